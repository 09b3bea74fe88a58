"""Counts of what a run has made so far: outcomes, reasons, and what the rules that judge a row by itself would keep.

Select judges all rows at the end; thresholds can be told as rows come, and that is what a forecast on the way needs. Duplicates, best
shares, caps and people wait for select.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorruptShard
from cluster.stage import DEAD, PENDING, Row
from cluster.status import reason_kind
from factory.ledger import ENTRY, MADE
from factory.recipe import SelectRecipe
from factory.teachers import TEACHER
from factory.units import read_table

ROW_RULES = ("text", "min_clip", "min_size_px", "scores")
"""Keys of select that judge a row by itself; of `scores` only `least` and `most`."""
_ASIDE = ("crop", "rank_by", "wanted", "best")
"""Keys that reject nothing by themselves, or that the forecast names on its own."""
_UNSEEN = {"embedding", "phash", "colours", "source", "crop", "made_sha256", "pictures_sha256", "seed"}
"""Columns of the ledger that no count looks at."""
_REASONS = 200
_VERSION = 1

Key = tuple[str, ...]


def verdict(row: Mapping[str, Any], rules: SelectRecipe) -> str:
    """Why the rules of a row by itself reject a row of the ledger, in select's words; empty if they keep it."""
    if row["outcome"] == DEAD:
        return row["reason"] or DEAD
    if rules.text == "raw":
        row = {**row, "prompt": row.get("raw_caption"), "clip_score": row.get("raw_clip_score")}
    if not row.get("prompt"):
        return "no caption"
    if row["outcome"] not in (PENDING, MADE):
        return row["reason"] or row["outcome"]
    edges = [row.get(name) for name in ("width_px", "height_px")]
    if min((edge for edge in edges if edge), default=math.inf) < rules.min_size_px:
        return "too small"
    clip = row.get("clip_score")
    if clip is not None and clip < rules.min_clip:
        return "clip below threshold"
    for name, rule in rules.scores.items():
        value = row.get(name)
        if value is None or math.isnan(value):
            return f"{name} is missing"
        if rule.least is not None and value < rule.least:
            return f"{name} below threshold"
        if rule.most is not None and value > rule.most:
            return f"{name} above threshold"
    return ""


def later_rules(rules: SelectRecipe) -> list[str]:
    """What else select will take away by these rules, in words."""
    found = ["duplicates"] if rules.same_file or rules.max_hamming_bits is not None else []
    found += [f"the best share of {name}" for name, rule in rules.scores.items() if rule.best_share is not None]
    known = {*ROW_RULES, *_ASIDE, "same_file", "max_hamming_bits", "max_colour_difference"}
    usual = SelectRecipe()
    for name in SelectRecipe.model_fields:
        # To ignore what people decided takes nothing away.
        if name not in known and getattr(rules, name) not in (getattr(usual, name), "ignore"):
            found.append("semantic duplicates" if name == "same_meaning" else f"the rule {name}")
    return found


@dataclass(frozen=True)
class Strata:
    """What samples are told apart by in a forecast, since they are made one kind after another: the plan file, and the teacher of several."""

    first_units: tuple[int, ...] = (0,)
    """Number of the first unit of each plan file."""
    teachers: bool = False

    @property
    def one(self) -> bool:
        """There is nothing to tell apart."""
        return len(self.first_units) == 1 and not self.teachers

    def key(self, file: int, attributes: str) -> Key:
        """The stratum of a row of a plan file with these attributes (JSON)."""
        return combination(str(file), attributes, [TEACHER] if self.teachers else [])

    def file_of(self, unit: int) -> int:
        """Number of the plan file of a unit."""
        return bisect.bisect_right(self.first_units, unit) - 1


