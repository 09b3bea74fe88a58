"""The simulation against real runs of `make` on a local Ray: PYTHONPATH=. python tests/bench/simulate.py [sleep|cpu|pocket] [--only NAME ...]

Calibrates on null units (Ray's start, a window's start, the driver), on ONE short run of one worker, and on a few units whose worker is
killed once (how long Ray takes to replace it). Then it predicts, and really runs: two workers; workers killed at a known rate; one of two
slower by a known factor; slow storage; small windows. Prints predicted against measured and whether each is within 15%.

The work of a picture: `sleep` only waits, so it tests scheduling and recovery, whatever else the machine does, and says nothing of shared cores; `cpu`
hashes on one core, `pocket` paints with the embedded teacher and scores: both want two idle cores. Ledger, storage, quarantine and Ray are the real
ones. Takes some ten minutes; `--units` sets the length of the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

import cluster.runner
import factory.make
from cluster.calibrate import Measured, measure
from cluster.needs import Need
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay
from cluster.scenario import Scenario
from cluster.simulate import quantile, simulate
from cluster.stage import PENDING, Row, Stage, Unit, Worker
from cluster.storage import publish_bytes
from factory.plan import PLAN, make_plan, table_bytes
from factory.recipe import FactoryRecipe, MakeRecipe
from factory.units import planned_units

OPEN_S = 2.0
TARGET = 0.15
SLOWER = 2.0


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in a run; nothing by default."""

    lives_s: tuple[float, ...] = ()
    """Of the first worker that opens, of the second, ...: then it kills itself."""
    slow_workers: int = 0
    """The first to open take `SLOWER` times as long."""
    storage_mb_per_s: float = math.inf
    storage_latency_s: float = 0.0


@dataclass(frozen=True)
class Case:
    name: str
    workers: int = 2
    trouble: Trouble = field(default=Trouble())
    window_units: int = 2048
    deaths_per_hour: float = 0.0


