"""A data set's latents, and the pictures that the original decoder makes of them, in files of a few samples each.

Each file is made from the same samples in the same batch whatever came before, so a resumed training reads the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.storage import publish_bytes
from factory.models import fingerprint
from trainer.latents import decode_scaled, encode_scaled
from trainer.recipe import DecoderRecipe
from trainer.stream import PictureFolder, ShardStream

CHUNK = 32
"""Samples a file, and the batch they are encoded in."""
_OPEN_FILES = 512


class LatentFiles:
    """Latents as a UNet has them (scaled; noise on every second one), by row number. `fill` first."""

    def __init__(
        self,
        folder: Path,
        samples: ShardStream | PictureFolder,
        vae: Any,
        size_px: int,
        recipe: DecoderRecipe,
    ) -> None:
        self.folder, self.samples, self.vae, self.size_px, self.recipe = folder, samples, vae, size_px, recipe
        self.chunks = -(-len(samples) // CHUNK)
        self.taught: list[int] = []
        self.held_out: list[int] = []
        self._open: OrderedDict[Path, np.ndarray] = OrderedDict()
        facts = [
            fingerprint(recipe.model),
            samples.digest(),
            size_px,
            recipe.latent_noise,
            recipe.keep_pictures,
            recipe.seed,
        ]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._claim()

    def fill(self, tick: Callable[[int, int], object]) -> None:
        """Make the files that are not there. Raises EdgeFusionError if no sample is left to teach or to judge by."""
        ids: list[str] = []
        for chunk in range(self.chunks):
            if not self._path("ids", chunk).exists():
                self._make(chunk)
            ids += self._load("ids", chunk).tolist()
            tick(min((chunk + 1) * CHUNK, len(self.samples)), len(self.samples))
        # By the id, so that a sample stays on its side when others come or go.
        bar = self.recipe.held_out_share * 2**32
        self.held_out = [row for row, key in enumerate(ids) if int(key[:8], 16) < bar]
        self.taught = [row for row, key in enumerate(ids) if int(key[:8], 16) >= bar]
        if not self.held_out or not self.taught:
            raise EdgeFusionError(
                f"{len(ids)} samples do not divide into some to learn from and some to judge by",
                remedy="Give more pictures or change held_out_share",
            )

    def read(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents B C H W and, if they are kept, the original decoder's pictures B 3 H W in [-1, 1]."""
        places = [divmod(row, CHUNK) for row in rows]
        latents = torch.from_numpy(np.stack([self._load("latents", c)[i] for c, i in places]))
        if not self.recipe.keep_pictures:
            return latents, None
        pixels = np.stack([self._load("pictures", c)[i] for c, i in places])
        return latents, torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def _claim(self) -> None:
        mark = self.folder / "recipe"
        if mark.exists() and mark.read_text() != self.digest:
            raise CorruptShard(
                "the latents are of another model, data set or recipe",
                where=str(self.folder),
                remedy="Choose another output folder",
            )
        publish_bytes(mark, self.digest.encode())

    @torch.no_grad()
    def _make(self, chunk: int) -> None:
        rows = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.samples)))
        examples = [self.samples.read(row) for row in rows]
        pixels = np.stack([example.pixels(self.size_px) for example in examples])
        device = next(self.vae.parameters()).device
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
        latents = encode_scaled(self.vae, pictures)
        noise = torch.randn(
            latents.shape, generator=torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + chunk)
        )
        odd = torch.tensor([row % 2 for row in rows])[:, None, None, None]
        latents = latents + (odd * noise * self.recipe.latent_noise).to(device)
        self._put("latents", chunk, latents.cpu().numpy())
        if self.recipe.keep_pictures:
            made = decode_scaled(self.vae, latents).clamp(-1, 1).add(1).mul(127.5).round().byte()
            self._put("pictures", chunk, made.permute(0, 2, 3, 1).cpu().numpy())
        self._put("ids", chunk, np.array([example.id for example in examples]))  # last: the mark of a whole chunk

    def _path(self, what: str, chunk: int) -> Path:
        return self.folder / f"{what}-{chunk:06d}.npy"

    def _put(self, what: str, chunk: int, array: np.ndarray) -> None:
        sink = io.BytesIO()
        np.save(sink, array, allow_pickle=False)
        publish_bytes(self._path(what, chunk), sink.getvalue())

    def _load(self, what: str, chunk: int) -> np.ndarray:
        path = self._path(what, chunk)
        found = self._open.pop(path, None)
        if found is None:
            try:
                found = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise CorruptShard(
                    f"cannot be read ({error})", where=str(path), remedy="Delete it and run again"
                ) from error
        self._open[path] = found  # most recently used is last; each holds a file handle
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return found
