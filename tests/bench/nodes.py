"""What the cluster wing costs beside the work: python tests/bench/nodes.py [overhead|memory|scaling|listing|status] ...

overhead: null units through two null stages on a local Ray, at several counts: seconds a unit at steady state (between the first and
the last unit out) and the driver's memory, and by how much it grew from the first count to the last. memory: the same stages in windows of so many units, and the
driver after each: what it holds, what of that the C library would give back, Python's objects; counts: units a window, windows. scaling: units a second of one worker
that computes on one core and of two, at steady state, in turns within one run; counts: units a turn, turns. listing: how long a resume
takes to see what a ledger of so many units lacks. status: how long one look at a run takes that is making so many.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import cluster.runner as runner_module
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
    ends: list[int] = []
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
            ends.append(max(peak, now))
            print(
                f"{done:8} {first - began:12.1f} {each:10.1f} {max(peak, now) / 2**20:17.0f} {now / 2**20:11.0f}",
                flush=True,
            )
    finally:
        runner.close()
    grown = (ends[-1] - ends[0]) / 2**20
    print(f"driver's peak from {counts[0]} to {counts[-1]} units: {grown:+.0f} MiB (target: less than 100)")


def memory(each: int, windows: int) -> None:
    """Tells what grows with windows (Ray's classes, threads) from what grows with units, on a machine too busy for 100,000 units."""
    import ctypes
    import gc

    runner_module._WINDOW_UNITS = each
    process, clib = psutil.Process(), ctypes.CDLL("libc.so.6")
    runner = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "bench"))
    held: list[float] = []
    print(f"{'units':>8} {'driver MiB':>11} {'without what could be given back':>33} {'objects':>9} {'threads':>8}")
    try:
        for done, _ in enumerate(runner.run([null_stage("one"), null_stage("two")], units(each * windows)), 1):
            if done % each:
                continue
            rss = process.memory_info().rss / 2**20
            gc.collect()
            clib.malloc_trim(0)
            held.append(process.memory_info().rss / 2**20)
            print(
                f"{done:8} {rss:11.1f} {held[-1]:33.1f} {len(gc.get_objects()):9} {process.num_threads():8}", flush=True
            )
    finally:
        runner.close()
    half = len(held) // 2
    a_window = (held[-1] - held[half]) / max(1, len(held) - 1 - half)
    print(f"{a_window:+.2f} MiB a window of {each} units in the second half of them")


WORK_S = 0.25


def busy_stage(rounds: int, workers: int) -> Stage:
    """Hashes in pure Python's hands: one core, little memory, nothing that a thread pool could share."""

    def work(rows: list[Row]) -> list[Row]:
        burn(rounds)
        return rows

    return Stage("busy", lambda: work, workers=workers, cpus=1)


def burn(rounds: int) -> None:
    data = b"x"
    for _ in range(rounds):
        data = hashlib.sha256(data).digest()


def scaling(count: int, turns: int) -> None:
    """The ratio of the two, each at steady state; what limits it besides us is how much the cores share (clock, threads of one core)."""
    rounds = 10_000
    while (spent := timed(rounds)) < WORK_S / 4:
        rounds *= 2
    rounds = int(rounds * WORK_S / spent)
    bare = two_processes(rounds, 12)
    runner = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "bench"))
    rates: dict[int, list[float]] = {1: [], 2: []}
    try:
        for turn in range(turns):
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                out = [time.perf_counter() for _ in runner.run([busy_stage(rounds, workers)], units(count))]
                # The first units come while the last worker may still be opening its stage.
                steady = out[len(out) // 4 :]
                rates[workers].append((len(steady) - 1) / (steady[-1] - steady[0]))
                print(
                    f"turn {turn + 1}: {workers} worker(s), {rates[workers][-1]:.2f} units/s of {WORK_S} s", flush=True
                )
    finally:
        runner.close()
    one, two = (statistics.median(rates[workers]) for workers in (1, 2))
    each = [b / a for a, b in zip(rates[1], rates[2], strict=True)]
    print(
        f"2 workers against 1: {two / one:.2f} times the units/s (median of {turns} turns; by turn {min(each):.2f} to {max(each):.2f}; "
        f"target 1.8). Two bare processes against one here: {bare:.2f}"
    )


def timed(rounds: int) -> float:
    began = time.perf_counter()
    burn(rounds)
    return time.perf_counter() - began


def two_processes(rounds: int, count: int) -> float:
    """What the machine itself gives: the same work in two plain processes, against one."""
    times: list[float] = []
    for workers in (1, 2):
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(burn, [1] * workers * 4))  # started
            began = time.perf_counter()
            list(pool.map(burn, [rounds] * count))
            times.append(time.perf_counter() - began)
    return times[0] / times[1]


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


def status(count: int) -> None:
    """Of a run that is making, 64 samples a unit, with ten units that nobody has counted."""
    import json

    from cluster.status import read_status
    from factory.recipe import SelectRecipe
    from factory.tally import Tally

    rows = [{"outcome": "made", "reason": "", "prompt": "p", "clip_score": 0.5}] * 64
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "dataset"
        (data / "ledger").mkdir(parents=True)
        (data / "index").mkdir()
        phase = {"steps": 0, "batch_images": 1}
        recipe = {"name": "bench", "trainer": {"adapt": phase, "distill": phase}, "export": {"targets": []}}
        (data.parent / "run.json").write_text(json.dumps({"recipe": recipe}))
        pq.write_table(pa.table({"id": pa.array(range(2 * count * 64)).cast(pa.string())}), data / "plan.parquet")
        tally, first = Tally(SelectRecipe()), data
        for i in range(count):
            entry = data / "ledger" / f"unit-{i:05d}.parquet"
            if i % 50_000:  # file systems limit the names of one file
                os.link(first, entry)
            else:
                first = entry
                pq.write_table(pa.Table.from_pylist(rows), entry)
            if i < count - 10:
                tally.add(i, rows if i < 5 else ())
        facts = {
            "when": time.time(),
            **tally.facts(),
            "stages": [],
            "per_s": 1.0,
            "eta_s": None,
            "foretold": {},
            "told": [],
        }
        for counted in (True, False):
            if counted:
                (data / "index" / "live.json").write_text(json.dumps(facts))
            else:
                (data / "index" / "live.json").unlink()
            took: list[float] = []
            for _ in range(5 if counted else 1):
                began = time.perf_counter()
                read_status(data.parent)
                took.append(time.perf_counter() - began)
            what = "make has counted all but ten" if counted else "nobody has counted them"
            print(f"{count} units, {what}: a look takes {statistics.median(took):.2f} s (median of {len(took)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["overhead", "memory", "scaling", "listing", "status"])
    parser.add_argument("counts", type=int, nargs="*")
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    print(f"{' '.join(sys.argv)}; commit {commit}, {platform.machine()}, {os.cpu_count()} cores, load {load:.1f}")
    if asked.what == "overhead":
        overhead(asked.counts or [1000, 10_000, 100_000])
    elif asked.what == "memory":
        each, windows = (*asked.counts, *(64, 12)[len(asked.counts) :])
        memory(each, windows)
    elif asked.what == "scaling":
        count, turns = (*asked.counts, *(120, 5)[len(asked.counts) :])
        scaling(count, turns)
    elif asked.what == "status":
        status((asked.counts or [100_000])[0])
    else:
        listing((asked.counts or [1_000_000])[0])


if __name__ == "__main__":
    main()
