"""How tables reach stdout: nothing in them is cut. A pipe or file gets lines as long as they need; a narrow terminal gets folded cells."""

from __future__ import annotations

import sys

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table

_ENDLESS = 10_000


def print_tables(*parts: RenderableType) -> None:
    """Print tables, and texts between them."""
    console = stdout()
    with console.capture() as shown:
        console.print(*(folding(part) for part in parts))
    lines = (line.rstrip() for line in shown.get().splitlines())
    typer.echo("\n".join(lines))


def stdout() -> Console:
    """The console of stdout."""
    return Console(width=None if sys.stdout.isatty() else _ENDLESS)


def folding(part: RenderableType) -> RenderableType:
    """`part`, whose tables now break what is too long for a column into lines."""
    if isinstance(part, Group):
        for inner in part.renderables:
            folding(inner)
    elif isinstance(part, Table):
        for column in part.columns:
            column.overflow = "fold"
    return part
