"""What both phases draw at a step: samples, and random numbers that depend on the seed, the phase and the step alone."""

from __future__ import annotations

import hashlib

import torch

from trainer.latents import Encoder
from trainer.mix import MixedStream
from trainer.stream import Example


def read_batch(
    stream: MixedStream, encoder: Encoder, step: int, batch: int, share: slice
) -> tuple[torch.Tensor, list[Example]]:
    """Clean latents B C H W and the samples of this rank's share of the global batch; those of the next step are begun to be read."""
    draws, following = (range(at * batch, (at + 1) * batch)[share] for at in (step, step + 1))
    examples = stream.read_draws(draws, following, encoder.size_px)
    stream.settle()
    if encoder.flip_seed is None:
        return encoder.latents(examples), examples
    mirrored = torch.rand(batch, generator=generator(encoder.flip_seed, "flip", step))[share] < 0.5
    return encoder.latents(examples, mirrored.tolist()), examples


def generator(seed: int, phase: str, step: int) -> torch.Generator:
    """Random numbers that depend on the seed, the phase and the step, and on nothing else."""
    return torch.Generator().manual_seed(seed_of(seed, phase, step))


def seed_of(seed: int, phase: str, step: int) -> int:
    key = hashlib.sha256(f"{seed}/{phase}/{step}".encode()).digest()
    return int.from_bytes(key[:7], "big")
