"""The factory's part of a recipe: what to plan, which models make and judge it, what is kept. Units stand in the names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from cluster.cache import is_url
from cluster.recipe import Settings
from cluster.served import ServerRecipe
from cluster.usage import Prices

VIEW_NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"


class TransformersWriter(Settings):
    """A causal language model folder run by transformers, in this process."""

    kind: Literal["transformers"] = "transformers"
    model: str = Field(description="folder, hub name or zoo:NAME of a causal language model")
    template: str = Field(
        default="{attributes} =>", description="what the model reads; {attributes} is `subject: fox; style: flat`"
    )
    temperature: float = Field(default=0.9, ge=0, le=2, description="sampling temperature")
    max_new_tokens: int = Field(default=48, ge=4, le=1024, description="longest prompt, tokens")
    batch_prompts: int = Field(default=64, ge=1, description="prompts written at once")


_API = "`completions`: the model reads the template as it is; `chat`: as a user's message, for models that were taught to chat"
_ENVIRONMENT = (
    "folder or name of the Python environment in which the run starts vLLM as a server on loopback (edgefusion cluster environment make "
    "vllm)"
)


class VllmWriter(TransformersWriter):
    """The same by vLLM. It pins torch, so give it an `environment` of its own; without one it is imported here."""

    kind: Literal["vllm"] = "vllm"
    batch_prompts: int = Field(default=4096, ge=1, description="prompts written at once")
    environment: str | None = Field(default=None, description=f"{_ENVIRONMENT}; left out: vLLM is imported here")
    server: ServerRecipe = Field(default=ServerRecipe(), description="how that server is run")
    api: Literal["completions", "chat"] = Field(default="completions", description=_API)

    @model_validator(mode="after")
    def _served(self) -> VllmWriter:
        if self.environment is None and self.server != ServerRecipe():
            raise ValueError("server says how a server is run, but environment is left out, so none is started")
        return self


class OpenAiWriter(TransformersWriter):
    """Any server that speaks OpenAI's chat completions, vLLM's among them. The key comes from OPENAI_API_KEY."""

    kind: Literal["openai"] = "openai"
    base_url: str = Field(description="for example http://127.0.0.1:8000/v1")
    api: Literal["completions", "chat"] = Field(default="chat", description=_API)
    answer: Literal["text", "json"] = Field(
        default="text",
        description="`json`: the model is to answer with an object that has the prompt under `prompt`; ask for it in the template",
    )
    concurrent: int = Field(default=16, ge=1, le=512, description="requests at once")
    price_input: float | None = Field(
        default=None, ge=0, description="price of a million tokens read, in your currency"
    )
    price_output: float | None = Field(default=None, ge=0, description="price of a million tokens written")
    max_cost: float | None = Field(
        default=None, gt=0, description="stop before the prompts cost more; what is written is kept"
    )

    @model_validator(mode="after")
    def _priced(self) -> OpenAiWriter:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output belong together: give both or neither")
        if self.max_cost is not None and self.price_input is None:
            raise ValueError("max_cost needs price_input and price_output")
        return self

    def prices(self) -> Prices | None:
        if self.price_input is None or self.price_output is None:
            return None
        return Prices(self.price_input, self.price_output)


Writer = Annotated[TransformersWriter | VllmWriter | OpenAiWriter, Field(discriminator="kind")]


_ALIKE = (
    "a prompt that shares this part of its words with an earlier one (Jaccard; 1: the same words) is refused: written anew while there are "
    "tries, else dead"
)


class PromptPlan(Settings):
    """Which prompts are written."""

    kind: Literal["written"] = "written"
    taxonomy: str = Field(
        description="YAML file of groups with attributes and shares; zoo:taxonomy.yaml is the pocket world's"
    )
    prompts: int = Field(ge=1, description="prompts in all")
    images_per_prompt: int = Field(default=1, ge=1, description="pictures of each prompt, each with its own seed")
    tries: int = Field(
        default=4, ge=1, description="how often a prompt that fails its check is written anew before it is dead"
    )
    most_alike: float | None = Field(
        default=None, gt=0, le=1, description=f"{_ALIKE}; left out: none is, for a small taxonomy says the same often"
    )
    writer: Writer


class PromptFilePlan(Settings):
    """Which prompts the user brings."""

    kind: Literal["file"] = "file"
    paths: list[str] = Field(
        min_length=1,
        description="files of prompts: .txt (one a line), .jsonl (an object a line) or .parquet (one a row)",
    )
    prompt_column: str = Field(default="prompt", description="key or column with the prompt; .txt has none")
    group_column: str | None = Field(
        default=None, description="key or column with the prompt's group; `prompts` if left out"
    )
    attribute_columns: list[str] = Field(
        default=[], description="keys or columns that are kept as attributes, for balance, caps and the page"
    )
    images_per_prompt: int = Field(default=1, ge=1, description="pictures of each prompt, each with its own seed")
    limit: int | None = Field(default=None, ge=1, description="take the first so many prompts; all if left out")
    most_alike: float | None = Field(default=1.0, gt=0, le=1, description=_ALIKE)


class DownloadRecipe(Settings):
    """How pictures are fetched whose URLs the plan's files list (docs/ingest.md)."""

    url_column: str = Field(default="url", description="CSV or Parquet column with the URL")
    concurrent: int = Field(default=32, ge=1, le=512, description="downloads at once")
    per_host: int = Field(default=4, ge=1, le=64, description="downloads at once from one host")
    timeout_s: float = Field(default=20.0, gt=0, le=600, description="longest time of one request, seconds")
    tries: int = Field(
        default=3, ge=1, le=10, description="requests of a URL that times out, breaks off or asks to come again"
    )
    back_off_s: float = Field(default=1.0, ge=0, le=60, description="wait before the second try, doubled for each more")
    max_bytes: int = Field(default=16 << 20, ge=1, le=64 << 20, description="larger answers are broken off")
    redirects: int = Field(default=5, ge=0, le=20, description="most redirects followed")
    allow_private: bool = Field(
        default=False, description="also fetch from addresses that are not public: loopback, your own network"
    )
    user_agent: str = Field(default="edgefusion-factory", description="who servers are told is asking")


