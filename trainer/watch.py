"""When a training has gone wrong: a loss that is not a number, or one far above those before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

WINDOW = 100
LEAST = 20
"""Losses that must be known before a high one means anything."""


class LossWatch:
    """Remembers the last losses and says what is wrong with the next one. Its state is `losses`."""

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor, self.losses = factor, list(losses)[-WINDOW:]

    def trouble(self, loss: float) -> str | None:
        """What is wrong with `loss`, in words that follow "the loss of adapt at step 7", or None."""
        if not math.isfinite(loss):
            return f"is {loss}"
        usual = statistics.median(self.losses) if len(self.losses) >= LEAST else 0.0
        # An adversarial loss may be usual at zero and below, of which nothing is a multiple.
        if usual > 0 and loss > self.factor * usual:
            return f"jumped to {loss:.4g} (median of the {len(self.losses)} before: {usual:.4g})"
        return None

    def note(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]
