# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""A `Flow` on Ray: an actor without a CPU slot, told by every worker and asked by the driver. What it cannot say is no reason to stop."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from cluster.live import Facts, Flow

_ASK_S = 5.0
_GATHER_S = 0.25
_LOOK_EVERY_S = 0.05


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

    def see_off(self, most_s: float) -> None:
        """Wait until all workers have sent what they kept back, `most_s` seconds at most: one that was killed never says that it leaves."""
        import ray

        last = time.monotonic() + most_s
        with contextlib.suppress(Exception):
            while ray.get(self._actor.present.remote(), timeout=_ASK_S) and time.monotonic() < last:
                time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._actor)


class RayDesk:
    """A worker's end, found by its name; what is told is not waited for.

    A message to an actor costs both ends a millisecond, as much as a small unit's work. So the first word goes at once and those
    that follow within `_GATHER_S` go together: units that take long are seen as they begin, small ones cost next to nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None
        self._lock = threading.Lock()
        self._words: list[tuple[str, str, int, float | None, float]] = []
        self._sent = 0.0
        self._waits = False
        self._worker = uuid.uuid4().hex

    def leave(self) -> None:
        """The last word of this process, heard before it ends."""
        import ray

        self._send()
        with contextlib.suppress(Exception):
            ray.get(self._found().left.remote(self._worker), timeout=_ASK_S)

    def begin(self, stage: str, unit: str, samples: int) -> None:
        self._say(stage, unit, samples, None)

    def end(self, stage: str, unit: str, samples: int, seconds: float) -> None:
        self._say(stage, unit, samples, seconds)

    def _say(self, stage: str, unit: str, samples: int, seconds: float | None) -> None:
        with self._lock:
            now = time.monotonic()
            self._words.append((stage, unit, samples, seconds, now))
            left = self._sent + _GATHER_S - now
            if left > 0 and self._waits:
                return
            self._waits = left > 0
        if left > 0:
            # The worker may be busy with one unit for long: another thread sends what it said.
            timer = threading.Timer(left, self._send)
            timer.daemon = True
            timer.start()
        else:
            self._send()

    def _send(self) -> None:
        with self._lock:
            words, self._words, self._waits, now = self._words, [], False, time.monotonic()
            self._sent = now
        if words:
            with contextlib.suppress(Exception):
                self._found().told.remote(self._worker, [(*word, now - said) for *word, said in words])

    def _found(self) -> Any:
        import ray

        if self._actor is None:
            self._actor = ray.get_actor(self._name)
        return self._actor
