"""The zoo's sharper decoder: the same latents, whoever learns from the critic's loss, every place it goes to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from factory.models import ZOO
from factory.pocket.build import unpack
from factory.pocket.sharpen import critic_loss, new_critic, train_decoder
from factory.pocket.world import Concept

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    unpack(ZOO, tmp_path)
    return tmp_path


def test_encoder_and_latents_stay_and_the_decoder_goes_to_both_pipelines(zoo: Path) -> None:
    concepts = [Concept("1f34e", "red apple", "food", ("fruit",)), Concept("1f98a", "fox", "animal")] * 40
    held_out = [Concept("1f42d", "rat", "animal")] * 64
    pixels = np.random.default_rng(0).integers(0, 256, (len(concepts) + 64, 64, 64, 4), dtype=np.uint8)
    train_decoder([(c, "3d") for c in [*concepts, *held_out]], pixels, zoo, steps=2, batch=4)

    before, after = load_file(ZOO / "teacher" / "vae" / WEIGHTS), load_file(zoo / "decoder" / "model" / WEIGHTS)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"decoder", "post_quant_conv"}
    finished = (zoo / "decoder" / "model" / WEIGHTS).read_bytes()
    for place in ("people/model/vae", "student-fewstep/vae"):
        assert (zoo / place / WEIGHTS).read_bytes() == finished
    config = (zoo / "decoder" / "model" / "config.json").read_text()
    assert '"scaling_factor": 0.43116' in config
    # Finished already: nothing is trained, the places are filled again.
    shutil.rmtree(zoo / "student-fewstep" / "vae")
    train_decoder([(c, "3d") for c in [*concepts, *held_out]], pixels, zoo, steps=2, batch=4)
    assert (zoo / "student-fewstep" / "vae" / WEIGHTS).read_bytes() == finished


def test_each_side_learns_from_its_own_terms_only() -> None:
    torch.manual_seed(0)
    critic: Any = new_critic()
    real = torch.rand(2, 3, 64, 64)
    weight = critic[0].parametrizations.weight.original

    def gradients(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        critic.eval()  # the norms' estimates stand still
        critic.zero_grad()
        drawn = torch.rand(2, 3, 64, 64, requires_grad=True)
        critic_loss(critic, drawn, real, share).backward()
        return torch.zeros(()) if drawn.grad is None else drawn.grad, weight.grad.clone()

    silent, told = gradients(0.0), gradients(1.0)
    assert not silent[0].any() and told[0].any()
    torch.testing.assert_close(silent[1], told[1], msg="the critic must not learn to please the decoder")
