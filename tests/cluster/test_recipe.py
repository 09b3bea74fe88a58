from pathlib import Path

import pytest
import yaml

from cluster.errors import RecipeError
from cluster.recipe import as_overrides, load_recipe, parse_yaml, recipe_digest
from edgefusion import DEFAULT_RECIPE, Recipe
from trainer.judging import EvaluateRecipe


def test_the_shipped_recipes_validate() -> None:
    recipes = sorted(DEFAULT_RECIPE.parent.glob("*.yaml"))
    assert {p.stem for p in recipes} >= {"pocket", "edgefusion"}
    for path in recipes:
        load_recipe(Recipe, path)


def test_overrides_are_typed_and_change_the_digest() -> None:
    plain, changed = (
        load_recipe(Recipe, DEFAULT_RECIPE),
        load_recipe(Recipe, DEFAULT_RECIPE, ["trainer.adapt.steps=21"]),
    )
    assert changed.trainer.adapt.steps == 21
    assert recipe_digest(plain) != recipe_digest(changed)
    assert recipe_digest(plain) == recipe_digest(load_recipe(Recipe, DEFAULT_RECIPE))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("factory.plan.promts=3", ["--set factory.plan.promts: ", "Did you mean prompts?"]),
        (
            "factory.plan.prompts=many",
            ["--set factory.plan.prompts: ", "should be a whole number, not 'many'", "prompts in all"],
        ),
        ("factory.plan.prompts=0", ["factory.plan.prompts", "greater than or equal to 1"]),
        ("factory.plan.writer.kind=gpt", ["factory.plan.writer", "'transformers'"]),
        ("factory.plan.writer.temprature=1", ["factory.plan.writer.temprature", "Did you mean temperature?"]),
        ("trainer.student=nano", ["trainer.student", "'tiny'"]),
        ("cluster.runner=slurm", ["cluster.runner", "'in-process'"]),
        ("export.targets=[onyx]", ["export.targets.0", "'onnx'"]),
        ("factory.make.unit_images=8", ["batch_images", "larger than make.unit_images"]),
        (
            "trainer.distill.guidance_max=1",
            ["pocket.yaml with --set trainer.distill.guidance_max: ", "below guidance_min"],
        ),
        ("name=../evil", ["name", "pattern"]),
        ("trainer.adapt", ["--set takes key=value"]),
        ("~ ", ["--set takes key=value"]),
        ("seed.x=1", ["seed", "holds no keys"]),
        ("name=2026-02-30", ["--set name", "is not valid YAML", "Quote it"]),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_the_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, DEFAULT_RECIPE, [override])
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["7", "yes", "a: b", "a #1", "[x", "~", "näh 'n\" \\"])
def test_what_an_option_gives_is_taken_as_text_whatever_yaml_would_make_of_it(name: str) -> None:
    given = {"data": Path(name), "judge": name, "count": 9, "prompts": None, "models": [name]}
    recipe = load_recipe(EvaluateRecipe, None, as_overrides(given))
    assert (recipe.data, recipe.judge, recipe.count, recipe.models) == (name, name, 9, [name])


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        load_recipe(Recipe, DEFAULT_RECIPE, ["trainer.adapt.steps=0", "trainer.distill.steps=0"])


def test_a_missing_key_and_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean .*pocket\.yaml"):
        load_recipe(Recipe, DEFAULT_RECIPE.with_name("pocke.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2")
    with pytest.raises(RecipeError, match="not valid YAML at line"):
        load_recipe(Recipe, broken)
    tree = yaml.safe_load(DEFAULT_RECIPE.read_text())
    del tree["factory"]["make"]["teacher"]["model"]
    broken.write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=r"factory\.make\.teacher\.model is missing"):
        load_recipe(Recipe, broken)


