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
from cluster.nearest import did_you_mean, wrong_folder
from cluster.stage import gpus_granted
from cluster.storage import digest_file

ZOO = Path(__file__).parent.parent / "pocket" / "models"
PIPELINE = "model_index.json"
"""The file by which a folder is a diffusers pipeline."""


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
    remedy = did_you_mean(path, PIPELINE) or "Give a folder that exists, zoo:NAME or a hub name owner/name"
    raise RecipeError(f"there is no model folder {model}", remedy=remedy)


def check_pipeline(model: str) -> None:
    """Raises RecipeError for a name of nothing and StageError for a folder that is no pipeline, as far as that can be told without the hub
    and without any heavy import."""
    place = Path(resolve(model))
    if place.is_dir() and not (place / PIPELINE).exists():
        raise wrong_folder(
            place, PIPELINE, "is no diffusers pipeline", f"Give a folder that holds {PIPELINE}", StageError
        )
    if not place.exists() and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        refuse_unknown(model)


def refuse_unknown(model: str, error: Exception | None = None) -> None:
    """Raises RecipeError if `model` is neither a folder nor in the hub's cache, after the hub was not asked or answered with `error`."""
    from huggingface_hub import errors as hub
    from huggingface_hub import try_to_load_from_cache

    try:
        if Path(resolve(model)).exists() or try_to_load_from_cache(model, PIPELINE):
            return
    except ValueError:  # not spelled as the hub's names are
        pass
    why = error.__cause__ or error if error else None
    if why is None or isinstance(why, hub.OfflineModeIsEnabled):
        found = "the hub's cache holds no such model (HF_HUB_OFFLINE is set, so the hub is not asked)"
    elif isinstance(why, hub.RepositoryNotFoundError | hub.HFValidationError):
        found = "no such model on the hub"
    else:
        found = f"the hub cannot be asked for one ({first_line(why).strip()})"
    remedy = (
        did_you_mean(Path(model), PIPELINE) or "Give a diffusers pipeline folder, zoo:NAME or a hub name owner/name"
    )
    raise RecipeError(f"there is no folder {model}, and {found}", remedy=remedy)


def weights_of(allow_pickle: bool) -> dict[str, Any]:
    """For diffusers' and transformers' from_pretrained: safetensors alone, or, where a recipe says so, pickles where there are none."""
    return {"use_safetensors": None if allow_pickle else True}


def first_line(error: BaseException, key: str = "allow_pickle") -> str:
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
