# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportAttributeAccessIssue=false
"""A prediction of a run on GPUs that can be taken away: time, cost, use and lost work, by discrete events (simpy).

A prediction, never a measurement. What it assumes: one worker a GPU and one GPU a node; preemptions come independently, equally
often at any moment; a lost node is replaced after `provision_s`, opens its models for `load_s` and does what it had in hand again, as
Ray's restarted actors do; an actor holds the unit it works on and one more (Ray Data's default); scoring and committing are queues behind
the GPUs; training scales linearly to the pace of its slowest node, and loses what came after its last checkpoint whenever any node
goes; plan, selection, packing and export take no time.

Up to 16 windows of units (2,048 each, or 64 a GPU if that is more) are played unit by unit. A longer run plays 16 and lets the mean of the 14 in the middle stand for
the others: windows begin alike, since each waits for the last unit of the one before. The spread between plays is then wider than the run's own.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cluster.errors import EdgeFusionError, TargetUnavailable
from cluster.needs import Phase
from cluster.scenario import Outcome, Scenario

_TOO_LONG_S = 3 * 365 * 86400.0
PLAYED_WINDOWS = 16
_WINDOWS_FOR_LIMITS = 6


class Endless(EdgeFusionError):
    """More is lost than done."""


def simulate(scenario: Scenario, seed: int = 0, played_windows: int = PLAYED_WINDOWS) -> Outcome:
    """Play the scenario once. Raises TargetUnavailable without simpy, Endless if it does not end within three years."""
    outcome = Outcome()
    # Dice of their own, so that a change of one part leaves the luck of the others as it was.
    if scenario.samples:
        _Make(scenario, outcome, max(3, played_windows), _dice(seed, "nodes"), _dice(seed, "units")).play()
    for phase, per_s in scenario.phases:
        _train(scenario, phase, per_s, _dice(seed, phase.name), outcome)
    outcome.cost = outcome.held_s / 3600 * scenario.price_per_gpu_hour
    return outcome


CURES: dict[str, dict[str, Any]] = {
    "rendering on the GPUs": {"make_per_s": math.inf},
    "scoring": {"score_per_s": math.inf},
    "storage": {"storage_mb_per_s": math.inf, "storage_latency_s": 0.0},
    "the driver": {"driver_s": 0.0},
    "the ledger listing": {"listing_s": 0.0},
    "opening models and windows": {"load_s": 0.0, "window_s": 0.0, "start_s": 0.0},
    "preemptions": {"preemptions_per_hour": 0.0},
    "stragglers": {"straggler_share": 0.0},
    "uneven units": {"unit_spread": 0.0},
    "training": {"phases": ()},
}
"""What can limit a run, and the scenario without it."""


def limits(scenario: Scenario, seed: int = 0, plays: int = 3) -> dict[str, float]:
    """By how much of the whole time the run would be shorter if this alone cost nothing; the greatest first.

    Of a run that does not end, 1 for what alone would let it end.
    """
    whole = _total_s(scenario, seed, plays)
    found: dict[str, float] = {}
    for name, cure in CURES.items():
        cured = replace(scenario, **cure)
        left = whole if cured == scenario else _total_s(cured, seed, plays)
        found[name] = 0.0 if not whole or left == whole else 1.0 if math.isinf(whole) else 1 - left / whole
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def said_limits(limiting: dict[str, float]) -> str:
    """The three greatest that save a hundredth or more."""
    told = [f"{name} {share:.0%}" for name, share in limiting.items() if share >= 0.01][:3]
    return ", ".join(told) or "nothing alone"


def _total_s(scenario: Scenario, seed: int, plays: int) -> float:
    try:
        return sum(simulate(scenario, seed + i, _WINDOWS_FOR_LIMITS).total_s for i in range(plays)) / plays
    except Endless:
        return math.inf


def _dice(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed} {what}")


def _life_s(scenario: Scenario, nodes: int, dice: random.Random) -> float:
    rate = scenario.preemptions_per_hour * nodes / 3600
    return dice.expovariate(rate) if rate else math.inf


@dataclass
class _Slot:
    """A GPU's place: the node that is there now, or comes."""

    slower: float
    gone_at: float
    held_from: float = 0.0
    """When the present node came or the next one comes."""
    idle_since: float = 0.0
    """No work of this window is left for it since."""


