"""`edgefusion zoo ...`: rebuild the embedded models and ship them. It lies here because the students need the trainer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import EdgeFusionError
from cluster.progress import progress_bars
from cluster.storage import publish_bytes, publish_folder
from cluster.tables import print_tables
from trainer.progress import follow_training
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe

app = typer.Typer(no_args_is_help=True, help="The embedded zoo: small real models that make the chain honest offline.")


@app.command("build")
def zoo_build(
    model: Annotated[
        str,
        typer.Argument(
            help="wild, evalset, vae, clip, judge, captioner (needs clip), writer, teacher (needs vae and clip), "
            "people (it learns to tell them apart; needs teacher), student (needs people), decoder (a sharper one for the same latents; needs vae and student), or all in their order"
        ),
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="optimiser steps in all, earlier runs included; a student's of the second phase, half as many in the first; `all` knows them",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="packages, checkpoints and finished models")] = Path("runs/zoo"),
    go_on: Annotated[
        bool,
        typer.Option(
            "--go-on",
            help="begin with the finished teacher, captioner or few-step student in FOLDER (zoo unpack puts the shipped ones there)",
        ),
    ] = False,
    ship: Annotated[bool, typer.Option("--ship", help="all: put what was built into the package at the end")] = False,
    report: Annotated[bool, typer.Option("--report", help="all: then measure it, as zoo report does")] = False,
) -> None:
    """Train one of the zoo's models from public packages, or all of them. Rerun the same command to resume; hours on two cores."""
    if model == "all":
        if steps is not None or go_on:
            raise EdgeFusionError(
                "zoo build all takes neither --steps nor --go-on", remedy="Build that one model by its name"
            )
        build_all(folder, _build_one, typer.echo)
        if ship:
            zoo_ship(folder)
        if report:
            zoo_report()
        return
    if steps is None or ship or report:
        what = "needs --steps" if steps is None else "takes no --ship or --report: they are for `all`"
        raise EdgeFusionError(
            f"zoo build {model} {what}", remedy="factory/pocket/README.md has the line of every model"
        )
    _build_one(model, folder, steps, go_on)


ROAD = (
    ("vae", 10500),
    ("clip", 800),
    ("judge", 2400),
    ("captioner", 3000),
    ("writer", 700),
    ("teacher", 9800),
    ("people", 4800),
    ("student", 2400),
    ("decoder", 1500),
    ("wild", 1),
    ("evalset", 1),
)
"""Every model and its steps, each after those that it needs."""
BUILT = "built.json"
"""In the building place: which of ROAD are finished, and with how many steps."""


def build_all(folder: Path, build_one: Callable[[str, Path, int, bool], None], tell: Callable[[str], None]) -> None:
    """Walk ROAD below `folder`. What is finished is not touched again: the decoder's line changes what earlier lines left."""
    try:
        built: dict[str, int] = json.loads((folder / BUILT).read_text())
    except FileNotFoundError:
        built = {}
    for model, steps in ROAD:
        if built.get(model) == steps:
            tell(f"{model}: built")
            continue
        tell(f"edgefusion zoo build {model} --steps {steps} --folder {folder}")
        build_one(model, folder, steps, False)
        built[model] = steps
        publish_bytes(folder / BUILT, (json.dumps(built, indent=2) + "\n").encode())


def _build_one(model: str, folder: Path, steps: int, go_on: bool) -> None:
    from factory.pocket.build import MODELS, build

    if model == "student":
        _build_student(folder, steps, go_on)
    elif model in MODELS:
        build(model, folder, steps, go_on)
    else:
        typer.echo(f"No zoo model is called {model!r}; there are {', '.join((*MODELS, 'student', 'all'))}.", err=True)
        raise typer.Exit(2)


@app.command("report")
def zoo_report(
    out: Annotated[Path, typer.Option(help="page, figures, grids and drawn pictures")] = Path("runs/zoo-report"),
) -> None:
    """Measure every shipped model with the judge CLIP and write a page; minutes. What misses its target is said so."""
    from rich.table import Table

    from factory.models import quiet
    from trainer.zoo_report import write_zoo_report

    quiet()
    with progress_bars() as bars:
        task = bars.add_task("zoo report", total=None)
        figures = write_zoo_report(out, lambda what: bars.update(task, description=f"zoo report: {what}"))
        bars.update(task, description="zoo report", total=1, completed=1)
    table = Table("what", "measured", "target", "", title="The zoo, by the judge CLIP")
    for line in figures["targets"]:
        mark = "met" if line["met"] else "[red]missed[/]"
        table.add_row(line["what"], f"{line['value']:.3g}", f"{line['target']:g}", mark)
    print_tables(table)
    typer.echo(f"open {out / 'report.html'}")


@app.command("unpack")
def zoo_unpack(
    folder: Annotated[Path, typer.Option(help="where zoo build is to work")] = Path("runs/zoo"),
) -> None:
    """Lay the shipped models out for zoo build: a student can be built on the teacher, and training can go on."""
    from factory.models import ZOO
    from factory.pocket.build import unpack

    unpack(ZOO, folder)
    typer.echo(f"{folder} holds the shipped models")


@app.command("ship")
def zoo_ship(
    folder: Annotated[Path, typer.Option(help="where zoo build worked")] = Path("runs/zoo"),
) -> None:
    """Put the finished models into the package, with their digests."""
    from factory.models import ZOO
    from factory.pocket.build import ship

    ship(folder, ZOO)
    typer.echo(f"wrote {ZOO}: {sum(p.stat().st_size for p in ZOO.rglob('*') if p.is_file()) / 2**20:.1f} MiB")


def _build_student(folder: Path, steps: int, go_on: bool) -> None:
    """The adapted student (`FOLDER/student`) and the few-step one (`FOLDER/student-fewstep`), by the project's own trainer.

    With `go_on` the second phase alone, from the few-step one, on other draws.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from factory.pocket.build import pack_world
    from factory.pocket.fit import half_is_fast
    from trainer.loop import train
    from trainer.sample import save_student

    teacher, few_step = str(folder / "people" / "model"), folder / "student-fewstep"
    training = folder / ("students-on" if go_on else "students")
    # What this replaces stays as it was until the end: a killed training begins with the same weights again.
    first = folder / "student-before"
    if go_on and not first.exists():
        publish_folder(first, lambda place: shutil.copytree(few_step, place, dirs_exist_ok=True))
    rate: dict[str, Any] = {"batch_images": 32, "warmup_steps": 100, "checkpoint_s": 120, "cosine": True}
    recipe = TrainerRecipe(
        teacher=teacher,
        teacher_dtype="bfloat16" if half_is_fast() else "float32",
        size_px=64,
        cache_latents=True,
        threads=len(os.sched_getaffinity(0)),
        start=str(first) if go_on else None,
        adapt=AdaptRecipe(steps=0 if go_on else steps // 2, learning_rate=4e-4, ema_decay=0.998, **rate),
        distill=DistillRecipe(
            steps=steps,
            learning_rate=2e-4 if go_on else 3e-4,
            ema_decay=0.99 if go_on else 0.98,
            guidance_min=3.0,
            guidance_max=3.0,
            **rate,
        ),
    )
    with progress_bars() as bars, follow_training(bars, recipe, training):
        train(recipe, pack_world(folder), training, seed=int(go_on))
    if not go_on:
        adapted: Any = UNet2DConditionModel.from_pretrained(training / "adapt" / "unet", use_safetensors=True)
        adapted.to(torch.float16).save_pretrained(folder / "student")
    save_student(recipe, training, few_step)
