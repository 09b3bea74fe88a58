"""Samples to WebDataset shards and back: same samples, same bytes; the manifest comes last and vouches for every byte.

A data set is a folder of `shard-000000.tar`, ..., and `manifest.parquet` (a row a sample). `factory/verify.py` proves one.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import re
import stat
import tarfile
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.nearest import wrong_folder
from cluster.storage import digest_file, publish_bytes

MANIFEST = "manifest.parquet"
MAX_MEMBER_BYTES = 64 << 20
"""A larger member is refused unread: no picture of ours is near it."""

_DECISIONS = b"decisions_sha256"
_BLOCK_BYTES = 1 << 20
ID = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"shard-[0-9]{6,}\.tar")
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
        return digest_members(self.members())


def pack(samples: Iterable[Sample], folder: Path, samples_per_shard: int = 1000, decisions_sha256: str = "") -> Path:
    """Write shards of `samples` in the order of their ids, then the manifest; returns the manifest's path.

    An older manifest goes before the first shard that it does not vouch for: killed on the way, the data set is whole or says that it is not.
    Rerunning with the same samples gives the same bytes, and writes no shard that has them already. They are spilled to disk first and sorted by id there: one shard and the ids lie
    in memory, however many samples come. `decisions_sha256` says which human decisions went in; the manifest keeps it, so that later ones
    show. Raises ValueError for a doubled or malformed id, an unknown picture kind or an empty prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _vouched(folder)
    written: list[pa.Table] = [_SCHEMA.empty_table()]
    with sorted_on_disk(samples, folder) as there:
        for start in range(0, len(there), samples_per_shard):
            part = there.read(start, start + samples_per_shard)
            name = shard_name(start // samples_per_shard)
            data = shard_bytes(part)
            digest = hashlib.sha256(data).hexdigest()
            if not before or before.get(name) != digest:
                (folder / MANIFEST).unlink(missing_ok=True)
            if not _holds(folder / name, len(data), digest):
                publish_bytes(folder / name, data)
            written.append(_rows(part, name, digest))
    stale = {path.name for path in folder.glob("shard-*.tar")} - {table["shard"][0].as_py() for table in written[1:]}
    if stale:
        (folder / MANIFEST).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink()
    table = pa.concat_tables(written).combine_chunks()
    if decisions_sha256:
        table = table.replace_schema_metadata({_DECISIONS: decisions_sha256})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    publish_bytes(folder / MANIFEST, sink.getvalue())
    return folder / MANIFEST


def _holds(shard: Path, size_bytes: int, digest: str) -> bool:
    """Whether the file is there and whole: what has this name was synced before it got it."""
    try:
        facts = shard.lstat()  # a link is replaced, whatever it leads to
        return stat.S_ISREG(facts.st_mode) and facts.st_size == size_bytes and digest_file(shard) == digest
    except OSError:
        return False


def _vouched(folder: Path) -> dict[str, str]:
    """As `manifest_shards`; empty where there is no manifest that can be read."""
    try:
        return manifest_shards(folder)
    except EdgeFusionError:
        return {}


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


_Place = tuple[bytes, int, int, int]
"""Id (raw, so that they sort as their hex does), offset, length of the head, length of the picture."""


class Sorted:
    """Samples on disk, in the order of their ids."""

    def __init__(self, samples: Iterable[Sample], spill: IO[bytes]) -> None:
        self._places, self._spill = _spill(samples, spill), spill

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> list[Sample]:
        """Those from number `start` up to `stop`."""
        return [_unspill(self._spill, *place) for place in self._places[start:stop]]

    def find(self, sample_id: str) -> Sample | None:
        """The one of this id, if it is there."""
        at = bisect.bisect_left(self._places, (bytes.fromhex(sample_id),))
        there = at < len(self) and self._places[at][0].hex() == sample_id
        return _unspill(self._spill, *self._places[at]) if there else None


@contextmanager
def sorted_on_disk(samples: Iterable[Sample], folder: Path) -> Generator[Sorted]:
    """`samples` in a file of `folder` that has no name and goes with the block; ids and places lie in memory, however many come. Raises
    ValueError for one that is doubled or malformed."""
    with tempfile.TemporaryFile(dir=folder) as spill:
        yield Sorted(samples, spill)


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


def read_manifest(folder: Path) -> list[dict[str, str]]:
    """The manifest's rows, in the order of the shards."""
    return manifest_table(folder).to_pylist()


def first_prompts(folder: Path, count: int) -> list[str]:
    """Prompts of the first samples; of a manifest of any length no more is read. Raises CorruptShard."""
    path = folder / MANIFEST
    if not path.exists():
        raise _no_manifest(folder)
    try:
        batch = next(pq.ParquetFile(path).iter_batches(count, columns=["prompt"]), None)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=str(path), remedy="Pack the data set again") from error
    return batch["prompt"].to_pylist() if batch is not None else []


