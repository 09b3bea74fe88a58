"""What is drawn: groups of concepts with their attributes, how many of each, and what never goes together.

Records are drawn by quota, not by chance: every value of an attribute comes up as often as its weight says (to one), and exclusions are met
by exchanging values between records, which leaves those counts as they are wherever that is possible.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from cluster.errors import RecipeError
from cluster.recipe import Settings, build_recipe
from factory.models import ZOO

Record = dict[str, str]
Exclusion = dict[str, str | list[str]]
Values = list[str] | dict[str, float]
_PARTNERS = 64
"""Records asked at random for an exchange before all are asked in turn."""
_MOST_COMBINATIONS = 100_000

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
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RecipeError("is not valid YAML", where=str(path), remedy="Check indentation and colons") from None
    taxonomy = build_recipe(Taxonomy, tree if isinstance(tree, dict) else {}, str(path))
    for wrong in _faults(taxonomy):
        raise RecipeError(wrong, where=str(path), remedy="Correct the group")
    return taxonomy


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
        for value in _listed(wanted):
            if value not in values:
                yield f"{where}: {name} is never {value}{_nearest(value, values)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def draw_records(taxonomy: Taxonomy, count: int, seed: int) -> list[tuple[Group, Record]]:
    """`count` attribute records: groups by count or share, and in each group every value of every attribute as often as its weight says
    (to one), but for what is excluded. Raises RecipeError if the groups' counts do not fit, or if exclusions leave nothing to draw."""
    found: list[tuple[Group, Record]] = []
    for group, some in zip(taxonomy.groups, _sizes(taxonomy, count), strict=True):
        columns = {
            name: balanced(values, some, random.Random(f"{seed}/{group.name}/{name}"))
            for name, values in group.attributes.items()
        }
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        records = keep_apart(records, group, taxonomy.exclusions(group), f"{seed}/{group.name}")
        found += [(group, record) for record in records]
    random.Random(seed).shuffle(found)
    return found


def _sizes(taxonomy: Taxonomy, count: int) -> list[int]:
    """Records of each group."""
    fixed = sum(group.count or 0 for group in taxonomy.groups)
    total = sum(group.share or 0 for group in taxonomy.groups)
    if fixed > count or (not total and fixed != count):
        raise RecipeError(
            f"the groups' counts come to {fixed}, but {count} prompts are planned",
            where="factory.plan.prompts",
            remedy=f"Plan {fixed}, or change the counts in the taxonomy, or give a group a share in place of its count",
        )
    sizes, shares, taken = list[int](), 0.0, 0
    for group in taxonomy.groups:
        shares += group.share or 0
        upto = round((count - fixed) * shares / total) if total else 0
        sizes.append(group.count if group.count is not None else upto - taken)
        taken = max(taken, upto)
    return sizes


def balanced(values: Values, count: int, rng: random.Random) -> list[str]:
    """`count` of the values in random order: of a list each equally often (to one), else each by its weight (to one)."""
    if isinstance(values, dict):
        exact = {value: count * weight / sum(values.values()) for value, weight in values.items()}
        found = [value for value, times in exact.items() for _ in range(math.floor(times))]
        rest = sorted(exact, key=lambda value: (math.floor(exact[value]) - exact[value], rng.random()))
        found += rest[: count - len(found)]
        rng.shuffle(found)
        return found
    found = []
    while len(found) < count:
        found += rng.sample(values, len(values))
    return found[:count]


def is_excluded(record: Mapping[str, str], rules: Sequence[Exclusion]) -> bool:
    return any(_meets(record, rule) for rule in rules)


def _meets(record: Mapping[str, str], rule: Exclusion) -> bool:
    return all(record.get(name) in _listed(wanted) for name, wanted in rule.items())


def _listed(wanted: str | list[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else wanted


def keep_apart(
    records: list[Record], group: Group, rules: Sequence[Exclusion], seed: str, fixed: Collection[str] = ()
) -> list[Record]:
    """The records without what is excluded: values change places between records, so each comes up as often as before; where no exchange
    helps, a record gets other values, the rarest so far. Attributes that are `fixed` stay. Raises RecipeError if nothing is left to draw."""
    if not rules:
        return records
    records, rng = [dict(record) for record in records], random.Random(f"{seed}/exclude")
    for i, record in enumerate(records):
        names = list(dict.fromkeys(n for rule in rules if _meets(record, rule) for n in rule if n not in fixed))
        if is_excluded(record, rules) and not _exchange(records, i, names, rules, rng):
            _rewrite(records, i, group, rules, fixed)
    return records


def _exchange(
    records: list[Record], i: int, names: Sequence[str], rules: Sequence[Exclusion], rng: random.Random
) -> bool:
    """Give record i one value of another record for its own, so that neither is excluded; False if no record can."""
    mine, count = records[i], len(records)
    start = rng.randrange(count)
    for j in itertools.chain((rng.randrange(count) for _ in range(_PARTNERS)), range(start, count), range(start)):
        theirs = records[j]
        for name in names:
            here, there = {**mine, name: theirs[name]}, {**theirs, name: mine[name]}
            if not is_excluded(here, rules) and not is_excluded(there, rules):
                records[i], records[j] = here, there
                return True
    return False


def _rewrite(records: list[Record], i: int, group: Group, rules: Sequence[Exclusion], fixed: Collection[str]) -> None:
    """Give record i the rarest values that are allowed, as few new ones as will do."""
    names = [name for name in dict.fromkeys(name for rule in rules for name in rule) if name not in fixed]
    used = {name: Counter(record[name] for record in records) for name in names}
    for size in range(1, len(names) + 1):
        found: list[tuple[int, Record]] = []
        for some in itertools.combinations(names, size):
            if math.prod(len(group.attributes[name]) for name in some) > _MOST_COMBINATIONS:
                continue
            for values in itertools.product(*(group.attributes[name] for name in some)):
                changed = {**records[i], **dict(zip(some, values, strict=True))}
                if not is_excluded(changed, rules):
                    found.append((sum(used[n][v] for n, v in zip(some, values, strict=True)), changed))
        if found:
            records[i] = min(found, key=lambda pair: pair[0])[1]
            return
    what = ", ".join(f"{name} {records[i][name]}" for name in fixed) or "anything"
    raise RecipeError(
        f"group {group.name}: the exclusions leave no way to draw {what}",
        where="factory.plan.taxonomy",
        remedy="Take back an exclusion, or add values",
    )
