"""What Prometheus reads of a run and of Ray's workers, and that the Grafana dashboard asks for nothing else."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from cluster.dashboard import dashboard
from cluster.heartbeat import HEARTBEAT
from cluster.metrics import METRICS, WORKER_METRICS, prometheus_text
from cluster.status import read_status
from cluster.status_view import status

LINE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (-?[0-9.e+]+)')
LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')


def parsed(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values but run and folder...) to value; fails on a line that Prometheus would refuse."""
    found: dict[tuple[str, ...], float] = {}
    typed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    for line in text.splitlines():
        if line.startswith("# "):
            continue
        match = LINE.fullmatch(line)
        assert match and match[1] in typed, line
        labels = dict(LABEL.findall(match[2]))
        assert labels.pop("run") == "tiny" and labels.pop("folder")
        key = (match[1], *labels.values())
        assert key not in found, f"twice: {line}"
        found[key] = float(match[3])
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run in training: 40 samples planned, 16 in the ledger, two of them dead of a reason that needs escapes; plan done."""
    phase = {"steps": 100, "batch_images": 8}
    recipe = {"name": "tiny", "trainer": {"adapt": phase, "distill": phase}, "export": {"targets": ["onnx"]}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "seconds": {"plan": 3.5}}))
    ledger, log = tmp_path / "dataset" / "ledger", tmp_path / "training" / "adapt" / "metrics.jsonl"
    ledger.mkdir(parents=True)
    log.parent.mkdir(parents=True)
    pq.write_table(pa.table({"id": [str(i) for i in range(40)]}), tmp_path / "dataset" / "plan.parquet")
    for unit in range(2):
        rows = [{"outcome": "made", "reason": ""}] * 7 + [{"outcome": "dead", "reason": 'render: "a\\b"\nc'}]
        pq.write_table(pa.Table.from_pylist(rows), ledger / f"unit-{unit:05d}.parquet")
    log.write_text('{"step": 20, "steps": 100, "loss": 0.25, "images_per_s": 16.0}\n')
    now = time.time()
    times = {"began": now - 60, "step_began": now - 60, "when": now}
    facts = {"pid": 1, "host": "elsewhere", "state": "running", "step": "train"}
    (tmp_path / HEARTBEAT).write_text(json.dumps({**facts, **times}))
    return tmp_path


def test_a_run_in_figures(out: Path) -> None:
    found = parsed(prometheus_text(read_status(out)))
    wanted = {
        ("edgefusion_run_state", "running"): 1,
        ("edgefusion_run_state", "died"): 0,
        ("edgefusion_samples_planned",): 40,
        ("edgefusion_samples_waiting",): 24,
        ("edgefusion_samples", "made"): 14,
        ("edgefusion_samples", "dead"): 2,
        ("edgefusion_units_done",): 2,
        ("edgefusion_stage_state", "train: adapt", "running"): 1,
        ("edgefusion_stage_items_done", "train: adapt"): 20,
        ("edgefusion_stage_seconds", "plan"): 3.5,
        ("edgefusion_training_loss", "adapt"): 0.25,
        ("edgefusion_training_images_per_second", "adapt"): 16,
        # The reason is cut to its first words, which are joined by single spaces.
        ("edgefusion_dead_letters", 'render: \\"a\\\\b\\" c'): 2,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("edgefusion_kept_ratio",) not in found, "not known before selection"
    assert ("edgefusion_training_gpu_busy_ratio", "adapt") not in found, "no GPU, no figure"


def test_a_gpu_that_tells_is_shown(out: Path) -> None:
    log = out / "training" / "adapt" / "metrics.jsonl"
    log.write_text('{"step": 20, "steps": 100, "loss": 0.25, "images_per_s": 16.0, "gpu_percent": 87.0}\n')
    assert parsed(prometheus_text(read_status(out)))["edgefusion_training_gpu_busy_ratio", "adapt"] == 0.87
    app = typer.Typer()
    app.command()(status)
    said = CliRunner().invoke(app, [str(out)], env={"COLUMNS": "200"})
    assert "2 steps/s, GPU 87%" in said.output


LIVE = {
    "when": time.time(),
    "upto": 2,
    "more": [],
    "outcomes": {"made": 14, "dead": 2},
    "reasons": {"dead: render": 2},
    "stages": [
        {"stage": "render", "workers": 2, "samples": 16, "per_s": 4.5, "busy": 0.9, "working": 8, "waiting": 16},
        {"stage": "score", "workers": 1, "samples": 8, "per_s": None, "busy": None, "working": 0, "waiting": 8},
    ],
    "per_s": 4.0,
    "eta_s": 6.0,
    "foretold": {
        **{"judged": 16, "kept": 12, "expected": 30, "least": 20, "most": 36},
        **{"best": {"of": 25}, "wanted": {"lacking": 7}},
    },
    "told": ["render 4.5/s"],
    "fallen": {},
}


def test_the_stages_of_make_and_what_it_will_keep(out: Path) -> None:
    (out / "dataset" / "index").mkdir()
    (out / "dataset" / "index" / "live.json").write_text(json.dumps(LIVE))
    found = parsed(prometheus_text(read_status(out)))
    wanted = {
        ("edgefusion_make_stage_samples_per_second", "render"): 4.5,
        ("edgefusion_make_stage_busy_ratio", "render"): 0.9,
        ("edgefusion_make_stage_waiting", "score"): 8,
        ("edgefusion_make_stage_workers", "score"): 1,
        ("edgefusion_kept_so_far",): 12,
        ("edgefusion_kept_foretold", "least"): 20,
        ("edgefusion_kept_wanted",): 25,
        ("edgefusion_wanted_samples_short",): 7,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("edgefusion_make_stage_busy_ratio", "score") not in found, "not known yet"


def test_every_metric_is_exported_by_some_run(out: Path) -> None:
    (out / "dataset" / "index").mkdir()
    (out / "dataset" / "index" / "live.json").write_text(json.dumps(LIVE))
    log = out / "training" / "adapt" / "metrics.jsonl"
    log.write_text(log.read_text().replace("}", ', "gpu_percent": 50.0}'))
    names = {key[0] for key in parsed(prometheus_text(read_status(out)))}
    pq.write_table(pa.table({"outcome": ["kept"], "reason": [""]}), out / "dataset" / "selection.parquet")
    (out / "dataset" / "manifest.parquet").touch()
    names |= {key[0] for key in parsed(prometheus_text(read_status(out)))}
    assert names == set(METRICS)


def test_large_counts_keep_their_digits(out: Path) -> None:
    facts = read_status(out)
    facts["samples"]["planned"] = 123_456_789
    assert parsed(prometheus_text(facts))["edgefusion_samples_planned",] == 123_456_789


def test_the_command_writes_a_file_for_the_textfile_collector(out: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(status)
    said = CliRunner().invoke(app, [str(out), "--json", "--prometheus", str(tmp_path / "edgefusion.prom")])
    assert said.exit_code == 0 and parsed((tmp_path / "edgefusion.prom").read_text())["edgefusion_units_done",] == 2
    assert not list(tmp_path.glob(".*partial*"))


def worker_names() -> set[str]:
    """The names under which Ray's exporter shows the workers' metrics."""
    parts = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"ray_{name}{part}" for name, (kind, _) in WORKER_METRICS.items() for part in parts[kind]}


def queries(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_is_what_grafana_reads_and_asks_only_for_what_is_exported() -> None:
    board = dashboard()
    jsonschema.validate(board, json.loads((Path(__file__).parent / "grafana-schema.json").read_text()))
    asked = {name for query in queries(board) for name in re.findall(r"\b(?:ray_)?edgefusion_[a-z_]+", query)}
    assert asked <= set(METRICS) | worker_names()
    assert set(METRICS) <= asked, "a metric of a run that no panel shows"
    for query in queries(board):
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        assert "edgefusion_" in query
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_render_writes_the_dashboard(tmp_path: Path) -> None:
    from edgefusion import app

    said = CliRunner().invoke(
        app, ["cluster", "render", "recipes/pocket.yaml", "--on", "grafana", "--out", str(tmp_path)]
    )
    assert said.exit_code == 0
    assert json.loads((tmp_path / "edgefusion-grafana.json").read_text()) == dashboard()


COUNTING = """
import sys, time
import ray
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay
from cluster.stage import PENDING, Stage, Unit

