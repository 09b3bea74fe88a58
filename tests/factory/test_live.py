"""The progress file of make: what it says, that it goes on after a kill, and that it spares status the ledger."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import RecipeError
from cluster.heartbeat import HEARTBEAT
from cluster.runner import InProcess
from cluster.stage import DEAD, PENDING, Row, Stage
from cluster.status import read_status
from cluster.status_view import view
from cluster.storage import publish_bytes
from factory.ledger import commit_unit
from factory.live import LIVE, Live, read_live, told
from factory.make import make
from factory.plan import PLAN, PLAN_SCHEMA, table_bytes
from factory.recipe import FactoryRecipe
from factory.retry import reopen_dead
from factory.tally import seen_of

UNITS, UNIT_IMAGES = 6, 4
RECIPE = {
    "plan": {"taxonomy": "zoo:taxonomy.yaml", "prompts": 24, "writer": {"kind": "transformers", "model": "zoo:writer"}},
    "make": {
        "teacher": {"model": "zoo:teacher", "batch_images": UNIT_IMAGES},
        "scorer": {"model": "zoo:clip"},
        "unit_images": UNIT_IMAGES,
    },
    "select": {"min_clip": 0.5, "best": 9},
}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with 24 planned samples; every second scores 0.9, the others 0.1; row 5 dies, and row 13 stops the run while `stop` is there."""
    data = tmp_path / "dataset"
    rows = [
        {
            "id": f"{i:064x}",
            "prompt": f"p{i}",
            "group": "g",
            "attributes": "{}",
            "seed": i,
            "outcome": PENDING,
            "reason": "",
        }
        for i in range(UNITS * UNIT_IMAGES)
    ]
    publish_bytes(data / PLAN, table_bytes(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)))

    def render(rows: list[Row]) -> list[Row]:
        if any(row["seed"] == 13 for row in rows) and (tmp_path / "stop").exists():
            raise KeyboardInterrupt
        if any(row["seed"] == 5 for row in rows):
            raise ValueError("five")
        time.sleep(0.01)
        return [{**row, "picture": b"x%d" % row["seed"], "clip_score": 0.9 * (row["seed"] % 2)} for row in rows]

    def commit(rows: list[Row]) -> list[Row]:
        commit_unit(data, rows)
        return [seen_of(row, []) for row in rows]

    stages = [Stage("render", lambda: render), Stage("commit", lambda: commit, whole=True)]
    monkeypatch.setattr("factory.make.make_stages", lambda recipe, folder: stages)
    phase = {"steps": 0, "batch_images": 1}
    facts = {"name": "tiny", "trainer": {"adapt": phase, "distill": phase}, "export": {"targets": []}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": facts, "seconds": {}}))
    return tmp_path


def run(out: Path) -> list[list[str]]:
    """Make what is left; the lines that were shown."""
    shown: list[list[str]] = []
    make(FactoryRecipe.model_validate(RECIPE), out / "dataset", InProcess(), show=shown.append)
    return shown


def beats(out: Path) -> None:
    now = time.time()
    facts = {"pid": os.getpid(), "host": "elsewhere", "state": "running", "step": "make", "began": now, "when": now}
    (out / HEARTBEAT).write_text(json.dumps({**facts, "step_began": now}))


def text_of(out: Path) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as said:
        console.print(view(read_status(out)))
    return said.get()


def test_too_many_wanted_combinations_are_told_before_anything_is_made(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.balance._MOST_COMBINATIONS", 0)
    wanted = {**RECIPE, "select": {"wanted": [{"attributes": ["group"], "least": 1}]}}
    with pytest.raises(RecipeError, match=r"factory\.select\.wanted.*combinations"):
        make(FactoryRecipe.model_validate(wanted), out / "dataset", InProcess())
    assert not (out / "dataset" / "ledger").exists()


def test_a_stopped_run_goes_on_counting_and_status_reads_the_counts(out: Path) -> None:
    (out / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    data = out / "dataset"
    live = read_live(data)
    assert (live["upto"], live["rows"], live["kept"]) == (3, 12, 5)
    assert live["outcomes"] == {"made": 11, "dead": 1} and live["fallen"] == {"clip below threshold": 6}
    assert [row["stage"] for row in live["stages"]] == ["render", "commit"]
    assert [row["samples"] for row in live["stages"]] == [12, 12] and live["stages"][0]["waiting"] == 8
    # One more unit that nobody counted, as after kill -9.
    later = [
        {"id": f"{i:064x}", "unit": "unit-00003", "prompt": "p", "outcome": PENDING, "reason": "", "clip_score": 0.9}
        for i in range(12, 16)
    ]
    commit_unit(data, later)
    beats(out)
    facts = read_status(out)
    assert facts["samples"] | {"planned": 24} == facts["samples"] and facts["samples"]["in_ledger"] == 16
    assert facts["samples"]["dead"] == 1 and facts["reasons"] == {"dead: render: ValueError: five": 1}
    assert facts["make"]["foretold"]["best"]["of"] == 9 and facts["units_not_counted"] == 0
    assert next(row for row in facts["stages"] if row["stage"] == "make")["per_s"] == live["per_s"] is not None
    # The counted files are not opened again: were they damaged, a look would say so.
    for number in range(3):
        (data / "ledger" / f"unit-{number:05d}.parquet").write_bytes(b"no")
    assert read_status(out)["unreadable"] == 0 and read_status(out)["samples"]["in_ledger"] == 16


def test_the_next_run_counts_what_was_left_and_forgets_what_was_given_back(out: Path) -> None:
    (out / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    (out / "stop").unlink()
    data = out / "dataset"
    (data / LIVE).unlink()
    shown = run(out)
    live = read_live(data)
    assert (live["rows"], live["kept"], live["upto"]) == (24, 11, 6) and live["outcomes"] == {"made": 23, "dead": 1}
    assert any("before duplicates" in line for line in shown[-1])
    assert "render" in shown[-1][0] and "commit" in shown[-1][0]
    assert reopen_dead(out) == (1, 1)
    facts = read_status(out)
    assert facts["samples"]["in_ledger"] == 20 and facts["samples"]["dead"] == 0, "counted from the ledger again"
    run(out)
    assert read_status(out)["samples"]["in_ledger"] == 24


def test_a_refill_is_foretold_by_its_own_samples(out: Path) -> None:
    run(out)
    data = out / "dataset"
    rows = pq.read_table(data / PLAN).to_pylist()[:6]
    publish_bytes(
        data / "plan-refill-0001.parquet",
        table_bytes(pa.Table.from_pylist([{**row, "id": "f" + row["id"][1:]} for row in rows], schema=PLAN_SCHEMA)),
    )
    live = Live(FactoryRecipe.model_validate(RECIPE), data, InProcess(), [6, 7])
    found = live.facts()["foretold"]
    assert (found["strata"], found["not_judged"]) == (2, 1)
    assert (found["kept"], found["least"], found["most"]) == (11, 11, 17)


def test_until_a_batch_is_through_it_says_what_is_waited_for() -> None:
    row = {"stage": "render", "per_s": None, "busy": None, "working": 8, "waiting": 4}
    facts = {"stages": [row, {**row, "stage": "score", "working": 0}], "foretold": {"share": None}}
    assert told(facts) == ["no batch is through yet: models are being loaded, or their first pictures made"]
    facts["stages"][0] |= {"per_s": 2.0, "busy": 0.5}
    assert told(facts) == ["render 2/s (50% busy, 4 waiting)"]


def test_status_says_how_make_goes(out: Path) -> None:
    (out / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run(out)
    beats(out)
    said = text_of(out)
    assert "make: render" in said and "busy" in said and "busy, 8 waiting)" in said
    assert "kept so far 5 of 12 (41.7%" in said and "at the end about 10" in said and "before duplicates" in said
    assert "the 9 best" in said
    shown: dict[str, Any] = json.loads((out / "dataset" / LIVE).read_text())
    assert shown["told"][0] in " ".join(said.split())
    (out / HEARTBEAT).unlink()
    assert "as it last said" in text_of(out)


def test_a_dead_plan_row_is_counted_as_dead(out: Path) -> None:
    run(out)
    assert read_live(out / "dataset")["reasons"] == {f"{DEAD}: render: ValueError: five": 1}
