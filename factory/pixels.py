"""A picture file to pixels as a person would see it: the one place where pictures that came from elsewhere are opened.

Turned as EXIF says, laid on white where it is transparent, 16 bits scaled to 8, colours by the file's own profile to sRGB. Bounded in
pixels before anything is decoded, and laid out a few rows at a time, so that a large picture is in memory twice at most.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from factory.jpeg import read_jpeg
from factory.recipe.make import MAX_PIXELS

_FORMATS = ("PNG", "JPEG", "WEBP")
_STRIP_PIXELS = 1 << 20
_ORIENTATION = 0x0112
_MAX_PROFILE_BYTES = 4 << 20
"""A larger colour profile is left out; those of printers have up to two million."""
DRAFT = 1.5
"""Nearer to the crop's own size, decoding at a fraction saves more, and leaves less for the better filter to do: 1.5 keeps over 30 dB."""

# Pillow warns at a limit of its own, which is not the recipe's.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """H x W x 3 uint8, not to be written to; raises ValueError for what is no picture or has more than `max_pixels`."""
    with opened(data, max_pixels) as image:
        return _turned(_pixels(image, data), _orientation(image))


def open_crops(
    data: bytes, size_px: int, ends: bool, max_pixels: int = MAX_PIXELS
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Squares of a picture file, scaled to `size_px` (H x W x 3 uint8), and its (height, width). Raises ValueError as `decode_picture`.

    The centre; with `ends` also the left or upper end and the right or lower one, unless the picture is square and all are the same.
    A JPEG much larger than the crop is decoded at a half, a quarter or an eighth, by its own frequencies, to no less than DRAFT times the crop.
    """
    with opened(data, max_pixels) as image:
        width, height = image.size
        share = DRAFT * size_px / min(width, height)
        ready = _pixels(image, data, (math.ceil(width * share), math.ceil(height * share)))
        orientation = _orientation(image)
        ready = _turned(ready, orientation)
        width, height = (height, width) if orientation >= 5 else (width, height)
    side = min(ready.shape[:2])
    across, down = ready.shape[1] - side, ready.shape[0] - side
    corners = [(across // 2, down // 2), *([(0, 0), (across, down)] if ends and width != height else [])]
    return [_scaled(ready[top : top + side, left : left + side], size_px) for left, top in corners], (height, width)


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Generator[Image.Image]:
    """The picture in `data`, its header read; whatever goes wrong while it is used comes as ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"a picture of {image.width} x {image.height} is over the limit of {max_pixels} pixels "
                    "(factory.make.crop.max_pixels)"
                )
            yield image
    except UnidentifiedImageError:
        # Its own words hold a memory address, and a reason must be the same in every run.
        raise ValueError("not a picture (neither PNG, JPEG nor WebP)") from None
    except ValueError:
        raise
    except Exception as error:  # damaged files make the decoders raise whatever they please
        raise ValueError(f"not a picture ({error})") from error


def _pixels(image: Image.Image, data: bytes, least_px: tuple[int, int] | None = None) -> np.ndarray:
    """H x W x 3 uint8 of an opened picture, not yet turned; a JPEG at a fraction that leaves `least_px` (width, height)."""
    profile = image.info.get("icc_profile")
    ready = read_jpeg(image, data, least_px or (0, 0))
    if ready is None:
        if least_px is not None:
            image.draft(None, least_px)
        image.load()
        grey = _grey_of_16_bits(image)
        ready = _rgb(image if grey is None else grey, profile)
    elif profile:
        ready = _to_srgb(ready, profile)
    return ready


def _rgb(image: Image.Image, profile: bytes | None) -> np.ndarray:
    """A loaded picture on white, in sRGB."""
    clear = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    # Grey and printing colours are what their profile is about; all others are RGB by then.
    own = None if clear else _transform(profile, image.mode) if image.mode in ("L", "CMYK") else None
    if own is None and not clear and image.width * image.height <= _STRIP_PIXELS * 16:
        ready = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    else:
        ready = np.empty((image.height, image.width, 3), np.uint8)
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            if own is not None:
                strip = ImageCms.applyTransform(strip, own)
            elif clear:
                strip = strip.convert("RGBA")
                strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
            assert strip is not None
            ready[top : top + rows] = np.asarray(strip.convert("RGB"))
    return ready if own is not None or not profile else _to_srgb(ready, profile)


def _grey_of_16_bits(image: Image.Image) -> Image.Image | None:
    """A picture of 16-bit grey in 8 bits (Pillow's own conversion cuts all above 255 off), or None if it is none."""
    if not image.mode.startswith("I"):
        return None
    clear = image.info.get("transparency")
    small, masks = Image.new("L", image.size), Image.new("L", image.size, 255) if clear is not None else None
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.int64)
        small.paste(Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8)), (0, top))
        if masks is not None:
            masks.paste(Image.fromarray(((values != clear) * 255).astype(np.uint8)), (0, top))
    return Image.merge("LA", (small, masks)) if masks is not None else small


def _to_srgb(ready: np.ndarray, profile: bytes) -> np.ndarray:
    transform = _transform(profile, "RGB")
    if transform is None:
        return ready
    found = np.empty(ready.shape, np.uint8)
    rows = max(1, _STRIP_PIXELS // ready.shape[1])
    for top in range(0, len(ready), rows):
        strip = Image.fromarray(np.ascontiguousarray(ready[top : top + rows]))
        found[top : top + rows] = np.asarray(ImageCms.applyTransform(strip, transform))
    return found


@lru_cache(maxsize=16)
def _transform(profile: bytes | None, mode: str) -> Any:
    """From the profile's colours to sRGB; None where it is damaged, is about other colours than `mode`, or changes nothing to speak of."""
    spaces = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
    if not profile or len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        inner: Any = found.profile  # of Pillow's own C code, which has no types
        if inner.xcolor_space.strip() != spaces[mode]:
            return None
        transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":
            # sRGB goes by many names and in many versions; one that moves no colour by more than a shade is it.
            shades = np.linspace(0, 255, 9).round().astype(np.uint8)
            cube = np.stack(np.meshgrid(shades, shades, shades), axis=-1).reshape(27, 27, 3)
            moved = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform)).astype(np.int16) - cube
            return transform if np.abs(moved).max() > 1 else None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 where it says nothing, or nothing that can be read. To be asked last: a PNG may say it at its end."""
    if not {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & set(image.info):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # a picture is no worse for what is damaged beside it
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(ready: np.ndarray, orientation: int) -> np.ndarray:
    """As `ImageOps.exif_transpose`: 2 to 4 mirror or turn it half round, 5 to 8 also exchange rows and columns."""
    if orientation >= 5:
        ready = ready.transpose(1, 0, 2)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return ready[:: -1 if down else 1, :: -1 if across else 1] if across or down else ready


def _scaled(square: np.ndarray, size_px: int) -> np.ndarray:
    """H x H x 3 uint8 at `size_px`, by PyTorch's bicubic filter: the same picture in a fifth of the time of Pillow's."""
    import torch

    # A copy, for the picture cannot be written to. With the batch in front before the axes are turned PyTorch sees that colours come last,
    # as its filter wants them, and leaves them there.
    pixels = torch.from_numpy(np.array(square, order="C"))[None].permute(0, 3, 1, 2)
    found = torch.nn.functional.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True)
    return np.ascontiguousarray(found[0].permute(1, 2, 0).numpy())
