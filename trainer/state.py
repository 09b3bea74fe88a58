"""What a training must keep to go on as if nothing had happened, saved as one file that is whole or absent; and its log.

Data order and noise are functions of the draw number, so numbers are all there is to their state.
"""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import CorruptShard
from cluster.storage import publish_bytes, publish_file

METRICS = "metrics.jsonl"
VERSION = 2
"""Of the state's layout; raised when an older program could misread it."""


class Average:
    """Exponential moving average of a model's weights, as a frozen model of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        means: list[torch.Tensor] = list(self.model.parameters())
        values = [v.detach().to(m.dtype) for m, v in zip(means, model.parameters(), strict=True)]
        torch._foreach_lerp_(means, values, 1 - self.decay)  # one call for all tensors


@dataclass
class Found:
    """The step to go on from, and what else was kept with it."""

    step: int = 0
    more: dict[str, Any] = field(default_factory=dict)


def save_state(
    path: Path,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimiser: Any,
    recipe_digest: str,
    more: dict[str, Any] | None = None,
) -> None:
    """Write `path`, replacing the older state only when the new one is whole."""
    state = {
        "version": VERSION,
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
        "recipe": recipe_digest,
        "more": more or {},
    }
    publish_file(path, lambda partial: torch.save(state, partial))


def load_state(path: Path, model: nn.Module, average: nn.Module, optimiser: Any, recipe_digest: str) -> Found:
    """Restore all in place; step 0 if there is no state. Raises CorruptShard."""
    if not path.exists():
        return Found()
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state.get("version", 1) > VERSION:
            raise CorruptShard(
                f"was written by a newer version (layout {state['version']}; this one reads up to {VERSION})",
                where=str(path),
                remedy="Go on with the newer version, or delete it to train this phase anew",
            )
        if state["recipe"] != recipe_digest:
            raise CorruptShard(
                "is of another recipe or data set",
                where=str(path),
                remedy="Train into a new output folder; encodings that the data set got since then can be deleted again",
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        return Found(int(state["step"]), dict(state.get("more", {})))
    except (RuntimeError, KeyError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise CorruptShard(
            f"cannot be read ({str(error).splitlines()[0]})",
            where=str(path),
            remedy="Delete it to train this phase anew",
        ) from error


class Log:
    """`metrics.jsonl`, a line a step, and the same as TensorBoard's event file beside it.

    After a resume, lines past the checkpoint are cut off and written anew. The event file is written again from the lines, so no
    reader ever sees a point twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.path = folder / METRICS
        kept = [row for row in read_log(self.path) if row["step"] <= step]
        publish_bytes(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._events = SummaryWriter(str(folder), flush_secs=10)
        for row in kept:
            self._draw(row)
        self._events.flush()

    def write(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._draw(row)

    def close(self) -> None:
        self._events.close()

    def _draw(self, row: dict[str, Any]) -> None:
        for name in row.keys() - {"step", "steps", "time_s"}:
            self._events.add_scalar(name, row[name], int(row["step"]), walltime=row.get("time_s"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
