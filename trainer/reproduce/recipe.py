"""The protocol of the miniature: what is held fixed for every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from cluster.likeness import Key, without
from cluster.recipe import Settings, load_recipe
from factory.models import fingerprint
from factory.recipe import FactoryRecipe
from factory.recipe.idle import IDLE
from factory.taxonomy import load_taxonomy
from trainer.options import AdversarialRecipe, LoraRecipe

DataName = Literal["L-orig", "L-pp", "L-pps", "synt", "synt-cur"]
RECIPES = Path(__file__).parent.parent.parent / "recipes"

# L-orig keeps what a crawl keeps: no rule removes anything but the same file and the same drawing (equal hashes and colours). The tables were
# measured so, before a level of duplicates could be switched off by null.
_NO_RULES = ["factory.select.min_clip=-1", "factory.select.min_size_px=0"]
_NO_DEDUP = ["factory.select.max_hamming_bits=0", "factory.select.max_colour_difference=0"]
OVERRIDES: dict[str, list[str]] = {
    "L-orig": ["factory.make.captioner=null", "factory.make.crop.choice=centre", *_NO_RULES, *_NO_DEDUP],
    # No CLIP threshold: the paper's L-pp and L-pps hold the same pictures, and a threshold on raw texts would tear them apart.
    "L-pp": ["factory.make.captioner=null", "factory.select.min_clip=-1"],
    "L-pps": ["factory.select.min_clip=-1"],
    "synt": ["factory.select.min_clip=-1"],
}
"""How each data set departs from its recipe; synt-cur is taken from synt."""


class FactoryPart(Settings):
    """The part of a recipe that makes a data set."""

    model_config = ConfigDict(extra="ignore")

    seed: int = 0
    factory: FactoryRecipe


class TablesRecipe(Settings):
    """`edgefusion reproduce tables`."""

    wild_recipe: str = Field(
        default=str(RECIPES / "pocket-wild.yaml"), description="recipe of L-pps; L-orig and L-pp leave steps of it out"
    )
    synt_recipe: str = Field(default=str(RECIPES / "pocket.yaml"), description="recipe of synt")
    wild_pictures: int | None = Field(default=None, ge=4, description="raw pictures taken in; all if left out")
    synt_prompts: int = Field(
        default=1200, ge=4, description="prompts of synt: about half of L-pps, as in the paper (62.3k to 119.9k)"
    )
    curated_share: float = Field(
        default=0.48, gt=0, le=1, description="share of synt that synt-cur keeps; the paper's 29.9k of 62.3k"
    )
    teacher: str = Field(default="zoo:teacher", description="the large UNet of both phases")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the frozen teacher's weights"
    )
    student: Literal["base", "small", "tiny"] = Field(default="tiny", description="BK-SDM size; the paper's is tiny")
    size_px: int = Field(default=64, ge=32, multiple_of=8, description="training resolution, pixels")
    adapt_steps: int = Field(default=600, ge=1, description="optimiser steps of phase 1, in every row")
    distill_steps: int = Field(default=600, ge=1, description="optimiser steps of phase 2, in every row")
    batch_images: int = Field(default=32, ge=1, description="global batch of both phases, images")
    adapt_rate: float = Field(default=4e-4, gt=0, description="learning rate of phase 1; falls along a cosine")
    distill_rate: float = Field(default=3e-4, gt=0, description="learning rate of phase 2; falls along a cosine")
    ema_decay: float = Field(default=0.98, ge=0, lt=1, description="decay of the moving average that is evaluated")
    guidance: float = Field(default=3.0, ge=0, description="w of phase 2; the guidance scale at 25 steps is w + 1")
    evaluation: Literal["trained", "compositions", "held-out"] = Field(
        default="trained", description="split of the zoo's evaluation set: captions and real pictures"
    )
    judge: str = Field(default="zoo:judge", description="open_clip that evaluates; it filters nothing")
    count: int = Field(default=512, ge=2, description="captions evaluated, one picture each")
    among: int = Field(default=256, ge=2, description="texts that a picture's own competes with in R@1")
    eval_steps: int = Field(default=25, ge=1, description="denoising steps of Table 2's students, DPM++")
    eval_batch_images: int = Field(default=16, ge=1, description="pictures drawn at once")
    seed: int = Field(default=0, ge=0, description="first training seed")
    seeds: int = Field(default=3, ge=1, description="trainings of each row; may be raised later")
    threads: int = Field(default=2, ge=1, description="CPU threads")

    def factory_of(self, name: str) -> FactoryPart:
        """How the data set `name` (not synt-cur) is made."""
        if name == "synt":
            more = [f"factory.plan.prompts={self.synt_prompts}"]
        else:
            more = [] if self.wild_pictures is None else [f"factory.plan.limit={self.wild_pictures}"]
        path = Path(self.synt_recipe if name == "synt" else self.wild_recipe)
        return load_recipe(FactoryPart, path, [*OVERRIDES[name], *more])

    def digest(self, idle: Sequence[Key] = IDLE) -> str:
        """What the results depend on, the models' files included: not how many seeds there are, where the recipes lie, nor their `idle` keys."""
        own = self.model_dump(mode="json", exclude={"seeds", "wild_recipe", "synt_recipe", "threads"})
        taxonomy = load_taxonomy(str(self.factory_of("synt").factory.plan.model_dump()["taxonomy"]))
        made = {name: self.factory_of(name).model_dump(mode="json") for name in OVERRIDES}
        names = sorted({self.teacher, self.judge, "zoo:evalset.parquet", *_files_in(made)})
        files = [fingerprint(name) for name in names if name.startswith("zoo:") or Path(name).exists()]
        told = {name: without(part, [("factory", *key) for key in idle]) for name, part in made.items()}
        return hashlib.sha256(
            json.dumps([own, told, files, taxonomy.model_dump(mode="json")], sort_keys=True).encode()
        ).hexdigest()


class AblationsRecipe(TablesRecipe):
    """`edgefusion reproduce ablations`: the tables' protocol, and what the rows share beside it."""

    adapt_data: DataName = Field(default="synt-cur", description="data set of phase 1, in every row that has one")
    distill_data: DataName = Field(default="synt", description="data set of phase 2, in every row")
    ddim_steps: int = Field(
        default=40, ge=2, description="solver grid of every row; a multiple of `phases` and a divisor of 1000"
    )
    phases: int = Field(default=4, ge=1, description="phases of the rows that have them (PCM)")
    adversarial: AdversarialRecipe = Field(
        default=AdversarialRecipe(learning_rate=1e-3), description="of the rows that have a discriminator"
    )
    lora: LoraRecipe = Field(default=LoraRecipe(rank=32), description="of the row with adapters")
    lora_rate: float = Field(
        default=1e-3, gt=0, description="learning rate of the row with adapters: they want a higher one than weights do"
    )

    @model_validator(mode="after")
    def _edges(self) -> AblationsRecipe:
        if self.ddim_steps % self.phases:
            raise ValueError(f"phases ({self.phases}) does not divide ddim_steps ({self.ddim_steps})")
        return self


def _files_in(tree: Any) -> Iterator[str]:
    """Models and sources that a recipe names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "model" and isinstance(value, str):
                yield value
            elif key == "paths":
                yield from value
            else:
                yield from _files_in(value)
