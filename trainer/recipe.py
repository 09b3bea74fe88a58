"""The trainer's part of a recipe: the teacher, the student's shape and start, and the two phases."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cluster.recipe import Settings
from cluster.runner import ClusterRecipe
from factory.recipe import OpenClipScorer
from factory.recipe.names import AllowPickle
from trainer.options import (
    PHASES,
    AdversarialRecipe,
    CheckpointRecipe,
    DataRecipe,
    LoraRecipe,
    OnCorrupt,
    Phase,
    Sharding,
    Tracker,
    ValidationRecipe,
)

POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends."""


class PhaseRecipe(Settings):
    """What both phases share."""

    steps: int = Field(ge=0, description="optimiser steps; 0 leaves the phase out")
    batch_images: int = Field(ge=1, description="global batch, images; the same samples for any number of workers")
    learning_rate: float = Field(gt=0, description="AdamW's, constant after warm-up unless `cosine`")
    cosine: bool = Field(
        default=False, description="let the learning rate fall to a fiftieth along a cosine over `steps`"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"] = Field(
        default="constant",
        description="how the learning rate falls after warm-up, by diffusers' schedules of these names, which end at 0 (`polynomial` at 1e-7); "
        "`constant` leaves it to `cosine`",
    )
    schedule_cycles: int = Field(default=1, ge=1, description="of `cosine-with-restarts`")
    schedule_power: float = Field(default=1.0, gt=0, description="exponent of `polynomial`")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    adam_beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's")
    ema_decay: float = Field(
        default=0.95, ge=0, lt=1, description="decay of the moving average that is saved as the student"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    accumulation: int = Field(
        default=1,
        ge=1,
        description="parts in which a worker's share of a batch is computed, one after the other: less memory",
    )
    optimiser: Literal["adamw", "adamw-foreach", "adamw-8bit"] = Field(
        default="adamw",
        description="`adamw` (fused), `adamw-foreach`, or `adamw-8bit` (bitsandbytes, extra `eight-bit`: a quarter of the state's memory)",
    )
    compile_backend: str | None = Field(
        default=None,
        description="torch.compile the student with this backend, such as inductor; not compiled if left out",
    )
    checkpoint_s: float = Field(default=60.0, gt=0, description="seconds between checkpoints: what a crash can cost")
    spike_factor: float = Field(
        default=10.0, gt=1, description="a loss this many times the median of the last 100 is a spike"
    )
    on_spike: Literal["stop", "rollback"] = Field(
        default="stop",
        description="at a spike or a loss that is not a number: `stop`, or `rollback` to the last checkpoint and past the batches since",
    )

    @model_validator(mode="after")
    def _one_schedule(self) -> PhaseRecipe:
        if self.cosine and self.schedule != "constant":
            raise ValueError(
                f"cosine (to a fiftieth) and schedule {self.schedule} are two ways for one learning rate; keep one"
            )
        if self.schedule == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(f"schedule polynomial ends at {POLYNOMIAL_END}; learning_rate must lie above it")
        if self.schedule != "constant" and 0 < self.steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) leaves schedule {self.schedule} none of {self.steps} steps; lower it"
            )
        return self


