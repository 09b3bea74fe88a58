"""What a training must keep to go on as if nothing had happened, saved as one file that is whole or absent.

Data order and noise are functions of the step number, so the step is all there is to their state.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from cluster.errors import CorruptShard
from cluster.storage import publish_file


class Average:
    """Exponential moving average of a student's weights, as a frozen model of its own."""

    def __init__(self, model: UNet2DConditionModel, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mean, value in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(value.detach().to(mean.dtype), 1 - self.decay)


def save_state(path: Path, step: int, model: nn.Module, average: nn.Module, optimiser: Any, recipe_digest: str) -> None:
    """Write `path`, replacing the older state only when the new one is whole."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
        "recipe": recipe_digest,
    }
    publish_file(path, lambda partial: torch.save(state, partial))


def load_state(path: Path, model: nn.Module, average: nn.Module, optimiser: Any, recipe_digest: str) -> int:
    """Restore all in place and return the step to go on from; 0 if there is no state. Raises CorruptShard."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["recipe"] != recipe_digest:
            raise CorruptShard("is of another recipe", where=str(path), remedy="Train into a new output folder")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
    except (RuntimeError, KeyError, EOFError, ValueError, OSError) as error:
        raise CorruptShard(
            f"cannot be read ({str(error).splitlines()[0]})",
            where=str(path),
            remedy="Delete it to train this phase anew",
        ) from error
    return int(state["step"])


class Log:
    """`metrics.jsonl`: a line every few steps. After a resume, lines past the checkpoint are cut off and written anew."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
