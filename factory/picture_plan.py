"""The plan of pictures that are taken in: written as the sources are read, a few thousand rows in memory, and mended in place where URLs
that had failed answer a later time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.cache import is_url
from cluster.errors import RecipeError, StageError
from cluster.stage import DEAD
from cluster.storage import publish_file
from factory.added import forget_units
from factory.dead import reopen_unit
from factory.download import asked_again, download_all, wants_again
from factory.ingest import downloaded_rows, planned_rows, read_part
from factory.plan import PLAN_SCHEMA
from factory.recipe import PicturePlan
from factory.seen import Seen
from factory.sources import source_files

_ROWS_AT_ONCE = 4096
GROUP_ROWS = 1 << 16
"""Rows of the plan that are written together."""


def plan_pictures(
    plan: PicturePlan, unit_images: int, final: Path, progress: Callable[[int], None] = lambda n: None
) -> Path:
    """Write the plan to `final` unless it is there; mend the one that is there if what failed is to be asked again. Raises StageError if
    nothing came in."""
    folder = final.parent
    if final.exists() and not wants_again(folder):
        return final
    if plan.download is None:
        _write(final, planned_rows(plan), plan, progress)
        return final
    parts = download_all(plan, _lists(plan), folder, progress, planned=final.exists())
    if final.exists():
        _mend(final, parts, unit_images)
    else:
        _write(final, downloaded_rows(parts), plan)
    asked_again(folder)
    return final


def _lists(plan: PicturePlan) -> list[Path]:
    files = [file for name in plan.paths for file in source_files(name)]
    for file in files:
        if is_url(file):
            raise RecipeError(
                "a list of URLs is read from the disk",
                where=file,
                remedy="Copy it here, and name the copy in factory.plan.paths",
            )
    return [Path(file) for file in files]


def _write(
    final: Path, rows: Iterable[dict[str, Any]], plan: PicturePlan, progress: Callable[[int], None] = lambda n: None
) -> None:
    alive = False

    def looked_at() -> Iterator[dict[str, Any]]:
        nonlocal alive
        for row in rows:
            alive = alive or row["outcome"] != DEAD
            yield row

    def write(place: Path) -> None:
        write_rows(place, looked_at(), progress)
        if not alive:
            remedy = (
                "edgefusion factory retry-failed FOLDER asks again for URLs that may answer later"
                if plan.download
                else ""
            )
            raise StageError(
                "the sources hold no picture",
                where=", ".join(plan.paths),
                remedy=f"Check factory.plan.paths{f'; {remedy}' if remedy else ''}",
            )

    publish_file(final, write)


def write_rows(place: Path, rows: Iterable[dict[str, Any]], progress: Callable[[int], None] = lambda n: None) -> None:
    """Rows of a plan to a Parquet file, GROUP_ROWS together: up to so many the file is that of `table_bytes`."""
    left = iter(rows)
    with pq.ParquetWriter(place, PLAN_SCHEMA, compression="zstd") as writer:
        held, written = [PLAN_SCHEMA.empty_table()], False
        while some := list(itertools.islice(left, _ROWS_AT_ONCE)):
            held.append(pa.Table.from_pylist(some, schema=PLAN_SCHEMA))
            progress(len(some))
            if sum(map(len, held)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held, written = [PLAN_SCHEMA.empty_table()], True
        if len(held) > 1 or not written:
            writer.write_table(pa.concat_tables(held).combine_chunks())


def _mend(final: Path, parts: list[Path], unit_images: int) -> None:
    """Put what answered now in the place of the dead row that it had, and give the units that change back to `make`.

    Rows keep their places, so the rest of the ledger stays true. The plan is changed last: killed before, this is done again.
    """
    known, fresh, changed = Seen(), dict[int, Any](), set[int]()
    for batch in pq.ParquetFile(final).iter_batches(_ROWS_AT_ONCE, columns=["id"]):
        for key in batch["id"].to_pylist():
            known.add(bytes.fromhex(key))
    for number, row in enumerate(_answered(final, parts)):
        # An answer that the same URL gave elsewhere in the list is there already; one of the two stays dead.
        if row is not None and known.add(bytes.fromhex(row["id"])):
            fresh[number] = row
            changed.add(number // unit_images)
    if not fresh:
        return
    units = [f"unit-{unit:05d}" for unit in sorted(changed)]
    forget_units(final.parent, units)
    for unit in units:
        reopen_unit(final.parent, unit)

    def rows() -> Iterator[dict[str, Any]]:
        batches = pq.ParquetFile(final).iter_batches(_ROWS_AT_ONCE)
        there: Iterator[dict[str, Any]] = (row for batch in batches for row in batch.to_pylist())
        return (fresh.get(number, row) for number, row in enumerate(there))

    publish_file(final, lambda place: write_rows(place, rows()))


def _answered(final: Path, parts: list[Path]) -> Iterator[dict[str, Any] | None]:
    """For each row of the plan what its URL answered, if the row is dead and the answer is none of that; one part is in memory."""
    by_name = {path.name: path for path in parts}
    held, answers = "", dict[tuple[int, ...], dict[str, Any]]()
    for batch in pq.ParquetFile(final).iter_batches(_ROWS_AT_ONCE, columns=["outcome", "source"]):
        for row in batch.to_pylist():
            if row["outcome"] != DEAD:
                yield None
                continue
            source = json.loads(row["source"])
            name = Path(source["file"]).name
            if name != held:
                held = name
                answers = {tuple(json.loads(one["source"])["at"]): one for one in read_part(by_name[name])}
            found = answers[tuple(source["at"])]
            yield found if found["outcome"] != DEAD else None
