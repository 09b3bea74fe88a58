"""One row with one seed, from data to figures: train what is not trained, draw, judge, keep the figures and a sheet of pictures.

Everything is a folder that is whole or goes on where it stopped; two processes on one output folder wait for each other job by job.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from diffusers import UNet2DConditionModel
from PIL import Image

from cluster.storage import publish_bytes, publish_folder, sweep_partials
from factory.models import quiet, resolve
from trainer.judging import EvaluateRecipe
from trainer.loop import train
from trainer.measure import draw, evaluate, prepare, read_questions
from trainer.mix import Source
from trainer.models import open_pipeline
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe
from trainer.reproduce.data import Say, ensure_data, ensure_evaluation
from trainer.reproduce.recipe import TablesRecipe
from trainer.sample import as_student, as_teacher, contact_sheet


class Row(Protocol):
    """What a run must know of a line of a table."""

    @property
    def name(self) -> str: ...
    @property
    def adapt(self) -> tuple[str, ...]: ...
    @property
    def distill(self) -> tuple[str, ...]: ...
    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def changes(self) -> Mapping[str, Any]:
        """Keys of phase 2 that depart from the protocol's."""
        ...


Tick = Callable[[str, int, int], object]
"""(what is being done, runs done, of how many) -> anything."""

RESULTS = "results"
SHOWN = 8
"""Pictures of each number of steps that are kept to look at."""


def result_of(out: Path, row: str, seed: int) -> Path:
    """Where the figures of a row with a seed lie once they are there."""
    return out / RESULTS / f"{_slug(row)}-seed{seed}.json"


def run_rows(recipe: TablesRecipe, out: Path, rows: Sequence[Row], write: Callable[[], object], tick: Tick) -> None:
    """The teacher, then every row that lacks its figures, seed by seed, so that a whole table is there early; `write` after each."""
    quiet()
    for model in (recipe.teacher, recipe.judge):
        resolve(model)
    jobs = [(seed, row) for seed in range(recipe.seeds) for row in rows]
    done = sum(result_of(out, row.name, seed).exists() for seed, row in jobs)

    def say(name: str) -> Say:
        return lambda what: tick(f"{name}: {what}", done, len(jobs))

    measure_teacher(recipe, out, say("teacher"))
    for seed, row in jobs:
        if not result_of(out, row.name, seed).exists():
            run_row(recipe, row, seed, out, say(f"{row.name}, seed {seed}"))
            done += 1
            write()
    tick("done", done, len(jobs))


def run_row(recipe: TablesRecipe, row: Row, seed: int, out: Path, say: Say) -> None:
    """Train and measure; leaves `result_of(...)` and a PNG beside it. Does nothing if they are there."""
    final = result_of(out, row.name, seed)
    if final.exists():
        return
    began = time.monotonic()
    unet = ensure_student(recipe, row, seed, out, say)
    with _held(out, f"evaluate-{_slug(row.name)}-seed{seed}"):
        if final.exists():
            return
        place = out / "scratch" / f"{_slug(row.name)}-seed{seed}"
        model = place / "model"
        if not model.exists():
            _assemble(recipe, row, unet, model)
        say("drawing and judging")
        rows, sheet = _evaluate(recipe, str(model), row.steps, ensure_evaluation(recipe, out), place / "evaluation")
        result = {"row": row.name, "seed": seed, "figures": rows, "seconds": round(time.monotonic() - began, 1)}
        _save_sheet(final.with_suffix(".png"), sheet)
        publish_bytes(final, (json.dumps(result, indent=2) + "\n").encode())
        shutil.rmtree(place)


def measure_teacher(recipe: TablesRecipe, out: Path, say: Say) -> None:
    """The teacher at 25 steps, and the evaluation set's own pictures: what there is to be reached."""
    final = out / RESULTS / "teacher.json"
    if final.exists():
        return
    with _held(out, "evaluate-teacher"):
        if final.exists():
            return
        say("drawing and judging")
        place = out / "scratch" / "teacher"
        rows, sheet = _evaluate(
            recipe, recipe.teacher, (recipe.eval_steps,), ensure_evaluation(recipe, out), place, real=True
        )
        _save_sheet(final.with_suffix(".png"), sheet)
        publish_bytes(final, (json.dumps({"figures": rows}, indent=2) + "\n").encode())
        shutil.rmtree(place)


def ensure_student(recipe: TablesRecipe, row: Row, seed: int, out: Path, say: Say) -> Path:
    """The trained UNet of a row; rows that share phase 1 share its result, as in the paper."""
    start: Path | None = None
    if row.adapt:
        start = _ensure_phase(recipe, "adapt", row.adapt, None, {}, f"{'+'.join(row.adapt)}-seed{seed}", seed, out, say)
    if not row.distill:
        assert start is not None
        return start
    job = f"{_slug(row.name)}-seed{seed}"
    return _ensure_phase(recipe, "distill", row.distill, start, row.changes, job, seed, out, say)


