"""The settings of `edgefusion trainer evaluate` and `edgefusion trainer prefer`: how models are compared, by figures and by people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from cluster.errors import RecipeError
from cluster.nearest import wrong_folder
from cluster.recipe import Settings
from factory.models import check_pipeline
from factory.pack import MANIFEST
from factory.recipe.names import AllowPickle


class EvaluateRecipe(Settings):
    """How models are compared (`edgefusion trainer evaluate`)."""

    models: list[str] = Field(min_length=1, description="pipeline folders, hub names or zoo:NAME")
    allow_pickle: AllowPickle = False
    data: str | None = Field(
        default=None,
        description="packed data set: prompts and reference pictures; or, beside `prompts`, a folder of reference pictures",
    )
    prompts: str | None = Field(
        default=None,
        description="prompts instead of the data set's: a file, one a line, COCO's captions or a .csv with a column caption or text; or "
        "hub:OWNER/NAME?split=...&column=... for a data set on the hub",
    )
    judge: str = Field(
        default="zoo:judge", description="open_clip folder, zoo:NAME, or model name; not the one that filtered the data"
    )
    judge_pretrained: str | None = Field(
        default=None, description="open_clip's weight tag when `judge` is a model name"
    )
    steps: list[int] = Field(default=[4, 2, 1], min_length=1, description="denoising steps of few-step students")
    teacher_steps: int = Field(
        default=25, ge=1, description="denoising steps of models without a few-step scheduler (LCM's, TCD's), by DPM++"
    )
    teacher_guidance: float = Field(
        default=7.5, ge=0, description="their guidance scale, and that of students that take guidance"
    )
    count: int = Field(default=512, ge=2, description="prompts, one picture each")
    among: int = Field(default=256, ge=2, description="texts that a picture's own competes with, itself included")
    judge_px: int | None = Field(
        default=None,
        ge=32,
        description="edge that pictures and references are resized to before the judge sees them, pixels; as they are if left out",
    )
    references: int | None = Field(
        default=None,
        ge=2,
        description="reference pictures, from the data set; as many as `count`, and 2048 at least, if left out",
    )
    seed: int = Field(default=0, ge=0, description="seed of the first picture, and of the order of the prompts")
    batch_images: int = Field(default=16, ge=1, description="pictures drawn at once")
    threads: int = Field(default=2, ge=1, description="CPU threads")
    attribute_words: dict[str, dict[str, list[str]]] = Field(
        default={},
        description="how prompts say an attribute's values, where not by the value itself: {gender: {man: [man, male], woman: [woman, female]}}; "
        "the n-th word of one value answers to the n-th of another",
    )
    fidelity: bool = Field(default=False, description="also IS and FID on Inception features, by torch-fidelity")
    fidelity_px: int = Field(default=256, ge=32, description="edge that pictures are resized to for these two, pixels")

    @model_validator(mode="after")
    def _asks(self) -> EvaluateRecipe:
        if self.data is None and self.prompts is None:
            raise ValueError("neither data nor prompts is given, so there is nothing to draw")
        return self


class PreferRecipe(Settings):
    """Two models before people (`edgefusion trainer prefer`)."""

    a: str = Field(description="pipeline folder, hub name or zoo:NAME")
    b: str = Field(description="the other one; may be the same with other steps")
    allow_pickle: AllowPickle = False
    steps_a: int = Field(default=4, ge=1, description="denoising steps of A")
    steps_b: int = Field(default=4, ge=1, description="denoising steps of B")
    data: str | None = Field(default=None, description="packed data set whose prompts are drawn")
    prompts: str | None = Field(
        default=None,
        description="prompts instead of the data set's: a file or hub:OWNER/NAME, as `evaluate` takes them",
    )
    count: int = Field(default=100, ge=2, description="pairs")
    teacher_guidance: float = Field(default=7.5, ge=0, description="guidance scale of models without an LCM scheduler")
    seed: int = Field(default=0, ge=0, description="of the pictures, the sides and each rater's order")
    batch_images: int = Field(default=16, ge=1, description="pictures drawn at once")
    threads: int = Field(default=2, ge=1, description="CPU threads")

    @model_validator(mode="after")
    def _asks(self) -> PreferRecipe:
        if self.data is None and self.prompts is None:
            raise ValueError("neither data nor prompts is given, so there is nothing to draw")
        return self


def check_given(models: Sequence[str], data: str | None, prompts: str | None) -> None:
    """Raises EdgeFusionError for models and data that cannot be the ones that were meant, without any heavy import."""
    for model in models:
        check_pipeline(model)
    if data is not None:
        check_data(Path(data), prompts)


def check_data(data: Path, prompts: str | None) -> None:
    """Raises RecipeError for data that does not exist, or from which prompts are to come and that is not packed."""
    if not data.exists() or (not prompts and not (data / MANIFEST).exists()):
        what, remedy = "is no packed data set, and pictures say no prompts", "Give --prompts too, or a packed data set"
        raise wrong_folder(data, MANIFEST, what, remedy, RecipeError)
