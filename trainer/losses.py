"""The equations of both phases as pure functions: tensors in, tensors out.

Source: LCM: Luo et al., arXiv 2310.04378; PCM: Wang et al., arXiv 2405.18407; BK-SDM: Kim et al., arXiv 2305.15798; v-prediction: Salimans
and Ho, arXiv 2202.00512.
Shapes: B C H W latents; timesteps and per-sample numbers are B, and broadcast over the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

Prediction = Literal["epsilon", "v_prediction"]
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy B C H W, timesteps B, text states B T D) -> prediction B C H W."""

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t for t = 0 .. T-1, with alpha^2 the cumulative product and alpha^2 + sigma^2 = 1."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    prediction: Prediction

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: torch.Tensor, prediction: Prediction) -> NoiseSchedule:
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device), self.prediction)

    def at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of timesteps B, as B 1 1 1."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]

    def clean(self, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 as the model's output implies it."""
        alpha, sigma = self.at(t)
        if self.prediction == "epsilon":
            return (noisy - sigma * output) / alpha
        return alpha * noisy - sigma * output

    def noise(self, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """epsilon as the model's output implies it."""
        if self.prediction == "epsilon":
            return output
        alpha, sigma = self.at(t)
        return alpha * output + sigma * noisy

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.at(t)
        return alpha * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model is trained to say: the noise, or the velocity alpha eps - sigma x0."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self.at(t)
        return alpha * noise - sigma * clean

    def ddim_step(self, clean: torch.Tensor, noise: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """The deterministic DDIM step to timesteps `to` of the point that `clean` and `noise` describe (LCM, eq. 15)."""
        return self.add_noise(clean, noise, to)

    def travel(self, noisy: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """`noisy` at t with as much more noise as makes it one at `to`, which is not before t."""
        (alpha, sigma), (alpha_to, sigma_to) = self.at(t), self.at(to)
        ratio = alpha_to / alpha
        return ratio * noisy + (sigma_to**2 - (ratio * sigma) ** 2).clamp(min=0).sqrt() * noise


def boundary_scalings(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out of timesteps B, as B 1 1 1 in float64: f(x, 0) = x exactly (LCM, section 4.1 with s = 10 t)."""
    scaled = TIMESTEP_SCALING * t.double()
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip[:, None, None, None], c_out[:, None, None, None]


def consistency(schedule: NoiseSchedule, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """f(x_t, t) = c_skip x_t + c_out x0 (LCM, eq. 9)."""
    c_skip, c_out = (c.to(noisy.dtype) for c in boundary_scalings(t))
    return c_skip * noisy + c_out * schedule.clean(output, noisy, t)


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """cond + w (cond - uncond), with w of B (LCM, eq. 13): w = 0 is no guidance; a pipeline's guidance_scale is w + 1."""
    return conditional + w[:, None, None, None] * (conditional - unconditional)


def pseudo_huber(a: torch.Tensor, b: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """Mean over elements of sqrt(d^2 + c^2) - c, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    difference = a.to(wide) - b.to(wide)
    return ((difference**2 + c**2).sqrt() - c).mean()


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared error, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return F.mse_loss(a.to(wide), b.to(wide))


def phase_edge(t: torch.Tensor, timesteps: int, phases: int) -> torch.Tensor:
    """The edge below each t of B: phase m reaches from m T / N - 1, its edge, up to (m + 1) T / N - 1; the lowest edge is 0 (PCM, 3.1)."""
    span = timesteps // phases
    return (t // span * span - 1).clamp(min=0)


def phased_consistency(
    schedule: NoiseSchedule, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, edge: torch.Tensor
) -> torch.Tensor:
    """f(x_t, t): the deterministic DDIM step from t to its phase's edge. At the edge it is x itself, so no other boundary is
    needed, and it is what sampling does (PCM, eq. 4)."""
    return schedule.ddim_step(schedule.clean(output, noisy, t), schedule.noise(output, noisy, t), edge)


def consistency_pair(
    schedule: NoiseSchedule,
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    noisy: torch.Tensor,
    t: torch.Tensor,
    skip: int,
    w: torch.Tensor,
    text: torch.Tensor,
    empty_text: torch.Tensor,
    edge: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the student at t, the target network at t - skip), which a loss draws together: LCM, eq. 17; with an `edge` PCM's, eq. 5.

    The frozen `teacher` moves `noisy` (B C H W at t) one guided DDIM step back. Only `student` gets a gradient.
    """
    to = (t - skip).clamp(min=0) if edge is None else torch.maximum(t - skip, edge)

    def f(output: torch.Tensor, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return (
            consistency(schedule, output, x, at) if edge is None else phased_consistency(schedule, output, x, at, edge)
        )

    with torch.no_grad():
        both = teacher(torch.cat([noisy, noisy]), torch.cat([t, t]), torch.cat([text, empty_text]))
        conditional, unconditional = both.chunk(2)
        clean = guided(schedule.clean(conditional, noisy, t), schedule.clean(unconditional, noisy, t), w)
        noise = guided(schedule.noise(conditional, noisy, t), schedule.noise(unconditional, noisy, t), w)
        earlier = schedule.ddim_step(clean, noise, to)
        wanted = f(target(earlier, to, text), earlier, to)
    return f(student(noisy, t, text), noisy, t), wanted


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the mean squared errors of paired feature maps (BK-SDM, eq. 3), in float32."""
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student features stand against {len(teacher)} of the teacher")
    errors = [F.mse_loss(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).sum()
