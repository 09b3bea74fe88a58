"""Launch files of a recipe: what Kubernetes, Slurm or Ray's cluster launcher need to run it, sized by its stages.

Renders text and starts nothing. Secrets are named, never written. The templates are in cluster/deploy.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.environment import VLLM
from cluster.errors import EdgeFusionError
from cluster.machine import pins, version_of
from cluster.needs import (
    DRIVER,
    MEMORY_SPARE,
    Group,
    Need,
    RunView,
    counted,
    groups,
    labels_of,
    nodes_of,
    refuse_homeless,
    run_words,
)
from cluster.storage import publish_bytes

Place = Literal["kuberay", "slurm", "aws", "gcp"]
PLACES: tuple[Place, ...] = ("kuberay", "slurm", "aws", "gcp")
_PYTHON = "3.11.13"
_MACHINES: dict[str, dict[int, tuple[str, int, int]]] = {
    "aws": {
        0: ("m7i.2xlarge", 8, 32),
        1: ("g6e.4xlarge", 16, 128),
        4: ("g6e.12xlarge", 48, 384),
        8: ("p5.48xlarge", 192, 2048),
    },
    "gcp": {
        0: ("n2-standard-8", 8, 32),
        1: ("g2-standard-16", 16, 64),
        4: ("g2-standard-48", 48, 192),
        8: ("a3-highgpu-8g", 208, 1872),
    },
}
"""GPUs a machine: (its name, its CPUs, its GiB of memory)."""
_MACHINE_MEMORY = 0.65
"""Of a cloud machine's memory what Ray gives to workers: by itself it keeps 30% for its object store, and the system takes some."""
_EXTRAS = frozenset({"s3", "metrics", "otel"})
"""What images bring whatever the recipe says."""
_GPU_EXTRAS = frozenset({"gpu"})
"""`status` and the log of training tell by it how busy a GPU is."""
_VLLM_FOLDER = "/opt/vllm"
"""Of images, where workers serve vLLM for themselves."""
_KEYS = "/home/edgefusion/.edgefusion.env"
_READ_KEYS = f"set -a && . {_KEYS} && set +a"
"""For a shell of a cloud's node: every variable that the file sets is the node's, and its workers'."""
_STORAGE = {"kuberay": "edgefusion-shared", "slurm": "$SLURM_SUBMIT_DIR"}
_PLAIN = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._:/@_-]*|/[A-Za-z0-9._:/@-]*")


@dataclass(frozen=True)
class Options:
    """What a recipe does not know of the place it is to run at."""

    images: str = "edgefusion"
    """Image names up to their role: registry.example/team/edgefusion gives .../edgefusion-gpu:VERSION."""
    storage: str = ""
    """kuberay: a ReadWriteMany claim; slurm: a folder that all nodes see; aws and gcp: HOST:/PATH of an NFS share."""
    secret: str = "edgefusion"
    """Name of the Kubernetes secret."""
    gpus_per_node: int = 1
    cpus_per_node: int = 8


