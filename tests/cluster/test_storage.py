import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.remote import RemoteStore
from cluster.storage import (
    digest_file,
    publish_bytes,
    publish_file,
    publish_folder,
    publish_new,
    sweep_dead,
    sweep_partials,
)

WRITER = """
import sys
from cluster.storage import publish_bytes
n = 0
while True:
    publish_bytes(sys.argv[1], bytes([n % 256]) * 3_000_000)
    if n == 0:
        print("writing", flush=True)
    n += 1
"""


def test_published_bytes_come_back_with_their_digest(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    data = random.Random(0).randbytes(3_000_000)
    digest = publish_bytes(path, data)
    assert path.read_bytes() == data
    assert digest == digest_file(path) == hashlib.sha256(data).hexdigest()
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_file_url_is_the_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish_bytes(f"file://{tmp_path}/one", b"x")
    publish_new(f"file://{tmp_path}/other", b"y")
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_a_killed_writer_leaves_a_whole_file_and_litter_that_is_swept(tmp_path) -> None:
    path = tmp_path / "a.bin"
    root = Path(__file__).parents[2]
    for attempt in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=root, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        time.sleep(0.01 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        data = path.read_bytes()
        assert len(data) == 3_000_000 and len(set(data)) == 1
    sweep_partials(tmp_path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_sweep_takes_only_litter(tmp_path) -> None:
    (tmp_path / ".a.bin.partial-1-ffff").write_bytes(b"x")
    (tmp_path / "keep.partial").write_bytes(b"x")
    assert sweep_partials(tmp_path) == 1
    assert os.listdir(tmp_path) == ["keep.partial"]


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgeFusionError, match=r"file/a\.bin.*another output folder"):
        publish_bytes(tmp_path / "file" / "a.bin", b"x")


def test_urls_work_too() -> None:
    digest = publish_bytes("memory://bucket/a.bin", b"hello")
    assert fsspec.filesystem("memory").cat("/bucket/a.bin") == b"hello"
    assert digest_file("memory://bucket/a.bin") == digest


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.storage import publish_bytes, publish_file, publish_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
place, big = Path(sys.argv[1]), torch.zeros(1_000_000)
for do in (
    lambda: publish_bytes(place / "a.bin", bytes(2_000_000)),
    lambda: publish_file(place / "b.pt", lambda p: torch.save({"x": big}, p)),
    lambda: publish_folder(place / "c", lambda p: save_file({"x": big}, p / "x.safetensors")),
):
    try:
        do()
        print("written")
    except EdgeFusionError as error:
        print("refused" if "could not be written" in str(error) else error)
"""


def test_a_place_without_room_leaves_nothing_half_written(tmp_path) -> None:
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert said.stdout.split() == ["refused"] * 3, said.stderr[-1500:]
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_whole_and_an_error_of_its_writer_is_not_disguised(tmp_path) -> None:
    publish_folder(tmp_path / "a", lambda p: (p / "old").write_text("1"))
    publish_folder(tmp_path / "a", lambda p: (p / "new").write_text("2"))
    assert os.listdir(tmp_path / "a") == ["new"]
    with pytest.raises(ZeroDivisionError):
        publish_file(tmp_path / "b", lambda p: p.write_text(str(1 / 0)))
    assert os.listdir(tmp_path) == ["a"]


MAKER = """
import sys, time
from pathlib import Path
from cluster.storage import publish_file, publish_folder

def slowly(partial):
    (partial / "half" if sys.argv[2] == "folder" else partial).write_text("half")
    print("making", flush=True)
    time.sleep(600)

{"file": publish_file, "folder": publish_folder}[sys.argv[2]](Path(sys.argv[1]), slowly)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_maker_left_goes_when_the_same_is_made_again_and_a_living_ones_stays(tmp_path, kind) -> None:
    root, path = Path(__file__).parents[2], tmp_path / "made[1]"
    (tmp_path / ".made[1].partial-1-ffff").mkdir()  # as older versions left it; that number of a process always lives
    (tmp_path / ".other.partial-1-ffff").write_text("another's")
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKER, str(path), kind], cwd=root, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for maker in makers:
        assert maker.stdout is not None and maker.stdout.readline() == b"making\n"
    makers[0].kill()
    makers[0].wait()
    publish = publish_file if kind == "file" else publish_folder
    publish(path, lambda p: p.write_text("whole") if kind == "file" else (p / "whole").touch())
    left = {p.name for p in tmp_path.iterdir()} - {"made[1]", ".other.partial-1-ffff"}
    assert len(left) == 1 and f"-{makers[1].pid}-" in left.pop() and sweep_dead(path) == 0
    makers[1].kill()
    makers[1].wait()
    assert sweep_dead(path) == 1
    for maker in makers:
        assert maker.stdout is not None
        maker.stdout.close()


@pytest.mark.parametrize("publish", [publish_bytes, publish_new, publish_file, publish_folder])
def test_a_sweep_spares_what_a_living_writer_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: Callable[..., object]
) -> None:
    """As a run begins while `factory select --name` is at work."""
    sync, swept = os.fsync, list[int]()
    (tmp_path / "views").mkdir()

    def swept_meanwhile(handle: int) -> None:
        sync(handle)
        swept.append(sweep_partials(tmp_path))

    monkeypatch.setattr(os, "fsync", swept_meanwhile)
    (tmp_path / ".dead.partial-1-ffff").write_text("left by a killed one")
    what: dict[Any, Any] = {publish_file: lambda p: p.write_text("whole"), publish_folder: lambda p: (p / "in").touch()}
    publish(tmp_path / "views" / "a", what.get(publish, b"whole"))
    assert sum(swept) == 1 and len(swept) > 1, "the dead one's alone"
    assert os.listdir(tmp_path / "views") == ["a"] and os.listdir(tmp_path) == ["views"]


