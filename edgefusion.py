"""The front door: the commands of the chain and of the four wings. Nothing but tests imports it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from chain import RUN, Chain, Recipe
from cluster.cli import app as cluster_app
from cluster.cli import doctor, mount_cluster
from cluster.errors import EdgeFusionError
from cluster.machine import commit, version_of
from cluster.nearest import wrong_folder
from cluster.needs import Need, RunView
from cluster.progress import console
from cluster.recipe import Settings, build_recipe, load_recipe
from cluster.recipe_view import app as recipe_app
from cluster.recipe_view import mount_recipe
from cluster.simulate_view import mount_simulate
from cluster.status_view import status
from export.cli import app as export_app
from export.profile import Profile
from factory.cli import app as factory_app
from factory.taxonomy import Taxonomy
from trainer.cli import app as trainer_app
from trainer.judging import EvaluateRecipe, PreferRecipe
from trainer.recipe import DecoderRecipe, EncodeRecipe
from trainer.reproduce.cli import app as reproduce_app
from trainer.reproduce.recipe import AblationsRecipe, TablesRecipe
from trainer.zoo import app as zoo_app

_INTERRUPTED = 130
"""How typer, which keeps the KeyboardInterrupt to itself, ends after Ctrl-C or SIGTERM."""
DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "pocket.yaml"

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
    ("recipe", recipe_app),
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
        if (out / "demo").exists():
            from export.pages import serve_line

            typer.echo(f"draw in the browser: {serve_line(out / 'demo')}, then http://localhost:8000")


@app.command()
def run(
    recipe: Annotated[Path, _RECIPE] = DEFAULT_RECIPE,
    out: Annotated[Path | None, _OUT] = None,
    overrides: Annotated[list[str] | None, _SET] = None,
) -> None:
    """Run the whole chain: plan, make, select, pack, adapt, distill, export, pages, report. Kill it anywhere; run it again to go on."""
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
    from factory.models import check_pipeline, quiet
    from factory.picture_file import check_picture_path, write_picture

    check_picture_path(out)
    check_pipeline(model)
    from trainer.models import open_pipeline
    from trainer.sample import generate as draw

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
        raise wrong_folder(out, RUN, "holds no run", "Give the --out folder of edgefusion run") from None
    typer.echo(f"wrote {write_report(out, facts)}")


def cluster_view(path: Path, overrides: list[str]) -> RunView:
    """What the cluster wing may know of a recipe, as the other wings tell it."""
    from export.needs import export_view
    from factory.needs import factory_view
    from trainer.needs import trainer_view

    recipe = load_recipe(Recipe, path, overrides)
    view = RunView(recipe.name, recipe.cluster, recipe.model_dump(mode="json"))
    return export_view(recipe.export, trainer_view(recipe.trainer, factory_view(recipe.factory, view)))


def make_needs(tree: dict[str, Any]) -> tuple[Need, ...]:
    """What the stages of `make` need by the recipe that a run noted, where that placed them."""
    from factory.needs import factory_view

    recipe = build_recipe(Recipe, tree, RUN)
    return factory_view(recipe.factory, RunView(recipe.name, recipe.cluster, tree)).needs


mount_cluster(cluster_view, DEFAULT_RECIPE)
mount_simulate(cluster_view, make_needs)
SCHEMAS: dict[str, type[Settings]] = {
    "decoder": DecoderRecipe,
    "encode": EncodeRecipe,
    "evaluate": EvaluateRecipe,
    "prefer": PreferRecipe,
    "tables": TablesRecipe,
    "ablations": AblationsRecipe,
    "taxonomy": Taxonomy,
    "profile": Profile,
}
"""Settings of single commands and files, which `edgefusion recipe keys --of` knows beside a recipe's."""
mount_recipe(Recipe, SCHEMAS)


def main() -> None:
    """Run a command; what a user can mend is said in plain words, with its own exit code, unless --debug asks for more."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop a run as Ctrl-C does
    try:
        app()
    except EdgeFusionError as error:
        if debug:
            raise
        console.print(f"[bold red]Error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            console.print("Stopped. The same command goes on from here.")
        raise


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
