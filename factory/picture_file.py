"""A picture as the file that a user asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.errors import EdgeFusionError
from cluster.storage import publish_bytes
from factory.stages import encode_picture

_KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


def check_picture_path(path: Path) -> None:
    """Raises EdgeFusionError if its name is not that of a picture: to be asked before the drawing, not after it."""
    if path.is_dir():
        raise EdgeFusionError("is a folder", where=str(path), remedy="Give the name of a file, such as out.png")
    if path.suffix.lower() not in _KINDS:
        raise EdgeFusionError(
            "its name does not say which kind of picture it is to be",
            where=str(path),
            remedy=f"Let it end in {', '.join(_KINDS)}",
        )


def write_picture(path: Path, picture: np.ndarray) -> None:
    """H x W x 3 uint8 to a file, whole or not at all, its kind by its name; folders on the way are made."""
    publish_bytes(path, encode_picture(picture, _KINDS[path.suffix.lower()]))
