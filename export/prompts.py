"""The prompts on which bundles are proven when no data set says better, and the reading of a prompt file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import RecipeError

PROMPTS = (
    "a 3d render of a red apple on a white background",
    "a flat icon of a fox on a blue background",
    "a penguin on a pink background, 3d render",
    "a glossy 3d picture of a rocket on a black background",
    "a flat drawing of a pizza on a yellow background",
    "a 3d icon of a female firefighter with dark skin on a gray background",
    "a flat icon of a man working as a farmer with light skin on a green background",
    "a 3d render of an octopus with a blue background",
)


def calibrating_first(
    judging: Sequence[str], pool: Callable[[int], Sequence[str]], calibration: int, parity: int
) -> list[str]:
    """As `export_student` takes prompts: `calibration` of them that calibrate, then `parity` that judge, none of which calibrates.

    The latter are of `judging`, over and over, the former of `pool(count)`, a data set's first. Where that holds nothing else, `judging`
    calibrates too, as it must.
    """
    judged = [judging[(calibration + i) % len(judging)] for i in range(parity)]
    others = [one for one in dict.fromkeys(pool(8 * (calibration + parity))) if one and one not in judged]
    others = others or [one for one in judging if one not in judged] or list(judging)
    return [others[i % len(others)] for i in range(calibration)] + judged


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The lines of a UTF-8 text file, or PROMPTS without one. Raises RecipeError for a file without a prompt."""
    if path is None:
        return PROMPTS
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("cannot be read", where=str(path), remedy="Give a text file, a prompt a line") from error
    if not lines:
        raise RecipeError("holds no prompt", where=str(path), remedy="Write a prompt a line")
    return lines
