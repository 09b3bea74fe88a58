"""Scores that need no model: sharpness, entropy, blankness. All of the picture's brightness (ITU-R BT.601), 0-255."""

from __future__ import annotations

import numpy as np

from factory.scorers import Batch, Score


class Sharpness:
    """Variance of the Laplacian. Source: Pech-Pacheco et al., 2000."""

    scores = (Score("sharpness", 0, None, "higher", "variance of the Laplacian of the brightness; small is blurred"),)

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        return {"sharpness": [_laplacian_variance(brightness(picture)) for picture in batch.pictures]}


class Entropy:
    scores = (Score("entropy", 0, 8, "higher", "bits of the histogram of the brightness; small shows little"),)

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        return {"entropy": [_entropy_bits(brightness(picture)) for picture in batch.pictures]}


class Blank:
    scores = (Score("blank", 0, 1, "lower", "share of the pixels within 8 of the most frequent brightness"),)

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        return {"blank": [_blank_share(brightness(picture)) for picture in batch.pictures]}


def brightness(picture: np.ndarray) -> np.ndarray:
    """H x W float64 of H x W x 3 uint8."""
    return picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _laplacian_variance(grey: np.ndarray) -> float:
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())


def _entropy_bits(grey: np.ndarray) -> float:
    share = np.bincount(grey.round().astype(np.int64).ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return float(abs((share * np.log2(share)).sum()))


def _blank_share(grey: np.ndarray) -> float:
    levels = grey.round().astype(np.int64).ravel()
    middle = int(np.bincount(levels, minlength=256).argmax())
    return float((np.abs(levels - middle) <= 8).mean())
