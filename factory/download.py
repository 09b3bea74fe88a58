"""Pictures by URL: lists of addresses become Parquet files of what they answered, kept in the data set folder.

`downloads/part-00000.parquet` (url, text, picture, wrong, and what else of the list is kept) holds the bytes as they came, published
atomically, a part 256 URLs: a killed download goes on after the last whole part, and a rerun reads the disk, not the net. The plan then
points into these files as into any Parquet source. What the server calls its answer counts for nothing; decoding decides later. Several
parts are on their way at once, so that one slow URL holds up nothing but its own part; they are judged and published in the order of the list.

A run of failures that looks like an outage stops the download, and the parts of it are not kept; if it was killed before it could tell, the
next run asks for them anew. What failed for a reason that may pass is asked once more after `ask_again`; a part changes only where an answer
came.

How a URL is asked for, and from which addresses never, is factory/asking.py's.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import mmap
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError
from cluster.status import reason_kind
from cluster.storage import publish_bytes, publish_file
from factory.asking import Asker, Job, asking, may_answer_later
from factory.ingest import attributes_of, metadata_of, url_key
from factory.prompts import read_lines
from factory.recipe import DownloadRecipe, PicturePlan

FOLDER = "downloads"
PART_URLS = 256
AHEAD_PARTS = 64
"""Parts on their way at once. With a dead host in each (a minute of time-outs) there are still some 260 URLs/s, more than one process fetches."""
_AHEAD_BYTES = 4 << 30
"""Answers on disk, of parts that are not published, beyond which only the first of these parts goes on."""
_PLAIN_BYTES = 256 << 20
"""Pictures of one part beyond which they are written one by one: as a dictionary, Arrow's own choice, they would be in memory four times."""
_ROWS_AT_ONCE = 16
_SCHEMA = pa.schema([("url", pa.string()), ("text", pa.string()), ("picture", pa.binary()), ("wrong", pa.string())])
AGAIN = "again"
"""A file beside the parts: failures that may pass are to be asked again by the next plan."""
_STATUS = re.compile(r"HTTP (\d+)\b")
_PASSING = re.compile(r"no whole answer within |\w+Error(:|,|$)")
"""Reasons as factory/asking.py words them; the second are those that an outage gives."""


def download_all(
    recipe: PicturePlan,
    paths: list[Path],
    folder: Path,
    progress: Callable[[int], None] = lambda n: None,
    planned: bool = False,
) -> list[Path]:
    """The parts of all URLs in `paths`, in order, fetched where they are not there yet. Raises RecipeError for a bad list.

    `planned`: there is a plan of them already, so what failed stays as it is unless somebody wants it again."""
    assert recipe.download is not None
    spoilt = set() if planned else _spoilt(recipe.download, folder)
    return asyncio.run(_Download(recipe, folder, progress, spoilt).run(paths))


_Listed = tuple[str, str, dict[str, str]]
"""URL, text, and what else of the list a part keeps, by its column there: attributes and metadata, each as JSON."""


class _Latest:
    """The parts that were fetched last, as many as mean something: are they the work of an outage?"""

    def __init__(self, recipe: DownloadRecipe) -> None:
        self._recipe = recipe
        self._parts: deque[tuple[Path, list[str]]] = deque()

    def add(self, part: Path, wrong: list[str]) -> None:
        """Judge a part before it is published. Raises StageError if most failed of late; the parts where most did are then removed, and the
        next run fetches them anew."""
        self._parts.append((part, wrong))
        total = sum(len(one) for _, one in self._parts)
        while total - len(self._parts[0][1]) >= self._recipe.failed_after:
            total -= len(self._parts.popleft()[1])
        failed = [why for _, one in self._parts for why in one if why]
        most = self._recipe.max_failed_share
        if total < self._recipe.failed_after or len(failed) <= most * total:
            return
        for path, one in self._parts:
            if sum(map(bool, one)) > most * len(one):
                path.unlink(missing_ok=True)
        (why, _), *_ = Counter(map(reason_kind, failed)).most_common(1)
        raise StageError(
            f"{len(failed)} of the last {total} URLs failed, more than factory.plan.download.max_failed_share ({most:g}); most often: {why}",
            where=str(part.parent),
            remedy="See whether the network is there, then run the same command again: it asks for these anew; or raise that key",
        )


