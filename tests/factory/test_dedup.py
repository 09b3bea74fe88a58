"""The fast ways to find near duplicates against the slow obvious one."""

import numpy as np
import pytest

from factory import dedup
from factory.dedup import Meanings, keep_first, same_drawing


def slowly(near: np.ndarray, forced: np.ndarray) -> list[int]:
    """Row by row: the first kept row that each is near to. `near` is N x N."""
    parent: list[int] = []
    for row in range(len(near)):
        kept = [k for k in range(row) if parent[k] < 0 and near[row, k]]
        parent.append(kept[0] if kept and not forced[row] else -1)
    return parent


def near_drawings(hashes: np.ndarray, colours: np.ndarray, bits: int, shades: float) -> np.ndarray:
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    shade = np.abs(colours[:, None].astype(int) - colours[None, :]).max(axis=2)
    return (apart <= bits) & (shade <= shades)


def some_drawings(rng: np.random.Generator, count: int, kinds: int, flips: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes around a few of them, each with up to `flips` bits turned over, and colours that differ a little."""
    hashes = rng.integers(0, 2**64, kinds, dtype=np.uint64)[rng.integers(0, kinds, count)]
    for _ in range(flips):
        hashes ^= np.where(rng.random(count) < 0.7, np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64), 0)
    return hashes.astype(np.uint64), rng.integers(100, 106, (count, 12), dtype=np.uint8)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 6, 9, 16])
def test_no_near_drawing_is_missed_and_none_invented(bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes, colours = some_drawings(rng, 400, 40, max(2, bits // 2))
    forced = rng.random(400) < 0.05
    wanted = slowly(near_drawings(hashes, colours, bits, 4), forced)
    assert same_drawing(hashes, colours, forced, bits, 4).tolist() == wanted
    assert 0 < sum(p >= 0 for p in wanted) < 400


@pytest.mark.parametrize("block", [1, 7, 64, 399])
def test_the_size_of_the_blocks_and_of_the_pieces_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    hashes, colours = some_drawings(rng, 400, 6, 4)
    forced = rng.random(400) < 0.1
    wanted = slowly(near_drawings(hashes, colours, 5, 5), forced)
    monkeypatch.setattr(dedup, "_CHUNK_PAIRS", 50)
    monkeypatch.setattr(dedup, "_MOST_PAIRS", 30)
    drawings = dedup.Drawings(hashes, colours, 5, 5, block_rows=block)
    assert keep_first(drawings, forced).tolist() == wanted


def test_a_chain_of_near_drawings_keeps_every_other_one() -> None:
    """1 is near 0 and falls, so 2, near 1 alone, stays: a fallen row takes nobody with it."""
    hashes = np.array([0, 0b1, 0b11, 0b111, 0b1111], np.uint64)
    found = same_drawing(hashes, np.zeros((5, 12), np.uint8), np.zeros(5, bool), 1, 0)
    assert found.tolist() == [-1, 0, -1, 2, -1]


def test_a_hundred_thousand_copies_are_one_picture() -> None:
    count = 100_000
    found = same_drawing(
        np.full(count, 77, np.uint64), np.full((count, 12), 9, np.uint8), np.zeros(count, bool), 16, 255
    )
    assert found[0] == -1 and (found[1:] == 0).all()


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_meanings_of_few_rows_are_compared_each_with_each() -> None:
    rng = np.random.default_rng(1)
    seen = unit(rng.standard_normal((40, 32))[rng.integers(0, 40, 500)] + 0.15 * rng.standard_normal((500, 32)))
    forced = rng.random(500) < 0.05
    wanted = slowly(np.round(seen @ seen.T, 5) >= 0.95, forced)
    found = keep_first(Meanings(lambda rows: seen[rows], 500, 0.95), forced)
    assert found.tolist() == wanted and 0 < sum(p >= 0 for p in wanted) < 500


def test_cells_find_nearly_all_and_invent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    themes = rng.standard_normal((60, 128))[rng.integers(0, 60, 3000)]  # each many pictures, of which some are copies
    alone = themes + 0.8 * rng.standard_normal((3000, 128))
    copied = alone[rng.integers(0, 1000, 3000)] + 0.1 * rng.standard_normal((3000, 128))
    seen = unit(np.where((np.arange(3000) % 3 == 0)[:, None], copied, alone))
    monkeypatch.setattr(dedup, "_EXACT_ROWS", 256)
    monkeypatch.setattr(dedup, "_CELL_ROWS", 50)
    found = keep_first(Meanings(lambda rows: seen[rows], 3000, 0.95), np.zeros(3000, bool))
    wanted = np.array(slowly(np.round(seen @ seen.T, 5) >= 0.95, np.zeros(3000, bool)))
    fallen = np.flatnonzero(found >= 0)
    assert (np.round((seen[fallen] * seen[found[fallen]]).sum(axis=1), 4) >= 0.95).all()
    assert (found[found[fallen]] == -1).all(), "the row that stands for a fallen one is kept"
    assert len(fallen) >= 0.97 * (wanted >= 0).sum() > 300
