"""OpenVINO on the CPU, or on an Intel GPU or NPU by its name: float32 arithmetic whatever the machine would prefer, but for graphs of bf16 and
for the NPU, which has float16 at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.openvino_core import openvino_core
from export.quantise_openvino import quantise_openvino
from export.targets.contract import GRAPHS, EdgeTarget, Source

if TYPE_CHECKING:
    from export.runtime import Call


class OpenVino(EdgeTarget):
    def require(self) -> None:
        if reason := self.not_here():
            raise TargetUnavailable(
                f"target openvino: {reason}",
                remedy="Install the device's driver (docs.openvino.ai names it), or choose another export.openvino_device",
            )

    def not_here(self) -> str:
        found = openvino_core().available_devices
        if any(one == self.device or one.startswith(f"{self.device}.") for one in found):
            return ""
        return f"OpenVINO finds no {self.device} here, only {', '.join(found)}"

    def lower(self, source: Source, precision: str, path: Path) -> None:
        quantise_openvino(source.onnx, path, precision, source.calibration, source.keep)

    def shipped(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """Compiled models. Raises TargetUnavailable for a device that is not there, and for bf16 on one without it."""
        self.require()
        compiled = {graph: self._compiled(str(folder / names[graph]), names[graph], threads) for graph in GRAPHS}

        def call(model: Any) -> Call:
            return lambda inputs: np.array(model(inputs)[0])

        return {graph: call(model) for graph, model in compiled.items()}

    def tensors(
        self, path: Path, names: Sequence[str], inputs: dict[str, np.ndarray], threads: int
    ) -> dict[str, np.ndarray]:
        model = openvino_core().read_model(str(path))
        there = {name for operator in model.get_ops() for output in operator.outputs() for name in output.get_names()}
        wanted = [name for name in dict.fromkeys(names) if name in there]
        given = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in wanted if name not in given])
        found = self._compiled(model, path.name, threads)(inputs)
        return {name: np.array(found[name], np.float32) for name in wanted}

    def _compiled(self, model: Any, name: str, threads: int) -> Any:
        """`model`: a file's path or an opened one; `name`: the file's, which says in what it is computed."""
        core, hint = openvino_core(), "bf16" if "bf16." in name else "f32"
        if hint == "bf16" and "BF16" not in core.get_property(self.device, "OPTIMIZATION_CAPABILITIES"):
            raise TargetUnavailable(
                f"this {self.device} has no bfloat16 arithmetic",
                where=name,
                remedy="Leave bf16 out of export.precisions here",
            )
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f16" if self.device == "NPU" else hint}
        if self.device == "CPU":
            config["INFERENCE_NUM_THREADS"] = threads
        return core.compile_model(model, self.device, config)


TARGETS = {"openvino": OpenVino("openvino", ".xml", "openvino", device="CPU")}
