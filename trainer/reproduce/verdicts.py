"""From figures of several seeds to intervals, and from intervals to what may be said. Pure functions; no sentence without a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.reproduce.paper import (
    COMPARISONS,
    COUNTERPART,
    HIGHER_IS_BETTER,
    ROWS,
    SAME,
    Comparison,
    Metric,
    row_named,
)

_T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5% points of Student's t by degrees of freedom; beyond nine, 2.23 is wide enough."""

Figures = dict[str, dict[str, Any]]
"""Metric to value, low, high and seeds."""
Cells = Mapping[tuple[str, int], Figures]


def pooled(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over seeds of a metric with its 95% interval.

    Two errors add in quadrature: that of the pictures drawn (the mean of the seeds' bootstrap half-widths; all seeds answer the same
    captions, so it does not shrink with their number) and that of the training (Student's t over the seeds). With one seed the second
    is unknown and left out, which makes the interval too narrow: `seeds` says so.
    """
    values = np.array([f["value"] for f in found])
    mean, count = float(values.mean()), len(values)
    spread = 0.0
    if count > 1:
        spread = _T975.get(count - 1, 2.23) * float(values.std(ddof=1)) / math.sqrt(count)
    below = math.hypot(float(np.mean([f["value"] - f["low"] for f in found])), spread)
    above = math.hypot(float(np.mean([f["high"] - f["value"] for f in found])), spread)
    return {"value": mean, "low": mean - below, "high": mean + above, "seeds": count}


def cells_of(
    results: Sequence[Mapping[str, Any]],
    is_few_step: Callable[[str], bool] = lambda row: bool(row_named(row).distill),
) -> dict[tuple[str, int], Figures]:
    """(row, steps) to figures, over all seeds that are there. Table 2's steps are called 25 whatever the protocol says."""
    gathered: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        for figure in result["figures"]:
            steps = figure["steps"] if is_few_step(result["row"]) else 25
            gathered.setdefault((result["row"], steps), []).append(figure)
    return {
        cell: {metric: pooled([f[metric] for f in figures]) for metric in HIGHER_IS_BETTER}
        for cell, figures in gathered.items()
    }


@dataclass(frozen=True)
class Verdict:
    """One comparison by one metric: the paper's two figures, ours, and what follows."""

    comparison: Comparison
    metric: Metric
    paper: tuple[float, float]
    ours: tuple[dict[str, Any], dict[str, Any]]
    word: str


AGREES, SAME_WAY, OTHER_WAY, CONTRADICTS = (
    "agrees",
    "same direction, intervals overlap",
    "other direction, intervals overlap",
    "contradicts",
)
NO_DIFFERENCE, A_DIFFERENCE = "agrees: no difference on either side", "differs: the paper has no difference"
SETTLED = {AGREES: "agree", NO_DIFFERENCE: "agree", CONTRADICTS: "disagree", A_DIFFERENCE: "disagree"}
"""The other two words settle nothing."""


def verdicts(cells: Cells) -> list[Verdict]:
    """Of every comparison whose two cells are there."""
    found: list[Verdict] = []
    for comparison in COMPARISONS:
        if comparison.one not in cells or comparison.other not in cells:
            continue
        for metric, name in COUNTERPART.items():
            paper = tuple(row_named(row).paper[steps][name] for row, steps in (comparison.one, comparison.other))
            ours = (cells[comparison.one][metric], cells[comparison.other][metric])
            word = judge(paper[0] - paper[1], SAME[name], *ours)
            found.append(Verdict(comparison, metric, (paper[0], paper[1]), ours, word))
    return found


def judge(paper_difference: float, same: float, one: Mapping[str, float], other: Mapping[str, float]) -> str:
    """What our two intervals say of the paper's difference: both metrics of a pair run the same way, so signs compare."""
    overlap = one["low"] <= other["high"] and other["low"] <= one["high"]
    if abs(paper_difference) <= same:
        return NO_DIFFERENCE if overlap else A_DIFFERENCE
    along = (one["value"] - other["value"]) * paper_difference > 0
    if overlap:
        return SAME_WAY if along else OTHER_WAY
    return AGREES if along else CONTRADICTS


def rank_agreement(cells: Cells, table: int, metric: Metric) -> tuple[float, int] | None:
    """Spearman's correlation of the paper's order of a table's rows and ours, and of how many rows; None below four."""
    steps = 4 if table == 3 else 25
    rows = [row for row in ROWS if row.table == table and (row.name, steps) in cells]
    if len(rows) < 4:
        return None
    paper = _ranks([row.paper[steps][COUNTERPART[metric]] for row in rows])
    ours = _ranks([cells[row.name, steps][metric]["value"] for row in rows])
    return float(np.corrcoef(paper, ours)[0, 1]), len(rows)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    array = np.array(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])
