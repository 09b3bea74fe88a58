"""A damaged data set made whole from its ledger: the same bytes, for shards are a function of ledger, rules and decisions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.recipe import build_recipe
from cluster.storage import digest_file, publish_bytes
from factory.card import CARD, CROISSANT, GRID, write_card
from factory.dead import reopen_unit
from factory.ledger import read_entry, read_pictures
from factory.make import choose, packed_samples, select_and_pack
from factory.pack import MANIFEST, Sorted, manifest_table, read_manifest, shard_bytes, sorted_on_disk
from factory.recipe import FactoryRecipe, SelectRecipe
from factory.retry import refuse_if_built
from factory.select import KEPT, SELECTION, SUMMARY
from factory.units import plan_units
from factory.verify import find_damage
from factory.views import MAIN, VIEWS, view_folder, view_rules

pc: Any = pyarrow.compute  # its functions are made at run time, where no type checker sees them
_ROWS_AT_ONCE = 8192


@dataclass
class Repair:
    """What was done. Paths are relative to the data set."""

    rebuilt: list[str] = field(default_factory=list)
    """Files written anew from the ledger."""
    reopened: list[str] = field(default_factory=list)
    """Units whose ledger entry or pictures are damaged: they are given back, and the next run of the recipe makes them anew."""


def repair(recipe: FactoryRecipe, folder: Path, title: str) -> Repair:
    """Mend the data set in `folder` and its views, as far as the ledger can. A whole one is left as it is.

    Raises LedgerConflict, with nothing touched, if units must be made anew and something was built on the data set as it is."""
    done = Repair()
    done.reopened = _reopen_damaged(recipe, folder)
    if done.reopened:
        return done
    names = sorted({*recipe.views, *(p.name for p in (folder / VIEWS).glob("*") if p.is_dir())})
    for name in [*names, MAIN]:  # the main one last: its manifest says that all are done
        target = view_folder(folder, name)
        rebuilt = _mend(recipe, folder, target, name)
        if rebuilt or not all((target / file).exists() for file in (CARD, GRID, CROISSANT)):
            funnel = json.loads((target / SUMMARY).read_text())["funnel"]
            write_card(target, recipe, funnel, f"{title}-{name}" if name else title)
        done.rebuilt += [str((target / file).relative_to(folder)) for file in rebuilt]
    return done


def _reopen_damaged(recipe: FactoryRecipe, folder: Path) -> list[str]:
    """Give back units that are damaged. An entry that can be read is set aside with its captions, which are then not paid for again."""
    found: dict[str, bool] = {}
    for unit, ids in plan_units(folder, recipe.make.unit_images):
        legible = False
        try:
            rows = read_entry(folder, unit)
            if [row["id"] for row in rows] != ids.to_pylist():
                raise CorruptShard("holds other rows", where=unit)
            legible = True
            for _ in read_pictures(folder, unit, rows[0]["pictures_sha256"]):
                pass
        except CorruptShard:
            found[unit] = legible
    if found:
        refuse_if_built(folder)
        # The manifest goes first: a data set without one is unfinished, whatever else happens.
        (folder / MANIFEST).unlink(missing_ok=True)
    for unit, legible in found.items():
        if legible:
            reopen_unit(folder, unit)
        else:
            (folder / "ledger" / f"{unit}.parquet").unlink(missing_ok=True)
    return list(found)


def _mend(recipe: FactoryRecipe, folder: Path, target: Path, name: str) -> list[str]:
    """Files of a selection that were written anew."""
    broken = [Path(error.where) for error in find_damage(target)]
    rules = _rules(recipe, target, name)
    if (
        rules is not None
        and target / MANIFEST not in broken
        and _selection_fits(target)
        and _rebuild(recipe, folder, target, broken, rules)
    ):
        return [path.name for path in broken]
    rules = rules or view_rules(recipe, name)
    before = _contents(target)
    if broken:
        # A manifest by which nothing could be rebuilt does not say what was packed; the selection may. Refused before it is taken away.
        choose(recipe, folder, rules, target, by_manifest=False)
        (target / MANIFEST).unlink(missing_ok=True)
    select_and_pack(recipe, folder, rules, target)
    return sorted(file for file, data in _contents(target).items() if before.get(file) != data)


def _contents(target: Path) -> dict[str, str]:
    """Digests of the files that select and pack write."""
    files = [*target.glob("shard-*.tar"), target / MANIFEST, target / SELECTION, target / SUMMARY]
    return {path.name: digest_file(path) for path in files if path.exists()}


def _rules(recipe: FactoryRecipe, target: Path, name: str) -> SelectRecipe | None:
    """The rules that the selection was made by, which may have come from the command line; None if it does not say."""
    try:
        return build_recipe(SelectRecipe, json.loads((target / SUMMARY).read_text())["rules"], str(target / SUMMARY))
    except (OSError, ValueError, KeyError, TypeError, EdgeFusionError):
        return None


def _selection_fits(target: Path) -> bool:
    """The selection can be read and keeps what the manifest lists."""
    try:
        table = pq.read_table(target / SELECTION, columns=["id", "outcome"])
        rows = read_manifest(target)
    except (pa.ArrowInvalid, OSError, CorruptShard):
        return False
    pairs = zip(table["id"].to_pylist(), table["outcome"].to_pylist(), strict=True)
    return sorted(key for key, outcome in pairs if outcome == KEPT) == [row["id"] for row in rows]


def _rebuild(recipe: FactoryRecipe, folder: Path, target: Path, broken: list[Path], rules: SelectRecipe) -> bool:
    """Write these shards anew, or remove those that the manifest does not know; False if one would not be what the manifest says.

    The samples of all are sorted on disk by one pass over the pictures: ids are spread over all units, however few shards are broken."""
    if not broken:
        return True
    listed: dict[str, list[dict[str, str]]] = {path.name: [] for path in broken}
    for batch in manifest_table(target).to_batches(_ROWS_AT_ONCE):
        for row in batch.filter(pc.is_in(batch["shard"], pa.array(list(listed), pa.string()))).to_pylist():
            listed[row["shard"]].append(row)
    wanted = {row["id"] for rows in listed.values() for row in rows}
    with sorted_on_disk(packed_samples(recipe, folder, wanted, rules) if wanted else (), target) as there:
        return all(_rebuild_one(path, listed[path.name], there) for path in broken)


def _rebuild_one(shard: Path, listed: list[dict[str, str]], there: Sorted) -> bool:
    if not listed:
        shard.unlink(missing_ok=True)
        return True
    samples = [there.find(key) for key in sorted(row["id"] for row in listed)]
    data = shard_bytes([sample for sample in samples if sample is not None])
    if hashlib.sha256(data).hexdigest() != listed[0]["shard_sha256"]:
        return False
    publish_bytes(shard, data)
    return True
