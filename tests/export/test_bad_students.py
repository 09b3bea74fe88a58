"""Students that cannot be exported: the part is named, and nothing that looks built is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.errors import EdgeFusionError, StageError
from export.bundle import export_student
from export.graph import Graph, to_onnx
from export.recipe import ExportRecipe
from factory.models import resolve

RECIPE = ExportRecipe(calibration_prompts=1, parity_prompts=1, latency_runs=1, threads=1)


def without(part: str) -> Callable[[Path], None]:
    def harm(student: Path) -> None:
        place = student / part
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return harm


def half_a_file(student: Path) -> None:
    path = student / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_width(student: Path) -> None:
    path = student / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 24}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without("vae"), "lacks vae/config.json, vae/*.safetensors"),
        (without("tokenizer"), "lacks tokenizer/tokenizer_config.json"),
        (without("scheduler"), "scheduler"),
        (without("unet/diffusion_pytorch_model.safetensors"), "unet"),
        (without("text_encoder/config.json"), "text_encoder"),
        (without("model_index.json"), "model_index.json"),
        (half_a_file, "unet"),
        (another_width, "cannot be opened"),
    ],
)
def test_a_student_with_a_missing_or_broken_part_is_refused(
    harm: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(resolve("zoo:student-fewstep"), tmp_path / "student"))
    harm(student)
    with pytest.raises(EdgeFusionError) as caught:
        export_student(student, ["a fox"], RECIPE, tmp_path / "out")
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out/*/bundle.json")) and not list(tmp_path.glob("out/onnx*"))


def test_a_module_that_the_converter_refuses_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x  # hangs on the data

    with pytest.raises(StageError, match="odd does not lower to ONNX"):
        to_onnx(Graph("odd", Odd().eval(), {"x": torch.ones(2)}, "y"), tmp_path / "odd.onnx")
    assert not list(tmp_path.iterdir())
