"""Real pictures in: folders, WebDataset shards and Parquet files become the same kind of plan as prompts do.

The plan holds where each picture lies and the SHA-256 of its bytes, never the bytes; nothing is unpacked to disk. The text that came with a
picture is kept as it is, wrong or empty. What cannot be read is planned as dead, so planned = kept + rejected + dead holds from here on.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError
from cluster.stage import DEAD, PENDING
from factory.models import ZOO
from factory.recipe import PicturePlan

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_PICTURE_BYTES = 64 << 20
"""A larger file is refused unread."""
MAX_TEXT_CHARACTERS = 2000
MAX_NAME_CHARACTERS = 4096
"""A member of a shard with a longer name is none."""
_CELLS = 16
"""Rows of a Parquet file that are in memory at once."""
MAX_BESIDE_BYTES = 64 << 10
"""Of a text or JSON beside a picture: a longer text is cut, a longer JSON left out."""


@dataclass(frozen=True)
class Found:
    """A picture of a source: where it lies, its bytes, the text beside it, and why it will not do (empty if it will)."""

    source: dict[str, Any]
    data: bytes
    text: str
    wrong: str = ""


def source_path(name: str) -> Path:
    """`zoo:NAME` or a path; raises RecipeError if there is nothing."""
    path = ZOO / name.removeprefix("zoo:") if name.startswith("zoo:") else Path(name)
    if not path.exists():
        raise RecipeError(
            f"there is no source {name}",
            where="factory.plan.paths",
            remedy="Give a folder, a .tar shard, a .parquet file or zoo:wild.parquet",
        )
    return path.resolve()


def planned_rows(recipe: PicturePlan) -> Iterator[dict[str, Any]]:
    """A plan row a picture, in the order of the sources; the same bytes from the same place come once."""
    seen: set[str] = set()
    for name in recipe.paths:
        for found in _read(source_path(name), recipe):
            sha = hashlib.sha256(found.data).hexdigest()
            key = hashlib.sha256(f"{Path(found.source['file']).name}/{found.source['at']}/{sha}/{found.text}".encode())
            if key.hexdigest() in seen:
                continue
            seen.add(key.hexdigest())
            yield _row(key.hexdigest(), found.text, found.source, sha, found.wrong)
            if recipe.limit and len(seen) >= recipe.limit:
                return


def downloaded_rows(parts: list[Path]) -> Iterator[dict[str, Any]]:
    """A plan row a URL and text of what factory/download.py fetched; the same answer of the same URL comes once."""
    seen: set[str] = set()
    for path in parts:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            for row, got in enumerate(file.read_row_group(group).to_pylist()):
                text, wrong = _text(got["text"].encode("utf-8", "surrogatepass"))
                data, wrong = got["picture"] or b"", got["wrong"] or wrong
                sha = hashlib.sha256(data).hexdigest()
                key = hashlib.sha256(json.dumps([got["url"], sha, text]).encode()).hexdigest()
                if key in seen:
                    continue
                seen.add(key)
                # Relative to the data set: the same URLs give the same plan in any folder.
                source = {
                    "file": f"{path.parent.name}/{path.name}",
                    "at": [group, row],
                    "column": "picture",
                    "url": got["url"],
                }
                yield _row(key, text, source, sha, wrong)


def _row(key: str, text: str, source: dict[str, Any], sha: str, wrong: str) -> dict[str, Any]:
    return {
        "id": key,
        "prompt": text,
        "group": "pictures",
        "attributes": "{}",
        "seed": 0,
        "outcome": DEAD if wrong else PENDING,
        "reason": f"plan: {wrong}" if wrong else "",
        "source": json.dumps(source, sort_keys=True),
        "picture_sha256": sha,
    }


def fetch(place: str, sha256: str, folder: Path = Path()) -> bytes:
    """The picture file that the plan of the data set in `folder` names. Raises StageError if the source changed since (all its rows would be wrong)."""
    source = json.loads(place)
    try:
        data = _fetch({**source, "file": str(folder / source["file"])})
    except (OSError, KeyError, pa.ArrowInvalid, IndexError) as error:
        raise StageError(
            f"a source is gone or damaged ({error})", where=source["file"], remedy="Put it back and run again"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StageError(
            "a source changed after it was planned", where=source["file"], remedy="Start in a new output folder"
        )
    return data


def _fetch(source: dict[str, Any]) -> bytes:
    if "column" in source:
        group, row = source["at"]
        return _cells(source["file"], group, source["column"]).get(row)
    with Path(source["file"]).open("rb") as file:
        file.seek(source["at"])
        return file.read(source["size"])


class _Cells:
    """A column of a row group, read forwards in small batches: one large value in a million rows must not be in memory a million times."""

    def __init__(self, file: pq.ParquetFile, group: int, column: str) -> None:
        self._file, self._group, self._column = file, group, column
        self._begin()

    def get(self, row: int) -> Any:
        """Raises IndexError beyond the end."""
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
    return _Cells(pq.ParquetFile(file), group, column)


def _read(path: Path, recipe: PicturePlan) -> Iterator[Found]:
    if path.is_dir():
        yield from _read_folder(path, recipe)
    elif path.suffix == ".tar":
        yield from _read_shard(path, recipe)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, recipe)
    else:
        raise RecipeError(
            "is neither a folder nor a .tar or .parquet file",
            where=str(path),
            remedy="Check factory.plan.paths; for a list of URLs give factory.plan.download, {} for its defaults",
        )


def _read_folder(folder: Path, recipe: PicturePlan) -> Iterator[Found]:
    """Picture files at any depth with NAME.txt and NAME.json beside them; links that lead out of the folder are left alone."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or not path.resolve().is_relative_to(folder):
            continue
        name = path.relative_to(folder).as_posix()
        try:
            size = path.stat().st_size
            words, facts = (_beside(path.with_suffix(kind), folder) for kind in (".txt", ".json"))
            data = path.read_bytes() if size <= MAX_PICTURE_BYTES else b""
        except OSError as error:
            source = {"file": str(path), "at": 0, "size": 0, **_origin(name, {})}
            yield Found(source, b"", "", f"the file or the text beside it cannot be read ({error.strerror})")
            continue
        text, wrong, more = _told(words, facts, recipe)
        source = {"file": str(path), "at": 0, "size": size, **_origin(name, more)}
        yield _judged(source, data, size, text, wrong)


