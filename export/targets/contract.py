"""What every target of a bundle can do: lower a graph, open it (or say why not here), tell what stays off the chip.

A target is one file with one subclass; `registry` finds it by its name in a recipe. Knows no bundle.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import EdgeFusionError, TargetUnavailable
from export.onnx_file import parts_of

if TYPE_CHECKING:
    from export.graph import Graph
    from export.runtime import Call
    from export.solve import Plan

GRAPHS = ("text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True)
class Source:
    """What a target is given of one graph: the module (as PyTorch has it), the float32 ONNX file made of it, rows of inputs that
    calibrate, modules that stay in float where the graph is quantised, and the recipe's plan of tiles."""

    graph: Graph
    onnx: Path
    calibration: Sequence[dict[str, np.ndarray]]
    keep: Sequence[str]
    plan: Plan | None = None


@dataclass(frozen=True)
class EdgeTarget:
    """One target. `packages`: what it needs beside this project's own, import name to distribution; `extra`: who installs them."""

    name: str
    suffix: str
    library: str
    """The runtime's distribution, whose version goes into bundle.json."""
    packages: dict[str, str] = field(default_factory=dict)
    extra: str = ""
    sample: str = ""
    """Whose sample program draws from its bundles; its own unless this says another's."""
    sample_needs: tuple[str, ...] = ()
    """What that program needs beside numpy, tokenizers and `library`."""
    from_onnx: bool = True
    """Whether graphs are lowered from ONNX, and so can be tiled; others are lowered from the module."""
    device: str = ""
    """Which of the chips that the target's runtime knows by name; empty where it has one kind."""
    emulated: tuple[str, ...] = ()
    """Precisions in which this machine plays another arithmetic: pictures are true, times say nothing of a chip."""

    def require(self) -> None:
        """Raises TargetUnavailable, with the line that installs it, where a build cannot be made."""
        for module, distribution in self.packages.items():
            if find_spec(module) is None:
                raise TargetUnavailable(
                    f"target {self.name} needs {distribution}",
                    remedy=f"pip install 'edgefusion[{self.extra}]', or leave {self.name} out of export.targets",
                )

    def lower(self, source: Source, precision: str, path: Path) -> None:
        """Write one graph at `precision` to `path`. Raises StageError for a graph that the target's compiler refuses."""
        raise NotImplementedError

    def kept(self, wanted: Sequence[str]) -> list[str]:
        """Of the modules that a recipe keeps in float, those that stay so where this target quantises."""
        return list(wanted)

    def plan(self, source: Source) -> Plan | None:
        """The plan whose tiles this target writes into the UNet of every build; None for an untiled UNet. (Targets that lower from ONNX
        are given the tiled graph of a build `-tiled` instead.)"""
        return None

    def suffix_of(self, graph: str) -> str:
        """How the file of a graph ends."""
        return self.suffix

    def shipped(self, path: Path) -> list[Path]:
        """What a device needs of a lowered graph: the bundle may hold more, such as what other chips are compiled from, or a report."""
        return parts_of(path)

    def readable(self, path: Path) -> Path:
        """The file in which the operators of a lowered graph can be read."""
        return path

    def not_here(self) -> str:
        """Why a build cannot be run on this machine, in words; empty where it can."""
        return ""

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """The three graphs, ready to be called; raises TargetUnavailable where they cannot run."""
        raise TargetUnavailable(f"no {self.name} build runs on this machine: {self.not_here()}", where=str(folder))

    def fallback(self, path: Path) -> dict[str, Any] | None:
        """Which operators of a lowered graph stay off the target's accelerator: `accelerated` (count), `not_accelerated` (kind to
        count), `said_by`. None where there is no accelerator that could refuse any."""
        return None

    def estimate(self, path: Path) -> dict[str, Any] | None:
        """What the vendor's offline compiler says of a lowered graph's costs, with `said_by`; never a device's figures."""
        return None

    def tensors(
        self, path: Path, names: Sequence[str], inputs: dict[str, np.ndarray], threads: int
    ) -> dict[str, np.ndarray]:
        """Values inside a lowered graph on `inputs`: of the tensors of the float32 ONNX file in `names`, those that it still has. Empty
        where the target lets nobody look inside."""
        return {}

    def runtime(self) -> str:
        """Name and version of what runs the build."""
        return f"{self.library} {metadata.version(self.library)}"

    def hardware(self, threads: int) -> str:
        """What a build is timed on, on this machine."""
        return f"{platform.machine()} {self.device or 'CPU'}, {threads} thread{'s' * (threads > 1)}"

    def times_kind(self, precisions: dict[str, str]) -> str:
        """`measured` or `emulated`: what the times of a build on this machine are."""
        return "emulated" if set(precisions.values()) & set(self.emulated) else "measured"


def bytes_of(target: EdgeTarget, path: Path) -> int:
    """Of a lowered graph, what a device needs; files of a folder one by one."""
    found = [file for top in target.shipped(path) for file in ([top] if top.is_file() else top.rglob("*"))]
    return sum(file.stat().st_size for file in found if file.is_file())


def check_open(target: EdgeTarget, folder: Path) -> None:
    """Raises EdgeFusionError for a bundle whose target does not run on this machine."""
    if reason := target.not_here():
        raise EdgeFusionError(
            f"no {target.name} bundle runs on this machine: {reason}",
            where=str(folder),
            remedy="Verify it where it does",
        )
