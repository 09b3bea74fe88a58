"""What a training drew from, as its folder and the student's say it. Knows no models and opens no data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.cache import is_url
from factory.views import VIEWS
from trainer.recipe import TrainerRecipe

DATA = "data.json"
"""In a training's folder, a row a data set: its place, samples, share, encodings, samples that could not be read; and the phase, where each phase
has data of its own."""
TRAINED_ON = "trained_on.json"
"""In a student's folder, a row for each phase and data set, without this machine's paths."""


def read_data(training: Path) -> list[dict[str, Any]]:
    """The rows of `training/data.json`; none if there is no such file."""
    path = training / DATA
    return json.loads(path.read_text()) if path.exists() else []


def trained_on(recipe: TrainerRecipe, training: Path) -> list[dict[str, Any]]:
    """A row for each phase and each data set that it drew from: `phase`, `data` (its name), `samples`, `share` of the draws."""
    return [
        {"phase": phase, "data": _name_of(fact["data"], training), "samples": fact["samples"], "share": fact["share"]}
        for phase in recipe.phases_run()
        for fact in read_data(training)
        if fact.get("phase", phase) == phase
    ]


def _name_of(data: str, training: Path) -> str:
    """`dataset/views/synt-cur` for the run's own, `l-pps/dataset` for another run's; a URL as it is."""
    place, own = Path(data), training.resolve().parent
    if is_url(data):
        return data
    if place.is_relative_to(own):
        return str(place.relative_to(own))
    return "/".join(place.parts[-4:] if VIEWS in place.parts[-2:] else place.parts[-2:])
