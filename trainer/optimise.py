"""The optimisers and learning rates that a recipe may name, and whether this machine can run them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from cluster.errors import TargetUnavailable
from trainer.recipe import PhaseRecipe

_PROBE = 4096
"""Numbers of the tensor that an 8-bit optimiser is tried on: smaller ones it keeps in 32 bits."""


def new_optimiser(settings: PhaseRecipe, groups: list[dict[str, Any]], device: torch.device) -> Any:
    """AdamW in the wanted form over `groups`. Raises TargetUnavailable for one that cannot run here."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if settings.optimiser == "adamw-8bit":
        return _eight_bit(device)(groups, **common)
    if settings.optimiser == "adamw-foreach":
        return torch.optim.AdamW(groups, **common, foreach=True)
    # One call for all tensors: with small ones, the calls are half of a step.
    return torch.optim.AdamW(groups, **common, fused=True)


def rate_at(settings: PhaseRecipe) -> Callable[[int], float]:
    """The learning rate of a step as a function of its number alone, so that a resumed training has no schedule to restore."""
    if settings.schedule != "constant":
        # Theirs is made for an optimiser, and is a function of the step; the polynomial one also looks at the rate.
        bearer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=settings.learning_rate)
        theirs = get_scheduler(
            settings.schedule.replace("-", "_"),
            bearer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
            num_cycles=settings.schedule_cycles,
            power=settings.schedule_power,
        ).lr_lambdas[0]
        return lambda step: settings.learning_rate * theirs(step)

    def ours(step: int) -> float:
        rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        if settings.cosine:
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        return rate

    return ours


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
