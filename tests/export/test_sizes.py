"""Pictures of another size, and several at once: the graphs, the pictures, the sample program and the proof follow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import RecipeError
from export import parity
from export.bundle import export_student, open_bundle
from export.graph import graphs_of, latent_side
from export.recipe import ExportRecipe
from export.runtime import Build
from export.verify import verify_bundle
from export.words import tokenize
from factory.models import resolve
from trainer.models import open_pipeline

STUDENT = Path(resolve("zoo:student-fewstep"))
PROMPTS = ("a 3d render of a red apple on a white background", "a flat icon of a fox on a blue background")


@pytest.mark.long
def test_two_pictures_of_128_px_at_once(tmp_path: Path) -> None:
    few = {"calibration_prompts": 1, "parity_prompts": 3, "latency_runs": 1, "threads": 1}
    recipe = ExportRecipe.model_validate(
        {"targets": ["onnx"], "precisions": ["fp32", "w8a8"], "size_px": 128, "batch_images": 2, **few}
    )
    export_student(STUDENT, PROMPTS, recipe, tmp_path)
    build, facts = open_bundle(tmp_path / "onnx", "fp32", 1)
    assert facts["latent_shape"] == [2, 16, 16, 16]
    tokens = tokenize(tmp_path / "onnx", facts["tokenizer"], [*PROMPTS, PROMPTS[0]])
    drawn = build.pictures(tokens, [5, 6, 7])
    assert [picture.shape for picture in drawn] == [(128, 128, 3)] * 3
    # A picture hangs on its own prompt and seed, not on those beside it: PyTorch draws the same, one at a time.
    graphs = graphs_of(open_pipeline(str(STUDENT)), 128)
    alone = Build(parity.torch_calls(graphs), facts["scheduler"], (1, 16, 16, 16))
    for row, seed, picture in zip(tokens, [5, 6, 7], drawn, strict=True):
        assert parity.psnr_db(alone.picture(row, seed), picture) > 60
    assert parity.psnr_db(drawn[0], drawn[2]) < 35
    assert verify_bundle(tmp_path / "onnx", runs=1, threads=1)["ok"]
    command = [sys.executable, "sample.py", PROMPTS[1], "--seed", "6", "--out", str(tmp_path / "two.png")]
    subprocess.run(command, cwd=tmp_path / "onnx", check=True)
    both = np.array(Image.open(tmp_path / "two.png"))
    assert both.shape == (256, 128, 3)
    assert parity.psnr_db(drawn[1], both[:128]) > 60 and parity.psnr_db(drawn[1], both[128:]) < 35


def test_sizes_that_cannot_be_halved_and_targets_of_one_picture_are_told() -> None:
    pipeline = open_pipeline(str(STUDENT))
    assert latent_side(pipeline, None) == 8 and latent_side(pipeline, 128) == 16
    with pytest.raises(
        RecipeError, match=r"export\.size_px is 100, and this student draws multiples of \d+ pixels"
    ) as caught:
        latent_side(pipeline, 100)
    near = json.loads(str(caught.value).split("export.size_px=")[1].split(",")[0])
    assert latent_side(pipeline, near) * 8 == near
    with pytest.raises(ValueError, match=r"export\.batch_images is 4, and litert is made for one picture"):
        ExportRecipe(targets=["litert"], precisions=["w8a16"], batch_images=4)
    with pytest.raises(ValueError, match=r"export\.tiling is made for one picture"):
        ExportRecipe.model_validate({"batch_images": 2, "tiling": {"profile": "ethos-u85-1024"}})
