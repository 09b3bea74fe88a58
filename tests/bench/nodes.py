"""What the cluster wing costs beside the work: python tests/bench/nodes.py [overhead|listing] ...

overhead: null units through two null stages on a local Ray, at several counts: seconds a unit at steady state (between the first and
the last unit out) and the driver's memory. listing: how long a resume takes to see what a ledger of so many units lacks.
"""

from __future__ import annotations

import argparse
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

from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay
from cluster.stage import PENDING, Row, Stage, Unit


def units(count: int) -> Iterator[Unit]:
    """Of one row each."""
    for i in range(count):
        yield Unit(f"unit-{i:06d}", [{"id": str(i), "outcome": PENDING, "reason": ""}])


def null_stage(name: str) -> Stage:
    def null(rows: list[Row]) -> list[Row]:
        return rows

    return Stage(name, lambda: null, cpus=0.5)


def overhead(counts: list[int]) -> None:
    process, peak = psutil.Process(), 0
    runner = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "bench"))
    print(f"{'units':>8} {'first out s':>12} {'ms a unit':>10} {'driver MiB, peak':>17} {'at the end':>11}")
    try:
        for count in counts:
            began, first, done = time.perf_counter(), 0.0, 0
            for _ in runner.run([null_stage("one"), null_stage("two")], units(count)):
                done += 1
                first = first or time.perf_counter()
                if done % 50 == 0:
                    peak = max(peak, process.memory_info().rss)
            each = (time.perf_counter() - first) / max(1, done - 1) * 1000
            now = process.memory_info().rss
            print(
                f"{done:8} {first - began:12.1f} {each:10.1f} {max(peak, now) / 2**20:17.0f} {now / 2**20:11.0f}",
                flush=True,
            )
    finally:
        runner.close()


def listing(count: int) -> None:
    from factory.plan import PLAN
    from factory.units import read_units, units_left

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ledger").mkdir()
        pq.write_table(pa.table({"id": pa.array(range(count)).cast(pa.string())}), folder / PLAN)
        for i in range(count):
            if i % 1000:
                os.close(os.open(folder / "ledger" / f"unit-{i:05d}.parquet", os.O_CREAT | os.O_WRONLY))
        began = time.perf_counter()
        left = units_left(folder, 1)
        listed = time.perf_counter() - began
        found = sum(1 for _ in read_units(folder, 1, left))
        read = time.perf_counter() - began - listed
        print(f"{count} units planned, {found} left: seen in {listed:.2f} s, read from the plan in {read:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["overhead", "listing"])
    parser.add_argument("counts", type=int, nargs="*")
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    print(f"{' '.join(sys.argv)}; commit {commit}, {platform.machine()}, {os.cpu_count()} cores, load {load:.1f}")
    if asked.what == "overhead":
        overhead(asked.counts or [1000, 10_000, 100_000])
    else:
        listing((asked.counts or [1_000_000])[0])


if __name__ == "__main__":
    main()
