"""What is kept: a pure function of the ledger, the rules and what people decided. No score is computed again and no picture is read,
so rules can change for free.

Legend: N rows of the ledger, in the order of the plan.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.errors import RecipeError
from cluster.storage import publish_bytes
from factory.balance import Attributes, audit, diversity, lacking, over_cap, place_in
from factory.decisions import KEEP, REJECT, Decision
from factory.dedup import Meanings, keep_first, same_drawing
from factory.index import Columns, Texts
from factory.ledger import MADE
from factory.plan import table_bytes
from factory.recipe import ScoreRule, SelectRecipe

pc: Any = pyarrow.compute  # its functions are made at run time, where no type checker sees them
SELECTION, SUMMARY, REFILL = "selection.parquet", "selection.json", "refill.jsonl"
KEPT, REJECTED, DEAD = "kept", "rejected", "dead"
_SCHEMA = pa.schema([("id", pa.string()), ("outcome", pa.string()), ("reason", pa.string()), ("cluster", pa.string())])


@dataclass(frozen=True)
class Selection:
    """The verdict on every row."""

    ids: np.ndarray
    outcome: Texts
    reason: Texts
    stands_for: np.ndarray
    """N row numbers: the sample that stands for this one among its duplicates, the row itself if it does; -1 if it has none."""

    @property
    def kept(self) -> np.ndarray:
        """N bools."""
        return self.outcome.codes == self.outcome.values.index(KEPT)

    def funnel(self) -> dict[str, Any]:
        """Counts that must add up: planned = kept + rejected + dead; and rejected and dead by reason."""
        pairs, counts = np.unique(np.stack([self.outcome.codes, self.reason.codes]), axis=1, return_counts=True)
        outcomes: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for (outcome, reason), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            name = self.outcome.values[outcome]
            outcomes[name] += count
            if name != KEPT:
                reasons[f"{name}: {self.reason.values[reason].split(':')[0]}"] += count
        return {
            "planned": len(self.ids),
            "kept": outcomes[KEPT],
            "rejected": outcomes[REJECTED],
            "dead": outcomes[DEAD],
            "reasons": dict(sorted(reasons.items())),
        }

    def table(self) -> pa.Table:
        """A row a ledger row: id, outcome, reason, and the id that stands for its cluster (empty if it has no duplicates)."""
        known = np.append(self.ids, b"")[self.stands_for]
        columns = [self.ids.astype(str), self.outcome.to_arrow(), self.reason.to_arrow(), known.astype(str)]
        arrays = [pa.array(c, pa.string()) if isinstance(c, np.ndarray) else c.cast(pa.string()) for c in columns]
        return pa.Table.from_arrays(arrays, schema=_SCHEMA)


class _Verdicts:
    """Verdicts as they come: a row that fell is never judged again."""

    def __init__(self, columns: Columns) -> None:
        self.outcome = np.zeros(len(columns), np.int32)
        self.reason = np.zeros(len(columns), np.int32)
        self.outcomes = {KEPT: 0, REJECTED: 1, DEAD: 2}
        self.reasons = {"": 0}
        self.open = np.ones(len(columns), bool)

    def reject(self, rows: np.ndarray, reason: str) -> None:
        """`rows`: N bools or row numbers; those that fell before stay as they are."""
        fresh = rows if rows.dtype == bool else np.zeros(len(self.open), bool)
        if fresh is not rows:
            fresh[rows] = True
        fresh = fresh & self.open
        self.outcome[fresh] = self.outcomes[REJECTED]
        self.reason[fresh] = self.reasons.setdefault(reason, len(self.reasons))
        self.open &= ~fresh

    def as_made(self, rows: np.ndarray, columns: Columns) -> None:
        """Take over what `make` said of these rows (N bools)."""
        rows = rows & self.open
        for own, known, found in (
            (self.outcome, self.outcomes, columns.outcome),
            (self.reason, self.reasons, columns.reason),
        ):
            there = np.unique(found.codes[rows])
            code = np.zeros(len(found.values), np.int32)
            code[there] = [known.setdefault(found.values[c], len(known)) for c in there.tolist()]
            own[rows] = code[found.codes[rows]]
        self.open &= ~rows


def select(columns: Columns, recipe: SelectRecipe, decisions: Mapping[str, Decision] | None = None) -> Selection:
    """The verdict on every ledger row.

    The keeper among duplicates is the one with the best score (`rank_by`), then the smallest id: no order of arrival plays a part. A
    person's reject always counts; a person's keep lifts every rule and near duplicates, but revives no dead row and keeps the very
    same file only once (it then chooses which). Raises RecipeError for a score or attribute that the ledger does not have.
    """
    decisions = {} if recipe.people == "ignore" else decisions or {}
    columns = columns.by_raw_texts() if recipe.text == "raw" else columns
    verdicts, wanted = _Verdicts(columns), np.zeros(len(columns), bool)
    spoken = _find(columns, decisions)
    alive = columns.made >= 0
    made = columns.outcome.codes == _code(columns.outcome, MADE)
    verdicts.as_made((columns.outcome.codes == _code(columns.outcome, DEAD)) | (~made & ~alive), columns)
    refused: dict[str, list[int]] = {}
    for row, decision in spoken:
        if decision.verdict == REJECT:
            refused.setdefault(f"human: {decision.reason}", []).append(row)
    for reason, rows in refused.items():
        verdicts.reject(np.array(rows), reason)
    mute = ~columns.has_text  # there is nothing to pack beside the picture, whoever wants it
    mute[[row for row, decision in spoken if decision.caption]] = False
    verdicts.reject(mute, "no caption")
    wanted[[row for row, decision in spoken if decision.verdict == KEEP]] = True
    wanted &= verdicts.open
    verdicts.as_made(~made & ~wanted, columns)
    if recipe.people == "only":
        verdicts.reject(~wanted, "not kept by a person")
    attributes = Attributes(columns)
    _apply_scores(columns, recipe, verdicts, wanted, attributes)
    order = _best_first(columns, recipe.rank_by)
    stands_for = _apply_duplicates(columns, recipe, verdicts, wanted, order)
    for cap in recipe.caps:
        for some, reason in over_cap(cap, attributes, _wanted_first(order, verdicts.open, wanted)):
            verdicts.reject(some[~wanted[some]], reason)
    if recipe.best is not None:
        beyond = _wanted_first(order, verdicts.open, wanted)[recipe.best :]
        verdicts.reject(beyond[~wanted[beyond]], f"not among the best {recipe.best}")
    return Selection(
        columns.ids,
        Texts(verdicts.outcome, list(verdicts.outcomes)),
        Texts(verdicts.reason, list(verdicts.reasons)),
        stands_for,
    )


def _apply_scores(
    columns: Columns, recipe: SelectRecipe, verdicts: _Verdicts, wanted: np.ndarray, attributes: Attributes
) -> None:
    verdicts.reject((columns.edge_px < recipe.min_size_px) & ~wanted, "too small")
    if "clip_score" in columns.scores:
        verdicts.reject((columns.scores["clip_score"] < recipe.min_clip) & ~wanted, "clip below threshold")
    for name, rule in recipe.scores.items():
        values = _score(columns, name)
        verdicts.reject(np.isnan(values) & ~wanted, f"{name} is missing")
        if rule.least is not None:
            verdicts.reject((values < rule.least) & ~wanted, f"{name} below threshold")
        if rule.most is not None:
            verdicts.reject((values > rule.most) & ~wanted, f"{name} above threshold")
    judged = verdicts.open & ~wanted
    for name, rule in recipe.scores.items():
        if rule.best_share is not None:
            worst = "highest" if name in columns.lower_is_better else "lowest"
            verdicts.reject(_worst(columns, name, rule, judged, attributes), f"{name} among the {worst}")


def _worst(columns: Columns, name: str, rule: ScoreRule, judged: np.ndarray, attributes: Attributes) -> np.ndarray:
    """The `judged` rows outside of the best share of their combination."""
    rows = _best_first(columns, name)
    rows = rows[judged[rows]]
    codes = attributes.combined(rule.within)[0][rows] if rule.within else np.zeros(len(rows), np.int64)
    counts = np.bincount(codes)
    stay = np.ceil(np.round(counts * (rule.best_share or 1.0), 6))
    return rows[place_in(codes) >= stay[codes]]


def _apply_duplicates(
    columns: Columns, recipe: SelectRecipe, verdicts: _Verdicts, wanted: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Exact, then perceptual, then semantic, each unless its key is null; returns what `Selection.stands_for` holds."""
    parent = np.full(len(columns), -1, np.int64)
    if recipe.same_file:
        rows = _wanted_first(order, verdicts.open, wanted)
        _, first, which = np.unique(columns.made[rows], return_index=True, return_inverse=True)
        keeper = rows[first][which.reshape(-1)]
        parent[rows[keeper != rows]] = keeper[keeper != rows]
        verdicts.reject(rows[keeper != rows], "exact duplicate")

    if recipe.max_hamming_bits is not None:
        rows = order[verdicts.open[order]]
        near = same_drawing(
            columns.hashes[rows],
            columns.colours[rows],
            wanted[rows],
            recipe.max_hamming_bits,
            recipe.max_colour_difference,
        )
        parent[rows[near >= 0]] = rows[near[near >= 0]]
        verdicts.reject(rows[near >= 0], "near duplicate")

    if recipe.same_meaning is not None:
        rows = order[verdicts.open[order]]
        embeddings = columns.embeddings()
        if embeddings is None:
            raise RecipeError(
                "the ledger holds no embeddings", where="factory.select.same_meaning", remedy="Leave the key out"
            )
        near = keep_first(Meanings(lambda r: embeddings.read(rows[r]), len(rows), recipe.same_meaning), wanted[rows])
        parent[rows[near >= 0]] = rows[near[near >= 0]]
        verdicts.reject(rows[near >= 0], "semantic duplicate")

    below = np.flatnonzero(parent >= 0)
    root = parent[below]
    while (parent[root] >= 0).any():  # three levels at most
        root = np.where(parent[root] >= 0, parent[root], root)
    stands_for = np.full(len(columns), -1, np.int64)
    stands_for[root] = root
    stands_for[below] = root
    return stands_for


