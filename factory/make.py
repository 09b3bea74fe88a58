"""The factory's three steps after the plan, in order: make, select, pack. Each can be killed and run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.runner import Runner
from cluster.storage import sweep_partials
from factory.decisions import Decision, digest_decisions, read_decisions
from factory.ledger import planned_units, read_entries, read_pictures, read_units, units_left
from factory.pack import Sample, pack, packed_decisions
from factory.plan import Progress
from factory.recipe import FactoryRecipe
from factory.select import KEPT, digest_picture, funnel, select, write_selection
from factory.stages import make_stages

NOTES = "attempts"
"""Folder of the data set that holds what workers are about to try (cluster/quarantine.py); gone when all are through."""


def make(recipe: FactoryRecipe, folder: Path, runner: Runner, progress: Progress = lambda n: None) -> int:
    """Make every planned unit that the ledger lacks; returns how many were made now."""
    sweep_partials(folder)
    todo = units_left(folder, recipe.make.unit_images)
    units = read_units(folder, recipe.make.unit_images, todo)
    for unit in runner.run(make_stages(recipe.make, folder), units, notes=folder / NOTES):
        progress(len(unit.rows))
    return len(todo)


def select_and_pack(recipe: FactoryRecipe, folder: Path) -> dict[str, Any]:
    """Apply the rules and what people decided to the ledger and pack what is kept; returns the funnel. The manifest is written last."""
    decisions = read_decisions(folder)
    entries = read_entries(folder, planned_units(folder, recipe.make.unit_images))
    digests = {key: digest_picture(data) for key, data in read_pictures(folder, entries)}
    selection = select(entries, digests, recipe.select, decisions)
    write_selection(folder, selection)
    kept = {row["id"] for row in selection if row["outcome"] == KEPT}
    samples = _samples(recipe, folder, entries, kept, decisions)
    pack(samples, folder, recipe.pack.samples_per_shard, digest_decisions(decisions))
    return funnel(selection)


def is_packed(folder: Path) -> bool:
    """The shards are there and hold every decision that people took so far. Raises CorruptShard if the decisions cannot be read."""
    return packed_decisions(folder) == digest_decisions(read_decisions(folder))


def _samples(
    recipe: FactoryRecipe,
    folder: Path,
    entries: list[dict[str, Any]],
    kept: set[str],
    decisions: Mapping[str, Decision],
) -> Iterator[Sample]:
    by_id = {row["id"]: row for row in entries}
    for key, data in read_pictures(folder, entries):
        if key in kept:
            row = by_id[key]
            facts = {
                "attributes": json.loads(row["attributes"]),
                "clip_score": row["clip_score"],
                "group": row["group"],
            }
            if recipe.make.teacher is not None:
                facts |= {"seed": row["seed"], "teacher": recipe.make.teacher.model}
            else:
                place = json.loads(row["source"])
                facts |= {
                    name: row[name] for name in ("raw_caption", "raw_clip_score", "crop", "width_px", "height_px")
                }
                facts["source"] = f"{Path(place['file']).name}#{place['at']}"
            caption = decisions[key].caption if key in decisions else None
            if caption is not None:
                facts["original_prompt"] = row["prompt"]
            yield Sample(key, data, recipe.make.picture_kind, caption or row["prompt"], facts)
