"""Which module of the student each layer of a lowered graph came from, and which layers a recipe keeps in float."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIGH_PRECISION = ("time_embedding", "time_proj", "add_embedding", "conv_in", "conv_out")
"""Modules that stay in float unless a recipe says otherwise: few weights, large loss."""

LAYERS = ("Conv", "MatMul", "Gemm")
"""What is quantised; the rest of a graph stays in float."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def module_of(node: Any) -> str:
    """The dotted path of the module that made an ONNX node (`unet.down_blocks.0.resnets.0.conv1`); empty where it is not known."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def lies_in(path: str, part: str) -> bool:
    """Whether `part` is a run of whole names of the dotted `path`: conv_in lies in unet.conv_in, and not in unet.conv_in2."""
    return f".{part}." in f".{path}."


def layer_modules(source: Path) -> dict[str, str]:
    """Name to module path of every layer of an ONNX file that can be quantised."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    return {node.name: module_of(node) for node in graph.node if node.op_type in LAYERS}


def kept_layers(source: Path, keep: Sequence[str]) -> list[str]:
    """Names of the layers of an ONNX file that lie in one of the modules `keep`."""
    return [name for name, path in layer_modules(source).items() if any(lies_in(path, part) for part in keep)]


def kept_nodes(source: Path, keep: Sequence[str]) -> list[str]:
    """As `kept_layers`, with every other operator of those modules."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    return [node.name for node in graph.node if any(lies_in(module_of(node), part) for part in keep)]
