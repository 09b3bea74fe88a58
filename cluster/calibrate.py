# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""What a finished run tells of its machine: rates free of start-up, the time to open the models, bytes a picture, the units' spread.

Reads files only: `run.json`, the log, when the ledger's entries were written (their mtimes), sizes, the logs of training. They hold for the machine
that ran it, with as many workers as it had; on one machine workers share its cores, so more of them are slower than this says.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import EdgeFusionError
from cluster.events import read_events
from cluster.needs import Need

NeedsOf = Callable[[dict[str, Any]], Sequence[Need]]
"""What the stages of `make` need by a recipe, as plain values, that a run noted; the wings that know its keys tell."""
START_S = 20.0
WINDOW_S = 5.5
DRIVER_S = 0.015
LISTING_S = 1.8e-6
"""Of this project's 2-core machine: docs/cluster.md says by which commands."""
_BESIDE = ("crop", "score")
_PAUSE = 10
"""Times the median unit: so long a gap is no work but a restart."""


@dataclass(frozen=True)
class Measured:
    """Of one worker; rates in images a second."""

    make_per_s: float
    phases: dict[str, float]
    """Empty where the number of training workers may have changed on the way (`cluster.train_workers_min`)."""
    load_s: float | None
    """From the begin of make to the begin of the first unit, less `START_S` and `WINDOW_S` on Ray; None if the run was interrupted."""
    unit_spread: float
    image_bytes: float
    units: int
    """That the rate was taken from."""
    beside: Mapping[str, float] = field(default_factory=dict[str, float])
    """Rates of the stages that go on beside it, score and crop, as far as the run told them."""


def measure(run: Path, needs_of: NeedsOf, start_s: float = START_S, window_s: float = WINDOW_S) -> Measured:
    """Raises EdgeFusionError if `run` holds no run that made at least three units a worker, or one whose workers cannot be counted."""
    try:
        facts: dict[str, Any] = json.loads((run / "run.json").read_text())
        recipe: dict[str, Any] = facts["recipe"]
        on_ray = recipe["cluster"]["runner"] == "ray"
        make = recipe["factory"]["make"]
        trainers = int(recipe["cluster"]["train_workers"]) if on_ray else 1
        known = not on_ray or recipe["cluster"].get("train_workers_min") in (None, trainers)
        unit_images, took = int(make["unit_images"]), float(facts["seconds"]["make"])
    except (OSError, ValueError, KeyError):
        raise EdgeFusionError(
            "holds no run that made its data set", where=str(run), remedy="Give the --out folder of a finished run"
        ) from None
    workers = _workers(run, needs_of(recipe)) if on_ray else 1
    found = sorted((p.stat().st_mtime, _rows(p), p.stat().st_size) for p in (run / "dataset" / "ledger").glob("unit-*"))
    times = [when for when, rows, _ in found if rows == unit_images]
    each, paused = unit_seconds(times, workers)
    if not each:
        raise EdgeFusionError(
            f"made {len(times)} whole units of {unit_images} pictures, and a rate takes {3 * workers}",
            where=str(run),
            remedy="Take a longer run, or one with a smaller factory.make.unit_images",
        )
    mean = statistics.fmean(each)
    opening = took - (times[-1] - times[0]) - mean - (start_s + window_s if on_ray else 0.0)
    pictures = sum(p.stat().st_size for p in (run / "dataset" / "pictures").glob("unit-*"))
    return Measured(
        unit_images / mean,
        _phase_rates(run, trainers) if known else {},
        None if paused else max(0.0, opening),
        statistics.pstdev(math.log(s) for s in each),
        (pictures + sum(size for *_, size in found)) / sum(rows for _, rows, _ in found),
        len(each),
        _stage_rates(run, recipe),
    )


def _workers(run: Path, needs: Sequence[Need]) -> int:
    """Workers of the stage that sets the pace: what draws, or writes captions, or where neither is done crops."""
    need = next(need for name in ("render", "caption", "crop") for need in needs if need.stage == name)
    if (need.workers_min or need.workers) < need.workers:
        raise EdgeFusionError(
            f"made its pictures with {need.workers_min} to {need.workers} workers of stage {need.stage}, and nothing says how many when",
            where=str(run),
            remedy=f"Take a run whose recipe has no cluster.stages.{need.stage}.workers_min",
        )
    return need.workers


def unit_seconds(times: Sequence[float], workers: int) -> tuple[list[float], bool]:
    """(seconds of a unit, as one worker took it, for each unit but the first `workers`; whether longer pauses were left out).

    `times`: when units were committed, ascending. Of equal workers in step each commits every `workers`-th; their mean is exact for whole
    rounds, which is why units of an unfinished last round are left out. Empty for fewer than three rounds.
    """
    rounds = len(times) // workers
    if rounds < 3:
        return [], False
    gaps = [times[i + workers] - times[i] for i in range((rounds - 1) * workers)]
    usual = statistics.median(gaps)
    worked = [gap for gap in gaps if 0 < gap <= _PAUSE * usual]
    return worked, len(worked) < len(gaps)


def _stage_rates(run: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Of one worker at work: by the log, which has all units of all starts, or by what the last start counted."""
    done: dict[str, list[float]] = {}
    if recipe["cluster"].get("log", "units") == "units":  # of `problems` only the units in which something died
        for event in read_events(run):
            if event["event"] == "unit":
                sums = done.setdefault(str(event["stage"]), [0.0, 0.0])
                sums[0], sums[1] = sums[0] + float(event["rows"]), sums[1] + float(event["seconds"])
    if not done:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            live: dict[str, Any] = json.loads((run / "dataset" / "index" / "live.json").read_text())
            done = {str(row["stage"]): [float(row["samples"]), float(row["seconds"])] for row in live["stages"]}
    return {name: done[name][0] / done[name][1] for name in _BESIDE if name in done and min(done[name]) > 0}


def _phase_rates(run: Path, trainers: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for log in sorted((run / "training").glob("*/metrics.jsonl")):
        rates = [json.loads(line)["images_per_s"] for line in log.read_text().splitlines() if line.endswith("}")]
        found |= {log.parent.name: rates[-1] / trainers} if rates else {}
    return found


def _rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0
