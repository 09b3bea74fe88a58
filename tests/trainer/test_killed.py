"""A training that is killed with SIGKILL at random moments, over and over: the same samples at every step, the same weights to the bit.

A few kills in `make test-long`, twenty in `make test-slow`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import pytest

from trainer.models import PHASES
from trainer.recipe import TrainerRecipe
from trainer.state import read_log

STEPS, BATCH = 12, 4

# Forks of a process that has imported everything start in a tenth of a second, so that kills fall into training and not into imports.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["trainer.loop", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip"]
)


def train_and_note(recipe: dict, data: Path, out: Path) -> None:
    """The training, with every sample that it reads written down before it is learned from."""
    import trainer.distill as distill
    import trainer.loop as loop

    read = loop.read_batch
    notes = os.open(out.with_suffix(".keys"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(stream, encoder, step, batch, share):
        phase = "distill" if (out / "adapt" / "unet").exists() else "adapt"
        keys = [stream.read(stream.row_at(draw)).id for draw in range(step * batch, (step + 1) * batch)]
        os.write(notes, (json.dumps([phase, step, keys]) + "\n").encode())
        return read(stream, encoder, step, batch, share)

    loop.read_batch = distill.read_batch = note
    loop.train(TrainerRecipe.model_validate(recipe), data, out, seed=1)


def start(recipe: dict, data: Path, out: Path):
    process = _forks.Process(target=train_and_note, args=(recipe, data, out))
    process.start()
    return process


def what_was_read(out: Path) -> dict[tuple[str, int], list[str]]:
    """By phase and step; a step that was done again must have read the same."""
    found: dict[tuple[str, int], set[tuple[str, ...]]] = defaultdict(set)
    for line in out.with_suffix(".keys").read_text().splitlines():
        phase, step, keys = json.loads(line)
        found[phase, step].add(tuple(keys))
    assert all(len(ways) == 1 for ways in found.values()), "a step was read in two ways"
    return {step: list(ways.pop()) for step, ways in found.items()}


def weights(out: Path) -> list[bytes]:
    return [(out / phase / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for phase in PHASES]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_weights(
    tiny_models: Path, data: Path, tmp_path: Path, kills: int
) -> None:
    phase = {"batch_images": BATCH, "learning_rate": 1e-3, "steps": STEPS, "checkpoint_s": 0.05}
    recipe = {"teacher": str(tiny_models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase}
    began = time.monotonic()
    start(recipe, data, tmp_path / "whole").join()
    whole_s = time.monotonic() - began
    out, moments, killed, reached = tmp_path / "killed", random.Random(3), 0, set()
    while killed < kills:
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".keys").unlink(missing_ok=True)
        while True:
            process = start(recipe, data, out)
            process.join(moments.uniform(0.1, whole_s * 0.7))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            killed += 1
            reached.add(len(what_was_read(out)) if out.with_suffix(".keys").exists() else 0)
        assert process.exitcode == 0
        assert weights(out) == weights(tmp_path / "whole")
        assert what_was_read(out) == what_was_read(tmp_path / "whole")
        for name in PHASES:
            assert [row["step"] for row in read_log(out / name / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert len(reached) > 2, f"the kills did not fall into training: {reached} steps were read before them"
