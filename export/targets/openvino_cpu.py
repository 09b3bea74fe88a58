"""OpenVINO on the CPU: float32 arithmetic whatever the machine would prefer, but for graphs of bf16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.quantise_openvino import quantise_openvino
from export.targets.contract import GRAPHS, EdgeTarget, Source

if TYPE_CHECKING:
    from export.runtime import Call


class OpenVino(EdgeTarget):
    def lower(self, source: Source, precision: str, path: Path) -> None:
        quantise_openvino(source.onnx, path, precision, source.calibration, source.keep)

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """Compiled models. Raises TargetUnavailable for bf16 on a CPU without it."""
        import openvino

        core = openvino.Core()

        def opened(name: str) -> Any:
            hint = "bf16" if "bf16." in name else "f32"
            if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                raise TargetUnavailable(
                    "this CPU has no bfloat16 arithmetic", where=name, remedy="Leave bf16 out of export.precisions here"
                )
            config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
            return core.compile_model(str(folder / name), "CPU", config)

        compiled = {graph: opened(names[graph]) for graph in GRAPHS}

        def call(model: Any) -> Call:
            return lambda inputs: np.array(model(inputs)[0])

        return {graph: call(model) for graph, model in compiled.items()}


TARGETS = {"openvino": OpenVino("openvino", ".xml", "openvino")}
