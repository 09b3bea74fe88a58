"""The small decoder in a bundle: trained, exported, proven; one that does not fit is refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import Image

from cluster.errors import RecipeError
from export.bundle import export_student
from export.recipe import ExportRecipe
from export.vae import open_decoder
from export.verify import verify_bundle
from factory.models import resolve
from trainer.decoder import train_decoder
from trainer.models import open_pipeline
from trainer.recipe import DecoderRecipe

STUDENT = "zoo:student-fewstep"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of the shipped student, trained for a few steps on pictures of noise."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "pictures").mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    fit = {"steps": 4, "batch_images": 4}
    shape = {"width": 8, "blocks": [1, 1, 1, 1], "held_out_share": 0.3, "threads": 1, "fit": fit}
    data = str(folder / "pictures")
    train_decoder(DecoderRecipe.model_validate({"model": STUDENT, "data": data, **shape}), folder / "out")
    return folder / "out" / "model"


@pytest.mark.long
def test_a_trained_decoder_draws_in_a_bundle(small: Path, tmp_path: Path) -> None:
    few = {"calibration_prompts": 1, "parity_prompts": 2, "latency_runs": 1, "threads": 1}
    recipe = ExportRecipe(targets=["onnx"], precisions=["fp32"], vae=str(small), **few)
    export_student(Path(resolve(STUDENT)), ["a red apple"], recipe, tmp_path)
    facts = json.loads((tmp_path / "onnx" / "bundle.json").read_text())
    assert facts["vae"]["folder"] == "model" and len(facts["vae"]["sha256"]) == 64
    assert facts["vae"]["against_own_decoder"]["psnr_db"] < 30, "four steps do not make the student's own decoder"
    assert facts["builds"]["fp32"]["bytes"]["vae_decoder"] < 200_000
    assert "The decoder is that of model" in (tmp_path / "onnx" / "README.md").read_text()
    assert verify_bundle(tmp_path / "onnx", runs=1, threads=1)["ok"]


def test_a_decoder_that_does_not_fit_is_refused(small: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(resolve(STUDENT))
    assert open_decoder(str(small), pipeline).config.scaling_factor == 1

    def saved(**changes: object) -> str:
        place = tmp_path / "-".join(changes)
        shape = {"decoder_block_out_channels": (8,) * 4, "encoder_block_out_channels": (4,) * 4}
        blocks = {"num_decoder_blocks": (1,) * 4, "num_encoder_blocks": (0,) * 4}
        AutoencoderTiny(**{"latent_channels": 16, **shape, **blocks, **changes}).save_pretrained(place)  # pyright: ignore[reportArgumentType]
        return str(place)

    shorter = {
        "decoder_block_out_channels": (8,) * 3,
        "encoder_block_out_channels": (4,) * 3,
        "num_decoder_blocks": (1,) * 3,
        "num_encoder_blocks": (0,) * 3,
    }
    for folder, said in (
        (saved(latent_channels=4), "latents of 4 channels, and the student's have 16"),
        (saved(**shorter), "4 pixels a side, and by the student's own VAE 8"),
        (saved(scaling_factor=0.5), "scaling_factor is 0.5, and the student's 0.43116"),
        (saved(shift_factor=0.1), "shift_factor 0.1"),
    ):
        with pytest.raises(RecipeError, match=said):
            open_decoder(folder, pipeline)
    with pytest.raises(RecipeError, match=r"export\.vae has no config\.json that names a VAE"):
        open_decoder(resolve("zoo:student-fewstep"), pipeline)
    with pytest.raises(RecipeError, match="no AutoencoderKL and no AutoencoderTiny, but a UNet2DConditionModel"):
        open_decoder(str(Path(resolve(STUDENT)) / "unet"), pipeline)
