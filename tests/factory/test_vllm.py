"""The real vLLM, served from its own environment, against transformers: the same prompts under greedy decoding.

    edgefusion cluster environment make vllm-cpu
    python -m pytest tests/factory/test_vllm.py -m vllm

EDGEFUSION_VLLM names the environment, a folder or a name; `vllm-cpu` if it is not set.
"""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.environment import find_environment
from cluster.errors import TargetUnavailable
from cluster.served import ServerRecipe
from factory.draw import draw_records
from factory.models.text import open_writer
from factory.recipe import TransformersWriter, VllmWriter
from factory.taxonomy import load_taxonomy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
SETTINGS: dict[str, Any] = {"model": "zoo:writer", "temperature": 0.0, "max_new_tokens": 48}
SERVER = ServerRecipe(arguments=["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"])


@pytest.fixture(scope="module")
def environment() -> str:
    name = os.environ.get("EDGEFUSION_VLLM", "vllm-cpu")
    try:
        find_environment(name)
    except TargetUnavailable as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm") / "writer.log"


@pytest.fixture(scope="module")
def writer(environment: str, log: Path) -> Iterator[Any]:
    served = open_writer(VllmWriter(**SETTINGS, environment=environment, server=SERVER), log)
    yield served
    processes = served_processes()
    served.close()
    assert all(gone(p) for p in processes), "a process of vLLM is left"


def served_processes() -> list[psutil.Process]:
    """The guard and all that descends from it."""
    children = [p for p in psutil.Process().children() if not gone(p)]
    guards = [p for p in children if any(word.endswith("guard.py") for word in p.cmdline())]
    return [process for guard in guards for process in (guard, *guard.children(recursive=True))]


def gone(process: psutil.Process) -> bool:
    """Ended; whether its parent has taken note is no matter."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_writes_what_transformers_writes(writer: Any) -> None:
    records = [record for _, record in draw_records(load_taxonomy("zoo:taxonomy.yaml"), 64, seed=5)]
    wanted = open_writer(TransformersWriter(**SETTINGS)).write(records, seed=0)
    assert len(set(wanted)) > 32 and writer.write(records, seed=0) == wanted


def test_it_listens_on_loopback_and_wants_the_key(writer: Any, log: Path) -> None:
    processes = served_processes()
    listening = {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    # vLLM's own processes may talk to each other on this host's address; what serves must not.
    serving = {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.laddr.port == port_of(writer)}
    print("listening on", listening)
    assert serving == {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{writer.endpoint.url}/models")
    assert len(writer.endpoint.key) > 30 and writer.endpoint.key not in log.read_text()
    assert not any(writer.endpoint.key in word for p in processes for word in p.cmdline())


def port_of(writer: Any) -> int:
    return int(writer.endpoint.url.rpartition(":")[2].partition("/")[0])


def test_a_killed_server_is_started_again_and_nothing_of_it_is_left(writer: Any, log: Path) -> None:
    before = served_processes()
    assert len(before) >= 3, "guard, server, engine"
    server = next(p for p in before if p.cmdline()[1:3] == ["-m", "vllm.entrypoints.openai.api_server"])
    server.send_signal(signal.SIGKILL)
    assert len(writer.write([{"subject": "fox"}], seed=0)) == 1
    assert log.read_text().count("--- ") == 2
    assert all(gone(p) for p in before)


def test_nothing_is_left_when_the_guard_is_killed(writer: Any) -> None:
    before = served_processes()
    guard = next(p for p in before if p.cmdline()[1:3] == ["-I", "-S"])
    guard.send_signal(signal.SIGKILL)
    guard.wait(30)
    writer.close()
    assert len(before) >= 3 and all(gone(p) for p in before)
