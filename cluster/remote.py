"""A folder of a remote store (whatever fsspec reads): files that are whole or absent, and the store's errors in plain words.

Keeps nothing on this machine; `cluster/cache.py` does. What may be over at the next try is tried again (`cluster/retry.py`). A put of S3
or Google Cloud shows when it is whole; `edgefusion cluster storage-check` proves it of any other store.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.retry import Answer, chain_of, retried
from cluster.storage import digest_file, publish_bytes, publish_new, store_code

_BLOCK_BYTES = 8 << 20
"""Read ahead of a stream."""
_PART_BYTES = 50 << 20
"""Of a large upload, as s3fs cuts it: what a compound ETag is a digest of."""
_CHUNK_BYTES = 1 << 20
_KEY = "Check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their like), then run again"
_BAD_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidClientTokenId")
_BAD_CLOCK = ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture")
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")


@dataclass(frozen=True)
class RemoteStore:
    """A folder by its URL, such as s3://bucket/prefix. Every method raises EdgeFusionError for a store that refuses or is not there."""

    url: str

    def __str__(self) -> str:
        return self.url.rstrip("/")

    def names(self) -> dict[str, int]:
        """Files directly in the folder and their bytes; empty for a folder that nobody has written to."""
        with plain_words(self.url):
            try:
                listed: list[dict[str, Any]] = retried(lambda: self._files.ls(self._root, detail=True), str(self))
            except FileNotFoundError as error:
                if _is_missing_bucket(error):
                    raise
                return {}
        files = [entry for entry in listed if entry["type"] == "file"]
        return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in files}

    def read(self, name: str) -> bytes:
        """A small file. Raises CorruptShard if it is not there."""
        where = f"{self}/{name}"
        with plain_words(where):
            return bytes(retried(lambda: self._files.cat_file(self._path(name)), where))

    def open(self, name: str) -> BinaryIO:
        """A file as a stream that is read from begin to end; the memory it takes does not depend on its size.

        Raises CorruptShard if it is not there; so may reading, for it may go while it is read."""
        return open_steadily(self._files, self._path(name), f"{self}/{name}", block_size=_BLOCK_BYTES)

    def holds(self, name: str, local: Path, sha256: str) -> bool:
        """A file with the contents of `local` is there.

        By the store's own checksum where it has one that can be compared (S3's ETag of what is not encrypted by a key of one's own), else
        the file is read.
        """
        where = f"{self}/{name}"
        with plain_words(where):
            try:
                facts: dict[str, Any] = retried(lambda: self._files.info(self._path(name)), where)
            except FileNotFoundError as error:
                if _is_missing_bucket(error):
                    raise
                return False
            if int(facts["size"] or 0) != local.stat().st_size:
                return False
            tag = str(facts.get("ETag", "")).strip('"')
            if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag == _tag(local, compound="-" in tag):
                return True
            return retried(lambda: digest_file(self._path(name), self._files), where) == sha256

    def send(self, name: str, local: Path) -> None:
        """Put a file there as a whole, in place of what is there."""
        where = f"{self}/{name}"
        with plain_words(where, "written"):
            retried(lambda: self._files.put_file(str(local), self._path(name)), where)

    def publish(self, name: str, data: bytes) -> str:
        """As `storage.publish_bytes`."""
        where = f"{self}/{name}"
        with plain_words(where, "written"):
            return retried(lambda: publish_bytes(where, data, self._files), where)

    def publish_new(self, name: str, data: bytes) -> str:
        """As `storage.publish_new`: raises LedgerConflict if another file is there."""
        where = f"{self}/{name}"
        with plain_words(where, "written"):
            return retried(lambda: publish_new(where, data, self._files), where)

    def age_s(self, name: str) -> float | None:
        """How long ago the file was written, by the store's own clock alone: a fresh file is written beside it, compared and removed.

        None if the store does not date its files, or the file is not there."""
        probe = f".edgefusion-clock-{uuid.uuid4().hex[:12]}"
        self.publish(probe, b"may be removed\n")
        where = f"{self}/{name}"

        def both() -> tuple[Any, Any]:
            return self._files.modified(self._path(probe)), self._files.modified(self._path(name))

        try:
            with plain_words(where):
                now, then = retried(both, where)
                return float((now - then).total_seconds())
        except (EdgeFusionError, TypeError):
            return None
        finally:
            self.remove(probe)

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        where = f"{self}/{name}"
        with plain_words(where, "removed"), contextlib.suppress(FileNotFoundError):
            retried(lambda: self._files.rm_file(self._path(name)), where)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        # Neither an instance nor a listing of before: what others write is to be seen, and keys may have changed.
        return open_store(self.url, use_listings_cache=False, skip_instance_cache=True)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]


