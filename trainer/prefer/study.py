"""The pairs: two models, the same prompts and seeds, drawn once; which is on the left is decided by seed, rater and pair."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.storage import publish_bytes
from factory.models import fingerprint, quiet
from trainer.judging import EvaluateRecipe, PreferRecipe
from trainer.measure import Tick, draw, prepare, read_questions
from trainer.prefer.votes import VOTES, VoteFile, tally

STUDY, RESULT = "study.json", "preference.json"


@dataclass(frozen=True)
class Study:
    """Prompts with A's and B's picture files; the votes lie beside them."""

    recipe: PreferRecipe
    folder: Path
    prompts: list[str]
    pictures: dict[Literal["a", "b"], list[Path]]
    votes: VoteFile

    def left(self, rater: str, pair: int) -> Literal["a", "b"]:
        """Whose picture this rater sees on the left."""
        return "a" if self._draw(f"side/{rater}/{pair}") & 1 else "b"

    def order(self, rater: str) -> list[int]:
        """All pairs, in this rater's own order."""
        return sorted(range(len(self.prompts)), key=lambda pair: (self._draw(f"order/{rater}/{pair}"), pair))

    def result(self) -> dict[str, Any]:
        """The tally of all votes so far, also written to `preference.json`."""
        recipe = self.recipe
        report = {
            "a": {"model": recipe.a, "steps": recipe.steps_a},
            "b": {"model": recipe.b, "steps": recipe.steps_b},
            **{
                ("wins_" + name if name in ("a", "b") else name): value
                for name, value in tally(self.votes.standing()).items()
            },
            "interval": "95%, Wilson, over votes that decided; votes are taken for independent, which those of one rater "
            "or on one pair are not quite",
        }
        publish_bytes(self.folder / RESULT, (json.dumps(report, indent=2) + "\n").encode())
        return report

    def _draw(self, what: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.recipe.seed}/{what}".encode()).digest()[:8], "big")


def open_study(recipe: PreferRecipe, folder: Path, tick: Tick = lambda what, done, of: None) -> Study:
    """Draw what is not drawn and open the votes. Raises LedgerConflict if the folder holds votes about other pictures."""
    quiet()
    settings = {name: _evaluation(recipe, name) for name in ("a", "b")}
    prompts = read_questions(settings["a"]).prompts
    facts = [fingerprint(recipe.a), recipe.steps_a, fingerprint(recipe.b), recipe.steps_b, prompts, recipe.seed]
    facts += [recipe.teacher_guidance]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    mark = folder / STUDY
    if mark.exists() and json.loads(mark.read_text()).get("digest") != digest:
        raise LedgerConflict(
            "the folder holds a study of other models, prompts or steps",
            where=str(folder),
            remedy="Choose another --out folder",
        )
    study = {"digest": digest, "recipe": recipe.model_dump(mode="json"), "prompts": prompts}
    publish_bytes(mark, (json.dumps(study, indent=2) + "\n").encode())
    pictures: dict[Any, list[Path]] = {}
    for name, model in (("a", recipe.a), ("b", recipe.b)):
        pipeline, plans = prepare(model, settings[name])
        steps, guidance = plans[0]
        pictures[name] = draw(model, pipeline, prompts, steps, guidance, settings[name], folder, tick)
    return Study(recipe, folder, prompts, pictures, VoteFile(folder / VOTES))


def kept_study(recipe: PreferRecipe, folder: Path) -> Study:
    """The study that lies in `folder`, whose models may be gone by now: enough to count its votes. Raises EdgeFusionError if there is none or
    it is about others."""
    mark = folder / STUDY
    if not mark.exists():
        raise EdgeFusionError("holds no study", where=str(folder), remedy="Leave --report out to begin one there")
    found = json.loads(mark.read_text())
    kept = PreferRecipe.model_validate(found["recipe"])
    if (kept.a, kept.b) != (recipe.a, recipe.b):
        raise LedgerConflict(
            f"the folder holds a study of {kept.a} and {kept.b}",
            where=str(folder),
            remedy="Name these two, in that order",
        )
    return Study(kept, folder, found["prompts"], {}, VoteFile(folder / VOTES))


def _evaluation(recipe: PreferRecipe, name: str) -> EvaluateRecipe:
    model, steps = (recipe.a, recipe.steps_a) if name == "a" else (recipe.b, recipe.steps_b)
    return EvaluateRecipe(
        models=[model],
        allow_pickle=recipe.allow_pickle,
        data=recipe.data,
        prompts=recipe.prompts,
        steps=[steps],
        teacher_steps=steps,
        teacher_guidance=recipe.teacher_guidance,
        count=recipe.count,
        seed=recipe.seed,
        batch_images=recipe.batch_images,
        threads=recipe.threads,
    )
