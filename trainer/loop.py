"""Both phases of training, top to bottom: adapt (BK-SDM feature distillation), then distill (LCM from the large teacher).

Every rank draws the noise, timesteps and batches of the whole global batch from the step number and takes its slice, so any
number of workers trains on the same numbers and a resumed run repeats nothing and skips nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F

from cluster.cache import RemoteFolder
from cluster.errors import EdgeFusionError, StageError
from cluster.recipe import recipe_digest
from cluster.storage import publish_bytes, publish_folder
from factory.models import quiet, resolve
from trainer.adversary import Opponent
from trainer.distill import Distillation, denoiser
from trainer.draws import generator, read_batch, seed_of
from trainer.encodings import encoders_digest, has_encodings
from trainer.features import Features, feature_names
from trainer.fit import STATE, LossAt, Partner, fit, new_accelerator
from trainer.guidance import add_guidance_input, takes_guidance
from trainer.latents import Encoder
from trainer.lora import add_lora, merge_lora, require_peft, save_lora
from trainer.losses import NoiseSchedule, feature_loss
from trainer.mix import MixedStream, Source, as_sources
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe
from trainer.state import Average
from trainer.surgery import SurgeryError, build_student, student_config
from trainer.track import end_trackers, start_trackers

PHASES = ("adapt", "distill")
DATA = "data.json"
"""What a training draws from: data sets, shares, encodings, samples that could not be read."""
LORA = "lora"


def train(recipe: TrainerRecipe, data: Path | RemoteFolder | Sequence[Source], folder: Path, seed: int) -> None:
    """Train both phases on a data set or a mixture of several; leaves `folder/data.json`, `folder/PHASE/unet` and `folder/PHASE/metrics.jsonl`.

    Run it again after a crash: finished phases are kept, the interrupted one goes on from its checkpoint.
    """
    torch.set_num_threads(recipe.threads)
    quiet()
    if recipe.distill.steps and recipe.distill.lora:
        require_peft()  # before the hours of phase 1
    accelerator = new_accelerator(recipe.mixed_precision, recipe.trackers)
    pipeline = open_pipeline(recipe.teacher)
    teacher: Any = pipeline.unet.requires_grad_(False).eval()
    refuse_misfit(teacher, pipeline, f"the UNet of {recipe.teacher}", "Use a teacher whose parts belong together")
    encoder = Encoder(pipeline, recipe.size_px, accelerator.device, recipe.cache_latents)
    stream = _open_stream(recipe, as_sources(data), pipeline, folder, seed, accelerator)
    digest = hashlib.sha256(f"{recipe_digest(recipe)} {stream.digest()}".encode()).hexdigest()
    for told in stream.told():
        accelerator.print(told)
    schedule = schedule_of(pipeline).to(accelerator.device)
    start_trackers(accelerator, recipe.trackers, folder, recipe.model_dump(mode="json"))
    for phase in PHASES:
        settings: AdaptRecipe | DistillRecipe = getattr(recipe, phase)
        done = folder / phase / "unet"
        if settings.steps == 0 or done.exists():
            continue
        student: Any = _student_for(phase, recipe, pipeline, folder)
        if isinstance(settings, DistillRecipe) and settings.teacher:
            teacher = _teacher_of(settings.teacher, student, pipeline)
        if isinstance(settings, DistillRecipe) and settings.guidance_input:
            student = add_guidance_input(student)
        # Cut first, halve then: the student gets the teacher's full numbers. Channels last is what convolutions are fastest with.
        student.to(memory_format=torch.channels_last)
        teacher.to(accelerator.device, getattr(torch, recipe.teacher_dtype), memory_format=torch.channels_last)
        if recipe.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        partner, lora = None, None
        if isinstance(settings, AdaptRecipe):
            loss_at: LossAt = _adapt_loss(settings, recipe, teacher, student, encoder, stream, schedule, seed)
        else:
            lora, opponent = settings.lora, None
            if lora:
                student = add_lora(student, lora, seed_of(seed, "lora", 0))
            if settings.adversarial:
                opponent = Opponent(settings.adversarial, teacher, schedule, seed_of(seed, "heads", 0))
                partner = Partner(opponent, settings.adversarial.learning_rate)
            loss_at = Distillation(settings, teacher, encoder, stream, schedule, seed, opponent)
        average: Any = fit(phase, settings, digest, student, loss_at, folder / phase, accelerator, partner)
        if accelerator.is_main_process:
            average.to(memory_format=torch.contiguous_format)
            if lora:
                publish_folder(folder / phase / LORA, lambda place, unet=average: save_lora(unet, place))
                merge_lora(average)
            publish_folder(done, average.save_pretrained)
            (folder / phase / STATE).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    end_trackers(accelerator)
    stream.close()


def _open_stream(
    recipe: TrainerRecipe, sources: Sequence[Source], pipeline: Any, folder: Path, seed: int, accelerator: Accelerator
) -> MixedStream:
    """The samples of this training; `folder/data.json` says what they are and, from here on, which could not be read."""
    cached = recipe.encodings == "auto" and any(
        isinstance(source.folder, Path) and has_encodings(source.folder) for source in sources
    )
    encoders = encoders_digest(pipeline, recipe.size_px) if cached else None
    main = accelerator.is_main_process
    stream = MixedStream(sources, seed, main, encoders, recipe.on_corrupt, recipe.max_corrupt_share)
    if (folder / DATA).exists():
        stream.recall(json.loads((folder / DATA).read_text()))
    if accelerator.num_processes > 1:
        stream.gather = gather_object

    def publish() -> None:
        if main:
            publish_bytes(folder / DATA, (json.dumps(stream.facts(), indent=2) + "\n").encode())

    accelerator.wait_for_everyone()  # all have read the old file before there is a new one
    publish()
    stream.on_skip = publish
    stream.settle()
    return stream


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


def refuse_misfit(unet: Any, pipeline: Any, what: str, remedy: str) -> None:
    """Raises StageError for a UNet that cannot read the pipeline's text states or draw its VAE's latents."""
    config, text = unet.config, pipeline.text_encoder.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    widths = set(width) if isinstance(width, list | tuple) else {width}
    if widths != {text.hidden_size}:
        raise StageError(
            f"{what} reads text states of width {', '.join(map(str, sorted(widths)))}, and the text encoder makes {text.hidden_size}",
            remedy=remedy,
        )
    channels = pipeline.vae.config.latent_channels
    if {config.in_channels, config.out_channels} != {channels}:
        raise StageError(
            f"{what} takes latents of {config.in_channels} channels and gives {config.out_channels}, and the VAE's have {channels}",
            remedy=remedy,
        )


def _student_for(phase: str, recipe: TrainerRecipe, pipeline: Any, folder: Path) -> UNet2DConditionModel:
    before = folder / "adapt" / "unet"
    if phase == "distill" and before.exists():
        return UNet2DConditionModel.from_pretrained(before)
    teacher = pipeline.unet
    try:
        if recipe.start is None:
            return build_student(teacher, recipe.student).float()
        wanted = student_config(dict(teacher.config), recipe.student)
    except SurgeryError as error:
        raise StageError(
            f"{recipe.teacher} cannot be cut: {error}", remedy="Choose another trainer.student or teacher"
        ) from error
    student: Any = open_unet(recipe.start)
    out = "Leave trainer.start out to cut the student from the teacher"
    if list(student.config["block_out_channels"]) != list(wanted["block_out_channels"]):
        raise StageError(f"trainer.start {recipe.start} is no {recipe.student} student of {recipe.teacher}", remedy=out)
    refuse_misfit(student, pipeline, f"trainer.start {recipe.start}", out)
    if phase == "distill" and takes_guidance(student) and not recipe.distill.guidance_input:
        raise StageError(
            f"trainer.start {recipe.start} takes guidance as an input",
            remedy="Set trainer.distill.guidance_input=true with guidance_min below guidance_max, or start from another",
        )
    return student.float()


def _teacher_of(name: str, student: UNet2DConditionModel, pipeline: Any) -> Any:
    """The UNet that phase 2 learns from where the recipe names one."""
    if name == "student":
        teacher: Any = copy.deepcopy(student)
    else:
        teacher = open_unet(name)
        refuse_misfit(
            teacher, pipeline, f"trainer.distill.teacher {name}", "Leave it out to learn from trainer.teacher"
        )
    return teacher.requires_grad_(False).eval()


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
        return task + settings.output_weight * output + settings.feature_weight * features

    return loss_at
