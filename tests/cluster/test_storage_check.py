"""Good stores pass, and each way of being bad is found by name: on disk, in memory, and on S3 by a stand-in on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.storage_check import Finding, Probe, check_storage
from edgefusion import app
from tests.s3 import s3_bucket

SMALL = Probe(rounds=12, object_bytes=1 << 16, objects=8, stream_bytes=1 << 20)


class _Bad(MemoryFileSystem):
    """A store in memory of a class of its own; its faults are set by `fault`."""

    protocol = "bad"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault = ""
    lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if self.fault == "torn" and path.endswith("one"):
            super().pipe_file(path, value[: len(value) // 2])
            import time

            time.sleep(0.01)
        if self.fault == "stale" and self.exists(path):
            return
        with self.lock:
            if mode == "create" and self.fault != "careless" and self.exists(path):
                raise FileExistsError(path)
            super().pipe_file(path, value)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = super().ls(path, detail=detail, **kwargs)
        return found[:-1] if self.fault == "blind" and path.endswith("many") else found

    def rm_file(self, path: str) -> None:
        if self.fault != "undead":
            super().rm_file(path)


fsspec.register_implementation("bad", _Bad, clobber=True)


def failed(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in findings if not finding.ok}


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("torn", "whole or absent", "nobody wrote as a whole"),
        ("stale", "read after write", "gave older contents"),
        ("blind", "listing", "lacks 1 and invents 0 of 8"),
        ("undead", "delete", "still there"),
        ("careless", "one of several wins", "4 of 4 who published the same new name"),
    ],
)
def test_a_bad_store_is_found_out(monkeypatch: pytest.MonkeyPatch, fault: str, name: str, words: str) -> None:
    assert failed(check_storage("bad://runs", SMALL)) == {}
    monkeypatch.setattr(_Bad, "fault", fault)
    found = failed(check_storage("bad://runs", SMALL))
    assert words in found[name]


def test_a_folder_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    said = CliRunner().invoke(app, ["cluster", "storage-check", str(tmp_path), "--megabytes", "1"])
    assert said.exit_code == 0 and said.output.count("ok ") == 6 and "MiB/s" in said.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_store_that_cannot_be_written_fails_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise EdgeFusionError("could not be written (Read-only file system)")

    monkeypatch.setattr("cluster.storage_check.publish_bytes", refuse)
    finding = check_storage(str(tmp_path), SMALL)[0]
    assert not finding.ok and "Read-only" in finding.detail
    with pytest.raises(EdgeFusionError):
        check_storage("nosuch://bucket", SMALL)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A prefix of an empty bucket of a stand-in for S3 on loopback."""
    with s3_bucket(monkeypatch) as bucket:
        yield f"{bucket}/check"


def test_s3_by_a_stand_in(s3: str) -> None:
    findings = check_storage(s3, SMALL)
    assert failed(findings) == {} and len(findings) == 6
    missing = check_storage("s3://no-such-bucket/x", SMALL)
    assert not missing[0].ok
