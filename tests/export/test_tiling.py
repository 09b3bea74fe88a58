import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from export.tiling import TiledAttnProcessor


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
