import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from pydantic import ValidationError

from cluster.errors import EdgeFusionError
from export.clip_gate import judge_failures, scores
from export.layers import HIGH_PRECISION, kept_layers, layer_modules, lies_in
from export.openvino_core import openvino_core
from export.parity import failures, picture_parity, snr_db
from export.proof import read_reference, reference_inputs, write_sums
from export.quantise import quantise_onnx
from export.recipe import ExportRecipe, GateRecipe, MixRecipe
from export.sensitivity import only, part_of, propose
from export.verify import verify_bundle

NEAR = {"fp32": 120.0, "fp16": 40.0, "w8a8": 10.0, "w8": 30.0, "w4": 10.0}
"""Least SNR in dB of the shipped UNet; each has its own arithmetic, so none may come out as another."""


def unet_snr(path: Path, inputs: dict[str, np.ndarray], wanted: np.ndarray) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, inputs)[0])
    return float(10 * np.log10(np.square(wanted).sum() / (np.square(wanted - got).sum() + 1e-12)))


@pytest.mark.parametrize("precision", ["fp16", "w8", "w4"])
def test_each_precision_is_smaller_and_near(student_bundles: Path, tmp_path: Path, precision: str) -> None:
    source = student_bundles / "onnx" / "unet.onnx"
    reference = read_reference(student_bundles / "onnx")
    inputs = reference_inputs(reference, "unet")
    quantise_onnx(source, tmp_path / "unet.onnx", precision, [inputs], HIGH_PRECISION)
    found = unet_snr(tmp_path / "unet.onnx", inputs, reference["unet.out"])
    assert NEAR[precision] < found < 100
    share = {"fp16": 0.56, "w8": 0.35, "w4": 0.32}[precision]
    assert (tmp_path / "unet.onnx").stat().st_size < share * source.stat().st_size


def test_kept_modules_keep_their_float_weights(student_bundles: Path, tmp_path: Path) -> None:
    import onnx

    source = student_bundles / "onnx" / "unet.onnx"
    kept = kept_layers(source, ["conv_in", "down_blocks.0.resnets.0"])
    modules = layer_modules(source)
    assert {modules[name] for name in kept} == {
        "unet.conv_in",
        *(f"unet.down_blocks.0.resnets.0.{part}" for part in ("conv1", "conv2", "time_emb_proj")),
    }
    quantise_onnx(source, tmp_path / "unet.onnx", "w8", [], ["conv_in", "down_blocks.0.resnets.0"])
    nodes = {node.name: node for node in onnx.load(str(tmp_path / "unet.onnx")).graph.node}
    assert all("opened" not in nodes[name].input[1] for name in kept)
    assert nodes["node_conv2d_49"].input[1].endswith("opened")  # conv_out was not named


@pytest.mark.long
def test_a_scan_quantises_the_part_and_nothing_else(student_bundles: Path, tmp_path: Path) -> None:
    import onnx

    source = student_bundles / "onnx" / "unet.onnx"
    reference = read_reference(student_bundles / "onnx")
    inputs = reference_inputs(reference, "unet")
    quantise_onnx(source, tmp_path / "all.onnx", "w8a8", [inputs], keep=())
    whole, plain = onnx.load(str(tmp_path / "all.onnx")), onnx.load(str(source))

    def snr(layers: list[str]) -> float:
        onnx.save(only(whole, plain, layers), str(tmp_path / "some.onnx"))
        return unet_snr(tmp_path / "some.onnx", inputs, reference["unet.out"])

    every = list(layer_modules(source))
    assert snr([]) > 100
    one = snr([name for name in every if lies_in(layer_modules(source)[name], "up_blocks.2.attentions.0")])
    all_of_it = unet_snr(tmp_path / "all.onnx", inputs, reference["unet.out"])
    assert all_of_it + 3 < one < 60
    assert snr(every) == pytest.approx(all_of_it, abs=0.01)


