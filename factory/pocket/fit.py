"""The small training loop that every zoo model shares: AdamW, warm-up and cosine, EMA, and a checkpoint that resumes.

It knows nothing of pictures or text; a model is a module and a function from step number to loss.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cluster.storage import publish_file

Model = TypeVar("Model", bound=nn.Module)


def fit(
    model: Model,
    loss_at: Callable[[int], torch.Tensor],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    save_every_s: float = 180.0,
    on_save: Callable[[Model, int], None] | None = None,
    start: nn.Module | None = None,
) -> Model:
    """Train `model` for `steps` optimiser steps and return its exponential moving average.

    `loss_at(step)` draws its own batch, keyed by the step number, so a resumed run sees the data it would have seen.
    Without a checkpoint, training begins with the weights of `start` if there is one.
    `folder` keeps `state.pt` (written whole, then renamed) and `log.tsv`; a finished run returns at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if start is not None:
        model.load_state_dict(start.state_dict())
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    parameters: list[torch.Tensor] = list(model.parameters())
    means: list[torch.Tensor] = list(average.parameters())
    first = _resume(folder / "state.pt", model, average, optimiser)
    saved_at, recent = time.monotonic(), []
    began, began_step = time.monotonic(), first
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(means, parameters, 1 - decay)  # one call for all: half the time of a step was here
        recent.append(float(loss.detach()))
        last = step + 1 == steps
        if len(recent) == 50 or last:
            rate = (step + 1 - began_step) / (time.monotonic() - began)
            line = f"{step + 1}\t{sum(recent) / len(recent):.5f}\t{rate:.2f} steps/s\t{(steps - step - 1) / rate / 60:.1f} min left"
            print(f"{folder.name}: {line}", flush=True)
            with (folder / "log.tsv").open("a") as log:
                log.write(line + "\n")
            recent = []
        if last or time.monotonic() - saved_at > save_every_s:
            for mean, now in zip(average.buffers(), model.buffers(), strict=True):
                mean.copy_(now)  # a batch norm's statistics are means already
            _save(folder / "state.pt", step + 1, model, average, optimiser)
            saved_at = time.monotonic()
            if on_save:
                on_save(average, step + 1)
    return average.eval()


def half_is_fast() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX, AVX512-BF16); others emulate it slowly."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def half_where_fast() -> torch.autocast:
    """bf16 autocast, a no-op where it is emulated."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half_is_fast())


def _resume(path: Path, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def _save(path: Path, step: int, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    state = {"step": step, "model": model.state_dict(), "average": average.state_dict()}
    keep(state | {"optimiser": optimiser.state_dict()}, path)


def keep(value: object, path: Path) -> None:
    """Write tensors to `path`, whole or not at all."""
    publish_file(path, lambda place: torch.save(value, place))
