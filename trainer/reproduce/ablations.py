"""What each choice in phase 2 is worth: rows that differ in one thing from a base, the same data, seeds and judge.

A row is the paper's pipeline with something left out or added; the machinery of runs, resume and intervals is the tables'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.storage import publish_bytes
from trainer.lora import require_peft
from trainer.reproduce.paper import HIGHER_IS_BETTER
from trainer.reproduce.recipe import AblationsRecipe
from trainer.reproduce.runs import RESULTS, Tick, result_of, run_rows
from trainer.reproduce.tables import claim, run_facts
from trainer.reproduce.verdicts import Cells, cells_of

ABLATIONS, PAGE = "ablations.json", "ablations.md"
BASE = "base"


@dataclass(frozen=True)
class AblationRow:
    """One training: a name, what it is compared for, and how phase 2 departs from the base's."""

    name: str
    about: str
    adapt: tuple[str, ...] = ()
    distill: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (4, 2, 1)


def rows_of(recipe: AblationsRecipe) -> list[AblationRow]:
    """The base first; every other row is compared with it."""
    one, two = (recipe.adapt_data,), (recipe.distill_data,)
    grid: dict[str, Any] = {"ddim_steps": recipe.ddim_steps}
    phased, judged = {"phases": recipe.phases}, {"adversarial": recipe.adversarial}
    adapters = {"lora": recipe.lora, "learning_rate": recipe.lora_rate}
    both = recipe.adapt_steps + recipe.distill_steps
    return [
        AblationRow(BASE, "phase 1, then LCM from the large teacher, full weights", one, two, grid),
        AblationRow(
            "same-size-teacher",
            "phase 2 from a frozen copy of the student",
            one,
            two,
            grid | {"teacher": "student"},
        ),
        AblationRow("no-phase-1", "phase 2 alone, from the bare cut", (), two, grid),
        AblationRow(
            "no-phase-1-same-compute", "phase 2 alone, with the steps of both", (), two, grid | {"steps": both}
        ),
        AblationRow("phased", f"PCM with {recipe.phases} phases instead of LCM", one, two, grid | phased),
        AblationRow("adversarial", "LCM with adversarial consistency", one, two, grid | judged),
        AblationRow(
            "phased-adversarial", f"PCM with {recipe.phases} phases and adversary", one, two, grid | phased | judged
        ),
        AblationRow("lora", f"adapters of rank {recipe.lora.rank} instead of full weights", one, two, grid | adapters),
    ]


def ablate(
    recipe: AblationsRecipe, out: Path, rows: Sequence[AblationRow], tick: Tick = lambda what, done, of: None
) -> dict[str, Any]:
    """Run what is missing, seed by seed, and return `ablations.json`'s contents; run again after a kill to go on.

    Raises LedgerConflict for a folder of another protocol, TargetUnavailable before anything is trained if a row needs peft and it is
    not there.
    """
    if any("lora" in row.changes for row in rows):
        require_peft()
    claim(recipe, out)
    run_rows(recipe, out, rows, lambda: write_ablations(recipe, out), tick)
    return write_ablations(recipe, out)


@dataclass(frozen=True)
class Found:
    """A row beside the base at a number of steps by a metric, and what the two intervals say."""

    row: str
    about: str
    steps: int
    metric: str
    ours: dict[str, Any]
    base: dict[str, Any]
    word: str


BETTER, WORSE, OPEN = "better", "worse", "not settled"


def compare(recipe: AblationsRecipe, cells: Cells) -> list[Found]:
    """Every row with the base, at every number of steps, by every metric; no word without intervals that are apart."""
    found: list[Found] = []
    for row in rows_of(recipe)[1:]:
        for steps in row.steps:
            if (row.name, steps) not in cells or (BASE, steps) not in cells:
                continue
            for metric, higher in HIGHER_IS_BETTER.items():
                ours, base = cells[row.name, steps][metric], cells[BASE, steps][metric]
                found.append(Found(row.name, row.about, steps, metric, ours, base, word_for(ours, base, higher)))
    return found


def word_for(ours: Mapping[str, float], base: Mapping[str, float], higher_is_better: bool) -> str:
    if ours["low"] <= base["high"] and base["low"] <= ours["high"]:
        return OPEN
    return BETTER if (ours["value"] > base["value"]) == higher_is_better else WORSE


def write_ablations(recipe: AblationsRecipe, out: Path) -> dict[str, Any]:
    """`ablations.json` and `ablations.md` of every result that is there."""
    from trainer.reproduce.ablations_page import write_page

    rows = rows_of(recipe)
    results = [
        json.loads(path.read_text())
        for row in rows
        for seed in range(recipe.seeds)
        if (path := result_of(out, row.name, seed)).exists()
    ]
    cells = cells_of(results, is_few_step=lambda _: True)
    teacher = json.loads((out / RESULTS / "teacher.json").read_text())["figures"]
    facts = run_facts(done=len(results), wanted=len(rows) * recipe.seeds)
    found = compare(recipe, cells)
    report = {
        **facts,
        "protocol": recipe.model_dump(mode="json"),
        "teacher": teacher,
        "rows": [{"row": row, "steps": steps, **figures} for (row, steps), figures in cells.items()],
        "found": [asdict(one) for one in found],
        "runs": results,
    }
    publish_bytes(out / ABLATIONS, (json.dumps(report, indent=2) + "\n").encode())
    publish_bytes(out / PAGE, write_page(recipe, facts, cells, found, teacher, results).encode())
    return report
