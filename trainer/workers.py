"""This process among the workers of a training, by Accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cluster.errors import EdgeFusionError, StageError
from trainer.options import Tracker
from trainer.track import require_trackers

Answer = TypeVar("Answer")


def new_accelerator(mixed_precision: str, trackers: Sequence[Tracker] = ()) -> Accelerator:
    """This process's share of the training; raises StageError where workers would train on their own, unaware of each other."""
    # Accelerate looks for other CPU workers only if told that this is about CPUs.
    require_trackers(trackers)
    accelerator = Accelerator(
        mixed_precision=mixed_precision, cpu=not torch.cuda.is_available(), log_with=list(trackers) or None
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise StageError(
            f"{world} workers were started and Accelerate sees {accelerator.num_processes}",
            remedy="Set cluster.train_workers=1, or mend the distributed set-up (MASTER_ADDR, RANK, LOCAL_RANK)",
        )
    return accelerator


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
