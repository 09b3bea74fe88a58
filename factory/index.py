"""The ledger as columns: what select needs of every row, read from a few files instead of one a work unit.

`index/` in the data set folder is a copy that can be deleted at any time: a part covers 512 units and holds a mark of their files
(name, size, time); a part whose mark no longer fits is made anew. Pictures are never read here, unless a ledger of an earlier version
lacks their digests; then once.

Legend: N rows, in the order of the plan; D dimensions of an embedding.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, LedgerConflict, RecipeError
from cluster.stage import DEAD
from cluster.storage import publish_bytes
from factory.added import Added, added_sets, added_to
from factory.ledger import digest_pictures
from factory.plan import table_bytes
from factory.units import plan_units, read_table

INDEX = "index"
pc: Any = pyarrow.compute  # its functions are made at run time, where no type checker sees them
_PART_UNITS = 512
_MARK = b"units"
_VERSION = b"3"
_LARGE = 1 << 30
"""Stands for the size of a drawn picture: it is what the recipe asked for."""


@dataclass(frozen=True)
class Texts:
    """A column of few different texts: N codes into `values`."""

    codes: np.ndarray
    values: list[str]

    def to_arrow(self) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(self.codes, pa.int32()), pa.array(self.values, pa.string()))


@dataclass(frozen=True)
class Columns:
    """Every ledger row of a data set, a numpy array of N a column."""

    ids: np.ndarray
    """Bytes of the hex id."""
    outcome: Texts
    reason: Texts
    group: Texts
    attributes: Texts
    has_text: np.ndarray
    has_raw_text: np.ndarray
    """Came with words of its own: only a taken-in picture can."""
    edge_px: np.ndarray
    """Shorter edge of a taken-in picture before the crop; huge for a drawn one."""
    hashes: np.ndarray
    colours: np.ndarray
    made: np.ndarray
    """Code of the picture file's digest: rows with the same file share it; -1 without a picture."""
    scores: dict[str, np.ndarray]
    """Every number with a fraction that the ledger holds, by its name; NaN where there is none."""
    lower_is_better: frozenset[str] = frozenset()
    """Scores of which their scorer says so, as the ledger notes it beside the column."""
    parts: tuple[tuple[Path, int], ...] = ()
    """Files of embeddings (n x D float16) in the order of the rows, and how many rows each has."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def by_id(self) -> np.ndarray:
        """Row numbers in the order of the ids."""
        return np.argsort(self.ids, kind="stable")

    def by_raw_texts(self) -> Columns:
        """The same rows judged by the texts that came with the pictures. Raises RecipeError for drawn ones, which have no such texts."""
        if "raw_clip_score" not in self.scores or not self.has_raw_text.any():
            raise RecipeError(
                "no picture of this ledger came with a text",
                where="factory.select.text",
                remedy="Leave the key out: `raw` is for factory.plan.kind pictures",
            )
        scores = {**self.scores, "clip_score": self.scores["raw_clip_score"]}
        return replace(self, has_text=self.has_raw_text, scores=scores)

    def embeddings(self) -> Embeddings | None:
        """The embeddings; None if no row of a part has one and not all of it died."""
        maps = [np.load(path, mmap_mode="r") for path, _ in self.parts]
        alive = np.array([value != DEAD for value in self.outcome.values], bool)[self.outcome.codes]
        ends = np.cumsum([len(m) for m in maps], dtype=np.int64)
        # A part of dead rows alone was saved without knowing how wide the others are.
        widths = {
            m.shape[1]
            for m, end in zip(maps, ends.tolist(), strict=True)
            if m.shape[1] or alive[end - len(m) : end].any()
        }
        return Embeddings(maps) if len(widths) == 1 and widths != {0} else None


class Embeddings:
    """Unit embeddings of the rows, read from the disk as they are asked for; a row without one is zeros."""

    def __init__(self, maps: list[np.ndarray]) -> None:
        self._maps = maps
        self._starts = np.concatenate([[0], np.cumsum([len(m) for m in maps])])
        self.dimensions = max(int(m.shape[1]) for m in maps)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, n x D float32 of unit length."""
        found = np.zeros((len(rows), self.dimensions), np.float32)
        which = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(len(self._maps) + 1))
        for i in np.unique(which):
            some = order[ends[i] : ends[i + 1]]
            if self._maps[i].shape[1]:
                found[some] = self._maps[i][rows[some] - self._starts[i]]
        length = np.sqrt(np.einsum("nd,nd->n", found, found))
        return found / np.maximum(length, 1e-6)[:, None]


