"""Reads and decodes the next samples while a worker learns from these.

A sample is a function of its draw number, so when it is read changes nothing. Threads are enough: decoders let go of the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from trainer.stream import Example


class ReadAhead:
    """Samples by draw number, read by `threads` threads; with none, only when they are asked for."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") if threads else None
        self._coming: dict[int, Future[Example]] = {}

    def take(
        self, read: Callable[[int], Example], draws: Sequence[int], following: Sequence[int] = ()
    ) -> list[Example]:
        """The samples of `draws` by `read`, which is called from any thread; begins to read `following`.

        Draws must not go back. Raises what reading one of `draws` raised; what is wrong with the others is told when they are asked for.
        """
        if self._pool is None:
            return [read(draw) for draw in draws]
        for draw in [draw for draw in self._coming if draw < draws[0]]:  # a rollback went past them
            self._coming.pop(draw).cancel()
        for draw in (*draws, *following):
            if draw not in self._coming:
                self._coming[draw] = self._pool.submit(read, draw)
        return [self._coming.pop(draw).result() for draw in draws]

    def close(self) -> None:
        """What was not asked for is thrown away."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
