"""What people decided about pictures: an overlay beside the ledger that select applies and nothing else rewrites.

`decisions.jsonl` in the data set folder has one JSON object a line: id, verdict (keep, reject or null), reason, caption (or null),
who, when. It only grows; the last line of an id wins. Every line is synced before it counts as saved, and a writer holds the
file's lock while it merges, so two people at two pages lose nothing. Knows no pictures and no page.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import CorruptShard, EdgeFusionError

DECISIONS = "decisions.jsonl"
KEEP, REJECT = "keep", "reject"
MAX_CAPTION, MAX_REASON, MAX_WHO = 2000, 200, 64
"""Most characters of each text."""

FIELDS: tuple[str, ...] = ("id", "verdict", "reason", "caption", "who", "when")
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Decision:
    """The state of one picture after a person's touch. Raises ValueError for what no decision can be."""

    id: str
    verdict: str | None = None
    reason: str = ""
    caption: str | None = None
    who: str = ""
    when: str = ""
    """UTC, ISO 8601."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise ValueError("id is not 64 hex digits")
        if self.verdict not in (None, KEEP, REJECT):
            raise ValueError("verdict is keep, reject or null")
        _check_text("reason", self.reason, MAX_REASON)
        _check_text("who", self.who, MAX_WHO)
        _check_text("when", self.when, MAX_WHO)
        if self.caption is not None:
            _check_text("caption", self.caption, MAX_CAPTION)
            if not self.caption:
                raise ValueError("caption is empty: null restores the prompt")
        if bool(self.reason) != (self.verdict == REJECT):
            raise ValueError("a reject needs a reason, and only a reject has one")

    @property
    def is_empty(self) -> bool:
        """Nothing is decided (any more)."""
        return self.verdict is None and self.caption is None


class Changed(Exception):
    """The picture was decided upon again since the caller last looked; holds what stands now."""

    def __init__(self, now: Decision | None) -> None:
        super().__init__("changed by someone else since")
        self.now = now


class Saved(NamedTuple):
    """A decision that is on disk, the number of its line, and what stood before (for undo)."""

    decision: Decision
    number: int
    before: Decision | None
    before_number: int


class Overlay:
    """The decisions of one data set folder, kept up to date with every other writer of the file. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        """Raises CorruptShard if a whole line of the file is no decision."""
        self.path = folder / DECISIONS
        self._lock = threading.RLock()
        self._forget()
        self.catch_up()

    def catch_up(self) -> int:
        """Read what other processes appended; returns the number of lines seen so far."""
        with self._lock:
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                return self.number
            with file:
                self._read(file.fileno())
            return self.number

    def state(self) -> dict[str, Decision]:
        """Every id that has a decision now."""
        with self._lock:
            return {key: found for key, found in self._now.items() if not found.is_empty}

    def of(self, key: str) -> tuple[Decision | None, int]:
        """The decision of an id, and the number of its line (0: it never had one)."""
        with self._lock:
            return self._now.get(key), self._numbers.get(key, 0)

    def since(self, number: int) -> list[tuple[int, Decision]]:
        """What changed after line `number`, oldest first, each id once."""
        with self._lock:
            recent = dict.fromkeys(reversed(self._order[number:]))
            return [(self._numbers[key], self._now[key]) for key in reversed(recent)]

    def counts(self) -> dict[str, int]:
        """How many ids are kept, rejected and captioned by people now."""
        with self._lock:
            return dict(self._counts)

    def decide(self, key: str, changes: Mapping[str, Any], who: str, expect: int | None = None) -> Saved:
        """Change verdict (with its reason) or caption of one id, leave the rest as it stands, and save it for good.

        With `expect` (a line number from `of`) nothing is written if the id changed since: raises Changed. Raises ValueError for
        a change that makes no decision, EdgeFusionError if the file cannot be written.
        """
        if unknown := set(changes) - {"verdict", "reason", "caption"}:
            raise ValueError(f"{min(unknown)} is nothing to decide")
        with self._lock, self._writing() as handle:
            now, number = self.of(key)
            if expect is not None and expect != number:
                raise Changed(now)
            fresh = {"who": _tidy(who), "when": datetime.now(UTC).isoformat(timespec="milliseconds")}
            if "verdict" in changes:
                fresh |= {"verdict": changes["verdict"], "reason": _tidy(changes.get("reason") or "")}
            if "caption" in changes:
                fresh["caption"] = _tidy(changes["caption"]) or None
            new = replace(now or Decision(key), **fresh)
            self._append(handle, [new])
            return Saved(new, self.number, now, number)

    def extend(self, decisions: Iterable[Decision]) -> int:
        """Append decisions from elsewhere, all or none; those that stand already are passed over. Returns how many were new."""
        with self._lock, self._writing() as handle:
            new = [d for d in decisions if _meaning(d) != _meaning(self._now.get(d.id, Decision(d.id)))]
            self._append(handle, new)
            return len(new)

    def _forget(self) -> None:
        self._now: dict[str, Decision] = {}
        self._numbers: dict[str, int] = {}
        self._order: list[str] = []
        self._counts = {"kept": 0, "rejected": 0, "captions": 0}
        self._offset, self._inode = 0, 0

    @property
    def number(self) -> int:
        """Lines read so far."""
        return len(self._order)

    def _note(self, new: Decision) -> None:
        for sign, found in ((-1, self._now.get(new.id)), (1, new)):
            if found is not None:
                self._counts["kept"] += sign * (found.verdict == KEEP)
                self._counts["rejected"] += sign * (found.verdict == REJECT)
                self._counts["captions"] += sign * (found.caption is not None)
        self._order.append(new.id)
        self._now[new.id], self._numbers[new.id] = new, len(self._order)

    def _read(self, handle: int) -> None:
        status = os.fstat(handle)
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._forget()  # another file under the same name
            self._inode = status.st_ino
        if status.st_size == self._offset:
            return
        data = os.pread(handle, status.st_size - self._offset, self._offset)
        lines = data.split(b"\n")
        torn = lines.pop()
        for line in lines:
            try:
                self._note(parse(line))
            except ValueError as error:
                raise CorruptShard(
                    f"line {self.number + 1} is no decision ({error})",
                    where=str(self.path),
                    remedy="Mend or delete that line",
                ) from None
        self._offset += len(data) - len(torn)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[int]:
        """The file, locked against other processes, caught up with, and without the torn line of a killed writer."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._read(handle)
            tail = os.pread(handle, 1 << 20, self._offset)
            if tail:
                # Never acknowledged, for a line counts only with its end; a hand-edited last line may merely lack it.
                with contextlib.suppress(ValueError):
                    self._append(handle, [parse(tail)])
                os.ftruncate(handle, self._offset)
            yield handle
        finally:
            os.close(handle)

    def _append(self, handle: int, decisions: list[Decision]) -> None:
        data = b"".join(_line(d) for d in decisions)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(handle, data[written:], self._offset + written)
            os.fsync(handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, self._offset)
            raise self._unwritable(error) from error
        self._offset += len(data)
        for decision in decisions:
            self._note(decision)

    def _unwritable(self, error: OSError) -> EdgeFusionError:
        return EdgeFusionError(
            f"could not be written ({error.strerror})", where=str(self.path), remedy="Free space or check permissions"
        )


def read_decisions(folder: Path) -> dict[str, Decision]:
    """What people decided about the data set in `folder`, by id; empty if nobody did. Raises CorruptShard."""
    return Overlay(folder).state()


def digest_decisions(decisions: Mapping[str, Decision]) -> str:
    """SHA-256 in hex of what is decided, whoever decided it and by whichever way; empty if nothing is."""
    standing = [list(_meaning(decisions[key])) for key in sorted(decisions) if not decisions[key].is_empty]
    return hashlib.sha256(json.dumps(standing).encode()).hexdigest() if standing else ""


def parse(line: bytes | str) -> Decision:
    """A line of the overlay; raises ValueError."""
    found = json.loads(line)
    if not isinstance(found, dict) or set(found) - set(FIELDS):
        raise ValueError(f"an object of {', '.join(FIELDS)} is wanted")
    try:
        return Decision(**found)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _line(decision: Decision) -> bytes:
    return (json.dumps(asdict(decision), ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _meaning(decision: Decision) -> tuple[str, str | None, str, str | None]:
    return decision.id, decision.verdict, decision.reason, decision.caption


def _tidy(text: Any) -> Any:
    """One line, single spaces; what is no text is left for the check."""
    return " ".join(text.split()) if isinstance(text, str) else text


def _check_text(name: str, text: Any, limit: int) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is not text")
    if len(text) > limit:
        raise ValueError(f"{name} has more than {limit} characters")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError(f"{name} has control characters")
