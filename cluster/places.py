"""Where workers of a stage may run and what they take: resources of the cluster's own names, labels of nodes, how many at least and at most.

Labels are Ray's: `ray start --labels zone=a`, `labels:` of a KubeRay group. What a stage asks of them is spelled as Ray spells it: `a`, `!a`,
`in(a,b)`, `!in(a,b)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cluster.recipe import Settings
from cluster.stage import Stage

TRAIN = "train"
_LIST = re.compile(r"(!?)in\(([^()]+)\)")


class StagePlace(Settings):
    """What is said here goes before what the stage itself asks for."""

    cpus: float | None = Field(default=None, ge=0, description="CPUs of a worker; 0.5 for two workers a CPU")
    gpus: float | None = Field(default=None, ge=0, description="GPUs of a worker; 0.5 for two workers a GPU")
    workers: int | None = Field(default=None, ge=1, description="workers, at most if there is workers_min")
    workers_min: int | None = Field(
        default=None,
        ge=1,
        description="begin with so many workers; more are started where work waits and nodes have room",
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="resources of the cluster's own that a worker takes: {npu: 1}"
    )
    labels: dict[str, str] = Field(
        default={},
        description="labels of the nodes that may hold a worker: {zone: a}, {market: '!spot'}, {gpu: 'in(l40s,h100)'}",
    )

    @field_validator("resources")
    @classmethod
    def _not_built_in(cls, value: dict[str, float]) -> dict[str, float]:
        if taken := sorted(set(value) & {"CPU", "GPU", "memory", "object_store_memory"}):
            raise ValueError(
                f"{', '.join(taken)} is no resource of the cluster's own; use cpus, gpus, cluster.memory_gib"
            )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> StagePlace:
        if self.workers_min and self.workers and self.workers_min > self.workers:
            raise ValueError(f"workers_min ({self.workers_min}) is more than workers ({self.workers})")
        return self


class Toleration(Settings):
    """A taint of Kubernetes nodes that pods put up with."""

    key: str | None = Field(default=None, min_length=1, description="the taint's key; every one if left out")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="`Exists`: whatever its value; `Equal`: `value`"
    )
    value: str | None = Field(default=None, description="the taint's value")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="the taint's effect; every one if left out"
    )

    @model_validator(mode="after")
    def _fits(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("value goes with operator Equal, and Equal with a value; give both or neither")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator Equal needs a key")
        return self


class PodPlace(Settings):
    """Which Kubernetes nodes hold the pods of a group, spot nodes for one (`edgefusion cluster render --on kuberay`)."""

    node_selector: dict[str, str] = Field(
        default={}, description="labels that the node must have: {cloud.google.com/gke-spot: 'true'}"
    )
    tolerations: list[Toleration] = Field(
        default=[], description="taints of nodes that the pods put up with, beside that of GPU nodes"
    )


PodGroup = Literal["head", "gpu", "cpu", "vllm"]
"""Pods that a rendered KubeRay file has."""


def placed(stage: Stage, place: StagePlace | None) -> Stage:
    """The stage as the recipe places it."""
    if place is None:
        return stage
    said = {name: getattr(place, name) for name in ("cpus", "gpus", "workers", "workers_min")}
    told = {name: value for name, value in said.items() if value is not None}
    if place.workers is None and place.workers_min and place.workers_min > stage.workers:
        told["workers"] = place.workers_min
    return replace(stage, **told, resources=place.resources, labels=place.labels)


def suits(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """A node with these labels is one that is asked for."""
    return all(_holds(text, labels.get(key)) for key, text in wanted.items())


def _holds(wanted: str, has: str | None) -> bool:
    if found := _LIST.fullmatch(wanted.replace(" ", "")):
        return (has in found[2].split(",")) != bool(found[1])
    return has != wanted[1:] if wanted.startswith("!") else has == wanted


def allowed(wanted: str) -> list[str]:
    """The values that are named as welcome; empty where only others are ruled out."""
    if found := _LIST.fullmatch(wanted.replace(" ", "")):
        return [] if found[1] else found[2].split(",")
    return [] if wanted.startswith("!") else [wanted]


def unknown_stages(named: Iterable[str], known: Iterable[str]) -> str:
    """In words, which names are no stage; empty if all are."""
    real = list(known)
    odd = sorted(set(named) - set(real))
    return f"{', '.join(odd)} is no stage of this recipe ({', '.join(real)})" if odd else ""
