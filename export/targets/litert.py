"""LiteRT, Android's runtime: the UNet as one W8A16 TFLite file that runs here as well, between an encoder and a decoder in ONNX.

Untiled, for a CPU has nothing to gain from tiles; `ethos` and `exynos`, which write the same file, plan them.

What hangs on the step alone is the host's: NAME.host.onnx beside the UNet gives the time vectors that the file takes as inputs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import StageError
from export.onnx_file import copy_onnx
from export.quantise import quantise_onnx
from export.targets.contract import GRAPHS, EdgeTarget, Source
from export.targets.litert_run import LiteRtModel
from export.targets.onnx_runtime import session_options
from export.targets.tflite import schema

if TYPE_CHECKING:
    from export.runtime import Call
    from export.solve import Plan
    from export.targets.unet import Cuts


class LiteRt(EdgeTarget):
    def suffix_of(self, graph: str) -> str:
        return self.suffix if graph == "unet" else ".onnx"

    def shipped(self, path: Path) -> list[Path]:
        return [*super().shipped(path), *(other for other in (host_path(path),) if other.exists())]

    def lower(self, source: Source, precision: str, path: Path) -> None:
        """The UNet at w8a16; others at any precision of ONNX Runtime. Raises StageError for a UNet with parts that are not lowered."""
        if source.graph.name != "unet":
            if precision == "fp32":
                copy_onnx(source.onnx, path)
            else:
                quantise_onnx(source.onnx, path, precision, source.calibration, source.keep)
            return
        from export.targets.npu_unet import calibrate, write_host, write_unet

        if precision != "w8a16":
            raise StageError(f"a UNet in {precision} is not written for {self.name}", remedy="Choose w8a16")
        unet: Any = source.graph.module.unet
        found = calibrate(unet, source.calibration, source.keep)
        side, tokens = source.graph.inputs["latent"].shape[-1], source.graph.inputs["text"].shape[1]
        plan = self.plan(source)
        write_unet(unet, side, tokens, found, path, {} if plan is None else cuts_of(plan), keep=source.keep)
        write_host(unet, source.graph.inputs, host_path(path))

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        import onnxruntime

        self.require()
        options = session_options(threads)

        def session(path: Path) -> Any:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def plain(path: Path) -> Call:
            opened = session(path)
            return lambda inputs: opened.run(None, inputs)[0]

        calls = {graph: plain(folder / names[graph]) for graph in GRAPHS if graph != "unet"}
        return {**calls, "unet": unet_call(folder / names["unet"], session(host_path(folder / names["unet"])), threads)}


def cuts_of(plan: Plan) -> Cuts:
    """The plan's choice for every attention block."""
    return {part.block.name: (part.chosen.head_group, part.chosen.query_tiles) for part in plan.blocks}


def unet_call(path: Path, host: Any, threads: int) -> Call:
    """The UNet as other targets call it: latent 1 C H W, timestep 1, text 1 S D and maybe guidance 1 E to 1 C H W; `host`: a session of its
    host part."""
    model = LiteRtModel(path, threads)
    ends = np.cumsum(model.widths[2:])[:-1]

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        time = host.run(None, {name: inputs[name] for name in host_inputs})[0]
        vectors = np.split(time.reshape(1, 1, 1, -1), ends, axis=-1)
        return model(inputs["latent"].transpose(0, 2, 3, 1), inputs["text"], *vectors).transpose(0, 3, 1, 2)

    host_inputs = [one.name for one in host.get_inputs()]
    return run


def host_path(path: Path) -> Path:
    """The host's part of a UNet's file."""
    return path.with_suffix(".host.onnx")


def operators(path: Path) -> dict[str, int]:
    """Kind to count of the operators of a TFLite file, most first. Raises TargetUnavailable."""
    s = schema()
    names = {value: name for name, value in vars(s.BuiltinOperator).items() if not name.startswith("_")}
    model = s.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    codes = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return dict(Counter(codes[node.opcodeIndex] for node in model.subgraphs[0].operators).most_common())


TARGETS = {
    "litert": LiteRt(
        "litert",
        ".tflite",
        "ai-edge-litert",
        packages={"ai_edge_litert": "ai-edge-litert"},
        extra="npu",
        from_onnx=False,
        sample_needs=("onnxruntime", "pillow"),
        emulated=("fp16",),  # encoder and decoder, by ONNX Runtime's CPU
    )
}
