"""Poison in make: the law holds, the rest is the same bytes, and retry-failed mends it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.heartbeat import HEARTBEAT
from cluster.machine import this_machine
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, InProcess, OnRay
from cluster.stage import DEAD, PENDING, Row, Stage
from cluster.storage import publish_bytes
from factory.cli import app
from factory.dead import all_through, captions_before, write_letters
from factory.index import Columns, to_columns
from factory.ledger import commit_unit, read_entry
from factory.make import make as factory_make
from factory.plan import PLAN, PLAN_SCHEMA, table_bytes
from factory.recipe import MakeRecipe, SelectRecipe
from factory.retry import reopen_dead
from factory.select import select
from factory.stages import _Caption, encode_picture
from factory.units import plan_units, planned_units

UNIT_IMAGES = 8


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A data set of 24 planned samples, one dead in the plan."""
    data = tmp_path / "out" / "dataset"
    rows = [
        {"id": f"{i:064x}", "prompt": f"p{i}", "group": "g", "attributes": "{}", "seed": i}
        | ({"outcome": DEAD, "reason": "plan: bad"} if i == 20 else {"outcome": PENDING, "reason": ""})
        for i in range(24)
    ]
    publish_bytes(data / PLAN, table_bytes(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)))
    return data


def stages(data: Path, deadly: int | None) -> list[Stage]:
    def render(rows: list[Row]) -> list[Row]:
        if any(row["seed"] == deadly for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return [{**row, "picture": row["prompt"].encode(), "clip_score": 0.5} for row in rows]

    def commit(rows: list[Row]) -> list[Row]:
        commit_unit(data, rows)
        return rows

    return [Stage("render", lambda: render, cpus=0.5), Stage("commit", lambda: commit, cpus=0.5, whole=True)]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int | None], list[Row]]:
    """The factory's own `make` with stages of this file; on Ray if a sample is deadly."""

    def run(data: Path, deadly: int | None) -> list[Row]:
        monkeypatch.setattr("factory.make.make_stages", lambda _recipe, folder: stages(folder, deadly))
        recipe: Any = SimpleNamespace(
            plan=SimpleNamespace(images_per_prompt=1),
            make=MakeRecipe.model_validate(
                {
                    "teacher": {"model": "owner/teacher", "batch_images": 1},
                    "scorer": {"model": "owner/clip"},
                    "unit_images": UNIT_IMAGES,
                }
            ),
            select=SelectRecipe(),
        )
        runner = InProcess() if deadly is None else OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test"))
        try:
            factory_make(recipe, data, runner)
        finally:
            runner.close()
        return [row for unit, _ in plan_units(data, UNIT_IMAGES) for row in read_entry(data, unit)]

    return run


def files(data: Path) -> dict[str, bytes]:
    """But `index`, which holds what can be made again at any time."""
    found = (p for p in sorted(data.rglob("*")) if p.is_file() and p.parent.name != "index")
    return {str(p.relative_to(data)): p.read_bytes() for p in found}


@pytest.mark.long
@pytest.mark.ray
def test_a_deadly_sample_is_a_dead_letter_until_it_is_tried_again(planned: Path, make) -> None:
    entries = make(planned, deadly=11)
    assert len(entries) == 24
    dead = {row["seed"]: row["reason"] for row in entries if row["outcome"] == DEAD}
    assert dead == {11: "render: killed its worker 2 times", 20: "plan: bad"}
    before = files(planned)

    (planned / "manifest.parquet").write_bytes(b"any")
    assert reopen_dead(planned.parent) == (1, 1)
    assert not (planned / "manifest.parquet").exists()
    entries = make(planned, deadly=None)
    assert [row["seed"] for row in entries if row["outcome"] == DEAD] == [20]
    after = files(planned)
    changed = {name for name in after if after[name] != before.get(name)}
    assert set(after) - set(before) == {"tried.jsonl"}
    assert {name for name in changed if name in before} == {"ledger/unit-00001.parquet", "pictures/unit-00001.parquet"}
    assert reopen_dead(planned) == (0, 0)


def test_nothing_is_taken_back_under_a_trained_student(planned: Path) -> None:
    units = planned_units(planned, UNIT_IMAGES)
    commit_unit(planned, [{**row, "outcome": DEAD, "reason": "render: ValueError"} for row in units[0].rows])
    (planned.parent / "training").mkdir()
    with pytest.raises(LedgerConflict, match="training there was made"):
        reopen_dead(planned.parent)
    assert (planned / "ledger" / "unit-00000.parquet").exists()
    (planned.parent / "training").rmdir()
    assert reopen_dead(planned.parent) == (8, 1)


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    texts = {name: [row[name] for row in rows] for name in ("id", "outcome", "reason", "group", "attributes")}
    count = len(rows)
    more = {
        "has_text": [True] * count,
        "has_raw_text": [False] * count,
        "edge_px": [9] * count,
        "hash": pa.array(range(count), pa.uint64()),
        "colours": pa.array([bytes(12)] * count, pa.binary(12)),
        "made_sha256": pa.array([None if row["outcome"] == DEAD else row["id"] for row in rows], pa.string()),
    }
    return to_columns(pa.table({**texts, **more, "clip_score": [0.5] * count}))


