"""A sign of life in the output folder: `heartbeat.json` says which process on which host is at which step, and when it last said so.

Whoever reads it may be on another host, whose clock may be wrong. So age alone, reckoned by two clocks, proves nothing: a reader who doubts
looks again for a while, by its own clock, and believes what changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import EdgeFusionError
from cluster.machine import every, this_machine
from cluster.storage import publish_bytes

HEARTBEAT = "heartbeat.json"
EVERY_S = 5.0
Look = Callable[[], dict[str, Any]]
"""Reads a sign of life (`read_sign`), freshly each time."""
_SILENT_S = 60.0
"""Longer than a shared file system may keep a file's old contents from other hosts, seconds."""
_LOOK_AGAIN_S = 3 * EVERY_S
_CERTAIN_S = 86_400.0
"""No clock that a cluster runs on is as wrong as that."""


@contextmanager
def heartbeat(folder: Path) -> Generator[Callable[[str], None]]:
    """Write the heartbeat until the block ends; yields a function to call with the name of each step as it begins."""
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": this_machine(),
        "state": "running",
        "step": "",
        "began": round(time.time(), 1),
        "step_began": round(time.time(), 1),
    }

    def write() -> None:
        # A full disk is told by the work itself; a heartbeat is not worth a run.
        with contextlib.suppress(EdgeFusionError, OSError):
            publish_bytes(folder / HEARTBEAT, (json.dumps({**facts, "when": round(time.time(), 1)}) + "\n").encode())

    def begin(step: str) -> None:
        facts.update(step=step, step_began=round(time.time(), 1))
        write()
        # The same moment by the storage's clock, which dates the files of the step.
        with contextlib.suppress(OSError):
            facts["step_began_there"] = (folder / HEARTBEAT).stat().st_mtime

    with every(EVERY_S, write):
        try:
            yield begin
        except BaseException as error:
            facts.update(state="stopped", why=(str(error) or type(error).__name__)[:500])
            raise
        else:
            facts.update(state="finished")


def read_heartbeat(folder: Path, wait: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The last heartbeat in `folder`, judged as `judge_sign` does."""
    return judge_sign(lambda: _asked(folder / HEARTBEAT), wait)


def judge_sign(look: Look, wait: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The sign of life that `look` reads, with `state` turned into `died` if whoever wrote it is gone, and `age_s`; empty if there is none.

    Where only the clocks of two hosts say that it is gone, or its clock is ahead of this one's, it is looked at again for some 15 s and counts as
    alive if it changes; `wait` is told so before, in words. With `clock_ahead_s`: by how much the writer's clock was ahead then.
    """
    facts = look()
    if not facts or facts["state"] != "running":
        return facts
    if facts.get("machine", "") == this_machine() or ("machine" not in facts and facts["host"] == socket.gethostname()):
        if facts["age_s"] > _SILENT_S or is_gone(facts):
            facts["state"] = "died"
        return facts
    if -EVERY_S <= facts["clock_age_s"] <= _SILENT_S:
        return facts
    if facts["clock_age_s"] > _CERTAIN_S:
        return {**facts, "state": "died"}
    if wait:
        apart = abs(facts["clock_age_s"])
        way = "old" if facts["clock_age_s"] > 0 else "in the future"
        wait(
            f"the last sign of life from {facts['host']} is {apart:.0f} s {way} by this machine's clock, and the two clocks may differ: "
            f"looking again for {_LOOK_AGAIN_S:.0f} s"
        )
    return _look_again(look, facts)


def find_living(look: Look, wait: Callable[[str], None]) -> dict[str, Any]:
    """What a living process says in the sign of life that `look` reads; empty if it ended or is gone.

    A fresh sign from another machine may be the last one of a process that is gone, so it is believed once it changes; `wait` is told so.
    """
    facts = judge_sign(look, wait)
    if facts.get("state") == "running" and facts.get("machine") != this_machine() and "clock_ahead_s" not in facts:
        wait(f"{facts['host']} was at this folder a moment ago: looking for {_LOOK_AGAIN_S:.0f} s whether it still is")
        facts = _look_again(look, facts)
    return facts if facts.get("state") == "running" else {}


def _look_again(look: Look, first: dict[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + _LOOK_AGAIN_S
    while time.monotonic() < end:
        time.sleep(1.0)
        now = look()
        if now and now["when"] != first["when"]:
            return {**now, "age_s": 0.0, "clock_ahead_s": round(-now["clock_age_s"], 1)}
    return {**first, "state": "died"}


def read_sign(path: Path) -> dict[str, Any]:
    """A file by which a process says that it lives, with its age by this machine's clock; empty if there is none that can be read."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        facts["clock_age_s"] = time.time() - float(facts["when"])
        facts["age_s"] = max(0.0, facts["clock_age_s"])
        _ = facts["state"], str(facts["host"]), int(facts["pid"])
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _asked(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # a shared file system then asks its server what is there
    return read_sign(path)


def is_gone(writer: dict[str, Any]) -> bool:
    """The process that wrote its `machine` (or, before that was written, its `host`) and `pid` is known not to live any more; only this
    machine's can be asked."""
    here = writer["machine"] == this_machine() if "machine" in writer else writer["host"] == socket.gethostname()
    if not here:
        return False
    try:
        os.kill(int(writer["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # One that was killed and that nobody waited for, as in a container without an init, still has its number.
    with contextlib.suppress(psutil.Error):
        return psutil.Process(int(writer["pid"])).status() == psutil.STATUS_ZOMBIE
    return False
