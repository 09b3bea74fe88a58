"""Samples to WebDataset shards and back: same samples, same bytes; the manifest comes last and vouches for every byte.

A data set is a folder of `shard-000000.tar`, ..., and `manifest.parquet` (a row a sample). `verify` proves one.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.storage import digest_file, publish_bytes

MANIFEST = "manifest.parquet"
MAX_MEMBER_BYTES = 64 << 20
"""A larger member is refused unread: no picture of ours is near it."""

_DECISIONS = b"decisions_sha256"
_ID = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"shard-[0-9]{6,}\.tar")
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("prompt", pa.string()),
        ("picture_kind", pa.string()),
        ("sample_sha256", pa.string()),
        ("shard_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One picture with its prompt. `id` is 64 hex digits; `picture` the encoded file, `picture_kind` png, jpg or webp."""

    id: str
    picture: bytes
    picture_kind: str
    prompt: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is known (attributes, scores, seed): plain JSON."""

    def members(self) -> dict[str, bytes]:
        """Extension to bytes, in the order of the archive."""
        facts = json.dumps(dict(self.facts), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return {"json": facts.encode(), self.picture_kind: self.picture, "txt": self.prompt.encode()}

    def digest(self) -> str:
        """SHA-256 over names, lengths and bytes of all members."""
        return _digest(self.members())


def pack(samples: Iterable[Sample], folder: Path, samples_per_shard: int = 1000, decisions_sha256: str = "") -> Path:
    """Write shards of `samples` in the order of their ids, then the manifest; returns the manifest's path.

    Rerunning with the same samples writes the same bytes. They are spilled to disk first and sorted by id there: one shard and the ids lie
    in memory, however many samples come. `decisions_sha256` says which human decisions went in; the manifest keeps it, so that later ones
    show. Raises ValueError for a doubled or malformed id, an unknown picture kind or an empty prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[pa.Table] = [_SCHEMA.empty_table()]
    with tempfile.TemporaryFile(dir=folder) as spill:
        places = _spill(samples, spill)
        for start in range(0, len(places), samples_per_shard):
            part = [_unspill(spill, *place) for place in places[start : start + samples_per_shard]]
            name = shard_name(start // samples_per_shard)
            data = shard_bytes(part)
            written.append(_rows(part, name, publish_bytes(folder / name, data)))
    stale = {path.name for path in folder.glob("shard-*.tar")} - {table["shard"][0].as_py() for table in written[1:]}
    for name in stale:
        (folder / name).unlink()
    table = pa.concat_tables(written).combine_chunks()
    if decisions_sha256:
        table = table.replace_schema_metadata({_DECISIONS: decisions_sha256})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    publish_bytes(folder / MANIFEST, sink.getvalue())
    return folder / MANIFEST


def _rows(samples: list[Sample], shard: str, digest: str) -> pa.Table:
    """The manifest's rows of a shard."""
    columns = [
        [s.id for s in samples],
        [shard] * len(samples),
        [s.prompt for s in samples],
        [s.picture_kind for s in samples],
        [s.digest() for s in samples],
        [digest] * len(samples),
    ]
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def plan_shards(ids: np.ndarray, samples_per_shard: int) -> list[tuple[str, np.ndarray]]:
    """(name, ids) of every shard for these ids in ascending order: known before a picture is read."""
    return [
        (shard_name(number), ids[start : start + samples_per_shard])
        for number, start in enumerate(range(0, len(ids), samples_per_shard))
    ]


_Place = tuple[bytes, int, int, int]
"""Id (raw, so that they sort as their hex does), offset, length of the head, length of the picture."""


def _spill(samples: Iterable[Sample], spill: IO[bytes]) -> list[_Place]:
    """Append every sample to `spill`; returns where each lies, in the order of the ids."""
    places: list[_Place] = []
    offset = 0
    for sample in samples:
        _refuse_bad(sample)
        head = json.dumps([sample.picture_kind, sample.prompt, dict(sample.facts)]).encode()
        spill.write(head)
        spill.write(sample.picture)
        places.append((bytes.fromhex(sample.id), offset, len(head), len(sample.picture)))
        offset += len(head) + len(sample.picture)
    places.sort()
    for before, after in itertools.pairwise(places):
        if before[0] == after[0]:
            raise ValueError(f"sample {after[0].hex()} is there twice")
    return places


def _unspill(spill: IO[bytes], key: bytes, offset: int, head: int, picture: int) -> Sample:
    spill.seek(offset)
    kind, prompt, facts = json.loads(spill.read(head))
    return Sample(key.hex(), spill.read(picture), kind, prompt, facts)


def verify(folder: Path) -> int:
    """Prove that the shards are exactly what the manifest says; returns the number of samples.

    Raises CorruptShard that names the first shard and sample that is missing, damaged, doubled or not in the manifest, or the first row of
    the manifest that does not tell the truth.
    """
    for error in find_damage(folder):
        raise error
    return pq.read_metadata(folder / MANIFEST).num_rows


def find_damage(folder: Path) -> Iterator[CorruptShard]:
    """Everything that is wrong with a data set: one error for the manifest, or one for each shard; `where` is the file."""
    try:
        rows = read_manifest(folder)
        wanted = _by_shard(rows, str(folder / MANIFEST))
    except CorruptShard as error:
        yield error
        return
    for name in sorted({p.name for p in folder.glob("shard-*.tar")} - set(wanted)):
        yield CorruptShard(f"is not in {MANIFEST}", where=str(folder / name), remedy="Pack the data set again")
    for name, listed in wanted.items():
        try:
            _verify_shard(folder / name, listed)
        except CorruptShard as error:
            yield error


def find_bad_samples(folder: Path) -> dict[str, str]:
    """Sample id to what is wrong with it, for every sample that cannot be trusted; empty for a whole data set.

    Of a damaged shard the samples whose own checksums are right stay out of it. Raises CorruptShard for a manifest that is not true.
    """
    found: dict[str, str] = {}
    rows = read_manifest(folder)
    for name, listed in _by_shard(rows, str(folder / MANIFEST)).items():
        path, left = folder / name, {row["id"]: row["sample_sha256"] for row in listed}
        reason = "its bytes are not what the manifest says"
        if not path.exists():
            reason = "its shard is missing"
        else:
            try:
                for key, members in read_shard(path):
                    if left.get(key) == _digest(members):
                        del left[key]
            except CorruptShard as error:
                reason = f"its shard {error.what}"
        found |= dict.fromkeys(left, reason)
    return found


def _by_shard(rows: list[dict[str, str]], manifest: str) -> dict[str, list[dict[str, str]]]:
    """The manifest's rows by shard; raises CorruptShard for a row that cannot be true whatever the shards hold."""
    found: dict[str, list[dict[str, str]]] = {}
    before = ""
    for row in rows:
        lacking = [name for name, value in row.items() if not value]
        if lacking:
            raise _wrong_row(manifest, row, f"has no {lacking[0]}")
        if not _SHARD.fullmatch(row["shard"]) or not _ID.fullmatch(row["id"]):
            raise _wrong_row(manifest, row, f"names what no data set of ours has ({row['shard'][:90]!r})")
        if row["id"] <= before:
            raise _wrong_row(manifest, row, "is there twice" if row["id"] == before else "stands out of order")
        before = row["id"]
        found.setdefault(row["shard"], []).append(row)
    return found


def _wrong_row(where: str, row: Mapping[str, str], what: str) -> CorruptShard:
    remedy = "Run `edgefusion factory repair` (with --recipe on a copy), or pack the data set again"
    return CorruptShard(f"sample {str(row['id'])[:90]} {what}", where=where, remedy=remedy)


def read_manifest(folder: Path) -> list[dict[str, str]]:
    """The manifest's rows, in the order of the shards."""
    path = folder / MANIFEST
    if not path.exists():
        raise _no_manifest(folder)
    return _manifest_rows(path, str(path))


def manifest_shards(folder: Path) -> dict[str, str]:
    """Shard to its SHA-256, in order; of a manifest of any length only these two columns are read."""
    path = folder / MANIFEST
    if not path.exists():
        raise _no_manifest(folder)
    try:
        table = pq.read_table(path, columns=["shard", "shard_sha256"], read_dictionary=["shard", "shard_sha256"])
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=str(path), remedy="Pack the data set again") from error
    pairs = table.group_by(["shard", "shard_sha256"]).aggregate([])
    return dict(sorted(zip(pairs["shard"].to_pylist(), pairs["shard_sha256"].to_pylist(), strict=True)))


