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
