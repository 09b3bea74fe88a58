"""Groups of a recipe's keys for what training may do besides its defaults; each is off unless it is named."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.recipe import Settings

OnCorrupt = Literal["stop", "skip"]
Tracker = Literal["mlflow", "wandb"]


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