class StudentPhaseRecipe(PhaseRecipe):
    """What both phases of a student share."""

    data: DataRecipe | None = Field(
        default=None,
        description="what this phase alone is trained on, in place of trainer.own_view, own_weight and more_data, none of which it takes over; "
        "what they say if left out",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_left_out(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A recipe without the key is to the byte what it was before there was one, and so is its digest.
        return {name: value for name, value in whole(self).items() if name != "data" or value is not None}


class AdaptRecipe(StudentPhaseRecipe):
    """Phase 1: feature distillation (BK-SDM)."""

    task_weight: float = Field(default=1.0, ge=0, description="weight of the error against the noise itself")
    output_weight: float = Field(default=1.0, ge=0, description="weight of the error against the teacher's output")
    feature_weight: float = Field(default=1.0, ge=0, description="weight of the six feature errors")
    empty_prompt_share: float = Field(
        default=0.1, ge=0, lt=1, description="share of samples trained without their prompt"
    )


class DistillRecipe(StudentPhaseRecipe):
    """Phase 2: latent consistency distillation (LCM) from the large teacher."""

    empty_prompt_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of samples trained without their prompt"
    )
    ddim_steps: int = Field(
        default=50, ge=2, le=1000, description="solver grid; one step spans 1000 / ddim_steps timesteps"
    )
    guidance_min: float = Field(default=5.0, ge=0, description="least w; a pipeline's guidance scale is w + 1")
    guidance_max: float = Field(
        default=5.0, ge=0, description="largest w; a student without guidance input wants it fixed"
    )
    guidance_input: bool = Field(
        default=False,
        description="give the student w as an input, by a projection that starts at zero; pipelines then take guidance_scale = w + 1",
    )
    loss: Literal["pseudo-huber", "l2"] = Field(default="pseudo-huber", description="distance of student and target")
    huber_c: float = Field(default=0.001, gt=0, description="pseudo-Huber constant; `l2` has none")
    target: Literal["average", "student"] = Field(
        default="average",
        description="the network at the earlier timestep: the moving average (`ema_decay`), or the student itself without gradient",
    )
    teacher: str | None = Field(
        default=None,
        description="UNet or pipeline folder that this phase learns from; `student` is a frozen copy of the student as the phase begins; "
        "trainer.teacher's large UNet if left out",
    )
    phases: int | None = Field(
        default=None,
        ge=1,
        description="phased consistency (PCM): sub-intervals of the trajectory, each with its own boundary; draw with as many steps or a "
        "multiple. One interval down to the clean picture (LCM) if left out",
    )
    adversarial: AdversarialRecipe | None = Field(
        default=None, description="adversarial consistency on the frozen teacher's features; none if left out"
    )
    lora: LoraRecipe | None = Field(default=None, description="train low-rank adapters; full weights if left out")

    @model_validator(mode="after")
    def _fits(self) -> DistillRecipe:
        if self.guidance_max < self.guidance_min:
            raise ValueError(f"guidance_max ({self.guidance_max}) is below guidance_min ({self.guidance_min})")
        if self.phases and self.ddim_steps % self.phases:
            raise ValueError(
                f"phases ({self.phases}) does not divide ddim_steps ({self.ddim_steps}), so edges would lie between steps; "
                "for 4 or 8 phases choose ddim_steps 40"
            )
        if self.guidance_input and self.guidance_max == self.guidance_min:
            raise ValueError(
                f"guidance_input is on and w is always {self.guidance_min}; raise guidance_max or leave guidance_input out"
            )
        if self.guidance_input and self.lora:
            raise ValueError("lora trains no new layer, and guidance_input needs one; leave one of the two out")
        return self


class TrainerRecipe(DataRecipe):
    """shards -> student."""

    teacher: str = Field(
        description="diffusers pipeline folder, hub name or zoo:NAME; the large UNet both phases learn from"
    )
    allow_pickle: AllowPickle = False
    student: Literal["base", "small", "tiny", "whole"] = Field(
        default="tiny",
        description="BK-SDM size cut from the teacher, or `whole`: a student as large as its teacher, which phase 2 alone makes few-step",
    )
    start: str | None = Field(
        default=None,
        description="pipeline or UNet folder the student starts from; the teacher's own blocks if left out",
    )
    size_px: int = Field(ge=32, le=1024, multiple_of=8, description="training resolution, pixels")
    encodings: Literal["auto", "ignore"] = Field(
        default="auto",
        description="latents and text states that `trainer encode` put beside the shards: `auto` reads them where they are and refuses stale "
        "ones, `ignore` encodes in training",
    )
    random_flip: bool = Field(
        default=False,
        description="mirror every second picture, left to right, at random; not with encodings, which hold one way. Texts that say left or right "
        "become wrong",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Accelerate's")
    tf32: bool = Field(
        default=False, description="let GPUs multiply float32 matrices with 10 bits of mantissa (TF32): faster, rounded"
    )
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the frozen teacher's weights; a half type halves their memory and its time"
    )
    on_corrupt: OnCorrupt = Field(
        default="stop",
        description="at a missing or damaged shard: `stop`, or `skip` its damaged samples; one of a data set by URL stops always. A sample of a "
        "sound shard that is no picture is skipped either way",
    )
    max_corrupt_share: float = Field(
        default=0.05, ge=0, le=1, description="share of all samples that may be skipped; more ends the training"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations to save memory")
    trackers: list[Tracker] = Field(
        default=[],
        description="also log to `mlflow` or `wandb`, into files below the training; TensorBoard is always there",
    )
    sharding: Sharding = Field(
        default="none",
        description="what several workers cut up among themselves instead of each holding all of it (FSDP): the `student` with its average and "
        "optimiser's state, or `all`, the teacher too",
    )
    validation: ValidationRecipe | None = Field(
        default=None, description="pictures and scores on the way; none if left out"
    )
    checkpoints: CheckpointRecipe = Field(
        default=CheckpointRecipe(), description="how often a phase is saved, and what of that stays"
    )
    loaders: int = Field(
        default=2,
        ge=0,
        description="threads of each worker that read and decode the next step's samples during this one; 0 reads them when they are wanted",
    )
    cache_latents: bool = Field(
        default=False, description="keep encoded pictures and prompts in memory after first use"
    )
    threads: int = Field(default=2, ge=1, description="CPU threads a training worker")
    adapt: AdaptRecipe
    distill: DistillRecipe
    grid_prompts: list[str] = Field(
        default=[], description="prompts of the 1/2/4-step grid; from the data set if empty"
    )
    grid_seed: int = Field(default=1, description="first seed of the grid")
    judge: OpenClipScorer | None = Field(
        default=None,
        description="scores the grid; name one that did not filter the data: a student takes after its filter, so the filter, "
        "used if this is left out, flatters it",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_left_out(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As a phase's `data`.
        plain = self.checkpoints == CheckpointRecipe()
        return {name: value for name, value in whole(self).items() if name != "checkpoints" or not plain}

    def phases_run(self) -> list[Phase]:
        """Those that have steps, in order."""
        return [name for name in PHASES if getattr(self, name).steps]

    def data_of(self, phase: Phase) -> tuple[DataRecipe, str]:
        """What `phase` is trained on, and the key under which the recipe says so."""
        own = self.distill.data if phase == "distill" else self.adapt.data
        return (self, "trainer") if own is None else (own, f"trainer.{phase}.data")

    @model_validator(mode="after")
    def _all_data_are_read(self) -> TrainerRecipe:
        if any(getattr(self, phase).data is None for phase in self.phases_run()):
            return self
        for name in DataRecipe.model_fields:
            if getattr(self, name) != DataRecipe.model_fields[name].default:
                raise ValueError(
                    f"{name} says what phases without data of their own read, and {' and '.join(f'{phase}.data' for phase in self.phases_run())} "
                    "name theirs, so nothing reads it; "
                    f"move it there or take it out (--set ~trainer.{name})"
                )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TrainerRecipe:
        if self.distill.lora and self.distill.steps and not self.adapt.steps and self.start is None:
            raise ValueError(
                "distill.lora needs a student to sit on, and the bare cut is none; set adapt.steps or name a `start`"
            )
        return self

    @model_validator(mode="after")
    def _whole_has_nothing_to_adapt(self) -> TrainerRecipe:
        if self.student == "whole" and self.adapt.steps:
            raise ValueError("student is whole, so nothing was cut that phase 1 could mend; set adapt.steps to 0")
        return self

    @model_validator(mode="after")
    def _shards_fit(self) -> TrainerRecipe:
        if self.sharding == "none":
            return self
        if self.mixed_precision == "fp16":
            raise ValueError(
                "sharding and mixed_precision fp16 do not go together: its scaler knows whole gradients; set bf16"
            )
        for name in ("adapt", "distill"):
            phase: PhaseRecipe = getattr(self, name)
            if phase.optimiser == "adamw-8bit" or phase.compile_backend:
                raise ValueError(
                    f"sharding takes neither {name}.optimiser adamw-8bit nor {name}.compile_backend; leave them out"
                )
        if self.distill.adversarial or self.distill.lora:
            raise ValueError("sharding takes neither distill.adversarial nor distill.lora; leave one of them out")
        return self


class DecoderFit(PhaseRecipe):
    """How a small decoder learns."""

    steps: int = Field(default=20000, ge=1, description="optimiser steps")
    batch_images: int = Field(default=16, ge=1, description="global batch, images")
    learning_rate: float = Field(default=2e-3, gt=0, description="AdamW's, after warm-up")
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="decay of the moving average that is saved")
    cosine: bool = Field(
        default=True, description="let the learning rate fall to a fiftieth along a cosine over `steps`"
    )


class DecoderRecipe(Settings):
    """A small decoder in place of a VAE's (`edgefusion trainer decoder`)."""

    model: str = Field(default="zoo:teacher", description="pipeline or VAE folder, hub name or zoo:NAME to learn from")
    allow_pickle: AllowPickle = False
    data: str = Field(description="packed data set, or a folder of pictures; both are encoded by the model's VAE")
    size_px: int | None = Field(
        default=None, ge=32, multiple_of=8, description="edge, pixels; the VAE's own if left out"
    )
    width: int | None = Field(
        default=None,
        ge=4,
        description="channels; if left out 64 (TAESD's) or the widest multiple of 4 within `max_cost`",
    )
    blocks: list[int] = Field(default=[3, 3, 3, 1], description="residual blocks a stage, innermost first; TAESD's")
    max_cost: float = Field(
        default=0.125, gt=0, le=1, description="largest share of the original decoder's multiply-accumulates"
    )
    latent_noise: float = Field(
        default=0.1, ge=0, description="standard deviation of noise on every second latent: a UNet's are never exact"
    )
    keep_pictures: bool = Field(
        default=True,
        description="keep the original decoder's pictures on disk, 3 bytes a pixel, and not decode each time",
    )
    held_out_share: float = Field(default=0.05, gt=0, lt=1, description="share of samples that only the PSNR sees")
    seed: int = Field(default=0, ge=0, description="seed of weights, order and noise")
    threads: int = Field(default=2, ge=1, description="CPU threads")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Accelerate's")
    fit: DecoderFit = DecoderFit()


class EncodeRecipe(Settings):
    """A data set's latents and text states, made once (`edgefusion trainer encode`)."""

    data: str = Field(description="packed data set folder: shards and manifest.parquet")
    teacher: str = Field(
        default="zoo:teacher", description="pipeline folder, hub name or zoo:NAME whose encoders to use"
    )
    allow_pickle: AllowPickle = False
    size_px: int = Field(
        default=64, ge=32, le=1024, multiple_of=8, description="edge, pixels: the training's trainer.size_px"
    )
    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="of the stored numbers; float16 halves the space and rounds"
    )
    batch_images: int = Field(default=32, ge=1, description="samples encoded at once")
    workers: int = Field(default=1, ge=1, description="encoding actors")
    gpus: float = Field(default=0, ge=0, description="GPUs an actor")
    threads: int = Field(default=2, ge=1, description="CPU threads a worker")
    cluster: ClusterRecipe = Field(default=ClusterRecipe(runner="in-process"), description="where the pass runs")
