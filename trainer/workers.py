"""This process among the workers of a training, by Accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, gather_object

from cluster.errors import EdgeFusionError, StageError
from trainer.options import Tracker
from trainer.track import require_trackers

Answer = TypeVar("Answer")


def new_accelerator(mixed_precision: str, trackers: Sequence[Tracker] = ()) -> Accelerator:
    """This process's share of the training; raises StageError where workers would train on their own, unaware of each other."""
    # Accelerate looks for other CPU workers only if told that this is about CPUs.
    require_trackers(trackers)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        # In older PyTorch a pass without gradients (the target's) leaves its cast weights to the student's, which then learns next to nothing.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise StageError(
            f"{world} workers were started and Accelerate sees {accelerator.num_processes}",
            remedy="Set cluster.train_workers=1, or mend the distributed set-up (MASTER_ADDR, RANK, LOCAL_RANK)",
        )
    return accelerator


def loss_scale(accelerator: Accelerator) -> dict[str, Any]:
    """The state of fp16's loss scale; empty where there is none."""
    return {} if accelerator.scaler is None else accelerator.scaler.state_dict()


def begin_anew(accelerator: Accelerator, scale: dict[str, Any]) -> None:
    """Let go of a phase that ended: its weights and optimiser, which would hold memory and be unscaled with the next one's, and the loss scale
    that it came to, which a run resumed after it would not know. `scale` is what `loss_scale` said before the first phase."""
    accelerator.free_memory()
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scale)


def of_main(accelerator: Accelerator, ask: Callable[[], Answer]) -> Answer:
    """What the main process finds, in all of them; and what it raises of ours, so that none waits for it."""
    found: Any = None
    if accelerator.is_main_process:
        try:
            found = ask()
        except EdgeFusionError as error:
            found = error
    if accelerator.num_processes > 1:
        found = gather_object([found])[0]
    if isinstance(found, EdgeFusionError):
        raise found
    return found
