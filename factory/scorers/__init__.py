"""Scores of pictures beside CLIP's: the contract of a scorer, and how the one that a recipe names is found.

Every score is a column of the ledger; `make` rejects nothing by it. `select`, the cards and the pages find it there by its name.
A scorer that raises for one picture leaves its scores empty (null): the picture is no worse for it, and a rule on that score
rejects it as `NAME is missing`. A scorer that cannot be opened or breaks this contract stops the run.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from cluster.errors import EdgeFusionError, RecipeError, StageError
from factory.ledger import ENTRY, TAKEN
from factory.models.memory import is_out_of_memory
from factory.recipe import FactoryRecipe, MakeRecipe, ScorerRecipe

GROUP = "edgefusion.scorers"
"""Entry points of this group are scorers that other packages bring."""
DIGITS = 6


@dataclass(frozen=True)
class Score:
    """A number that a scorer gives each picture."""

    name: str
    low: float | None
    """Least value; None if there is none."""
    high: float | None
    better: Literal["higher", "lower", "neither"]
    about: str = ""

    def range(self) -> str:
        """`0 to 1`; an open end says so."""
        return f"{'any' if self.low is None else f'{self.low:g}'} to {'any' if self.high is None else f'{self.high:g}'}"


@dataclass(frozen=True)
class Batch:
    """What a scorer sees: N pictures."""

    pictures: list[np.ndarray]
    """H x W x 3 uint8 each."""
    prompts: list[str]
    embeddings: np.ndarray
    """N x D float32, the unit CLIP embeddings of `make.scorer`."""


class Scorer(Protocol):
    """Opened once a worker with the recipe's `options` as keyword arguments; reads no clock and no dice, so a rerun gives the same."""

    scores: Sequence[Score]
    """An attribute of the class: the columns are known before anything is opened."""

    def __call__(self, batch: Batch) -> Mapping[str, Sequence[float | None]]:
        """N numbers for each name in `scores`; None or NaN where there is nothing to say."""
        ...


BUILT_IN = {
    "sharpness": "factory.scorers.plain:Sharpness",
    "entropy": "factory.scorers.plain:Entropy",
    "blank": "factory.scorers.plain:Blank",
    "aesthetic": "factory.scorers.aesthetic:Aesthetic",
    "nsfw": "factory.scorers.detect:Nsfw",
    "faces": "factory.scorers.detect:Faces",
    "text": "factory.scorers.writing:Writing",
}


def load_scorer(recipe: ScorerRecipe) -> Any:
    """The class that the recipe names. Raises RecipeError if there is none or it breaks the contract."""
    if recipe.kind == "import":
        found = class_of(recipe.use)
    elif recipe.kind == "plugin":
        found = _plugin(recipe.name)
    else:
        found = class_of(BUILT_IN[recipe.kind])
    named = getattr(found, "scores", None)
    if not callable(found) or not isinstance(named, list | tuple) or not all(isinstance(s, Score) for s in named):
        raise _broken(recipe, "has no class attribute `scores`, a tuple of factory.scorers.Score")
    if not named or not all(re.fullmatch(r"[a-z][a-z0-9_]{0,39}", score.name) for score in named):
        raise _broken(recipe, "must name its scores by small letters, digits and _")
    return found


def scores_of(recipe: MakeRecipe) -> dict[str, Score]:
    """Every column that the recipe's scorers add to the ledger. Raises RecipeError for a name that is taken."""
    found: dict[str, Score] = {}
    for scorer in recipe.scores:
        for score in load_scorer(scorer).scores:
            name = scorer.prefix + score.name
            if name in TAKEN:
                raise RecipeError(
                    f"{scorer.label()} calls a score {name}, which is the name of a column that every ledger has",
                    where="factory.make.scores",
                    remedy="Give that scorer another `prefix`",
                )
            if name in found:
                raise RecipeError(
                    f"two scores are called {name}", where="factory.make.scores", remedy="Give one scorer a `prefix`"
                )
            found[name] = score
    return found


