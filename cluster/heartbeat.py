"""A sign of life in the output folder: `heartbeat.json` says which process on which host is at which step, and when it last said so."""

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

from cluster.errors import EdgeFusionError
from cluster.machine import every
from cluster.storage import publish_bytes

HEARTBEAT = "heartbeat.json"
EVERY_S = 5.0
_SILENT_S = 60.0
"""Longer than a shared file system may keep a file's old contents from other hosts, seconds."""


@contextmanager
def heartbeat(folder: Path) -> Generator[Callable[[str], None]]:
    """Write the heartbeat until the block ends; yields a function to call with the name of each step as it begins."""
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
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

    with every(EVERY_S, write):
        try:
            yield begin
        except BaseException as error:
            facts.update(state="stopped", why=(str(error) or type(error).__name__)[:500])
            raise
        else:
            facts.update(state="finished")


def read_heartbeat(folder: Path) -> dict[str, Any]:
    """The last heartbeat, with `state` turned into `died` if whoever wrote it is gone, and `age_s`; empty if there is none."""
    try:
        facts: dict[str, Any] = json.loads((folder / HEARTBEAT).read_text())
        facts["age_s"] = max(0.0, time.time() - facts["when"])
        if facts["state"] == "running" and (facts["age_s"] > _SILENT_S or is_gone(facts["host"], facts["pid"])):
            facts["state"] = "died"
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_gone(host: str, pid: int) -> bool:
    """A process is known not to live any more; only this host's can be asked."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
