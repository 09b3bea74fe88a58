# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a recipe's workers need and whether nodes have it: the sums behind `cluster check`, `render` and `simulate`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.clocks import WRONG_S, clocks_apart
from cluster.errors import EdgeFusionError
from cluster.places import allowed, suits
from cluster.runner import ClusterRecipe, local_slots, start_ray, stop_ray
from cluster.stage import Stage

MEMORY_SPARE = 1.25
"""Memory of a rendered node for each GiB that workers may ask of it; the rest is Ray's, the object store's and the system's."""
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


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
    workers_min: int | None = None
    """Fewer workers will do, down to this."""
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    labels: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def amounts(self) -> dict[str, float]:
        """What a worker takes of a node, by what it is called to a user."""
        return {"CPUs": self.cpus, "GPUs": self.gpus, "GiB of memory": self.memory_gib, **self.resources}


@dataclass(frozen=True)
class Node:
    name: str
    cpus: float
    gpus: float = 0.0
    memory_gib: float = math.inf
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    labels: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def amounts(self) -> dict[str, float]:
        return {"CPUs": self.cpus, "GPUs": self.gpus, "GiB of memory": self.memory_gib, **self.resources}


def need_of(step: str, stage: Stage, cluster: ClusterRecipe) -> Need:
    """A stage's workers as the recipe places them."""
    own = cluster.placed(stage)
    memory = cluster.memory_gib.get(stage.name, 0.0)
    return Need(step, own.name, own.workers, own.cpus, own.gpus, memory, own.workers_min, own.resources, own.labels)


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
    launch_tree: dict[str, Any] | None = None
    """The same without what says how the run serves vLLM for itself, where it says so: launch files bring a server of their own."""
    until: str = ""
    """The wing as far as which it runs (`as_far_as`); all of it if empty."""
    needs: tuple[Need, ...] = ()
    samples: int = 0
    """Planned pictures."""
    unit_images: int = 1
    phases: tuple[Phase, ...] = ()
    vllm_model: str = ""
    """The language model that a vLLM server would have to serve; empty if the recipe has no use for one."""
    vllm_revision: str | None = None
    """Commit of that model on the hub, if the recipe pins one."""
    server_settings: tuple[str, ...] = ()
    """`key={url}` overrides that make the recipe use such a server."""
    extras: frozenset[str] = frozenset()
    """Extras of the project without which its workers or its driver would refuse."""
    own_vllm: str = ""
    """The stage whose workers serve vLLM for themselves where they run; empty if none does."""
    own_vllm_settings: tuple[str, ...] = ()
    """`key={folder}` overrides that name the Python environment which they do it by."""
    server_drops: tuple[str, ...] = ()
    """Further ones that a recipe needs for that which serves vLLM for itself; `launch_tree` has no such keys."""


WINGS = ("factory", "trainer", "export")


def as_far_as(view: RunView, wing: str) -> RunView:
    """What `edgefusion WING run` does of it, which is all if `wing` is empty. Raises EdgeFusionError for a name that is no wing."""
    if wing and wing not in WINGS:
        raise EdgeFusionError(
            f"{wing} is no wing that runs", where="--until", remedy=f"Use one of {', '.join(WINGS)}, or leave it out"
        )
    needs = tuple(need for need in view.needs if wing != "factory" or need.step == "make")
    return replace(view, until=wing, needs=needs)


def run_words(view: RunView, program: str = "edgefusion") -> list[str]:
    """The command that runs it, without recipe and options."""
    return [program, *([view.until] if view.until else []), "run"]


DRIVER = "plan, select, samples, export, pages and report"
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
        free = [node.amounts for node in nodes]
        mine = [i for i, need in enumerate(needs) if need.step == step]
        for i in sorted(mine, key=lambda i: (-needs[i].gpus, -needs[i].memory_gib, -needs[i].cpus)):
            found[i] = _place_one(needs[i], nodes, free)
    return [found[i] for i in range(len(needs))]


