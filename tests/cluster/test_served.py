"""Servers in environments of their own: started, watched, started again, stopped, and found when a killed run left them behind.

The server is a small stand-in for vLLM, in a real environment made by pip from a wheel that is written here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from cluster.environment import find_environment, make_environment
from cluster.errors import EdgeFusionError, RecipeError, StageError, TargetUnavailable
from cluster.recipe import build_recipe
from cluster.served import ServerRecipe, stop_orphans
from edgefusion import app
from factory.models.caption import open_captioner
from factory.models.server import serve_vllm
from factory.models.text import open_writer
from factory.plan import make_plan
from factory.recipe import FactoryRecipe, VllmCaptioner, VllmWriter

ROOT = Path(__file__).parent.parent.parent
STAND_IN = '''
"""Takes the words that vLLM takes. Prints its key, has a child process, and dies at the word "die"."""
import argparse, json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for name in ("model", "served-model-name", "host"):
    parser.add_argument("--" + name)
parser.add_argument("--port", type=int)
parser.add_argument("--fail", default="")
parser.add_argument("--load-s", type=float, default=0)
args = parser.parse_args()
key = os.environ["VLLM_API_KEY"]
print("key", key, "path", sys.path, "variable", os.environ.get("OWN_VARIABLE"), flush=True)
if args.fail:
    sys.exit(args.fail)
time.sleep(args.load_s)
# As programs do that write their title there: the child blanks its first environment variable.
blank = "import ctypes as c; a = c.POINTER(c.c_void_p).in_dll(c.CDLL(None), 'environ')[0]; c.memset(a, 0, 8); "
child = subprocess.Popen([sys.executable, "-c", blank + "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, tree):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def known(self):
        if self.headers["Authorization"] == "Bearer " + key:
            return True
        self.answer(401, {})
        return False

    def do_GET(self):
        if self.known():
            self.answer(200, {"data": [{"id": args.served_model_name}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.known():
            return
        assert asked["model"] == args.served_model_name
        if "die" in json.dumps(asked) and not os.path.exists(os.environ.get("DIED_BEFORE", "/nonexistent")):
            if "DIED_BEFORE" in os.environ:
                open(os.environ["DIED_BEFORE"], "w").close()
            print("the engine core died", flush=True)
            os._exit(7)
        if "prompt" in asked:
            self.answer(200, {"choices": [{"text": " " + asked["prompt"] + " written\\\\nmore"}]})
        else:
            self.answer(200, {"choices": [{"message": {"content": "a picture"}}]})

    def log_message(self, *_):
        pass

ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
'''


def write_wheel(folder: Path) -> Path:
    """A wheel `vllm` whose server is the stand-in."""
    path = folder / f"vllm-0.{os.getpid()}-py3-none-any.whl"
    info = f"vllm-0.{os.getpid()}.dist-info"
    files = {
        "vllm/__init__.py": "",
        "vllm/entrypoints/__init__.py": "",
        "vllm/entrypoints/openai/__init__.py": "",
        "vllm/entrypoints/openai/api_server.py": STAND_IN.replace("\\\\n", "\\n"),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: 0.{os.getpid()}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, of the stand-in's wheel."""
    folder = tmp_path_factory.mktemp("environment")
    words = ["cluster", "environment", "make", "vllm", "--out", str(folder / "env")]
    said = CliRunner().invoke(app, [*words, "--requirement", str(write_wheel(folder))])
    assert said.exit_code == 0 and "ready: " in said.output, said.output
    return folder / "env"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Records of servers that are this test's alone; none may be left, and no process of theirs."""
    monkeypatch.setenv("EDGEFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: loopback must not be asked by way of a proxy
    yield tmp_path / "cache"
    assert list((tmp_path / "cache" / "servers").rglob("*.json")) == []


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


def soon(reached: Callable[[], bool], at_most_s: float = 30.0) -> None:
    end = time.monotonic() + at_most_s
    while not reached():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    """Ended; whether its parent has taken note is no matter."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def child_of(log: Path) -> psutil.Process:
    """The process that the stand-in started last."""
    return psutil.Process(int(log.read_text().rpartition("child ")[2].split()[0]))


def test_it_is_started_used_and_stopped_with_all_its_processes(environment: Path, model: str, tmp_path: Path) -> None:
    log = tmp_path / "writer.log"
    server = ServerRecipe(variables={"OWN_VARIABLE": "heard"})
    recipe = VllmWriter(model=model, environment=str(environment), server=server, template="{attributes}")
    writer = open_writer(recipe, log)
    assert writer.write([{"subject": "fox"}, {"subject": "owl"}], seed=1) == [
        "subject: fox written",
        "subject: owl written",
    ]
    said, child = log.read_text(), child_of(log)
    assert str(ROOT) not in said and str(environment) in said, "it must see its own packages and none of ours"
    assert "variable heard" in said
    endpoint = writer.endpoint
    assert endpoint.url.startswith("http://127.0.0.1:")
    assert len(endpoint.key) > 30 and endpoint.key not in said and "key ***" in said
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{endpoint.url}/models")
    writer.close()
    assert gone(child)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2].partition("/")[0])), 1)


def test_one_that_dies_is_started_again_and_the_question_asked_again(
    environment: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "writer.log"
    server = ServerRecipe(variables={"DIED_BEFORE": str(tmp_path / "died")})
    writer = open_writer(VllmWriter(model=model, environment=str(environment), server=server), log)
    with caplog.at_level(logging.WARNING, "edgefusion"):
        found = writer.write([{"subject": word} for word in ("fox", "die", "owl", "key")], seed=1)
    assert [text.split()[1] for text in found] == ["fox", "die", "owl", "key"]
    assert "ended with code 7; it is started again" in caplog.text and log.read_text().count("child ") == 2
    writer.close()


def test_one_that_dies_too_often_ends_in_words_with_the_end_of_its_log(
    environment: Path, model: str, tmp_path: Path
) -> None:
    log = tmp_path / "writer.log"
    server = ServerRecipe(max_restarts=1)
    writer = open_writer(VllmWriter(model=model, environment=str(environment), server=server), log)
    with pytest.raises(
        StageError, match=r"ended with code 7, 2 times in all; its last lines:(.|\n)*the engine core died"
    ) as caught:
        writer.write([{"subject": "die"}], seed=1)
    assert str(log) in str(caught.value) and writer.endpoint.key not in str(caught.value)
    writer.close()


def test_one_that_does_not_start_says_why(environment: Path, model: str, tmp_path: Path) -> None:
    server = ServerRecipe(arguments=["--fail", "no such architecture"])
    with pytest.raises(StageError, match=r"ended with code 1 before it answered(.|\n)*no such architecture"):
        serve_vllm(model, str(environment), server, "the server", tmp_path / "log")
    assert (tmp_path / "log").read_text().count("no such architecture") == 1, "what cannot start is not tried again"
    slow = ServerRecipe(start_s=0.5, arguments=["--load-s", "60"])
    with pytest.raises(StageError, match=r"gave no answer in 0\.5 s"):
        serve_vllm(model, str(environment), slow, "the server", tmp_path / "log")


DRIVER = """
import sys, time
from pathlib import Path
from cluster.served import ServerRecipe
from factory.models.server import serve_vllm
endpoint = serve_vllm(sys.argv[1], sys.argv[2], ServerRecipe(), "a server", Path(sys.argv[3]))
print("UP", flush=True)
time.sleep(600)
"""


def start_driver(model: str, environment: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", DRIVER, model, str(environment), str(log)]
    driver = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert driver.stdout and driver.stdout.readline() == b"UP\n"
    return driver


def test_a_killed_run_leaves_no_orphan(environment: Path, model: str, tmp_path: Path) -> None:
    driver = start_driver(model, environment, tmp_path / "log")
    child = child_of(tmp_path / "log")
    server = child.parent()
    assert server
    guard = server.parent()
    assert guard
    driver.kill()
    driver.wait()
    soon(lambda: gone(child) and gone(server) and gone(guard))
    assert stop_orphans() == 0, "nothing was left to stop, only a note"


def test_an_orphan_of_a_killed_run_and_guard_is_stopped_by_the_next(
    environment: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = start_driver(model, environment, tmp_path / "log")
    child = child_of(tmp_path / "log")
    server = child.parent()
    assert server
    guard = server.parent()
    assert guard and "guard.py" in " ".join(guard.cmdline())
    assert stop_orphans() == 0 and not gone(child), "a server whose run is alive is left alone"
    for process in (psutil.Process(driver.pid), guard):
        process.send_signal(signal.SIGSTOP)  # neither may see the other go
    guard.kill()
    driver.kill()
    driver.wait()
    assert not gone(child)
    with caplog.at_level(logging.WARNING, "edgefusion"):
        assert stop_orphans() == 1
    assert "stopped a server that a killed run had left behind" in caplog.text
    soon(lambda: gone(child))


def test_a_captioning_worker_has_a_server_of_its_own_while_it_lives(
    environment: Path, model: str, own_cache: Path
) -> None:
    captioner = open_captioner(VllmCaptioner(model=model, environment=str(environment)))
    assert captioner.describe([np.zeros((8, 8, 3), np.uint8)] * 2) == ["a picture"] * 2
    (log,) = (own_cache / "logs").iterdir()
    child = child_of(log)
    assert not gone(child)
    del captioner
    assert gone(child)


def test_the_plan_of_a_run_is_written_by_it(environment: Path, tmp_path: Path) -> None:
    tree = {
        "plan": {
            "taxonomy": "zoo:taxonomy.yaml",
            "prompts": 6,
            "writer": {"kind": "vllm", "model": "zoo:writer", "environment": str(environment)},
        },
        "make": {
            "teacher": {"kind": "diffusers", "model": "zoo:teacher", "size_px": 64, "batch_images": 4},
            "scorer": {"kind": "open_clip", "model": "zoo:clip"},
            "unit_images": 4,
        },
    }
    make_plan(build_recipe(FactoryRecipe, tree, "test"), 0, tmp_path / "dataset")
    assert gone(child_of(tmp_path / "dataset" / "plan" / "writer.log"))


def test_environments_that_are_not_there_or_half_made_are_told(tmp_path: Path, environment: Path) -> None:
    with pytest.raises(TargetUnavailable, match=r"no Python environment vllm.*environment make vllm --out"):
        find_environment("vllm")
    half = tmp_path / "half"
    half.mkdir()
    with pytest.raises(EdgeFusionError, match="failed with code 1"):
        make_environment("vllm", half, python="/bin/false")
    with pytest.raises(TargetUnavailable, match="only half made"):
        find_environment(str(half))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    with pytest.raises(EdgeFusionError, match="not empty"):
        make_environment("vllm", taken)
    assert (taken / "mine").exists()
    facts = json.loads((environment / "edgefusion-environment.json").read_text())
    made = make_environment("vllm", environment, facts["requirements"], python="/nonexistent")
    assert made == environment / "bin" / "python", "what is there is not made again"


def test_a_server_without_an_environment_is_refused() -> None:
    tree = {"kind": "vllm", "model": "zoo:writer", "server": {"start_s": 5}}
    with pytest.raises(RecipeError, match="environment is left out"):
        build_recipe(VllmWriter, tree, "test")
