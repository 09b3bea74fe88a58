"""The factory's three steps after the plan, in order: make, select, pack. Each can be killed and run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import LedgerConflict, StageError
from cluster.runner import Runner
from cluster.stage import DEAD, Unit
from cluster.storage import sweep_partials
from factory.budget import forget_set_aside
from factory.dead import all_through, write_letters
from factory.decisions import Decision, digest_decisions, read_decisions
from factory.index import Columns, load_columns
from factory.ingest import fetch
from factory.ledger import further_scores, read_entry, read_pictures
from factory.live import Show, following
from factory.pack import MANIFEST, Sample, is_packed_as, pack, packed_decisions
from factory.pixels import open_crops
from factory.plan import Progress
from factory.recipe import CropRecipe, FactoryRecipe, SelectRecipe
from factory.retry import built_on
from factory.same_models import refuse_other_models
from factory.select import Selection, is_selected_as, select, selected_contents, summarise, write_selection
from factory.stages import CAPTIONS, CROPS, encode_picture, make_stages
from factory.teachers import teacher_of
from factory.units import plan_units, read_units, units_left

_TRAINED_ON = "training/data.json"
"""Below the output folder: which data sets a training reads."""
NOTES = "attempts"
"""Folder of the data set that holds what workers are about to try (cluster/quarantine.py); gone when all are through."""


def make(
    recipe: FactoryRecipe,
    folder: Path,
    runner: Runner,
    progress: Progress = lambda n: None,
    show: Show = lambda told: None,
) -> int:
    """Make every planned unit that the ledger lacks; returns how many were made now. `show` is given lines that say how it goes.

    Raises LedgerConflict if a model has other files than when the data set was begun."""
    sweep_partials(folder)
    forget_set_aside(folder / CAPTIONS)
    todo = units_left(folder, recipe.make.unit_images)
    if todo:
        refuse_other_models(recipe.make, folder)
    with following(recipe, folder, runner, todo, show) as live:
        for unit in _made(recipe, folder, runner, todo):
            live.add(unit)
            progress(len(unit.rows))
    all_through(folder)
    return len(todo)


def _made(recipe: FactoryRecipe, folder: Path, runner: Runner, todo: list[int]) -> Iterator[Unit]:
    """The units as they are committed; raises StageError once too many samples died."""
    hopeless: set[str] = set()
    units = _noting_dead(read_units(folder, recipe.make.unit_images, todo), hopeless)
    tried = dead = 0
    for unit in runner.run(make_stages(recipe.make, folder), units, notes=folder / NOTES):
        yield unit
        # Rows that died in the plan were never tried here.
        outcomes = [row["outcome"] for row in unit.rows if row["id"] not in hopeless]
        hopeless.difference_update(row["id"] for row in unit.rows)
        tried, dead = tried + len(outcomes), dead + outcomes.count(DEAD)
        if tried >= recipe.make.dead_after and dead > recipe.make.max_dead_share * tried:
            raise StageError(
                f"{dead} of {tried} samples died, more than factory.make.max_dead_share ({recipe.make.max_dead_share:g}); "
                "their reasons stand in the ledger",
                where=str(folder / "ledger"),
                remedy="Mend the cause, then edgefusion factory retry-failed and the same command again; or raise that key",
            )


def _noting_dead(units: Iterator[Unit], dead: set[str]) -> Iterator[Unit]:
    """The same units; the ids of rows that died in the plan are added to `dead`."""
    for unit in units:
        dead.update(row["id"] for row in unit.rows if row["outcome"] == DEAD)
        yield unit


@dataclass(frozen=True)
class Choice:
    """What a selection will pack."""

    rules: SelectRecipe
    decisions: Mapping[str, Decision]
    columns: Columns
    selection: Selection

    @property
    def mark(self) -> str:
        return digest_decisions(self.decisions)


def choose(recipe: FactoryRecipe, folder: Path, rules: SelectRecipe, target: Path, by_manifest: bool = True) -> Choice:
    """Apply the rules and what people decided to the ledger. Raises LedgerConflict if a run was trained on what is packed in `target`, and
    it would become another: by its manifest, unless that is not to be believed, else by its selection."""
    decisions = _standing(folder, rules)
    columns = load_columns(folder, recipe.make.unit_images)
    choice = Choice(rules, decisions, columns, select(columns, rules, decisions))
    if _is_trained_on(folder, target) and _is_packed(recipe, target, choice, by_manifest) is False:
        raise LedgerConflict(
            f"{', '.join(built_on(folder))} in {folder.resolve().parent} was made from the selection as it is, and it would become another",
            where=str(target),
            remedy="Make the new one beside it (edgefusion factory select DATASET --name NAME --rule ...), delete those to build them anew, "
            "or copy the dataset folder and go on in the copy",
        )
    return choice


def select_and_pack(
    recipe: FactoryRecipe, folder: Path, rules: SelectRecipe | None = None, target: Path | None = None
) -> dict[str, Any]:
    """Apply the rules and what people decided to the ledger and pack what is kept; returns the funnel. The manifest is written last.

    Without `rules` those of the recipe, without `target` into `folder` itself. Raises LedgerConflict as `choose` does.
    """
    target = target or folder
    choice = choose(recipe, folder, rules or recipe.select, target)
    summary = summarise(choice.columns, choice.selection, choice.rules)
    if not _is_packed(recipe, target, choice):
        # Killed on the way, the old shards must not stand there by the new rules.
        (target / MANIFEST).unlink(missing_ok=True)
    write_selection(target, choice.selection, {**summary, "decisions_sha256": choice.mark})
    if target == folder:
        write_letters(folder, choice.selection)
    samples = _samples(recipe, folder, choice.selection.kept, choice.decisions, choice.rules)
    pack(samples, target, recipe.pack.samples_per_shard, choice.mark)
    return summary["funnel"]


def _is_packed(recipe: FactoryRecipe, target: Path, choice: Choice, by_manifest: bool = True) -> bool | None:
    """What is packed in `target` has the same samples, words and shards, by its manifest, or where that is gone or not believed by its selection; None if
    neither says."""
    ids = np.sort(choice.columns.ids[choice.selection.kept])
    same = is_packed_as(target, ids, recipe.pack.samples_per_shard, choice.mark) if by_manifest else None
    if same is None:
        return is_selected_as(target, choice.selection, choice.rules, choice.mark)
    return same and selected_contents(target) in (None, (choice.rules.text, choice.rules.crop))


def _is_trained_on(folder: Path, target: Path) -> bool:
    """A run was built on the data set in `folder`: on its main selection, whose counts its report shows, or on the view in `target`."""
    if target == folder or not built_on(folder):
        return bool(built_on(folder))
    try:
        told = json.loads((folder.resolve().parent / _TRAINED_ON).read_text())
        return any(Path(fact["data"]).parts[-3:] == target.resolve().parts[-3:] for fact in told)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_packed(folder: Path, rules: SelectRecipe, target: Path | None = None) -> bool:
    """The shards in `target`, or of the main selection, are there and hold what people decided so far, as far as `rules` listen to them.
    Raises CorruptShard if the decisions cannot be read."""
    return packed_decisions(target or folder) == decided(folder, rules)


def decided(folder: Path, rules: SelectRecipe) -> str:
    """Digest of the decisions that a selection by `rules` would now be packed with; empty without any, and where people count for nothing."""
    return digest_decisions(_standing(folder, rules))


def _standing(folder: Path, rules: SelectRecipe) -> dict[str, Decision]:
    return {} if rules.people == "ignore" else read_decisions(folder)


def packed_samples(recipe: FactoryRecipe, folder: Path, wanted: set[str], rules: SelectRecipe) -> Iterator[Sample]:
    """The samples with these ids, as a selection by `rules` packs them."""
    units = plan_units(folder, recipe.make.unit_images)
    kept = np.fromiter((key in wanted for _, ids in units for key in ids.to_pylist()), bool)
    decisions = _standing(folder, rules)
    return _samples(recipe, folder, kept, decisions, rules)


def _samples(
    recipe: FactoryRecipe, folder: Path, kept: np.ndarray, decisions: Mapping[str, Decision], rules: SelectRecipe
) -> Iterator[Sample]:
    """`kept`: a bool for each row of the plan. One unit's pictures lie in memory."""
    units, start, wanted = plan_units(folder, recipe.make.unit_images), 0, dict[int, np.ndarray]()
    for number, (_, ids) in enumerate(units):
        some = kept[start : start + len(ids)]
        start += len(ids)
        if some.any():
            wanted[number] = some
    centre = rules.crop == "centre" and not recipe.make.painters()
    planned = read_units(folder, recipe.make.unit_images, wanted) if centre else None
    for number, some in wanted.items():
        unit = units[number][0]
        rows = {row["id"]: row for row, keep in zip(read_entry(folder, unit), some.tolist(), strict=True) if keep}
        digests = {row["id"]: row["picture_sha256"] for row in next(planned).rows} if planned else {}
        sha256 = next(iter(rows.values()))["pictures_sha256"]
        for key, data in read_pictures(folder, unit, sha256):
            if key in rows and key in digests and rows[key]["crop"] != CROPS[0]:
                yield _centred(recipe, folder, _sample(recipe, rows[key], data, decisions, rules), rows[key], digests)
            elif key in rows:
                yield _sample(recipe, rows[key], data, decisions, rules)


