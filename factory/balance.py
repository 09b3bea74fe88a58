"""How even and how varied a selection is: attributes before and after, caps, what lacks, one figure of diversity.

An attribute is a key of the plan's `attributes`; `group` counts as one too. Legend: N rows of the ledger.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import RecipeError
from factory.index import Columns, Texts
from factory.recipe import Cap, Wanted

VENDI_ROWS = 2048
_MOST_COMBINATIONS = 100_000
_MOST_VALUES = 300
_LOWEST_YIELD = 0.1
"""A combination of which fewer are kept is not worth more than ten tries a sample; a person should look at it."""


class Attributes:
    """The attributes of every row, read from the plan's JSON once."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._records = [_record(text) for text in columns.attributes.values]
        self.names = sorted({name for record in self._records for name in record} - {"group"})

    def of(self, name: str) -> Texts:
        """One attribute as codes; an empty value where a row has none. Raises RecipeError if no row has it."""
        if name == "group":
            return self._columns.group
        if name not in self.names:
            raise RecipeError(
                f"no sample has an attribute {name}",
                where="factory.select",
                remedy=f"There are: {', '.join(['group', *self.names])}",
            )
        values = [record.get(name, "") for record in self._records]
        known = sorted(set(values))
        code = {value: i for i, value in enumerate(known)}
        table = np.array([code[value] for value in values], np.int32)
        return Texts(table[self._columns.attributes.codes], known)

    def combined(self, names: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        """Combinations of several attributes: N codes and what each stands for."""
        parts = [self.of(name) for name in names]
        stacked = np.stack([part.codes for part in parts], axis=1)
        known, codes = np.unique(stacked, axis=0, return_inverse=True)
        values = [tuple(part.values[c] for part, c in zip(parts, row, strict=True)) for row in known.tolist()]
        return codes.reshape(-1), values


def _record(text: str) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def place_in(codes: np.ndarray) -> np.ndarray:
    """How many of the same code come before each: 0 for the first. The rows come in order of preference."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(codes) else np.zeros(0, int)
    place = np.empty(len(codes), np.int64)
    place[order] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.r_[starts, len(codes)]))
    return place


def over_cap(cap: Cap, attributes: Attributes, rows: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Which of `rows` (best first) a cap leaves out: (rows, reason) for each combination. A row that lacks one of the attributes is of none."""
    codes, values = attributes.combined(cap.attributes)
    codes = codes[rows]
    whole = np.array([all(value) for value in values], bool)
    counts = np.where(whole, np.bincount(codes, minlength=len(values)), 0)
    present = counts[counts > 0]
    most = cap.most if cap.most is not None else math.ceil((cap.most_times or 1) * int(present.min(initial=1 << 60)))
    out = place_in(codes) >= most
    return [
        (rows[out & (codes == code)], f"over the cap: {', '.join(values[code])}")
        for code in np.flatnonzero(counts > most).tolist()
    ]


def audit(attributes: Attributes, kept: np.ndarray) -> dict[str, Any]:
    """For each attribute: its values with how many were planned and kept, most planned first, and how even each is.

    Evenness is the entropy of the shares over that of equal shares: 1 when every value comes up equally often.
    """
    found: dict[str, Any] = {}
    for name in ["group", *attributes.names]:
        texts = attributes.of(name)
        before = np.bincount(texts.codes, minlength=len(texts.values))
        after = np.bincount(texts.codes[kept], minlength=len(texts.values))
        there = [i for i, value in enumerate(texts.values) if value and before[i]]
        there.sort(key=lambda i: (-before[i], texts.values[i]))
        if there:
            found[name] = {
                "values": {texts.values[i]: [int(before[i]), int(after[i])] for i in there[:_MOST_VALUES]},
                "distinct": len(there),
                "evenness_planned": _evenness(before[there]),
                "evenness_kept": _evenness(after[there]),
            }
    return found


def _evenness(counts: np.ndarray) -> float | None:
    shares = counts[counts > 0] / max(1, counts.sum())
    if len(counts) < 2 or not len(shares):
        return None
    # Of one value it is -0.0, which + 0.0 mends.
    return round(float(-(shares * np.log(shares)).sum() / np.log(len(counts))), 4) + 0.0


def lacking(wanted: Sequence[Wanted], attributes: Attributes, kept: np.ndarray) -> list[dict[str, Any]]:
    """What lacks, the refill list: a row a combination with its group, its attributes, how many samples lack and how many to plan.

    Every combination of values that the group's own samples show is looked at, planned or not. `plan` reckons with the share of the
    combination's planned samples that was kept, or the group's where none was planned.
    """
    found: list[dict[str, Any]] = []
    for rule in wanted:
        codes, values = attributes.combined(["group", *(name for name in rule.attributes if name != "group")])
        planned = dict(zip(values, np.bincount(codes, minlength=len(values)).tolist(), strict=True))
        have = dict(zip(values, np.bincount(codes[kept], minlength=len(values)).tolist(), strict=True))
        found += lacks(rule, planned, have)[0]
    return found


def lacks(
    rule: Wanted, planned: Mapping[tuple[str, ...], int], have: Mapping[tuple[str, ...], int]
) -> tuple[list[dict[str, Any]], int]:
    """(what lacks by one rule, how many combinations were looked at). Keys are the group and the values of the rule's other attributes.

    Raises RecipeError for more combinations than anybody can mean.
    """
    names = [name for name in rule.attributes if name != "group"]
    found: list[dict[str, Any]] = []
    count = 0
    for group in sorted({value[0] for value in planned}):
        own = [value for value in planned if value[0] == group and all(value)]
        choices = [sorted({value[i] for value in own}) for i in range(1, len(names) + 1)]
        if math.prod(map(len, choices)) > _MOST_COMBINATIONS:
            raise RecipeError(
                f"{', '.join(rule.attributes)} have over {_MOST_COMBINATIONS:,} combinations in group {group}",
                where="factory.select.wanted",
                remedy="Name fewer attributes together",
            )
        share = sum(have.get(v, 0) for v in own) / max(1, sum(planned[v] for v in own))
        for rest in itertools.product(*choices) if own else ():
            value, count = (group, *rest), count + 1
            lacking = rule.least - have.get(value, 0)
            if lacking > 0:
                own_yield = have.get(value, 0) / planned[value] if planned.get(value) else share
                found.append(
                    {
                        "group": group,
                        "attributes": dict(zip(names, rest, strict=True)),
                        "lacking": lacking,
                        "plan": math.ceil(lacking / max(own_yield, _LOWEST_YIELD)),
                    }
                )
    return found, count


def vendi_score(embeddings: np.ndarray) -> float:
    """The effective number of different pictures among n unit embeddings, n x D: 1 if all are alike, n if none has anything in
    common with another (at most D). Source: Friedman and Dieng, arXiv 2210.02410, with the cosine as kernel."""
    rows = embeddings.astype(np.float64)
    square = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    shares = np.linalg.eigvalsh(square / len(rows))
    shares = shares[shares > 1e-12]
    return round(float(np.exp(-(shares * np.log(shares)).sum())), 2)


def diversity(columns: Columns, kept: np.ndarray) -> dict[str, Any]:
    """Vendi score of as many pictures made as kept (at most 2,048 each, those with the smallest ids), so that they compare."""
    embeddings = columns.embeddings()
    made = columns.made >= 0
    count = min(VENDI_ROWS, int(kept.sum()), int(made.sum()))
    if embeddings is None or count == 0:
        return {"vendi_made": None, "vendi_kept": None, "pictures": 0}
    scores: list[float] = []
    for mask in (made, kept):
        rows = np.flatnonzero(mask)
        first = rows[np.argpartition(columns.ids[rows], count - 1)[:count]] if count < len(rows) else rows
        scores.append(vendi_score(embeddings.read(np.sort(first))))
    return {"vendi_made": scores[0], "vendi_kept": scores[1], "pictures": count}
