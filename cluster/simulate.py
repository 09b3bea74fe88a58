# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportAttributeAccessIssue=false
"""A prediction of a run on GPUs that can be taken away: time, cost, use and lost work, by discrete events (simpy).

A prediction, never a measurement. What it assumes: one worker a GPU and one GPU a node; preemptions come independently, equally
often at any moment; a lost node is replaced after `provision_s` and opens its models for `load_s`; training scales linearly, and
loses what came after its last checkpoint whenever any node goes; plan, selection, packing and export take no time.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError, TargetUnavailable
from cluster.needs import Phase

_TOO_LONG_S = 3 * 365 * 86400.0


@dataclass(frozen=True)
class Scenario:
    """What is run on what. Rates are images a second of one worker."""

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
    """Held, but without work: for the last units, for scores, for a lost peer in training."""
    preemptions: int = 0
    cost: float = 0.0

    @property
    def held_s(self) -> float:
        return self.useful_s + self.lost_s + self.loading_s + self.waiting_s

    @property
    def utilisation(self) -> float:
        return self.useful_s / self.held_s if self.held_s else 0.0


def simulate(scenario: Scenario, seed: int = 0) -> Outcome:
    """Play the scenario once. Raises TargetUnavailable without simpy, EdgeFusionError if it does not end within three years."""
    dice, outcome = random.Random(seed), Outcome()
    if scenario.samples:
        _Make(scenario, dice, outcome).play()
    for phase, per_s in scenario.phases:
        _train(scenario, phase, per_s, dice, outcome)
    outcome.cost = outcome.held_s / 3600 * scenario.price_per_gpu_hour
    return outcome


def _next_loss_s(scenario: Scenario, nodes: int, dice: random.Random) -> float:
    rate = scenario.preemptions_per_hour * nodes / 3600
    return dice.expovariate(rate) if rate else math.inf


@dataclass
class _Make:
    """Nodes take units from a queue; a unit that its node did not finish goes back."""

    scenario: Scenario
    dice: random.Random
    outcome: Outcome
    done: int = field(default=0, init=False)

    def play(self) -> None:
        try:
            import simpy  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
        except ImportError:
            raise TargetUnavailable("simulation needs simpy", remedy="pip install 'edgefusion[simulate]'") from None
        self.env: Any = simpy.Environment()
        self.todo: Any = simpy.Store(self.env)
        self.scorers: Any = simpy.Resource(self.env, self.scenario.score_workers)
        whole, rest = divmod(self.scenario.samples, self.scenario.unit_images)
        sizes = [self.scenario.unit_images] * whole + [rest] * bool(rest)
        self.units = len(sizes)
        self.todo.items.extend(sizes)
        self.finished: Any = self.env.event()
        nodes = [self.env.process(self._node()) for _ in range(self.scenario.gpus)]
        self.env.run(until=self.env.any_of([self.env.all_of(nodes), self.env.timeout(_TOO_LONG_S)]))
        if self.done < self.units:
            raise _endless(self.scenario)
        self.outcome.make_s = self.env.now

    def _node(self) -> Generator[Any, Any, None]:
        env, out, play = self.env, self.outcome, self.scenario
        while not self.finished.triggered:
            gone_at = env.now + _next_loss_s(play, 1, self.dice)
            loaded = min(play.load_s, gone_at - env.now)
            yield env.timeout(loaded)
            out.loading_s += loaded
            while env.now < gone_at and not self.finished.triggered:
                began, get = env.now, self.todo.get()
                yield env.any_of([get, self.finished])
                out.waiting_s += env.now - began
                if not get.triggered:
                    get.cancel()
                    return
                size = get.value
                needs = size / play.make_per_s
                # A loss while it waited strikes here; the unit was not begun.
                left = max(0.0, gone_at - env.now)
                yield env.timeout(min(needs, left))
                if needs > left:
                    out.lost_s += left
                    yield self.todo.put(size)
                else:
                    out.useful_s += needs
                    env.process(self._score(size))
            if self.finished.triggered:
                return
            out.preemptions += 1
            yield env.any_of([env.timeout(play.provision_s), self.finished])

    def _score(self, size: int) -> Generator[Any, Any, None]:
        with self.scorers.request() as turn:
            yield turn
            yield self.env.timeout(size / self.scenario.score_per_s)
        self.done += 1
        if self.done == self.units:
            self.finished.succeed()


def _train(play: Scenario, phase: Phase, per_s: float, dice: random.Random, out: Outcome) -> None:
    """All nodes together; the loss of one stops all until it is replaced."""
    total = phase.steps * phase.batch_images / (per_s * play.gpus)
    saved = clock = 0.0
    loading = True
    while saved < total:
        loss = _next_loss_s(play, play.gpus, dice)
        loaded = min(play.load_s, loss) if loading else 0.0
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


def _endless(play: Scenario) -> EdgeFusionError:
    return EdgeFusionError(
        f"with {play.preemptions_per_hour:g} preemptions an hour of each of {play.gpus} GPUs the run does not end in three years",
        remedy="Make units or checkpoint_s smaller, or use fewer nodes that are taken away less often",
    )


def measured_rates(run: Path) -> dict[str, float]:
    """Images a second of one worker: `make` from the run's clock, each phase from its log. Raises EdgeFusionError."""
    try:
        facts: dict[str, Any] = json.loads((run / "run.json").read_text())
        recipe: dict[str, Any] = facts["recipe"]
        workers = recipe["factory"]["make"]["render_workers"] if recipe["cluster"]["runner"] == "ray" else 1
        trainers = recipe["cluster"]["train_workers"] if recipe["cluster"]["runner"] == "ray" else 1
        found = {"make": facts["funnel"]["planned"] / facts["seconds"]["make"] / workers}
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        raise EdgeFusionError(
            "holds no run that made its data set", where=str(run), remedy="Give the --out folder of a finished run"
        ) from None
    for log in sorted((run / "training").glob("*/metrics.jsonl")):
        rates = [json.loads(line)["images_per_s"] for line in log.read_text().splitlines() if line.endswith("}")]
        found |= {log.parent.name: rates[-1] / trainers} if rates else {}
    return found


def quantile(values: list[float], share: float) -> float:
    """The nearest of the sorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
