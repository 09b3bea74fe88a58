"""`edgefusion cluster simulate`: cluster/simulate.py asked many times, and its answers with their spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli import SET, app
from cluster.errors import EdgeFusionError
from cluster.needs import RunView
from cluster.simulate import Outcome, Scenario, measured_rates, quantile, simulate
from cluster.status_view import clock

_ROWS: tuple[tuple[str, Callable[[Outcome], float], Callable[[float], str]], ...] = (
    ("make", lambda o: o.make_s, clock),
    ("train", lambda o: o.train_s, clock),
    ("make and train", lambda o: o.make_s + o.train_s, clock),
    ("GPU hours held", lambda o: o.held_s / 3600, lambda v: f"{v:.2f}"),
    ("cost", lambda o: o.cost, lambda v: f"{v:.2f}"),
    ("utilisation", lambda o: o.utilisation, lambda v: f"{v:.1%}"),
    ("lost work, GPU hours", lambda o: o.lost_s / 3600, lambda v: f"{v:.2f}"),
    ("loading, GPU hours", lambda o: o.loading_s / 3600, lambda v: f"{v:.2f}"),
    ("waiting, GPU hours", lambda o: o.waiting_s / 3600, lambda v: f"{v:.2f}"),
    ("preemptions", lambda o: float(o.preemptions), lambda v: f"{v:.0f}"),
)


def mount_simulate(view_of: Callable[[Path, list[str]], RunView]) -> None:
    """Add the command; `view_of` (recipe, overrides) is the front door's."""

    @app.command("simulate")
    def simulate_run(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/edgefusion.yaml")],
        gpus: Annotated[int, typer.Option(min=1, help="GPU nodes, one GPU each")] = 8,
        samples: Annotated[
            int | None, typer.Option(min=0, help="pictures to make; the recipe's plan if left out")
        ] = None,
        from_run: Annotated[
            Path | None,
            typer.Option(help="output folder of a finished run to take rates from; they hold for its machine"),
        ] = None,
        make_per_s: Annotated[float | None, typer.Option(min=1e-6, help="images a second that one GPU renders")] = None,
        score_per_s: Annotated[float, typer.Option(min=1e-6, help="images a second that one scorer takes")] = math.inf,
        train_per_s: Annotated[
            float | None, typer.Option(min=1e-6, help="images a second that one GPU trains on, in every phase")
        ] = None,
        preemptions_per_hour: Annotated[float, typer.Option(min=0, help="of each GPU")] = 0.0,
        provision_s: Annotated[float, typer.Option(min=0, help="seconds until a lost node is replaced")] = 180.0,
        load_s: Annotated[float, typer.Option(min=0, help="seconds in which a worker opens its models")] = 60.0,
        price_per_gpu_hour: Annotated[float, typer.Option(min=0, help="in any currency")] = 0.0,
        repeats: Annotated[int, typer.Option(min=1, max=1000, help="plays with different dice")] = 20,
        seed: Annotated[int, typer.Option(help="of the dice")] = 0,
        overrides: Annotated[list[str] | None, SET] = None,
    ) -> None:
        """Predict time, cost, use and lost work of a recipe on GPUs that can be taken away. A prediction, not a measurement."""
        view = view_of(recipe, overrides or [])
        rates = measured_rates(from_run) if from_run else {}
        rates |= {"make": make_per_s} if make_per_s else {}
        rates |= {phase.name: train_per_s for phase in view.phases} if train_per_s else {}
        lacking = [name for name in ("make", *(phase.name for phase in view.phases)) if name not in rates]
        if lacking:
            raise EdgeFusionError(
                f"no rate is known for {', '.join(lacking)}",
                remedy="Give --from-run OUT, or --make-per-s and --train-per-s",
            )
        scenario = Scenario(
            gpus,
            view.samples if samples is None else samples,
            view.unit_images,
            rates["make"],
            tuple((phase, rates[phase.name]) for phase in view.phases),
            next((need.workers for need in view.needs if need.stage == "score"), 1),
            score_per_s,
            preemptions_per_hour,
            provision_s,
            load_s,
            price_per_gpu_hour,
        )
        _show(view.name, scenario, [simulate(scenario, seed + i) for i in range(repeats)])


def _show(name: str, scenario: Scenario, outcomes: list[Outcome]) -> None:
    what = f"predicted: {name}, {scenario.samples} samples on {scenario.gpus} GPUs"
    table = Table(
        "predicted", "median", "10%", "90%", title=f"{what}, {scenario.preemptions_per_hour:g} preemptions/h each"
    )
    for label, value, said in _ROWS:
        values = [value(outcome) for outcome in outcomes]
        table.add_row(label, *(said(quantile(values, share)) for share in (0.5, 0.1, 0.9)))
    Console().print(table)
    used = [f"make {scenario.make_per_s:.3g}", *(f"{phase.name} {rate:.3g}" for phase, rate in scenario.phases)]
    typer.echo(
        f"Predicted from {len(outcomes)} plays at images/s a GPU: {', '.join(used)}. Nothing here was measured on GPUs"
    )
    typer.echo(
        "but what the rates come from. Assumed: training scales linearly; plan, select, pack and export take no time."
    )
