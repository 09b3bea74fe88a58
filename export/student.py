"""Opens a student folder for export, and says which part of it is missing. Knows diffusers' folders, no graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError, StageError
from cluster.nearest import did_you_mean
from export.recipe import ExportRecipe
from export.refusal import reason
from factory.models import PIPELINE
from trainer.guidance import fix_guidance, takes_guidance
from trainer.models import open_pipeline
from trainer.sample import is_few_step

_PARTS = {
    "tokenizer": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
    "text_encoder": ("config.json", "*.safetensors"),
    "unet": ("config.json", "*.safetensors"),
    "vae": ("config.json", "*.safetensors"),
}
"""Folders of a student, and what each must hold; with export.allow_pickle weights may also end in .bin."""


def open_student(folder: Path, recipe: ExportRecipe) -> Any:
    """The pipeline in float32; a guidance input of its UNet is fixed at the recipe's scale, unless the recipe has a range. Raises
    EdgeFusionError, naming the part."""
    check_parts(folder, recipe.allow_pickle)
    try:
        pipeline = open_pipeline(str(folder), recipe.allow_pickle)
    except EdgeFusionError:
        raise
    except Exception as error:  # the libraries' own words for a config that lies about its weights come in any class
        raise StageError(
            f"cannot be opened: {reason(error)}",
            where=str(folder),
            remedy="Save the student again; --debug shows the library's report",
        ) from error
    check_scheduler(pipeline, folder)
    if recipe.guidance_range is not None:
        if not takes_guidance(pipeline.unet):
            raise EdgeFusionError(
                "the student does not take guidance as an input, so no build of it can",
                where=str(folder),
                remedy="Leave export.guidance_range out, or train with trainer.distill.guidance_input=true",
            )
    elif takes_guidance(pipeline.unet):
        if recipe.guidance_scale is None:
            raise EdgeFusionError(
                "the student takes guidance as an input, and the recipe neither fixes it nor keeps it",
                where=str(folder),
                remedy="Set export.guidance_scale to a scale that it was trained for (w + 1), or export.guidance_range to those that builds "
                "let one choose from",
            )
        pipeline.unet = fix_guidance(pipeline.unet, recipe.guidance_scale - 1)
    return pipeline


def guidance_of(pipeline: Any, recipe: ExportRecipe) -> dict[str, Any] | None:
    """For bundle.json, of an opened student whose guidance stays an input: the scale where none is said, the range, the width of the
    embedding. None where guidance is fixed."""
    if recipe.guidance_range is None:
        return None
    low, high = recipe.guidance_range
    scale = (low + high) / 2 if recipe.guidance_scale is None else recipe.guidance_scale
    return {"scale": scale, "low": low, "high": high, "width": pipeline.unet.config.time_cond_proj_dim}


def check_parts(folder: Path, allow_pickle: bool) -> None:
    """Raises StageError for a folder without one of a pipeline's parts or files, or with pickled weights alone."""
    lacking = [f"{part}/{name}" for part, names in _PARTS.items() for name in names if not _has(folder / part, name)]
    pickled = [name for name in lacking if _pickle_of(folder / name)]
    if pickled and not allow_pickle:
        raise StageError(
            f"the student's weights are pickled ({', '.join(str(Path(name).parent) for name in pickled)}), which may run code of their maker",
            where=str(folder),
            remedy="Save the student again with safetensors, or set export.allow_pickle=true if you trust who made it",
        )
    lacking = [name for name in lacking if name not in pickled]
    if not (folder / PIPELINE).is_file():
        lacking.insert(0, PIPELINE)
    if lacking:
        raise StageError(
            f"the student lacks {', '.join(lacking)}",
            where=str(folder),
            remedy=did_you_mean(folder, PIPELINE)
            or "Give a whole diffusers pipeline folder, such as OUT/student of a run",
        )
    try:
        json.loads((folder / PIPELINE).read_text())
    except ValueError as error:
        raise StageError("is no JSON", where=str(folder / PIPELINE), remedy="Save the student again") from error


def check_scheduler(pipeline: Any, folder: Path) -> None:
    """Raises StageError for a scheduler whose steps are not those of `runtime.Build`: parity would compare a build with the same wrong steps."""
    kind, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    wrong = ""
    if not is_few_step(pipeline):
        wrong = f"a {kind}, and builds draw in the few steps of LCM's or TCD's"
    elif config.get("prediction_type") not in ("epsilon", "v_prediction"):
        wrong = f"for {config.get('prediction_type')}, not epsilon or v_prediction"
    elif config.get("thresholding"):  # clip_sample is switched off by diffusers' own pipeline
        wrong = "told to clip what it predicts (thresholding), which a build does not"
    if wrong:
        raise StageError(
            f"the student's scheduler is {wrong}",
            where=str(folder / "scheduler"),
            remedy="Give a few-step student, such as OUT/student of a run with trainer.distill.steps, or zoo:student-fewstep",
        )


def _has(place: Path, name: str) -> bool:
    return next(place.glob(name), None) is not None


def _pickle_of(wanted: Path) -> bool:
    """Whether a .bin lies where safetensors are `wanted`."""
    return wanted.suffix == ".safetensors" and next(wanted.parent.glob("*.bin"), None) is not None