def open_store(url: str, **options: Any) -> tuple[Any, str]:
    """(fsspec's file system, path in it without a slash at its end); raises EdgeFusionError for what nothing installed reads."""
    try:
        files, root = cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))  # pyright: ignore[reportUnknownMemberType]
    except (ValueError, ImportError) as error:
        remedy = "Install what reads it; S3: pip install 'edgefusion[s3]'"
        raise EdgeFusionError(f"cannot be opened ({error})", where=url, remedy=remedy) from None
    return files, str(root).rstrip("/")


def open_steadily(files: Any, path: str, where: str, **options: Any) -> BinaryIO:
    """A file of an opened store, which can seek where the store's own can; every call is tried again as `retried` does.

    Raises EdgeFusionError, CorruptShard if it is not there; so may reading. `options` are those of fsspec's `open`."""
    return cast(BinaryIO, _Steady(lambda: cast(BinaryIO, files.open(path, "rb", **options)), where))


@contextmanager
def plain_words(where: str, done: str = "read") -> Generator[None]:
    """What a store raises in this block, in which something is `done`, as errors of ours: see `explain_store`."""
    try:
        yield
    except EdgeFusionError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise explain_store(where, error, done) from error


def explain_store(where: str, error: Exception, done: str = "read") -> EdgeFusionError:
    """What the store at `where` raised, in words that a user can act on: CorruptShard for a file that is not there, else EdgeFusionError."""
    chain = chain_of(error)
    codes = {store_code(one) for one in chain} | {type(one).__name__ for one in chain}
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    if _is_missing_bucket(error):
        return EdgeFusionError("there is no such bucket", where=where, remedy="Make it, or correct the address")
    if isinstance(error, FileNotFoundError):
        return CorruptShard("is missing", where=where, remedy="Copy the data set there again")
    if codes & set(_BAD_CLOCK):
        remedy = "Set it (timedatectl, chrony, or the host's own), then run again"
        return EdgeFusionError(
            f"the store says that the clock of this machine is wrong ({first})", where=where, remedy=remedy
        )
    if codes & set(_NO_KEYS):
        return EdgeFusionError(f"the store wants a key and none was found ({first})", where=where, remedy=_KEY)
    if codes & set(_BAD_KEYS):
        return EdgeFusionError(f"the store does not accept the key ({first})", where=where, remedy=_KEY)
    if any(isinstance(one, PermissionError) for one in chain) or codes & {"AccessDenied", "403"}:
        remedy = "Use a key that may list, read, write and delete there, or ask whoever owns the bucket"
        return EdgeFusionError(f"no permission ({first})", where=where, remedy=remedy)
    remedy = "Check the address, the network and the keys (AWS_ACCESS_KEY_ID and its like), then run again"
    return EdgeFusionError(f"cannot be {done} ({first})", where=where, remedy=remedy)


def _is_missing_bucket(error: BaseException) -> bool:
    words = "bucket does not exist" in str(error).lower()
    return isinstance(error, FileNotFoundError) and (
        words or any(store_code(e) == "NoSuchBucket" for e in chain_of(error))
    )


def _tag(local: Path, compound: bool) -> str:
    """The ETag that S3 gives a file: its MD5, or for one that came in parts the MD5 of the parts' MD5s and their number."""
    parts: list[bytes] = []
    with local.open("rb") as file:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), _PART_BYTES if compound else 1 << 62
            while left and (piece := file.read(min(_CHUNK_BYTES, left))):
                digest.update(piece)
                left -= len(piece)
            if parts and left == _PART_BYTES:
                break
            parts.append(digest.digest())
            if left:
                break
    if not compound:
        return parts[0].hex()
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


class _Steady(io.RawIOBase):
    """A file whose errors are in plain words. Where the store breaks it off, it is opened anew and goes on where it was."""

    def __init__(self, begin: Callable[[], BinaryIO], where: str) -> None:
        super().__init__()
        self._begin, self._where = begin, where
        self._file: BinaryIO | None = None
        self._place = 0
        self._steadily(lambda file: None)

    def _steadily(self, do: Callable[[BinaryIO], Answer]) -> Answer:
        """What `do` gives of the opened file, which then stands at `_place`."""

        def once() -> Answer:
            held, self._file = self._file, None
            file = held or self._begin()
            try:
                if held is None and self._place:
                    file.seek(self._place)
                answer = do(file)
            except BaseException:
                with contextlib.suppress(Exception):  # it is of no use any more
                    file.close()
                raise
            self._file = file
            return answer

        with plain_words(self._where):
            return retried(once, self._where)

    def read(self, size: int = -1, /) -> bytes:
        piece = self._steadily(lambda file: file.read(size))
        self._place += len(piece)
        return piece

    def readinto(self, buffer: Any, /) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = self._steadily(lambda file: file.seek(offset, whence))
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