def render(view: RunView, place: Place, options: Options, folder: Path) -> list[Path]:
    """Write the launch files for `place` into `folder`; returns them. Raises EdgeFusionError for what cannot be rendered."""
    facts = _facts(view, place, options, folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "deploy"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Bash counts arrays by ${#names[@]}, in which Jinja would see a comment.
        comment_start_string="<#",
        comment_end_string="#>",
    )
    launch = "slurm.sbatch" if place == "slurm" else f"{place}.yaml"
    texts = {launch: environment.get_template(f"{launch}.j2").render(**facts)}
    texts["recipe.yaml"] = facts["recipe"] + "\n"
    if place != "slurm":
        roles = ["cpu", *(role for _, role, _ in facts["worker_groups"] if role == "gpu")]
        for role in roles:
            texts[f"Dockerfile.{role}"] = environment.get_template("Dockerfile.j2").render(**facts, role=role)
        if view.vllm_model:
            texts["Dockerfile.vllm"] = environment.get_template("Dockerfile.vllm.j2").render(**facts)
        texts["constraints.txt"] = environment.get_template("constraints.txt.j2").render(**facts)
    for name, text in texts.items():
        publish_bytes(folder / name, text.encode())
    return [folder / name for name in sorted(texts)]


def _facts(view: RunView, place: Place, options: Options, folder: Path) -> dict[str, Any]:
    storage = options.storage or _STORAGE.get(place, "")
    if not storage:
        raise EdgeFusionError(
            f"{place} needs storage that all nodes share", remedy="Give --storage HOST:/PATH of an NFS file system"
        )
    for name, value in (("storage", storage), ("images", options.images), ("secret", options.secret)):
        if not _PLAIN.fullmatch(value):
            raise EdgeFusionError(f"--{name} {value!r} holds characters that do not belong there", remedy="Correct it")
    cpus_per_node = _MACHINES[place][0][1] if place in _MACHINES else options.cpus_per_node
    gpu, cpu = groups(view.needs, options.gpus_per_node, cpus_per_node)
    # The runs of one recipe, one wing after another, are things of their own to a scheduler.
    name = f"{view.name}-{view.until}" if view.until else view.name
    url = f"http://edgefusion-{name}-vllm:8000/v1" if place == "kuberay" else "http://127.0.0.1:$vllm_port/v1"
    if view.vllm_model and place in _MACHINES:
        raise EdgeFusionError(
            f"the recipe writes prompts by vLLM, for which the launch files of {place} have no server",
            remedy="Start one (any that speaks OpenAI's chat completions) and give "
            + " ".join(f"--set '{s.format(url='URL')}'" for s in (*view.server_settings, *view.server_drops)),
        )
    served = ["--model", view.vllm_model, *(["--revision", view.vllm_revision] if view.vllm_revision else [])]
    settings = [setting.format(url=url) for setting in view.server_settings]
    own_role = "gpu" if any(need.gpus for need in view.needs if need.stage == view.own_vllm) else "cpu"
    if place != "slurm":
        settings += [setting.format(folder=_VLLM_FOLDER) for setting in view.own_vllm_settings]
    extras = _EXTRAS | view.extras
    machines: dict[str, str] = {}
    if place in _MACHINES:
        gpu, cpu, machines = _machines(place, gpu, cpu, view.needs)
    tree = {**(view.launch_tree or view.tree), "cluster": {**view.tree["cluster"], "runner": "ray", "address": "auto"}}
    more = [word for setting in settings for word in ("--set", setting)]
    whole = gpu if gpu.nodes else cpu
    workers = [("gpu", "gpu", gpu)] * bool(gpu.nodes) + [("cpu", "cpu", cpu)] * bool(cpu.nodes)
    node = _alike(gpu, cpu, view.needs) if place == "slurm" else whole
    share = _MACHINE_MEMORY if place in _MACHINES else 1 / MEMORY_SPARE
    started = [node] if place == "slurm" else [gpu, cpu]
    refuse_homeless(view.needs, [one for group in started for one in nodes_of(group, share)])
    return {
        "name": name,
        "out_name": view.name,
        "run_line": shlex.join(run_words(view)),
        "folder": str(folder),
        "images": options.images,
        "storage": storage,
        "storage_given": bool(options.storage),
        "secret": options.secret,
        "version": version_of("edgefusion") or "0.1.0",
        "ray": version_of("ray"),
        "python": _PYTHON,
        "vllm": VLLM,
        "extras": {"cpu": ",".join(sorted(extras)), "gpu": ",".join(sorted(extras | _GPU_EXTRAS))},
        "pins": pins("edgefusion", sorted(extras | _GPU_EXTRAS)),
        "recipe": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip(),
        "driver": DRIVER,
        "head": Group(1, 4, 0, 16),
        "pods": {name: one.model_dump(exclude_none=True) for name, one in view.cluster.pods.items()},
        "worker_groups": workers,
        "max_workers": gpu.nodes + cpu.nodes,
        "machines": machines,
        "own_vllm": view.own_vllm,
        "own_vllm_role": own_role if view.own_vllm else "",
        "own_vllm_folder": _VLLM_FOLDER,
        "vllm_model": view.vllm_model,
        "vllm_words": served,
        "vllm_line": shlex.join(served),
        # In double quotes: the port is known to the job alone, and nothing else in words of our own means anything to bash.
        "server_settings": " ".join(f'"{word}"' for word in more),
        # KubeRay puts it into a line of a shell of its own, which would keep all behind an && for itself.
        "entrypoint": f"bash -c {shlex.quote(_line(view, '/etc/edgefusion/recipe.yaml', more))}",
        # One word of the line that a person copies into a shell.
        "launched": shlex.quote(f"{_READ_KEYS} && {_line(view, '/home/edgefusion/launch/recipe.yaml', more)}"),
        "keys": _KEYS,
        "read_keys": _READ_KEYS,
        "programs": (["rsync"] if place in _MACHINES else []),
        "node": node,
        "place_words": _place_words(node) if place == "slurm" else "",
        # Left to itself Ray gives workers 70% of the memory that it finds, which is less than they were promised.
        "worker_bytes": {group.gpus: int(group.memory_gib * share * 2**30) for group in (gpu, cpu, node)},
    }


def _line(view: RunView, recipe: str, more: Sequence[str]) -> str:
    """For a shell in a container. A recipe's relative paths are those of the shared storage: its data sets and other runs, and, unless there
    are some already, the image's own recipes with their taxonomies."""
    words = [*run_words(view), recipe, "--out", f"/shared/runs/{view.name}", *more]
    return f"cd /shared && {{ [ -e recipes ] || ln -sfn /app/recipes recipes; }} && {shlex.join(words)}"


def _alike(gpu: Group, cpu: Group, needs: Sequence[Need]) -> Group:
    """Slurm's nodes are all alike, so the CPU stages must find room beside the GPU ones: a share on each node, and for one worker at least."""
    resources = {**cpu.resources, **gpu.resources}
    labels = labels_of(needs, "the nodes of a Slurm job are all alike")
    if not gpu.nodes:
        return replace(cpu, resources=resources, labels=labels)
    without = [need for need in needs if not need.gpus]
    cpus = max((math.ceil(need.cpus) for need in without), default=0)
    memory = max((math.ceil(need.memory_gib * MEMORY_SPARE) for need in without), default=0)
    return replace(
        gpu,
        cpus=gpu.cpus + max(cpus, -(-cpu.cpus * cpu.nodes // gpu.nodes)),
        memory_gib=gpu.memory_gib + max(memory, -(-cpu.memory_gib * cpu.nodes // gpu.nodes)),
        resources=resources,
        labels=labels,
    )


def _place_words(node: Group) -> str:
    """Of `ray start`: resources and labels of a node."""
    resources = f" --resources={shlex.quote(json.dumps(dict(node.resources)))}" if node.resources else ""
    labels = ",".join(f"{key}={value}" for key, value in node.labels.items())
    return resources + (f" --labels={shlex.quote(labels)}" if labels else "")


def _machines(place: Place, gpu: Group, cpu: Group, needs: Sequence[Need]) -> tuple[Group, Group, dict[str, str]]:
    known = _MACHINES[place]
    if gpu.nodes and gpu.gpus not in known:
        raise EdgeFusionError(
            f"no {place} machine with {gpu.gpus} GPUs is known", remedy=f"Use --gpus-per-node {sorted(known)[1:]}"
        )
    name, cpus, memory = known[gpu.gpus] if gpu.nodes else ("", 0, 0)
    small, small_cpus, small_memory = known[0]
    with_gpu, without = [n for n in needs if n.gpus], [n for n in needs if not n.gpus]
    return (
        counted(replace(gpu, cpus=cpus, memory_gib=memory), with_gpu, _MACHINE_MEMORY),
        counted(replace(cpu, cpus=small_cpus, memory_gib=small_memory), without, _MACHINE_MEMORY),
        {"gpu": name, "cpu": small},
    )
