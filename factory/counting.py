"""How many pictures the sources of a plan hold, where that can be told without reading them."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from cluster.cache import is_url
from cluster.errors import StageError
from factory.ingest import SUFFIXES
from factory.prompts import read_lines
from factory.recipe import PicturePlan
from factory.sources import is_shard, leads_out, open_table, source_files, walk


def count_pictures(plan: PicturePlan) -> int | None:
    """Rows of Parquet files by their footers, lines of lists of URLs, files of folders; doubles count. None if a shard is among them, or
    what is no source. Raises RecipeError if a source is not there, StageError if one cannot be read."""
    total = 0
    for file in (file for name in plan.paths for file in source_files(name)):
        try:
            count = _count(file, listed=plan.download is not None)
        except (pa.ArrowInvalid, OSError, csv.Error) as error:
            raise StageError(f"cannot be counted ({error})", where=file, remedy="Mend it or leave it out") from error
        if count is None:
            return None
        total += count
    return total if plan.limit is None else min(total, plan.limit)


def _count(file: str, listed: bool) -> int | None:
    path = Path(file)
    if file.endswith(".parquet"):
        return open_table(file).metadata.num_rows
    if is_url(file):
        return None
    if listed and path.suffix in (".txt", ".csv"):
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            if path.suffix == ".txt":
                return sum(1 for line in read_lines(lines) if line.strip())
            return max(sum(1 for row in csv.reader(read_lines(lines)) if row) - 1, 0)  # its head is no picture
    return None if listed or not path.is_dir() else _count_folder(path)


def _count_folder(folder: Path) -> int | None:
    count = 0
    for path in walk(folder):
        if leads_out(path, folder):
            continue
        if is_shard(path.name):
            return None
        count += path.suffix.lower() in SUFFIXES
    return count
