"""Spans by OpenTelemetry: what a collector on loopback is sent, by the driver and by workers; nothing where nobody asks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.tracing import span

ROOT = Path(__file__).parent.parent.parent
WORK = """
import sys
from pathlib import Path
from cluster.events import Events
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, make_runner
from cluster.stage import PENDING, Stage, Unit

def same(rows):
    return rows

units = [Unit(f"unit-{i}", [{"id": str(i), "outcome": PENDING, "reason": ""}]) for i in range(5)]
events = Events(Path(sys.argv[2]) / "log", "run-1", "start-1")
try:
    with events.during("run", recipe="tiny") as whole:
        with whole.during("step make") as inner:
            runner = make_runner(build_recipe(ClusterRecipe, {"cpus": 2, "runner": sys.argv[1]}, "test"), inner)
            list(runner.run([Stage("same", lambda: same, cpus=0.5)], units))
            runner.close()
        with whole.during("step train"):
            raise ValueError("hf_planted0123456789")
except ValueError:
    pass
"""


@contextmanager
def collector(busy: bool = False) -> Generator[tuple[str, list[Any]]]:
    """(its address, the spans it was sent). A busy one takes nothing at the first try: the sender then waits a second and tries again."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found: list[Any] = []
    refused: set[bytes] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            if busy and body not in refused:
                refused.add(body)
                self.send_response(503)
                self.end_headers()
                return
            asked = ExportTraceServiceRequest.FromString(body)
            found.extend(one for some in asked.resource_spans for scope in some.scope_spans for one in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", found
    finally:
        server.shutdown()


def run(kind: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-c", WORK, kind, str(folder)], env=whole, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("kind", ["in-process", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.parametrize("busy", [False, True], ids=["at-once", "busy"])
def test_a_run_is_one_trace_over_all_its_processes(tmp_path: Path, kind: str, busy: bool) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'edgefusion[otel]'")
    with collector(busy) as (url, found):
        said = run(kind, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=url, HF_TOKEN="hf_planted0123456789")
        assert said.returncode == 0, said.stderr
    by_id = {one.span_id: one for one in found}
    assert len({one.trace_id for one in found}) == 1 and len(by_id) == len(found)

    def path(one: Any) -> list[str]:
        return [*(path(by_id[one.parent_span_id]) if one.parent_span_id else []), one.name]

    assert sorted(path(one) for one in found) == [
        ["run"],
        *([["run", "step make"]] + [["run", "step make", "same"]] * 5),
        ["run", "step train"],
    ]
    units = {a.value.string_value for one in found for a in one.attributes if a.key == "edgefusion.unit"}
    assert units == {f"unit-{i}" for i in range(5)}
    assert b"hf_planted" not in b"".join(one.SerializeToString() for one in found)
    trace = found[0].trace_id.hex()
    log = "".join(file.read_text() for file in (tmp_path / "log").iterdir())
    assert log.count(f'"trace": "{trace}"') == len(log.splitlines()) > 10, "every line says of which trace it is"


def test_a_collector_that_is_away_stops_nothing_and_says_nothing(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'edgefusion[otel]'")
    said = run("in-process", tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="1")
    assert said.returncode == 0 and said.stderr == ""


def test_nobody_asks_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with span("run", {}, "") as trace:
        assert trace == ""


def test_asked_for_without_the_package_is_said_once(tmp_path: Path) -> None:
    hidden = tmp_path / "opentelemetry"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('hidden by the test')")
    code = "from cluster.tracing import span\nfor _ in range(2):\n    with span('a', {}, '') as t: assert t == ''"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert said.returncode == 0 and said.stderr.count("pip install 'edgefusion[otel]'") == 1, said.stderr
