"""docs/reproduction.md, written from the figures: tables, what agrees with the paper and what does not, and what a miniature cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.reproduce.paper import COUNTERPART, PAPER_PAIRS, ROWS, TableRow
from trainer.reproduce.recipe import OVERRIDES, TablesRecipe
from trainer.reproduce.verdicts import (
    A_DIFFERENCE,
    AGREES,
    CONTRADICTS,
    NO_DIFFERENCE,
    OTHER_WAY,
    SAME_WAY,
    Cells,
    Verdict,
    rank_agreement,
)

METRIC_NAMES = {"recall_at_1": "R@1 ↑", "clip_score": "CLIP ↑", "cmmd": "CMMD ↓", "fid_judge": "FID of judge ↓"}
_DIGITS = {"recall_at_1": 3, "clip_score": 3, "cmmd": 1, "fid_judge": 3}


def write_page(
    recipe: TablesRecipe,
    facts: Mapping[str, Any],
    cells: Cells,
    found: Sequence[Verdict],
    data: Mapping[str, Mapping[str, Any]],
    teacher: Sequence[Mapping[str, Any]],
) -> str:
    """Markdown. `facts` are commit, machine and how many runs of how many are in."""
    runs = f"{facts['done']} of {facts['wanted']} trainings are in"
    parts = [
        "# Reproduction in miniature",
        "",
        f"Tables 2 and 3 of EdgeFusion (arXiv 2404.11925) on the pocket world; written by `edgefusion reproduce tables`. {runs}.",
        "",
        *_protocol(recipe, facts),
        *_data(recipe, data),
        "## Table 2: phase 1, 25 steps",
        "",
        *_table([row for row in ROWS if row.table == 2], (25,), cells, teacher),
        "## Table 3: phase 1, then phase 2",
        "",
        "`A > B`: phase 1 on A, phase 2 on B.",
        "",
        *_table([row for row in ROWS if row.table == 3], (4, 2, 1), cells, ()),
        *_verdicts(found),
        *_ranks(cells),
        *_limits(recipe, cells),
    ]
    return "\n".join(parts) + "\n"


def _protocol(recipe: TablesRecipe, facts: Mapping[str, Any]) -> list[str]:
    return [
        "## Protocol",
        "",
        f"- Every row: {recipe.adapt_steps} steps of phase 1 from the bare cut (BK-SDM {recipe.student} of {recipe.teacher}), {recipe.distill_steps} of phase 2, "
        f"batch {recipe.batch_images}, {recipe.size_px} px; learning rates {recipe.adapt_rate:g} and {recipe.distill_rate:g} along a cosine; w = {recipe.guidance:g}. "
        "`none` has no phase 1 and so less compute.",
        f"- {recipe.seeds} seed{'s' if recipe.seeds > 1 else ''} asked for. An interval is 95%: bootstrap over pictures and, from two seeds on, Student's t over trainings, "
        "added in quadrature. Where a row has one seed, chance in training is not in its interval.",
        f"- Evaluation: {recipe.count} captions of the zoo's split `{recipe.evaluation}` by {recipe.judge}, a CLIP that filtered nothing; R@1 among {recipe.among}. "
        f"Table 2 by DPM++ with {recipe.eval_steps} steps, guidance scale {recipe.guidance + 1:g}.",
        f"- Commit {facts['commit']}; {facts['machine']}.",
        "",
    ]


def _data(recipe: TablesRecipe, data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    how = {
        "L-orig": "raw pictures, centre crop, raw texts; only the same file or the same drawing in the same colours, there twice, is left out",
        "L-pp": "duplicates and small pictures out, crop chosen of three by CLIP, raw texts (no text: left out); no manual removal",
        "L-pps": "the same with captions written anew after the crop (pictures without a text stay; which of two duplicates stays may differ)",
        "synt": "prompts by the pocket writer, pictures by the teacher, duplicates out",
        "synt-cur": f"stand-in for the paper's people: the top {recipe.curated_share:.0%} of synt by the filter CLIP. Captions are not corrected",
    }
    lines = ["## Data", "", "| | how | planned | kept | paper's pairs |", "|---|---|---:|---:|---:|"]
    for name, what in how.items():
        funnel = data.get(name)
        counts = f"{funnel['planned']:,} | {funnel['kept']:,}" if funnel else "– | –"
        lines.append(f"| {name} | {what} | {counts} | {PAPER_PAIRS[name]:,} |")
    changed = "; ".join(f"{name}: `{' '.join(more)}`" for name, more in OVERRIDES.items())
    return [*lines, "", f"By recipes/pocket-wild.yaml and recipes/pocket.yaml with {changed}.", ""]


def _table(
    rows: Sequence[TableRow], steps: Sequence[int], cells: Cells, teacher: Sequence[Mapping[str, Any]]
) -> list[str]:
    lines = [
        f"| training data | steps | seeds | {' | '.join(METRIC_NAMES.values())} | paper: CLIP ↑ | FID ↓ |",
        "|---|---:|---:|" + "---:|" * (len(METRIC_NAMES) + 2),
    ]
    for figures in teacher:
        name = "*teacher*" if figures["steps"] else "*the evaluation set's own pictures*"
        shown = " | ".join(figure_cell(figures.get(metric), metric) for metric in METRIC_NAMES)
        paper = "0.307 | 17.63" if figures["steps"] else " | "
        lines.append(f"| {name} | {figures['steps'] or ''} | | {shown} | {paper} |")
    for count in steps:
        for row in rows:
            found = cells.get((row.name, count))
            name = f"{'+'.join(row.adapt) or 'none'} > {'+'.join(row.distill)}" if row.distill else "+".join(row.adapt)
            paper = row.paper.get(count, {})
            told = " | ".join(f"{paper[name]:g}" if name in paper else "" for name in ("CLIP", "FID"))
            shown = " | ".join(figure_cell(found[metric] if found else None, metric) for metric in METRIC_NAMES)
            seeds = found["clip_score"]["seeds"] if found else 0
            lines.append(f"| {name} | {count} | {seeds or 'not run'} | {shown} | {told} |")
    return [*lines, ""]


def figure_cell(found: Mapping[str, float] | None, metric: str) -> str:
    if not found:
        return ""
    digits = _DIGITS[metric]
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _verdicts(found: Sequence[Verdict]) -> list[str]:
    order = {
        (AGREES, NO_DIFFERENCE): "### Agrees with the paper",
        (CONTRADICTS, A_DIFFERENCE): "### Does not agree",
        (SAME_WAY, OTHER_WAY): "### Not settled: the intervals overlap",
    }
    lines = [
        "## What agrees and what does not",
        "",
        "CLIP is compared with the paper's CLIP, CMMD with its FID. The words follow from the intervals alone: apart or overlapping, and the sign.",
        "",
    ]
    for words, title in order.items():
        lines += [title, ""]
        some = [verdict for verdict in found if verdict.word in words]
        lines += [_line(verdict) for verdict in some] or ["Nothing."]
        lines.append("")
    return lines


def _line(verdict: Verdict) -> str:
    c = verdict.comparison
    metric = "CLIP" if verdict.metric == "clip_score" else "CMMD"
    one, other = (figure_cell(f, verdict.metric) for f in verdict.ours)
    paper = f"{COUNTERPART[verdict.metric]} {verdict.paper[0]:g} against {verdict.paper[1]:g}"
    cells = f"{_short(c.one)} against {_short(c.other)}"
    return f"- **{c.about}** (Table {c.one[0][0]}, {cells}): {metric} {one} against {other}; paper: {paper}. {verdict.word.capitalize()}."


def _short(cell: tuple[str, int]) -> str:
    row, steps = cell
    return f"{row[2:].replace('/', ' > ')} at {steps}"


def _ranks(cells: Cells) -> list[str]:
    lines = ["### Order of the rows", ""]
    for table in (2, 3):
        for metric, name in COUNTERPART.items():
            found = rank_agreement(cells, table, metric)
            told = (
                f"Spearman {found[0]:+.2f} over {found[1]} rows"
                if found
                else "fewer than four rows are in: not computed"
            )
            lines.append(
                f"- Table {table}, {'CLIP' if metric == 'clip_score' else 'CMMD'} against the paper's {name}: {told}."
            )
    return [*lines, ""]


def _limits(recipe: TablesRecipe, cells: Cells) -> list[str]:
    single = sorted({row for (row, _), figures in cells.items() if figures["clip_score"]["seeds"] == 1})
    return [
        "## What this can and cannot show",
        "",
        "- It can show whether, in one small world, with one teacher and fixed compute, the direction of a difference between data sets is the paper's. It cannot confirm "
        "or refute the paper's figures: CLIP scores and distances of other encoders on other pictures are other scales.",
        "- The world is 64-pixel drawings of a few hundred subjects. The wild set's flaws are made by program in known shares, not found on the web; the captioner has seen "
        "such flaws in its training; the teacher has learned from the same drawings that the wild set and the evaluation pictures are made from, so real data "
        "is nearer to the reference here than LAION is to COCO.",
        "- Synthetic pictures come from the teacher itself. In the paper SDXL, a better model than the teacher, drew them, so what `synt` adds there cannot appear here.",
        "- synt-cur is chosen by a score and not by people, and its captions stay as they are: its rows say what thresholding does, not what curation does.",
        f"- {recipe.adapt_steps} + {recipe.distill_steps} steps of {recipe.batch_images} pictures are far from the paper's 50,000 of 256: rows are compared early in training, where data sets may rank otherwise than late.",
        "- The row `none` starts phase 2 from the bare cut, with no training at all; the paper's had the published BK-SDM-Tiny behind it.",
        "- IS is not reported (it needs Inception, which knows no such pictures), nor is SD-v1.4's row.",
        *([f"- Rows with one seed only: {', '.join(single)}."] if single else []),
    ]
