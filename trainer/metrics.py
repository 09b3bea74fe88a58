"""How good pictures are, from their embeddings: pure functions of numpy arrays, each with its source.

All embeddings are N x D float, of unit length where a cosine is meant.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Kernel width and the factor on the result, as published (Jayasumana et al. 2024, arXiv 2401.09603)."""


def recalled(pictures: np.ndarray, texts: np.ndarray, among: int = 256) -> np.ndarray:
    """N values in [0, 1]: whether each picture's own text is the nearest of the `among` texts of its block.

    Blocks are consecutive, the last one moved back to be full. A tie of k texts counts 1/k, so a model that says the same of all gains nothing.
    Raises ValueError for fewer than `among` rows.
    """
    if len(pictures) != len(texts) or len(pictures) < among:
        raise ValueError(f"recall among {among} needs as many pairs, not {len(pictures)} and {len(texts)}")
    found = np.zeros(len(pictures))
    for start in range(0, len(pictures), among):
        block = slice(min(start, len(pictures) - among), min(start, len(pictures) - among) + among)
        near = np.round(pictures[block] @ texts[block].T, 6)
        best = near.max(axis=1)
        found[block] = (np.diag(near) == best) / (near == best[:, None]).sum(axis=1)
    return found


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """N cosines of pictures and their own texts."""
    return (pictures * texts).sum(axis=1)


def cmmd(pictures: np.ndarray, reference: np.ndarray) -> float:
    """CLIP maximum mean discrepancy of two sets of unit embeddings, times 1,000; 0 for equal sets (biased estimate, as published)."""
    return float(
        CMMD_SCALE * (_kernel(pictures, pictures) + _kernel(reference, reference) - 2 * _kernel(pictures, reference))
    )


def _kernel(a: np.ndarray, b: np.ndarray) -> float:
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.exp(-distance / (2 * CMMD_SIGMA**2)).mean(dtype=np.float64))


def frechet_distance(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two sets of features (Heusel et al. 2017), here of the judge's, so no FID of Inception."""
    a, b = pictures.astype(np.float64), reference.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The eigenvalues of a product of covariances are real and not negative; rounding may say otherwise.
    shared = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared)


def interval(
    values: np.ndarray, measure: Callable[[np.ndarray], float] = np.mean, seed: int = 0, times: int = 1000
) -> tuple[float, float]:
    """95% bootstrap interval of `measure` over the rows of `values`."""
    rng = np.random.default_rng(seed)
    found = [measure(values[rng.integers(len(values), size=len(values))]) for _ in range(times)]
    return float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))
