"""Real pictures in: folders, WebDataset shards and Parquet files become the same kind of plan as prompts do.

The plan holds where each picture lies and the SHA-256 of its bytes, never the bytes; nothing is unpacked to disk. The text that came with a
picture is kept as it is, wrong or empty. What cannot be read is planned as dead, so planned = kept + rejected + dead holds from here on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.cache import is_url
from cluster.errors import RecipeError, StageError
from cluster.stage import DEAD, PENDING
from factory.models.answers import writable
from factory.recipe import PicturePlan
from factory.seen import Seen
from factory.sources import (
    SHARDS,
    is_shard,
    leads_out,
    open_source,
    open_table,
    read_cell,
    read_range,
    source_files,
    walk,
)

_log = logging.getLogger("edgefusion")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_PICTURE_BYTES = 64 << 20
"""A larger file is refused unread."""
MAX_TEXT_CHARACTERS = 2000
MAX_NAME_CHARACTERS = 4096
"""A member of a shard with a longer name is none."""
MAX_ATTRIBUTE_CHARACTERS = 200
_CELLS = 16
"""Rows of a Parquet file that are in memory at once."""
_BESIDE = (".txt", ".json")
"""How the files end that hold a picture's text and what else is known of it."""
MAX_BESIDE_BYTES = 64 << 10
"""Of a text or JSON beside a picture: a longer text is cut, a longer JSON left out."""


@dataclass(frozen=True)
class Found:
    """A picture of a source: where it lies, its bytes, the text beside it, why it will not do (empty if it will), its attributes as JSON."""

    source: dict[str, Any]
    data: bytes
    text: str
    wrong: str = ""
    attributes: str = "{}"


def planned_rows(recipe: PicturePlan) -> Iterator[dict[str, Any]]:
    """A plan row a picture, in the order of the sources; the same bytes from the same place come once."""
    seen = Seen()
    for file in (file for name in recipe.paths for file in source_files(name)):
        for found in _read(file, recipe):
            sha = hashlib.sha256(found.data).hexdigest()
            key = hashlib.sha256(f"{Path(found.source['file']).name}/{found.source['at']}/{sha}/{found.text}".encode())
            if not seen.add(key.digest()):
                continue
            yield _row(key.hexdigest(), found.text, found.source, sha, found.wrong, found.attributes)
            if recipe.limit and len(seen) >= recipe.limit:
                return


def downloaded_rows(parts: list[Path]) -> Iterator[dict[str, Any]]:
    """A plan row a URL and text of what factory/download.py fetched; the same answer of the same URL comes once."""
    seen = Seen()
    for path in parts:
        for row in read_part(path):
            if seen.add(bytes.fromhex(row["id"])):
                yield row


