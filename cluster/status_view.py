"""`edgefusion status`: the facts of cluster/status.py in a terminal."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.metrics import prometheus_text
from cluster.status import read_status
from cluster.storage import publish_bytes
from cluster.tables import folding, print_tables, stdout
from cluster.usage import Usage, spell_usage

_WATCH_S = 2.0


def status(
    out: Annotated[Path, typer.Argument(help="output folder of a run")],
    watch: Annotated[bool, typer.Option("--watch", help="look again every 2 s until the run ends")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the facts as JSON")] = False,
    prometheus: Annotated[
        Path | None,
        typer.Option(
            help="also write them to this file for Prometheus (node_exporter's textfile folder, name ending in .prom)"
        ),
    ] = None,
) -> None:
    """Say how far a run is, how fast, what died and why. Reads files only: from any terminal, also after the run died."""
    facts = _look(out, prometheus)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if not watch:
        print_tables(view(facts))
        return
    console = stdout()
    if not console.is_terminal:
        _watch_lines(out, prometheus, facts)
        return
    # Whoever has seen enough stops looking; the run goes on.
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(folding(view(facts)), console=console, auto_refresh=False) as live,
    ):
        while facts["state"] == "running":
            time.sleep(_WATCH_S)
            facts = _look(out, prometheus)
            live.update(folding(view(facts)), refresh=True)


def _watch_lines(out: Path, prometheus: Path | None, facts: dict[str, Any]) -> None:
    """Into a file or a pipe: a line when something moved, and the whole at the end."""
    said = ""
    while facts["state"] == "running":
        if (now := _in_a_line(facts)) != said:
            typer.echo(f"{time.strftime('%H:%M:%S')} {now}")
            said = now
        time.sleep(_WATCH_S)
        facts = _look(out, prometheus)
    print_tables(view(facts))


def _in_a_line(facts: dict[str, Any]) -> str:
    stage = next((stage for stage in facts["stages"] if stage["state"] == "running"), None)
    if stage is None:
        return f"{facts['step']}: running"
    done = f" {stage['done']} of {stage['of']} {stage['items']}" if stage["of"] is not None else ""
    left = f", {clock(stage['eta_s'])} left" if stage["eta_s"] else ""
    return f"{stage['stage']}:{done}{left}" if done else f"{stage['stage']}: running"


def _look(out: Path, prometheus: Path | None) -> dict[str, Any]:
    facts = read_status(out, lambda words: typer.echo(words, err=True))
    if prometheus:
        publish_bytes(prometheus, prometheus_text(facts).encode())
    return facts


def view(facts: dict[str, Any]) -> Group:
    """A table of stages, and lines on samples and on what went wrong."""
    table = Table(
        "stage", "state", "done", "rate", "took", "time left", title=f"{facts['recipe']} in {facts['folder']}"
    )
    for stage in facts["stages"]:
        done = f"{stage['done']} of {stage['of']} {stage['items']}" if stage["of"] is not None else ""
        rate = f"{stage['per_s']:.3g} {stage['items']}/s" if stage["per_s"] else ""
        if stage.get("gpu_percent") is not None and stage["state"] == "running":
            rate += f", GPU {stage['gpu_percent']:.0f}%"
        table.add_row(stage["stage"], stage["state"], done, rate, clock(stage["seconds"]), clock(stage["eta_s"]))
    samples = facts["samples"]
    lines = [_state_line(facts)]
    parts = [f"{samples[name]} {name}" for name in ("made", "kept", "rejected", "dead") if samples[name]]
    if samples["planned"]:
        share = f"; kept {facts['kept_share']:.1%}" if facts["kept_share"] is not None else ""
        lines.append(f"samples: {samples['planned']} planned, {', '.join(parts) or 'none made yet'}{share}")
    for what, asked in (("prompts", facts["asked"]), ("captions", facts["asked_for_captions"])):
        if asked:
            lines.append(f"{what}: {spell_usage(Usage(**asked))}")
    if make := facts["make"]:
        now = facts["state"] == "running" and facts["step"] == "make"
        told = [*make["told"], *([f"at the end in {clock(make['eta_s'])}"] if now and make["eta_s"] else [])]
        lines += (
            [f"make{'' if now else ', as it last said'}: {told[0]}", *(f"  {line}" for line in told[1:])]
            if told
            else []
        )
    lines += [f"  {count} {reason}" for reason, count in facts["reasons"].items()]
    lines += [
        f"suspect: {s['unit']} killed {s['deaths']} workers in stage {s['stage']}; "
        f"{s['rows_tried_together']} of its samples are tried together now"
        for s in facts["suspects"]
    ]
    lines += [f"{event['time'][11:19]} {event['level']}: {said(event)}" for event in facts["problems"]]
    if facts["unreadable"]:
        lines.append(f"{facts['unreadable']} ledger files cannot be read")
    if facts["units_not_counted"]:
        lines.append(
            f"{facts['units_not_counted']:,} units of earlier runs are still to be counted; make does so beside its work"
        )
    return Group(table, *(Text(line) for line in lines))


def said(event: dict[str, Any]) -> str:
    """A line of the log in words."""
    where = " ".join(str(event[name]) for name in ("stage", "unit") if name in event)
    what = str(event.get("text") or event.get("error") or "")
    if dead := event.get("dead"):
        what = f"{len(dead)} samples died, the first of {dead[0]['reason']}"
    return f"{event['event']} on {event.get('host', '?')}: {' '.join(part for part in (where, what) if part)}"


def _state_line(facts: dict[str, Any]) -> str:
    state, where = facts["state"], f"process {facts['pid']} on {facts['host']}"
    if state == "unknown":
        return "There is no heartbeat: the run is older than heartbeats, or has not begun."
    if facts["silent"]:
        return (
            f"At {facts['step']}, and silent for {clock(facts['heartbeat_age_s'])}: {where} is stopped or stuck. "
            f"End it (kill -9 {facts['pid']}) or let it go on (fg, or kill -CONT {facts['pid']})."
        )
    if state == "running":
        apart = facts["clock_ahead_s"]
        clocks = (
            f" Its clock is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} this machine's." if apart else ""
        )
        return f"Running: {where}, at {facts['step']}; last sign of life {facts['heartbeat_age_s']:.0f} s ago.{clocks}"
    again = "The same edgefusion run command goes on from here."
    if state == "died":
        return f"Died at {facts['step']} ({where}, last sign of life {clock(facts['heartbeat_age_s'])} ago). {again}"
    if state == "stopped":
        return f"Stopped at {facts['step']}: {facts['why']}. {again}"
    waiting = [stage["stage"] for stage in facts["stages"] if stage["state"] == "waiting"]
    if waiting:
        return f"Finished what was asked for; {waiting[0]} and what follows were not. edgefusion run goes on from here."
    return "Finished."


def clock(seconds: float | None) -> str:
    """Seconds as a person says them; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.0f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"