def test_a_key_is_taken_out_by_a_tilde() -> None:
    paper = DEFAULT_RECIPE.parent / "edgefusion.yaml"
    kind = ["factory.plan.writer.kind=openai", "factory.plan.writer.base_url=http://127.0.0.1:8000/v1"]
    with pytest.raises(
        RecipeError,
        match=r"writer.environment is no key of this kind. Take it out: --set ~factory.plan.writer.environment",
    ):
        load_recipe(Recipe, paper, kind)
    # The recipe does not say `answer`: what is out already is no mistake.
    recipe = load_recipe(Recipe, paper, [*kind, "~factory.plan.writer.environment", "~factory.plan.writer.answer"])
    assert recipe.factory.plan.kind == "written" and recipe.factory.plan.writer.kind == "openai"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("export.gates.clip_margn", ["no key export.gates.clip_margn to", "Did you mean export.gates.clip_margin?"]),
        ("factory.plan.writr.kind", ["no key factory.plan.writr to take out", "Did you mean factory.plan.writer?"]),
        ("cluster.stages.rendr.gpus", ["no key cluster.stages.rendr to", "Did you mean cluster.stages.render?"]),
        ("name.of", ["no key name.of to take out"]),
        ("xyz", ["no key xyz to take out", "Correct the name"]),
    ],
)
def test_a_key_that_is_not_there_to_be_taken_out_is_named(key: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, DEFAULT_RECIPE, ["cluster.stages.render.workers=1", f"~{key}"])
    assert [word for word in (f"--set ~{key}: ", *words) if word not in str(caught.value)] == []


DOUBLED = """\
name: twice
factory:
  plan: &plan
    prompts: 3
    extra: {a: 1, b: 2}
  select: {min_clip: 0.5}
  more:
  - {<<: *plan, prompts: 4}
"""


@pytest.mark.parametrize(
    ("line", "key", "lines"),
    [
        ("seed: 1\nseed: 2", "seed", "lines 9 and 10"),
        ("factory: {}", "factory", "lines 2 and 9"),
        ('"factory": {}', "factory", "lines 2 and 9"),
        ("  - {a: 1, b: {c: 1, c: 1}}", "factory.more.1.b.c", "line 9"),
        ("  deep:\n    1: x\n    0x1: y", "factory.deep.0x1", "lines 10 and 11"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, line: str, key: str, lines: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(f"{DOUBLED}{line}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path)
    assert str(caught.value) == f"{path}: {key} stands twice, at {lines}. Keep one of the two"


def test_words_are_no_truths(tmp_path: Path) -> None:
    """YAML 1.1 makes False of `off` and `no`, which are words of ours; a key that is a truth takes them as ever."""
    tree = parse_yaml("[off, no, yes, ON, true, False, trueish]", "here")
    assert tree == ["off", "no", "yes", "ON", True, False, "trueish"]
    path = tmp_path / "words.yaml"
    path.write_text(DEFAULT_RECIPE.read_text())
    words = ["cluster.log=off", "trainer.mixed_precision=no", "trainer.gradient_checkpointing=yes"]
    recipe = load_recipe(Recipe, path, words)
    assert recipe.cluster.log == "off" and recipe.trainer.mixed_precision == "no"
    assert recipe.trainer.gradient_checkpointing is True


def test_what_yaml_allows_is_read_as_yaml_reads_it() -> None:
    for text in (
        DOUBLED,
        "",
        "[a, a]",
        "a: &x {b: *x}",
        "1",
        *(p.read_text() for p in DEFAULT_RECIPE.parent.glob("*.yaml")),
    ):
        assert repr(parse_yaml(text, "here")) == repr(yaml.safe_load(text))
    for option in ("cluster.memory_gib={render: 1, render: 2}", "name=*x"):
        with pytest.raises(
            RecipeError, match=r"--set (cluster\.memory_gib: render stands twice|name: .*not valid YAML)"
        ):
            load_recipe(Recipe, DEFAULT_RECIPE, [option])


def test_a_tab_in_a_recipe_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tab.yaml").write_text("name: x\n\tseed: 1\n")
    with pytest.raises(RecipeError, match=r"not valid YAML at line 2: a tab\. Indent by spaces"):
        load_recipe(Recipe, tmp_path / "tab.yaml")
