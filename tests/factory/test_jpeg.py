"""The quick reader of JPEG changes nothing but the time: whole or damaged, the pixels or the refusal are those of Pillow."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

import factory.jpeg
from factory.stages import decode_picture, open_crops

pytest.importorskip("simplejpeg")


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format="JPEG", **options)
    return sink.getvalue()


def kinds() -> dict[str, bytes]:
    image = photo(1, (333, 217))
    turned = Image.Exif()
    turned[274] = 6
    return {
        "plain": encoded(image),
        "4:4:4": encoded(image, subsampling=0),
        "4:2:2": encoded(image, subsampling=1, quality=30),
        "progressive": encoded(image, progressive=True),
        "turned by EXIF": encoded(image, exif=turned),
        "RGB kept": encoded(image, keep_rgb=True),
        "grey": encoded(image.convert("L")),
        "CMYK": encoded(image.convert("CMYK")),
        "one pixel": encoded(photo(2, (1, 1))),
        "thin": encoded(photo(3, (900, 3))),
        "large": encoded(photo(4, (1601, 1203))),
    }


def outcome(data: bytes, size_px: int | None) -> object:
    """The pixels of the whole picture, or of its crops, as bytes; or the refusal."""
    try:
        found = [decode_picture(data)] if size_px is None else open_crops(data, size_px, ends=True)[0]
    except ValueError as error:
        return str(error)
    return [(one.shape, one.tobytes()) for one in found]


def both(data: bytes, monkeypatch: pytest.MonkeyPatch, size_px: int | None) -> tuple[object, object]:
    quick = outcome(data, size_px)
    with monkeypatch.context() as without:
        without.setattr(factory.jpeg, "_decoder", lambda: None)
        return quick, outcome(data, size_px)


def test_all_kinds_of_jpeg_at_all_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in kinds().items():
        for size_px in (None, 16, 50, 64, 100, 217):
            quick, slow = both(data, monkeypatch, size_px)
            assert quick == slow, (name, size_px)
    with Image.open(io.BytesIO(kinds()["large"])) as image:  # it was the quick one that read it
        assert factory.jpeg.read_jpeg(image, kinds()["large"], (400, 300)) is not None


def test_what_is_damaged_ends_as_it_does_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, read = random.Random(0), 0
    for number in range(300):
        data = bytearray(
            rng.choice([d for k, d in kinds().items() if k != "large"]) if number % 60 else kinds()["large"]
        )
        if number % 3 == 0:
            data = data[: rng.randrange(2, len(data))]
        elif number % 3 == 1:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(2, len(data))] ^= 1 << rng.randrange(8)
        else:
            place, more = rng.randrange(len(data)), rng.randbytes(rng.randint(1, 40))
            data[place:place] = more
        quick, slow = both(bytes(data), monkeypatch, rng.choice([None, 32]))
        assert quick == slow, number
        read += isinstance(quick, list)
    assert 10 < read < 290


def test_a_second_header_does_not_get_round_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose later header says another size than the first is for Pillow."""
    data = kinds()["plain"]
    place = data.index(b"\xff\xc0")
    length = int.from_bytes(data[place + 2 : place + 4], "big") + 2
    header = bytearray(data[place : place + length])
    header[5:9] = b"\xff\xff\xff\xff"
    twice = data[:place] + bytes(header) + data[place:]
    quick, slow = both(twice, monkeypatch, None)
    assert quick == slow
