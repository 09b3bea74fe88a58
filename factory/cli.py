"""`edgefusion factory ...`: look after data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prompts to curated shards.")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a data set folder: shards and manifest.parquet")]) -> None:
    """Prove that the shards are exactly what the manifest says; exits with 4 and names the first damaged sample if not."""
    from factory.pack import verify as prove

    typer.echo(f"{folder}: {prove(folder)} samples, every shard as the manifest says")


@app.command("retry-failed")
def retry_failed(folder: Annotated[Path, typer.Argument(help="a run's output folder, or its data set")]) -> None:
    """Give samples that died while they were made another try: their units are made anew by the next run."""
    from factory.retry import reopen_dead

    samples, units = reopen_dead(folder)
    if not samples:
        typer.echo(f"{folder}: no sample died while it was made, so there is nothing to try again")
        return
    typer.echo(f"{folder}: {samples} dead samples in {units} units are to be made anew; now run the recipe again")
