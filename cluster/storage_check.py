"""Proves of a store what runs rely on: objects appear whole or not at all, at once, in listings too, one of several who put the same; and says how fast it is.

Works below a fresh folder of its own and removes it. Uses the calls that publish shards, ledger entries and claims of a place.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from cluster.errors import EdgeFusionError, LedgerConflict, TargetUnavailable
from cluster.storage import PARTIAL, publish_bytes, publish_new

_PUBLISHERS = 4


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Probe:
    """How hard to try."""

    rounds: int = 40
    """Overwrites of one object while it is read."""
    object_bytes: int = 1 << 20
    objects: int = 50
    """Objects of the listing."""
    names: int = 10
    """New names that several publish at once."""
    stream_bytes: int = 64 << 20
    """Bytes of the throughput test, in eight objects."""


def check_storage(url: str, probe: Probe | None = None) -> list[Finding]:
    """Try `url` (a folder or any fsspec URL); raises TargetUnavailable without its driver, EdgeFusionError if it cannot be reached."""
    probe = probe or Probe()
    system, root = _open(url)
    base = f"{url.rstrip('/')}/.edgefusion-check-{uuid.uuid4().hex[:12]}"
    folder = f"{root.rstrip('/')}/{base.rsplit('/', 1)[1]}"
    findings: list[Finding] = []
    try:
        for name, test in (
            ("whole or absent", _is_atomic),
            ("read after write", _reads_its_writes),
            ("listing", _lists),
            ("delete", _deletes),
            ("one of several wins", _lets_one_win),
            ("throughput", _throughput),
        ):
            findings.append(_try(name, test, system, base, folder, probe))
            if len(findings) == 1 and not findings[0].ok and "cannot be written" in findings[0].detail:
                break
    finally:
        # Not an error of its own: it must not hide what went before.
        tidy = _try("clean up", _cleans, system, base, folder, probe)
        findings += [] if tidy.ok else [tidy]
    return findings


Test = Callable[[Any, str, str, Probe], str]
"""(file system, URL, path, probe) -> what was seen; raises AssertionError with what was wrong."""


def _try(name: str, test: Test, system: Any, base: str, folder: str, probe: Probe) -> Finding:
    try:
        return Finding(name, True, test(system, base, folder, probe))
    except AssertionError as error:
        return Finding(name, False, str(error))
    except Exception as error:
        # Stores fail in types of their own; to a user each is an answer.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(name, False, f"cannot be written, read or listed: {first}"[:300])


def _open(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        # No caches: another host's writes are what this is about.
        options: dict[str, Any] = (
            {} if protocol == "file" else {"use_listings_cache": False, "skip_instance_cache": True}
        )
        system, root = cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))  # pyright: ignore[reportUnknownMemberType]
        if protocol == "file":
            os.makedirs(root, exist_ok=True)
        return system, root
    except ImportError as error:
        raise TargetUnavailable(
            f"{protocol}:// needs a driver ({error})", where=url, remedy="For s3:// pip install s3fs; for gs:// gcsfs"
        ) from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EdgeFusionError(
            f"cannot be opened ({first})", where=url, remedy="Check the URL and credentials"
        ) from error


def _is_atomic(system: Any, base: str, folder: str, probe: Probe) -> str:
    """One thread overwrites an object again and again, three read it: each read is one of the written wholes."""
    contents = [bytes([i]) * probe.object_bytes for i in range(4)]
    known = {hashlib.sha256(content).digest() for content in contents}
    publish_bytes(f"{base}/one", contents[0])
    wrong: list[str] = []
    reads, stop = [0, 0, 0], threading.Event()

    def read(mine: int) -> None:
        while not stop.is_set():
            try:
                seen = system.cat_file(f"{folder}/one")
            except Exception as error:
                wrong.append(f"an object that is being replaced could not be read ({type(error).__name__})")
                return
            reads[mine] += 1
            if hashlib.sha256(seen).digest() not in known:
                wrong.append(f"a reader saw {len(seen)} bytes that nobody wrote as a whole")
                return

    readers = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(3)]
    for reader in readers:
        reader.start()
    try:
        for i in range(probe.rounds):
            publish_bytes(f"{base}/one", contents[(i + 1) % 4])
    finally:
        stop.set()
        for reader in readers:
            reader.join(timeout=60)
    assert not wrong, wrong[0]
    assert sum(reads), "no reader got to read, so nothing was shown"
    return f"{probe.rounds} overwrites, {sum(reads)} reads of {probe.object_bytes >> 10} KiB, each one whole"


def _reads_its_writes(system: Any, base: str, folder: str, probe: Probe) -> str:
    stale = 0
    for i in range(probe.rounds):
        content = f"{i} {uuid.uuid4()}".encode()
        publish_bytes(f"{base}/fresh", content)
        stale += system.cat_file(f"{folder}/fresh") != content
    assert not stale, f"{stale} of {probe.rounds} reads right after a write gave older contents"
    return f"{probe.rounds} overwrites, each read back at once"


def _lists(system: Any, base: str, folder: str, probe: Probe) -> str:
    wanted: set[str] = set()
    for i in range(probe.objects):
        publish_bytes(f"{base}/many/object-{i:05d}", b"x")
        wanted.add(f"object-{i:05d}")
    began = time.perf_counter()
    found = {str(path).rstrip("/").rsplit("/", 1)[1] for path in system.ls(f"{folder}/many", detail=False)}
    took = time.perf_counter() - began
    assert not any(PARTIAL in name for name in found), "a listing shows unfinished files"
    assert found == wanted, f"a listing lacks {len(wanted - found)} and invents {len(found - wanted)} of {len(wanted)}"
    return f"{len(wanted)} objects, all listed at once, in {took * 1000:.0f} ms"


def _deletes(system: Any, base: str, folder: str, probe: Probe) -> str:
    publish_bytes(f"{base}/gone", b"x")
    system.rm_file(f"{folder}/gone")
    assert not system.exists(f"{folder}/gone"), "a deleted object is still there"
    left = [str(path) for path in system.ls(folder, detail=False) if str(path).endswith("gone")]
    assert not left, "a deleted object is still listed"
    return "gone at once"


def _lets_one_win(system: Any, base: str, folder: str, probe: Probe) -> str:
    """Several threads publish the same new name at the same moment, each its own contents: packers rely on it that one of them wins."""
    for i in range(probe.names):
        name, start = f"new-{i}", threading.Barrier(_PUBLISHERS)
        won: list[bytes] = []
        wrong: list[Exception] = []

        def publish(own: bytes, name: str = name, start: threading.Barrier = start) -> None:
            start.wait(timeout=60)
            try:
                publish_new(f"{base}/{name}", own)
                won.append(own)  # noqa: B023 (joined before the next turn)
            except LedgerConflict:
                pass
            except Exception as error:
                wrong.append(error)  # noqa: B023

        threads = [threading.Thread(target=publish, args=(f"{k}".encode(),), daemon=True) for k in range(_PUBLISHERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        if wrong:
            raise wrong[0]
        assert len(won) == 1, (
            f"{len(won)} of {_PUBLISHERS} who published the same new name at once were told that they won: let only one pack there at a time"
        )
        assert system.cat_file(f"{folder}/{name}") == won[0], "what lies there is not the winner's"
    return f"{probe.names} new names, each published by {_PUBLISHERS} at once: one won"


def _cleans(system: Any, base: str, folder: str, probe: Probe) -> str:
    if system.exists(folder):
        system.rm(folder, recursive=True)
    return f"{base} is gone"


def _throughput(system: Any, base: str, folder: str, probe: Probe) -> str:
    piece = os.urandom(max(1, probe.stream_bytes // 8))
    began = time.perf_counter()
    for i in range(8):
        publish_bytes(f"{base}/stream-{i}", piece)
    wrote = time.perf_counter() - began
    began = time.perf_counter()
    for i in range(8):
        assert system.cat_file(f"{folder}/stream-{i}") == piece, "what was read is not what was written"
    read = time.perf_counter() - began
    mib = 8 * len(piece) / 2**20
    return (
        f"wrote {mib / wrote:.0f} MiB/s, read {mib / read:.0f} MiB/s ({mib:.0f} MiB, one stream; reads may be cached)"
    )
