"""Whether two recipes, as trees of plain values, are alike but for keys that decide nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, cast

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
        for one in _parts(tree):
            _take_out(one, below)
    elif isinstance(tree, dict):
        part = cast(dict[str, Any], tree)
        if below:
            _take_out(part.get(name), below)
        else:
            part.pop(name, None)


def _parts(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return list(cast(dict[str, Any], tree).values())
    return cast(list[Any], tree) if isinstance(tree, list) else []


def first_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first key with another value, in words."""
    return _walk(there, here, "")


def _walk(there: Any, here: Any, key: str) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        one, other = cast(dict[str, Any], there), cast(dict[str, Any], here)
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                return _walk(one.get(name), other.get(name), f"{key}.{name}" if key else name)
        return ""
    return f"{key} is {json.dumps(there)} there and {json.dumps(here)} now"
