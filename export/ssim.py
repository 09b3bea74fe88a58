"""Structural similarity of two pictures: what PSNR does not see, such as lost texture.

Source: Wang, Bovik, Sheikh and Simoncelli, Image quality assessment: from error visibility to structural similarity, IEEE TIP 2004.
"""

from __future__ import annotations

import numpy as np

_RADIUS, _SIGMA = 5, 1.5


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean SSIM of the luma of two uint8 pictures H W 3, 11 x 11 Gaussian window; 1 is equal. Needs 11 px a side."""
    x, y = (picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) for picture in (a, b))
    steady, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    shared = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + steady) * (2 * shared + contrast)
    below = (mean_x**2 + mean_y**2 + steady) * (var_x + var_y + contrast)
    return round(float((above / below).mean()), 4)


def _blur(plane: np.ndarray) -> np.ndarray:
    """H W to H-10 W-10: only where the whole window lies inside."""
    weights = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(plane, len(weights), axis=axis)
        plane = windows @ weights
    return plane
