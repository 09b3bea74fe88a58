# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""What a run has done and how fast, read from the files it leaves: from any terminal, while it runs and after it died.

Reads only. Knows the layout of an output folder, not what the files are for: `run.json`, `heartbeat.json`, the ledger's columns
`outcome` and `reason`, and the logs `training/*/metrics.jsonl`. Of a large run `dataset/index/live.json` has counted most of the ledger,
so that few of its files are read.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.events import last_problems
from cluster.heartbeat import read_heartbeat
from cluster.nearest import wrong_folder
from cluster.usage import files_of_usage, read_usage

Facts = dict[str, Any]
_PHASES = ("adapt", "distill")
_UNIT = re.compile(r"unit-([0-9]+)\.parquet")
_READ_UNITS = 2048
"""Ledger entries that one look reads beyond those that make has counted."""
_PROBLEMS = 5
"""Of the log, the last."""
_STALE_S = 60.0
"""What make said longer ago is no rate of now."""


def read_status(out: Path, wait: Callable[[str], None] | None = None) -> Facts:
    """Everything `edgefusion status` shows; numbers in seconds and items a second, None where nothing is known.

    `wait` is told, in words, before this waits to see whether the driver lives (`read_heartbeat`). Raises EdgeFusionError if `out` holds no run.
    """
    try:
        run: Facts = json.loads((out / "run.json").read_text())
        recipe: Facts = run["recipe"]
    except (OSError, ValueError, KeyError):
        raise wrong_folder(out, "run.json", "holds no run", "Give the --out folder of edgefusion run") from None
    beat = read_heartbeat(out, wait)
    seconds: dict[str, float] = run.get("seconds", {})
    ledger = _ledger(out / "dataset")
    live = _live(out / "dataset", ledger, beat)
    outcomes, reasons, unreadable, unseen = _outcomes(out / "dataset", ledger, live)
    stages = [
        _step(out, "plan", out / "dataset" / "plan.parquet", seconds),
        _make(out, outcomes, seconds, "make" in run.get("cut_off", {}), beat, ledger, live),
        _step(out, "select", out / "dataset" / "manifest.parquet", seconds),
        *(_phase(out, phase, recipe) for phase in _PHASES if recipe["trainer"][phase]["steps"]),
        _step(out, "student", out / "student", seconds),
        _step(out, "samples", out / "samples", seconds),
        *(
            _step(out, f"export {target}", out / "export" / target / "bundle.json", {})
            for target in recipe["export"]["targets"]
        ),
        *([_step(out, "pages", out / "compare.html", seconds)] if _has_pages(out, recipe) else []),
        _step(out, "report", out / "report.html", seconds),
    ]
    state = beat.get("state", "unknown")
    current = str(beat.get("step", "")) if state in ("running", "died", "stopped") else ""
    for stage in stages:
        if stage["state"] != "done" and current and stage["stage"].split()[0] in (current, f"{current}:"):
            stage["state"] = "running" if state == "running" else state
    _one_phase_at_a_time(stages)
    if state != "running":
        for stage in stages:
            stage["eta_s"] = None
    return {
        "folder": str(out),
        "recipe": recipe["name"],
        "state": state,
        "step": current,
        "why": beat.get("why", ""),
        "pid": beat.get("pid"),
        "host": beat.get("host"),
        "heartbeat_age_s": round(beat["age_s"], 1) if beat else None,
        "clock_ahead_s": beat.get("clock_ahead_s"),
        "silent": state == "running" and beat.get("silent", False),
        "stages": stages,
        "samples": outcomes,
        "units": len(ledger),
        "kept_share": _share(outcomes, "kept"),
        "make": _at_work(live, outcomes),
        "reasons": reasons,
        "asked": _asked(out / "dataset" / "plan"),
        "asked_for_captions": _asked(out / "dataset" / "captions"),
        "problems": last_problems(out, _PROBLEMS),
        "suspects": _suspects(out / "dataset" / "attempts"),
        "unreadable": unreadable,
        "units_not_counted": unseen,
    }


def _has_pages(out: Path, recipe: Facts) -> bool:
    """Whether the step is one of this run; where no bundle can be measured it leaves nothing, and the report follows."""
    return bool(recipe["export"].get("pages")) and (
        (out / "compare.html").exists() or not (out / "report.html").exists()
    )


