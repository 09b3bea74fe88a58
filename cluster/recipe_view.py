"""`edgefusion recipe ...`: what a recipe may say, and whether one is right. Shows what cluster/recipe_keys.py reads off the schema."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from cluster.errors import RecipeError
from cluster.recipe import AnySettings, load_recipe, recipe_digest
from cluster.recipe_keys import EACH, NAME, Group, Key, recipe_groups, recipe_keys
from cluster.storage import publish_bytes
from cluster.tables import print_tables

RUN = "run"
"""Whose settings are a whole recipe; the others are settings of single commands."""
_SET = typer.Option("--set", help="override a key: --set trainer.adapt.steps=20 (repeatable)")

app = typer.Typer(no_args_is_help=True, help="What a recipe may say, and whether one is right.")


def mount_recipe(schema: type[AnySettings], others: Mapping[str, type[BaseModel]]) -> None:
    """Add the commands: `schema` is a whole recipe's, `others` are those of commands and files of their own, by name."""
    schemas: dict[str, type[BaseModel]] = {RUN: schema, **others}

    @app.command("keys")
    def keys(
        prefix: Annotated[str, typer.Argument(help="only what begins so: trainer.distill")] = "",
        of: Annotated[str, typer.Option(help="whose settings: run (a recipe's), or what docs/recipe.md lists")] = RUN,
        as_json: Annotated[bool, typer.Option("--json", help="as a JSON list")] = False,
    ) -> None:
        """List the keys of a recipe: name, type, default, meaning. Into a pipe one line a key, for grep."""
        if of not in schemas:
            raise RecipeError(f"--of {of} is not known", remedy=f"Use one of {', '.join(schemas)}")
        found = recipe_keys(schemas[of], prefix)
        if as_json:
            typer.echo(json.dumps([asdict(key) for key in found], indent=2, ensure_ascii=False))
        else:
            _show(found)

    @app.command("check")
    def check(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/pocket.yaml")],
        overrides: Annotated[list[str] | None, _SET] = None,
        resolved: Annotated[bool, typer.Option("--resolved", help="print it with every default filled in")] = False,
    ) -> None:
        """Say whether a recipe is right: its keys, their values, and whether they go together. Opens no model, starts nothing."""
        found = load_recipe(schema, recipe, overrides or [])
        if resolved:
            typer.echo(yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip())
        else:
            typer.echo(f"{recipe}: right (digest {recipe_digest(found)[:12]}). Whether nodes have room for it says:")
            more = " ".join(f"--set {shlex.quote(change)}" for change in overrides or [])
            typer.echo(f"  edgefusion cluster check {shlex.quote(str(recipe))} {more}".rstrip())

    @app.command("page")
    def page(
        out: Annotated[Path, typer.Option(help="Markdown file to write")] = Path("docs/recipe.md"),
    ) -> None:
        """Write the page of all keys, docs/recipe.md, anew from the schema."""
        publish_bytes(out, recipe_page(schemas).encode())
        typer.echo(f"wrote {out}")


def _show(keys: Sequence[Key]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("key", "type", "default", "what it is"):
        table.add_column(name)
    for key in keys:
        table.add_row(*(escape(words) for words in (key.key, key.type, key.default, _meaning(key))))
    print_tables(table)


def _meaning(key: Key) -> str:
    return key.description + (f" (kind {' or '.join(key.kinds)})" if key.kinds else "")


_HEAD = f"""# The keys of a recipe

<!-- Written by `edgefusion recipe page` from the schema; change the descriptions there. tests/cluster/test_recipe_keys.py holds this page to it. -->

A recipe is a YAML file of these keys, an object of the same names in Python ([python.md](python.md)), and what `--set KEY=VALUE` changes on the command line: one schema.

    edgefusion recipe keys trainer.distill                # these tables in a terminal, or a part of them
    edgefusion recipe keys | grep guidance                # into a pipe: one line a key
    edgefusion recipe keys --json                         # for programs
    edgefusion recipe check my.yaml --set seed=3          # right or not: the key, the file, the remedy
    edgefusion recipe check my.yaml --resolved            # with every default filled in

A key that is not here is an error that names the nearest one. `{NAME}` stands for a name of your own, `{EACH}` for each entry of a list (`--set` sets a list whole).
Where a `kind` chooses among several, *with kind* says which of them has the key. *Required* means so as soon as the keys around it are there; an empty default is what the keys below it say.
"""


def recipe_page(schemas: Mapping[str, type[BaseModel]]) -> str:
    """docs/recipe.md."""
    parts = [_HEAD]
    for name, schema in schemas.items():
        if name != RUN:
            parts.append(f"## Settings of `{name}`\n\n`edgefusion recipe keys --of {name}`\n")
        for group in recipe_groups(schema):
            level = "##" if name == RUN and "." not in group.name else "###"
            if group.name or name == RUN:
                parts.append(f"{level} {f'`{group.name}`' if group.name else 'A recipe'}\n")
            parts.append(_section(group))
    return "\n".join(parts)


def _section(group: Group) -> str:
    about = "" if group.abouts else f"{_cell(group.about)}.\n\n" if group.about else ""
    about += "".join(f"- `{kind}`: {_cell(said)}.\n" for kind, said in group.abouts.items()) + "\n" * bool(group.abouts)
    names = ["key", "type", "default", *(["with kind"] if group.abouts else []), "what it is"]
    rows = [
        [f"`{key.key.rpartition('.')[2]}`", key.type, f"`{key.default}`" if key.default else ""]
        + ([", ".join(key.kinds)] if group.abouts else [])
        + [key.description]
        for key in group.keys
    ]
    lines = [names, ["---"] * len(names), *([_cell(word) for word in row] for row in rows)]
    return about + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """<...> would be taken for a tag outside of code, and a bar for the next cell."""
    return text if text.startswith("`") and text.endswith("`") else text.replace("|", r"\|").replace("<", r"\<")