class Tally:
    """Counts over the units that were looked at, each once, whatever order they come in."""

    def __init__(self, rules: SelectRecipe, strata: Strata | None = None) -> None:
        self.rules, self.strata = rules, strata or Strata()
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.fallen: Counter[str] = Counter()
        """By the rules of a row by itself: reason to count."""
        self.kept = 0
        self.combinations: list[dict[Key, list[int]]] = [{} for _ in rules.wanted]
        """For each rule of `wanted`: (group, values ...) to [rows looked at, rows that stay]."""
        self.by_stratum: dict[Key, list[int]] = {}
        """The same of each stratum."""
        self._upto = 0
        self._more: set[int] = set()

    @property
    def rows(self) -> int:
        return self.outcomes.total()

    def covers(self, number: int) -> bool:
        """The unit of this number was looked at."""
        return number < self._upto or number in self._more

    def add(self, number: int, rows: Iterable[Row]) -> None:
        """The ledger's rows of a unit; one that was looked at before counts once."""
        if self.covers(number):
            return
        file = self.strata.file_of(number)
        for row in rows:
            alive = row["outcome"] in (PENDING, MADE)
            outcome = MADE if alive else row["outcome"]
            self.outcomes[outcome] += 1
            if row["reason"]:
                self._count_reason(f"{outcome}: {reason_kind(row['reason'])}")
            wrong = verdict(row, self.rules)
            self.kept += not wrong
            stratum = self.by_stratum.setdefault(self.strata.key(file, row.get("attributes") or ""), [0, 0])
            stratum[0] += 1
            stratum[1] += not wrong
            if wrong and alive:
                self.fallen[wrong] += 1
            for rule, found in zip(self.rules.wanted, self.combinations, strict=True):
                counts = found.setdefault(combination(row["group"], row["attributes"], rule.attributes), [0, 0])
                counts[0] += 1
                counts[1] += not wrong
        self._more.add(number)
        while self._upto in self._more:
            self._more.remove(self._upto)
            self._upto += 1

    def _count_reason(self, reason: str) -> None:
        known = reason in self.reasons or len(self.reasons) < _REASONS
        self.reasons[reason if known else "other reasons"] += 1

    def facts(self) -> dict[str, Any]:
        """As it is written; plain JSON."""
        return {
            "version": _VERSION,
            "rules_sha256": rules_mark(self.rules),
            "upto": self._upto,
            "more": sorted(self._more),
            "rows": self.rows,
            "outcomes": dict(self.outcomes),
            "reasons": dict(self.reasons.most_common()),
            "fallen": dict(self.fallen.most_common()),
            "kept": self.kept,
            "combinations": [[[list(key), *counts] for key, counts in found.items()] for found in self.combinations],
            "strata": [[list(key), *counts] for key, counts in self.by_stratum.items()],
        }

    @classmethod
    def read(
        cls, facts: Mapping[str, Any], rules: SelectRecipe, ledger: set[int], strata: Strata | None = None
    ) -> Tally:
        """What an earlier run counted, if it was by the same rules and of units that the ledger still has; else nothing."""
        fresh = cls(rules, strata)
        try:
            upto, more = int(facts["upto"]), {int(number) for number in facts["more"]}
            if facts["version"] != _VERSION or facts["rules_sha256"] != rules_mark(rules):
                return fresh
            if not more <= ledger or any(number not in ledger for number in range(upto)):
                return fresh
            found = cls(rules, strata)
            found.outcomes.update({str(k): int(v) for k, v in facts["outcomes"].items()})
            found.reasons.update({str(k): int(v) for k, v in facts["reasons"].items()})
            found.fallen.update({str(k): int(v) for k, v in facts["fallen"].items()})
            found.kept, found._upto, found._more = int(facts["kept"]), upto, more
            found.combinations = [
                {tuple(map(str, key)): [int(seen), int(kept)] for key, seen, kept in rows}
                for rows in facts["combinations"]
            ]
            # An earlier version did not tell strata apart; where there is but one, its counts are those of all.
            rows = facts["strata"] if "strata" in facts or not found.strata.one else [[["0"], found.rows, found.kept]]
            found.by_stratum = {tuple(map(str, key)): [int(seen), int(kept)] for key, seen, kept in rows}
            return found if len(found.combinations) == len(rules.wanted) else fresh
        except (KeyError, TypeError, ValueError, AttributeError):
            return fresh


def seen_of(row: Row, scores: Iterable[str]) -> Row:
    """What counts look at of a row that was committed; `scores` are the ledger's columns beyond its usual ones."""
    return {name: row.get(name) for name in (*ENTRY.names, *scores) if name not in _UNSEEN}


def read_outcomes(path: Path) -> list[Row]:
    """The same of a ledger entry. Raises CorruptShard."""
    try:
        names = [name for name in pq.read_schema(path).names if name not in _UNSEEN]
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=str(path)) from error
    return read_table(path, names).to_pylist()


def combination(group: str, attributes: str, names: Sequence[str]) -> Key:
    """(group, values of these attributes ...) of a row; an empty value where it has none."""
    try:
        record = json.loads(attributes or "{}")
    except ValueError:
        record = {}
    record = record if isinstance(record, dict) else {}
    return (group or "", *(str(record.get(name, "")) for name in names if name != "group"))


def rules_mark(rules: SelectRecipe) -> str:
    """SHA-256 of the rules."""
    return hashlib.sha256(json.dumps(rules.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
