"""The promises of make that need models: a picture depends on its row alone, and a bad row poisons nothing."""

import numpy as np
import pytest

from cluster.errors import LedgerConflict
from factory.ledger import commit_unit
from factory.models.image import Painter
from factory.recipe import DiffusersTeacher
from factory.stages import decode_picture, encode_picture


@pytest.fixture
def painter(tiny_models) -> Painter:
    return Painter(DiffusersTeacher(model=str(tiny_models / "teacher"), steps=2, size_px=32, batch_images=4))


def test_neighbours_and_batch_sizes_change_no_bit(painter: Painter) -> None:
    prompts, seeds = ["a fox", "a key", "an owl", "a pizza", "a rocket"], [1, 2, 3, 4, 5]
    together = painter.paint(prompts, seeds)
    alone = [painter.paint([p], [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(together[0], painter.paint(["a fox"], [9])[0])


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_formats_keep_every_bit(kind: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode_picture(encode_picture(picture, kind)), picture)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_what_is_no_picture_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a picture"):
        decode_picture(data)


def test_a_gigantic_picture_is_refused_before_it_is_decoded() -> None:
    import io
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(Exception, match=r"over the limit|not a picture|exceeds limit"):
        decode_picture(io.BytesIO(data).getvalue())


def test_a_zombie_may_commit_again_but_not_something_else(tmp_path) -> None:
    row = {"id": "1", "unit": "unit-00000", "prompt": "a fox", "outcome": "pending", "reason": "", "picture": b"p"}
    commit_unit(tmp_path, [row])
    commit_unit(tmp_path, [row])
    with pytest.raises(LedgerConflict, match="other contents"):
        commit_unit(tmp_path, [{**row, "prompt": "an owl"}])
