"""Both phases of training, top to bottom: adapt (BK-SDM feature distillation), then distill (LCM from the large teacher).

Every rank draws the noise, timesteps and batches of the whole global batch from the step number and takes its slice, so any
number of workers trains on the same numbers and a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch.nn import functional as F

from cluster.errors import RecipeError
from cluster.storage import publish_folder
from factory.models import quiet
from trainer.adversary import Opponent
from trainer.checkpoints import forget_checkpoints
from trainer.distill import Distillation, denoiser
from trainer.draws import generator, read_batch, seed_of
from trainer.encodings import encoders_digest, has_encodings
from trainer.features import Features, feature_names
from trainer.fit import LossAt, Partner, fit
from trainer.guidance import add_guidance_input
from trainer.identity import training_identity
from trainer.latents import Encoder
from trainer.lora import add_lora, merge_lora, require_peft, save_lora
from trainer.losses import NoiseSchedule, feature_loss
from trainer.memory import explain_training, explains_memory
from trainer.mix import Data, MixedStream
from trainer.models import LORA, PHASES, open_pipeline, refuse_misfit, schedule_of, student_for, teacher_of
from trainer.options import Phase
from trainer.progress import is_finished
from trainer.recipe import AdaptRecipe, DistillRecipe, PhaseRecipe, TrainerRecipe
from trainer.sample import as_student, as_teacher
from trainer.shard import is_sharded, shard
from trainer.state import Average
from trainer.streams import Streams, sources_of_phases
from trainer.track import end_trackers, start_trackers
from trainer.validate import Looks
from trainer.workers import begin_anew, loss_scale, new_accelerator

_LOOKED_AT = 8
"""Prompts of a look where the recipe names none."""


@explains_memory(explain_training)
def train(recipe: TrainerRecipe, data: Data | Mapping[Phase, Data], folder: Path, seed: int) -> None:
    """Train both phases on a data set or a mixture of several, each on its own where `data` are by phase; leaves
    `folder/data.json`, `folder/PHASE/unet` and `folder/PHASE/metrics.jsonl`.

    Run it again after a crash: finished phases are kept, the interrupted one goes on from its checkpoint. Raises OutOfMemory where
    the recipe needs more memory than there is.
    """
    torch.set_num_threads(recipe.threads)
    quiet()
    if recipe.distill.steps and recipe.distill.lora:
        require_peft()  # before the hours of phase 1
    accelerator = new_accelerator(recipe.mixed_precision, recipe.trackers)
    scale = loss_scale(accelerator)
    pipeline = open_pipeline(recipe.teacher, recipe.allow_pickle)
    teacher: Any = pipeline.unet.requires_grad_(False).eval()
    refuse_misfit(teacher, pipeline, f"the UNet of {recipe.teacher}", "Use a teacher whose parts belong together")
    if recipe.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    flip_seed = seed if recipe.random_flip else None
    encoder = Encoder(pipeline, recipe.size_px, accelerator.device, recipe.cache_latents, flip_seed)
    streams = Streams(recipe, data, _encoders_of(recipe, data, pipeline), folder, seed, accelerator)
    for told in streams.told():
        accelerator.print(told)
    schedule = schedule_of(pipeline).to(accelerator.device)
    start_trackers(accelerator, recipe.trackers, folder, recipe.model_dump(mode="json"))
    for phase in PHASES:
        settings: AdaptRecipe | DistillRecipe = getattr(recipe, phase)
        done = folder / phase / "unet"
        if settings.steps == 0:
            continue
        if is_finished(folder, phase):
            _tidy(recipe, folder / phase, accelerator)  # a kill may have left them
            continue
        stream = streams[phase]
        student: Any = student_for(phase, recipe, pipeline, folder)
        if isinstance(settings, DistillRecipe) and settings.teacher:
            teacher = teacher_of(settings.teacher, student, pipeline, recipe.allow_pickle)
        if isinstance(settings, DistillRecipe) and settings.guidance_input:
            student = add_guidance_input(student)
        # Cut first, halve then: the student gets the teacher's full numbers. Channels last is what convolutions are fastest with.
        if (
            settings.optimiser != "adamw-8bit"
        ):  # it walks its moments as they lie in memory, and they would come back otherwise
            student.to(memory_format=torch.channels_last)
        if not is_sharded(teacher):
            teacher.to(accelerator.device, getattr(torch, recipe.teacher_dtype), memory_format=torch.channels_last)
        if recipe.sharding == "all" and accelerator.num_processes > 1:
            shard(teacher)
        if recipe.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        partner, lora = None, None
        hooks = contextlib.ExitStack()
        if isinstance(settings, AdaptRecipe):
            loss_at: LossAt = _adapt_loss(settings, recipe, teacher, student, encoder, stream, schedule, seed, hooks)
        else:
            lora, opponent = settings.lora, None
            if lora:
                student = add_lora(student, lora, seed_of(seed, "lora", 0))
            if settings.adversarial:
                opponent = Opponent(settings.adversarial, teacher, schedule, seed_of(seed, "heads", 0))
                partner = Partner(opponent, settings.adversarial.learning_rate)
            loss_at = Distillation(settings, teacher, encoder, stream, schedule, seed, opponent)
        looks = _looks(recipe, phase, settings, pipeline, stream, accelerator)
        sharded = recipe.sharding != "none"
        identity = training_identity(recipe, phase, seed, stream.identity())
        with hooks:
            average: Any = fit(
                phase,
                settings,
                identity,
                student,
                loss_at,
                folder / phase,
                accelerator,
                partner,
                looks,
                sharded,
                recipe.checkpoints,
            )
        if accelerator.is_main_process:
            average.to(memory_format=torch.contiguous_format)
            if lora:
                publish_folder(folder / phase / LORA, lambda place, unet=average: save_lora(unet, place))
                merge_lora(average)
            publish_folder(done, average.save_pretrained)
        _tidy(recipe, folder / phase, accelerator)
        accelerator.wait_for_everyone()
        del student, average, loss_at, partner, looks
        begin_anew(accelerator, scale)
    end_trackers(accelerator)
    streams.close()


def _tidy(recipe: TrainerRecipe, phase: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process and not recipe.checkpoints.keep_after:
        forget_checkpoints(phase)


def _encoders_of(recipe: TrainerRecipe, data: Data | Mapping[Phase, Data], pipeline: Any) -> str | None:
    """The digest by which encodings beside the shards are known, where there are any to read."""
    sources = [source for some in sources_of_phases(recipe, data).values() for source in some]
    cached = recipe.encodings == "auto" and any(has_encodings(source.folder) for source in sources)
    if cached and recipe.random_flip:
        raise RecipeError(
            "the data set has encodings, which hold each picture one way round, and pictures are to be mirrored",
            where="trainer.random_flip",
            remedy="Set trainer.encodings=ignore to encode in training, or leave random_flip out",
        )
    return encoders_digest(pipeline, recipe.size_px) if cached else None


def _looks(
    recipe: TrainerRecipe,
    phase: str,
    settings: PhaseRecipe,
    pipeline: Any,
    stream: MixedStream,
    accelerator: Accelerator,
) -> Looks | None:
    """How this phase is looked at on its way, if the recipe says that it is."""
    validation = recipe.validation
    if validation is None or phase not in validation.phases:
        return None
    prompts = validation.prompts or recipe.grid_prompts or stream.first_prompts(_LOOKED_AT)
    if isinstance(settings, DistillRecipe):
        grid = {"ddim_steps": settings.ddim_steps, "phases": settings.phases}
        scale = validation.guidance if settings.guidance_input else 1.0
        plans = [(steps, scale) for steps in validation.steps]
        return Looks(validation, prompts, plans, lambda unet: as_student(pipeline, unet, **grid), accelerator.device)

    def many_steps(unet: UNet2DConditionModel) -> Any:
        drawn: Any = as_teacher(pipeline, unet)
        drawn.scheduler = DPMSolverMultistepScheduler.from_config(drawn.scheduler.config)
        return drawn

    return Looks(validation, prompts, [(validation.adapt_steps, validation.guidance)], many_steps, accelerator.device)


def _adapt_loss(
    settings: AdaptRecipe,
    recipe: TrainerRecipe,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    encoder: Encoder,
    stream: MixedStream,
    schedule: NoiseSchedule,
    seed: int,
    hooks: contextlib.ExitStack,
) -> LossAt:
    """`hooks` takes what must be closed when the phase ends: the teacher goes on to the next one, and would hold features for nobody."""
    assert recipe.student != "whole"  # the recipe sees to it that nothing is adapted then
    names = feature_names(len(teacher.config["block_out_channels"]), teacher.config["layers_per_block"], recipe.student)
    own, theirs = Features(student, names[0]), Features(teacher, names[1])
    hooks.callback(own.close)
    hooks.callback(theirs.close)

    def loss_at(model: UNet2DConditionModel, _average: Average, step: int, share: slice) -> torch.Tensor:
        draw = generator(seed, "adapt", step)
        clean, examples = read_batch(stream, encoder, step, settings.batch_images, share)
        empty = torch.rand(settings.batch_images, generator=draw)[share] < settings.empty_prompt_share
        text = encoder.texts_of(examples, empty.tolist())
        noise = torch.randn((settings.batch_images, *clean.shape[1:]), generator=draw)[share].to(clean.device)
        t = torch.randint(0, len(schedule.alpha), (settings.batch_images,), generator=draw)[share].to(clean.device)
        noisy = schedule.add_noise(clean, noise, t)
        with torch.no_grad():
            wanted = denoiser(teacher, teacher.dtype)(noisy, t, text)
        said = model(noisy, t, text, return_dict=False)[0]
        task = F.mse_loss(said.float(), schedule.target(clean, noise, t).float())
        output = F.mse_loss(said.float(), wanted.float())
        features = feature_loss(own.take(need_grad=True), theirs.take())
        # One transfer for all three; the log asks for them anyway.
        parts = torch.stack([task.detach(), output.detach(), features.detach()]).tolist()
        notes.update({name: round(value, 6) for name, value in zip(("task", "output", "features"), parts, strict=True)})
        return settings.task_weight * task + settings.output_weight * output + settings.feature_weight * features

    notes: dict[str, float] = {}
    loss_at.notes = notes  # pyright: ignore[reportFunctionMemberAccess]
    return loss_at
