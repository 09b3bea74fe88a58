"""A training that needs more memory than there is: what to change, said by key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from cluster.errors import OutOfMemory
from factory.models.memory import is_out_of_memory
from trainer.progress import is_finished
from trainer.recipe import DecoderRecipe, TrainerRecipe

Given = ParamSpec("Given")
Found = TypeVar("Found")


def explains_memory(explain: Callable[..., OutOfMemory]) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """For a function that raises `explain(error, *its arguments)` in place of what torch raises when memory is short."""

    def around(work: Callable[Given, Found]) -> Callable[Given, Found]:
        @functools.wraps(work)
        def guarded(*given: Given.args, **named: Given.kwargs) -> Found:
            try:
                return work(*given, **named)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise explain(error, *given, **named) from error

        return guarded

    return around


def explain_training(
    error: BaseException, recipe: TrainerRecipe, data: object, folder: Path, *_: object, **__: object
) -> OutOfMemory:
    """What ran out in the first phase of `folder` that has no result, and the keys that take less, the cheapest first."""
    phase = next((phase for phase in recipe.phases_run() if not is_finished(folder, phase)), "")
    if not phase:  # nothing was to be trained any more
        return OutOfMemory(f"{_device()} is out of memory ({_said(error)})", where="trainer", remedy="Free some of it")
    settings, less = getattr(recipe, phase), list[str]()
    if settings.batch_images > settings.accumulation:
        less.append(
            f"set trainer.{phase}.accumulation to a larger divisor of a worker's images (it is {settings.accumulation})"
        )
    if not recipe.gradient_checkpointing:
        less.append("set trainer.gradient_checkpointing=true")
    if recipe.sharding != "all":
        less.append(f"use several workers and trainer.sharding={'student' if recipe.sharding == 'none' else 'all'}")
    less.append("or use a device with more memory")
    if not torch.cuda.is_available():
        less.append("and say what a worker needs (cluster.memory_gib.train), so that fewer share a node")
    # These change which training it is, so they want a folder of their own.
    anew = [f"trainer.{phase}.optimiser=adamw-8bit"] if settings.optimiser != "adamw-8bit" else []
    anew += ["trainer.teacher_dtype=bfloat16"] if recipe.teacher_dtype == "float32" else []
    anew.append("a smaller trainer.size_px or batch_images")
    first = less[0][0].upper() + less[0][1:]
    return OutOfMemory(
        f"{_device()} is out of memory in {phase} with {settings.batch_images} images a batch in {settings.accumulation} "
        f"part{'s' * (settings.accumulation > 1)} ({_said(error)}); another try would end here too",
        where=f"trainer.{phase}",
        remedy=f"{', '.join([first, *less[1:]])}: the same command then goes on from the last checkpoint. In a new output folder also {', '.join(anew)}",
    )


def explain_decoder(error: BaseException, recipe: DecoderRecipe, *_: object, **__: object) -> OutOfMemory:
    """The same for a small decoder."""
    return OutOfMemory(
        f"{_device()} is out of memory with {recipe.fit.batch_images} images a batch ({_said(error)})",
        where="fit",
        remedy="Raise fit.accumulation, or lower fit.batch_images, size_px or width; in a new output folder",
    )


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine"


def _said(error: BaseException) -> str:
    """Torch's first sentences say how much was wanted; what follows is advice on its allocator."""
    said = " ".join((str(error) or type(error).__name__).split())
    return said[:160].rsplit(". ", 1)[0].rstrip(".") if len(said) > 160 else said.rstrip(".")