class PicturePlan(Settings):
    """Which pictures are taken in: real ones with the texts that came with them (the paper's L-orig)."""

    kind: Literal["pictures"] = "pictures"
    paths: list[str] = Field(
        min_length=1,
        description="folders (picture files with .txt or .json beside them), WebDataset shards (.tar), Parquet files, or zoo:wild.parquet",
    )
    picture_column: str = Field(default="picture", description="Parquet column with the picture file's bytes")
    text_column: str = Field(default="text", description="Parquet column with the text")
    metadata_columns: list[str] = Field(
        default=[], description="further Parquet columns that are kept as each sample's `metadata`"
    )
    limit: int | None = Field(default=None, ge=1, description="take the first so many pictures; all if left out")
    download: DownloadRecipe | None = Field(
        default=None, description="`paths` are .txt, .csv or .parquet lists of URLs, and this is how they are fetched"
    )


def _plan_kind(plan: Any) -> str:
    """A plan without `kind` writes prompts."""
    return plan.get("kind", "written") if isinstance(plan, dict) else getattr(plan, "kind", "written")


PlanRecipe = Annotated[
    Annotated[PromptPlan, Tag("written")]
    | Annotated[PromptFilePlan, Tag("file")]
    | Annotated[PicturePlan, Tag("pictures")],
    Discriminator(_plan_kind),
]


class DiffusersTeacher(Settings):
    """A text-to-image pipeline run by diffusers."""

    kind: Literal["diffusers"] = "diffusers"
    model: str = Field(description="diffusers folder, hub name or zoo:NAME")
    revision: str | None = Field(default=None, description="commit of a hub model; pin it")
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
    model: str = Field(description="open_clip folder, zoo:NAME, or a model name of open_clip such as ViT-B-32")
    pretrained: str | None = Field(default=None, description="open_clip's weight tag when `model` is a model name")
    batch_images: int = Field(default=64, ge=1, description="pictures scored at once")


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
    activation: Literal["none", "relu"] = Field(default="none", description="between layers; LAION's MLP has none")
    clip: OpenClipScorer | None = Field(
        default=None, description="the CLIP that the head was fitted to; make.scorer if left out"
    )

    def options_given(self) -> dict[str, Any]:
        return self.model_dump(include={"weights", "file", "activation", "clip"})


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


class CropRecipe(Settings):
    """How a taken-in picture becomes square."""

    size_px: int = Field(default=512, ge=32, le=2048, description="edge of the crops, pixels")
    choice: Literal["best", "centre"] = Field(
        default="best",
        description="`best`: of the centre and the two ends of the longer side, the one CLIP finds nearest to the text",
    )


