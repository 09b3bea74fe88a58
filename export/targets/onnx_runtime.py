"""ONNX Runtime: `onnx` on the CPU (and in browsers), `cuda` and `tensorrt` on NVIDIA GPUs by its providers, from the same files."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.onnx_file import copy_onnx, open_model
from export.quantise import quantise_onnx
from export.targets.contract import GRAPHS, EdgeTarget, Source

if TYPE_CHECKING:
    from export.runtime import Call


CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@dataclass(frozen=True)
class OnnxRuntime(EdgeTarget):
    provider: str = CPU
    install: str = ""
    """The line that brings the provider."""

    def require(self) -> None:
        if reason := self.not_here():
            raise TargetUnavailable(
                f"target {self.name}: {reason}",
                remedy=f"On a machine with an NVIDIA GPU: {self.install}. Or leave {self.name} out of export.targets",
            )

    def not_here(self) -> str:
        import onnxruntime

        found = onnxruntime.get_available_providers()  # what it was built with, whether or not that starts here
        if self.provider not in found:
            return f"ONNX Runtime has no {self.provider} here, only {', '.join(found)}"
        if self.provider == TENSORRT:
            # It has no option against TF32, and reads this when it builds an engine.
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        return "" if self.provider == CPU else _why_not(self.provider)

    def lower(self, source: Source, precision: str, path: Path) -> None:
        if precision == "fp32":
            copy_onnx(source.onnx, path)
        else:
            quantise_onnx(source.onnx, path, precision, source.calibration, source.keep)

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """Sessions of which every operator runs on the provider, or ONNX Runtime says on the CPU beside it (`fallback`)."""
        self.require()
        sessions = {graph: self._session(folder / names[graph], threads) for graph in GRAPHS}

        def call(session: Any) -> Call:
            return lambda inputs: session.run(None, inputs)[0]

        return {graph: call(session) for graph, session in sessions.items()}

    def _session(self, path: Path, threads: int) -> Any:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            str(path), session_options(threads), providers=self._providers(path.name)
        )
        if self.provider not in (got := session.get_providers()):
            raise TargetUnavailable(
                f"target {self.name}: ONNX Runtime runs it by {', '.join(got)} and not by {self.provider}",
                where=path.name,
                remedy="Its log says which library of the provider it does not find",
            )
        session.disable_fallback()  # a call that fails would go on by another provider
        return session

    def fallback(self, path: Path) -> dict[str, Any] | None:
        """From ONNX Runtime's own profile of one run: which nodes ran on which provider. Of TensorRT, nodes are whole parts of the graph, and
        `on_cuda` counts the operators that it left to CUDA."""
        if self.provider == CPU:
            return None
        return _placed(path, self._providers(path.name), self.provider)

    def tensors(
        self, path: Path, names: Sequence[str], inputs: dict[str, np.ndarray], threads: int
    ) -> dict[str, np.ndarray]:
        return values_inside(path, names, inputs, threads, self._providers(path.name))

    def runtime(self) -> str:
        """By the module: onnxruntime-gpu brings it in the place of onnxruntime, whose own version is then nowhere."""
        import onnxruntime

        return f"{self.library} {onnxruntime.__version__}"

    def hardware(self, threads: int) -> str:
        if self.provider == CPU:
            return super().hardware(threads)
        import torch

        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "an NVIDIA GPU"
        return f"{name} by {self.provider}"

    def _providers(self, name: str) -> list[Any]:
        """For the graph in the file `name`. What is stored as float32 is computed as float32: CUDA would take TF32 (10 bits of mantissa), and
        TensorRT halves, if they were let. The sample program says the same once more (`export/samples/onnx_sample.py`)."""
        cuda = (CUDA, {"use_tf32": "0"})
        if self.provider == TENSORRT:
            return [(TENSORRT, {"trt_fp16_enable": ".fp16." in name}), cuda, CPU]
        return [cuda, CPU] if self.provider == CUDA else [CPU]


@functools.cache
def _why_not(provider: str) -> str:
    """Why ONNX Runtime cannot start a provider that it was built with; empty where it can. By a session, for one whose libraries it does not
    find is left out with a line in its log, and the CPU takes its place."""
    import onnxruntime
    from onnx import TensorProto, helper

    getattr(onnxruntime, "preload_dlls", list)()  # CUDA's libraries as pip installs them, where no linker looks
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("given", "made"))
    graph = helper.make_graph([helper.make_node("Identity", ["given"], ["made"])], "probe", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider], enable_fallback=0
        )
    except Exception as error:
        return f"{provider} does not start: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return (
        "" if provider in session.get_providers() else f"{provider} does not start: a library that it needs is missing"
    )


def session_options(threads: int) -> Any:
    """For graphs that take turns: a session's threads stop waiting for more work when its run ends.

    Else those of the text encoder and the UNet spin while the decoder draws, and take its cores: a picture took
    twice as long as its parts (docs/decisions.md, 22).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def values_inside(
    path: Path, names: Sequence[str], inputs: dict[str, np.ndarray], threads: int, providers: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Of an ONNX file, those of the tensors `names` that it has, as float32. (What is looked at is not fused with what follows it.)"""
    import onnx

    model = onnx.load(str(path))
    there = {name for node in model.graph.node for name in node.output}
    wanted = [name for name in dict.fromkeys(names) if name in there]
    if not wanted:
        return {}
    given = {one.name for one in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in given)
    session = open_model(model, session_options(threads), providers)
    return dict(zip(wanted, (np.asarray(value, np.float32) for value in session.run(wanted, inputs)), strict=True))


def _placed(path: Path, providers: list[Any], wanted: str) -> dict[str, Any]:
    import json
    import tempfile

    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        session.run(None, {one.name: np.ones(one.shape, kinds[one.type]) for one in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
    return _tally(events, wanted)


def _tally(events: Iterable[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """Of a profile's events: how many nodes ran by the provider `wanted`, and which by others."""
    ran = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    by = {one: Counter(args["op_name"] for args in ran if args["provider"] == one) for one in (wanted, CUDA, CPU)}
    return {
        "accelerated": by[wanted].total(),
        "not_accelerated": dict(by[CPU]),
        **({"on_cuda": dict(by[CUDA])} if wanted == TENSORRT else {}),
        "said_by": "ONNX Runtime's profile of one run",
    }


_GPU = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"

TARGETS = {
    "onnx": OnnxRuntime("onnx", ".onnx", "onnxruntime", emulated=("fp16", "w8a16")),
    "cuda": OnnxRuntime("cuda", ".onnx", "onnxruntime-gpu", provider=CUDA, install=_GPU, sample="onnx"),
    "tensorrt": OnnxRuntime(
        "tensorrt",
        ".onnx",
        "onnxruntime-gpu",
        provider=TENSORRT,
        install=f"{_GPU} and tensorrt",
        sample="onnx",
    ),
}
