"""What a recipe will cost, from a short probe of its own models on this machine.

The probe plans, makes and selects K samples in a scratch folder, stage by stage in one process, after a batch that warms each stage up and
is not timed. What it measures is THIS machine; hours and cost say what as many workers of THIS speed would take. A probe on a CPU says
nothing of a GPU's speed, and the forecast says so.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError
from cluster.machine import load_per_core
from factory.charges import Charge, charges, probe_lines, run_lines
from factory.counting import count_pictures
from factory.lost_work import lines as lost_lines
from factory.make import select_and_pack
from factory.plan import make_plan
from factory.probing import cores_a_gpu, gpu_bytes, timed, tried
from factory.prompts import read_prompts
from factory.recipe import FactoryRecipe
from factory.shares import wilson
from factory.size_lines import span
from factory.sizes import LOOKING, BatchProbe, StageProbe
from factory.stages import make_stages
from factory.units import planned_units

_BUSY = 1.5
"""Processes a core of a machine that does more than the probe."""


@dataclass(frozen=True)
class Probe:
    """What K samples showed. Measured here."""

    samples: int
    plan_s: float
    """Without the writer's opening."""
    stages: tuple[StageProbe, ...]
    made: int
    kept: int
    dead: int
    bytes_made: int
    bytes_packed: int
    device: str
    batches: tuple[BatchProbe, ...] = ()
    gpu_bytes: int = 0
    """Memory of the GPU; 0 without one."""
    on_gpu: tuple[StageProbe, ...] = ()
    """Stages that the recipe leaves on the CPU, on the GPU."""
    cores: int = 0
    """For each GPU of this machine; 0 without one."""
    plan_open_s: float = 0.0
    """The writer's opening and closing: once, however many prompts it writes."""
    asked: tuple[Charge, ...] = ()
    """Of servers that charge."""

    def kept_interval(self) -> tuple[float, float]:
        """95% interval of the kept share (Wilson)."""
        return wilson(self.kept, self.samples)


@dataclass(frozen=True)
class Forecast:
    """The whole run. Scaled from the probe, not measured."""

    samples: int
    hours: float
    plan_hours: float
    gpu_hours: float
    cost: float | None
    disk_bytes: int
    kept: tuple[int, int, int]
    """Expected, least and most by the 95% interval."""
    unit_images: int
    batch: int
    """Pictures that the first model takes at once."""


def probe(
    recipe: FactoryRecipe,
    seed: int,
    samples: int,
    tell: Callable[[str], None] = lambda text: None,
    sizes: bool = False,
) -> Probe:
    """Run `samples` samples of the recipe through every step; with `sizes` also some batch sizes of each model.

    Raises EdgeFusionError if none could be made.
    """
    short = _shortened(recipe, samples)
    with tempfile.TemporaryDirectory(prefix="edgefusion-probe-") as scratch:
        folder = Path(scratch)
        tell("plan")
        opening: list[float] = []
        began = time.perf_counter()
        make_plan(short, seed, folder, took=opening.append)
        plan_s = time.perf_counter() - began - sum(opening)
        units = planned_units(folder, short.make.unit_images)
        stages: list[StageProbe] = []
        batches: list[BatchProbe] = []
        on_gpu: list[StageProbe] = []
        for stage in make_stages(short.make, folder):
            before = units
            tell(stage.name)
            units, found = timed(stage, units, _batch(short, stage.name))
            stages.append(found)
            batches += tried(short, stage.name, folder, before, tell) if sizes else []
            if sizes and gpu_bytes() and stage.name in LOOKING and not stage.gpus:
                tell(f"{stage.name}, on the GPU")
                on_gpu.append(timed(replace(stage, gpus=1.0), before, _batch(short, stage.name))[1])
        tell("select")
        funnel = select_and_pack(short, folder)
        captioned = sum(stage.samples for stage in stages if stage.name == "caption")
        asked = charges(short, folder, funnel["planned"], captioned)
        made = sum(_bytes(folder / part) for part in ("pictures", "ledger", "downloads"))
        packed = sum(path.stat().st_size for path in folder.glob("shard-*.tar"))
    if funnel["planned"] == funnel["dead"]:
        raise EdgeFusionError("every sample of the probe died", remedy="Run the recipe with few prompts and see why")
    return Probe(
        samples=funnel["planned"],
        plan_s=plan_s,
        stages=tuple(stages),
        made=funnel["planned"] - funnel["dead"],
        kept=funnel["kept"],
        dead=funnel["dead"],
        bytes_made=made,
        bytes_packed=packed,
        device=device(),
        batches=tuple(batches),
        gpu_bytes=gpu_bytes(),
        on_gpu=tuple(on_gpu),
        cores=cores_a_gpu(),
        plan_open_s=sum(opening),
        asked=asked,
    )


