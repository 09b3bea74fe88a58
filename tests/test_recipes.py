"""Every recipe that ships is one, and so is it with the changes that its own comments offer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from chain import RUN, Chain, Recipe
from cluster.errors import LedgerConflict, RecipeError
from cluster.recipe import load_recipe
from factory.cli import _factory_part
from factory.plan import PLAN

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
OFFERED = [
    (path, line)
    for path in RECIPES
    for line in re.findall(r"^#.*?(--set .*?)(?:     .*)?$", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_it_is_a_recipe(path: Path) -> None:
    assert load_recipe(Recipe, path).name == path.stem


@pytest.mark.parametrize(
    ("path", "line"), OFFERED, ids=lambda v: v.name if isinstance(v, Path) else v.split("=")[0][6:]
)
def test_what_its_comments_offer_is_one_too(path: Path, line: str) -> None:
    words = shlex.split(line.rstrip("`."))
    changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert changes and load_recipe(Recipe, path, changes) != load_recipe(Recipe, path)


def test_a_run_that_an_earlier_version_began_goes_on_and_another_recipes_does_not(tmp_path: Path) -> None:
    """A key that came since, at its default, is no other recipe."""
    recipe = load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml")
    tree = recipe.model_dump(mode="json")
    assert tree["trainer"].pop("loaders") and tree["factory"]["pack"].pop("to") is None
    facts = {"recipe": tree, "seconds": {}}
    (tmp_path / RUN).write_text(json.dumps(facts))
    assert Chain(recipe, tmp_path).facts["recipe"] == recipe.model_dump(mode="json")
    (tmp_path / RUN).write_text(json.dumps({**facts, "recipe": {**tree, "seed": 8}}))
    with pytest.raises(LedgerConflict, match="another recipe: seed is 8 there and 7 now"):
        Chain(recipe, tmp_path)
    (tmp_path / RUN).write_text("[]")
    with pytest.raises(LedgerConflict, match="cannot be read"):
        Chain(recipe, tmp_path)


def test_keys_that_nothing_reads_any_more_part_no_recipe(tmp_path: Path) -> None:
    """An earlier version wrote the batch sizes of transformers into the recipe of every writer and captioner."""
    recipe = load_recipe(Recipe, RECIPES[0].parent / "edgefusion-wild.yaml")
    tree = recipe.model_dump(mode="json")
    captioner = tree["factory"]["make"]["captioner"]
    assert captioner["kind"] == "vllm" and captioner.pop("concurrent")
    captioner["batch_pictures"] = 32
    (tmp_path / RUN).write_text(json.dumps({"recipe": tree, "seconds": {}}))
    assert Chain(recipe, tmp_path).facts["recipe"] == recipe.model_dump(mode="json")
    data = tmp_path / "dataset"
    data.mkdir()
    (data / PLAN).touch()
    assert _factory_part(data, None, []).factory == recipe.factory
    with pytest.raises(RecipeError, match="batch_pictures"):
        load_recipe(Recipe, RECIPES[0].parent / "edgefusion-wild.yaml", ["factory.make.captioner.batch_pictures=32"])


def test_while_it_trains_only_what_decides_no_weight_may_change(tmp_path: Path) -> None:
    def recipe(*changes: str) -> Recipe:
        return load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml", changes)

    (tmp_path / "training").mkdir()
    (tmp_path / RUN).write_text(json.dumps({"recipe": recipe().model_dump(mode="json"), "seconds": {}}))
    idle = (
        "trainer.loaders=0",
        "trainer.adapt.checkpoint_s=5",
        "trainer.distill.on_spike=rollback",
        "trainer.threads=1",
    )
    Chain(recipe(*idle), tmp_path)
    for change in ("trainer.adapt.learning_rate=7", "trainer.grid_seed=5", "trainer.encodings=ignore"):
        with pytest.raises(LedgerConflict, match=f"another recipe: {change.split('=')[0]} is"):
            Chain(recipe(change), tmp_path)


def _begun(folder: Path, *changes: str) -> None:
    recipe = load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml", changes)
    (folder / RUN).write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "seconds": {}}))


_URLS = (
    "factory.plan={kind: pictures, paths: [urls.txt], download: {}}",
    "factory.make.teacher=null",
    "factory.make.captioner={kind: transformers, model: 'zoo:captioner'}",
    "factory.make.scores=[{kind: aesthetic, weights: 'zoo:x', clip: {model: 'zoo:clip'}}]",
)
_SHARED = ("factory.make.teacher=null", "factory.make.teachers={a: {model: 'zoo:teacher', size_px: 64}}")


@pytest.mark.parametrize(
    ("begun", "changes"),
    [
        (
            _URLS,
            [
                *(f"factory.plan.download.{key}" for key in ("max_failed_share=1", "failed_after=9", "timeout_s=99")),
                *(f"factory.plan.download.{key}" for key in ("tries=9", "back_off_s=9", "concurrent=9", "per_host=9")),
                "factory.make.captioner.allow_pickle=true",
                "factory.make.captioner.device=cuda",
                "factory.make.scores=[{kind: aesthetic, weights: 'zoo:x', clip: {model: 'zoo:clip', allow_pickle: true}}]",
            ],
        ),
        (_SHARED, ["factory.make.teachers.a.allow_pickle=true"]),
        (
            (),
            [
                *(f"factory.{model}.allow_pickle=true" for model in ("plan.writer", "make.teacher", "make.scorer")),
                *(f"factory.make.{key}" for key in ("render_gpus=1", "render_workers=9", "score_gpus=0.5")),
                "factory.plan.writer.device=cpu",
            ],
        ),
    ],
)
def test_what_errors_say_to_change_may_change_in_the_same_folder(
    tmp_path: Path, begun: tuple[str, ...], changes: list[str]
) -> None:
    _begun(tmp_path, *begun)
    for change in changes:
        changed = load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml", [*begun, change])
        assert Chain(changed, tmp_path).facts["recipe"] == changed.model_dump(mode="json")
    other = load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml", [*begun, "factory.make.unit_images=32"])
    with pytest.raises(LedgerConflict, match=r"factory\.make\.unit_images is"):
        Chain(other, tmp_path)


def test_a_run_that_was_killed_before_it_wrote_its_first_file_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml")
    for name in ("claim-000001.json", f".{RUN}.partial-1-abcd", ".claim-000002.json.partial-1-abcd"):
        (tmp_path / name).touch()
    assert Chain(recipe, tmp_path).facts["seconds"] == {}
    (tmp_path / "claim-thesis.txt").touch()
    with pytest.raises(LedgerConflict, match="holds no run"):
        Chain(recipe, tmp_path)


def test_pages_of_builds_that_are_made_anew_are_made_anew_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else compare.html and the demo would show the student before, beside a report of the new one."""
    ran: list[str] = []
    chain = Chain(load_recipe(Recipe, RECIPES[0].parent / "pocket.yaml"), tmp_path)
    (tmp_path / RUN).write_text(json.dumps({**chain.facts, "funnel": {}}))
    monkeypatch.setattr(Chain, "_holds_decisions", lambda self: True)
    for step in Chain.STEPS:
        monkeypatch.setattr(Chain, f"_{step}", lambda self, bars, step=step: ran.append(step))
    for name in ("dataset/plan.parquet", "dataset/manifest.parquet", "student/x", "samples/x", "demo/demo.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("compare.html", "report.html"):
        (tmp_path / name).touch()
    assert chain.run()
    assert ran == ["export", "pages", "report"] and not (tmp_path / "demo").exists()


def test_the_five_data_sets_of_the_paper_are_described() -> None:
    assert {path.name for path, _ in OFFERED} >= {"edgefusion.yaml", "edgefusion-wild.yaml", "pocket-wild.yaml"}
    synt, wild = (
        load_recipe(Recipe, RECIPES[0].parent / f"{name}.yaml").factory for name in ("edgefusion", "edgefusion-wild")
    )
    assert synt.plan.kind == "written" and synt.plan.prompts == 62_300 and synt.view("synt-cur").people == "only"
    assert wild.plan.kind == "pictures" and wild.plan.download is not None and wild.make.captioner is not None
    assert wild.select.min_size_px == 300
