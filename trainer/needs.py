"""What training needs of a cluster, in the cluster's own words."""

from __future__ import annotations

from dataclasses import replace

from cluster.needs import Need, Phase, RunView
from trainer.recipe import TrainerRecipe


def trainer_view(recipe: TrainerRecipe, view: RunView) -> RunView:
    """`view` with the training workers and the phases."""
    cluster = view.cluster
    gpus, memory = float(cluster.trains_on_gpu()), cluster.memory_gib.get("train", 0.0)
    phases = (("adapt", recipe.adapt), ("distill", recipe.distill))
    return replace(
        view,
        needs=(*view.needs, Need("train", "train", cluster.train_workers, 1.0, gpus, memory)),
        phases=tuple(Phase(name, p.steps, p.batch_images, p.checkpoint_s) for name, p in phases if p.steps),
    )
