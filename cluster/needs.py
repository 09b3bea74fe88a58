# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a recipe's workers need and whether nodes have it: the sums behind `cluster check`, `render` and `simulate`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import EdgeFusionError
from cluster.runner import ClusterRecipe, start_ray, stop_ray


@dataclass(frozen=True)
class Need:
    """Equal workers of one stage. Stages of one `step` run at the same time, steps one after another."""

    step: str
    stage: str
    workers: int
    cpus: float
    """Each worker's."""
    gpus: float = 0.0
    memory_gib: float = 0.0
    """0 where the recipe does not say; then memory is not checked."""


@dataclass(frozen=True)
class Node:
    name: str
    cpus: float
    gpus: float = 0.0
    memory_gib: float = math.inf


@dataclass(frozen=True)
class Phase:
    """A phase of training."""

    name: str
    steps: int
    batch_images: int
    checkpoint_s: float


@dataclass(frozen=True)
class RunView:
    """What the cluster wing knows of a recipe; each wing adds its part."""

    name: str
    cluster: ClusterRecipe
    tree: dict[str, Any]
    """The whole recipe as plain values."""
    needs: tuple[Need, ...] = ()
    samples: int = 0
    """Planned pictures."""
    unit_images: int = 1
    phases: tuple[Phase, ...] = ()
    vllm_model: str = ""
    """The language model that a vLLM server would have to serve; empty if the recipe has no use for one."""
    server_settings: tuple[str, ...] = ()
    """`key={url}` overrides that make the recipe use such a server."""


DRIVER = "plan, select, samples, export and report"
"""What the process that starts the run does by itself."""


@dataclass(frozen=True)
class Fit:
    """How many workers of a need found a place, by node; and why the others did not."""

    need: Need
    nodes: dict[str, int]
    why: str = ""

    @property
    def placed(self) -> int:
        return sum(self.nodes.values())


def place(needs: Sequence[Need], nodes: Sequence[Node]) -> list[Fit]:
    """Largest worker first onto the first node with room, step by step; the answer is in the order of `needs`."""
    found: dict[int, Fit] = {}
    for step in dict.fromkeys(need.step for need in needs):
        free = [[node.cpus, node.gpus, node.memory_gib] for node in nodes]
        mine = [i for i, need in enumerate(needs) if need.step == step]
        for i in sorted(mine, key=lambda i: (-needs[i].gpus, -needs[i].memory_gib, -needs[i].cpus)):
            found[i] = _place_one(needs[i], nodes, free)
    return [found[i] for i in range(len(needs))]


def _place_one(need: Need, nodes: Sequence[Node], free: list[list[float]]) -> Fit:
    wants = [need.cpus, need.gpus, need.memory_gib]
    taken: dict[str, int] = {}
    for _ in range(need.workers):
        room = [i for i, left in enumerate(free) if all(w <= has + 1e-9 for w, has in zip(wants, left, strict=True))]
        if not room:
            break
        # A stage without GPUs stays off GPU nodes while others have room.
        spot = min(room, key=lambda i: (nodes[i].gpus > 0) != (need.gpus > 0))
        free[spot] = [has - w for w, has in zip(wants, free[spot], strict=True)]
        taken[nodes[spot].name] = taken.get(nodes[spot].name, 0) + 1
    lacking = need.workers - sum(taken.values())
    return Fit(need, taken, _why(need, nodes, free) if lacking else "")


def _why(need: Need, nodes: Sequence[Node], free: list[list[float]]) -> str:
    words = ("CPUs", "GPUs", "GiB of memory")
    wants = [need.cpus, need.gpus, need.memory_gib]
    whole = [[node.cpus, node.gpus, node.memory_gib] for node in nodes]
    for want, word, column in zip(wants, words, range(3), strict=True):
        most = max((node[column] for node in whole), default=0.0)
        if want > most + 1e-9:
            return f"a worker needs {want:g} {word} and no node has more than {most:g}"
    short = [
        f"{sum(left[column] for left in free):g} {word} are left in all and a worker needs {want:g}"
        for want, word, column in zip(wants, words, range(3), strict=True)
        if want and not any(want <= left[column] + 1e-9 for left in free)
    ]
    return "; ".join(short) or "no single node has all that a worker needs left at once"


