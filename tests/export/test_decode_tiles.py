"""Decoding in tiles: exact where the maths allows, near and without seams where a norm sees the whole picture."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from cluster.errors import ParityError, StageError
from export import parity
from export.build import prove_tiles
from export.decode_tiles import TiledDecoder, joined, starts
from export.graph import decoder_graph, to_onnx
from export.recipe import ExportRecipe
from export.runtime import Build
from factory.models import resolve
from tests.bench.decode_tiles import seam_ratio, with_own_statistics


@pytest.fixture(scope="module")
def shipped() -> Any:
    vae: Any = AutoencoderKL.from_pretrained(Path(resolve("zoo:student-fewstep")) / "vae")
    return vae.eval()


def uneven(channels: int, side: int) -> torch.Tensor:
    """Latents whose strength changes across the picture, so that a tile's own statistics are not the picture's."""
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.randn(1, channels, 4, 4), side, mode="bicubic")
    return coarse * torch.linspace(0.3, 1.5, side)


@pytest.mark.parametrize(("side", "tile", "overlap"), [(16, 8, 2), (17, 8, 3), (10, 16, 4), (9, 8, 1)])
def test_tiles_cover_the_side_and_join_without_a_trace(side: int, tile: int, overlap: int) -> None:
    begins = starts(side, tile, overlap)
    assert begins[0] == 0 and begins[-1] + tile >= side
    assert all(after - before <= tile - overlap for before, after in pairwise(begins))
    whole = torch.randn(1, 2, 3, side * 4)
    size = min(tile, side)
    parts = [whole[..., 4 * begin : 4 * (begin + size)] for begin in begins]
    torch.testing.assert_close(joined(parts, begins, size, 4, -1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1, 8])
@pytest.mark.parametrize("tile", [4, 5, 8, 12])
def test_any_tiles_join_without_a_trace(tile: int, factor: int) -> None:
    """Every overlap on every side up to four tiles: tiles may share pixels with those after the next."""
    for side in range(1, 4 * tile):
        whole, size = torch.randn(side * factor), min(tile, side)
        for overlap in range(1, tile):
            begins = starts(side, tile, overlap)
            steps = [after - before for before, after in pairwise(begins)]
            assert begins[0] == 0 and begins[-1] + size == side
            assert (
                all(1 <= step <= tile - overlap for step in steps) and max(steps, default=1) - min(steps, default=1) < 2
            )
            parts = [whole[begin * factor : (begin + size) * factor].clone() for begin in begins]
            # What a part says of the outer quarter of what it shares counts for nothing: convolutions lack their surroundings there.
            for i, step in enumerate(steps):
                outer = (tile - step) * factor // 4
                parts[i][len(parts[i]) - outer :] = torch.nan
                parts[i + 1][:outer] = torch.nan
            torch.testing.assert_close(joined(parts, begins, size, factor, -1), whole, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("overlap", [20, 22, 24])
def test_tiles_that_share_more_than_half_are_drawn(overlap: int) -> None:
    vae: Any = AutoencoderTiny(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    plain, latent = vae.decoder.double().eval(), torch.randn(1, 4, 64, 64, dtype=torch.float64)
    got, wanted = TiledDecoder(plain, 32, overlap)(latent), plain(latent)
    assert got.shape == wanted.shape and (got - wanted).square().mean() < 0.01 * wanted.square().mean()


@torch.no_grad()
def test_a_decoder_of_convolutions_is_exact_once_tiles_share_enough() -> None:
    torch.manual_seed(0)
    vae: Any = AutoencoderTiny(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    plain, latent = vae.decoder.double().eval(), torch.randn(1, 4, 44, 44, dtype=torch.float64)
    wanted = plain(latent)
    # It sees 7 latents to each side: conv, block of three, and at twice the size conv, block, conv. A quarter of 28 is 7.
    torch.testing.assert_close(TiledDecoder(plain, 36, 28)(latent), wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(TiledDecoder(plain, 24, 4)(latent), wanted, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_held_statistics_leave_no_seams(shipped: Any) -> None:
    latent = uneven(16, 16)
    wanted = shipped.decoder(latent)
    tiled = TiledDecoder(shipped.decoder, 8, 2).eval()
    got = tiled(latent)
    assert parity.psnr_db(as_picture(wanted), as_picture(got)) > 40
    assert seam_ratio(wanted, got, 8, 2, 8) < 1.6
    # With each tile's own statistics in their place it is another picture.
    own = with_own_statistics(tiled, latent)
    assert parity.psnr_db(as_picture(wanted), as_picture(own)) < parity.psnr_db(as_picture(wanted), as_picture(got)) - 6
    weights = {id(one) for one in shipped.decoder.parameters()}
    assert {id(one) for one in tiled.parameters()} == weights  # shared, not copied


def as_picture(decoded: torch.Tensor) -> np.ndarray:
    return ((decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()


def test_the_graph_holds_no_features_of_the_whole_picture(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae: Any = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=False, **kinds)
    latent, sizes, stored = torch.randn(1, 4, 16, 16), {}, {}
    for name, tiles in (("whole", None), ("tiled", (10, 4))):
        graph = decoder_graph(vae.eval(), latent, tiles)
        to_onnx(graph, tmp_path / f"{name}.onnx")
        model = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / f"{name}.onnx")))
        shapes = [[d.dim_value for d in info.type.tensor_type.shape.dim] for info in model.graph.value_info]
        sizes[name] = max(int(np.prod(shape)) for shape in shapes)
        stored[name] = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            wanted = graph.module(latent).numpy()
        assert parity.snr_db(wanted, np.asarray(session.run(None, {"latent": latent.numpy()})[0])) > 60
    # Weights once, not once a tile; and the largest tensor is a tile's, (10 / 16)^2 of the whole's.
    assert stored["tiled"] < 1.1 * stored["whole"]
    assert sizes["tiled"] < 0.5 * sizes["whole"]


def test_pictures_that_tiles_change_are_refused(shipped: Any) -> None:
    latent = uneven(16, 16)
    calls = {
        "text_encoder": lambda inputs: np.zeros((1, 1), np.float32),
        "unet": lambda inputs: inputs["latent"] * 0,
        "vae_decoder": parity.torch_calls([decoder_graph(shipped, latent)])["vae_decoder"],
    }
    step = {"t": 1, "c_skip": 1.0, "c_out": 0.0, "alpha": 1.0, "sigma": 1.0}
    whole = Build(calls, {"prediction_type": "epsilon", "steps": [step]}, (1, 16, 16, 16))
    tokens = [np.zeros((1, 1), np.int64)]
    wanted = [whole.picture(tokens[0], 0)]
    tiled = parity.torch_calls([decoder_graph(shipped, latent, (8, 2))])["vae_decoder"]
    recipe = ExportRecipe.model_validate({"decoder": {"tile": 8, "overlap": 2}, "gates": {"decoder_psnr_db": 20}})
    found = prove_tiles(whole, tiled, tokens, wanted, recipe)
    assert found["tile"] == 8 and found["psnr_db"] > 20
    strict = recipe.model_copy(update={"gates": recipe.gates.model_copy(update={"decoder_psnr_db": 90.0})})
    with pytest.raises(ParityError, match=r"tiles of 8 latents changes the pictures.*90 wanted"):
        prove_tiles(whole, tiled, tokens, wanted, strict)


def test_sizes_and_decoders_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"overlap \(8\) must be less than tile \(8\)"):
        ExportRecipe.model_validate({"decoder": {"tile": 8, "overlap": 8}})
    with pytest.raises(StageError, match="cannot share 0"):
        TiledDecoder(AutoencoderTiny().decoder, 8, 0)
    with pytest.raises(StageError, match="a Linear is not decoded in tiles"):
        TiledDecoder(torch.nn.Linear(2, 2), 8, 2)
