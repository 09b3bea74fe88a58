"""Recipes that an earlier version wrote down beside what it made, without the keys that nothing reads any more."""

from __future__ import annotations

from typing import Any

from cluster.likeness import without

_READ_BY_TRANSFORMERS = (("plan", "writer", "batch_prompts"), ("make", "captioner", "batch_pictures"))
"""Once every kind had them."""


def without_gone_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """A whole recipe's tree, as run.json holds it. Raises AttributeError or TypeError where it is no recipe's."""
    gone: list[tuple[str, ...]] = []
    for part, model, key in _READ_BY_TRANSFORMERS:
        keys = recipe.get("factory", {}).get(part, {}).get(model) or {}
        if keys.get("kind") != "transformers":
            gone.append(("factory", part, model, key))
    return without(recipe, gone)
