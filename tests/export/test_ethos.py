import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import EdgeFusionError, TargetUnavailable
from export.blocks import Block
from export.plan_view import compiled_table
from export.profile import load_profile
from export.solve import solve
from export.targets import ethos
from export.targets.judge import USUAL_REACH, compile_plan
from export.targets.litert_run import LiteRtModel

SELF = Block("a", queries=256, keys=256, width=64, key_width=64, heads=2, crossed=False)
CROSS = replace(SELF, keys=77, key_width=48, crossed=True)


def inputs(block: Block) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((1, block.queries, block.width)).astype(np.float32)
    return [hidden, rng.standard_normal((1, block.keys, block.key_width)).astype(np.float32)][: 1 + block.crossed]


def snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((wanted - got) ** 2).sum()))


def weights_of(attention: Any) -> ethos.Weights:
    """Of a diffusers Attention."""
    out = attention.to_out[0]
    query, key, value, joined = (
        layer.weight.detach().float().numpy() for layer in (attention.to_q, attention.to_k, attention.to_v, out)
    )
    bias = np.zeros(len(joined), np.float32) if out.bias is None else out.bias.detach().float().numpy()
    return ethos.Weights(query, key, value, joined, bias)


def attend(
    block: Block, weights: ethos.Weights, hidden: np.ndarray, context: np.ndarray | None = None
) -> tuple[np.ndarray, ethos.Reach]:
    """The block in float32, hidden 1 T C and context 1 S C_key to 1 T C, and the reach of every activation on the way."""
    seen = hidden if context is None else context
    query, key, value = hidden @ weights.query.T, seen @ weights.key.T, seen @ weights.value.T
    mixed, most = np.empty_like(query), 0.0
    for head in range(block.heads):
        part = slice(head * block.head_width, (head + 1) * block.head_width)
        scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(block.head_width)
        most = max(most, largest(scores))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[..., part] = shares / shares.sum(axis=-1, keepdims=True) @ value[..., part]
    out = mixed @ weights.out.T + weights.bias
    reach = ethos.Reach(
        hidden=largest(hidden),
        context=largest(seen),
        query=largest(query) / math.sqrt(block.head_width),
        key=largest(key),
        value=largest(value),
        scores=most,
        mixed=largest(mixed),
        out=largest(out),
    )
    return out, reach


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def test_without_the_packages_the_install_line_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(TargetUnavailable, match=r"pip install .*npu"):
        ethos.lower(SELF, 1, 1, tmp_path / "a.tflite", ethos.random_weights(SELF), USUAL_REACH)
    monkeypatch.setattr(ethos.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(TargetUnavailable, match=r"Vela.*pip install .*npu"):
        ethos.estimate(tmp_path / "a.tflite", load_profile("ethos-u85-1024"))


def test_another_vendor_s_chip_is_refused(tmp_path) -> None:
    with pytest.raises(EdgeFusionError, match="hexagon-v75 is not an Arm NPU"):
        ethos.estimate(tmp_path / "a.tflite", load_profile("hexagon-v75"))


def test_the_reference_equals_the_block_of_diffusers() -> None:
    import torch
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    module = Attention(query_dim=64, cross_attention_dim=48, heads=2, dim_head=32).eval()
    hidden, context = inputs(CROSS)
    with torch.no_grad():
        wanted = module(torch.from_numpy(hidden), encoder_hidden_states=torch.from_numpy(context)).numpy()
    np.testing.assert_allclose(attend(CROSS, weights_of(module), hidden, context)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softmax", ["operator", "parts"])
@pytest.mark.parametrize(("block", "cut"), [(SELF, (2, 1)), (SELF, (1, 8)), (CROSS, (1, 4)), (CROSS, (2, 2))])
def test_the_w8a16_file_computes_the_block(tmp_path, block, cut, softmax) -> None:
    pytest.importorskip("ai_edge_litert")
    weights, given = ethos.random_weights(block), inputs(block)
    wanted, reach = attend(block, weights, *given)
    ethos.lower(block, *cut, tmp_path / "a.tflite", weights, reach, softmax)
    got = LiteRtModel(tmp_path / "a.tflite")(*given)
    assert got.shape == wanted.shape and snr_db(wanted, got) > 33


@pytest.mark.parametrize("softmax", ["operator", "parts"])
def test_rows_of_one_key_and_of_all_keys_both_stay_precise(tmp_path, softmax) -> None:
    """The sum of exponentials runs from 1 to the number of keys: both ends must survive int16."""
    pytest.importorskip("ai_edge_litert")
    width = 32
    block = Block("a", 512, 512, width, width, 1, False)
    eye = np.eye(width, dtype=np.float32)
    weights = ethos.Weights(eye * 1.5, eye * 1.5, eye, eye, np.zeros(width, np.float32))
    hidden = np.random.default_rng(0).standard_normal((1, 512, width)).astype(np.float32)
    hidden[:, :256] *= 3  # peaked on themselves
    hidden[:, 256:] *= 0.05  # flat
    wanted, reach = attend(block, weights, hidden)
    ethos.lower(block, 1, 4, tmp_path / "a.tflite", weights, reach, softmax)
    got = LiteRtModel(tmp_path / "a.tflite")(hidden)
    # Scores reach 300 here, so that one code of theirs is already a hundredth.
    assert snr_db(wanted[:, :256], got[:, :256]) > 29


def _survives(path) -> tuple[int, set[int]]:
    """How many products of activations a file holds, and how many rows they have."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph, codes = model.subgraphs[0], [code.builtinCode for code in model.operatorCodes]
    products = [n for n in graph.operators if codes[n.opcodeIndex] == schema.BuiltinOperator.BATCH_MATMUL]
    return len(products), {int(graph.tensors[n.outputs[0]].shape[1]) for n in products}


def test_the_tiles_are_in_the_file(tmp_path) -> None:
    pytest.importorskip("ai_edge_litert")
    ethos.lower(SELF, 1, 8, tmp_path / "a.tflite", ethos.random_weights(SELF), USUAL_REACH)
    assert _survives(tmp_path / "a.tflite") == (2 * 2 * 8, {32})


@pytest.mark.parametrize("width", [320, 640])
@pytest.mark.parametrize(
    ("name", "times_less"), [pytest.param("ethos-u85-256", 2, marks=pytest.mark.long), ("ethos-u85-1024", 3)]
)
def test_the_compiler_agrees_that_the_plan_pays(name, times_less, width) -> None:
    pytest.importorskip("ethosu")
    pytest.importorskip("ai_edge_litert")
    profile = load_profile(name)
    plan = solve([Block("a", 1024, 1024, width, width, 8, False)], profile)
    said = compile_plan(plan.blocks, profile)["a"]
    assert said["chosen"]["cpu_operators"] == 0
    assert said["chosen"]["dram_bytes"] * times_less < said["untiled"]["dram_bytes"]
    assert said["chosen"]["latency_s"] < said["untiled"]["latency_s"]
    assert said["untiled_heads"] == 8 and said["own_softmax"]["dram_bytes"] > said["chosen"]["dram_bytes"]


def test_every_block_is_compiled_and_a_shape_once(monkeypatch) -> None:
    pytest.importorskip("ethosu")
    pytest.importorskip("ai_edge_litert")
    profile, asked = load_profile("ethos-u85-1024"), []
    monkeypatch.setattr(
        ethos, "estimate", lambda path, chip, real=ethos.estimate: asked.append(path) or real(path, chip)
    )
    plan = solve([CROSS, replace(CROSS, name="b")], profile)
    said = compile_plan(plan.blocks, profile)
    assert (
        said["a"] is said["b"] and not plan.tiled and len(asked) == 2
    )  # as planned, and with the compiler's own softmax
    assert said["a"]["chosen"] is said["a"]["untiled"]
    table = Console(width=200, record=True)
    table.print(compiled_table(plan, said))
    assert table.export_text().count("cross") == 2
