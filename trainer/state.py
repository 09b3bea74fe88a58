"""What a training must keep to go on as if nothing had happened; and its log.

Data order and noise are functions of the draw number, so numbers are all there is to their state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from cluster.errors import CorruptShard
from cluster.storage import publish_bytes
from trainer.checkpoints import best_checkpoint, best_weights, read_checkpoint, save_best, save_checkpoint
from trainer.identity import Identity
from trainer.looks import Look, read_looks
from trainer.shard import load_whole, load_whole_optimiser, whole

METRICS = "metrics.jsonl"
VERSION = 3
"""Of the state's layout; raised when an older program could misread it."""


class Average:
    """Exponential moving average of a model's weights, as a frozen model of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            module._forward_hooks.clear()  # they watch the student
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


def state_of(
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimiser: Any,
    identity: Identity,
    more: dict[str, Any] | None = None,
    kept: bool = True,
) -> dict[str, Any]:
    """A copy, in main memory, of all that a training goes on from; where tensors are sharded, all workers must call it together, and those
    that do not keep it get no tensors."""
    take = _copied if kept else _dropped
    return {
        "version": VERSION,
        "step": step,
        "model": whole(model.state_dict(), take),
        "average": whole(average.state_dict(), take),
        "optimiser": whole(optimiser.state_dict(), take),
        "recipe": copy.deepcopy(identity.facts),
        "more": whole(more or {}, take),
    }


def save_state(folder: Path, state: dict[str, Any], config: str | None = None, keep: int = 1) -> None:
    """Write a checkpoint below `folder`; older ones beyond `keep` go only when it is whole. `config` makes its weights a diffusers folder."""
    save_checkpoint(folder, state, config, keep)


class Background:
    """One piece of work at a time beside the training, which so does not wait for the disk."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, work: Callable[[], object]) -> None:
        """Begin it, once the one before has ended. Raises what that one raised."""
        self.wait()

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until it has ended. Raises what it raised, such as a disk that is full."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    # As safetensors wants it; `load_whole` puts it back as the model lies in memory.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _dropped(_: torch.Tensor) -> torch.Tensor:
    return torch.empty(0)


def load_state(path: Path | None, model: nn.Module, average: nn.Module, optimiser: Any, identity: Identity) -> Found:
    """Restore all in place from a checkpoint; step 0 if there is none. Raises CorruptShard, also for the checkpoint of another training."""
    if path is None:
        return Found()
    with _readable(path):
        state = read_checkpoint(path)
        if state.get("version", 1) > VERSION:
            raise CorruptShard(
                f"was written by a newer version (layout {state['version']}; this one reads up to {VERSION})",
                where=str(path),
                remedy="Go on with the newer version, or delete it to train this phase anew",
            )
        identity.refuse_another(state["recipe"], path)
        load_whole(model, state["model"])
        load_whole(average, state["average"])
        load_whole_optimiser(optimiser, state["optimiser"])
        return Found(int(state["step"]), dict(state.get("more", {})))


@dataclass
class Best:
    """The weights that drew the best pictures so far, kept below `folder`."""

    folder: Path
    identity: Identity
    config: str | None = None
    score: float = -math.inf

    def offer(
        self, score: float, step: int, weights: Callable[[], dict[str, torch.Tensor]]
    ) -> Callable[[], None] | None:
        """If they are better than what is kept, the work of keeping a copy of them, which was taken here and now."""
        if score <= self.score:
            return None
        self.score, copied = score, whole(weights(), _copied)
        facts = {"recipe": self.identity.facts, "step": step, "score": score}
        return lambda: save_best(self.folder, copied, self.config, facts)

    def recall(self, weights: bool = True) -> dict[str, Any] | None:
        """`step`, `score` and, if `weights` are asked for, `average`; or nothing. Raises CorruptShard."""
        found = best_checkpoint(self.folder)
        if found is None:
            return None
        place, kept = found
        with _readable(place):
            self.identity.refuse_another(kept["recipe"], place)
            self.score = float(kept["score"])
            return {"average": best_weights(place)} | kept if weights else kept


@contextlib.contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except (RuntimeError, KeyError, EOFError, ValueError, OSError, pickle.UnpicklingError, SafetensorError) as error:
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
        for look in read_looks(folder):
            if look.step <= step:
                self._show(look)
        self._events.flush()

    def write(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._draw(row)

    def show(self, step: int) -> Look | None:
        """The look at `step`, which lies beside the log."""
        found = next((look for look in read_looks(self.path.parent) if look.step == step), None)
        if found:
            self._show(found)
        return found

    def close(self) -> None:
        self._events.close()

    def _show(self, look: Look) -> None:
        self._events.add_image("looks", np.asarray(Image.open(look.sheet).convert("RGB")), look.step, dataformats="HWC")
        for name, score in look.named_scores().items():
            self._events.add_scalar(name, score, look.step)

    def _draw(self, row: dict[str, Any]) -> None:
        for name, value in points_of(row).items():
            self._events.add_scalar(name, value, int(row["step"]), walltime=row.get("time_s"))


def points_of(row: dict[str, Any]) -> dict[str, Any]:
    """What of a line is a curve over the steps."""
    return {name: value for name, value in row.items() if name not in ("step", "steps", "began_step", "time_s")}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
