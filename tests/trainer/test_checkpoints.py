"""Checkpoints as files: folders that diffusers opens and no pickle needs, how many stay, what a damaged one costs, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn

import trainer.checkpoints as checkpoints
import trainer.fit as fit_module
import trainer.loop as loop
from cluster.errors import CorruptShard
from trainer.checkpoints import CHECKPOINTS, FACTS, best_checkpoint, newest_checkpoint, read_checkpoint, save_best
from trainer.fit import fit
from trainer.identity import Identity
from trainer.options import CheckpointRecipe
from trainer.recipe import PhaseRecipe, TrainerRecipe
from trainer.state import Average, Best, state_of

STEPS = 12

IDENTITY = Identity({"it is": "a recipe"})


def train(folder: Path, model: nn.Module | None = None, die_at: int | None = None, **keys: Any) -> Any:
    """A dozen steps, saved at each; as if the power went out before the loss of step `die_at`, when all before are on the disk."""
    torch.manual_seed(0)
    changes = {name: keys.pop(name) for name in list(keys) if name in PhaseRecipe.model_fields}
    settings = PhaseRecipe(steps=STEPS, batch_images=4, learning_rate=1e-2, **changes)

    def loss_at(model: nn.Module, _average: object, draw: int, share: slice) -> torch.Tensor:
        if draw == die_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(draw))[share]
        loss = (model(x) - x.sum(dim=1, keepdim=True)).pow(2).mean()
        return loss * float("nan") if draw in keys.get("bad", ()) else loss

    asked = CheckpointRecipe(**{"every_steps": 1, "keep": keys.get("keep", 1)})
    return fit("adapt", settings, IDENTITY, model or new_model(), loss_at, folder, Accelerator(), checkpoints=asked)


def new_model() -> nn.Module:
    """With a layer that draws random numbers of its own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def die(folder: Path, at: int, **keys: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(folder, die_at=at, **keys)


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in (folder / CHECKPOINTS).iterdir())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def damage(place: Path, name: str = "student/diffusion_pytorch_model.safetensors") -> None:
    data = bytearray((place / name).read_bytes())
    data[-1] ^= 1  # one bit of the weights, which every reader would take for sound
    (place / name).write_bytes(data)


def test_weights_are_folders_that_diffusers_opens_and_the_rest_needs_no_pickle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    unet = UNet2DConditionModel(
        **{**blocks, "cross_attention_dim": 8, "sample_size": 8},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model: Any = unet
    model.to(memory_format=torch.channels_last)
    average = Average(model, 0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 2, 8)).sample.square().mean().backward()
    optimiser.step()
    average.update(model)
    state = state_of(5, model, average.model, optimiser, IDENTITY, {"losses": [1.0]})
    place = checkpoints.save_checkpoint(tmp_path, state, checkpoints.config_of(model), keep=1)
    assert place.name == "step-00000005" and not same(model, average.model)
    for part, wanted in (("student", model), ("average", average.model)):
        assert same(UNet2DConditionModel.from_pretrained(place / part), wanted)
    kept = read_checkpoint(place)  # torch.load here is told to take weights only
    assert kept["optimiser"]["param_groups"] == state["optimiser"]["param_groups"] and kept["more"] == state["more"]
    moments = [kept["optimiser"]["state"][0][name] for name in ("step", "exp_avg", "exp_avg_sq")]
    assert all(torch.equal(a, b) for a, b in zip(moments, state["optimiser"]["state"][0].values(), strict=True))
    facts = json.loads((place / FACTS).read_text())
    assert (facts["step"], facts["recipe"]) == (5, IDENTITY.facts)
    files = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert files == {*facts["files"], FACTS}


