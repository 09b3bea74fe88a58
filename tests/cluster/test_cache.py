"""The cache of remote files: fetched once, proven, bounded, safe for several processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import cluster.cache as cache_module
from cluster.cache import CacheRecipe, RemoteFolder, is_url
from cluster.errors import CorruptShard, EdgeFusionError
from cluster.retry import TRIES

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20


class _Counting(MemoryFileSystem):
    """A store in memory that counts what is opened, and cuts or breaks on demand."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    opened: ClassVar[list[str]] = []
    broken = False
    says_more = 0
    """Bytes by which it overstates every file."""

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        facts = super().info(path, **kwargs)
        return facts | {"size": facts["size"] + self.says_more}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" in mode:
            self.opened.append(path.rpartition("/")[2])
            if self.broken:
                raise TimeoutError("the network is away")
        return super()._open(path, mode=mode, **kwargs)


fsspec.register_implementation("counting", _Counting, clobber=True)


@pytest.fixture
def digests() -> dict[str, str]:
    """Files a, b, c, d of 1 MiB below counting://data, with their checksums."""
    files, _Counting.opened[:] = fsspec.filesystem("counting"), []
    found = {}
    for name in "abcd":
        files.pipe_file(f"counting://data/{name}", name.encode() * MIB)
        found[name] = hashlib.sha256(name.encode() * MIB).hexdigest()
    return found


def remote(folder: Path, mib: float = 100) -> RemoteFolder:
    return RemoteFolder("counting://data", CacheRecipe(folder=str(folder), limit_gib=mib / 1024))


def held(folder: Path, digests: dict[str, str]) -> str:
    return "".join(name for name in digests if (folder / digests[name]).exists())


def test_a_file_is_fetched_once_and_read_from_disk(tmp_path: Path, digests: dict[str, str]) -> None:
    for _ in range(3):
        with remote(tmp_path).open("a", digests["a"]) as file:
            assert file.read() == b"a" * MIB
    assert _Counting.opened == ["a"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [digests["a"]]


def test_a_store_that_overstates_a_size_gives_the_bytes_it_has(
    tmp_path: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Counting, "says_more", 10)
    with remote(tmp_path).open("a", digests["a"]) as file:
        assert file.read() == b"a" * MIB


def test_the_longest_unused_goes_first_and_what_is_open_can_still_be_read(
    tmp_path: Path, digests: dict[str, str]
) -> None:
    files = remote(tmp_path, mib=3)
    kept_open = files.open("a", digests["a"])
    for name in "bca":
        time.sleep(0.02)
        files.open(name, digests[name]).close()
    assert held(tmp_path, digests) == "abc"
    files.open("d", digests["d"]).close()
    assert held(tmp_path, digests) == "acd", "b was not used for longest"
    for name in "bc":
        files.open(name, digests[name]).close()
    assert held(tmp_path, digests) == "bcd" and kept_open.read() == b"a" * MIB
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3 * MIB


def test_a_file_that_is_not_what_the_manifest_says_is_refused_and_not_kept(
    tmp_path: Path, digests: dict[str, str]
) -> None:
    with pytest.raises(CorruptShard, match=r"counting://data/a: has another checksum"):
        remote(tmp_path).open("a", digests["b"])
    with pytest.raises(CorruptShard, match=r"counting://data/zzz: is missing"):
        remote(tmp_path).open("zzz", digests["b"])
    with pytest.raises(EdgeFusionError, match=r"no room in a cache of .*cluster\.cache\.limit_gib"):
        remote(tmp_path, mib=0.5).open("a", digests["a"])
    with pytest.raises(CorruptShard, match="no checksum"):
        remote(tmp_path).open("a", "../../etc/passwd")
    assert held(tmp_path, digests) == ""


def test_one_that_rotted_on_disk_is_fetched_again(
    tmp_path: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote(tmp_path).open("a", digests["a"]).close()
    with (tmp_path / digests["a"]).open("r+b") as file:
        file.write(b"!")
    monkeypatch.setattr(cache_module, "_PROVEN", {})  # as another process sees it
    assert remote(tmp_path).open("a", digests["a"]).read() == b"a" * MIB
    assert _Counting.opened == ["a", "a"]


def test_a_store_that_cannot_be_read_is_told_in_words(
    tmp_path: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Counting, "broken", True)
    monkeypatch.setattr("cluster.retry.FIRST_WAIT_S", 0.0)
    with pytest.raises(EdgeFusionError, match=r"cannot be read \(the network is away\)\. Check the address"):
        remote(tmp_path).open("a", digests["a"])
    assert _Counting.opened == ["a"] * TRIES
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))
    with pytest.raises(EdgeFusionError, match="cannot be opened"):
        RemoteFolder("nosuch://bucket", CacheRecipe(folder=str(tmp_path))).read("x")


def test_several_at_once_fetch_each_file_once_and_keep_the_limit(tmp_path: Path, digests: dict[str, str]) -> None:
    wrong: list[str] = []

    def read(name: str) -> None:
        with remote(tmp_path, mib=100).open(name, digests[name]) as file:
            if file.read() != name.encode() * MIB:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in "abcd" * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and sorted(_Counting.opened) == list("abcd")


READER = """
import hashlib, sys
from pathlib import Path
from cluster.cache import CacheRecipe, RemoteFolder, _locked
url, folder, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = RemoteFolder(url, CacheRecipe(folder=folder, limit_gib=2.5 / 1024))
names = sorted(p.name for p in Path(url.removeprefix("local://")).iterdir())
for turn in range(turns):
    for name in names:
        digest = hashlib.sha256(name.encode() * (1 << 20)).hexdigest()
        with files.open(name, digest) as file:
            assert file.read() == name.encode() * (1 << 20)
        with _locked(Path(folder) / ".lock"):  # nobody makes room now; a file may still change from `.SHA256.part` to its name
            seen = [p.name.lstrip(".") for p in Path(folder).iterdir() if not p.name.endswith("lock")]
        assert len({name[:64] for name in seen}) <= 2, seen
    print(turn, flush=True)
"""


def test_a_file_that_gets_its_name_while_room_is_made_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RemoteFolder(f"local://{tmp_path}", CacheRecipe(folder=str(tmp_path / "cache")))
    name = "a" * 64
    partial = files._folder / f".{name}.part"
    partial.write_bytes(b"x" * 10)

    def finished(_: Path) -> bool:
        partial.rename(files._folder / name)  # by another process, just now
        return answers.pop()

    monkeypatch.setattr("cluster.cache._is_locked", finished)
    answers = [True, False]
    for _ in range(2):
        assert [(path.name, size) for path, size, _ in files._held()] == [(name, 10)]
        (files._folder / name).rename(partial)


def test_processes_share_a_cache_that_is_too_small_even_if_one_is_killed(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "cache"
    store.mkdir()
    for name in "abcd":
        (store / name).write_bytes(name.encode() * MIB)
    words = [sys.executable, "-c", READER, f"local://{store}", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen([*words, "10000"], env=env, stdout=subprocess.PIPE)
    assert victim.stdout and victim.stdout.readline() == b"0\n"
    others = [subprocess.Popen([*words, "8"], env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert [other.wait(60) for other in others] == [0, 0]
    subprocess.run([*words, "1"], env=env, check=True, stdout=subprocess.DEVNULL)
    assert not list(folder.glob(".*.part")), "what the killed one was fetching is swept"


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/x") and is_url("https://host/x")
    assert not is_url("/data/x") and not is_url("file:///data/x") and not is_url("runs/a")
