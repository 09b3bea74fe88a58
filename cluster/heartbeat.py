"""A sign of life in the output folder: `heartbeat.json` says which process on which host is at which step, and when it last said so.

Whoever reads it may be on another host, whose clock may be wrong. So age alone, reckoned by two clocks, proves nothing: a reader who doubts
looks again for a while, by its own clock, and believes what changes. On the writer's own machine its process is looked for instead: while it
is there it may go on at any moment, however long it was silent (Ctrl-Z, a disk that does not answer).
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
from cluster.machine import born, every, this_machine
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


def about_me() -> dict[str, Any]:
    """By which others find this process, or know that it is gone."""
    pid = os.getpid()
    return {"pid": pid, "born": born(pid), "host": socket.gethostname(), "machine": this_machine()}


@contextmanager
def heartbeat(folder: Path, still_mine: Callable[[], None] = lambda: None) -> Generator[Callable[[str], None]]:
    """Write the heartbeat until the block ends; yields a function to call with the name of each step as it begins.

    Nothing is written any more once `still_mine` raises an EdgeFusionError: the sign is another process's then.
    """
    facts: dict[str, Any] = {
        **about_me(),
        "state": "running",
        "step": "",
        "began": round(time.time(), 1),
        "step_began": round(time.time(), 1),
    }

    def write() -> None:
        # A full disk is told by the work itself; a heartbeat is not worth a run.
        with contextlib.suppress(EdgeFusionError, OSError):
            still_mine()
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

    `silent` is true where the process is there and stopped, or has not said for long that it lives.

    Where only the clocks of two hosts say that it is gone, or its clock is ahead of this one's, it is looked at again for some 15 s and counts as
    alive if it changes; `wait` is told so before, in words. With `clock_ahead_s`: by how much the writer's clock was ahead then.
    """
    facts = look()
    if not facts or facts["state"] != "running":
        return facts
    if _is_here(facts):
        silent = facts["age_s"] > _SILENT_S
        if is_gone(facts) or (silent and not _is_there_still(facts)):
            facts["state"] = "died"
        return {**facts, "silent": silent or _is_stopped(int(facts["pid"]))}
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
    if not _is_here(writer):
        return False
    try:
        os.kill(int(writer["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    began = born(int(writer["pid"]))
    if writer.get("born") is not None and began is not None and began != writer["born"]:
        return True  # another has its number now
    # One that was killed and that nobody waited for, as in a container without an init, still has its number.
    with contextlib.suppress(psutil.Error):
        return psutil.Process(int(writer["pid"])).status() == psutil.STATUS_ZOMBIE
    return False


def _is_there_still(writer: dict[str, Any]) -> bool:
    """It is that very process and no later one of its number; False too for a sign by an earlier version, which does not say enough."""
    return writer.get("born") is not None and born(int(writer["pid"])) == writer["born"]


def _is_stopped(pid: int) -> bool:
    """By Ctrl-Z or SIGSTOP."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _is_here(writer: dict[str, Any]) -> bool:
    return writer["machine"] == this_machine() if "machine" in writer else writer["host"] == socket.gethostname()
