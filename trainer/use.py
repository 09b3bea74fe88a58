"""How much of the machine a training uses, for its log."""

from __future__ import annotations

import functools
import logging

import psutil
import torch

log = logging.getLogger("edgefusion")


def machine_use() -> dict[str, float]:
    """`memory_gib`: the most that was allocated on the GPU, or what this process holds where there is none. `gpu_percent`: the share of the
    driver's last sample, a second or less, in which a kernel ran; absent without a GPU or without what asks its driver, never a made-up 0."""
    if not torch.cuda.is_available():
        return {"memory_gib": round(psutil.Process().memory_info().rss / 2**30, 2)}
    found = {"memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    try:
        found["gpu_percent"] = float(torch.cuda.utilization())
    except Exception as error:  # each driver's library has errors of its own
        _say_once(f"{type(error).__name__}: {error}")
    return found


@functools.cache
def _say_once(why: str) -> None:
    log.warning("the training log has no gpu_percent (%s); pip install 'edgefusion[gpu]' for NVIDIA's", why)
