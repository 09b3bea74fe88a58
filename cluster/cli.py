"""`edgefusion cluster ...` and `edgefusion doctor`: where work runs and what this machine can do."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from cluster.machine import NEEDED, OPTIONAL, machine_facts, version_of

app = typer.Typer(no_args_is_help=True, help="Where work runs.")


def doctor() -> None:
    """Say what this machine can do, what is missing and how to get it. Exits with 1 if a needed package is missing."""
    table = Table(title="edgefusion doctor", show_header=False)
    for name, value in machine_facts().items():
        table.add_row(name, value)
    table.add_section()
    missing: list[str] = []
    for package in NEEDED:
        version = version_of(package)
        table.add_row(package, version or "[red]missing[/]")
        missing += [] if version else [package]
    for package, remedy in OPTIONAL.items():
        table.add_row(package, version_of(package) or f"not installed (optional; to {remedy})".replace("[", r"\["))
    Console().print(table)
    if missing:
        typer.echo(f"Missing: {', '.join(missing)}. Mend it with: pip install {' '.join(missing)}", err=True)
        raise typer.Exit(1)
