"""Adversarial consistency: small heads on the frozen teacher's features judge noised latents of the student and of its target.

Source: Wang et al., "Phased Consistency Models", arXiv 2405.18407, section 3.3: both sides are noised alike to a random time between the edge
that they lie at and the next, the teacher's UNet down to its middle is the backbone, the loss is the hinge. Theirs takes turns; here both
learn in one backward pass: the student's term holds the heads fixed, the heads' term holds the latents fixed.
Shapes: B C H W latents; timesteps B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from trainer.features import Features
from trainer.losses import NoiseSchedule
from trainer.options import AdversarialRecipe


class Heads(nn.Module):
    """A head a feature map: real latents should score above 1, the student's below -1."""

    def __init__(self, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden, 1), nn.GroupNorm(4, hidden), nn.SiLU(), nn.Conv2d(hidden, 1, 3, padding=1)
            )
            for width in channels
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """B x (places of all features) scores."""
        return torch.cat([head(f).flatten(1) for head, f in zip(self.each, features, strict=True)], dim=1)


class Opponent:
    """The heads and the teacher that they look through."""

    def __init__(
        self, recipe: AdversarialRecipe, teacher: UNet2DConditionModel, schedule: NoiseSchedule, seed: int
    ) -> None:
        self.recipe, self.teacher, self.schedule = recipe, teacher, schedule
        config = teacher.config
        widths = list(config["block_out_channels"])
        if config["mid_block_type"] is not None:
            widths.append(widths[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads: nn.Module = Heads(widths, recipe.hidden_channels)

    def losses(
        self, fake: torch.Tensor, real: torch.Tensor, t: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the student's term, the heads' term) for latents noised to `t`: the first gives no gradient to the heads, the second
        none to the student."""
        seen_fake = teacher_features(self.teacher, fake, t, text)
        with torch.no_grad():
            seen_real = teacher_features(self.teacher, real, t, text)
        bare = self.heads.module if hasattr(self.heads, "module") else self.heads
        fixed = {name: value.detach() for name, value in bare.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
        student: Any = functional_call(bare, fixed, (seen_fake,))  # pyright: ignore[reportArgumentType]
        both = [torch.cat([a, b.detach()]) for a, b in zip(seen_real, seen_fake, strict=True)]
        says_real, says_fake = self.heads(both).chunk(2)
        return -student.mean(), hinge(says_real, says_fake)


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss: 2 for heads that say nothing, 0 for ones that are sure and right."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class _Enough(Exception):
    """What was asked for is caught."""


def teacher_features(
    teacher: UNet2DConditionModel, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs of the down blocks and the middle, float32, with gradients to `noisy`; the way up is not computed."""
    names = [f"down_blocks.{i}" for i in range(len(teacher.down_blocks))]
    if teacher.mid_block is not None:
        names.append("mid_block")
    caught = Features(teacher, names)

    def stop(*_: object) -> None:
        raise _Enough

    last = teacher.get_submodule(names[-1]).register_forward_hook(stop)  # runs after the one that catches
    try:
        teacher(noisy.to(teacher.dtype), t, text.to(teacher.dtype), return_dict=False)
    except _Enough:
        pass
    finally:
        last.remove()
        caught.close()
    return [feature.float() for feature in caught.take()]
