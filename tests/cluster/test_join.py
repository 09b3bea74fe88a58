"""Real Ray clusters on loopback that a run cannot join, or must wait for: another token, another version, nodes by label, a full object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a-token-of-this-test-only-0123456789abcdef"
OTHER_RAY = os.environ.get("EDGEFUSION_OTHER_RAY", "")
"""The `ray` program of an environment with another version of Ray."""
pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]


class Cluster:
    """A head on loopback and what joined it."""

    def __init__(
        self, home: Path, token: str = TOKEN, program: list[str] | None = None, dashboard: bool = False
    ) -> None:
        with socket.socket() as free, socket.socket() as second:
            free.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
            self.dashboard = f"http://127.0.0.1:{second.getsockname()[1]}" if dashboard else ""
        self.home, self.folders, self.started = home, list[str](), list[subprocess.Popen[bytes]]()
        self.program = program or [str(Path(sys.executable).parent / "ray")]
        self.env = {**os.environ, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}

    def node(self, *words: str) -> None:
        """The first is the head; returns when it answers. On a very busy machine Ray gives a node up after 30 s, so it is tried again."""
        for left in (2, 1, 0):
            log = self._start(words)
            end = time.monotonic() + 180
            while b"Ray runtime started" not in log.read_bytes() and self.started[-1].poll() is None:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            if self.started[-1].poll() is None:
                return
            assert left and "timed out during startup" in log.read_text(), log.read_text()
            self.started.pop()

    def _start(self, words: Sequence[str]) -> Path:
        port = self.address.rpartition(":")[2]
        place = [f"--address={self.address}"]
        if not self.started:
            shown = self.dashboard.rpartition(":")[2]
            place = ["--head", f"--port={port}", f"--include-dashboard={'true' if shown else 'false'}"]
            place += [f"--dashboard-port={shown}"] if shown else []
        self.folders.append(tempfile.mkdtemp(prefix="efj-", dir="/tmp"))
        size = [f"--object-store-memory={100 << 20}", "--memory=1000000000", f"--temp-dir={self.folders[-1]}"]
        command = [*self.program, "start", "--block", "--node-ip-address=127.0.0.1", *place, *size, *words]
        log = Path(self.folders[-1], "start.log")
        with log.open("wb") as said:
            self.started.append(
                subprocess.Popen(command, env=self.env, stdout=said, stderr=said, start_new_session=True)
            )
        return log

    def run(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A driver of its own, for a process may start Ray with one token only."""
        words = [sys.executable, "-c", code.replace("ADDRESS", self.address)]
        return subprocess.run(words, env={**self.env, **env}, capture_output=True, text=True, timeout=400)

    def close(self) -> None:
        for process in reversed(self.started):
            process.terminate()  # `ray start --block` then takes its processes down with it
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(tmp_path: Path, program: list[str] | None = None) -> Generator[Cluster]:
    made = Cluster(tmp_path, program=program)
    try:
        yield made
    finally:
        made.close()


JOIN = """
import sys
from cluster.errors import StageError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, start_ray
try:
    start_ray(build_recipe(ClusterRecipe, {"address": "ADDRESS"}, "test"))
except StageError as error:
    sys.exit(f"refused: {error}")
print("joined")
"""


