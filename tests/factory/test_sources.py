"""What the names in `factory.plan.paths` stand for, and pictures read where they lie: patterns, folders of shards, stores, zipped shards."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from cluster.errors import EdgeFusionError, RecipeError, StageError
from cluster.stage import Stage, Unit, apply, open_stage
from factory.ingest import fetch, planned_rows
from factory.picture_plan import GROUP_ROWS, plan_pictures, write_rows
from factory.plan import PLAN_SCHEMA, table_bytes
from factory.recipe import PicturePlan
from factory.seen import Seen
from factory.sources import _cells, _unzipped, source_files


def drawing(seed: int) -> bytes:
    sink = io.BytesIO()
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).save(sink, format="PNG")
    return sink.getvalue()


def shard(*seeds: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for seed in seeds:
            facts = json.dumps({"site": f"s{seed % 2}", "size": seed, "list": [1], "no": None}).encode()
            for kind, data in (("png", drawing(seed)), ("txt", f"text {seed}".encode()), ("json", facts)):
                entry = tarfile.TarInfo(f"{seed}.{kind}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def rows_of(*names: object, **keys) -> list[dict]:
    return list(planned_rows(PicturePlan(paths=[str(name) for name in names], **keys)))


def texts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for i in range(3):
        (folder / f"00{i}.tar").write_bytes(shard(2 * i, 2 * i + 1))
    (folder / "more" / "9.tar.gz").write_bytes(gzip.compress(shard(8, 9)))
    (folder / "stats.json").write_text("{}")
    return folder


def test_braces_patterns_and_a_folder_of_shards(shards: Path) -> None:
    six = [f"text {i}" for i in range(6)]
    assert texts(rows_of(shards / "{000..002}.tar")) == six
    assert texts(rows_of(shards / "*.tar")) == six
    assert texts(rows_of(shards / "{000,002}.tar")) == [six[i] for i in (0, 1, 4, 5)]
    everything = rows_of(shards)
    assert texts(everything) == [*six, "text 8", "text 9"]
    for row, seed in zip(everything, (0, 1, 2, 3, 4, 5, 8, 9), strict=True):
        assert fetch(row["source"], row["picture_sha256"]) == drawing(seed)
    (shards / "{odd}.tar").write_bytes(shard(7))
    assert texts(rows_of(shards / "{odd}.tar")) == ["text 7"], "a file of that very name goes first"


def test_a_zipped_shard_is_read_in_any_order_and_a_damaged_one_is_named(shards: Path) -> None:
    zipped = shards / "more" / "9.tar.gz"
    rows = rows_of(zipped)
    for row, seed in [(rows[1], 9), (rows[0], 8), (rows[1], 9)]:
        assert fetch(row["source"], row["picture_sha256"]) == drawing(seed)
    whole = zipped.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes(40) + whole[240:], b"no gzip"):
        (shards / "bad.tgz").write_bytes(damaged)
        with pytest.raises(StageError, match="cannot be read to its end"):
            rows_of(shards / "bad.tgz")


def test_shards_and_tables_in_a_store() -> None:
    store = fsspec.filesystem("memory")
    for i in range(2):
        store.pipe_file(f"/bucket/00{i}.tar", shard(i))
    sink = io.BytesIO()
    pq.write_table(pa.table({"picture": [drawing(5)], "text": ["five"]}), sink)
    store.pipe_file("/bucket/a.parquet", sink.getvalue())
    try:
        rows = rows_of("memory://bucket/{000..001}.tar", "memory://bucket/*.parquet")
        assert texts(rows) == ["text 0", "text 1", "five"]
        assert texts(rows_of("memory://bucket/*.tar")) == ["text 0", "text 1"]
        for row, seed in zip(rows, (0, 1, 5), strict=True):
            assert json.loads(row["source"])["file"].startswith("memory://")
            assert fetch(row["source"], row["picture_sha256"], Path("/anywhere")) == drawing(seed)
        with pytest.raises(EdgeFusionError, match="is missing"):
            rows_of("memory://bucket/none.tar")
        with pytest.raises(RecipeError, match="there is no source"):
            source_files("memory://bucket/*.zip")
    finally:
        store.rm("/bucket", recursive=True)


class EndpointConnectionError(Exception):
    """As botocore's, which is no OSError."""


