"""The progress of make as it goes: for the bars and log lines of the run itself, and in `index/live.json` for `edgefusion status`.

The file says which units it counts, so whoever reads it looks at few ledger files himself, whatever the size of the run. It can be
deleted at any time: the next run counts anew, beside its work.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.live import Facts, Flow
from cluster.machine import every
from cluster.runner import Runner
from cluster.stage import Unit
from cluster.storage import publish_bytes
from factory.balance import lacks
from factory.foretell import foretell, lines
from factory.recipe import FactoryRecipe
from factory.tally import Key, Strata, Tally, combination, read_outcomes
from factory.units import first_units, plan_files, read_parts, unit_name, unit_sizes

LIVE = "index/live.json"
_WRITE_S = 3.0
_CATCH_UP_S = 5.0
"""How long a run that is through goes on counting what earlier runs left."""
_MADE = "made"

Show = Callable[[list[str]], None]
"""Given the lines that stand below the bar."""


class Live:
    """What a run of make has done and foretells; counts units as they are committed, and those of runs before beside that."""

    def __init__(self, recipe: FactoryRecipe, folder: Path, runner: Runner, todo: Iterable[int]) -> None:
        self._folder, self._runner = folder, runner
        self._each = getattr(recipe.plan, "images_per_prompt", 1)
        sizes = unit_sizes(folder, recipe.make.unit_images)
        left = set(todo)
        self._planned, self._left = sum(sizes), sum(sizes[number] for number in left)
        ledger = set(range(len(sizes))) - left
        strata = Strata(tuple(first_units(folder, recipe.make.unit_images)), bool(recipe.make.teachers))
        self.tally = Tally.read(read_live(folder), recipe.select, ledger, strata)
        self._strata = {} if strata.one else _planned_strata(folder, strata)
        self._earlier = sorted(number for number in ledger if not self.tally.covers(number))
        self._combinations = _planned_combinations(folder, recipe)
        for rule, planned in zip(recipe.select.wanted, self._combinations, strict=True):
            lacks(rule, planned, {})  # more combinations than anybody can mean are told now, not when all is made
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._stages: list[Facts] = []
        self._flow: Flow | None = None
        self._began, self._done = time.monotonic(), 0

    def add(self, unit: Unit) -> None:
        """A unit that was committed just now."""
        with self._lock:
            self.tally.add(int(unit.id.rpartition("-")[2]), unit.rows)
            # Units come out together as the workers of the widest stage end together. The first ones took all the time until now.
            widest = max((row["workers"] for row in self._stages), default=1)
            self._flow = self._flow or Flow([(_MADE, widest)])
            self._flow.end(_MADE, unit.id, len(unit.rows), time.monotonic() - self._began)
            self._done += len(unit.rows)

    def facts(self) -> dict[str, Any]:
        """Plain JSON: the tally, `stages`, `foretold`, and the rate and time left of make as a whole."""
        # Once the stages are gone, what they did last is still worth showing.
        self._stages = self._runner.live() or self._stages
        with self._lock:
            per_s = self._flow.read()[0]["per_s"] if self._flow else None
            waits = self._left - self._done
            under_way = sum(row["working"] + (row["waiting"] or 0) for row in self._stages)
            stages = [
                {**row, "waiting": max(0, waits - under_way)} if row["waiting"] is None else row for row in self._stages
            ]
            return {
                "when": round(time.time(), 1),
                **self.tally.facts(),
                "stages": stages,
                "per_s": per_s,
                "eta_s": round(waits / per_s, 1) if per_s else None,
                "foretold": foretell(self.tally, self._planned, per_s, self._combinations, self._each, self._strata),
            }

    def catch_up(self) -> None:
        """Count the units that earlier runs left uncounted; ends early when the run does."""
        for number in self._earlier:
            if self._stop.is_set():
                return
            with contextlib.suppress(CorruptShard, OSError):
                rows = read_outcomes(self._folder / "ledger" / f"{unit_name(number)}.parquet")
                with self._lock:
                    self.tally.add(number, rows)

    def end(self) -> None:
        self._stop.set()


@contextmanager
def following(recipe: FactoryRecipe, folder: Path, runner: Runner, todo: list[int], show: Show) -> Generator[Live]:
    """Write and show what happens until the block ends."""
    live = Live(recipe, folder, runner, todo)

    def tell() -> None:
        facts = live.facts()
        facts["told"] = told(facts)
        show(facts["told"])
        # A full disk is told by the work itself.
        with contextlib.suppress(EdgeFusionError, OSError):
            publish_bytes(folder / LIVE, (json.dumps(facts) + "\n").encode())

    earlier = threading.Thread(target=live.catch_up, daemon=True)
    with every(_WRITE_S, tell):
        earlier.start()
        try:
            yield live
            earlier.join(_CATCH_UP_S)
        finally:
            live.end()
            earlier.join()


def told(facts: dict[str, Any]) -> list[str]:
    """The lines below the bar: a stage after the other, then what is foretold."""
    at_work = [row for row in facts["stages"] if row["per_s"] is not None or row["working"]]
    if all(row["per_s"] is None for row in at_work):
        return [
            "no batch is through yet: models are being loaded, or their first pictures made",
            *lines(facts["foretold"]),
        ]
    return [" > ".join(map(_stage, at_work)), *lines(facts["foretold"])]


def _stage(row: Facts) -> str:
    per_s = row["per_s"]
    rate = "" if per_s is None else f" {per_s:,.0f}/s" if per_s >= 100 else f" {per_s:.3g}/s"
    more = [
        *([f"{row['busy']:.0%} busy"] if row["busy"] is not None else []),
        *([f"{row['waiting']:,} waiting"] if row["waiting"] else []),
    ]
    return f"{row['stage']}{rate}" + (f" ({', '.join(more)})" if more else "")


def read_live(folder: Path) -> dict[str, Any]:
    """What the last run wrote; empty if there is nothing that can be read."""
    try:
        found = json.loads((folder / LIVE).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _planned_strata(folder: Path, strata: Strata) -> Counter[Key]:
    """How many samples of each stratum the plan has."""
    found = Counter[Key]()
    for file, path in enumerate(plan_files(folder)):
        for row in (row for part in read_parts(path, ["attributes"]) for row in _counted(part)):
            found[strata.key(file, row["attributes"])] += row["count_all"]
    return found


def _planned_combinations(folder: Path, recipe: FactoryRecipe) -> list[Counter[Key]]:
    """For each rule of `wanted`: how many samples of each combination the plan has."""
    found = [Counter[Key]() for _ in recipe.select.wanted]
    if not found:
        return found
    for path in plan_files(folder):
        for row in (row for part in read_parts(path, ["group", "attributes"]) for row in _counted(part)):
            for rule, counts in zip(recipe.select.wanted, found, strict=True):
                counts[combination(row["group"], row["attributes"], rule.attributes)] += row["count_all"]
    return found


def _counted(part: pa.Table) -> list[dict[str, Any]]:
    """Its different rows, each with how many there are (`count_all`)."""
    return part.group_by(part.column_names).aggregate([([], "count_all")]).to_pylist()
