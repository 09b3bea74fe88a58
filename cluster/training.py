# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
"""Launches a training function in this process or on Ray Train workers; the function resumes by itself from its own checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError, StageError
from cluster.events import NOWHERE, Events
from cluster.places import TRAIN, StagePlace
from cluster.runner import ClusterRecipe, start_ray
from cluster.tracing import flush


def launch(
    train: Callable[[], None],
    recipe: ClusterRecipe,
    storage: Path,
    threads: int,
    use_gpu: bool,
    events: Events = NOWHERE,
) -> None:
    """Run `train` to its end; when a worker dies all begin again up to `max_failures` times. Raises StageError.

    With `train_workers_min` they may then be fewer, so `train` must take any number of workers.
    """
    if recipe.runner == "in-process":
        train()
        return
    start_ray(recipe)
    import ray.train
    from ray.train.torch import TorchTrainer

    def on_worker(_config: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        own = ray.train.get_context()
        facts = {"rank": own.get_world_rank(), "workers": own.get_world_size()}
        with events.during("training worker", **facts) as inner, inner.listening():
            train()
        flush()

    # What Ray Train asks for by itself, said aloud once memory is to be counted too.
    memory, place = recipe.memory_bytes(TRAIN), recipe.stages.get(TRAIN, StagePlace())
    each = {"CPU": 1.0 if place.cpus is None else place.cpus, **place.resources}
    each |= {"GPU": float(place.gpus or 1)} if use_gpu else {}
    each |= {"memory": float(memory)} if memory else {}
    fewest = recipe.train_workers_min
    trainer = TorchTrainer(
        on_worker,
        train_loop_config={},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, recipe.train_workers) if fewest else recipe.train_workers,
            use_gpu=use_gpu,
            resources_per_worker=each,
            label_selector=dict(place.labels) or None,
            placement_strategy=recipe.train_placement.upper(),
        ),
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=recipe.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _own_error(error) from error


def _own_error(error: BaseException) -> EdgeFusionError:
    """The error of ours inside Ray's wrapping, if there is one."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, EdgeFusionError):
            return inner
        failures: dict[int, BaseException] = getattr(inner, "worker_failures", {})
        following = next(iter(failures.values()), None) or getattr(inner, "cause", None) or inner.__cause__
        inner = following if following is not inner else None
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return StageError(f"training failed: {last[0]}", remedy="Run the same command again to resume; --debug shows all")