@dataclass
class _Make:
    """Window after window; in each the slots take units, whose pictures then pass scorers and storage in turn."""

    scenario: Scenario
    out: Outcome
    played: int
    dice: random.Random
    unit_dice: random.Random
    now: float = field(default=0.0, init=False)

    def play(self) -> None:
        play = self.scenario
        slow = play.stragglers
        self.slots = [
            _Slot(play.straggler_factor if i < slow else 1.0, _life_s(play, 1, self.dice)) for i in range(play.gpus)
        ]
        self.sigma = play.unit_spread
        self._wait_until(play.start_s + play.listing_s * play.units)
        whole, last = play.windows - 1, play.samples - (play.windows - 1) * play.window * play.unit_images
        played = whole if play.windows <= self.played else self.played - 1
        first = Outcome()
        for number in range(played):
            self._window(play.window * play.unit_images)
            if number == 0:
                first = self._so_far()
        middle = self._so_far()
        self._window(last)
        self.out.make_s = self.now
        if played < whole:
            _add(self.out, first, middle, (whole - played) / (played - 1))

    def _so_far(self) -> Outcome:
        return replace(self.out, make_s=self.now)

    def _window(self, samples: int) -> None:
        play = self.scenario
        self._wait_until(self.now + play.window_s)
        whole, rest = divmod(samples, play.unit_images)
        self.sizes = iter([play.unit_images] * whole + [rest] * bool(rest))
        self.began, self.handed_out, self.left = self.now, 0, whole + bool(rest)
        self.scorers = [self.now] * play.score_workers
        self.stored = self.now
        self.env: Any = _simpy().Environment(initial_time=self.now)
        for slot in self.slots:
            slot.idle_since = self.now
            self.env.process(self._node(slot))
        self.env.run()
        # Some slots have nothing left to do while others work on.
        self._wait_until(max(self.stored, *self.scorers))

    def _wait_until(self, when: float) -> None:
        """Every slot holds what it holds, idle."""
        for slot in self.slots:
            since = max(slot.idle_since, slot.held_from)
            while since < when:
                self.out.waiting_s += min(when, slot.gone_at) - since
                if slot.gone_at > when:
                    break
                since = self._lose(slot)
            slot.idle_since = when
        self.now = when

    def _lose(self, slot: _Slot) -> float:
        self.out.preemptions += 1
        slot.held_from = slot.gone_at + self.scenario.provision_s
        slot.gone_at = slot.held_from + _life_s(self.scenario, 1, self.dice)
        if slot.held_from > _TOO_LONG_S:
            raise _endless(self.scenario)
        return slot.held_from

    def _take(self) -> tuple[int, float] | None:
        """(pictures, when the driver has it ready) of the next unit, or None."""
        if not self.left:
            return None
        self.left -= 1
        self.handed_out += 1
        return next(self.sizes), self.began + self.handed_out * self.scenario.driver_s

    def _node(self, slot: _Slot) -> Generator[Any, Any, None]:
        env, out, play = self.env, self.out, self.scenario
        mine: tuple[int, float] | None = None
        after: tuple[int, float] | None = None
        needs = 0.0
        while True:
            slot.idle_since = max(env.now, slot.held_from)
            if mine is None and not self.left:
                return
            yield env.timeout(max(0.0, slot.held_from - env.now))
            loaded = min(play.load_s, slot.gone_at - env.now)
            yield env.timeout(loaded)
            # Of those that are ready at this moment each gets one before any gets a second.
            mine = mine or self._take()
            if mine is None:
                return
            out.loading_s += loaded
            yield env.timeout(0)
            while env.now < slot.gone_at and mine is not None:
                after = after or self._take()
                size, ready = mine
                waits, left = max(0.0, ready - env.now), slot.gone_at - env.now
                needs = needs or size / play.make_per_s * slot.slower * self._luck()
                yield env.timeout(min(waits + needs, left))
                out.waiting_s += min(waits, left)
                if waits + needs > left:
                    out.lost_s += max(0.0, left - waits)
                    break
                out.useful_s += needs
                self._finish(size)
                mine, after, needs = after, None, 0.0
            slot.idle_since = env.now
            if mine is None:
                return
            self._lose(slot)

    def _luck(self) -> float:
        return math.exp(self.unit_dice.gauss(0.0, self.sigma) - self.sigma**2 / 2) if self.sigma else 1.0

    def _finish(self, size: int) -> None:
        """Queues whose every service time is known when a unit joins need no events: they come in the order in which they are served."""
        play = self.scenario
        scored = max(self.env.now, heapq.heappop(self.scorers)) + size / play.score_per_s
        heapq.heappush(self.scorers, scored)
        takes = play.storage_latency_s + size * play.image_bytes / (play.storage_mb_per_s * 1e6)
        self.stored = max(scored, self.stored) + takes


def _add(out: Outcome, first: Outcome, middle: Outcome, times: float) -> None:
    """What came between two moments, `times` times more."""
    for part in fields(Outcome):
        grown: float = getattr(out, part.name) + times * (getattr(middle, part.name) - getattr(first, part.name))
        setattr(out, part.name, round(grown) if part.name == "preemptions" else grown)


def _simpy() -> Any:
    try:
        import simpy  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
    except ImportError:
        raise TargetUnavailable("simulation needs simpy", remedy="pip install 'edgefusion[simulate]'") from None
    return simpy


def _train(play: Scenario, phase: Phase, per_s: float, dice: random.Random, out: Outcome) -> None:
    """All nodes together, at the pace of the slowest; the loss of one stops all until it is replaced."""
    slower = play.straggler_factor if play.stragglers else 1.0
    total = phase.steps * phase.batch_images / (per_s * play.gpus) * slower
    saved = clock = 0.0
    while saved < total:
        loss = _life_s(play, play.gpus, dice)
        loaded = min(play.load_s, loss)
        out.loading_s += loaded * play.gpus
        runs = min(total - saved, max(0.0, loss - loaded))
        clock += loaded + runs
        if runs >= total - saved:
            out.useful_s += runs * play.gpus
            break
        kept = runs - runs % phase.checkpoint_s
        saved += kept
        out.useful_s += kept * play.gpus
        out.lost_s += (runs - kept) * play.gpus
        out.preemptions += 1
        out.waiting_s += play.provision_s * (play.gpus - 1)
        clock += play.provision_s
        if clock > _TOO_LONG_S:
            raise _endless(play)
    out.train_s += clock


def _endless(play: Scenario) -> Endless:
    return Endless(
        f"with {play.preemptions_per_hour:g} preemptions an hour of each of {play.gpus} GPUs the run does not end in three years",
        remedy="Make units or checkpoint_s smaller, or use fewer nodes that are taken away less often",
    )


def quantile(values: list[float], share: float) -> float:
    """The nearest of the sorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
