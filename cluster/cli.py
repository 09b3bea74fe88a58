"""`edgefusion cluster ...` and `edgefusion doctor`: where work runs and what this machine can do."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.dashboard import dashboard
from cluster.environment import KINDS, default_folder, make_environment
from cluster.errors import EdgeFusionError
from cluster.events import LOG, PROBLEMS, read_events, samples_of
from cluster.machine import NEEDED, OPTIONAL, machine_facts, provided_by, version_of
from cluster.needs import DRIVER, Fit, Node, RunView, as_far_as, own_node, parse_nodes, place, ray_nodes
from cluster.render import PLACES, Options, Place, render
from cluster.storage import publish_bytes
from cluster.tables import print_tables

app = typer.Typer(no_args_is_help=True, help="Where work runs.")


def doctor() -> None:
    """Say what this machine can do, what is missing and how to get it. Exits with 1 if a needed package is missing."""
    table = Table(title="edgefusion doctor", show_header=False)
    for name, value in machine_facts().items():
        table.add_row(name, value)
    table.add_section()
    missing: list[str] = []
    for package in NEEDED:
        found = provided_by(package)
        by = f" (by {found[0]})" if found and found[0] != package else ""
        table.add_row(package, f"{found[1]}{by}" if found else "[red]missing[/]")
        missing += [] if found else [package]
    for package, remedy in OPTIONAL.items():
        table.add_row(package, version_of(package) or f"not installed; optional, {remedy}".replace("[", r"\["))
    print_tables(table)
    if missing:
        typer.echo(f"Missing: {', '.join(missing)}. Mend it with: pip install {' '.join(missing)}", err=True)
        raise typer.Exit(1)


@app.command("storage-check")
def storage_check(
    url: Annotated[str, typer.Argument(help="folder or URL (s3://bucket/prefix) that a run would write to")],
    megabytes: Annotated[int, typer.Option(min=1, help="MiB to write and read for the speed")] = 64,
) -> None:
    """Prove that a store keeps what runs rely on: whole or absent, read after write, true listings; say how fast it is."""
    from cluster.storage_check import Probe, check_storage

    findings = check_storage(url, Probe(stream_bytes=megabytes << 20))
    for finding in findings:
        typer.echo(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.name}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command("log")
def log(
    out: Annotated[Path, typer.Argument(help="output folder of a run")],
    stage: Annotated[str | None, typer.Option(help="of this stage only")] = None,
    unit: Annotated[str | None, typer.Option(help="of this unit only: unit-00012")] = None,
    sample: Annotated[str | None, typer.Option(help="what names this sample: its id, or how it begins")] = None,
    problems: Annotated[bool, typer.Option("--problems", help="warnings and errors only")] = False,
) -> None:
    """Print the log of a run, of all machines in order of time: one JSON object a line, for eyes, jq and log collectors."""
    if not (out / LOG).is_dir():
        raise EdgeFusionError(
            "holds no log", where=str(out), remedy="Give the --out folder of a run; cluster.log may be off"
        )
    found = 0
    for event in read_events(out):
        if (stage, unit) != (event.get("stage") if stage else None, event.get("unit") if unit else None):
            continue
        if problems and event.get("level") not in PROBLEMS:
            continue
        if sample and not any(key.startswith(sample) for key in samples_of(event)):
            continue
        found += 1
        typer.echo(json.dumps(event, ensure_ascii=False))
    if not found:
        letters = out / "dataset" / "dead.parquet"
        dead = (problems or sample is not None) and letters.exists()
        told = f"; every sample that died, in the plan too, stands in {letters}" if dead else ""
        typer.echo(f"the log holds nothing of that{told}", err=True)


environments = typer.Typer(
    no_args_is_help=True, help="Python environments of their own, for programs whose packages fight with ours."
)
app.add_typer(environments, name="environment")


@environments.command("make")
def make_one(
    kind: Annotated[
        str, typer.Argument(help=", ".join(f"{name} ({', '.join(k.requirements)})" for name, k in KINDS.items()))
    ],
    out: Annotated[
        Path | None, typer.Option(help="folder; if left out among this user's own, where recipes find it by its kind")
    ] = None,
    requirement: Annotated[
        list[str] | None, typer.Option(help="install this instead, as pip spells it: vllm==0.33.0 (repeatable)")
    ] = None,
    python: Annotated[str, typer.Option(help="Python to make it of; this one if left out")] = sys.executable,
) -> None:
    """Make an environment and install pinned packages into it: gigabytes, minutes. Kill it anywhere, run it again to go on."""
    folder = out or default_folder(kind)
    made = make_environment(kind, folder, requirement or [], python, tell=typer.echo)
    typer.echo(f"ready: {made}\nrecipes name it by `environment: {folder if out else kind}`")


UNTIL = typer.Option(
    help="only as far as `edgefusion WING run` goes: factory, trainer or export; all of it if left out"
)
SET = typer.Option("--set", help="override a key: --set cluster.train_workers=4 (repeatable)")


def mount_cluster(view_of: Callable[[Path, list[str]], RunView], default: Path) -> None:
    """Add the commands that read a recipe; `view_of` (recipe, overrides) is the front door's, which alone knows whole recipes."""

    @app.command("check")
    def check(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/pocket.yaml")] = default,
        overrides: Annotated[list[str] | None, SET] = None,
        node: Annotated[
            list[str] | None,
            typer.Option(
                help="nodes to check against instead: 4:cpus=16,gpus=1,memory_gib=64,resources.npu=1,labels.zone=a (repeatable)"
            ),
        ] = None,
    ) -> None:
        """Say which workers fit where, which do not and why, before anything starts. Exits with 1 if any does not fit."""
        view = view_of(recipe, overrides or [])
        nodes = [one for text in node or [] for one in parse_nodes(text)]
        if not nodes:
            nodes = (
                [own_node(view.cluster, view.needs)]
                if view.cluster.is_here()
                else ray_nodes(view.cluster, lambda words: typer.echo(words, err=True))
            )
        fits = place(view.needs, nodes)
        _show_fits(view, nodes, fits)
        if any(fit.why for fit in fits) and view.cluster.runner == "ray":
            raise typer.Exit(1)

    @app.command("submit")
    def submit_run(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/edgefusion.yaml")],
        to: Annotated[str, typer.Option(help="the cluster's dashboard: http://127.0.0.1:8265")],
        out: Annotated[str, typer.Option(help="output folder as the cluster's nodes see it; the same again goes on")],
        overrides: Annotated[list[str] | None, SET] = None,
        until: Annotated[str, UNTIL] = "",
        home: Annotated[
            str,
            typer.Option(help="folder, as the cluster's nodes see it, that relative paths of the recipe start from"),
        ] = "",
        wait: Annotated[bool, typer.Option(help="show what it says until it ends; Ctrl-C leaves it running")] = True,
    ) -> None:
        """Run a recipe as a Ray job: the driver is on the cluster too. Relative paths in it are looked up there, in --home."""
        from cluster.submit import follow, submit

        job = submit(as_far_as(view_of(recipe, overrides or []), until), to, out, home)
        typer.echo(f"submitted as {job}; ray job stop {job} --address {to} ends it")
        if wait:
            try:
                follow(to, job, lambda text: typer.echo(text, nl=False))
            except KeyboardInterrupt:
                typer.echo(f"{job} goes on without this terminal")

    @app.command("render")
    def render_files(
        recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/edgefusion.yaml")],
        on: Annotated[str, typer.Option(help="kuberay, slurm, aws, gcp; or grafana for a dashboard of every run")],
        out: Annotated[Path, typer.Option(help="folder for the files")],
        overrides: Annotated[list[str] | None, SET] = None,
        until: Annotated[str, UNTIL] = "",
        images: Annotated[str, typer.Option(help="image names up to their role")] = Options.images,
        storage: Annotated[
            str, typer.Option(help="shared storage: a claim (kuberay), a folder (slurm), HOST:/PATH (aws, gcp)")
        ] = Options.storage,
        secret: Annotated[str, typer.Option(help="name of the Kubernetes secret")] = Options.secret,
        gpus_per_node: Annotated[int, typer.Option(min=1, max=16)] = Options.gpus_per_node,
        cpus_per_node: Annotated[int, typer.Option(min=1, help="of nodes without GPUs")] = Options.cpus_per_node,
    ) -> None:
        """Write what a cluster needs to run the recipe: launch files, Dockerfiles, the resolved recipe. Starts nothing."""
        if on == "grafana":
            path = out / "edgefusion-grafana.json"
            publish_bytes(path, (json.dumps(dashboard(), indent=2) + "\n").encode())
            typer.echo(f"wrote {path}")
            return
        places: dict[str, Place] = {name: name for name in PLACES}
        if on not in places:
            raise EdgeFusionError(f"--on {on} is not known", remedy=f"Use one of {', '.join(PLACES)}, grafana")
        options = Options(images, storage, secret, gpus_per_node, cpus_per_node)
        view = as_far_as(view_of(recipe, overrides or []), until)
        for path in render(view, places[on], options, out):
            typer.echo(f"wrote {path}")