def _spoilt(recipe: DownloadRecipe, folder: Path) -> set[Path]:
    """The last parts there, as far as in each most failed for reasons that may pass: a download that was killed in an outage leaves them."""
    found: set[Path] = set()
    for part in reversed(_parts(folder)):
        wrong = pq.read_table(part, columns=["wrong"])["wrong"].to_pylist()
        if sum(map(may_pass, wrong)) <= recipe.max_failed_share * len(wrong):
            break
        found.add(part)
    return found


class _Download:
    """Parts in the order of the list: entered as there is room for them, fetched side by side, judged and published one after another."""

    def __init__(
        self, recipe: PicturePlan, folder: Path, progress: Callable[[int], None], spoilt: Collection[Path]
    ) -> None:
        assert recipe.download is not None
        self._recipe, self._folder, self._progress, self._spoilt = recipe, folder, progress, spoilt
        self._again, self._latest = wants_again(folder), _Latest(recipe.download)
        self._ahead: deque[_Part] = deque()

    async def run(self, paths: list[Path]) -> list[Path]:
        """All parts; raises as `download_all` does."""
        assert self._recipe.download is not None
        parts: list[Path] = []
        listed = (one for path in paths for one in _listed(path, self._recipe))
        left = itertools.islice(listed, self._recipe.limit)
        async with asking(self._recipe.download, self._may_ask) as asker:
            while some := list(itertools.islice(left, PART_URLS)):
                self._ahead.append(part := self._enter(some, len(parts)))
                parts.append(part.final)
                for place, url in enumerate(part.left, part.number * PART_URLS):
                    asker.add(Job(place, url, part.take, part.fail))
                while self._ahead and (len(self._ahead) >= AHEAD_PARTS or self._ahead[0].done.is_set()):
                    await self._finish(asker)
            while self._ahead:
                await self._finish(asker)
        return parts

    def _may_ask(self, place: int) -> bool:
        """The first part always, or nothing would ever be published; others while what waits on disk is within bounds."""
        first = self._ahead[0].number if self._ahead else 0
        return place < (first + 1) * PART_URLS or sum(part.bytes for part in self._ahead) < _AHEAD_BYTES

    def _enter(self, some: list[_Listed], number: int) -> _Part:
        """What is to be asked of a part: all, what failed before, or nothing. Raises StageError if it is there, of another list."""
        final = self._folder / FOLDER / f"part-{number:05d}.parquet"
        if not final.exists():
            more = [pa.field(name, pa.string()) for name in _kept({}, self._recipe)]
            rows = [{"url": url, "text": text, **kept} for url, text, kept in some]
            return _Part(final, number, rows, pa.schema([*_SCHEMA, *more]), asked=True, judged=True)
        table = pq.read_table(final, columns=["url", "text"])
        if list(zip(table["url"].to_pylist(), table["text"].to_pylist(), strict=True)) != [one[:2] for one in some]:
            raise StageError(
                "was downloaded from another list of URLs", where=str(final), remedy="Start in a new output folder"
            )
        schema = pq.read_schema(final).remove_metadata()
        names = [name for name in schema.names if name != "picture"]
        asked = self._again or final in self._spoilt
        rows = pq.read_table(final, columns=names).to_pylist() if asked else [{} for _ in some]
        return _Part(final, number, rows, schema, asked, judged=final in self._spoilt)

    async def _finish(self, asker: Asker) -> None:
        """Judge and publish the first part once all of it was answered."""
        part = self._ahead[0]
        await part.done.wait()
        if part.failed is not None:
            raise part.failed
        if part.judged:
            self._latest.add(part.final, [row["wrong"] for row in part.rows])
        if part.asked:
            # Beside the event loop, where others are being answered meanwhile.
            await asyncio.to_thread(part.publish)
        self._ahead.popleft()
        asker.look()
        self._progress(len(part.rows))