def own_node(recipe: ClusterRecipe) -> Node:
    """This machine as a local Ray would offer it, found without starting Ray."""
    import psutil
    import torch

    cpus = recipe.cpus or max(2, os.cpu_count() or 2)
    # Ray keeps the object store and 30% of what is left from its memory resource; this is the more cautious sum.
    memory = psutil.virtual_memory().available / 2**30 - recipe.object_store_mib / 1024
    return Node("this machine", cpus, torch.cuda.device_count(), round(memory, 1))


def ray_nodes(recipe: ClusterRecipe) -> list[Node]:
    """The living nodes of the running cluster at `recipe.address`; raises StageError if it cannot be reached."""
    start_ray(recipe)
    import ray

    try:
        found: list[dict[str, Any]] = ray.nodes()
    finally:
        stop_ray()
    return [
        Node(
            str(node["NodeManagerHostname"]),
            float(node["Resources"].get("CPU", 0)),
            float(node["Resources"].get("GPU", 0)),
            round(float(node["Resources"].get("memory", 0)) / 2**30, 1),
        )
        for node in found
        if node["Alive"]
    ]


def parse_nodes(text: str) -> list[Node]:
    """`4:cpus=16,gpus=1,memory_gib=64` to four nodes; raises EdgeFusionError."""
    count, colon, rest = text.partition(":")
    try:
        pairs = [part.split("=") for part in rest.split(",")]
        values = {name.strip(): float(value) for name, value in pairs}
        if not colon or not set(values) <= {"cpus", "gpus", "memory_gib"} or "cpus" not in values:
            raise ValueError
        return [Node(f"{count} x {rest} #{i + 1}", **values) for i in range(int(count))]
    except ValueError:
        raise EdgeFusionError(
            f"--node takes COUNT:cpus=N,gpus=N,memory_gib=N, not {text!r}", remedy="For example 4:cpus=16,gpus=1"
        ) from None


@dataclass(frozen=True)
class Group:
    """Equal nodes that a launcher is asked for."""

    nodes: int
    cpus: int
    gpus: int
    memory_gib: int


def groups(needs: Sequence[Need], gpus_per_node: int, cpus_per_node: int) -> tuple[Group, Group]:
    """(GPU nodes, CPU nodes) that hold every step at its full number of workers; either may be of 0 nodes."""
    with_gpu, without = [n for n in needs if n.gpus], [n for n in needs if not n.gpus]
    steps = dict.fromkeys(need.step for need in needs)
    gpus = max((math.ceil(sum(n.gpus * n.workers for n in with_gpu if n.step == s)) for s in steps), default=0)
    cpus = max((math.ceil(sum(n.cpus * n.workers for n in without if n.step == s)) for s in steps), default=0)
    beside = max((n.cpus / n.gpus for n in with_gpu), default=0.0) * gpus_per_node
    gpu_memory = max((n.memory_gib / n.gpus for n in with_gpu), default=0.0) * gpus_per_node
    cpu_memory = max((n.memory_gib / n.cpus for n in without), default=0.0) * cpus_per_node
    # Two CPUs are for Ray itself and the loaders; 4 GiB a CPU and 32 a GPU where the recipe says nothing.
    return (
        Group(
            -(-gpus // gpus_per_node),
            max(4 * gpus_per_node, math.ceil(beside) + 2),
            gpus_per_node,
            max(32 * gpus_per_node, math.ceil(gpu_memory * 1.25)),
        ),
        Group(-(-cpus // cpus_per_node), cpus_per_node, 0, max(4 * cpus_per_node, math.ceil(cpu_memory * 1.25))),
    )