def _beside(path: Path, folder: Path) -> bytes | None:
    if not path.is_file() or not path.resolve().is_relative_to(folder):
        return None
    with path.open("rb") as file:
        return file.read(MAX_BESIDE_BYTES + 1)


def _told(words: bytes | None, facts: bytes | None, recipe: PicturePlan) -> tuple[str, str, dict[str, Any]]:
    """(text, what is wrong with it, metadata) of what stands beside a picture. The .txt goes before the .json's own text.

    A .json that is no object, or over the limit, is left out: the picture is no worse for it.
    """
    found: Any = None
    if facts is not None and len(facts) <= MAX_BESIDE_BYTES:
        try:
            found = json.loads(facts, parse_constant=lambda name: None)  # NaN and its like are no JSON
        except (ValueError, RecursionError):
            found = None
    # What cannot be written as UTF-8 (half a surrogate pair) must not stop the packing later.
    more = (
        json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")) if isinstance(found, dict) else {}
    )
    if words is None:
        told = [more.get(key) for key in (recipe.text_column, "caption", "text")]
        words = next((text.encode("utf-8", "replace") for text in told if isinstance(text, str)), b"")
    return *_text(words), more


def _origin(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a source keeps of where its picture came from."""
    known = {"name": name.encode("utf-8", "replace").decode()}
    return {**known, "metadata": metadata} if metadata else known


def _read_shard(path: Path, recipe: PicturePlan) -> Iterator[Found]:
    """Members of one key stand together, as in any WebDataset; links and folders are no members."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, picture, text, facts = "", None, None, None
            for entry in archive:
                own, _, kind = entry.name.rpartition("/")[2].partition(".")
                own = f"{entry.name.rpartition('/')[0]}/{own}"
                if own != key:
                    if picture:
                        yield _member(path, archive, picture, _told(text, facts, recipe))
                    key, picture, text, facts = own, None, None, None
                if not entry.isfile() or len(entry.name) > MAX_NAME_CHARACTERS:
                    continue
                if f".{kind.lower()}" in SUFFIXES and picture is None:
                    picture = entry
                elif kind.lower() == "txt":
                    text = _content(archive, entry, MAX_BESIDE_BYTES + 1)
                elif kind.lower() == "json":
                    facts = _content(archive, entry, MAX_BESIDE_BYTES + 1)
            if picture:
                yield _member(path, archive, picture, _told(text, facts, recipe))
    # MemoryError: a header may say that terabytes of name follow.
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
        raise StageError(
            f"the shard cannot be read to its end ({error})", where=str(path), remedy="Copy it again or leave it out"
        ) from error


def _member(
    path: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo, told: tuple[str, str, dict[str, Any]]
) -> Found:
    text, wrong, more = told
    source = {"file": str(path), "at": entry.offset_data, "size": entry.size, **_origin(entry.name, more)}
    data = _content(archive, entry, entry.size) if entry.size <= MAX_PICTURE_BYTES else b""
    return _judged(source, data, entry.size, text, wrong)


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, most: int) -> bytes:
    content = archive.extractfile(entry)
    return content.read(most) if content else b""


