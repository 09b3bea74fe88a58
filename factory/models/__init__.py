"""Adapters of the models the factory works with; each imports its heavy library when it is opened.

A model is named by a folder, by a hub name, or by `zoo:NAME` for what ships in `factory/pocket/models`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from cluster.errors import RecipeError, StageError
from cluster.stage import gpus_granted
from cluster.storage import digest_file

ZOO = Path(__file__).parent.parent / "pocket" / "models"


def resolve(model: str) -> str:
    """`zoo:NAME` and folders to an existing path; a hub name (`owner/name`) unchanged. Raises RecipeError for what is neither."""
    if model.startswith("zoo:"):
        path = ZOO / model.removeprefix("zoo:")
        if path.exists():
            return str(path)
        known = sorted(p.name for p in ZOO.iterdir()) if ZOO.exists() else []
        near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.3)
        raise RecipeError(
            f"{model} is not in the zoo", remedy=f"Did you mean zoo:{near[0]}?" if near else f"It holds {known}"
        )
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/"):
        return model
    raise RecipeError(
        f"there is no model folder {model}", remedy="Give a folder that exists, zoo:NAME or a hub name owner/name"
    )


def weights_of(allow_pickle: bool) -> dict[str, Any]:
    """For diffusers' and transformers' from_pretrained: safetensors alone, or, where a recipe says so, pickles where there are none."""
    return {"use_safetensors": None if allow_pickle else True}


def first_line(error: Exception, key: str = "allow_pickle") -> str:
    """What a library says of weights that it does not open, and the `key` that lets pickled ones in where that is the matter."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    pickled = "safetensors" in str(error)
    return f"{said} (pickled weights are opened only with {key}: true)" if pickled else said


@cache
def fingerprint(model: str, revision: str | None = None) -> str:
    """What makes this model this model: digests of a folder's files, or the hub name and revision. Looked at once a process."""
    return fresh_fingerprint(model, revision)


def fresh_fingerprint(model: str, revision: str | None = None) -> str:
    """`fingerprint` of what lies there now."""
    place = Path(resolve(model))
    if not place.exists():
        return f"{model}@{revision or 'main'}"
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(place)} {digest_file(file)}\n".encode())
    return digest.hexdigest()


def pick_device(wanted: str = "auto", where: str = "") -> str:
    """`cuda` where there is one and the stage that is being opened was given some of it, else `cpu`. Raises StageError where `wanted` is
    `cuda` and cannot be had; `where` is the recipe's key."""
    import torch

    granted = gpus_granted() != 0
    if wanted == "cuda" and not (granted and torch.cuda.is_available()):
        why = "PyTorch finds none on this machine" if granted else "the stage was given none"
        raise StageError(
            f"a GPU is asked for, and {why}",
            where=where,
            remedy="Say `auto` or `cpu`"
            if granted
            else "Give its workers one (factory.make.render_gpus), or say `auto`",
        )
    return "cuda" if wanted != "cpu" and granted and torch.cuda.is_available() else "cpu"


def set_threads(threads: int) -> None:
    """The same number in every runner (Ray sets its own): float sums depend on it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def quiet() -> None:
    """No progress bars and no advice from the model libraries inside workers."""
    import logging
    import warnings

    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