def scale(recipe: FactoryRecipe, found: Probe, gpus: int, price: float | None) -> Forecast:
    """The run that the recipe asks for on `gpus` workers as fast as this machine; stages overlap, the slowest sets the pace.

    The plan is written first, by one process. Raises EdgeFusionError for a source whose size nobody knows.
    """
    samples = planned_samples(recipe)
    times = {"main": 0.0}
    for stage in found.stages:
        # Render and caption are what GPUs are rented for; scoring goes by its own workers.
        workers = gpus if stage.name in ("render", "caption") else _workers(recipe, stage.name)
        own = samples * stage.per_sample_s / workers if stage.samples else 0.0
        times[stage.name] = own + stage.open_s
    plan_hours = (samples * found.plan_s / found.samples + found.plan_open_s) / 3600
    make_hours = max(times.values()) / 3600
    hours = plan_hours + make_hours
    share, low, high = found.kept / found.samples, *found.kept_interval()
    return Forecast(
        samples=samples,
        hours=hours,
        plan_hours=plan_hours,
        gpu_hours=make_hours * gpus,
        cost=None if price is None else make_hours * gpus * price,
        disk_bytes=round(samples * (found.bytes_made + found.bytes_packed * _copies(recipe)) / found.samples),
        kept=(round(samples * share), math.floor(samples * low), math.ceil(samples * high)),
        unit_images=recipe.make.unit_images,
        batch=_batch(recipe, found.stages[0].name),
    )


def _copies(recipe: FactoryRecipe) -> int:
    """How often packed samples lie on the disk at the peak: in the main selection, in each view, taken to be as large, and once more while
    one of them is being packed (factory/pack.py sorts on disk)."""
    return 1 + len(recipe.views) + 1


def planned_samples(recipe: FactoryRecipe) -> int:
    """Samples of the whole run. Raises EdgeFusionError if neither the recipe nor its sources say."""
    plan = recipe.plan
    if plan.kind == "written":
        return plan.prompts * plan.images_per_prompt
    if plan.kind == "file":
        return sum(1 for _ in read_prompts(plan)) * plan.images_per_prompt
    if (held := plan.limit or count_pictures(plan)) is None:
        raise EdgeFusionError(
            "the recipe does not say how many pictures its sources hold, and shards do not tell unread",
            remedy="Set factory.plan.limit for the forecast",
        )
    return held


def device() -> str:
    """What the probe ran on."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def lines(found: Probe, whole: Forecast, gpus: int) -> list[str]:
    """The forecast as text: what was measured and what is scaled stand apart."""
    low, high = found.kept_interval()
    told = [f"measured here by a probe of {found.samples} samples, on {found.device}, one process:"]
    told.append(
        f"  plan    {found.samples / found.plan_s:10.2f} samples/s, its writer opened in {found.plan_open_s:.1f} s"
    )
    for stage in found.stages:
        rate = f"{1 / stage.per_sample_s:10.2f} samples/s" if stage.samples and stage.seconds else "        no samples"
        told.append(f"  {stage.name:7} {rate}, opened in {stage.open_s:.1f} s")
    for stage in found.on_gpu:
        told.append(
            f"  {stage.name:7} {1 / stage.per_sample_s:10.2f} samples/s on the GPU, which the recipe does not give it"
        )
    told.append(
        f"  kept    {found.kept} of {found.samples} ({low:.0%} to {high:.0%} at 95%), dead {found.dead}; "
        f"{(found.bytes_made + found.bytes_packed) / found.samples / 1024:.1f} KiB a sample"
    )
    told += probe_lines(found.asked)
    what = f"{gpus} workers as fast as this {found.device}"
    told += [
        f"scaled to {whole.samples:,} samples on {what}, nothing taken away or waiting:",
        f"  time    {span(whole.hours)}, of it {span(whole.plan_hours)} for the plan",
        f"  workers {whole.gpu_hours:,.2f} hours"
        + ("" if whole.cost is None else f", cost {whole.cost:,.2f} without the plan's"),
        *run_lines(found.asked, whole.samples),
        f"  disk    {whole.disk_bytes / 2**30:,.2f} GiB at the peak: pictures, ledger, shards of every selection, and those that are being packed once more",
        f"  kept    {whole.kept[0]:,} ({whole.kept[1]:,} to {whole.kept[2]:,} at 95%); a small probe misses most duplicates, "
        "so a large run keeps fewer",
        *lost_lines(found.stages, whole.unit_images, whole.batch),
    ]
    if found.device == "CPU":
        told.append(
            "This machine has no GPU: these are hours of CPU workers. Run the same on one GPU of the kind you will rent."
        )
    if (load := load_per_core()) > _BUSY:
        told.append(
            f"Other work was going on here ({load:.1f} processes a core): rates are lower than this machine's own."
        )
    told.append("For nodes that are taken away: edgefusion cluster simulate")
    return told


def _shortened(recipe: FactoryRecipe, samples: int) -> FactoryRecipe:
    """The same models and settings, few samples; nothing else differs."""
    plan = recipe.plan
    if plan.kind == "written":
        prompts = min(plan.prompts, max(1, samples // plan.images_per_prompt))
        change: dict[str, Any] = {"prompts": prompts}
    elif plan.kind == "file":
        change = {"limit": min(plan.limit or samples, max(1, samples // plan.images_per_prompt))}
    else:
        change = {"limit": min(plan.limit or samples, samples)}
    return recipe.model_copy(update={"plan": plan.model_copy(update=change)})


def _workers(recipe: FactoryRecipe, stage: str) -> int:
    return recipe.make.score_workers if stage in ("score", "crop") else 1


def _batch(recipe: FactoryRecipe, stage: str) -> int:
    make = recipe.make
    if stage == "render" and make.painters():
        return max(teacher.batch_images for teacher in make.painters().values())
    if stage == "caption" and make.captioner is not None:
        # What a server answers is warm after one question, and may cost.
        return make.captioner.batch_pictures if make.captioner.kind == "transformers" else 1
    return make.scorer.batch_images


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
