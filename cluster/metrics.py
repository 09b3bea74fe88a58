"""Our own Prometheus metrics: of a run, read from its output folder; of the workers, counted inside Ray.

`METRICS` names every metric with its kind and help; the Grafana dashboard (cluster/dashboard.py) may ask for nothing else.
Source of the text format: Prometheus, "Exposition formats", version 0.0.4.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.stage import DEAD, Unit

Labels = dict[str, str]
Sample = tuple[str, Labels, float]

METRICS: dict[str, tuple[str, str]] = {
    "edgefusion_run_state": ("gauge", "1 for the state that the run is in: running, finished, stopped, died, unknown"),
    "edgefusion_heartbeat_age_seconds": ("gauge", "seconds since the driver's last sign of life"),
    "edgefusion_samples_planned": ("gauge", "samples of the plan"),
    "edgefusion_samples_waiting": ("gauge", "samples of the plan that are not in the ledger: the queue"),
    "edgefusion_samples": ("gauge", "samples in the ledger by outcome: made, kept, rejected, dead"),
    "edgefusion_kept_ratio": ("gauge", "kept samples of all that were made, 0 to 1; only once selected"),
    "edgefusion_units_done": ("gauge", "work units in the ledger"),
    "edgefusion_dead_letters": ("gauge", "dead samples by the first words of their reason"),
    "edgefusion_suspect_units": ("gauge", "units whose worker died before they were through"),
    "edgefusion_unreadable_files": ("gauge", "ledger files that cannot be read"),
    "edgefusion_stage_state": ("gauge", "1 for the state that the stage is in: waiting, running, done, stopped, died"),
    "edgefusion_stage_items_done": ("gauge", "pictures or steps that the stage has done"),
    "edgefusion_stage_items": ("gauge", "pictures or steps of the stage in all"),
    "edgefusion_stage_items_per_second": ("gauge", "pictures or steps a second"),
    "edgefusion_stage_seconds": ("gauge", "seconds that the finished stage took"),
    "edgefusion_stage_eta_seconds": ("gauge", "seconds that the stage will still take at its present rate"),
    "edgefusion_make_stage_samples_per_second": ("gauge", "samples a second through a stage of make"),
    "edgefusion_make_stage_busy_ratio": ("gauge", "share of the time of the stage's workers that is work, 0 to 1"),
    "edgefusion_make_stage_workers": ("gauge", "workers of the stage"),
    "edgefusion_make_stage_working": ("gauge", "samples that the stage is working on"),
    "edgefusion_make_stage_waiting": ("gauge", "samples that wait before the stage: its queue"),
    "edgefusion_kept_so_far": ("gauge", "samples that the rules of a row by itself would keep, of those judged"),
    "edgefusion_judged_so_far": ("gauge", "samples that those rules have judged"),
    "edgefusion_kept_foretold": ("gauge", "samples kept at the end before duplicates: expected, least and most (95%)"),
    "edgefusion_kept_wanted": ("gauge", "samples that the recipe wants to keep at most (select.best)"),
    "edgefusion_wanted_samples_short": ("gauge", "samples that wanted combinations will lack at the end, foretold"),
    "edgefusion_training_loss": ("gauge", "last logged loss by phase"),
    "edgefusion_training_images_per_second": ("gauge", "images a second that training reads, by phase"),
    "edgefusion_training_gpu_busy_ratio": (
        "gauge",
        "share of the time that the GPU works, 0 to 1, by phase; if its driver tells",
    ),
}
WORKER_METRICS: dict[str, tuple[str, str]] = {
    "edgefusion_units": ("counter", "units through the stage; Prometheus sees ray_edgefusion_units_total"),
    "edgefusion_rows_dead": ("counter", "rows that the stage marked dead; seen as ray_edgefusion_rows_dead_total"),
    "edgefusion_unit_seconds": ("histogram", "seconds that the stage took for a unit"),
    "edgefusion_open_seconds": ("gauge", "seconds that the stage took to open its models"),
}
"""Ray's names; its exporter puts `ray_` before and `_total` behind a counter."""
_BOUNDS_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
_RUN_STATES = ("running", "finished", "stopped", "died", "unknown")
_STAGE_STATES = ("waiting", "running", "done", "stopped", "died")


def prometheus_text(facts: dict[str, Any]) -> str:
    """The facts of `read_status` in Prometheus' text format; what is not known is left out."""
    whose = {"run": str(facts["recipe"]), "folder": str(facts["folder"])}
    found: dict[str, list[str]] = {}
    for name, labels, value in _samples(facts):
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**whose, **labels}.items())
        found.setdefault(name, []).append(
            f"{name}{{{shown}}} {value:g}" if abs(value) < 1e5 else f"{name}{{{shown}}} {value!r}"
        )
    lines = [
        line
        for name, (kind, help_text) in METRICS.items()
        if name in found
        for line in (f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *found[name])
    ]
    return "\n".join(lines) + "\n"


