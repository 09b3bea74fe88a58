"""Groups of a recipe's keys for what training may do besides its defaults; each is off unless it is named."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from cluster.recipe import Settings
from factory.recipe import VIEW_NAME, OpenClipScorer

OnCorrupt = Literal["stop", "skip"]
Tracker = Literal["mlflow", "wandb"]
Sharding = Literal["none", "student", "all"]
Phase = Literal["adapt", "distill"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which they run."""


class MoreData(Settings):
    """Another packed data set to train on."""

    data: str = Field(
        description="packed data set, shards and manifest.parquet: a folder, or a URL such as s3://bucket/dataset, whose shards are read by way "
        "of cluster.cache"
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        description="its part of the draws, relative to the other weights; its number of samples if left out, so that all samples count alike",
    )


class DataRecipe(Settings):
    """What is trained on: the run's own data set, or a selection of it, and others beside it."""

    own_view: str | None = Field(
        default=None,
        pattern=VIEW_NAME,
        description="train on this selection of the run's own data set in place of the main one: a name in factory.views, or of one that "
        "`factory select --name` packed",
    )
    own_weight: float | None = Field(
        default=None,
        ge=0,
        description="part of the draws from the run's own data set beside `more_data`; its number of samples if left out, 0 leaves it out",
    )
    more_data: list[MoreData] = Field(default=[], description="other packed data sets to draw from in the same batches")


class CheckpointRecipe(Settings):
    """How often a phase saves what it goes on from, and what of it stays."""

    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimiser steps between checkpoints; by the clock if left out, every `checkpoint_s` of the phase",
    )
    keep: int = Field(
        default=1,
        ge=1,
        description="newest checkpoints that stay; with 2 or more a damaged newest one costs no training. The best look stays beside them, "
        "where validation has a scorer",
    )
    keep_after: bool = Field(default=False, description="keep them all when the phase is done, too")


class ValidationRecipe(Settings):
    """Pictures from a phase's moving average on the way: fixed prompts and seeds, a grid and scores for each look."""

    every_steps: int = Field(
        ge=1, description="optimiser steps between two looks; the start and the end are looked at too"
    )
    phases: list[Phase] = Field(default=["adapt", "distill"], min_length=1, description="the phases that are looked at")
    prompts: list[str] = Field(
        default=[],
        description="what to draw; trainer.grid_prompts if empty, and if there are none, eight of the data set's",
    )
    seed: int = Field(default=1, description="seed of the first picture; the next one has the next")
    steps: list[int] = Field(default=[4, 2, 1], min_length=1, description="denoising steps in phase 2")
    adapt_steps: int = Field(default=25, ge=1, description="denoising steps in phase 1, by DPM++")
    guidance: float = Field(
        default=7.5, ge=0, description="guidance scale in phase 1, and of a student that takes guidance in phase 2"
    )
    scorer: OpenClipScorer | None = Field(
        default=None,
        description="scores each look; no scores if left out. Keep the judge of the final evaluation out of it",
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="what becomes the student: the `last` moving average, or the `best` that was looked at, by the mean score over `steps`",
    )

    @model_validator(mode="after")
    def _best_by_something(self) -> ValidationRecipe:
        if self.keep == "best" and self.scorer is None:
            raise ValueError("keep is `best` and no scorer says what that is; name a scorer, or keep the last")
        return self


class AdversarialRecipe(Settings):
    """Adversarial consistency: heads on the frozen teacher's features tell the student's latents from its target's (PCM)."""

    weight: float = Field(default=0.1, gt=0, description="weight of the adversarial term in the student's loss")
    learning_rate: float = Field(
        default=1e-4, gt=0, description="of the discriminator heads; warm-up and cosine as the student's"
    )
    hidden_channels: int = Field(default=64, ge=4, description="channels inside a head; a multiple of 4", multiple_of=4)


class LoraRecipe(Settings):
    """Low-rank adapters instead of full weights (extra `lora`)."""

    rank: int = Field(default=16, ge=1, description="rank of each adapter")
    alpha: float | None = Field(
        default=None, gt=0, description="adapters are scaled by alpha / rank; alpha is the rank if left out"
    )
