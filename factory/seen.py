"""Which digests came before, in sixteen bytes each: planning a hundred million rows must not hold a hundred million texts."""

from __future__ import annotations

import numpy as np

_FRESH = 1 << 16
_BYTES = 16
"""Of a digest: that two of 10^9 agree by chance in so many is as likely as one in 10^20."""


class Seen:
    """A set that only grows: the latest in a set of Python's, the earlier ones in sorted arrays, each over twice as long as the next."""

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """False if it was there."""
        key = digest[:_BYTES]
        if key in self._fresh or any(_holds(known, key) for known in self._sorted):
            return False
        self._fresh.add(key)
        self._count += 1
        if len(self._fresh) >= _FRESH:
            run = np.sort(np.array(list(self._fresh), f"S{_BYTES}"))
            while self._sorted and len(self._sorted[-1]) <= 2 * len(run):
                run = np.sort(np.concatenate([self._sorted.pop(), run]))
            self._sorted.append(run)
            self._fresh = set()
        return True


def _holds(known: np.ndarray, key: bytes) -> bool:
    # numpy leaves zeros at the end of a text out, of both alike.
    place = int(np.searchsorted(known, np.array(key, f"S{_BYTES}")))
    return place < len(known) and known[place] == key.rstrip(b"\0")