def test_openvino_keeps_what_the_recipe_keeps(student_bundles: Path, tmp_path: Path) -> None:
    weights = student_bundles / "openvino" / "unet.w8.xml"
    kept = kept_layers(student_bundles / "onnx" / "unet.onnx", HIGH_PRECISION)
    model = openvino_core().read_model(str(weights))
    by_name = {op.get_friendly_name().removesuffix("/WithoutBiases"): op for op in model.get_ops()}

    def is_packed(name: str) -> bool:
        op, seen = by_name[name].input_value(1).get_node(), []
        while op.get_type_name() != "Constant" and op.get_input_size():
            seen.append(op.get_type_name())
            op = op.input_value(0).get_node()
        return str(op.get_element_type()) in ("<Type: 'int8_t'>", "<Type: 'uint8_t'>")

    assert kept and not any(is_packed(name) for name in kept)
    assert is_packed("node_conv2d_1")


def test_a_name_stands_for_a_precision_of_each_component() -> None:
    recipe = ExportRecipe(precisions=["mixed", "w8", MixRecipe(name="mine", text_encoder="w8", unet="w4")])
    assert [mix.name for mix in recipe.builds("onnx")] == ["mixed", "w8", "mine"]
    assert [mix.name for mix in recipe.builds("openvino")] == ["w8", "mine"]
    assert recipe.builds()[0].graphs() == {"text_encoder": "fp16", "unet": "w8a16", "vae_decoder": "fp16"}
    assert recipe.builds()[2].graphs() == {"text_encoder": "w8", "unet": "w4", "vae_decoder": "fp32"}
    with pytest.raises(ValidationError, match="names w8 twice"):
        ExportRecipe(precisions=["w8", "w8"])
    with pytest.raises(ValidationError, match="no build that openvino can run"):
        ExportRecipe(precisions=["w8a16"])


def test_equal_pictures_do_not_hide_a_far_one() -> None:
    rng = np.random.default_rng(0)
    a = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(4)]
    far = a[3].copy()
    far[::2] = 255 - far[::2]
    found = picture_parity(a, [*a[:3], far])
    assert found["equal_pictures"] == 3
    # Pooled: the far one's error spread over four pictures, 6 dB over the worst; a mean of decibels would be some 150.
    assert found["psnr_db"] == pytest.approx(found["psnr_db_min"] + 10 * np.log10(4), abs=0.02)


def test_the_gate_is_by_component() -> None:
    gates = GateRecipe(fp32_snr_db=60, half_snr_db=40, quantised_psnr_db=20)
    proof = {
        "graph_snr_db": {"text_encoder": 50.0, "unet": 9.0, "vae_decoder": 70.0},
        "psnr_db": 30.0,
        "psnr_db_min": 15.0,
        "ssim_mean": 0.9,
    }
    picture = [np.arange(768, dtype=np.uint8).reshape(16, 16, 3)]
    mixed = {"text_encoder": "fp16", "unet": "w8a16", "vae_decoder": "fp32"}
    assert failures(mixed, proof, picture, gates) == []
    assert failures({**mixed, "text_encoder": "fp32"}, proof, picture, gates) == [
        "text_encoder: SNR 50.0 dB is under 60.0"
    ]
    assert failures({**mixed, "unet": "fp16"}, proof, picture, gates) == ["unet: SNR 9.0 dB is under 40.0"]
    assert len(failures(mixed, {**proof, "psnr_db": 19.0}, picture, gates)) == 1
    # One of 64 that shows something else: all together they still pass.
    assert failures(mixed, {**proof, "psnr_db_min": 7.0}, picture, gates) == [
        "pictures: the worst one's PSNR 7.0 dB is under 10.0"
    ]


