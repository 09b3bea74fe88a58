"""The log of a run: what the driver and its workers did, one JSON object a line, in the folder `log` of the output folder.

Owns the shape of a line and how it gets to disk: one append of a whole line, so that a crash costs at most the line that is being written, and
whoever comes next begins a new one. Each machine writes a file of its own, for hosts that share a file system may overwrite each other's
appends. No line is worth a run: what cannot be written is left out. Nothing that a run makes depends on it; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
import re
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from cluster.machine import this_machine
from cluster.progress import console
from cluster.stage import DEAD, Unit
from cluster.tracing import span

LOG = "log"
Event = dict[str, Any]
PROBLEMS = ("warning", "error")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""A shorter value would blank ordinary words."""
_IN_TEXT = (
    (re.compile(r"(://[^/@\s:\"]*:)[^/@\s\"]+@"), r"\1***@"),
    (re.compile(r"((?:bearer|basic) +)[^\s\"\\]{8,}", re.IGNORECASE), r"\1***"),
    (
        re.compile(r"([?&](?:X-(?:Amz|Goog)-[A-Za-z-]+|sig|signature|token|access_token|key)=)[^&\s\"\\]+", re.I),
        r"\1***",
    ),
)
# A level of its own: libraries raise the root's, and our warnings would go with theirs.
logging.getLogger("edgefusion").setLevel(logging.INFO)
_TAIL_BYTES = 64 << 10
_TAIL_FILES = 256


@dataclass(frozen=True)
class Events:
    """Where a run's events go; small, and sent to every worker."""

    folder: Path | None
    """None: nowhere."""
    run: str = ""
    """Names the output folder's run, through all its reruns."""
    start: str = ""
    """Names this start of its driver."""
    units: bool = True
    """Note every unit; else only those in which something died."""
    trace: str = ""
    """W3C traceparent of the span in which this happens; empty without OpenTelemetry."""

    def say(self, event: str, level: str = "info", **facts: Any) -> None:
        """Append a line; `facts` that are None are left out."""
        if self.folder is None:
            return
        line: Event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "event": event,
            "run": self.run,
            "start": self.start,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **({"trace": self.trace.split("-")[1]} if self.trace else {}),
            **{name: value for name, value in facts.items() if value is not None},
        }
        with contextlib.suppress(OSError):
            _append(self.folder / f"{_file_name()}.jsonl", scrubbed(json.dumps(line, ensure_ascii=False, default=str)))

    @contextmanager
    def during(self, what: str, **facts: Any) -> Generator[Events]:
        """Say that `what` began and how it ended; yields what notes events inside it."""
        began = time.monotonic()
        with span(what, facts, self.trace) as trace:
            inner = replace(self, trace=trace)
            inner.say(f"{what} began", **facts)
            try:
                yield inner
            except BaseException as error:
                seconds = round(time.monotonic() - began, 3)
                inner.say(f"{what} failed", "error", **facts, seconds=seconds, error=first_words(error))
                raise
            inner.say(f"{what} ended", **facts, seconds=round(time.monotonic() - began, 3))

    @contextmanager
    def work(self, stage: str, unit: Unit) -> Generator[list[Unit]]:
        """Around a stage's work on a unit; the block puts the finished unit into the list."""
        done: list[Unit] = []
        began = time.monotonic()
        with span(stage, {"unit": unit.id, "rows": len(unit.rows)}, self.trace):
            try:
                yield done
            except Exception as error:
                self.say("unit failed", "error", stage=stage, unit=unit.id, error=first_words(error))
                raise
        died = [row for old, row in zip(unit.rows, done[0].rows, strict=True) if _died(old, row)] if done else []
        if self.units or died:
            samples = [{"id": row["id"], "reason": row.get("reason")} for row in died]
            seconds = round(time.monotonic() - began, 3)
            self.say(
                "unit",
                "warning" if died else "info",
                stage=stage,
                unit=unit.id,
                rows=len(unit.rows),
                seconds=seconds,
                dead=samples or None,
            )

    @contextmanager
    def listening(self) -> Generator[None]:
        """Also note what our own code logs (`logging.getLogger("edgefusion")`) until the block ends, and say its warnings on stderr."""
        log, handlers = logging.getLogger("edgefusion"), (_Handler(self), _Aloud(logging.WARNING))
        for handler in handlers:
            log.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                log.removeHandler(handler)

    def listen(self) -> None:
        """As `listening`, for a worker process that does nothing else until it ends."""
        logging.getLogger("edgefusion").addHandler(_Handler(self))


NOWHERE = Events(None)


class _Handler(logging.Handler):
    def __init__(self, events: Events) -> None:
        super().__init__(logging.INFO)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        facts: Event = getattr(record, "facts", {})
        self._events.say("message", record.levelname.lower(), text=record.getMessage(), **facts)


class _Aloud(logging.Handler):
    """Above the bars: where a handler is set, Python no longer says warnings by itself."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(
            f"{record.levelname.lower()}: {record.getMessage()}", soft_wrap=True, markup=False, highlight=False
        )


def _died(before: Event, after: Event) -> bool:
    return after["outcome"] == DEAD and before["outcome"] != DEAD


def first_words(error: BaseException) -> str:
    """Its kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


def _file_name() -> str:
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}-{this_machine()[:8]}"


def _append(path: Path, line: str) -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        file = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, flags, 0o666)
    try:
        end = os.lseek(file, 0, os.SEEK_END)
        torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"
        # One call of the system: processes of one machine do not cut into each other's lines. The size may be read in the middle of another's
        # write, which then looks torn: that costs an empty line, which readers of JSON lines skip.
        os.write(file, b"\n" * torn + line.encode(errors="replace") + b"\n")
    finally:
        os.close(file)


def scrubbed(text: str) -> str:
    """`text` (or a line of JSON) without the secrets of this process's environment, passwords in URLs and signatures of signed ones."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            for spelling in {value, json.dumps(value, ensure_ascii=False)[1:-1]}:
                text = text.replace(spelling, "***")
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def read_events(out: Path) -> Iterator[Event]:
    """All events of the run in `out`, by their time as each machine's clock told it. Lines cut short by a crash are skipped."""
    files = sorted((out / LOG).glob("*.jsonl"))
    yield from heapq.merge(*(_lines(path) for path in files), key=lambda event: str(event["time"]))


def _lines(path: Path) -> Iterator[Event]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        yield from _parsed(file)


def _parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    for line in lines:
        with contextlib.suppress(ValueError):
            found: Any = json.loads(line)
            if isinstance(found, dict) and "time" in found and "event" in found:
                yield cast(Event, found)


def samples_of(event: Event) -> list[str]:
    """The ids of samples that an event names."""
    dead: list[Event] = event.get("dead", [])
    return [*event.get("samples", []), *(str(one["id"]) for one in dead)]


def last_problems(out: Path, most: int) -> list[Event]:
    """The last warnings and errors, the newest last; looks at the ends of the files only."""
    found: list[Event] = []
    with contextlib.suppress(OSError):
        files = sorted((out / LOG).glob("*.jsonl"), key=lambda path: path.stat().st_mtime)[-_TAIL_FILES:]
        for path in files:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                found += [event for event in _parsed(file.read().splitlines()) if event.get("level") in PROBLEMS]
    return sorted(found, key=lambda event: str(event["time"]))[-most:]
