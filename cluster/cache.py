"""Files of a remote folder, kept on this machine's disk: fetched once, proven by their SHA-256, the longest unused removed first.

Any number of processes of one machine may share a cache: each file is fetched by one of them while the others wait, is seen whole or not
at all, and may be removed while another still reads what it opened. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.machine import cache_folder
from cluster.recipe import Settings
from cluster.remote import explain_store, open_store
from cluster.retry import retried

_CHUNK_BYTES = 1 << 20
_WHOLE = re.compile(r"[0-9a-f]{64}")
_TRIES = 3


class CacheRecipe(Settings):
    """Where files of remote data sets are kept on each machine."""

    folder: str | None = Field(
        default=None, description="folder on a fast local disk of every node; below this user's cache if left out"
    )
    limit_gib: float = Field(
        default=50,
        gt=0,
        description="what it may hold at most, GiB; best more than the data sets, for training reads them in random order",
    )


def is_url(name: str) -> bool:
    """s3://..., gs://..., https://..., whatever fsspec knows; file:// is a folder like any other."""
    return "://" in name and not name.startswith("file://")


@dataclass(frozen=True)
class RemoteFolder:
    """A remote folder by its URL, seen through a cache on this machine. It may be sent to other machines, which then use their own."""

    url: str
    recipe: CacheRecipe = field(default_factory=CacheRecipe)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """A small file, past the cache. Raises CorruptShard if it is not there, EdgeFusionError if the store cannot be read."""
        with self._plain_words(name):
            return bytes(retried(lambda: self._files.cat_file(self._path(name)), f"{self.url}/{name}"))

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Bytes of those of the files that are there."""
        found: dict[str, int] = {}
        with self._plain_words(""), contextlib.suppress(NotImplementedError, FileNotFoundError):
            listed: list[dict[str, Any]] = retried(lambda: self._files.ls(self._root, detail=True), self.url)
            found = {str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"] or 0) for entry in listed}
        for name in set(names) - set(found):
            with self._plain_words(name), contextlib.suppress(FileNotFoundError):
                found[name] = self._size(name)
        return {name: found[name] for name in names if name in found}

    def open(self, name: str, sha256: str) -> BinaryIO:
        """A file whose SHA-256 this is, from the cache; fetched first if it is not there, or not what it should be.

        Raises CorruptShard for a file that is gone or another than `sha256` says, EdgeFusionError for one that has no room.
        """
        if not _WHOLE.fullmatch(sha256):
            raise CorruptShard(f"has no checksum ({sha256[:90]!r})", where=f"{self.url}/{name}", remedy="Pack it again")
        place = self._folder / sha256
        for _ in range(_TRIES):
            if (file := self._kept(place, sha256)) is not None:
                return file
            with _locked(self._folder / f".{sha256}.lock"):
                # Another process may have fetched it while we waited; one that small caches make lose it again is fetched again.
                if not place.exists():
                    self._fetch(name, place, sha256)
                if (file := self._kept(place, sha256)) is not None:
                    return file
        raise EdgeFusionError(
            f"{name} is removed from the cache faster than it can be read",
            where=str(self._folder),
            remedy="Raise cluster.cache.limit_gib",
        )

    @cached_property
    def _folder(self) -> Path:
        folder = Path(self.recipe.folder).expanduser() if self.recipe.folder else cache_folder() / "shards"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EdgeFusionError(
                f"the cache cannot be made ({error.strerror})", where=str(folder), remedy="Set cluster.cache.folder"
            ) from None
        return folder.absolute()

    @cached_property
    def _files(self) -> Any:
        return open_store(self.url)[0]

    @cached_property
    def _root(self) -> str:
        return open_store(self.url)[1]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "recipe": self.recipe}

    def _kept(self, place: Path, sha256: str) -> BinaryIO | None:
        """The file, noted as used just now; None if it is not there. One that this process sees first is proven, and removed if it rotted."""
        try:
            file = place.open("rb")
        except FileNotFoundError:
            return None
        seen = _PROVEN.get(str(place))
        now = os.fstat(file.fileno())
        if seen != (now.st_ino, now.st_size):
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                file.close()
                place.unlink(missing_ok=True)
                return None
            file.seek(0)
            _PROVEN[str(place)] = (now.st_ino, now.st_size)
        with contextlib.suppress(OSError):
            os.utime(place)
        return file

    def _fetch(self, name: str, place: Path, sha256: str) -> None:
        """Copy a remote file to `place`, whole or not at all. Its lock is ours."""
        partial = place.with_name(f".{place.name}.part")
        partial.unlink(missing_ok=True)  # of one who was killed
        try:
            with self._plain_words(name):
                self._make_room(partial, self._size(name))
                found = retried(lambda: self._copy(name, partial), f"{self.url}/{name}")
            if found != sha256:
                raise CorruptShard(
                    "has another checksum than the manifest says",
                    where=f"{self.url}/{name}",
                    remedy="Copy the data set there again, the manifest last",
                )
            facts = partial.stat()
            _PROVEN[str(place)] = (facts.st_ino, facts.st_size)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)

    def _copy(self, name: str, partial: Path) -> str:
        """The remote file's bytes into `partial`, from the begin; returns their SHA-256."""
        digest = hashlib.sha256()
        with self._files.open(self._path(name), "rb") as source, partial.open("r+b") as sink:
            while piece := source.read(_CHUNK_BYTES):
                digest.update(piece)
                sink.write(piece)
            sink.truncate()  # room was made by what the store said of the size
        return digest.hexdigest()

    def _size(self, name: str) -> int:
        """Bytes of a remote file; raises FileNotFoundError."""
        facts: dict[str, Any] = retried(lambda: self._files.info(self._path(name)), f"{self.url}/{name}")
        return int(facts["size"])

    def _make_room(self, partial: Path, size: int) -> None:
        """Reserve `size` bytes under the name `partial`, removing what was not used for longest. Raises EdgeFusionError without room."""
        limit = int(self.recipe.limit_gib * 2**30)
        with _locked(self._folder / ".lock"):
            held = self._held()
            others = sum(bytes_ for path, bytes_, _ in held if not _WHOLE.fullmatch(path.name))
            if others + size > limit:
                raise EdgeFusionError(
                    f"a file of {size / 2**30:.3g} GiB has no room in a cache of {self.recipe.limit_gib:g} GiB"
                    + (f", {others / 2**30:.3g} of which are being fetched into" if others else ""),
                    where=str(self._folder),
                    remedy="Raise cluster.cache.limit_gib above the largest shard for every worker of a machine",
                )
            over = sum(bytes_ for _, bytes_, _ in held) + size - limit
            for path, bytes_, _ in sorted(held, key=lambda one: one[2]):
                if over <= 0:
                    break
                if _WHOLE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                    over -= bytes_
            with partial.open("wb") as file:
                # Sparse: it counts from now on, and a full disk is told by the write.
                file.truncate(size)

    def _held(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use) of files and of those being fetched; leftovers of killed processes are removed."""
        found: dict[Path, tuple[int, float]] = {}

        def count(path: Path) -> None:
            facts = path.stat()
            found[path] = (facts.st_size, facts.st_mtime)

        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _WHOLE.fullmatch(path.name):
                    count(path)
                elif path.name.endswith(".part"):
                    try:
                        if _is_locked(path.with_name(f"{path.stem}.lock")):
                            count(path)
                        else:
                            path.unlink()
                    except FileNotFoundError:  # since the folder was listed it got its own name
                        count(path.with_name(path.stem.lstrip(".")))
        return [(path, *facts) for path, facts in found.items()]

    @contextmanager
    def _plain_words(self, name: str) -> Generator[None]:
        """A missing file and a store that cannot be read, in words; a full disk of ours apart from trouble with the store."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except (EdgeFusionError, NotImplementedError):
            raise
        except OSError as error:
            if error.errno is not None and shutil.disk_usage(self._folder).free < _CHUNK_BYTES:
                raise EdgeFusionError(
                    "the disk of the cache is full",
                    where=str(self._folder),
                    remedy="Free space or lower cluster.cache.limit_gib",
                ) from error
            raise explain_store(where, error) from error
        except Exception as error:  # each store has exceptions of its own
            raise explain_store(where, error) from error


_PROVEN: dict[str, tuple[int, int]] = {}
"""(inode, bytes) of cached files whose checksum this process has seen to be right, by path."""


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Alone among the processes of this machine; a killed one lets go by itself. Lock files are empty and stay."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
