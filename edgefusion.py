"""The front door: one recipe, one chain, and the commands of the four wings. Nothing imports it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, model_validator
from rich.progress import Progress

from cluster.cli import app as cluster_app
from cluster.cli import doctor, mount_cluster
from cluster.errors import EdgeFusionError, LedgerConflict, StageError
from cluster.heartbeat import heartbeat
from cluster.machine import NEEDED, commit, load_per_core, machine_facts, version_of, watch_memory
from cluster.needs import RunView
from cluster.progress import console, progress_bars
from cluster.recipe import Settings, load_recipe, recipe_digest
from cluster.runner import ClusterRecipe, make_runner, stop_ray
from cluster.simulate_view import mount_simulate
from cluster.status_view import status
from cluster.storage import publish_bytes, sweep_partials
from export.cli import app as export_app
from export.recipe import ExportRecipe
from factory.cli import app as factory_app
from factory.recipe import FactoryRecipe
from trainer.cli import app as trainer_app
from trainer.progress import follow_training
from trainer.recipe import TrainerRecipe
from trainer.reproduce.cli import app as reproduce_app
from trainer.zoo import app as zoo_app

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "pocket.yaml"
RUN = "run.json"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From prompts and GPUs to a small, fast, on-device text-to-image model.",
    epilog="Any command takes --debug, which shows the traceback of an error.",
)
for name, wing in (
    ("factory", factory_app),
    ("trainer", trainer_app),
    ("export", export_app),
    ("cluster", cluster_app),
    ("zoo", zoo_app),
    ("reproduce", reproduce_app),
):
    app.add_typer(wing, name=name)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgefusion {version_of('edgefusion')}, commit {commit()[:10]}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="print the version and stop")
    ] = False,
) -> None:
    """Options of the front door itself."""


app.command()(doctor)
app.command()(status)


class Recipe(Settings):
    """Everything a run depends on."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="short name in lower-case letters, digits and dashes"
    )
    seed: int = Field(default=0, ge=0, description="seed of the plan and of training")
    cluster: ClusterRecipe = ClusterRecipe()
    factory: FactoryRecipe
    trainer: TrainerRecipe
    export: ExportRecipe = ExportRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.trainer.adapt.steps == 0 and self.trainer.distill.steps == 0:
            raise ValueError("trainer.adapt.steps and trainer.distill.steps are both 0, so there is nothing to train")
        distill, export = self.trainer.distill, self.export
        if distill.steps and distill.phases and export.steps % distill.phases:
            raise ValueError(
                f"export.steps ({export.steps}) is no multiple of trainer.distill.phases ({distill.phases}), and the student learns to "
                "step from edge to edge only; change one of the two"
            )
        if distill.steps and distill.guidance_input and export.guidance_scale is None:
            raise ValueError(
                "trainer.distill.guidance_input needs export.guidance_scale, which a build is fixed at; "
                f"choose one from {distill.guidance_min + 1:g} to {distill.guidance_max + 1:g}"
            )
        return self


