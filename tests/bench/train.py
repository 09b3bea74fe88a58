"""One distillation step of ours beside one by the formulas of diffusers' published LCM script: samples per CPU-second.

The script (examples/consistency_distillation/train_lcm_distill_sd_wds.py of diffusers) is not run here (published.py does that): its
step is written out below from what it computes, its student as large as its teacher. It encodes pictures and prompts at every step,
steps AdamW and the moving average tensor by tensor, and asks the teacher twice; its guidance embedding is left out, for our student
has none. Ours is the loop as it runs, its log and its watch included, memory format as in training. Ratios come from one run.
"""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from cluster.runner import InProcess
from factory.models import quiet
from factory.pack import Sample, pack
from factory.stages import encode_picture
from trainer.adversary import Opponent
from trainer.distill import Distillation
from trainer.encode import encode
from trainer.encodings import encoders_digest, has_encodings
from trainer.fit import Partner, _Run
from trainer.latents import Encoder
from trainer.mix import MixedStream, Source
from trainer.models import open_pipeline, schedule_of
from trainer.recipe import DistillRecipe, EncodeRecipe
from trainer.stream import ShardStream
from trainer.surgery import build_student
from trainer.workers import new_accelerator

TEACHER, SIZE_PX, BATCH = "zoo:teacher", 64, 16
WARM, RUNS = 3, 8
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


