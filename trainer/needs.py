"""What training needs of a cluster, in the cluster's own words."""

from __future__ import annotations

from dataclasses import replace

from cluster.needs import Need, Phase, RunView
from cluster.places import TRAIN, StagePlace
from trainer.recipe import TrainerRecipe


def trainer_view(recipe: TrainerRecipe, view: RunView) -> RunView:
    """`view` with the training workers and the phases."""
    cluster = view.cluster
    place = cluster.stages.get(TRAIN, StagePlace())
    worker = Need(
        "train",
        TRAIN,
        cluster.train_workers,
        1.0 if place.cpus is None else place.cpus,
        float(place.gpus or 1) if cluster.trains_on_gpu() else 0.0,
        cluster.memory_gib.get(TRAIN, 0.0),
        cluster.train_workers_min,
        place.resources,
        place.labels,
    )
    phases = [(name, p) for name, p in (("adapt", recipe.adapt), ("distill", recipe.distill)) if p.steps]
    extras = {"eight-bit"} if any(p.optimiser == "adamw-8bit" for _, p in phases) else set[str]()
    extras |= {"lora"} if recipe.distill.lora and recipe.distill.steps else set()
    return replace(
        view,
        needs=(*view.needs, worker),
        phases=tuple(Phase(name, p.steps, p.batch_images, p.checkpoint_s) for name, p in phases),
        extras=view.extras | extras,
    )