def test_an_older_folder_is_never_half_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while it goes away sees the new one."""
    publish_folder(tmp_path / "a", lambda p: (p / "old").write_text("1"))
    rmtree, seen = shutil.rmtree, []

    def look(path: Path, **options: object) -> None:
        seen.append((path.name, os.listdir(tmp_path / "a")))
        rmtree(path, **options)

    monkeypatch.setattr("cluster.storage.shutil.rmtree", look)
    publish_folder(tmp_path / "a", lambda p: (p / "new").write_text("2"))
    assert len(seen) == 1 and seen[0][0].startswith(".a.partial-") and seen[0][1] == ["new"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_folders_files_are_on_disk_before_its_name_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, synced, replace = [], [], os.replace
    monkeypatch.setattr(
        "cluster.storage.os.fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    monkeypatch.setattr("cluster.storage.os.replace", lambda a, b: (done.extend(synced), replace(a, b)))
    publish_folder(tmp_path / "a", lambda p: ((p / "in").mkdir(), (p / "in" / "one").write_text("1")))
    assert {Path(name).name for name in done} >= {"one", "in"} and synced[-1] == str(tmp_path)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_of_several_who_publish_a_new_file_one_wins(tmp_path: Path, where: str) -> None:
    path = str(tmp_path / "claim") if where == "disk" else f"memory://{tmp_path.name}/claim"
    assert publish_new(path, b"mine") == hashlib.sha256(b"mine").hexdigest()
    publish_new(path, b"mine")
    with pytest.raises(LedgerConflict, match="is there already, with other contents"):
        publish_new(path, b"yours")
    assert digest_file(path) == hashlib.sha256(b"mine").hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == (["claim"] if where == "disk" else [])


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_one_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    rename, path = os.replace, tmp_path / "claim"

    def no_link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    def slow(source: Path, target: Path) -> None:
        time.sleep(0.05)  # between the look whether it is there and the rename
        rename(source, target)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "replace", slow)

    def attempt(name: int) -> bool:
        try:
            return bool(publish_new(path, b"%d" % name))
        except LedgerConflict:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1 and path.read_bytes() == b"%d" % won.index(True)
    publish_new(path, path.read_bytes())
    sweep_partials(tmp_path)
    assert os.listdir(tmp_path) == ["claim"]


def test_one_killed_while_it_put_a_new_file_without_links_bars_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = (
        "import errno, os, sys, time\n"
        "from cluster.storage import publish_new\n"
        "def no_link(*_): raise OSError(errno.EPERM, 'no')\n"
        "def hang(*_): print('in', flush=True); time.sleep(600)\n"
        "os.link, os.replace = no_link, hang\n"
        "publish_new(sys.argv[1], b'mine')"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "claim")], cwd=root, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    process.kill()
    process.wait()
    process.stdout.close()

    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "link", no_link)
    publish_new(tmp_path / "claim", b"yours")
    assert (tmp_path / "claim").read_bytes() == b"yours"


def test_a_store_that_finds_our_clock_wrong_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 signs requests with the time and refuses those of a clock that is a quarter of an hour wrong."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = (
                b"<?xml version='1.0'?><Error><Code>RequestTimeTooSkewed</Code>"
                b"<Message>The difference between the request time and the current time is too large.</Message></Error>"
            )
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_MAX_ATTEMPTS": "1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(EdgeFusionError, match=r"the clock of this machine is wrong .*Set it \(timedatectl"):
            RemoteStore("s3://bucket/set").names()
    finally:
        server.shutdown()
