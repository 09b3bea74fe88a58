"""Qualcomm's HTP (the NPU of Snapdragon chips), by the compiler in onnxruntime-qnn's x86 wheel: context binaries for one chip.

Nothing here ran on a phone. Pictures and SNR of a build are of the same graph played by ONNX Runtime's CPU, integers and halves as
the chip has them; times so taken say nothing of it. The wheel's own emulator of the NPU runs small blocks (tests/export/test_qnn.py) and dies of a
whole UNet. Read the wheel's licence before you pass a context binary on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import StageError, TargetUnavailable
from export.layers import kept_nodes
from export.onnx_file import copy_onnx, weights_beside
from export.quantise import quantise_onnx
from export.targets.contract import GRAPHS, EdgeTarget, Source
from export.targets.onnx_runtime import session_options, values_inside

if TYPE_CHECKING:
    from export.runtime import Call

_EP = "QNNExecutionProvider"


@dataclass(frozen=True)
class Chip:
    """As Qualcomm numbers it. Source: QAIRT's table of supported Snapdragon devices (SoC model, Hexagon architecture)."""

    name: str
    soc_model: str
    htp_arch: str


SM8650 = Chip("SM8650 (Snapdragon 8 Gen 3)", "57", "75")

INTEGERS = ("w8a16", "w8a8")


class Qnn(EdgeTarget):
    """A graph in integers or fp16 is NAME.onnx (for ONNX Runtime on the phone) with its context binary NAME_qnn.bin, and NAME.source.onnx,
    from which other chips are compiled; fp32 is a plain ONNX file for the phone's CPU."""

    def shipped(self, path: Path) -> list[Path]:
        """Not NAME.source.onnx, which is the same weights once more."""
        return [*super().shipped(path), *([_binary(path)] if _binary(path).exists() else [])]

    def readable(self, path: Path) -> Path:
        """A context binary shows nothing of what is in it."""
        return _origin(path) if _origin(path).exists() else path

    def lower(self, source: Source, precision: str, path: Path) -> None:
        if precision == "fp32":
            copy_onnx(source.onnx, path)
            return
        if precision in INTEGERS:
            if weights_beside(source.onnx).exists():
                raise StageError(
                    f"{source.graph.name} has more than 2 GiB of weights in float32, and Qualcomm's preparation of integers reads one file",
                    where=self.name,
                    remedy=f"Leave {precision} out of export.precisions for qnn (fp16 is lowered), or take a smaller student",
                )
            quantise_qnn(source.onnx, _origin(path), precision, source.calibration, source.keep)
        else:
            quantise_onnx(source.onnx, _origin(path), precision, (), ())
        compile_context(_origin(path), path)

    def open(self, folder: Path, names: dict[str, str], threads: int) -> dict[str, Call]:
        """ONNX Runtime's CPU on what was compiled, not on the context binaries: those run on their chip alone."""
        import onnxruntime

        def opened(path: Path) -> Any:
            options = session_options(threads)
            played = _origin(path) if _origin(path).exists() else path
            return onnxruntime.InferenceSession(str(played), options, providers=["CPUExecutionProvider"])

        sessions = {graph: opened(folder / names[graph]) for graph in GRAPHS}

        def call(session: Any) -> Call:
            return lambda inputs: session.run(None, inputs)[0]

        return {graph: call(session) for graph, session in sessions.items()}

    def tensors(
        self, path: Path, names: Sequence[str], inputs: dict[str, np.ndarray], threads: int
    ) -> dict[str, np.ndarray]:
        played = _origin(path) if _origin(path).exists() else path
        return values_inside(played, names, inputs, threads, ["CPUExecutionProvider"])

    def fallback(self, path: Path) -> dict[str, Any] | None:
        import onnx

        found = onnx.load(str(path), load_external_data=False).graph.node
        if not _origin(path).exists():
            return {
                "accelerated": 0,
                "not_accelerated": dict(Counter(n.op_type for n in found)),
                "said_by": "by choice",
            }
        inside = onnx.load(str(_origin(path)), load_external_data=False).graph.node
        others = Counter(node.op_type for node in found if node.op_type != "EPContext")
        return {
            "accelerated": sum(node.op_type not in ("QuantizeLinear", "DequantizeLinear") for node in inside),
            "not_accelerated": dict(others),
            "said_by": "Qualcomm's compiler, with CPU fallback disabled",
        }


