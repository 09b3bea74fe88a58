"""`edgefusion cluster simulate`: cluster/simulate.py asked many times, and its answers with their spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.calibrate import DRIVER_S, LISTING_S, START_S, WINDOW_S, Measured, NeedsOf, measure
from cluster.cli import SET, app
from cluster.errors import EdgeFusionError
from cluster.needs import RunView
from cluster.scenario import Outcome, Scenario
from cluster.simulate import PLAYED_WINDOWS, limits, quantile, said_limits, simulate
from cluster.status_view import clock
from cluster.tables import print_tables

_LOAD_S = 60.0
_ROWS: tuple[tuple[str, Callable[[Outcome], float], Callable[[float], str]], ...] = (
    ("make", lambda o: o.make_s, clock),
    ("train", lambda o: o.train_s, clock),
    ("make and train", lambda o: o.total_s, clock),
    ("GPU hours held", lambda o: o.held_s / 3600, lambda v: f"{v:.2f}"),
    ("cost", lambda o: o.cost, lambda v: f"{v:.2f}"),
    ("utilisation", lambda o: o.utilisation, lambda v: f"{v:.1%}"),
    ("lost work, GPU hours", lambda o: o.lost_s / 3600, lambda v: f"{v:.2f}"),
    ("loading, GPU hours", lambda o: o.loading_s / 3600, lambda v: f"{v:.2f}"),
    ("waiting, GPU hours", lambda o: o.waiting_s / 3600, lambda v: f"{v:.2f}"),
    ("preemptions", lambda o: float(o.preemptions), lambda v: f"{v:.0f}"),
)
_OVERHEAD = "tests/bench/nodes.py overhead"


def mount_simulate(view_of: Callable[[Path, list[str]], RunView], needs_of: NeedsOf) -> None:
    """Add the command; `view_of` (recipe, overrides) and `needs_of` (recipe of a run) are the front door's."""

    @app.command("simulate")
    def simulate_run(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/edgefusion.yaml")],
        gpus: Annotated[int, typer.Option(min=1, help="GPU nodes, one GPU each")] = 8,
        samples: Annotated[
            int | None, typer.Option(min=0, help="pictures to make; the recipe's plan if left out")
        ] = None,
        from_run: Annotated[
            Path | None,
            typer.Option(
                help="output folder of a finished run to take rates (of scoring and cropping too), the time to open models, the units' spread and bytes a "
                "picture from; they hold for its machine"
            ),
        ] = None,
        make_per_s: Annotated[float | None, typer.Option(min=1e-6, help="images a second that one GPU renders")] = None,
        score_per_s: Annotated[
            float | None,
            typer.Option(min=1e-6, help="images a second that one scorer takes; --from-run's, else as fast as asked"),
        ] = None,
        train_per_s: Annotated[
            float | None, typer.Option(min=1e-6, help="images a second that one GPU trains on, in every phase")
        ] = None,
        preemptions_per_hour: Annotated[float, typer.Option(min=0, help="of each GPU")] = 0.0,
        provision_s: Annotated[float, typer.Option(min=0, help="seconds until a lost node is replaced")] = 180.0,
        load_s: Annotated[
            float | None,
            typer.Option(min=0, help=f"seconds in which a worker opens its models; --from-run's, else {_LOAD_S:g}"),
        ] = None,
        stragglers: Annotated[float, typer.Option(min=0, max=1, help="share of the GPUs that is slower")] = 0.0,
        straggler_factor: Annotated[float, typer.Option(min=1, help="how many times longer those take")] = 2.0,
        unit_spread: Annotated[
            float | None,
            typer.Option(
                min=0, max=2, help="log-normal spread of a unit's time, 0.1 for about 10%; --from-run's, else 0"
            ),
        ] = None,
        storage_mb_per_s: Annotated[
            float, typer.Option(min=1e-3, help="MB a second that all commits share (edgefusion cluster storage-check)")
        ] = math.inf,
        storage_latency_s: Annotated[
            float, typer.Option(min=0, help="seconds that a unit's commit takes besides")
        ] = 0.0,
        picture_kb: Annotated[
            float | None, typer.Option(min=0, help="kB that a picture takes on the storage; --from-run's if left out")
        ] = None,
        driver_s: Annotated[
            float, typer.Option(min=0, help=f"seconds of the driver for each unit (default as {_OVERHEAD} measured)")
        ] = DRIVER_S,
        listing_s: Annotated[
            float,
            typer.Option(
                min=0,
                help="seconds for each planned unit to list the ledger (default as tests/bench/nodes.py listing measured)",
            ),
        ] = LISTING_S,
        start_s: Annotated[
            float, typer.Option(min=0, help=f"seconds until Ray is there, once (default: first unit of {_OVERHEAD})")
        ] = START_S,
        window_s: Annotated[
            float,
            typer.Option(
                min=0,
                help=f"seconds until a window of units (2,048, or 16 a GPU if more) begins to open its models (default: first unit of {_OVERHEAD}, later counts)",
            ),
        ] = WINDOW_S,
        price_per_gpu_hour: Annotated[float, typer.Option(min=0, help="in any currency")] = 0.0,
        repeats: Annotated[int, typer.Option(min=1, max=1000, help="plays with different dice")] = 20,
        seed: Annotated[int, typer.Option(help="of the dice")] = 0,
        page: Annotated[
            Path | None, typer.Option(help="write a page with curves over samples and GPUs, and what limits where")
        ] = None,
        overrides: Annotated[list[str] | None, SET] = None,
    ) -> None:
        """Predict time, cost, use and lost work of a recipe on GPUs that can be taken away. A prediction, not a measurement."""
        view = view_of(recipe, overrides or [])
        if samples is None and not view.samples:
            raise EdgeFusionError(
                "the recipe does not say how many samples its sources come to",
                where=str(recipe),
                remedy="Give --samples",
            )
        found = measure(from_run, needs_of) if from_run else None
        rates = _rates(view, found, make_per_s, train_per_s)
        if picture_kb is None and not found and storage_mb_per_s < math.inf:
            raise EdgeFusionError(
                "--storage-mb-per-s says nothing without the size of a picture",
                remedy="Give --picture-kb or --from-run",
            )
        scenario = Scenario(
            gpus,
            view.samples if samples is None else samples,
            view.unit_images,
            rates["make"],
            tuple((phase, rates[phase.name]) for phase in view.phases),
            _workers(view, "score"),
            scoring_rate(view, found.beside if found else {}, score_per_s),
            preemptions_per_hour,
            provision_s,
            _first(load_s, found.load_s if found else None, _LOAD_S),
            price_per_gpu_hour,
            straggler_share=stragglers,
            straggler_factor=straggler_factor,
            unit_spread=_first(unit_spread, found.unit_spread if found else None, 0.0),
            image_bytes=_first(picture_kb and picture_kb * 1000, found.image_bytes if found else None, 0.0),
            storage_mb_per_s=storage_mb_per_s,
            storage_latency_s=storage_latency_s,
            driver_s=driver_s,
            listing_s=listing_s,
            start_s=start_s,
            window_s=window_s,
        )
        _show(view.name, scenario, [simulate(scenario, seed + i) for i in range(repeats)], limits(scenario, seed))
        if page:
            from cluster.simulate_page import write_page

            write_page(page, view.name, scenario, seed)
            typer.echo(f"wrote {page}")


