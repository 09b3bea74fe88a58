# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
"""Launches a training function in this process or on Ray Train workers; the function resumes by itself from its own checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connect import explain_work
from cluster.errors import EdgeFusionError, OutOfMemory, StageError
from cluster.events import NOWHERE, Events
from cluster.machine import stand_in
from cluster.places import TRAIN, StagePlace
from cluster.runner import ClusterRecipe, start_ray
from cluster.storage import publish_bytes
from cluster.tracing import flush

_LESS = (
    "Compute less at once (trainer.PHASE.accumulation, trainer.gradient_checkpointing=true), cut the weights up among workers "
    "(trainer.sharding=student), or say what a worker needs (cluster.memory_gib.train), so that fewer share a node; the same command then "
    "goes on from the last checkpoint"
)


def launch(
    train: Callable[[], None],
    recipe: ClusterRecipe,
    storage: Path,
    threads: int,
    use_gpu: bool,
    events: Events = NOWHERE,
) -> None:
    """Run `train` to its end; when a worker dies all begin again up to `max_failures` times. Raises StageError.

    With `train_workers_min` they may then be fewer, so `train` must take any number of workers. One that says OutOfMemory is not
    tried again: it would need as much.
    """
    if recipe.runner == "in-process":
        train()
        return
    start_ray(recipe)
    import ray.train
    from ray.train.torch import TorchTrainer

    # Ray restarts after any error. What one try notes here, those that follow repeat at once and open no model.
    gave_up = storage.resolve() / f"out-of-memory-{uuid.uuid4().hex}.json"

    folder = os.getcwd()

    def on_worker(_config: dict[str, Any]) -> None:
        stand_in(folder)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        own = ray.train.get_context()
        facts = {"rank": own.get_world_rank(), "workers": own.get_world_size()}
        with events.during("training worker", **facts) as inner, inner.listening():
            repeat_error(gave_up)
            try:
                train()
            except OutOfMemory as error:
                note_error(gave_up, error)
                raise
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
        raise own_error(error) from error
    finally:
        with contextlib.suppress(OSError):
            gave_up.unlink(missing_ok=True)


def note_error(path: Path, error: OutOfMemory) -> None:
    """Keep what `repeat_error` raises. A disk that takes no note costs further tries, not the error."""
    with contextlib.suppress(OSError):
        publish_bytes(path, json.dumps({"what": error.what, "where": error.where, "remedy": error.remedy}).encode())


def repeat_error(path: Path) -> None:
    """Raises the OutOfMemory that was noted in `path`, if one was."""
    if path.exists():
        said: dict[str, str] = json.loads(path.read_text())
        raise OutOfMemory(said["what"], where=said["where"], remedy=said["remedy"])


def own_error(error: BaseException) -> EdgeFusionError:
    """The error of ours inside Ray's wrapping, if there is one; else in our words what Ray says of a machine without memory or space."""
    found = _inside(error)
    ours = [one for one in found if isinstance(one, EdgeFusionError)]
    # When one worker runs out, the others fail too, at what they were exchanging with it.
    ours.sort(key=lambda one: not isinstance(one, OutOfMemory))
    if ours:
        return ours[0]
    names = {kind.__name__ for one in found for kind in type(one).__mro__}
    text = "\n".join(str(one) for one in found)
    if "OutOfMemoryError" in names or any(word in text for word in ("OutOfMemoryError", "running low on memory")):
        return StageError(
            "Ray ended a training worker, for its node ran out of memory", where="cluster.memory_gib", remedy=_LESS
        )
    if known := next(filter(None, map(explain_work, found)), None):
        return known
    if names & {"RayActorError", "ActorDiedError", "WorkerCrashedError", "NodeDiedError"}:
        return StageError(
            "a training worker died without a word: its node was lost, or the system ended it, most often because memory ran out "
            "(dmesg on its node tells)",
            where="cluster",
            remedy=f"Run the same command again to resume. If it was memory: {_LESS[0].lower()}{_LESS[1:]}",
        )
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return StageError(f"training failed: {last[0]}", remedy="Run the same command again to resume; --debug shows all")


def _inside(error: BaseException) -> list[BaseException]:
    """The error, those of all workers that it tells of, and what each came of."""
    found: list[BaseException] = []
    todo: list[object] = [error]
    while todo:
        one = todo.pop(0)
        if not isinstance(one, BaseException) or any(one is known for known in found):
            continue
        found.append(one)
        failures: dict[int, BaseException] = getattr(one, "worker_failures", {})
        causes = (getattr(one, name, None) for name in ("controller_failure", "cause", "__cause__"))
        todo += [*failures.values(), *causes]
    return found
