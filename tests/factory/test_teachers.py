"""Several teachers of one plan: shares met in every group, each picture drawn by its own, each model opened once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RecipeError
from cluster.runner import InProcess
from factory.card import write_card
from factory.make import make, packed_samples, select_and_pack
from factory.models import image
from factory.plan import make_plan, resolve_models
from factory.recipe import FactoryRecipe, MakeRecipe
from factory.teachers import share_out
from factory.units import read_table


def recipe_of(models: Path, prompts: Path, **keys: Any) -> FactoryRecipe:
    teacher = {"model": str(models / "teacher"), "size_px": 64, "batch_images": 4}
    return FactoryRecipe.model_validate(
        {
            "plan": {
                "kind": "file",
                "paths": [str(prompts)],
                "group_column": "group",
                "attribute_columns": keys.pop("columns", ["style"]),
            },
            "make": {
                "teachers": {
                    "sharp": {**teacher, "steps": 2, "share": 3},
                    "quick": {**teacher, "steps": 1, "sampler": "ddim"},
                },
                "scorer": {"model": str(models / "clip")},
                "unit_images": 8,
                **keys,
            },
            "select": {"min_clip": -1, "max_hamming_bits": 0, "caps": [{"attributes": ["teacher"], "most": 5}]},
        }
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    words = [f"{name} {i}" for name in ("fox", "owl", "key") for i in range(8)]
    rows = [{"prompt": f"a {w}", "group": "abc"[i % 3], "style": "flat"} for i, w in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_small_share_is_met_though_every_draw_is_small() -> None:
    shares = {"common": {"model": "a", "share": 9}, "rare": {"model": "b", "share": 1}}
    make_part = MakeRecipe.model_validate({"teachers": shares, "scorer": {"model": "c"}})
    once = Counter(share_out(make_part, ["g"] * 1000, "0"))
    assert abs(once["rare"] - 100) <= 1
    often = Counter(name for part in range(500) for name in share_out(make_part, ["g"] * 3, str(part)))
    assert 110 < often["rare"] < 190  # 150 expected of 1,500
    both = share_out(make_part, ["g", "h"] * 200, "0")
    assert all(abs(Counter(both[start::2])["rare"] - 20) <= 1 for start in (0, 1))
    assert both == share_out(make_part, ["g", "h"] * 200, "0") != share_out(make_part, ["g", "h"] * 200, "1")


def test_from_the_plan_to_the_card(
    tiny_models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    start = image.Painter.__init__

    def counted(self: image.Painter, recipe: Any, *given: Any) -> None:
        opened.append(recipe.steps)
        start(self, recipe, *given)

    monkeypatch.setattr(image.Painter, "__init__", counted)
    recipe, out = recipe_of(tiny_models, prompts), tmp_path / "data"
    rows = read_table(make_plan(recipe, 0, out)).to_pylist()
    named = [json.loads(row["attributes"])["teacher"] for row in rows]
    assert named == ["sharp"] * 18 + ["quick"] * 6 and len({row["id"] for row in rows}) == 24
    for group in "abc":
        assert Counter(n for n, row in zip(named, rows, strict=True) if row["group"] == group) == {
            "sharp": 6,
            "quick": 2,
        }
    make(recipe, out, InProcess())
    assert opened == [2, 1]  # one after the other, though the third unit is of both
    funnel = select_and_pack(recipe, out)
    assert funnel["planned"] == 24 == funnel["kept"] + funnel["rejected"] + funnel["dead"]
    assert funnel["reasons"]["rejected: over the cap"] >= 13  # of 18 by `sharp`, five stay at most
    ids = {row["id"] for row in rows}
    facts = [sample.facts for sample in packed_samples(recipe, out, ids, recipe.select)]
    assert Counter(fact["attributes"]["teacher"] for fact in facts) == {"sharp": 18, "quick": 6}
    write_card(out, recipe, funnel, "two")
    card = (out / "README.md").read_text()
    assert "pictures, sharp (75%)" in card and "pictures, quick (25%)" in card
    based_on = json.loads((out / "croissant.json").read_text())["isBasedOn"]
    assert [part["description"] for part in based_on if "pictures," in part["description"]] == [
        "pictures, sharp (75%)",
        "pictures, quick (25%)",
    ]

    # The same row by the other teacher is another picture, and the very same by the same one.
    alone = recipe_of(
        tiny_models, prompts, teachers={}, teacher={**recipe.make.teachers["quick"].model_dump(exclude={"share"})}
    )
    own = {row["prompt"]: row["id"] for row in read_table(make_plan(alone, 0, tmp_path / "alone")).to_pylist()}
    assert all((own[row["prompt"]] == row["id"]) == (name == "quick") for row, name in zip(rows, named, strict=True))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher": {"model": "x", "size_px": 64, "batch_images": 4}}, "one or the other"),
        ({"unit_images": 2}, r"make\.teachers\.sharp\.batch_images"),
        (
            {
                "teachers": {
                    "a": {"model": "x", "batch_images": 1},
                    "b": {"model": "x", "size_px": 64, "batch_images": 1},
                }
            },
            "size_px",
        ),
        ({"teachers": {"a": {"model": "x", "share": 0}}}, "greater than 0"),
        ({"teachers": {}}, "who is to draw"),
    ],
)
def test_what_cannot_be_combined(keys: dict, words: str, tiny_models: Path, prompts: Path) -> None:
    with pytest.raises(ValueError, match=words):
        recipe_of(tiny_models, prompts, **keys)


def test_the_name_teacher_belongs_to_them(tiny_models: Path, prompts: Path) -> None:
    with pytest.raises(RecipeError, match="attribute `teacher`"):
        resolve_models(recipe_of(tiny_models, prompts, columns=["teacher"]))
