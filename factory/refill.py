"""The loop from select back to plan: prompts for combinations of attributes of which too few were kept.

A refill is one more plan beside the first (`plan-refill-0001.parquet`, ...): its samples go into work units of their own, so what is in
the ledger stays as it is, and the next `make` makes what is new.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster.errors import EdgeFusionError, RecipeError
from cluster.recipe import Settings, build_recipe
from cluster.stage import DEAD
from cluster.storage import publish_bytes
from factory.draw import balanced, keep_apart
from factory.models.text import opened_late
from factory.pack import MANIFEST
from factory.plan import (
    PART_PROMPTS,
    WRITER_LOG,
    Progress,
    remember,
    table_bytes,
    written_part,
)
from factory.prompts import Alike
from factory.recipe import FactoryRecipe
from factory.retry import refuse_if_built
from factory.taxonomy import Group, Taxonomy, is_excluded, load_taxonomy
from factory.teachers import TEACHER, by_teacher
from factory.units import REFILLS, plan_files, read_table

_LIST = b"refill_list_sha256"


class Lacking(Settings):
    """A line of the refill list that select writes (refill.jsonl)."""

    group: str = Field(description="group of the taxonomy")
    attributes: dict[str, str] = Field(description="the combination; the group's other attributes are drawn evenly")
    lacking: int = Field(default=0, ge=0, description="samples that lack; told, not used")
    plan: int = Field(ge=1, le=10_000_000, description="samples to plan")


def plan_refill(
    recipe: FactoryRecipe, seed: int, folder: Path, listed: Path, progress: Progress = lambda n: None
) -> tuple[Path, int]:
    """Plan what the refill list `listed` asks for; returns the new plan and its number of samples. A killed one goes on.

    The manifest goes, for the data set is unfinished until the next run of the recipe. Raises RecipeError for a list that does not fit the
    taxonomy, EdgeFusionError if this very list was planned before, LedgerConflict if something was built on the data set.
    """
    if recipe.plan.kind != "written":
        raise RecipeError(
            "factory.plan takes in what others made, so no prompt can be written for what lacks", remedy="Add sources"
        )
    data = _read(listed)
    mark = hashlib.sha256(data).hexdigest()
    plans = plan_files(folder)
    for path in plans[1:]:
        if (pq.read_schema(path).metadata or {}).get(_LIST) == mark.encode():
            raise EdgeFusionError(
                f"was planned before ({path.name})", where=str(listed), remedy="Run the recipe, then select again"
            )
    refuse_if_built(folder)
    records = draw_refill(parse_list(data, listed), load_taxonomy(recipe.plan.taxonomy), recipe, mark)
    known = set(pa.concat_tables([read_table(path, ["id"]) for path in plans])["id"].to_pylist())
    # Far from the numbers of earlier prompts, for the seeds of the pictures come from them.
    offset = max(recipe.plan.prompts, len(known))
    parts: list[pa.Table] = []
    alike = Alike(recipe.plan.most_alike)
    for path in plans if alike.most is not None else []:
        remember(alike, read_table(path, ["prompt", "outcome"]))
    with opened_late(recipe.plan.writer, folder / "plan" / WRITER_LOG) as writer:
        for start in range(0, len(records), PART_PROMPTS):
            part = folder / "plan" / f"refill-{mark[:16]}-{start // PART_PROMPTS:05d}.parquet"
            some = records[start : start + PART_PROMPTS]
            pairs, teachers = [(group, record) for group, record, _ in some], [name for *_, name in some]
            parts.append(written_part(recipe, part, writer, pairs, offset + start, seed, alike, teachers))
            remember(alike, parts[-1])
            progress(len(some))
    table = by_teacher(pa.concat_tables(parts), recipe.make)
    fresh = [not (key in known or known.add(key)) for key in table["id"].to_pylist()]
    table = table.filter(pa.array(fresh)).replace_schema_metadata({_LIST: mark})
    final = folder / REFILLS.replace("*", f"{len(plans):04d}")
    # The manifest goes first: a data set without one is unfinished, whatever else happens.
    (folder / MANIFEST).unlink(missing_ok=True)
    publish_bytes(final, table_bytes(table))
    return final, sum(outcome != DEAD for outcome in table["outcome"].to_pylist())


def parse_list(data: bytes, where: Path) -> list[Lacking]:
    """The rows of a refill list, one JSON object a line; raises RecipeError that names the first bad line."""
    found: list[Lacking] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise RecipeError(f"line {number} is no JSON object", where=str(where), remedy="Mend or delete that line")
        found.append(build_recipe(Lacking, tree, f"{where} line {number}"))
    if not found:
        raise RecipeError("lists nothing", where=str(where), remedy="Nothing lacks, so nothing is to be planned")
    return found


def draw_refill(
    rows: list[Lacking], taxonomy: Taxonomy, recipe: FactoryRecipe, mark: str
) -> list[tuple[Group, dict[str, str], str]]:
    """Attribute records for every row, each with the teacher that the row wants, if any; raises RecipeError for a group, attribute or value
    that the taxonomy does not have, and for an unknown teacher.

    A combination that the taxonomy excludes is passed over; a list of nothing else is refused.
    """
    assert recipe.plan.kind == "written"
    groups = {group.name: group for group in taxonomy.groups}
    found: list[tuple[Group, dict[str, str], str]] = []
    for number, row in enumerate(rows):
        group = groups.get(row.group)
        if group is None:
            raise RecipeError(f"the taxonomy has no group {row.group}", remedy=f"There are: {', '.join(groups)}")
        wanted = dict(row.attributes)
        teacher = wanted.pop(TEACHER, "") if recipe.make.teachers else ""
        if teacher and teacher not in recipe.make.teachers:
            raise RecipeError(
                f"factory.make.teachers has no {teacher}", remedy=f"There are: {', '.join(recipe.make.teachers)}"
            )
        for name, value in wanted.items():
            if value not in group.attributes.get(name, []):
                raise RecipeError(
                    f"group {group.name} of the taxonomy has no {name} that is {value}",
                    remedy="Correct the list or the taxonomy",
                )
        rules = taxonomy.exclusions(group)
        if is_excluded(wanted, rules):
            continue  # select looks at every combination of values and knows no taxonomy
        count = -(-row.plan // recipe.plan.images_per_prompt)
        columns = {
            name: [wanted[name]] * count
            if name in wanted
            else balanced(values, count, random.Random(f"{mark}/{number}/{name}"))
            for name, values in group.attributes.items()
        }
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        records = keep_apart(records, group, rules, f"{mark}/{number}", fixed=wanted)
        found += [(group, record, teacher) for record in records]
    if not found:
        raise RecipeError(
            "the taxonomy excludes every combination that the list asks for",
            where="factory.plan.taxonomy",
            remedy="Take back an exclusion, or ask for other combinations in factory.select.wanted",
        )
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgeFusionError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="Give the refill.jsonl of a selection"
        ) from error
