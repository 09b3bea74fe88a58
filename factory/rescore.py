"""A further scorer for pictures that are made: `edgefusion factory score`. Kill it anywhere; the same command goes on, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.errors import LedgerConflict, RecipeError
from cluster.runner import Runner
from cluster.stage import DEAD, PENDING, Row, Stage, Unit
from cluster.storage import publish_bytes, sweep_partials
from factory.added import PICTURES, SCORER, SCORES, Added, added_sets, is_of
from factory.ledger import ENTRY, read_entry, read_pictures
from factory.models import fingerprint, set_threads
from factory.plan import table_bytes
from factory.recipe import AestheticScorer, MakeRecipe, ScorerRecipe
from factory.scorers import Batch, OpenedScorers, scores_of
from factory.stages import decode_picture, score_columns
from factory.units import plan_units, read_table, units_left


def add_scores(
    make: MakeRecipe,
    data: Path,
    scorer: ScorerRecipe,
    runner: Runner,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Added, int]:
    """Score every unit of the ledger in `data` that the scorer has not seen; `make` made it. Returns the set and how many were scored now.

    Raises RecipeError for a scorer whose columns are there already, LedgerConflict if others are half way in its place.
    """
    alone = make.model_copy(update={"scores": [scorer]})
    one = _claim(make, alone, data, scorer)
    sweep_partials(one.folder)
    left = set(units_left(data, make.unit_images))
    there = [name for number, (name, _) in enumerate(plan_units(data, make.unit_images)) if number not in left]
    todo = [name for name in there if not (one.file(name).exists() and is_of(one.file(name), _pictures_of(data, name)))]
    stage = Stage(
        "score", lambda: _Look(alone, data, one), make.score_workers, cpus=0.5, gpus=make.score_gpus, whole=True
    )
    units = (Unit(name, [{"id": name, "outcome": PENDING}]) for name in todo)
    for done, _ in enumerate(runner.run([stage], units), 1):
        progress(done, len(todo))
    return one, len(todo)


def _claim(make: MakeRecipe, alone: MakeRecipe, data: Path, scorer: ScorerRecipe) -> Added:
    columns = tuple(scores_of(alone))
    taken = {*ENTRY.names, *scores_of(make)} & set(columns)
    taken |= {name for one in added_sets(data) if one.name != columns[0] for name in one.columns} & set(columns)
    if taken:
        raise RecipeError(
            f"the data set has a score {min(taken)} already",
            where=str(data),
            remedy="Give the scorer a prefix: {kind: ..., prefix: new_}",
        )
    mark = fingerprint(scorer.weights, scorer.revision) if isinstance(scorer, AestheticScorer) else ""
    told = {"scorer": scorer.model_dump(mode="json"), "mark": mark, "columns": list(columns)}
    one = Added(data / SCORES / columns[0], told["scorer"], mark, columns)
    text = (json.dumps(told, indent=2, sort_keys=True) + "\n").encode()
    path = one.folder / SCORER
    if path.exists() and path.read_bytes() != text:
        raise LedgerConflict(
            "another scorer, or the same with other options or weights, gave these scores",
            where=str(path),
            remedy=f"Give the new one a prefix, or delete {one.folder} to score anew",
        )
    publish_bytes(path, text)
    return one


def _pictures_of(data: Path, unit: str) -> str:
    return read_table(data / "ledger" / f"{unit}.parquet", ["pictures_sha256"])["pictures_sha256"][0].as_py() or ""


class _Look:
    """Opens the pictures of a unit, whose name is the row's id, and publishes its scores."""

    def __init__(self, make: MakeRecipe, data: Path, one: Added) -> None:
        set_threads(make.threads)
        self.data, self.one, self.schema = data, one, score_columns(make)
        self.scorer = OpenedScorers(make)

    def __call__(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            self._unit(row["id"])
        return rows

    def _unit(self, unit: str) -> None:
        entries = read_entry(self.data, unit)
        sha256 = entries[0]["pictures_sha256"]
        pictures = dict(read_pictures(self.data, unit, sha256))
        alive = [row for row in entries if row["outcome"] != DEAD and row["id"] in pictures]
        given = dict(zip((row["id"] for row in alive), self.scorer(_batch(alive, pictures)), strict=True))
        empty = dict.fromkeys(self.schema.names)
        found = [{"id": row["id"], **empty, **given.get(row["id"], {})} for row in entries]
        schema = pa.schema([pa.field("id", pa.string()), *self.schema], metadata={PICTURES: sha256.encode()})
        publish_bytes(self.one.file(unit), table_bytes(pa.Table.from_pylist(found, schema=schema)))


def _batch(rows: list[Row], pictures: dict[str, bytes]) -> Batch:
    """Embeddings are those of the ledger: float16 of what `make` saw, so their scores may differ in the last digits from make's own."""
    seen = [np.frombuffer(row["embedding"] or b"", np.float16).astype(np.float32) for row in rows]
    found = np.stack(seen) if seen else np.zeros((0, 0), np.float32)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return Batch(
        [decode_picture(pictures[row["id"]]) for row in rows],
        [row["prompt"] for row in rows],
        found / np.maximum(length, 1e-6),
    )
