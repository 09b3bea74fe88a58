"""How many samples a run that is on its way will keep, whether that is what its recipe wants, and what to do if not.

A sum of what was judged and a share of what is to come, with its 95% interval; before duplicates, for those show at the end only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.status_view import clock
from factory.balance import lacks
from factory.recipe import SelectRecipe
from factory.shares import wilson
from factory.tally import Key, Tally, later_rules

_SHOWN = 5


def foretell(
    tally: Tally,
    planned: int,
    per_s: float | None,
    combinations: Sequence[Mapping[Key, int]] = (),
    images_per_prompt: int = 1,
) -> dict[str, Any]:
    """`planned` samples in all, of which the tally's were judged; made at `per_s` samples a second, None if nobody knows.

    `combinations`: for each rule of `wanted`, how many samples of each combination are planned. Counts are before the rules that
    `not_counted` names.
    """
    judged, kept, left = tally.rows, tally.kept, max(0, planned - tally.rows)
    low, high = wilson(kept, judged)
    share = kept / judged if judged else None
    found: dict[str, Any] = {
        "judged": judged,
        "kept": kept,
        "share": None if share is None else round(share, 4),
        "share_95": [round(low, 4), round(high, 4)],
        "expected": None if share is None else round(kept + left * share),
        "least": kept + math.floor(left * low),
        "most": kept + math.ceil(left * high),
        "not_counted": later_rules(tally.rules),
        "best": None,
        "wanted": None,
    }
    if share is not None and tally.rules.best is not None:
        found["best"] = _best(found, tally.rules.best, left, per_s, images_per_prompt)
    if share is not None and tally.rules.wanted:
        found["wanted"] = _wanted(tally, tally.rules, combinations)
    return found


def _best(
    found: Mapping[str, Any], best: int, left: int, per_s: float | None, images_per_prompt: int
) -> dict[str, Any]:
    """Whether so many will be there to choose from."""
    verdict = "yes" if found["least"] >= best else "no" if found["most"] < best else "open"
    lacking = max(0, best - found["expected"])
    share = max(found["share"], 1e-6)
    goes_on_s = left / per_s if per_s and left else None
    needed = math.ceil(max(0, best - found["kept"]) / share)
    more = math.ceil(lacking / share / images_per_prompt)
    return {
        "of": best,
        "reached": verdict,
        "lacking": lacking,
        "more_prompts": more,
        "eta_s": round(needed / per_s, 1) if per_s and goes_on_s is not None and needed <= left else None,
        "remedy": ""
        if verdict == "yes"
        else f"plan about {more:,} more prompts, or loosen the rules of factory.select"
        if lacking
        else "wait and see, or plan some more prompts",
    }


def _wanted(tally: Tally, rules: SelectRecipe, combinations: Sequence[Mapping[Key, int]]) -> dict[str, Any]:
    """Which combinations will lack samples if each is kept as often as its own samples were so far, or as all were."""
    share = tally.kept / tally.rows
    short: list[dict[str, Any]] = []
    count = 0
    for rule, planned, seen in zip(rules.wanted, combinations, tally.combinations, strict=True):
        have: dict[Key, float] = {}
        for key, of in planned.items():
            judged, kept = seen.get(key, (0, 0))
            have[key] = kept + max(0, of - judged) * (kept / judged if judged else share)
        rows, looked_at = lacks(rule, planned, {key: math.floor(value) for key, value in have.items()})
        short += rows
        count += looked_at
    short.sort(key=lambda row: -row["lacking"])
    return {
        "combinations": count,
        "short": len(short),
        "lacking": sum(row["lacking"] for row in short),
        "worst": short[:_SHOWN],
        "remedy": "once it is packed: edgefusion factory plan OUT/dataset --refill OUT/dataset/refill.jsonl"
        if short
        else "",
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """In words, for a terminal and a log."""
    if found["share"] is None:
        return []
    low, high = found["share_95"]
    told = [
        f"kept so far {found['kept']:,} of {found['judged']:,} ({found['share']:.1%}; {low:.1%} to {high:.1%}), "
        f"at the end about {found['expected']:,} ({found['least']:,} to {found['most']:,}), before {', '.join(found['not_counted'])}"
    ]
    if best := found["best"]:
        word = {"yes": "will be there", "no": "will not be there", "open": "may or may not be there"}[best["reached"]]
        when = f", in about {clock(best['eta_s'])}" if best["reached"] == "yes" and best["eta_s"] else ""
        told.append(f"by that the {best['of']:,} best {word}{when}" + (f": {best['remedy']}" if best["remedy"] else ""))
    if wanted := found["wanted"]:
        if wanted["short"]:
            worst = ", ".join([wanted["worst"][0]["group"], *wanted["worst"][0]["attributes"].values()])
            told.append(
                f"{wanted['short']:,} of {wanted['combinations']:,} wanted combinations will lack {wanted['lacking']:,} samples, "
                f"most of all {worst}; {wanted['remedy']}"
            )
        else:
            told.append(f"all {wanted['combinations']:,} wanted combinations will be there")
    return told