def _best_first(columns: Columns, name: str) -> np.ndarray:
    """All row numbers, the best score first, then by id; rows without the score come last."""
    values = _score(columns, name)
    values = values if name in columns.lower_is_better else -values
    return columns.by_id[np.argsort(values[columns.by_id], kind="stable")]


def _wanted_first(order: np.ndarray, open_rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    rows = order[open_rows[order]]
    return np.concatenate([rows[wanted[rows]], rows[~wanted[rows]]])


def _score(columns: Columns, name: str) -> np.ndarray:
    if name not in columns.scores:
        raise RecipeError(
            f"the ledger holds no score {name}",
            where="factory.select",
            remedy=f"There are: {', '.join(sorted(columns.scores))}",
        )
    return columns.scores[name]


def _find(columns: Columns, decisions: Mapping[str, Decision]) -> list[tuple[int, Decision]]:
    """(row number, decision) of every id that the ledger has."""
    if not decisions or not len(columns):
        return []
    asked = np.array([key.encode() for key in decisions])
    places = np.searchsorted(columns.ids, asked, sorter=columns.by_id)
    rows = columns.by_id[np.minimum(places, len(columns) - 1)]
    there = columns.ids[rows] == asked
    pairs = zip(rows.tolist(), decisions.values(), there.tolist(), strict=True)
    return [(row, decision) for row, decision, found in pairs if found]


def _code(texts: Texts, value: str) -> int:
    return texts.values.index(value) if value in texts.values else -1


def summarise(columns: Columns, selection: Selection, recipe: SelectRecipe) -> dict[str, Any]:
    """The selection in numbers: rules, funnel, clusters, balance before and after, what lacks, diversity."""
    attributes, kept = Attributes(columns), selection.kept
    sizes = np.bincount(selection.stands_for[selection.stands_for >= 0], minlength=len(kept))
    return {
        "rules": recipe.model_dump(mode="json"),
        "funnel": selection.funnel(),
        "clusters": {
            "count": int((sizes > 0).sum()),
            "largest": int(sizes.max(initial=0)),
        },
        "balance": audit(attributes, kept),
        "lacking": lacking(recipe.wanted, attributes, kept),
        "diversity": diversity(columns, kept),
    }


def is_selected_as(folder: Path, selection: Selection, rules: SelectRecipe, decisions_sha256: str) -> bool | None:
    """What was selected in `folder` keeps the same rows with the same words; None if nothing that can be read says."""
    try:
        table = pq.read_table(folder / SELECTION, columns=["id", "outcome"])
        said = json.loads((folder / SUMMARY).read_text())["decisions_sha256"]
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError):
        return None
    kept = table.filter(pc.equal(table["outcome"], KEPT))["id"].to_pylist()
    same = said == decisions_sha256 and set(kept) == set(selection.ids[selection.kept].astype(str))
    return same and selected_contents(folder) in (None, (rules.text, rules.crop))


def selected_contents(folder: Path) -> tuple[str, str] | None:
    """By which words and which crop the selection in `folder` judges and packs; None if nothing that can be read says."""
    try:
        rules = json.loads((folder / SUMMARY).read_text())["rules"]
        return rules["text"], rules.get("crop", "made")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_selection(folder: Path, selection: Selection, summary: Mapping[str, Any]) -> None:
    """selection.parquet, selection.json and, if the recipe wants combinations that lack, refill.jsonl; else none is left there."""
    publish_bytes(folder / SELECTION, table_bytes(selection.table()))
    publish_bytes(folder / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    if summary["lacking"]:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in summary["lacking"])
        publish_bytes(folder / REFILL, "".join(lines).encode())
    else:
        (folder / REFILL).unlink(missing_ok=True)