def _read_parquet(path: Path, recipe: PicturePlan) -> Iterator[Found]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(
            f"cannot be read ({error})", where=str(path), remedy="Copy it again or leave it out"
        ) from error
    wanted = [recipe.picture_column, recipe.text_column, *recipe.metadata_columns]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise RecipeError(
            f"has no column {lacking[0]}; there are {names}",
            where=str(path),
            remedy="Set factory.plan.picture_column, text_column and metadata_columns",
        )
    columns = list(dict.fromkeys(wanted))
    try:
        for group in range(file.num_row_groups):
            first = 0
            for batch in file.iter_batches(_CELLS, row_groups=[group], columns=columns):
                for row, cells in enumerate(_cells_of(batch), first):
                    yield _cell(path, [group, row], cells, recipe)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise StageError(
            f"cannot be read to its end ({error})", where=str(path), remedy="Copy it again or leave it out"
        ) from error


def _cells_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows by column; texts as bytes, for a file may say that they are UTF-8 where they are not."""
    columns: list[list[Any]] = []
    for column in batch.columns:
        if isinstance(column, pa.DictionaryArray):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        columns.append(column.to_pylist())
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _cell(path: Path, at: list[int], cells: dict[str, Any], recipe: PicturePlan) -> Found:
    data, text = cells[recipe.picture_column], cells[recipe.text_column]
    source: dict[str, Any] = {"file": str(path), "at": at, "column": recipe.picture_column}
    if recipe.metadata_columns:
        source["metadata"] = _plain({name: cells[name] for name in recipe.metadata_columns})
    data = data if isinstance(data, bytes) else b""
    return _judged(source, data, len(data), *_text(text if isinstance(text, bytes) else b""))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Cells as JSON: what has no JSON of its own (dates, bytes) as text."""
    told = json.dumps(row, default=_as_text, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(told, parse_constant=lambda name: None)


def _as_text(cell: Any) -> str:
    return cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell)


def _text(data: bytes) -> tuple[str, str]:
    """(text, what is wrong with it): spaces and line ends become one space, other control characters vanish."""
    try:
        text = " ".join(data.decode("utf-8").split())
    except UnicodeDecodeError:
        return "", "the text is not UTF-8"
    text = "".join(c for c in text if c.isprintable())
    return text[:MAX_TEXT_CHARACTERS], ""


def _judged(source: dict[str, Any], data: bytes, size: int, text: str, wrong: str) -> Found:
    if size > MAX_PICTURE_BYTES:
        wrong = f"the file has {size} bytes, over the limit"
    elif not data:
        wrong = "the picture is empty"
    return Found(source, data, text, wrong)
