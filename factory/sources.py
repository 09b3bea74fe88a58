"""Where pictures that are taken in lie: names with braces and patterns become files, here or in an object store, read in any place.

A file is known by its absolute path or its URL. A .tar.gz has no places to jump to: it is read forwards, and once more from its start for
what lies behind, so whoever reads it in order reads it once.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq
from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportMissingTypeStubs, reportAttributeAccessIssue]

from cluster.cache import is_url
from cluster.errors import RecipeError
from cluster.remote import open_steadily, open_store, plain_words
from cluster.retry import retried
from factory.models import ZOO

SHARDS = (".tar", ".tar.gz", ".tgz")
"""How names of WebDataset shards end."""
_ZIPPED = (".tar.gz", ".tgz")
_MOST_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}")
_CELLS = 16
"""Rows of a Parquet file that are in memory at once."""
_AHEAD_BYTES = 8 << 20
"""Of a remote file, read in one request."""


def source_files(name: str) -> list[str]:
    """The files and folders that a name of the recipe stands for, in order: `zoo:NAME`, a path or URL, `{000..099}`, `{a,b}`, `*`, `?`, `[a-c]`.

    Raises RecipeError if there is nothing; whether a URL without a pattern is there shows when it is read.
    """
    if name.startswith("zoo:"):
        found = [str(ZOO / name.removeprefix("zoo:"))]
    elif not is_url(name) and Path(_plain(name)).exists():
        found = [_plain(name)]  # whatever odd letters its name has
    else:
        # braceexpand writes a range out before it gives its first name.
        lengths = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(name)]
        try:
            names = (
                list(itertools.islice(braceexpand(name), _MOST_NAMES + 1)) if math.prod(lengths) <= _MOST_NAMES else []
            )
        except UnbalancedBracesError:
            raise RecipeError(
                f"the braces of {name} do not close", where="factory.plan.paths", remedy="Write {000..099} or {a,b}"
            ) from None
        if not 0 < len(names) <= _MOST_NAMES:
            raise RecipeError(
                f"{name} stands for over a million files", where="factory.plan.paths", remedy="Use a pattern with *"
            )
        found = [file for one in names for file in _matching(one)]
    lacking = [one for one in found if not is_url(one) and not Path(one).exists()]
    if lacking or not found:
        raise RecipeError(
            f"there is no source {lacking[0] if lacking else name}",
            where="factory.plan.paths",
            remedy="Give a folder, .tar shards (shards/{000..099}.tar, s3://bucket/*.tar), a .parquet file or zoo:wild.parquet",
        )
    return [one if is_url(one) else str(_place(Path(one))) for one in found]


def _place(path: Path) -> Path:
    """Absolute. A file that is a link keeps its name, for the name says what it is: what it leads to may have none (the cache of a hub)."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def _matching(name: str) -> list[str]:
    if not glob.has_magic(name):
        return [name if is_url(name) else _plain(name)]
    if not is_url(name):
        return sorted(glob.glob(_plain(name), recursive=True))
    files, pattern = open_store(name)
    with plain_words(name, "listed"):
        found: list[str] = retried(lambda: files.glob(pattern), name)
    return sorted(files.unstrip_protocol(path) for path in found)


def _plain(name: str) -> str:
    return name.removeprefix("file://")


def is_shard(file: str) -> bool:
    """Whether it is a WebDataset shard, by its name."""
    return file.lower().endswith(SHARDS)


def open_source(file: str) -> BinaryIO:
    """A file to read, which can seek; a .tar.gz as what is in it. Raises EdgeFusionError of a store, also while it is read; OSError here."""
    if is_url(file):
        store, path = open_store(file)
        raw = open_steadily(store, path, file, block_size=_AHEAD_BYTES, cache_type="readahead")
    else:
        raw = Path(file).open("rb")  # noqa: SIM115 (whoever asked closes it)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if file.lower().endswith(_ZIPPED) else raw


def read_range(file: str, at: int, size: int) -> bytes:
    """Bytes of a file, of a .tar.gz those of what is in it; fewer at its end."""
    if file.lower().endswith(_ZIPPED):
        try:
            unzipped = _unzipped(file)
            unzipped.seek(at)
            return unzipped.read(size)
        except Exception:
            _unzipped.cache_clear()  # it may stand anywhere
            raise
    if is_url(file):
        store, path = open_store(file)
        with plain_words(file):
            return bytes(retried(lambda: store.cat_file(path, start=at, end=at + size), file))
    with Path(file).open("rb") as local:
        local.seek(at)
        return local.read(size)


@lru_cache(maxsize=2)
def _unzipped(file: str) -> BinaryIO:
    """Left open: the next member is asked for next."""
    return open_source(file)


def open_table(file: str) -> pq.ParquetFile:
    """A Parquet file here or in a store."""
    return pq.ParquetFile(open_source(file) if is_url(file) else file)


def read_cell(file: str, group: int, row: int, column: str) -> Any:
    """A cell of a Parquet file; raises IndexError beyond the end. Cheap for whoever goes on with the rows that follow."""
    try:
        return _cells(file, group, column).get(row)
    except Exception:
        _cells.cache_clear()  # where a read failed, nothing would seem to follow
        raise


class _Cells:
    """A column of a row group, read forwards in small batches: one large value in a million rows must not be in memory a million times."""

    def __init__(self, file: pq.ParquetFile, group: int, column: str) -> None:
        self._file, self._group, self._column = file, group, column
        self._begin()

    def get(self, row: int) -> Any:
        if row < self._start:
            self._begin()
        while row >= self._start + len(self._batch):
            following = next(self._left, None)
            if following is None:
                raise IndexError(f"there is no row {row}")
            self._start, self._batch = self._start + len(self._batch), following
        return self._batch[row - self._start].as_py()

    def _begin(self) -> None:
        self._start = 0
        self._batch: Any = ()
        batches = self._file.iter_batches(_CELLS, row_groups=[self._group], columns=[self._column])
        self._left = (batch.column(0) for batch in batches)


@lru_cache(maxsize=2)
def _cells(file: str, group: int, column: str) -> _Cells:
    return _Cells(open_table(file), group, column)


def walk(folder: Path) -> Iterator[Path]:
    """Files of a folder at any depth, in the order of their paths, one folder's names in memory. Folders that are links come as they are:
    nobody goes into them."""
    for name in sorted(entry.name for entry in folder.iterdir()):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)
        else:
            yield path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path that `walk` gave of a resolved folder is a link that leads out of it. The cache of a hub is made of links, from
    `snapshots/REVISION/NAME` to `blobs/DIGEST` of the same repository: these count as its own files."""
    if not path.is_symlink():
        return False
    target = Path(os.path.realpath(path))  # unlike Path.resolve it also bears links in a ring
    if target.is_relative_to(folder):
        return False
    repositories = (above.parent.parent for above in path.parents if above.parent.name == "snapshots")
    return not any(target.is_relative_to(repository / "blobs") for repository in repositories)
