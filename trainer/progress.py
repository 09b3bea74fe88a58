"""Training seen from the driver: bars fed from the log that the workers write."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from cluster.machine import every
from trainer.options import Phase
from trainer.recipe import TrainerRecipe


def is_finished(training: Path, phase: Phase) -> bool:
    """Whether the folder of a training holds what a phase leaves."""
    return (training / phase / "unet").exists()


@contextmanager
def follow_training(bars: Progress, recipe: TrainerRecipe, folder: Path) -> Generator[None]:
    """A bar for each phase that runs."""
    from trainer.models import PHASES

    steps = {phase: getattr(recipe, phase).steps for phase in PHASES}
    with follow(bars, {f"train: {phase}": (folder / phase, count) for phase, count in steps.items() if count}):
        yield


@contextmanager
def follow(bars: Progress, runs: Mapping[str, tuple[Path, int]]) -> Generator[None]:
    """Bars of (folder, steps) by name, fed from each folder's metrics.jsonl, which any worker anywhere writes."""
    from trainer.state import METRICS, read_log

    # A bar's clock runs from the first step on: the second phase must not count the first one's time, nor Ray's start.
    tasks = {name: bars.add_task(name, total=steps, start=False) for name, (_, steps) in runs.items()}

    def look() -> None:
        for name, task in tasks.items():
            rows = read_log(runs[name][0] / METRICS)
            if rows:
                bars.start_task(task)
            bars.update(task, completed=rows[-1]["step"] if rows else 0)

    with every(1.0, look):
        yield
