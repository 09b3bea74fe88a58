"""Which models draw, crop, caption and judge the pictures, and how many workers they have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.recipe import Settings
from cluster.served import ServerRecipe
from factory.recipe.names import VIEW_NAME, AllowPickle
from factory.recipe.plan import (
    DEVICE,
    DTYPE,
    ENVIRONMENT,
    OWN_CONCURRENT,
    REVISION,
    Priced,
    ServerAccess,
    refuse_unpinned_code,
)


class DiffusersTeacher(Settings):
    """A text-to-image pipeline run by diffusers."""

    kind: Literal["diffusers"] = "diffusers"
    model: str = Field(description="diffusers folder, hub name or zoo:NAME")
    revision: str | None = Field(default=None, description="commit of a hub model; pin it")
    allow_pickle: AllowPickle = False
    sampler: Literal["dpm++", "ddim", "euler", "lcm"] = Field(default="dpm++", description="scheduler")
    steps: int = Field(default=25, ge=1, le=1000, description="denoising steps")
    guidance: float = Field(default=7.5, ge=0, description="classifier-free guidance scale; 1 is none")
    size_px: int = Field(default=512, ge=32, le=2048, multiple_of=8, description="edge of the pictures, pixels")
    negative_prompt: str = Field(default="", description="what to steer away from")
    batch_images: int = Field(
        default=8, ge=1, description="pictures rendered at once; every batch is filled up to this size"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="compute type")


class SharingTeacher(DiffusersTeacher):
    """One of several teachers."""

    share: float = Field(default=1.0, gt=0, description="share of the pictures, relative to the other teachers")


class OpenClipScorer(Settings):
    """How well a picture fits its prompt, by open_clip."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = Field(
        description="open_clip folder, zoo:NAME, hub name of such a folder, or a model name of open_clip such as ViT-B-32"
    )
    revision: str | None = Field(default=None, description="commit of a hub name; pin it")
    pretrained: str | None = Field(default=None, description="open_clip's weight tag when `model` is a model name")
    allow_pickle: AllowPickle = False
    batch_images: int = Field(default=64, ge=1, description="pictures scored at once")

    @model_validator(mode="after")
    def _pinned_once(self) -> OpenClipScorer:
        if self.revision is not None and self.pretrained is not None:
            raise ValueError("revision pins a hub name; weights that `pretrained` names are open_clip's own")
        return self


class _Scorer(Settings):
    """What every further scorer has."""

    prefix: str = Field(
        default="",
        pattern=r"^([a-z][a-z0-9_]{0,19})?$",
        description="put before its columns, where two would be called alike",
    )
    batch_images: int = Field(default=32, ge=1, description="pictures scored at once")

    def options_given(self) -> dict[str, Any]:
        """Keyword arguments of the scorer's class."""
        return {}

    def label(self) -> str:
        """How errors call it."""
        return str(getattr(self, "kind", ""))


class PlainScorer(_Scorer):
    """Scores that need no key: arithmetic on pixels, and detectors of the extras `scorers` and `text`."""

    kind: Literal["sharpness", "entropy", "blank", "nsfw", "faces", "text"] = Field(
        description="which (docs/scores.md)"
    )


class AestheticScorer(_Scorer):
    """A head on CLIP embeddings, such as LAION's."""

    kind: Literal["aesthetic"] = "aesthetic"
    weights: str = Field(description="safetensors file, folder, hub name or zoo:NAME of the head")
    file: str = Field(default="model.safetensors", description="file in that folder or on the hub")
    revision: str | None = Field(default=None, description=REVISION)
    activation: Literal["none", "relu"] = Field(default="none", description="between layers; LAION's MLP has none")
    clip: OpenClipScorer | None = Field(
        default=None, description="the CLIP that the head was fitted to; make.scorer if left out"
    )

    def options_given(self) -> dict[str, Any]:
        return self.model_dump(include={"weights", "file", "revision", "activation", "clip"})


class ImportedScorer(_Scorer):
    """A class of your own. Its module is imported and runs with your rights: name only code that you trust."""

    kind: Literal["import"] = "import"
    use: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:Class, importable here and on every node"
    )
    options: dict[str, Any] = Field(default={}, description="its keyword arguments")

    def options_given(self) -> dict[str, Any]:
        return dict(self.options)

    def label(self) -> str:
        return self.use


class PluginScorer(_Scorer):
    """A scorer that an installed package brings, by its entry point in the group `edgefusion.scorers`."""

    kind: Literal["plugin"] = "plugin"
    name: str = Field(description="the entry point's name")
    options: dict[str, Any] = Field(default={}, description="its keyword arguments")

    def options_given(self) -> dict[str, Any]:
        return dict(self.options)

    def label(self) -> str:
        return self.name


ScorerRecipe = Annotated[PlainScorer | AestheticScorer | ImportedScorer | PluginScorer, Field(discriminator="kind")]


