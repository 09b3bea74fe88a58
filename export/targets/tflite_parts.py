"""A written network as several TFLite files that run one after another: what a part leaves for later parts is its output and their input.

A compiler that sees the whole network keeps what waits for a later operator on chip, where a tiled block then has no room. Between files it
waits in DRAM. Knows the format, no network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.storage import publish_bytes


def cut_model(model: Any, starts: Sequence[int]) -> list[Any]:
    """The parts of a model whose operators `starts` begin a new one. Tensors between parts are named by their place in the whole."""
    graph = model.subgraphs[0]
    bounds = list(pairwise(sorted({0, *starts, len(graph.operators)})))
    parts = [graph.operators[start:end] for start, end in bounds]
    last = {index: n for n, nodes in enumerate(parts) for node in nodes for index in node.inputs}
    wanted, found = set(graph.outputs), []
    for n, nodes in enumerate(parts):
        made = dict.fromkeys(index for node in nodes for index in node.outputs)
        read = dict.fromkeys(index for node in nodes for index in node.inputs)
        inputs = [i for i in read if i not in made and not graph.tensors[i].buffer]
        outputs = [i for i in made if i in wanted or last.get(i, n) > n]
        # A block's result before those of its head groups: the other way round a block of 4096 tokens lost its tiles' room on chip
        # (Vela 5.2: 4170 MB of traffic in place of 88).
        outputs.sort(key=lambda i: (i != graph.outputs[0], last.get(i, n) <= n))
        found.append(_part(model, nodes, inputs, outputs))
    return found


def _part(model: Any, nodes: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]) -> Any:
    """The operators `nodes` alone, with the tensors and buffers that they need."""
    whole = model.subgraphs[0]
    part, graph = copy.copy(model), copy.copy(whole)
    places: dict[int, int] = {}
    part.buffers, part.subgraphs, graph.tensors = [model.buffers[0]], [graph], []

    def place(index: int) -> int:
        if index not in places:
            tensor = copy.copy(whole.tensors[index])
            if tensor.buffer:
                part.buffers.append(model.buffers[tensor.buffer])
                tensor.buffer = len(part.buffers) - 1
            elif (index in inputs and index not in whole.inputs) or index in outputs:
                tensor.name = f"between.{index}".encode()
            places[index] = len(graph.tensors)
            graph.tensors.append(tensor)
        return places[index]

    graph.inputs, graph.operators = [place(i) for i in inputs], []
    for node in nodes:
        moved = copy.copy(node)
        moved.inputs, moved.outputs = [place(i) for i in node.inputs], [place(i) for i in node.outputs]
        graph.operators.append(moved)
    graph.outputs = [place(i) for i in outputs]
    return part


def write_model(model: Any, path: Path) -> None:
    """Write a model of the schema's classes whole."""
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    publish_bytes(path, bytes(builder.Output()))