@dataclass(frozen=True)
class Ours:
    """How a row of ours trains."""

    student: str
    """`equal` to the teacher, or a BK-SDM size."""
    data: str
    """`plain`, or `encoded`: with encodings beside the shards."""
    cache: bool = False
    teacher_dtype: torch.dtype = torch.float32
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of trainer.distill."""


ROWS = {
    "equal student, encodings beside the shards": Ours("equal", "encoded"),
    "equal student, encodings, bfloat16 teacher": Ours("equal", "encoded", teacher_dtype=torch.bfloat16),
    "BK-SDM-Tiny, encoding each time": Ours("tiny", "plain"),
    "BK-SDM-Tiny, latents and texts kept": Ours("tiny", "plain", cache=True),
    "BK-SDM-Tiny, encodings beside the shards": Ours("tiny", "encoded"),
    "BK-SDM-Tiny, encodings, bfloat16 teacher": Ours("tiny", "encoded", teacher_dtype=torch.bfloat16),
    "BK-SDM-Tiny, encodings, phased": Ours("tiny", "encoded", changes={"phases": 4, "ddim_steps": 40}),
    "BK-SDM-Tiny, encodings, adversarial": Ours("tiny", "encoded", changes={"adversarial": {}}),
    "BK-SDM-Tiny, encodings, teacher as small": Ours("tiny", "encoded", changes={"teacher": "student"}),
}


def main() -> None:
    quiet()
    torch.set_num_threads(THREADS)
    pipeline = open_pipeline(TEACHER)
    pipeline.unet.requires_grad_(False).eval()
    tiny = build_student(pipeline.unet, "tiny").float()
    with tempfile.TemporaryDirectory() as scratch:
        data = {kind: write_data(Path(scratch) / kind) for kind in ("plain", "encoded")}
        settings = {"data": str(data["encoded"]), "teacher": TEACHER, "size_px": SIZE_PX, "threads": THREADS}
        began = time.process_time()
        encode(EncodeRecipe.model_validate(settings), InProcess())
        once = time.process_time() - began
        steps = {
            what: ours(
                row, pipeline, pipeline.unet if row.student == "equal" else tiny, data[row.data], Path(scratch) / what
            )
            for what, row in ROWS.items()
        }
        steps["published formulas, BK-SDM-Tiny"] = theirs(pipeline, tiny, data["plain"])
        steps["published formulas, equal student"] = theirs(pipeline, pipeline.unet, data["plain"])
        # Turn by turn, so that what else the machine does falls on all alike.
        times: dict[str, list[float]] = {what: [] for what in steps}
        for turn in range(WARM + RUNS):
            for what, step in steps.items():
                began = time.process_time()
                step()
                if turn >= WARM:
                    times[what].append(time.process_time() - began)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    sizes = f"{TEACHER}, {SIZE_PX} px, batch {BATCH}, float32, {THREADS} thread"
    table = Table(
        "distillation step",
        "samples per CPU-second (median)",
        "spread",
        "ratio",
        title=f"{sizes} · commit {commit} · {platform.machine()}, {os.cpu_count()} cores",
    )
    base = statistics.median(times["published formulas, equal student"])
    for what, found in times.items():
        rates = [BATCH / t for t in found]
        ratio = f"{base / statistics.median(found):.2f} x"
        table.add_row(what, f"{statistics.median(rates):.2f}", f"{min(rates):.2f} to {max(rates):.2f}", ratio)
    table.caption = f"trainer encode of {BATCH * 2} samples, models' loading included: {once:.1f} CPU-seconds, once"
    Console().print(table)


def write_data(folder: Path) -> Path:
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH * 2, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    pack(
        [
            Sample(hashlib.sha256(bytes([i])).hexdigest(), encode_picture(p, "png"), "png", f"a red apple {i}")
            for i, p in enumerate(pictures)
        ],
        folder,
    )
    return folder


def ours(row: Ours, pipeline: Any, student: UNet2DConditionModel, data: Path, folder: Path) -> Callable[[], None]:
    """A step of the loop as it runs."""
    common = {"steps": 10_000, "batch_images": BATCH, "learning_rate": 1e-6, "checkpoint_s": 1e9}
    settings = DistillRecipe.model_validate(common | row.changes)
    encoder = Encoder(pipeline, SIZE_PX, torch.device("cpu"), row.cache)
    encoders = encoders_digest(pipeline, SIZE_PX) if has_encodings(data) else None
    stream = MixedStream([Source(data)], encoders=encoders)
    copies: Any = [
        copy.deepcopy(model).to(memory_format=torch.channels_last)
        for model in (student if settings.teacher else pipeline.unet, student)
    ]
    teacher, own = copies[0].to(row.teacher_dtype), copies[1].requires_grad_(True).train()
    schedule, opponent, partner = schedule_of(pipeline), None, None
    if settings.adversarial:
        opponent = Opponent(settings.adversarial, teacher.requires_grad_(False), schedule, 0)
        partner = Partner(opponent, 1e-6)
    loss_at = Distillation(settings, teacher, encoder, stream, schedule, 0, opponent)
    run = _Run("distill", settings, "", own, folder, new_accelerator("no"), partner)
    return lambda: run.one_step(loss_at)


def theirs(pipeline: Any, student: UNet2DConditionModel, data: Path) -> Callable[[], None]:
    """A step as the published script computes it, in float32 on one process."""
    online, target = copy.deepcopy(student).requires_grad_(True).train(), copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.AdamW(online.parameters(), lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0)
    stream, schedule, encoder = ShardStream(data), schedule_of(pipeline), pipeline.text_encoder
    tokens = pipeline.tokenizer
    step = 0

    def say(prompts: list[str]) -> torch.Tensor:
        words = tokens(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return encoder(words)[0]

    none = say([""] * BATCH)  # the script encodes the empty prompt once

    def at(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha, sigma, c_skip and c_out of t, each B 1 1 1."""
        s = 10.0 * t
        found = (schedule.alpha[t], schedule.sigma[t], 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt())
        return tuple(x.view(-1, 1, 1, 1) for x in found)  # type: ignore[return-value]

    def one() -> None:
        nonlocal step
        examples = [stream.read(stream.row_at(draw)) for draw in range(step * BATCH, (step + 1) * BATCH)]
        step += 1
        pixels = torch.from_numpy(np.stack([e.pixels(SIZE_PX) for e in examples])).permute(0, 3, 1, 2)
        text = say([e.prompt for e in examples])
        with torch.no_grad():
            clean = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist.sample()
            clean = clean * pipeline.vae.config.scaling_factor
        t = torch.randint(1, 51, (BATCH,)) * 20 - 1
        to, w = (t - 20).clamp(min=0), torch.full((BATCH, 1, 1, 1), 5.0)
        alpha, sigma, skip, out = at(t)
        noisy = alpha * clean + sigma * torch.randn_like(clean)
        said = online(noisy, t, encoder_hidden_states=text).sample
        guess = skip * noisy + out * to_clean(schedule, said, noisy, alpha, sigma)
        with torch.no_grad():
            parts = []
            for states in (text, none):
                told = pipeline.unet(noisy, t, encoder_hidden_states=states).sample
                x0 = to_clean(schedule, told, noisy, alpha, sigma)
                parts.append((x0, (noisy - alpha * x0) / sigma))
            (x0, eps), (x0_free, eps_free) = parts
            alpha, sigma, skip, out = at(to)
            earlier = alpha * (x0 + w * (x0 - x0_free)) + sigma * (eps + w * (eps - eps_free))
            told = target(earlier, to, encoder_hidden_states=text).sample
            aim = skip * earlier + out * to_clean(schedule, told, earlier, alpha, sigma)
        loss = (((guess - aim) ** 2 + 0.001**2).sqrt() - 0.001).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for mean, value in zip(target.parameters(), online.parameters(), strict=True):
            mean.mul_(0.95).add_(value.detach(), alpha=0.05)

    return one


def to_clean(schedule: Any, said: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
    if schedule.prediction == "epsilon":
        return (noisy - sigma * said) / alpha
    return alpha * noisy - sigma * said


if __name__ == "__main__":
    main()
