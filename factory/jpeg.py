"""JPEG by simplejpeg, where it is installed: the same pixels as Pillow gives, in two thirds of the time.

Only what is whole and plain. All else is left to Pillow, which then says what is wrong with it; so what is a picture, and which, hangs on Pillow alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image


def read_jpeg(image: Image.Image, data: bytes, least_px: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """H x W x 3 uint8 of `data`, of which `image` is the header, or None if it is for Pillow to read.

    With `least_px` (width, height) at the smallest of a half, a quarter and an eighth that is as large, as `Image.draft` does.
    """
    decoder = _decoder()
    if decoder is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    width, height = image.size
    fraction = min(width // max(1, least_px[0]), height // max(1, least_px[1])) if any(least_px) else 1
    scale = next(one for one in (8, 4, 2, 1) if one <= max(1, fraction))
    wanted = (-(-height // scale), -(-width // scale))
    try:
        # Two headers in one file must not get round the limit on pixels, which Pillow's was held against.
        if decoder.decode_jpeg_header(data)[:2] != (height, width):
            return None
        found = decoder.decode_jpeg(data, "RGB", min_height=wanted[0], min_width=wanted[1])
    except ValueError:  # damaged, if only a little
        return None
    return found if found.shape[:2] == wanted else None


@cache
def _decoder() -> Any:
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return simplejpeg
