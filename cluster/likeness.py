"""Whether two recipes, as trees of plain values, are alike but for keys that decide nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

Key = Sequence[str]
"""Names from the root down; `*` stands for every name or number."""


def without(tree: dict[str, Any], keys: Iterable[Key]) -> dict[str, Any]:
    """A copy that lacks `keys`, where they are there."""
    copy: dict[str, Any] = json.loads(json.dumps(tree))
    for key in keys:
        _take_out(copy, key)
    return copy


def _take_out(tree: Any, key: Key) -> None:
    name, *below = key
    if name == "*":
        for one in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            _take_out(one, below)
    elif isinstance(tree, dict) and below:
        _take_out(tree.get(name), below)
    elif isinstance(tree, dict):
        tree.pop(name, None)


def first_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first key with another value, in words."""

    def walk(one: Any, other: Any, key: str) -> str:
        if isinstance(one, dict) and isinstance(other, dict):
            pairs = ((name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other]))
            return next((walk(a, b, f"{key}.{name}" if key else name) for name, a, b in pairs if a != b), "")
        return f"{key} is {json.dumps(one)} there and {json.dumps(other)} now"

    return walk(there, here, "")
