"""Of a phase that ended nothing is left in the next: no weights, no optimiser, no loss scale; nor whole tensors where none is kept."""

from __future__ import annotations

import torch
from torch import nn

from trainer.identity import Identity
from trainer.shard import whole
from trainer.state import state_of
from trainer.workers import begin_anew, loss_scale, new_accelerator


def test_the_next_phase_begins_with_the_first_loss_scale_and_nothing_to_unscale() -> None:
    accelerator = new_accelerator("no")
    assert loss_scale(accelerator) == {}
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = loss_scale(accelerator)
    model = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimiser)
    accelerator.scaler.scale(model(torch.full((1, 2), float("inf"))).sum()).backward()
    accelerator.scaler.step(optimiser)
    accelerator.scaler.update()
    assert accelerator.scaler.get_scale() == 512.0
    begin_anew(accelerator, before)
    assert accelerator.scaler.get_scale() == 1024.0 and loss_scale(accelerator) == before
    assert not accelerator._models and not accelerator._optimizers


def test_tensors_are_taken_one_after_the_other() -> None:
    tree = {"a": [torch.ones(2), {"b": torch.zeros(3)}], "c": "text"}
    taken: list[int] = []

    def take(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(len(tensor))
        return tensor + 1

    found = whole(tree, take)
    assert taken == [2, 3] and found["c"] == "text" and found["a"][1]["b"].tolist() == [1, 1, 1]


def test_a_worker_that_keeps_no_state_holds_none() -> None:
    model = nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    kept, other = (state_of(1, model, model, optimiser, Identity({}), {"losses": [1.0]}, kept=k) for k in (True, False))
    assert torch.equal(kept["model"]["weight"], model.weight) and kept["model"]["weight"] is not model.weight
    assert other["model"]["weight"].numel() == 0 and other["optimiser"]["state"][0]["exp_avg"].numel() == 0
    assert kept["more"] == other["more"] == {"losses": [1.0]}
