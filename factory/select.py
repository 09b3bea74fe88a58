"""What is kept: a pure function of the ledger, the rules and what people decided. Scores are never computed again, so rules can
change for free."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import publish_bytes
from factory.decisions import KEEP, REJECT, Decision
from factory.ledger import MADE
from factory.plan import table_bytes
from factory.recipe import SelectRecipe

SELECTION = "selection.parquet"
KEPT, REJECTED, DEAD = "kept", "rejected", "dead"
_SCHEMA = pa.schema([("id", pa.string()), ("outcome", pa.string()), ("reason", pa.string())])
_LARGE = 1 << 30
"""Stands for the size of a drawn picture: it is what the recipe asked for."""
_BITS = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


def select(
    entries: list[dict[str, Any]],
    pictures: dict[str, str],
    recipe: SelectRecipe,
    decisions: Mapping[str, Decision] | None = None,
) -> list[dict[str, str]]:
    """(id, outcome, reason) for every ledger row. `pictures` maps made ids to the SHA-256 of their picture file.

    The keeper among duplicates is the one with the best CLIP score, then the smallest id: no order of arrival plays a part. A
    person's reject always counts; a person's keep lifts every threshold and near duplicates, but revives no dead row and keeps the
    very same file only once (it then chooses which).
    """
    verdict: dict[str, tuple[str, str]] = {}
    candidates: list[dict[str, Any]] = []
    fixed = decisions or {}
    spoken = {key: d for key, d in fixed.items() if d.verdict is not None}
    wanted = {key for key, d in spoken.items() if d.verdict == KEEP}
    for row in entries:
        key = row["id"]
        if row["outcome"] == DEAD or (row["outcome"] != MADE and key not in pictures):
            verdict[key] = (row["outcome"], row["reason"] or "")
        elif key in spoken and spoken[key].verdict == REJECT:
            verdict[key] = (REJECTED, f"human: {spoken[key].reason}")
        elif not row.get("prompt", "-") and not (key in fixed and fixed[key].caption):
            verdict[key] = (REJECTED, "no caption")  # there is nothing to pack beside the picture, whoever wants it
        elif key in wanted:
            candidates.append(row)
        elif row["outcome"] != MADE:
            verdict[key] = (row["outcome"], row["reason"] or "")
        elif min(row.get("width_px") or _LARGE, row.get("height_px") or _LARGE) < recipe.min_size_px:
            verdict[key] = (REJECTED, "too small")
        elif row["clip_score"] < recipe.min_clip:
            verdict[key] = (REJECTED, "clip below threshold")
        else:
            candidates.append(row)
    candidates.sort(key=lambda r: (-r["clip_score"], r["id"]))
    keeper: dict[str, str] = {}
    for row in sorted(candidates, key=lambda r: r["id"] not in wanted):
        keeper.setdefault(pictures[row["id"]], row["id"])
    kept_hash = np.zeros((len(candidates), 8), np.uint8)
    kept_colours = np.zeros((len(candidates), 12), np.float32)
    count = 0
    for row in candidates:
        own = np.frombuffer(bytes.fromhex(row["phash"]), np.uint8)
        colours = np.frombuffer(row["colours"], np.uint8).astype(np.float32)
        near = _BITS[kept_hash[:count] ^ own].sum(axis=1) <= recipe.max_hamming_bits
        alike = np.abs(kept_colours[:count] - colours).max(axis=1) <= recipe.max_colour_difference
        if keeper[pictures[row["id"]]] != row["id"]:
            verdict[row["id"]] = (REJECTED, "exact duplicate")
        elif row["id"] not in wanted and bool((near & alike).any()):
            verdict[row["id"]] = (REJECTED, "near duplicate")
        else:
            verdict[row["id"]] = (KEPT, "")
            kept_hash[count], kept_colours[count] = own, colours
            count += 1
    return [{"id": row["id"], "outcome": verdict[row["id"]][0], "reason": verdict[row["id"]][1]} for row in entries]


def write_selection(folder: Path, selection: list[dict[str, str]]) -> None:
    publish_bytes(folder / SELECTION, table_bytes(pa.Table.from_pylist(selection, schema=_SCHEMA)))


def funnel(selection: list[dict[str, str]]) -> dict[str, Any]:
    """Counts that must add up: planned = kept + rejected + dead; and rejected and dead by reason."""
    outcomes = Counter(row["outcome"] for row in selection)
    reasons = Counter((row["outcome"], row["reason"].split(":")[0]) for row in selection if row["outcome"] != KEPT)
    return {
        "planned": len(selection),
        "kept": outcomes[KEPT],
        "rejected": outcomes[REJECTED],
        "dead": outcomes[DEAD],
        "reasons": {f"{outcome}: {reason}": n for (outcome, reason), n in sorted(reasons.items())},
    }


def digest_picture(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
