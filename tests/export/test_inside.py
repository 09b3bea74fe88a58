"""Signal-to-noise of each UNet block: the tensors are the blocks' own, and a block that is hurt is the one that shows it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.clip_gate import judge_failures
from export.graph import graphs_of, to_onnx
from export.inside import block_snr_db, unet_blocks
from export.layers import module_of
from export.proof import read_reference, reference_inputs
from export.recipe import GateRecipe
from export.targets.registry import find_target
from export.verify import verify_bundle
from export.verify_view import block_lines
from factory.models import resolve
from trainer.models import open_pipeline


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The shipped student's UNet as a module, and as an ONNX file with the names of modules that bundles keep as well."""
    graph = graphs_of(open_pipeline(resolve("zoo:student-fewstep")))[1]
    path = tmp_path_factory.mktemp("unet") / "unet.onnx"
    to_onnx(graph, path)
    return graph, path


def test_the_tensors_are_what_the_blocks_hand_on(lowered: tuple[Any, Path]) -> None:
    graph, path = lowered
    unet, seen = graph.module.unet, {}
    parts = {
        f"{side}_blocks.{i}": part for side in ("down", "up") for i, part in enumerate(getattr(unet, f"{side}_blocks"))
    }
    hooks = [
        part.register_forward_hook(
            lambda _module, _given, said, name=name: seen.update({name: said[0] if isinstance(said, tuple) else said})
        )
        for name, part in parts.items()
    ]
    with torch.inference_mode():
        graph.module(*graph.inputs.values())
    for hook in hooks:
        hook.remove()
    blocks = unet_blocks(path)
    assert set(parts) <= set(blocks)
    inputs = {name: tensor.numpy() for name, tensor in graph.inputs.items()}
    found = find_target("onnx").tensors(path, list(blocks.values()), inputs, 1)
    for name in parts:
        np.testing.assert_allclose(found[blocks[name]], seen[name].numpy(), rtol=1e-3, atol=1e-3)


def test_a_hurt_block_shows_it_and_those_before_do_not(lowered: tuple[Any, Path], tmp_path: Path) -> None:
    graph, path = lowered
    model, blocks = onnx.load(str(path)), unet_blocks(path)
    hurt = next(n for n in model.graph.node if n.op_type == "Conv" and "up_blocks.0.resnets.0" in module_of(n))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == hurt.input[1])
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, str(tmp_path / "hurt.onnx"))
    inputs = {name: tensor.numpy() for name, tensor in graph.inputs.items()}
    plain, other = (
        find_target("onnx").tensors(p, list(blocks.values()), inputs, 1) for p in (path, tmp_path / "hurt.onnx")
    )
    found = block_snr_db(blocks, plain, other)
    assert found is not None and found["down_blocks.0"] > 100 and found["up_blocks.0"] < 40
    assert block_snr_db(blocks, plain, {}) is None


@pytest.mark.parametrize(("target", "build"), [("onnx", "w8a16"), ("openvino", "w8")])
def test_bundles_hold_every_blocks_and_verify_finds_them_again(
    student_bundles: Path, tmp_path: Path, target: str, build: str
) -> None:
    facts = json.loads((student_bundles / target / "bundle.json").read_text())
    recorded = facts["builds"][build]["parity"]["block_snr_db"]
    assert set(recorded) == set(facts["unet_blocks"]) and all(10 < db < 90 for db in recorded.values())
    assert "block_snr_db" not in facts["builds"]["fp32"]["parity"]
    bundle = Path(shutil.copytree(student_bundles / target, tmp_path / target))
    found = verify_bundle(bundle, [build], runs=1, threads=1)
    again = found["builds"][build]["parity"]["block_snr_db"]
    assert again == pytest.approx(recorded, abs=1.0)
    assert min(again, key=lambda one: again[one]) in block_lines(found)[0]
    row = reference_inputs(read_reference(bundle), "unet")
    assert find_target(target).tensors(bundle / facts["builds"][build]["graphs"]["unet"], ["no such"], row, 1) == {}


def test_of_few_pictures_one_may_fall() -> None:
    def missed(count: int, lost: int) -> list[str]:
        both = {"clip_mean": 0.8, "recall_at_1": 1.0}
        judged = {"pytorch": both, "build": {**both, "recall_at_1": round(1 - lost / count, 4)}}
        return judge_failures(judged, GateRecipe(), count)

    assert not missed(8, 1) and missed(8, 2)
    assert not missed(64, 3) and missed(64, 4)
    assert not missed(512, 25) and missed(512, 26)
