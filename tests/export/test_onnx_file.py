"""Graphs with more weights than one ONNX file holds: 1,000 bytes here in place of 2 GiB."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cluster.errors import EdgeFusionError, StageError
from cluster.storage import sweep_partials
from export.demo import write_demo
from export.graph import Graph, to_onnx
from export.onnx_file import copy_onnx, weights_beside
from export.openvino_core import openvino_core
from export.parity import snr_db
from export.proof import BUNDLE, broken_files, write_sums
from export.targets.contract import Source, bytes_of
from export.targets.registry import find_target
from tests.export.test_targets import small_graphs


@pytest.fixture
def graph() -> Graph:
    return small_graphs()[1]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.onnx_file.LIMIT_BYTES", 1000)


def rows_of(graph: Graph) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in graph.inputs.items()}


def snr_of(path: Path, graph: Graph) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = graph.module(*graph.inputs.values()).detach().numpy()
    return snr_db(wanted, np.asarray(session.run(None, rows_of(graph))[0]))


def test_the_exporters_own_limit_does_not_part_a_file(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch writes external data from 1.5 GiB on, whatever it is told: bk-sdm-small has 1.8."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    to_onnx(graph, tmp_path / "unet.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.onnx"]
    assert snr_of(tmp_path / "unet.onnx", graph) > 90


@pytest.mark.usefixtures("large")
def test_weights_lie_beside_a_large_graph_and_survive_a_sweep(graph: Graph, tmp_path: Path) -> None:
    to_onnx(graph, tmp_path / "unet.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet.onnx", "unet.onnx.data"]
    assert sweep_partials(tmp_path) == 0
    assert weights_beside(tmp_path / "unet.onnx").stat().st_size > 1000
    assert snr_of(tmp_path / "unet.onnx", graph) > 90


@pytest.mark.usefixtures("large")
def test_a_large_graph_is_not_there_before_its_weights(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, name: str) -> None:
        assert (tmp_path / name).exists() and not (tmp_path / "unet.onnx").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("export.onnx_file._point_to", killed)
        to_onnx(graph, tmp_path / "unet.onnx")
    assert not (tmp_path / "unet.onnx").exists()
    to_onnx(graph, tmp_path / "unet.onnx")
    assert snr_of(tmp_path / "unet.onnx", graph) > 90


@pytest.mark.usefixtures("large")
def test_a_copy_of_another_name_finds_its_own_weights(graph: Graph, tmp_path: Path) -> None:
    to_onnx(graph, tmp_path / "unet.onnx")
    (tmp_path / "there").mkdir()
    copy_onnx(tmp_path / "unet.onnx", tmp_path / "there" / "other.onnx")
    shutil.move(tmp_path / "unet.onnx.data", tmp_path / "away")
    assert snr_of(tmp_path / "there" / "other.onnx", graph) > 90


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("name", "precision", "least"),
    [
        ("onnx", "fp32", 90),
        ("onnx", "fp16", 40),
        ("onnx", "w8", 25),
        ("onnx", "w4", 10),
        ("onnx", "w8a8", 10),
        ("qnn", "fp32", 90),
        ("openvino", "fp32", 90),
        ("openvino", "fp16", 40),
        ("openvino", "w8", 25),
    ],
)
def test_targets_carry_the_weights_of_a_large_graph(
    name: str, precision: str, least: float, graph: Graph, tmp_path: Path
) -> None:
    target: Any = find_target(name)
    to_onnx(graph, tmp_path / "unet.onnx")
    place = tmp_path / "bundle"
    place.mkdir()
    path = place / f"unet{target.suffix}"
    target.lower(Source(graph, tmp_path / "unet.onnx", [rows_of(graph)], ["out"]), precision, path)
    (tmp_path / "unet.onnx.data").unlink()
    assert bytes_of(target, path) == sum(file.stat().st_size for file in place.iterdir())
    if name == "openvino":
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs would compute in bf16
        got = np.array(openvino_core().compile_model(str(path), "CPU", exact)(rows_of(graph))[0])
        assert snr_db(graph.module(*graph.inputs.values()).detach().numpy(), got) > least
        return
    assert snr_of(path, graph) > least
    tensors = [node.output[0] for node in onnx.load(str(path), load_external_data=False).graph.node[:3]]
    assert set(target.tensors(path, tensors, rows_of(graph), 1)) == set(tensors)
    # Digests hold the weights to account.
    (place / BUNDLE).write_text('{"files": {}}')
    write_sums(place)
    assert broken_files(place) == []
    if weights_beside(path).exists():
        weights_beside(path).write_bytes(b"")
        assert broken_files(place) == ["unet.onnx.data: is not what SHA256SUMS says"]
    else:
        assert precision != "fp32"


@pytest.mark.usefixtures("large")
def test_what_a_large_graph_is_no_good_for_is_told(graph: Graph, student_bundles: Path, tmp_path: Path) -> None:
    to_onnx(graph, tmp_path / "unet.onnx")
    source = Source(graph, tmp_path / "unet.onnx", [rows_of(graph)], [])
    with pytest.raises(StageError, match=r"unet has more than 2 GiB of weights.*fp16 is lowered"):
        find_target("qnn").lower(source, "w8a16", tmp_path / "q.onnx")
    bundle = Path(shutil.copytree(student_bundles / "onnx", tmp_path / "onnx"))
    (bundle / "unet.onnx.data").touch()
    with pytest.raises(EdgeFusionError, match=r"unet\.onnx has more than 2 GiB.*--precision w8"):
        write_demo(bundle, tmp_path / "demo")
