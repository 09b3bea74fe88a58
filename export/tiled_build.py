"""The tiled variant of a build: its plan, its ONNX file and what bundle.json says about it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.blocks import attention_blocks
from export.graph import Graph, to_onnx
from export.profile import load_profile
from export.solve import Plan, solve
from export.targets.contract import EdgeTarget, Source
from export.tiling import check_tiles, tile_unet

TILED = "-tiled"
"""Appended to a precision: the name of its tiled build."""

SOURCE = "unet.tiled.onnx"


def plan_unet(unet: Any, side: int, profile: str, tokens: int) -> Plan:
    """The solver's plan for a loaded UNet that is given latents of `side` x `side`. Raises RecipeError for an unknown or too small profile."""
    return solve(attention_blocks(unet.config, side, tokens), load_profile(profile))


def lower_tiled(graph: Graph, plan: Plan, folder: Path) -> None:
    """Write SOURCE, the UNet graph with the plan's tiles; raises ParityError if they do not survive. `graph` keeps its own."""
    path = folder / SOURCE
    if not path.exists():
        module: Any = copy.deepcopy(graph.module)
        tile_unet(module.unet, plan)
        to_onnx(replace(graph, module=module), path, rewrite=False)
    check_tiles(path, plan)


def tiles_in(target: EdgeTarget, source: Source, variant: str) -> dict[str, Any]:
    """For bundle.json: how many attention blocks of a build's UNet are tiled, and for which profile's chip; 0 and None for none.

    A target may leave the recipe's plan aside, or follow another.
    """
    plan = source.plan if variant == TILED else target.plan(source)
    blocks = 0 if plan is None else len(plan.tiled)
    return {"profile": plan.profile if plan is not None and blocks else None, "blocks": blocks}


def tiling_facts(
    plan: Plan, kind: str, where: str, unet_ms: float, untiled_unet_ms: float, compiled: dict[str, Any] | None = None
) -> dict[str, Any]:
    """For bundle.json. Four kinds of number, never mixed: what is null was not obtained. `kind` of the times: measured or emulated, and
    `where`: on which machine."""
    facts = plan.facts()
    times = {"where": where, "unet_ms": unet_ms, "untiled_unet_ms": untiled_unet_ms}
    return {
        "profile": facts["profile"],
        "plan": [{k: v for k, v in row.items() if k != "predicted"} for row in facts["blocks"]],
        "predicted": {row["name"]: row["predicted"] for row in facts["blocks"]},
        "compiler_estimated": compiled,
        "emulated": None,
        "measured": None,
        kind: times,
    }
