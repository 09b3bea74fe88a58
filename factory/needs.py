"""What `make` needs of a cluster, in the cluster's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.needs import RunView, need_of
from factory.recipe import FactoryRecipe
from factory.stages import make_stages

_OWN_SERVER = ("environment", "server", "revision")
_ANOTHER_SERVER = (
    "factory.plan.writer.kind=openai",
    "factory.plan.writer.base_url={url}",
    "factory.plan.writer.key_variable=OPENAI_API_KEY",
)
"""The launch files give such a server's key by that name."""
_SCORERS = {"nsfw": "scorers", "faces": "scorers", "text": "text"}
"""Scorers by the extra that brings their packages."""


def factory_view(recipe: FactoryRecipe, view: RunView) -> RunView:
    """`view` with the factory's workers, samples and, if vLLM writes the prompts, what it would take to serve it elsewhere."""
    needs = tuple(need_of("make", stage, view.cluster) for stage in make_stages(recipe.make, Path()))
    plan, captioner = recipe.plan, recipe.make.captioner
    view = replace(view, extras=view.extras | _extras(recipe))
    if captioner is not None and captioner.kind == "vllm":
        view = replace(view, own_vllm="caption", own_vllm_settings=("factory.make.captioner.environment={folder}",))
    if plan.kind != "written":
        each = plan.images_per_prompt if plan.kind == "file" else 1
        samples = (plan.limit or 0) * each
        return replace(view, needs=view.needs + needs, samples=samples, unit_images=recipe.make.unit_images)
    served = plan.writer.kind == "vllm"
    own = [name for name in _OWN_SERVER if name in view.tree["factory"]["plan"]["writer"]] if served else []
    return replace(
        view,
        launch_tree=_without_own_server(view.tree) if served else None,
        needs=view.needs + needs,
        samples=plan.prompts * plan.images_per_prompt,
        unit_images=recipe.make.unit_images,
        vllm_model=plan.writer.model if served else "",
        vllm_revision=getattr(plan.writer, "revision", None) if served else None,
        server_settings=_ANOTHER_SERVER if served else (),
        server_drops=tuple(f"~factory.plan.writer.{name}" for name in own),
    )


def _without_own_server(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what says how the run serves vLLM for itself: launch files bring a server of their own, and another `kind`."""
    factory = tree["factory"]
    writer = {k: v for k, v in factory["plan"]["writer"].items() if k not in _OWN_SERVER}
    return {**tree, "factory": {**factory, "plan": {**factory["plan"], "writer": writer}}}


def _extras(recipe: FactoryRecipe) -> set[str]:
    found = {_SCORERS[one.kind] for one in recipe.make.scores if one.kind in _SCORERS}
    urls = recipe.plan.kind == "pictures" and recipe.plan.download is not None
    return found | ({"urls"} if urls else set())
