# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""What was asked of servers that count tokens: kept in the metadata of each Parquet file that the answers went into, so that a file and its cost
are there together or not at all, whatever is killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

USAGE = b"usage"
_MILLION = 1_000_000


@dataclass(frozen=True)
class Usage:
    """Answers, and the tokens that the server says it read and wrote for them."""

    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    uncounted: int = 0
    """Answers of which the server did not say how many tokens they took."""
    cost: float | None = 0.0
    """In the currency of the recipe's prices; None where there are none."""

    def __add__(self, other: Usage) -> Usage:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        counts = (getattr(self, name) + getattr(other, name) for name in _COUNTS)
        return Usage(*counts, cost=cost)

    def metadata(self) -> dict[bytes, bytes] | None:
        """For the schema of a table; none where nothing was asked."""
        return {USAGE: json.dumps(asdict(self), sort_keys=True).encode()} if self.answers else None


_COUNTS = ("answers", "input_tokens", "output_tokens", "uncounted")


@dataclass(frozen=True)
class Prices:
    """For a million tokens."""

    input: float
    output: float

    def of(self, read: int, wrote: int) -> float:
        """What so many tokens cost."""
        return (read * self.input + wrote * self.output) / _MILLION


class Meter:
    """Counts answers as they come, from any thread."""

    def __init__(self, prices: Prices | None = None) -> None:
        self.prices, self._lock = prices, Lock()
        self._seen = self._empty = Usage(cost=0.0 if prices else None)

    def add(self, answer: Any) -> None:
        """`answer`: what a server answered; its `usage` counts."""
        told = answer.get("usage") if isinstance(answer, Mapping) else None
        tokens = [
            told.get(name) if isinstance(told, Mapping) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        read, wrote = (t if isinstance(t, int) and t >= 0 else None for t in tokens)
        counted = read is not None and wrote is not None
        cost = None if self.prices is None else self.prices.of(read or 0, wrote or 0)
        with self._lock:
            self._seen = self._seen + Usage(1, read or 0, wrote or 0, int(not counted), cost)

    def take(self) -> Usage:
        """What was counted since the last call."""
        with self._lock:
            seen, self._seen = self._seen, self._empty
        return seen


def read_usage(files: Iterable[Path]) -> Usage:
    """The sum over Parquet files; those without a note, or that cannot be read, count for nothing."""
    found: list[Usage] = []
    for path in files:
        try:
            noted = (pq.read_schema(path).metadata or {}).get(USAGE)
            if noted:
                found.append(Usage(**json.loads(noted)))
        except (OSError, pa.ArrowInvalid, ValueError, TypeError):
            continue
    return sum(found[1:], found[0]) if found else Usage(cost=None)


def spell_usage(usage: Usage) -> str:
    """`1,234 answers, 56,000 tokens read, 78,000 written, cost 0.12`."""
    words = [f"{usage.answers:,} answers", f"{usage.input_tokens:,} tokens read", f"{usage.output_tokens:,} written"]
    if usage.uncounted:
        words.append(f"tokens of {usage.uncounted:,} unknown")
    if usage.cost is not None:
        words.append(f"cost {usage.cost:.2f}")
    return ", ".join(words)
