"""IS and FID on Inception features, by the torch-fidelity package, which is not one of ours: absent, it is said and not replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import StageError, TargetUnavailable


def require_fidelity() -> Any:
    """The package; raises TargetUnavailable."""
    try:
        import torch_fidelity  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TargetUnavailable(
            "torch-fidelity is not installed, so there is no IS and no FID on Inception features",
            remedy="pip install torch-fidelity (its Inception weights need a network once), or leave --fidelity out",
        ) from error
    return torch_fidelity


def fidelity(
    made: Sequence[Path], real: Sequence[Callable[[], np.ndarray]], size_px: int
) -> dict[str, dict[str, float | None] | None]:
    """`inception_score` of the pictures and, with references, `fid`; all resized to `size_px` first, as BK-SDM does (256).

    The score's interval is its standard deviation over ten splits; the package gives none for FID.
    """
    package = require_fidelity()
    with tempfile.TemporaryDirectory() as scratch:
        one, other = Path(scratch) / "made", Path(scratch) / "real"
        for folder, pictures in (
            (one, [lambda path=path: np.asarray(Image.open(path)) for path in made]),
            (other, real),
        ):
            folder.mkdir()
            for i, read in enumerate(pictures):
                picture = Image.fromarray(read()).convert("RGB").resize((size_px, size_px), Image.Resampling.LANCZOS)
                picture.save(folder / f"{i:06d}.png")
        wanted: dict[str, Any] = {"input1": str(one), "isc": True, "verbose": False}
        wanted |= {"input2": str(other), "fid": True} if real else {}
        try:
            found = package.calculate_metrics(**wanted)
        except (OSError, RuntimeError, ValueError) as error:
            raise StageError(
                f"torch-fidelity failed: {str(error).splitlines()[0]}",
                remedy="Its weights need a network or a filled cache",
            ) from error
    score, spread = found["inception_score_mean"], found["inception_score_std"]
    fid = found.get("frechet_inception_distance")
    return {
        "inception_score": {"value": score, "low": score - spread, "high": score + spread},
        "fid": None if fid is None else {"value": fid, "low": None, "high": None},
    }
