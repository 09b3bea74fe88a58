"""Stages of make, run here to see how fast one worker of each is: as the recipe has it, and with other batch sizes."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.errors import StageError
from cluster.stage import PENDING, Row, Stage, Unit, Worker, apply, open_stage
from factory.recipe import FactoryRecipe
from factory.sizes import ON_GPUS, BatchProbe, StageProbe, batch_keys, batches_to_try, teacher_of_key, with_size
from factory.stages import make_stages
from factory.teachers import teacher_of

_TURNS = 3


def tried(
    recipe: FactoryRecipe, name: str, folder: Path, units: list[Unit], tell: Callable[[str], None]
) -> list[BatchProbe]:
    """A stage with some batch sizes, a full batch of each in turns; one that does not fit into memory ends the search for larger ones.

    What a work unit's last batch is filled up with counts as work. Of several teachers each is tried on rows of its own; one that has none is
    left out.
    """
    found: list[BatchProbe] = []
    size, pending = recipe.make.unit_images, [row for unit in units for row in unit.rows if row["outcome"] == PENDING]
    for key, (own, names) in batch_keys(recipe.make).items():
        teacher = teacher_of_key(key)
        rows = [row for row in pending if not teacher or teacher_of(row, recipe.make) == teacher]
        for batch in batches_to_try(own, size) if name in names and rows else ():
            tell(f"{name}, {key.removeprefix('factory.make.')} {batch}")
            stage = next(s for s in make_stages(with_size(recipe.make, key, batch), folder) if s.name == name)
            some = Unit(units[0].id, _copies(list(itertools.islice(itertools.cycle(rows), batch))))
            done: StageProbe | None = None
            with _out_of_memory() as told:
                try:
                    done = _quickest(stage, some)
                except StageError:
                    if batch <= own:
                        raise
            if told or done is None:
                found.append(BatchProbe(key, batch, None))
                break
            filled = -(-size // batch) * batch / size
            done = replace(done, seconds=done.seconds * filled, device_s=done.device_s * filled)
            found.append(BatchProbe(key, batch, done))
    return found


@contextmanager
def _out_of_memory() -> Generator[list[str]]:
    """What was said of batches that were halved (factory/models/memory.py)."""
    told: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "out of memory" in record.getMessage():
                told.append(record.getMessage())

    log, listener = logging.getLogger("edgefusion"), Listening()
    log.addHandler(listener)
    try:
        yield told
    finally:
        log.removeHandler(listener)


def gpu_bytes() -> int:
    """Memory of the GPU; 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def cores_a_gpu() -> int:
    """CPU cores of this machine for each of its GPUs; 0 without one."""
    import torch

    return len(os.sched_getaffinity(0)) // torch.cuda.device_count() if torch.cuda.is_available() else 0


def _opened(stage: Stage, rows: list[Row]) -> tuple[Worker, float]:
    """A worker that has done `rows` once to warm up, and the seconds it took to open. What GPUs are rented for is probed on one even where
    the recipe gives it none yet."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    worker = open_stage(replace(stage, gpus=stage.gpus or float(stage.name in ON_GPUS)))
    open_s = time.perf_counter() - began
    if not stage.whole and rows:
        apply(stage, worker, Unit("warm", _copies(rows)))
    return worker, open_s


def timed(stage: Stage, units: list[Unit], batch: int) -> tuple[list[Unit], StageProbe]:
    """Map the stage over all units, after a first batch that only warms it up."""
    worker, open_s = _opened(stage, [r for unit in units for r in unit.rows if r["outcome"] == PENDING][:batch])
    warm_s, late_s = getattr(worker, "device_s", 0.0), getattr(worker, "late_s", 0.0)
    began, count, done = time.perf_counter(), 0, list[Unit]()
    for unit in units:
        count += len(unit.rows) if stage.whole else sum(row["outcome"] == PENDING for row in unit.rows)
        done.append(apply(stage, worker, unit))
    seconds, device_s = time.perf_counter() - began, getattr(worker, "device_s", 0.0) - warm_s
    # A model that is opened on the way is opened once by a worker, however many pictures come.
    late = getattr(worker, "late_s", 0.0)
    seconds, open_s = seconds - (late - late_s), open_s + late
    return done, StageProbe(stage.name, open_s, count, seconds, stage.gpus, device_s, _peak_bytes())


def _quickest(stage: Stage, unit: Unit) -> StageProbe:
    """The fastest of some turns over one unit: whatever else the machine does makes turns slower, never faster."""
    worker, open_s = _opened(stage, unit.rows)
    turns: list[tuple[float, float]] = []
    for _ in range(_TURNS):
        before, began = getattr(worker, "device_s", 0.0), time.perf_counter()
        apply(stage, worker, unit)
        turns.append((time.perf_counter() - began, getattr(worker, "device_s", 0.0) - before))
    seconds, device_s = min(turns)
    return StageProbe(stage.name, open_s, len(unit.rows), seconds, stage.gpus, device_s, _peak_bytes())


def _peak_bytes() -> int:
    """Memory of the GPU that was held at most since a worker was opened."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def _copies(rows: list[Row]) -> list[Row]:
    return [dict(row) for row in rows]
