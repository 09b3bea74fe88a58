"""Prompts from where people keep them: lines, COCO's captions, a table with a column of captions, a data set on the hub by name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import pyarrow.parquet as pq

from cluster.errors import RecipeError, TargetUnavailable

HUB = "hub:"
_KINDS = "One prompt a line, COCO's captions_*.json, a .csv with a column caption or text, or hub:OWNER/NAME"
_COLUMNS = ("caption", "captions", "text", "prompt", "sentences")
"""Where a table says what a picture shows, if nobody names the column; the first that is there."""
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_CONVERTED = "refs/convert/parquet"
"""Where the hub keeps its own Parquet copy of a data set that is in another form."""


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, or of `hub:OWNER/NAME?split=...&column=...&revision=...`, in the source's order. Raises RecipeError."""
    if source.startswith(HUB):
        found = _of_hub(source)
    else:
        path = Path(source)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".json":
                    rows = sorted(json.load(file)["annotations"], key=lambda row: (row["image_id"], row["id"]))
                    found = list({row["image_id"]: row["caption"].strip() for row in reversed(rows)}.values())
                elif path.suffix == ".csv":
                    table = csv.DictReader(file)
                    column = _column(table.fieldnames or [], None, source)
                    found = [row[column] or "" for row in table]
                else:
                    found = list(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise RecipeError(f"cannot be read as prompts ({error})", where=source, remedy=_KINDS) from None
    found = [prompt for prompt in (each.strip() for each in found) if prompt]
    if not found:
        raise RecipeError("holds no prompts", where=source, remedy=_KINDS)
    return found


def open_hub() -> Any:
    """The hub as an fsspec file system: only the bytes that are read come over the network. Raises TargetUnavailable."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise TargetUnavailable(
            "huggingface_hub is not installed, so no captions can be read from the hub",
            remedy="pip install huggingface_hub, or give a file",
        ) from error
    return HfFileSystem()


def _of_hub(source: str) -> list[str]:
    name, _, query = source.removeprefix(HUB).partition("?")
    said = dict(parse_qsl(query))
    if unknown := said.keys() - {"split", "column", "revision"}:
        raise RecipeError(
            f"{', '.join(sorted(unknown))} is nothing that can be said of a data set on the hub",
            where=source,
            remedy="hub:OWNER/NAME?split=...&column=...&revision=...",
        )
    files = open_hub()
    try:
        paths = _parquet(files, name, said.get("revision", "main"))
        if not paths and "revision" not in said:
            paths = _parquet(files, name, _CONVERTED)
        chosen = _of_split(paths, name, said.get("split"), source)
        found: list[str] = []
        for path in chosen:
            with files.open(path, "rb") as file, pq.ParquetFile(file) as table:
                column = _column(table.schema_arrow.names, said.get("column"), source)
                # One column: the pictures beside it, gigabytes, stay where they are.
                found += [_first(value) for value in table.read(columns=[column])[column].to_pylist()]
        return found
    except RecipeError:
        raise
    except Exception as error:  # the hub's client raises its own kinds, and those of whatever it fetches with
        why = (str(error).strip().splitlines() or [""])[0]
        raise RecipeError(
            f"cannot be read from the hub ({type(error).__name__}: {why})",
            where=source,
            remedy="See that the name is right and that there is a network (HF_HUB_OFFLINE unset); a private one needs HF_TOKEN. Or give a file",
        ) from error


def _parquet(files: Any, name: str, revision: str) -> list[str]:
    try:
        return sorted(files.glob(f"datasets/{name}@{quote(revision, safe='')}/**/*.parquet"))
    except FileNotFoundError:  # no such revision; a name that is not there is found out by what follows
        return []


def _of_split(paths: list[str], name: str, split: str | None, source: str) -> list[str]:
    """The files of one split: of several, none is taken for the one that was meant."""
    words = {path: re.split(r"[/_.\-]", path.partition(f"{name}@")[2]) for path in paths}
    there = [known for known in _SPLITS if any(known in said for said in words.values())]
    if split is None and len(there) > 1:
        raise RecipeError(f"has the splits {', '.join(there)}", where=source, remedy=f"Add ?split={there[-1]}")
    chosen = [path for path in paths if split is None or split in words[path]]
    if not chosen:
        what = f"has no split {split}" if paths else "has no Parquet files, or is not there"
        more = f"There is {', '.join(there)}" if there else "See the name and its files on the hub, or give a file"
        raise RecipeError(what, where=source, remedy=more)
    return chosen


def _column(names: Sequence[str], wanted: str | None, source: str) -> str:
    column = wanted or next((name for name in _COLUMNS if name in names), None)
    if column is None or column not in names:
        raise RecipeError(
            f"has no column {wanted or ' or '.join(_COLUMNS)}; it has {', '.join(names) or 'none'}",
            where=source,
            remedy="Name the one with the captions: ?column=... on the hub, the header of a .csv",
        )
    return column


def _first(value: Any) -> str:
    """Of several captions of a picture the first, as COCO's file is read."""
    while isinstance(value, list):
        value = value[0] if value else ""
    return "" if value is None else str(value)
