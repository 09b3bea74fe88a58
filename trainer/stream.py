"""A packed data set as an endless stream whose batch at any step is a pure function of (seed, step).

The state of the stream is therefore the step number: resume is exact, and any number of workers sees the same global batches.
Each epoch is a fresh seeded permutation of all samples; a batch may span two epochs. Pictures are read where they lie in the
shards (a tar member is contiguous bytes), so nothing is unpacked; where encodings of them lie beside the shards and are asked for, those
are read instead. Shards of a data set that is given by URL are read from a cache on this machine. Knows no models.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cluster.cache import RemoteFolder
from cluster.errors import CorruptShard, EdgeFusionError
from cluster.nearest import wrong_folder
from cluster.storage import digest_file
from factory.pack import MANIFEST, read_manifest
from factory.verify import find_bad_samples, read_remote_manifest, verify
from trainer.encodings import Encoded, Encodings, name_of
from trainer.options import OnCorrupt

_OPEN_SHARDS = 16

log = logging.getLogger("edgefusion")


class CorruptSample(CorruptShard):
    """One sample whose bytes are as they were packed, or lie where they should, and still are no picture with a prompt."""

    def __init__(self, reason: str, key: str, where: str = "") -> None:
        self.reason, self.key = reason, key
        super().__init__(
            f"sample {key} cannot be read ({reason})",
            where=where,
            remedy="Leave it out of the data set and pack again",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CorruptSample, (self.reason, self.key, self.where)  # it may come from an actor


@dataclass(frozen=True)
class Example:
    """One training sample."""

    id: str
    prompt: str
    picture: bytes = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    encoded: Encoded | None = field(default=None, repr=False)
    """Its latents and text states where the data set has them; `picture` is then empty."""
    _decoded: dict[int | None, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def pixels(self, size_px: int | None = None) -> np.ndarray:
        """size x size x 3 uint8: the centre square, resized if another size is asked for. Decoded once; raises CorruptSample."""
        if size_px not in self._decoded:
            try:
                self._decoded[size_px] = self._decode(size_px)
            except Exception as error:  # decoders raise whatever they like at bytes that are no picture
                raise CorruptSample(f"its picture cannot be decoded: {type(error).__name__}", self.id) from error
        return self._decoded[size_px]

    def _decode(self, size_px: int | None) -> np.ndarray:
        with Image.open(io.BytesIO(self.picture), formats=("PNG", "JPEG", "WEBP")) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            if size_px is not None and side != size_px:
                square = square.resize((size_px, size_px), Image.Resampling.LANCZOS)
            return np.asarray(square)


class EndlessOrder:
    """Row numbers without end: each epoch is a fresh seeded permutation of all `count` rows."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int, batch: int) -> list[int]:
        """Row numbers of the global batch at `step`."""
        return [self.row_at(position) for position in range(step * batch, (step + 1) * batch)]

    def row_at(self, position: int) -> int:
        """Row number of the draw at `position`."""
        epoch, place = divmod(position, self.count)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count))
        return int(self._epoch[1][place])


