"""The factory's three steps after the plan, in order: make, select, pack. Each can be killed and run again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.runner import Runner
from cluster.storage import sweep_partials
from factory.ledger import is_committed, planned_units, read_entries, read_pictures
from factory.pack import MANIFEST, Sample, pack
from factory.plan import Progress
from factory.recipe import FactoryRecipe
from factory.select import KEPT, digest_picture, funnel, select, write_selection
from factory.stages import make_stages

NOTES = "attempts"
"""Folder of the data set that holds what workers are about to try (cluster/quarantine.py); gone when all are through."""


def make(recipe: FactoryRecipe, folder: Path, runner: Runner, progress: Progress = lambda n: None) -> int:
    """Make every planned unit that the ledger lacks; returns how many were made now."""
    sweep_partials(folder)
    todo = [unit for unit in planned_units(folder, recipe.make.unit_images) if not is_committed(folder, unit.id)]
    for unit in runner.run(make_stages(recipe.make, folder), todo, notes=folder / NOTES):
        progress(len(unit.rows))
    return len(todo)


def select_and_pack(recipe: FactoryRecipe, folder: Path) -> dict[str, Any]:
    """Apply the rules to the ledger and pack what is kept; returns the funnel. The manifest is written last."""
    entries = read_entries(folder, planned_units(folder, recipe.make.unit_images))
    digests = {key: digest_picture(data) for key, data in read_pictures(folder, entries)}
    selection = select(entries, digests, recipe.select)
    write_selection(folder, selection)
    kept = {row["id"] for row in selection if row["outcome"] == KEPT}
    pack(_samples(recipe, folder, entries, kept), folder, recipe.pack.samples_per_shard)
    return funnel(selection)


def is_packed(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def _samples(recipe: FactoryRecipe, folder: Path, entries: list[dict[str, Any]], kept: set[str]) -> Iterator[Sample]:
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
            yield Sample(key, data, recipe.make.picture_kind, row["prompt"], facts)
