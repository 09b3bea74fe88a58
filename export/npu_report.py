"""A whole UNet on one of Arm's NPUs, by its offline compiler: the file, untiled and tiled, with what the compiler says of each.

Costs do not depend on weights or scales, so that an architecture without weights can be asked about. Decides nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cluster.errors import EdgeFusionError, RecipeError
from cluster.storage import publish_bytes
from export.blocks import ARCHITECTURES, attention_blocks, read_architecture
from export.profile import load_profile
from export.solve import solve

CUTS = ("untiled", "tiled", "parts")
"""Untiled: one head at a time, because all heads at once make the compiler divide by zero; tiled: the solver's plan; parts: the same in
several files, one for each tiled block and one for what lies between, the estimates summed."""


def judge_unet(
    model: str,
    profile_name: str,
    out: Path,
    size_px: int | None = None,
    cuts: tuple[str, ...] = CUTS,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Write `out/unet.CUT.tflite` (of parts, `unet.parts.NN.tflite`) of a model folder, zoo:NAME or published architecture and ask the compiler about each.

    Raises RecipeError for another vendor's chip, TargetUnavailable without the compiler, StageError for a UNet that is not lowered.
    """
    from export.targets.ethos import estimate, together
    from export.targets.litert import cuts_of, operators
    from export.targets.npu_unet import usual_calibration, write_unet

    if unknown := sorted(set(cuts) - set(CUTS)):
        raise RecipeError(f"there is no cut {unknown[0]}", remedy=f"Choose of {', '.join(CUTS)}")
    profile = load_profile(profile_name)
    if profile.vela is None:
        raise RecipeError(f"{profile.name} is not an Arm NPU", remedy="Choose an ethos-u85 profile")
    config, side, tokens = read_architecture(model, size_px)
    blocks = attention_blocks(config, side, tokens)
    planned = cuts_of(solve(blocks, profile))
    chosen = {"tiled": planned, "parts": planned, "untiled": {block.name: (1, 1) for block in blocks}}
    unet = _unet(model, config)
    found: dict[str, Any] = {"model": model, "profile": profile.name, "latent_side": side, "cuts": {}}
    out.mkdir(parents=True, exist_ok=True)
    for cut in cuts:
        path = out / f"unet.{cut}.tflite"
        progress(f"writing {path}")
        scales = usual_calibration(unet)
        paths = write_unet(unet, side, tokens, scales, path, chosen[cut], in_parts=cut == "parts")
        kinds: Counter[str] = sum((Counter(operators(part)) for part in paths), Counter())
        row: dict[str, Any] = {
            "files": len(paths),
            "bytes": sum(part.stat().st_size for part in paths),
            "operators": dict(kinds.most_common()),
            "compiler_estimated": None,
        }
        said = []
        try:
            for part in paths:
                progress(f"compiling {part} for {profile.name}")
                said.append(estimate(part, profile))
            row["compiler_estimated"] = asdict(together(said))
            row["each"] = [asdict(one) for one in said] if len(said) > 1 else []
        except EdgeFusionError as error:
            row["not_compiled"] = error.what
        found["cuts"][cut] = row
    publish_bytes(out / "npu.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def unet_table(found: dict[str, Any]) -> Table:
    """One row a cut, all of it compiler-estimated."""
    table = Table(
        title=f"{found['model']}, latent {found['latent_side']} x {found['latent_side']}, on {found['profile']}",
        caption="Estimated by Vela, Arm's offline compiler; no device. Scales are not calibrated: costs do not depend on them.",
        box=box.SIMPLE,
    )
    for heading in ("cut", "files", "MB", "ops", "NPU ops", "CPU ops", "DRAM MB", "ms", "Mcycles"):
        table.add_column(heading)
    for cut, row in found["cuts"].items():
        said, head = (
            row["compiler_estimated"],
            [cut, str(row["files"]), f"{row['bytes'] / 1e6:.1f}", str(sum(row["operators"].values()))],
        )
        if said is None:
            table.add_row(*head, "", "", "", "", row["not_compiled"])
            continue
        table.add_row(
            *head,
            str(said["npu_operators"]),
            str(said["cpu_operators"]),
            f"{said['dram_bytes'] / 1e6:.1f}",
            f"{said['latency_s'] * 1e3:.2f}",
            f"{said['npu_cycles'] / 1e6:.1f}",
        )
    return table


def _unet(model: str, config: dict[str, Any]) -> Any:
    """With a model's own weights, or random ones where it is only an architecture. float32."""
    import torch
    from diffusers import UNet2DConditionModel

    from factory.models import resolve

    if model in ARCHITECTURES or Path(resolve(model)).is_file():
        torch.manual_seed(0)
        drawn: Any = UNet2DConditionModel.from_config(config)
        return drawn.eval()
    place: Any = Path(resolve(model))
    unet: Any = UNet2DConditionModel.from_pretrained(
        place / "unet" if (place / "unet").is_dir() else place, use_safetensors=True
    )
    return unet.eval()
