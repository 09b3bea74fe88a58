"""Asks a chip's own offline compiler about a plan: compiler-estimated numbers beside the solver's predictions."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError
from export.profile import Profile
from export.solve import Choice, Plan
from export.targets import ethos

USUAL_REACH = ethos.Reach(hidden=5, context=5, query=4, key=20, value=20, scores=64, mixed=4, out=3)
"""Scales to compile with where nothing was calibrated: the compiler's costs do not depend on them."""


def compile_plan(plan: Plan, profile: Profile) -> dict[str, Any]:
    """Per tiled block name: the compiler's DRAM bytes and seconds untiled and as chosen, or why it would not compile.

    Blocks of one shape are compiled once, with random weights. Raises TargetUnavailable without the compiler, EdgeFusionError for
    a chip that has no offline compiler.
    """
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.tflite"
        for part in plan.tiled:
            block, key = part.block, (*asdict(part.block).values(),)[1:]
            if key not in done:
                weights = ethos.random_weights(block)

                def judge(choice: Choice, block: Any = block, weights: Any = weights) -> dict[str, Any]:
                    ethos.lower(block, choice.head_group, choice.query_tiles, path, weights, USUAL_REACH)
                    return asdict(ethos.estimate(path, profile))

                chosen = judge(part.chosen)
                try:
                    done[key] = {"untiled": judge(part.untiled), "chosen": chosen}
                except EdgeFusionError as error:
                    done[key] = {"untiled": error.what, "chosen": chosen}
            found[block.name] = done[key]
    return found
