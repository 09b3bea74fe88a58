"""How many samples a run that is on its way will keep, whether that is what its recipe wants, and what to do if not.

A sum of what was judged and a share of what is to come, with its 95% interval; before duplicates, for those show at the end only. Samples
come teacher by teacher and refills last, so each of these strata goes by its own samples; of one that nothing is known of, all or none may be
kept.
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
    strata: Mapping[Key, int] | None = None,
) -> dict[str, Any]:
    """`planned` samples in all, of which the tally's were judged; made at `per_s` samples a second, None if nobody knows.

    `combinations`: for each rule of `wanted`, how many samples of each combination are planned; `strata`: how many of each stratum, where
    there are several. Counts are before the rules that `not_counted` names.
    """
    judged, kept, left = tally.rows, tally.kept, max(0, planned - tally.rows)
    share = kept / judged if judged else None
    (low, high), expected, least, most = _at_the_end(tally, strata or {("0",): planned}, share or 0.0)
    found: dict[str, Any] = {
        "judged": judged,
        "kept": kept,
        "share": None if share is None else round(share, 4),
        "share_95": [round(low, 4), round(high, 4)],
        "expected": None if share is None else round(expected),
        "least": math.floor(least),
        "most": math.ceil(most),
        "not_counted": later_rules(tally.rules),
        "strata": max(1, len(strata or {})),
        "not_judged": sum(key not in tally.by_stratum for key in strata or {}),
        "best": None,
        "wanted": None,
    }
    if share is not None and tally.rules.best is not None:
        of_all = expected / planned if strata else share
        found["best"] = _best(found, tally.rules.best, left, of_all, per_s, images_per_prompt)
    if share is not None and tally.rules.wanted:
        found["wanted"] = _wanted(tally, tally.rules, combinations)
    return found


def _at_the_end(
    tally: Tally, strata: Mapping[Key, int], usual: float
) -> tuple[tuple[float, float], float, float, float]:
    """(ends of the share kept of all, expected, least, most kept): sums over the strata. One without a judged sample is expected to keep
    the `usual` share, and counts as none and as all of it at the ends."""
    planned = max(1, sum(strata.values()))
    ends, expected, least, most = [0.0, 0.0], 0.0, 0.0, 0.0
    for key, of in strata.items():
        judged, kept = (tally.rows, tally.kept) if len(strata) == 1 else tally.by_stratum.get(key, (0, 0))
        (low, high), left = wilson(kept, judged), max(0, of - judged)
        ends = [end + at * of / planned for end, at in zip(ends, (low, high), strict=True)]
        expected += kept + left * (kept / judged if judged else usual)
        least, most = least + kept + left * low, most + kept + left * high
    return (ends[0], ends[1]), expected, least, most


def _best(
    found: Mapping[str, Any], best: int, left: int, share: float, per_s: float | None, images_per_prompt: int
) -> dict[str, Any]:
    """Whether so many will be there to choose from; `share` of all is kept at the end."""
    verdict = "yes" if found["least"] >= best else "no" if found["most"] < best else "open"
    lacking = max(0, best - found["expected"])
    share = max(share, 1e-6)
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
    of_all = " of all" if found["strata"] > 1 else ""
    told = [
        f"kept so far {found['kept']:,} of {found['judged']:,} ({found['share']:.1%}; {low:.1%} to {high:.1%}{of_all}), "
        f"at the end about {found['expected']:,} ({found['least']:,} to {found['most']:,}), before {', '.join(found['not_counted'])}"
    ]
    if found["not_judged"]:
        told[0] += f"; of {found['not_judged']} of {found['strata']} teachers and refills nothing is judged yet"
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
