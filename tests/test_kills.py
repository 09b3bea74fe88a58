"""Kills at random moments, of the driver and of Ray's workers, until there were many: the same bytes each time. Minutes: `make test-slow`."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from factory.pack import read_manifest
from factory.verify import verify
from tests.test_chain import command, data_bytes, tiny_settings

KILLS_IN_PROCESS, KILLS_ON_RAY = 30, 20
UNET = "student/unet/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_chains_killed_at_random(tiny_models: Path, tmp_path: Path) -> None:
    """The driver dies while it plans, makes, selects, packs, trains or exports."""
    run = command(write_recipe(tiny_models, tmp_path), tmp_path / "out")
    whole, work_s = undisturbed(run, tmp_path / "out")
    student = (tmp_path / "out" / UNET).read_bytes()
    moments, killed = random.Random(1), 0
    while killed < KILLS_IN_PROCESS:
        shutil.rmtree(tmp_path / "out")
        while True:
            process = started(run, tmp_path / "out")
            if ended_within(process, moments.uniform(0, work_s / 2)):
                break
            process.kill()
            process.wait()
            killed += 1
        assert process.returncode == 0
        assert_whole(tmp_path / "out", whole)
        assert (tmp_path / "out" / UNET).read_bytes() == student


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_drivers_and_workers_of_ray_killed_at_random(tiny_models: Path, tmp_path: Path) -> None:
    """Making on Ray: a dead worker's unit is done again within the run, a dead driver's by the next; no process is left behind."""
    recipe, out = write_recipe(tiny_models, tmp_path), tmp_path / "out"
    run = [*command(recipe, out)[:2], "factory", "run", str(recipe), "--out", str(out)]
    whole, _ = undisturbed(run, out)
    run += ["--set", "cluster.runner=ray", "--set", "factory.make.render_workers=2"]
    _, work_s = undisturbed(run, out)
    moments, killed = random.Random(2), 0
    while killed < KILLS_ON_RAY:
        shutil.rmtree(out)
        while True:
            process = started(run, out)
            if ended_within(process, moments.uniform(0, work_s)):
                break
            family = psutil.Process(process.pid).children(recursive=True)
            workers = [p for p in family if name_of(p).startswith("ray::")]
            if workers and moments.random() < 0.5:
                with contextlib.suppress(psutil.NoSuchProcess):
                    moments.choice(workers).kill()
                    killed += 1
                process.wait()
                break
            process.kill()
            process.wait()
            killed += 1
            _, left = psutil.wait_procs(family, timeout=60)
            assert not left, f"the dead driver left {[name_of(p) for p in left]}"
        if process.returncode != 0:  # a worker died too often, or while the driver could not do without it
            subprocess.run(run, check=True, capture_output=True)
        assert_whole(out, whole)


def write_recipe(models: Path, folder: Path) -> Path:
    """The tiny recipe with more units, so that making takes long enough to be killed in."""
    settings = tiny_settings(models)
    settings["factory"]["plan"]["prompts"] = 64
    settings["factory"]["make"]["unit_images"] = 4
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tiny.yaml"


def undisturbed(run: list[str], out: Path) -> tuple[dict[str, bytes], float]:
    """The data set's bytes, and the seconds between the first sign of work and the end. Leaves the folder."""
    shutil.rmtree(out, ignore_errors=True)
    process = started(run, out)
    began = time.monotonic()
    assert process.wait() == 0
    return data_bytes(out), time.monotonic() - began


def started(run: list[str], out: Path) -> subprocess.Popen[bytes]:
    """The command, past its imports: something in `out` has changed, or it has ended."""
    before = seen(out)
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while seen(out) == before and process.poll() is None:
        time.sleep(0.01)
    return process


def seen(folder: Path) -> set[tuple[str, int]]:
    """Files and when they were written."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(place, name)
                found.add((path, os.stat(path).st_mtime_ns))
    return found


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    assert process.returncode != -signal.SIGKILL
    return True


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def assert_whole(out: Path, whole: dict[str, bytes]) -> None:
    """Nothing lost, nothing doubled, the same bytes, no litter."""
    assert data_bytes(out) == whole
    keys = [row["id"] for row in read_manifest(out / "dataset")]
    assert len(keys) == len(set(keys)) == verify(out / "dataset")
    assert not [p for p in out.rglob("*") if ".partial-" in p.name]
