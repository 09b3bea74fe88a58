"""The ledger of `make`: an entry a work unit, written last, vouches that the unit's pictures are on disk and whole.

Layout below the data set: `pictures/unit-00000.parquet` (id, picture), then `ledger/unit-00000.parquet` (outcome, reason, scores,
embedding, hashes and the digest of the pictures file). Resume = planned minus ledger. The same unit always gives the same bytes, so
a worker that outlives its driver can commit again without harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import CorruptShard, LedgerConflict
from cluster.stage import PENDING, Row
from cluster.storage import digest_file, publish_bytes, publish_new
from factory.plan import table_bytes
from factory.units import read_table

MADE = "made"
ENTRY = pa.schema(
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
        ("made_sha256", pa.string()),
        ("pictures_sha256", pa.string()),
    ]
)
"""What every ledger has; scorers (factory/scorers) add a float column a score, after these."""
TAKEN = frozenset({*ENTRY.names, "picture", "picture_sha256", "has_text", "has_raw_text", "edge_px", "hash"})
"""Names that no score can have: columns of the ledger, of rows on their way to it and of its index."""
_PICTURES = pa.schema([("id", pa.string()), ("picture", pa.binary())])


def commit_unit(folder: Path, rows: list[Row], scores: pa.Schema | None = None) -> None:
    """Publish the pictures, then the entry; `scores` are its columns beyond ENTRY.

    Raises LedgerConflict if the unit is there with other contents. Its pictures are then left as they are, for the entry vouches for them.
    """
    schema = pa.unify_schemas([ENTRY, scores]) if scores else ENTRY
    unit = rows[0]["unit"]
    pictures = [{"id": row["id"], "picture": row["picture"]} for row in rows if row.get("picture")]
    picture_file = table_bytes(pa.Table.from_pylist(pictures, schema=_PICTURES))
    entries = [
        {
            **{name: row.get(name) for name in schema.names},
            "outcome": MADE if row["outcome"] == PENDING else row["outcome"],
            "made_sha256": hashlib.sha256(row["picture"]).hexdigest() if row.get("picture") else None,
            "pictures_sha256": hashlib.sha256(picture_file).hexdigest(),
        }
        for row in rows
    ]
    data = table_bytes(pa.Table.from_pylist(entries, schema=schema))
    final = folder / "ledger" / f"{unit}.parquet"
    if final.exists() and final.read_bytes() != data:
        raise _conflict(final)
    publish_bytes(folder / "pictures" / f"{unit}.parquet", picture_file)
    try:
        publish_new(final, data)
    except LedgerConflict:  # by a worker that outlived its driver, at this very moment
        raise _conflict(final) from None


def _conflict(entry: Path) -> LedgerConflict:
    return LedgerConflict(
        "the unit was committed before with other contents",
        where=str(entry),
        remedy="Models or packages changed between runs: start in a new output folder",
    )


def further_scores(row: dict[str, Any]) -> dict[str, float | None]:
    """What scorers beyond CLIP said of a ledger row, by name."""
    return {name: row[name] for name in row if name not in ENTRY.names}


def read_entry(folder: Path, unit: str) -> list[dict[str, Any]]:
    """The ledger rows of a unit; raises CorruptShard if they are missing or damaged."""
    path = folder / "ledger" / f"{unit}.parquet"
    if not path.exists():
        raise CorruptShard("is missing", where=str(path), remedy="Run the same command again: it makes what is missing")
    return read_table(path).to_pylist()


def read_pictures(folder: Path, unit: str, sha256: str) -> Iterator[tuple[str, bytes]]:
    """(id, picture file) of every made row of a unit; raises CorruptShard if the file is not what its entry says."""
    path = folder / "pictures" / f"{unit}.parquet"
    if not path.exists() or digest_file(path) != sha256:
        raise CorruptShard(
            "is damaged or missing",
            where=str(path),
            remedy=f"Run `edgefusion factory repair {folder}`, then the recipe again: it makes {unit} anew",
        )
    table = read_table(path)
    yield from zip(table["id"].to_pylist(), table["picture"].to_pylist(), strict=True)


def digest_pictures(folder: Path, unit: str, sha256: str) -> Iterator[tuple[str, str]]:
    """(id, SHA-256 in hex) of every picture file of a unit, for ledgers that did not note it; raises CorruptShard."""
    for key, data in read_pictures(folder, unit, sha256):
        yield key, hashlib.sha256(data).hexdigest()
