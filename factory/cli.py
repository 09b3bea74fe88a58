"""`edgefusion factory ...`: look after data sets."""

from __future__ import annotations

import getpass
import json
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ConfigDict
from typer.core import TyperGroup

from cluster.errors import EdgeFusionError, RecipeError
from cluster.recipe import Settings, build_recipe, load_recipe, parse_yaml
from cluster.runner import ClusterRecipe
from factory.recipe import FactoryRecipe, ScorerRecipe
from factory.recipe.earlier import without_gone_keys

_ORDER = (
    *("run", "forecast", "retry-failed", "plan"),
    *("scorers", "score", "select", "views", "curate", "decisions"),
    *("verify", "repair", "pack"),
)


class _InOrder(TyperGroup):
    """Commands as a data set meets them: made, chosen from, kept."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(cls=_InOrder, no_args_is_help=True, help="Prompts to curated shards.")
decisions_app = typer.Typer(no_args_is_help=True, help="What people decided about a data set, as a table.")
app.add_typer(decisions_app, name="decisions")

_FOLDER = typer.Argument(help="a data set folder, such as runs/pocket/dataset", exists=True, file_okay=False)


class _FactoryPart(Settings):
    """The part of a recipe that select and pack need; the wings to the right may say what they like."""

    model_config = ConfigDict(extra="ignore")

    name: str = "data set"
    seed: int = 0
    cluster: ClusterRecipe = ClusterRecipe()
    factory: FactoryRecipe


class _Given(Settings):
    """A scorer of the command line."""

    scorer: ScorerRecipe


@app.command()
def verify(
    folder: Annotated[
        str,
        typer.Argument(
            help="a data set: a folder of shards and manifest.parquet, or the URL of one (s3://bucket/prefix)"
        ),
    ],
) -> None:
    """Prove that the shards are exactly what the manifest says; exits with 4 and names the first damaged sample if not."""
    from cluster.cache import is_url
    from cluster.remote import RemoteStore
    from cluster.storage import local_path
    from factory.verify import verify as prove

    count = prove(RemoteStore(folder) if is_url(folder) else local_path(folder))
    typer.echo(f"{folder}: {count} samples, every shard as the manifest says")


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="a packed data set folder", exists=True, file_okay=False)],
    to: Annotated[str, typer.Option(help="URL of a store, such as s3://bucket/prefix; views go to URL/views/NAME")],
) -> None:
    """Put a packed data set into an object store: shards first, the manifest last. Kill it anywhere; run it again to go on."""
    from cluster.cache import is_url
    from cluster.progress import bar_each, progress_bars
    from factory.views import publish_all

    if not is_url(to):
        remedy = "Give one such as s3://bucket/prefix. On disk `edgefusion factory select` packs beside the ledger"
        raise RecipeError(f"--to {to} is no URL of a store", remedy=remedy)
    with progress_bars() as bars:
        done = publish_all(folder, to, bar_each(bars))
    for place in done:
        typer.echo(
            f"{place.url}: {place.sent} shards sent, {place.there} were there, {place.removed} of an older pack removed"
        )


@app.command()
def repair(
    folder: Annotated[Path, _FOLDER],
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe; without it the one that the run's own run.json recorded")
    ] = None,
) -> None:
    """Write anew, byte for byte, what is missing or damaged of the shards and manifests, from the ledger. A whole data set is left alone."""
    from factory.repair import repair as mend

    with _alone(folder, "repair"):
        part = _factory_part(folder, recipe, [])
        done = mend(part.factory, folder, part.name)
    for name in done.rebuilt:
        typer.echo(f"written anew: {name}")
    for unit in done.reopened:
        typer.echo(f"{unit}: its pictures or its ledger entry are damaged, so it is to be made anew")
    if done.reopened:
        typer.echo("Now run the recipe again: it makes these units, the same to the byte, and packs")
    elif not done.rebuilt:
        typer.echo(f"{folder}: whole, nothing to do")


@app.command("retry-failed")
def retry_failed(folder: Annotated[Path, typer.Argument(help="a run's output folder, or its data set")]) -> None:
    """Give samples that died while they were made, and URLs that failed and may yet answer, another try by the next run."""
    from factory.retry import is_planned, reopen_dead, reopen_urls

    with _alone(folder, "retry-failed"):
        urls = reopen_urls(folder)
        samples, units = reopen_dead(folder) if not urls or is_planned(folder) else (0, 0)
    if urls:
        typer.echo(f"{folder}: {urls} URLs that failed are to be asked again")
    if samples:
        typer.echo(f"{folder}: {samples} dead samples in {units} units are to be made anew")
    if urls or samples:
        typer.echo("Now run the recipe again")
    else:
        typer.echo(
            f"{folder}: no sample died while it was made, and no URL that failed may yet answer: nothing to try again"
        )


@app.command("select")
def select_again(
    folder: Annotated[Path, _FOLDER],
    name: Annotated[
        str | None,
        typer.Option(
            help="one selection of several, in FOLDER/views/NAME; without it all of the recipe, the main one last"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe; without it the one that the run's own run.json recorded")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a key: --set factory.select.min_clip=0.4 (repeatable)")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option("--rule", help="a rule of the selection NAME: --rule min_clip=0.4 (repeatable)")
    ] = None,
) -> None:
    """Select and pack a made data set again: after people decided, by other rules, or as a further selection. No model runs."""
    from factory.decisions import read_decisions
    from factory.views import list_views, pack_all, pack_view, view_folder

    if rules and not name:
        raise RecipeError(
            "--rule is for a selection with a --name", remedy="Give one, or change the main one by --recipe and --set"
        )
    # A further selection lies in a folder of its own, so it may be made while a run is at work: `sweep_partials` spares what is being written.
    with nullcontext() if name else _alone(folder, "select"):
        part = _factory_part(folder, recipe, overrides or [])
        if name:
            funnel = pack_view(part.factory, folder, name, part.name, rules or [])
        else:
            funnel = pack_all(part.factory, folder, part.name)
    sums = "planned {planned} = kept {kept} + rejected {rejected} + dead {dead}"
    packed = list_views(folder)
    for view in () if name else part.factory.views:
        typer.echo(f"{view_folder(folder, view)}: {sums.format(**packed[view]['funnel'])}")
    typer.echo(f"{view_folder(folder, name or '')}: {sums.format(**funnel)}")
    for reason, count in funnel["reasons"].items():
        typer.echo(f"  {reason}: {count}")
    decisions = read_decisions(folder).values()
    typer.echo(
        f"people decided on {len(decisions)} pictures, {sum(d.caption is not None for d in decisions)} captions fixed"
        + (", of which this selection hears nothing (people: ignore)" if _deaf(packed[name or ""]) else "")
    )


def _deaf(summary: dict[str, Any]) -> bool:
    return summary["rules"]["people"] == "ignore"


@app.command("plan")
def plan_more(
    folder: Annotated[Path, _FOLDER],
    refill: Annotated[
        Path, typer.Option(help="the refill.jsonl that select wrote: what lacks, by group and attributes")
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe; without it the one that the run's own run.json recorded")
    ] = None,
) -> None:
    """Plan prompts for the combinations that lack; the next run of the recipe makes their pictures, selects and packs."""
    from factory.refill import plan_refill

    with _alone(folder, "plan"):
        part = _factory_part(folder, recipe, [])
        written, samples = plan_refill(part.factory, part.seed, folder, refill)
    typer.echo(f"{written}: {samples} samples more are planned; now run the recipe again")


@app.command("score")
def score_more(
    folder: Annotated[Path, _FOLDER],
    scorer: Annotated[
        str, typer.Option(help="as in factory.make.scores: sharpness, or {kind: aesthetic, weights: ..., prefix: a_}")
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="a recipe; without it the one that the run's own run.json recorded")
    ] = None,
) -> None:
    """Add the scores of a further scorer to a made data set; no picture is made anew. Rerun the same command to go on; then select by it."""
    import yaml

    from cluster.progress import progress_bars
    from cluster.runner import make_runner
    from factory.rescore import add_scores

    part = _factory_part(folder, recipe, [])
    try:
        given = parse_yaml(scorer, "--scorer")
    except yaml.YAMLError:
        raise RecipeError(f"--scorer {scorer!r} is not valid YAML", remedy="For example --scorer sharpness") from None
    tree = {"scorer": given if isinstance(given, dict) else {"kind": given}}
    runner = make_runner(part.cluster)
    try:
        with _alone(folder, "score"), progress_bars() as bars:
            task = bars.add_task("score: units", total=None)
            told = lambda done, of: bars.update(task, completed=done, total=of)  # noqa: E731
            one, units = add_scores(
                part.factory.make, folder, build_recipe(_Given, tree, "--scorer").scorer, runner, told
            )
    finally:
        runner.close()
    typer.echo(
        f"{one.folder}: {', '.join(one.columns)} of {units} units scored now; select by `--rule scores.{one.columns[0]}.least=...`"
    )


@app.command("scorers")
def scorers_() -> None:
    """List the scorers that `factory.make.scores` can name: columns, range, which way is better."""
    from importlib.metadata import entry_points

    from factory.recipe import PluginScorer
    from factory.scorers import BUILT_IN, GROUP, class_of, load_scorer

    found = {kind: class_of(path) for kind, path in BUILT_IN.items()}
    found |= {f"plugin {p.name}": load_scorer(PluginScorer(name=p.name)) for p in entry_points(group=GROUP)}
    for kind, scorer in found.items():
        for score in scorer.scores:
            typer.echo(f"{kind:12} {score.name:14} {score.range():12} {score.better:8} {score.about}")


@app.command()
def forecast(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/pocket.yaml")],
    gpus: Annotated[int, typer.Option(min=1, help="workers of the whole run, each as fast as this machine")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="of a worker's hour")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="samples of the probe")] = 64,
    sizes: Annotated[
        bool, typer.Option(help="also try some batch sizes, and propose workers, GPU shares and batches for the recipe")
    ] = True,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a key: --set factory.plan.prompts=1000 (repeatable)")
    ] = None,
) -> None:
    """Hours, cost, disk and kept share of a whole run, scaled from a short probe of its own models on this machine; and sizes for it.

    A server that the recipe names for prompts or captions is asked too, and charges."""
    from factory.forecast import lines, planned_samples, probe, scale
    from factory.plan import resolve_models
    from factory.size_lines import lines as size_lines
    from factory.sizes import propose

    part = load_recipe(_FactoryPart, recipe, overrides or [])
    resolve_models(part.factory)
    planned = planned_samples(part.factory)
    found = probe(part.factory, part.seed, samples, lambda stage: typer.echo(f"probing {stage} ...", err=True), sizes)
    told = lines(found, scale(part.factory, found, gpus, price), gpus)
    if sizes:
        sizes_of = (found.stages, found.batches, gpus, price, found.gpu_bytes, found.on_gpu, found.cores)
        told += size_lines(propose(part.factory, planned, *sizes_of))
    for line in told:
        typer.echo(line)


@app.command("views")
def views_(folder: Annotated[Path, _FOLDER]) -> None:
    """List the selections of a data set: how many each keeps, how even and how varied they are."""
    from factory.views import list_views

    found = list_views(folder)
    if not found:
        typer.echo(f"{folder}: nothing is selected and packed yet")
    for name, summary in found.items():
        funnel, varied, balance = summary["funnel"], summary["diversity"], summary["balance"]
        typer.echo(f"{name or '(main)'}: kept {funnel['kept']:,} of {funnel['planned']:,}")
        if varied["vendi_kept"] is not None:
            typer.echo(
                f"  diversity (Vendi score of {varied['pictures']:,} pictures): {varied['vendi_made']} made, {varied['vendi_kept']} kept"
            )
        for attribute, facts in balance.items():
            if facts["evenness_kept"] is not None:
                before, after = facts["evenness_planned"], facts["evenness_kept"] + 0.0  # earlier versions wrote -0.0
                typer.echo(f"  evenness of {attribute}: {before} planned, {after} kept")
        if summary["lacking"]:
            samples = sum(row["lacking"] for row in summary["lacking"])
            typer.echo(f"  {samples:,} samples of {len(summary['lacking'])} combinations lack: see refill.jsonl")


@app.command()
def curate(
    folder: Annotated[Path, _FOLDER],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on the loopback; 0 takes a free one")] = 0,
    who: Annotated[str, typer.Option(help="name that goes with decisions until the page is told another")] = "",
    view: Annotated[
        str, typer.Option(help="show what this selection of several keeps and rejects; decisions are for all of them")
    ] = "",
    show: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the default browser")] = False,
) -> None:
    """Serve the page on which people keep, reject and re-caption, on this machine only. Stop it with Ctrl-C; all is saved."""
    import webbrowser

    from factory.curate.server import Server

    with Server(folder, port, who or getpass.getuser(), view) as server:
        typer.echo(
            "{folder}: {alive} pictures; people so far: {kept} keep, {rejected} reject, {captions} captions".format(
                folder=folder, alive=server.catalogue.alive, **server.overlay.counts()
            )
        )
        typer.echo(f"Open {server.url} (the address is the key: whoever has it may decide)")
        if show:
            webbrowser.open(server.url)
        server.serve()


@decisions_app.command("export")
def export_(
    folder: Annotated[Path, _FOLDER], target: Annotated[Path, typer.Argument(help=".csv or .parquet file to write")]
) -> None:
    """Write what stands decided, one row a picture: id, verdict, reason, caption, who, when."""
    from factory.exchange import export_decisions

    typer.echo(f"wrote {export_decisions(folder, target)} decisions to {target}")


@decisions_app.command("import")
def import_(
    folder: Annotated[Path, _FOLDER], source: Annotated[Path, typer.Argument(help=".csv or .parquet file to read")]
) -> None:
    """Take over decisions from a table, all or none. They win over what stands; columns id, verdict and reason are enough."""
    from factory.exchange import import_decisions

    typer.echo(f"{import_decisions(folder, source)} new decisions from {source}")


@contextmanager
def _alone(folder: Path, what: str) -> Generator[None]:
    """Keeps runs and others of these commands away from the data set until the block ends: what they read must not change under them.

    Raises LedgerConflict while one is at work on it.
    """
    from cluster.claim import claimed, refuse_second_driver

    def say(words: str) -> None:
        typer.echo(words, err=True)

    place = folder.resolve()
    out = place.parent if place.name == "dataset" else place
    if not (out / "run.json").exists():  # no run can go on here, and nothing is to be left in a folder that is none
        refuse_second_driver(out, say)
        yield
        return
    with claimed(out, f"edgefusion factory {what}", say):
        yield


def _factory_part(folder: Path, recipe: Path | None, overrides: list[str]) -> _FactoryPart:
    """The recipe of the data set in `folder`; raises EdgeFusionError if there is none, RecipeError if nothing says its recipe."""
    from factory.plan import PLAN

    if not (folder / PLAN).exists():
        raise EdgeFusionError("holds no plan", where=str(folder), remedy="Give the dataset folder of a run")
    if recipe is not None:
        return load_recipe(_FactoryPart, recipe, overrides)
    record = folder.resolve().parent / "run.json"
    try:
        tree = without_gone_keys(json.loads(record.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(
            f"nothing says by which recipe it was made: {record} is not there",
            where=str(folder),
            remedy="Give the recipe with --recipe",
        ) from None
    if overrides:
        raise RecipeError("--set needs --recipe", remedy="Give the recipe that the overrides change")
    return build_recipe(_FactoryPart, tree, str(record))
