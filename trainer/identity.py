"""What makes a training this training: the keys of its recipe and the data that decide its weights, so that only it goes on from its checkpoints.

Keys that decide nothing (where it runs, how it is logged and looked at, when it saves or stops) are not in it. A checkpoint holds the keys and
their values, not a digest of them: a difference can be named, and a key that came since matters only where it is not at its default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from cluster.errors import CorruptShard
from cluster.recipe import Settings
from trainer.options import PHASES
from trainer.recipe import DecoderRecipe, TrainerRecipe

_OF_PHASE = ("checkpoint_s", "spike_factor", "on_spike", "accumulation", "compile_backend")
_OF_PLACE = (
    "allow_pickle",
    "gradient_checkpointing",
    "on_corrupt",
    "max_corrupt_share",
    "trackers",
    "checkpoints",
    "sharding",
    "loaders",
    "cache_latents",
    "threads",
)
IDLE = (*((key,) for key in _OF_PLACE), *((phase, key) for phase in PHASES for key in _OF_PHASE))
"""Keys of a TrainerRecipe that decide no weight: where and in how many parts it is computed, when it is saved, when it stops."""
_OF_DATA = ("own_view", "own_weight", "more_data", "encodings")
"""What they, and a phase's own `data`, say is in the data's own digests, wherever the data lie."""
_OF_SAMPLES = ("grid_prompts", "grid_seed", "judge")
"""Of what is drawn when all is trained."""

_ABSENT = object()


@dataclass(frozen=True)
class Identity:
    """`facts`: nested keys and values that must be the same; `defaults`: of dotted keys, where they have one."""

    facts: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)

    def changes(self, then: Mapping[str, Any]) -> list[str]:
        """`KEY: then X, now Y` for each difference from the facts `then`."""
        return list(self._changes(then, self.facts, ""))

    def refuse_another(self, kept: Mapping[str, Any], path: Path) -> None:
        """Raises CorruptShard unless `kept`, the facts that lie in `path`, are this training's."""
        if found := self.changes(kept):
            encoded = any(".encodings: then null" in one for one in found)
            raise CorruptShard(
                f"is of another recipe or data set: {'; '.join(found)}",
                where=str(path),
                remedy="Go back to those values, or train into a new output folder"
                + ("; encodings that the data set got since then can be deleted again" * encoded),
            )

    def _changes(self, then: Mapping[str, Any], now: Mapping[str, Any], above: str) -> Iterator[str]:
        for name in dict.fromkeys([*then, *now]):
            key = f"{above}{name}"
            # A version that had no such key did what its default does.
            before = then.get(name, self.defaults.get(key, _ABSENT))
            after = now.get(name, _ABSENT)
            if isinstance(before, Mapping) and isinstance(after, Mapping):
                yield from self._changes(before, after, f"{key}.")
            elif before != after:
                yield f"{key}: then {_spell(before)}, now {_spell(after)}"


def training_identity(recipe: TrainerRecipe, phase: str, seed: int, data: list[dict[str, Any]]) -> Identity:
    """Of a phase. `data`: what each data set is, in order."""
    aside = {*_OF_PLACE, *_OF_DATA, *_OF_SAMPLES, *(("distill",) if phase == "adapt" else ())}
    told = {name: value for name, value in recipe.model_dump(mode="json").items() if name not in aside}
    for part in PHASES:
        for key in (*_OF_PHASE, "data"):
            told.get(part, {}).pop(key, None)
    looks = recipe.validation
    if looks is None or looks.keep == "last":
        told["validation"] = None  # looks change no weight unless the best of them is kept
    else:
        told["validation"]["prompts"] = looks.prompts or recipe.grid_prompts
    facts = {"seed": seed, "trainer": told, "data": {str(i): fact for i, fact in enumerate(data, 1)}}
    return Identity(facts, defaults_of(recipe, "trainer."))


def decoder_identity(recipe: DecoderRecipe, files_digest: str) -> Identity:
    """Of a small decoder's training on latents with this digest, which says what `model` and `data` are."""
    tree = recipe.model_dump(mode="json")
    told = {name: value for name, value in tree.items() if name not in ("model", "data", "threads", "allow_pickle")}
    told["fit"] = {name: value for name, value in tree["fit"].items() if name not in _OF_PHASE}
    return Identity({**told, "latents": files_digest}, defaults_of(recipe, ""))


def defaults_of(settings: Settings, above: str) -> dict[str, Any]:
    """Dotted key to default, as JSON, of all that is set; keys that must be given have none."""
    found: dict[str, Any] = {}
    for name, info in type(settings).model_fields.items():
        if not info.is_required():
            found[f"{above}{name}"] = to_jsonable_python(info.get_default(call_default_factory=True))
        if isinstance(value := getattr(settings, name), Settings):
            found |= defaults_of(value, f"{above}{name}.")
    return found


def _spell(value: Any) -> str:
    if value is _ABSENT:
        return "no such key"
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 60 else f"{said[:57]}..."