def load_columns(folder: Path, unit_images: int) -> Columns:
    """The ledger of the data set in `folder`; raises CorruptShard if an entry is missing or damaged, LedgerConflict if one is of another plan."""
    units = plan_units(folder, unit_images)
    paths = [folder / "ledger" / f"{name}.parquet" for name, _ in units]
    sets = [one for one in added_sets(folder) if one.covers([name for name, _ in units])]
    parts: list[pa.Table] = []
    seen: list[tuple[Path, int]] = []
    for start in range(0, len(paths), _PART_UNITS):
        place = folder / INDEX / f"part-{start // _PART_UNITS:05d}"
        some = paths[start : start + _PART_UNITS]
        table = _part(folder, place, some, sets)
        _refuse_strangers(table, units[start : start + _PART_UNITS], some)
        parts.append(table)
        seen.append((place.with_suffix(".npy"), table.num_rows))
    return to_columns(pa.concat_tables(parts, promote_options="default"), tuple(seen))


def to_columns(table: pa.Table, parts: tuple[tuple[Path, int], ...] = ()) -> Columns:
    """Columns of a table such as the index holds."""

    def texts(name: str) -> Texts:
        codes, values = _coded(pc.fill_null(_large(table[name]), ""))
        return Texts(codes, values.to_pylist())

    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    colours = table["colours"].combine_chunks()
    return Columns(
        ids=_fixed(table["id"]),
        outcome=texts("outcome"),
        reason=texts("reason"),
        group=texts("group"),
        attributes=texts("attributes"),
        has_text=table["has_text"].to_numpy(),
        has_raw_text=table["has_raw_text"].to_numpy(),
        edge_px=table["edge_px"].to_numpy(),
        hashes=table["hash"].to_numpy(),
        colours=np.frombuffer(colours.buffers()[1] or b"", np.uint8)[colours.offset * 12 :][
            : 12 * len(colours)
        ].reshape(-1, 12),
        made=_coded(_large(table["made_sha256"]))[0],
        scores={name: _numbers(table[name]) for name in floats},
        lower_is_better=frozenset(
            name for name in floats if (table.schema.field(name).metadata or {}).get(b"better") == b"lower"
        ),
        parts=parts,
    )


def _large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of which one array may hold more than 2 GiB: the digests of 33 million rows are as much."""
    return column.cast(pa.large_string())


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(N codes, -1 for null, and what they stand for, in the order in which it comes first)."""
    encoded = column.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return np.zeros(0, np.int32), pa.array([], column.type)
    codes = [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate(codes).astype(np.int32), encoded.chunk(0).dictionary


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    """Texts as numpy bytes, all as long as the longest."""
    width = max((pc.max(pc.binary_length(column)).as_py() or 1), 1)
    found = np.empty(len(column), f"S{width}")
    start = 0
    for chunk in column.chunks:
        if pc.min(pc.binary_length(chunk)).as_py() == width:  # as all ids of ours: their bytes lie side by side
            text = chunk.buffers()[2]
            first = int(np.frombuffer(chunk.buffers()[1], np.int32, offset=4 * chunk.offset, count=1)[0])
            found[start : start + len(chunk)] = np.frombuffer(text, f"S{width}", offset=first, count=len(chunk))
        else:
            found[start : start + len(chunk)] = np.array(chunk.to_pylist(), f"S{width}")
        start += len(chunk)
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()


def _part(folder: Path, place: Path, entries: list[Path], sets: Sequence[Added] = ()) -> pa.Table:
    mark = _mark([*entries, *(one.file(path.stem) for one in sets for path in entries)])
    path, seen = place.with_suffix(".parquet"), place.with_suffix(".npy")
    if path.exists() and seen.exists():
        try:
            table = pq.read_table(path, memory_map=True)
            if (table.schema.metadata or {}).get(_MARK) == mark:
                return table
        except (pa.ArrowInvalid, OSError):
            pass  # a copy: it is made anew
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(read_table, entries))
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    publish_bytes(seen, _embeddings(table["embedding"], entries[0].parent))
    table = _digested(folder, table)
    columns: dict[str, Any] = {
        **{name: table[name] for name in ("id", "unit", "group", "attributes", "outcome", "reason", "made_sha256")},
        "has_text": _said(table, "prompt"),
        "has_raw_text": _said(table, "raw_caption"),
        "edge_px": _edge(table),
        "hash": np.array([int(h, 16) for h in table["phash"].fill_null("0").to_pylist()], np.uint64),
        "colours": pa.array([c or bytes(12) for c in table["colours"].to_pylist()], pa.binary(12)),
    }
    floats = [(field, table[field.name]) for field in table.schema if pa.types.is_floating(field.type)]
    found = pa.table(columns).replace_schema_metadata({_MARK: mark})
    for field, values in [*floats, *added_to(sets, table)]:  # as they are, with what their scorer said of them
        found = found.append_column(field, values)
    publish_bytes(path, table_bytes(found))
    return found