class _Part:
    """A part on its way: its rows without the pictures, and these on disk in the order in which they come, in a file that has no name."""

    def __init__(
        self, final: Path, number: int, rows: list[dict[str, Any]], schema: pa.Schema, asked: bool, judged: bool
    ) -> None:
        """`asked`: URLs that have no answer, or failed and may answer now, are to be asked; `judged`: their failures may be an outage's."""
        self.final, self.number, self.rows, self._schema = final, number, rows, schema
        self.left: dict[str, list[int]] = {}
        """URLs that are yet to answer, each once, to their rows."""
        for i, row in enumerate(rows if asked else ()):
            if "wrong" not in row or may_pass(row["wrong"]):
                self.left.setdefault(row["url"], []).append(i)
        self.asked = bool(self.left)
        self.judged = judged and self.asked
        self.bytes = 0
        self.done = asyncio.Event()
        self.failed: Exception | None = None
        if not self.left:
            self.done.set()
        self._spill: IO[bytes] | None = None
        self._places: list[tuple[int, int] | None] = [None] * len(rows)
        """Offset and length of each row's picture."""

    def take(self, url: str, data: bytes | bytearray | None, wrong: str) -> None:
        """What a URL answered, or why it did not."""
        place = self._keep(data) if data is not None else None
        for i in self.left.pop(url):
            self.rows[i]["wrong"], self._places[i] = wrong, place
        if not self.left:
            self.done.set()

    def fail(self, error: Exception) -> None:
        """Something that is no answer, such as a full disk."""
        self.failed = self.failed or error
        self.done.set()

    def _keep(self, data: bytes | bytearray) -> tuple[int, int]:
        try:
            if self._spill is None:
                self.final.parent.mkdir(parents=True, exist_ok=True)
                self._spill = tempfile.TemporaryFile(dir=self.final.parent)  # noqa: SIM115 - closed by `publish`
            self._spill.write(data)
        except OSError as error:
            raise StageError(
                f"could not be written ({error.strerror})",
                where=str(self.final),
                remedy="Free space and run the same command again, or choose another output folder",
            ) from error
        self.bytes += len(data)
        return self.bytes - len(data), len(data)

    def publish(self) -> None:
        """Put the part under its name. Raises EdgeFusionError if the disk is full."""
        publish_file(self.final, self._write)
        if self._spill is not None:
            self._spill.close()

    def _write(self, place: Path) -> None:
        if self.final.exists():
            self._keep_older()
        names = [name for name in self._schema.names if name != "picture"]
        columns: dict[str, Any] = {name: pa.array([row[name] for row in self.rows], pa.string()) for name in names}
        plain = sum(one[1] for one in self._places if one) > _PLAIN_BYTES
        columns["picture"] = self._mapped() if plain else self._pictures()
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        # One group either way, for the plan names rows by group and place.
        how: dict[str, Any] = {"use_dictionary": names, "write_batch_size": 1} if plain else {}
        pq.write_table(table, place, compression="zstd", **how)

    def _keep_older(self) -> None:
        """Take over the pictures that the part has already."""
        batches = pq.ParquetFile(self.final).iter_batches(_ROWS_AT_ONCE, columns=["picture"])
        for row, cell in enumerate(cell for batch in batches for cell in batch["picture"]):
            if self._places[row] is None and (data := cell.as_py()) is not None:
                self._places[row] = self._keep(data)

    def _pictures(self) -> pa.Array:
        """The column in one piece, in memory once."""
        sizes = [place[1] if place else 0 for place in self._places]
        ends = np.cumsum([0, *sizes], dtype=np.int32)
        data = memoryview(bytearray(int(ends[-1])))
        for place, start, end in zip(self._places, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if place and self._spill is not None:
                self._spill.seek(place[0])
                data[start:end] = self._spill.read(place[1])
        there = pa.array([place is not None for place in self._places])
        return pa.Array.from_buffers(
            pa.binary(), len(sizes), [there.buffers()[1], pa.py_buffer(ends), pa.py_buffer(data)]
        )

    def _mapped(self) -> pa.ChunkedArray:
        """The column as pieces of the file on disk, none of which is in memory before it is written."""
        assert self._spill is not None
        self._spill.flush()
        whole = pa.py_buffer(mmap.mmap(self._spill.fileno(), 0, access=mmap.ACCESS_READ))
        pieces = [
            pa.nulls(1, pa.binary())
            if place is None
            else pa.Array.from_buffers(
                pa.binary(), 1, [None, pa.py_buffer(np.array([0, place[1]], np.int32)), whole.slice(*place)]
            )
            for place in self._places
        ]
        return pa.chunked_array(pieces, pa.binary())


def may_pass(wrong: str) -> bool:
    """Whether a URL that failed for this reason may answer another time."""
    if status := _STATUS.match(wrong):
        return may_answer_later(int(status[1]))
    return _PASSING.match(wrong) is not None


def failed_urls(folder: Path) -> list[tuple[str, str]]:
    """(id of its row, reason) of the URLs that failed for reasons that may pass, of the data set in `folder`; doubles come once."""
    found: dict[str, str] = {}
    for part in _parts(folder):
        for row in pq.read_table(part, columns=["url", "text", "wrong"]).to_pylist():
            if may_pass(row["wrong"]):
                found[url_key(row["url"], b"", row["text"])[0]] = row["wrong"]
    return list(found.items())


def ask_again(folder: Path) -> None:
    """Let the next plan ask for those once more."""
    publish_bytes(folder / FOLDER / AGAIN, b"")


def wants_again(folder: Path) -> bool:
    """Whether the plan in `folder` is yet to ask for what failed."""
    return (folder / FOLDER / AGAIN).exists()


def asked_again(folder: Path) -> None:
    """The plan has what came of it."""
    (folder / FOLDER / AGAIN).unlink(missing_ok=True)


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("part-*.parquet"))


