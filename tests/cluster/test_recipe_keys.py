"""What `edgefusion recipe` says of keys is what the schema does, and docs/recipe.md says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cluster.errors import RecipeError
from cluster.recipe import load_recipe
from cluster.recipe_keys import REQUIRED, recipe_groups, recipe_keys
from cluster.recipe_view import RUN, recipe_page
from edgefusion import DEFAULT_RECIPE, SCHEMAS, Recipe, app

RECIPES = sorted(DEFAULT_RECIPE.parent.glob("*.yaml"))
MISSING = object()


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return MISSING
        tree = tree[part]
    return tree


def test_the_page_is_up_to_date() -> None:
    page = DEFAULT_RECIPE.parent.parent / "docs" / "recipe.md"
    assert page.read_text() == recipe_page({RUN: Recipe, **SCHEMAS}), "write it anew: edgefusion recipe page"


@pytest.mark.parametrize("name", [RUN, *SCHEMAS])
def test_every_key_says_what_it_is(name: str) -> None:
    keys = recipe_keys({RUN: Recipe, **SCHEMAS}[name])
    assert keys and [key.key for key in keys if not key.description or not key.type] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_key_that_is_left_out_has_the_default_that_is_told(path: Path) -> None:
    """And one that can be left out is not called required. Of keys that depend on a kind, those of the recipe's kind."""
    tree = load_recipe(Recipe, path).model_dump(mode="json")
    tried = 0
    for group in recipe_groups(Recipe):
        kind = at(tree, f"{group.name}.kind")
        for key in group.keys:
            if at(tree, key.key) is MISSING or (key.kinds and kind not in key.kinds):
                continue
            without = json.loads(json.dumps(tree))
            (at(without, group.name) if group.name else without).pop(key.key.rpartition(".")[2])
            try:
                left = at(Recipe.model_validate(without).model_dump(mode="json"), key.key)
            except ValidationError:
                continue  # required, or does not go with what else the recipe says
            assert key.default != REQUIRED, key
            if left is MISSING:  # a key that is not written while it is left out, such as a phase's own data
                assert key.default == "null", key
            elif key.default:
                tried += 1
                assert key.default == left if isinstance(left, str) and left else json.loads(key.default) == left, key
    assert tried > 100


def test_every_key_of_the_shipped_recipes_is_listed() -> None:
    listed = {key.key for key in recipe_keys(Recipe)}

    def keys_of(tree: dict[str, Any], above: str) -> list[str]:
        found: list[str] = []
        for name, value in tree.items():
            key = f"{above}.{name}" if above else name
            found += [key, *(keys_of(value, key) if isinstance(value, dict) else [])]
        return found

    for path in RECIPES:
        found = keys_of(yaml.safe_load(path.read_text()), "")
        # Names of the user's own stand where the list says NAME.
        own = (
            "factory.views.",
            "factory.select.scores.",
            "cluster.memory_gib.",
            "cluster.stages.",
            "factory.make.teachers.",
        )
        assert [key for key in found if key not in listed and not key.startswith(own)] == []


def test_a_prefix_is_whole_names_and_any_name_stands_for_a_users_own() -> None:
    keys = [key.key for key in recipe_keys(Recipe, "trainer.adapt")]
    assert "trainer.adapt.steps" in keys and all(key.startswith("trainer.adapt") for key in keys)
    assert [key.key for key in recipe_keys(Recipe, "cluster.stages.render.gpus")] == ["cluster.stages.NAME.gpus"]
    assert {key.key for key in recipe_keys(Recipe, "export.sources")} >= {"export.sources[].licence"}
    for wrong, near in (
        ("steps", "trainer.adapt.steps"),
        ("trainer.distil", "trainer.distill"),
        ("qqq", "Leave the prefix"),
    ):
        with pytest.raises(RecipeError) as caught:
            recipe_keys(Recipe, wrong)
        assert near in str(caught.value)


def test_kinds_are_told_apart() -> None:
    found = {(key.key, key.kinds): key for key in recipe_keys(Recipe, "factory.plan.writer")}
    key = "factory.plan.writer.concurrent"
    assert found[key, ("vllm",)].default == "256" and found[key, ("openai",)].default == "16"
    batch = "factory.plan.writer.batch_prompts"
    assert [kinds for name, kinds in found if name == batch] == [("transformers",)], "nobody else reads it"
    (kind,) = recipe_keys(Recipe, "factory.plan.kind")
    assert (kind.type, kind.default) == ("written or file or pictures", "written")


def test_the_commands_print_a_table_json_and_a_verdict() -> None:
    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["recipe", *words], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    (line,) = [line for line in said("keys").splitlines() if line.startswith("trainer.distill.ddim_steps ")]
    assert all(words in line for words in ("whole number, at least 2, at most 1000", " 50 ", "solver grid"))
    (key,) = json.loads(said("keys", "trainer.distill.ddim_steps", "--json"))
    assert key["default"] == "50" and key["description"].startswith("solver grid")
    assert "teacher_guidance" in said("keys", "--of", "evaluate")
    assert ": right" in said("check", str(DEFAULT_RECIPE), "--set", "seed=3")
    resolved = yaml.safe_load(said("check", str(DEFAULT_RECIPE), "--set", "seed=3", "--resolved"))
    assert resolved == load_recipe(Recipe, DEFAULT_RECIPE, ["seed=3"]).model_dump(mode="json")
    with pytest.raises(RecipeError, match="--of nobody is not known"):
        CliRunner().invoke(app, ["recipe", "keys", "--of", "nobody"], catch_exceptions=False)
