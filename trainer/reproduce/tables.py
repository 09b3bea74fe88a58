"""All rows with all seeds, one after the other; the figures and the page are written anew after each, so that what is in can be read."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import LedgerConflict, RecipeError
from cluster.machine import commit, machine_facts
from cluster.storage import publish_bytes
from trainer.reproduce.data import FUNNEL
from trainer.reproduce.page import write_page
from trainer.reproduce.paper import DATA_SETS, ROWS, TableRow
from trainer.reproduce.recipe import TablesRecipe
from trainer.reproduce.runs import RESULTS, Row, Tick, run_rows
from trainer.reproduce.verdicts import SETTLED, cells_of, verdicts

PROTOCOL, TABLES, PAGE = "protocol.json", "tables.json", "reproduction.md"
AnyRow = TypeVar("AnyRow", bound=Row)


def chosen_rows(patterns: Sequence[str]) -> list[TableRow]:
    """The tables' rows whose names match one of the patterns, in the paper's order; all without a pattern. Raises RecipeError."""
    return chosen(ROWS, patterns)


def chosen(rows: Sequence[AnyRow], patterns: Sequence[str]) -> list[AnyRow]:
    """Those of `rows` whose names match one of the patterns, in their order; all without a pattern. Raises RecipeError."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise RecipeError(f"no row is called {pattern!r}", where="--rows", remedy=f"There are {names}")
    wanted = patterns or ["*"]
    return [row for row in rows if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in wanted)]


def reproduce(
    recipe: TablesRecipe, out: Path, rows: Sequence[TableRow] = ROWS, tick: Tick = lambda what, done, of: None
) -> dict[str, Any]:
    """Run what is missing and return `tables.json`'s contents; run again after a kill to go on.

    Seed by seed, so that a whole table is there early. Raises LedgerConflict for a folder of another protocol.
    """
    claim(recipe, out)
    run_rows(recipe, out, rows, lambda: write_tables(recipe, out), tick)
    return write_tables(recipe, out)


def write_tables(recipe: TablesRecipe, out: Path) -> dict[str, Any]:
    """`tables.json` and `reproduction.md` of every result that is there, whichever rows were asked for."""
    results = [json.loads(path.read_text()) for path in sorted((out / RESULTS).glob("*-seed*.json"))]
    results = [result for result in results if result["seed"] < recipe.seeds]
    cells = cells_of(results)
    found = verdicts(cells)
    funnels = {name: out / "data" / name / FUNNEL for name in DATA_SETS}
    data = {name: json.loads(path.read_text()) for name, path in funnels.items() if path.exists()}
    teacher = json.loads((out / RESULTS / "teacher.json").read_text())["figures"]
    facts = run_facts(done=len(results), wanted=len(ROWS) * recipe.seeds)
    report = {
        **facts,
        "protocol": recipe.model_dump(mode="json"),
        "data": data,
        "teacher": teacher,
        "rows": [{"row": row, "steps": steps, **figures} for (row, steps), figures in cells.items()],
        "verdicts": [{**asdict(v), "settled": SETTLED.get(v.word, "open")} for v in found],
        "runs": results,
    }
    publish_bytes(out / TABLES, (json.dumps(report, indent=2) + "\n").encode())
    publish_bytes(out / PAGE, write_page(recipe, facts, cells, found, data, teacher).encode())
    return report


def claim(recipe: TablesRecipe, out: Path) -> None:
    """Take the folder for this protocol. More seeds, other `threads` and what decides no picture of the data may come later; nothing else may
    change."""
    path, digest = out / PROTOCOL, recipe.digest()
    if path.exists():
        try:
            kept = json.loads(path.read_text())["digest"]
        except (ValueError, KeyError, TypeError):
            raise LedgerConflict("cannot be read", where=str(path), remedy="Choose another --out folder") from None
        # Earlier versions counted every key of the data recipes.
        if kept not in (digest, recipe.digest(idle=())):
            raise LedgerConflict(
                "the folder holds rows of another protocol (steps, sizes, data recipes or models differ)",
                where=str(out),
                remedy="Choose another --out folder, or go back to those values",
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise LedgerConflict(
            "the folder is not empty and holds no protocol", where=str(out), remedy="Choose another --out folder"
        )
    content = {"digest": digest, "recipe": recipe.model_dump(mode="json"), "commit": commit()}
    publish_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def run_facts(done: int, wanted: int) -> dict[str, Any]:
    """Commit, machine, and how many runs of how many are in."""
    facts = machine_facts()
    machine = ", ".join(f"{name}: {facts[name]}" for name in ("CPU cores", "bf16 on this CPU", "memory", "GPUs"))
    return {"commit": commit(), "machine": machine, "done": done, "wanted": wanted}
