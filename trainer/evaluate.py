"""What a student can do: teacher beside student at 4, 2 and 1 steps, same prompts and seeds, with CLIP scores."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from cluster.storage import publish_folder
from factory.models.clip import Clip
from factory.recipe import OpenClipScorer
from trainer.models import open_pipeline
from trainer.sample import contact_sheet, generate, is_few_step, on_gpu, student_guidance

STUDENT_STEPS = (4, 2, 1)
TEACHER_STEPS = 25


def write_samples(
    teacher: str,
    student: Path,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    judge: OpenClipScorer,
    threads: int,
    folder: Path,
    allow_pickle: bool = False,
) -> None:
    """Fill `folder` with `teacher.png`, `student-N.png` (one row of pictures each) and `samples.json` (scores, judge, seconds)."""
    torch.set_num_threads(threads)
    publish_folder(folder, lambda place: _fill(place, teacher, student, prompts, seed, guidance, judge, allow_pickle))


def _fill(
    place: Path,
    teacher: str,
    student: Path,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    judge: OpenClipScorer,
    allow_pickle: bool,
) -> None:
    clip = Clip(judge)
    seeds = [seed + i for i in range(len(prompts))]
    texts = clip.texts(list(prompts))
    rows: list[dict[str, Any]] = []

    def draw(name: str, pipeline: Any, steps: int, scale: float) -> None:
        began = time.perf_counter()
        pictures = generate(pipeline, prompts, seeds, steps, scale)
        seconds = (time.perf_counter() - began) / len(prompts)
        scores = (clip.pictures(pictures) * texts).sum(axis=1)
        Image.fromarray(contact_sheet([pictures])).save(place / f"{name}.png")
        rows.append(
            {
                "name": name,
                "steps": steps,
                "seconds_per_picture": round(seconds, 4),
                "clip": [round(float(s), 4) for s in scores],
                "clip_mean": round(float(scores.mean()), 4),
            }
        )

    def draw_in_many_steps(name: str, pipeline: Any) -> None:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        draw(name, pipeline, TEACHER_STEPS, guidance)

    draw_in_many_steps("teacher", on_gpu(open_pipeline(teacher, allow_pickle)))
    small = on_gpu(open_pipeline(str(student)))
    if is_few_step(small):
        for steps in STUDENT_STEPS:
            draw(f"student-{steps}", small, steps, student_guidance(small, guidance))
    else:  # of phase 1 alone
        draw_in_many_steps(f"student-{TEACHER_STEPS}", small)
    facts = {"judge": judge.model, "prompts": list(prompts), "seeds": seeds, "rows": rows}
    (place / "samples.json").write_text(json.dumps(facts, indent=2) + "\n")
