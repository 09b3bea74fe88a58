"""Core ML: ML programs (.mlpackage) for Apple's CPU, GPU and Neural Engine. Built anywhere, run on macOS only."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import StageError
from export.refusal import reason
from export.targets.contract import GRAPHS, EdgeTarget, Source

if TYPE_CHECKING:
    from export.runtime import Call


class CoreMl(EdgeTarget):
    def not_here(self) -> str:
        return "" if sys.platform == "darwin" else "Core ML runs on macOS and iOS only"

    def kept(self, wanted: Sequence[str]) -> list[str]:
        """None: Core ML's compression is told nothing of modules, and takes every weight."""
        return []

    def lower(self, source: Source, precision: str, path: Path) -> None:
        """fp32, fp16, or fp16 arithmetic with weights of 8 bits a channel (w8) or palettes of 16 values (w4)."""
        import coremltools as ct  # pyright: ignore[reportMissingImports]
        import torch

        graph = source.graph
        kinds = {torch.int64: np.int32, torch.float32: np.float32}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                exported = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()))
                model: Any = ct.convert(
                    without_aliases(exported.run_decompositions({})),
                    inputs=[
                        ct.TensorType(name=name, shape=tuple(tensor.shape), dtype=kinds[tensor.dtype])
                        for name, tensor in graph.inputs.items()
                    ],
                    outputs=[ct.TensorType(name=graph.output, dtype=np.float32)],
                    minimum_deployment_target=ct.target.iOS18,
                    compute_precision=ct.precision.FLOAT32 if precision == "fp32" else ct.precision.FLOAT16,
                    skip_model_load=True,
                )
        except Exception as error:
            raise StageError(
                f"{graph.name} does not lower to Core ML: {reason(error)}",
                remedy="--debug shows the converter's report; leave coreml out of export.targets",
            ) from error
        if precision in ("w8", "w4"):
            model = _compressed(model, precision)
        model.save(str(path))

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        if self.not_here():
            return super().open(folder, names, threads)
        self.require()
        import coremltools as ct  # pyright: ignore[reportMissingImports]

        models = {graph: ct.models.MLModel(str(folder / names[graph])) for graph in GRAPHS}

        def call(model: Any) -> Call:
            def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
                given = {name: v.astype(np.int32) if v.dtype == np.int64 else v for name, v in inputs.items()}
                return next(iter(model.predict(given).values()))

            return run

        return {graph: call(model) for graph, model in models.items()}

    def hardware(self, threads: int) -> str:
        """Core ML chooses by itself, whatever `threads` says."""
        return f"{platform.machine()}, what Core ML chose of CPU, GPU and Neural Engine"


def without_aliases(program: Any) -> Any:
    """The exported program without `aten.alias`, a name for what has one, which PyTorch 2.14 leaves in it and coremltools 9 does not know."""
    import torch

    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        (same,) = node.all_input_nodes
        program.graph_signature.replace_all_uses(node.name, same.name)
        node.replace_all_uses_with(same)
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _compressed(model: Any, precision: str) -> Any:
    import coremltools.optimize.coreml as optimise  # pyright: ignore[reportMissingImports]

    if precision == "w8":
        how = optimise.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
        return optimise.linear_quantize_weights(model, optimise.OptimizationConfig(global_config=how))
    how = optimise.OpPalettizerConfig(mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=16)
    return optimise.palettize_weights(model, optimise.OptimizationConfig(global_config=how))


TARGETS = {
    "coreml": CoreMl(
        "coreml", ".mlpackage", "coremltools", packages={"coremltools": "coremltools"}, extra="coreml", from_onnx=False
    )
}