def test_dead_letters_say_stage_error_and_attempt(planned: Path) -> None:
    units = planned_units(planned, UNIT_IMAGES)
    for unit in units:
        died = {"outcome": DEAD, "reason": "render: ValueError: no: luck"}
        commit_unit(planned, [{**row, **(died if row["seed"] == 11 else {})} for row in unit.rows])

    def letters() -> list[dict[str, Any]]:
        entries = [row for path in sorted((planned / "ledger").iterdir()) for row in pq.read_table(path).to_pylist()]
        write_letters(planned, select(columns_of(entries), SelectRecipe(max_hamming_bits=None, min_clip=-1)))
        return pq.read_table(planned / "dead.parquet").to_pylist()

    first = {"id": f"{11:064x}", "stage": "render", "error": "ValueError: no: luck", "attempt": 1}
    bad = {"id": f"{20:064x}", "stage": "plan", "error": "bad", "attempt": 1}
    assert letters() == [first, bad]
    for attempt in (2, 3):
        assert reopen_dead(planned) == (1, 1)
        assert captions_before(planned, "unit-00001") == {f"{i:064x}": f"p{i}" for i in range(8, 16) if i != 11}
        commit_unit(planned, [{**row, **(died if row["seed"] == 11 else {})} for row in units[1].rows])
        assert letters() == [{**first, "attempt": attempt}, bad]
    all_through(planned)
    assert captions_before(planned, "unit-00001") == {}


def test_captions_of_the_living_are_not_asked_for_again(planned: Path) -> None:
    """A unit is reopened for its dead; the captioner sees those alone, and the captions of the others stay."""
    unit = planned_units(planned, UNIT_IMAGES)[0]
    rows = [{**row, "prompt": f"old {row['seed']}"} for row in unit.rows]
    rows[2] |= {"outcome": DEAD, "reason": "caption: TimeoutError: x"}
    commit_unit(planned, rows)
    reopen_dead(planned)
    stage, asked = _Caption.__new__(_Caption), []
    stage.folder, stage.asked, stage.budget, stage.device_s = planned, planned / "captions", None, 0.0

    class Model:
        def note_usage(self, place: Path) -> None:
            """Nothing is charged here."""

        def describe(self, pictures: list) -> list[str]:
            asked.append(len(pictures))
            return [f"new {i}" for i in range(len(pictures))]

    stage.model = Model()  # pyright: ignore[reportAttributeAccessIssue]
    picture = encode_picture(np.zeros((8, 8, 3), np.uint8), "png")
    given = [{**row, "prompt": "raw", "picture": picture} for row in unit.rows]
    found = [row["prompt"] for row in stage(given)]
    assert asked == [1] and found == ["old 0", "old 1", "new 0", *(f"old {i}" for i in range(3, 8))]
    assert [row["prompt"] for row in stage(given[:2])] == ["old 0", "old 1"] and asked == [1]
    all_through(planned)
    assert [row["prompt"] for row in stage(given)] == [f"new {i}" for i in range(8)]


@pytest.mark.parametrize("words", [["retry-failed"], ["repair"], ["select"], ["plan", "--refill", "lacks.jsonl"]])
def test_nothing_is_rewritten_under_a_run_that_is_at_work(planned: Path, words: list[str]) -> None:
    beat = {"pid": os.getppid(), "host": "here", "machine": this_machine(), "state": "running", "when": time.time()}
    (planned.parent / HEARTBEAT).write_text(json.dumps(beat))
    before = files(planned)
    with pytest.raises(LedgerConflict, match="runs into this folder at this moment"):
        CliRunner().invoke(app, [words[0], str(planned), *words[1:]], catch_exceptions=False)
    assert files(planned) == before


def test_a_run_that_starts_meanwhile_is_kept_out(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def reopen(folder: Path) -> tuple[int, int]:
        seen.extend(json.loads(path.read_text()) for path in planned.parent.glob("claim-*.json"))
        return 0, 0

    monkeypatch.setattr("factory.retry.reopen_dead", reopen)
    CliRunner().invoke(app, ["retry-failed", str(planned)], catch_exceptions=False)
    assert not seen and not list(planned.parent.glob("claim-*.json")), "no run can go on here"
    (planned.parent / "run.json").write_text("{}")
    CliRunner().invoke(app, ["retry-failed", str(planned)], catch_exceptions=False)
    assert [(facts["what"], facts["state"]) for facts in seen] == [("edgefusion factory retry-failed", "running")]
    (left,) = planned.parent.glob("claim-*.json")
    assert json.loads(left.read_text())["state"] == "ended"


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeFusionError, match="holds no data set"):
        reopen_dead(tmp_path)
