"""What building needs of the machine that starts the run, in the cluster's own words."""

from __future__ import annotations

from dataclasses import replace

from cluster.needs import RunView
from export.recipe import ExportRecipe
from export.targets.registry import find_target


def export_view(recipe: ExportRecipe, view: RunView) -> RunView:
    """`view` with the extras of the targets and of an NPU's compiler."""
    extras = {find_target(name).extra for name in recipe.targets} - {""}
    extras |= {"npu"} if recipe.tiling is not None and recipe.tiling.compile else set()
    return replace(view, extras=view.extras | extras)
