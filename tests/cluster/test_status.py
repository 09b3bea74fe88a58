"""What `edgefusion status` says, from files alone: of a run at work, killed, stopped, finished, and of damaged files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from cluster.claim import refuse_second_driver
from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.events import Events
from cluster.heartbeat import HEARTBEAT, heartbeat, read_heartbeat
from cluster.machine import born, every, this_machine
from cluster.status import read_status
from cluster.status_view import clock, status, view

PHASE = {"steps": 100, "batch_images": 8}


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of 40 samples with two of five units made, ten seconds apart."""
    recipe = {"name": "tiny", "trainer": {"adapt": PHASE, "distill": PHASE}, "export": {"targets": ["onnx"]}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "seconds": {"plan": 3.5}}))
    table(tmp_path / "dataset" / "plan.parquet", [{"id": str(i)} for i in range(40)])
    now = time.time()
    for unit, when in ((0, now - 10), (1, now)):
        rows: list[dict[str, object]] = [{"outcome": "made", "reason": ""}] * 7
        rows.append({"outcome": "dead", "reason": "render: killed its worker 2 times"})
        path = tmp_path / "dataset" / "ledger" / f"unit-{unit:05d}.parquet"
        table(path, rows)
        os.utime(path, (when, when))
    return tmp_path


def beats(out: Path, **facts: object) -> None:
    now = time.time()
    whole = {"pid": os.getpid(), "host": "elsewhere", "state": "running", "step": "make"}
    times = {"began": now - 60, "step_began": now - 60, "when": now}
    (out / HEARTBEAT).write_text(json.dumps({**whole, **times, **facts}))


def stage(out: Path, name: str) -> dict[str, object]:
    return next(row for row in read_status(out)["stages"] if row["stage"] == name)


