"""Who may write into an output folder: one process at a time, whatever its host.

`claim-000007.json` there is the seventh claim. A number is given once (`storage.publish_new`), so of two who start at the same moment one has
it. Its owner writes it again every few seconds; the next number may be taken once that owner has ended or, by the rules of
`cluster/heartbeat.py`, is gone. Earlier claims are removed. The last one stays, for its number must not come again. Whoever lost the folder all
the same (his machine slept, and another machine took it for gone) is interrupted in whatever he does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.heartbeat import EVERY_S, HEARTBEAT, about_me, find_living, read_sign
from cluster.machine import every, this_machine
from cluster.storage import publish_bytes, publish_new

_SIGNAL = signal.SIGUSR2
_TELL_AGAIN = 12
"""Looks, each `EVERY_S` after the last."""
_CLAIM = re.compile(r"claim-([0-9]{6,})\.json")


@contextmanager
def claimed(folder: Path, what: str, wait: Callable[[str], None]) -> Generator[Callable[[], None]]:
    """Hold `folder` for `what` until the block ends; yields what raises LedgerConflict once another process holds it.

    Of a block in the main thread that comes out within seconds, whatever it waits for. Raises LedgerConflict as `refuse_second_driver` does,
    EdgeFusionError for a folder that cannot be written.
    """
    number = _last(folder) + 1  # before the look at who has the last one: whoever comes in between has this number
    refuse_second_driver(folder, wait)
    path, facts, loss = _claim(folder, number), _about_me(what), _Loss()

    def written() -> bytes:
        return (json.dumps({**facts, "when": round(time.time(), 1)}) + "\n").encode()

    def still_mine() -> None:
        if _last(folder) > number:
            raise _taken(folder, _holder(folder))

    def refresh() -> None:
        try:
            still_mine()
            publish_bytes(path, written())
        except LedgerConflict as error:
            loss.tell(error)
        except (EdgeFusionError, OSError):
            pass  # a full disk is told by the work itself

    try:
        publish_new(path, written())
    except LedgerConflict:
        raise _taken(folder, read_sign(path)) from None
    try:
        still_mine()  # the number may have been given long ago, and its file removed
    except LedgerConflict:
        path.unlink(missing_ok=True)
        raise
    for earlier in _numbers(folder):
        if earlier < number:
            _claim(folder, earlier).unlink(missing_ok=True)
    with loss.raised_here(), every(EVERY_S, refresh):
        try:
            yield still_mine
        finally:
            facts["state"] = "ended"
            loss.over = True


class _Loss:
    """That the folder is another's now: noted by one thread, raised in the main one.

    By a signal, which ends whatever the main thread waits for, Ray too. Not by SIGINT: shells without job control start programs that
    ignore it, and Ray Train has a use of its own for it. As a KeyboardInterrupt, which no `except Exception` on the way keeps to itself.
    """

    def __init__(self) -> None:
        self.error: LedgerConflict | None = None
        self.over = False
        """The block has ended, and what cleans up after it is not interrupted."""
        self._told = 0
        self._listens = False

    def tell(self, error: LedgerConflict) -> None:
        self.error = self.error or error
        # Again now and then, should a library have kept the last one to itself, but not at once: the first one has things to put away.
        if self._listens and not self.over and self._told % _TELL_AGAIN == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
        self._told += 1

    @contextmanager
    def raised_here(self) -> Generator[None]:
        """Turn the interruption of the block into the LedgerConflict."""
        if threading.current_thread() is not threading.main_thread():  # nothing can interrupt it
            yield
            return
        before = signal.signal(_SIGNAL, self._interrupt)
        self._listens = True
        try:
            yield
        except KeyboardInterrupt:
            if self.error:
                raise self.error from None
            raise
        finally:
            self._listens, self.over = False, True
            # By default the signal would end the process, and one may still be on its way.
            signal.signal(_SIGNAL, before if callable(before) else _nothing)
        if self.error:
            raise self.error

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.error and not self.over:
            raise KeyboardInterrupt


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """The folder is given back; who tells of its loss is late."""


def refuse_second_driver(folder: Path, wait: Callable[[str], None]) -> None:
    """Raises LedgerConflict if another process writes into `folder` now: each would sweep away what the other is writing.

    A fresh sign of life from another machine may be the last one of a process that is gone, so it is believed once it changes; `wait` is told so.
    """
    living = find_living(lambda: _holder(folder), wait)
    if living and not (living.get("machine") == this_machine() and int(living["pid"]) == os.getpid()):
        raise _taken(folder, living)


def is_claim(name: str) -> bool:
    """A file of this name says who writes into its folder, and nothing of what lies there."""
    return _CLAIM.fullmatch(name) is not None


def _about_me(what: str) -> dict[str, Any]:
    # The id: two claims never have the same bytes, which would be no conflict.
    return {**about_me(), "what": what, "state": "running", "id": uuid.uuid4().hex}


def _holder(folder: Path) -> dict[str, Any]:
    """Whoever claimed last, as he last wrote; of a run by an earlier version, which knew no claims, its heartbeat."""
    number = _last(folder)
    return read_sign(_claim(folder, number) if number else folder / HEARTBEAT)


def _last(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _numbers(folder: Path) -> list[int]:
    try:
        found = [_CLAIM.fullmatch(name) for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # a server that does not answer is no proof that nobody is there
        words = f"cannot be listed ({error.strerror})"
        raise EdgeFusionError(words, where=str(folder), remedy="Check the file system and the permissions") from error
    return [int(match[1]) for match in found if match]


def _claim(folder: Path, number: int) -> Path:
    return folder / f"claim-{number:06d}.json"


def _taken(folder: Path, holder: dict[str, Any]) -> LedgerConflict:
    what = f" ({holder['what']})" if holder.get("what") else ""
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{what}"
    if holder.get("silent"):
        return LedgerConflict(
            f"{who} has this folder and said nothing for {holder['age_s']:.0f} s: it is stopped or stuck",
            where=str(folder),
            remedy=f"End it (kill -9 {holder['pid']}) or let it go on (fg, or kill -CONT {holder['pid']})",
        )
    return LedgerConflict(
        f"{who} runs into this folder at this moment",
        where=str(folder),
        remedy="Wait for it (edgefusion status shows how far it is) or stop it first",
    )
