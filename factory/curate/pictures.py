"""Pictures on demand: one unit's file is read when one of its pictures is wanted; what stays in memory is bounded in bytes."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from factory.pixels import decode_picture, opened

THUMBNAIL_PX = 320
"""Longest edge; smaller pictures are sent as they are."""
_UNITS_BYTES, _THUMBNAILS_BYTES = 256 << 20, 64 << 20
_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class _Bounded:
    """Least recently used first out, bounded by bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._held: OrderedDict[str, tuple[object, int]] = OrderedDict()

    def get(self, key: str) -> object | None:
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: str, value: object, size_bytes: int) -> None:
        if size_bytes > self.limit_bytes or key in self._held:
            return
        self._held[key] = (value, size_bytes)
        self.used_bytes += size_bytes
        while self.used_bytes > self.limit_bytes:
            self.used_bytes -= self._held.popitem(last=False)[1][1]


class Pictures:
    """The pictures of one data set folder. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pictures"
        self._units, self._thumbnails = _Bounded(_UNITS_BYTES), _Bounded(_THUMBNAILS_BYTES)
        self._lock = threading.Lock()

    def picture(self, unit: str, key: str) -> bytes | None:
        """The encoded file of picture `key` in `unit`, or None if the unit has no such picture. `unit` comes from the ledger."""
        with self._lock:  # Six requests for one unit read it once.
            held = self._units.get(unit)
            if held is None:
                held = self._read(unit)
                self._units.put(unit, held, sum(map(len, held.values())))
        assert isinstance(held, dict)
        return held.get(key)

    def thumbnail(self, unit: str, key: str) -> bytes | None:
        """As `picture`, at most THUMBNAIL_PX on the longest edge. Raises ValueError for what cannot be decoded."""
        with self._lock:
            small = self._thumbnails.get(key)
        if small is None and (data := self.picture(unit, key)) is not None:
            small = _shrink(data)
            if small is not data:  # The original is held already, with its unit.
                with self._lock:
                    self._thumbnails.put(key, small, len(small))
        assert small is None or isinstance(small, bytes)
        return small

    def _read(self, unit: str) -> dict[str, bytes]:
        try:
            table = pq.read_table(self.folder / f"{unit}.parquet", columns=["id", "picture"])
        except (OSError, pa.ArrowInvalid):
            return {}  # Pictures may lie elsewhere by now; the rest of the page is of use without them.
        return dict(zip(table["id"].to_pylist(), table["picture"].to_pylist(), strict=True))


def media_type(data: bytes) -> str | None:
    """By the first bytes: PNG, JPEG or WebP; nothing else is ever served."""
    return next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)


def _shrink(data: bytes) -> bytes:
    with opened(data) as image:
        if max(image.size) <= THUMBNAIL_PX:
            return data
    small = Image.fromarray(decode_picture(data))
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=80, method=2)
    return sink.getvalue()
