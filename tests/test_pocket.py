"""The shipped recipe on the shipped models, at reduced counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from chain import Chain, Recipe
from cluster.recipe import load_recipe

POCKET = Path(__file__).parent.parent / "recipes" / "pocket.yaml"


@pytest.mark.long
def test_the_shipped_pocket_recipe_runs_at_reduced_counts(tmp_path: Path) -> None:
    small = {
        "cluster.runner": "in-process",
        "factory.plan.prompts": 24,
        "factory.make.unit_images": 12,
        "factory.make.teacher.batch_images": 12,
        "trainer.adapt.steps": 2,
        "trainer.distill.steps": 2,
        "export.parity_prompts": 2,
        "export.calibration_prompts": 2,
    }
    chain = Chain(load_recipe(Recipe, POCKET, [f"{key}={value}" for key, value in small.items()]), tmp_path / "out")
    assert chain.run()
    assert chain.facts["funnel"]["kept"] >= 12
    assert (tmp_path / "out" / "report.html").exists()
