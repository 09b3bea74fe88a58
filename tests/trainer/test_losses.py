"""The equations against a straightforward reference, written sample by sample from the papers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from trainer.losses import (
    NoiseSchedule,
    boundary_scalings,
    consistency,
    consistency_pair,
    feature_loss,
    guided,
    phase_edge,
    phased_consistency,
    pseudo_huber,
    squared,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
CUMULATIVE = (1 - BETAS).cumprod(0).float()


def lcm_loss(*numbers) -> torch.Tensor:
    """LCM, eq. 17, with the distance that is the default."""
    return pseudo_huber(*consistency_pair(*numbers[:10]))


def linear_model(seed: int):
    """A denoiser with a text-dependent answer, small enough to repeat by hand."""
    a, b = torch.randn(2, generator=torch.Generator().manual_seed(seed)).tolist()
    weight = torch.tensor([a, b], requires_grad=True)

    def model(x, t, text):
        return weight[0] * x + weight[1] * text.mean(dim=(1, 2))[:, None, None, None] + t[:, None, None, None] / 1000

    return weight, model


def reference_loss(prediction, student, target, teacher, noisy, t, skip, w, text, empty, c):
    """One sample at a time, in plain arithmetic."""
    losses = []
    for i in range(len(noisy)):
        x, n, prompt, none = noisy[i : i + 1], int(t[i]), text[i : i + 1], empty[i : i + 1]

        def split(out, x, n):
            alpha, sigma = math.sqrt(float(CUMULATIVE[n])), math.sqrt(1 - float(CUMULATIVE[n]))
            if prediction == "epsilon":
                return (x - sigma * out) / alpha, out
            return alpha * x - sigma * out, alpha * out + sigma * x

        def f(model, x, n, prompt, split=split):
            s = 10.0 * n
            x0, _ = split(model(x, torch.tensor([n]), prompt), x, n)
            return 0.25 / (s * s + 0.25) * x + s / math.sqrt(s * s + 0.25) * x0

        m = max(n - skip, 0)
        x0_c, eps_c = split(teacher(x, torch.tensor([n]), prompt), x, n)
        x0_u, eps_u = split(teacher(x, torch.tensor([n]), none), x, n)
        x0, eps = x0_c + w[i] * (x0_c - x0_u), eps_c + w[i] * (eps_c - eps_u)
        back = (math.sqrt(float(CUMULATIVE[m])) * x0 + math.sqrt(1 - float(CUMULATIVE[m])) * eps).detach()
        d = f(student, x, n, prompt) - f(target, back, m, prompt).detach()
        losses.append(((d * d + c * c).sqrt() - c).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_lcm_loss_and_gradients_equal_the_reference_over_fifty_steps(prediction) -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE, prediction)
    ours, our_model = linear_model(1)
    theirs, their_model = linear_model(1)
    _, teacher = linear_model(2)
    for step in range(50):
        draw = torch.Generator().manual_seed(step)
        noisy, text = torch.randn(3, 4, 5, 5, generator=draw), torch.randn(3, 6, 8, generator=draw)
        t = torch.randint(1, 50, (3,), generator=draw) * 20 - 1
        w = torch.rand(3, generator=draw) * 10
        drawn = (noisy, t, 20, w, text, torch.zeros_like(text), 0.001)
        pair = []
        for weight, model, loss, first in (
            (ours, our_model, lcm_loss, schedule),
            (theirs, their_model, reference_loss, prediction),
        ):
            value = loss(first, model, model, teacher, *drawn)
            weight.grad = None
            value.backward()
            pair.append((value.detach(), weight.grad.clone()))
            with torch.no_grad():
                weight -= 1e-3 * weight.grad
        torch.testing.assert_close(pair[0][0], pair[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pair[0][1], pair[1][1], rtol=1e-5, atol=1e-5)


def test_f_at_zero_is_the_identity() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE, "v_prediction")
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(consistency(schedule, torch.randn_like(x), x, torch.zeros(2, dtype=torch.long)), x)
    c_skip, c_out = boundary_scalings(torch.tensor([0, 999]))
    assert (c_skip.flatten()[0], c_out.flatten()[0]) == (1, 0)
    assert c_skip.flatten()[1] < 1e-8 and c_out.flatten()[1] > 1 - 1e-7


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_and_noise_come_back_out_of_the_target(prediction) -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE.double(), prediction)
    clean, noise = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 19, 500, 999])
    noisy, target = schedule.add_noise(clean, noise, t), schedule.target(clean, noise, t)
    torch.testing.assert_close(schedule.clean(target, noisy, t), clean)
    torch.testing.assert_close(schedule.noise(target, noisy, t), noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ddim_step_is_diffusers(prediction) -> None:
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading",
    )  # fmt: skip
    theirs.set_timesteps(50)
    schedule = NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod, prediction)
    x, out, t = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.tensor([500])
    ours = schedule.ddim_step(schedule.clean(out, x, t), schedule.noise(out, x, t), t - 20)
    torch.testing.assert_close(ours, theirs.step(out, 500, x).prev_sample, rtol=1e-5, atol=1e-5)


def test_only_the_student_gets_a_gradient() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE, "epsilon")
    (student, s), (target, g), (teacher, m) = linear_model(1), linear_model(2), linear_model(3)
    noisy, text = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 6)
    lcm_loss(schedule, s, g, m, noisy, torch.tensor([39, 999]), 20, torch.ones(2), text, 0 * text).backward()
    assert student.grad is not None and target.grad is None and teacher.grad is None


def test_small_pieces() -> None:
    one, other = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert guided(one, other, torch.tensor([7.0])).item() == 8
    assert pseudo_huber(one, one).item() == 0
    assert pseudo_huber(one, other, c=1.0).item() == pytest.approx(math.sqrt(2) - 1)
    assert feature_loss([one, one * 3], [other, other]).item() == 10
    with pytest.raises(ValueError, match="1 student"):
        feature_loss([one], [])
    assert squared(one * 3, one).item() == 4


def test_phases_have_their_own_edges() -> None:
    t = torch.tensor([24, 249, 250, 274, 499, 749, 774, 999])
    assert phase_edge(t, 1000, 4).tolist() == [0, 0, 249, 249, 249, 499, 749, 749]
    assert phase_edge(t, 1000, 1).tolist() == [0] * 8


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_at_its_edge_a_phase_is_the_identity_and_its_step_is_the_samplers(prediction) -> None:
    theirs = TCDScheduler(prediction_type=prediction, original_inference_steps=40)
    theirs.set_timesteps(4)
    assert theirs.timesteps.tolist() == [999, 749, 499, 249]
    schedule = NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod, prediction)
    x, out = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    for t, edge in ((999, 749), (749, 499), (499, 249), (249, 0)):
        time, end = torch.tensor([t]), torch.tensor([edge])
        ours = phased_consistency(schedule, out, x, time, end)
        torch.testing.assert_close(ours, theirs.step(out, t, x, eta=0.0).prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(phased_consistency(schedule, out, x, end, end), x, rtol=1e-4, atol=1e-4)


def test_a_target_at_its_edge_is_what_the_teacher_made() -> None:
    """The student at the first grid point above an edge is asked for the solver's own point: that anchors each phase."""
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE, "epsilon")
    (_, s), (_, g), (_, m) = linear_model(1), linear_model(2), linear_model(3)
    noisy, text, t = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 6), torch.tensor([274, 24])
    edge = phase_edge(t, 1000, 4)
    _, wanted = consistency_pair(schedule, s, g, m, noisy, t, 25, torch.zeros(2), text, text, edge)
    said = m(noisy, t, text)
    solver = schedule.ddim_step(schedule.clean(said, noisy, t), schedule.noise(said, noisy, t), edge)
    torch.testing.assert_close(wanted, solver, rtol=1e-4, atol=1e-4)


def test_travel_ends_at_the_noise_of_its_time() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(CUMULATIVE.double(), "epsilon")
    clean, t, to = torch.ones(40_000, 1, 1, 1, dtype=torch.float64), torch.tensor([249]), torch.tensor([499])
    once = schedule.add_noise(clean, torch.randn_like(clean), t)
    found = schedule.travel(once, torch.randn_like(clean), t, to)
    alpha, sigma = (float(x) for x in schedule.at(to))
    assert float(found.mean()) == pytest.approx(alpha, abs=0.02) and float(found.std()) == pytest.approx(
        sigma, abs=0.02
    )
    assert torch.equal(schedule.travel(once, torch.randn_like(clean), t, t), once)
