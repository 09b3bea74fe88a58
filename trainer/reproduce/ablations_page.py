"""ablations.md, written from the figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.reproduce.ablations import BASE, BETTER, OPEN, WORSE, Found, rows_of
from trainer.reproduce.page import METRIC_NAMES, figure_cell
from trainer.reproduce.recipe import AblationsRecipe
from trainer.reproduce.verdicts import Cells


def write_page(
    recipe: AblationsRecipe,
    facts: Mapping[str, Any],
    cells: Cells,
    found: Sequence[Found],
    teacher: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown."""
    lines = [
        "# Ablations of phase 2 in miniature",
        "",
        f"On the pocket world; written by `edgefusion reproduce ablations`. {facts['done']} of {facts['wanted']} trainings are in.",
        "",
        f"- Base: {recipe.adapt_steps} steps of phase 1 on {recipe.adapt_data}, {recipe.distill_steps} of LCM on {recipe.distill_data} from "
        f"{recipe.teacher}, BK-SDM {recipe.student}, batch {recipe.batch_images}, {recipe.size_px} px, ddim_steps {recipe.ddim_steps}, w {recipe.guidance:g}.",
        f"- {recipe.seeds} seed{'s' if recipe.seeds > 1 else ''} asked for; intervals are 95%: bootstrap over pictures and, from two seeds on, Student's t "
        "over trainings, in quadrature. With one seed chance in training is not in them.",
        f"- {recipe.count} captions of the split `{recipe.evaluation}` by {recipe.judge}, a CLIP that filtered nothing; R@1 among {recipe.among}.",
        f"- A student with {recipe.phases} phases learned steps from edge to edge: its figures below {recipe.phases} steps are of jumps that it never learned.",
        f"- Commit {facts['commit']}; {facts['machine']}.",
        "",
        "## Figures",
        "",
        f"| row | steps | seeds | {' | '.join(METRIC_NAMES.values())} | seconds |",
        "|---|---:|---:|" + "---:|" * (len(METRIC_NAMES) + 1),
    ]
    for figures in teacher:
        name = "*teacher*" if figures["steps"] else "*the evaluation set's own pictures*"
        shown = " | ".join(figure_cell(figures.get(metric), metric) for metric in METRIC_NAMES)
        lines.append(f"| {name} | {figures['steps'] or ''} | | {shown} | |")
    for row in rows_of(recipe):
        seconds = [result["seconds"] for result in results if result["row"] == row.name]
        for i, steps in enumerate(row.steps):
            cell = cells.get((row.name, steps))
            shown = " | ".join(figure_cell(cell[metric] if cell else None, metric) for metric in METRIC_NAMES)
            seeds = cell["clip_score"]["seeds"] if cell else "not run"
            took = f"{statistics.median(seconds):.0f}" if seconds and not i else ""
            lines.append(f"| {row.name} | {steps} | {seeds} | {shown} | {took} |")
    lines += ["", "Seconds: of the row's training and judging; a phase 1 that rows share counts in the first.", ""]
    lines += [f"- `{row.name}`: {row.about}." for row in rows_of(recipe)]
    for word, title in ((BETTER, "Better than the base"), (WORSE, "Worse than the base"), (OPEN, "Not settled")):
        lines += ["", f"## {title}", ""]
        lines += [_line(one) for one in found if one.word == word] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _line(one: Found) -> str:
    ours, base = (figure_cell(figure, one.metric) for figure in (one.ours, one.base))
    return f"- **{one.row}** ({one.about}) at {one.steps}: {METRIC_NAMES[one.metric]} {ours} against {BASE}'s {base}."
