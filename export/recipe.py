"""The exporter's part of a recipe: targets, precisions and the gates a build must pass."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cluster.recipe import Settings
from export.layers import HIGH_PRECISION
from factory.recipe import OpenClipScorer
from factory.recipe.names import AllowPickle

Target = Literal["onnx", "openvino", "qnn", "executorch", "coreml", "cuda", "tensorrt", "litert", "ethos", "exynos"]
Precision = Literal["fp32", "fp16", "bf16", "w8a16", "w8a8", "w8", "w4", "w8bf16", "w8a8bf16"]
Named = Literal["fp32", "fp16", "bf16", "w8a16", "w8a8", "w8", "w4", "w8bf16", "w8a8bf16", "mixed"]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]

PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "w8a16", "w8a8", "w8", "w4"),
    "openvino": ("fp32", "fp16", "bf16", "w8a8", "w8", "w4", "w8bf16", "w8a8bf16"),
    "qnn": ("fp32", "fp16", "w8a16", "w8a8"),
    "executorch": ("fp32",),
    "coreml": ("fp32", "fp16", "w8", "w4"),
    "cuda": ("fp32", "fp16", "w8"),
    "tensorrt": ("fp32", "fp16"),
    "litert": ("fp32", "fp16", "w8a16"),
    "ethos": ("fp32", "fp16", "w8a16"),
    "exynos": ("fp32", "fp16", "w8a16"),
}
"""What each target can store and run."""

UNETS: dict[str, tuple[str, ...]] = {"litert": ("w8a16",), "ethos": ("w8a16",), "exynos": ("w8a16",)}
"""What targets can make of the UNet where that is less."""


class MixRecipe(Settings):
    """A build with a precision for each component."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$", description="the build's name in the bundle")
    text_encoder: Precision = Field(default="fp32", description="precision of the text encoder")
    unet: Precision = Field(description="precision of the UNet")
    vae_decoder: Precision = Field(default="fp32", description="precision of the VAE's decoder")

    def graphs(self) -> dict[str, str]:
        """Graph to precision."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae_decoder": self.vae_decoder}


class GateRecipe(Settings):
    """How far a build may be from PyTorch in float32 before it is refused. Decibels: larger is nearer."""

    fp32_snr_db: float = Field(default=60.0, description="least signal-to-noise ratio of a full-precision graph, dB")
    fp32_psnr_db: float | None = Field(
        default=40.0,
        description="least PSNR of the pictures of a build that is fp32 throughout, dB; decoder_psnr_db stands in its place where the decoder "
        "draws in tiles; none: no such gate",
    )
    half_snr_db: float = Field(default=25.0, description="least signal-to-noise ratio of an fp16 or bf16 graph, dB")
    quantised_psnr_db: float = Field(
        default=20.0, description="least PSNR of the pictures of a build that is not fp32 throughout, dB"
    )
    worst_psnr_db: float = Field(
        default=10.0,
        description="least PSNR of the worst of those pictures, dB; pictures of different things have 5 to 10",
    )
    block_snr_db: float | None = Field(
        default=6.0,
        description="least signal-to-noise ratio of what each block of a quantised or half UNet hands on, dB, where the target shows it; "
        "none: no such gate",
    )
    ssim: float | None = Field(
        default=0.6, le=1, description="least mean SSIM of a build's pictures; none: no such gate"
    )
    decoder_psnr_db: float = Field(
        default=40.0, description="least PSNR of pictures decoded in tiles against the whole decoder's, dB"
    )
    judge: OpenClipScorer | None = Field(
        default=None, description="the CLIP that judges the pictures of a build beside PyTorch's; none: no such gate"
    )
    clip_margin: float = Field(
        default=0.02, ge=0, description="how far the judge's mean cosine may fall under that of PyTorch's pictures"
    )
    recall_margin: float = Field(
        default=0.05,
        ge=0,
        description="how far the judge's R@1 (picture to prompt) may fall under PyTorch's; one picture of those judged always may",
    )


class DecoderRecipe(Settings):
    """A VAE decoder that draws in tiles, which takes less memory."""

    tile: int = Field(ge=4, description="side of a tile in latents")
    overlap: int = Field(default=4, ge=1, description="latents that two neighbours share")

    @model_validator(mode="after")
    def _fits(self) -> DecoderRecipe:
        if self.overlap >= self.tile:
            raise ValueError(f"overlap ({self.overlap}) must be less than tile ({self.tile})")
        return self


class SourceRecipe(Settings):
    """A model or data set that the student came from, for the bundle's model card."""

    name: str = Field(description="its name, with version")
    part: Literal["weights", "data"] = Field(description="what of it went in")
    licence: str = Field(description="its licence, SPDX where there is one")
    used_for: str = Field(default="", description="in a few words")


