"""Both phases of training, top to bottom: adapt (BK-SDM feature distillation), then distill (LCM from the large teacher).

Every rank draws the noise, timesteps and batches of the whole global batch from the step number and takes its slice, so any
number of workers trains on the same numbers and a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F

from cluster.cache import RemoteFolder
from cluster.errors import EdgeFusionError, StageError
from cluster.recipe import recipe_digest
from cluster.storage import publish_bytes, publish_folder
from factory.models import quiet, resolve
from trainer.encodings import encoders_digest, has_encodings
from trainer.features import Features, feature_names
from trainer.fit import STATE, LossAt, fit, new_accelerator
from trainer.latents import Encoder
from trainer.losses import Denoiser, NoiseSchedule, feature_loss, lcm_loss
from trainer.mix import MixedStream, Source, as_sources
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe
from trainer.state import Average
from trainer.stream import Example
from trainer.surgery import SurgeryError, build_student, student_config

PHASES = ("adapt", "distill")
DATA = "data.json"
"""What a training draws from: data sets, shares, encodings."""


def train(recipe: TrainerRecipe, data: Path | RemoteFolder | Sequence[Source], folder: Path, seed: int) -> None:
    """Train both phases on a data set or a mixture of several; leaves `folder/data.json`, `folder/PHASE/unet` and `folder/PHASE/metrics.jsonl`.

    Run it again after a crash: finished phases are kept, the interrupted one goes on from its checkpoint.
    """
    torch.set_num_threads(recipe.threads)
    quiet()
    accelerator = new_accelerator(recipe.mixed_precision)
    pipeline = open_pipeline(recipe.teacher)
    teacher: Any = pipeline.unet.requires_grad_(False).eval()
    encoder = Encoder(pipeline, recipe.size_px, accelerator.device, recipe.cache_latents)
    sources = as_sources(data)
    cached = recipe.encodings == "auto" and any(
        isinstance(source.folder, Path) and has_encodings(source.folder) for source in sources
    )
    encoders = encoders_digest(pipeline, recipe.size_px) if cached else None
    stream = MixedStream(sources, seed, accelerator.is_main_process, encoders)
    digest = hashlib.sha256(f"{recipe_digest(recipe)} {stream.digest()}".encode()).hexdigest()
    if accelerator.is_main_process:
        publish_bytes(folder / DATA, (json.dumps(stream.facts(), indent=2) + "\n").encode())
    for told in stream.told():
        accelerator.print(told)
    schedule = schedule_of(pipeline).to(accelerator.device)
    for phase in PHASES:
        settings: AdaptRecipe | DistillRecipe = getattr(recipe, phase)
        done = folder / phase / "unet"
        if settings.steps == 0 or done.exists():
            continue
        student: Any = _student_for(phase, recipe, teacher, folder)
        # Cut first, halve then: the student gets the teacher's full numbers. Channels last is what convolutions are fastest with.
        student.to(memory_format=torch.channels_last)
        teacher.to(accelerator.device, getattr(torch, recipe.teacher_dtype), memory_format=torch.channels_last)
        if recipe.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if isinstance(settings, AdaptRecipe):
            loss_at = _adapt_loss(settings, recipe, teacher, student, encoder, stream, schedule, seed)
        else:
            loss_at = _distill_loss(settings, teacher, encoder, stream, schedule, seed)
        average: Any = fit(phase, settings, digest, student, loss_at, folder / phase, accelerator)
        if accelerator.is_main_process:
            publish_folder(done, average.to(memory_format=torch.contiguous_format).save_pretrained)
            (folder / phase / STATE).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    stream.close()


def open_pipeline(model: str) -> Any:
    """A StableDiffusionPipeline (or one of its kin) in float32; raises StageError."""
    try:
        return DiffusionPipeline.from_pretrained(resolve(model), dtype=torch.float32, safety_checker=None)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model} cannot be opened: {str(error).splitlines()[0]}",
            remedy="Give a diffusers pipeline folder; hub names need a network or a filled cache",
        ) from error


def open_unet(model: str) -> UNet2DConditionModel:
    """The UNet of a pipeline, or of a folder that holds nothing but a UNet; float32."""
    place = Path(resolve(model))
    if (place / "config.json").exists() and not (place / "model_index.json").exists():
        return UNet2DConditionModel.from_pretrained(place, dtype=torch.float32)
    return open_pipeline(model).unet


def schedule_of(pipeline: Any) -> NoiseSchedule:
    """The training schedule and prediction type of a pipeline's scheduler."""
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise StageError(f"the teacher predicts {prediction}", remedy="Use a teacher of epsilon or v_prediction")
    return NoiseSchedule.from_alphas_cumprod(pipeline.scheduler.alphas_cumprod, prediction)


def final_unet(folder: Path) -> Path:
    """The UNet of the last phase that ran."""
    for phase in reversed(PHASES):
        if (folder / phase / "unet").exists():
            return folder / phase / "unet"
    raise EdgeFusionError(
        "no phase was trained", where=str(folder), remedy="Set trainer.adapt.steps or trainer.distill.steps"
    )


