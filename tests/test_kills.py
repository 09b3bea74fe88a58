"""Kills at random moments, of the driver and of Ray's workers, while they make, select and pack: the same bytes each time.

A few of the driver in `make test-long`; fifty, Ray's workers among them, in `make test-slow`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import yaml

from factory.pack import read_manifest
from factory.verify import verify
from tests.kills import ended_within, front_door, reached
from tests.test_chain import data_bytes, tiny_settings

log = logging.getLogger(__name__)
SAMPLES, UNIT = 48, 4
KILLS_ON_RAY = 16
MAKE, PACK = "make", "select and pack"


@pytest.mark.parametrize("kills", [pytest.param(10, marks=pytest.mark.long), pytest.param(34, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_the_driver_killed_at_random(tiny_models: Path, tmp_path: Path, kills: int) -> None:
    """In this process everything dies with it; half of the kills come while it selects and packs."""
    run = _Run(write_recipe(tiny_models, tmp_path), tmp_path / "out")
    run.undisturbed()
    moments = random.Random(1)
    while run.killed.total() < kills or min(run.killed[MAKE], run.killed[PACK]) < kills // 4:
        run.forget()
        while run.driver_dies(moments, run.due()):
            if run.made() and run.due() == MAKE:  # nothing is left to make here: the next kill wants an empty folder
                run.finish()
                break
        run.check()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_workers_and_drivers_of_ray_killed_at_random(tiny_models: Path, tmp_path: Path) -> None:
    """A dead worker's unit is done again within the run, a dead driver's by the next, and a dead driver leaves no process behind."""
    run = _Run(write_recipe(tiny_models, tmp_path), tmp_path / "out")
    run.undisturbed()
    run.words += ["--set", "cluster.runner=ray", "--set", "factory.make.render_workers=2"]
    moments = random.Random(2)
    while run.killed.total() < KILLS_ON_RAY:
        run.forget()
        if run.killed["workers"] <= run.killed[MAKE] + run.killed[PACK]:
            run.worker_dies(moments)
        else:
            run.driver_dies(moments, MAKE)
            run.finish()
        run.check()
    assert run.killed["workers"] and run.killed[MAKE], run.killed


class _Run:
    """A recipe's run as far as the packed data set, its output folder, what it must hold, and who was killed in it."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.out = out
        self.words = ["factory", "run", str(recipe), "--out", str(out)]
        self.whole: dict[str, bytes] = {}
        self.seconds = {MAKE: 0.0, PACK: 0.0}
        self.killed = Counter[str]()

    def undisturbed(self) -> None:
        """Once as it should be: the bytes, and how long each part takes."""
        process = front_door(*self.words)
        assert reached(process, self._planned)
        began = time.monotonic()
        assert reached(process, self.made)
        made = time.monotonic()
        process.join()
        assert process.exitcode == 0
        self.seconds = {MAKE: made - began, PACK: time.monotonic() - made}
        self.whole = data_bytes(self.out)
        assert len(read_manifest(self.out / "dataset")) > SAMPLES // 2

    def forget(self) -> None:
        shutil.rmtree(self.out)

    def due(self) -> str:
        """The part that was killed less often."""
        return PACK if self.killed[PACK] < self.killed[MAKE] else MAKE

    def driver_dies(self, moments: random.Random, part: str) -> bool:
        """Start, and kill it at a random moment of this part; False if it ended before."""
        process = front_door(*self.words)
        reached(process, self._planned if part == MAKE else self.made)
        if ended_within(process, moments.uniform(0, self.seconds[part])):
            assert process.exitcode == 0
            return False
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        self.killed[PACK if self.made() else MAKE] += 1
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, f"the dead driver left {[_name(p) for p in left]}"
        return True

    def worker_dies(self, moments: random.Random) -> None:
        """Kill a worker of Ray at a random moment; the run goes on, or the next one does."""
        process = front_door(*self.words)
        reached(process, lambda: bool(_workers(process)))
        if not ended_within(process, moments.uniform(0, self.seconds[MAKE])):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # the run may end at this very moment
                moments.choice(_workers(process)).kill()
                self.killed["workers"] += 1
        process.join()
        if process.exitcode != 0:  # the driver could not do without it, the plain error says
            self.finish()

    def finish(self) -> None:
        """The same command again, to its end."""
        process = front_door(*self.words)
        process.join()
        assert process.exitcode == 0

    def check(self) -> None:
        """Nothing lost, nothing doubled, the same bytes, no litter."""
        log.info("killed so far: %s", dict(self.killed))
        assert data_bytes(self.out) == self.whole
        keys = [row["id"] for row in read_manifest(self.out / "dataset")]
        assert len(keys) == len(set(keys)) == verify(self.out / "dataset")
        assert not [p for p in self.out.rglob("*") if ".partial-" in p.name]

    def _planned(self) -> bool:
        return (self.out / "dataset" / "plan.parquet").exists()

    def made(self) -> bool:
        return len(list(self.out.glob("dataset/ledger/unit-*.parquet"))) == SAMPLES // UNIT


def write_recipe(models: Path, folder: Path) -> Path:
    """The tiny recipe, its prompts given, with more units, so that making takes long enough to be killed in."""
    things = [
        f"a {kind} {size} {thing}" for kind in ("red", "blue") for size in range(8) for thing in ("fox", "key", "owl")
    ]
    (folder / "prompts.txt").write_text("\n".join(things))
    settings = tiny_settings(models)
    factory = settings["factory"]
    factory["plan"] = {"kind": "file", "paths": [str(folder / "prompts.txt")]}
    factory["make"]["unit_images"] = UNIT
    factory["pack"]["samples_per_shard"] = 5
    factory["views"] = {"strict": {"min_clip": 0.0}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tiny.yaml"


def _workers(driver: BaseProcess) -> list[psutil.Process]:
    """Those of Ray's processes that hold a stage."""
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in family if "MapWorker" in _name(process)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""
