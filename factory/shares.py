"""A share of counts with its interval: of samples that are kept, of votes that are won."""

from __future__ import annotations

import math

_Z = 1.959964
"""Of 95%, on both sides of the normal distribution."""


def wilson(hits: float, of: int) -> tuple[float, float]:
    """Ends of the 95% interval of a share; (0, 1) of nothing. Source: Wilson 1927, doi 10.1080/01621459.1927.10502953."""
    if not of:
        return 0.0, 1.0
    share, spread = hits / of, _Z * _Z / of
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    # At the ends the interval reaches 0 and 1 exactly; rounding would leave it a hair outside.
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
