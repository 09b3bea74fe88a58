"""What is planned: prompts that a model writes or the user brings, or pictures that are taken in."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from cluster.recipe import Settings
from cluster.served import ServerRecipe
from cluster.usage import Prices
from factory.recipe.names import AllowPickle


class WriterKeys(Settings):
    """What every prompt writer has."""

    model: str = Field(description="folder, hub name or zoo:NAME of a causal language model")
    template: str = Field(
        default="{attributes} =>", description="what the model reads; {attributes} is `subject: fox; style: flat`"
    )
    answer: Literal["text", "json"] = Field(
        default="text",
        description="`json`: the model is to answer with an object that has the prompt under `prompt`; ask for it in the template",
    )
    temperature: float = Field(default=0.9, ge=0, le=2, description="sampling temperature")
    max_new_tokens: int = Field(default=48, ge=4, le=1024, description="longest prompt, tokens")


DTYPE = "compute type"
DEVICE = "`auto`: the GPU where there is one and the worker was given it, else the CPU; `cuda` refuses to go on without"
REVISION = "commit of a hub model; pin it"


class TransformersWriter(WriterKeys):
    """A causal language model folder run by transformers, in this process."""

    kind: Literal["transformers"] = "transformers"
    allow_pickle: AllowPickle = False
    revision: str | None = Field(default=None, description=REVISION)
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description=DTYPE)
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description=DEVICE)
    batch_prompts: int = Field(default=64, ge=1, description="prompts written at once")


_API = "`completions`: the model reads the template as it is; `chat`: as a user's message, for models that were taught to chat"
ENVIRONMENT = (
    "folder or name of the Python environment in which the run starts vLLM as a server on loopback (edgefusion cluster environment make "
    "vllm)"
)

OWN_CONCURRENT = "requests at once to the server that the run starts; its `--max-num-seqs` is a good choice"


def refuse_unpinned_code(model: str, revision: str | None, server: ServerRecipe) -> None:
    """Raises ValueError where vLLM would run whatever code the hub's model has on the day: unpinned, it may be anybody's and another tomorrow."""
    said = [word.partition("=")[0].replace("_", "-") for word in server.arguments]
    # vLLM takes shortened words too.
    trusts = any(len(word) > 3 and "--trust-remote-code".startswith(word) for word in said)
    if trusts and not revision and "--revision" not in said and not model.startswith(("/", ".", "~")):
        raise ValueError(
            f"server.arguments has vLLM run code that comes with {model}, and nothing says of which commit; give `revision`, and read that code"
        )


class VllmWriter(WriterKeys):
    """The same by vLLM. It pins torch, so give it an `environment` of its own; without one it is imported here."""

    kind: Literal["vllm"] = "vllm"
    revision: str | None = Field(default=None, description=REVISION)
    environment: str | None = Field(default=None, description=f"{ENVIRONMENT}; left out: vLLM is imported here")
    server: ServerRecipe = Field(default=ServerRecipe(), description="how that server is run")
    concurrent: int = Field(
        default=256, ge=1, le=512, description=f"{OWN_CONCURRENT}; vLLM that is imported here takes all at once"
    )
    api: Literal["completions", "chat"] = Field(default="completions", description=_API)

    @model_validator(mode="after")
    def _served(self) -> VllmWriter:
        if self.environment is None and self.server != ServerRecipe():
            raise ValueError("server says how a server is run, but environment is left out, so none is started")
        refuse_unpinned_code(self.model, self.revision, self.server)
        return self


class ServerAccess(Settings):
    """How somebody's server is asked."""

    key_variable: str | None = Field(
        default=None,
        description="name of the environment variable that holds the server's key, such as OPENAI_API_KEY; left out: no key is sent",
    )
    timeout_s: float = Field(default=120.0, gt=0, le=3600, description="longest wait for one answer, seconds")
    tries: int = Field(
        default=5,
        ge=1,
        le=100,
        description="how often a question is asked of a server that is busy, away or answers nonsense",
    )

    @field_validator("key_variable")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # Without the value in the message: it may be the key itself, given here by mistake.
        if value is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", value):
            raise ValueError("give the NAME of an environment variable in capital letters, never the key itself")
        return value


class Priced(Settings):
    """What a server charges, and how much it may come to."""

    price_input: float | None = Field(
        default=None, ge=0, description="price of a million tokens read, in your currency"
    )
    price_output: float | None = Field(default=None, ge=0, description="price of a million tokens written")
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="stop before the answers of all runs of the data set cost more; what is there is kept",
    )

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output belong together: give both or neither")
        if self.max_cost is not None and self.price_input is None:
            raise ValueError("max_cost needs price_input and price_output")
        return self

    def prices(self) -> Prices | None:
        """None where the recipe names none."""
        if self.price_input is None or self.price_output is None:
            return None
        return Prices(self.price_input, self.price_output)


class OpenAiWriter(WriterKeys, Priced, ServerAccess):
    """Any server that speaks OpenAI's chat completions, vLLM's among them."""

    kind: Literal["openai"] = "openai"
    base_url: str = Field(description="for example http://127.0.0.1:8000/v1")
    api: Literal["completions", "chat"] = Field(default="chat", description=_API)
    concurrent: int = Field(default=16, ge=1, le=512, description="requests at once")


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
    max_failed_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="stop when more than this share of the last `failed_after` URLs failed, as in a network outage; 1 never stops",
    )
    failed_after: int = Field(default=1024, ge=1, description="URLs fetched before max_failed_share means something")
    allow_private: bool = Field(
        default=False, description="also fetch from addresses that are not public: loopback, your own network"
    )
    user_agent: str = Field(default="edgefusion-factory", description="who servers are told is asking")


class PicturePlan(Settings):
    """Which pictures are taken in: real ones with the texts that came with them (the paper's L-orig)."""

    kind: Literal["pictures"] = "pictures"
    paths: list[str] = Field(
        min_length=1,
        description="folders (picture files with .txt or .json beside them, or shards), WebDataset shards (.tar, .tar.gz), Parquet files, or "
        "zoo:wild.parquet; with braces ({000..099}.tar), patterns (*.tar) and URLs (s3://bucket/*.tar)",
    )
    picture_column: str = Field(default="picture", description="Parquet column with the picture file's bytes")
    text_column: str = Field(
        default="text",
        description="column with the text, of Parquet files or lists of URLs; of these it may be missing unless another name is given here",
    )
    metadata_columns: list[str] = Field(
        default=[],
        description="further columns of Parquet files or lists of URLs that are kept as each sample's `metadata`",
    )
    attribute_columns: list[str] = Field(
        default=[],
        description="columns of Parquet files or lists of URLs, or keys of the .json, that are kept as attributes, for balance, caps and the page",
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
