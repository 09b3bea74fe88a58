"""What `edgefusion status` says, from files alone: of a run at work, killed, stopped, finished, and of damaged files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.heartbeat import HEARTBEAT, heartbeat, read_heartbeat
from cluster.status import read_status
from cluster.status_view import clock, status

PHASE = {"steps": 100, "batch_images": 8}


def table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


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


def test_silence_and_a_missing_process_are_death(out: Path) -> None:
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


def test_times_are_said_as_people_say_them() -> None:
    assert [clock(s) for s in (None, 5, 99, 101, 3700)] == ["", "5 s", "99 s", "1 min 41 s", "1 h 01 min"]
