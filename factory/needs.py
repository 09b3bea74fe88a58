"""What `make` needs of a cluster, in the cluster's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.needs import Need, RunView
from factory.recipe import FactoryRecipe
from factory.stages import make_stages


def factory_view(recipe: FactoryRecipe, view: RunView) -> RunView:
    """`view` with the factory's workers, samples and, if vLLM writes the prompts, what it would take to serve it elsewhere."""
    memory = view.cluster.memory_gib
    stages = make_stages(recipe.make, Path())
    needs = tuple(Need("make", s.name, s.workers, s.cpus, s.gpus, memory.get(s.name, 0.0)) for s in stages)
    plan = recipe.plan
    if plan.kind == "pictures":
        return replace(view, needs=view.needs + needs, samples=plan.limit or 0, unit_images=recipe.make.unit_images)
    served = plan.writer.kind == "vllm"
    return replace(
        view,
        needs=view.needs + needs,
        samples=plan.prompts * plan.images_per_prompt,
        unit_images=recipe.make.unit_images,
        vllm_model=plan.writer.model if served else "",
        server_settings=("factory.plan.writer.kind=openai", "factory.plan.writer.base_url={url}") if served else (),
    )