MAX_PIXELS = 8192 * 8192
"""Cameras of 60 megapixels are below it. A PNG or WebP of so many takes up to a gigabyte while it is opened, a JPEG mostly less."""


class CropRecipe(Settings):
    """How a taken-in picture becomes square."""

    size_px: int = Field(default=512, ge=32, le=2048, description="edge of the crops, pixels")
    choice: Literal["best", "centre"] = Field(
        default="best",
        description="`best`: of the centre and the two ends of the longer side, the one CLIP finds nearest to the text",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=178_956_970,  # beyond it Pillow itself refuses
        description="a picture of more pixels (width times height) is dead; one is opened at a time, a JPEG at a fraction of its size",
    )


class CaptionerKeys(Settings):
    """What every captioner has."""

    model: str = Field(description="folder, hub name or zoo:NAME of an image-text-to-text model, such as a LLaVA")
    revision: str | None = Field(default=None, description=REVISION)
    template: str = Field(default="Describe the picture in one sentence.", description="the question")
    max_new_tokens: int = Field(default=48, ge=4, le=512, description="longest caption, tokens")


class TransformersCaptioner(CaptionerKeys):
    """A vision-language model folder run by transformers, in this process."""

    kind: Literal["transformers"] = "transformers"
    allow_pickle: AllowPickle = False
    template: str = Field(default="<image>", description="what the model reads; <image> stands for the picture")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description=DTYPE)
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description=DEVICE)
    batch_pictures: int = Field(default=32, ge=1, description="pictures captioned at once")


class OpenAiCaptioner(CaptionerKeys, Priced, ServerAccess):
    """Any server that speaks OpenAI's chat completions with pictures, vLLM's among them."""

    kind: Literal["openai"] = "openai"
    base_url: str = Field(description="for example http://127.0.0.1:8000/v1")
    concurrent: int = Field(default=16, ge=1, le=512, description="requests at once of a captioning worker")


class VllmCaptioner(CaptionerKeys):
    """A vision-language model by vLLM; each captioning worker starts a server of its own where it runs."""

    kind: Literal["vllm"] = "vllm"
    environment: str = Field(description=f"{ENVIRONMENT}; on every node that captions")
    server: ServerRecipe = Field(default=ServerRecipe(), description="how that server is run")
    concurrent: int = Field(
        default=256, ge=1, le=512, description=f"{OWN_CONCURRENT}, as far as a work unit has pictures"
    )

    @model_validator(mode="after")
    def _pinned(self) -> VllmCaptioner:
        refuse_unpinned_code(self.model, self.revision, self.server)
        return self


Captioner = Annotated[TransformersCaptioner | OpenAiCaptioner | VllmCaptioner, Field(discriminator="kind")]


class MakeRecipe(Settings):
    """How pictures are made, or taken in, and scored."""

    teacher: DiffusersTeacher | None = Field(default=None, description="draws the prompts; none when pictures come in")
    teachers: dict[Annotated[str, Field(pattern=VIEW_NAME)], SharingTeacher] = Field(
        default={},
        description="several by name in place of one, each with its share; the name is the attribute `teacher` of its pictures",
    )
    crop: CropRecipe | None = Field(
        default=None, description="makes taken-in pictures square; 512 px by CLIP if left out"
    )
    captioner: Captioner | None = Field(
        default=None, description="writes the text anew after the crop; the text that came with it is kept beside it"
    )
    scorer: OpenClipScorer
    scores: list[ScorerRecipe] = Field(
        default=[], description="further scorers; each adds columns to the ledger, and rejects nothing (docs/scores.md)"
    )
    unit_images: int = Field(default=64, ge=1, le=1024, description="pictures of one work unit: what a crash can cost")
    picture_kind: Literal["png", "webp", "jpg"] = Field(
        default="png", description="picture format in the shards (webp: lossless)"
    )
    render_workers: int = Field(default=1, ge=1, description="rendering actors, or captioning ones")
    render_gpus: float = Field(
        default=0, ge=0, description="GPUs a rendering or captioning actor; without any it computes on the CPU"
    )
    score_workers: int = Field(default=1, ge=1, description="scoring actors, and cropping ones")
    score_gpus: float = Field(default=0, ge=0, description="GPUs a scoring actor; without any it computes on the CPU")
    crop_gpus: float = Field(default=0, ge=0, description="GPUs a cropping actor; without any it computes on the CPU")
    threads: int = Field(default=1, ge=1, description="CPU threads a worker")
    max_dead_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="stop when more than this share of the samples made in a run died, once `dead_after` were; 1 never stops",
    )
    dead_after: int = Field(default=512, ge=1, description="samples made before max_dead_share means something")

    def painters(self) -> dict[str, DiffusersTeacher]:
        """Who draws, by name; the only one has none. Empty when pictures come in."""
        return dict(self.teachers) if self.teachers else {"": self.teacher} if self.teacher else {}
