"""Qualcomm's compiler and emulator, where onnxruntime-qnn is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import StageError
from export.parity import snr_db
from export.targets.qnn import _native_log, _options, compile_context, quantise_qnn, refused

needs_qnn = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")


def write_block(path: Path, extra: str = "") -> None:
    """A small attention block, 1 T C to 1 T C; `extra`: an operator behind it."""
    import torch
    from torch import nn

    from export.graph import Graph, to_onnx

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.outward = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.inward(x).chunk(3, dim=-1)
            mixed = self.outward((query @ key.transpose(1, 2) / 32**0.5).softmax(-1) @ value)
            return torch.einsum("btc,bsc->bts", mixed, mixed) if extra else mixed

    torch.manual_seed(0)
    to_onnx(Graph("block", Block().eval(), {"x": torch.randn(1, 64, 32)}, "y"), path)


def emulator(origin: Path) -> Any:
    """A session in which the whole of a small graph runs on the emulated NPU. A whole UNet kills the process in `run` (onnxruntime-qnn 2.7)."""
    import onnxruntime

    options = _options({})
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with _native_log() as said:
        try:
            return onnxruntime.InferenceSession(str(origin), options)
        except Exception as error:
            failure = error
    raise StageError(
        f"the NPU's emulator does not take the graph: {refused(said) or failure}", where=origin.name
    ) from failure


@needs_qnn
def test_an_attention_block_compiles_and_the_emulated_npu_agrees(tmp_path: Path) -> None:
    import onnxruntime

    write_block(tmp_path / "block.onnx")
    rows = [{"x": np.random.default_rng(i).standard_normal((1, 64, 32)).astype(np.float32)} for i in range(4)]
    quantise_qnn(tmp_path / "block.onnx", tmp_path / "block.w8a16.source.onnx", "w8a16", rows, [])
    compile_context(tmp_path / "block.w8a16.source.onnx", tmp_path / "block.w8a16.onnx")
    assert (tmp_path / "block.w8a16_qnn.bin").stat().st_size > 1000
    plain = onnxruntime.InferenceSession(str(tmp_path / "block.onnx"), providers=["CPUExecutionProvider"])
    wanted = np.asarray(plain.run(None, rows[0])[0])
    got = np.asarray(emulator(tmp_path / "block.w8a16.source.onnx").run(None, rows[0])[0])
    assert 25 < snr_db(wanted, got) < 100


@needs_qnn
def test_a_refused_operator_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    write_block(tmp_path / "block.onnx", extra="einsum")
    rows = [{"x": np.zeros((1, 64, 32), np.float32)}]
    quantise_qnn(tmp_path / "block.onnx", tmp_path / "block.source.onnx", "w8a16", rows, [])
    with pytest.raises(StageError, match=r"does not take the graph for SM8650.*Einsum \("):
        compile_context(tmp_path / "block.source.onnx", tmp_path / "block.ctx.onnx")
    assert not list(tmp_path.glob("*.bin"))


@needs_qnn
def test_norms_of_two_kinds_that_share_an_offset_compile(tmp_path: Path) -> None:
    """The exporter stores equal tensors (offsets that are all 0) once, and a LayerNormalization's code of it suits no other operator."""
    import onnx
    import torch
    from torch import nn

    from export.graph import Graph, to_onnx

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups, self.line, self.tokens = nn.GroupNorm(4, 32), nn.Linear(32, 32), nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tokens(self.line(self.groups(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)))

    torch.manual_seed(0)
    to_onnx(Graph("norms", Norms().eval(), {"x": torch.randn(1, 64, 32)}, "y"), tmp_path / "norms.onnx")
    graph = onnx.load(str(tmp_path / "norms.onnx")).graph
    (offset,) = {node.input[2] for node in graph.node if node.op_type == "LayerNormalization"}
    assert sum(offset in node.input for node in graph.node) == 2  # shared with the other norm
    rows = [{"x": np.random.default_rng(i).standard_normal((1, 64, 32)).astype(np.float32) * 9} for i in range(4)]
    quantise_qnn(tmp_path / "norms.onnx", tmp_path / "norms.source.onnx", "w8a16", rows, [])
    compile_context(tmp_path / "norms.source.onnx", tmp_path / "norms.ctx.onnx")
    assert (tmp_path / "norms.ctx_qnn.bin").stat().st_size > 1000


def test_the_compilers_words_are_read() -> None:
    line = "E: Unsupported nodes in QNN EP: { name: node_einsum, type: Einsum }{ name: a, type: Erf }"
    assert refused([line, "other"]) == "Erf (a), Einsum (node_einsum)"
