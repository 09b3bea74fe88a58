"""Workers, GPU shares and batch sizes by which no stage of make waits for another, from rates that a probe measured.

A stage's rate is measured for one worker; more workers are reckoned to be as fast each, which holds while they have cores and GPUs of their
own. The batch sizes that are proposed were measured. How many workers share a GPU is reckoned from how much of a worker's time is the
model's and how much memory it took; it was not tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from factory.recipe import FactoryRecipe, MakeRecipe

_HEADROOM = 1.1
"""More workers of the stages that must not be the slowest."""
_WORTH = 1.03
"""A batch is worth a change if it is so much faster."""
_FULL = 0.98
_MOST_SHARING = 4
_MEMORY = 0.9
"""Of a GPU, what its workers may take together."""
ON_GPUS = ("render", "caption")
"""What GPUs are rented for."""
LOOKING = ("crop", "score")
"""Stages of CLIP: cheap on a CPU beside a slow teacher, and no longer beside many."""
_LOOKERS = 0.1
"""Of a GPU, what is set aside for those who score beside a teacher."""
_MOST_LOOKING = 0.5
"""Of a GPU, what they keep of it where a recipe gives them so much that nothing is left."""


@dataclass(frozen=True)
class StageProbe:
    """A stage as one worker of it ran here."""

    name: str
    open_s: float
    samples: int
    seconds: float
    gpus: float
    device_s: float = 0.0
    """Of `seconds`, what was the model's; the rest is pictures decoded and encoded on the CPU."""
    gpu_bytes: int = 0
    """Memory of the GPU that it took at most; 0 without one."""

    @property
    def per_sample_s(self) -> float:
        return self.seconds / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class BatchProbe:
    """A stage with another batch size."""

    key: str
    """Of the recipe."""
    batch: int
    stage: StageProbe | None
    """None if it did not fit into memory."""


@dataclass(frozen=True)
class Step:
    """One key changed; hours and cost of make with it and all changes before it."""

    key: str
    before: Any
    after: Any
    hours: float
    cost: float | None


@dataclass(frozen=True)
class Proposal:
    """Sizes for a run on so many GPUs."""

    gpus: int
    hours: float
    """As the recipe stands."""
    cost: float | None
    steps: tuple[Step, ...]
    limit: str
    """The stage that sets the pace with all changes."""
    notes: tuple[str, ...]

    def tree(self) -> dict[str, Any]:
        """The changed keys as a recipe has them."""
        found: dict[str, Any] = {}
        for step in self.steps:
            *parents, last = step.key.split(".")
            place = found
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = step.after
        return found


@dataclass(frozen=True)
class _Sizes:
    """What is chosen: workers, and how fast one of each stage is."""

    stages: tuple[StageProbe, ...]
    render_workers: int
    share: float
    """GPUs of a worker of render or caption."""
    score_workers: int
    look_share: float = 0.0
    """GPUs of a worker of score, and of crop."""

    def rates(self, gpus: int) -> dict[str, float]:
        """Samples a second of each stage that took any time."""
        found: dict[str, float] = {}
        shares = {stage.name: self.share if stage.name in ON_GPUS else self.look_share for stage in self.stages}
        done = [s for s in self.stages if s.samples and s.seconds]
        on_gpu = [s for s in done if s.device_s and s.name in (*ON_GPUS, *LOOKING) and shares[s.name]]
        # Those that share a GPU are together no faster than their models are on it.
        a_sample_s = sum(s.device_s / s.samples for s in on_gpu)
        for stage in done:
            found[stage.name] = self._workers(stage.name, gpus) / stage.per_sample_s
            if stage in on_gpu:
                own = math.ceil(round(self._workers(stage.name, gpus) * shares[stage.name], 6))
                own = min(gpus, own if stage.name in ON_GPUS else gpus)
                found[stage.name] = min(found[stage.name], max(1, own) / a_sample_s)
        return found

    def hours(self, samples: int, gpus: int) -> float:
        """Of make: stages overlap, the slowest sets the pace, and each opens its models first."""
        rates = self.rates(gpus)
        return max(s.open_s + samples / rates[s.name] if s.name in rates else s.open_s for s in self.stages) / 3600

    def _workers(self, name: str, gpus: int) -> int:
        if name in ON_GPUS:
            room = math.floor(gpus / self.share + 1e-6) if self.share else self.render_workers
            return max(1, min(self.render_workers, room))
        return self.score_workers if name in LOOKING else 1