def _rates(
    view: RunView, found: Measured | None, make_per_s: float | None, train_per_s: float | None
) -> dict[str, float]:
    rates = {"make": found.make_per_s, **found.phases} if found else {}
    rates |= {"make": make_per_s} if make_per_s else {}
    rates |= {phase.name: train_per_s for phase in view.phases} if train_per_s else {}
    lacking = [name for name in ("make", *(phase.name for phase in view.phases)) if name not in rates]
    if lacking:
        raise EdgeFusionError(
            f"no rate is known for {', '.join(lacking)}",
            remedy="Give --from-run OUT, or --make-per-s and --train-per-s",
        )
    return rates


def _workers(view: RunView, stage: str) -> int:
    return next((need.workers for need in view.needs if need.stage == stage), 1)


def scoring_rate(view: RunView, beside: Mapping[str, float], score_per_s: float | None = None) -> float:
    """Images a second of one scorer, so that all scorers are as fast as the slower of scoring and cropping beside captions: one queue of
    workers is played, and the slowest sets the pace. Infinite where nothing is known."""
    rates = dict(beside) | ({"score": score_per_s} if score_per_s else {})
    # Without captions cropping is what a unit is waited for, which make's own rate tells.
    stages = ["score", *(["crop"] if any(need.stage == "caption" for need in view.needs) else [])]
    whole = [rates[name] * _workers(view, name) for name in stages if name in rates]
    return min(whole, default=math.inf) / _workers(view, "score")


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _show(name: str, scenario: Scenario, outcomes: list[Outcome], limiting: dict[str, float]) -> None:
    what = f"predicted: {name}, {scenario.samples} samples on {scenario.gpus} GPUs"
    table = Table(
        "predicted", "median", "10%", "90%", title=f"{what}, {scenario.preemptions_per_hour:g} preemptions/h each"
    )
    for label, value, said in _ROWS:
        values = [value(outcome) for outcome in outcomes]
        table.add_row(label, *(said(quantile(values, share)) for share in (0.5, 0.1, 0.9)))
    print_tables(table)
    typer.echo(
        "What limits, by how much of the whole time would be saved if it alone cost nothing: " + said_limits(limiting)
    )
    scorers = [] if math.isinf(scenario.score_per_s) else [f"score {scenario.score_per_s:.3g} a scorer"]
    used = [
        f"make {scenario.make_per_s:.3g}",
        *scorers,
        *(f"{phase.name} {rate:.3g}" for phase, rate in scenario.phases),
    ]
    typer.echo(
        f"Predicted from {len(outcomes)} plays at images/s a GPU: {', '.join(used)}; {scenario.load_s:.3g} s to open models. "
        "Nothing here was measured on GPUs"
    )
    typer.echo(
        "but what the rates come from. Assumed: training scales linearly; plan, select, pack and export take no time."
    )
    if scenario.windows > PLAYED_WINDOWS:
        typer.echo(
            f"{PLAYED_WINDOWS} of {scenario.windows} windows of {scenario.window} units were played unit by unit; "
            f"the mean of the {PLAYED_WINDOWS - 2} in the middle stands for the others."
        )
