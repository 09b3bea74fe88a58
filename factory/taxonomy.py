"""What is drawn: groups of concepts with their attributes, how many of each, and what never goes together (factory/draw.py draws it)."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from cluster.errors import RecipeError
from cluster.recipe import Settings, bad_yaml, build_recipe, parse_yaml
from factory.models import ZOO

Record = dict[str, str]
Exclusion = dict[str, str | list[str]]
Values = list[str] | dict[str, float]

_EXCLUDE = "combinations that are never drawn, such as {role: nun, gender: man}; a value may be a list of values"


class Group(Settings):
    """Things that share the same attributes."""

    name: str = Field(description="what the report calls it")
    share: float | None = Field(default=None, gt=0, description="share of the prompts, relative to the other groups")
    count: int | None = Field(default=None, ge=1, description="exactly so many prompts, whatever the others' shares")
    must_mention: list[str] = Field(default=["subject"], description="attributes whose words a prompt must hold")
    attributes: dict[str, Values] = Field(
        description="attribute to its values: a list, where each comes up equally often, or a mapping of each to its weight"
    )
    exclude: list[Exclusion] = Field(default=[], description=_EXCLUDE)

    @model_validator(mode="after")
    def _one(self) -> Group:
        if (self.share is None) == (self.count is None):
            raise ValueError("give either share or count")
        return self


class Taxonomy(Settings):
    groups: list[Group] = Field(min_length=1, description="groups of concepts")
    exclude: list[Exclusion] = Field(
        default=[], description=f"{_EXCLUDE}; for every group that has all these attributes"
    )

    def exclusions(self, group: Group) -> list[Exclusion]:
        """Those of the group and those of all groups that it can meet."""
        return [*group.exclude, *(rule for rule in self.exclude if set(rule) <= set(group.attributes))]


def load_taxonomy(name: str) -> Taxonomy:
    """Read the YAML file `name` (zoo:NAME for a shipped one); raises RecipeError."""
    path = ZOO.parent / name.removeprefix("zoo:") if name.startswith("zoo:") else Path(name)
    if not path.is_file():
        raise RecipeError(
            f"there is no taxonomy {name}",
            where="factory.plan.taxonomy",
            remedy="Give a YAML file or zoo:taxonomy.yaml",
        )
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, ValueError) as error:
        raise bad_yaml(error, str(path)) from None
    taxonomy = build_recipe(Taxonomy, tree if isinstance(tree, dict) else {}, str(path))
    for wrong in _faults(taxonomy):
        raise RecipeError(wrong, where=str(path), remedy="Correct the group")
    return taxonomy


def digest_taxonomy(taxonomy: Taxonomy) -> str:
    """SHA-256 of what it says, in its order; comments and spaces do not count."""
    return hashlib.sha256(taxonomy.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def _faults(taxonomy: Taxonomy) -> Iterable[str]:
    """What no schema can say, in words."""
    names = [group.name for group in taxonomy.groups]
    for name in names:
        if names.count(name) > 1:
            yield f"there are two groups {name}"
    for group in taxonomy.groups:
        if unknown := sorted(set(group.must_mention) - set(group.attributes)):
            yield f"group {group.name}: must_mention names {unknown}, which are no attributes"
        for name, values in group.attributes.items():
            if not values:
                yield f"group {group.name} has an attribute without values: {name}"
            for value, weight in values.items() if isinstance(values, dict) else ():
                if not 0 < weight < math.inf:
                    yield f"group {group.name}: the weight of {name} {value} is {weight:g}, not greater than 0"
        for rule in group.exclude:
            yield from _strange(rule, [group], f"group {group.name}: exclude")
    for rule in taxonomy.exclude:
        able = [group for group in taxonomy.groups if set(rule) <= set(group.attributes)]
        yield from _strange(rule, able or taxonomy.groups, "exclude")
        if not able:
            yield f"exclude: no group has all of {', '.join(rule)}"


def _strange(rule: Exclusion, groups: Sequence[Group], where: str) -> Iterable[str]:
    """Attributes and values of an exclusion that none of the groups knows."""
    if not rule:
        yield f"{where}: an empty combination excludes everything"
    for name, wanted in rule.items():
        known = [name for group in groups for name in group.attributes]
        if name not in known:
            yield f"{where}: there is no attribute {name}{_nearest(name, known)}"
            continue
        values = [value for group in groups for value in group.attributes.get(name, ())]
        for value in listed(wanted):
            if value not in values:
                yield f"{where}: {name} is never {value}{_nearest(value, values)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def is_excluded(record: Mapping[str, str], rules: Sequence[Exclusion]) -> bool:
    return any(meets(record, rule) for rule in rules)


def meets(record: Mapping[str, str], rule: Exclusion) -> bool:
    return all(record.get(name) in listed(wanted) for name, wanted in rule.items())


def listed(wanted: str | list[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else wanted