def read_part(path: Path) -> Iterator[dict[str, Any]]:
    """The plan row of each URL of a part, doubles too."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        for row, got in enumerate(file.read_row_group(group).to_pylist()):
            text, wrong = _text(got["text"].encode("utf-8", "surrogatepass"))
            wrong = got["wrong"] or wrong
            key, sha = url_key(got["url"], got["picture"] or b"", got["text"])
            # Relative to the data set: the same URLs give the same plan in any folder.
            source = {
                "file": f"{path.parent.name}/{path.name}",
                "at": [group, row],
                "column": "picture",
                "url": got["url"],
            }
            if metadata := got.get("metadata"):
                source["metadata"] = json.loads(metadata)
            yield _row(key, text, source, sha, wrong, got.get("attributes") or "{}")


def url_key(url: str, answer: bytes, text: str) -> tuple[str, str]:
    """(id of the plan row, SHA-256 of the answer) of a URL, what it answered (nothing if it failed) and the text beside it in the list."""
    sha = hashlib.sha256(answer).hexdigest()
    words, _ = _text(text.encode("utf-8", "surrogatepass"))
    return hashlib.sha256(json.dumps([url, sha, words]).encode()).hexdigest(), sha


def _row(key: str, text: str, source: dict[str, Any], sha: str, wrong: str, attributes: str = "{}") -> dict[str, Any]:
    return {
        "id": key,
        "prompt": text,
        "group": "pictures",
        "attributes": attributes,
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
        file = source["file"] if is_url(source["file"]) else str(folder / source["file"])
        if "column" in source:
            group, row = source["at"]
            data = read_cell(file, group, row, source["column"])
        else:
            data = read_range(file, source["at"], source["size"])
    except (OSError, EOFError, zlib.error, KeyError, pa.ArrowInvalid, IndexError) as error:
        raise StageError(
            f"a source is gone or damaged ({error})", where=source["file"], remedy="Put it back and run again"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StageError(
            "a source changed after it was planned", where=source["file"], remedy="Start in a new output folder"
        )
    return data


def _read(file: str, recipe: PicturePlan) -> Iterator[Found]:
    path = Path(file)
    if not is_url(file) and path.is_dir():
        yield from _read_folder(path, recipe)
    elif is_shard(file):
        yield from _read_shard(file, recipe)
    elif file.endswith(".parquet"):
        yield from _read_parquet(file, recipe)
    else:
        raise RecipeError(
            f"is neither a folder nor a {', '.join(SHARDS)} or .parquet file",
            where=file,
            remedy="Check factory.plan.paths; for a list of URLs give factory.plan.download, {} for its defaults",
        )


def _read_folder(folder: Path, recipe: PicturePlan) -> Iterator[Found]:
    """Picture files at any depth with NAME.txt and NAME.json beside them, and shards; links that lead out of the folder are left alone."""
    for path in _inside(folder):
        shard = is_shard(path.name)
        if not (shard or path.suffix.lower() in SUFFIXES) or not path.is_file():
            continue
        if shard:
            yield from _read_shard(str(path), recipe)
            continue
        name = path.relative_to(folder).as_posix()
        try:
            size = path.stat().st_size
            words, facts = (_beside(path.with_suffix(kind), folder) for kind in _BESIDE)
            data = path.read_bytes() if size <= MAX_PICTURE_BYTES else b""
        except OSError as error:
            source = {"file": str(path), "at": 0, "size": 0, **_origin(name, {})}
            yield Found(source, b"", "", f"the file or the text beside it cannot be read ({error.strerror})")
            continue
        text, wrong, more = _told(words, facts, recipe)
        source = {"file": str(path), "at": 0, "size": size, **_origin(name, more)}
        yield _judged(source, data, size, text, wrong, attributes_of(more, recipe))


def _inside(folder: Path) -> Iterator[Path]:
    """What lies in the folder, as `walk` gives it. Links that lead out are left alone; how many of them might have been read is told at the end."""
    count, first = 0, folder
    for path in walk(folder):
        if not leads_out(path, folder):
            yield path
        elif path.is_dir() or is_shard(path.name) or path.suffix.lower() in {*SUFFIXES, *_BESIDE}:
            count, first = count + 1, first if count else path
    if count:
        _log.warning(
            "%s: %d link%s out of the folder left alone, %s first; name the files themselves in factory.plan.paths, or the folder where they are",
            folder,
            count,
            " that leads" if count == 1 else "s that lead",
            first.relative_to(folder),
        )


def _beside(path: Path, folder: Path) -> bytes | None:
    if not path.is_file() or leads_out(path, folder):
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
    known = {"name": writable(name)}
    return {**known, "metadata": metadata} if metadata else known


def _read_shard(file: str, recipe: PicturePlan) -> Iterator[Found]:
    """Members of one key stand together, as in any WebDataset; links and folders are no members.

    Each is read when it is passed: of a zipped or a remote shard going back would mean to begin anew.
    """
    try:
        with open_source(file) as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            key, picture, text, facts = "", None, None, None
            for entry in archive:
                own, _, kind = entry.name.rpartition("/")[2].partition(".")
                own = f"{entry.name.rpartition('/')[0]}/{own}"
                if own != key:
                    if picture:
                        yield _member(file, *picture, _told(text, facts, recipe), recipe)
                    key, picture, text, facts = own, None, None, None
                if not entry.isfile() or len(entry.name) > MAX_NAME_CHARACTERS:
                    continue
                if f".{kind.lower()}" in SUFFIXES and picture is None:
                    fits = entry.size <= MAX_PICTURE_BYTES
                    picture = entry, _content(archive, entry, entry.size) if fits else b""
                elif kind.lower() == "txt":
                    text = _content(archive, entry, MAX_BESIDE_BYTES + 1)
                elif kind.lower() == "json":
                    facts = _content(archive, entry, MAX_BESIDE_BYTES + 1)
            if picture:
                yield _member(file, *picture, _told(text, facts, recipe), recipe)
    # MemoryError: a header may say that terabytes of name follow.
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        zlib.error,
        UnicodeDecodeError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:
        raise StageError(
            f"the shard cannot be read to its end ({error})", where=file, remedy="Copy it again or leave it out"
        ) from error


def _member(
    file: str, entry: tarfile.TarInfo, data: bytes, told: tuple[str, str, dict[str, Any]], recipe: PicturePlan
) -> Found:
    text, wrong, more = told
    source = {"file": file, "at": entry.offset_data, "size": entry.size, **_origin(entry.name, more)}
    return _judged(source, data, entry.size, text, wrong, attributes_of(more, recipe))


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, most: int) -> bytes:
    content = archive.extractfile(entry)
    return content.read(most) if content else b""


def _read_parquet(path: str, recipe: PicturePlan) -> Iterator[Found]:
    try:
        file = open_table(path)
        names = file.schema_arrow.names
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(
            f"cannot be read ({error})", where=str(path), remedy="Copy it again or leave it out"
        ) from error
    wanted = [recipe.picture_column, recipe.text_column, *recipe.metadata_columns, *recipe.attribute_columns]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise RecipeError(
            f"has no column {lacking[0]}; there are {names}",
            where=str(path),
            remedy="Set factory.plan.picture_column, text_column, metadata_columns and attribute_columns",
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


def _cell(path: str, at: list[int], cells: dict[str, Any], recipe: PicturePlan) -> Found:
    data, text = cells[recipe.picture_column], cells[recipe.text_column]
    source: dict[str, Any] = {"file": path, "at": at, "column": recipe.picture_column}
    if recipe.metadata_columns:
        source["metadata"] = _plain({name: cells[name] for name in recipe.metadata_columns})
    data = data if isinstance(data, bytes) else b""
    attributes = attributes_of(_plain({name: cells[name] for name in recipe.attribute_columns}), recipe)
    return _judged(source, data, len(data), *_text(text if isinstance(text, bytes) else b""), attributes)


def attributes_of(known: Mapping[str, Any], recipe: PicturePlan) -> str:
    """The recipe's `attribute_columns` of what is known of a picture, as JSON; what is missing, a list or an object is left out."""
    found = {name: known.get(name) for name in recipe.attribute_columns}
    words = {
        name: str(json.dumps(value) if isinstance(value, bool) else value)[:MAX_ATTRIBUTE_CHARACTERS]
        for name, value in found.items()
        if isinstance(value, str | int | float)
    }
    return writable(json.dumps(words, ensure_ascii=False)) if words else "{}"


def metadata_of(known: Mapping[str, Any], recipe: PicturePlan) -> str:
    """The recipe's `metadata_columns` of what is known of a picture, as JSON."""
    return json.dumps(_plain({name: known.get(name) for name in recipe.metadata_columns}), ensure_ascii=False)


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


def _judged(source: dict[str, Any], data: bytes, size: int, text: str, wrong: str, attributes: str) -> Found:
    if size > MAX_PICTURE_BYTES:
        wrong = f"the file has {size} bytes, over the limit"
    elif not data:
        wrong = "the picture is empty"
    return Found(source, data, text, wrong, attributes)