@pytest.mark.parametrize("ahead_s", [-300.0, 300.0])
def test_a_driver_whose_clock_is_wrong_is_not_taken_for_dead_nor_a_dead_one_for_alive(
    out: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    monkeypatch.setattr("cluster.heartbeat._LOOK_AGAIN_S", 3.0)
    words: list[str] = []

    def beat() -> None:
        beats(out, machine="another", when=time.time() + ahead_s)

    beat()
    assert read_status(out, words.append)["state"] == "died", "nothing changed while it was watched"
    assert len(words) == 1 and "the last sign of life from elsewhere is" in words[0] and "300 s" in words[0]
    with every(0.5, beat):
        facts = read_status(out, words.append)
    assert facts["state"] == "running" and abs(facts["clock_ahead_s"] - ahead_s) < 3
    console = Console(width=200)
    with console.capture() as said:
        console.print(view(facts))
    assert f"300 s {'ahead of' if ahead_s > 0 else 'behind'} this machine's" in " ".join(said.get().split())
    # Without doubt nobody waits, and a day is no skew.
    beats(out, machine="another", when=time.time() - 100_000)
    assert read_status(out, words.append)["state"] == "died" and len(words) == 2


def test_rates_go_by_one_clock(out: Path) -> None:
    """The driver's clock is five minutes behind, the files are dated by the storage."""
    now = time.time()
    beats(out, when=now - 3, step_began=now - 3 - 300, step_began_there=now - 15)
    assert stage(out, "make")["per_s"] == pytest.approx(0.8)
    beats(out, when=now - 3, step_began=now - 3 - 300, step_began_there=now - 5)
    assert stage(out, "make")["per_s"] is None, "one commit since the step began"


def test_a_process_is_looked_for_on_its_own_machine_only(out: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    beats(out, host=socket.gethostname(), machine=this_machine(), pid=gone.pid)
    assert read_status(out)["state"] == "died"
    # A container of the same name has numbers of its own.
    beats(out, host=socket.gethostname(), machine="another", pid=gone.pid)
    assert read_status(out)["state"] == "running"


def test_the_last_problems_of_the_log_are_shown(out: Path) -> None:
    beats(out)
    log = Events(out / "log", "r", "s")
    for i in range(9):
        log.say("message", "warning", text=f"warning {i}")
    log.say("unit", unit="unit-00001", stage="render")
    facts = read_status(out)
    assert [problem["text"] for problem in facts["problems"]] == [f"warning {i}" for i in range(4, 9)]
    console = Console(width=200)
    with console.capture() as said:
        console.print(view(facts))
    assert "warning: message on" in said.get() and "warning 8" in said.get() and "unit-00001" not in said.get()


def test_a_run_at_work(out: Path) -> None:
    beats(out)
    facts = read_status(out)
    assert (facts["state"], facts["step"], facts["kept_share"]) == ("running", "make", None)
    assert facts["samples"] == {"planned": 40, "in_ledger": 16, "made": 14, "kept": 0, "rejected": 0, "dead": 2}
    assert facts["reasons"] == {"dead: render: killed its worker 2 times": 2}
    make = stage(out, "make")
    # Eight rows between two commits ten seconds apart; 24 are left.
    assert make["per_s"] == pytest.approx(0.8, rel=1e-2) and make["eta_s"] == pytest.approx(30, rel=1e-2)
    assert stage(out, "plan")["state"] == "done" and stage(out, "plan")["seconds"] == 3.5
    assert stage(out, "export onnx")["state"] == "waiting"


def test_training_is_read_from_its_log_though_the_last_line_is_cut(out: Path) -> None:
    beats(out, step="train")
    log = out / "training" / "adapt" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 20, "steps": 100, "loss": 0.5, "images_per_s": 16.0}\n{"step": 21, "st')
    adapt, distill = stage(out, "train: adapt"), stage(out, "train: distill")
    assert (adapt["state"], adapt["done"], adapt["per_s"], adapt["eta_s"]) == ("running", 20, 2.0, 40.0)
    assert distill["state"] == "waiting" and distill["eta_s"] is None


@pytest.mark.parametrize(("went_on_at", "took"), [(0, 204.0), (60, None), (None, None)])
def test_a_phase_that_was_not_interrupted_says_what_it_took(out: Path, went_on_at: int | None, took: object) -> None:
    folder, began = out / "training" / "adapt", 1_000_000.0
    (folder / "unet").mkdir(parents=True)
    rows = [{"step": i, "steps": 100, "images_per_s": 2.0, "time_s": began + 4 + 2 * i} for i in range(1, 101)]
    if went_on_at is not None:  # an older version did not note it
        rows = [{**row, "began_step": went_on_at if row["step"] > went_on_at else 0} for row in rows]
    if took:
        rows = [{**row, "time_s": row["time_s"] + 2 * (row["step"] > 50)} for row in rows]  # a look takes its time too
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapt = stage(out, "train: adapt")
    assert (adapt["state"], adapt["seconds"]) == ("done", took)
    (folder / "unet").rmdir()
    assert stage(out, "train: adapt")["seconds"] is None


def test_after_selection_the_kept_share_is_known(out: Path) -> None:
    table(
        out / "dataset" / "selection.parquet",
        [{"outcome": "kept", "reason": ""}] * 30
        + [{"outcome": "rejected", "reason": "near duplicate"}] * 8
        + [{"outcome": "dead", "reason": "plan: x"}] * 2,
    )
    assert read_status(out)["kept_share"] is None, "without a manifest the selection may be an old one"
    (out / "dataset" / "manifest.parquet").touch()
    assert read_status(out)["kept_share"] == 0.75


def test_silence_and_a_missing_process_are_death(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.heartbeat._LOOK_AGAIN_S", 0.0)
    assert read_status(out)["state"] == "unknown"
    beats(out, when=time.time() - 3600)
    facts = read_status(out)
    assert facts["state"] == "died" and facts["heartbeat_age_s"] > 3500
    assert stage(out, "make")["state"] == "died" and stage(out, "make")["eta_s"] is None


def test_a_killed_process_is_seen_at_once(tmp_path: Path) -> None:
    code = f"from pathlib import Path\nfrom cluster.heartbeat import heartbeat\nimport time\nwith heartbeat(Path({str(tmp_path)!r})) as begin:\n    begin('make'); print('up', flush=True); time.sleep(60)"
    root = str(Path(__file__).parent.parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout and process.stdout.readline() == b"up\n"
    assert read_heartbeat(tmp_path)["state"] == "running" and read_heartbeat(tmp_path)["step"] == "make"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_heartbeat(tmp_path)["state"] == "died"


def test_a_living_process_of_this_machine_is_not_dead_however_long_it_is_silent(out: Path) -> None:
    other, long_ago = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), time.time() - 7200
    here = {"machine": this_machine(), "pid": other.pid, "born": born(other.pid), "when": long_ago}
    try:
        beats(out, **here)
        facts = read_status(out)
        assert (facts["state"], facts["silent"]) == ("running", True)
        console = Console(width=300)
        with console.capture() as said:
            console.print(view(facts))
        assert f"process {other.pid} on elsewhere is stopped or stuck" in said.get()
        with pytest.raises(
            LedgerConflict, match=f"process {other.pid} .* is stopped or stuck. End it .* or let it go on"
        ):
            refuse_second_driver(out, print)
        beats(out, **{**here, "when": time.time()})
        assert read_status(out)["silent"] is False
        # The number is another's now, though its last word is fresh; an older version did not say enough to tell.
        for gone in ({"born": here["born"] - 100, "when": time.time()}, {"born": None}):
            beats(out, **{**here, **gone})
            assert read_status(out)["state"] == "died"
            refuse_second_driver(out, print)
    finally:
        other.communicate(b"\n")
    beats(out, **here)
    assert read_status(out)["state"] == "died"


def test_a_second_driver_is_refused_and_one_after_a_death_is_not(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.heartbeat._LOOK_AGAIN_S", 2.0)
    words: list[str] = []
    refuse_second_driver(out, words.append)  # nobody was there
    beats(out, machine=this_machine(), pid=os.getpid())
    refuse_second_driver(out, words.append)  # this process itself
    beats(out, machine=this_machine(), pid=os.getppid())
    with pytest.raises(LedgerConflict, match=f"process {os.getppid()} on .* runs into this folder"):
        refuse_second_driver(out, words.append)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    beats(out, machine=this_machine(), pid=child.pid)
    refuse_second_driver(out, words.append)  # it ended, though nobody took its number back
    child.wait()
    assert not words
    beats(out, machine="another")
    refuse_second_driver(out, words.append)
    assert len(words) == 1, "its last sign of life was fresh, and no other came"
    with every(0.5, lambda: beats(out, machine="another")), pytest.raises(LedgerConflict, match="on elsewhere"):
        refuse_second_driver(out, words.append)


def test_the_end_of_a_run_is_said_in_its_last_heartbeat(tmp_path: Path) -> None:
    with heartbeat(tmp_path) as begin:
        begin("plan")
    assert read_heartbeat(tmp_path)["state"] == "finished"
    with pytest.raises(EdgeFusionError), heartbeat(tmp_path) as begin:
        begin("make")
        raise EdgeFusionError("no space")
    facts = read_heartbeat(tmp_path)
    assert (facts["state"], facts["step"], facts["why"]) == ("stopped", "make", "no space")


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with heartbeat(tmp_path / "file" / "below") as begin:
        begin("plan")


def test_damage_is_counted_and_hides_nothing_else(out: Path) -> None:
    (out / "dataset" / "ledger" / "unit-00000.parquet").write_bytes(b"PAR1 no")
    (out / HEARTBEAT).write_text("{")
    facts = read_status(out)
    assert facts["unreadable"] == 1 and facts["samples"]["made"] == 7 and facts["state"] == "unknown"


def test_an_entry_that_is_given_back_while_status_looks_costs_nothing(out: Path) -> None:
    beats(out)
    (out / "dataset" / "ledger" / "unit-00002.parquet").symlink_to("nowhere")  # listed, and gone when it is looked at
    assert stage(out, "make")["per_s"] == pytest.approx(0.8, rel=1e-2)


def test_a_unit_that_kills_workers_is_a_suspect(out: Path) -> None:
    notes = out / "dataset" / "attempts"
    notes.mkdir()
    (notes / "render.unit-00002.json").write_text(json.dumps({"deaths": 3, "at_risk": ["a", "b"]}))
    (notes / "render.unit-00003.json").write_text(json.dumps({"deaths": 0, "at_risk": ["c"]}))
    suspect = {"unit": "unit-00002", "stage": "render", "deaths": 3, "rows_tried_together": 2}
    assert read_status(out)["suspects"] == [suspect]


def test_the_command_reads_and_changes_nothing(out: Path) -> None:
    app = typer.Typer()
    app.command()(status)
    beats(out, state="finished")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    said = CliRunner().invoke(app, [str(out), "--json"])
    assert json.loads(said.output)["samples"]["dead"] == 2
    said = CliRunner().invoke(app, [str(out), "--watch"], env={"COLUMNS": "140"})
    assert said.exit_code == 0 and "killed its worker 2 times" in said.output and "Finished" in said.output
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(EdgeFusionError, match="holds no run"):
        CliRunner().invoke(app, [str(out / "dataset")], catch_exceptions=False)


def test_watched_into_a_pipe_it_says_what_moved_and_how_it_ended(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(status)
    beats(out)
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            table(out / "dataset" / "ledger" / "unit-00002.parquet", [{"outcome": "made", "reason": ""}] * 8)
        if looks == 4:
            beats(out, state="finished")

    monkeypatch.setattr("cluster.status_view.time.sleep", sleep)
    said = CliRunner().invoke(app, [str(out), "--watch"], env={"COLUMNS": "140"})
    lines = said.output.splitlines()
    assert " make: 16 of 40 pictures" in lines[0] and " make: 24 of 40 pictures" in lines[1]
    assert looks == 4 and "Finished" in said.output


def test_times_are_said_as_people_say_them() -> None:
    assert [clock(s) for s in (None, 5, 99, 101, 3700)] == ["", "5 s", "99 s", "1 min 41 s", "1 h 01 min"]


def test_pages_are_waited_for_until_the_report_that_follows_them(out: Path) -> None:
    run = json.loads((out / "run.json").read_text())
    run["recipe"]["export"]["pages"] = True
    (out / "run.json").write_text(json.dumps(run))
    assert stage(out, "pages")["state"] == "waiting"
    (out / "report.html").write_text("no bundle could be measured on this machine")
    assert "pages" not in [row["stage"] for row in read_status(out)["stages"]]
