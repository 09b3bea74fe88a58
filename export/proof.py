"""What a bundle carries to prove itself without the student: references from PyTorch in float32, digests, a sample program.

`reference.npz` holds each graph's inputs and PyTorch's output (`unet.in.latent`, `unet.out`, ...), and the token rows N T and
pictures N H W 3 of the judged prompts; picture i has seed i. Where guidance is an input, `pictures.low` and `pictures.high` are those of the
first prompts at the ends of its range. `SHA256SUMS` lists every file, bundle.json included, for `sha256sum -c`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.errors import CorruptShard
from cluster.nearest import wrong_folder
from cluster.storage import digest_file
from export.runtime import GRAPHS, Call

BUNDLE = "bundle.json"
REFERENCE = "reference.npz"
SUMS = "SHA256SUMS"
SAMPLE = "sample.py"
_AT_END = "pictures."
_SAMPLES = Path(__file__).parent / "samples"


def check_bundle(folder: Path) -> None:
    """Raises EdgeFusionError for what is no bundle, whole or damaged; takes no time, so that commands ask before they import anything heavy."""
    if not (folder / BUNDLE).exists() and not (folder / SUMS).exists():
        raise wrong_folder(folder, BUNDLE, "is no finished bundle", "Run edgefusion run or export first")


def write_reference(
    place: Path,
    calls: dict[str, Call],
    inputs: dict[str, dict[str, np.ndarray]],
    tokens: Sequence[np.ndarray],
    pictures: Sequence[np.ndarray],
    ends: Mapping[str, Sequence[np.ndarray]],
) -> None:
    """REFERENCE of a bundle, from the float32 `calls`."""
    arrays = {"tokens": np.concatenate(tokens), "pictures": np.stack(pictures)}
    arrays |= {f"{_AT_END}{end}": np.stack(drawn) for end, drawn in ends.items()}
    for graph in GRAPHS:
        arrays[f"{graph}.out"] = calls[graph](inputs[graph])
        arrays |= {f"{graph}.in.{name}": value for name, value in inputs[graph].items()}
    np.savez(place / REFERENCE, **arrays)  # pyright: ignore[reportArgumentType]


def read_reference(place: Path) -> dict[str, np.ndarray]:
    """REFERENCE's arrays; raises CorruptShard."""
    try:
        with np.load(place / REFERENCE, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CorruptShard("cannot be read", where=str(place / REFERENCE), remedy="Export again") from error


def reference_inputs(reference: dict[str, np.ndarray], graph: str) -> dict[str, np.ndarray]:
    """The inputs on which REFERENCE holds the output of `graph`."""
    start = f"{graph}.in."
    return {key.removeprefix(start): value for key, value in reference.items() if key.startswith(start)}


def reference_ends(reference: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """End of the guidance range to the pictures H W 3 there; empty where guidance is fixed."""
    return {key.removeprefix(_AT_END): list(value) for key, value in reference.items() if key.startswith(_AT_END)}


def write_sample(place: Path, target: str) -> None:
    """SAMPLE: draws a picture from the bundle with the target's runtime alone."""
    shutil.copyfile(_SAMPLES / f"{target}_sample.py", place / SAMPLE)


def write_sums(place: Path) -> None:
    """SUMS over everything in `place`; call it last."""
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != SUMS)
    (place / SUMS).write_text("".join(f"{digest_file(p)}  {p.relative_to(place).as_posix()}\n" for p in files))


def broken_files(place: Path) -> list[str]:
    """What SUMS and the bundle disagree about, in words; empty for a sound bundle. Raises CorruptShard without SUMS."""
    try:
        lines = (place / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptShard(
            f"there is no readable {SUMS}, so nothing proves the files", where=str(place), remedy="Export again"
        ) from error
    found: list[str] = []
    listed: set[str] = set()
    for line in lines:
        digest, _, name = line.partition("  ")
        path = place / name
        listed.add(name)
        # A damaged list must not lead outside the bundle.
        if not name or not path.resolve().is_relative_to(place.resolve()) or not path.is_file():
            found.append(f"{name or line}: is missing")
        elif digest_file(path) != digest:
            found.append(f"{name}: is not what {SUMS} says")
    # What people put beside (pictures that sample.py drew) is nobody's harm; what the bundle is made of must be listed.
    try:
        needed = {BUNDLE, *json.loads((place / BUNDLE).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        needed = {BUNDLE}
    return found + [f"{name}: is not in {SUMS}" for name in sorted(needed - listed)]