class ShardStream:
    """Random access to the samples of a verified data set, and its endless seeded order."""

    def __init__(
        self,
        folder: Path | RemoteFolder,
        seed: int = 0,
        check: bool = True,
        encoders: str | None = None,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        """With `encoders` (`trainer.encodings.encoders_digest`), encodings beside the shards are read instead of pictures.

        Raises CorruptShard if `check` finds that shards, members or encodings are not what the manifest says, and for encodings by
        other encoders or of another packing. With `on_corrupt=skip` samples of missing or damaged shards are named in `damaged` instead;
        a manifest that is not true is refused all the same. Of a remote data set `check` proves the manifest and that all shards are there;
        each shard, or file of encodings, is proven when it is fetched, and a damaged one is an error.
        """
        self.damaged: dict[int, str] = {}
        """Row number to what is wrong with it."""
        self.folder, self.seed, self.on_corrupt = folder, seed, on_corrupt
        if isinstance(folder, RemoteFolder):
            manifest = folder.read(MANIFEST)
            self._manifest_sha256 = hashlib.sha256(manifest).hexdigest()
            self.rows = read_remote_manifest(manifest, f"{folder}/{MANIFEST}")
        else:
            if check and on_corrupt == "stop":
                verify(folder)
            self._manifest_sha256 = ""
            self.rows = read_manifest(folder)
        if not self.rows:
            raise EdgeFusionError(
                "the data set is empty",
                where=str(folder),
                remedy="Loosen factory.select (min_clip) or plan more prompts",
            )
        _refuse_gaps(self.rows, f"{folder}/{MANIFEST}")
        if check and on_corrupt == "skip" and isinstance(folder, Path):
            reasons = find_bad_samples(folder)
            self.damaged = {i: reasons[row["id"]] for i, row in enumerate(self.rows) if row["id"] in reasons}
        self._sha256 = {row["shard"]: row["shard_sha256"] for row in self.rows}
        self._lock = threading.Lock()
        self._members: dict[str, dict[str, tuple[int, int]]] = {}
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._order = EndlessOrder(len(self.rows), seed)
        self.encodings: Encodings | None = None
        if encoders:
            self.encodings = Encodings.find(folder, self.rows, encoders, check, self._manifest_sha256 or None)
        if isinstance(folder, RemoteFolder):
            if check and self.encodings is None:
                _look_for_files(folder, list(self._sha256), "Copy the data set there again, the manifest last")
            elif check and self.encodings is not None:  # no shard is fetched then
                place = RemoteFolder(self.encodings.place, folder.recipe)
                names = [name_of(shard) for shard in self.encodings.index["files"]]
                _look_for_files(place, names, f"Run `edgefusion trainer encode DATA --to {folder}` again")
            return
        if check and self.encodings is None:
            for row in range(len(self.rows)):
                if row not in self.damaged:
                    self._places(row)

    def __len__(self) -> int:
        return len(self.rows)

    def row_at(self, draw: int) -> int:
        """Row number of a draw of its endless order."""
        return self._order.row_at(draw)

    def read(self, row: int) -> Example:
        """From any thread; one at a time is at the files."""
        entry = self.rows[row]
        with self._lock:
            if self.encodings is not None:
                return Example(entry["id"], entry["prompt"], b"", encoded=self.encodings.read(row))
            places = self._places(row)
            try:
                data = {kind: self._bytes(entry["shard"], *place) for kind, place in places.items()}
            except OSError as error:
                raise self._unreadable(row, str(error)) from error
        try:
            return Example(entry["id"], data["txt"].decode(), data[entry["picture_kind"]], json.loads(data["json"]))
        except ValueError as error:
            what = f"its text is no text: {type(error).__name__}"
            raise CorruptSample(what, entry["id"], f"{self.folder}/{entry['shard']}") from error

    def identity(self) -> dict[str, str | None]:
        """What makes this data set this data set: its manifest vouches for every byte, and the index of the encodings for theirs."""
        own = digest_file(self.folder / MANIFEST) if isinstance(self.folder, Path) else self._manifest_sha256
        return {"manifest": own, "encodings": None if self.encodings is None else self.encodings.digest}

    def digest(self) -> str:
        """The same as one digest."""
        own, encodings = self.identity().values()
        return str(own) if encodings is None else hashlib.sha256(f"{own} {encodings}".encode()).hexdigest()

    def close(self) -> None:
        if self.encodings is not None:
            self.encodings.close()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _places(self, row: int) -> dict[str, tuple[int, int]]:
        """Offset and size of the sample's members in its shard. Raises CorruptShard for one that is not there."""
        entry = self.rows[row]
        try:
            found = self._index(entry["shard"])
        except (tarfile.TarError, OSError) as error:
            raise self._unreadable(row, str(error)) from error
        names = {kind: f"{entry['id']}.{kind}" for kind in ("json", entry["picture_kind"], "txt")}
        for name in names.values():
            if name not in found:
                raise self._unreadable(row, f"there is no member {name}")
        return {kind: found[name] for kind, name in names.items()}

    def _unreadable(self, row: int, why: str) -> CorruptShard:
        entry = self.rows[row]
        return CorruptShard(
            f"sample {entry['id']} cannot be read ({why})",
            where=f"{self.folder}/{entry['shard']}",
            remedy="Copy the shard again or pack the data set again",
        )

    def _index(self, shard: str) -> dict[str, tuple[int, int]]:
        if shard not in self._members:
            found: dict[str, tuple[int, int]] = {}
            with self._open(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                try:
                    for entry in archive:
                        found[entry.name] = (entry.offset_data, entry.size)
                except tarfile.TarError:
                    # With samples left out, those before the damage are read: the main process proved each.
                    if self.on_corrupt == "stop":
                        raise
            self._members[shard] = found
        return self._members[shard]

    def _bytes(self, shard: str, offset: int, size: int) -> bytes:
        file = self._files.pop(shard, None) or self._open(shard)
        self._files[shard] = file  # most recently used is last
        if len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        file.seek(offset)
        return file.read(size)

    def _open(self, shard: str) -> BinaryIO:
        if isinstance(self.folder, RemoteFolder):
            return self.folder.open(shard, self._sha256[shard])
        return (self.folder / shard).open("rb")


def _look_for_files(folder: RemoteFolder, names: list[str], remedy: str) -> None:
    """Raises CorruptShard for one that is not there; warns if the cache cannot hold them all."""
    sizes = folder.sizes(names)
    for name in names:
        if name not in sizes:
            raise CorruptShard("is missing", where=f"{folder}/{name}", remedy=remedy)
    whole, limit_gib = sum(sizes.values()) / 2**30, folder.recipe.limit_gib
    if whole > limit_gib:
        log.warning(
            "%s holds %.3g GiB and its cache only %.3g: files will be fetched again and again. Raise cluster.cache.limit_gib",
            folder,
            whole,
            limit_gib,
        )


def _refuse_gaps(rows: list[dict[str, str]], where: str) -> None:
    """Raises CorruptShard for a manifest whose rows lack what reading needs."""
    for row in rows:
        for name in ("id", "shard", "prompt", "picture_kind"):
            if not row.get(name):
                raise CorruptShard(
                    f"sample {row.get('id') or 'without id'} has no {name}",
                    where=where,
                    remedy="Pack the data set again",
                )


class PictureFolder:
    """The PNG, JPEG and WebP files below a folder, as samples without prompts; an id is the SHA-256 of the file's bytes."""

    def __init__(self, folder: Path) -> None:
        """Raises EdgeFusionError for a folder without pictures."""
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not self.paths:
            what, remedy = "holds neither a manifest nor pictures", "Give a packed data set or a folder of pictures"
            raise wrong_folder(folder, MANIFEST, what, remedy)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Example:
        data = self.paths[row].read_bytes()
        return Example(hashlib.sha256(data).hexdigest(), "", data)

    def digest(self) -> str:
        """The names and contents of all files."""
        lines = [f"{path.name} {digest_file(path)}" for path in self.paths]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Nothing is held."""


def open_samples(folder: Path) -> ShardStream | PictureFolder:
    """A packed data set, proven whole, or else a folder of pictures."""
    return ShardStream(folder) if (folder / MANIFEST).exists() else PictureFolder(folder)
