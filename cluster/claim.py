"""Who may write into an output folder: one process at a time, whatever its host.

`claim-000007.json` there is the seventh claim. A number is given once (`storage.publish_new`), so of two who start at the same moment one has
it. Its owner writes it again every few seconds; the next number may be taken once that owner has ended or, by the rules of
`cluster/heartbeat.py`, is gone. Earlier claims are removed. The last one stays, for its number must not come again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.heartbeat import EVERY_S, HEARTBEAT, find_living, read_sign
from cluster.machine import every, this_machine
from cluster.storage import publish_bytes, publish_new

_CLAIM = re.compile(r"claim-([0-9]{6,})\.json")


@contextmanager
def claimed(folder: Path, what: str, wait: Callable[[str], None]) -> Generator[Callable[[], None]]:
    """Hold `folder` for `what` until the block ends; yields what raises LedgerConflict once another process holds it.

    Raises LedgerConflict as `refuse_second_driver` does, EdgeFusionError for a folder that cannot be written.
    """
    number = _last(folder) + 1  # before the look at who has the last one: whoever comes in between has this number
    refuse_second_driver(folder, wait)
    path, facts = _claim(folder, number), _about_me(what)

    def written() -> bytes:
        return (json.dumps({**facts, "when": round(time.time(), 1)}) + "\n").encode()

    def still_mine() -> None:
        if _last(folder) > number:
            raise _taken(folder, _holder(folder))

    def refresh() -> None:
        # A full disk is told by the work itself.
        with contextlib.suppress(EdgeFusionError, OSError):
            still_mine()
            publish_bytes(path, written())

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
    with every(EVERY_S, refresh):
        try:
            yield still_mine
        finally:
            facts["state"] = "ended"


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
    where = {"pid": os.getpid(), "host": socket.gethostname(), "machine": this_machine()}
    # The id: two claims never have the same bytes, which would be no conflict.
    return {**where, "what": what, "state": "running", "id": uuid.uuid4().hex}


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
    return LedgerConflict(
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{what} runs into this folder at this moment",
        where=str(folder),
        remedy="Wait for it (edgefusion status shows how far it is) or stop it first",
    )
