"""Runs a build the way a device would: tokens, a few UNet calls between closed-form scheduler steps, one decode.

The scheduler is a short table of constants in `bundle.json`, so a device needs no diffusers. Where the UNet takes guidance, they say which
scales. Knows no quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.errors import ParityError
from export.guidance import guidance_input, with_scale
from export.noise import noise
from export.targets.contract import GRAPHS

__all__ = ["GRAPHS", "Build", "Call", "scheduler_constants"]


Call = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Named inputs to the graph's one output."""


def scheduler_constants(pipeline: Any, steps: int, guidance: dict[str, Any] | None = None) -> dict[str, Any]:
    """What one few-step loop needs: per step t, c_skip, c_out, alpha, sigma, and alpha, sigma of the step after it.

    Deterministic steps (TCD's scheduler, students with phases) have the same form: the DDIM step to s is sigma_s / sigma x
    + (alpha_s - sigma_s alpha / sigma) x0, and no noise follows. `guidance`: `guidance_of` the student.
    """
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps]
    cumulative, phased = scheduler.alphas_cumprod, type(scheduler).__name__ == "TCDScheduler"
    table: list[dict[str, float]] = []
    for i, t in enumerate(times):
        alpha, sigma = _root(cumulative[t]), _root(1 - cumulative[t])
        if phased:
            to = cumulative[times[i + 1] if i + 1 < len(times) else 0]
            c_skip = _root(1 - to) / sigma
            c_out = _root(to) - c_skip * alpha
        else:
            c_skip, c_out = (float(v) for v in scheduler.get_scalings_for_boundary_condition_discrete(t))
        row = {"t": t, "c_skip": c_skip, "c_out": c_out, "alpha": alpha, "sigma": sigma}
        if i + 1 < len(times) and not phased:
            after = cumulative[times[i + 1]]
            row |= {"next_alpha": _root(after), "next_sigma": _root(1 - after)}
        table.append(row)
    kept = {} if guidance is None else {"guidance": guidance}
    return {"prediction_type": scheduler.config.prediction_type, "steps": table, **kept}


def _root(value: Any) -> float:
    return float(value) ** 0.5


class Build:
    """An opened build: three callables and the scheduler's table. Its graphs draw as many pictures at once as the latent's shape says."""

    def __init__(self, calls: dict[str, Call], scheduler: dict[str, Any], latent_shape: Sequence[int]) -> None:
        self.calls, self.scheduler, self.shape = calls, scheduler, tuple(latent_shape)

    def at(self, scale: float | None) -> Build:
        """The same build, drawing at another guidance scale than its own default; itself for None. Raises EdgeFusionError for a scale that it
        does not take."""
        return self if scale is None else Build(self.calls, with_scale(self.scheduler, scale), self.shape)

    def denoise(
        self,
        tokens: np.ndarray,
        seeds: int | Sequence[int],
        seen: Callable[[dict[str, np.ndarray]], None] = lambda _: None,
    ) -> np.ndarray:
        """The final latents B C H W for token ids of up to B prompts, N T, and a seed each; `seen` is shown the inputs of each UNet call
        (for calibration). A batch that is not full repeats the last prompt and seed. Noise hangs on a picture's own seed alone."""
        given = [seeds] if isinstance(seeds, int) else list(seeds)
        rows = [min(i, len(given) - 1) for i in range(self.shape[0])]
        text = self.calls["text_encoder"]({"input_ids": tokens[rows]})

        def drawn(draw: int) -> np.ndarray:
            return np.stack([noise(seed, draw, self.shape[1:]) for seed in given])[rows]

        latent, more = drawn(0), guidance_input(self.scheduler)
        for step, row in enumerate(self.scheduler["steps"], start=1):
            inputs = {"latent": latent, "timestep": np.array([row["t"]], np.float32), "text": text, **more}
            seen(inputs)
            said = self.calls["unet"](inputs)
            if self.scheduler["prediction_type"] == "epsilon":
                clean = (latent - row["sigma"] * said) / row["alpha"]
            else:
                clean = row["alpha"] * latent - row["sigma"] * said
            latent = (row["c_skip"] * latent + row["c_out"] * clean).astype(np.float32)
            if "next_alpha" in row:
                latent = row["next_alpha"] * latent + row["next_sigma"] * drawn(step)
                latent = latent.astype(np.float32)
        return latent

    def picture(self, tokens: np.ndarray, seed: int) -> np.ndarray:
        """H x W x 3 uint8 for token ids 1 T. Raises ParityError for a picture that is not a number."""
        return self.pictures([tokens], [seed])[0]

    def pictures(self, rows: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        """As `picture`, of token ids 1 T each, as many at once as the build draws."""
        found: list[np.ndarray] = []
        for start in range(0, len(rows), self.shape[0]):
            end = min(start + self.shape[0], len(rows))
            latents = self.denoise(np.concatenate(rows[start:end]), seeds[start:end])
            drawn = self.calls["vae_decoder"]({"latent": latents})
            if not np.isfinite(drawn).all():
                raise ParityError(
                    "the build drew a picture that is not a number", remedy="Keep more of it in full precision"
                )
            found += list((drawn[: end - start].transpose(0, 2, 3, 1) * 255).round().astype(np.uint8))
        return found
