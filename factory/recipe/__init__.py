"""The factory's part of a recipe: what to plan, which models make and judge it, what is kept. Units stand in the names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from cluster.cache import is_url
from cluster.recipe import Settings
from factory.recipe.make import (
    AestheticScorer,
    Captioner,
    CaptionerKeys,
    CropRecipe,
    DiffusersTeacher,
    ImportedScorer,
    MakeRecipe,
    OpenAiCaptioner,
    OpenClipScorer,
    PlainScorer,
    PluginScorer,
    ScorerRecipe,
    SharingTeacher,
    TransformersCaptioner,
    VllmCaptioner,
)
from factory.recipe.names import VIEW_NAME
from factory.recipe.plan import (
    DownloadRecipe,
    OpenAiWriter,
    PicturePlan,
    PlanRecipe,
    PromptFilePlan,
    PromptPlan,
    ServerAccess,
    TransformersWriter,
    VllmWriter,
    Writer,
    WriterKeys,
)
from factory.recipe.select import Cap, ScoreRule, SelectRecipe, Wanted

__all__ = [
    "VIEW_NAME",
    "AestheticScorer",
    "Cap",
    "Captioner",
    "CaptionerKeys",
    "CropRecipe",
    "DiffusersTeacher",
    "DownloadRecipe",
    "FactoryRecipe",
    "ImportedScorer",
    "MakeRecipe",
    "OpenAiCaptioner",
    "OpenAiWriter",
    "OpenClipScorer",
    "PackRecipe",
    "PicturePlan",
    "PlainScorer",
    "PlanRecipe",
    "PluginScorer",
    "PromptFilePlan",
    "PromptPlan",
    "ScoreRule",
    "ScorerRecipe",
    "SelectRecipe",
    "ServerAccess",
    "SharingTeacher",
    "SourceRecipe",
    "TransformersCaptioner",
    "TransformersWriter",
    "VllmCaptioner",
    "VllmWriter",
    "Wanted",
    "Writer",
    "WriterKeys",
]


class PackRecipe(Settings):
    """How what was selected is put into shards."""

    samples_per_shard: int = Field(default=1000, ge=1, description="samples a shard")
    to: str | None = Field(
        default=None,
        description="URL of a store (s3://bucket/prefix) where every packed selection is put as well, views in URL/views/NAME",
    )

    @model_validator(mode="after")
    def _is_a_store(self) -> PackRecipe:
        if self.to is not None and not is_url(self.to):
            raise ValueError(f"{self.to} is no URL of a store, such as s3://bucket/prefix")
        return self


class SourceRecipe(Settings):
    """What the data set comes from, and its licence, for the card and for Croissant."""

    name: str = Field(
        description="as the recipe names it: the model, the path, or the scorer's class; or whatever else had a part"
    )
    licence: str = Field(min_length=1, description="its licence, SPDX where there is one")
    url: str = Field(default="", pattern=r"^(https?://\S+)?$", description="where that can be read")


class FactoryRecipe(Settings):
    """prompts -> pictures -> scores -> selection -> shards."""

    plan: PlanRecipe
    make: MakeRecipe
    select: SelectRecipe = SelectRecipe()
    views: dict[Annotated[str, Field(pattern=VIEW_NAME)], dict[str, Any]] = Field(
        default={},
        description="more selections of the same ledger by name: what differs from `select`; packed in dataset/views/NAME",
    )
    pack: PackRecipe = PackRecipe()
    sources: list[SourceRecipe] = Field(
        default=[], description="licences of models and sources; those of the zoo are known"
    )

    def view(self, name: str) -> SelectRecipe:
        """The rules of a selection: `select` itself for an empty name. Raises KeyError."""
        return SelectRecipe(**{**self.select.model_dump(), **self.views[name]}) if name else self.select

    @model_validator(mode="after")
    def _fits(self) -> FactoryRecipe:
        for name, changes in self.views.items():
            if strange := set(changes) - set(SelectRecipe.model_fields):
                raise ValueError(f"views.{name}.{min(strange)} is not a known key of a selection")
            try:
                self.view(name)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"views.{name}.{place}: {first['msg']}") from None
        make, painters = self.make, self.make.painters()
        if self.plan.kind == "pictures" and painters:
            raise ValueError("make.teacher draws prompts, but plan.kind is pictures: leave the teacher out")
        if self.plan.kind != "pictures" and not painters:
            raise ValueError("make.teacher is missing: who is to draw the prompts?")
        if self.plan.kind != "pictures" and (make.crop or make.captioner):
            raise ValueError("make.crop and make.captioner are for plan.kind pictures; drawn pictures need neither")
        if make.teacher is not None and make.teachers:
            raise ValueError("make.teacher and make.teachers: give one or the other")
        if len({painter.size_px for painter in painters.values()}) > 1:
            raise ValueError("make.teachers draw pictures of different size_px: the trainer wants all alike")
        for name, painter in painters.items():
            if painter.batch_images > make.unit_images:
                raise ValueError(
                    f"make.{f'teachers.{name}' if name else 'teacher'}.batch_images ({painter.batch_images}) is larger than "
                    f"make.unit_images ({make.unit_images}): a batch never crosses units"
                )
        return self