def _node_words(node: Node) -> str:
    """Equal nodes, equal words; of labels only a user's own."""
    amounts = {"CPUs": node.cpus, "GPUs": node.gpus, "GiB": node.memory_gib, **node.resources}
    labels = [f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith("ray.io/")]
    return ", ".join([*(f"{amount:g} {name}" for name, amount in amounts.items()), *labels])


def _show_fits(view: RunView, nodes: list[Node], fits: list[Fit]) -> None:
    kinds = Counter(_node_words(node) for node in nodes)
    for words, count in kinds.items():
        typer.echo(f"{count} x {words}")
    table = Table("step", "stage", "workers", "each", "fits", "where, or why not")
    for fit in fits:
        need = fit.need
        each = f"{need.cpus:g} CPU" + (f", {need.gpus:g} GPU" if need.gpus else "")
        each += f", {need.memory_gib:g} GiB" if need.memory_gib else ", memory not stated"
        each += "".join(f", {amount:g} {name}" for name, amount in need.resources.items())
        where = f"on {len(fit.nodes)} node{'s' * (len(fit.nodes) != 1)}"
        where += "".join(f", {key}={value}" for key, value in need.labels.items())
        workers = f"{need.workers_min} to {need.workers}" if need.workers_min else str(need.workers)
        table.add_row(need.step, need.stage, workers, each, str(fit.placed), fit.why or where)
    print_tables(table)
    typer.echo(f"The process that starts the run does {DRIVER} by itself.")
    if view.vllm_model:
        typer.echo(f"It also runs {view.vllm_model} by vLLM, on a GPU of its own machine that Ray does not count.")
    if view.cluster.runner == "in-process":
        typer.echo("cluster.runner is in-process: all workers take turns in one process, so nothing has to fit.")
