# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""A `Flow` on Ray: an actor without a CPU slot, told by every worker and asked by the driver. What it cannot say is no reason to stop."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from cluster.live import Facts, Flow

_ASK_S = 5.0


class FlowActor:
    """The driver's end."""

    def __init__(self, stages: Sequence[tuple[str, int]]) -> None:
        import ray

        self.name = f"edgefusion-flow-{uuid.uuid4().hex}"
        made: Any = ray.remote(Flow)
        # Restarted elsewhere if its node is lost: it then counts anew.
        self._actor: Any = made.options(name=self.name, num_cpus=0, max_restarts=-1, max_task_retries=0).remote(
            list(stages)
        )

    def read(self) -> list[Facts]:
        """Empty if it does not answer."""
        import ray

        with contextlib.suppress(Exception):
            return ray.get(self._actor.read.remote(), timeout=_ASK_S)
        return []

    def close(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._actor)


class RayDesk:
    """A worker's end, found by its name; what is told is not waited for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    def begin(self, stage: str, unit: str, samples: int) -> None:
        with contextlib.suppress(Exception):
            self._found().begin.remote(stage, unit, samples)

    def end(self, stage: str, unit: str, samples: int, seconds: float) -> None:
        with contextlib.suppress(Exception):
            self._found().end.remote(stage, unit, samples, seconds)

    def _found(self) -> Any:
        import ray

        if self._actor is None:
            self._actor = ray.get_actor(self._name)
        return self._actor
