"""Files that are whole or absent: atomic publish and digests, on local disk or any fsspec URL."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from cluster.errors import EdgeFusionError, LedgerConflict

PARTIAL = ".partial-"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links say of one: many of FUSE, SMB, FAT."""
_CHUNK_BYTES = 1 << 20
_FULL = (
    "No space left",
    "File too large",
    "file write failed",
    "iostream error",
    "inline_container",
    "StorageFull",
    "FileTooLarge",
    "os error 28",
    "os error 27",
    "Disk quota",
)


def publish_bytes(path: str | Path, data: bytes, files: Any = None) -> str:
    """Write `data` so that no reader ever sees a part of it; returns its SHA-256 in hex.

    On local disk: temporary file beside it, fsync, rename, fsync of the folder. On an object store a put is atomic by itself; `files` is
    an opened fsspec file system to use for it. Raises EdgeFusionError if the place is full or cannot be written; nothing half-written is
    left under the final name.
    """
    if _is_remote(path):
        (files or _filesystem(path)).pipe_file(str(path), data)
    else:
        _write_beside(local_path(path), data)
    return hashlib.sha256(data).hexdigest()


def publish_new(path: str | Path, data: bytes, files: Any = None) -> str:
    """As `publish_bytes`, but of several who try at once one wins: raises LedgerConflict if something else is there already.

    The same bytes are no conflict: a put whose answer was lost is tried again. On disk by a link, on S3 and Google Cloud by a condition
    of the put; a store that knows no conditions is asked whether the file is there, which leaves a moment for two to win. So does a disk
    without hard links, if it also does not tell its hosts of each other's locks; processes of one host are told apart there too.
    """
    try:
        if _is_remote(path):
            (files or _filesystem(path)).pipe_file(str(path), data, mode="create")
        else:
            _write_beside(local_path(path), data, only_new=True)
    except OSError as error:
        if not _was_there(error):
            raise
        there = None
        with contextlib.suppress(FileNotFoundError):  # it was removed since
            there = b"".join(_pieces(path, files))
        if there != data:
            raise LedgerConflict(
                "is there already, with other contents", where=str(path), remedy="See who else writes there"
            ) from None
    return hashlib.sha256(data).hexdigest()


def _was_there(error: OSError) -> bool:
    """Also as S3 says it: a condition of the put did not hold."""
    return isinstance(error, FileExistsError) or store_code(error.__cause__) in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
    )


def store_code(error: BaseException | None) -> str:
    """S3's own word for what went wrong, of an error that botocore raised; empty if there is none."""
    answer: Any = getattr(error, "response", None)
    try:
        return str(answer["Error"]["Code"])
    except (KeyError, TypeError):
        return ""


def _write_beside(final: Path, data: bytes, only_new: bool = False) -> None:
    """Write a temporary file beside `final` and put it there by one call of the system."""
    partial = final.with_name(f".{final.name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (_put_new if only_new else os.replace)(partial, final)
        _sync(final.parent)
    except OSError as error:
        if only_new and isinstance(error, FileExistsError) and final.is_file():
            raise
        raise _unwritable(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _put_new(partial: Path, final: Path) -> None:
    """Give the whole file `partial` the name `final` unless that is taken; raises FileExistsError."""
    try:
        return os.link(partial, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    # The system lets go of the lock of a process that was killed, so nothing is left to be cleared away. The file stays until the next
    # sweep: who removes it could let two in, one by the old file and one by a new one.
    handle = os.open(final.with_name(f".new{PARTIAL}lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        os.replace(partial, final)
    finally:
        os.close(handle)


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a local file too large for memory, then put it under `path` whole, as `publish_bytes` does."""
    with _partial_of(path) as partial:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


def publish_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a fresh folder beside `path`, then put it there by one rename; an older folder there is replaced.

    No call of the system replaces a full folder, so for a moment there is none: killed then, the old one is gone and the new one not there.
    """
    with _partial_of(path) as partial:
        partial.mkdir()
        write(partial)
        _sync_tree(partial)
        if path.exists():
            # Aside by one rename: killed while it is removed, it must not stand there in part.
            old = partial.with_name(f"{partial.name}-old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, path)
        _sync(path.parent)


@contextlib.contextmanager
def _partial_of(path: Path) -> Generator[Path]:
    """A temporary name beside `path`; what is left under it is removed, and a full disk is told in plain words."""
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except Exception as error:
        # torch and safetensors wrap the system's error in types of their own.
        if isinstance(error, OSError) or any(sign in str(error) for sign in _FULL):
            raise _unwritable(path, error) from error
        raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def sweep_partials(folder: str | Path) -> int:
    """Remove what killed writers left below a local folder; returns how many files and folders. Call it while nobody writes there."""
    found = list(Path(folder).rglob(f".*{PARTIAL}*"))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def digest_file(path: str | Path, files: Any = None) -> str:
    """SHA-256 of a file or URL in hex, read in pieces of a mebibyte."""
    digest = hashlib.sha256()
    for piece in _pieces(path, files):
        digest.update(piece)
    return digest.hexdigest()


def _unwritable(path: str | Path, error: Exception) -> EdgeFusionError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return EdgeFusionError(
        f"could not be written ({reason})", where=str(path), remedy="Free space or choose another output folder"
    )


def _pieces(path: str | Path, files: Any = None) -> Iterator[bytes]:
    with cast(BinaryIO, (files or _filesystem(path)).open(str(path), "rb")) as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def local_path(path: str | Path) -> Path:
    """Also of a file:// URL, which would else be a folder of that name."""
    return Path(str(path).removeprefix("file://"))


def _filesystem(path: str | Path) -> Any:
    return fsspec.core.url_to_fs(str(path))[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            _sync(path)


def _sync(path: Path) -> None:
    """A file, or a folder: a rename itself must survive a power cut, not only the bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
