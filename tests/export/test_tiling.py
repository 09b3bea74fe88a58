from pathlib import Path

import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from cluster.errors import ParityError
from export.blocks import attention_blocks
from export.graph import Graph, _Unet, to_onnx
from export.profile import load_profile
from export.quantise_openvino import quantise_openvino
from export.solve import solve
from export.tiling import TiledAttnProcessor, check_tiles, compare_scores, tile_unet, wanted_scores

SMALL = str(Path(__file__).with_name("small-npu.yaml"))


def attention(context_width: int | None) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=32, cross_attention_dim=context_width, heads=4, dim_head=8).eval()


@pytest.mark.parametrize("tiles", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("context_width", [None, 24])
def test_tiled_equals_untiled(tiles, context_width) -> None:
    block = attention(context_width)
    hidden = torch.randn(2, 64, 32)
    context = None if context_width is None else torch.randn(2, 7, context_width)
    with torch.no_grad():
        plain = block(hidden, encoder_hidden_states=context)
        block.set_processor(TiledAttnProcessor(tiles))
        tiled = block(hidden, encoder_hidden_states=context)
    torch.testing.assert_close(tiled, plain, rtol=1e-5, atol=1e-6)


def test_a_whole_unet_keeps_its_answer() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=16,
    ).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 24))
    with torch.no_grad():
        plain = unet(*inputs, return_dict=False)[0]
        unet.set_attn_processor(TiledAttnProcessor(4))
        tiled = unet(*inputs, return_dict=False)[0]
    torch.testing.assert_close(tiled, plain, rtol=1e-4, atol=1e-5)


def test_no_intermediate_is_larger_than_one_tile_of_scores() -> None:
    block = attention(None)
    block.set_processor(TiledAttnProcessor(8))
    program = torch.export.export(block, (torch.randn(1, 64, 32),))
    softmaxes = [n for n in program.graph.nodes if n.op == "call_function" and "softmax" in str(n.target)]
    assert len(softmaxes) == 4 * 8
    assert {tuple(n.meta["val"].shape) for n in softmaxes} == {(1, 8, 64)}


def test_uneven_tiles_and_masks_are_refused() -> None:
    block = attention(None)
    block.set_processor(TiledAttnProcessor(5))
    with pytest.raises(ValueError, match="64 queries cannot be cut into 5"):
        block(torch.randn(1, 64, 32))
    block.set_processor(TiledAttnProcessor(4))
    with pytest.raises(ValueError, match="no mask"):
        block(torch.randn(1, 64, 32), attention_mask=torch.zeros(1, 64, 64))


@pytest.mark.parametrize(("group", "tiles"), [(1, 1), (2, 4), (4, 8)])
def test_head_groups_keep_the_answer(group, tiles) -> None:
    block = attention(24)
    hidden, context = torch.randn(2, 64, 32), torch.randn(2, 7, 24)
    with torch.no_grad():
        plain = block(hidden, encoder_hidden_states=context)
        block.set_processor(TiledAttnProcessor(tiles, group))
        tiled = block(hidden, encoder_hidden_states=context)
    torch.testing.assert_close(tiled, plain, rtol=1e-5, atol=1e-6)


def small_unet() -> tuple[UNet2DConditionModel, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=16,
    ).eval()
    return unet, (torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 24))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A UNet's plan, its outputs plain and tiled, and the two ONNX files."""
    unet, inputs = small_unet()
    plan = solve(attention_blocks(unet.config, 8, 7), load_profile(SMALL))
    assert 0 < len(plan.tiled) < len(plan.blocks)
    folder = tmp_path_factory.mktemp("lowered")
    graph = Graph(
        "unet", _Unet(unet).eval(), dict(zip(("latent", "timestep", "text"), inputs, strict=True)), "prediction"
    )
    with torch.no_grad():
        plain = unet(*inputs, return_dict=False)[0]
    to_onnx(graph, folder / "plain.onnx")
    tile_unet(unet, plan)
    with torch.no_grad():
        tiled = unet(*inputs, return_dict=False)[0]
    to_onnx(graph, folder / "tiled.onnx", rewrite=False)
    return plan, plain, tiled, folder, inputs


def test_a_planned_unet_keeps_its_answer_and_its_tiles_survive_conversion(lowered) -> None:
    plan, plain, tiled, folder, inputs = lowered
    torch.testing.assert_close(tiled, plain, rtol=1e-4, atol=1e-5)
    check_tiles(folder / "tiled.onnx", plan)
    session = onnxruntime.InferenceSession(str(folder / "tiled.onnx"), providers=["CPUExecutionProvider"])
    names = ("latent", "timestep", "text")
    ran = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})[0]
    torch.testing.assert_close(torch.from_numpy(ran), plain, rtol=1e-3, atol=1e-4)


def test_tiles_survive_in_openvino(lowered) -> None:
    plan, _, _, folder, _ = lowered
    for name in ("plain", "tiled"):
        quantise_openvino(folder / f"{name}.onnx", folder / f"{name}.xml", "fp32", [], [])
    check_tiles(folder / "tiled.xml", plan)
    with pytest.raises(ParityError, match="changed the tiles"):
        check_tiles(folder / "plain.xml", plan)


def test_a_graph_without_its_tiles_is_found_out(lowered) -> None:
    plan, _, _, folder, _ = lowered
    with pytest.raises(ParityError, match=r"missing \d+ of .* x 64.* instead 5 of 4 x 64 x 64"):
        check_tiles(folder / "plain.onnx", plan)


def test_a_softmax_read_twice_is_found_out(lowered) -> None:
    plan = lowered[0]
    shapes = list(wanted_scores(plan).elements())
    compare_scores([(shape, 1) for shape in shapes], plan, "here")
    with pytest.raises(ParityError, match="exactly one matrix product"):
        compare_scores([(shape, 2) for shape in shapes], plan, "here")


def test_another_unet_s_plan_is_refused(lowered) -> None:
    with pytest.raises(ValueError, match="another UNet"):
        tile_unet(torch.nn.Linear(1, 1), lowered[0])
