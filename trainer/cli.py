"""`edgefusion trainer ...`: students."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Shards to a few-step student.")
