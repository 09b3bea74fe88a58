# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""The page of `edgefusion cluster simulate --page`: curves over samples and over GPUs, and what limits at each scale."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.scenario import Outcome, Scenario
from cluster.simulate import PLAYED_WINDOWS, Endless, limits, quantile, said_limits, simulate
from cluster.status_view import clock
from cluster.storage import publish_bytes

SAMPLES = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
GPUS = (1, 4, 16, 64, 256, 1024)
_PLAYS = 5
_COLOURS = {"make": "#2a9d8f", "train": "#e9a23b", "both": "#1c2430"}


@dataclass(frozen=True)
class Point:
    """A scenario of the curves, with its plays and what limits it: making alone, and all."""

    scenario: Scenario
    outcomes: list[Outcome]
    making: str
    whole: str

    def at(self, value: Callable[[Outcome], float], share: float = 0.5) -> float:
        """Not a number if the run does not end."""
        return quantile([value(outcome) for outcome in self.outcomes], share) if self.outcomes else math.nan


def write_page(
    path: Path,
    name: str,
    scenario: Scenario,
    seed: int = 0,
    samples: Sequence[int] = SAMPLES,
    gpus: Sequence[int] = GPUS,
) -> None:
    """One self-contained file. The curves hold everything but samples, or GPUs, as the scenario has it."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    over_samples = [_point(replace(scenario, samples=count), seed) for count in samples]
    over_gpus = [_point(replace(scenario, gpus=count), seed) for count in sorted({*gpus, scenario.gpus})]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True)
    ).get_template("simulate.html.j2")
    page = template.render(
        name=name,
        scenario=scenario,
        given=_given(scenario),
        plays=_PLAYS,
        played_windows=PLAYED_WINDOWS,
        priced=scenario.price_per_gpu_hour > 0,
        sweeps=[
            ("samples", f"on {_count(scenario.gpus)} GPUs", _rows(over_samples), _curves(over_samples, "samples")),
            ("GPUs", f"for {_count(scenario.samples)} samples", _rows(over_gpus), _curves(over_gpus, "gpus")),
        ],
    )
    publish_bytes(path, page.encode())


def _point(scenario: Scenario, seed: int) -> Point:
    try:
        outcomes = [simulate(scenario, seed + i) for i in range(_PLAYS)]
    except Endless:
        outcomes = []
    whole = said_limits(limits(scenario, seed))
    alone = replace(scenario, phases=())
    return Point(scenario, outcomes, whole if alone == scenario else said_limits(limits(alone, seed)), whole)


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "over": {"samples": _count(point.scenario.samples), "GPUs": _count(point.scenario.gpus)},
            "figures": _figures(point) if point.outcomes else None,
            "making": point.making,
            "whole": point.whole,
        }
        for point in points
    ]


def _figures(point: Point) -> list[str]:
    """In the order of the page's columns."""
    priced = point.scenario.price_per_gpu_hour > 0
    return [
        clock(point.at(lambda o: o.make_s)),
        clock(point.at(lambda o: o.train_s)),
        f"{point.at(lambda o: o.held_s) / 3600:,.1f}",
        *([f"{point.at(lambda o: o.cost):,.0f}"] if priced else []),
        f"{point.at(lambda o: o.utilisation):.0%}",
        f"{point.at(lambda o: o.lost_s / o.held_s if o.held_s else 0.0):.1%}",
    ]


def _curves(points: Sequence[Point], over: str) -> list[tuple[str, str]]:
    """(what it shows, data URL) of each plot."""
    at = [float(getattr(point.scenario, over)) for point in points]
    label = "samples" if over == "samples" else "GPUs"

    def time(axes: Any) -> None:
        parts: list[tuple[str, str, Callable[[Outcome], float]]] = [
            ("make", "make", lambda o: o.make_s / 3600),
            ("train", "train", lambda o: o.train_s / 3600),
            ("both", "both", lambda o: o.total_s / 3600),
        ]
        for name, colour, value in parts:
            if any(point.at(value) > 0 for point in points):
                _line(axes, at, points, value, _COLOURS[colour], name)
        axes.set(yscale="log", ylabel="hours")
        axes.legend(frameon=False, fontsize=8)

    def cost(axes: Any) -> None:
        priced = points[0].scenario.price_per_gpu_hour > 0
        _line(axes, at, points, lambda o: o.cost if priced else o.held_s / 3600, _COLOURS["both"], "")
        axes.set(yscale="log", ylabel="cost" if priced else "GPU hours held")

    def use(axes: Any) -> None:
        _line(axes, at, points, lambda o: 100 * o.utilisation, _COLOURS["make"], "")
        axes.set(ylim=(0, 102), ylabel="% of held GPU time at work")

    drawn = (("time", time), ("cost", cost), ("utilisation", use))
    return [(f"{what} over {label}", _plot(draw, label)) for what, draw in drawn]


def _line(
    axes: Any, at: list[float], points: Sequence[Point], value: Callable[[Outcome], float], colour: str, name: str
) -> None:
    axes.plot(at, [point.at(value) for point in points], marker="o", ms=3, color=colour, label=name)
    low, high = ([point.at(value, share) for point in points] for share in (0.0, 1.0))
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def _plot(draw: Callable[[Any], None], label: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    draw(axes)
    axes.set(xscale="log", xlabel=label)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(sink.getvalue()).decode()


def _given(play: Scenario) -> list[tuple[str, str]]:
    rates = [f"make {play.make_per_s:.3g}", *(f"{phase.name} {rate:.3g}" for phase, rate in play.phases)]
    store = "as fast as asked" if math.isinf(play.storage_mb_per_s) else f"{play.storage_mb_per_s:g} MB/s shared"
    scorers = "" if math.isinf(play.score_per_s) else f"{play.score_workers} x {play.score_per_s:.3g} images/s"
    return [
        ("images a second of one GPU", ", ".join(rates)),
        ("a unit", f"{play.unit_images} pictures, spread {play.unit_spread:.0%}"),
        (
            "preemptions",
            f"{play.preemptions_per_hour:g} an hour of each GPU, {play.provision_s:g} s until it is replaced",
        ),
        ("opening the models", f"{play.load_s:.3g} s"),
        ("stragglers", f"{play.straggler_share:.0%} of the GPUs, {play.straggler_factor:g} times slower"),
        ("scorers", scorers or f"{play.score_workers}, as fast as asked"),
        ("storage", f"{store}, {play.image_bytes / 1000:.3g} kB a picture, {play.storage_latency_s:g} s a commit"),
        ("driver", f"{play.driver_s * 1000:.3g} ms a unit, {play.listing_s * 1e6:.3g} s to list 10^6 units"),
        ("start", f"{play.start_s:g} s once, {play.window_s:g} s for every window of units"),
        ("price of a GPU hour", f"{play.price_per_gpu_hour:g}"),
    ]


def _count(count: int) -> str:
    power = math.log10(count) if count > 0 else 0.5
    return f"10^{power:.0f}" if count >= 10**5 and power.is_integer() else f"{count:,}"
