"""Proof that a packed data set is what its manifest says, on disk or in a remote store, read as a stream: nothing is copied here.

Each shard is read once from begin to end: its own checksum and those of its samples come from the same pass. One shard's rows and one
sample lie in memory, beside the manifest as columns.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from cluster.errors import CorruptShard
from cluster.remote import RemoteStore
from factory.pack import (
    ID,
    MANIFEST,
    SHARD,
    corrupt,
    digest_members,
    manifest_table,
    parse_manifest,
    read_shard,
    remedy_for,
)

_CHUNK_BYTES = 1 << 20
_ROWS_AT_ONCE = 8192

Row = dict[str, str]


@dataclass(frozen=True)
class _Folder:
    """A data set on disk, asked as a RemoteStore is."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        return {path.name for path in self.path.glob("shard-*.tar")}

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")


def verify(place: Path | RemoteStore) -> int:
    """Prove that the shards are exactly what the manifest says; returns the number of samples.

    Raises CorruptShard that names the first shard and sample that is missing, damaged, doubled or not in the manifest, or the first row of
    the manifest that does not tell the truth; EdgeFusionError for a store that cannot be read.
    """
    count = 0
    for found in _look_through(place):
        if isinstance(found, CorruptShard):
            raise found
        count += found
    return count


def find_damage(place: Path | RemoteStore) -> Iterator[CorruptShard]:
    """Everything that is wrong with a data set: one error for the manifest, or one for each shard; `where` is the file."""
    return (found for found in _look_through(place) if isinstance(found, CorruptShard))


def _look_through(place: Path | RemoteStore) -> Iterator[CorruptShard | int]:
    """For each shard the number of its samples, or what is wrong."""
    folder = place if isinstance(place, RemoteStore) else _Folder(place)
    manifest = f"{folder}/{MANIFEST}"
    try:
        there = set(folder.names())
        table = manifest_table(folder.path) if isinstance(folder, _Folder) else _fetched(folder, there)
        wanted = {name for name, _ in _by_shard(table, manifest)}
    except CorruptShard as error:
        yield error
        return
    for name in sorted(name for name in there - wanted if SHARD.fullmatch(name)):
        yield CorruptShard(f"is not in {MANIFEST}", where=f"{folder}/{name}", remedy="Pack the data set again")
    for name, listed in _by_shard(table, manifest):
        try:
            _verify_shard(folder, name, listed, name in there)
            yield len(listed)
        except CorruptShard as error:
            yield error


def _fetched(store: RemoteStore, there: set[str]) -> pa.Table:
    where = f"{store}/{MANIFEST}"
    if MANIFEST in there:
        return parse_manifest(io.BytesIO(store.read(MANIFEST)), where)
    if not there:
        raise CorruptShard("there is nothing", where=str(store), remedy="Check the address")
    raise CorruptShard("there is no manifest", where=where, remedy=f"Packing there did not finish. {remedy_for(where)}")


def find_bad_samples(folder: Path) -> dict[str, str]:
    """Sample id to what is wrong with it, for every sample that cannot be trusted; empty for a whole data set.

    Of a damaged shard the samples whose own checksums are right stay out of it. Raises CorruptShard for a manifest that is not true.
    """
    found: dict[str, str] = {}
    for name, listed in list(_by_shard(manifest_table(folder), str(folder / MANIFEST))):
        path, left = folder / name, {row["id"]: row["sample_sha256"] for row in listed}
        reason = "its bytes are not what the manifest says"
        if not path.exists():
            reason = "its shard is missing"
        else:
            try:
                for key, members in read_shard(path):
                    if left.get(key) == digest_members(members):
                        del left[key]
            except CorruptShard as error:
                reason = f"its shard {error.what}"
        found |= dict.fromkeys(left, reason)
    return found


def read_remote_manifest(data: bytes, where: str) -> list[Row]:
    """The rows of a manifest that was fetched from `where`; raises CorruptShard for a row that cannot be true whatever the shards hold."""
    table = parse_manifest(io.BytesIO(data), where)
    return [row for _, rows in _by_shard(table, where) for row in rows]


def _by_shard(table: pa.Table, manifest: str) -> Iterator[tuple[str, list[Row]]]:
    """(shard, its rows) in order; raises CorruptShard for a row that cannot be true whatever the shards hold."""
    before, shard, rows, seen = "", "", list[Row](), set[str]()
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        for row in cast(list[Row], batch.to_pylist()):
            lacking = [name for name, value in row.items() if not value]
            if lacking:
                raise _wrong_row(manifest, row, f"has no {lacking[0]}")
            if not SHARD.fullmatch(row["shard"]) or not ID.fullmatch(row["id"]):
                raise _wrong_row(manifest, row, f"names what no data set of ours has ({row['shard'][:90]!r})")
            if row["id"] <= before:
                raise _wrong_row(manifest, row, "is there twice" if row["id"] == before else "stands out of order")
            before = row["id"]
            if row["shard"] != shard:
                if rows:
                    yield shard, rows
                if row["shard"] in seen:
                    raise _wrong_row(manifest, row, f"stands out of order: the rows of {row['shard']} ended before")
                shard, rows = row["shard"], []
                seen.add(shard)
            rows.append(row)
    if rows:
        yield shard, rows


def _wrong_row(where: str, row: Mapping[str, str], what: str) -> CorruptShard:
    return CorruptShard(f"sample {str(row['id'])[:90]} {what}", where=where, remedy=remedy_for(where))


def _verify_shard(folder: RemoteStore | _Folder, name: str, listed: list[Row], there: bool) -> None:
    """Every sample is read, for a right checksum of the shard says nothing about the rows of the manifest."""
    where, manifest = f"{folder}/{name}", f"{folder}/{MANIFEST}"
    if not there:
        raise corrupt(where, "is missing")
    left, odd = {row["id"]: row for row in listed}, ""
    row: Row | None = None
    with folder.open(name) as file:
        source = _Digested(file)
        for key, members in read_shard(cast(BinaryIO, source), where):
            row, odd = left.pop(key, None), key
            if row is None or row["sample_sha256"] != digest_members(members):
                break
            if row["prompt"].encode() != members.get("txt") or row["picture_kind"] not in members:
                raise _wrong_row(manifest, row, f"has another prompt or kind of picture than in {name}")
            odd = ""
        whole = {row["shard_sha256"] for row in listed} == {source.whole()}
    if odd and row is not None and whole:
        raise _wrong_row(manifest, row, f"has another checksum than in {name}")
    if odd:
        raise corrupt(where, f"sample {odd} is damaged, doubled or not in {MANIFEST}")
    if left:
        raise corrupt(where, f"lacks sample {min(left)}")
    if not whole:
        raise corrupt(where, "has a wrong checksum though its samples are whole")


class _Digested:
    """A stream that takes the SHA-256 of what is read through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._digest.update(piece)
        return piece

    def whole(self) -> str:
        """Reads what is left; the digest of all in hex."""
        while self.read(_CHUNK_BYTES):
            pass
        return self._digest.hexdigest()