class Chain:
    """One run of a recipe into a folder. Each step knows by its output whether it is done, so a rerun goes on where it stopped."""

    STEPS = ("plan", "make", "select", "train", "student", "samples", "export", "report")

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.data, self.training, self.student = out / "dataset", out / "training", out / "student"
        self.facts = self._claim()

    def run(self, until: str = "report") -> bool:
        """Run what is missing up to step `until`; returns False if there was nothing to do."""
        steps = self.STEPS[: self.STEPS.index(until) + 1]
        todo = [step for step in steps if not self._is_done(step)]
        if not todo:
            return False
        if "train" in steps:
            self._refuse_late_decisions()
        from factory.models import quiet, resolve
        from factory.plan import resolve_models
        from trainer.mix import sources_of

        if "train" in todo:
            # A data set that is not there is told now, not after hours of making.
            sources_of(self.recipe.trainer, self.data, self.recipe.cluster.cache)
        resolve_models(self.recipe.factory)
        resolve(self.recipe.trainer.teacher)
        resolve(self.recipe.trainer.start or self.recipe.trainer.teacher)
        quiet()
        self._save()
        sweep_partials(self.out)
        with watch_memory() as peak, progress_bars() as bars, heartbeat(self.out) as begin:
            for step in todo:
                begin(step)
                began = time.monotonic()
                self.facts.setdefault("load", {})[step] = round(load_per_core(), 1)
                result = getattr(self, f"_{step}")(bars)
                self.facts["seconds"][step] = round(self.facts["seconds"].get(step, 0) + time.monotonic() - began, 1)
                self.facts["peak_memory_bytes"] = max(peak(), self.facts.get("peak_memory_bytes", 0))
                self.facts |= result or {}
                self._save()
        return True

    def _claim(self) -> dict[str, Any]:
        """What the folder says of this recipe's run, or a new run's facts; refuses a folder that holds another recipe's run.

        Nothing is written yet: a recipe whose models are not there must not take the folder.
        """
        path, digest = self.out / RUN, recipe_digest(self.recipe)
        if path.exists():
            try:
                facts = json.loads(path.read_text())
                same = facts["recipe_digest"] == digest
            except (ValueError, KeyError):
                raise LedgerConflict("cannot be read", where=str(path), remedy="Choose another --out folder") from None
            if not same:
                raise LedgerConflict(
                    f"the folder holds a run of another recipe: {_first_difference(facts['recipe'], self.recipe)}",
                    where=str(self.out),
                    remedy="Choose another --out folder, or go back to that recipe",
                )
            return facts
        if self.out.is_dir() and any(self.out.iterdir()):
            raise LedgerConflict(
                "the folder is not empty and holds no run", where=str(self.out), remedy="Choose another --out folder"
            )
        facts = {
            "recipe_digest": digest,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": {package: version_of(package) for package in NEEDED},
            "commit": commit(),
            "machine": machine_facts(),
            "seconds": {},
            "load": {},
        }
        return facts

    def _save(self) -> None:
        publish_bytes(self.out / RUN, (json.dumps(self.facts, indent=2) + "\n").encode())

    def _is_done(self, step: str) -> bool:
        if step == "select":
            return "funnel" in self.facts and self._holds_decisions()
        if step == "export":
            return all((self.out / "export" / target / "bundle.json").exists() for target in self.recipe.export.targets)
        proof = {
            "plan": self.data / "plan.parquet",
            "make": self.data / "manifest.parquet",
            "train": self.student,
            "student": self.student,
            "samples": self.out / "samples",
            "report": self.out / "report.html",
        }
        return proof[step].exists()

    def _holds_decisions(self) -> bool:
        """The shards, and the counts noted of them, include everything that people decided so far."""
        from factory.make import is_packed
        from factory.pack import packed_decisions

        return is_packed(self.data) and self.facts.get("decisions_sha256", "") == packed_decisions(self.data)

    def _refuse_late_decisions(self) -> None:
        """A student must not be trained on two data sets, nor a report show the counts of one it never saw."""
        from factory.decisions import digest_decisions, read_decisions

        if "funnel" not in self.facts or not (self.training.exists() or self.student.exists()):
            return
        if self.facts.get("decisions_sha256", "") != digest_decisions(read_decisions(self.data)):
            raise LedgerConflict(
                "people decided anew about the data set after training began",
                where=str(self.out),
                remedy="Delete training, student, samples, export and report.html there to train on the curated pictures, "
                "or take the decisions back",
            )

    def _plan(self, bars: Progress) -> None:
        from factory.plan import make_plan

        plan = self.recipe.factory.plan
        total = plan.prompts if plan.kind == "written" else plan.limit
        what = "writing prompts" if plan.kind == "written" else "taking in pictures"
        task = bars.add_task(f"plan: {what}", total=total)
        make_plan(self.recipe.factory, self.recipe.seed, self.data, lambda n: bars.advance(task, n))

    def _make(self, bars: Progress) -> None:
        from factory.make import make
        from factory.units import unit_sizes, units_left

        each = self.recipe.factory.make.unit_images
        sizes = unit_sizes(self.data, each)
        left = sum(sizes[number] for number in units_left(self.data, each))
        task = bars.add_task("make: pictures", total=sum(sizes), completed=sum(sizes) - left)
        runner = make_runner(self.recipe.cluster)
        try:
            make(self.recipe.factory, self.data, runner, lambda n: bars.advance(task, n))
        finally:
            runner.close()

    def _select(self, bars: Progress) -> dict[str, Any]:
        from factory.pack import packed_decisions
        from factory.views import pack_all

        task = bars.add_task("select and pack", total=1)
        funnel = pack_all(self.recipe.factory, self.data, self.recipe.name)
        bars.advance(task)
        if not funnel["kept"]:
            why = ", ".join(f"{count} {reason}" for reason, count in funnel["reasons"].items())
            raise StageError(
                f"the data set is empty: of {funnel['planned']} planned samples none was kept ({why})",
                where=str(self.data),
                remedy="Look at what came in, or loosen factory.select in a run of its own (another --out)",
            )
        return {"funnel": funnel, "decisions_sha256": packed_decisions(self.data)}

    def _train(self, bars: Progress) -> None:
        from cluster.training import launch
        from trainer.loop import train
        from trainer.mix import sources_of

        recipe, folder, seed = self.recipe.trainer, self.training.resolve(), self.recipe.seed
        data = sources_of(recipe, self.data, self.recipe.cluster.cache)
        with follow_training(bars, self.recipe.trainer, folder):
            try:
                launch(
                    lambda: train(recipe, data, folder, seed),
                    self.recipe.cluster,
                    folder,
                    recipe.threads,
                    self.recipe.cluster.trains_on_gpu(),
                )
            finally:
                if self.recipe.cluster.runner == "ray":
                    stop_ray()

    def _student(self, bars: Progress) -> None:
        from trainer.sample import save_student

        task = bars.add_task("student folder", total=1)
        save_student(self.recipe.trainer, self.training, self.student)
        bars.advance(task)

    def _samples(self, bars: Progress) -> None:
        from trainer.evaluate import write_samples

        task = bars.add_task("samples: teacher and student", total=1)
        recipe = self.recipe
        write_samples(
            recipe.trainer.teacher,
            self.student,
            self._prompts(16),
            recipe.trainer.grid_seed,
            self._guidance(),
            recipe.trainer.judge or recipe.factory.make.scorer,
            recipe.trainer.threads,
            self.out / "samples",
        )
        bars.advance(task)

    def _export(self, bars: Progress) -> None:
        from export.bundle import export_student

        task = bars.add_task("export", total=None)
        export_student(
            self.student,
            self._prompts(16),
            self.recipe.export,
            self.out / "export",
            lambda what: bars.update(task, description=f"export: {what}"),
        )
        bars.update(task, description="export", total=1, completed=1)

    def _report(self, bars: Progress) -> None:
        from export.report import write_report

        task = bars.add_task("report", total=1)
        write_report(self.out, self.facts)
        bars.advance(task)

    def _guidance(self) -> float:
        """The teacher's scale where it draws; where pictures came in, the one that the student learned."""
        teacher = self.recipe.factory.make.teacher
        return teacher.guidance if teacher is not None else self.recipe.trainer.distill.guidance_max

    def _prompts(self, count: int) -> list[str]:
        from factory.pack import read_manifest

        return list(self.recipe.trainer.grid_prompts) or [row["prompt"] for row in read_manifest(self.data)[:count]]


