"""`edgefusion trainer encode`: a pass over the shards that writes their encodings; kill it anywhere, run it again to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cluster.errors import CorruptShard, StageError
from cluster.remote import RemoteStore
from cluster.runner import Runner
from cluster.stage import PENDING, Row, Stage, Unit
from cluster.storage import digest_file, publish_bytes, sweep_partials
from factory.models import quiet, set_threads
from factory.pack import MANIFEST
from trainer.encodings import (
    ENCODINGS,
    INDEX,
    encoders_digest,
    file_of,
    has_encodings,
    name_of,
    read_index,
    write_index,
)
from trainer.latents import Encoder
from trainer.models import open_pipeline
from trainer.recipe import EncodeRecipe
from trainer.stream import ShardStream


def encode(
    recipe: EncodeRecipe, runner: Runner, tick: Callable[[int, int], object] = lambda done, of: None
) -> dict[str, Any]:
    """Encode what is not encoded yet, a unit of work a shard; returns the index that was written.

    Encodings by other encoders or of another packing are replaced. Raises CorruptShard if the data set itself is not whole.
    """
    folder = Path(recipe.data).expanduser().resolve()
    stream = ShardStream(folder)
    pipeline = open_pipeline(recipe.teacher, recipe.allow_pickle)
    encoders = encoders_digest(pipeline, recipe.size_px)
    del pipeline
    manifest = digest_file(folder / MANIFEST)
    sound: dict[str, str] = {}
    if has_encodings(folder):
        index = read_index(folder)
        if (index["encoders"], index["manifest"], index["dtype"]) == (encoders, manifest, recipe.dtype):
            sound = index["files"]
        else:
            (folder / ENCODINGS / INDEX).unlink()  # from here on nobody takes the old ones for whole
    sweep_partials(folder / ENCODINGS)
    shards = {row["shard"]: row["shard_sha256"] for row in stream.rows}
    for stale in set((folder / ENCODINGS).glob("*.safetensors")) - {file_of(folder, shard) for shard in shards}:
        stale.unlink()
    stream.close()
    bindings = {shard: _binding(encoders, sha256, recipe.dtype) for shard, sha256 in shards.items()}
    todo = [shard for shard in shards if not _is_sound(file_of(folder, shard), bindings[shard], sound.get(shard))]
    done = len(shards) - len(todo)
    tick(done, len(shards))
    # No Ray object may hold the recipe's path relative to another folder: it is absolute from here on.
    settings = recipe.model_copy(update={"data": str(folder)})
    stage = Stage("encode", lambda: _Encode(settings), recipe.workers, cpus=1, gpus=recipe.gpus, whole=True)
    units = [Unit(shard, [{"id": shard, "outcome": PENDING, "binding": bindings[shard]}]) for shard in todo]
    for _ in runner.run([stage], units):
        done += 1
        tick(done, len(shards))
    files = {shard: digest_file(file_of(folder, shard)) for shard in shards}
    index = {
        "teacher": recipe.teacher,
        "size_px": recipe.size_px,
        "dtype": recipe.dtype,
        "encoders": encoders,
        "manifest": manifest,
        "files": files,
    }
    write_index(folder, index)
    return index


def publish_encodings(folder: Path, url: str, tick: Callable[[int, int], object] = lambda done, of: None) -> int:
    """Put the encodings of the packed data set in `folder` beside the same data set at `url`, the index last; returns how many files were sent.

    What is there and right is not sent again. Raises CorruptShard if another data set, or none, is there.
    """
    index, data, place = read_index(folder), RemoteStore(url), RemoteStore(f"{url.rstrip('/')}/{ENCODINGS}")
    remedy = f"Publish it first: edgefusion factory pack {folder} --to {url}"
    if MANIFEST not in data.names():
        raise CorruptShard("there is no packed data set", where=url, remedy=remedy)
    if hashlib.sha256(data.read(MANIFEST)).hexdigest() != index["manifest"]:
        raise CorruptShard(f"there is another data set than in {folder}", where=url, remedy=remedy)
    there, sent = place.names(), 0
    written = (folder / ENCODINGS / INDEX).read_bytes()
    if INDEX in there and place.read(INDEX) != written:
        place.remove(INDEX)  # from here on nobody takes the old ones for whole
    for done, (shard, sha256) in enumerate(index["files"].items(), 1):
        name = name_of(shard)
        if name not in there or not place.holds(name, file_of(folder, shard), sha256):
            place.send(name, file_of(folder, shard))
            sent += 1
        tick(done, len(index["files"]))
    for stale in set(there) - {INDEX, *(name_of(shard) for shard in index["files"])}:
        place.remove(stale)
    place.publish(INDEX, written)
    return sent


class _Encode:
    """Writes the file of each shard it is given."""

    def __init__(self, recipe: EncodeRecipe) -> None:
        set_threads(recipe.threads)
        quiet()
        self.recipe, self.folder = recipe, Path(recipe.data)
        device = torch.device("cuda" if recipe.gpus and torch.cuda.is_available() else "cpu")
        self.encoder = Encoder(open_pipeline(recipe.teacher, recipe.allow_pickle), recipe.size_px, device, cache=False)
        self.stream = ShardStream(self.folder, check=False)

    def __call__(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            self._write(row["id"], row["binding"])
        return rows

    def _write(self, shard: str, binding: str) -> None:
        numbers = [i for i, entry in enumerate(self.stream.rows) if entry["shard"] == shard]
        latents: list[torch.Tensor] = []
        text: list[torch.Tensor] = []
        for start in range(0, len(numbers), self.recipe.batch_images):
            examples = [self.stream.read(i) for i in numbers[start : start + self.recipe.batch_images]]
            latents.append(self.encoder.latents(examples).cpu())
            text.append(self.encoder.texts([example.prompt for example in examples]).cpu())
        kind = getattr(torch, self.recipe.dtype)
        tensors = {"latents": torch.cat(latents).to(kind), "text": torch.cat(text).to(kind)}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise StageError(
                    f"{name} of {shard} hold what is no number in {self.recipe.dtype}", remedy="Use dtype float32"
                )
        # Both under one key: of several safetensors takes another order each time, and the bytes would differ.
        publish_bytes(file_of(self.folder, shard), save(tensors, {"binding": f"{binding} {_digest_of(tensors)}"}))


def _binding(encoders: str, shard_sha256: str, dtype: str) -> str:
    return hashlib.sha256(json.dumps([encoders, shard_sha256, dtype]).encode()).hexdigest()


def _is_sound(path: Path, binding: str, sha256: str | None) -> bool:
    """Whether a file is there, bound to `binding`, and as it was written: by the index's digest, or by its own where no index was written."""
    try:
        with safe_open(path, "pt") as file:
            bound, _, own = (file.metadata() or {}).get("binding", "").partition(" ")
            if bound != binding:
                return False
            if sha256 is not None:
                return digest_file(path) == sha256
            return own == _digest_of({name: file.get_tensor(name) for name in ("latents", "text")})
    except (OSError, SafetensorError):
        return False


def _digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, types, shapes and numbers; it lies in the file itself, so that no kill comes between the two."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
