"""That a data set is made by the models that began it: `models.json` beside the plan holds the digest of each, and later runs are held to it.

Ids of planned pictures vouch for the teacher's files as they were, and a threshold means something only if one model gave all scores. Models
of servers, and scorers of other packages, have no files to take a digest of; a hub name stands for itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster.errors import LedgerConflict
from cluster.storage import publish_bytes
from factory.dead import REOPENED
from factory.models import fresh_fingerprint, resolve
from factory.recipe import MakeRecipe, OpenClipScorer, ServerAccess

MODELS = "models.json"

_Noted = dict[str, dict[str, str]]
"""Key of the recipe to `model`, `mark` (its digest) and `seen` (names, sizes and times of its files, by which a digest is spared)."""


def refuse_other_models(make: MakeRecipe, folder: Path) -> None:
    """Note which models make the data set in `folder`, or hold them to what was noted; a folder of an earlier version is noted as it is.

    Raises LedgerConflict that names the first model whose files are others now. Until a unit is made, those that the plan knows nothing of
    may change.
    """
    path = folder / MODELS
    before, begun = _read(path), any(any((folder / part).glob("*.parquet")) for part in ("ledger", REOPENED))
    now = {key: _noted(before.get(key), *model) for key, model in _models(make).items()}
    for key, one in now.items():
        told = before.get(key, one)
        other = told["model"] == one["model"] and told["mark"] != one["mark"]
        if other and (begun or key.startswith("factory.make.teacher")):
            raise LedgerConflict(
                f"{one['model']} was changed since this data set was begun, which would be of two models then",
                where=key,
                remedy="Put its files back as they were and run the same command again, or start in a new output folder",
            )
    if now != before:
        publish_bytes(path, (json.dumps(now, indent=2, sort_keys=True) + "\n").encode())


def _models(make: MakeRecipe) -> dict[str, tuple[str, str | None]]:
    """Key of the recipe to (model, revision) of all that have files."""
    found: dict[str, tuple[str, str | None]] = {}
    for name, teacher in make.painters().items():
        found[f"factory.make.teachers.{name}" if name else "factory.make.teacher"] = (teacher.model, teacher.revision)
    if make.captioner is not None and not isinstance(make.captioner, ServerAccess):
        found["factory.make.captioner"] = (make.captioner.model, make.captioner.revision)
    clips: dict[str, OpenClipScorer | None] = {"factory.make.scorer": make.scorer}
    for number, scorer in enumerate(make.scores):
        if scorer.kind == "aesthetic":
            found[f"factory.make.scores.{number}"] = (scorer.weights, scorer.revision)
            clips[f"factory.make.scores.{number}.clip"] = scorer.clip
    # A model name of open_clip with a weight tag is no folder.
    found |= {key: (clip.model, clip.revision) for key, clip in clips.items() if clip and clip.pretrained is None}
    return found


def _noted(before: dict[str, str] | None, model: str, revision: str | None) -> dict[str, str]:
    """Gigabytes are read only where a file has another size or time than it had."""
    seen = _look(Path(resolve(model)))
    if before and seen and (before["model"], before["seen"]) == (model, seen):
        return before
    return {"model": model, "mark": fresh_fingerprint(model, revision), "seen": seen}


def _look(place: Path) -> str:
    """Digest of the names, sizes and times of a folder's files; empty for a hub name."""
    if not place.exists():
        return ""
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
        facts = file.stat()
        digest.update(f"{file.relative_to(place)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(path: Path) -> _Noted:
    """What was noted. Raises LedgerConflict if it cannot be read."""
    try:
        told = json.loads(path.read_bytes())
        return {key: {name: str(one[name]) for name in ("model", "mark", "seen")} for key, one in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LedgerConflict(
            "cannot be read",
            where=str(path),
            remedy="If no model changed since this data set was begun, delete it and run the same command again",
        ) from None