def _first_difference(there: dict[str, Any], here: Recipe) -> str:
    """The first key with another value, in words."""

    def walk(one: Any, other: Any, key: str) -> str:
        if isinstance(one, dict) and isinstance(other, dict):
            pairs = ((name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other]))
            return next((walk(a, b, f"{key}.{name}" if key else name) for name, a, b in pairs if a != b), "")
        return f"{key} is {json.dumps(one)} there and {json.dumps(other)} now"

    return walk(there, here.model_dump(mode="json"), "")


_RECIPE = typer.Argument(help="a recipe, such as recipes/pocket.yaml")
_OUT = typer.Option(
    help="output folder, runs/NAME for NAME.yaml if left out; the same command again goes on from what is there"
)
_SET = typer.Option("--set", help="override a key: --set trainer.adapt.steps=20 (repeatable)")


def _run(recipe: Path, out: Path | None, overrides: list[str] | None, until: str) -> None:
    began = time.monotonic()
    out = out or Path("runs") / recipe.stem
    chain = Chain(load_recipe(Recipe, recipe, overrides or []), out)
    if not chain.run(until):
        look = f" Look at {out / 'report.html'}" if until == "report" else ""
        typer.echo(f"{out}: nothing to do, the run is complete.{look}")
        return
    typer.echo(f"{out}: done in {time.monotonic() - began:.0f} s")
    if funnel := chain.facts.get("funnel"):
        typer.echo("planned {planned} = kept {kept} + rejected {rejected} + dead {dead}".format(**funnel))
    if until == "report":
        typer.echo(f"open {out / 'report.html'}")


