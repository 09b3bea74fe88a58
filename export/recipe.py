"""The exporter's part of a recipe: targets, precisions and the gates a build must pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.recipe import Settings

Target = Literal["onnx", "openvino"]
Precision = Literal["fp32", "w8a16", "w8"]


class GateRecipe(Settings):
    """How far a build may be from PyTorch in float32 before it is refused. Decibels: larger is nearer."""

    fp32_snr_db: float = Field(default=60.0, description="least signal-to-noise ratio of a full-precision graph, dB")
    quantised_psnr_db: float = Field(
        default=20.0, description="least end-to-end PSNR of a quantised build's pictures, dB"
    )


class TilingRecipe(Settings):
    """A second build of each precision whose attention is cut for one NPU."""

    profile: str = Field(
        description="an NPU profile: `edgefusion export profiles` lists them; or the path of a YAML file"
    )
    compile: bool = Field(default=False, description="also ask the NPU's offline compiler (needs the npu extra)")


class ExportRecipe(Settings):
    """student -> builds."""

    targets: list[Target] = Field(default=["onnx", "openvino"], description="`onnx` (ONNX Runtime) and `openvino`")
    precisions: list[Precision] = Field(
        default=["fp32", "w8a16", "w8"],
        description="fp32; w8a16: int8 weights, 16-bit activations (onnx); w8: int8 weights alone (openvino)",
    )
    tiling: TilingRecipe | None = Field(
        default=None, description="{profile: NAME}: also build with attention tiled for that NPU"
    )
    steps: int = Field(default=2, ge=1, le=8, description="denoising steps of the build")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="what a student that takes guidance is fixed at; others have none"
    )
    calibration_prompts: int = Field(
        default=8, ge=1, description="prompts whose few-step trajectories calibrate activations"
    )
    parity_prompts: int = Field(default=8, ge=1, description="prompts on which builds are compared with PyTorch")
    latency_runs: int = Field(default=5, ge=1, description="timed runs after one warm-up")
    threads: int = Field(default=2, ge=1, description="CPU threads while measuring")
    gates: GateRecipe = GateRecipe()