def test_a_token_that_is_not_the_clusters(tmp_path: Path) -> None:
    with cluster(tmp_path) as head:
        head.node("--num-cpus=1")
        said = head.run(JOIN)
        assert said.stdout == "joined\n", said.stderr
        began = time.monotonic()
        for env in ({"RAY_AUTH_TOKEN": "b" * 32}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": ""}):
            said = head.run(JOIN, **env)
            assert said.returncode == 1, said
            assert f"refused: cluster.address: the cluster at {head.address} refuses the token" in said.stderr
            assert "RAY_AUTH_TOKEN" in said.stderr and TOKEN not in said.stderr and "b" * 32 not in said.stderr
        print(f"three refusals took {time.monotonic() - began:.0f} s")


PATCHED = "import ray; ray.__version__ = '2.1.0'; from ray.scripts.scripts import main; main()"


@pytest.mark.parametrize("which", ["says it is 2.1.0", "is another"])
def test_a_cluster_of_another_version(tmp_path: Path, which: str) -> None:
    if which == "is another" and not OTHER_RAY:
        pytest.skip("EDGEFUSION_OTHER_RAY names no `ray` program of another version")
    with cluster(tmp_path, [OTHER_RAY] if which == "is another" else [sys.executable, "-c", PATCHED]) as head:
        head.node("--num-cpus=1")
        said = head.run(JOIN)
        assert said.returncode == 1
        assert "refused: cluster.address: Ray or Python here is of another version than the cluster's" in said.stderr
        print(said.stderr)


WORK = """
import json, sys, time
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay
from cluster.stage import PENDING, Stage, Unit

def where(rows):
    import ray
    labels = ray.get_runtime_context().get_node_labels()
    time.sleep(WAIT)
    return [{**row, "zone": labels.get("zone"), "node": ray.get_runtime_context().get_node_id(), "pid": __import__("os").getpid()} for row in rows]

units = [Unit(f"unit-{i}", [{"id": str(i), "outcome": PENDING, "reason": ""}]) for i in range(COUNT)]
recipe = build_recipe(ClusterRecipe, {"address": "ADDRESS", "stages": {"look": PLACE}}, "test")
print("began", flush=True)
done = list(OnRay(recipe).run([Stage("look", lambda: where, cpus=0.5)], units))
print(json.dumps([unit.rows[0] for unit in done]))
"""


def work(count: int, place: dict[str, object], wait: float = 0.0) -> str:
    return WORK.replace("COUNT", str(count)).replace("PLACE", repr(place)).replace("WAIT", str(wait))


SKEWED = "import time\nreal = time.time\ntime.time = lambda: real() + 300\n"
CLOCKS = """
from cluster.needs import ray_nodes
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe
print(len(ray_nodes(build_recipe(ClusterRecipe, {"address": "ADDRESS"}, "test"), lambda words: print("told:", words))))
"""


def test_nodes_whose_clocks_are_apart_are_named(tmp_path: Path) -> None:
    with cluster(tmp_path) as head:
        head.node("--num-cpus=2", "--labels=zone=a")
        assert head.run(CLOCKS).stdout == "1\n"
        said = head.run(SKEWED + CLOCKS).stdout
        assert said.startswith("told: the clock of ") and said.endswith("1\n") and " s behind this machine's" in said


def test_stages_go_where_their_labels_and_resources_are_and_wait_for_a_node_with_a_word(tmp_path: Path) -> None:
    with cluster(tmp_path) as head:
        head.node("--num-cpus=2", "--labels=zone=a")
        code = work(4, {"labels": {"zone": "b"}, "resources": {"npu": 1}, "workers": 2, "workers_min": 1})
        words = [sys.executable, "-c", code.replace("ADDRESS", head.address)]
        with subprocess.Popen(words, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            assert run.stderr and run.stdout
            said = ""
            while "waiting for one to join" not in said:
                said = run.stderr.readline()
                assert said, "it ended without a word"
            try:
                assert "stage look needs 0.5 CPU, 1 npu, a node with zone=b, and no node has that now" in said
                head.node("--num-cpus=2", "--labels=zone=b", '--resources={"npu": 1}')
                out, more = run.communicate(timeout=300)
            finally:
                run.kill()
        rows = json.loads(out.splitlines()[-1])
        assert len(rows) == 4 and {row["zone"] for row in rows} == {"b"}, more
        assert len({row["pid"] for row in rows}) == 1, "one npu, one worker"
        # More workers are started where work waits and there is room.
        said = head.run(work(90, {"workers": 3, "workers_min": 1, "labels": {"zone": "!b"}}, wait=1.0))
        rows = json.loads(said.stdout.splitlines()[-1])
        assert {row["zone"] for row in rows} == {"a"} and len({row["pid"] for row in rows}) > 1


FULL = """
import sys
from cluster.errors import StageError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay
from cluster.stage import PENDING, Stage, Unit

def big(rows):
    return [{**row, "blob": b"x" * (60 << 20)} for row in rows]

def same(rows):
    return rows

units = [Unit(f"unit-{i}", [{"id": str(i), "outcome": PENDING, "reason": ""}]) for i in range(4)]
recipe = build_recipe(ClusterRecipe, {"cpus": 2, "object_store_mib": 80}, "test")
try:
    list(OnRay(recipe).run([Stage("big", lambda: big, cpus=0.5), Stage("same", lambda: same, cpus=0.5)], units))
except StageError as error:
    sys.exit(f"ended: {error}")
"""


def test_a_full_object_store_and_a_full_disk_behind_it() -> None:
    """Ray takes the disk for full at a hundredth of its size."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_local_fs_capacity_threshold": "0.01"}
    said = subprocess.run([sys.executable, "-c", FULL], env=env, capture_output=True, text=True, timeout=500)
    assert said.returncode == 1
    assert "ended: cluster: Ray's object store is full, and so is the disk that it would spill to" in said.stderr
