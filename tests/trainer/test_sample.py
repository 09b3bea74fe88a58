"""Pictures from a pipeline, or a word on why not."""

from typing import Any

import pytest
from diffusers import LCMScheduler

from cluster.errors import EdgeFusionError
from trainer.sample import generate


class Student:
    """As far as the schedule goes."""

    def __init__(self) -> None:
        self.scheduler: Any = LCMScheduler(original_inference_steps=50)

    def set_progress_bar_config(self, **_: object) -> None:
        """Quiet."""

    def __call__(self, prompts: list[str], num_inference_steps: int, **_: object) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        raise AssertionError("it took them")


def test_more_steps_than_a_student_has_are_refused_in_words() -> None:
    with pytest.raises(EdgeFusionError, match=r"does not draw in 60 steps .*Take fewer"):
        generate(Student(), ["a fox"], [1], steps=60)
