"""Embeddings of pictures, made once and kept by what was embedded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from cluster.storage import publish_bytes

Tick = Callable[[str, int, int], object]
"""(what, done, of how many) -> anything."""


class Sees(Protocol):
    """What says something of pictures: a CLIP, or Inception."""

    batch: int

    def pictures(self, pictures: list[np.ndarray], /) -> np.ndarray: ...


class Judge:
    """A network whose embeddings are kept on disk by what was embedded."""

    def __init__(self, network: Sees, digest: str, folder: Path, size_px: int | None = None) -> None:
        """Pictures are resized to `size_px` first, if it is given."""
        self.network, self.size_px, self.folder = network, size_px, folder / "embeddings"
        self.digest = digest if size_px is None else f"{digest} at {size_px} px"

    def embed(self, what: str, pictures: Sequence[Callable[[], np.ndarray]], key: str | None, tick: Tick) -> np.ndarray:
        """N x D; pictures are read a batch at a time. Nothing is kept without a `key`."""
        path = self.folder / f"{hashlib.sha256(f'{self.digest} {key}'.encode()).hexdigest()}.npy"
        if key and path.exists():
            return np.load(path, allow_pickle=False)
        parts: list[np.ndarray] = []
        batch = self.network.batch
        for start in range(0, len(pictures), batch):
            parts.append(self.network.pictures([self._resized(read()) for read in pictures[start : start + batch]]))
            tick(what, min(start + batch, len(pictures)), len(pictures))
        found = np.concatenate(parts)
        if key:
            sink = io.BytesIO()
            np.save(sink, found, allow_pickle=False)
            publish_bytes(path, sink.getvalue())
        return found

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        if self.size_px is None or picture.shape[:2] == (self.size_px, self.size_px):
            return picture
        size = (self.size_px, self.size_px)
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
