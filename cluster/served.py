"""A server that a run starts for itself, in an environment of its own: waited for, watched, started again if it dies, and stopped.

It listens on loopback and takes a key made for it alone, which stands in no file and no command line. A guard (cluster/guard.py) ends it
when the process that started it is gone; should the guard be killed too, the next server that anyone starts here finds the orphan by a
mark in its environment and stops it. Knows nothing of what is served.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from cluster.errors import StageError
from cluster.machine import cache_folder
from cluster.recipe import Settings
from cluster.storage import publish_bytes

_MARK = "EDGEFUSION_SERVED"
_GUARD = Path(__file__).with_name("guard.py")
_TAIL_LINES = 15
_STOP_S = 20.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

log = logging.getLogger("edgefusion")


class ServerRecipe(Settings):
    """How a server in an environment of its own is run."""

    start_s: float = Field(default=900, gt=0, description="seconds until its first answer; models are loaded meanwhile")
    max_restarts: int = Field(default=2, ge=0, description="how often it is started again after it died")
    arguments: list[str] = Field(default=[], description="more words for its command line, such as [--dtype, float32]")
    variables: dict[str, str] = Field(
        default={}, description="more environment variables; they are written into the output folder, so no secrets"
    )


@dataclass(frozen=True)
class Service:
    """What to start."""

    name: str
    """What messages call it."""
    command: Callable[[int], list[str]]
    """Its words for a port; it must listen on 127.0.0.1."""
    variables: Mapping[str, str]
    """Its whole environment."""
    key_variable: str
    """The variable by which it learns its key."""
    ready: str
    """Path that answers 200 to the key once the server can work."""
    log: Path
    recipe: ServerRecipe = field(default_factory=ServerRecipe)
    remedy: str = ""


@dataclass
class _Running:
    """One life of a server; holds no reference to its owner."""

    guard: subprocess.Popen[bytes] | None = None
    record: Path | None = None
    key: str = field(default="", repr=False)
    url: str = ""
    log_start: int = 0

    def stop(self) -> None:
        """End the server and wait for it; safe to call twice."""
        guard, record, self.guard, self.record = self.guard, self.record, None, None
        if guard is not None:
            assert guard.stdin
            with contextlib.suppress(OSError):
                guard.stdin.close()
            try:
                guard.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
        if record is not None:
            _end_marked(record.stem)
            record.unlink(missing_ok=True)


class Served:
    """A server that answers. Stop it; one that is forgotten stops with this object, with this process, or after it."""

    def __init__(self, service: Service) -> None:
        """Starts it and waits for its first answer. Raises StageError with the end of its log if there will be none."""
        self.service, self.deaths, self._now = service, 0, _Running()
        self._given_up: StageError | None = None
        self._finalizer = weakref.finalize(self, self._now.stop)
        stop_orphans()
        self._start()

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return self._now.url

    @property
    def key(self) -> str:
        return self._now.key

    def is_alive(self) -> bool:
        return self._now.guard is not None and self._now.guard.poll() is None

    def revive(self) -> bool:
        """Start it again if it died; True if it did. Raises StageError, with the end of its log, once it died too often."""
        if self.is_alive():
            return False
        if self._given_up:
            raise self._given_up
        self.deaths += 1
        how = f"{self.service.name} {_how(self._now.guard.returncode if self._now.guard else 0)}"
        try:
            if self.deaths > self.service.recipe.max_restarts:
                raise self._error(how + (f", {self.deaths} times in all" if self.deaths > 1 else ""))
            log.warning("%s; it is started again. Its log: %s", how, self.service.log)
            self._now.stop()
            self._start()
        except StageError as error:
            self._given_up = error
            raise
        return True

    def stop(self) -> None:
        self._now.stop()

    def _start(self) -> None:
        for last in (False, False, True):
            try:
                self._launch()
                return
            except StageError as error:
                self._now.stop()
                # Between the choice of a free port and its use another program can take it.
                if last or "ddress already in use" not in str(error):
                    raise
            except BaseException:
                self._now.stop()
                raise

    def _launch(self) -> None:
        service, port, mark = self.service, _free_port(), uuid.uuid4().hex
        key = secrets.token_urlsafe(32)
        service.log.parent.mkdir(parents=True, exist_ok=True)
        with service.log.open("a") as file:
            file.write(f"--- {time.strftime('%F %T')} {service.name}, port {port}\n")
        # First the record, then the server: no moment in which it runs and nobody could know.
        record = _records() / f"{mark}.json"
        facts = {"owner": os.getpid(), "owner_began": psutil.Process().create_time(), "name": service.name}
        publish_bytes(record, json.dumps(facts).encode())
        words = [
            sys.executable,
            "-I",
            "-S",
            str(_GUARD),
            str(service.log),
            service.key_variable,
            *service.command(port),
        ]
        now = self._now
        now.record, now.key, now.url, now.log_start = (
            record,
            key,
            f"http://127.0.0.1:{port}",
            service.log.stat().st_size,
        )
        now.guard = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # The mark comes last, where no program's title reaches.
            env={**service.variables, service.key_variable: key, _MARK: mark},
            start_new_session=True,
        )
        self._wait()

    def _wait(self) -> None:
        service, end = self.service, time.monotonic() + self.service.recipe.start_s
        assert self._now.guard
        while not self._answers():
            code = self._now.guard.poll()
            if code is not None:
                raise self._error(f"{service.name} {_how(code)} before it answered")
            if time.monotonic() > end:
                raise self._error(f"{service.name} gave no answer in {service.recipe.start_s:g} s")
            time.sleep(0.2)

    def _answers(self) -> bool:
        """With our key, so that another program on this port is not taken for ours."""
        request = urllib.request.Request(
            self.url + self.service.ready, headers={"Authorization": f"Bearer {self._now.key}"}
        )
        try:
            with _NO_PROXY.open(request, timeout=5) as answer:
                return answer.status == 200
        except (OSError, ValueError, urllib.error.URLError):
            return False

    def _error(self, what: str) -> StageError:
        with contextlib.suppress(OSError):
            time.sleep(0.1)  # the guard may still be copying the last words
            said = self.service.log.read_bytes()[self._now.log_start :].decode(errors="replace")
            tail = "\n".join(said.strip().splitlines()[-_TAIL_LINES:])
            what += f"; its last lines:\n{tail}\n" if tail else " without a word"
        return StageError(
            what, where=str(self.service.log), remedy=self.service.remedy or "Mend the cause and run again"
        )


def stop_orphans() -> int:
    """Stop servers on this host whose owner is gone, by the mark that all their processes carry; returns how many there were."""
    found = 0
    for record in _records().glob("*.json"):
        try:
            facts: dict[str, Any] = json.loads(record.read_text())
            if _is_alive(int(facts["owner"]), float(facts["owner_began"])):
                continue
            name = str(facts["name"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            name = "a server"
        if ended := _end_marked(record.stem):
            log.warning("stopped %s that a killed run had left behind (%d processes)", name, ended)
            found += 1
        record.unlink(missing_ok=True)
    return found


def _records() -> Path:
    """One a host, for home folders may be shared."""
    return cache_folder() / "servers" / socket.gethostname()


def _is_alive(pid: int, began: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - began) < 1.0
    except psutil.Error:
        return False


def _end_marked(mark: str) -> int:
    """End all processes that carry the mark: asked first, then killed."""
    found = [process for process in psutil.process_iter() if _carries(process, mark)]
    for which, wait_s in ((signal.SIGTERM, 12.0), (signal.SIGKILL, 5.0)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(which)
        _, alive = psutil.wait_procs(found, wait_s)
        if not alive:
            break
    return len(found)


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        if sys.platform == "linux":
            # Raw: programs that write their title there (vLLM's do) blank the first variables, and psutil reads no further.
            return f"{_MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
        return process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):
        return False


def _how(code: int) -> str:
    """Of a guard's exit code, which is its server's."""
    if 128 < code < 160:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(code - 128).name}"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
