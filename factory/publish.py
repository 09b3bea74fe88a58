"""A packed data set into a remote store: the same bytes, shards first and the manifest last, so that it is there whole or not at all.

While it is on its way `packing.json` there says whose manifest is coming; of two who pack different data sets to one place, one is told to
wait. Shards that are there with the right checksum are not sent again, so a killed one goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict
from cluster.heartbeat import is_gone
from cluster.machine import every, this_machine
from cluster.remote import RemoteStore
from cluster.storage import digest_file
from factory.card import CARD, CROISSANT, GRID
from factory.pack import MANIFEST, SHARD, manifest_shards, manifest_table

CLAIM = "packing.json"
_REFRESH_S = 60.0
_SILENT_S = 600.0
"""A claim that was not refreshed for so long is of a dead process."""
_WATCH_S = 2.5 * _REFRESH_S
_LOOK_S = 5.0
_PROBE = ".edgefusion-can-write"

Told = Callable[[str, int, int], None]
"""(what, how many are done, of how many)."""


@dataclass(frozen=True)
class Published:
    """What was done, in shards."""

    url: str
    sent: int
    there: int
    """Not sent, for they were there and right."""
    removed: int
    """Of another packing."""


def publish(folder: Path, url: str, told: Told = lambda what, done, of: None) -> Published:
    """Put the packed data set of `folder` at `url`, in place of an older one there.

    Raises CorruptShard for a data set that is not whole here, LedgerConflict if somebody else is packing to that place, EdgeFusionError for a
    store that refuses.
    """
    manifest_table(folder)  # refuses what is no data set, in words
    shards, data = manifest_shards(folder), (folder / MANIFEST).read_bytes()
    store, mark = RemoteStore(url), _digest(data)
    there = store.names()
    stale = sorted(name for name in there if SHARD.fullmatch(name) and name not in shards)
    claim = _claimed(store) if CLAIM in there else {}
    if _is_there(store, there, data) and claim.get("manifest_sha256", mark) == mark:
        # A rerun, or shards there were damaged: whoever reads meanwhile finds the right manifest.
        sent = _send_shards(folder, store, shards, there, told, lambda: None)
        _finish(folder, store, stale)
        _refuse_changed_here(folder, data)
        if claim:
            store.remove(CLAIM)
        return Published(str(store), sent, len(shards) - sent, len(stale))
    with _claim(store, mark, told) as still_mine:
        # From here on nobody takes what is there for a whole data set; unless another packer of this very one just ended.
        if not _is_there(store, store.names(), data):
            store.remove(MANIFEST)
        sent = _send_shards(folder, store, shards, there, told, still_mine)
        _finish(folder, store, stale)
        still_mine()
        _refuse_changed(folder, store, shards)
        _refuse_changed_here(folder, data)
        store.publish_new(MANIFEST, data)
    return Published(str(store), sent, len(shards) - sent, len(stale))


def check_place(url: str) -> None:
    """See that one may list, write and remove at `url`, before hours are spent. Raises EdgeFusionError."""
    store = RemoteStore(url)
    store.names()
    store.publish(_PROBE, b"may be removed\n")
    store.remove(_PROBE)


def _send_shards(
    folder: Path,
    store: RemoteStore,
    shards: dict[str, str],
    there: dict[str, int],
    told: Told,
    check: Callable[[], None],
) -> int:
    sent = 0
    for done, (name, sha256) in enumerate(shards.items(), 1):
        check()
        local = folder / name
        if not local.exists() or digest_file(local) != sha256:
            raise CorruptShard(
                "is missing or damaged here, so nothing was sent for it",
                where=str(local),
                remedy="Run `edgefusion factory repair`, then the same command again",
            )
        if name not in there or not store.holds(name, local, sha256):
            store.send(name, local)
            sent += 1
        told(f"sending shards to {store}", done, len(shards))
    return sent


def _finish(folder: Path, store: RemoteStore, stale: list[str]) -> None:
    """Shards of another packing go; the card, its pictures and its metadata come."""
    for name in stale:
        store.remove(name)
    for name in (GRID, CROISSANT, CARD):
        if (folder / name).exists():
            store.publish(name, (folder / name).read_bytes())


def _is_there(store: RemoteStore, names: Collection[str], manifest: bytes) -> bool:
    return MANIFEST in names and store.read(MANIFEST) == manifest


def _refuse_changed_here(folder: Path, manifest: bytes) -> None:
    """Packing anew begins with the manifest: while it is what it was, so is every shard that was sent. Raises LedgerConflict."""
    path = folder / MANIFEST
    if not path.exists() or path.read_bytes() != manifest:
        raise LedgerConflict("was packed anew meanwhile", where=str(folder), remedy="Run the same command again")


def _refuse_changed(folder: Path, store: RemoteStore, shards: dict[str, str]) -> None:
    """The manifest vouches for what is there, so a last look: raises LedgerConflict if anybody meddled."""
    sizes = store.names()
    wrong = [name for name in shards if sizes.get(name) != (folder / name).stat().st_size]
    wrong += [name for name in sizes if SHARD.fullmatch(name) and name not in shards]
    if wrong:
        raise LedgerConflict(
            "was changed by somebody else meanwhile", where=f"{store}/{wrong[0]}", remedy="Run the same command again"
        )


@contextmanager
def _claim(store: RemoteStore, mark: str, told: Told) -> Generator[Callable[[], None]]:
    """Say that the data set with this manifest is coming; yields what raises LedgerConflict once somebody else says so.

    The claim goes when the block ends well; one that is left says how far the store is to be trusted, and is taken over by the next run.
    """
    facts = {"manifest_sha256": mark, "host": socket.gethostname(), "machine": this_machine(), "pid": os.getpid()}

    def written() -> bytes:
        return (json.dumps({**facts, "when": round(time.time(), 1)}) + "\n").encode()

    def still_mine() -> None:
        found = _claimed(store)
        # None is there once another packer of this very data set has ended.
        if found.get("manifest_sha256", mark) != mark:
            raise LedgerConflict(
                f"{_who(found)} packs another data set to this place",
                where=str(store),
                remedy="Pack one of them somewhere else",
            )

    def refresh() -> None:
        try:
            still_mine()
            store.publish(CLAIM, written())
        except (EdgeFusionError, OSError):
            pass  # told by the next shard, or the next look

    found = _claimed(store)
    if found.get("manifest_sha256") not in (None, mark):
        if not _is_dead(store, found, told):
            raise LedgerConflict(
                f"{_who(found)} is packing another data set to this place",
                where=str(store),
                remedy=f"Wait for it; if it died, its claim ends {_SILENT_S / 60:.0f} minutes after its last sign of life",
            )
        store.remove(CLAIM)
    if not found or found["manifest_sha256"] != mark:
        store.publish_new(CLAIM, written())
    with every(_REFRESH_S, refresh):
        yield still_mine
    store.remove(CLAIM)


def _claimed(store: RemoteStore) -> dict[str, Any]:
    """What the claim there says; empty if there is none, or none of ours."""
    try:
        found = json.loads(store.read(CLAIM))
        return found if isinstance(found, dict) and isinstance(found.get("manifest_sha256"), str) else {}
    except (CorruptShard, ValueError):
        return {}


def _is_dead(store: RemoteStore, claim: dict[str, Any], told: Told) -> bool:
    """Its process is gone, or it was not refreshed for long by the store's clock. A store without one is watched: clocks of two hosts differ."""
    try:
        if is_gone(claim):
            return True
    except (KeyError, TypeError, ValueError):
        return True  # nothing that we wrote
    silent_s = store.age_s(CLAIM)
    if silent_s is not None:
        return silent_s > _SILENT_S
    end = time.monotonic() + _WATCH_S
    while (left_s := end - time.monotonic()) > 0:
        told(f"waiting to see whether {_who(claim)} still packs to {store}", int(_WATCH_S - left_s), int(_WATCH_S))
        time.sleep(min(_LOOK_S, left_s))
        if _claimed(store) != claim:
            return False
    return True


def _who(claim: dict[str, Any]) -> str:
    return f"process {claim.get('pid', '?')} on {claim.get('host', '?')}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
