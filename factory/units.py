"""Work units: a plan cut into pieces of `unit_images` rows, by number. What is left to make is known from row counts and one listing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard
from cluster.stage import Unit
from factory.plan import PLAN

REFILLS = "plan-refill-*.parquet"
_ROWS_AT_ONCE, _PART_ROWS = 1024, 65_536


def plan_files(folder: Path) -> list[Path]:
    """The plan, and the plans of refills after it (factory/refill.py), in order; each begins a work unit of its own."""
    return [folder / PLAN, *sorted(folder.glob(REFILLS))]


def unit_sizes(folder: Path, unit_images: int) -> list[int]:
    """Rows of every planned unit, by its number."""
    found: list[int] = []
    for path in plan_files(folder):
        rows = _open(path).metadata.num_rows
        found += [min(unit_images, rows - start) for start in range(0, rows, unit_images)]
    return found


def first_units(folder: Path, unit_images: int) -> list[int]:
    """Number of the first unit of each plan file."""
    found = [0]
    for path in plan_files(folder)[:-1]:
        found.append(found[-1] + -(-_open(path).metadata.num_rows // unit_images))
    return found


def planned_units(folder: Path, unit_images: int) -> list[Unit]:
    """All units of the plan in `folder`, in order, in memory."""
    return list(read_units(folder, unit_images, range(len(unit_sizes(folder, unit_images)))))


def plan_units(folder: Path, unit_images: int) -> list[tuple[str, pa.ChunkedArray]]:
    """(name, ids) of all units of the plan, in order: what is cheap to know of a million rows."""
    found: list[tuple[str, pa.ChunkedArray]] = []
    for path in plan_files(folder):
        for ids in cut_ids(read_table(path, ["id"])["id"], unit_images):
            found.append((unit_name(len(found)), ids))
    return found


def cut_ids(ids: pa.ChunkedArray, unit_images: int) -> Iterator[pa.ChunkedArray]:
    """The ids of each unit, none copied: in one piece those of over 33 million rows are more than the 2 GiB that an Arrow array of texts holds."""
    return (ids.slice(start, unit_images) for start in range(0, len(ids), unit_images))


def units_left(folder: Path, unit_images: int) -> list[int]:
    """Numbers of the planned units that the ledger lacks; no file of the ledger is opened."""
    try:
        with os.scandir(folder / "ledger") as listing:
            there = {entry.name for entry in listing}
    except FileNotFoundError:
        there = set[str]()
    units = len(unit_sizes(folder, unit_images))
    return [number for number in range(units) if f"{unit_name(number)}.parquet" not in there]


def read_units(folder: Path, unit_images: int, numbers: Iterable[int]) -> Iterator[Unit]:
    """The units of these ascending numbers, read as they are asked for: a plan of millions is never in memory whole."""
    wanted, first = list(numbers), 0
    for path in plan_files(folder):
        plan = _open(path)
        units = -(-plan.metadata.num_rows // unit_images)
        own = [number - first for number in wanted if first <= number < first + units]
        for number, rows in _cut_rows(plan, unit_images, own):
            name = unit_name(first + number)
            yield Unit(name, [{**row, "unit": name} for row in rows])
        first += units


def _cut_rows(plan: pq.ParquetFile, unit_images: int, numbers: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number, rows) of these parts of one file, each `unit_images` rows but the last, which may be short."""
    left = iter(numbers)
    number = next(left, None)
    start, rows = 0, list[dict[str, Any]]()
    # Several threads decode no faster what becomes Python rows next, and each keeps memory of its own.
    for batch in plan.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
        if number is None:
            return
        if start + len(rows) + batch.num_rows <= number * unit_images:
            # Nothing of this batch is wanted, nor what is left of those before it.
            start, rows = start + len(rows) + batch.num_rows, []
            continue
        rows += batch.to_pylist()
        while number is not None and start + len(rows) >= (number + 1) * unit_images:
            first = number * unit_images - start
            yield number, rows[first : first + unit_images]
            rows, start = rows[first + unit_images :], start + first + unit_images
            number = next(left, None)
    if number is not None:
        yield number, rows[number * unit_images - start :]


def unit_name(number: int) -> str:
    return f"unit-{number:05d}"


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or some of its columns; raises CorruptShard."""
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def read_parts(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The same, some rows at a time: for what must not grow with a plan of millions. Raises CorruptShard."""
    try:
        for batch in _open(path).iter_batches(_PART_ROWS, columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptShard:
    return CorruptShard(
        f"cannot be read ({str(error).splitlines()[0]})",
        where=str(path),
        remedy="Delete it and run the same command again",
    )
