"""The log of a run: whole lines whatever happens, the same data with it and without, what died by its id, no secrets."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError, StageError
from cluster.events import NOWHERE, Events, last_problems, read_events, scrubbed
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, InProcess, OnRay, Runner
from cluster.stage import PENDING, Row, Stage, Unit
from edgefusion import app


def events(out: Path, units: bool = True) -> Events:
    return Events(out / "log", "run-1", "start-1", units)


def halve(rows: list[Row]) -> list[Row]:
    if any(row["number"] == 3 for row in rows):
        raise ValueError("three is odd")
    return [{**row, "half": row["number"] / 2} for row in rows]


def two_units() -> list[Unit]:
    rows = [{"id": f"id-{i}", "outcome": PENDING, "reason": "", "number": i} for i in range(8)]
    return [Unit("unit-0", rows[:4]), Unit("unit-1", rows[4:])]


def runners(log: Events, kind: str) -> Runner:
    recipe = build_recipe(ClusterRecipe, {"cpus": 2}, "test")
    return InProcess(2, log) if kind == "in-process" else OnRay(recipe, log)


@pytest.mark.parametrize("kind", ["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def test_each_unit_is_noted_with_what_died_in_it_and_the_answer_is_the_same(tmp_path: Path, kind: str) -> None:
    runner = runners(events(tmp_path), kind)
    try:
        done = list(runner.run([Stage("halve", lambda: halve, cpus=0.5)], two_units(), tmp_path / "notes"))
    finally:
        runner.close()
    silent = list(InProcess().run([Stage("halve", lambda: halve)], two_units()))
    assert sorted(u.to_bytes() for u in done) == sorted(u.to_bytes() for u in silent)

    said = list(read_events(tmp_path))
    assert {(e["run"], e["start"]) for e in said} == {("run-1", "start-1")}
    assert [e["stage"] for e in said if e["event"] == "stage opened"] == ["halve"]
    units = {e["unit"]: e for e in said if e["event"] == "unit"}
    assert units.keys() == {"unit-0", "unit-1"} and units["unit-1"]["level"] == "info" and "dead" not in units["unit-1"]
    assert units["unit-0"]["dead"] == [{"id": "id-3", "reason": "halve: ValueError: three is odd"}]
    assert (os.getpid() in {e["pid"] for e in said}) == (kind == "in-process"), "whoever did it says it"
    assert last_problems(tmp_path, 5) == [units["unit-0"]]


def test_without_units_only_what_went_wrong_is_noted_and_nowhere_is_nowhere(tmp_path: Path) -> None:
    list(InProcess(2, events(tmp_path, units=False)).run([Stage("halve", lambda: halve)], two_units()))
    assert [e["unit"] for e in read_events(tmp_path) if e["event"] == "unit"] == ["unit-0"]
    NOWHERE.say("hello")
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_step_says_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError), events(tmp_path).during("run", recipe="tiny") as run, run.listening():
        with run.during("step plan"):
            logging.getLogger("edgefusion").warning("waiting for %s", "a node", extra={"facts": {"unit": "unit-7"}})
        with run.during("step make"):
            raise StageError("stage render failed", remedy="Mend it\nthen")
    logging.getLogger("edgefusion").warning("said afterwards, to nobody")
    said = list(read_events(tmp_path))
    assert [e["event"] for e in said] == [
        *("run began", "step plan began", "message", "step plan ended"),
        *("step make began", "step make failed", "run failed"),
    ]
    assert "warning: waiting for a node\n" in capsys.readouterr().err, "who watches the run is told too"
    assert said[2]["text"] == "waiting for a node" and said[2]["unit"] == "unit-7"
    assert said[5]["error"] == "StageError: stage render failed. Mend it" and said[5]["level"] == "error"


def test_the_command_finds_what_is_asked_for(tmp_path: Path) -> None:
    log = events(tmp_path)
    list(InProcess(2, log).run([Stage("halve", lambda: halve)], two_units()))
    log.say("message", "warning", unit="unit-7", samples=["id-9", "id-10"])

    def said(*words: str) -> list[str]:
        ran = CliRunner().invoke(app, ["cluster", "log", str(tmp_path), *words], catch_exceptions=False)
        assert ran.exit_code == 0
        return [f"{e['event']} {e.get('unit', '')}".strip() for e in map(json.loads, ran.output.splitlines())]

    assert said() == ["stage opened", "unit unit-0", "unit unit-1", "message unit-7"]
    assert said("--stage", "halve", "--unit", "unit-1") == ["unit unit-1"]
    assert said("--problems") == ["unit unit-0", "message unit-7"]
    assert said("--sample", "id-3") == ["unit unit-0"] and said("--sample", "id-1") == ["message unit-7"]
    for told in ("", f"; every sample that died, in the plan too, stands in {tmp_path}/dataset/dead.parquet"):
        words = ["cluster", "log", str(tmp_path), "--sample", "nobody"]
        nothing = CliRunner().invoke(app, words, catch_exceptions=False)
        assert (nothing.stdout, nothing.stderr) == ("", f"the log holds nothing of that{told}\n")
        (tmp_path / "dataset").mkdir(exist_ok=True)
        (tmp_path / "dataset" / "dead.parquet").touch()
    with pytest.raises(EdgeFusionError, match="holds no log"):
        CliRunner().invoke(app, ["cluster", "log", str(tmp_path / "log")], catch_exceptions=False)


def write_many(out: Path, mine: int) -> None:
    for i in range(300):
        events(out).say("tick", who=mine, i=i, more="x" * (i * 7 % 900))


def test_processes_of_one_machine_do_not_cut_into_each_others_lines(tmp_path: Path) -> None:
    spawned = multiprocessing.get_context("fork")
    writers = [spawned.Process(target=write_many, args=(tmp_path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    (file,) = (tmp_path / "log").iterdir()
    # A line on two pages of the file may be seen half written, as if torn: then an empty line stands after it.
    lines = [json.loads(line) for line in file.read_bytes().splitlines() if line]
    assert sorted((e["who"], e["i"]) for e in lines) == [(n, i) for n in range(4) for i in range(300)]


def test_a_line_cut_by_a_crash_costs_itself_only(tmp_path: Path) -> None:
    log = events(tmp_path)
    log.say("before")
    (file,) = (tmp_path / "log").iterdir()
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut].replace(b"before", b"struck"))
        log.say("after")
        assert [e["event"] for e in read_events(tmp_path)] in (["before", "after"], ["before", "struck", "after"])
    (tmp_path / "log" / "other.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"time": 1}\n')
    assert next(read_events(tmp_path))["event"] == "before"


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    events(tmp_path).say("hello")
    with events(tmp_path).during("step"):
        pass
    assert list(read_events(tmp_path)) == [] and last_problems(tmp_path, 5) == []


SECRETS: Sequence[tuple[str, str]] = (
    ("AWS_SECRET_ACCESS_KEY", 'planted/"quoted"\\secret'),
    ("HF_TOKEN", "hf_planted0123456789"),
    ("MY_PASSWORD", "пароль-длинный"),
)


def test_no_line_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_KEY", "the")
    text = " ".join(value for _, value in SECRETS)
    more = "s3://me:hunter22@bucket/x Bearer abcdefghij https://h/x?X-Amz-Signature=feedbeef&page=2"
    events(tmp_path).say("failed", error=f"the {text} {more}", deep=[{"reason": text}])
    raw = next((tmp_path / "log").iterdir()).read_text()
    assert not any(value in raw or json.dumps(value)[1:-1] in raw for _, value in SECRETS)
    (event,) = read_events(tmp_path)
    assert event["deep"] == [{"reason": "*** *** ***"}]
    assert event["error"].endswith("s3://me:***@bucket/x Bearer *** https://h/x?X-Amz-Signature=***&page=2")
    assert scrubbed("nothing to hide at http://host:80/v1") == "nothing to hide at http://host:80/v1"