def read_remote_manifest(data: bytes, where: str) -> list[dict[str, str]]:
    """The same of a manifest that was fetched from `where`; raises CorruptShard for a row that cannot be true whatever the shards hold."""
    rows = _manifest_rows(io.BytesIO(data), where)
    _by_shard(rows, where)
    return rows


def _manifest_rows(source: Path | IO[bytes], where: str) -> list[dict[str, str]]:
    try:
        return pq.read_table(source, schema=_SCHEMA).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=where, remedy="Pack the data set again") from error


def _no_manifest(folder: Path) -> EdgeFusionError:
    if (folder / "dataset" / MANIFEST).exists():
        return EdgeFusionError(
            "is a run, not a data set", where=str(folder), remedy=f"Did you mean {folder / 'dataset'}?"
        )
    if not (folder / "plan.parquet").exists() and not any(folder.glob("shard-*.tar")):
        return EdgeFusionError(
            "is no data set folder", where=str(folder), remedy="Give the folder that holds shards and manifest.parquet"
        )
    return CorruptShard(
        "there is no manifest", where=str(folder / MANIFEST), remedy="Packing did not finish: run it again"
    )


def packed_decisions(folder: Path) -> str | None:
    """Digest of the human decisions in the packed shards: empty if there were none, None if nothing whole is packed."""
    try:
        metadata = pq.read_schema(folder / MANIFEST).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return metadata.get(_DECISIONS, b"").decode()


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(sample id, members by extension) in order. Nothing is unpacked to disk; odd names, links and huge members are refused."""
    current, members = "", {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                key, _, kind = entry.name.partition(".")
                if not entry.isfile() or not _ID.fullmatch(key) or entry.size > MAX_MEMBER_BYTES:
                    raise _corrupt(path, f"holds a member that no shard of ours has: {entry.name[:90]!r}")
                if key != current and current:
                    yield current, members
                    members = {}
                if kind in members:
                    raise _corrupt(path, f"holds {entry.name[:90]!r} twice")
                current = key
                content = archive.extractfile(entry)
                members[kind] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"cannot be read ({error})") from error
    if current:
        yield current, members


def _verify_shard(path: Path, listed: list[dict[str, str]]) -> None:
    """Every sample is read, for a right checksum of the shard says nothing about the rows of the manifest."""
    if not path.exists():
        raise _corrupt(path, "is missing")
    manifest, left = str(path.parent / MANIFEST), {row["id"]: row for row in listed}
    whole = {row["shard_sha256"] for row in listed} == {digest_file(path)}
    for key, members in read_shard(path):
        row = left.pop(key, None)
        if row is None or row["sample_sha256"] != _digest(members):
            if row is not None and whole:
                raise _wrong_row(manifest, row, f"has another checksum than in {path.name}")
            raise _corrupt(path, f"sample {key} is damaged, doubled or not in {MANIFEST}")
        if (row["prompt"] or "").encode() != members.get("txt") or row["picture_kind"] not in members:
            raise _wrong_row(manifest, row, f"has another prompt or kind of picture than in {path.name}")
    if left:
        raise _corrupt(path, f"lacks sample {min(left)}")
    if not whole:
        raise _corrupt(path, "has a wrong checksum though its samples are whole")


def _corrupt(path: Path, what: str) -> CorruptShard:
    return CorruptShard(
        what,
        where=str(path),
        remedy="Run `edgefusion factory repair` (with --recipe on a copy), or copy the shard again",
    )


def _digest(members: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for kind in sorted(members):
        digest.update(f"{kind} {len(members[kind])}\n".encode())
        digest.update(members[kind])
    return digest.hexdigest()


def shard_bytes(samples: list[Sample]) -> bytes:
    """The shard of these samples, in their order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            for kind, content in sample.members().items():
                entry = tarfile.TarInfo(f"{sample.id}.{kind}")
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def _refuse_bad(sample: Sample) -> None:
    if not _ID.fullmatch(sample.id):
        raise ValueError(f"a sample id is 64 hex digits, not {sample.id[:90]!r}")
    if sample.picture_kind not in ("png", "jpg", "webp"):
        raise ValueError(f"sample {sample.id}: pictures are png, jpg or webp, not {sample.picture_kind!r}")
    if not sample.prompt.strip():
        raise ValueError(f"sample {sample.id} has an empty prompt")
