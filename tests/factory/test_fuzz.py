"""Input that is made to fill the memory: each ends as a dead letter or a plain error within a real limit on the process's memory."""

from __future__ import annotations

import io
import json
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import EdgeFusionError
from factory.download import _listed
from factory.ingest import fetch, planned_rows
from factory.pack import read_shard
from factory.prompts import read_prompts
from factory.recipe import DownloadRecipe, PicturePlan, PromptFilePlan
from factory.stages import decode_picture, open_crops

MORE = 600 << 20
"""Bytes of address space that may be taken beyond what the process has: each input here would want gigabytes."""


@contextmanager
def little_memory() -> Iterator[None]:
    open_crops(png(8, 8, bytes(8 * 25)), 8, ends=False)  # PyTorch and its filter are there before the limit is
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MORE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def png(width: int, height: int, rows: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: what its header says, and what its data are, need not fit."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(rows, 9)),
    ]
    parts.append((b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sink, format="JPEG")
    data = bytearray(sink.getvalue())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0\0\0\0"
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    sink = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sink, format="WEBP", lossless=True)
    body += sink.getvalue()[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


SQUEEZED = zlib.compress(bytes(1 << 30), 9)
BOMBS = {
    "PNG of 60,000 x 60,000": png(60_000, 60_000, bytes(1 << 20)),
    "PNG of 2^31 x 1": png(2**31 - 1, 1, b""),
    "PNG with less than it says": png(4000, 4000, b"\0"),
    "PNG with a gigabyte more than it says": png(8, 8, bytes(1 << 30)),
    "PNG with a gigabyte of text": png(8, 8, bytes(200), (b"zTXt", b"a\0\0" + SQUEEZED)),
    "PNG with a gigabyte of colour profile": png(8, 8, bytes(200), (b"iCCP", b"a\0\0" + SQUEEZED)),
    "JPEG of 65,500 x 65,500": jpeg(65_500, 65_500),
    "JPEG of 4,000 x 4,000 that ends at once": jpeg(4000, 4000),
    "WebP of 16,383 x 16,383": webp(16_383, 16_383),
    "WebP of 2^24 x 2^24": webp(1 << 24, 1 << 24),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    with little_memory():
        for read in (decode_picture, lambda data: open_crops(data, 64, ends=True)):
            try:
                read(BOMBS[name])
            except ValueError as error:
                assert not isinstance(error.__cause__, MemoryError)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


NAME = b"n" * (64 << 20)
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a name of 64 MiB": lambda: (
        header("x", len(NAME) + 1, tarfile.GNUTYPE_LONGNAME) + NAME + b"\0" * 512 + header("y", 0)
    ),
    "a name of 8 TiB": lambda: header("x", 8 << 40, tarfile.GNUTYPE_LONGNAME) + b"a" * 1024,
    "an extended header of 8 TiB": lambda: header("x", 8 << 40, tarfile.XHDTYPE) + b"30 path=a.png\n" * 100,
    "a picture of 8 TiB": lambda: header("a.png", 8 << 40) + b"a" * 1024,
    "a text of 8 TiB": lambda: header("a.txt", 8 << 40) + b"a" * 1024,
    "a file of holes": lambda: header("a.png", 8 << 40, tarfile.GNUTYPE_SPARSE) + b"a" * 1024,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_promise_too_much(name: str, tmp_path: Path) -> None:
    place = tmp_path / "w.tar"
    place.write_bytes(ARCHIVES[name]() + b"\0" * 1024)
    with little_memory():
        try:
            rows = list(planned_rows(PicturePlan(paths=[str(place)])))
        except EdgeFusionError as error:
            assert "cannot be read" in str(error)
        else:
            assert all(row["outcome"] == "dead" for row in rows)
        with pytest.raises(EdgeFusionError):
            list(read_shard(place))


def hole(path: Path, size: int) -> Path:
    """A file of so many zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_files_of_eight_gigabytes(tmp_path: Path) -> None:
    """A picture, what stands beside one, lists of prompts and of URLs."""
    folder = tmp_path / "in"
    folder.mkdir()
    hole(folder / "large.png", 8 << 30)
    for name in ("text", "facts"):
        (folder / f"{name}.png").write_bytes(png(8, 8, bytes(200)))
    hole(folder / "text.txt", 8 << 30)
    hole(folder / "facts.json", 8 << 30)
    with little_memory():
        rows = list(planned_rows(PicturePlan(paths=[str(folder)])))
        assert [row["outcome"] for row in rows] == ["pending", "dead", "pending"]
    lines = hole(tmp_path / "prompts.txt", 1 << 30)
    urls = PicturePlan(paths=["x"], download=DownloadRecipe())
    with little_memory():
        assert [len(prompt) for prompt, *_ in read_prompts(PromptFilePlan(paths=[str(lines)]))] == [1 << 20]
        assert [len(url) for url, *_ in _listed(lines, urls)] == [1 << 20]
        for name in ("prompts.jsonl", "list.csv"):
            lines = lines.rename(tmp_path / name)
            with pytest.raises(EdgeFusionError):
                list(
                    read_prompts(PromptFilePlan(paths=[str(lines)])) if name.endswith("jsonl") else _listed(lines, urls)
                )


def test_one_large_value_in_very_many_rows(tmp_path: Path) -> None:
    """A Parquet file of one megabyte whose column of pictures is twelve gigabytes if it is laid out."""
    path, count = tmp_path / "w.parquet", 6000
    picture = np.random.default_rng(0).integers(0, 4, 2 << 20, dtype=np.uint8).tobytes()
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([picture]))
    pq.write_table(pa.table({"picture": column, "text": ["a"] * count}), path, store_schema=False)
    assert path.stat().st_size < 4 << 20
    with little_memory():
        rows = list(planned_rows(PicturePlan(paths=[str(path)], limit=200)))
        assert len(rows) == 200
        for row in (rows[150], rows[199], rows[3]):
            assert fetch(row["source"], row["picture_sha256"]) == picture
    beyond = json.dumps({**json.loads(rows[0]["source"]), "at": [0, count]})
    with pytest.raises(EdgeFusionError, match="gone or damaged"):
        fetch(beyond, "")


def test_texts_that_are_no_texts(tmp_path: Path) -> None:
    """A Parquet file may call bytes a text: the row is dead, its neighbours and other columns are kept."""
    bad = pa.StringArray.from_buffers(3, *pa.array([b"fine", b"caf\xe9", b"x"], pa.binary()).buffers()[1:])
    picture = png(8, 8, bytes(200))
    table = pa.table({"picture": [picture] * 3, "text": bad, "place": bad})
    pq.write_table(table, tmp_path / "w.parquet")
    rows = list(planned_rows(PicturePlan(paths=[str(tmp_path / "w.parquet")], metadata_columns=["place"])))
    assert [(row["prompt"], row["outcome"]) for row in rows] == [("fine", "pending"), ("", "dead"), ("x", "pending")]
    assert json.loads(rows[1]["source"])["metadata"] == {"place": "caf\ufffd"}