class Log:
    """One line an event in a folder that all workers see; `claim` numbers those who ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self) -> int:
        for number in range(10_000):
            try:
                os.close(os.open(self.folder / f"opened-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return number
            except FileExistsError:
                continue
        raise AssertionError("ten thousand openings")

    def note(self, what: str) -> None:
        (self.folder / f"{what}-at-{time.time():.3f}").touch()

    def times(self, what: str) -> list[float]:
        return sorted(float(path.name.rpartition("-")[2]) for path in self.folder.glob(f"{what}-at-*"))


def troubled(stage: Stage, workers: int, trouble: Trouble, log: Log) -> Stage:
    """The stage, whose workers die and dawdle as told."""

    def open_it() -> Worker:
        number = log.claim()

        def die() -> None:
            log.note("died")
            os.kill(os.getpid(), signal.SIGKILL)

        if number < len(trouble.lives_s) and trouble.lives_s[number] < math.inf:
            timer = threading.Timer(trouble.lives_s[number], die)
            timer.daemon = True
            timer.start()
        worker, factor = stage.open(), SLOWER if number < trouble.slow_workers else 1.0
        log.note("opened")

        def work(rows: list[Row]) -> list[Row]:
            began = time.perf_counter()
            done = worker(rows)
            time.sleep((factor - 1) * (time.perf_counter() - began))
            return done

        return work

    return replace(stage, open=open_it, workers=workers)


def slow_commit(stage: Stage, folder: Path, trouble: Trouble) -> Stage:
    """The commit stage on a store of that speed: what it wrote is waited for."""

    def open_it() -> Worker:
        commit = stage.open()

        def work(rows: list[Row]) -> list[Row]:
            done = commit(rows)
            name = f"{rows[0]['unit']}.parquet"
            written = sum((folder / part / name).stat().st_size for part in ("pictures", "ledger"))
            time.sleep(trouble.storage_latency_s + written / (trouble.storage_mb_per_s * 1e6))
            return done

        return work

    return replace(stage, open=open_it)


def drawing(work: str, picture_s: float, rounds: int) -> Stage:
    """Pictures of noise, 64 x 64, each after so many seconds or rounds of hashing."""

    def open_it() -> Worker:
        time.sleep(OPEN_S)

        def draw(rows: list[Row]) -> list[Row]:
            from factory.stages import encode_picture, looks

            made: list[Row] = []
            for row in rows:
                if work == "sleep":
                    time.sleep(picture_s)
                else:
                    data = b"x"
                    for _ in range(rounds):
                        data = hashlib.sha256(data).digest()
                picture = np.random.default_rng(row["seed"]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                score = {"clip_score": 0.5, "embedding": b""}
                made.append({**row, "picture": encode_picture(picture, "png"), **score, **looks(picture)})
            return made

        return draw

    return Stage("draw", open_it, cpus=0.5)


class Bench:
    def __init__(self, work: str, units: int, unit_images: int, picture_s: float) -> None:
        self.work, self.units, self.unit_images, self.picture_s = work, units, unit_images, picture_s
        self.rounds = rounds_of(picture_s) if work == "cpu" else 0
        self.cluster = build_recipe(
            ClusterRecipe, {"cpus": 4, "max_failures": 1000}, "bench"
        )  # slots, so that all workers find a place; the cores are what they are
        self.recipe = build_recipe(
            FactoryRecipe,
            {
                "plan": {
                    "taxonomy": "zoo:taxonomy.yaml",
                    "prompts": units * unit_images,
                    "writer": {"kind": "transformers", "model": "zoo:writer"},
                },
                "make": {
                    "teacher": {
                        "kind": "diffusers",
                        "model": "zoo:teacher",
                        "steps": 12,
                        "size_px": 64,
                        "batch_images": unit_images,
                    },
                    "scorer": {"kind": "open_clip", "model": "zoo:clip"},
                    "unit_images": unit_images,
                    "threads": 1,
                },
            },
            "bench",
        )
        self.stages = factory.make.make_stages

    def null(self, count: int) -> float:
        """Sets `start_s` and `window_s` by null units through as many stages as making has; returns the driver's seconds a unit."""
        names = ["one", "two", "three"] if self.work == "pocket" else ["one", "two"]
        stages = [Stage(name, lambda: lambda rows: rows, cpus=0.1) for name in names]

        def once(runner: OnRay) -> tuple[float, float]:
            began = time.perf_counter()
            units = [Unit(f"unit-{i:05d}", [{"id": str(i), "outcome": PENDING, "reason": ""}]) for i in range(count)]
            out = [time.perf_counter() for _ in runner.run(stages, units)]
            return out[0] - began, (out[-1] - out[0]) / (count - 1)

        # The very first start also imports Ray Data; the runs that follow in this process do not.
        for _ in range(2):
            runner = OnRay(self.cluster)
            first, _ = once(runner)
            second, driver_s = once(runner)
            runner.close()
            self.start_s, self.window_s = max(0.0, first - second), second
        return driver_s

    def run(self, case: Case, units: int, folder: Path) -> tuple[float, Log]:
        """Seconds of the whole of `make`, Ray's start in it; leaves a folder that `measure` reads."""
        data, log = folder / "dataset", Log(folder / "log")
        log.folder.mkdir(parents=True)
        self.plan(data, units)

        def stages(recipe: MakeRecipe, data: Path) -> list[Stage]:
            real = self.stages(recipe, data)
            first = real[0] if self.work == "pocket" else drawing(self.work, self.picture_s, self.rounds)
            rest = real[1:-1] if self.work == "pocket" else []
            return [troubled(first, case.workers, case.trouble, log), *rest, slow_commit(real[-1], data, case.trouble)]

        factory.make.make_stages, cluster.runner.window_units = stages, lambda workers: case.window_units
        runner, began = OnRay(self.cluster), time.monotonic()
        try:
            factory.make.make(self.recipe, data, runner)
            took = time.monotonic() - began
        finally:
            runner.close()
        made = {"render_workers": case.workers, "unit_images": self.unit_images}
        facts = {"recipe": {"cluster": {"runner": "ray", "train_workers": 1}, "factory": {"make": made}}}
        (folder / "run.json").write_text(json.dumps({**facts, "seconds": {"make": took}}))
        return took, log

    def plan(self, data: Path, units: int) -> None:
        count = units * self.unit_images
        if self.work == "pocket":
            plan = self.recipe.plan.model_copy(update={"prompts": count})
            make_plan(self.recipe.model_copy(update={"plan": plan}), 0, data)
            return
        rows = [
            {
                "id": hashlib.sha256(b"%d" % i).hexdigest(),
                "prompt": f"picture {i}",
                "group": "things",
                "attributes": "{}",
            }
            | {"seed": i, "outcome": PENDING, "reason": ""}
            for i in range(count)
        ]
        publish_bytes(data / PLAN, table_bytes(pa.Table.from_pylist(rows)))
        assert len(planned_units(data, self.unit_images)) == units

    def scenario(self, found: Measured, driver_s: float, provision_s: float, case: Case) -> Scenario:
        assert found.load_s is not None
        return Scenario(
            case.workers,
            self.units * self.unit_images,
            self.unit_images,
            found.make_per_s,
            preemptions_per_hour=case.deaths_per_hour,
            provision_s=provision_s,
            load_s=found.load_s,
            straggler_share=case.trouble.slow_workers / case.workers,
            straggler_factor=SLOWER,
            unit_spread=found.unit_spread,
            image_bytes=found.image_bytes,
            storage_mb_per_s=case.trouble.storage_mb_per_s,
            storage_latency_s=case.trouble.storage_latency_s,
            driver_s=driver_s,
            start_s=self.start_s,
            window_units=case.window_units,
            window_s=self.window_s,
        )


def rounds_of(seconds: float) -> int:
    """Hashes that one core makes in this time."""
    rounds, spent = 100_000, 0.0
    while spent < 0.5:
        rounds, began, data = rounds * 2, time.perf_counter(), b"x"
        for _ in range(rounds):
            data = hashlib.sha256(data).digest()
        spent = time.perf_counter() - began
    return round(rounds * seconds / spent)