def test_interrupted_at_every_step_it_equals_undisturbed_though_a_layer_draws_random_numbers(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    for step in range(2, STEPS + 1):
        die(tmp_path / "broken", step)
    assert same(train(tmp_path / "broken"), whole)


def test_as_many_stay_as_the_recipe_says(tmp_path: Path) -> None:
    die(tmp_path / "one", 8)
    die(tmp_path / "three", 8, keep=3)
    assert names(tmp_path / "one") == ["step-00000007"]
    assert names(tmp_path / "three") == ["step-00000005", "step-00000006", "step-00000007"]


def test_a_damaged_newest_one_costs_a_step_and_not_the_training(tmp_path: Path, capsys) -> None:
    whole = train(tmp_path / "whole")
    die(tmp_path / "broken", 8, keep=2)
    damage(tmp_path / "broken" / CHECKPOINTS / "step-00000007")
    again = train(tmp_path / "broken", keep=2)
    said = capsys.readouterr().out
    assert "step-00000007: student/diffusion_pytorch_model.safetensors is damaged; going on from step-00000006" in said
    assert same(again, whole)
    assert "damaged-step-00000007" in names(tmp_path / "broken")


@pytest.mark.parametrize("name", ["optimiser.pt", "loop.pt", FACTS])
def test_with_only_damaged_ones_nothing_is_trained_anew_unasked(tmp_path: Path, name: str) -> None:
    die(tmp_path, 4)
    place = tmp_path / CHECKPOINTS / "step-00000003"
    (place / name).write_bytes((place / name).read_bytes()[:-20])
    with pytest.raises(CorruptShard, match=r"step-00000003: .*Delete it: an older one is taken"):
        train(tmp_path)
    assert names(tmp_path) == ["step-00000003"]


def test_after_a_rollback_the_new_one_of_the_same_step_is_the_later(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", bad=(6,), on_spike="rollback")
    die(tmp_path / "broken", 7, bad=(6,), on_spike="rollback", keep=2)
    # The gradient of step 5 was sound, the loss of draw 6 was not: back to step 5, past draw 6.
    assert names(tmp_path / "broken") == ["step-00000005", "step-00000005-1"]
    place, _ = newest_checkpoint(tmp_path / "broken")
    assert place is not None and read_checkpoint(place)["more"]["skipped"] == 2
    assert same(train(tmp_path / "broken", bad=(6,), on_spike="rollback"), whole)


def test_a_kill_while_an_old_one_goes_leaves_no_torn_one(tmp_path: Path, monkeypatch) -> None:
    die(tmp_path, 4)

    def torn(place: Path, **_: object) -> None:
        next(p for p in place.rglob("*") if p.is_file()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", torn)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    found = [place for place in (tmp_path / CHECKPOINTS).glob("step-*")]
    assert found
    for place in found:
        checkpoints.prove(place)


def test_a_file_of_an_older_version_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"weights")
    with pytest.raises(
        CorruptShard, match=r"state\.pt: was written by an older version.*Finish this training with the version"
    ):
        train(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == b"weights"


def test_the_better_of_two_bests_counts_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    best, model = Best(tmp_path / CHECKPOINTS, IDENTITY), nn.Linear(3, 1)
    assert best.recall() is None
    for score, step in ((0.5, 2), (0.4, 4), (0.9, 6)):
        if keep := best.offer(score, step, model.state_dict):
            keep()
    assert names(tmp_path) == ["best-00000006"]
    # As a kill leaves them, between the new one and the end of the old.
    shutil.copytree(tmp_path / CHECKPOINTS / "best-00000006", tmp_path / "kept")
    shutil.rmtree(tmp_path / CHECKPOINTS)
    save_best(tmp_path / CHECKPOINTS, model.state_dict(), None, {"step": 2, "score": 0.5, "recipe": IDENTITY.facts})
    (tmp_path / "kept").rename(tmp_path / CHECKPOINTS / "best-00000006")
    again = Best(tmp_path / CHECKPOINTS, IDENTITY)
    kept = again.recall()
    assert kept is not None and (kept["step"], again.score) == (6, 0.9)
    assert torch.equal(kept["average"]["weight"], model.weight)
    with pytest.raises(CorruptShard, match="another recipe"):
        Best(tmp_path / CHECKPOINTS, Identity({"it is": "another"})).recall()
    found = best_checkpoint(tmp_path / CHECKPOINTS)
    assert found is not None
    damage(found[0], "average/diffusion_pytorch_model.safetensors")
    with pytest.raises(CorruptShard, match=r"best-00000006: average/.* is damaged") as caught:
        again.recall()
    assert "without that look" in caught.value.remedy


def test_a_training_keeps_them_afterwards_only_if_asked_and_may_be_asked_on_the_way(
    tiny_models: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 4, "checkpoint_s": 1e9}
    tree = {"teacher": str(tiny_models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase}

    def recipe(**keys: Any) -> TrainerRecipe:
        return TrainerRecipe.model_validate(
            {**tree, "distill": phase | {"steps": 0}, "checkpoints": {"every_steps": 1} | keys}
        )

    saved = fit_module.save_state

    def save_and_die(*args: Any) -> None:
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(), data, tmp_path / "kept", seed=1)
    monkeypatch.setattr(fit_module, "save_state", saved)
    loop.train(recipe(keep=2, keep_after=True), data, tmp_path / "kept", seed=1)
    loop.train(recipe(), data, tmp_path / "plain", seed=1)
    assert names(tmp_path / "kept" / "adapt") == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "plain" / "adapt" / CHECKPOINTS).exists()
    unets = [UNet2DConditionModel.from_pretrained(tmp_path / name / "adapt" / "unet") for name in ("kept", "plain")]
    assert same(*unets)
    UNet2DConditionModel.from_pretrained(tmp_path / "kept" / "adapt" / CHECKPOINTS / "step-00000003" / "average")
    assert "checkpoints" not in TrainerRecipe.model_validate({**tree, "distill": phase}).model_dump(mode="json")