class _Shaky(MemoryFileSystem):
    """A store in memory that fails at the next calls of a method, or reads of an opened file."""

    protocol = "shakysource"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail: ClassVar[Counter[str]] = Counter()

    def maybe(self, name: str) -> None:
        if self.fail[name]:
            self.fail[name] -= 1
            raise EndpointConnectionError(f"{name} was cut")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shakysource://", "memory://"))

    def glob(self, *args: Any, **kwargs: Any) -> Any:
        self.maybe("glob")
        return super().glob(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        self.maybe("cat_file")
        return super().cat_file(*args, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.maybe("open")
        file: Any = super().open(path, mode, **kwargs)
        return _ShakyFile(file.getvalue(), self) if mode == "rb" else file


class _ShakyFile(io.BytesIO):
    def __init__(self, data: bytes, store: _Shaky) -> None:
        super().__init__(data)
        self._store = store

    def read(self, size: int | None = -1) -> bytes:
        if self._store.fail["read"]:
            super().read(7)
        self._store.maybe("read")
        return super().read(size)


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Shaky]:
    """A bucket with a shard of texts 0 and 1, a zipped one of 2 and 3, and a table of 40 rows from 10 on."""
    fsspec.register_implementation("shakysource", _Shaky, clobber=True)
    monkeypatch.setattr("cluster.retry.FIRST_WAIT_S", 0.0)
    store = fsspec.filesystem("shakysource")
    store.pipe_file("/bucket/a.tar", shard(0, 1))
    store.pipe_file("/bucket/b.tar.gz", gzip.compress(shard(2, 3)))
    sink, seeds = io.BytesIO(), range(10, 50)
    pq.write_table(pa.table({"picture": [drawing(i) for i in seeds], "text": [f"text {i}" for i in seeds]}), sink)
    store.pipe_file("/bucket/c.parquet", sink.getvalue())
    yield store
    _Shaky.fail.clear()
    store.rm("/bucket", recursive=True)
    for cached in (_unzipped, _cells):
        cached.cache_clear()


SHAKY = [f"shakysource://bucket/{name}" for name in ("*.tar", "b.tar.gz", "c.parquet")]


def test_a_store_that_fails_for_a_moment_is_asked_again_and_no_row_dies(shaky: _Shaky) -> None:
    calm = rows_of(*SHAKY)
    assert texts(calm) == [f"text {i}" for i in (0, 1, 2, 3, *range(10, 50))]
    shaky.fail.update(glob=2, open=2, read=2)
    assert rows_of(*SHAKY) == calm and not +shaky.fail
    for row in calm:
        shaky.fail.update(cat_file=1, open=1, read=1)
        assert fetch(row["source"], row["picture_sha256"]) == drawing(int(row["prompt"].split()[1]))
        shaky.fail.clear()


@pytest.mark.parametrize("seed", [1, 2, 30])
def test_a_store_that_is_away_stops_the_stage_and_kills_no_row(shaky: _Shaky, seed: int) -> None:
    row = next(row for row in rows_of(*SHAKY) if row["prompt"] == f"text {seed}")
    stage = Stage("crop", lambda: lambda rows: [{**r, "got": fetch(r["source"], r["picture_sha256"])} for r in rows])

    def run() -> list[dict]:
        return apply(stage, open_stage(stage), Unit("u", [row])).rows

    assert run()[0]["got"] == drawing(seed)
    _unzipped.cache_clear()
    _cells.cache_clear()
    _unzipped(SHAKY[1])
    _cells(SHAKY[2], 0, "picture")  # opened, and cut off then
    shaky.fail.update(dict.fromkeys(("cat_file", "open", "read"), 100))
    with pytest.raises(EdgeFusionError, match=r"shakysource:///?bucket/.*cannot be read \(\w+ was cut\)"):
        run()
    shaky.fail.clear()
    assert run()[0]["got"] == drawing(seed), "what was opened then is not trusted"


def test_a_store_that_is_away_while_it_is_planned_is_told_in_plain_words(shaky: _Shaky) -> None:
    for name, call in (
        ("*.tar", "glob"),
        ("a.tar", "open"),
        ("a.tar", "read"),
        ("b.tar.gz", "read"),
        ("c.parquet", "read"),
    ):
        shaky.fail.update({call: 100})
        with pytest.raises(EdgeFusionError, match=rf"bucket/.*{call} was cut"):
            rows_of(f"shakysource://bucket/{name}")
        shaky.fail.clear()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: a shard, a table, a picture with its text, all of them links to files named by digests."""
    repository = tmp_path / "hub" / "datasets--someone--foxes"
    snapshot = repository / "snapshots" / "0123abc"
    sink = io.BytesIO()
    pq.write_table(pa.table({"picture": [drawing(5)], "text": ["text 5"]}), sink)
    files = {"00000.tar": shard(1, 2), "a.parquet": sink.getvalue()}
    files |= {"deep/3.png": drawing(3), "deep/3.txt": b"text 3"}
    (repository / "blobs").mkdir(parents=True)
    for name, data in files.items():
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/"))) / "blobs" / blob.name)
    return snapshot


def test_links_to_files_keep_their_names(cache: Path, tmp_path: Path) -> None:
    found = rows_of(cache / "{00000.tar,a.parquet}")
    assert texts(found) == ["text 1", "text 2", "text 5"]
    assert [Path(json.loads(row["source"])["file"]).name for row in found] == ["00000.tar"] * 2 + ["a.parquet"]
    for row, seed in zip(found, (1, 2, 5), strict=True):
        assert fetch(row["source"], row["picture_sha256"]) == drawing(seed)
    assert texts(rows_of(cache / "*.tar")) == ["text 1", "text 2"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "link").symlink_to(cache)
    assert source_files(str(tmp_path / "x" / ".." / "x" / "link")) == [str(cache)], "a folder is where it really is"
    assert source_files(str(tmp_path / "x" / "link" / "00000.tar")) == [str(cache / "00000.tar")]


@pytest.mark.parametrize("above", range(4))
def test_a_snapshot_of_a_hub_s_cache_is_read(cache: Path, above: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the repository, or the whole cache, is given."""
    found = rows_of([cache, *cache.parents][above])
    assert texts(found) == ["text 1", "text 2", "text 3"] and not caplog.records
    for row, seed in zip(found, (1, 2, 3), strict=True):
        assert fetch(row["source"], row["picture_sha256"]) == drawing(seed)


def test_links_out_of_a_folder_are_counted_with_a_remedy(
    shards: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Into another repository, into one's own beside the blobs, a whole folder, and the text beside a picture; a ring of links is none."""
    other = shards.parent / "hub" / "datasets--someone--owls" / "snapshots" / "77"
    other.mkdir(parents=True)
    (other / "1.tar").symlink_to((cache / "00000.tar").resolve())
    (other / "2.tar").symlink_to(shards / "000.tar")
    (other.parent / "beside.tar").write_bytes(shard(6))
    (other / "3.tar").symlink_to(other.parent / "beside.tar")
    (other / "folder").symlink_to(shards)
    (other / "4.png").write_bytes(drawing(4))
    (other / "4.txt").symlink_to(shards / "stats.json")
    (other / "5.tar").symlink_to("5.tar")
    (other / "notes.md").symlink_to(shards / "stats.json")
    found = rows_of(other)
    assert [json.loads(row["source"])["name"] for row in found] == ["4.png"] and texts(found) == [""]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(other) in record.message
    assert "5 links that lead out of the folder left alone, 1.tar first; name the files themselves" in record.message


def test_names_that_stand_for_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "000.tar").write_bytes(shard(1))
    for name, what in [
        ("*.png", "there is no source"),
        ("{000..002}.tar", "001.tar"),
        ("{000..002.tar", "do not close"),
        ("{0..99999999}.tar", "over a million"),
    ]:
        with pytest.raises(RecipeError, match=what):
            source_files(str(tmp_path / name))


def test_keys_and_columns_become_attributes(shards: Path, tmp_path: Path) -> None:
    rows = rows_of(shards / "000.tar", attribute_columns=["site", "size", "list", "no", "nowhere"])
    assert [json.loads(row["attributes"]) for row in rows] == [{"site": "s0", "size": "0"}, {"site": "s1", "size": "1"}]
    assert [row["id"] for row in rows] == [row["id"] for row in rows_of(shards / "000.tar")]
    assert rows_of(shards / "000.tar")[0]["attributes"] == "{}"
    table = pa.table(
        {"picture": [drawing(1)] * 2, "text": ["a", "b"], "tone": ["x" * 300, None], "good": [True, False]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet", attribute_columns=["tone", "good"])
    assert [json.loads(row["attributes"]) for row in rows] == [{"tone": "x" * 200, "good": "true"}, {"good": "false"}]
    with pytest.raises(RecipeError, match="has no column mood"):
        rows_of(tmp_path / "a.parquet", attribute_columns=["mood"])


def planned(number: int) -> dict:
    key = f"{number:064x}"
    return {
        "id": key,
        "prompt": f"p{number}",
        "group": "pictures",
        "attributes": "{}",
        "seed": 0,
        "outcome": "pending",
    } | {
        "reason": "",
        "source": json.dumps({"file": "x", "at": number}),
        "picture_sha256": key,
    }


def test_a_plan_is_written_as_it_comes_and_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [planned(i) for i in range(9001)]
    write_rows(tmp_path / "a", iter(some))
    assert (tmp_path / "a").read_bytes() == table_bytes(pa.Table.from_pylist(some, schema=PLAN_SCHEMA))
    assert GROUP_ROWS >= 1 << 16
    monkeypatch.setattr("factory.picture_plan.GROUP_ROWS", 4096)
    told: list[int] = []
    write_rows(tmp_path / "b", iter(some), told.append)
    assert pq.read_table(tmp_path / "b").to_pylist() == some and sum(told) == 9001
    assert pq.ParquetFile(tmp_path / "b").num_row_groups == 3


def test_no_plan_is_left_of_sources_without_a_picture(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(StageError, match="the sources hold no picture"):
        plan_pictures(PicturePlan(paths=[str(tmp_path / "in")]), 8, tmp_path / "out" / "plan.parquet")
    assert not list((tmp_path / "out").glob("*"))


def test_what_was_seen_is_known_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.seen._FRESH", 50)
    rng = np.random.default_rng(0)
    keys = [rng.bytes(15) + bytes([i % 3 and 7]) + b"rest" for i in range(1000)]
    seen = Seen()
    for key in keys:
        assert seen.add(key) and not seen.add(key)
    assert not any(seen.add(key) for key in keys) and len(seen) == 1000
    assert len(seen._sorted) < 8