def lives(mean_s: float, count: int, seed: int = 0) -> tuple[float, ...]:
    """Exponential, in an order of chance; every ten hold the quantiles at 5%, 15%, ..., so that one run's mean is not luck."""
    dice, ten = random.Random(seed), [-math.log(1 - (i + 0.5) / 10) for i in range(10)]
    scale = mean_s / (sum(ten) / 10)
    found: list[float] = []
    while len(found) < count:
        dice.shuffle(ten)
        found += [scale * life for life in ten]
    return tuple(found)


def cases(unit_s: float, found: Measured, unit_images: int) -> list[Case]:
    """Each trouble as large as to show: a life of ten units, storage that takes 1.6 units' time for two workers' one."""
    life_s = OPEN_S + 10 * unit_s
    unit_mb = unit_images * found.image_bytes / 1e6
    return [
        Case("one worker again", 1),
        Case("two workers"),
        Case(
            f"two workers, each killed every {life_s:.0f} s",
            trouble=Trouble(lives(life_s, 400)),
            deaths_per_hour=3600 / life_s,
        ),
        Case(f"one of two is {SLOWER:g} times slower", trouble=Trouble(slow_workers=1)),
        Case(
            "two workers, slow storage",
            trouble=Trouble(storage_mb_per_s=unit_mb / (0.5 * unit_s), storage_latency_s=0.3 * unit_s),
        ),
        Case("two workers, windows of 20 units", window_units=20),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", choices=["sleep", "cpu", "pocket"], default="sleep")
    parser.add_argument("--units", type=int, default=80)
    parser.add_argument("--calibrate", type=int, default=24, help="units of the short run")
    parser.add_argument("--unit-images", type=int, default=8)
    parser.add_argument("--picture-s", type=float, default=0.125, help="sleep and cpu: seconds of work a picture")
    parser.add_argument("--only", nargs="*", help="cases whose names hold one of these words")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{' '.join(sys.argv)}; commit {commit}, {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before"
    )
    bench = Bench(asked.work, asked.units, asked.unit_images, asked.picture_s)
    with tempfile.TemporaryDirectory(prefix="edgefusion-simulate-") as scratch:
        sys.exit(validate(bench, asked.calibrate, asked.only or [], Path(scratch), print))


def validate(bench: Bench, calibrate: int, only: list[str], folder: Path, tell: Callable[[str], None]) -> int:
    driver_s = bench.null(128)
    bench.run(Case("calibration", 1), calibrate, folder / "calibrate")
    found = measure(folder / "calibrate", lambda _: [Need("make", "render", 1, 1)], bench.start_s, bench.window_s)
    unit_s = bench.unit_images / found.make_per_s
    killed = Case("killed once", 1, Trouble((OPEN_S + 2.5 * unit_s,)))
    _, log = bench.run(killed, 6, folder / "killed")
    # A part of the opening passes while Ray starts the window, so the run's own figure for it is short; here it is not.
    provision_s = max(0.0, log.times("opened")[1] - log.times("died")[0] - (found.load_s or 0.0))
    tell(
        f"calibrated: a unit {unit_s:.3f} s, spread {found.unit_spread:.3f}, opening {found.load_s:.2f} s, {found.image_bytes:.0f} bytes a "
        f"picture ({calibrate} units); Ray {bench.start_s:.1f} s, a window {bench.window_s:.1f} s, driver {driver_s * 1000:.1f} ms a unit; "
        f"a killed worker begins to open again after {provision_s:.1f} s"
    )
    table = Table(
        "run",
        "predicted s",
        "10-90%",
        "measured s",
        "error",
        "within 15%",
        title=f"{bench.units} units, work: {bench.work}",
    )
    missed = 0
    for case in cases(unit_s, found, bench.unit_images):
        if only and not any(word in case.name for word in only):
            continue
        scenario = bench.scenario(found, driver_s, provision_s, case)
        plays = [simulate(scenario, seed).make_s for seed in range(200)]
        predicted = sum(plays) / len(plays)
        measured, log = bench.run(case, bench.units, folder / f"case-{table.row_count}")
        error = predicted / measured - 1
        missed += abs(error) > TARGET
        span = f"{quantile(plays, 0.1):.1f}-{quantile(plays, 0.9):.1f}"
        died = f" ({len(log.times('died'))} deaths)" if case.deaths_per_hour else ""
        verdict = "pass" if abs(error) <= TARGET else "MISS"
        tell(f"{case.name}{died}: predicted {predicted:.1f} ({span}), measured {measured:.1f}, {error:+.1%} {verdict}")
        table.add_row(case.name + died, f"{predicted:.1f}", span, f"{measured:.1f}", f"{error:+.1%}", verdict)
    Console(width=120).print(table)
    return int(missed > 0)


if __name__ == "__main__":
    main()
