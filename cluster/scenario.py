"""What a simulated run is given and what comes of it (cluster/simulate.py plays it)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.needs import Phase
from cluster.runner import window_units


@dataclass(frozen=True)
class Scenario:
    """What is run on what. Rates are images a second of one worker; what is left at its default costs nothing."""

    gpus: int
    samples: int
    unit_images: int
    make_per_s: float
    phases: tuple[tuple[Phase, float], ...] = ()
    """Training phases, each with the images a second of one GPU."""
    score_workers: int = 1
    score_per_s: float = math.inf
    preemptions_per_hour: float = 0.0
    """Of each GPU node."""
    provision_s: float = 180.0
    load_s: float = 60.0
    price_per_gpu_hour: float = 0.0
    straggler_share: float = 0.0
    """Of the nodes, rounded to whole nodes; a replaced node is as slow as the one before."""
    straggler_factor: float = 1.0
    """How many times longer a straggler takes."""
    unit_spread: float = 0.0
    """Standard deviation of the logarithm of a unit's rendering time; the mean stays."""
    image_bytes: float = 0.0
    """What making leaves on the storage, a picture."""
    storage_mb_per_s: float = math.inf
    """10^6 bytes a second, shared by all: one worker commits."""
    storage_latency_s: float = 0.0
    """Of committing a unit, however small."""
    driver_s: float = 0.0
    """The driver's time for a unit; it hands out one after another."""
    listing_s: float = 0.0
    """For each planned unit, when the driver starts: the ledger is listed."""
    start_s: float = 0.0
    """Once, until Ray is there."""
    window_units: int | None = None
    """Units that the runner gives Ray at once, its own choice if left out; the next window waits for the last unit of this one and
    opens the models again."""
    window_s: float = 0.0
    """Until the first actor of a window opens its models."""

    @property
    def units(self) -> int:
        return -(-self.samples // self.unit_images)

    @property
    def window(self) -> int:
        """Units of a window."""
        return self.window_units or window_units(self.gpus)

    @property
    def windows(self) -> int:
        return -(-self.units // self.window)

    @property
    def stragglers(self) -> int:
        return round(self.straggler_share * self.gpus) if self.straggler_factor > 1 else 0


@dataclass
class Outcome:
    """GPU seconds but for the times of the clock, `make_s` and `train_s`. Everything held is in one of the four parts."""

    make_s: float = 0.0
    train_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    """Work begun and thrown away."""
    loading_s: float = 0.0
    waiting_s: float = 0.0
    """Held, but without work: for the driver, the last units of a window, scores, storage, a lost peer in training."""
    preemptions: int = 0
    cost: float = 0.0

    @property
    def held_s(self) -> float:
        return self.useful_s + self.lost_s + self.loading_s + self.waiting_s

    @property
    def utilisation(self) -> float:
        return self.useful_s / self.held_s if self.held_s else 0.0

    @property
    def total_s(self) -> float:
        return self.make_s + self.train_s
