"""How good pictures are, as numbers with intervals: pure functions of embeddings, in numpy and nothing else.

Shapes: N pictures, M reference pictures, D embedding widths. Raises ValueError for embeddings that no metric is defined on; no
metric ever stands in for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""Both as published with the metric: CMMD values of other kernels cannot be compared."""

_ROWS = 1024  # kernel rows held at once, so that 30,000 pictures need megabytes and not gigabytes


class Interval(NamedTuple):
    """A statistic and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def recall_hits(picture_embeddings: np.ndarray, text_embeddings: np.ndarray, among: int) -> np.ndarray:
    """N numbers: 1 where picture i is nearer to its own text than to `among` - 1 others, 0 where it is not.

    Picture i (N x D) competes over the texts i .. i + among - 1 (N x D, counted round the end), so each meets as many rivals and
    its own text among them. k equal best texts share the hit, 1/k: an encoder that says the same of all gets 1 / among.
    """
    pictures, texts = _unit(picture_embeddings), _unit(text_embeddings)
    _refuse_unpaired(pictures, texts)
    count = len(pictures)
    if not 1 <= among <= count:
        raise ValueError(f"recall among {among} needs at least as many pairs, not {count}")
    rivals = (np.arange(count)[:, None] + np.arange(among)[None]) % count
    hits = np.empty(count)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        likeness = np.take_along_axis(pictures[rows] @ texts.T, rivals[rows], axis=1)
        best = likeness.max(axis=1, keepdims=True) - 1e-9  # the same text twice may differ by rounding
        hits[rows] = (likeness[:, 0] >= best[:, 0]) / (likeness >= best).sum(axis=1)
    return hits


def clip_scores(picture_embeddings: np.ndarray, text_embeddings: np.ndarray) -> np.ndarray:
    """N cosines of pictures (N x D) and their own texts (N x D), unscaled: as a paper's 0.28, not 28."""
    pictures, texts = _unit(picture_embeddings), _unit(text_embeddings)
    _refuse_unpaired(pictures, texts)
    return (pictures * texts).sum(axis=1)


def cmmd(made: np.ndarray, real: np.ndarray) -> float:
    """CLIP maximum mean discrepancy of pictures N x D and reference pictures M x D; 0 is the same set.

    Gaussian kernel of sigma 10 on unit embeddings, times 1000, with the diagonals counted (the minimum-variance estimator), as the
    authors' code does. Source: Jayasumana et al., arXiv 2401.09603.
    """
    made, real = _pair_of_sets(made, real)
    return float(_discrepancies(made, real, _even(len(made)), _even(len(real)))[0])


def frechet_distance(made: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance of the normal distributions fitted to features N x D and M x D (needs N, M >= 2).

    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)), with unbiased covariances. It is FID only on Inception features; its value
    falls with N, so compare equal N. Source: Heusel et al., arXiv 1706.08500.
    """
    made, real = _finite(made), _finite(real)
    if made.shape[1] != real.shape[1] or min(len(made), len(real)) < 2:
        raise ValueError(
            f"two sets of at least two features of one width are needed, not {made.shape} and {real.shape}"
        )
    a, b = np.atleast_2d(np.cov(made, rowvar=False)), np.atleast_2d(np.cov(real, rowvar=False))
    # trace (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex rounding.
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    shift = made.mean(axis=0) - real.mean(axis=0)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * cross)


def bootstrap(
    statistic: Callable[..., float], *counts: int, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """`statistic` of everything, with its bootstrap interval.

    `statistic` takes one array of row numbers for each of `counts`; each draw samples the rows of each set anew, with replacement.
    The percentiles are moved by the bootstrap's own bias: a sample with repeats is further from any reference than the sample was,
    which would push the whole interval of a distance above its value. Source: Efron and Tibshirani 1993, chapters 10 and 13.
    """
    if min(counts, default=0) < 1 or draws < 2 or not 0 < level < 1:
        raise ValueError(f"cannot draw {draws} bootstrap samples of {counts} rows at level {level}")
    rng = np.random.default_rng(seed)
    value = statistic(*(np.arange(n) for n in counts))
    found = [statistic(*(rng.integers(n, size=n) for n in counts)) for _ in range(draws)]
    return _around(value, np.array(found), level)


def mean_interval(values: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of N numbers, such as `recall_hits` or `clip_scores`, with its bootstrap interval."""
    values = np.asarray(values, np.float64)
    return bootstrap(lambda rows: float(values[rows].mean()), len(values), draws=draws, level=level, seed=seed)


def cmmd_interval(made: np.ndarray, real: np.ndarray, draws: int = 200, level: float = 0.95, seed: int = 0) -> Interval:
    """`cmmd` with its bootstrap interval; every kernel value is computed once for all draws."""
    made, real = _pair_of_sets(made, real)
    rng = np.random.default_rng(seed)
    weights = [
        np.concatenate([_even(n), rng.multinomial(n, np.full(n, 1 / n), size=draws).T / n], axis=1)
        for n in (len(made), len(real))
    ]
    found = _discrepancies(made, real, weights[0], weights[1])
    return _around(float(found[0]), found[1:], level)


def frechet_interval(
    made: np.ndarray, real: np.ndarray, draws: int = 100, level: float = 0.95, seed: int = 0
) -> Interval:
    """`frechet_distance` with its bootstrap interval."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return frechet_distance(made[a], real[b])

    return bootstrap(distance, len(made), len(real), draws=draws, level=level, seed=seed)


def _around(value: float, found: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) + (value - found.mean())
    return Interval(float(value), float(low), float(high))


def _discrepancies(made: np.ndarray, real: np.ndarray, of_made: np.ndarray, of_real: np.ndarray) -> np.ndarray:
    """CMMD under K weightings at once: weights N x K and M x K, whose columns sum to 1."""
    within = _kernel_means(made, made, of_made, of_made) + _kernel_means(real, real, of_real, of_real)
    return CMMD_SCALE * (within - 2 * _kernel_means(made, real, of_made, of_real))


def _kernel_means(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    total = np.zeros(of_a.shape[1])
    squares = (b**2).sum(axis=1)
    for start in range(0, len(a), _ROWS):
        part = a[start : start + _ROWS]
        distances = (part**2).sum(axis=1)[:, None] + squares[None] - 2 * part @ b.T
        total += (of_a[start : start + _ROWS] * (np.exp(-distances / (2 * CMMD_SIGMA**2)) @ of_b)).sum(axis=0)
    return total


def _even(count: int) -> np.ndarray:
    return np.full((count, 1), 1 / count)


def _pair_of_sets(made: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    made, real = _unit(made), _unit(real)
    if made.shape[1] != real.shape[1]:
        raise ValueError(f"embeddings of one width are needed, not {made.shape} and {real.shape}")
    return made, real


def _refuse_unpaired(pictures: np.ndarray, texts: np.ndarray) -> None:
    if pictures.shape != texts.shape:
        raise ValueError(f"pictures {pictures.shape} and texts {texts.shape} are not pairs")


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """N x D float64 of length 1."""
    embeddings = _finite(embeddings)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("an embedding is all zeros and has no direction")
    return embeddings / lengths


def _finite(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings, np.float64)
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"embeddings are N x D with N >= 1, not {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise ValueError("an embedding is not a number")
    return embeddings
