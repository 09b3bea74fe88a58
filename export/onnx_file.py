"""ONNX files on disk. One holds 2 GiB at most (protobuf); a graph with more weights keeps them beside it in NAME.onnx.data and refers to that name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_BYTES = 1984 << 20
"""Weights that go into the one file; what is left to 2 GiB is for the graph."""


def weights_beside(path: Path) -> Path:
    """Where the weights of a graph lie that are too many for its own file."""
    return path.with_name(f"{path.name}.data")


def parts_of(path: Path) -> list[Path]:
    """All files of a graph."""
    return [part for part in (path, weights_beside(path)) if part == path or part.exists()]


def publish_onnx(path: Path, model: Any) -> None:
    """Put an onnx_ir model under `path`, whole or not at all."""
    import onnx_ir

    from cluster.storage import publish_file  # not above: what runs a bundle opens this module and no storage

    beside = weights_beside(path)
    if sum(value.const_value.nbytes for value in model.graph.initializers.values()) <= LIMIT_BYTES:
        publish_file(path, lambda partial: onnx_ir.save(model, str(partial)))
        beside.unlink(missing_ok=True)
        return

    def write(partial: Path) -> None:
        # Weights first: a graph that is there must find them. They are written under a name that a sweep would take away.
        publish_file(beside, lambda data: onnx_ir.save(model, str(partial), external_data=data.name))
        _point_to(partial, beside.name)

    publish_file(path, write)


def save_onnx(model: Any, path: Path) -> None:
    """Write a ModelProto that holds its weights; its tensors may lie outside of it afterwards."""
    import onnx

    beside = weights_beside(path)
    beside.unlink(missing_ok=True)
    large = _weights_bytes(model) > LIMIT_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=beside.name if large else None)


def copy_onnx(source: Path, target: Path) -> None:
    """Copy a graph with its weights; the copy may have another name."""
    shutil.copyfile(source, target)
    if weights_beside(source).exists():
        shutil.copyfile(weights_beside(source), weights_beside(target))
        _point_to(target, weights_beside(target).name)


def open_model(model: Any, options: Any, providers: Sequence[Any]) -> Any:
    """A session of a ModelProto that holds its weights: from memory, or through a file where protobuf cannot pass it on."""
    import onnxruntime

    if _weights_bytes(model) <= LIMIT_BYTES:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _weights_bytes(model: Any) -> int:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _point_to(path: Path, name: str) -> None:
    """Let every tensor outside of a graph's file be looked for in the file `name` beside it."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString())