def halve(rows):
    if any(row["value"] == 5 for row in rows):
        raise ValueError("five")
    return rows

ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False, _metrics_export_port=int(sys.argv[1]))
units = [Unit(f"u{i}", [{"id": f"{i}-{j}", "value": i * 4 + j, "outcome": PENDING, "reason": ""} for j in range(4)]) for i in range(5)]
done = list(OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test")).run([Stage("halve", lambda: halve, cpus=0.5)], units))
print("READY", len(done), flush=True)
# Once Ray shuts the actors down their gauges are gone; the exporter looks every few seconds.
sys.stdin.readline()
"""


@pytest.mark.ray
def test_ray_exports_what_the_workers_count() -> None:
    for needed in (
        "opentelemetry.exporter.prometheus",
        "grpc",
        "aiohttp_cors",
    ):  # without any of them Ray says nothing and exports nothing
        pytest.importorskip(needed, reason="Ray exports metrics only with ray[default]: pip install -e '.[metrics]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    driver = subprocess.Popen([sys.executable, "-c", COUNTING, str(port)], **pipes)
    assert driver.stdout and driver.stdin
    try:
        assert driver.stdout.readline() == b"READY 5\n"
        text, end = "", time.monotonic() + 200
        while "ray_edgefusion_rows_dead_total{" not in text and time.monotonic() < end:
            time.sleep(1)
            with contextlib.suppress(OSError):  # the exporter comes up last
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    finally:
        driver.stdin.close()
        driver.wait()
    ours = [line for line in text.splitlines() if line.startswith("ray_edgefusion_")]
    assert {line.partition("{")[0] for line in ours} == worker_names()
    values = {line.partition("{")[0]: float(line.rsplit(" ", 1)[1]) for line in ours if 'stage="halve"' in line}
    assert values["ray_edgefusion_units_total"] == 5 and values["ray_edgefusion_rows_dead_total"] == 1