def _place_one(need: Need, nodes: Sequence[Node], free: list[dict[str, float]]) -> Fit:
    taken: dict[str, int] = {}
    for _ in range(need.workers):
        room = [i for i, left in enumerate(free) if suits(need.labels, nodes[i].labels) and _has(left, need)]
        if not room:
            break
        # A stage without GPUs stays off GPU nodes while others have room.
        spot = min(room, key=lambda i: (nodes[i].gpus > 0) != (need.gpus > 0))
        free[spot] |= {what: free[spot][what] - want for what, want in need.amounts.items() if want}
        taken[nodes[spot].name] = taken.get(nodes[spot].name, 0) + 1
    enough = sum(taken.values()) >= (need.workers_min or need.workers)
    return Fit(need, taken, "" if enough else _why(need, nodes, free))


def _has(left: Mapping[str, float], need: Need) -> bool:
    return all(want <= left.get(what, 0.0) + 1e-9 for what, want in need.amounts.items())


def _why(need: Need, nodes: Sequence[Node], free: list[dict[str, float]]) -> str:
    right = [i for i, node in enumerate(nodes) if suits(need.labels, node.labels)]
    if not right:
        asked = ", ".join(f"{key}={value}" for key, value in need.labels.items())
        return f"no node has the labels that it asks for ({asked})"
    wants = {what: want for what, want in need.amounts.items() if want}
    for what, want in wants.items():
        most = max(nodes[i].amounts.get(what, 0.0) for i in right)
        if want > most + 1e-9:
            return f"a worker needs {want:g} {what} and no node has more than {most:g}"
    left = [free[i] for i in right]
    short = [
        f"{sum(one.get(what, 0.0) for one in left):g} {what} are left in all and a worker needs {want:g}"
        for what, want in wants.items()
        if not any(want <= one.get(what, 0.0) + 1e-9 for one in left)
    ]
    return "; ".join(short) or "no single node has all that a worker needs left at once"


def own_node(recipe: ClusterRecipe, needs: Sequence[Need] = ()) -> Node:
    """This machine as a local Ray would offer it (`start_ray`), found without starting Ray."""
    import psutil
    import torch

    stages = [(need.workers, need.cpus) for need in needs if need.step == "make" and need.stage != DRIVER]
    cpus = local_slots(recipe, stages)
    # Ray keeps the object store and 30% of what is left from its memory resource; this is the more cautious sum.
    memory = psutil.virtual_memory().available / 2**30 - recipe.object_store_mib / 1024
    return Node("this machine", cpus, torch.cuda.device_count(), round(memory, 1))


def ray_nodes(recipe: ClusterRecipe, tell: Callable[[str], None] = lambda words: None) -> list[Node]:
    """The living nodes of the running cluster at `recipe.address`; raises StageError if it cannot be reached.

    `tell` is told of nodes whose clocks are wrong."""
    start_ray(recipe)
    import ray

    try:
        found: list[dict[str, Any]] = ray.nodes()
        for name, ahead_s in clocks_apart().items():
            if abs(ahead_s) > WRONG_S:
                way = "ahead of" if ahead_s > 0 else "behind"
                tell(
                    f"the clock of {name} is {abs(ahead_s):.0f} s {way} this machine's: a run comes to no harm, but logs are dated so, and S3 "
                    "refuses requests of a clock that is 15 minutes wrong. Set it (chrony, timedatectl)"
                )
    finally:
        stop_ray()
    return [
        Node(
            str(node["NodeManagerHostname"]),
            float(node["Resources"].get("CPU", 0)),
            float(node["Resources"].get("GPU", 0)),
            round(float(node["Resources"].get("memory", 0)) / 2**30, 1),
            {name: float(amount) for name, amount in node["Resources"].items() if _is_own(str(name))},
            {str(key): str(value) for key, value in (node.get("Labels") or {}).items()},
        )
        for node in found
        if node["Alive"]
    ]


