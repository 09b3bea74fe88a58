"""A run as a Ray job, on a real job server; it needs `ray[default]`, which the tests' own environment may lack."""

from __future__ import annotations

import importlib.util
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import EdgeFusionError, StageError
from cluster.needs import RunView, as_far_as
from cluster.submit import follow, submit
from edgefusion import cluster_view
from tests.cluster.test_join import ROOT, TOKEN, Cluster

PAPER = ROOT / "recipes" / "edgefusion.yaml"
SEND = """
import sys
from pathlib import Path
from cluster.errors import EdgeFusionError
from cluster.submit import follow, submit
from edgefusion import cluster_view
try:
    job = submit(cluster_view(Path(RECIPE), []), HEAD, "/shared/out one", program=PROGRAM)
    print("sent", job, flush=True)
    follow(HEAD, job, print)
except EdgeFusionError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def view() -> RunView:
    return cluster_view(PAPER, [])


def test_what_is_no_dashboard_is_refused() -> None:
    with pytest.raises(EdgeFusionError, match=r"is no address of a Ray dashboard. For example http"):
        submit(view(), "127.0.0.1:6379", "/x")


def test_an_output_folder_that_would_go_with_the_job_is_refused() -> None:
    with pytest.raises(EdgeFusionError, match=r"--out s3://b/x: is a URL, and the ledger"):
        submit(view(), "http://127.0.0.1:8265", "s3://b/x", "/shared")
    with pytest.raises(EdgeFusionError, match=r"--out: runs/x would be in the job's own folder"):
        submit(view(), "http://127.0.0.1:8265", "runs/x")


class Client:
    """A job server's client that keeps the recipe it was handed, and loses the connection."""

    recipe: dict[str, Any]
    said = ""

    def submit_job(self, entrypoint: str, runtime_env: dict[str, str], **_: Any) -> str:
        folder = runtime_env["working_dir"]
        self.said = subprocess.run(["sh", "-c", entrypoint], cwd=folder, capture_output=True, text=True).stdout
        self.recipe = yaml.safe_load(Path(runtime_env["working_dir"], "recipe.yaml").read_text())
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "making"
        raise ConnectionResetError("gone")


def test_a_job_gets_the_whole_recipe_and_a_lost_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the run serves vLLM for itself, too: only launch files bring a server."""
    client, said = Client(), list[str]()
    monkeypatch.setattr("cluster.submit._client", lambda head: client)
    assert submit(view(), "http://127.0.0.1:8265", "/x") == "job-1"
    assert client.recipe["factory"]["plan"]["writer"]["environment"] == "vllm"
    assert client.recipe["cluster"]["address"] == "auto"
    with pytest.raises(
        StageError, match=r"broke off \(ConnectionResetError: gone\); the job goes on.*ray job logs job-1"
    ):
        follow("http://127.0.0.1:8265", "job-1", said.append)
    assert said == ["making"]


def test_a_wings_run_starts_where_relative_paths_mean_the_shared_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, program, home = Client(), tmp_path / "a program", tmp_path / "the shared one"
    home.mkdir()
    program.write_text('#!/bin/bash\necho "$PWD $1 $2 $4 $5"; test -s "$3" && echo "has the recipe"')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("cluster.submit._client", lambda head: client)
    submit(as_far_as(view(), "factory"), "http://127.0.0.1:8265", "runs/a b", str(home), str(program))
    assert client.said.splitlines() == [f"{home} factory run --out runs/a b", "has the recipe"]


@pytest.mark.skipif(not importlib.util.find_spec("aiohttp_cors"), reason="ray[default] is not installed")
def test_an_address_where_nothing_listens() -> None:
    with pytest.raises(StageError, match=r"Ray at http://127.0.0.1:9 cannot be reached"):
        submit(view(), "http://127.0.0.1:9", "/x")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not importlib.util.find_spec("aiohttp_cors"), reason="ray[default] is not installed")
def test_a_job_is_given_the_recipe_and_says_how_it_ended(tmp_path: Path) -> None:
    program = tmp_path / "program"
    said = 'echo "was given $*"; cat "$2"; env | grep -c planted-secret || true; exit "$(cat "${0%/*}/code")"'
    program.write_text(f"#!/bin/bash\n{said}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    head = Cluster(tmp_path, dashboard=True, program=[sys.executable, "-m", "ray.scripts.scripts"])
    try:
        head.node("--num-cpus=1")
        code = SEND.replace("RECIPE", repr(str(PAPER))).replace("HEAD", repr(head.dashboard))
        for status in (0, 7):
            (tmp_path / "code").write_text(str(status))
            ran: Any = head.run(code.replace("PROGRAM", repr(str(program))), HF_TOKEN="planted-secret")
            assert "was given run recipe.yaml --out /shared/out one" in ran.stdout, ran.stderr
            assert "address: auto" in ran.stdout and "name: edgefusion" in ran.stdout and "\n0\n" in ran.stdout
            assert (ran.returncode, "StageError: " in ran.stderr) == ((0, False) if status == 0 else (1, True))
        assert "failed: Job entrypoint command failed with exit code 7" in ran.stderr
        ran = head.run(code.replace("PROGRAM", repr(str(program))), RAY_AUTH_TOKEN="c" * 32)
        assert ran.returncode == 1 and "refuses the token" in ran.stderr and TOKEN not in ran.stderr
    finally:
        head.close()
