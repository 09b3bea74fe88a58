"""Both phases of training on tiny models, slowed down so that something can happen to them: a driver for tests/cluster/test_train_nodes.py.

python slow_train.py TEACHER DATA OUT HOST:PORT FEWEST_WORKERS

Each worker appends to OUT/workers.jsonl which rank it has, of how many, and on which node, whenever a training begins.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, stop_ray
from cluster.training import launch
from trainer.recipe import TrainerRecipe

ADAPT_STEPS, DISTILL_STEPS, STEP_S, WORKERS = 60, 8, 0.4, 2
GIB = 3
"""Memory that a worker asks for: two do not fit on a node of tests/cluster/conftest.py."""


def main(teacher: str, data: str, out: Path, address: str, fewest: int) -> None:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "checkpoint_s": 1.0, "warmup_steps": 5}
    recipe = TrainerRecipe.model_validate(
        {
            **{"teacher": teacher, "size_px": 32, "threads": 1},
            **{"adapt": {**phase, "steps": ADAPT_STEPS}, "distill": {**phase, "steps": DISTILL_STEPS}},
        }
    )

    def work() -> None:
        import os

        import ray
        import torch

        import trainer.distill as distill
        import trainer.loop as loop

        torch.use_deterministic_algorithms(True)
        facts = {"rank": int(os.environ["RANK"]), "of": int(os.environ["WORLD_SIZE"])}
        with (out / "workers.jsonl").open("a") as file:
            file.write(json.dumps({**facts, "node": ray.util.get_node_ip_address()}) + "\n")
        read = loop.read_batch

        def slow(*words):
            time.sleep(STEP_S)
            return read(*words)

        loop.read_batch = distill.read_batch = slow
        loop.train(recipe, Path(data), out / "training", seed=1)

    out.mkdir(exist_ok=True)
    settings = {
        **{"address": address, "train_workers": WORKERS, "train_gpu": False, "train_placement": "spread"},
        **{"train_workers_min": fewest or None, "memory_gib": {"train": GIB}},
    }
    try:
        launch(work, build_recipe(ClusterRecipe, settings, "slow_train"), out, 1, use_gpu=False)
    finally:
        stop_ray()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
