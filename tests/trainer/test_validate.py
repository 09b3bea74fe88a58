"""Looks on the way: they change nothing, come again after a kill, and the best of them becomes the student if that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from pydantic import ValidationError

import trainer.fit as fit
import trainer.loop as loop
from tests.trainer.test_fit import points
from trainer.looks import LOOKS, read_looks
from trainer.recipe import TrainerRecipe
from trainer.validate import Looks

STEPS = 4


def recipe(models: Path, **validation: Any) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": STEPS, "checkpoint_s": 1e-9, "ema_decay": 0.5}
    looks = {"every_steps": 2, "steps": [2, 1], "adapt_steps": 2, "prompts": ["a fox", "a red apple"]} | validation
    settings = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase}
    return TrainerRecipe.model_validate(settings | ({"validation": looks} if validation.get("steps") != [] else {}))


def weights(out: Path, phase: str = "distill") -> dict[str, torch.Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(out / phase / "unet").state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_looks_show_the_student_change_and_change_nothing(tiny_models, data, tmp_path) -> None:
    scorer = {"kind": "open_clip", "model": str(tiny_models / "clip")}
    loop.train(recipe(tiny_models, scorer=scorer), data, tmp_path / "looked", seed=1)
    loop.train(recipe(tiny_models, steps=[]), data, tmp_path / "blind", seed=1)
    for phase, rows in (("adapt", 1), ("distill", 2)):
        assert same(weights(tmp_path / "looked", phase), weights(tmp_path / "blind", phase))
        looks = read_looks(tmp_path / "looked" / phase)
        assert [look.step for look in looks] == [0, 2, 4]
        sheets = [np.asarray(Image.open(look.sheet)) for look in looks]
        assert {sheet.shape for sheet in sheets} == {(rows * 34 + 2, 2 * 34 + 2, 3)}
        assert not np.array_equal(sheets[0], sheets[-1])
        assert all(len(look.scores) == rows and min(look.scores.values()) >= -1 for look in looks)
        assert [step for tag, step, _ in points(tmp_path / "looked" / phase) if tag == "looks"] == [0, 2, 4]
    assert not (tmp_path / "blind" / "adapt" / LOOKS).exists()


@pytest.mark.long
def test_a_kill_at_every_checkpoint_leaves_the_same_looks(tiny_models, data, tmp_path, monkeypatch) -> None:
    loop.train(recipe(tiny_models), data, tmp_path / "whole", seed=1)
    saved = fit.save_state

    def save_and_die(*args: Any) -> None:
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_state", save_and_die)
    for _ in range(4 * STEPS):
        try:
            loop.train(recipe(tiny_models), data, tmp_path / "broken", seed=1)
            break
        except KeyboardInterrupt:
            continue
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    for phase in ("adapt", "distill"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / phase / LOOKS).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "broken" / phase / LOOKS).iterdir()}


def test_the_best_look_becomes_the_student(tiny_models, data, tmp_path, monkeypatch) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    scores = {0: 0.1, 2: 0.9, 4: 0.5}

    def draw(self: Looks, average: Any, step: int, folder: Path) -> float:
        seen[step] = {name: value.clone() for name, value in average.state_dict().items()}
        return scores[step]

    monkeypatch.setattr(Looks, "draw", draw)
    scorer = {"kind": "open_clip", "model": str(tiny_models / "clip")}
    loop.train(recipe(tiny_models, scorer=scorer, keep="best", phases=["distill"]), data, tmp_path, seed=1)
    assert same(weights(tmp_path), seen[2]) and not same(seen[2], seen[4])
    assert not list(tmp_path.glob("*/checkpoints"))


def test_the_best_without_a_scorer_is_refused(tiny_models) -> None:
    with pytest.raises(ValidationError, match="name a scorer"):
        recipe(tiny_models, keep="best")
