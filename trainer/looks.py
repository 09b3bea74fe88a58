"""What a training's validation leaves on the way: `looks/step-N.png` and `.json` in a phase's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LOOKS = "looks"


@dataclass(frozen=True)
class Look:
    """One look: the step, the sheet (a row of pictures for each number of denoising steps), and mean CLIP scores by that number."""

    step: int
    sheet: Path
    scores: dict[int, float]

    def named_scores(self) -> dict[str, float]:
        """As TensorBoard and the trackers know them."""
        return {f"looks/clip_{steps}_steps": score for steps, score in self.scores.items()}


def read_looks(folder: Path) -> list[Look]:
    """What `draw` left in a phase's folder, in the order of the steps."""
    found: list[Look] = []
    for path in sorted((folder / LOOKS).glob("step-*.json")):
        facts = json.loads(path.read_text())
        scores = {int(steps): float(score) for steps, score in facts.get("scores", {}).items()}
        found.append(Look(int(facts["step"]), path.with_suffix(".png"), scores))
    return found