def _asked(folder: Path) -> dict[str, Any] | None:
    """What servers were asked for the files in there; None if nothing was."""
    usage = read_usage(files_of_usage(folder))
    return asdict(usage) if usage.answers else None


def _ledger(data: Path) -> dict[int, str]:
    """Unit number to the name of its ledger entry, by one listing."""
    try:
        with os.scandir(data / "ledger") as listing:
            names = [entry.name for entry in listing]
    except OSError:
        return {}
    found = ((_UNIT.fullmatch(name), name) for name in names)
    return {int(match[1]): name for match, name in found if match}


def _live(data: Path, ledger: dict[int, str], beat: Facts) -> Facts:
    """What make last said; empty if it never did, or if units that it counted were given back since."""
    try:
        found: Facts = json.loads((data / "index" / "live.json").read_text())
        upto, more = int(found["upto"]), {int(number) for number in found["more"]}
        # Numbers are told once each, so counting those below `upto` shows a gap.
        whole = sum(number < upto for number in ledger) == upto and more <= ledger.keys()
        # The driver wrote both files: by its own clock one is so much older than the other, whatever this host's clock says.
        now = float(beat["when"]) + beat["age_s"] if beat else time.time()
        return {**found, "more": more, "age_s": max(0.0, now - float(found["when"]))} if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _at_work(live: Facts, outcomes: Facts) -> Facts | None:
    """The stages of make and what it will keep, as it last said; None once select has said it."""
    if not live or not outcomes["made"]:
        return None
    return {name: live.get(name) for name in ("age_s", "stages", "per_s", "eta_s", "foretold", "told", "fallen")}


def _step(out: Path, name: str, proof: Path, seconds: dict[str, float]) -> Facts:
    state = "done" if proof.exists() else "waiting"
    return _row(name, state, seconds=seconds.get(name) if state == "done" else None)


def _row(name: str, state: str, **more: Any) -> Facts:
    empty = {"done": None, "of": None, "items": "", "per_s": None, "seconds": None, "eta_s": None}
    return {"stage": name, "state": state, **empty, **more}


def _make(
    out: Path,
    outcomes: Facts,
    seconds: dict[str, float],
    cut_off: bool,
    beat: Facts,
    ledger: dict[int, str],
    live: Facts,
) -> Facts:
    """`cut_off`: a start was stopped in it, whose pictures are there and whose seconds are not."""
    done, planned = outcomes["in_ledger"], outcomes["planned"]
    state = "done" if planned and done >= planned else "waiting"
    if state == "done" and seconds.get("make"):
        rate = None if cut_off else done / seconds["make"]
    elif live:
        rate = live.get("per_s") if live["age_s"] < _STALE_S else None
    else:
        rate = _ledger_rate([out / "dataset" / "ledger" / name for name in ledger.values()], beat)
    left = (planned - done) / rate if rate and planned and state != "done" else None
    return _row(
        "make",
        state,
        done=done,
        of=planned or None,
        items="pictures",
        per_s=rate and round(rate, 3),
        seconds=seconds.get("make"),
        eta_s=left and round(left, 1),
    )


def _ledger_rate(paths: list[Path], beat: Facts) -> float | None:
    """Pictures a second between this run's first and last commit; before that models were loaded."""
    times: list[tuple[float, Path]] = []
    for path in paths:
        with suppress(OSError):  # given back since the listing (retry-failed, repair)
            times.append((path.stat().st_mtime, path))
    times.sort()
    # Files are dated by the storage's clock, and so is the step's beginning where the driver could tell.
    began = beat.get("step_began_there") or beat.get("step_began", 0.0)
    times = [(when, path) for when, path in times if when >= began]
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    rows = sum(_rows(path) for _, path in times[1:])
    return rows / (times[-1][0] - times[0][0])


def _rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0


