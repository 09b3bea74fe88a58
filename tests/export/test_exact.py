from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.embeddings import AttentionPooling
from diffusers.models.upsampling import Upsample2D
from torch import nn

from export.exact import _DoubleConv, with_small_upsampling, without_einsum


def near(wanted: torch.Tensor, got: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_pooling_by_matrix_products_is_the_same() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = AttentionPooling(3, 24)

    holder = Holder().double().eval()
    text = torch.randn(2, 7, 24, dtype=torch.float64)
    other = without_einsum(holder)
    # diffusers takes this softmax in float32 whatever the rest is.
    torch.testing.assert_close(other.pool(text), holder.pool(text), rtol=1e-6, atol=1e-6)
    assert isinstance(holder.pool, AttentionPooling) and not isinstance(other.pool, AttentionPooling)
    assert other.pool.q_proj.weight is holder.pool.q_proj.weight


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_doubling_and_its_convolution_are_one(bias: bool) -> None:
    both = Upsample2D(5, use_conv=True, out_channels=6, bias=bias).double()
    picture = torch.randn(2, 5, 4, 7, dtype=torch.float64)
    assert isinstance(both.conv, nn.Conv2d)
    near(both(picture), _DoubleConv(both.conv)(picture))


@torch.no_grad()
def test_whole_decoders_are_the_same_and_were_changed() -> None:
    torch.manual_seed(0)
    large = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    small = AutoencoderTiny(decoder_block_out_channels=(8, 8, 8, 8))
    for vae, doublings in ((large, 1), (small, 3)):
        plain = vae.decoder.double().eval()
        changed = with_small_upsampling(plain)
        latent = torch.randn(1, 4, 6, 6, dtype=torch.float64)
        near(plain(latent), changed(latent))
        assert sum(isinstance(part, _DoubleConv) for part in changed.modules()) == doublings
        assert not any(isinstance(part, _DoubleConv) for part in plain.modules())


def test_graphs_hold_no_einsum_and_no_interpolation_in_the_decoder(student_bundles: Path) -> None:
    import onnx

    kinds = {
        graph: {node.op_type for node in onnx.load(str(student_bundles / "onnx" / f"{graph}.onnx")).graph.node}
        for graph in ("unet", "vae_decoder")
    }
    assert "Einsum" not in kinds["unet"] and "Conv" in kinds["unet"]
    assert "Resize" not in kinds["vae_decoder"]
