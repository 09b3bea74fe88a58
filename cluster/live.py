"""What the stages of a run are doing now: samples a second of each, how busy its workers are, how many samples wait before it.

Ray Data knows something of this, but tells it only to its own progress bars and, with `ray[default]`, to Prometheus; what it keeps inside
changes from version to version. So stages count for themselves: in one process into a `Flow`, on Ray into one that an actor without a
CPU slot holds. Both give the same fields.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_ENDS, _ROUNDS = 64, 4
"""The last units, whose ends give a stage's rate: so many, and at least so many rounds of its workers."""
_GONE = 1024
"""Units that came out last: what is told of them late says nothing new."""
Facts = dict[str, Any]
Word = tuple[str, str, int, float | None, float]
"""(stage, unit, samples, seconds that the work took or None when it begins, seconds ago): a worker's word in a message."""


class Desk(Protocol):
    """Where a worker says what it begins and ends. Nothing that goes wrong there may stop the work."""

    def begin(self, stage: str, unit: str, samples: int) -> None: ...

    def end(self, stage: str, unit: str, samples: int, seconds: float) -> None: ...


@dataclass
class _Counts:
    """Of one stage."""

    workers: int
    samples: int = 0
    seconds: float = 0.0
    ends: deque[tuple[float, int, float]] = field(init=False)
    """(when, samples, seconds of work) of the last units."""

    def __post_init__(self) -> None:
        self.ends = deque(maxlen=max(_ENDS, _ROUNDS * self.workers + 1))

    def rate(self, now: float) -> tuple[float | None, float | None]:
        """(samples a second, share of the workers' time that was work, 0 to 1); None before anything ended."""
        if not self.ends:
            return None, None
        ends = list(self.ends)
        # Workers that began together end together, so the time between two ends says little: that of a whole round of all workers does.
        whole = (len(ends) - 1) // self.workers * self.workers
        rows = ends[-whole:] if whole else ends
        # A unit ends when its work does, so the work of the one before `rows` lies before their span.
        since = ends[-whole - 1][0] if whole else min(when - seconds for when, _, seconds in ends)
        last = ends[-1][0]
        span = last - since
        if span <= 0:
            return None, None
        if now - last > 2 * span / len(rows):
            span = now - since  # nothing came for long: the rate falls
        busy = min(1.0, sum(seconds for *_, seconds in rows) / span / self.workers) if whole else None
        return sum(samples for _, samples, _ in rows) / span, busy


class Flow:
    """Where every unit that is under way is; as small as what is under way."""

    def __init__(self, stages: Sequence[tuple[str, int]], clock: Callable[[], float] = time.monotonic) -> None:
        """`stages`: (name, workers) in order."""
        self._clock = clock
        self._order = {name: i for i, (name, _) in enumerate(stages)}
        self._counts = [_Counts(workers) for _, workers in stages]
        self._at: dict[str, tuple[int, bool, int]] = {}
        """Unit to (stage, whether that is done with it, samples). Workers' words overtake one another, so the furthest place counts."""
        self._gone: dict[str, None] = {}
        self._workers: set[str] = set()

    def left(self, worker: str) -> None:
        self._workers.discard(worker)

    def present(self) -> int:
        """Workers that told something and have not left; one that was killed never leaves."""
        return len(self._workers)

    def told(self, worker: str, words: Sequence[Word]) -> None:
        """What a worker has gathered, oldest first."""
        self._workers.add(worker)
        for stage, unit, samples, seconds, ago in words:
            if seconds is None:
                self.begin(stage, unit, samples)
            else:
                self.end(stage, unit, samples, seconds, ago)

    def begin(self, stage: str, unit: str, samples: int) -> None:
        place = self._order[stage]
        if unit not in self._gone and place >= self._at.get(unit, (0, False, 0))[0]:
            self._at[unit] = (place, False, samples)

    def end(self, stage: str, unit: str, samples: int, seconds: float, ago: float = 0.0) -> None:
        """`samples` that the stage worked on, not those that were dead before; it ended `ago` seconds before now."""
        place = self._order[stage]
        counts = self._counts[place]
        counts.samples, counts.seconds = counts.samples + samples, counts.seconds + seconds
        counts.ends.append((self._clock() - ago, samples, seconds))
        there = self._at.get(unit)
        if there is None or there[0] != place:
            return  # a worker that was given up and lives after all: the unit is further on
        if place < len(self._counts) - 1:
            self._at[unit] = (place, True, there[2])
            return
        del self._at[unit]
        self._gone[unit] = None
        if len(self._gone) > _GONE:
            del self._gone[next(iter(self._gone))]

    def read(self) -> list[Facts]:
        """A row a stage: stage, workers, samples (done), per_s, busy (0 to 1), working and waiting (samples).

        `waiting` of the first stage is None: it takes what the plan holds.
        """
        now = self._clock()
        found: list[Facts] = []
        places = list(self._at.values())
        for name, place in self._order.items():
            counts = self._counts[place]
            per_s, busy = counts.rate(now)
            found.append(
                {
                    "stage": name,
                    "workers": counts.workers,
                    "samples": counts.samples,
                    "seconds": round(counts.seconds, 3),
                    "per_s": per_s and round(per_s, 3),
                    "busy": busy and round(busy, 3),
                    "working": sum(n for at, done, n in places if at == place and not done),
                    "waiting": sum(n for at, done, n in places if at == place - 1 and done) if place else None,
                }
            )
        return found
