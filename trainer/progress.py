"""Training seen from the driver: bars fed from the log that the workers write."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from cluster.machine import every
from trainer.recipe import TrainerRecipe


@contextmanager
def follow_training(bars: Progress, recipe: TrainerRecipe, folder: Path) -> Generator[None]:
    """Bars fed from metrics.jsonl, which any worker anywhere writes."""
    from trainer.loop import PHASES
    from trainer.state import METRICS, read_log

    tasks = {
        phase: bars.add_task(f"train: {phase}", total=getattr(recipe, phase).steps)
        for phase in PHASES
        if getattr(recipe, phase).steps
    }

    def look() -> None:
        for phase, task in tasks.items():
            rows = read_log(folder / phase / METRICS)
            bars.update(task, completed=rows[-1]["step"] if rows else 0)

    with every(1.0, look):
        yield
