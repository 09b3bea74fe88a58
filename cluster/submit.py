# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
"""A run as a Ray job: the driver too runs on the cluster, so this machine may be switched off. Needs `ray[default]` here and there."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.connect import explain
from cluster.errors import EdgeFusionError, StageError, TargetUnavailable
from cluster.events import first_words
from cluster.needs import RunView, run_words
from cluster.storage import refuse_url


def submit(view: RunView, head: str, out: str, home: str = "", program: str = "edgefusion") -> str:
    """Hand the recipe to the cluster whose dashboard is at `head`, as `edgefusion run ... --out OUT` there; returns the job's id.

    It runs in the folder `home` there, from which relative paths start; left out, Ray's own folder of the job, which goes with it.
    Raises StageError in plain words if the cluster cannot be reached or refuses the token, TargetUnavailable without `ray[default]`.
    """
    if not head.startswith(("http://", "https://")):
        raise EdgeFusionError(
            f"{head} is no address of a Ray dashboard", where="--to", remedy="For example http://127.0.0.1:8265"
        )
    refuse_url(out)
    if not home and not out.startswith("/"):
        raise EdgeFusionError(
            f"{out} would be in the job's own folder, which Ray removes",
            where="--out",
            remedy="Give the whole path as the cluster's nodes see it, or --home",
        )
    client = _client(head)
    tree = {**view.tree, "cluster": {**view.tree["cluster"], "runner": "ray", "address": "auto"}}
    # Ray names a job's folder by its contents and keeps it; only the recipe is in it, and no secret is in a recipe.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        there, recipe = ("", "recipe.yaml")
        if home:
            there, recipe = f"here=$PWD; cd {shlex.quote(home)} && ", '"$here/recipe.yaml"'
        line = f"{there}{shlex.join(run_words(view, program))} {recipe} --out {shlex.quote(out)}"
        about = {"edgefusion": view.name, "out": out}
        try:
            return str(client.submit_job(entrypoint=line, runtime_env={"working_dir": folder}, metadata=about))
        except Exception as error:
            raise explain(head, error) from error


def follow(head: str, job: str, tell: Callable[[str], None]) -> None:
    """Tell what the job says until it ends; raises StageError if it did not end well. To be left at any time: the job goes on."""
    client = _client(head)

    async def all_lines() -> None:
        async for lines in client.tail_job_logs(job):
            tell(lines)

    try:
        asyncio.run(all_lines())
        about = client.get_job_info(job)
    except Exception as error:  # whatever the web client has at hand
        raise StageError(
            f"the connection to job {job} broke off ({first_words(error)}); the job goes on",
            where=head,
            remedy=f"ray job logs {job} --address {head} --follow shows the rest",
        ) from error
    if str(about.status.value) in ("STOPPED", "FAILED"):
        last = (str(about.message or "").strip().splitlines() or ["no reason given"])[0]
        raise StageError(
            f"job {job} {about.status.value.lower()}: {last}", where=head, remedy="Submit it again: the run goes on"
        )


def _client(head: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(head)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) or "ray[default]" in str(error):
            raise TargetUnavailable(
                "submitting a job needs Ray's job client", remedy="pip install 'edgefusion[metrics]'"
            ) from None
        raise explain(head, error) from error
    except Exception as error:
        raise explain(head, error) from error