def batch_keys(recipe: MakeRecipe) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Key of a batch size to (its value, stages that it is for)."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for name, painter in recipe.painters().items():
        part = f"teachers.{name}" if name else "teacher"
        found[f"factory.make.{part}.batch_images"] = (painter.batch_images, ("render",))
    if recipe.captioner is not None and recipe.captioner.kind == "transformers":
        found["factory.make.captioner.batch_pictures"] = (recipe.captioner.batch_pictures, ("caption",))
    stages = ("score",) if recipe.painters() else ("crop", "score")
    found["factory.make.scorer.batch_images"] = (recipe.scorer.batch_images, stages)
    return found


def batches_to_try(own: int, unit_images: int) -> list[int]:
    """The recipe's own; half, double and four times as much, and a work unit, as far as they cut a unit into whole batches."""
    sizes = {own // 2, own * 2, own * 4, *([unit_images] if own > unit_images else [])}
    return sorted({own, *(size for size in sizes if 1 <= size <= unit_images and unit_images % size == 0)})


def teacher_of_key(key: str) -> str:
    """Which of several teachers a key is of; empty for all other keys."""
    return key.split(".")[3] if key.startswith("factory.make.teachers.") else ""


def with_size(make: MakeRecipe, key: str, value: int) -> MakeRecipe:
    """The recipe with another batch size."""
    *_, part, name = key.split(".")
    if teacher := teacher_of_key(key):
        changed = make.teachers[teacher].model_copy(update={name: value})
        return make.model_copy(update={"teachers": {**make.teachers, teacher: changed}})
    return make.model_copy(update={part: getattr(make, part).model_copy(update={name: value})})


def propose(
    recipe: FactoryRecipe,
    samples: int,
    stages: Sequence[StageProbe],
    batches: Sequence[BatchProbe],
    gpus: int,
    price: float | None,
    gpu_bytes: int = 0,
    on_gpu: Sequence[StageProbe] = (),
    cores: int = 0,
) -> Proposal:
    """Sizes for `samples` samples on `gpus` GPUs (workers of the kind that was probed), each of `gpu_bytes`, 0 if it was none, and with
    `cores` of the CPU, 0 if nobody knows. `on_gpu`: how fast stages are there that the recipe leaves on the CPU."""
    make, units = recipe.make, -(-samples // recipe.make.unit_images)
    now = _Sizes(tuple(stages), make.render_workers, make.render_gpus, make.score_workers, make.score_gpus)
    on_gpus = next((stage for stage in stages if stage.name in ON_GPUS and stage.samples), None)
    steps: list[Step] = []
    notes: list[str] = []
    lookers, fewer = make.score_workers, False

    def cost(hours: float) -> float | None:
        return None if price is None else hours * gpus * price

    def change(key: str, before: Any, after: Any, sizes: _Sizes) -> _Sizes:
        earlier = next((step for step in steps if step.key == key), None)
        if earlier is not None:
            steps.remove(earlier)
            before = earlier.before
        if before == after:
            return sizes
        hours = sizes.hours(samples, gpus)
        steps.append(Step(key, before, after, hours, cost(hours)))
        return sizes

    begun = now.hours(samples, gpus)
    chosen: dict[str, int] = {}
    for key, (own, _) in batch_keys(make).items():
        tried = [probe for probe in batches if probe.key == key]
        chosen[key] = _best_batch(own, tried)
        now = change(
            key, own, chosen[key], replace(now, stages=tuple(_with_batches(s, make, chosen, batches) for s in stages))
        )
        if batches and not tried and (name := teacher_of_key(key)):
            notes.append(f"teacher {name} drew nothing in the probe, so its batch size was not tried: raise --samples")
    if on_gpus is not None:
        stage = next(s for s in now.stages if s.name == on_gpus.name)
        sharing, why = _sharing(stage, gpu_bytes)
        notes += [why] if why else []
        workers = max(1, min(gpus * sharing, units))
        share = make.render_gpus
        if gpu_bytes and make_uses_gpu(make):
            lookers, share = _beside(make, gpus, sharing)
            fewer = lookers < make.score_workers
            if fewer:
                notes.append(
                    f"{make.score_workers} scoring workers, with the GPUs that the recipe gives them, leave nothing of {gpus} GPUs "
                    f"to {stage.name}; {lookers} fit"
                )
            if not share:
                notes.append(
                    f"score_gpus and crop_gpus leave nothing of {gpus} GPUs to {stage.name}: lower them, or take more GPUs"
                )
                share, workers = make.render_gpus, make.render_workers
        if fewer:
            now = replace(now, score_workers=lookers)
        # The share first: without room on the GPUs, more workers are not started.
        now = change("factory.make.render_gpus", make.render_gpus, share, replace(now, share=share))
        now = change("factory.make.render_workers", make.render_workers, workers, replace(now, render_workers=workers))
        pace = now.rates(gpus)[stage.name]
        needed = [pace * s.per_sample_s * _HEADROOM for s in now.stages if s.name in LOOKING and s.samples]
        scorers = max(1, min(math.ceil(round(max(needed, default=1.0), 6)), units))
    else:
        scorers = max(1, min(gpus, units))
    if fewer:
        scorers = lookers
    elif make.score_gpus:
        scorers = max(scorers, make.score_workers)  # their GPUs are set aside already
    there = max(1, cores * gpus // make.threads) if cores else scorers
    short = on_gpus is None or scorers > there
    better = _looking_on_gpus(now, on_gpu, gpus, units) if short and not make.score_gpus else None
    few = replace(now, score_workers=min(scorers, there))
    if better and on_gpus is not None and on_gpus.name == "caption":
        notes.append(
            f"{scorers} scoring workers want more cores than there are: give crop and score a GPU of their own (crop_gpus, score_gpus), "
            "and one captioning worker less"
        )
    elif better and better.hours(samples, gpus) * _WORTH < few.hours(samples, gpus):
        now = change("factory.make.render_gpus", now.share, better.share, replace(now, share=better.share))
        now = change("factory.make.score_workers", make.score_workers, better.score_workers, better)
        now = change("factory.make.score_gpus", make.score_gpus, better.look_share, now)
        if not make.painters():
            now = change("factory.make.crop_gpus", make.crop_gpus, better.look_share, now)
    if not now.look_share or make.score_gpus:
        now = change("factory.make.score_workers", make.score_workers, scorers, replace(now, score_workers=scorers))
    rates = now.rates(gpus)
    limit = min(rates, key=lambda name: rates[name]) if rates else ""
    if limit == "commit":
        notes.append("one process commits what is made, and it is the slowest: larger factory.make.unit_images help it")
    cores = now.score_workers * make.threads
    notes.append(
        f"{now.score_workers} scoring workers want {cores} cores, render and caption {make.threads} for each worker"
    )
    return Proposal(gpus, begun, cost(begun), tuple(steps), limit, tuple(notes))


def _beside(make: MakeRecipe, gpus: int, sharing: int) -> tuple[int, float]:
    """(scoring workers, share of a GPU of each of `sharing` workers beside them): fewer than the recipe's where those would leave nothing, and
    a share of 0 where one on each GPU does."""
    each = make.score_gpus + (0 if make.painters() else make.crop_gpus)

    def left(workers: int) -> float:
        return max(0.0, _part(1 - math.ceil(workers / gpus) * each, sharing))

    if left(make.score_workers):
        return make.score_workers, left(make.score_workers)
    fit = min(make.score_workers, gpus * max(1, math.floor(round(_MOST_LOOKING / each, 6))))
    return (fit, left(fit)) if left(fit) else (make.score_workers, 0.0)


def _part(room: float, workers: int) -> float:
    """What each of some workers takes of the room on a GPU, in hundredths, rounded down: together they fit."""
    share = math.floor(round(100 * room / workers, 6)) / 100
    return int(share) if share == int(share) else share


def _looking_on_gpus(now: _Sizes, on_gpu: Sequence[StageProbe], gpus: int, units: int) -> _Sizes | None:
    """Score, and crop, on the GPUs: beside the teacher as many on each as keep up with it, or a GPU for both; None if nobody timed them."""
    timed = {stage.name: stage for stage in on_gpu if stage.samples}
    if not all(stage.name in timed for stage in now.stages if stage.name in LOOKING):
        return None
    stages = tuple(timed.get(stage.name, stage) for stage in now.stages)
    main = next((stage for stage in stages if stage.name in ON_GPUS), None)
    if main is None:
        return replace(now, stages=stages, score_workers=max(1, min(gpus, units)), look_share=_part(1, 2))
    each = math.ceil(round(now.rates(gpus)[main.name] * timed["score"].per_sample_s * _HEADROOM / gpus, 6))
    each = min(each, round(100 * _LOOKERS))  # a share is of hundredths, and none is no share
    share = _part(now.share * (1 - _LOOKERS), 1)
    return replace(
        now, stages=stages, share=share, score_workers=min(each * gpus, units), look_share=_part(_LOOKERS, each)
    )


def make_uses_gpu(make: MakeRecipe) -> bool:
    """The models of render or caption run in our own workers: a server that is asked has GPUs of its own."""
    return make.captioner is None or make.captioner.kind != "openai"


def _best_batch(own: int, tried: Sequence[BatchProbe]) -> int:
    """The smallest of those that are about as fast as the fastest; the recipe's own if that is among them."""
    seconds: dict[int, float] = {}
    for probe in tried:
        if probe.stage is not None and probe.stage.samples:
            seconds[probe.batch] = seconds.get(probe.batch, 0.0) + probe.stage.per_sample_s
    lost = {probe.batch for probe in tried if probe.stage is None}
    seconds = {batch: took for batch, took in seconds.items() if batch not in lost}
    if not seconds:
        return own
    limit = min(seconds.values()) * _WORTH
    return (
        own if seconds.get(own, math.inf) <= limit else min(batch for batch, took in seconds.items() if took <= limit)
    )


def _with_batches(
    stage: StageProbe, make: MakeRecipe, chosen: Mapping[str, int], batches: Sequence[BatchProbe]
) -> StageProbe:
    """The stage as it runs with the batches of `chosen`, by keys: by the ratio of two probes of one kind. Of several teachers each counts
    with its share and the time that it takes; one that was not probed as the mean of the others."""
    keys = {key: own for key, (own, names) in batch_keys(make).items() if stage.name in names}
    if all(chosen.get(key, own) == own for key, own in keys.items()):
        return stage
    found = {(p.key, p.batch): p.stage for p in batches if p.stage is not None and p.stage.name == stage.name}
    pairs: list[tuple[float, StageProbe, StageProbe]] = []
    for key, own in keys.items():
        before, after = found.get((key, own)), found.get((key, chosen.get(key, own)))
        if before is not None and after is not None and before.seconds:
            pairs.append((_share(make, key), before, after))
    if not pairs:
        return stage
    missing = sum(_share(make, key) for key in keys) / sum(share for share, _, _ in pairs)

    def ratio(of: Callable[[StageProbe], float]) -> float | None:
        """None of what took no time."""
        begun = sum(share * of(before) for share, before, _ in pairs) * missing
        return 1 + sum(share * (of(after) - of(before)) for share, before, after in pairs) / begun if begun else None

    slower = ratio(lambda probe: probe.per_sample_s)
    assert slower is not None
    on_device = ratio(lambda probe: probe.device_s / probe.samples)
    return replace(
        stage,
        seconds=stage.seconds * slower,
        device_s=stage.device_s * (slower if on_device is None else on_device),
        gpu_bytes=max([after.gpu_bytes for _, _, after in pairs] + [stage.gpu_bytes] * (len(pairs) < len(keys))),
    )


def _share(make: MakeRecipe, key: str) -> float:
    """Of the pictures of a stage, those that a key's model sees, relative to the stage's other keys."""
    name = teacher_of_key(key)
    return make.teachers[name].share if name else 1.0


def _sharing(stage: StageProbe, gpu_bytes: int) -> tuple[int, str]:
    """How many workers keep one GPU at work, and what to say about it."""
    if not gpu_bytes or not stage.device_s:
        return 1, ""
    share = stage.device_s / stage.seconds
    wanted = next((k for k in range(1, _MOST_SHARING + 1) if k * share >= _FULL), _MOST_SHARING)
    room = max(1, int(_MEMORY * gpu_bytes // max(stage.gpu_bytes, 1)))
    told = f"{stage.name}: {share:.0%} of a worker's time is the model's, {stage.gpu_bytes / 2**30:.1f} of {gpu_bytes / 2**30:.0f} GiB its memory"
    if wanted > room:
        return room, f"{told}; {wanted} workers a GPU would keep it at work, but it holds {room}"
    return wanted, told + (f"; {wanted} workers share a GPU (reckoned, not tried)" if wanted > 1 else "")
