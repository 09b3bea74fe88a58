"""Dead rows: the letters that say of each at which stage, of what and at which attempt it died, and how their units are given back to `make`.

A unit is made anew whole, for its pictures file is one; what was captioned in it is not asked for again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.errors import CorruptShard
from cluster.stage import DEAD
from cluster.storage import publish_bytes
from factory.plan import table_bytes
from factory.select import Selection
from factory.units import read_table

LETTERS = "dead.parquet"
"""Beside the selection: a row for each dead sample."""
TRIED = "tried.jsonl"
"""In the data set: the deaths of which retry-failed made nothing, so the next is a later attempt."""
REOPENED = "reopened"
"""Folder of the data set with the ledger entries of units that are being made anew; gone when all are through."""
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("attempt", pa.int32()),
    ]
)


def write_letters(folder: Path, selection: Selection) -> None:
    """dead.parquet of the data set in `folder`, in the order of the plan; none is left there if nothing died."""
    dead = selection.outcome.codes == selection.outcome.values.index(DEAD)
    if not dead.any():
        (folder / LETTERS).unlink(missing_ok=True)
        return
    ids = selection.ids[dead].astype(str).tolist()
    reasons = [selection.reason.values[code] for code in selection.reason.codes[np.flatnonzero(dead)].tolist()]
    before, parts = attempts(folder), [reason.partition(": ") for reason in reasons]
    columns = {
        "id": ids,
        "stage": [stage for stage, *_ in parts],
        "error": [error for *_, error in parts],
        "attempt": [before[key] + 1 for key in ids],
    }
    publish_bytes(folder / LETTERS, table_bytes(pa.Table.from_pydict(columns, schema=_SCHEMA)))


def attempts(folder: Path) -> Counter[str]:
    """How often samples died and were then tried again, by id."""
    try:
        lines = (folder / TRIED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return Counter()
    try:
        return Counter(json.loads(line)["id"] for line in lines)
    except (ValueError, KeyError, TypeError):
        raise CorruptShard(
            "cannot be read", where=str(folder / TRIED), remedy="Delete it: attempts are then counted from one again"
        ) from None


def note_tried(folder: Path, deaths: Iterable[Mapping[str, str]]) -> None:
    """Remember deaths (id, reason) that are about to be undone."""
    path = folder / TRIED
    there = path.read_bytes() if path.exists() else b""
    lines = (json.dumps({"id": one["id"], "reason": one["reason"]}, ensure_ascii=False) + "\n" for one in deaths)
    publish_bytes(path, there + "".join(lines).encode("utf-8", "replace"))


def reopen_unit(folder: Path, unit: str) -> None:
    """Give a unit back to `make`; nothing happens if it is not in the ledger."""
    entry, place = folder / "ledger" / f"{unit}.parquet", folder / REOPENED / f"{unit}.parquet"
    if entry.exists():
        place.parent.mkdir(exist_ok=True)
        os.replace(entry, place)


def captions_before(folder: Path, unit: str) -> dict[str, str]:
    """The captions of those that lived when a unit was made the last time, by id; empty if it was not reopened."""
    place = folder / REOPENED / f"{unit}.parquet"
    if not place.exists():
        return {}
    rows = read_table(place, ["id", "outcome", "prompt"]).to_pylist()
    return {row["id"]: row["prompt"] for row in rows if row["outcome"] != DEAD and row["prompt"]}


def all_through(folder: Path) -> None:
    """Every unit is in the ledger again."""
    shutil.rmtree(folder / REOPENED, ignore_errors=True)