def test_blocks_likeness_and_full_precisions_pictures_have_gates() -> None:
    """SNR a block and SSIM were figures alone, and no gate saw what an fp32 build draws."""
    snr = dict.fromkeys(("text_encoder", "unet", "vae_decoder"), 90.0)
    proof = {"graph_snr_db": snr, "psnr_db": 39.0, "psnr_db_min": 39.0, "ssim_mean": 0.9}
    picture = [np.arange(768, dtype=np.uint8).reshape(16, 16, 3)]
    fp32, rough = dict.fromkeys(snr, "fp32"), {**dict.fromkeys(snr, "fp32"), "unet": "w8a8"}
    off = {"block_snr_db": None, "ssim": None, "fp32_psnr_db": None}

    def missed(build: dict[str, str], more: dict, tiled: bool = False, **gates: float | None) -> list[str]:
        return failures(build, proof | more, picture, GateRecipe(**gates), tiled)  # type: ignore[arg-type]

    blocks = {"block_snr_db": {"mid_block": 5.0, "up_blocks.0": 30.0}}
    assert missed(rough, blocks) == ["unet, mid_block: SNR 5.0 dB is under 6.0"]
    assert missed(rough, {"block_snr_db": {"mid_block": float("nan")}}) != []
    assert missed(rough, {"block_snr_db": None}) == []  # a target that shows no tensors
    assert missed(rough, {"ssim_mean": 0.5}) == ["pictures: mean SSIM 0.5 is under 0.6"]
    assert missed(fp32, {}) == ["pictures: PSNR 39.0 dB is under 40.0 (fp32_psnr_db)"]
    assert missed(fp32, {"psnr_db": 41.0}) == [] == missed(rough, {})
    # Decoded in tiles, held to pictures that were decoded whole: that gate is the recipe's for the decoder.
    assert missed(fp32, {}, True) == ["pictures: PSNR 39.0 dB is under 40.0 (decoder_psnr_db)"]
    assert missed(fp32, {}, True, decoder_psnr_db=30.0) == [] == missed(fp32, {}, fp32_psnr_db=38.0)
    assert missed(fp32, {"ssim_mean": 0.1}, **off) == [] == missed(rough, blocks, **off)


def test_verify_asks_the_gates_of_blocks_likeness_and_the_decoders_tiles(student_bundles: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student_bundles / "onnx", tmp_path / "onnx"))
    facts = json.loads((folder / "bundle.json").read_text())
    # Equal pictures are at 200 dB, and those of fp32 may be equal.
    facts["gates"] |= {"block_snr_db": 150.0, "ssim": 1.0, "decoder_psnr_db": 201.0}
    facts["decoder_tiles"] = {"tile": 8, "overlap": 4}
    (folder / "bundle.json").write_text(json.dumps(facts))
    write_sums(folder)
    found = verify_bundle(folder, builds=["fp32", "w8"], runs=1, threads=1)["builds"]
    assert any("(decoder_psnr_db)" in line for line in found["fp32"]["missed"])
    missed = " ".join(found["w8"]["missed"])
    assert "unet, down_blocks.0: SNR" in missed and "mean SSIM" in missed


def test_the_judge_knows_a_picture_by_its_words(student_bundles: Path) -> None:
    from factory.models.clip import Clip
    from factory.recipe import OpenClipScorer

    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    pictures = list(read_reference(student_bundles / "onnx")["pictures"])
    clip = Clip(OpenClipScorer(model="zoo:judge", batch_images=2))
    right, wrong = (scores(clip, facts["prompts"], drawn) for drawn in (pictures, pictures[::-1]))
    assert right["recall_at_1"] == 1 and wrong["recall_at_1"] == 0
    gates = GateRecipe(clip_margin=0.01, recall_margin=0.1)
    missed = judge_failures({"pytorch": right, "build": wrong}, gates, len(pictures))
    assert [line.split()[1] for line in missed] == ["CLIP", "R@1"]
    same = {"pytorch": right, "build": right}
    assert judge_failures(same, gates, len(pictures)) == judge_failures(None, gates, len(pictures)) == []


def test_a_bundle_has_a_card_with_licences_and_kinds(student_bundles: Path) -> None:
    card = (student_bundles / "onnx" / "README.md").read_text()
    assert "![" in card and "(parity.png)" in card and "Apache-2.0" in card and "fluent-emoji" in card
    w8a16 = next(line for line in card.splitlines() if line.startswith("| w8a16 |") and "ed |" in line)
    assert w8a16.endswith("| emulated |")
    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    build = facts["builds"]["w8a16"]
    (low, high), median = build["spread_ms"]["picture"], build["emulated_ms"]["picture"]
    assert 0 < low <= median <= high and f"| {median}, {low} to {high} | emulated |" in w8a16
    assert "README.md" in (student_bundles / "onnx" / "SHA256SUMS").read_text()


