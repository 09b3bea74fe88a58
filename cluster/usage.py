# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""What was asked of servers that count tokens. Each answer is noted in a journal as it comes, so that whoever is killed forgets nothing that was paid
for; a Parquet file that the answers went into then keeps their sum in its metadata, and its journal goes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

USAGE = b"usage"
JOURNAL = ".asked.jsonl"
"""Ending of a journal: a line an answer. What stands before it names the file that the answers go into."""
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
    """Notes answers as they come, from any thread; in no journal until one is given."""

    def __init__(self, prices: Prices | None = None) -> None:
        self.prices, self._lock = prices, Lock()
        self._journal: Path | None = None

    def note_in(self, journal: Path) -> None:
        """From now on in this file, after what stands there."""
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._journal = journal

    def add(self, answer: Any) -> None:
        """`answer`: what a server answered; its `usage` counts."""
        if self._journal is None:
            return
        told = answer.get("usage") if isinstance(answer, Mapping) else None
        tokens = [
            told.get(name) if isinstance(told, Mapping) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        read, wrote = (t if isinstance(t, int) and t >= 0 else None for t in tokens)
        counted = read is not None and wrote is not None
        cost = None if self.prices is None else self.prices.of(read or 0, wrote or 0)
        line = json.dumps(asdict(Usage(1, read or 0, wrote or 0, int(not counted), cost))) + "\n"
        with self._lock, self._journal.open("ab", buffering=0) as journal:
            # A line torn by a kill must not take the next one with it.
            torn = journal.tell() > 0 and not _ends_a_line(self._journal)
            journal.write((b"\n" if torn else b"") + line.encode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def files_of_usage(folder: Path) -> list[Path]:
    """The Parquet files in a folder, and the journals of those that are not written yet."""
    journals = sorted(folder.glob(f"*{JOURNAL}"))
    left = [path for path in journals if not (folder / f"{path.name.removesuffix(JOURNAL)}.parquet").exists()]
    return [*sorted(folder.glob("*.parquet")), *left]


def read_usage(files: Iterable[Path]) -> Usage:
    """The sum over Parquet files and journals; those without a note, or that cannot be read, count for nothing."""
    found: list[Usage] = []
    for path in files:
        try:
            if path.name.endswith(JOURNAL):
                noted = path.read_bytes().splitlines()
            else:
                noted = [(pq.read_schema(path).metadata or {}).get(USAGE, b"")]
        except (OSError, pa.ArrowInvalid):
            continue
        for line in noted:
            try:
                found.append(Usage(**json.loads(line)))
            except (ValueError, TypeError):
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
