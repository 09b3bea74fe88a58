"""A picture file is opened as a person sees it: turned, on white, in 8 bits, in sRGB. Each flaw with a real file made by Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

import factory.jpeg
import factory.pixels
from factory.curate.pictures import _shrink
from factory.pixels import decode_picture, open_crops
from factory.recipe import CropRecipe, FactoryRecipe, MakeRecipe


def photo(size: tuple[int, int] = (90, 60), seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format=kind, **options)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("quick", [True, False])
def test_turned_as_exif_says(kind: str, orientation: int, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not quick:
        monkeypatch.setattr(factory.jpeg, "_decoder", lambda: None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        right = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode_picture(data), right)
    crops, size = open_crops(data, 60, ends=True)
    assert size == right.shape[:2] == ((90, 60) if orientation >= 5 else (60, 90))
    start, end = (right[:60], right[30:]) if orientation >= 5 else (right[:, :60], right[:, 30:])
    assert np.array_equal(crops[1], start) and np.array_equal(crops[2], end)


def test_a_phone_s_upright_photo_is_upright_at_a_fraction_too() -> None:
    """Drafted JPEG, turned: the same crop as of the file with its pixels turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo((1200, 900))
    lying, upright = encoded(image, "JPEG", exif=exif, quality=95), encoded(image.rotate(-90, expand=True), "PNG")
    (crop, *_), size = open_crops(lying, 64, ends=True)
    (right, *_), same = open_crops(upright, 64, ends=True)
    assert size == same == (1200, 900)
    assert np.abs(crop.astype(int) - right).mean() < 3


def test_damaged_exif_does_no_harm() -> None:
    whole = encoded(photo(), "JPEG")
    for exif in (
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
    ):
        assert np.array_equal(decode_picture(encoded(photo(), "JPEG", exif=exif)), decode_picture(whole))


def test_16_bits_of_grey_keep_their_shades() -> None:
    ramp = np.linspace(0, 65535, 64 * 40).reshape(40, 64).round().astype(np.uint16)
    found = decode_picture(encoded(Image.fromarray(ramp)))
    assert np.array_equal(found, np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, axis=2))
    assert np.array_equal(open_crops(encoded(Image.fromarray(ramp[:, :40])), 40, ends=False)[0][0], found[:, :40])
    clear = decode_picture(encoded(Image.fromarray(np.full((4, 4), 777, np.uint16)), transparency=777))
    assert clear.min() == 255


def test_what_is_transparent_is_white() -> None:
    disc = np.zeros((20, 30, 4), np.uint8)
    disc[5:15, 5:15] = (200, 30, 60, 255)
    disc[5:15, 15:25] = (200, 30, 60, 128)
    image = Image.fromarray(disc)
    right = np.full((20, 30, 3), 255, np.uint8)
    right[5:15, 5:15] = (200, 30, 60)
    right[5:15, 15:25] = (227, 142, 157)
    for data in (encoded(image), encoded(image, "WEBP", lossless=True)):
        assert np.abs(decode_picture(data).astype(int) - right).max() <= 1
    grey = decode_picture(encoded(image.convert("LA")))
    assert grey[0, 0].tolist() == [255] * 3 and 70 < grey[10, 10, 0] < 100
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 200, 30])
    palette.putpixel((0, 0), 0)
    found = decode_picture(encoded(palette, transparency=0))
    assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [10, 200, 30]
    keyed = decode_picture(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)))
    assert keyed.min() == 255


def test_opaque_alpha_and_strips_change_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo()
    monkeypatch.setattr(factory.pixels, "_STRIP_PIXELS", 300)
    for one in (image, image.convert("RGBA"), image.convert("L"), image.convert("P"), image.convert("1")):
        assert np.array_equal(decode_picture(encoded(one)), np.asarray(one.convert("RGB")))


def swapped_profile() -> bytes:
    """A profile whose red is sRGB's green: what it does is seen at once. sRGB's own with two of its tags exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colours_of_another_profile_come_to_srgb(kind: str) -> None:
    red = Image.new("RGB", (32, 32), (250, 10, 10))
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode_picture(encoded(red, kind, icc_profile=swapped_profile(), **options))[16, 16].astype(int)
    assert found[1] > 240 and found[0] < 30
    plain = encoded(photo(), kind, **options)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, b"no profile at all", swapped_profile()[:200]):
        assert np.array_equal(
            decode_picture(encoded(photo(), kind, icc_profile=profile, **options)), decode_picture(plain)
        ), "sRGB and damaged profiles change nothing"


def test_printing_colours_and_palettes() -> None:
    image = photo()
    cmyk = decode_picture(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.asarray(image)).mean() < 4
    few = image.quantize(32)
    assert np.array_equal(decode_picture(encoded(few)), np.asarray(few.convert("RGB")))


def test_a_camera_s_photo_of_50_megapixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG is opened at a fraction, so this is cheap; what is over the recipe's limit dies with the key's name."""
    data = encoded(Image.new("RGB", (8688, 5792), (10, 120, 200)), "JPEG")
    (crop,), size = open_crops(data, 64, ends=False)
    assert size == (5792, 8688) and np.abs(crop.reshape(-1, 3).astype(int) - (10, 120, 200)).max() < 4
    with pytest.raises(
        ValueError, match=r"8688 x 5792 is over the limit of 1000000 pixels \(factory\.make\.crop\.max_pixels\)"
    ):
        open_crops(data, 64, ends=False, max_pixels=1_000_000)
    assert CropRecipe(max_pixels=150_000_000).max_pixels == 150_000_000
    with pytest.raises(ValueError, match="max_pixels"):
        CropRecipe(max_pixels=1 << 30)


def test_the_recipe_s_limit_reaches_the_crop(tiny_models: Path, tmp_path: Path) -> None:
    from factory.ingest import planned_rows
    from factory.recipe import PicturePlan
    from factory.stages import make_stages

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(photo()))
    scorer = {"kind": "open_clip", "model": str(tiny_models / "clip")}
    rows = [{**row, "unit": "unit-00000"} for row in planned_rows(PicturePlan(paths=[str(tmp_path / "in")]))]
    for most, right in ((90 * 60, True), (90 * 60 - 1, False)):
        make = MakeRecipe.model_validate({"scorer": scorer, "crop": {"size_px": 64, "max_pixels": most}})
        crop = make_stages(make, tmp_path)[0].open()
        if right:
            assert crop(rows)[0]["width_px"] == 90
        else:
            with pytest.raises(ValueError, match="max_pixels"):
                crop(rows)
    assert "make" in FactoryRecipe.model_fields


def test_thumbnails_are_on_white_too() -> None:
    small = decode_picture(_shrink(encoded(Image.new("RGBA", (400, 400), (0, 0, 0, 0)))))
    assert small.shape == (320, 320, 3) and small.min() > 250
    with pytest.raises(ValueError, match="not a picture"):
        _shrink(b"\x89PNG" + bytes(50))
