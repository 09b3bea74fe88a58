"""A store that fails for a moment is asked again; one that says no is not."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.cache import CacheRecipe, RemoteFolder
from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict
from cluster.remote import RemoteStore
from cluster.retry import TRIES, is_passing, retried

MIB = 1 << 20


class _Shaky(MemoryFileSystem):
    """A store in memory whose next calls of a method, or reads of a stream, fail."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[dict[str, list[Exception]]] = {}
    calls: ClassVar[list[str]] = []
    puts_before_it_fails: ClassVar[bool] = False

    def _maybe(self, name: str) -> None:
        self.calls.append(name)
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._maybe("ls")
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._maybe("cat_file")
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if self.puts_before_it_fails and self.failures.get("pipe_file"):
            super().pipe_file(path, value, mode, **kwargs)
        self._maybe("pipe_file")
        super().pipe_file(path, value, mode, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._maybe("put_file")
        super().put_file(lpath, rpath, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self._maybe("rm_file")
        super().rm_file(path)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super().open(path, mode, **kwargs)
        return _ShakyFile(file.getvalue(), self) if mode == "rb" else file


class _ShakyFile(io.BytesIO):
    def __init__(self, data: bytes, store: _Shaky) -> None:
        super().__init__(data)
        self._store = store

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():  # in the middle
            self.seek(self.tell() + 7) if self._store.failures.get("read") else None
            self._store._maybe("read")
        return super().read(size)


fsspec.register_implementation("shaky", _Shaky, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteStore]:
    monkeypatch.setattr("cluster.retry.FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(_Shaky, "store", {})
    monkeypatch.setattr(_Shaky, "failures", {})
    monkeypatch.setattr(_Shaky, "calls", [])
    yield RemoteStore("shaky://bucket/set")


def fail(method: str, *errors: Exception) -> None:
    _Shaky.failures[method] = list(errors)


@pytest.mark.parametrize(
    ("method", "do"),
    [
        ("ls", lambda store, local: store.names()),
        ("cat_file", lambda store, local: store.read("a")),
        ("put_file", lambda store, local: store.send("b", local)),
        ("pipe_file", lambda store, local: store.publish("b", b"x")),
        ("pipe_file", lambda store, local: store.publish_new("b", b"x")),
        ("rm_file", lambda store, local: store.remove("a")),
    ],
)
def test_what_fails_twice_succeeds_the_third_time_and_is_logged(
    store: RemoteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, do: Callable[..., Any]
) -> None:
    (tmp_path / "local").write_bytes(b"x")
    store.publish("a", b"hello")
    _Shaky.calls.clear()
    fail(method, TimeoutError("no answer"), ConnectionResetError("reset by peer"))
    with caplog.at_level(logging.WARNING, "edgefusion"):
        do(store, tmp_path / "local")
    assert _Shaky.calls.count(method) == 3
    assert [
        line for line in caplog.messages if "shaky://bucket/set" in line and "another try in" in line
    ] == caplog.messages
    assert "no answer" in caplog.messages[0] and "reset by peer" in caplog.messages[1]
    with pytest.raises(EdgeFusionError, match="away for good"):
        fail(method, *[TimeoutError("away for good")] * TRIES)
        do(store, tmp_path / "local")
    assert _Shaky.calls.count(method) == 3 + TRIES


def test_a_stream_that_breaks_off_goes_on_where_it_was(store: RemoteStore) -> None:
    data = bytes(range(256)) * 100
    store.publish("a", data)
    fail("read", ConnectionResetError("cut"), TimeoutError("slow"))
    with store.open("a") as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == data
    assert not _Shaky.failures["read"], "it was never cut"


def test_a_shard_that_breaks_off_is_fetched_again_into_the_cache(tmp_path: Path, store: RemoteStore) -> None:
    data = bytes(3 * MIB) + b"end"
    store.publish("a", data)
    fail("read", ConnectionResetError("cut"), TimeoutError("slow"))
    remote = RemoteFolder(store.url, CacheRecipe(folder=str(tmp_path), limit_gib=4 / 1024))
    with remote.open("a", hashlib.sha256(data).hexdigest()) as file:
        assert file.read() == data


def test_a_no_is_not_asked_for_again(store: RemoteStore, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CorruptShard, match="is missing"):
        store.read("nobody")
    fail("cat_file", PermissionError("AccessDenied"))
    with pytest.raises(EdgeFusionError, match="no permission"):
        store.read("nobody")
    store.publish_new("claim", b"mine")
    with pytest.raises(LedgerConflict):
        store.publish_new("claim", b"yours")
    assert caplog.messages == []


def test_a_put_whose_answer_was_lost_is_no_conflict_with_itself(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Shaky, "puts_before_it_fails", True)
    fail("pipe_file", TimeoutError("the answer was lost"))
    store.publish_new("claim", b"mine")
    assert store.read("claim") == b"mine"


class _Answered(Exception):
    """As botocore raises."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class _WithStatus(Exception):
    """As aiohttp raises."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (_Answered(503, "SlowDown"), True),
        (_Answered(500, "InternalError"), True),
        (_Answered(429, "TooManyRequests"), True),
        (_Answered(403, "AccessDenied"), False),
        (_Answered(403, "RequestTimeTooSkewed"), False),
        (_Answered(404, "NoSuchKey"), False),
        (_Answered(412, "PreconditionFailed"), False),
        (_Answered(409, "ConditionalRequestConflict"), False),
        (_WithStatus(502), True),
        (_WithStatus(404), False),
        (BrokenPipeError("pipe"), True),
        (FileExistsError("there"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("nonsense"), False),
    ],
    ids=repr,
)
def test_which_errors_pass(error: Exception, passing: bool) -> None:
    assert is_passing(error) == passing
    hidden = OSError("what the driver says")
    hidden.__cause__ = error
    assert is_passing(hidden) == passing


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that itself waited for minutes is not waited for again and again."""
    asked: list[int] = []

    def slow() -> None:
        asked.append(1)
        raise TimeoutError

    monkeypatch.setattr("cluster.retry._LAST_TRY_S", -1.0)
    with pytest.raises(TimeoutError):
        retried(slow, "there")
    assert asked == [1]
