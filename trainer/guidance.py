"""Guidance as an input of the student: the embedding of w, a projection that starts at zero, and how to fix w again.

Source: Luo et al., arXiv 2310.04378 (w embedded as a timestep is); diffusers' `time_cond_proj_dim` and its pipelines' embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

WIDTH = 256
"""Numbers in the embedding of w, as in the LCM paper's code and its students."""


def takes_guidance(unet: Any) -> bool:
    """Whether the UNet has a projection for the embedding of w."""
    return unet.config.time_cond_proj_dim is not None


def embed_guidance(w: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    """B x width: sines, then cosines, of 1000 w; w is a pipeline's guidance scale minus 1."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angles = (w.float() * 1000.0)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def add_guidance_input(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet with a projection of w that starts at zero, so that it says what it said before. Weights are shared."""
    if takes_guidance(unet):
        return unet
    wider: Any = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": WIDTH})
    projection = wider.time_embedding.cond_proj
    nn.init.zeros_(projection.weight)
    wider.load_state_dict(unet.state_dict() | {"time_embedding.cond_proj.weight": projection.weight.detach()})
    return wider.to(next(unet.parameters()).dtype)


@torch.no_grad()
def fix_guidance(unet: UNet2DConditionModel, w: float) -> UNet2DConditionModel:
    """A UNet without the input that says what `unet` says at `w`: what the projection adds is a constant of the first bias."""
    kept: Any = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": None})
    state = unet.state_dict()
    projection = state.pop("time_embedding.cond_proj.weight").double()
    added = projection @ embed_guidance(torch.tensor([w]), projection.shape[1])[0].to(projection)
    weight, bias = state["time_embedding.linear_1.weight"], state["time_embedding.linear_1.bias"]
    state["time_embedding.linear_1.bias"] = (bias.double() + weight.double() @ added).to(bias.dtype)
    kept.load_state_dict(state)
    return kept.to(bias.dtype).to(bias.device)
