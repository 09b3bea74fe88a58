"""Noise that any language can draw again: the same seed gives the same numbers in Python, in JavaScript and on a device.

A counter-based generator needs no state: number i of draw d of a seed is Philox4x32-10 of (d, 0, i, 0) under the key `seed`, its first two
words turned into a normal number by Box-Muller. Integers agree to the bit; logarithm and sine may differ in a double's last place.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

GENERATOR = "philox4x32-10 of (draw, 0, i, 0), key (seed low, seed high); box-muller: sqrt(-2 ln u0) sin(2 pi u1)"
"""As bundle.json names it."""

_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds: counters 4 N (uint64 holding 32 bits each) to 4 N random words of 32 bits."""
    a, b, c, d = counter.astype(np.uint64)
    for step in range(10):
        ab, cd = a * np.uint64(_MULTIPLY[0]), c * np.uint64(_MULTIPLY[1])
        k0, k1 = ((key[i] + step * _WEYL[i]) & _LOW for i in range(2))
        a, b, c, d = (cd >> 32) ^ b ^ k0, cd & _LOW, (ab >> 32) ^ d ^ k1, ab & _LOW
    return np.stack([a, b, c, d])


def noise(seed: int, draw: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32. Draw 0 is the first latent, draw n the noise after step n; of `seed` the low 64 bits count."""
    count = math.prod(shape)
    counter = np.zeros((4, count), np.uint64)
    counter[0], counter[2] = draw, np.arange(count)
    words = philox(counter, (seed & _LOW, seed >> 32 & _LOW))
    first, second = (words[:2] + 0.5) / 2.0**32
    return (np.sqrt(-2 * np.log(first)) * np.sin(2 * np.pi * second)).astype(np.float32).reshape(shape)