def quantise_qnn(
    source: Path, target: Path, precision: str, calibration: Sequence[dict[str, np.ndarray]], keep: Sequence[str]
) -> None:
    """Every operator between QuantizeLinear and DequantizeLinear: unsigned activations of 16 or 8 bits, uint8 weights, a channel where that is known.

    Operators of the modules `keep` stay in float, which the NPU computes in fp16.
    """
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    from export.quantise import reader

    activations = {"w8a16": QuantType.QUInt16, "w8a8": QuantType.QUInt8}[precision]
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            ready = Path(folder) / "ready.onnx"
            if not qnn_preprocess_model(str(source), str(ready)):
                shutil.copyfile(source, ready)
            _give_norms_their_own(ready)
            config = get_qnn_qdq_config(
                str(ready),
                reader(calibration),
                activation_type=activations,
                weight_type=QuantType.QUInt8,  # signed ones make its compiler refuse LayerNormalization
                per_channel=True,
                nodes_to_exclude=kept_nodes(ready, keep),
            )
            quantize(str(ready), str(target), config)
    finally:
        logging.disable(logging.NOTSET)


def _give_norms_their_own(path: Path) -> None:
    """Every LayerNormalization with a gain and an offset of its own.

    The exporter stores equal tensors once. A norm's offset becomes int32 in the scale of that norm's input, which the compiler refuses to
    read for anybody else.
    """
    import onnx

    model = onnx.load(str(path))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    users = Counter(name for node in model.graph.node for name in node.input)
    for i, node in enumerate(model.graph.node):
        for place, name in enumerate(node.input):
            if node.op_type == "LayerNormalization" and place > 0 and name in stored and users[name] > 1:
                own = model.graph.initializer.add()
                own.CopyFrom(stored[name])
                own.name = node.input[place] = f"{name}.of.{i}"
    onnx.save(model, str(path))


def compile_context(origin: Path, path: Path, chip: Chip = SM8650) -> None:
    """Write `path` and its binary for one chip; raises StageError, which names the operators, if one would stay on the CPU."""
    import onnxruntime

    for old in (path, _binary(path)):
        old.unlink(missing_ok=True)
    options = _options({"soc_model": chip.soc_model, "htp_arch": chip.htp_arch})
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(path))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    with _native_log() as said:
        try:
            onnxruntime.InferenceSession(str(origin), options)
        except Exception as error:
            failure: Exception | None = error
        else:
            failure = None
    if failure is not None or not _binary(path).exists():
        for part in (path, _binary(path)):
            part.unlink(missing_ok=True)  # of a graph cut in pieces it writes the pieces that it could
        raise StageError(
            f"Qualcomm's compiler does not take the graph for {chip.name}: {refused(said) or failure or 'it wrote no binary'}",
            where=origin.name,
            remedy="Leave qnn or this precision out of the recipe, or name the operators' modules in export.keep",
        ) from failure


def refused(said: Sequence[str]) -> str:
    """What the compiler's log says of operators that it does not take: `Einsum (node_einsum)`, ...; empty if nothing."""
    import re

    found = {pair for line in said for pair in re.findall(r"\{ name: ([^,}]+), type: ([^,} ]+) \}", line)}
    return ", ".join(f"{kind} ({name})" for name, kind in sorted(found))


def _options(provider: dict[str, str]) -> Any:
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == _EP]
    if not devices:
        onnxruntime.register_execution_provider_library(_EP, onnxruntime_qnn.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == _EP]
    if not devices:
        raise TargetUnavailable(
            "onnxruntime-qnn finds no device here, not even its emulator's",
            remedy="Run it on x86 Linux or a Snapdragon, or leave qnn out of export.targets",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    chosen = [device for device in devices if "NPU" in str(device.device.type)] or devices
    options.add_provider_for_devices(chosen[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **provider})
    return options


@contextlib.contextmanager
def _native_log() -> Iterator[list[str]]:
    """Lines that libraries write to file descriptors 1 and 2 meanwhile: the compiler names refused operators there and nowhere else."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, fd)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _binary(path: Path) -> Path:
    return path.with_name(f"{path.stem}_qnn.bin")


def _origin(path: Path) -> Path:
    return path.with_suffix(".source.onnx")


TARGETS = {
    "qnn": Qnn(
        "qnn",
        ".onnx",
        "onnxruntime-qnn",
        packages={"onnxruntime_qnn": "onnxruntime-qnn"},
        extra="qnn",
        sample_needs=("pillow",),
        emulated=("fp16", "w8a16", "w8a8"),
    )
}
