# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The keys of a recipe as its schema describes them: name, type, default and meaning. Knows no wing's fields, and holds no text of its own
that could be wrong about them."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Discriminator
from pydantic.fields import FieldInfo

from cluster.errors import RecipeError
from cluster.recipe import models_in

NAME = "NAME"
"""Stands in a key for a name that the user gives."""
EACH = "[]"
"""Stands behind a key whose list holds settings: those of each entry."""
REQUIRED = "required"
_HOME = Path(__file__).parent.parent
"""A file of the project is named from there, so that a page is the same wherever it is written."""
_PLAIN: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any",
}
_OR_NULL = " or null"
_BOUNDS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
    "min_length": "{} or more",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    key: str
    """From the root, with dots; NAME and [] as above."""
    type: str
    default: str
    """As YAML writes it in one line, or `required`; empty where it is what the keys below it say."""
    description: str
    kinds: tuple[str, ...] = ()
    """Values of the `kind` beside it with which it is there; empty if with all."""


@dataclass(frozen=True)
class Group:
    """The keys that stand beside one another."""

    name: str
    """The key that holds them; empty for the root."""
    about: str
    abouts: dict[str, str]
    """What each `kind` is, where a kind chooses."""
    keys: tuple[Key, ...]


def recipe_keys(schema: type[BaseModel], prefix: str = "") -> list[Key]:
    """Every key of `schema`, or those at and below `prefix`; raises RecipeError, with near names, if there is none."""
    keys = [key for group in recipe_groups(schema) for key in group.keys]
    wanted = _parts(prefix)
    found = [key for key in keys if _begins(_parts(key.key), wanted)]
    if found:
        return found
    names = list(dict.fromkeys(key.key for key in keys))
    last = [name for name in names if wanted[-1] in _parts(name)]
    near = last[:4] or difflib.get_close_matches(prefix, names, n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else "Leave the prefix out to see all keys"
    raise RecipeError(f"{prefix} is not a known key", remedy=remedy)


def recipe_groups(schema: type[BaseModel]) -> list[Group]:
    """The keys of `schema`, those that stand beside one another together, in the order of the schema."""
    return list(_groups("", [schema], ""))


def _groups(name: str, models: Sequence[type[BaseModel]], meant: str) -> Iterator[Group]:
    """The group at `name`, where one of `models` stands, and all groups below it. `meant` is the default of its kind."""
    every = [kind for model in models for kind in _kinds(model)]
    rows: dict[tuple[str, ...], list[str]] = {}
    below: dict[str, tuple[list[type[BaseModel]], str]] = {}
    for model in models:
        for field_name, field in model.model_fields.items():
            key = f"{name}.{field_name}" if name else field_name
            inner = list(dict.fromkeys(models_in(field.annotation)))
            if field_name == "kind" and len(models) > 1:
                row = (key, " or ".join(every), meant or REQUIRED, "which of these")
            else:
                said = field.description or _about(inner) or ("there is no other kind" if field_name == "kind" else "")
                row = (key, type_words(field.annotation, field.metadata), _default(field), said)
            rows.setdefault(row, []).extend(_kinds(model))
            if inner:
                held, _ = below.setdefault(_place_below(key, field.annotation), ([], _kind_meant(field)))
                held += [one for one in inner if one not in held]
    keys = [
        Key(*row, kinds=() if len(models) == 1 or set(kinds) == set(every) else tuple(kinds))
        for row, kinds in rows.items()
    ]
    abouts = {kind: _about([model]) for model in models for kind in _kinds(model)} if len(models) > 1 else {}
    yield Group(name, _about(models), abouts, tuple(keys))
    for place, (inner, kind) in below.items():
        yield from _groups(place, inner, kind)


def _kinds(model: type[BaseModel]) -> list[str]:
    field = model.model_fields.get("kind")
    return [str(kind) for kind in typing.get_args(field.annotation)] if field else []


def _kind_meant(field: FieldInfo) -> str:
    """The kind that is taken where a recipe names none; empty if it has to."""
    for one in [*field.metadata, field.discriminator]:
        if isinstance(one, Discriminator) and callable(one.discriminator):
            return str(one.discriminator({}))
    return ""


def _about(models: Sequence[type[BaseModel]]) -> str:
    """What its author says of the model, or that a kind chooses among several."""
    if len(models) > 1:
        return f"one of several kinds: {', '.join(kind for model in models for kind in _kinds(model))}"
    said = models[0].__doc__ if models else ""
    return " ".join((said or "").split("\n\n")[0].split()).rstrip(".")


def _place_below(key: str, annotation: Any) -> str:
    """How the keys below `key` begin: with a name of the user's, or of each entry, where it holds several settings."""
    origins = {typing.get_origin(one) for one in (annotation, *typing.get_args(annotation))}
    return f"{key}.{NAME}" if dict in origins else f"{key}{EACH}" if list in origins else key


def type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: `whole number, at least 1`."""
    bounds = [
        _BOUNDS[name].format(value)
        for one in metadata
        for name in _BOUNDS
        if (value := getattr(one, name, None)) is not None
    ]
    words = _words(annotation)
    if bounds and words.endswith(_OR_NULL):
        return ", ".join([words.removesuffix(_OR_NULL), *bounds]) + f",{_OR_NULL}"
    return ", ".join([words, *bounds])


def _words(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = inner[1].metadata if isinstance(inner[1], FieldInfo) else []
        return type_words(inner[0], bounds)
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        # Null last: `left out` is what the description says of it.
        words = dict.fromkeys(_words(one) for one in sorted(inner, key=lambda one: one is type(None)))
        return " or ".join(words)
    if origin is dict:
        return f"by name: {_words(inner[1])}"
    if origin in (list, tuple):
        return f"list of {_words(inner[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys of its own"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        usual = {name: one.get_default() for name, one in type(value).model_fields.items()}
        apart = {name: given for name, given in value.model_dump(mode="json").items() if given != usual.get(name)}
        apart = {name: given for name, given in apart.items() if not isinstance(getattr(value, name), BaseModel)}
        return json.dumps(apart, ensure_ascii=False) if apart else ""
    if isinstance(value, str) and value:
        return value.removeprefix(f"{_HOME}/")
    return json.dumps(value, ensure_ascii=False)


def _parts(key: str) -> list[str]:
    return [part.removesuffix(EACH) for part in key.split(".") if part] if key else []


def _begins(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """NAME is any name: `cluster.stages.render` is of cluster.stages.NAME."""
    return len(parts) >= len(wanted) and all(has in (want, NAME) for has, want in zip(parts, wanted, strict=False))
