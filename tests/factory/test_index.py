"""The index is a copy of the ledger: as good as the ledger, never staler."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import CorruptShard, LedgerConflict, RecipeError
from cluster.storage import publish_bytes
from factory import index
from factory.index import load_columns
from factory.plan import PLAN, table_bytes
from factory.recipe import SelectRecipe
from factory.select import select
from factory.units import read_table

UNIT_IMAGES = 8


def texts(found) -> list[str]:
    return [found.values[code] for code in found.codes]


def test_it_says_what_the_ledger_says(dataset: Path, ids: list[str]) -> None:
    for _ in range(2):  # made, then read back
        columns = load_columns(dataset, UNIT_IMAGES)
        ledger = [row for path in sorted((dataset / "ledger").iterdir()) for row in pq.read_table(path).to_pylist()]
        assert columns.ids.astype(str).tolist() == ids == [row["id"] for row in ledger]
        for name in ("outcome", "reason", "group", "attributes"):
            assert texts(getattr(columns, name)) == [row[name] or "" for row in ledger]
        assert columns.has_text.all() and (columns.edge_px > 1 << 20).all()
        assert [f"{h:016x}" for h in columns.hashes.tolist()] == [row["phash"] or "0" * 16 for row in ledger]
        assert [bytes(c) for c in columns.colours] == [row["colours"] or bytes(12) for row in ledger]
        assert np.flatnonzero(columns.made < 0).tolist() == [5] and len(set(columns.made.tolist())) == 24
        assert set(columns.scores) == {"clip_score", "raw_clip_score"}
        assert columns.scores["clip_score"][7] == 7 / 23 and np.isnan(columns.scores["clip_score"][5])
        assert columns.embeddings() is None


def test_a_unit_made_anew_is_read_anew(dataset: Path) -> None:
    load_columns(dataset, UNIT_IMAGES)
    entry = dataset / "ledger" / "unit-00001.parquet"
    table = pq.read_table(entry)
    place = table.schema.get_field_index("clip_score")
    publish_bytes(entry, table_bytes(table.set_column(place, "clip_score", pa.array([9.0] * 8))))
    assert load_columns(dataset, UNIT_IMAGES).scores["clip_score"][8:16].tolist() == [9.0] * 8


def test_a_damaged_or_missing_copy_is_made_anew_but_a_ledger_is_not(dataset: Path) -> None:
    load_columns(dataset, UNIT_IMAGES)
    part = dataset / "index" / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert load_columns(dataset, UNIT_IMAGES).scores["clip_score"][7] == 7 / 23
    assert part.read_bytes() == whole
    entry = dataset / "ledger" / "unit-00002.parquet"
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.raises(CorruptShard, match="unit-00002"):
        load_columns(dataset, UNIT_IMAGES)
    entry.unlink()
    with pytest.raises(CorruptShard, match=r"unit-00002.*missing"):
        load_columns(dataset, UNIT_IMAGES)


def test_an_entry_of_another_plan_is_refused(dataset: Path) -> None:
    plan = read_table(dataset / PLAN)
    publish_bytes(dataset / PLAN, table_bytes(plan.take([*range(8), 9, 8, *range(10, 24)])))
    with pytest.raises(LedgerConflict, match=r"unit-00001\.parquet: belongs to another plan"):
        load_columns(dataset, UNIT_IMAGES)


def test_a_ledger_without_digests_takes_them_from_the_pictures(dataset: Path) -> None:
    wanted = load_columns(dataset, UNIT_IMAGES).made
    for entry in (dataset / "ledger").iterdir():
        publish_bytes(entry, table_bytes(pq.read_table(entry).drop_columns(["made_sha256"])))
    assert load_columns(dataset, UNIT_IMAGES).made.tolist() == wanted.tolist()
    table = pq.read_table(dataset / "index" / "part-00000.parquet")
    pictures = pq.read_table(dataset / "pictures" / "unit-00000.parquet").to_pylist()
    assert table["made_sha256"][0].as_py() == hashlib.sha256(pictures[0]["picture"]).hexdigest()


def give_embeddings(dataset: Path, vectors: np.ndarray, dead: set[int]) -> None:
    """Into the ledger, but for the rows that are dead: N x D float16."""
    for number, entry in enumerate(sorted((dataset / "ledger").iterdir())):
        table, rows = pq.read_table(entry), range(8 * number, 8 * number + 8)
        cells = pa.array([None if row in dead else vectors[row].tobytes() for row in rows], pa.binary())
        outcomes = pa.array(["dead" if row in dead else "made" for row in rows])
        for name, column in (("embedding", cells), ("outcome", outcomes)):
            table = table.set_column(table.schema.get_field_index(name), name, column)
        publish_bytes(entry, table_bytes(table))


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_part_that_died_whole_hides_no_embeddings(dataset: Path, monkeypatch: pytest.MonkeyPatch, unit: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float16)
    give_embeddings(dataset, vectors, {5, *range(8 * unit, 8 * unit + 8)})
    monkeypatch.setattr(index, "_PART_UNITS", 1)
    columns = load_columns(dataset, UNIT_IMAGES)
    embeddings = columns.embeddings()
    assert embeddings is not None and embeddings.dimensions == 6
    lengths = np.linalg.norm(embeddings.read(np.arange(24)), axis=1)
    assert np.allclose(lengths, [0 if row == 5 or row // 8 == unit else 1 for row in range(24)], atol=1e-6)
    kept = select(columns, SelectRecipe(min_clip=-1, same_meaning=0.999, max_hamming_bits=None)).kept
    assert kept.sum() == (16 if unit == 0 else 15)


def test_living_rows_without_embeddings_are_told(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float16)
    give_embeddings(dataset, vectors, {5, *range(8, 16)})
    entry = dataset / "ledger" / "unit-00001.parquet"
    table = pq.read_table(entry)
    alive = pa.array(["made", *["dead"] * 7])
    publish_bytes(entry, table_bytes(table.set_column(table.schema.get_field_index("outcome"), "outcome", alive)))
    monkeypatch.setattr(index, "_PART_UNITS", 1)
    columns = load_columns(dataset, UNIT_IMAGES)
    assert columns.embeddings() is None
    with pytest.raises(RecipeError, match="holds no embeddings"):
        select(columns, SelectRecipe(same_meaning=0.9))


def test_parts_join_and_embeddings_come_by_row(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((24, 6)).astype(np.float16)
    for number, entry in enumerate(sorted((dataset / "ledger").iterdir())):
        table = pq.read_table(entry)
        cells = pa.array([None if 8 * number + i == 5 else vectors[8 * number + i].tobytes() for i in range(8)])
        place = table.schema.get_field_index("embedding")
        publish_bytes(entry, table_bytes(table.set_column(place, "embedding", cells.cast(pa.binary()))))
    monkeypatch.setattr(index, "_PART_UNITS", 2)
    columns = load_columns(dataset, UNIT_IMAGES)
    embeddings = columns.embeddings()
    assert len(columns) == 24 and len(columns.parts) == 2 and embeddings is not None
    rows = np.array([23, 0, 16, 15, 5])
    wanted = vectors[rows].astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    wanted[4] = 0
    assert np.allclose(embeddings.read(rows), wanted, atol=1e-6)