def _mark(entries: list[Path]) -> bytes:
    digest = hashlib.sha256(_VERSION)
    for path in entries:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CorruptShard(
                "is missing", where=str(path), remedy="Run the same command again: it makes what is missing"
            ) from None
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest().encode()


def _said(table: pa.Table, name: str) -> Any:
    """Whether there are words; a ledger of an earlier version may lack the column."""
    if name not in table.column_names:
        return pa.array(np.zeros(len(table), bool))
    return pc.not_equal(pc.fill_null(table[name], ""), "")


def _edge(table: pa.Table) -> pa.Array:
    """0 counts as not known, as null does."""
    edges = [
        np.asarray(pc.fill_null(table[name], 0)) if name in table.column_names else np.zeros(len(table), np.int64)
        for name in ("width_px", "height_px")
    ]
    return pa.array(np.minimum(*(np.where(e > 0, e, _LARGE) for e in edges)), pa.int64())


def _embeddings(column: pa.ChunkedArray, ledger: Path) -> bytes:
    """The rows' float16 embeddings as a .npy file: n x D; D is 0 if there is none at all."""
    cells = column.to_pylist()
    widths = {len(cell) for cell in cells if cell}
    if len(widths) > 1:
        raise CorruptShard(
            f"embeddings are of {len(widths)} sizes", where=str(ledger), remedy="The scorer changed: make the set anew"
        )
    width = max(widths, default=0)
    rows = np.frombuffer(b"".join(cell or bytes(width) for cell in cells), np.float16).reshape(len(cells), width // 2)
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


def _digested(folder: Path, table: pa.Table) -> pa.Table:
    """The table with `made_sha256`, taken from the pictures where an earlier version did not note it."""
    if "made_sha256" in table.column_names:
        noted = pc.or_(pc.is_valid(table["made_sha256"]), pc.is_null(table["phash"]))
        if pc.all(noted).as_py() is not False:
            return table
    units = dict.fromkeys(zip(table["unit"].to_pylist(), table["pictures_sha256"].to_pylist(), strict=True))
    digests = {key: mark for unit, sha256 in units for key, mark in digest_pictures(folder, unit, sha256)}
    column = pa.array([digests.get(key) for key in table["id"].to_pylist()], pa.string())
    if "made_sha256" in table.column_names:
        table = table.drop_columns(["made_sha256"])
    return table.append_column("made_sha256", column)


def _refuse_strangers(table: pa.Table, units: list[tuple[str, pa.ChunkedArray]], entries: list[Path]) -> None:
    """Each entry must hold the ids that the plan gives its unit."""
    start, ids = 0, table["id"]
    for (_, planned), path in zip(units, entries, strict=True):
        if not ids.slice(start, len(planned)).equals(planned):
            raise LedgerConflict("belongs to another plan", where=str(path), remedy="Start in a new output folder")
        start += len(planned)
    if start != len(ids):
        raise LedgerConflict("has rows of no plan", where=str(entries[-1]), remedy="Start in a new output folder")
