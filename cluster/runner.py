# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""Two ways to run the same stages over the same units, with the same answer: in this process, or on Ray actors.

A runner owns placement, order of work and progress. It yields finished units in any order; the caller commits them, or a last
stage does. Knows no images.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator

from cluster import tracing
from cluster.cache import CacheRecipe
from cluster.connect import explain, explain_work, knock, see_that_it_fits
from cluster.errors import EdgeFusionError, StageError
from cluster.events import NOWHERE, Events, first_words
from cluster.live import Desk, Facts, Flow
from cluster.live_ray import FlowActor, RayDesk
from cluster.machine import give_back_memory, stand_in
from cluster.metrics import WorkerMetrics
from cluster.places import TRAIN, PodGroup, PodPlace, StagePlace, placed
from cluster.progress import speaking
from cluster.quarantine import Attempts, apply_noted
from cluster.recipe import Settings
from cluster.stage import PENDING, Stage, Unit, Worker, apply, open_stage

_WINDOW_UNITS = 2048
_WINDOW_UNITS_A_WORKER = 64
"""Units that Ray Data holds at once, at least; on wide clusters opening the models anew must stay little beside a worker's units, for some 30 KiB
of the driver's memory a unit."""
_SEE_OFF_S = 10.0
"""How long the end of a run waits for workers that still send spans: a collector that is busy is tried again after a second, then two."""


def window_units(workers: int) -> int:
    """Units that Ray Data is given at once, if the widest stage has so many workers."""
    return max(_WINDOW_UNITS, _WINDOW_UNITS_A_WORKER * workers)