def _is_own(name: str) -> bool:
    """A resource that somebody gave the node, and not one that Ray counts by itself."""
    return name not in ("CPU", "GPU", "memory", "object_store_memory") and not name.startswith(
        ("node:", "accelerator_type:")
    )


def parse_nodes(text: str) -> list[Node]:
    """`4:cpus=16,gpus=1,memory_gib=64,resources.npu=1,labels.zone=a` to four nodes; raises EdgeFusionError."""
    count, colon, rest = text.partition(":")
    numbers: dict[str, float] = {}
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    try:
        for part in rest.split(","):
            name, value = (word.strip() for word in part.split("="))
            kind, dot, key = name.partition(".")
            if dot and kind == "labels":
                labels[key] = value
            elif dot and kind == "resources":
                resources[key] = float(value)
            elif name in ("cpus", "gpus", "memory_gib"):
                numbers[name] = float(value)
            else:
                raise ValueError
        if not colon or "cpus" not in numbers or int(count) < 1:
            raise ValueError
        return [
            Node(f"{count} x {rest} #{i + 1}", **numbers, resources=resources, labels=labels) for i in range(int(count))
        ]
    except ValueError:
        raise EdgeFusionError(
            f"--node takes COUNT:cpus=N,gpus=N,memory_gib=N,resources.NAME=N,labels.NAME=WORD, not {text!r}",
            remedy="For example 4:cpus=16,gpus=1",
        ) from None


@dataclass(frozen=True)
class Group:
    """Equal nodes that a launcher is asked for."""

    nodes: int
    cpus: int
    gpus: int
    memory_gib: int
    resources: Mapping[str, int] = field(default_factory=dict[str, int])
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


def groups(needs: Sequence[Need], gpus_per_node: int, cpus_per_node: int) -> tuple[Group, Group]:
    """(GPU nodes, CPU nodes) that hold every step at its full number of workers; either may be of 0 nodes.

    Raises EdgeFusionError for a worker that is wider than such a node."""
    with_gpu, without = [n for n in needs if n.gpus], [n for n in needs if not n.gpus]
    _refuse_wide(with_gpu, "gpus", gpus_per_node, "GPUs", "--gpus-per-node")
    _refuse_wide(without, "cpus", cpus_per_node, "CPUs", "--cpus-per-node")
    beside = _most_on_a_node(with_gpu, "cpus", "gpus", gpus_per_node)
    gpu_memory = _most_on_a_node(with_gpu, "memory_gib", "gpus", gpus_per_node)
    cpu_memory = _most_on_a_node(without, "memory_gib", "cpus", cpus_per_node)
    # Two CPUs are for Ray itself and the loaders; 4 GiB a CPU and 32 a GPU where the recipe says nothing.
    gpu = Group(
        0,
        max(4 * gpus_per_node, math.ceil(round(beside, 6)) + 2),
        gpus_per_node,
        max(32 * gpus_per_node, math.ceil(round(gpu_memory * MEMORY_SPARE, 6))),
        labels=labels_of(with_gpu),
    )
    cpu = Group(
        0,
        cpus_per_node,
        0,
        max(4 * cpus_per_node, math.ceil(round(cpu_memory * MEMORY_SPARE, 6))),
        labels=labels_of(without),
    )
    return counted(gpu, with_gpu), counted(cpu, without)


def nodes_of(group: Group, memory_share: float = 1 / MEMORY_SPARE) -> list[Node]:
    """The nodes as Ray will see them: `memory_share` of their memory is for workers."""
    memory = group.memory_gib * memory_share
    return [
        Node(f"#{i + 1}", group.cpus, group.gpus, memory, group.resources, group.labels) for i in range(group.nodes)
    ]