def test_parts_are_proposed_by_harm_a_weight_within_the_budget() -> None:
    assert (
        part_of("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "block")
        == "down_blocks.0.attentions.1"
    )
    assert part_of("unet.conv_in", "block") == "conv_in"
    assert lies_in("unet.conv_in", "conv_in") and not lies_in("unet.conv_in2", "conv_in")
    rows = [
        {"part": "conv_in", "weights": 0.01, "snr_db": 5.0},  # kept anyway
        {"part": "mid", "weights": 0.5, "snr_db": 10.0},  # over the budget
        {"part": "a", "weights": 0.05, "snr_db": 20.0},
        {"part": "b", "weights": 0.05, "snr_db": 30.0},
        {"part": "c", "weights": 0.02, "snr_db": 25.0},
        {"part": "calm", "weights": 0.001, "snr_db": 70.0},
    ]
    assert propose(rows, 0.1) == ["a", "c"]
    assert propose(rows, 0.0) == []


def test_an_unknown_build_is_told(student_bundles: Path) -> None:
    from export.bundle import open_bundle

    with pytest.raises(EdgeFusionError, match="there is no mixed build"):
        open_bundle(student_bundles / "onnx", "mixed")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "w8bf16", "w8a8bf16"])
def test_openvino_keeps_the_angles_of_the_timestep(tmp_path: Path, precision: str) -> None:
    """A frequency in float16 is off by up to half a radian at t = 999, and the sines of it had 28 dB."""
    import onnx
    import torch
    from diffusers.models.embeddings import Timesteps
    from torch import nn

    from export.graph import Graph, to_onnx
    from export.layers import kept_nodes
    from export.quantise_openvino import quantise_openvino
    from export.targets.registry import find_target

    class Time(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_proj, self.time_embedding, self.out = Timesteps(64, True, 0), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, timestep: torch.Tensor) -> torch.Tensor:
            return self.out(self.time_embedding(self.time_proj(timestep)))

    time = Time().eval()
    to_onnx(Graph("time", time, {"timestep": torch.tensor([999.0])}, "y"), tmp_path / "time.onnx")
    row = {"timestep": np.array([999.0], np.float32)}
    quantise_openvino(tmp_path / "time.onnx", tmp_path / "time.xml", precision, [row], HIGH_PRECISION)
    last = kept_nodes(tmp_path / "time.onnx", ["time_proj"])[-1]
    nodes = {node.name: node for node in onnx.load(str(tmp_path / "time.onnx")).graph.node}
    (angles,) = find_target("openvino").tensors(tmp_path / "time.xml", [nodes[last].output[0]], row, 1).values()
    assert snr_db(time.time_proj(torch.tensor([999.0])).numpy(), angles) > 80


@pytest.mark.parametrize(("rows", "smooths"), [(4, False), (16, True)])
def test_openvino_smooths_only_what_it_saw_enough_of(tmp_path: Path, rows: int, smooths: bool) -> None:
    """SmoothQuant on few rows cost the shipped student's W8A8 4 dB (docs/export.md)."""
    import torch
    from torch import nn

    from export.graph import Graph, to_onnx
    from export.quantise_openvino import quantise_openvino

    torch.manual_seed(0)
    layers = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    to_onnx(Graph("layers", layers, {"x": torch.randn(1, 8, 32)}, "y"), tmp_path / "plain.onnx")
    seen = [{"x": np.random.default_rng(i).standard_normal((1, 8, 32)).astype(np.float32)} for i in range(rows)]
    quantise_openvino(tmp_path / "plain.onnx", tmp_path / "w8a8.xml", "w8a8", seen, [])
    ops = openvino_core().read_model(str(tmp_path / "w8a8.xml")).get_ops()
    assert any(op.get_type_name() == "FakeQuantize" for op in ops)
    assert any("smooth_quant" in op.get_friendly_name() for op in ops) == smooths
