"""What a run of many samples costs the process that drives it: PYTHONPATH=. python tests/bench/driver.py [SAMPLES ...] (10000 1000000 if left out)

`factory make` as it is (plan, units, quarantine, ledger, live progress) on a local Ray, with stages that draw and score nothing in place of
the models; a process of its own for each count. Its peak memory, and that peak's growth from the first count to the last (aim: flat).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import factory.make as make_module
from chain import Recipe
from cluster.recipe import load_recipe
from cluster.runner import OnRay
from cluster.stage import Row, Stage
from factory.plan import PLAN, PLAN_SCHEMA, resolve_models
from factory.recipe import MakeRecipe
from factory.stages import make_stages

REPOSITORY = Path(__file__).parent.parent.parent
ROWS_AT_ONCE = 50_000


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        return measure(int(sys.argv[2]), Path(sys.argv[3]))
    counts = [int(word) for word in sys.argv[1:]] or [10_000, 1_000_000]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    print(f"{'samples':>10} {'samples/s':>10} {'driver MiB, before':>19} {'peak':>6}", flush=True)
    peaks: list[float] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            # Written here, so that what the writing left behind is not counted.
            write_plan(Path(name) / PLAN, count)
            command = [sys.executable, __file__, "--measure", str(count), name]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(said.splitlines()[-1])
        peaks.append(found["peak"])
        print(f"{count:10,} {found['per_s']:10.0f} {found['before']:19.0f} {found['peak']:6.0f}", flush=True)
    print(f"the driver's peak from {counts[0]:,} to {counts[-1]:,} samples: {peaks[-1] - peaks[0]:+.0f} MiB")


def measure(count: int, folder: Path) -> None:
    """One run of the plan in `folder` in this process, printed as JSON; MiB."""
    recipe = load_recipe(Recipe, REPOSITORY / "recipes" / "pocket.yaml", ["cluster.log=off"])
    resolve_models(recipe.factory)
    make_module.make_stages = null_stages
    process, peak = psutil.Process(), 0
    runner = OnRay(recipe.cluster)
    before, began = process.memory_info().rss, time.perf_counter()

    def seen(_: int) -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    try:
        make_module.make(recipe.factory, folder, runner, seen)
    finally:
        runner.close()
    per_s = count / (time.perf_counter() - began)
    print(json.dumps({"per_s": per_s, "before": before / 2**20, "peak": peak / 2**20}))


def write_plan(path: Path, count: int) -> None:
    with pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd") as sink:
        for start in range(0, count, ROWS_AT_ONCE):
            rows = list(planned(start, min(count, start + ROWS_AT_ONCE)))
            sink.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))


def planned(start: int, end: int) -> Iterator[Row]:
    for i in range(start, end):
        yield {
            "id": hashlib.sha256(b"%d" % i).hexdigest(),
            "prompt": f"a flat picture of subject {i % 240}, seen from the side, no. {i}",
            "group": "things",
            "attributes": json.dumps({"subject": f"subject {i % 240}", "style": "flat"}),
            "seed": i,
            "outcome": "pending",
            "reason": "",
        }


def null_stages(recipe: MakeRecipe, folder: Path) -> list[Stage]:
    """Nothing drawn, nothing seen; committed as ever."""

    def render(rows: list[Row]) -> list[Row]:
        return [{**row, "picture": row["id"].encode() * 8} for row in rows]

    def score(rows: list[Row]) -> list[Row]:
        facts = {"clip_score": 0.5, "embedding": bytes(512), "phash": "0" * 16, "colours": bytes(12)}
        return [{**row, **facts} for row in rows]

    return [
        Stage("render", lambda: render, cpus=0.5),
        Stage("score", lambda: score, cpus=0.5),
        make_stages(recipe, folder)[-1],
    ]


if __name__ == "__main__":
    main()