def refuse_homeless(needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Raises EdgeFusionError where a worker would wait for a place for ever."""
    for fit in place(needs, nodes):
        if fit.why:
            raise EdgeFusionError(
                f"the nodes would not hold the workers of stage {fit.need.stage}: {fit.why}",
                where=f"cluster.stages.{fit.need.stage}",
                remedy="Give larger nodes (--gpus-per-node, --cpus-per-node), or ask for less (cluster.stages, cluster.memory_gib)",
            )


def _refuse_wide(needs: Sequence[Need], what: str, most: int, words: str, option: str) -> None:
    for need in needs:
        if (wants := getattr(need, what)) > most + 1e-9:
            raise EdgeFusionError(
                f"a worker of stage {need.stage} takes {wants:g} {words} and a node has {most}",
                where=f"cluster.stages.{need.stage}",
                remedy=f"Take less, or give {option} {math.ceil(wants)} or more where there are such nodes",
            )


def _most_on_a_node(needs: Sequence[Need], what: str, per: str, room: float) -> float:
    """The most of `what` that workers of one step can want of a node on which `room` of `per` limits them: Ray starts them in any order."""
    found = 0.0
    for step in dict.fromkeys(need.step for need in needs):
        mine = [need for need in needs if need.step == step]
        # All that take nothing of `per` may come to one node; of the others the hungriest for what they take.
        want = sum(getattr(n, what) * n.workers for n in mine if not getattr(n, per))
        left = room
        takers = [n for n in mine if getattr(n, per)]
        for need in sorted(takers, key=lambda n: -getattr(n, what) / getattr(n, per)):
            each = getattr(need, per)
            taken = min(left, each * need.workers)
            want, left = want + getattr(need, what) * taken / each, left - taken
        found = max(found, want)
    return found


def counted(group: Group, needs: Sequence[Need], memory_share: float = 1 / MEMORY_SPARE) -> Group:
    """As many nodes of this size as hold every step of `needs`: first fit opens one more only where no other has room."""
    own = {name: math.inf for need in needs for name in need.resources}
    each = replace(group, nodes=sum(need.workers for need in needs), resources={})
    nodes = [replace(node, resources=own) for node in nodes_of(each, memory_share)]
    fits = place([replace(need, workers_min=None) for need in needs], nodes)
    # At least one where there is something to hold: whoever looks then sees what it lacks.
    count = max(len({name for fit in fits for name in fit.nodes}), min(1, len(needs)))
    return replace(group, nodes=count, resources=_own_of(needs, count))


def _own_of(needs: Sequence[Need], nodes: int) -> dict[str, int]:
    """Resources of the cluster's own on each of `nodes`."""
    most: dict[str, float] = {}
    for step in dict.fromkeys(need.step for need in needs):
        mine = [need for need in needs if need.step == step]
        for name in {name for need in mine for name in need.resources}:
            whole = sum(need.resources.get(name, 0.0) * need.workers for need in mine)
            largest = max(need.resources.get(name, 0.0) for need in mine)
            most[name] = max(most.get(name, 0.0), whole / max(1, nodes), largest)
    return {name: math.ceil(amount) for name, amount in sorted(most.items())}


def labels_of(needs: Sequence[Need], whose: str = "one group of equal nodes serves its stages") -> dict[str, str]:
    """Labels by which nodes suit all of these: of `in(a,b)` the first that the others allow, for `!a` alone none at all.

    Raises EdgeFusionError where no one node could; `whose` says in it why these must be alike.
    """
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for need in needs for key in need.labels):
        asked = [need for need in needs if key in need.labels]
        values = [value for need in asked for value in allowed(need.labels[key])]
        for i, need in enumerate(asked):
            left = [v for v in values if all(suits({key: one.labels[key]}, {key: v}) for one in asked[: i + 1])]
            if values and not [v for v in left if _LABEL.fullmatch(v)]:
                raise EdgeFusionError(
                    f"stage {need.stage} asks for nodes with {key}={need.labels[key]}, and {whose}",
                    where="cluster.stages",
                    remedy="Ask for a value of each label that all of them allow, or write the groups by hand",
                )
            values = left
        if values:
            found[key] = next(v for v in values if _LABEL.fullmatch(v))
    return found
