"""Batches that shrink where the memory does not reach: halved and tried again, never given up for a picture that would fit alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.errors import StageError

Thing = TypeVar("Thing")
Found = TypeVar("Found")
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error on a GPU, its RuntimeError on a CPU, or Python's own."""
    import torch

    told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


class BatchSize:
    """How many things a model gets at once. Short batches are filled up, so that neighbours change no bit.

    A smaller batch can change the last bits of a picture on some devices: it is said once, with the key to set.
    """

    def __init__(self, most: int, key: str) -> None:
        self.now, self.key = most, key

    def map(self, things: Sequence[Thing], run: Callable[[list[Thing]], Sequence[Found]]) -> list[Found]:
        """What `run` gives for each thing. Raises StageError if not even one fits."""
        found: list[Found] = []
        while len(found) < len(things):
            part = list(things[len(found) : len(found) + self.now])
            try:
                found += list(run(part + [part[-1]] * (self.now - len(part))))[: len(part)]
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve()  # after the error is gone, for its traceback holds the tensors
        return found

    def _halve(self) -> None:
        import gc

        import torch

        if self.now == 1:
            raise StageError(
                "not even one picture fits into memory",
                where=self.key,
                remedy="Use a smaller model or size, another dtype, or a device with more memory",
            )
        self.now //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logging.getLogger("edgefusion").warning("out of memory: going on with %s: %d", self.key, self.now)
