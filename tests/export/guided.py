"""An untrained student that hears guidance, and recipes of its builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.recipe import ExportRecipe
from trainer.guidance import add_guidance_input
from trainer.models import open_pipeline
from trainer.sample import as_student
from trainer.surgery import build_student

PROMPTS = ("a fox", "a red apple")
LOW, HIGH = 3.0, 7.0
_FEW = {"calibration_prompts": 4, "parity_prompts": 2, "latency_runs": 1, "threads": 1}
_PRECISIONS = {"onnx": ["fp32", "w8a16", "w8"], "openvino": ["fp32", "w8a8"], "litert": ["w8a16"]}


def recipe(target: str, **keys: Any) -> ExportRecipe:
    return ExportRecipe.model_validate({"targets": [target], "precisions": _PRECISIONS[target], **_FEW, **keys})


def save_students(teacher: Path, folder: Path) -> None:
    """`guided`, whose projection of guidance is drawn at random, and `plain`, which has none."""
    pipeline = open_pipeline(str(teacher))
    torch.manual_seed(0)
    unet = build_student(pipeline.unet, "tiny").float()
    guided: Any = add_guidance_input(unet)
    torch.nn.init.normal_(guided.time_embedding.cond_proj.weight, std=0.3)
    as_student(pipeline, guided).save_pretrained(folder / "guided")
    as_student(pipeline, unet).save_pretrained(folder / "plain")
