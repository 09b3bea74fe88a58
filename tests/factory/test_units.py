"""Plans whose ids are more than one Arrow array of texts can hold."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factory.index import _coded, _large
from factory.plan import PLAN
from factory.units import cut_ids, plan_units

OVER_BYTES = 1 << 31


def test_ids_of_over_2_gib_are_cut_into_units() -> None:
    """Few and very long ones, the same 34 times, which takes the memory of one time."""
    some = [str(i) + "0" * (1 << 20) for i in range(64)]
    ids = pa.chunked_array([pa.array(some)] * 34)
    assert ids.nbytes > OVER_BYTES
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        ids.combine_chunks()
    units = list(cut_ids(ids, 65))
    assert [len(unit) for unit in units] == [65] * 33 + [31]
    assert [unit[0].as_py()[:2] for unit in units[:9]] == [f"{i}0" for i in range(9)]


def test_units_reach_over_the_row_groups_of_the_plan(tmp_path: Path) -> None:
    ids = [f"{i:064x}" for i in range(24)]
    pq.write_table(pa.table({"id": ids}), tmp_path / PLAN, row_group_size=5)
    found = plan_units(tmp_path, 7)
    assert [name for name, _ in found] == [f"unit-{i:05d}" for i in range(4)]
    assert [unit.to_pylist() for _, unit in found] == [ids[i : i + 7] for i in range(0, 24, 7)]
    assert all(isinstance(unit, pa.ChunkedArray) for _, unit in found), "nothing was put into one piece"


def test_texts_of_over_2_gib_become_codes() -> None:
    texts = ["a" * (2 << 20), "b" * (2 << 20), *("c" * (1 << 20) + str(i) for i in range(60))]
    column = pa.chunked_array([pa.array([*texts, None])] * 34)
    assert column.nbytes > OVER_BYTES
    codes, values = _coded(_large(column))
    assert values.to_pylist() == texts
    assert codes.tolist() == [*range(62), -1] * 34
    empty, nothing = _coded(_large(pa.chunked_array([], pa.string())))
    assert len(empty) == len(nothing) == 0
