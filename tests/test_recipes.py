"""Every recipe that ships is one, and so is it with the changes that its own comments offer."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from chain import Recipe
from cluster.recipe import load_recipe

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


def test_the_five_data_sets_of_the_paper_are_described() -> None:
    assert {path.name for path, _ in OFFERED} >= {"edgefusion.yaml", "edgefusion-wild.yaml", "pocket-wild.yaml"}
    synt, wild = (
        load_recipe(Recipe, RECIPES[0].parent / f"{name}.yaml").factory for name in ("edgefusion", "edgefusion-wild")
    )
    assert synt.plan.kind == "written" and synt.plan.prompts == 62_300 and synt.view("synt-cur").people == "only"
    assert wild.plan.kind == "pictures" and wild.plan.download is not None and wild.make.captioner is not None
    assert wild.select.min_size_px == 300
