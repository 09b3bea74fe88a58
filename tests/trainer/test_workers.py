"""Two Ray Train workers (gloo) train as one does, of unequal shares too, and a training may change their number on its way."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from cluster.errors import EdgeFusionError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, stop_ray
from cluster.training import launch
from trainer.models import PHASES
from trainer.recipe import TrainerRecipe
from trainer.state import read_log
from trainer.stream import ShardStream

STEPS, BATCH = 4, 5
"""Two workers share five images as 2 and 3."""


def run(recipe: TrainerRecipe, data: Path, out: Path, workers: int, stop_at: str = "", leg: int = 0) -> None:
    """Train on `workers` workers, each writing down the samples it reads; all of them fall at `stop_at`, a PHASE/STEP."""

    def work() -> None:
        import os

        import trainer.distill as distill
        import trainer.loop as loop

        read, rank = loop.read_batch, os.environ.get("RANK", "0")

        def note(stream, encoder, step, batch, share):
            # The phase in which this happens is the one that has no result yet.
            phase = "distill" if (out / "training" / "adapt" / "unet").exists() else "adapt"
            if f"{phase}/{step}" == stop_at:
                raise RuntimeError("the power went out")
            keys = [stream.read(stream.row_at(draw)).id for draw in range(step * batch, (step + 1) * batch)[share]]
            with (out / f"keys-{rank}-{leg}.jsonl").open("a") as file:
                file.write(json.dumps([phase, step, share.start, keys]) + "\n")
            return read(stream, encoder, step, batch, share)

        loop.read_batch = distill.read_batch = note
        try:
            loop.train(recipe, data, out / "training", seed=1)
        finally:
            loop.read_batch = distill.read_batch = read

    out.mkdir(exist_ok=True)
    settings = {
        "runner": "ray" if workers > 1 else "in-process",
        "cpus": 3,
        "train_workers": workers,
        "max_failures": 0,
    }
    launch(work, build_recipe(ClusterRecipe, settings, "test"), out, 1, use_gpu=False)


def keys_by_step(out: Path) -> dict[tuple[str, int], list[str]]:
    """What the workers together read at each step, in the order of their shares; a step that was run again must read the same."""
    found: dict[tuple[str, int], dict[int, dict[int, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for path in out.glob("keys-*.jsonl"):
        leg = int(path.stem.rsplit("-", 1)[1])
        for phase, step, start, keys in map(json.loads, path.read_text().splitlines()):
            found[phase, step][leg][start] = keys
    together = {}
    for step, legs in found.items():
        reads = {tuple(key for start in sorted(parts) for key in parts[start]) for parts in legs.values()}
        assert len(reads) == 1, f"{step} was read in two ways"
        together[step] = list(reads.pop())
    return together


def assert_same(one: Path, other: Path) -> None:
    for phase in PHASES:
        logs = [read_log(out / "training" / phase / "metrics.jsonl") for out in (one, other)]
        assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == list(range(1, STEPS + 1))
        assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-3, abs=1e-5)
        models = [UNet2DConditionModel.from_pretrained(out / "training" / phase / "unet") for out in (one, other)]
        for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "student", "all"])
def test_two_workers_then_one_then_two_train_as_one_does(tiny_models, data, tmp_path, sharding) -> None:
    phase = {"batch_images": BATCH, "learning_rate": 1e-3, "steps": STEPS, "checkpoint_s": 1e-9, "warmup_steps": 5}
    recipe = TrainerRecipe.model_validate(
        {
            "teacher": str(tiny_models / "teacher"),
            "size_px": 32,
            "threads": 1,
            "sharding": sharding,
            "validation": {"every_steps": 3, "steps": [2], "adapt_steps": 2},
            "adapt": phase,
            "distill": phase,
        }
    )
    run(recipe, data, tmp_path / "one", workers=1)
    try:  # adapt with two, then one; distill with one, then two
        with pytest.raises(EdgeFusionError, match="power"):
            run(recipe, data, tmp_path / "mixed", workers=2, stop_at="adapt/2", leg=0)
        with pytest.raises(RuntimeError, match="power"):
            run(recipe, data, tmp_path / "mixed", workers=1, stop_at="distill/2", leg=1)
        run(recipe, data, tmp_path / "mixed", workers=2, leg=2)
        if sharding == "all":  # the teacher is cut up once for both phases
            run(recipe, data, tmp_path / "both", workers=2)
            assert_same(tmp_path / "both", tmp_path / "one")
    finally:
        stop_ray()
    stream = ShardStream(data, seed=1)
    # The loop looks at one step more than it learns from.
    wanted = {
        (phase, step): [stream.read(stream.row_at(draw)).id for draw in range(step * BATCH, (step + 1) * BATCH)]
        for phase in PHASES
        for step in range(STEPS + 1)
    }
    for name in ("one", "mixed"):
        assert keys_by_step(tmp_path / name) == wanted
    assert_same(tmp_path / "mixed", tmp_path / "one")
