"""What a node that goes away costs: the work unit that each of its workers had in hand, and its models opened again elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from factory.size_lines import span
from factory.sizes import StageProbe

MOST_S = 600.0
"""A lost node should cost minutes."""


def unit_seconds(stages: Sequence[StageProbe], unit_images: int) -> float:
    """Of one unit, through all stages one after the other: a node takes along what earlier ones had made of it there."""
    return unit_images * sum(stage.per_sample_s for stage in stages if stage.samples)


def fitting_unit(stages: Sequence[StageProbe], unit_images: int, batch: int) -> int | None:
    """The largest half, quarter, ... of `unit_images` that is made within `MOST_S`, in whole batches; None if no such is."""
    size = unit_images
    while size % 2 == 0 and (size // 2) % batch == 0:
        size //= 2
        if unit_seconds(stages, size) <= MOST_S:
            return size
    return None


def lines(stages: Sequence[StageProbe], unit_images: int, batch: int) -> list[str]:
    """In words; `batch`: pictures that are drawn at once."""
    seconds, opening = unit_seconds(stages, unit_images), sum(stage.open_s for stage in stages)
    told = [
        f"  lost    a node that is taken away costs some {span(seconds / 3600)} for each unit of {unit_images} that it had in hand, and "
        f"{span(opening / 3600)} to open the models elsewhere"
    ]
    if seconds > MOST_S and (size := fitting_unit(stages, unit_images, batch)) is not None:
        told.append(
            f"          with factory.make.unit_images={size}, set before the run begins, {span(unit_seconds(stages, size) / 3600)} for each"
        )
    return told
