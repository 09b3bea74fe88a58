"""Records drawn from a taxonomy by quota, not by chance.

Every value of an attribute comes up as often as its weight says (to one), and exclusions are met by exchanging values between records, which
leaves those counts as they are wherever that is possible: `off_quota` says where it was not.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence

from cluster.errors import RecipeError
from factory.taxonomy import Exclusion, Group, Record, Taxonomy, Values, is_excluded, meets

_PARTNERS = 64
"""Records asked at random for an exchange before a chain of exchanges is looked for among all."""
_MOST_COMBINATIONS = 100_000


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


def off_quota(taxonomy: Taxonomy, records: Sequence[tuple[Group, Record]]) -> list[str]:
    """Where exclusions left no way to keep a quota, in words: values that came up at least one more or one less than their weight says."""
    return [
        f"group {group.name}: {times} of {name} {value}, not {exact:.4g}"
        for group in taxonomy.groups
        if taxonomy.exclusions(group)
        for name, value, times, exact in _shares(group, [record for other, record in records if other is group])
        if abs(times - exact) >= 1
    ]


def _shares(group: Group, records: Sequence[Record]) -> Iterator[tuple[str, str, int, float]]:
    """(attribute, value, times, times by its weight)."""
    for name, values in group.attributes.items():
        weights = values if isinstance(values, dict) else dict.fromkeys(values, 1.0)
        times = Counter(record[name] for record in records)
        for value, weight in weights.items():
            yield name, value, times[value], len(records) * weight / sum(weights.values())


def keep_apart(
    records: list[Record], group: Group, rules: Sequence[Exclusion], seed: str, fixed: Collection[str] = ()
) -> list[Record]:
    """The records without what is excluded: values change places between records, so each comes up as often as before; where no exchange
    helps, a record gets other values, the rarest so far. Attributes that are `fixed` stay. Raises RecipeError if nothing is left to draw.
    """
    if not rules:
        return records
    records, rng = [dict(record) for record in records], random.Random(f"{seed}/exclude")
    bound = [name for name in group.attributes if any(name in rule for rule in rules)]
    hopeless = set[tuple[str, ...]]()
    used: dict[str, Counter[str]] | None = None
    for i, record in enumerate(records):
        if not is_excluded(record, rules):
            continue
        names = list(dict.fromkeys(n for rule in rules if meets(record, rule) for n in rule if n not in fixed))
        kind = tuple(record[name] for name in bound)
        if kind not in hopeless:
            if _exchange(records, i, names, rules, rng) or any(_chain(records, i, n, bound, rules) for n in names):
                continue
            hopeless.add(kind)  # exchanges make room for nobody who found none before
        free = [name for name in bound if name not in fixed]
        used = used or {name: Counter(other[name] for other in records) for name in free}
        _rewrite(records, i, group, free, rules, used, fixed)
    return records


def _exchange(
    records: list[Record], i: int, names: Sequence[str], rules: Sequence[Exclusion], rng: random.Random
) -> bool:
    """Give record i one value of another record for its own, so that neither is excluded; False if none of some records can."""
    mine, count = records[i], len(records)
    rng.randrange(count)
    for j in (rng.randrange(count) for _ in range(_PARTNERS)):
        theirs = records[j]
        for name in names:
            here, there = {**mine, name: theirs[name]}, {**theirs, name: mine[name]}
            if not is_excluded(here, rules) and not is_excluded(there, rules):
                records[i], records[j] = here, there
                return True
    return False


def _chain(records: list[Record], i: int, name: str, bound: Sequence[str], rules: Sequence[Exclusion]) -> bool:
    """Hand values of one attribute round among records, so that record i is no longer excluded and no other comes to be: the shortest way,
    or False if there is none.

    An augmenting path of a bipartite matching between records and values (Berge 1957). One that is excluded itself may end it: its turn comes.
    """
    holders: dict[str, list[int]] = {}
    seen = set[tuple[str, ...]]()
    for j, record in enumerate(records):
        kind = tuple(record[n] for n in bound)
        if kind not in seen:  # one of each kind will do
            seen.add(kind)
            holders.setdefault(record[name], []).append(j)

    def may_hold(j: int, value: str) -> bool:
        return not is_excluded({**records[j], name: value}, rules)

    free = records[i][name]
    before: dict[str, tuple[str | None, int]] = {free: (None, -1)}
    """Value to (the value given up for it, who gives that up and takes it)."""
    todo = deque[str]()

    def reach(j: int, given: str | None) -> None:
        for value in holders:
            if value not in before and may_hold(j, value):
                before[value] = (given, j)
                todo.append(value)

    reach(i, None)
    while todo:
        value = todo.popleft()
        for j in holders[value]:
            if may_hold(j, free) or is_excluded(records[j], rules):
                _hand_round(records, name, j, value, free, before)
                return True
            reach(j, value)
    return False


def _hand_round(
    records: list[Record], name: str, last: int, value: str, free: str, before: dict[str, tuple[str | None, int]]
) -> None:
    """Record `last` gives up `value` and takes `free`; then each takes what the one after it in the chain gave up."""
    records[last] = {**records[last], name: free}
    taken: str | None = value
    while taken is not None:
        given, j = before[taken]
        records[j] = {**records[j], name: taken}
        taken = given


def _rewrite(
    records: list[Record],
    i: int,
    group: Group,
    names: Sequence[str],
    rules: Sequence[Exclusion],
    used: dict[str, Counter[str]],
    fixed: Collection[str],
) -> None:
    """Give record i the values of `names` that are allowed and least `used`, as few new ones as will do."""
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
            changed = min(found, key=lambda pair: pair[0])[1]
            for name in names:
                used[name][records[i][name]] -= 1
                used[name][changed[name]] += 1
            records[i] = changed
            return
    what = ", ".join(f"{name} {records[i][name]}" for name in fixed) or "anything"
    raise RecipeError(
        f"group {group.name}: the exclusions leave no way to draw {what}",
        where="factory.plan.taxonomy",
        remedy="Take back an exclusion, or add values",
    )
