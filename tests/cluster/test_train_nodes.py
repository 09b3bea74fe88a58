"""A training over two real nodes goes on from its checkpoint when one is lost: on a third, or with fewer workers on what is left."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from factory.pack import Sample, pack
from factory.stages import encode_picture
from tests.cluster.slow_train import ADAPT_STEPS, DISTILL_STEPS
from trainer.models import PHASES
from trainer.state import read_log


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures of noise."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    samples = [
        Sample(hashlib.sha256(bytes([i])).hexdigest(), encode_picture(p, "png"), "png", f"a fox {i}")
        for i, p in enumerate(pictures)
    ]
    pack(samples, tmp_path / "data")
    return tmp_path / "data"


class Training:
    """A driver on the head node, and how far its training is."""

    def __init__(self, nodes: Any, models: Path, data: Path, out: Path, fewest: int = 0) -> None:
        self.nodes, self.out = nodes, out
        script = str(Path(__file__).with_name("slow_train.py"))
        words = [sys.executable, script, str(models / "teacher"), str(data), str(out), nodes.address, str(fewest)]
        self.said = out.with_suffix(".log")
        with self.said.open("wb") as log:
            self.process: subprocess.Popen[bytes] = nodes.popen(words, stdout=log, stderr=log)

    def workers(self) -> list[dict[str, Any]]:
        path = self.out / "workers.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        rows = read_log(self.out / "training" / "adapt" / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def has_saved(self) -> bool:
        return any((self.out / "training" / "adapt" / "checkpoints").glob("step-*"))

    def reach(self, step: int) -> None:
        """Wait until `adapt` is there and has saved a state; it must not be over by then."""
        end = time.monotonic() + 240
        while self.step() < step or not self.has_saved():
            assert self.process.poll() is None, f"the driver ended early:\n{self.said.read_text()[-3000:]}"
            assert time.monotonic() < end, f"step {self.step()} after 240 s:\n{self.said.read_text()[-3000:]}"
            time.sleep(0.1)
        assert self.step() < ADAPT_STEPS, "the phase was over before anything could be done to it"
        print(f"{time.strftime('%X')} step {self.step()} on {self.workers()}", flush=True)

    def end(self) -> None:
        assert self.process.wait(timeout=400) == 0, self.said.read_text()[-3000:]
        print(f"{time.strftime('%X')} done on {self.workers()}", flush=True)
        for phase, steps in zip(PHASES, (ADAPT_STEPS, DISTILL_STEPS), strict=True):
            rows = read_log(self.out / "training" / phase / "metrics.jsonl")
            assert [row["step"] for row in rows] == list(range(1, steps + 1)), "each step is noted once"


def number(address: str) -> int:
    return int(address.rpartition(".")[2]) - 10


def students(out: Path) -> dict[str, bytes]:
    folders = [out / "training" / phase / "unet" for phase in PHASES]
    return {str(p.relative_to(out)): p.read_bytes() for folder in folders for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_a_training_survives_the_loss_of_a_node(nodes: Any, tiny_models: Path, data: Path, tmp_path: Path) -> None:
    alone = Training(nodes, tiny_models, data, tmp_path / "undisturbed")
    alone.end()
    first = alone.workers()
    assert len(first) == 2 and len({worker["node"] for worker in first}) == 2, "two workers on two nodes"

    # One of the two nodes is gone from one moment to the next; a third has room. Two workers again: the same sums, the same bytes.
    moved = Training(nodes, tiny_models, data, tmp_path / "moved")
    moved.reach(12)
    victim = next(worker["node"] for worker in moved.workers() if worker["rank"] == 1)
    nodes.kill(number(victim))
    moved.end()
    again = moved.workers()[2:]
    assert {worker["of"] for worker in again} == {2} and victim not in {worker["node"] for worker in again}
    mine, wanted = students(moved.out), students(alone.out)
    assert mine.keys() == wanted.keys() and [name for name in mine if mine[name] != wanted[name]] == []

    # Now only two nodes are left; with one of them lost too, the training shrinks to one worker. Sums in another order: nearly the same.
    fewer = Training(nodes, tiny_models, data, tmp_path / "fewer", fewest=1)
    fewer.reach(12)
    nodes.kill(number(next(worker["node"] for worker in fewer.workers() if worker["rank"] == 0)))
    fewer.end()
    assert [worker["of"] for worker in fewer.workers()] == [2, 2, 1]
    for phase in PHASES:
        models = [UNet2DConditionModel.from_pretrained(t.out / "training" / phase / "unet") for t in (fewer, alone)]
        for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
