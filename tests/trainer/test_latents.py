"""What the frozen encoders give for a sample does not hang on what was encoded before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.latents import Encoder
from trainer.models import open_pipeline
from trainer.stream import ShardStream


class OfItsBatch:
    """Stands for kernels whose sums depend on the size of a batch, by far more than real ones do."""

    def __init__(self, call: Any, change: Any) -> None:
        self.call, self.change = call, change

    def __call__(self, batch: torch.Tensor, *args: Any, **options: Any) -> Any:
        return self.change(self.call(batch, *args, **options), len(batch))


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_is_the_same_whatever_is_in_memory(tiny_models: Path, data: Path, cache: bool, monkeypatch) -> None:
    """A resumed training begins with nothing in memory and must end in the same weights."""
    pipeline, stream = open_pipeline(str(tiny_models / "teacher")), ShardStream(data)
    states = pipeline.text_encoder.forward
    monkeypatch.setattr(pipeline.vae, "encode", OfItsBatch(pipeline.vae.encode, lambda found, n: Scaled(found[0], n)))
    monkeypatch.setattr(pipeline.text_encoder, "forward", OfItsBatch(states, lambda found, n: (found[0] * n,)))
    batches = [[stream.read(row) for row in rows] for rows in ((0, 1, 2, 3), (2, 3, 4, 5), (6, 6, 1, 7))]
    dropped = [[True, False, False, False], [False] * 4, [False, True, False, True]]

    def seen(encoder: Encoder, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder.latents(batches[i]), encoder.texts_of(batches[i], dropped[i])

    undisturbed = Encoder(pipeline, 32, torch.device("cpu"), cache)
    wanted = [seen(undisturbed, i) for i in range(3)]
    for i in (1, 2):
        resumed = Encoder(pipeline, 32, torch.device("cpu"), cache)
        for mine, theirs in zip(seen(resumed, i), wanted[i], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    stream.close()


class Scaled:
    """A posterior n times as far from zero, as an item of the tuple that `encode` returns."""

    def __init__(self, posterior: Any, n: int) -> None:
        self.posterior, self.n = posterior, n

    def __getitem__(self, _place: int) -> Scaled:
        return self

    def mode(self) -> torch.Tensor:
        return self.posterior.mode() * self.n
