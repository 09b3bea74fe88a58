"""Near duplicates among millions of pictures, without comparing each with each and without decoding one.

Rows come in order of preference, the best first. A row falls if it is near to a row that was kept before it, so what is kept is a
function of the order alone. Knows no ledger and no recipe: arrays in, array out.

Legend: N rows, D dimensions of an embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb
from typing import Protocol

import numpy as np

_BLOCK_ROWS = 1 << 16
_CHUNK_PAIRS = 1 << 21
"""Candidate pairs looked at together: what bounds the memory."""
_MOST_PAIRS = 1 << 22
"""Near pairs inside a block; with more of them the block is halved."""
_HASH_BITS, _MOST_BAND_BITS = 64, 22

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
"""Pieces of (query row, base row)."""


class Nearness(Protocol):
    @property
    def block_rows(self) -> int:
        """Rows judged together."""
        ...

    def pairs(self, queries: np.ndarray, base: np.ndarray) -> Pairs:
        """Near pairs of a row of `queries` and an EARLIER row of `base` (both ascending), perhaps more than once."""
        ...


def keep_first(near: Nearness, forced: np.ndarray) -> np.ndarray:
    """For each of N rows, -1 if it is kept, else the first kept row it is near to. `forced` rows (N bools) are always kept."""
    count = len(forced)
    parent = np.full(count, -1, np.int64)
    blocks = [(start, min(start + near.block_rows, count)) for start in range(0, count, near.block_rows)][::-1]
    while blocks:
        start, stop = blocks.pop()
        rows = np.arange(start, stop)
        kept = np.flatnonzero(parent[:start] < 0)
        first = _first(near.pairs(rows, kept), start, stop)
        parent[start:stop] = np.where((first < count) & ~forced[start:stop], first, -1)
        still = rows[parent[start:stop] < 0]
        inside = _gather(near.pairs(still, still), enough=_MOST_PAIRS if len(rows) > 256 else None)
        if inside is None:
            middle = (start + stop) // 2
            blocks += [(middle, stop), (start, middle)]
            continue
        parent[start:stop] = _settle(*inside, start, parent[start:stop], forced[start:stop])
    return parent


def _first(pairs: Pairs, start: int, stop: int) -> np.ndarray:
    """The smallest base row of each query row from `start` to `stop`; a huge number where there is none."""
    first = np.full(stop - start, np.iinfo(np.int64).max)
    for query, base in pairs:
        np.minimum.at(first, query - start, base)
    return first


def _gather(pairs: Pairs, enough: int | None) -> tuple[np.ndarray, np.ndarray] | None:
    """All pairs in two arrays; None if there are more than `enough`."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    total = 0
    for query, base in pairs:
        total += len(query)
        if enough is not None and total > enough:
            return None
        found.append((query, base))
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *(q for q, _ in found)]), np.concatenate([empty, *(b for _, b in found)])


def _settle(query: np.ndarray, base: np.ndarray, start: int, parent: np.ndarray, forced: np.ndarray) -> np.ndarray:
    """What going through a block row by row would give, in as many rounds as the longest chain of near rows has links."""
    query, base = query - start, base - start
    keep, fall = forced.copy(), parent >= 0
    open_query, open_base = query, base
    while not (keep | fall).all():
        some = ~(keep | fall)[open_query] & ~fall[open_base]
        open_query, open_base = open_query[some], open_base[some]
        fall[open_query[keep[open_base]]] = True
        waits = np.zeros(len(keep), bool)
        waits[open_query] = True
        keep |= ~(fall | waits)
    first = np.full(len(keep), np.iinfo(np.int64).max)
    some = keep[base] & fall[query]
    np.minimum.at(first, query[some], base[some])
    return np.where(fall & (parent < 0), first + start, parent)


# --- perceptual: 64-bit hashes and the mean colours of the quadrants


