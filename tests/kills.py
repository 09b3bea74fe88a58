"""Commands in processes that can be killed at any moment, started in a tenth of a second: forks of one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

_IMPORTED = [
    "edgefusion",
    "chain",
    "ray.data",
    "open_clip",
    "imagehash",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "factory.plan",
    "factory.make",
    "factory.views",
    "factory.models.image",
    "factory.models.clip",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_IMPORTED)


def front_door(*words: str) -> BaseProcess:
    """`edgefusion WORDS` as a process of its own, started."""
    process = _forks.Process(target=_front_door, args=(words,))
    process.start()
    return process


def _front_door(words: tuple[str, ...]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.argv = ["edgefusion", *words]
    from edgefusion import main

    main()


def reached(process: BaseProcess, there: Callable[[], bool]) -> bool:
    """Wait until `there`; False if the process ended before."""
    while not there():
        if process.exitcode is not None:
            return there()
        time.sleep(0.005)
    return True


def ended_within(process: BaseProcess, seconds: float) -> bool:
    process.join(seconds)
    return process.exitcode is not None
