"""The ledger of `make`: an entry a work unit, written last, vouches that the unit's pictures are on disk and whole.

Layout below the data set: `pictures/unit-00000.parquet` (id, picture), then `ledger/unit-00000.parquet` (outcome, reason, scores,
embedding, hashes and the digest of the pictures file). Resume = planned minus ledger. The same unit always gives the same bytes, so
a worker that outlives its driver can commit again without harm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, LedgerConflict
from cluster.stage import PENDING, Row, Unit
from cluster.storage import digest_file, publish_bytes
from factory.plan import PLAN, table_bytes

MADE = "made"
_ENTRY = pa.schema(
    [
        ("id", pa.string()),
        ("unit", pa.string()),
        ("prompt", pa.string()),
        ("group", pa.string()),
        ("attributes", pa.string()),
        ("seed", pa.int64()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("clip_score", pa.float64()),
        ("embedding", pa.binary()),
        ("phash", pa.string()),
        ("colours", pa.binary()),
        ("source", pa.string()),
        ("raw_caption", pa.string()),
        ("raw_clip_score", pa.float64()),
        ("crop", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("pictures_sha256", pa.string()),
    ]
)
_PICTURES = pa.schema([("id", pa.string()), ("picture", pa.binary())])


def planned_units(folder: Path, unit_images: int) -> list[Unit]:
    """All units of the plan in `folder`, in order."""
    rows = read_table(folder / PLAN).to_pylist()
    return [
        Unit(name, [{**row, "unit": name} for row in rows[start : start + unit_images]])
        for start in range(0, len(rows), unit_images)
        for name in [_name(start // unit_images)]
    ]


def units_left(folder: Path, unit_images: int) -> list[int]:
    """Numbers of the planned units that the ledger lacks: from the plan's row count and one listing, no file of the ledger is opened."""
    units = -(-planned_rows(folder) // unit_images)
    try:
        with os.scandir(folder / "ledger") as listing:
            there = {entry.name for entry in listing}
    except FileNotFoundError:
        there = set[str]()
    return [number for number in range(units) if f"{_name(number)}.parquet" not in there]


def read_units(folder: Path, unit_images: int, numbers: Iterable[int]) -> Iterator[Unit]:
    """The units of these ascending numbers, read from the plan as they are asked for: a plan of millions is never in memory whole."""
    wanted = iter(numbers)
    number, rows = next(wanted, None), list[dict[str, Any]]()
    start = 0
    for batch in _plan_file(folder).iter_batches(batch_size=4096):
        if number is None:
            return
        if start + len(rows) + batch.num_rows <= number * unit_images:
            # Nothing of this batch is wanted, nor what is left of those before it.
            start, rows = start + len(rows) + batch.num_rows, []
            continue
        rows += batch.to_pylist()
        while number is not None and start + len(rows) >= (number + 1) * unit_images:
            first = number * unit_images - start
            yield _unit(number, rows[first : first + unit_images])
            rows, start = rows[first + unit_images :], start + first + unit_images
            number = next(wanted, None)
    if number is not None:  # the last one may be short
        yield _unit(number, rows[number * unit_images - start :])


def planned_rows(folder: Path) -> int:
    """Samples of the plan."""
    return int(_plan_file(folder).metadata.num_rows)


def _plan_file(folder: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(folder / PLAN)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(folder / PLAN, error) from error


def _unit(number: int, rows: list[dict[str, Any]]) -> Unit:
    return Unit(_name(number), [{**row, "unit": _name(number)} for row in rows])


def _name(number: int) -> str:
    return f"unit-{number:05d}"


def commit_unit(folder: Path, rows: list[Row]) -> None:
    """Publish the pictures, then the entry. Raises LedgerConflict if the unit is there with other contents."""
    unit = rows[0]["unit"]
    pictures = [{"id": row["id"], "picture": row["picture"]} for row in rows if row.get("picture")]
    digest = publish_bytes(
        folder / "pictures" / f"{unit}.parquet", table_bytes(pa.Table.from_pylist(pictures, schema=_PICTURES))
    )
    entries = [
        {
            **{name: row.get(name) for name in _ENTRY.names},
            "outcome": MADE if row["outcome"] == PENDING else row["outcome"],
            "pictures_sha256": digest,
        }
        for row in rows
    ]
    data = table_bytes(pa.Table.from_pylist(entries, schema=_ENTRY))
    final = folder / "ledger" / f"{unit}.parquet"
    if final.exists() and final.read_bytes() != data:
        raise LedgerConflict(
            "the unit was committed before with other contents",
            where=str(final),
            remedy="Models or packages changed between runs: start in a new output folder",
        )
    publish_bytes(final, data)


def read_entries(folder: Path, units: list[Unit]) -> list[dict[str, Any]]:
    """Every ledger row, in the order of the plan; raises CorruptShard if an entry is missing, damaged or of another plan."""
    found: list[dict[str, Any]] = []
    for unit in units:
        path = folder / "ledger" / f"{unit.id}.parquet"
        if not path.exists():
            raise CorruptShard(
                "is missing", where=str(path), remedy="Run the same command again: it makes what is missing"
            )
        rows = read_table(path).to_pylist()
        if [row["id"] for row in rows] != [row["id"] for row in unit.rows]:
            raise LedgerConflict("belongs to another plan", where=str(path), remedy="Start in a new output folder")
        found += rows
    return found


def read_pictures(folder: Path, entries: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """(id, picture file) of every made row, unit by unit; raises CorruptShard if a pictures file is not what its entry says."""
    digests = {row["unit"]: row["pictures_sha256"] for row in entries}
    for unit, digest in digests.items():
        path = folder / "pictures" / f"{unit}.parquet"
        if not path.exists() or digest_file(path) != digest:
            raise CorruptShard(
                "is damaged or missing",
                where=str(path),
                remedy=f"Delete {folder / 'ledger' / unit}.parquet and run the same command again",
            )
        table = read_table(path)
        yield from zip(table["id"].to_pylist(), table["picture"].to_pylist(), strict=True)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or some of its columns; raises CorruptShard."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptShard:
    return CorruptShard(
        f"cannot be read ({str(error).splitlines()[0]})",
        where=str(path),
        remedy="Delete it and run the same command again",
    )
