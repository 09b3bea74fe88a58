# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""A stage of work: opened once in the process that owns its device, then mapped over work units.

A unit is an Arrow table of rows that travel together and are never split, filtered or reordered: a stage marks a row, it does
not drop it. Knows nothing of what the rows mean but the two columns `id` and `outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from cluster.errors import EdgeFusionError, StageError

DEAD = "dead"
PENDING = "pending"

Row = dict[str, Any]

_PACKED_BELOW = 2**20
"""Bytes of a unit's table: most units before they have pictures. They wait in the driver by the thousand, in a third of the space when compressed."""


class Worker(Protocol):
    """An opened stage. It gets rows that are pending and returns as many, in order, with columns added or changed."""

    def __call__(self, rows: list[Row]) -> list[Row]: ...


@dataclass(frozen=True)
class Stage:
    """What to open, and what it needs where it runs."""

    name: str
    open: Callable[[], Worker]
    workers: int = 1
    """At most, if there is `workers_min`."""
    cpus: float = 1.0
    gpus: float = 0.0
    whole: bool = False
    """Give the worker all rows of a unit, dead ones included; such a stage is never bisected."""
    workers_min: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of the cluster's own names, for a worker."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the nodes that may hold a worker (cluster/places.py)."""


_GRANTED: ContextVar[float | None] = ContextVar("gpus granted", default=None)


def open_stage(stage: Stage) -> Worker:
    """Open a stage's worker, which may ask `gpus_granted` meanwhile."""
    before = _GRANTED.set(stage.gpus)
    try:
        return stage.open()
    finally:
        _GRANTED.reset(before)


def gpus_granted() -> float | None:
    """GPUs of the stage that is being opened here; None outside of any, where whoever runs may use what there is.

    It has to be asked: Ray leaves all GPUs of a machine visible to a worker that was given none.
    """
    return _GRANTED.get()


@dataclass(frozen=True)
class Unit:
    """Rows of one work unit; each has at least `id` and `outcome`."""

    id: str
    rows: list[Row]

    def to_bytes(self) -> bytes:
        """Arrow IPC, so that no runner has to pickle a row; compressed if it is small (`_PACKED_BELOW`)."""
        table = pa.Table.from_pylist(self.rows)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd" if table.nbytes < _PACKED_BELOW else None)
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, unit_id: str, data: bytes) -> Unit:
        with pa.ipc.open_stream(data) as reader:
            return cls(unit_id, reader.read_all().to_pylist())


def apply(stage: Stage, worker: Worker, unit: Unit) -> Unit:
    """Map `worker` over the pending rows of `unit`; a row that raises is found by bisection and marked dead with its error."""
    if stage.whole:
        return Unit(unit.id, worker(unit.rows))
    pending = [i for i, row in enumerate(unit.rows) if row["outcome"] == PENDING]
    rows = list(unit.rows)
    for i, row in zip(pending, _bisect(stage.name, worker, [rows[i] for i in pending]), strict=True):
        rows[i] = row
    # Arrow tables are rectangular: rows that died early carry empty cells for later columns.
    columns = {name: None for row in rows for name in row}
    return Unit(unit.id, [{**columns, **row} for row in rows])


def _bisect(stage: str, worker: Worker, rows: Sequence[Row]) -> list[Row]:
    if not rows:
        return []
    try:
        done = worker(list(rows))
        if len(done) != len(rows):
            raise StageError(f"stage {stage} was given {len(rows)} rows and returned {len(done)}")
        return done
    except EdgeFusionError:
        raise  # something that a user can mend is no fault of the row
    except OSError as error:
        # A full disk or a lost mount is no fault of the row.
        raise StageError(
            f"stage {stage} failed: {error}", remedy="Mend the machine and run the same command again"
        ) from error
    except Exception as error:
        if len(rows) == 1:
            reason = f"{stage}: {type(error).__name__}: {error}"[:300]
            return [{**rows[0], "outcome": DEAD, "reason": reason}]
        half = len(rows) // 2
        return _bisect(stage, worker, rows[:half]) + _bisect(stage, worker, rows[half:])