class TilingRecipe(Settings):
    """A second build of each precision whose attention is cut for one NPU."""

    profile: str = Field(
        description="an NPU profile: `edgefusion export profiles` lists them; or the path of a YAML file"
    )
    compile: bool = Field(default=False, description="also ask the NPU's offline compiler (needs the npu extra)")


class ExportRecipe(Settings):
    """student -> builds."""

    targets: list[Target] = Field(
        default=["onnx", "openvino"],
        description="`onnx` (ONNX Runtime's CPU, browsers), `openvino`, `qnn` (Qualcomm HTP), "
        "`executorch` (XNNPACK), `coreml` (Apple), `cuda` and `tensorrt` (NVIDIA, through ONNX Runtime), "
        "`litert` (Android's runtime: an integer UNet), `ethos` (Arm's NPU, judged by its compiler), `exynos` (Samsung's, not compiled here). Those beyond the first two need extras",
    )
    openvino_device: str = Field(
        default="CPU",
        pattern=r"^(CPU|GPU(\.\d+)?|NPU)$",
        description="what the openvino target runs on: CPU, GPU (or GPU.1, ...), NPU; the last two by Intel's drivers",
    )
    precisions: list[Named | MixRecipe] = Field(
        default=["fp32", "w8a16", "w8"],
        description="builds. fp32, fp16, bf16 (openvino): all three graphs. w8a16 (onnx), w8a8: a UNet of int8 weights and 16- or "
        "8-bit integer activations; w8, w4: int8 or 4-bit weights, float activations; the rest fp32. w8bf16, w8a8bf16 (openvino): so, with all other arithmetic in bf16. mixed: the paper's, w8a16 "
        "between an fp16 text encoder and decoder. Or {name, text_encoder, unet, vae_decoder}. A target leaves out what it cannot run",
    )
    keep: list[str] | Literal["auto"] = Field(
        default=list(HIGH_PRECISION),
        description="modules whose layers stay in float where a graph is quantised, by dotted path or a part of it; "
        "auto: these defaults and what a sensitivity scan proposes",
    )
    keep_budget: float = Field(
        default=0.1, ge=0, le=1, description="keep: auto may hold back at most this share of the UNet's weights"
    )
    tiling: TilingRecipe | None = Field(
        default=None, description="{profile: NAME}: also build with attention tiled for that NPU"
    )
    decoder: DecoderRecipe | None = Field(
        default=None,
        description="{tile: N, overlap: M}: the VAE's decoder draws in tiles of N latents, with less memory",
    )
    vae: str | None = Field(
        default=None,
        description="folder of a VAE whose decoder draws in place of the student's own, such as the small one that `edgefusion trainer "
        "decoder` writes (OUT/model)",
    )
    allow_pickle: AllowPickle = False
    steps: int = Field(default=2, ge=1, le=8, description="denoising steps of the build")
    size_px: int | None = Field(
        default=None,
        ge=8,
        description="side of the pictures, pixels: a multiple of what the student's VAE and UNet halve; the student's own if left out",
    )
    batch_images: int = Field(default=1, ge=1, description="pictures that the static graphs draw at once")
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        description="what a student that takes guidance is fixed at; others have none. With guidance_range: what is drawn, proven and timed "
        "at where nobody says another scale, the middle of the range if left out",
    )
    guidance_range: tuple[Scale, Scale] | None = Field(
        default=None,
        description="[LOWEST, HIGHEST] guidance scale: builds of a student that takes guidance keep it as an input, and whoever draws chooses "
        "within the range; guidance is fixed if left out",
    )
    calibration_prompts: int = Field(
        default=8, ge=1, description="prompts whose few-step trajectories calibrate activations"
    )
    parity_prompts: int = Field(
        default=8,
        ge=1,
        description="prompts on which builds are compared with PyTorch; 64 and more where a build is to be shipped",
    )
    latency_runs: int = Field(default=5, ge=1, description="timed runs after one warm-up")
    threads: int = Field(default=2, ge=1, description="CPU threads while measuring")
    pages: bool = Field(
        default=True,
        description="a run also writes compare.html, for which all bundles are measured once more, and, where onnxruntime-web "
        "lies in the cache (`edgefusion export fetch-web`), demo, which draws in the browser",
    )
    gates: GateRecipe = GateRecipe()
    sources: list[SourceRecipe] = Field(
        default=[], description="what the student came from, with licences; the shipped student knows its own"
    )

    @model_validator(mode="after")
    def _fits(self) -> ExportRecipe:
        names = [mix.name for mix in self.builds()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"export.precisions names {twice[0]} twice: give each build a name of its own")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if low >= high:
                raise ValueError(
                    f"export.guidance_range goes from {low:g} to {high:g}: name the lower scale first, or fix one scale by export.guidance_scale "
                    "alone"
                )
            if self.guidance_scale is not None and not low <= self.guidance_scale <= high:
                raise ValueError(
                    f"export.guidance_scale ({self.guidance_scale:g}) does not lie in export.guidance_range ({low:g} to {high:g}): change one "
                    "of the two, or leave guidance_scale out for the middle"
                )
        if self.batch_images > 1:
            single = [target for target in self.targets if target in UNETS]
            if single or self.tiling is not None:
                raise ValueError(
                    f"export.batch_images is {self.batch_images}, and {single[0] if single else 'export.tiling'} is made for one picture at "
                    f"a time; leave one of the two out"
                )
        for target in self.targets:
            if not self.builds(target):
                raise ValueError(
                    f"export.precisions has no build that {target} can run: it knows {', '.join(UNETS.get(target, PRECISIONS[target]))}"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_left_out(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A recipe without the key is to the byte what it was before there was one, and so is what a bundle says that it was made with.
        return {name: value for name, value in whole(self).items() if name != "guidance_range" or value is not None}

    def builds(self, target: str | None = None) -> list[MixRecipe]:
        """The recipe's builds as mixes; of one target, those that it can run."""
        mixes = [entry if isinstance(entry, MixRecipe) else _mix(entry) for entry in self.precisions]
        if target is None:
            return mixes
        return [
            mix
            for mix in mixes
            if set(mix.graphs().values()) <= set(PRECISIONS[target])
            and mix.unet in UNETS.get(target, PRECISIONS[target])
        ]


def _mix(name: Named) -> MixRecipe:
    """What a plain name stands for."""
    if name == "mixed":
        return MixRecipe(name=name, text_encoder="fp16", unet="w8a16", vae_decoder="fp16")
    if name in ("fp16", "bf16"):
        return MixRecipe(name=name, text_encoder=name, unet=name, vae_decoder=name)
    if name in ("w8bf16", "w8a8bf16"):
        return MixRecipe(name=name, text_encoder="bf16", unet=name, vae_decoder="bf16")
    return MixRecipe(name=name, unet=name)