def _ensure_phase(
    recipe: TablesRecipe,
    phase: str,
    names: tuple[str, ...],
    start: Path | None,
    changes: Mapping[str, Any],
    job: str,
    seed: int,
    out: Path,
    say: Say,
) -> Path:
    folder = out / phase / job
    unet = folder / phase / "unet"
    if unet.exists():
        return unet
    for name in names:
        # What it is taken from under a lock of its own: another row may be making just that.
        for part in ("synt", name) if name == "synt-cur" else (name,):
            with _held(out, f"data-{part}"):
                ensure_data(recipe, part, out, say)
    with _held(out, f"{phase}-{job}"):
        if not unet.exists():
            say(f"{phase} on {'+'.join(names)}")
            sweep_partials(folder)
            sources = [Source((out / "data" / name).resolve()) for name in names]  # all samples count alike
            train(_trainer(recipe, phase, start, changes), sources, folder, recipe.seed + seed)
    return unet


def _trainer(recipe: TablesRecipe, phase: str, start: Path | None, changes: Mapping[str, Any]) -> TrainerRecipe:
    """The same values for every row but for `changes`, of phase 2; the phase that is not asked for has no steps."""
    steps = {"adapt": recipe.adapt_steps, "distill": recipe.distill_steps}
    each: dict[str, dict[str, Any]] = {
        name: {
            "steps": count if name == phase else 0,
            "batch_images": recipe.batch_images,
            "warmup_steps": min(100, count // 10),
            "ema_decay": recipe.ema_decay,
            "cosine": True,
        }
        for name, count in steps.items()
    }
    return TrainerRecipe(
        teacher=recipe.teacher,
        teacher_dtype=recipe.teacher_dtype,
        student=recipe.student,
        start=str(start) if start else None,
        size_px=recipe.size_px,
        cache_latents=True,
        threads=recipe.threads,
        adapt=AdaptRecipe(learning_rate=recipe.adapt_rate, **each["adapt"]),
        distill=_distill(recipe, each["distill"] | dict(changes)),
    )


def _distill(recipe: TablesRecipe, more: Mapping[str, Any]) -> DistillRecipe:
    common = {"learning_rate": recipe.distill_rate, "guidance_min": recipe.guidance, "guidance_max": recipe.guidance}
    return DistillRecipe.model_validate(common | dict(more))


def _assemble(recipe: TablesRecipe, row: Row, unet: Path, folder: Path) -> None:
    """A pipeline folder: an LCM student for Table 3, the teacher's scheduler for Table 2."""
    teacher = open_pipeline(recipe.teacher)
    student = UNet2DConditionModel.from_pretrained(unet, use_safetensors=True)
    if row.distill:
        grid = {name: row.changes[name] for name in ("ddim_steps", "phases") if name in row.changes}
        pipeline: Any = as_student(teacher, student, **grid)
    else:
        pipeline = as_teacher(teacher, student)
    publish_folder(folder, pipeline.save_pretrained)


def _evaluate(
    recipe: TablesRecipe, model: str, steps: tuple[int, ...], data: Path, folder: Path, real: bool = False
) -> tuple[list[dict[str, Any]], list[list[np.ndarray]]]:
    """Figures for each number of steps, and the first pictures of each; with `real`, those of the data set's own pictures before."""
    settings = EvaluateRecipe(
        models=[model],
        data=str(data),
        judge=recipe.judge,
        steps=list(steps),
        teacher_steps=recipe.eval_steps,
        teacher_guidance=recipe.guidance + 1,
        count=recipe.count,
        among=recipe.among,
        references=max(2, recipe.count),
        batch_images=recipe.eval_batch_images,
        threads=recipe.threads,
    )
    shown: list[list[np.ndarray]] = []
    report = evaluate(settings, folder)
    pipeline, plans = prepare(model, settings)
    prompts = read_questions(settings).prompts
    for count, guidance in plans:  # all of them are there: nothing is drawn again
        paths = draw(model, pipeline, prompts, count, guidance, settings, folder, lambda *_: None)
        shown.append([np.asarray(Image.open(path).convert("RGB")) for path in paths[:SHOWN]])
    keep = ("steps", "recall_at_1", "clip_score", "cmmd", "fid_judge")
    rows = [{name: row[name] for name in keep} for row in report["rows"] if real or row["steps"] is not None]
    return rows, shown


def _save_sheet(path: Path, rows: list[list[np.ndarray]]) -> None:
    sink = io.BytesIO()
    Image.fromarray(contact_sheet(rows)).save(sink, "PNG")
    publish_bytes(path, sink.getvalue())


@contextlib.contextmanager
def _held(out: Path, job: str) -> Generator[None]:
    """Only one process at a time does `job`; the system lets go when a process dies."""
    place = out / "locks" / f"{job}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _slug(row: str) -> str:
    return row.replace("/", "_")
