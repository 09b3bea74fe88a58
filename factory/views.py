"""Several selections of one ledger side by side: `dataset/views/NAME` is a data set like `dataset` itself, by other rules.

A view takes its rules from `factory.views.NAME` in the recipe, which says what differs from `factory.select`, or from the command line.
The ledger and the pictures are shared; only shards, manifest, selection and card are a view's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import CorruptShard, LedgerConflict, RecipeError, StageError
from cluster.recipe import build_recipe, override
from factory.card import write_card
from factory.decisions import digest_decisions, read_decisions
from factory.make import choose, select_and_pack
from factory.pack import MANIFEST
from factory.publish import Published, Told, publish
from factory.recipe import VIEW_NAME, FactoryRecipe, SelectRecipe
from factory.retry import built_on
from factory.select import SUMMARY

VIEWS = "views"
MAIN = ""
"""Name of the selection in the data set folder itself."""


def view_folder(folder: Path, name: str) -> Path:
    """Where a selection of the data set in `folder` lies. Raises RecipeError for what is no name."""
    if name and not re.fullmatch(VIEW_NAME, name):
        raise RecipeError(
            f"{name!r} is no name of a selection", remedy="Use up to 40 lower-case letters, digits and dashes"
        )
    return folder / VIEWS / name if name else folder


def view_rules(recipe: FactoryRecipe, name: str, changes: Sequence[str] = ()) -> SelectRecipe:
    """The recipe's rules of a selection, those of `select` if it has none of that name, and `changes` (each key=value)."""
    tree = (recipe.view(name) if name in recipe.views else recipe.select).model_dump(mode="json")
    for change in changes:
        override(tree, change, SelectRecipe, "--rule")
    return build_recipe(SelectRecipe, tree, f"selection {name}" if name else "factory.select")


def _quiet(what: str, done: int, of: int) -> None:
    """Nobody is told."""


def pack_view(
    recipe: FactoryRecipe, folder: Path, name: str, title: str, changes: Sequence[str] = (), told: Told = _quiet
) -> dict[str, Any]:
    """Select by the rules of `name`, pack into the view's folder and write its card; returns the funnel. The manifest comes last but one.

    With `pack.to` it is published there as well.
    """
    funnel = select_and_pack(recipe, folder, view_rules(recipe, name, changes), view_folder(folder, name))
    _show(recipe, folder, name, title, funnel, told)
    return funnel


def write_cards(recipe: FactoryRecipe, folder: Path, title: str, told: Told = _quiet) -> None:
    """The cards of all that is packed anew, the main one last, where `factory.sources` says something else now; shards stay as they are."""
    found = list_views(folder)
    for name in sorted(found, reverse=True):
        _show(recipe, folder, name, title, found[name]["funnel"], told)


def _show(recipe: FactoryRecipe, folder: Path, name: str, title: str, funnel: dict[str, Any], told: Told) -> None:
    """Write the card of a packed selection, and put it where the recipe wants it."""
    target = view_folder(folder, name)
    write_card(target, recipe, funnel, f"{title}-{name}" if name else title)
    if recipe.pack.to is not None and funnel["kept"]:
        publish(target, place_of(recipe.pack.to, name), told)


def pack_all(recipe: FactoryRecipe, folder: Path, title: str, told: Told = _quiet) -> dict[str, Any]:
    """Every selection of the recipe, the main one last, so that its manifest vouches for all; returns the main funnel."""
    if built_on(folder):
        # Refused as a whole, or one selection would be packed anew before another is refused.
        for name in (*recipe.views, MAIN):
            choose(recipe, folder, view_rules(recipe, name), view_folder(folder, name))
    for name in recipe.views:
        pack_view(recipe, folder, name, title, told=told)
    return pack_view(recipe, folder, MAIN, title, told=told)


def publish_all(folder: Path, url: str, told: Told = _quiet) -> list[Published]:
    """Publish the packed data set in `folder` and its views, each to the same place below `url`, the main one last."""
    views = sorted(path.parent for path in (folder / VIEWS).glob(f"*/{MANIFEST}"))
    done = [publish(place, place_of(url, place.name), told) for place in views]
    return [*done, publish(folder, place_of(url, MAIN), told)]


def check_view(recipe: FactoryRecipe, folder: Path, name: str | None, key: str) -> None:
    """Raises RecipeError, which speaks of the recipe's `key`, unless `name` is a selection of the recipe, is packed in `folder` or is None."""
    known = dict.fromkeys([*recipe.views, *(view for view in list_views(folder) if view)])
    if name is not None and name not in known:
        raise RecipeError(
            f"{key} is {name}, and there is no such selection; there are: {', '.join(known) or 'none but the main one'}",
            where=str(folder),
            remedy=f"Leave {key} out for the main one or name another; make one by factory.views.{name} in the recipe of a new run, or of "
            f"what is made by: edgefusion factory select {folder} --name {name} --rule min_clip=0.4",
        )


def refuse_stale_view(folder: Path, name: str | None, key: str) -> None:
    """Raises LedgerConflict, which speaks of the recipe's `key`, if `name` was packed before people decided anew or more samples were
    made: `select` without a name packs the recipe's selections alone. Raises StageError if it waits for people who kept nothing yet."""
    found = list_views(folder)
    if name is None or name not in found:
        return
    view, main = found[name], found.get(MAIN, found[name])
    if view["rules"]["people"] == "only" and not view["funnel"]["kept"]:
        raise StageError(
            f"{key} is {name}, what people kept, and they kept nothing yet",
            where=str(view_folder(folder, name)),
            remedy=f"Let them choose: edgefusion factory curate {folder}. Then run the same command again",
        )
    decided = "" if view["rules"]["people"] == "ignore" else digest_decisions(read_decisions(folder))
    if view.get("decisions_sha256", decided) != decided or view["funnel"]["planned"] != main["funnel"]["planned"]:
        raise LedgerConflict(
            f"{key} is {name}, which was packed before people decided anew or more samples were made",
            where=str(view_folder(folder, name)),
            remedy=f"Select it again by the same rules (selection.json has them): edgefusion factory select {folder} --name {name} --rule ...",
        )


def place_of(url: str, name: str) -> str:
    """Where a selection goes below `url`."""
    return f"{url.rstrip('/')}/{VIEWS}/{name}" if name else url.rstrip("/")


def list_views(folder: Path) -> dict[str, dict[str, Any]]:
    """The summaries of what is packed, by name (empty for the main selection). Raises CorruptShard."""
    found: dict[str, dict[str, Any]] = {}
    for place in [folder, *sorted(p for p in (folder / VIEWS).glob("*") if p.is_dir())]:
        if not (place / MANIFEST).exists() or not (place / SUMMARY).exists():
            continue
        try:
            found[place.name if place != folder else MAIN] = json.loads((place / SUMMARY).read_text())
        except ValueError:
            raise CorruptShard("cannot be read", where=str(place / SUMMARY), remedy="Select again") from None
    return found
