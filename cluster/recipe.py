"""Recipes: strict pydantic models read from YAML, built in Python or overridden by `--set key=value`.

Owns how a bad recipe is refused: the key, the file, the remedy and the nearest valid name. Knows no wing's fields.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import RecipeError

_MERGE = "tag:yaml.org,2002:merge"
_TRUTH = "tag:yaml.org,2002:bool"
_PLAIN = {
    "int": "should be a whole number",
    "float": "should be a number",
    "bool": "should be true or false",
    "string": "should be text",
    "list": "should be a list",
    "dict": "should have keys of its own",
}
"""Instead of pydantic's words for values that are not of a type: by the first word of the error's."""
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class Settings(BaseModel):
    """Base of every part of a recipe: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_recipe(schema: type[AnySettings], path: Path | None, overrides: Sequence[str] = ()) -> AnySettings:
    """Read `path`, if there is one, and apply `overrides` (each `a.b.c=value`, the value in YAML); raises RecipeError."""
    mapping = _read(path) if path else {}
    for change in overrides:
        override(mapping, change, schema)
    changed = [change.partition("=")[0].strip() for change in overrides]
    return build_recipe(schema, mapping, str(path or "the options"), changed)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise RecipeError("there is no such recipe", where=str(path), remedy=_nearest_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read ({error})", where=str(path), remedy="Check the path") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that no month has
        raise bad_yaml(error, str(path)) from None
    if not isinstance(tree, dict):
        raise RecipeError("holds no keys", where=str(path), remedy="Start from recipes/pocket.yaml")
    return cast(dict[str, Any], tree)


def bad_yaml(error: yaml.YAMLError | ValueError, where: str) -> RecipeError:
    """What `parse_yaml` met in the file `where`, in plain words."""
    mark = getattr(error, "problem_mark", None)
    line = f" at line {mark.line + 1}" if mark else ""
    if "\\t" in str(getattr(error, "problem", "")):
        return RecipeError(f"is not valid YAML{line}: a tab", where=where, remedy="Indent by spaces, not by tabs")
    return RecipeError(f"is not valid YAML{line}", where=where, remedy="Check indentation (by spaces) and colons")


class _Loader(yaml.SafeLoader):
    """With `true` and `false` as the only truths, as in YAML 1.2: of `log: off` and `mixed_precision: no` the older one makes False."""


_loader: Any = _Loader  # its members have no types
_loader.yaml_implicit_resolvers = {
    first: [(tag, what) for tag, what in rules if tag != _TRUTH]
    for first, rules in _loader.yaml_implicit_resolvers.items()
}
_loader.add_implicit_resolver(_TRUTH, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))


def parse_yaml(text: str, where: str) -> Any:
    """As `yaml.safe_load`, but for truths (`_Loader`), and a key that stands twice, of which that would silently take the last, raises RecipeError."""
    loader = _loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_doubled(loader, node, [], where, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_doubled(loader: Any, node: yaml.Node, path: list[str], where: str, seen: set[int]) -> None:
    """`seen`: what was looked at before, for an alias names a node again, and may name the one that it stands in."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for number, inner in enumerate(cast(list[yaml.Node], node.value)):
            _refuse_doubled(loader, inner, [*path, str(number)], where, seen)
        return
    lines: dict[Any, int] = {}
    for name, inner in cast(list[tuple[yaml.Node, yaml.Node]], node.value):
        # What a merge (<<) brings may be overridden by a key beside it: that is what it is for.
        if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
            key, line = loader.construct_object(name), name.start_mark.line + 1
            if key in lines:
                at = f"line {line}" if lines[key] == line else f"lines {lines[key]} and {line}"
                told = ".".join([*path, name.value])
                raise RecipeError(f"{told} stands twice, at {at}", where=where, remedy="Keep one of the two")
            lines[key] = line
        _refuse_doubled(loader, inner, [*path, str(name.value)], where, seen)


def build_recipe(
    schema: type[AnySettings], tree: dict[str, Any], where: str, changed: Sequence[str] = ()
) -> AnySettings:
    """Validate `tree`; raises RecipeError that names the first bad key, `where` it stands (or that it was `changed` on the command
    line) and the nearest valid name."""
    _refuse_passwords(tree, "", where)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _explain(schema, error, where, changed) from None


def _refuse_passwords(value: Any, key: str, where: str) -> None:
    """A recipe is copied into every output folder, so no secret may stand in one."""
    if isinstance(value, dict):
        for name, inner in cast(dict[Any, Any], value).items():
            _refuse_passwords(inner, f"{key}.{name}" if key else str(name), where)
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            _refuse_passwords(inner, key, where)
    elif isinstance(value, str) and _PASSWORD.search(value):
        raise RecipeError(
            f"{key} holds a password in its URL, and recipes are written into every output folder",
            where=where,
            remedy="Take it out; keys come from the environment (OPENAI_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY)",
        )


def recipe_digest(recipe: Settings) -> str:
    """SHA-256 of the resolved recipe: equal recipes, equal digests, whatever the YAML looked like."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def as_overrides(given: Mapping[str, Any]) -> list[str]:
    """What was given by options of a command's own, as `--set` takes it; None was not given. Texts are quoted, or a folder named 7 were a number."""
    return [
        f"{key}={json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
        for key, value in given.items()
        if value is not None
    ]


def override(tree: dict[str, Any], change: str, schema: type[BaseModel], option: str = "--set") -> None:
    """Put `a.b.c=value` (the value in YAML), given by an `option` of the command line, into `tree`, a recipe by `schema`; `~a.b.c` takes the
    key out. Raises RecipeError."""
    if change.startswith("~") and "=" not in change and (taken := change[1:].strip()):
        _take_out(tree, taken, schema, option)
        return
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        example = "trainer.adapt.steps=20" if option == "--set" else "min_clip=0.4"
        raise RecipeError(f"{option} takes key=value, not {change!r}", remedy=f"For example {option} {example}")
    *parents, last = key.strip().split(".")
    place: dict[str, Any] = tree
    for depth, name in enumerate(parents):
        if place.get(name) is None:
            place[name] = {}
        inner: Any = place[name]
        if not isinstance(inner, dict):
            raise RecipeError(f"{option} {key}: {'.'.join(parents[: depth + 1])} holds no keys", remedy="Set it whole")
        place = cast(dict[str, Any], inner)
    try:
        place[last] = parse_yaml(text, f"{option} {key}")
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"{option} {key}: the value {text!r} is not valid YAML", remedy="Quote it") from None


