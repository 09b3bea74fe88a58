"""Latents and text states of a packed data set, kept beside its shards so that no step encodes what an earlier one did.

Layout below the data set: `encodings/shard-000000.safetensors` (`latents` N C H W, `text` N T D, in the order of the manifest), one a shard,
and `encodings/index.json`, written last. The index is bound to the encoders (weights, tokenizer, picture size) and to the manifest: encodings
by other encoders or of another packing are refused, never used. The shards themselves stay as they are, byte for byte. Beside a data set that is
given by URL they are read by way of this machine's cache, as its shards are, each proven by the index when it is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.cache import RemoteFolder
from cluster.errors import CorruptShard
from cluster.storage import digest_file, publish_bytes
from factory.pack import MANIFEST

ENCODINGS, INDEX = "encodings", "index.json"
_OPEN_FILES = 16
_TRIES = 3


@dataclass(frozen=True)
class Encoded:
    """One sample's latents C H W (scaled, as a UNet has them) and text states T D, float32."""

    latents: torch.Tensor
    text: torch.Tensor


class Encodings:
    """The encodings of one data set, by row number of its manifest."""

    def __init__(self, folder: Path | RemoteFolder, rows: list[dict[str, str]], index: dict[str, Any]) -> None:
        self.data, self.index = folder, index
        self.place = f"{folder}/{ENCODINGS}"
        count: Counter[str] = Counter()
        self._places: list[tuple[str, int]] = []
        for row in rows:
            self._places.append((row["shard"], count[row["shard"]]))
            count[row["shard"]] += 1
        self._open: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    def find(
        cls,
        folder: Path | RemoteFolder,
        rows: list[dict[str, str]],
        encoders: str,
        check: bool = True,
        manifest: str | None = None,
    ) -> Encodings | None:
        """Those of the data set in `folder`, or None if it has none; `manifest` is the SHA-256 of its manifest if that was read already.

        Raises CorruptShard for stale ones and, with `check`, for damaged ones on disk; those of a remote data set are proven when fetched.
        """
        if not has_encodings(folder):
            return None
        place = f"{folder}/{ENCODINGS}"
        index = read_index(folder)
        how = f"DATA --to {folder}" if isinstance(folder, RemoteFolder) else str(folder)
        remedy = (
            f"Run `edgefusion trainer encode {how}` again with this teacher and size, or set trainer.encodings=ignore"
        )
        if index["encoders"] != encoders:
            what = f"were made by other encoders or at another size ({index['teacher']}, {index['size_px']} px)"
            raise CorruptShard(f"the encodings {what}", where=place, remedy=remedy)
        if index["manifest"] != (manifest or digest_file(f"{folder}/{MANIFEST}")):
            raise CorruptShard("the encodings are of another packing of the data set", where=place, remedy=remedy)
        found = cls(folder, rows, index)
        if check and not isinstance(folder, RemoteFolder):
            for shard, sha256 in index["files"].items():
                path = file_of(folder, shard)
                if not path.exists() or digest_file(path) != sha256:
                    raise CorruptShard(
                        "is damaged or missing", where=str(path), remedy=f"Delete {place} and encode again"
                    )
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What made them: teacher, edge in pixels, number type."""
        return {name: self.index[name] for name in ("teacher", "size_px", "dtype")}

    @property
    def digest(self) -> str:
        """What makes these encodings these."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    def read(self, row: int) -> Encoded:
        """Raises CorruptShard for a file that cannot be read."""
        shard, place = self._places[row]
        try:
            file = self._open.pop(shard, None) or self._opened(shard)
            found = [file.get_slice(name)[place].float() for name in ("latents", "text")]
        except (SafetensorError, OSError, IndexError) as error:
            raise CorruptShard(
                f"cannot be read ({error})",
                where=f"{self.place}/{name_of(shard)}",
                remedy=f"Delete {self.place} and encode again",
            ) from error
        self._open[shard] = file  # most recently used is last
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return Encoded(*found)

    def _opened(self, shard: str) -> Any:
        if not isinstance(self.data, RemoteFolder):
            return safe_open(file_of(self.data, shard), "pt")
        for attempt in range(_TRIES):
            # What is open here stays whole, but safetensors opens by name, and the cache may have given it away by then.
            with self.data.open(f"{ENCODINGS}/{name_of(shard)}", self.index["files"][shard]) as file:
                try:
                    return safe_open(file.name, "pt")
                except FileNotFoundError:
                    if attempt == _TRIES - 1:
                        raise

    def close(self) -> None:
        self._open.clear()


def has_encodings(folder: Path | RemoteFolder) -> bool:
    """Whether the data set in `folder` has encodings of whatever kind."""
    if isinstance(folder, RemoteFolder):
        name = f"{ENCODINGS}/{INDEX}"
        return name in folder.sizes([name])
    return (folder / ENCODINGS / INDEX).exists()


def read_index(folder: Path | RemoteFolder) -> dict[str, Any]:
    """The index of the data set's encodings; raises CorruptShard."""
    path, name = f"{folder}/{ENCODINGS}/{INDEX}", f"{ENCODINGS}/{INDEX}"
    try:
        index = json.loads(folder.read(name) if isinstance(folder, RemoteFolder) else (folder / name).read_text())
        missing = {"encoders", "manifest", "teacher", "size_px", "dtype", "files"} - set(index)
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise CorruptShard(
            f"cannot be read ({error})", where=path, remedy=f"Delete {folder}/{ENCODINGS} and encode again"
        ) from error
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    publish_bytes(folder / ENCODINGS / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def name_of(shard: str) -> str:
    """The file of a shard's encodings."""
    return f"{Path(shard).stem}.safetensors"


def file_of(folder: Path, shard: str) -> Path:
    """Where the encodings of a shard lie."""
    return folder / ENCODINGS / name_of(shard)


def encoders_digest(pipeline: Any, size_px: int) -> str:
    """What decides encodings: the VAE's and the text encoder's weights as they are in memory, their configs' scalings, the tokenizer, the size."""
    digest = hashlib.sha256()
    vae, tokenizer = pipeline.vae, pipeline.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = [size_px, vae.config.scaling_factor, vae.config.shift_factor, tokenizer.model_max_length, words]
    digest.update(json.dumps(facts).encode())
    for part in (vae, pipeline.text_encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
