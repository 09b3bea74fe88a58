"""A whole UNet in int16: the same function as diffusers', close to it as a file, and nothing left to the CPU by Arm's compiler."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from cluster.errors import RecipeError, StageError, TargetUnavailable
from export.blocks import Block, attention_blocks
from export.bundle import export_student, open_bundle
from export.graph import Graph, _Unet
from export.npu_report import judge_unet
from export.parity import snr_db
from export.profile import load_profile
from export.recipe import ExportRecipe
from export.solve import solve
from export.targets.contract import Source
from export.targets.ethos import estimate
from export.targets.litert import operators
from export.targets.litert_run import LiteRtModel
from export.targets.meter import Meter
from export.targets.norms import geglu, group_norm, layer_norm
from export.targets.npu_unet import calibrate, meter_unet, torch_inputs, write_unet
from export.targets.ops import Calibration
from export.targets.registry import find_target
from export.targets.tflite import Writer, schema
from export.targets.unet import HostTime, check_unet
from export.tiled_build import tiles_in
from factory.models import resolve

SIDE, TOKENS = 8, 7


def small_unet(**more: Any) -> Any:
    """Stable Diffusion's shape in small, with a middle block, skips, up- and downsampling."""
    torch.manual_seed(0)
    config = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**config, **more}).eval()


