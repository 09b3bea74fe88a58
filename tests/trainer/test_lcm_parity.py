"""Fifty steps of our distillation beside Algorithm 1 of the LCM paper, written here from its equations alone.

Source: Luo et al., arXiv 2310.04378: f (eq. 9), the guided solver step z + (1 + w) Psi(c) - w Psi(empty) (eq. 15), Psi of DDIM
(appendix), the loss (eq. 17), the target network (Algorithm 1). Only the drawn numbers (noisy latent, t, w) are taken from our loop.
All in float64: the pseudo-Huber gradient is nearly a sign, so in float32 two right answers part after a few steps of AdamW.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook

import trainer.distill as distill
import trainer.loop as loop
from trainer.fit import fit
from trainer.identity import Identity
from trainer.latents import Encoder
from trainer.losses import NoiseSchedule
from trainer.mix import MixedStream, Source
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe
from trainer.surgery import build_student

STEPS, RATE, DECAY = 50, 1e-3, 0.9


class Reference:
    """Algorithm 1: an online network, its moving average as target, a frozen teacher."""

    def __init__(self, student, teacher, cumulative: torch.Tensor, prediction: str) -> None:
        self.student, self.target, self.teacher = student, copy.deepcopy(student), teacher
        self.alphas, self.sigmas = cumulative**0.5, (1 - cumulative) ** 0.5
        self.prediction = prediction
        self.optimiser = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def epsilon(self, said, z, t):
        """What the network says, read as noise: v = alpha eps - sigma z0 and z = alpha z0 + sigma eps."""
        return said if self.prediction == "epsilon" else self.alphas[t] * said + self.sigmas[t] * z

    def f(self, said, z, t):
        """c_skip z + c_out (z - sigma eps) / alpha, with sigma_data 0.5 and 10 t for t."""
        s = 10.0 * t
        z0 = (z - self.sigmas[t] * self.epsilon(said, z, t)) / self.alphas[t]
        return 0.25 / (s**2 + 0.25) * z + s / (s**2 + 0.25) ** 0.5 * z0

    def psi(self, said, z, t, to):
        """The change of z in one DDIM step from t to `to`."""
        ratio = self.alphas[to] / self.alphas[t]
        slope = self.sigmas[t] * self.alphas[to] / (self.alphas[t] * self.sigmas[to]) - 1
        return ratio * z - self.sigmas[to] * slope * self.epsilon(said, z, t) - z

    def step(self, z, t, skip, w, text, empty) -> tuple[float, list[torch.Tensor]]:
        times, weights, rows = t.tolist(), w.tolist(), range(len(t))
        to = [max(n - skip, 0) for n in times]
        with torch.no_grad():
            told, free = self.teacher(z, t, text)[0], self.teacher(z, t, empty)[0]
            moved = []
            for i in rows:
                x = z[i]
                with_text, without = (self.psi(said[i], x, times[i], to[i]) for said in (told, free))
                moved.append(x + (1 + weights[i]) * with_text - weights[i] * without)
            earlier = torch.stack(moved)
            aims = self.target(earlier, torch.tensor(to), text)[0]
        said = self.student(z, t, text)[0]
        gaps = [self.f(said[i], z[i], times[i]) - self.f(aims[i], earlier[i], to[i]) for i in rows]
        loss = torch.stack([((gap**2 + 0.001**2) ** 0.5 - 0.001).mean() for gap in gaps]).mean()
        self.optimiser.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in self.student.parameters()]
        self.optimiser.step()
        with torch.no_grad():
            for mean, value in zip(self.target.parameters(), self.student.parameters(), strict=True):
                mean.copy_(DECAY * mean + (1 - DECAY) * value)
        return float(loss.detach()), gradients


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_and_gradients_of_fifty_steps_equal_the_papers(
    tiny_models, data: Path, tmp_path, monkeypatch, prediction
) -> None:
    torch.set_num_threads(1)
    settings = DistillRecipe(
        steps=STEPS, batch_images=4, learning_rate=RATE, ema_decay=DECAY, max_grad_norm=1e9, guidance_max=9.0
    )
    adapt = AdaptRecipe(steps=0, batch_images=4, learning_rate=RATE)
    recipe = TrainerRecipe(teacher=str(tiny_models / "teacher"), size_px=32, threads=1, adapt=adapt, distill=settings)
    pipeline = loop.open_pipeline(recipe.teacher)
    cumulative = pipeline.scheduler.alphas_cumprod.double()
    teacher = pipeline.unet.requires_grad_(False).eval().double()
    student = build_student(teacher, "tiny").double()
    reference = Reference(copy.deepcopy(student).train(), teacher, cumulative, prediction)

    drawn, losses, gradients = [], [], []
    ours, measured = distill.consistency_pair, distill.pseudo_huber

    def watch(schedule, student, target, teacher, noisy, t, skip, w, text, empty, edge):
        numbers = (noisy.double(), t, skip, w.double(), text.double(), empty.double())
        drawn.append(numbers)
        return ours(schedule, student, target, teacher, *numbers, edge)

    def note(guess, wanted, c):
        loss = measured(guess, wanted, c)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(distill, "consistency_pair", watch)
    monkeypatch.setattr(distill, "pseudo_huber", note)
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *_: gradients.append([p.grad.clone() for p in optimiser.param_groups[0]["params"]])
    )
    schedule = NoiseSchedule.from_alphas_cumprod(cumulative, prediction)
    encoder = Encoder(pipeline, 32, torch.device("cpu"), cache=True)
    loss_at = distill.Distillation(settings, teacher, encoder, MixedStream([Source(data)], 1), schedule, seed=1)
    average = fit("distill", settings, Identity({}), student, loss_at, tmp_path, Accelerator())
    hook.remove()

    assert len(drawn) == STEPS + 1, "the loop looks at one more loss, and learns nothing from it"
    assert len(gradients) == STEPS
    assert {int(n) for _, t, *_ in drawn for n in t} <= set(range(19, 1000, 20)), "t is one of the 50 DDIM steps"
    worst = 0.0
    for numbers, loss, ours_now in zip(drawn[:-1], losses[:-1], gradients, strict=True):
        wanted, theirs_now = reference.step(*numbers)
        assert loss == pytest.approx(wanted, abs=1e-5)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(ours_now, theirs_now, strict=True)))
    assert worst < 1e-5
    assert any(float(g.abs().max()) > 1e-3 for g in gradients[-1]), "gradients this small would agree by chance"
    for mine, theirs in zip(average.parameters(), reference.target.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
