"""What cannot be trained is refused in plain words before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import trainer.loop as loop
from cluster.errors import CorruptShard, StageError
from trainer.guidance import add_guidance_input
from trainer.identity import Identity
from trainer.recipe import TrainerRecipe
from trainer.state import VERSION, Average, save_state, state_of
from trainer.surgery import build_student, student_config


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1}
    tree = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase}
    return TrainerRecipe.model_validate(tree | changes)


def teacher_unet(models: Path) -> UNet2DConditionModel:
    return loop.open_pipeline(str(models / "teacher")).unet


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cross_attention_dim": 24}, "reads text states of width 24, and the text encoder makes 16"),
        ({"in_channels": 8}, "takes latents of 8 channels and gives 4, and the VAE's have 4"),
        ({"out_channels": 6}, "takes latents of 4 channels and gives 6, and the VAE's have 4"),
    ],
)
def test_a_student_that_does_not_fit_its_teachers_encoders(tiny_models, data, tmp_path, changed, words) -> None:
    config = student_config(dict(teacher_unet(tiny_models).config), "tiny") | changed
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "start")
    with pytest.raises(StageError, match=words) as caught:
        loop.train(recipe(tiny_models, start=str(tmp_path / "start")), data, tmp_path / "out", seed=1)
    assert "trainer.start" in str(caught.value) and "Leave trainer.start out" in str(caught.value)


def test_a_teacher_whose_parts_do_not_belong_together(tiny_models, data, tmp_path) -> None:
    shutil.copytree(tiny_models / "teacher", tmp_path / "teacher")
    config = {**teacher_unet(tiny_models).config, "cross_attention_dim": 24}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "teacher" / "unet")
    with pytest.raises(StageError, match="parts belong together"):
        loop.train(recipe(tiny_models, teacher=str(tmp_path / "teacher")), data, tmp_path / "out", seed=1)
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1, "teacher": str(tmp_path / "teacher" / "unet")}
    none = {"batch_images": 4, "learning_rate": 1e-3, "steps": 0}
    with pytest.raises(StageError, match=r"trainer\.distill\.teacher .* width 24"):
        loop.train(recipe(tiny_models, adapt=none, distill=phase), data, tmp_path / "out", seed=1)


def test_a_start_that_takes_guidance_where_the_recipe_gives_none(tiny_models, data, tmp_path) -> None:
    student = build_student(teacher_unet(tiny_models), "tiny").float()
    add_guidance_input(student).save_pretrained(tmp_path / "start")
    none = {"batch_images": 4, "learning_rate": 1e-3, "steps": 0}
    with pytest.raises(StageError, match=r"takes guidance as an input.*guidance_input=true"):
        loop.train(recipe(tiny_models, start=str(tmp_path / "start"), adapt=none), data, tmp_path / "out", seed=1)


def test_a_checkpoint_of_a_newer_version(tiny_models, data, tmp_path, monkeypatch) -> None:
    model = torch.nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr("trainer.state.VERSION", VERSION + 1)
    state = state_of(3, model, Average(model, 0.9).model, optimiser, Identity({}))
    save_state(tmp_path / "adapt" / "checkpoints", state)
    monkeypatch.undo()
    with pytest.raises(CorruptShard, match=rf"newer version \(layout {VERSION + 1}; this one reads up to {VERSION}\)"):
        loop.train(recipe(tiny_models), data, tmp_path, seed=1)
