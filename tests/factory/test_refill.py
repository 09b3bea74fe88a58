"""From what lacks to a new plan, its units and a selection that lacks no more. The pocket writer writes the prompts."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import EdgeFusionError, LedgerConflict, RecipeError
from cluster.recipe import load_recipe
from factory.cli import _FactoryPart
from factory.ledger import commit_unit
from factory.make import select_and_pack
from factory.pack import MANIFEST
from factory.plan import PLAN
from factory.recipe import FactoryRecipe, SharingTeacher
from factory.refill import Lacking, draw_refill, parse_list, plan_refill
from factory.stages import encode_picture, looks
from factory.taxonomy import load_taxonomy
from factory.units import plan_units, planned_units, read_table
from factory.verify import verify

TWO = [
    {"group": "objects", "attributes": {"background": "red", "style": "flat"}, "lacking": 3, "plan": 5},
    {"group": "professions", "attributes": {"gender": "woman"}, "lacking": 2, "plan": 4},
]


@pytest.fixture
def recipe(dataset: Path) -> FactoryRecipe:
    return load_recipe(_FactoryPart, dataset.parent / "recipe.yaml").factory


def write_list(folder: Path, rows: list[dict]) -> Path:
    path = folder / "lacking.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_by_hand(folder: Path) -> None:
    """What make would do with the units that the ledger lacks, with noise for pictures."""
    rng = np.random.default_rng(9)
    for unit in planned_units(folder, 8):
        if not (folder / "ledger" / f"{unit.id}.parquet").exists():
            rows = []
            for row in unit.rows:
                picture = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
                made = {
                    "picture": encode_picture(picture, "png"),
                    "clip_score": 0.9,
                    "embedding": b"",
                    **looks(picture),
                }
                rows.append({**row, **(made if row["outcome"] == "pending" else {})})
            commit_unit(folder, rows)


def test_what_lacks_is_planned_made_and_no_longer_lacks(dataset: Path, recipe: FactoryRecipe) -> None:
    before = [path.read_bytes() for path in sorted((dataset / "ledger").iterdir())]
    select_and_pack(recipe, dataset)
    plan = (dataset / PLAN).read_bytes()
    listed = write_list(dataset, TWO)
    final, samples = plan_refill(recipe, 7, dataset, listed)
    rows = read_table(final).to_pylist()
    assert final.name == "plan-refill-0001.parquet" and (dataset / PLAN).read_bytes() == plan
    assert len(rows) == 9 and samples == sum(row["outcome"] == "pending" for row in rows) >= 7
    for row, group in zip(rows, ["objects"] * 5 + ["professions"] * 4, strict=True):
        attributes = json.loads(row["attributes"])
        wanted = TWO[0 if group == "objects" else 1]["attributes"]
        assert row["group"] == group and {name: attributes[name] for name in wanted} == wanted
        assert attributes["subject"].lower() in row["prompt"].lower() or row["outcome"] == "dead"
    assert not (dataset / MANIFEST).exists(), "the data set is unfinished now"
    assert [name for name, _ in plan_units(dataset, 8)] == [f"unit-{i:05d}" for i in range(5)]
    make_by_hand(dataset)
    assert [path.read_bytes() for path in sorted((dataset / "ledger").iterdir())][:3] == before
    rules = recipe.select.model_validate({"wanted": [{"attributes": ["background", "style"], "least": 3}]})
    funnel = select_and_pack(recipe, dataset, rules)
    assert funnel["planned"] == 33 == funnel["kept"] + funnel["rejected"] + funnel["dead"]
    assert verify(dataset) == funnel["kept"]
    lacking = (
        [json.loads(line) for line in (dataset / "refill.jsonl").read_text().splitlines()]
        if (dataset / "refill.jsonl").exists()
        else []
    )
    assert {"background": "red", "style": "flat"} not in [
        row["attributes"] for row in lacking if row["group"] == "objects"
    ]


def test_the_same_list_is_planned_once_and_to_the_same_rows(dataset: Path, recipe: FactoryRecipe) -> None:
    listed = write_list(dataset, TWO)
    first = plan_refill(recipe, 7, dataset, listed)[0]
    rows = read_table(first)
    with pytest.raises(EdgeFusionError, match=r"planned before \(plan-refill-0001"):
        plan_refill(recipe, 7, dataset, listed)
    first.unlink()
    for part in (dataset / "plan").iterdir():
        part.unlink()
    assert read_table(plan_refill(recipe, 7, dataset, listed)[0]).equals(rows)


def test_nothing_is_planned_under_a_training(dataset: Path, recipe: FactoryRecipe) -> None:
    (dataset.parent / "training").mkdir()
    with pytest.raises(LedgerConflict, match="training"):
        plan_refill(recipe, 7, dataset, write_list(dataset, TWO))
    assert not list(dataset.glob("plan-refill-*"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "line 1 is no JSON object"),
        (json.dumps({"group": "objects", "attributes": {}}), "plan is missing"),
        (json.dumps({**TWO[0], "group": "animals"}), "no group animals"),
        (json.dumps({**TWO[0], "attributes": {"background": "plaid"}}), "no background that is plaid"),
        (json.dumps({**TWO[0], "attributes": {"teacher": "quick"}}), "no teacher that is quick"),
        ("", "lists nothing"),
    ],
)
def test_a_list_that_does_not_fit_says_so(line: str, told: str, recipe: FactoryRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        rows = parse_list(line.encode(), tmp_path / "x.jsonl")
        draw_refill(rows, load_taxonomy("zoo:taxonomy.yaml"), recipe, "mark")


def test_a_list_of_what_the_taxonomy_excludes_is_refused_in_words(recipe: FactoryRecipe) -> None:
    taxonomy = load_taxonomy("zoo:taxonomy.yaml")
    strict = taxonomy.model_copy(update={"exclude": [{"background": "red", "style": "flat"}]})
    excluded = Lacking(group="objects", attributes={"background": "red", "style": "flat"}, plan=3)
    with pytest.raises(RecipeError, match="excludes every combination"):
        draw_refill([excluded], strict, recipe, "mark")
    other = excluded.model_copy(update={"attributes": {"background": "red"}, "plan": 4})
    assert len(draw_refill([excluded, other], strict, recipe, "mark")) == 4


def test_what_lacks_of_a_teacher_is_planned_for_it(dataset: Path, recipe: FactoryRecipe) -> None:
    own = recipe.make.teacher
    assert own is not None
    teachers = {
        name: SharingTeacher(**{**own.model_dump(), "steps": steps}) for name, steps in (("sharp", 2), ("quick", 1))
    }
    several = recipe.model_copy(update={"make": recipe.make.model_copy(update={"teacher": None, "teachers": teachers})})
    wanted = {**TWO[0], "attributes": {**TWO[0]["attributes"], "teacher": "quick"}}
    written, samples = plan_refill(several, 7, dataset, write_list(dataset, [wanted]))
    rows = [json.loads(text) for text in read_table(written, ["attributes"])["attributes"].to_pylist()]
    assert len(rows) >= samples >= 1
    assert all(wanted["attributes"].items() <= row.items() for row in rows)
    with pytest.raises(RecipeError, match="no slow"):
        draw_refill(
            [Lacking(group="objects", attributes={"teacher": "slow"}, plan=1)],
            load_taxonomy("zoo:taxonomy.yaml"),
            several,
            "mark",
        )
