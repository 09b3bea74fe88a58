"""Votes as a file of lines that only grows, and what they amount to."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.errors import CorruptShard, EdgeFusionError
from factory.shares import wilson

VOTES = "votes.jsonl"
Winner = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Vote:
    """What one rater said of one pair; a later vote of the same rater on the same pair replaces it."""

    pair: int
    rater: str
    left: Literal["a", "b"]
    """Whose picture was on the left."""
    winner: Winner
    when: str
    """ISO 8601, UTC."""


class VoteFile:
    """Votes of all raters; each is on disk before `add` returns. Several processes may write."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptShard for a line that is no vote; a last line cut short by a crash is none yet and goes."""
        self.path, self._lock = path, threading.Lock()
        self._standing: dict[tuple[str, int], Vote] = {}
        self._order: list[tuple[str, int]] = []
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._note(parse(line))
            except (ValueError, TypeError) as error:
                raise CorruptShard(
                    f"line {number} is no vote ({error})", where=str(path), remedy="Mend or delete that line"
                ) from error

    def add(self, vote: Vote) -> None:
        """Raises EdgeFusionError if it cannot be saved; it then does not count."""
        line = (json.dumps(asdict(vote), ensure_ascii=False) + "\n").encode()
        with self._lock:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    end = _whole_end(handle)
                    os.ftruncate(handle, end)
                    if os.pwrite(handle, line, end) != len(line):
                        os.ftruncate(handle, end)
                        raise OSError(0, "the disk is full")
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise EdgeFusionError(
                    f"the vote could not be saved ({error.strerror})", where=str(self.path), remedy="Free space"
                ) from error
            self._note(vote)

    def standing(self) -> list[Vote]:
        """What counts: the last vote of each rater on each pair."""
        with self._lock:
            return list(self._standing.values())

    def of(self, rater: str) -> dict[int, Vote]:
        """A rater's votes by pair, the latest last."""
        with self._lock:
            return {pair: self._standing[who, pair] for who, pair in self._order if who == rater}

    def _note(self, vote: Vote) -> None:
        key = (vote.rater, vote.pair)
        if key in self._standing:
            self._order.remove(key)
        self._order.append(key)
        self._standing[key] = vote


def parse(line: bytes) -> Vote:
    """Raises ValueError or TypeError."""
    found = json.loads(line)
    vote = Vote(**found) if isinstance(found, dict) else None
    if vote is None or vote.winner not in get_args(Winner) or vote.left not in ("a", "b"):
        raise ValueError("winner is a, b or tie; left is a or b")
    if not isinstance(vote.pair, int) or not isinstance(vote.rater, str):
        raise ValueError("pair is a number, rater a name")
    return vote


def tally(votes: Iterable[Vote]) -> dict[str, Any]:
    """Wins, ties, and A's win rate among votes that decided, with Wilson's interval.

    `sides` is the share of decided votes for the left picture: far from 0.5 it says that raters clicked by side.
    """
    votes = list(votes)
    counts = Counter(vote.winner for vote in votes)
    decided = [vote for vote in votes if vote.winner != "tie"]
    low, high = wilson(counts["a"], len(decided))
    return {
        "votes": len(votes),
        "raters": len({vote.rater for vote in votes}),
        "pairs": len({vote.pair for vote in votes}),
        "a": counts["a"],
        "b": counts["b"],
        "ties": counts["tie"],
        "win_rate": counts["a"] / len(decided) if decided else None,
        "low": low,
        "high": high,
        "left_share": sum(vote.winner == vote.left for vote in decided) / len(decided) if decided else None,
    }


def _whole_end(handle: int) -> int:
    """Where the last whole line ends; what a killed writer left behind it was never acknowledged."""
    size = os.fstat(handle).st_size
    start = max(0, size - (1 << 16))
    return start + os.pread(handle, size - start, start).rfind(b"\n") + 1
