"""Stands between a run and a server that it started: when the run ends, however it ends, the server ends.

    python guard.py LOG KEY_VARIABLE WORD ...

Runs the words as a process group of its own and copies what they say into LOG, without the key that KEY_VARIABLE holds. Ends the group once
standard input closes, the process that started this one is gone, or it is told to (SIGTERM). Exits with the server's code, 128 + N for
signal N. A program of its own, run by path: it imports the standard library and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

_GRACE_S = 10.0
"""What the server gets to end by itself, seconds."""
_LOOK_S = 0.5
_LINE_BYTES = 64 << 10
_DEATH_SIGNAL = 1
"""Linux' PR_SET_PDEATHSIG."""


def main(log: str, key_variable: str, words: list[str]) -> int:
    parent = os.getppid()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    key = os.environ.get(key_variable, "").encode()
    with open(log, "ab", buffering=0) as sink:
        try:
            server = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_the_guard,
            )
        except OSError as error:
            sink.write(f"{words[0]} cannot be started: {error}\n".encode())
            return 127
        assert server.stdout
        copy = threading.Thread(target=_copy, args=(server.stdout, sink, key), daemon=True)
        copy.start()
        while server.poll() is None and not ended.is_set() and os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], _LOOK_S)
            if readable and not os.read(0, 1):
                break
        _end(server)
        copy.join(2.0)
    code = server.returncode
    return code if code >= 0 else 128 - code


def _die_with_the_guard() -> None:
    """Should even this process be killed without a word, Linux kills the server; elsewhere the next run finds it by its mark."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _copy(source: BinaryIO, sink: BinaryIO, key: bytes) -> None:
    """Line by line, for a key may not be cut in two. A full disk must not stop the server."""
    while line := source.readline(_LINE_BYTES):
        with contextlib.suppress(OSError):
            sink.write(line.replace(key, b"***") if key else line)


def _end(server: subprocess.Popen[bytes]) -> None:
    """The whole group: asked first, then killed; also what a server that ended left behind."""
    _signal(server.pid, signal.SIGTERM)
    end = time.monotonic() + _GRACE_S
    while server.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    _signal(server.pid, signal.SIGKILL)
    server.wait()


def _signal(group: int, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, which)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
