"""Reading ahead: the same samples, read while the worker is busy; errors at the draw that has them; no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from trainer.ahead import ReadAhead
from trainer.mix import MixedStream, Source
from trainer.stream import Example


def example(draw: int) -> Example:
    return Example(str(draw), "a fox", b"")


def test_the_next_draws_are_read_while_the_worker_is_busy() -> None:
    read: list[int] = []
    held = threading.Event()

    def slow(draw: int) -> Example:
        if draw >= 8:
            held.wait(60)
        read.append(draw)
        return example(draw)

    ahead = ReadAhead(4)
    ahead.take(slow, range(0, 4), range(4, 8))
    end = time.monotonic() + 60  # a step of training, at most
    while len(read) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(read) == list(range(8)), "read before they were asked for"
    assert [found.id for found in ahead.take(slow, range(4, 8), range(8, 12))] == ["4", "5", "6", "7"]
    assert sorted(read) == list(range(8)), "the next ones are not waited for"
    held.set()
    ahead.close()


def test_an_error_is_told_at_its_own_draw_and_a_rollback_forgets_what_it_went_past() -> None:
    def harmed(draw: int) -> Example:
        if draw == 5:
            raise ValueError("draw 5")
        return example(draw)

    before = set(threading.enumerate())
    ahead = ReadAhead(2)
    assert len(ahead.take(harmed, range(0, 4), range(4, 8))) == 4
    with pytest.raises(ValueError, match="draw 5"):
        ahead.take(harmed, range(4, 8), range(8, 12))
    assert [found.id for found in ahead.take(harmed, range(12, 14), range(14, 16))] == ["12", "13"]
    ahead.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("threads", [1, 4])
def test_a_mixture_is_read_in_the_same_order_by_any_number_of_threads(data, threads) -> None:
    def ids(threads: int) -> list[str]:
        stream = MixedStream([Source(data, 3), Source(data, 1)], seed=5)
        stream.ahead = ReadAhead(threads)
        # Steps that cross cycles and epochs, where the order is made anew.
        found = [
            found.id
            for step in range(60)
            for found in stream.read_draws(range(step * 40, step * 40 + 40), range(step * 40 + 40, step * 40 + 80), 32)
        ]
        stream.close()
        return found

    assert ids(threads) == ids(0)
