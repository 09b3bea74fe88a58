"""Looks at a training on the way: fixed prompts and seeds drawn from the moving average, scored, kept as pictures beside the log.

A look is a function of the weights alone and draws no number that the training draws, so a training with looks ends in the same
weights as one without, unless it is asked to keep the best.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.storage import publish_bytes
from factory.models.clip import Clip
from trainer.looks import LOOKS
from trainer.options import ValidationRecipe
from trainer.sample import contact_sheet, generate


class Looks:
    """The looks of one phase. `pipeline_of` makes a UNet a pipeline, `plans` are (denoising steps, guidance scale)."""

    def __init__(
        self,
        recipe: ValidationRecipe,
        prompts: Sequence[str],
        plans: Sequence[tuple[int, float]],
        pipeline_of: Callable[[Any], Any],
        device: torch.device,
    ) -> None:
        self.recipe, self.prompts, self.plans = recipe, list(prompts), list(plans)
        self.pipeline_of, self.device = pipeline_of, device
        self.keeps_best = recipe.keep == "best"
        self._clip: Clip | None = None

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to look once `step` of `steps` are learned."""
        return step % self.recipe.every_steps == 0 or step == steps

    def draw(self, average: Any, step: int, folder: Path) -> float | None:
        """Leaves `folder/looks/step-N.png` and `.json`; returns the mean score, or None without a scorer."""
        pipeline = self.pipeline_of(average).to(self.device)
        seeds = [self.recipe.seed + i for i in range(len(self.prompts))]
        rows = [generate(pipeline, self.prompts, seeds, steps, guidance) for steps, guidance in self.plans]
        scores = {str(steps): self._score(row) for (steps, _), row in zip(self.plans, rows, strict=True)}
        facts = {"step": step, "prompts": self.prompts, "seeds": seeds}
        if self.recipe.scorer:
            facts |= {"scorer": self.recipe.scorer.model, "scores": scores}
        sheet = io.BytesIO()
        Image.fromarray(contact_sheet(rows)).save(sheet, "PNG")
        place = folder / LOOKS / f"step-{step:07d}"
        publish_bytes(place.with_suffix(".png"), sheet.getvalue())
        publish_bytes(place.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
        return float(np.mean(list(scores.values()))) if self.recipe.scorer else None

    def _score(self, pictures: list[np.ndarray]) -> float:
        """Mean cosine of the pictures and their prompts."""
        if self.recipe.scorer is None:
            return float("nan")
        self._clip = self._clip or Clip(self.recipe.scorer)
        cosines = (self._clip.pictures(pictures) * self._clip.texts(self.prompts)).sum(axis=1)
        return round(float(cosines.mean()), 5)
