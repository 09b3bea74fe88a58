"""Which parts of the UNet suffer from 8 bits: each quantised alone, judged by the final latents and pictures of the few-step loop.

The whole UNet is calibrated and quantised once; a part alone, or all but some parts, is that file with the other layers wired back
to their float tensors. So a scan costs one calibration however many parts there are, and its arithmetic is the build's own.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export import parity
from export.layers import HIGH_PRECISION, LAYERS, layer_modules, lies_in
from export.onnx_file import open_model
from export.quantise import Inputs, quantise_onnx
from export.recipe import ExportRecipe
from export.runtime import Build, Call

Progress = Callable[[str], None]

_PART = re.compile(r".*?(?:resnets|attentions|downsamplers|upsamplers)\.\d+")


def part_of(module: str, by: str) -> str:
    """The part of the UNet that the module `unet.A.B...` belongs to: `by` layer the module itself, by block its resnet or attention."""
    path = module.removeprefix("unet.")
    if by == "layer":
        return path
    found = _PART.match(path)
    return found.group() if found else path.split(".")[0]


def keep_of(
    recipe: ExportRecipe,
    sources: Path,
    calibration: dict[str, list[Inputs]],
    reference: Build,
    tokens: Sequence[np.ndarray],
    progress: Progress,
) -> list[str]:
    """The modules that a recipe keeps in float; for `keep: auto` by a scan at 8 bits."""
    if recipe.keep != "auto":
        return list(recipe.keep)
    progress("scanning the unet for sensitive layers")
    found = scan(sources / "unet.onnx", calibration["unet"], reference, tokens[:4], recipe.keep_budget)
    return found["keep"]


def scan(
    source: Path,
    calibration: Sequence[Inputs],
    reference: Build,
    tokens: Sequence[np.ndarray],
    budget: float,
    by: str = "block",
    precision: str = "w8a8",
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Effect of every part of the UNet `source` (float32 ONNX), and a proposal of parts to keep in float.

    `rows`, most harmful first: `part`, `layers`, `weights` (share of the UNet's), `snr_db` of the final latents and `psnr_db` of the
    pictures with that part alone at `precision`. `keep`: the defaults and the parts that do most harm a weight, as long as they
    hold no more than `budget` of the weights. `before` and `after`: the whole UNet at `precision`, with the defaults kept and
    with the proposal.
    """
    import onnx

    modules = layer_modules(source)
    parts: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module:
            parts.setdefault(part_of(module, by), []).append(name)
    plain = onnx.load(str(source))
    weights = _weights(plain)
    total = sum(weights.values())
    wanted = [reference.denoise(row, i) for i, row in enumerate(tokens)]
    pictures = reference.pictures(tokens, range(len(tokens)))
    with tempfile.TemporaryDirectory() as place:
        progress(f"calibrating at {precision}")
        quantise_onnx(source, Path(place) / "all.onnx", precision, calibration, keep=())
        whole = onnx.load(str(Path(place) / "all.onnx"))

    def effect(layers: Collection[str]) -> dict[str, float]:
        calls = {**reference.calls, "unet": _open(only(whole, plain, layers))}
        build = Build(calls, reference.scheduler, reference.shape)
        latents = [build.denoise(row, i) for i, row in enumerate(tokens)]
        drawn = build.pictures(tokens, range(len(tokens)))
        shown = parity.picture_parity(pictures, drawn)
        return {
            "snr_db": parity.snr_db(np.stack(wanted), np.stack(latents)),
            "psnr_db": shown["psnr_db"],
            "psnr_db_min": shown["psnr_db_min"],
        }

    rows: list[dict[str, Any]] = []
    for part, layers in parts.items():
        progress(part)
        share = sum(weights.get(name, 0) for name in layers) / total
        rows.append({"part": part, "layers": len(layers), "weights": round(share, 5), **effect(layers)})
    rows.sort(key=lambda row: row["snr_db"])
    keep = [*HIGH_PRECISION, *propose(rows, budget)]

    def all_but(kept: Sequence[str]) -> list[str]:
        return [name for name, module in modules.items() if not any(lies_in(module, part) for part in kept)]

    progress("the proposal")
    return {
        "precision": precision,
        "by": by,
        "budget": budget,
        "rows": rows,
        "keep": keep,
        "before": effect(all_but(HIGH_PRECISION)),
        "after": effect(all_but(keep)),
    }


def propose(rows: Sequence[dict[str, Any]], budget: float) -> list[str]:
    """Parts to keep in float: those with the most error power a weight first, while they hold at most `budget` of all weights.

    Parts that are kept by default, or do no harm (60 dB and more), are not proposed.
    """
    found: list[str] = []
    left = budget
    open_to = [
        row for row in rows if row["snr_db"] < 60 and not any(lies_in(row["part"], part) for part in HIGH_PRECISION)
    ]
    for row in sorted(open_to, key=lambda row: row["weights"] / 10 ** (-row["snr_db"] / 10)):
        if row["weights"] <= left:
            found.append(row["part"])
            left -= row["weights"]
    return found


def only(whole: Any, plain: Any, layers: Collection[str]) -> Any:
    """The ONNX model `whole` (every layer quantised) with all but `layers` wired back to the float tensors of `plain`."""
    import onnx

    source: dict[str, Any] = {node.name: node for node in plain.graph.node}
    opened: dict[str, str] = _opened(whole)
    floats: dict[str, Any] = {tensor.name: tensor for tensor in plain.graph.initializer}
    # What a quantised layer reads or writes is quantised for all who read it, as in the build.
    touched = {name for node in plain.graph.node if node.name in layers for name in (*node.input, *node.output)}
    model: Any = onnx.ModelProto()
    model.CopyFrom(whole)
    floating: set[str] = set()
    for node in model.graph.node:
        if node.name in layers or node.name not in source:
            continue
        node.input[:] = [
            # A quantised bias keeps the name of the float one, so float tensors come back under a name of their own.
            f"float:{name}" if name in floats else opened.get(name, name) if name in touched else name
            for name in source[node.name].input
        ]
        # Of a layer that makes the graph's output the quantised model calls the float tensor otherwise.
        node.output[:] = source[node.name].output
        floating |= set(node.output)
    # What nothing leads to any more goes, and float weights that are wanted again come back.
    needed = {output.name for output in model.graph.output}
    nodes: list[Any] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output) and not (node.name not in source and floating & set(node.output)):
            nodes.append(node)
            needed |= set(node.input)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in floats.items():
        if f"float:{name}" in needed:
            held[f"float:{name}"] = onnx.TensorProto()
            held[f"float:{name}"].CopyFrom(tensor)
            held[f"float:{name}"].name = f"float:{name}"
    nodes.reverse()
    weights = [held[name] for name in sorted(needed) if name in held]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    return model


def _opened(whole: Any) -> dict[str, str]:
    """Float tensor to the same tensor after its quantisation."""
    closed: dict[str, str] = {
        node.output[0]: node.input[0] for node in whole.graph.node if node.op_type == "QuantizeLinear"
    }
    return {
        closed[node.input[0]]: node.output[0]
        for node in whole.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in closed
    }


def _weights(plain: Any) -> dict[str, int]:
    """Layer to the number of its weights."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in plain.graph.initializer}
    return {n.name: sum(sizes.get(i, 0) for i in n.input) for n in plain.graph.node if n.op_type in LAYERS}


def _open(model: Any) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = open_model(model, options, ["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]