def check_scores(recipe: FactoryRecipe) -> None:
    """Refuse scorers that are not there and rules for scores that nobody will give, before any work is done. Raises RecipeError."""
    known = {field.name for field in ENTRY if pa.types.is_floating(field.type)} | set(scores_of(recipe.make))
    for view in ("", *recipe.views):
        rules = recipe.view(view)
        if strange := {rules.rank_by, *rules.scores} - known:
            near = difflib.get_close_matches(min(strange), known, n=1, cutoff=0.4)
            raise RecipeError(
                f"no scorer gives {min(strange)}",
                where=f"factory.views.{view}" if view else "factory.select",
                remedy=f"Did you mean {near[0]}? There are: {', '.join(sorted(known))}"
                if near
                else f"Add one to factory.make.scores. There are: {', '.join(sorted(known))}",
            )


class OpenedScorers:
    """The recipe's scorers, opened."""

    def __init__(self, recipe: MakeRecipe) -> None:
        self._opened = [(scorer, _open(scorer)) for scorer in recipe.scores]

    def __call__(self, batch: Batch) -> list[dict[str, float | None]]:
        """All scores of each of N pictures."""
        rows: list[dict[str, float | None]] = [{} for _ in batch.pictures]
        for recipe, scorer in self._opened:
            for start in range(0, len(rows), recipe.batch_images):
                part = slice(start, start + recipe.batch_images)
                some = Batch(batch.pictures[part], batch.prompts[part], batch.embeddings[part])
                for row, scores in zip(rows[part], _score(recipe, scorer, some), strict=True):
                    row |= {recipe.prefix + name: value for name, value in scores.items()}
        return rows


def _open(recipe: ScorerRecipe) -> Any:
    made = load_scorer(recipe)
    try:
        return made(**recipe.options_given())
    except EdgeFusionError:
        raise
    except Exception as error:
        raise StageError(
            f"the scorer cannot be opened: {type(error).__name__}: {error}",
            where=f"factory.make.scores {recipe.label()}",
            remedy="Check its options",
        ) from error


def _score(recipe: ScorerRecipe, scorer: Any, batch: Batch) -> list[dict[str, float | None]]:
    """N rows of scores. A batch that raises is halved down to the picture that does it, and that one has no scores."""
    names = [score.name for score in type(scorer).scores]
    try:
        found = scorer(batch)
    except (EdgeFusionError, OSError):
        raise
    except Exception as error:
        if len(batch.pictures) == 1 and is_out_of_memory(error):
            raise StageError(
                "one picture does not fit into memory",
                where=f"factory.make.scores {recipe.label()}",
                remedy="Leave it out",
            ) from None
        if len(batch.pictures) == 1:
            return [dict.fromkeys(names)]
        half = len(batch.pictures) // 2
        parts = [slice(0, half), slice(half, None)]
        return [
            row
            for part in parts
            for row in _score(recipe, scorer, Batch(batch.pictures[part], batch.prompts[part], batch.embeddings[part]))
        ]
    if not isinstance(found, Mapping) or set(found) != set(names):
        raise _broken(recipe, f"must return a mapping with exactly {names}")
    for name in names:
        if len(found[name]) != len(batch.pictures):
            raise _broken(recipe, f"returned {len(found[name])} numbers of {name} for {len(batch.pictures)} pictures")
    return [{name: _number(recipe, found[name][i]) for name in names} for i in range(len(batch.pictures))]


def _number(recipe: ScorerRecipe, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _broken(recipe, f"returned {value!r}, which is no number") from None
    return round(number, DIGITS) if np.isfinite(number) else None


def class_of(path: str) -> Any:
    """`package.module:Class`, imported; raises RecipeError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise RecipeError(
            f"the scorer {path} does not import ({type(error).__name__}: {error})",
            where="factory.make.scores",
            remedy="Give package.module:Class of a package that is installed here and on every node",
        ) from error


def _plugin(name: str) -> Any:
    from importlib.metadata import entry_points

    there = {point.name: point for point in entry_points(group=GROUP)}
    if name not in there:
        raise RecipeError(
            f"no installed package brings a scorer {name}",
            where="factory.make.scores",
            remedy=f"There are: {', '.join(sorted(there)) or 'none'}; see the group {GROUP}",
        )
    return class_of(there[name].value)


def _broken(recipe: ScorerRecipe, what: str) -> StageError:
    return StageError(
        f"the scorer {what}",
        where=f"factory.make.scores {recipe.label()}",
        remedy="See docs/scores.md for the contract",
    )
