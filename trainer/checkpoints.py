"""The checkpoints of a phase: a folder each, whole or absent, proven by its digests before a training goes on from it.

    checkpoints/step-00000400/           -1, -2 at its end after so many rollbacks
        student/ average/                weights; those of a UNet are folders that diffusers opens
        optimiser.pt loop.pt             the optimiser's state; what else the loop goes on from. Both load with weights_only
        checkpoint.json                  step, recipe, layout, SHA-256 of every other file
    checkpoints/best-00000400/           average/ and checkpoint.json of the look that drew best

Knows files and tensors, and nothing of what is trained.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.errors import CorruptShard
from cluster.storage import PARTIAL, digest_file, publish_folder

CHECKPOINTS = "checkpoints"
FACTS = "checkpoint.json"
_OLDER = "state.pt"
"""What older versions kept in a phase's folder in place of all this."""
_NO_OTHER = "Delete it: an older one is taken where there is one, else this is trained anew"
_STUDENT, _AVERAGE, _OPTIMISER, _LOOP = "student", "average", "optimiser.pt", "loop.pt"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""As diffusers calls it."""


def config_of(model: nn.Module) -> str | None:
    """The config.json with which diffusers opens the model's weights; None for what it cannot open, such as a UNet with adapters inside."""
    spell = getattr(model, "to_json_string", None)
    return None if spell is None or hasattr(model, "peft_config") else spell()


def save_checkpoint(folder: Path, state: Mapping[str, Any], config: str | None, keep: int) -> Path:
    """Write a state (`trainer.state.state_of`, tensors contiguous) as a folder of its own; only the newest `keep` stay. Returns its place."""
    rollbacks = int(state["more"].get("rollbacks", 0))
    place = folder / (f"step-{state['step']:08d}" + f"-{rollbacks}" * (rollbacks > 0))

    def write(partial: Path) -> None:
        _save_weights(partial / _STUDENT, state["model"], config)
        _save_weights(partial / _AVERAGE, state["average"], config)
        torch.save(state["optimiser"], partial / _OPTIMISER)
        torch.save(state["more"], partial / _LOOP)
        _seal(partial, {name: state[name] for name in ("version", "step", "recipe")})

    publish_folder(place, write)
    for old in _by_age(folder)[keep:]:
        _remove(old)
    return place


def read_checkpoint(place: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder; raises what torch, safetensors and json raise."""
    return {
        **json.loads((place / FACTS).read_text()),
        "model": load_file(place / _STUDENT / _WEIGHTS),
        "average": load_file(place / _AVERAGE / _WEIGHTS),
        "optimiser": torch.load(place / _OPTIMISER, weights_only=True, map_location="cpu"),
        "more": torch.load(place / _LOOP, weights_only=True, map_location="cpu"),
    }


def newest_checkpoint(phase: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a phase's folder, or None; and a word on each damaged one that was newer.

    Those are put aside as `damaged-...`. Raises CorruptShard if there are checkpoints and all are damaged, or only an older version's.
    """
    damaged: list[tuple[Path, CorruptShard]] = []
    for place in _by_age(phase / CHECKPOINTS):
        try:
            prove(place)
        except CorruptShard as error:
            damaged.append((place, error))
            continue
        told = [
            f"{bad}: {error.what}; going on from {place.name}, and it is kept as damaged-{bad.name} until the phase is done"
            for bad, error in damaged
        ]
        for bad, _ in damaged:
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return place, told
    if damaged:
        raise damaged[0][1]
    if (phase / _OLDER).exists():
        raise CorruptShard(
            "was written by an older version, whose checkpoints were one file",
            where=str(phase / _OLDER),
            remedy="Finish this training with the version that began it, or delete the file to train this phase anew",
        )
    return None, []


def prove(place: Path, remedy: str = _NO_OTHER) -> None:
    """Raises CorruptShard unless every file of a checkpoint is what was written."""
    try:
        files: dict[str, str] = json.loads((place / FACTS).read_text())["files"]
        broken = [name for name, sha256 in files.items() if digest_file(place / name) != sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(f"cannot be read ({error})", where=str(place), remedy=remedy) from error
    if broken:
        raise CorruptShard(f"{', '.join(broken)} is damaged", where=str(place), remedy=remedy)


def save_best(folder: Path, weights: Mapping[str, torch.Tensor], config: str | None, facts: Mapping[str, Any]) -> None:
    """Keep the weights that drew best so far, of `facts` step, score and recipe, in place of those before."""
    place = folder / f"best-{facts['step']:08d}"
    before = best_checkpoint(folder)

    def write(partial: Path) -> None:
        _save_weights(partial / _AVERAGE, weights, config)
        _seal(partial, facts)

    publish_folder(place, write)
    if before is not None and before[0] != place:
        _remove(before[0])


def best_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Place and facts of the best that is kept, of two the better one: a kill may have left the one before. Raises CorruptShard."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for place in sorted(folder.glob("best-*")):
        try:
            found.append((place, json.loads((place / FACTS).read_text())))
        except (OSError, ValueError) as error:
            raise CorruptShard(
                f"cannot be read ({error})", where=str(place), remedy="Delete it to go on without that look"
            ) from error
    return max(found, key=lambda one: one[1]["score"], default=None)


def best_weights(place: Path) -> dict[str, torch.Tensor]:
    """Of what `best_checkpoint` found; raises CorruptShard."""
    prove(place, "Delete it to go on without that look: the student is then the last average")
    return load_file(place / _AVERAGE / _WEIGHTS)


def forget_checkpoints(phase: Path) -> None:
    """Remove all that a finished phase no longer needs."""
    shutil.rmtree(phase / CHECKPOINTS, ignore_errors=True)


def _by_age(folder: Path) -> list[Path]:
    """Newest first. A rollback goes back to the newest, so that of two of one step the one with more rollbacks is the later."""
    found = {
        (int(match[1]), int(match[2] or 0)): place
        for place in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)(?:-(\d+))?", place.name))
    }
    return [found[key] for key in sorted(found, reverse=True)]


def _save_weights(place: Path, weights: Mapping[str, torch.Tensor], config: str | None) -> None:
    place.mkdir()
    save_file(dict(weights), place / _WEIGHTS, {"format": "pt"})
    if config is not None:
        (place / "config.json").write_text(config)


def _seal(partial: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts with the digests of all files."""
    files = {str(path.relative_to(partial)): digest_file(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    (partial / FACTS).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n")


def _remove(place: Path) -> None:
    """By its name first, so that a kill leaves no torn one under it."""
    gone = place.with_name(f".{place.name}{PARTIAL}{os.getpid()}-old")
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