def _phase(out: Path, phase: str, recipe: Facts) -> Facts:
    settings: Facts = recipe["trainer"][phase]
    log = out / "training" / phase / "metrics.jsonl"
    last = _last_line(log)
    step, steps = int(last.get("step", 0)), int(settings["steps"])
    done = (out / "training" / phase / "unet").exists()
    per_s = float(last.get("images_per_s") or 0) / settings["batch_images"] or None
    return _row(
        f"train: {phase}",
        "done" if done else "waiting",
        done=step,
        of=steps,
        items="steps",
        per_s=per_s and round(per_s, 3),
        seconds=_took(log, last, settings["batch_images"]) if done else None,
        eta_s=round((steps - step) / per_s, 1) if per_s and not done else None,
        loss=last.get("loss"),
        images_per_s=last.get("images_per_s"),
        memory_gib=last.get("memory_gib"),
        gpu_percent=last.get("gpu_percent"),
    )


def _took(log: Path, last: Facts, batch_images: int) -> float | None:
    """Seconds of a phase from its first step to its last; None where it was interrupted, or where an older log does not say."""
    if last.get("began_step") != 0:
        return None
    try:
        with log.open() as file:
            first: Facts = json.loads(file.readline())
        # A line is written at the end of its step.
        return round(float(last["time_s"]) - float(first["time_s"]) + batch_images / float(first["images_per_s"]), 1)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _one_phase_at_a_time(stages: list[Facts]) -> None:
    """Training has one step name for both phases; only the first unfinished one can be at work."""
    active = [stage for stage in stages if stage["stage"].startswith("train:") and stage["state"] != "done"]
    for stage in active[1:]:
        stage["state"] = "waiting"


def _last_line(path: Path) -> Facts:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found: Any = json.loads(line)
        except ValueError:
            continue  # cut short, by a crash or by being read while written
        if isinstance(found, dict):
            return cast(Facts, found)
    return {}


def _outcomes(data: Path, ledger: dict[int, str], live: Facts) -> tuple[Facts, dict[str, int], int, int]:
    """(samples by outcome, reasons with counts, files that could not be read, units that nobody has counted yet)."""
    plan, selection = data / "plan.parquet", data / "selection.parquet"
    unreadable, found, reasons = 0, Counter[str](), Counter[str]()
    chosen = selection.exists() and (data / "manifest.parquet").exists()
    paths = [selection]
    if not chosen:
        found.update(live.get("outcomes", {}))
        reasons.update(live.get("reasons", {}))
        upto, more = live.get("upto", 0), live.get("more", set[int]())
        paths = [data / "ledger" / ledger[n] for n in sorted(ledger) if n >= upto and n not in more]
    # While make counts what an earlier version left, this one need not count it too.
    unseen = max(0, len(paths) - _READ_UNITS) if live else 0
    for path in paths[: len(paths) - unseen]:
        try:
            table = pq.read_table(path, columns=["outcome", "reason"])
        except (OSError, pa.ArrowInvalid):
            unreadable += 1
            continue
        for row in table.group_by(["outcome", "reason"]).aggregate([([], "count_all")]).to_pylist():
            found[row["outcome"]] += row["count_all"]
            if row["reason"]:
                reasons[f"{row['outcome']}: {reason_kind(row['reason'])}"] += row["count_all"]
    refills = sorted(data.glob("plan-refill-*.parquet"))
    planned = sum(_rows(path) for path in [plan, *refills]) if plan.exists() else 0
    named = {name: found[name] for name in ("made", "kept", "rejected", "dead")}
    return {"planned": planned, "in_ledger": found.total(), **named}, dict(reasons.most_common(20)), unreadable, unseen


def reason_kind(reason: str) -> str:
    """Seven words tell reasons apart; what follows, and what stands in brackets, is about the one sample."""
    words = reason.split(" (")[0].split()
    return " ".join(words[:7]) + (" ..." if len(words) > 7 else "")


def _share(outcomes: Facts, name: str) -> float | None:
    total = outcomes["kept"] + outcomes["rejected"] + outcomes["dead"]
    return round(outcomes[name] / total, 4) if total and not outcomes["made"] else None


def _suspects(notes: Path) -> list[Facts]:
    """Units whose worker died before they were through."""
    found: list[Facts] = []
    for path in sorted(notes.glob("*.json")):
        try:
            note: Facts = json.loads(path.read_text())
            deaths, trying = int(note["deaths"]), len(note["at_risk"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the unit is through, or its note was just replaced
        if deaths:
            stage, _, unit = path.stem.partition(".")
            found.append({"unit": unit, "stage": stage, "deaths": deaths, "rows_tried_together": trying})
    return found