def _student_for(
    phase: str, recipe: TrainerRecipe, teacher: UNet2DConditionModel, folder: Path
) -> UNet2DConditionModel:
    before = folder / "adapt" / "unet"
    if phase == "distill" and before.exists():
        return UNet2DConditionModel.from_pretrained(before)
    try:
        if recipe.start is None:
            return build_student(teacher, recipe.student).float()
        wanted = student_config(dict(teacher.config), recipe.student)
    except SurgeryError as error:
        raise StageError(
            f"{recipe.teacher} cannot be cut: {error}", remedy="Choose another trainer.student or teacher"
        ) from error
    student = open_unet(recipe.start)
    if list(student.config["block_out_channels"]) != list(wanted["block_out_channels"]):
        raise StageError(
            f"trainer.start {recipe.start} is no {recipe.student} student of {recipe.teacher}",
            remedy="Leave trainer.start out to cut the student from the teacher",
        )
    return student.float()


def _adapt_loss(
    settings: AdaptRecipe,
    recipe: TrainerRecipe,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    encoder: Encoder,
    stream: MixedStream,
    schedule: NoiseSchedule,
    seed: int,
) -> LossAt:
    names = feature_names(len(teacher.config["block_out_channels"]), teacher.config["layers_per_block"], recipe.student)
    own, theirs = Features(student, names[0]), Features(teacher, names[1])

    def loss_at(model: UNet2DConditionModel, _average: Average, step: int, share: slice) -> torch.Tensor:
        draw = _generator(seed, "adapt", step)
        clean, examples = _batch(stream, encoder, step, settings.batch_images, share)
        empty = torch.rand(settings.batch_images, generator=draw)[share] < settings.empty_prompt_share
        text = encoder.texts_of(examples, empty.tolist())
        noise = torch.randn((settings.batch_images, *clean.shape[1:]), generator=draw)[share].to(clean.device)
        t = torch.randint(0, len(schedule.alpha), (settings.batch_images,), generator=draw)[share].to(clean.device)
        noisy = schedule.add_noise(clean, noise, t)
        with torch.no_grad():
            wanted = _denoiser(teacher, teacher.dtype)(noisy, t, text)
        said = model(noisy, t, text, return_dict=False)[0]
        task = F.mse_loss(said.float(), schedule.target(clean, noise, t).float())
        output = F.mse_loss(said.float(), wanted.float())
        features = feature_loss(own.take(need_grad=True), theirs.take())
        return task + settings.output_weight * output + settings.feature_weight * features

    return loss_at


def _distill_loss(
    settings: DistillRecipe,
    teacher: UNet2DConditionModel,
    encoder: Encoder,
    stream: MixedStream,
    schedule: NoiseSchedule,
    seed: int,
) -> LossAt:
    timesteps = len(schedule.alpha)
    skip = timesteps // settings.ddim_steps

    def loss_at(model: UNet2DConditionModel, average: Average, step: int, share: slice) -> torch.Tensor:
        draw, batch = _generator(seed, "distill", step), settings.batch_images
        clean, examples = _batch(stream, encoder, step, batch, share)
        noise = torch.randn((batch, *clean.shape[1:]), generator=draw)[share].to(clean.device)
        t = (torch.randint(1, settings.ddim_steps + 1, (batch,), generator=draw) * skip - 1)[share].to(clean.device)
        spread = settings.guidance_max - settings.guidance_min
        w = (settings.guidance_min + spread * torch.rand(batch, generator=draw))[share].to(clean.device)
        return lcm_loss(
            schedule,
            _denoiser(model),
            _denoiser(average.model),
            _denoiser(teacher, teacher.dtype),
            schedule.add_noise(clean, noise, t),
            t,
            skip,
            w,
            encoder.texts_of(examples),
            encoder.texts([""] * len(examples)),
            settings.huber_c,
        )

    return loss_at


def _denoiser(unet: UNet2DConditionModel, dtype: torch.dtype | None = None) -> Denoiser:
    """The UNet as the equations want it; `dtype` is its weights' where that is not the latents'."""

    def predict(noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        said = unet(noisy.to(dtype or noisy.dtype), t, text.to(dtype or text.dtype), return_dict=False)[0]
        return said.to(noisy.dtype)

    return predict


def _batch(
    stream: MixedStream, encoder: Encoder, step: int, batch: int, share: slice
) -> tuple[torch.Tensor, list[Example]]:
    """Clean latents B C H W and the samples of this rank."""
    examples = [stream.read(row) for row in stream.batch_rows(step, batch)[share]]
    return encoder.latents(examples), examples


def _generator(seed: int, phase: str, step: int) -> torch.Generator:
    """Random numbers that depend on the seed, the phase and the step, and on nothing else."""
    key = hashlib.sha256(f"{seed}/{phase}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
