"""What a data set comes from: models, sources, scorers, each with its digest or revision and its licence as far as anybody said.

The licences of what ships with this project are known here; those of all else stand in the recipe (`factory.sources`) or are told to lack.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from factory.added import SCORES, added_sets
from factory.models import fingerprint
from factory.recipe import CaptionerKeys, FactoryRecipe, ScorerRecipe, ServerAccess, WriterKeys
from factory.units import unit_name, unit_sizes

KNOWN = {
    **{f"zoo:{name}": "Apache-2.0" for name in ("teacher", "clip", "judge", "captioner", "writer", "student-fewstep")},
    # The packages that the pictures come from: factory/pocket/README.md.
    "zoo:wild.parquet": "MIT AND Apache-2.0",
    "zoo:evalset.parquet": "MIT AND Apache-2.0",
    **dict.fromkeys(("sharpness", "entropy", "blank"), "Apache-2.0"),
    "nsfw": "BSD-2-Clause",
    "faces": "MIT",
    "text": "Apache-2.0",
}
"""By the name that a recipe gives it: SPDX expressions. The last four lines are kinds of scorers."""


@dataclass(frozen=True)
class Part:
    """A row of the card's provenance."""

    part: str
    name: str
    mark: str
    """Digest of the folder, or the hub's revision; empty where there is none."""
    licence: str
    """Empty if nobody said."""
    url: str = ""


def provenance(recipe: FactoryRecipe, folder: Path) -> list[Part]:
    """Everything that had a part in the packed data set in `folder`, in the order of the work; then sources that only the recipe names."""
    told = {source.name: source for source in recipe.sources}
    found: list[Part] = []
    for part, name, mark in _parts(recipe, folder):
        source = told.pop(name, None)
        licence = source.licence if source else KNOWN.get(name, "")
        found.append(Part(part, name, mark, licence, source.url if source else ""))
    named = {one.name for one in found}
    rest = [Part("source", one.name, "", one.licence, one.url) for one in told.values() if one.name not in named]
    return [*found, *rest]


def licences(parts: list[Part]) -> list[str]:
    """Each licence once, in the order of the parts."""
    return list(dict.fromkeys(one.licence for one in parts if one.licence))


def _parts(recipe: FactoryRecipe, folder: Path) -> list[tuple[str, str, str]]:
    """(part, model, digest of the folder or the hub revision)."""
    make, plan = recipe.make, recipe.plan
    found: list[tuple[str, str, str]] = []
    if plan.kind == "written":
        found.append(("prompts", plan.writer.model, mark_of(plan.writer)))
    shares = sum(teacher.share for teacher in make.teachers.values())
    for name, teacher in make.painters().items():
        part = f"pictures, {name} ({make.teachers[name].share / shares:.0%})" if name else "pictures"
        found.append((part, teacher.model, _short(fingerprint(teacher.model, teacher.revision))))
    if make.captioner is not None:
        found.append(("captions", make.captioner.model, mark_of(make.captioner)))
    scorer = make.scorer
    mark = scorer.pretrained or _short(fingerprint(scorer.model, scorer.revision))
    sources = [("source", path, "") for path in plan.paths] if plan.kind != "written" else []
    further = [(f"scores {one.label()}", *_scorer_mark(one)) for one in make.scores]
    return [*sources, *found, ("filter", scorer.model, mark), *further, *_added(folder, make.unit_images)]


def _added(folder: Path, unit_images: int) -> list[tuple[str, str, str]]:
    """Scorers that came later, as far as they are through; a view's folder lies two below the data set's."""
    data = next((place for place in (folder, folder.parent.parent) if (place / SCORES).is_dir()), folder)
    found: list[tuple[str, str, str]] = []
    sets = added_sets(data)
    units = [unit_name(number) for number in range(len(unit_sizes(data, unit_images)))] if sets else []
    for one in (one for one in sets if one.covers(units)):
        kind, scorer = one.scorer["kind"], one.scorer
        name = scorer.get("weights") or scorer.get("use") or scorer.get("name") or kind
        found.append((f"scores {', '.join(one.columns)}, added", name, _short(one.mark) if one.mark else ""))
    return found


def _scorer_mark(scorer: ScorerRecipe) -> tuple[str, str]:
    """(what it opens, its digest)."""
    if scorer.kind != "aesthetic":
        return scorer.label(), ""
    return scorer.weights, _short(fingerprint(scorer.weights, scorer.revision))


def mark_of(model: WriterKeys | CaptionerKeys) -> str:
    """A served model has no files to take a digest of."""
    if isinstance(model, ServerAccess):
        return "by a server"
    return _short(fingerprint(model.model, getattr(model, "revision", None)))


def _short(mark: str) -> str:
    return mark if "@" in mark else f"sha256 {mark[:16]}"