def _take_out(tree: dict[str, Any], key: str, schema: type[BaseModel], option: str) -> None:
    """A known key that the recipe leaves out is out already; one that nobody knows is a slip of the pen."""
    path, place = key.split("."), cast(Any, tree)
    for depth, name in enumerate(path):
        here = cast(dict[str, Any], place) if isinstance(place, dict) else {}
        if name not in here:
            known = _fields_at(schema, path[:depth])
            if name in known:
                return
            near = difflib.get_close_matches(name, {*map(str, here), *known}, n=1, cutoff=0.4)
            remedy = f"Did you mean {'.'.join([*path[:depth], near[0]])}?" if near else "Correct the name"
            told = ".".join(path[: depth + 1])
            raise RecipeError(f"{option} ~{key}: there is no key {told} to take out", remedy=remedy)
        if depth == len(path) - 1:
            del here[name]
        else:
            place = here[name]


def _explain(schema: type[BaseModel], error: ValidationError, where: str, changed: Sequence[str]) -> RecipeError:
    first = error.errors()[0]
    # A discriminated union puts its tag into the location; it is not a key of the file.
    path = [part for part in first["loc"] if isinstance(part, int) or not _is_tag(schema, first["loc"], part)]
    key = ".".join(str(part) for part in path)
    where = _blamed(key, where, changed)
    if first["type"] == "extra_forbidden":
        known = _fields_at(schema, path[:-1])
        if path[-1] in known:
            return RecipeError(f"{key} is no key of this kind", where=where, remedy=f"Take it out: --set ~{key}")
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.4)
        remedy = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(sorted(known))}"
        return RecipeError(f"{key} is not a known key", where=where, remedy=remedy)
    if first["type"] == "missing":
        return RecipeError(f"{key} is missing", where=where, remedy=_describe(schema, path) or "Add it")
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be", 1)
    kind, _, matter = first["type"].partition("_")
    if matter in ("type", "parsing", "from_float"):
        message = _PLAIN.get(kind, message)
    if first["type"] == "model_type":
        message = f"needs keys of its own, such as {', '.join(_fields_at(schema, path)[:4])}"
        return RecipeError(f"{key} {message}, not {first['input']!r}", where=where, remedy=_describe(schema, path))
    got = (
        "" if isinstance(first["input"], dict | list) or first["type"] == "value_error" else f", not {first['input']!r}"
    )
    said = "" if where == f"--set {key}" else f"{key or 'the recipe'}: "
    return RecipeError(f"{said}{message}{got}", where=where, remedy=_describe(schema, path))


def _blamed(key: str, where: str, changed: Sequence[str]) -> str:
    """Who gave `key` its value: an option of the command line, the file, or the file and an option that do not go together."""
    for name in reversed(changed):
        if f"{key}.".startswith(f"{name}."):
            return f"--set {name}"
        if f"{name}.".startswith(f"{key}.") or not key:
            return f"{where} with --set {name}"
    return where


def _is_tag(schema: type[BaseModel], location: tuple[int | str, ...], part: int | str) -> bool:
    parents = list(location[: location.index(part)])
    return bool(parents) and part not in _fields_at(schema, parents) and part in _tags_at(schema, parents)


def _models_at(schema: type[BaseModel], path: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that can stand at `path`: several where a `kind` chooses."""
    models: list[type[BaseModel]] = [schema]
    for part in path:
        inner = [m.model_fields[str(part)].annotation for m in models if str(part) in m.model_fields]
        if inner:
            models = [model for annotation in inner for model in models_in(annotation)]
    return models


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings that a field may hold, in whatever list, mapping or choice."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]


def _fields_at(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    return sorted({name for model in _models_at(schema, path) for name in model.model_fields})


def _tags_at(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    return [m.model_fields["kind"].default for m in _models_at(schema, path) if "kind" in m.model_fields]


def _describe(schema: type[BaseModel], path: Sequence[int | str]) -> str:
    for model in _models_at(schema, path[:-1]):
        field = model.model_fields.get(str(path[-1])) if path else None
        if field is not None and field.description:
            return f"It is: {field.description}"
    return ""


def _nearest_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.3)
    return f"Did you mean {path.parent / near[0]}?" if near else "Start from recipes/pocket.yaml"