def _samples(facts: dict[str, Any]) -> Iterator[Sample]:
    for state in _RUN_STATES:
        yield "edgefusion_run_state", {"state": state}, float(facts["state"] == state)
    samples: dict[str, int] = facts["samples"]
    plain: dict[str, float | None] = {
        "edgefusion_heartbeat_age_seconds": facts["heartbeat_age_s"],
        "edgefusion_samples_planned": samples["planned"],
        "edgefusion_samples_waiting": max(0, samples["planned"] - samples["in_ledger"]),
        "edgefusion_kept_ratio": facts["kept_share"],
        "edgefusion_units_done": facts["units"],
        "edgefusion_suspect_units": len(facts["suspects"]),
        "edgefusion_unreadable_files": facts["unreadable"],
    }
    yield from ((name, {}, float(value)) for name, value in plain.items() if value is not None)
    for outcome in ("made", "kept", "rejected", "dead"):
        yield "edgefusion_samples", {"outcome": outcome}, float(samples[outcome])
    reasons: dict[str, int] = facts["reasons"]
    for reason, count in reasons.items():
        if reason.startswith(f"{DEAD}: "):
            yield "edgefusion_dead_letters", {"reason": reason.removeprefix(f"{DEAD}: ")}, float(count)
    for stage in facts["stages"]:
        yield from _stage_samples(stage)
    if facts["make"]:
        yield from _make_samples(facts["make"])


def _make_samples(make: dict[str, Any]) -> Iterator[Sample]:
    names = {
        "per_s": "samples_per_second",
        "busy": "busy_ratio",
        "workers": "workers",
        "working": "working",
        "waiting": "waiting",
    }
    rows: list[dict[str, Any]] = make["stages"]
    for row in rows:
        for key, name in names.items():
            if row[key] is not None:
                yield f"edgefusion_make_stage_{name}", {"stage": str(row["stage"])}, float(row[key])
    told: dict[str, Any] = make["foretold"]
    yield "edgefusion_kept_so_far", {}, float(told["kept"])
    yield "edgefusion_judged_so_far", {}, float(told["judged"])
    if told["expected"] is not None:
        for bound in ("expected", "least", "most"):
            yield "edgefusion_kept_foretold", {"bound": bound}, float(told[bound])
    if told["best"]:
        yield "edgefusion_kept_wanted", {}, float(told["best"]["of"])
    if told["wanted"]:
        yield "edgefusion_wanted_samples_short", {}, float(told["wanted"]["lacking"])


def _stage_samples(stage: dict[str, Any]) -> Iterator[Sample]:
    label = {"stage": str(stage["stage"])}
    for state in _STAGE_STATES:
        yield "edgefusion_stage_state", {**label, "state": state}, float(stage["state"] == state)
    named = {
        "edgefusion_stage_items_done": stage["done"],
        "edgefusion_stage_items": stage["of"],
        "edgefusion_stage_items_per_second": stage["per_s"],
        "edgefusion_stage_seconds": stage["seconds"],
        "edgefusion_stage_eta_seconds": stage["eta_s"],
    }
    yield from ((name, label, float(value)) for name, value in named.items() if value is not None)
    if label["stage"].startswith("train: "):
        phase = {"phase": label["stage"].removeprefix("train: ")}
        for name, key in (("loss", "loss"), ("images_per_second", "images_per_s")):
            if stage.get(key) is not None:
                yield f"edgefusion_training_{name}", phase, float(stage[key])
        if stage.get("gpu_percent") is not None:
            yield "edgefusion_training_gpu_busy_ratio", phase, float(stage["gpu_percent"]) / 100


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class WorkerMetrics:
    """Counts what one Ray actor does; Ray's own exporter on each node shows it (it needs `ray[default]`, else nothing is exported)."""

    def __init__(self, stage: str) -> None:
        from ray.util import metrics

        keys, self._tags = ("stage",), {"stage": stage}
        help_of = {name: text for name, (_, text) in WORKER_METRICS.items()}

        def made(kind: Any, name: str, **more: Any) -> Any:
            return kind(name, description=help_of[name], tag_keys=keys, **more)

        self._units = made(metrics.Counter, "edgefusion_units")
        self._dead = made(metrics.Counter, "edgefusion_rows_dead")
        self._seconds = made(metrics.Histogram, "edgefusion_unit_seconds", boundaries=_BOUNDS_S)
        self._open = made(metrics.Gauge, "edgefusion_open_seconds")

    @contextmanager
    def opening(self) -> Generator[None]:
        began = time.perf_counter()
        yield
        with contextlib.suppress(Exception):
            self._open.set(time.perf_counter() - began, tags=self._tags)

    def worked(self, before: Unit, done: Unit, seconds: float) -> None:
        """A figure that cannot be told is no reason to lose a unit."""
        died = _dead(done) - _dead(before)
        with contextlib.suppress(Exception):
            self._units.inc(1, tags=self._tags)
            self._seconds.observe(seconds, tags=self._tags)
            if died > 0:
                self._dead.inc(died, tags=self._tags)


def _dead(unit: Unit) -> int:
    return sum(row["outcome"] == DEAD for row in unit.rows)
