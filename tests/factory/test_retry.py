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

import pyarrow as pa
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
from factory.ledger import commit_unit, read_entry
from factory.make import make as factory_make
from factory.plan import PLAN, PLAN_SCHEMA, table_bytes
from factory.recipe import SelectRecipe
from factory.retry import reopen_dead
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
            make=SimpleNamespace(unit_images=UNIT_IMAGES, dead_after=512, max_dead_share=0.5),
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
    changed = {name for name in after if after[name] != before[name]}
    assert set(after) == set(before)
    assert changed == {"ledger/unit-00001.parquet", "pictures/unit-00001.parquet"}
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
