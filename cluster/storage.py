"""Files that are whole or absent: atomic publish and digests, on local disk or any fsspec URL."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
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
    handle = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = _hold(partial, _touch_new)
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
        if handle is not None:
            os.close(handle)


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
    with _partial_of(path, _touch_new) as partial:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


def publish_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a fresh folder beside `path`, then put it there by one rename; an older folder there is replaced."""
    with _partial_of(path, Path.mkdir) as partial:
        write(partial)
        for part in (*partial.rglob("*"), partial):
            _sync(part)
        if path.exists():
            # Aside first: one that is half deleted would look like a whole one.
            older = partial.with_name(f"{partial.name}-older")
            os.replace(path, older)
            os.replace(partial, path)
            _remove(older)
        else:
            os.replace(partial, path)
        _sync(path.parent)


@contextlib.contextmanager
def _partial_of(path: Path, make: Callable[[Path], object]) -> Generator[Path]:
    """A file or folder under a temporary name beside `path`; what is left under it is removed, and a full disk is told in plain words."""
    partial, handle = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_dead(path)
        handle = _hold(partial, make)
        yield partial
    except Exception as error:
        # torch and safetensors wrap the system's error in types of their own.
        if isinstance(error, OSError) or any(sign in str(error) for sign in _FULL):
            raise _unwritable(path, error) from error
        raise
    finally:
        _remove(partial)
        if handle is not None:
            os.close(handle)


def _touch_new(path: Path) -> None:
    path.touch(exist_ok=False)


def _hold(partial: Path, make: Callable[[Path], object]) -> int:
    """Make it, under a lock that ends with this process however it ends, in whatever container it runs; returns the handle."""
    while True:
        make(partial)
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(partial, os.O_RDONLY)
            with contextlib.suppress(OSError):  # where there are no locks, `_remove_dead` knows
                fcntl.flock(handle, fcntl.LOCK_SH)
            if partial.exists():
                return handle
            os.close(handle)  # a sweep came between the two lines above


def sweep_dead(path: Path) -> int:
    """Remove what killed makers of the file or folder `path` left beside it; what a living one works on stays. Returns how many there were."""
    found = list(path.parent.glob(f".{glob.escape(path.name)}{PARTIAL}*"))
    return sum(_remove_dead(partial, alone=False) for partial in found)


def _remove_dead(partial: Path, alone: bool) -> bool:
    """Remove it unless a living maker holds it; what no lock tells of, only if the caller is `alone`."""
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):  # somebody holds it, or it is gone
            return False
        except OSError:  # this file system has no locks, or the file may not be opened
            if not alone:
                return False
        _remove(partial)  # under the lock, or its maker could take it in between
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep_partials(folder: str | Path) -> int:
    """Remove what killed writers left below a local folder; returns how many files and folders. What a living one holds stays, but on a file
    system without locks, so call it where no other driver writes."""
    return sum(_remove_dead(path, alone=True) for path in list(Path(folder).rglob(f".*{PARTIAL}*")))


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


def refuse_url(out: str | Path) -> None:
    """Raises EdgeFusionError for a URL as an output folder; as a path it would be a folder of that odd name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):
        raise EdgeFusionError(
            "is a URL, and the ledger, the pictures and the checkpoints of a run need a file system, which all its nodes see",
            where=f"--out {out}",
            remedy="Give a folder; factory.pack.to puts the packed data set to a store",
        )


def local_path(path: str | Path) -> Path:
    """Also of a file:// URL, which would else be a folder of that name."""
    return Path(str(path).removeprefix("file://"))


def _filesystem(path: str | Path) -> Any:
    return fsspec.core.url_to_fs(str(path))[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _sync(path: Path) -> None:
    """A file's bytes must survive a power cut, and a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