def _centred(
    recipe: FactoryRecipe, folder: Path, sample: Sample, row: dict[str, Any], digests: Mapping[str, str]
) -> Sample:
    """The centre of a taken-in picture in place of the crop that was made; its scores are of that one, so they go."""
    crop = recipe.make.crop or CropRecipe()
    whole = fetch(row["source"], digests[row["id"]], folder)
    centre = open_crops(whole, crop.size_px, False, crop.max_pixels)[0][0]
    facts = {name: value for name, value in sample.facts.items() if name != "scores"}
    facts |= {"crop": CROPS[0], "clip_score": None, "raw_clip_score": None}
    return replace(sample, picture=encode_picture(centre, recipe.make.picture_kind), facts=facts)


def _sample(
    recipe: FactoryRecipe, row: dict[str, Any], data: bytes, decisions: Mapping[str, Decision], rules: SelectRecipe
) -> Sample:
    """By the rule `text: raw` the text that came with the picture, and how well it fits, take the place of the new caption."""
    raw = rules.text == "raw"
    text, score = (row["raw_caption"], row["raw_clip_score"]) if raw else (row["prompt"], row["clip_score"])
    facts = {"attributes": json.loads(row["attributes"]), "clip_score": score, "group": row["group"]}
    if painters := recipe.make.painters():
        facts |= {"seed": row["seed"], "teacher": painters[teacher_of(row, recipe.make)].model}
    else:
        place = json.loads(row["source"])
        facts |= {name: row[name] for name in ("raw_caption", "raw_clip_score", "crop", "width_px", "height_px")}
        name = Path(place["file"].partition("?")[0]).name  # what follows in a URL may be a key
        facts["source"] = place.get("url") or f"{name}#{place['at']}"
        facts |= {
            key: place[name] for name, key in (("name", "original_path"), ("metadata", "metadata")) if name in place
        }
    facts |= {"scores": more} if (more := further_scores(row)) else {}
    caption = decisions[row["id"]].caption if row["id"] in decisions else None
    if caption is not None:
        facts["original_prompt"] = text
    return Sample(row["id"], data, recipe.make.picture_kind, caption or text, facts)
