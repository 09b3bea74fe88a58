"""The ledger as something to browse: filters by DuckDB, orders by numpy, fluent at a million rows. Knows no pictures and no HTTP.

A row is known by its place in the ledger (0 ... total - 1). A filter gives a View: the fixed list of matching places in order, so
that pages do not shift under a person who is deciding. Every value in SQL is a parameter; column names come from the ledger's own
schema and are renamed s0, s1, ... before anything is asked.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.recipe import Settings
from factory.added import Added, added_sets, added_to
from factory.decisions import Decision
from factory.select import DEAD, SELECTION
from factory.units import read_table

MAX_VALUES = 300
"""Attribute values offered on the page, the most frequent ones."""
_VIEWS = 16
_RECENT = 4000
_SHUFFLE_SEED = 0
_NOTED = ("id", "verdict", "caption")
_ID_START = re.compile(r"[0-9a-f]{6,64}")


class Filter(Settings):
    """What to show, and in which order. Empty parts do not filter."""

    text: str = Field(
        default="",
        max_length=500,
        description="words that prompt, caption, the text a picture came with or its path hold, or the start of an id",
    )
    scores: dict[str, tuple[float | None, float | None]] = Field(default={}, description="least and most of a score")
    attributes: dict[str, list[str]] = Field(default={}, description="values of an attribute, any of which will do")
    group: str = Field(default="", max_length=500, description="group of the taxonomy")
    outcome: str = Field(
        default="", max_length=500, description="what the rules said: kept, rejected, dead or made; empty: any but dead"
    )
    reason: str = Field(default="", max_length=500, description="why the rules said so")
    crop: str = Field(default="", max_length=20, description="which crop of a taken-in picture: centre, start or end")
    people: Literal["", "open", "keep", "reject", "caption"] = Field(default="", description="what people said")
    sort: str = Field(default="plan", max_length=100, description="plan, shuffle or a score")
    descending: bool = False


class View:
    """The places that match a filter, in order."""

    def __init__(self, places: np.ndarray) -> None:
        self.key, self.places = secrets.token_hex(8), places


class Catalogue:
    """The ledger of one data set folder in memory (without embeddings and pictures). Safe for threads."""

    def __init__(self, folder: Path, view: str = "") -> None:
        """With the verdicts of the selection `view`. Raises EdgeFusionError if nothing is made yet or there is no such selection,
        CorruptShard if a file cannot be read."""
        self._folder, selection = folder, _selection(folder, view)
        if view and not selection.exists():
            raise EdgeFusionError(
                f"there is no selection {view}",
                where=str(selection.parent),
                remedy=f"edgefusion factory views {folder} lists those that are there",
            )
        files = sorted((folder / "ledger").glob("unit-*.parquet"))
        if not files:
            raise EdgeFusionError(
                "nothing is made yet", where=str(folder), remedy="Give the dataset folder of a run, after `make`"
            )
        self._base = duckdb.connect(config={"preserve_insertion_order": True})
        try:
            schema = pq.read_schema(files[0])
            own = [field.name for field in schema if pa.types.is_floating(field.type)]
            sets = [one for one in added_sets(folder) if one.covers([f.stem for f in files])]
            self.scores = [*own, *(name for one in sets for name in one.columns)]
            self._known = set(schema.names)
            self._load(files, selection, own)
            self._add(sets, files, len(own))
        except (duckdb.Error, pa.ArrowInvalid, OSError) as error:
            raise CorruptShard(
                f"the ledger cannot be read ({str(error).splitlines()[0]})", where=str(folder), remedy="Run make again"
            ) from error
        # From here on nothing but the tables can be reached, whatever a query says.
        self._base.execute("SET enable_external_access = false")
        self.total = int(self._rows("SELECT count(*) FROM e")[0][0])
        self.taken_in = bool(self._rows("SELECT raw IS NOT NULL FROM e WHERE raw IS NOT NULL LIMIT 1"))
        """Pictures that came with texts of their own."""
        self.alive = int(self._rows("SELECT count(*) FROM e WHERE outcome <> ?", [DEAD])[0][0])
        """Rows that a person can decide about; a dead row has no picture."""
        # Sixty thumbnails ask for sixty ids: a sorted list of hashes finds each at once, where a query would read every id.
        hashes = np.asarray(self._base.execute("SELECT hash(id) AS h FROM e").fetchnumpy()["h"], np.uint64)
        self._by_hash = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._by_hash]
        self._views: OrderedDict[str, View] = OrderedDict()
        self._orders: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._captions = 0
        self._recent: dict[str, str] = {}
        self._lock = threading.Lock()

    def _load(self, entries: list[Path], selection: Path, own: list[str]) -> None:
        files = [str(entry) for entry in entries]
        scores = "".join(f', e."{_quoted(name)}" AS s{i}' for i, name in enumerate(own))
        origin = "coalesce(json_extract_string(e.source, '$.name'), json_extract_string(e.source, '$.url'))"
        further = [("raw_caption", "e.raw_caption", "raw"), ("crop", "e.crop", "crop"), ("source", origin, "origin")]
        more = "".join(f", {what if own in self._known else 'NULL::VARCHAR'} AS {name}" for own, what, name in further)
        columns = f'e.id, e.unit, e.prompt, e."group" AS grp, e.attributes, e.seed{more}{scores}'
        source = "read_parquet($files)"
        if not selection.exists():
            self._base.execute(
                f"CREATE TABLE e AS SELECT {columns}, e.outcome, e.reason FROM {source} e", {"files": files}
            )
        else:
            given = {"files": files, "selection": str(selection)}
            # Select writes in the order of the ledger; a join by place costs nothing, one by id seconds at a million rows.
            self._base.execute(
                f"CREATE TABLE e AS SELECT {columns}, s.outcome, s.reason, s.id AS same "
                f"FROM {source} e POSITIONAL JOIN read_parquet($selection) s",
                given,
            )
            if self._rows("SELECT count(*) FROM e WHERE id IS DISTINCT FROM same")[0][0]:
                self._base.execute(
                    f"CREATE OR REPLACE TABLE e AS SELECT {columns}, coalesce(s.outcome, e.outcome) AS outcome, "
                    f"coalesce(s.reason, e.reason) AS reason FROM {source} e "
                    "LEFT JOIN read_parquet($selection) s USING (id) ORDER BY e.unit, e.id",
                    given,
                )
        self._base.execute(
            "CREATE TABLE a AS WITH d AS (SELECT DISTINCT attributes FROM e WHERE json_valid(attributes)) "
            "SELECT d.attributes, j.key AS name, j.value ->> '$' AS value FROM d, json_each(d.attributes) j"
        )
        self._base.execute("CREATE TABLE p (place BIGINT PRIMARY KEY, verdict VARCHAR, caption VARCHAR)")

    def _add(self, sets: list[Added], entries: list[Path], first: int) -> None:
        """Finished sets of scores that stand beside the ledger, as the scores from number `first` on. Raises LedgerConflict if they are of
        other pictures."""
        if not sets:
            return
        ledger = pa.concat_tables(read_table(entry, ["id", "unit", "pictures_sha256"]) for entry in entries)
        columns = {f"s{first + i}": values for i, (_, values) in enumerate(added_to(sets, ledger))}
        self._base.register("added", pa.table({"id": ledger["id"], **columns}))
        what = ", ".join(f"x.{name}" for name in columns)
        # In the order of the ledger too, unless a selection of another order brought the table into one of its own.
        self._base.execute(f"CREATE TABLE f AS SELECT e.*, {what}, x.id AS scored FROM e POSITIONAL JOIN added x")
        if self._rows("SELECT count(*) FROM f WHERE id IS DISTINCT FROM scored")[0][0]:
            self._base.execute(
                f"CREATE OR REPLACE TABLE f AS SELECT e.*, {what} FROM e LEFT JOIN added x USING (id) ORDER BY e.rowid"
            )
        self._base.execute("DROP TABLE e")
        self._base.execute("ALTER TABLE f RENAME TO e")
        self._base.unregister("added")

    def _rows(self, sql: str, given: Any = None) -> list[tuple[Any, ...]]:
        return self._base.cursor().execute(sql, given or []).fetchall()

    def choices(self) -> dict[str, Any]:
        """What the filters can offer: values with their counts, and the range of each score."""
        attributes: dict[str, list[tuple[str, int]]] = {}
        counted = self._rows(
            "WITH n AS (SELECT attributes, count(*) AS n FROM e GROUP BY attributes), "
            "v AS (SELECT name, value, sum(n)::BIGINT AS total FROM a JOIN n USING (attributes) "
            "WHERE value IS NOT NULL GROUP BY name, value) "
            "SELECT * FROM v QUALIFY row_number() OVER (PARTITION BY name ORDER BY total DESC, value) <= ? "
            "ORDER BY name, total DESC, value",
            [MAX_VALUES],
        )
        for name, value, count in counted:
            attributes.setdefault(name, []).append((value, count))
        return {
            "attributes": attributes,
            "groups": self._rows("SELECT grp, count(*) FROM e GROUP BY 1 ORDER BY 2 DESC LIMIT 300"),
            "crops": self._rows("SELECT crop, count(*) FROM e WHERE crop IS NOT NULL GROUP BY 1 ORDER BY 2 DESC"),
            "outcomes": self._rows("SELECT outcome, count(*) FROM e GROUP BY 1 ORDER BY 2 DESC"),
            "reasons": self._rows(
                "SELECT reason, count(*) FROM e WHERE reason <> '' GROUP BY 1 ORDER BY 2 DESC LIMIT 100"
            ),
            "scores": {name: self._histogram(i) for i, name in enumerate(self.scores)},
        }

    def _histogram(self, score: int, bars: int = 40) -> dict[str, Any]:
        values = self._score(score)
        values = values[np.isfinite(values)]
        if not len(values):
            return {"min": 0.0, "max": 0.0, "bars": []}
        counts, edges = np.histogram(values, bars)
        return {"min": float(edges[0]), "max": float(edges[-1]), "bars": counts.tolist()}

    def note(self, decisions: list[Decision]) -> None:
        """Let filters know what people decided."""
        with self._lock:
            cursor = self._base.cursor()
            latest = list({d.id: d for d in decisions}.values())
            if len(latest) <= 50:
                for d in latest:
                    if (place := self._place(d.id)) is not None:
                        cursor.execute("INSERT OR REPLACE INTO p VALUES (?, ?, ?)", [place, d.verdict, d.caption])
            else:
                fresh = {name: pa.array([getattr(d, name) for d in latest], pa.string()) for name in _NOTED}
                cursor.register("fresh", pa.table(fresh))
                cursor.execute(
                    "INSERT OR REPLACE INTO p SELECT e.rowid, f.verdict, f.caption FROM fresh f JOIN e USING (id)"
                )
                cursor.unregister("fresh")
            self._captions = self._rows("SELECT count(*) FROM p WHERE caption IS NOT NULL")[0][0]

    def view(self, wanted: Filter) -> View:
        """The places that match now. Raises ValueError for a score that is not there."""
        where, given = self._where(wanted)
        scored, unscored = self._order(wanted.sort)
        if where:
            found = self._base.cursor().execute(f"SELECT rowid AS place FROM e WHERE {where}", given).fetchnumpy()
            mask = np.zeros(self.total, bool)
            mask[found["place"]] = True
            scored, unscored = scored[mask[scored]], unscored[mask[unscored]]
        view = View(np.concatenate([scored[::-1] if wanted.descending else scored, unscored]))
        with self._lock:
            self._views[view.key] = view
            while len(self._views) > _VIEWS:
                self._views.popitem(last=False)
        return view

    def kept_view(self, key: str) -> View | None:
        """A view of earlier, unless many came after it."""
        with self._lock:
            if key in self._views:
                self._views.move_to_end(key)
            return self._views.get(key)

    def page(self, view: View, start: int, count: int) -> list[dict[str, Any]]:
        """Rows `start` ... of a view, in its order."""
        places = [int(p) for p in view.places[start : start + count]]
        found = {row["place"]: row for row in self._fetch("rowid IN (SELECT unnest(?::BIGINT[]))", [places])}
        with self._lock:  # The page asks for these pictures next.
            self._recent |= {row["id"]: row["unit"] for row in found.values()}
            while len(self._recent) > _RECENT:
                del self._recent[next(iter(self._recent))]
        return [found[p] for p in places]

    def unit(self, key: str) -> str | None:
        """The work unit that an id belongs to."""
        if (recent := self._recent.get(key)) is not None:
            return recent
        row = self.row(key)
        return row["unit"] if row else None

    def row(self, key: str) -> dict[str, Any] | None:
        """The row of an id."""
        place = self._place(key)
        return None if place is None else self._fetch("rowid = ?", [place])[0]

    def more(self, key: str) -> dict[str, Any] | None:
        """What else is known of a taken-in picture, read from its unit: size before the crop, where it lies, metadata."""
        unit = self.unit(key)
        names = [name for name in ("id", "width_px", "height_px", "source") if name in self._known]
        if unit is None:
            return None
        table = pq.read_table(self._folder / "ledger" / f"{unit}.parquet", columns=names)
        found = next((row for row in table.to_pylist() if row["id"] == key), {})
        source = json.loads(found.get("source") or "{}")
        file = str(source.get("file", "")).partition("?")[0]  # what follows in a URL may be a key
        return {
            "size": [found.get("width_px"), found.get("height_px")],
            "source": source.get("url") or (f"{file}#{source['at']}" if file else ""),
            "metadata": source.get("metadata", {}),
        }

    def _place(self, key: str) -> int | None:
        wanted = np.uint64(self._rows("SELECT hash(?)", [key])[0][0])
        first, last = (int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        for place in map(int, self._by_hash[first:last]):
            if self._rows("SELECT id FROM e WHERE rowid = ?", [place])[0][0] == key:
                return place
        return None

    def _fetch(self, where: str, given: list[Any]) -> list[dict[str, Any]]:
        scores = "".join(f", s{i}" for i in range(len(self.scores)))
        rows = self._rows(
            f"SELECT rowid, id, unit, prompt, grp, attributes, outcome, reason, seed, raw, crop, origin{scores} FROM e WHERE {where}",
            given,
        )
        names = ("place", "id", "unit", "prompt", "group", "attributes", "outcome", "reason", "seed", "raw_caption")
        names += ("crop", "original_path")
        return [
            {
                **dict(zip(names, row, strict=False)),
                "scores": dict(zip(self.scores, (_plain(s) for s in row[len(names) :]), strict=True)),
            }
            for row in rows
        ]

    def _order(self, sort: str) -> tuple[np.ndarray, np.ndarray]:
        """Places in ascending order, and those without a score, which come last whichever way. Computed once. Raises ValueError."""
        if sort not in ("plan", "shuffle", *self.scores):
            raise ValueError(f"there is no order {sort!r}")
        if sort not in self._orders:
            scored = self.total
            if sort == "plan":
                order = np.arange(self.total)
            elif sort == "shuffle":
                order = np.random.default_rng(_SHUFFLE_SEED).permutation(self.total)
            else:
                values = self._score(self.scores.index(sort))
                order, scored = np.argsort(values, kind="stable"), self.total - int(np.isnan(values).sum())
            order = order.astype(np.int32)
            self._orders[sort] = order[:scored], order[scored:]
        return self._orders[sort]

    def _score(self, number: int) -> np.ndarray:
        found = self._base.cursor().execute(f"SELECT coalesce(s{number}, 'nan'::DOUBLE) AS s FROM e").fetchnumpy()["s"]
        return np.asarray(found, np.float64)

    def _where(self, wanted: Filter) -> tuple[str, list[Any]]:
        parts: list[str] = []
        given: list[Any] = []
        for name, (least, most) in wanted.scores.items():
            if name not in self.scores:
                raise ValueError(f"there is no score {name!r}")
            for sign, bound in ((">=", least), ("<=", most)):
                if bound is not None:
                    # isnan: DuckDB holds NaN for the largest number.
                    parts.append(f"(s{self.scores.index(name)} {sign} ? AND NOT isnan(s{self.scores.index(name)}))")
                    given.append(bound)
        for name, values in wanted.attributes.items():
            if values:
                parts.append("attributes IN (SELECT attributes FROM a WHERE name = ? AND value IN (SELECT unnest(?)))")
                given += [name, values]
        given_once = {"grp": wanted.group, "outcome": wanted.outcome, "reason": wanted.reason, "crop": wanted.crop}
        for column, value in given_once.items():
            if value:
                parts.append(f"{column} = ?")
                given.append(value)
        if not wanted.outcome and self.alive < self.total:
            parts.append("outcome <> ?")
            given.append(DEAD)
        for word in wanted.text.lower().split():
            either = ["contains(lower(prompt), ?)"]
            if self.taken_in:
                either += ["contains(lower(raw), ?)", "contains(lower(origin), ?)"]
            if _ID_START.fullmatch(word):
                either.append("starts_with(id, ?)")
            if self._captions:
                either.append("rowid IN (SELECT place FROM p WHERE contains(lower(caption), ?))")
            parts.append(f"({' OR '.join(either)})")
            given += [word] * len(either)
        if wanted.people == "open":
            parts.append("rowid NOT IN (SELECT place FROM p WHERE verdict IS NOT NULL)")
        elif wanted.people == "caption":
            parts.append("rowid IN (SELECT place FROM p WHERE caption IS NOT NULL)")
        elif wanted.people:
            parts.append("rowid IN (SELECT place FROM p WHERE verdict = ?)")
            given.append(wanted.people)
        return " AND ".join(parts), given


def _selection(folder: Path, view: str) -> Path:
    if not view:
        return folder / SELECTION
    from factory.views import view_folder  # it knows packing and cards, for which the page need not wait

    return view_folder(folder, view) / SELECTION


def _quoted(name: str) -> str:
    return name.replace('"', '""')


def _plain(score: float | None) -> float | None:
    return None if score is None or not np.isfinite(score) else float(score)
