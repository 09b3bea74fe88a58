"""The Grafana dashboard of a run: one JSON document made from a table of panels, loaded by Grafana's Import or by provisioning.

Reads the metrics of cluster/metrics.py and a few of Ray's own. Source of the shape: Grafana's "Dashboard JSON model".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SOURCE = {"type": "prometheus", "uid": "${source}"}
_ME = 'run=~"$run"'
_WIDTH, _HEIGHT = 8, 7
"""Of a panel, in Grafana's grid of 24 columns."""


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    unit: str = "short"
    kind: str = "timeseries"
    help: str = ""


RUN = (
    Panel("State", ((f"edgefusion_run_state{{{_ME}}} == 1", "{{run}}: {{state}}"),), kind="stat"),
    Panel("Last sign of life", ((f"edgefusion_heartbeat_age_seconds{{{_ME}}}", "{{run}}"),), "s", "stat"),
    Panel("Time left", ((f"edgefusion_stage_eta_seconds{{{_ME}}}", "{{stage}}"),), "s", "stat"),
    Panel(
        "Samples",
        ((f"edgefusion_samples_planned{{{_ME}}}", "planned"), (f"edgefusion_samples{{{_ME}}}", "{{outcome}}")),
        help="planned = kept + rejected + dead once selected; until then pictures count as made.",
    ),
    Panel("Queue", ((f"edgefusion_samples_waiting{{{_ME}}}", "samples not in the ledger"),)),
    Panel("Units in the ledger", ((f"edgefusion_units_done{{{_ME}}}", "{{run}}"),)),
    Panel("Rate", ((f"edgefusion_stage_items_per_second{{{_ME}}}", "{{stage}}"),), "ops"),
    Panel(
        "Done",
        ((f"edgefusion_stage_items_done{{{_ME}}} / (edgefusion_stage_items{{{_ME}}} > 0)", "{{stage}}"),),
        "percentunit",
    ),
    Panel(
        "Stages of make: samples a second",
        ((f"edgefusion_make_stage_samples_per_second{{{_ME}}}", "{{stage}}"),),
        "ops",
    ),
    Panel(
        "Stages of make: busy",
        ((f"edgefusion_make_stage_busy_ratio{{{_ME}}}", "{{stage}}"),),
        "percentunit",
        help="The busiest stage sets the pace: more workers for it, or fewer for the others (edgefusion factory forecast).",
    ),
    Panel(
        "Stages of make: samples that wait",
        (
            (f"edgefusion_make_stage_waiting{{{_ME}}}", "before {{stage}}"),
            (f"edgefusion_make_stage_working{{{_ME}}}", "in {{stage}}"),
            (f"edgefusion_make_stage_workers{{{_ME}}}", "workers of {{stage}}"),
        ),
    ),
    Panel(
        "Kept, foretold",
        (
            (f"edgefusion_kept_so_far{{{_ME}}}", "so far"),
            (f"edgefusion_judged_so_far{{{_ME}}}", "judged so far"),
            (f"edgefusion_kept_foretold{{{_ME}}}", "{{bound}} at the end"),
            (f"edgefusion_kept_wanted{{{_ME}}}", "wanted"),
        ),
        help="By the rules that judge a row by itself, before duplicates, best shares and caps.",
    ),
    Panel("Wanted combinations", ((f"edgefusion_wanted_samples_short{{{_ME}}}", "samples that will lack"),)),
    Panel("Kept share", ((f"edgefusion_kept_ratio{{{_ME}}}", "{{run}}"),), "percentunit"),
    Panel(
        "Dead letters",
        ((f"edgefusion_dead_letters{{{_ME}}}", "{{reason}}"),),
        help="edgefusion factory retry-failed OUT gives them another try.",
    ),
    Panel(
        "Suspects and damage",
        (
            (f"edgefusion_suspect_units{{{_ME}}}", "units that killed workers"),
            (f"edgefusion_unreadable_files{{{_ME}}}", "ledger files that cannot be read"),
        ),
    ),
    Panel("Seconds of finished stages", ((f"edgefusion_stage_seconds{{{_ME}}}", "{{stage}}"),), "s"),
    Panel("Loss", ((f"edgefusion_training_loss{{{_ME}}}", "{{phase}}"),)),
    Panel("Training", ((f"edgefusion_training_images_per_second{{{_ME}}}", "{{phase}}"),), "ops"),
    Panel("GPU in training", ((f"edgefusion_training_gpu_busy_ratio{{{_ME}}}", "{{phase}}"),), "percentunit"),
    Panel("Stages at work", ((f'edgefusion_stage_state{{{_ME},state="running"}} == 1', "{{stage}}"),)),
)
WORKERS = (
    Panel("Units a second", (("sum by (stage) (rate(ray_edgefusion_units_total[5m]))", "{{stage}}"),), "ops"),
    Panel(
        "Seconds a unit, 95th percentile",
        (
            (
                "histogram_quantile(0.95, sum by (stage, le) (rate(ray_edgefusion_unit_seconds_bucket[5m])))",
                "{{stage}}",
            ),
        ),
        "s",
    ),
    Panel("Rows marked dead", (("sum by (stage) (rate(ray_edgefusion_rows_dead_total[5m]))", "{{stage}}"),), "ops"),
    Panel("Opening a stage's models", (("max by (stage) (ray_edgefusion_open_seconds)", "{{stage}}"),), "s"),
)


def dashboard() -> dict[str, Any]:
    """Grafana asks for the Prometheus to read when the file is imported; `run` chooses among the runs it has seen."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in (("The run, from its output folder", RUN), ("The workers, from Ray", WORKERS)):
        panels.append(_row(len(panels) + 1, title, top))
        for i, panel in enumerate(row):
            place = {"x": i % 3 * _WIDTH, "y": top + 1 + i // 3 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
        top += 1 + -(-len(row) // 3) * _HEIGHT
    return {
        "title": "EdgeFusion",
        "uid": "edgefusion",
        "tags": ["edgefusion"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_choice_of_source(), _choice_of_run()]},
        "panels": panels,
    }


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
        "panels": [],
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    # A stat of a state shows the name of the series, not its 1.
    name_only = {"textMode": "name"} if panel.kind == "stat" and panel.unit == "short" else {}
    options = {"stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, **name_only}}.get(panel.kind, {})
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": options,
    }


def _choice_of_source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _choice_of_run() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(edgefusion_run_state, run)", "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }
