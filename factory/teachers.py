"""Several teachers of one plan: which of them draws each picture, by quota and not by chance.

The name stands among the picture's attributes, so that caps, audits and the curation page know it as they know style or gender.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import RecipeError
from factory.recipe import FactoryRecipe, MakeRecipe
from factory.taxonomy import Taxonomy

TEACHER = "teacher"
"""The attribute."""


def share_out(make: MakeRecipe, groups: Sequence[str], seed: str) -> list[str]:
    """The teacher of each of N pictures whose groups are given: in each group by their shares (to one), so that no teacher draws more of
    one group than of another. Empty names where there is only one teacher."""
    if not make.teachers:
        return [""] * len(groups)
    names = list(make.teachers)
    edges = list(itertools.accumulate(teacher.share for teacher in make.teachers.values()))
    found = [""] * len(groups)
    for group in dict.fromkeys(groups):
        rows = [i for i, other in enumerate(groups) if other == group]
        rng = random.Random(f"{seed}/{group}/{TEACHER}")
        # Systematic sampling: exact to one and, over many small draws, without a bias against small shares.
        start = rng.random()
        points = [(i + start) / len(rows) * edges[-1] for i in range(len(rows))]
        drawn = [
            names[next(k for k, edge in enumerate(edges) if point < edge or k == len(edges) - 1)] for point in points
        ]
        rng.shuffle(drawn)
        for row, name in zip(rows, drawn, strict=True):
            found[row] = name
    return found


def teacher_of(row: Mapping[str, Any], make: MakeRecipe) -> str:
    """Name of the teacher of a planned row, empty for the only one."""
    return json.loads(row["attributes"])[TEACHER] if make.teachers else ""


def by_teacher(table: pa.Table, make: MakeRecipe) -> pa.Table:
    """The plan with one teacher's rows after another's, else in the same order: a worker then opens each model once or so."""
    if not make.teachers:
        return table
    order = {name: place for place, name in enumerate(make.teachers)}
    places = [order[json.loads(text)[TEACHER]] for text in table["attributes"].to_pylist()]
    return table.take(pa.array(sorted(range(len(places)), key=places.__getitem__), pa.int64()))


def refuse_taken_name(recipe: FactoryRecipe, taxonomy: Taxonomy | None) -> None:
    """Raises RecipeError if the prompts have an attribute of that name already."""
    groups = taxonomy.groups if taxonomy else []
    columns = recipe.plan.attribute_columns if recipe.plan.kind == "file" else []
    if recipe.make.teachers and (TEACHER in columns or any(TEACHER in group.attributes for group in groups)):
        raise RecipeError(
            "factory.make.teachers gives each picture the attribute `teacher`, which the prompts have already",
            where="factory.plan",
            remedy="Call that attribute something else",
        )
