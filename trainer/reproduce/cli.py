"""`edgefusion reproduce ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.progress import progress_bars
from cluster.recipe import load_recipe
from trainer.reproduce.recipe import AblationsRecipe, TablesRecipe

app = typer.Typer(
    no_args_is_help=True, help="The paper's tables, and what each choice is worth, in miniature on the pocket world."
)


@app.command("tables")
def tables(
    out: Annotated[Path, typer.Option(help="data, students, figures and the page; rerun to go on")] = Path(
        "runs/reproduction"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps of each phase, in every row; 600")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="trainings of each row; 3. May be raised later")] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="only these rows, such as 2/synt or '3/*' (repeatable); all if left out")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="a YAML file of the protocol; options win over it")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override: --set batch_images=16")] = None,
) -> None:
    """Tables 2 and 3: each data set, both phases, fixed compute a row, judged with intervals. Hours; kill it anywhere and run it again."""
    given = {"adapt_steps": steps, "distill_steps": steps, "seeds": seeds}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = load_recipe(TablesRecipe, recipe, [*options, *(overrides or [])])
    from trainer.reproduce.tables import PAGE, TABLES, chosen_rows, reproduce

    chosen = chosen_rows(rows or [])
    with progress_bars() as bars:
        task = bars.add_task("reproduce", total=None)
        report = reproduce(
            settings, out, chosen, lambda what, done, of: bars.update(task, description=what, completed=done, total=of)
        )
    words = [verdict["settled"] for verdict in report["verdicts"]]
    typer.echo(
        f"{report['done']} of {report['wanted']} trainings; comparisons with the paper: {words.count('agree')} agree, "
        f"{words.count('disagree')} do not, {words.count('open')} are not settled"
    )
    typer.echo(f"wrote {out / PAGE} and {out / TABLES}")


@app.command("ablations")
def ablations(
    out: Annotated[Path, typer.Option(help="data, students, figures and the page; rerun to go on")] = Path(
        "runs/ablations"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps of each phase, in every row; 600")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="trainings of each row; 3. May be raised later")] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="only these rows, such as base or 'phased*' (repeatable); all if left out")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="a YAML file of the protocol; options win over it")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override: --set phases=2")] = None,
) -> None:
    """Large or same-size teacher, phase 1 or none, PCM or LCM, adversary or none, LoRA or full weights. Hours; kill it anywhere and run it again."""
    given = {"adapt_steps": steps, "distill_steps": steps, "seeds": seeds}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    from trainer.reproduce.ablations import ABLATIONS, PAGE, ablate, rows_of
    from trainer.reproduce.tables import chosen

    settings = load_recipe(AblationsRecipe, recipe, [*options, *(overrides or [])])
    wanted = chosen(rows_of(settings), rows or [])
    with progress_bars() as bars:
        task = bars.add_task("ablations", total=None)
        report = ablate(
            settings, out, wanted, lambda what, done, of: bars.update(task, description=what, completed=done, total=of)
        )
    words = [found["word"] for found in report["found"]]
    typer.echo(
        f"{report['done']} of {report['wanted']} trainings; against the base: {words.count('better')} figures better, "
        f"{words.count('worse')} worse, {words.count('not settled')} not settled"
    )
    typer.echo(f"wrote {out / PAGE} and {out / ABLATIONS}")