def manifest_table(folder: Path) -> pa.Table:
    """The manifest as it stands, true or not. Raises CorruptShard."""
    path = folder / MANIFEST
    if not path.exists():
        raise _no_manifest(folder)
    return parse_manifest(path, str(path))


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


def parse_manifest(source: Path | IO[bytes], where: str) -> pa.Table:
    """A manifest's file, which came from `where`; raises CorruptShard."""
    try:
        return pq.read_table(source, schema=_SCHEMA)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=where, remedy="Pack the data set again") from error


def _no_manifest(folder: Path) -> EdgeFusionError:
    if not (folder / "plan.parquet").exists() and not any(folder.glob("shard-*.tar")):
        what, remedy = "is no data set folder", "Give the folder that holds shards and manifest.parquet"
        return wrong_folder(folder, MANIFEST, what, remedy)
    return CorruptShard(
        "there is no manifest", where=str(folder / MANIFEST), remedy="Packing did not finish: run it again"
    )


def is_packed_as(folder: Path, ids: np.ndarray, samples_per_shard: int, decisions_sha256: str) -> bool | None:
    """The manifest lists these ids (bytes of hex, sorted), in shards of that size, and was packed by these decisions; None if no manifest says."""
    try:
        table = pq.read_table(folder / MANIFEST, columns=["id", "shard"])
    except (pa.ArrowInvalid, OSError):
        return None
    shards = {at: shard_name(at // samples_per_shard) for at in (samples_per_shard - 1, samples_per_shard)}
    return (
        np.array_equal(np.array(table["id"].to_pylist(), ids.dtype), ids)
        and all(table["shard"][at].as_py() == name for at, name in shards.items() if at < len(table))
        and packed_decisions(folder) == decisions_sha256
    )


def packed_decisions(folder: Path) -> str | None:
    """Digest of the human decisions in the packed shards: empty if there were none, None if nothing whole is packed."""
    try:
        metadata = pq.read_schema(folder / MANIFEST).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return metadata.get(_DECISIONS, b"").decode()


def read_shard(shard: Path | BinaryIO, where: str = "") -> Iterator[tuple[str, dict[str, bytes]]]:
    """(sample id, members by extension) in order, of a file or a stream that came from `where`; one sample lies in memory.

    Nothing is unpacked to disk; odd names, links and huge members are refused. Raises CorruptShard.
    """
    if isinstance(shard, Path):
        try:
            file = shard.open("rb")
        except OSError as error:
            raise corrupt(str(shard), f"cannot be read ({error})") from error
        with file:
            yield from read_shard(file, str(shard))
        return
    current, members = "", {}
    try:
        with tarfile.open(fileobj=shard, mode="r|", bufsize=_BLOCK_BYTES) as archive:
            for entry in archive:
                key, _, kind = entry.name.partition(".")
                if not entry.isfile() or not ID.fullmatch(key) or entry.size > MAX_MEMBER_BYTES:
                    raise corrupt(where, f"holds a member that no shard of ours has: {entry.name[:90]!r}")
                if key != current and current:
                    yield current, members
                    members = {}
                if kind in members:
                    raise corrupt(where, f"holds {entry.name[:90]!r} twice")
                current = key
                content = archive.extractfile(entry)
                members[kind] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise corrupt(where, f"cannot be read ({error})") from error
    if current:
        yield current, members


def corrupt(where: str, what: str) -> CorruptShard:
    """The error for a shard that is not what it should be."""
    return CorruptShard(what, where=where, remedy=remedy_for(where))


def remedy_for(where: str) -> str:
    """How to mend a damaged data set, by where it lies."""
    if "://" in where:
        return "Run `edgefusion factory pack FOLDER --to URL`, which sends what is damaged or missing there again"
    return "Run `edgefusion factory repair` (with --recipe on a copy), or copy it again or pack the data set again"


def digest_members(members: Mapping[str, bytes]) -> str:
    """SHA-256 over names, lengths and bytes of a sample's members by extension."""
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
    if not ID.fullmatch(sample.id):
        raise ValueError(f"a sample id is 64 hex digits, not {sample.id[:90]!r}")
    if sample.picture_kind not in ("png", "jpg", "webp"):
        raise ValueError(f"sample {sample.id}: pictures are png, jpg or webp, not {sample.picture_kind!r}")
    if not sample.prompt.strip():
        raise ValueError(f"sample {sample.id} has an empty prompt")
