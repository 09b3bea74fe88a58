"""Experiment trackers beside metrics.jsonl and TensorBoard, by Accelerate: into files below the training unless the environment says otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from cluster.errors import TargetUnavailable
from trainer.looks import Look
from trainer.options import Tracker

PROJECT = "edgefusion"


def require_trackers(names: Sequence[Tracker]) -> None:
    """Raises TargetUnavailable for one whose package is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TargetUnavailable(
                f"{name} is not installed, and trainer.trackers names it",
                remedy=f"pip install {name}, or leave it out: metrics.jsonl and TensorBoard's events are always written",
            )


def start_trackers(accelerator: Accelerator, names: Sequence[Tracker], folder: Path, recipe: dict[str, object]) -> None:
    """Begin a run in each tracker. MLflow writes to `folder/mlruns` unless MLFLOW_TRACKING_URI is set, W&B offline to `folder/wandb`
    unless WANDB_MODE is. A training that is resumed is a run of its own there, of the same name."""
    if not names:
        return
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_TRACKING_URI", (folder / "mlruns").resolve().as_uri())
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # files are wanted here, though databases are its default now
        os.environ.setdefault("WANDB_MODE", "offline")
    run = folder.parent.name
    each: dict[str, dict[str, object]] = {
        "mlflow": {"run_name": run},
        "wandb": {"name": run, "dir": str(folder)},
    }
    flat = {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in recipe.items()}
    accelerator.init_trackers(PROJECT, config=flat, init_kwargs={name: each[name] for name in names})


def track(accelerator: Accelerator, phase: str, step: int, values: Mapping[str, float]) -> None:
    """Log `values` to each tracker, under names of the phase's own: both phases count from 1."""
    named = {f"{phase}/{name}": value for name, value in values.items()} | {f"{phase}/step": step}
    for tracker in accelerator.trackers:
        tracker.log(named, step=_step_for(tracker, step))


def track_look(accelerator: Accelerator, phase: str, look: Look) -> None:
    """Log the scores of a look, and its sheet to each tracker that takes pictures or files."""
    if look.scores:
        track(accelerator, phase, look.step, look.named_scores())
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            with Image.open(look.sheet) as sheet:
                tracker.log_images({f"{phase}/looks": [sheet.convert("RGB")]}, step=_step_for(tracker, look.step))
        elif hasattr(tracker, "log_artifact"):  # Accelerate's MLflow
            tracker.log_artifact(str(look.sheet), f"{phase}/looks")


def _step_for(tracker: Any, step: int) -> int | None:
    """W&B drops what is behind a step that it has seen, as phase 2 would be; without one MLflow has every point at 0."""
    return None if tracker.name == "wandb" else step


def end_trackers(accelerator: Accelerator) -> None:
    """Close them; the process group stays as it is."""
    for tracker in accelerator.trackers:
        tracker.finish()
