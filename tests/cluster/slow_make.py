"""The factory's make, select and pack on pictures that take no model and no core, only time: a driver for tests/cluster/test_nodes.py.

python slow_make.py FOLDER in-process|HOST:PORT
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

import factory.make
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, make_runner
from cluster.stage import Row, Stage
from cluster.storage import publish_bytes
from factory.plan import PLAN, table_bytes
from factory.recipe import FactoryRecipe, MakeRecipe

UNITS, UNIT_IMAGES, DRAW_S = 110, 4, 3.0
RECIPE = {
    "plan": {"taxonomy": "zoo:taxonomy.yaml", "prompts": 1, "writer": {"kind": "transformers", "model": "zoo:writer"}},
    "make": {
        "teacher": {"kind": "diffusers", "model": "zoo:teacher", "batch_images": UNIT_IMAGES},
        "scorer": {"kind": "open_clip", "model": "zoo:clip"},
        "unit_images": UNIT_IMAGES,
    },
    "select": {"min_clip": 0.2, "max_hamming_bits": 0, "max_colour_difference": 0},
}


def draw_stage(seconds: float) -> Stage:
    def draw(rows: list[Row]) -> list[Row]:
        from factory.stages import encode_picture, looks

        time.sleep(seconds)
        made: list[Row] = []
        for row in rows:
            noise = np.random.default_rng(row["seed"]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = np.kron(noise, np.ones((4, 4, 1), np.uint8))
            score = {"clip_score": row["seed"] % 100 / 100, "embedding": b""}
            made.append({**row, "picture": encode_picture(picture, "png"), **score, **looks(picture)})
        return made

    return Stage("draw", lambda: draw, workers=3, cpus=0.5)


def plan(folder: Path) -> None:
    rows = [
        {
            "id": hashlib.sha256(b"%d" % i).hexdigest(),
            "prompt": f"picture {i}",
            "group": "things",
            "attributes": json.dumps({"number": str(i)}),
            "seed": i,
            "outcome": "pending",
            "reason": "",
        }
        for i in range(UNITS * UNIT_IMAGES)
    ]
    publish_bytes(folder / PLAN, table_bytes(pa.Table.from_pylist(rows)))


def main(folder: Path, where: str) -> None:
    local = where == "in-process"
    settings = {"runner": "in-process"} if local else {"runner": "ray", "address": where}
    theirs = factory.make.make_stages

    def stages(recipe: MakeRecipe, data: Path) -> list[Stage]:
        return [draw_stage(0.0 if local else DRAW_S), theirs(recipe, data)[-1]]

    factory.make.make_stages = stages
    if not (folder / PLAN).exists():
        plan(folder)
    recipe = build_recipe(FactoryRecipe, RECIPE, "slow_make")
    runner = make_runner(build_recipe(ClusterRecipe, settings, "slow_make"))
    try:
        factory.make.make(recipe, folder, runner)
    finally:
        runner.close()
    print(factory.make.select_and_pack(recipe, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
