"""ExecuTorch with XNNPACK, the runtime of PyTorch on phones' CPUs; runs on this CPU too.

Lowered from the module itself by torch.export. Operators that XNNPACK does not take run by ExecuTorch's portable kernels, and
`fallback` names them.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import StageError
from export.refusal import reason
from export.targets.contract import GRAPHS, EdgeTarget, Source

if TYPE_CHECKING:
    from export.runtime import Call


class ExecuTorch(EdgeTarget):
    def lower(self, source: Source, precision: str, path: Path) -> None:
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

        graph = source.graph
        try:
            with torch.no_grad():
                program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()))
                lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        except Exception as error:
            raise StageError(
                f"{graph.name} does not lower to ExecuTorch at {precision}: {reason(error)}",
                remedy="--debug shows the whole report; leave executorch or this precision out",
            ) from error
        path.write_bytes(lowered.to_executorch().buffer)

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """Loaded programs. ExecuTorch's runtime takes as many threads as the machine has cores, whatever `threads` says."""
        self.require()
        import torch
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        runtime = Runtime.get()
        # A method does not keep its program alive by itself.
        programs = {graph: runtime.load_program((folder / names[graph]).read_bytes()) for graph in GRAPHS}
        methods = {graph: program.load_method("forward") for graph, program in programs.items()}

        def call(graph: str) -> Call:
            def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
                given = [
                    torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in _ORDER[graph] if name in inputs
                ]
                return methods[graph].execute(given)[0].numpy().copy()  # pyright: ignore[reportOptionalMemberAccess]

            run.program = programs[graph]  # pyright: ignore[reportFunctionMemberAccess]
            return run

        return {graph: call(graph) for graph in GRAPHS}

    def hardware(self, threads: int) -> str:
        """Not of `threads`: its runtime takes them all."""
        return f"{platform.machine()} CPU, all {os.cpu_count()} cores"

    def fallback(self, path: Path) -> dict[str, Any] | None:
        """From the program's own table: delegated parts and the operators between them."""
        from executorch.exir._serialize._program import deserialize_pte_binary  # pyright: ignore[reportMissingImports]

        program = deserialize_pte_binary(path.read_bytes()).program
        plan = program.execution_plan[0]
        calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
        others = Counter(plan.operators[call.op_index].name for call in calls if type(call).__name__ == "KernelCall")
        parts = sum(type(call).__name__ == "DelegateCall" for call in calls)
        return {"accelerated_parts": parts, "not_accelerated": dict(others), "said_by": "the program's own plan"}


_ORDER = {
    "text_encoder": ("input_ids",),
    "unet": ("latent", "timestep", "text", "guidance"),
    "vae_decoder": ("latent",),
}
"""A program's inputs have no names; guidance is there where it is an input."""


TARGETS = {
    "executorch": ExecuTorch(
        "executorch",
        ".pte",
        "executorch",
        packages={"executorch": "executorch"},
        extra="executorch",
        from_onnx=False,
        sample_needs=("torch", "pillow"),
    )
}
