"""Arm Ethos-U85: the file of `litert` with the tiles of a plan, compiled by Vela. Its figures are estimates; pictures are LiteRT's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.storage import publish_bytes
from export.blocks import attention_blocks
from export.profile import load_profile
from export.solve import Plan, solve
from export.targets.contract import Source
from export.targets.ethos import estimate
from export.targets.litert import LiteRt, operators

PROFILE = "ethos-u85-1024"
"""The chip where the recipe has no tiling.profile."""


class Ethos(LiteRt):
    def shipped(self, path: Path) -> list[Path]:
        """What Vela made, in place of what it was made of, which is there for LiteRT."""
        compiled = compiled_path(path)
        return [compiled if one == path and compiled.exists() else one for one in super().shipped(path)]

    def lower(self, source: Source, precision: str, path: Path) -> None:
        """As `litert`'s, then by Vela: NAME_vela.tflite for the NPU and NAME.vela.json, its report."""
        super().lower(source, precision, path)
        if source.graph.name != "unet":
            return
        profile = load_profile(self.plan(source).profile)
        said = estimate(path, profile, compiled_path(path))
        facts = {"profile": profile.name, "operators": operators(path), **asdict(said)}
        publish_bytes(report_path(path), (json.dumps(facts, indent=2) + "\n").encode())

    def plan(self, source: Source) -> Plan:
        """The recipe's plan where it is for one of Arm's chips, else one for PROFILE."""
        if source.plan is not None and load_profile(source.plan.profile).vela is not None:
            return source.plan
        wrapped: Any = source.graph.module
        config = wrapped.unet.config
        side, tokens = source.graph.inputs["latent"].shape[-1], source.graph.inputs["text"].shape[1]
        return solve(attention_blocks(config, side, tokens), load_profile(PROFILE))

    def fallback(self, path: Path) -> dict[str, Any] | None:
        if not report_path(path).exists():
            return None
        said = json.loads(report_path(path).read_text())
        off = {"operators": said["cpu_operators"]} if said["cpu_operators"] else {}
        return {"accelerated": said["npu_operators"], "not_accelerated": off, "said_by": "Vela, Arm's offline compiler"}

    def estimate(self, path: Path) -> dict[str, Any] | None:
        if not report_path(path).exists():
            return None
        said = json.loads(report_path(path).read_text())
        costs = {key: said[key] for key in ("profile", "dram_bytes", "sram_bytes", "latency_s", "npu_cycles")}
        return {**costs, "said_by": "Vela, Arm's offline compiler; no device"}


def compiled_path(path: Path) -> Path:
    """What Vela made of a file."""
    return path.with_name(f"{path.stem}_vela.tflite")


def report_path(path: Path) -> Path:
    """What Vela said of a file."""
    return path.with_suffix(".vela.json")


TARGETS = {
    "ethos": Ethos(
        "ethos",
        ".tflite",
        "ai-edge-litert",
        packages={"ai_edge_litert": "ai-edge-litert", "ethosu": "ethos-u-vela"},
        extra="npu",
        sample="litert",
        from_onnx=False,
        sample_needs=("onnxruntime", "pillow"),
        emulated=("w8a16",),
    )
}
