"""The paper's recipe as launch files see it, and several real Ray nodes on one machine, each with its own processes, address and network cable.

A node lives in a network namespace of its own; the namespaces hang on a bridge in one more, so nothing of this machine's network is
touched and a cable can be pulled. Everything in these namespaces was started by the test, which is how it knows what to stop.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.needs import RunView

ROOT = Path(__file__).parent.parent.parent
_PORT = 6379
NODE_GIB = 4
"""Memory that a node says it has; Ray only counts it."""
_WATCH = """
import sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(GcsClientOptions.create(sys.argv[1], None, True, False))
for _ in sys.stdin:
    print(*(node["NodeManagerAddress"] for node in state.node_table() if node["Alive"]), flush=True)
"""
_DEAD_AFTER = {
    # A node counts as lost after about 10 s of silence, not after Ray's 30 to 60.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def paper() -> RunView:
    """recipes/edgefusion.yaml: eight GPUs, prompts by vLLM."""
    from edgefusion import cluster_view

    return cluster_view(ROOT / "recipes" / "edgefusion.yaml", [])


@pytest.fixture(scope="module")
def plain(paper: RunView) -> RunView:
    """The same with prompts from elsewhere."""
    return replace(paper, vllm_model="", server_settings=())


class RealNodes:
    """A Ray head (node 0, without CPUs for workers) and worker nodes of two CPUs; `start` adds a node or brings a lost one back."""

    def __init__(self) -> None:
        self._name = f"ef{os.getpid() % 100000}"
        self._net = f"198.18.{os.getpid() % 250}"
        self._folders: dict[int, Path] = {}
        self._watcher: subprocess.Popen[bytes] | None = None
        self._env = {
            **os.environ,
            **_DEAD_AFTER,
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-this-test-only-0123456789abcdef",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # The host's name is not an address of these nodes.
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        self.address = f"{self._net}.10:{_PORT}"
        _ip("netns", "add", self._space("sw"))
        _ip("-n", self._space("sw"), "link", "add", "name", "bridge0", "type", "bridge")
        _ip("-n", self._space("sw"), "link", "set", "bridge0", "up")

    def start(self, node: int) -> None:
        """Start a node; returns when the head knows it."""
        self._wire(node)
        shutil.rmtree(self._folders.pop(node, Path("/nonexistent")), ignore_errors=True)
        # Unix sockets want short names.
        self._folders[node] = Path(tempfile.mkdtemp(prefix=f"ef{node}-", dir="/tmp"))
        place = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"] if node == 0 else [f"--address={self.address}"]
        )
        words = [
            *("ray", "start", "--block", *place, f"--node-ip-address={self._net}.{10 + node}"),
            *(f"--num-cpus={2 if node else 0}", f"--object-store-memory={100 << 20}"),
            *(f"--temp-dir={self._folders[node]}", "--disable-usage-stats", f"--memory={NODE_GIB << 30}"),
        ]
        words[0] = str(Path(sys.executable).parent / "ray")
        with (self._folders[node] / "start.log").open("wb") as log:
            started = self.popen(words, node, stdout=log, stderr=log)

        def joined() -> bool:
            if started.poll() is not None:
                pytest.fail(f"node {node} did not start: {(self._folders[node] / 'start.log').read_text()}")
            return node in self.alive()

        wait_for(joined, 120, f"node {node} to join")

    def popen(self, words: list[str], node: int = 0, **more: object) -> subprocess.Popen[bytes]:
        """Run a command on a node, with the cluster's token; its pid is the command's own."""
        whole = ["ip", "netns", "exec", self._space(str(node)), *words]
        return subprocess.Popen(whole, env=self._env, **more)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def alive(self) -> set[int]:
        """The nodes that the head counts as alive; none while there is no head."""
        if self._watcher is None or self._watcher.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._watcher = self.popen([sys.executable, "-c", _WATCH, self.address], **pipes)
        assert self._watcher.stdin and self._watcher.stdout
        try:
            self._watcher.stdin.write(b"\n")
            self._watcher.stdin.flush()
        except BrokenPipeError:
            return set()
        found = self._watcher.stdout.readline().decode().split()
        return {int(address.rpartition(".")[2]) - 10 for address in found}

    def kill(self, node: int) -> None:
        """The machine is gone from one moment to the next."""
        self._signal(node, signal.SIGKILL)

    def pause(self, node: int) -> None:
        self._signal(node, signal.SIGSTOP)

    def resume(self, node: int) -> None:
        self._signal(node, signal.SIGCONT)

    def cut(self, node: int) -> None:
        """Pull the node's network cable; its processes go on and see the same disk."""
        _ip("-n", self._space("sw"), "link", "set", f"cable{node}", "down")

    def heal(self, node: int) -> None:
        _ip("-n", self._space("sw"), "link", "set", f"cable{node}", "up")

    def pids(self, node: int) -> list[int]:
        said = subprocess.run(["ip", "netns", "pids", self._space(str(node))], capture_output=True, text=True)
        return [int(word) for word in said.stdout.split()]

    def close(self) -> None:
        for node in self._folders:
            # Twice: a process may have been forked while we looked.
            self._signal(node, signal.SIGKILL)
            wait_for(lambda node=node: self._signal(node, signal.SIGKILL) == 0, 30, "processes to end")
            _ip("netns", "del", self._space(str(node)))
        _ip("netns", "del", self._space("sw"))
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _space(self, node: str) -> str:
        return f"{self._name}-{node}"

    def _wire(self, node: int) -> None:
        space, switch = self._space(str(node)), self._space("sw")
        if node in self._folders:
            return
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"cable{node}", "netns", switch)
        _ip("-n", switch, "link", "set", f"cable{node}", "master", "bridge0", "up")
        _ip("-n", space, "addr", "add", f"{self._net}.{10 + node}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def _signal(self, node: int, which: signal.Signals) -> int:
        found = self.pids(node)
        for pid in found:
            try:
                os.kill(pid, which)
            except ProcessLookupError:
                continue
        return len(found)


def _ip(*words: str) -> None:
    said = subprocess.run(["ip", *words], capture_output=True, text=True)
    if said.returncode:
        raise OSError(f"ip {' '.join(words)}: {said.stderr.strip()}")


def wait_for(reached: Callable[[], bool], at_most_s: float, what: str) -> None:
    """Poll until `reached`; fails the test after `at_most_s`."""
    end = time.monotonic() + at_most_s
    while not reached():
        if time.monotonic() > end:
            pytest.fail(f"waited {at_most_s} s for {what}")
        time.sleep(0.2)


@pytest.fixture
def nodes() -> Generator[RealNodes]:
    """A head and three worker nodes. Skips where network namespaces cannot be made (that takes root)."""
    try:
        made = RealNodes()
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        for node in range(4):
            made.start(node)
        yield made
    finally:
        made.close()
