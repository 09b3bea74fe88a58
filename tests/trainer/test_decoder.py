"""The small decoder: what it costs, that it learns, resumes exactly, and stands in for the VAE in an ordinary pipeline call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from typer.testing import CliRunner

import trainer.decoder as decoder_module
import trainer.fit as fit_module
from cluster.errors import CorruptShard, EdgeFusionError, RecipeError, StageError
from trainer.cli import app
from trainer.decoder import multiply_accumulates, new_decoder, open_vae, psnr_db, train_decoder
from trainer.latent_files import LatentFiles
from trainer.latents import Encoder, decode_scaled
from trainer.models import open_pipeline
from trainer.recipe import DecoderRecipe
from trainer.sample import generate
from trainer.stream import open_samples


def recipe(models: Path, data: Path, **changes) -> DecoderRecipe:
    fit = {"steps": 6, "batch_images": 4, "checkpoint_s": 1e-9} | changes.pop("fit", {})
    settings = {"model": str(models / "teacher"), "data": str(data), "width": 8, "blocks": [1, 1, 1], "max_cost": 1}
    more = {"held_out_share": 0.3, "threads": 1, "fit": fit}
    return DecoderRecipe.model_validate(settings | more | changes)


def test_costs_are_counted_as_by_hand() -> None:
    tiny = AutoencoderTiny(latent_channels=16)  # TAESD's decoder: 64 wide, blocks 3 3 3 1
    at = [8 * 8 * 4**stage for stage in range(4)]
    wide = 9 * 64 * 64 * (at[0] * 9 + at[1] * (1 + 9) + at[2] * (1 + 9) + at[3] * (1 + 3))
    assert multiply_accumulates(tiny, 16, 8) == wide + 9 * 64 * (16 * at[0] + 3 * at[3])


def test_attention_is_part_of_the_cost() -> None:
    config = {
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [32],
    }
    with_it, without = (
        multiply_accumulates(AutoencoderKL(**config, latent_channels=4, mid_block_add_attention=a), 4, 8)
        for a in (True, False)
    )
    tokens, width = 64, 32
    assert with_it - without == 4 * tokens * width * width + 2 * tokens * tokens * width


def test_the_widest_decoder_within_the_cost_is_taken(tiny_models, data) -> None:
    vae = open_vae(str(tiny_models / "teacher"))
    made, costs = new_decoder(vae, recipe(tiny_models, data, width=None, max_cost=0.9), 32)
    assert made.config.decoder_block_out_channels == (costs["width"],) * 3
    assert costs["macs"] <= 0.9 * costs["original_macs"]
    with pytest.raises(RecipeError, match="costs more than max_cost"):
        new_decoder(vae, recipe(tiny_models, data, width=costs["width"] + 4, max_cost=0.9), 32)
    with pytest.raises(RecipeError, match="2 stages and the VAE 3"):
        new_decoder(vae, recipe(tiny_models, data, blocks=[1, 1]), 32)


def test_it_learns_and_interrupted_anywhere_it_ends_in_the_same_bytes(tiny_models, data, tmp_path, monkeypatch) -> None:
    settings = recipe(tiny_models, data)
    report = train_decoder(settings, tmp_path / "whole")
    saved, put = fit_module.save_state, LatentFiles._put

    def die(do):
        def done_and_dead(*args: object) -> None:
            do(*args)
            raise KeyboardInterrupt

        return done_and_dead

    monkeypatch.setattr(LatentFiles, "_put", die(put))
    with pytest.raises(KeyboardInterrupt):
        train_decoder(settings, tmp_path / "broken")
    monkeypatch.setattr(LatentFiles, "_put", put)
    monkeypatch.setattr(fit_module, "save_state", die(saved))
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            train_decoder(settings, tmp_path / "broken")
    monkeypatch.setattr(fit_module, "save_state", saved)
    assert train_decoder(settings, tmp_path / "broken") == report
    weights = "model/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "broken" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()

    longer = train_decoder(recipe(tiny_models, data, fit={"steps": 150, "warmup_steps": 0}), tmp_path / "longer")
    assert longer["psnr_db"] > report["psnr_db"] + 3


def test_it_stands_in_for_the_vae_in_the_same_call(tiny_models, data, tmp_path) -> None:
    pipeline = open_pipeline(str(tiny_models / "teacher"))
    train_decoder(recipe(tiny_models, data), tmp_path)
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "model")

    def latents(output: str) -> np.ndarray | torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipeline("a fox", num_inference_steps=2, generator=generator, output_type=output)[0]

    before, drawn = latents("np"), latents("latent")
    pipeline.vae = tiny
    with torch.no_grad():
        wanted = decode_scaled(tiny, drawn).div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        fed = tiny.decoder(drawn).div(2).add(0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    after = latents("np")
    assert after.shape == before.shape
    np.testing.assert_allclose(after, wanted, atol=1e-6)
    np.testing.assert_allclose(after, fed, atol=1e-6, err_msg="the UNet's latents must reach the decoder as they are")
    assert generate(pipeline, ["a fox"], [3], 2)[0].shape == (32, 32, 3)


def test_it_is_taught_on_the_latents_that_unets_are_trained_on(tiny_models, data, tmp_path) -> None:
    settings = recipe(tiny_models, data, latent_noise=0.0)
    pipeline, samples = open_pipeline(settings.model), open_samples(data)
    files = LatentFiles(tmp_path, samples, open_vae(settings.model), 32, settings)
    files.fill(lambda done, of: None)
    rows = [*files.taught, *files.held_out]
    assert sorted(rows) == list(range(12)) and files.held_out
    found, pictures = files.read(rows)
    wanted = Encoder(pipeline, 32, torch.device("cpu"), cache=False).latents([samples.read(row) for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert pictures is not None and float(psnr_db(pictures, decode_scaled(pipeline.vae, wanted)).min()) > 50


def test_the_encoder_that_nobody_trained_says_so(tiny_models, data, tmp_path) -> None:
    train_decoder(recipe(tiny_models, data), tmp_path)
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "model")
    assert tiny.encode(torch.zeros(1, 3, 32, 32)).latents.isnan().all()


def test_a_folder_of_pictures_will_do_and_the_command_prints_both_figures(tiny_models, data, tmp_path) -> None:
    samples, folder = open_samples(data), tmp_path / "pictures"
    folder.mkdir()
    for row in range(12):
        (folder / f"{row}.png").write_bytes(samples.read(row).picture)
    more = [
        "--set",
        "blocks=[1,1,1]",
        "--set",
        "max_cost=1",
        "--set",
        "held_out_share=0.3",
        "--set",
        "keep_pictures=false",
    ]
    out = ["--out", str(tmp_path / "out"), "--steps", "2", "--width", "4", "--set", "fit.batch_images=2"]
    said = CliRunner().invoke(
        app, ["decoder", "--model", str(tiny_models / "teacher"), "--data", str(folder), *out, *more]
    )
    assert said.exit_code == 0, said.output
    assert "dB" in said.output and "multiply-accumulates" in said.output
    assert not list((tmp_path / "out" / "latents").glob("pictures-*"))


def test_what_cannot_work_is_refused_in_words(tiny_models, data, tmp_path) -> None:
    with pytest.raises(EdgeFusionError, match="neither a manifest nor pictures"):
        train_decoder(recipe(tiny_models, tmp_path), tmp_path / "a")
    with pytest.raises(EdgeFusionError, match="do not divide"):
        train_decoder(recipe(tiny_models, data, held_out_share=1e-9), tmp_path / "b")
    with pytest.raises(StageError, match="VAE of"):
        train_decoder(recipe(tiny_models, data, model=str(tiny_models / "clip")), tmp_path / "c")
    train_decoder(recipe(tiny_models, data), tmp_path / "d")
    (tmp_path / "d" / decoder_module._REPORT).unlink()
    with pytest.raises(CorruptShard, match="another model, data set or recipe"):
        train_decoder(recipe(tiny_models, data, seed=5), tmp_path / "d")