class TransformersCaptioner(Settings):
    """A vision-language model folder run by transformers, in this process."""

    kind: Literal["transformers"] = "transformers"
    model: str = Field(description="folder, hub name or zoo:NAME of an image-text-to-text model, such as a LLaVA")
    revision: str | None = Field(default=None, description="commit of a hub model; pin it")
    template: str = Field(default="<image>", description="what the model reads; <image> stands for the picture")
    max_new_tokens: int = Field(default=48, ge=4, le=512, description="longest caption, tokens")
    batch_pictures: int = Field(default=32, ge=1, description="pictures captioned at once")


class OpenAiCaptioner(TransformersCaptioner):
    """Any server that speaks OpenAI's chat completions with pictures, vLLM's among them. The key comes from OPENAI_API_KEY."""

    kind: Literal["openai"] = "openai"
    base_url: str = Field(description="for example http://127.0.0.1:8000/v1")
    template: str = Field(default="Describe the picture in one sentence.", description="the question")


class VllmCaptioner(TransformersCaptioner):
    """A vision-language model by vLLM; each captioning worker starts a server of its own where it runs."""

    kind: Literal["vllm"] = "vllm"
    template: str = Field(default="Describe the picture in one sentence.", description="the question")
    environment: str = Field(description=f"{_ENVIRONMENT}; on every node that captions")
    server: ServerRecipe = Field(default=ServerRecipe(), description="how that server is run")


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
    render_workers: int = Field(default=1, ge=1, description="rendering actors")
    render_gpus: float = Field(default=0, ge=0, description="GPUs a rendering actor")
    score_workers: int = Field(default=1, ge=1, description="scoring actors")
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


class ScoreRule(Settings):
    """What a stored score must be."""

    least: float | None = Field(default=None, description="smaller is rejected")
    most: float | None = Field(default=None, description="larger is rejected")
    best_share: float | None = Field(
        default=None, gt=0, le=1, description="keep this share of the highest: 0.8 drops the lowest fifth"
    )
    within: list[str] = Field(
        default=[], description="take best_share in each combination of these attributes apart; `group` is one too"
    )


class Cap(Settings):
    """At most so many samples of each combination of some attributes; the best by rank_by stay."""

    attributes: list[str] = Field(
        min_length=1, description="attributes whose combinations are counted; `group` is one too"
    )
    most: int | None = Field(default=None, ge=0, description="samples of a combination")
    most_times: float | None = Field(
        default=None, ge=1, description="samples of a combination, as a multiple of the rarest one that is there"
    )

    @model_validator(mode="after")
    def _one(self) -> Cap:
        if (self.most is None) == (self.most_times is None):
            raise ValueError("give either most or most_times")
        return self


class Wanted(Settings):
    """At least so many samples of each combination of some attributes; what lacks goes to the refill list."""

    attributes: list[str] = Field(min_length=1, description="attributes whose combinations are counted, in each group")
    least: int = Field(ge=1, description="samples of a combination")


class SelectRecipe(Settings):
    """What is kept."""

    text: Literal["caption", "raw"] = Field(
        default="caption",
        description="words of a taken-in picture: its new caption, or those that came with it (the paper's L-pp)",
    )
    min_clip: float = Field(default=0.0, ge=-1, le=1, description="least cosine of picture and prompt")
    min_size_px: int = Field(default=0, ge=0, description="least shorter edge of a taken-in picture, before the crop")
    scores: dict[str, ScoreRule] = Field(
        default={}, description="rules for any score that the ledger stores, by its name"
    )
    rank_by: str = Field(
        default="clip_score", description="score by which one of several is kept: the highest, then the smallest id"
    )
    max_hamming_bits: int = Field(
        default=2, ge=0, le=16, description="perceptual hashes this near count as the same drawing"
    )
    max_colour_difference: float = Field(
        default=6.0, ge=0, le=255, description="and so do mean colours (0-255) this near"
    )
    same_meaning: float | None = Field(
        default=None, gt=0, le=1, description="CLIP embeddings with at least this cosine count as the same picture"
    )
    caps: list[Cap] = Field(default=[], description="most samples of combinations of attributes, applied in turn")
    wanted: list[Wanted] = Field(default=[], description="least samples of combinations of attributes")
    best: int | None = Field(default=None, ge=1, description="keep so many of the highest by rank_by")
    people: Literal["apply", "ignore", "only"] = Field(
        default="apply",
        description="what people decided: have the last word, count for nothing, or keep only what a person kept",
    )


class PackRecipe(Settings):
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