def row(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    latent, text = rng.standard_normal((1, 4, SIDE, SIDE)), rng.standard_normal((1, TOKENS, 16))
    return {
        "latent": latent.astype(np.float32),
        "timestep": np.array([499.0], np.float32),
        "text": text.astype(np.float32),
    }


def by_torch(unet: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return unet(*(torch.from_numpy(given[name]) for name in ("latent", "timestep", "text"))).sample.numpy()


def by_litert(path: Path, unet: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    model, fed = LiteRtModel(path), torch_inputs(HostTime(unet), given)
    return model(*(fed[name] for name in model.names)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("linear", [False, True])
def test_the_operators_are_the_unet_s_function(linear: bool) -> None:
    unet = small_unet(use_linear_projection=linear)
    with torch.no_grad():
        # Gains and offsets of norms start at 1 and 0, which would hide where they are folded away.
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    found = calibrate(unet, [row()])
    got, values = meter_unet(unet, HostTime(unet), row(), found, values=True)
    assert snr_db(by_torch(unet, row()), got) > 60
    assert {"conv_in", "mid_block.resnets.1.timed", "conv_out"} <= set(values)


def test_the_file_computes_the_unet_and_tiles_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    unet = small_unet()
    wanted = by_torch(unet, row(1))
    said: dict[str, np.ndarray] = {}
    for name, keep, tiles in (("plain", (), 1), ("kept", ("conv_in", "conv_out"), 1), ("tiled", (), 4)):
        found = calibrate(unet, [row(), row(1)], keep)
        blocks = attention_blocks(unet.config, SIDE, TOKENS)
        cuts = {block.name: (1, tiles if not block.crossed and block.queries == SIDE**2 else 1) for block in blocks}
        write_unet(unet, SIDE, TOKENS, found, tmp_path / f"{name}.tflite", cuts, keep=keep)
        said[name] = by_litert(tmp_path / f"{name}.tflite", unet, row(1))
    assert snr_db(wanted, said["plain"]) > 30
    assert snr_db(wanted, said["kept"]) > snr_db(wanted, said["plain"])
    assert snr_db(said["plain"], said["tiled"]) > 45


@pytest.mark.parametrize("name", ["litert", "exynos"])
def test_a_recipe_s_tiles_are_in_the_file_or_said_not_to_be(name: str, tmp_path: Path) -> None:
    """exynos wrote the untiled file, and bundle.json named the recipe's profile and plan beside it."""
    pytest.importorskip("ai_edge_litert")
    unet, tensors = small_unet(), {key: torch.from_numpy(value) for key, value in row().items()}
    chip = load_profile(str(Path(__file__).with_name("small-npu.yaml")))
    plan = solve(attention_blocks(unet.config, SIDE, TOKENS), chip)
    source = Source(Graph("unet", _Unet(unet).eval(), tensors, "prediction"), tmp_path, [row()], (), plan)
    target = find_target(name)
    target.lower(source, "w8a16", tmp_path / "unet.tflite")
    products = operators(tmp_path / "unet.tflite")["BATCH_MATMUL"]
    cut = sum(2 * part.block.heads // part.chosen.head_group * part.chosen.query_tiles for part in plan.blocks)
    assert plan.tiled and cut > 2 * len(plan.blocks)
    if name == "exynos":
        assert products == cut and tiles_in(target, source, "") == {"profile": "small-npu", "blocks": len(plan.tiled)}
    else:
        assert products == 2 * len(plan.blocks) and tiles_in(target, source, "") == {"profile": None, "blocks": 0}


def test_arm_s_bundle_with_another_vendor_s_profile_says_which_one_it_took() -> None:
    unet, tensors = small_unet(), {key: torch.from_numpy(value) for key, value in row().items()}
    phone = solve(attention_blocks(unet.config, SIDE, TOKENS), load_profile("exynos-2400"))
    source = Source(Graph("unet", _Unet(unet).eval(), tensors, "prediction"), Path(), [row()], (), phone)
    ethos = find_target("ethos")
    taken = ethos.plan(source)
    assert taken is not None and taken.profile == "ethos-u85-1024"
    assert tiles_in(ethos, source, "")["profile"] in ("ethos-u85-1024", None)
    small = replace(source, plan=solve([Block("a", 4096, 4096, 320, 320, 8, False)], load_profile("ethos-u85-256")))
    assert tiles_in(ethos, small, "") == {"profile": "ethos-u85-256", "blocks": 1}


def run_parts(paths: list[Path], given: dict[str, np.ndarray]) -> np.ndarray:
    """The last part's first output, for inputs by name; what lies between parts is handed on by name."""
    known, first = dict(given), np.empty(0)
    for path in paths:
        model = LiteRtModel(path)
        first = model(*(known[name] for name in model.names))
        for one in model._runner.get_output_details():
            known[one["name"]] = model._runner.get_tensor(one["index"]) * np.float32(one["quantization"][0])
    return first


def test_parts_are_the_whole_file_to_the_code(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    unet, given = small_unet(), torch_inputs(HostTime(small_unet()), row(1))
    found = calibrate(unet, [row(), row(1)])
    cuts = {b.name: (1, 4) for b in attention_blocks(unet.config, SIDE, TOKENS) if not b.crossed and b.queries == 64}
    (whole,) = write_unet(unet, SIDE, TOKENS, found, tmp_path / "whole.tflite", cuts)
    parts = write_unet(unet, SIDE, TOKENS, found, tmp_path / "parts.tflite", cuts, in_parts=True)
    assert len(cuts) > 1 and len(parts) == 2 * len(cuts) + 1
    counted = sum((Counter(operators(part)) for part in parts), Counter())
    assert counted == operators(whole)
    # A tiled block is alone in its file, and its result comes before those of its heads.
    read = schema().ModelT.InitFromPackedBuf
    graphs = [read(part.read_bytes(), 0).subgraphs[0] for part in parts[1::2]]
    widths = [[int(graph.tensors[i].shape[-1]) for i in graph.outputs] for graph in graphs]
    assert all(len(found) == 3 and found[0] == 2 * found[1] for found in widths)
    assert all(operators(part)["BATCH_MATMUL"] == 2 * 2 * 4 for part in parts[1::2])
    np.testing.assert_array_equal(run_parts(parts, given), run_parts([whole], given))


def test_the_compiler_leaves_nothing_to_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("ethosu")
    unet = small_unet()
    found = calibrate(unet, [row()], ("conv_in",))
    write_unet(unet, SIDE, TOKENS, found, tmp_path / "unet.tflite", {}, keep=("conv_in",))
    said = estimate(tmp_path / "unet.tflite", load_profile("ethos-u85-1024"), tmp_path / "compiled.tflite")
    assert said.cpu_operators == 0 and said.npu_operators > 300
    assert (tmp_path / "compiled.tflite").stat().st_size > 10_000


def _run(build: Any, x: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What `build(ops, tensor)` makes of x by the Meter and by LiteRT."""
    found = Calibration()
    for _ in range(2):
        meter = Meter({"x": x}, found)
        with torch.inference_mode():
            metered = build(meter, meter.input(x.shape, "x", "x")).value.numpy()
    writer = Writer(found)
    writer.save([build(writer, writer.input(x.shape, "x", "x"))], path)
    return metered, LiteRtModel(path)(x)


def test_group_norm_keeps_groups_of_far_apart_variance_precise(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 16, 32)).astype(np.float32)
    x *= np.repeat(np.array([0.03, 0.1, 1, 3], np.float32), 8)
    x += 2
    gain, offset = rng.standard_normal((2, 32)).astype(np.float32)
    pictures, scales = (
        torch.from_numpy(x).double().permute(0, 3, 1, 2),
        (torch.from_numpy(v).double() for v in (gain, offset)),
    )
    wanted = F.group_norm(pictures, 4, *scales, 1e-5).permute(0, 2, 3, 1).numpy()
    metered, got = _run(lambda ops, t: group_norm(ops, "n", t, 4, 1e-5, gain, offset), x, tmp_path / "a.tflite")
    assert snr_db(wanted, metered) > 90
    # The first group lives on a hundredth of the input's codes, its variance on a ten thousandth.
    assert all(snr_db(wanted[..., i : i + 8], got[..., i : i + 8]) > 35 for i in range(0, 32, 8))


def test_layer_norm_and_geglu(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 48)).astype(np.float32) * np.linspace(0.5, 4, 64, dtype=np.float32)[:, None]
    wanted = F.layer_norm(torch.from_numpy(x), (48,)).numpy()
    metered, got = _run(lambda ops, t: layer_norm(ops, "n", t, 1e-5), x, tmp_path / "a.tflite")
    assert snr_db(wanted, metered) > 90 and snr_db(wanted, got) > 45
    weight, bias = rng.standard_normal((96, 48)).astype(np.float32) / 3, rng.standard_normal(96).astype(np.float32)
    hidden, gate = F.linear(*map(torch.from_numpy, (x, weight, bias))).chunk(2, dim=-1)
    wanted = (hidden * F.gelu(gate)).numpy()
    metered, got = _run(lambda ops, t: geglu(ops, "g", t, weight, bias), x, tmp_path / "b.tflite")
    assert snr_db(wanted, metered) > 60 and snr_db(wanted, got) > 35


def test_a_unet_of_another_kind_is_refused_by_its_part() -> None:
    with pytest.raises(StageError, match="scale and shift by time"):
        check_unet(small_unet(resnet_time_scale_shift="scale_shift"))
    with pytest.raises(StageError, match=r"down_blocks\.1: AttnDownBlock2D"):
        check_unet(small_unet(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D")))


def test_another_vendor_s_chip_and_an_unknown_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hexagon-v75 is not an Arm NPU"):
        judge_unet("bk-sdm-tiny", "hexagon-v75", tmp_path / "out")
    with pytest.raises(RecipeError, match="no cut striped"):
        judge_unet("bk-sdm-tiny", "ethos-u85-1024", tmp_path / "out", cuts=("striped",))
    assert not (tmp_path / "out").exists()


def test_an_npu_s_unet_is_w8a16_or_nothing() -> None:
    recipe = ExportRecipe(targets=["litert"], precisions=["fp32", "w8a16", "mixed", "w8"])
    assert [mix.name for mix in recipe.builds("litert")] == ["w8a16", "mixed"]
    with pytest.raises(ValueError, match="no build that ethos can run: it knows w8a16"):
        ExportRecipe(targets=["ethos"], precisions=["fp32"])


@pytest.mark.long
def test_bundles_of_the_shipped_student(tmp_path: Path) -> None:
    targets = ["litert", "ethos", "exynos"]
    try:
        for name in targets:
            find_target(name).require()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    recipe = ExportRecipe(
        targets=targets, precisions=["w8a16"], calibration_prompts=3, parity_prompts=2, latency_runs=1, threads=1
    )
    prompts = ("a flat icon of a fox", "a penguin", "a red apple", "a pizza on a yellow background", "a rocket")
    export_student(Path(resolve("zoo:student-fewstep")), prompts, recipe, tmp_path)
    builds = {name: json.loads((tmp_path / name / "bundle.json").read_text())["builds"]["w8a16"] for name in targets}
    assert all(build["parity"]["psnr_db"] > 35 for build in builds.values())
    assert builds["litert"]["measured_ms"] and not builds["litert"]["emulated_ms"]
    said = builds["ethos"]
    assert said["emulated_ms"] and not said["measured_ms"] and said["compiler_estimated"]["unet"]["latency_s"] > 0
    assert said["fallback"]["unet"]["not_accelerated"] == {} and said["fallback"]["unet"]["accelerated"] > 900
    assert builds["exynos"]["fallback"]["unet"]["status"] == "not compiled here"
    assert builds["litert"]["tiled"] == {"profile": None, "blocks": 0}
    opened, facts = open_bundle(tmp_path / "litert", "w8a16", 1)
    assert opened.picture(np.full((1, facts["tokenizer"]["length"]), 5), 0).shape[2] == 3
