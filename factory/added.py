"""Scores that came later: columns beside a ledger, by scorers that its recipe did not know (factory/rescore.py gives them).

`scores/NAME/` below the data set holds `scorer.json`, which says what gave them, and a file a work unit with ids and scores. The ledger
stays as it is, to the byte. A set counts once it covers every planned unit; until then it is as if it were not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, LedgerConflict
from factory.units import read_table

SCORES, SCORER = "scores", "scorer.json"
PICTURES = b"pictures"
"""Metadata of a file of scores: SHA-256 of the file of pictures that was looked at, as the ledger has it."""


@dataclass(frozen=True)
class Added:
    """A set of scores; its files may lack."""

    folder: Path
    scorer: dict[str, Any]
    """As a recipe has it."""
    mark: str
    """Digest or hub revision of what it opens; empty where it is known by its name."""
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def file(self, unit: str) -> Path:
        return self.folder / f"{unit}.parquet"

    def covers(self, units: Sequence[str]) -> bool:
        """By one listing; no file is opened."""
        there = set(os.listdir(self.folder))
        return all(f"{unit}.parquet" in there for unit in units)


def added_sets(data: Path) -> list[Added]:
    """All sets of the data set in `data`, finished or not, by name. Raises CorruptShard."""
    found: list[Added] = []
    for path in sorted((data / SCORES).glob(f"*/{SCORER}")):
        try:
            told = json.loads(path.read_bytes())
            found.append(Added(path.parent, told["scorer"], told["mark"], tuple(told["columns"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptShard(
                f"cannot be read ({error})",
                where=str(path),
                remedy=f"Delete {path.parent} and run edgefusion factory score again",
            ) from error
    return found


def added_to(sets: Sequence[Added], table: pa.Table) -> list[tuple[pa.Field, pa.ChunkedArray]]:
    """Fields, with what their scorer says of them, and columns of finished sets for the ledger rows in `table` (id, unit, pictures_sha256).

    Raises LedgerConflict if they are of others.
    """
    units = dict(zip(table["unit"].to_pylist(), table["pictures_sha256"].to_pylist(), strict=True))
    found: list[tuple[pa.Field, pa.ChunkedArray]] = []
    for one in sets:
        parts = [read_table(one.file(unit)) for unit in units]
        for unit, part, sha256 in zip(units, parts, units.values(), strict=True):
            if (part.schema.metadata or {}).get(PICTURES, b"").decode() != (sha256 or ""):
                raise _of_others(one.file(unit))
        scores = pa.concat_tables(part.replace_schema_metadata(None) for part in parts)
        if not scores["id"].combine_chunks().equals(table["id"].combine_chunks()):
            raise _of_others(one.folder)
        found += [(scores.schema.field(name), scores[name]) for name in one.columns]
    return found


def is_of(path: Path, sha256: str) -> bool:
    """The file of scores is there, whole, and of those pictures."""
    try:
        return (pq.read_schema(path).metadata or {}).get(PICTURES, b"").decode() == sha256
    except (OSError, pa.ArrowInvalid):
        return False


def forget_units(data: Path, units: Sequence[str]) -> None:
    """Take back the scores of units that are to be made anew."""
    for one in added_sets(data):
        for unit in units:
            one.file(unit).unlink(missing_ok=True)


def _of_others(path: Path) -> LedgerConflict:
    return LedgerConflict(
        "scores of other pictures than the ledger now has",
        where=str(path),
        remedy="Run edgefusion factory score with the same scorer again, or delete the folder",
    )