@dataclass(frozen=True)
class Drawings:
    """Pictures whose hashes differ in at most `bits` bits and whose colours differ by at most `shades` everywhere."""

    hashes: np.ndarray
    """N uint64."""
    colours: np.ndarray
    """N x 12 uint8."""
    bits: int
    shades: float
    block_rows: int = _BLOCK_ROWS

    def pairs(self, queries: np.ndarray, base: np.ndarray) -> Pairs:
        """Multi-index hashing (Norouzi et al., arXiv 1307.2982): two near hashes are nearer still in one of a few bands of bits."""
        for shift, width, flips in _bands(self.bits, len(base)):
            mask = np.uint64((1 << width) - 1)
            keys = ((self.hashes[base] >> np.uint64(shift)) & mask).astype(np.int64)
            order = np.argsort(keys, kind="stable")
            members = base[order]
            ends = np.cumsum(np.bincount(keys, minlength=1 << width))
            wanted = ((self.hashes[queries] >> np.uint64(shift)) & mask).astype(np.int64)
            for flip in flips:
                found = wanted ^ flip
                stop = ends[found]
                begin = np.where(found > 0, ends[found - 1], 0)
                for piece, place in _expand(begin, stop - begin):
                    yield from self._near(queries[piece], members[place])

    def _near(self, query: np.ndarray, base: np.ndarray) -> Pairs:
        some = base < query
        query, base = query[some], base[some]
        some = np.bitwise_count(self.hashes[query] ^ self.hashes[base]) <= self.bits
        query, base = query[some], base[some]
        difference = np.abs(self.colours[query].astype(np.int16) - self.colours[base])
        some = (difference <= self.shades).all(axis=1)
        yield query[some], base[some]


def same_drawing(hashes: np.ndarray, colours: np.ndarray, forced: np.ndarray, bits: int, shades: float) -> np.ndarray:
    """`keep_first` of Drawings. Rows that look exactly alike are compared with others once, so a million copies cost nothing."""
    looks = np.empty(len(hashes), np.dtype([("hash", "<u8"), ("colours", "V12")]))
    looks["hash"], looks["colours"] = hashes, np.ascontiguousarray(colours).view("V12")[:, 0]
    _, leader, which = np.unique(looks.view("V20"), return_index=True, return_inverse=True)
    leader = leader[which.reshape(-1)]
    asked = np.flatnonzero((leader == np.arange(len(hashes))) | forced | forced[leader])
    inner = keep_first(Drawings(hashes[asked], colours[asked], bits, shades), forced[asked])
    parent = np.full(len(hashes), -1, np.int64)
    parent[asked] = np.where(inner >= 0, asked[inner], -1)
    follows = np.ones(len(hashes), bool)
    follows[asked] = False
    chief = leader[follows]
    parent[follows] = np.where(parent[chief] >= 0, parent[chief], chief)
    return parent