class ClusterRecipe(Settings):
    """Where the work runs."""

    runner: Literal["in-process", "ray"] = Field(
        default="ray", description="`in-process` or `ray`; the answer is the same"
    )
    address: str = Field(
        default="local", description="`local` starts Ray here; `auto` or host:port joins a running cluster"
    )
    cpus: int | None = Field(
        default=None,
        ge=1,
        description="CPU slots of a local Ray; if left out as many as it has cores, or as the stages have workers",
    )
    object_store_mib: int = Field(default=200, ge=80, description="shared memory of a local Ray, MiB")
    train_workers: int = Field(default=1, ge=1, description="Ray Train workers, one a GPU or one a CPU group")
    train_workers_min: int | None = Field(
        default=None,
        ge=1,
        description="go on with as few training workers as this when nodes are lost and do not come back; if left out, training waits for all",
    )
    train_placement: Literal["pack", "spread"] = Field(
        default="pack",
        description="training workers on as few nodes as hold them, or on as many as there are (CPU nodes share their memory's speed)",
    )
    train_gpu: bool | None = Field(
        default=None,
        description="train on GPUs, one a worker; left out: if the machine that starts the run has one (a cluster's head may not)",
    )
    memory_gib: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="memory that a worker needs, GiB, by stage: {render: 12, train: 40}; Ray then packs no more workers than fit",
    )
    stages: dict[str, StagePlace] = Field(
        default={},
        description="by stage (render, score, train ...), what its workers take and which nodes may hold them: {render: {gpus: 0.5, labels: {zone: a}}}",
    )
    pods: dict[PodGroup, PodPlace] = Field(
        default={},
        description="on Kubernetes, which nodes hold the pods of head, gpu, cpu and vllm, and which taints these put up with: "
        "{gpu: {node_selector: {karpenter.sh/capacity-type: spot}}}",
    )
    cache: CacheRecipe = Field(
        default=CacheRecipe(), description="where shards of data sets that are given by URL are kept on each machine"
    )
    log: Literal["units", "problems", "off"] = Field(
        default="units",
        description="what OUT/log notes: every unit of every stage, only steps and what went wrong, or nothing",
    )
    max_failures: int = Field(
        default=2,
        ge=0,
        description="restarts of a training that lost a worker, and workers a sample may kill before it is a dead letter",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ClusterRecipe:
        if self.train_workers_min is not None and self.train_workers_min > self.train_workers:
            raise ValueError(
                f"train_workers_min ({self.train_workers_min}) is more than train_workers ({self.train_workers})"
            )
        train = self.stages.get(TRAIN)
        if train and (train.workers or train.workers_min):
            raise ValueError("stages.train: workers of training are train_workers and train_workers_min")
        return self

    def placed(self, stage: Stage) -> Stage:
        """The stage with what `stages` says of it."""
        return placed(stage, self.stages.get(stage.name))

    def is_here(self) -> bool:
        """All workers run on this machine."""
        return self.runner == "in-process" or self.address == "local"

    def trains_on_gpu(self) -> bool:
        """As the recipe says, or as this machine can."""
        import torch

        return torch.cuda.is_available() if self.train_gpu is None else self.train_gpu

    def memory_bytes(self, stage: str) -> int:
        """What a worker of the stage needs; 0 if the recipe does not say."""
        return int(self.memory_gib.get(stage, 0) * 2**30)


class Runner(Protocol):
    def run(self, stages: Sequence[Stage], units: Iterable[Unit], notes: Path | None = None) -> Iterator[Unit]:
        """Pass every unit through all stages in turn; yields finished units, in no promised order.

        `notes` is a folder that all workers see, for what they are about to try: with it, rows that kill their worker
        become dead letters; without it the run ends with a StageError once workers have died `max_failures` times.
        """
        ...

    def live(self) -> list[Facts]:
        """What each stage of the run that goes on is doing (`Flow.read`); empty before it begins. From any thread."""
        ...

    def close(self) -> None: ...


def make_runner(recipe: ClusterRecipe, events: Events = NOWHERE) -> Runner:
    return (
        InProcess(recipe.max_failures, events, recipe.placed)
        if recipe.runner == "in-process"
        else OnRay(recipe, events)
    )


class InProcess:
    """Everything here, one unit after the other. A row that kills it kills the run; the next runs find and bury that row."""

    def __init__(
        self, max_failures: int = 2, events: Events = NOWHERE, place: Callable[[Stage], Stage] = lambda stage: stage
    ) -> None:
        """`place` says what the recipe gives a stage (`ClusterRecipe.placed`): here only whether it may use a GPU."""
        self.max_failures, self.events, self._place = max_failures, events, place
        self._flow = Flow([])

    def run(self, stages: Sequence[Stage], units: Iterable[Unit], notes: Path | None = None) -> Iterator[Unit]:
        attempts = _attempts(notes, self.max_failures, trust_other_runs=True)
        workers: list[tuple[Stage, Worker]] = []
        stages = [self._place(stage) for stage in stages]
        self._flow = Flow([(stage.name, 1) for stage in stages])
        for unit in units:
            # Opened late: a run with nothing left to do loads no models.
            workers = workers or [(stage, _opened(stage, self.events)) for stage in stages]
            for stage, worker in workers:
                before = unit
                try:
                    unit = _work(stage, worker, before, attempts, self._flow, self.events)
                finally:
                    # Also after an exception or Ctrl-C: only a process that was killed leaves its note.
                    if attempts:
                        attempts.end(stage, before)
            yield unit
        if attempts:
            attempts.clear()

    def live(self) -> list[Facts]:
        return self._flow.read()

    def close(self) -> None:
        """Nothing is held."""


class OnRay:
    """Ray Data actor pools, one pool a stage; one row of the data set is one unit, so Ray can split and retry nothing smaller."""

    def __init__(self, recipe: ClusterRecipe, events: Events = NOWHERE) -> None:
        self.recipe, self.events = recipe, events
        self._flow: FlowActor | None = None

    def run(self, stages: Sequence[Stage], units: Iterable[Unit], notes: Path | None = None) -> Iterator[Unit]:
        stages = [self.recipe.placed(stage) for stage in stages]
        attempts = _attempts(notes.resolve() if notes else None, self.recipe.max_failures, trust_other_runs=False)
        # With notes it is they that end the dying; Ray, which cannot tell one row from another, need not count.
        restarts = -1 if attempts else self.recipe.max_failures
        rest, at_once = iter(units), window_units(max((stage.workers for stage in stages), default=0))
        # Ray Data keeps something of every unit in the driver, so it is given a bounded number at a time: memory stays flat, and
        # opening the stages anew costs little beside the work of so many units.
        try:
            while rows := [{"unit": unit.id, "payload": unit.to_bytes()} for unit in islice(rest, at_once)]:
                yield from self._window(stages, rows, attempts, restarts)
        finally:
            self._end_flow()
        if attempts:
            attempts.clear()

    def _window(
        self, stages: Sequence[Stage], rows: list[dict[str, Any]], attempts: Attempts | None, restarts: int
    ) -> Iterator[Unit]:
        start_ray(self.recipe, stages)
        memory = {stage.name: self.recipe.memory_bytes(stage.name) for stage in stages}
        see_that_it_fits(stages, memory, self.recipe.address == "local")
        if self._flow is None:
            self._flow = FlowActor([(stage.name, stage.workers) for stage in stages])
        import ray.data
        from ray.exceptions import RayError

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # One unit a block: a block is what Ray hands out, and what it repeats when a worker is lost.
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        rows.clear()  # Ray has its own copy
        give_back_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray deprecates the spelling of max_restarts, and offers no other yet
            for stage in stages:
                mapper: Any = _Mapper  # Ray builds it once an actor and calls it once a row
                data = data.map(
                    mapper,
                    fn_constructor_args=[stage, attempts, self._flow.name, self.events, os.getcwd()],
                    compute=ray.data.ActorPoolStrategy(
                        min_size=stage.workers_min or stage.workers, max_size=stage.workers
                    ),
                    num_cpus=stage.cpus,
                    num_gpus=stage.gpus,
                    resources=dict(stage.resources) or None,
                    label_selector=dict(stage.labels) or None,
                    memory=self.recipe.memory_bytes(stage.name) or None,
                    max_restarts=restarts,
                    max_task_retries=restarts,
                )
        try:
            # `iter_rows` would hold each unit back until the next one is there.
            blocks: Iterable[Any] = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for block in blocks:
                for row in block.to_pylist():
                    yield Unit.from_bytes(row["unit"], row["payload"])
        except RayError as error:
            raise _stage_error(error) from error

    def live(self) -> list[Facts]:
        flow = self._flow
        return flow.read() if flow else []

    def close(self) -> None:
        self._end_flow()
        stop_ray()

    def _end_flow(self) -> None:
        flow, self._flow = self._flow, None
        if flow:
            if tracing.is_asked():
                flow.see_off(_SEE_OFF_S)
            flow.close()


class _Mapper:
    """What a Ray actor holds: one opened stage."""

    def __init__(self, stage: Stage, attempts: Attempts | None, flow: str, events: Events, folder: str) -> None:
        stand_in(folder)
        self.stage, self.attempts, self.metrics = stage, attempts, WorkerMetrics(stage.name)
        self.desk, self.events = RayDesk(flow), events
        events.listen()
        with attempts.opening(stage) if attempts else nullcontext(), self.metrics.opening():
            self.worker = _opened(stage, events)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit, began = Unit.from_bytes(row["unit"], row["payload"]), time.perf_counter()
        done = _work(self.stage, self.worker, unit, self.attempts, self.desk, self.events)
        answer = {"unit": done.id, "payload": done.to_bytes()}
        if self.attempts:
            self.attempts.end(self.stage, unit)
        self.metrics.worked(unit, done, time.perf_counter() - began)
        return answer

    def __del__(self) -> None:
        """Ray Data drops it once the stage has no more work, and then ends the process without waiting for what is kept back in it."""
        with suppress(Exception):
            tracing.flush()
            self.desk.leave()


def _attempts(folder: Path | None, max_failures: int, trust_other_runs: bool) -> Attempts | None:
    return Attempts(folder, max(1, max_failures), uuid.uuid4().hex, trust_other_runs) if folder else None


def _opened(stage: Stage, events: Events) -> Worker:
    began = time.perf_counter()
    try:
        worker = open_stage(stage)
    except Exception as error:
        events.say("stage failed to open", "error", stage=stage.name, error=first_words(error))
        raise
    events.say("stage opened", stage=stage.name, seconds=round(time.perf_counter() - began, 3))
    return worker


def _work(
    stage: Stage, worker: Worker, unit: Unit, attempts: Attempts | None, desk: Desk, events: Events = NOWHERE
) -> Unit:
    samples, began = sum(stage.whole or row["outcome"] == PENDING for row in unit.rows), time.perf_counter()
    desk.begin(stage.name, unit.id, len(unit.rows))
    with events.work(stage.name, unit) as finished:
        done = apply_noted(stage, worker, unit, attempts) if attempts else apply(stage, worker, unit)
        finished.append(done)
    desk.end(stage.name, unit.id, samples, time.perf_counter() - began)
    return done


def local_slots(recipe: ClusterRecipe, workers: Sequence[tuple[int, float]] = ()) -> int:
    """CPU slots of a local Ray: the recipe's, or those in which all `workers` (how many, CPUs of each) are at work at the same time; what is
    wider than this machine finds no room by that."""
    cores = max(2, os.cpu_count() or 2)
    return recipe.cpus or max(cores, math.ceil(sum(count * each for count, each in workers if each <= cores)))


def start_ray(recipe: ClusterRecipe, stages: Sequence[Stage] = ()) -> None:
    """Join or start Ray once per process, quietly; one that is started has CPU slots for all `stages` together."""
    # Quiet: our own bars and errors say what a user needs.
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_DATA_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    import ray

    if ray.is_initialized():
        return
    knock(recipe.address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "address": recipe.address}
    if recipe.address == "local":
        options |= {
            "num_cpus": local_slots(recipe, [(stage.workers, stage.cpus) for stage in stages]),
            "include_dashboard": False,
            "object_store_memory": recipe.object_store_mib << 20,
        }
    told_to_stop = signal.getsignal(signal.SIGTERM)
    try:
        with _hushed():
            ray.init(**options)
    except Exception as error:  # Ray raises whatever it has at hand, a bare Exception among them
        raise explain(recipe.address, error) from error
    finally:
        # Ray's own handlers end the process with a dump of its C++ core, and without closing what is open.
        if callable(told_to_stop) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, told_to_stop)
    for quiet in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
        for handler in logging.getLogger(quiet).handlers:
            handler.setLevel(logging.ERROR)


@contextmanager
def _hushed() -> Generator[None]:
    """Drop what Ray's C++ core writes to stderr while it starts; its failures also come as exceptions."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    with speaking:  # the lines of a log wait meanwhile
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def stop_ray() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()


def _stage_error(error: BaseException) -> EdgeFusionError:
    """The error of ours inside Ray's wrapping if there is one: as an object, or as the line of a remote traceback."""
    inner: BaseException | None = error
    while inner is not None:
        cause: BaseException | None = getattr(inner, "cause", None)
        if isinstance(cause, EdgeFusionError):
            return cause
        inner = cause or inner.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line.partition("StageError: ")[2] for line in lines if "StageError: " in line]
    if named:
        return StageError(named[-1])
    if known := explain_work(error):
        return known
    return StageError(
        f"a worker failed: {lines[-1]}", remedy="Mend the cause and run the same command again; --debug shows all"
    )
