"""What is left to do is known from one listing, and read from the plan without holding it whole."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import CorruptShard, LedgerConflict
from cluster.stage import PENDING, Row
from cluster.storage import publish_bytes
from factory.ledger import commit_unit, read_entry, read_pictures
from factory.plan import PLAN
from factory.units import planned_units, read_units, unit_sizes, units_left


def plan(folder: Path, rows: int, row_group: int = 1 << 20) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": [str(i) for i in range(rows)]}), folder / PLAN, row_group_size=row_group)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 4096, 4097, 10_001])
@pytest.mark.parametrize("row_group", [100, 1 << 20])
def test_units_are_read_as_they_were_planned(tmp_path: Path, rows: int, row_group: int) -> None:
    plan(tmp_path, rows, row_group)
    whole = planned_units(tmp_path, 8)
    assert sum(unit_sizes(tmp_path, 8)) == rows
    numbers = units_left(tmp_path, 8)
    assert list(read_units(tmp_path, 8, numbers)) == whole
    for some in (numbers[::3], numbers[-1:], numbers[600:602], []):
        assert list(read_units(tmp_path, 8, some)) == [whole[number] for number in some]


def test_a_unit_may_be_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    plan(tmp_path, 30_000)
    assert list(read_units(tmp_path, 9000, [1, 3])) == [planned_units(tmp_path, 9000)[i] for i in (1, 3)]


def test_what_the_ledger_holds_is_not_left(tmp_path: Path) -> None:
    plan(tmp_path, 33)
    (tmp_path / "ledger").mkdir()
    for name in ("unit-00001.parquet", "unit-00004.parquet", ".unit-00002.parquet.partial-1-ab", "unit-00003.txt"):
        (tmp_path / "ledger" / name).touch()
    assert units_left(tmp_path, 8) == [0, 2, 3]


def rows(picture: bytes) -> list[Row]:
    made = {"id": "0" * 64, "unit": "unit-00000", "prompt": "a fox", "outcome": PENDING, "reason": ""}
    return [{**made, "picture": picture}]


def test_a_unit_that_comes_out_otherwise_leaves_what_is_there(tmp_path: Path) -> None:
    commit_unit(tmp_path, rows(b"first"))
    commit_unit(tmp_path, rows(b"first"))
    with pytest.raises(LedgerConflict, match="committed before with other contents"):
        commit_unit(tmp_path, rows(b"other"))
    (entry,) = read_entry(tmp_path, "unit-00000")
    assert list(read_pictures(tmp_path, "unit-00000", entry["pictures_sha256"])) == [("0" * 64, b"first")]


def test_of_two_who_commit_other_contents_at_once_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's entry comes between this one's look at the ledger and its own entry."""

    def publish(path: Path, data: bytes) -> str:
        publish_bytes(tmp_path / "ledger" / "unit-00000.parquet", b"another's")
        return publish_bytes(path, data)

    monkeypatch.setattr("factory.ledger.publish_bytes", publish)
    with pytest.raises(LedgerConflict, match="committed before with other contents"):
        commit_unit(tmp_path, rows(b"mine"))
    assert (tmp_path / "ledger" / "unit-00000.parquet").read_bytes() == b"another's"


def test_a_damaged_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / PLAN).write_bytes(b"PAR1 no")
    with pytest.raises(CorruptShard, match=r"plan\.parquet"):
        units_left(tmp_path, 8)