def _bands(bits: int, count: int) -> list[tuple[int, int, list[int]]]:
    """(lowest bit, width, what to flip) of each band: the cheapest cut of the hash for `count` rows that misses no pair."""
    cuts = [_cut(bits, bands) for bands in range(-(-_HASH_BITS // _MOST_BAND_BITS), bits + 4)]

    def cost(cut: list[tuple[int, int, int]]) -> float:
        return sum(sum(comb(w, k) for k in range(r + 1)) * (1 + count / 2**w) for _, w, r in cut)

    return [
        (shift, width, [sum(1 << i for i in places) for k in range(radius + 1) for places in _choose(width, k)])
        for shift, width, radius in min(cuts, key=cost)
    ]


def _cut(bits: int, bands: int) -> list[tuple[int, int, int]]:
    """(lowest bit, width, radius): by the pigeonhole principle the radii need to sum to bits - bands + 1 only; -1 drops a band."""
    widths = [_HASH_BITS // bands + (i < _HASH_BITS % bands) for i in range(bands)]
    total = bits - bands + 1
    radii = [total // bands + (i < total % bands) for i in range(bands)]
    shifts = [0, *itertools.accumulate(widths)]
    return [(shifts[i], widths[i], radii[i]) for i in range(bands) if radii[i] >= 0]


def _choose(width: int, count: int) -> Iterator[tuple[int, ...]]:
    return itertools.combinations(range(width), count)


def _expand(begin: np.ndarray, count: np.ndarray) -> Pairs:
    """(number of the range, place in it) for every place of the ranges, in pieces of a bounded size."""
    ends = np.cumsum(count)
    first, total = 0, int(ends[-1]) if len(ends) else 0
    done = 0
    while done < total:
        last = max(int(np.searchsorted(ends, done + _CHUNK_PAIRS, side="right")), first + 1)
        some = count[first:last]
        which = np.repeat(np.arange(first, last), some)
        offset = np.repeat(begin[first:last] - (np.cumsum(some) - some), some)
        yield which, np.arange(len(which)) + offset
        done, first = int(ends[last - 1]), last


# --- semantic: embeddings

_EXACT_ROWS = 8192
_CELL_ROWS = 384
_SEEN_DIMENSIONS = 64
_CELLS_EACH = 2
_DIGITS = 5
"""A cosine counts to so many digits: the last bits of a float sum depend on the machine."""


class Meanings:
    """Pictures whose embeddings have at least the cosine `least`.

    Up to 8,192 rows each is compared with each. Beyond, rows are put into cells around rows drawn at random (by a fixed seed), as
    SemDeDup does with k-means (Abbas et al., arXiv 2303.09540), and compared within a cell; each row is looked for in its two
    nearest cells. A few pairs near the border of cells are missed; tests/bench/selection.py measures how many.
    """

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], count: int, least: float) -> None:
        """`read` gives rows of unit embeddings, n x D float32, for n row numbers."""
        self._read, self._least = read, least
        self.block_rows = 1 << 19  # rows of a cell are read anew for every block
        cells = 1 if count <= _EXACT_ROWS else count // _CELL_ROWS
        self._cells = self._assign(count, cells) if cells > 1 else np.zeros((count, 1), np.int32)

    def _assign(self, count: int, cells: int) -> np.ndarray:
        """The nearest cells of each row, N x 2."""
        rng = np.random.default_rng(0)
        centres = self._read(np.sort(rng.choice(count, cells, replace=False)))
        dimensions = centres.shape[1]
        turn = None
        if dimensions > 1.5 * _SEEN_DIMENSIONS:
            turn = (rng.standard_normal((dimensions, _SEEN_DIMENSIONS)) / np.sqrt(_SEEN_DIMENSIONS)).astype(np.float32)
            centres = centres @ turn
        half = (centres**2).sum(axis=1) / 2  # the nearest by distance: projected rows have no unit length
        found = np.empty((count, _CELLS_EACH), np.int32)
        for start in range(0, count, 4096):
            rows = self._read(np.arange(start, min(start + 4096, count)))
            score = (rows if turn is None else rows @ turn) @ centres.T - half
            for k in range(_CELLS_EACH):
                found[start : start + len(rows), k] = best = score.argmax(axis=1)
                score[np.arange(len(rows)), best] = -np.inf
        return found

    def pairs(self, queries: np.ndarray, base: np.ndarray) -> Pairs:
        if not len(base) or not len(queries):
            return
        own = self._cells[queries, 0]
        by_cell = np.argsort(own, kind="stable")
        owned = own[by_cell]
        listed = self._cells[base].reshape(-1)
        order = np.argsort(listed, kind="stable")
        members, listed = base[order // self._cells.shape[1]], listed[order]
        cells, begins = np.unique(owned, return_index=True)
        for cell, begin, end in zip(cells, begins, [*begins[1:], len(owned)], strict=True):
            asked = queries[by_cell[begin:end]]
            low, high = np.searchsorted(listed, [cell, cell + 1])
            known = members[low:high]
            known = known[: np.searchsorted(known, asked[-1])]
            yield from self._compare(asked, known)

    def _compare(self, asked: np.ndarray, known: np.ndarray) -> Pairs:
        for first in range(0, len(known), _EXACT_ROWS // 2):
            base = known[first : first + _EXACT_ROWS // 2]
            columns = self._read(base).T
            for start in range(0, len(asked), 1024):
                query = asked[start : start + 1024]
                near = np.round(self._read(query) @ columns, _DIGITS) >= self._least
                row, column = np.nonzero(near & (base[None, :] < query[:, None]))
                yield query[row], base[column]
