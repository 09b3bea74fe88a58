"""The optimiser loop of every training: AdamW, warm-up, clipping, a moving average, checkpoints by the clock, a watch on the loss.

A batch is a function of its draw number, so the state of the data is two numbers: the step, and how many draws were skipped by
rollbacks. Knows no pictures and no UNets.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from cluster.errors import StageError
from trainer.checkpoints import CHECKPOINTS, config_of, newest_checkpoint
from trainer.draws import seed_of
from trainer.identity import Identity
from trainer.optimise import new_optimiser, rate_at
from trainer.options import CheckpointRecipe
from trainer.recipe import PhaseRecipe
from trainer.shard import shard, whole
from trainer.state import (
    Average,
    Background,
    Best,
    Log,
    load_state,
    points_of,
    save_state,
    state_of,
)
from trainer.track import track, track_look
from trainer.use import machine_use
from trainer.watch import LossWatch
from trainer.workers import of_main

Model = TypeVar("Model", bound=nn.Module)
LossAt = Callable[[Any, Average, int, slice], torch.Tensor]
"""(model, its average, draw number, this rank's slice of the global batch) -> mean loss of the slice."""


class HasHeads(Protocol):
    """Where a second set of weights lies, prepared in place."""

    heads: nn.Module


class Validation(Protocol):
    """Looks at the average on the way; see trainer/validate.py."""

    keeps_best: bool

    def is_due(self, step: int, steps: int) -> bool: ...

    def draw(self, average: Any, step: int, folder: Path) -> float | None:
        """Leave pictures in `folder`; return how good they are, more being better."""
        ...


@dataclass(frozen=True)
class Partner:
    """What learns beside the model from the same loss, at a rate of its own; it is saved with it and has no average."""

    owner: HasHeads
    learning_rate: float


MAX_ROLLBACKS = 5
BY_THE_CLOCK = CheckpointRecipe()


def fit(
    phase: str,
    settings: PhaseRecipe,
    identity: Identity,
    model: Model,
    loss_at: LossAt,
    folder: Path,
    accelerator: Accelerator,
    partner: Partner | None = None,
    validation: Validation | None = None,
    sharded: bool = False,
    checkpoints: CheckpointRecipe = BY_THE_CLOCK,
) -> Model:
    """Train `model` and return its average, or the best one that `validation` saw if it says so; `folder` keeps `checkpoints`,
    `metrics.jsonl`, what `validation` leaves and TensorBoard's event file.

    With `sharded`, weights and the optimiser's state are cut up among the workers; what is returned is whole. A state is saved only
    after the next loss was looked at, and the last one is looked at too: what is saved is sound. Raises StageError for a batch that is
    too small for all workers and for a loss that spiked, after rolling back if the recipe says so.
    """
    run = _Run(phase, settings, identity, model, folder, accelerator, partner, validation, sharded, checkpoints)
    try:
        while run.step <= settings.steps:
            run.one_step(loss_at)
        return run.result()
    finally:
        run.close()


class _Spike(Exception):
    """What is wrong, in words."""


class _Run:
    def __init__(
        self,
        phase: str,
        settings: PhaseRecipe,
        identity: Identity,
        model: nn.Module,
        folder: Path,
        accelerator: Accelerator,
        partner: Partner | None = None,
        validation: Validation | None = None,
        sharded: bool = False,
        checkpoints: CheckpointRecipe = BY_THE_CLOCK,
    ) -> None:
        workers, batch = accelerator.num_processes, settings.batch_images
        if batch < workers:
            raise StageError(
                f"trainer.{phase}.batch_images ({batch}) is less than one image for each of {workers} workers",
                remedy=f"Raise it, or set cluster.train_workers to {batch} at most",
            )
        if batch // workers % settings.accumulation:
            raise StageError(
                f"trainer.{phase}.accumulation ({settings.accumulation}) does not divide a worker's {batch // workers} images of a batch",
                remedy="Choose a divisor",
            )
        rank = accelerator.process_index
        self.share = slice(rank * batch // workers, (rank + 1) * batch // workers)
        self.workers = workers
        self.layer_seed = int(identity.facts.get("seed", 0)) + 7919 * rank
        self.phase, self.settings, self.identity, self.accelerator = phase, settings, identity, accelerator
        self.folder, self.checkpoints = folder, checkpoints
        self.average = Average(model.train(), settings.ema_decay)
        self.config = config_of(self.average.model)
        self.validation, self.writing = validation, Background()
        self.best = Best(folder / CHECKPOINTS, identity, self.config)
        self.average.model.to(accelerator.device)
        self.empty: nn.Module | None = None
        if sharded and workers > 1:
            # What the average is poured into where it must be whole.
            self.empty = copy.deepcopy(self.average.model).to("meta")
            model.to(accelerator.device)
            shard(model)
            shard(self.average.model)
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.partner = partner.owner if partner else None
        if partner:
            heads = partner.owner.heads
            groups.append({"params": list(heads.parameters()), "scale": partner.learning_rate / settings.learning_rate})
            partner.owner.heads = accelerator.prepare(heads)
        optimiser = new_optimiser(settings, groups, accelerator.device)
        self.rate_at, self.rate, self.grad_norm = rate_at(settings), 0.0, 0.0
        if settings.compile_backend:
            model.compile(backend=settings.compile_backend)
            self.average.model.compile(backend=settings.compile_backend)
        if self.empty is None:
            self.model, self.optimiser = accelerator.prepare(model, optimiser)
        else:  # prepared, it would be wrapped for whole replicas
            self.model, self.optimiser = model, accelerator.prepare(optimiser)
        self.log: Log | None = None
        self._restore()

    def one_step(self, loss_at: LossAt) -> None:
        """Look at the loss, keep the state that led to it if it is sound, then learn from it. Past the last step, only look."""
        # Nothing here draws from torch's own generators; a layer of somebody's student, such as dropout, may.
        torch.manual_seed(seed_of(self.layer_seed, self.phase, self.step + self.skipped))
        try:
            loss, mean = self._loss(loss_at)
            self._validate_if_due()
            self._checkpoint_if_due()
            if self.step < self.settings.steps:
                self._learn(loss)
        except _Spike as spike:
            self._mend(spike)
            return
        if self.step < self.settings.steps:
            self.watch.note(mean)
            self._note(mean)
        self.step += 1

    def result(self) -> Any:
        """The average to go on with, whole; with `validation.keep: best` the best one, in the main process."""
        self.writing.wait()
        self.accelerator.wait_for_everyone()  # the best one is there
        found = self._whole_average()
        # The main process alone: it is the one that uses it, and removes what it was read from.
        keeps_best = self.validation is not None and self.validation.keeps_best
        if keeps_best and self.accelerator.is_main_process and (best := self.best.recall()):
            found.load_state_dict(best["average"])
            self.accelerator.print(f"{self.phase}: the average of step {best['step']} drew best ({best['score']:.4f})")
        return found

    def close(self) -> None:
        if self.log:
            self.log.close()
        self.writing.wait()

    def _whole_average(self) -> Any:
        if self.empty is None:
            return self.average.model
        weights = whole(self.average.model.state_dict())  # all workers take part
        found = copy.deepcopy(self.empty)
        found.load_state_dict(weights, assign=True)
        return found.requires_grad_(False).eval()

    def _validate_if_due(self) -> None:
        """Draw from the average that has learned `self.step` steps, whose loss was just found sound."""
        if self.validation is None or not self.validation.is_due(self.step, self.settings.steps):
            return
        began = time.monotonic()
        average = self._whole_average()
        if self.accelerator.is_main_process:
            score = self.validation.draw(average, self.step, self.folder)
            if score is not None and (keep := self.best.offer(score, self.step, average.state_dict)):
                self.writing.run(keep)
            if self.log and (look := self.log.show(self.step)):
                track_look(self.accelerator, self.phase, look)
        self.accelerator.wait_for_everyone()
        self.began += time.monotonic() - began

    def _loss(self, loss_at: LossAt) -> tuple[torch.Tensor, float]:
        """This rank's loss, and the mean over all ranks, of which all ranks therefore think the same."""
        draw, parts = self.step + self.skipped, self.settings.accumulation
        first, images = self.share.start, self.share.stop - self.share.start
        shares = [slice(first + i * images // parts, first + (i + 1) * images // parts) for i in range(parts)]
        total = torch.zeros((), device=self.accelerator.device)
        for share in shares[:-1]:  # nothing but their gradients is kept
            with self.accelerator.no_sync(self.model), self.accelerator.autocast():
                part = loss_at(self.model, self.average, draw, share) * self._weight(share)
            with self.accelerator.no_sync(self.model):
                self.accelerator.backward(part)
            total += part.detach().float()
        with self.accelerator.autocast():
            loss = loss_at(self.model, self.average, draw, shares[-1]) * self._weight(shares[-1])
        self.notes = dict(getattr(loss_at, "notes", {}))
        if len(shares) > 1:
            loss = total + loss
        mean = float(self.accelerator.reduce(loss.detach().float(), "mean"))  # pyright: ignore[reportArgumentType]
        if what := self.watch.trouble(mean):
            raise _Spike(f"the loss of {self.phase} at step {self.step} {what}")
        return loss, mean

    def _weight(self, share: slice) -> float:
        """Means over parts and ranks are means over the batch only if each counts as much as it is; 1 exactly for a whole equal share."""
        return (share.stop - share.start) * self.workers / self.settings.batch_images

    def _learn(self, loss: torch.Tensor) -> None:
        settings, self.rate = self.settings, self.rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * group.get("scale", 1.0)
        self.accelerator.backward(loss)
        norm: Any = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
        if self.partner:  # by itself, or the louder one would quieten the other; its gradients are unscaled by now
            norm = norm + nn.utils.clip_grad_norm_(self.partner.heads.parameters(), settings.max_grad_norm)
        self.grad_norm = float(norm)
        # With fp16 the scaler meets gradients that overflow: it drops the step and scales down.
        if self.accelerator.scaler is None and not math.isfinite(self.grad_norm):
            raise _Spike(
                f"the gradient of {self.phase} at step {self.step} is {self.grad_norm} (its loss is {float(loss.detach()):.4g})"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.accelerator.unwrap_model(self.model))

    def _mend(self, spike: _Spike) -> None:
        """Go back to the last state and past the draws that led here, or stop with what the user can do."""
        self.optimiser.zero_grad(set_to_none=True)
        key = f"trainer.{self.phase}"
        kept = f"the state of step {self.kept} is kept" if self.saved else "nothing was saved"
        calmer = f"Lower {key}.learning_rate or raise {key}.warmup_steps, and train into a new output folder"
        if self.settings.on_spike == "stop":
            raise StageError(
                f"{spike}; {kept}", where=str(self.folder), remedy=f"{calmer}; or set {key}.on_spike to rollback"
            )
        if self.rollbacks >= MAX_ROLLBACKS or not self.saved:
            raise StageError(
                f"{spike}, after {self.rollbacks} rollbacks; {kept}", where=str(self.folder), remedy=calmer
            )
        reached, rollbacks = self.step + self.skipped, self.rollbacks
        self.accelerator.wait_for_everyone()
        self._restore()
        # The same draws would lead to the same place.
        self.skipped, self.rollbacks = reached + 1 - self.step, rollbacks + 1
        self.accelerator.wait_for_everyone()
        self._save()
        self.accelerator.print(f"{spike}: back to step {self.step}, past the batches since then")

    def _restore(self) -> None:
        self.close()
        self.accelerator.wait_for_everyone()  # what the main process was writing is there
        place = self._newest()
        found = load_state(
            place, self.accelerator.unwrap_model(self.model), self.average.model, self.optimiser, self.identity
        )
        self.step, more = found.step, found.more
        self.skipped, self.rollbacks = int(more.get("skipped", 0)), int(more.get("rollbacks", 0))
        self.watch = LossWatch(self.settings.spike_factor, more.get("losses", []))
        if self.partner and "partner" in more:
            self.accelerator.unwrap_model(self.partner.heads).load_state_dict(more["partner"])
        if self.accelerator.scaler is not None and "scaler" in more:
            self.accelerator.scaler.load_state_dict(more["scaler"])
        self.best.recall(weights=False)
        self.saved = place is not None
        """Whether there is something to go back to; of one mind in all workers, while the main one is still writing."""
        self.kept = self.began_step = self.step
        self.began = self.saved_at = time.monotonic()
        if self.accelerator.is_main_process:
            self.log = Log(self.folder, self.step)

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, which the main process proves."""
        place, told = of_main(self.accelerator, lambda: newest_checkpoint(self.folder))
        for line in told:
            self.accelerator.print(line)
        return place

    def _checkpoint_if_due(self) -> None:
        every = self.checkpoints.every_steps
        due = self.step % every == 0 if every else self._clock_says()
        base = self.settings.on_spike == "rollback" and not self.saved
        if base or (due and self.kept < self.step < self.settings.steps):
            self._save()

    def _clock_says(self) -> bool:
        due = time.monotonic() - self.saved_at > self.settings.checkpoint_s
        if self.empty is not None:  # a state is gathered by all, so the main process's clock is everyone's
            told = torch.tensor(float(due and self.accelerator.is_main_process), device=self.accelerator.device)
            due = float(self.accelerator.reduce(told)) > 0  # pyright: ignore[reportArgumentType]
        return due

    def _save(self) -> None:
        main = self.accelerator.is_main_process
        if main or self.empty is not None:
            more: dict[str, Any] = {
                "losses": self.watch.losses,
                "skipped": self.skipped,
                "rollbacks": self.rollbacks,
            }
            if self.partner:
                more["partner"] = self.accelerator.unwrap_model(self.partner.heads).state_dict()
            if self.accelerator.scaler is not None:
                more["scaler"] = self.accelerator.scaler.state_dict()
            model = self.accelerator.unwrap_model(self.model)
            state = state_of(self.step, model, self.average.model, self.optimiser, self.identity, more, main)
            if main:
                place, keep = self.folder / CHECKPOINTS, self.checkpoints.keep
                self.writing.run(lambda: save_state(place, state, self.config, keep))
        self.saved, self.kept, self.saved_at = True, self.step, time.monotonic()

    def _note(self, loss: float) -> None:
        if self.log:
            done = self.step + 1 - self.began_step
            rate = done * self.settings.batch_images / (time.monotonic() - self.began)
            row: dict[str, Any] = dict(
                step=self.step + 1,
                steps=self.settings.steps,
                loss=round(loss, 6),
                **self.notes,
                learning_rate=float(f"{self.rate:.6g}"),
                # With fp16 a dropped step's norm may be no number, which JSON has no word for.
                **({"grad_norm": float(f"{self.grad_norm:.6g}")} if math.isfinite(self.grad_norm) else {}),
                images_per_s=round(rate, 2),
                # Where this start went on: above 0 the phase was interrupted, and times of two lines are not its work alone.
                began_step=self.began_step,
                **machine_use(),
                time_s=round(time.time(), 2),
            )
            self.log.write(**row)
            track(self.accelerator, self.phase, self.step + 1, points_of(row))
