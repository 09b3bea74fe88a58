"""The optimisers that a recipe may name, and whether this machine can run them."""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import TargetUnavailable
from trainer.recipe import PhaseRecipe

_PROBE = 4096
"""Numbers of the tensor that an 8-bit optimiser is tried on: smaller ones it keeps in 32 bits."""


def new_optimiser(settings: PhaseRecipe, groups: list[dict[str, Any]], device: torch.device) -> Any:
    """AdamW in the wanted form over `groups`. Raises TargetUnavailable for one that cannot run here."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (0.9, 0.99),
    }
    if settings.optimiser == "adamw-8bit":
        return _eight_bit(device)(groups, **common)
    if settings.optimiser == "adamw-foreach":
        return torch.optim.AdamW(groups, **common, foreach=True)
    # One call for all tensors: with small ones, the calls are half of a step.
    return torch.optim.AdamW(groups, **common, fused=True)


def _eight_bit(device: torch.device) -> Any:
    remedy = "pip install 'edgefusion[eight-bit]' on a machine with a GPU that bitsandbytes knows, or leave optimiser at adamw"
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except Exception as error:  # its libraries are loaded on import and fail in ways of their own
        raise TargetUnavailable(f"optimiser adamw-8bit needs bitsandbytes ({error})", remedy=remedy) from error
    weight = torch.nn.Parameter(torch.ones(_PROBE, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        AdamW8bit([weight], lr=1e-3).step()
        if not torch.isfinite(weight).all() or bool((weight == 1).any()):
            raise RuntimeError("a step changed nothing")
    except Exception as error:
        what = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise TargetUnavailable(
            f"optimiser adamw-8bit cannot run on {device.type} ({what[0]})", remedy=remedy
        ) from error
    return AdamW8bit
