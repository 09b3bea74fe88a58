"""Asks a chip's own offline compiler about a plan: compiler-estimated numbers beside the solver's predictions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError
from export.profile import Profile
from export.solve import BlockPlan
from export.targets import ethos

USUAL_REACH = ethos.Reach(hidden=5, context=5, query=4, key=20, value=20, scores=64, mixed=4, out=3)
"""Scales to compile with where nothing was calibrated: the compiler's costs do not depend on them."""


def compile_plan(parts: Sequence[BlockPlan], profile: Profile) -> dict[str, Any]:
    """Per block name what the compiler says of it `chosen`, `untiled` (softmax in parts, as chosen) and with its `own_softmax` (untiled).

    Untiled is all heads at once or, where the compiler does not take that, one at a time: `untiled_heads`. Neither: the reason.
    Blocks of one shape are compiled once, with random weights. Raises TargetUnavailable without the compiler, EdgeFusionError for
    a chip that has no offline compiler.
    """
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            key = (*asdict(part.block).values(),)[1:]
            if key not in done:
                done[key] = _compile_block(part, profile, Path(folder) / "block.tflite")
            found[part.block.name] = done[key]
    return found


def _compile_block(part: BlockPlan, profile: Profile, path: Path) -> dict[str, Any]:
    block, weights = part.block, ethos.random_weights(part.block)

    def judge(heads: int, tiles: int, softmax: ethos.Softmax = "parts") -> dict[str, Any]:
        ethos.lower(block, heads, tiles, path, weights, USUAL_REACH, softmax)
        return asdict(ethos.estimate(path, profile))

    chosen = judge(part.chosen.head_group, part.chosen.query_tiles)
    reason = ""
    for heads in dict.fromkeys((block.heads, 1)):
        try:
            untiled = judge(heads, 1) if part.is_tiled or heads != part.chosen.head_group else chosen
            own = judge(heads, 1, "operator")
        except EdgeFusionError as error:
            reason = error.what
            continue
        return {"chosen": chosen, "untiled": untiled, "own_softmax": own, "untiled_heads": heads}
    return {"chosen": chosen, "untiled": reason, "own_softmax": reason, "untiled_heads": None}