def _listed(path: Path, recipe: PicturePlan) -> Iterator[_Listed]:
    assert recipe.download is not None
    columns = [recipe.download.url_column, recipe.text_column, *recipe.metadata_columns, *recipe.attribute_columns]
    if path.suffix == ".txt":
        _refuse_lacking(path, recipe, columns[:2])
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in read_lines(file):
                url, _, text = line.strip().partition("\t")
                if url:
                    yield url.strip(), text.strip(), {}
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(read_lines(file))
            try:
                _refuse_lacking(path, recipe, list(reader.fieldnames or []))
                for row in reader:
                    yield (row[columns[0]] or "").strip(), row.get(columns[1]) or "", _kept(row, recipe)
            except csv.Error as error:
                raise RecipeError(
                    f"cannot be read ({error})",
                    where=f"{path} line {reader.line_num}",
                    remedy="Mend or delete that line",
                ) from error
    elif path.suffix == ".parquet":
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(f"cannot be read ({error})", where=str(path), remedy="Copy it again") from error
        names = parquet.schema_arrow.names
        _refuse_lacking(path, recipe, names)
        for batch in parquet.iter_batches(columns=[name for name in dict.fromkeys(columns) if name in names]):
            for row in batch.to_pylist():
                url, text = str(row[columns[0]] or "").strip(), str(row.get(columns[1]) or "")
                yield url, text, _kept(row, recipe)
    else:
        raise RecipeError(
            "is no list of URLs (.txt, .csv or .parquet)", where=str(path), remedy="Check factory.plan.paths"
        )


def _kept(row: Mapping[str, Any], recipe: PicturePlan) -> dict[str, str]:
    """Of a row of the list what a part keeps besides URL and text; none of what the recipe does not ask for."""
    attributes = {"attributes": attributes_of(row, recipe)} if recipe.attribute_columns else {}
    return {**attributes, "metadata": metadata_of(row, recipe)} if recipe.metadata_columns else attributes


def _refuse_lacking(path: Path, recipe: PicturePlan, names: list[str]) -> None:
    """Raises RecipeError if the list lacks a column. Texts may be missing altogether, unless the recipe says where they stand: by another
    name than the usual one."""
    assert recipe.download is not None
    named = recipe.text_column != PicturePlan.model_fields["text_column"].default
    wanted = {
        "download.url_column": [recipe.download.url_column],
        "text_column": [recipe.text_column] if named else [],
        "metadata_columns": recipe.metadata_columns,
        "attribute_columns": recipe.attribute_columns,
    }
    for key, columns in wanted.items():
        for column in columns:
            if column not in names:
                there = "as a .txt it has only URLs and texts" if path.suffix == ".txt" else f"there are {names}"
                raise RecipeError(f"has no column {column}; {there}", where=str(path), remedy=f"Set factory.plan.{key}")
