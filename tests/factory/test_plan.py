from pathlib import Path

import pytest

from cluster.errors import RecipeError, TargetUnavailable
from factory import plan
from factory.plan import check_prompt, resolve_models, sample_id
from factory.recipe import DiffusersTeacher, FactoryRecipe
from factory.taxonomy import Group

GROUP = Group(name="things", share=3, attributes={"subject": ["fox", "owl", "key"], "background": ["red", "blue"]})


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a Fox on red", ""),
        ("", "empty"),
        ("an owl", "does not mention fox"),
        ("fox" * 200, "too long"),
        ("fox \x00", "odd"),
    ],
)
def test_a_prompt_must_say_what_it_is_about(prompt: str, wrong: str) -> None:
    found = check_prompt(prompt, GROUP, {"subject": "fox", "background": "red"})
    assert wrong in found and bool(wrong) == bool(found)


def test_an_id_is_what_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key of the teacher must stay out of the ids while it has its default, or every ledger would be made anew."""
    monkeypatch.setattr(plan, "fingerprint", lambda model, revision: "0" * 64)
    teacher = DiffusersTeacher(model="anything", steps=12, size_px=64)
    assert sample_id(teacher, "a red fox", 7) == "f3125e955179eb0aaac4c126cc6b8fb0c28c50ebce274304bfc18ffd3aa754fb"


RULES = {
    "caps": {"caps": [{"attributes": ["style", "gendr"], "most": 3}]},
    "wanted": {"wanted": [{"attributes": ["gendr"], "least": 3}]},
    "within": {"scores": {"clip_score": {"best_share": 0.5, "within": ["gendr"]}}},
}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("view", ["", "few"])
def test_a_rule_by_an_attribute_that_no_sample_will_have_is_refused_before_anything_is_made(
    rule: str, view: str
) -> None:
    tree = {
        "plan": {
            "taxonomy": "zoo:taxonomy.yaml",
            "prompts": 8,
            "writer": {"model": "zoo:writer", "kind": "transformers"},
        },
        "make": {"teacher": {"model": "zoo:teacher"}, "scorer": {"model": "zoo:clip"}},
        **({"views": {view: RULES[rule]}} if view else {"select": RULES[rule]}),
    }
    where = "factory.views.few" if view else "factory.select"
    with pytest.raises(RecipeError, match=rf"{where}: no sample will have an attribute gendr. Did you mean gender\?"):
        resolve_models(FactoryRecipe.model_validate(tree))
    good = {"caps": [{"attributes": ["group", "gender"], "most": 3}]}
    resolve_models(FactoryRecipe.model_validate({**tree, "views": {}, "select": good}))


def test_the_captioners_environment_is_looked_for_where_the_workers_run(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    captioner = {"kind": "vllm", "model": "zoo:captioner", "environment": str(tmp_path / "none")}
    tree = {
        "plan": {"kind": "pictures", "paths": [str(tmp_path / "pictures")]},
        "make": {"crop": {"size_px": 64}, "captioner": captioner, "scorer": {"model": "zoo:clip"}},
    }
    recipe = FactoryRecipe.model_validate(tree)
    with pytest.raises(TargetUnavailable, match=r"no Python environment .*none.*environment make vllm"):
        resolve_models(recipe)
    # A cluster's head may be another machine than those that caption.
    resolve_models(recipe, here=False)
