"""A folder of a remote store (whatever fsspec reads): files that are whole or absent, and the store's errors in plain words.

Keeps nothing on this machine; `cluster/cache.py` does. A put of S3 or Google Cloud shows when it is whole; `edgefusion cluster
storage-check` proves it of any other store.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from cluster.errors import CorruptShard, EdgeFusionError
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
                listed: list[dict[str, Any]] = self._files.ls(self._root, detail=True)
            except FileNotFoundError as error:
                if _is_missing_bucket(error):
                    raise
                return {}
        files = [entry for entry in listed if entry["type"] == "file"]
        return {str(entry["name"]).rpartition("/")[2]: int(entry["size"] or 0) for entry in files}

    def read(self, name: str) -> bytes:
        """A small file. Raises CorruptShard if it is not there."""
        with plain_words(f"{self}/{name}"):
            return bytes(self._files.cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        """A file as a stream that is read from begin to end; the memory it takes does not depend on its size.

        Raises CorruptShard if it is not there; so may reading, for it may go while it is read."""
        where = f"{self}/{name}"
        with plain_words(where):
            file = cast(BinaryIO, self._files.open(self._path(name), "rb", block_size=_BLOCK_BYTES))
        return cast(BinaryIO, _Plainly(file, where))

    def holds(self, name: str, local: Path, sha256: str) -> bool:
        """A file with the contents of `local` is there.

        By the store's own checksum where it has one that can be compared (S3's ETag of what is not encrypted by a key of one's own), else
        the file is read.
        """
        with plain_words(f"{self}/{name}"):
            try:
                facts: dict[str, Any] = self._files.info(self._path(name))
            except FileNotFoundError as error:
                if _is_missing_bucket(error):
                    raise
                return False
            if int(facts["size"] or 0) != local.stat().st_size:
                return False
            tag = str(facts.get("ETag", "")).strip('"')
            if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag == _tag(local, compound="-" in tag):
                return True
            return digest_file(self._path(name), self._files) == sha256

    def send(self, name: str, local: Path) -> None:
        """Put a file there as a whole, in place of what is there."""
        with plain_words(f"{self}/{name}", "written"):
            self._files.put_file(str(local), self._path(name))

    def publish(self, name: str, data: bytes) -> str:
        """As `storage.publish_bytes`."""
        with plain_words(f"{self}/{name}", "written"):
            return publish_bytes(f"{self}/{name}", data, self._files)

    def publish_new(self, name: str, data: bytes) -> str:
        """As `storage.publish_new`: raises LedgerConflict if another file is there."""
        with plain_words(f"{self}/{name}", "written"):
            return publish_new(f"{self}/{name}", data, self._files)

    def age_s(self, name: str) -> float | None:
        """How long ago the file was written, by the store's own clock alone: a fresh file is written beside it, compared and removed.

        None if the store does not date its files, or the file is not there."""
        probe = f".edgefusion-clock-{uuid.uuid4().hex[:12]}"
        self.publish(probe, b"may be removed\n")
        try:
            with plain_words(f"{self}/{name}"):
                now, then = (self._files.modified(self._path(one)) for one in (probe, name))
                return float((now - then).total_seconds())
        except (EdgeFusionError, TypeError):
            return None
        finally:
            self.remove(probe)

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        with plain_words(f"{self}/{name}", "removed"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

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
    chain = _chain(error)
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


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in found:
        found.append(inner)
        inner = inner.__cause__ or inner.__context__
    return found


def _is_missing_bucket(error: BaseException) -> bool:
    words = "bucket does not exist" in str(error).lower()
    return isinstance(error, FileNotFoundError) and (
        words or any(store_code(e) == "NoSuchBucket" for e in _chain(error))
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


class _Plainly:
    """A stream whose errors are in plain words."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where

    def read(self, size: int = -1) -> bytes:
        with plain_words(self._where):
            return self._file.read(size)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _Plainly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