@app.command()
def run(
    recipe: Annotated[Path, _RECIPE] = DEFAULT_RECIPE,
    out: Annotated[Path | None, _OUT] = None,
    overrides: Annotated[list[str] | None, _SET] = None,
) -> None:
    """Run the whole chain: plan, make, select, pack, adapt, distill, export, report. Kill it anywhere; run it again to go on."""
    _run(recipe, out, overrides, "report")


def _mount(wing: typer.Typer, until: str, what: str) -> None:
    @wing.command("run", help=f"{what} Rerun to go on after a kill.")
    def run_wing(
        recipe: Annotated[Path, _RECIPE] = DEFAULT_RECIPE,
        out: Annotated[Path | None, _OUT] = None,
        overrides: Annotated[list[str] | None, _SET] = None,
    ) -> None:
        _run(recipe, out, overrides, until)


_mount(factory_app, "select", "Run the chain as far as the packed data set.")
_mount(trainer_app, "samples", "Run the chain as far as the student and its sample grid.")
_mount(export_app, "export", "Run the chain as far as the proven builds.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what to draw, for example: a red apple, 3d render")],
    model: Annotated[str, typer.Option(help="a student or any diffusers folder, or zoo:NAME")] = "zoo:student-fewstep",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="denoising steps; 1, 2 or 4 for a student")] = 2,
    guidance: Annotated[float, typer.Option(min=0, help="guidance scale; leave it at 1 for a student")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("out.png"),
) -> None:
    """Draw one picture."""
    from factory.models import quiet
    from factory.picture_file import check_picture_path, write_picture
    from trainer.loop import open_pipeline
    from trainer.sample import generate as draw

    check_picture_path(out)
    quiet()
    pipeline = open_pipeline(model)
    began = time.perf_counter()
    picture = draw(pipeline, [prompt], [seed], steps, guidance)[0]
    write_picture(out, picture)
    typer.echo(
        f"wrote {out}: {picture.shape[1]} x {picture.shape[0]}, {steps} steps, {time.perf_counter() - began:.2f} s"
    )


@app.command()
def report(out: Annotated[Path, typer.Argument(help="output folder of a run")]) -> None:
    """Write OUT/report.html anew from what the run left behind."""
    from export.report import write_report

    try:
        facts = json.loads((out / RUN).read_text())
    except (OSError, ValueError):
        raise EdgeFusionError(
            "holds no run", where=str(out), remedy="Give the --out folder of edgefusion run"
        ) from None
    typer.echo(f"wrote {write_report(out, facts)}")


def cluster_view(path: Path, overrides: list[str]) -> RunView:
    """What the cluster wing may know of a recipe, as the other wings tell it."""
    from factory.needs import factory_view
    from trainer.needs import trainer_view

    recipe = load_recipe(Recipe, path, overrides)
    view = RunView(recipe.name, recipe.cluster, recipe.model_dump(mode="json"))
    return trainer_view(recipe.trainer, factory_view(recipe.factory, view))


mount_cluster(cluster_view, DEFAULT_RECIPE)
mount_simulate(cluster_view)


def main() -> None:
    """Run a command; what a user can mend is said in plain words, with its own exit code, unless --debug asks for more."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except EdgeFusionError as error:
        if debug:
            raise
        console.print(f"[bold red]Error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
