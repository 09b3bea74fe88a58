"""Pickled weights may run code of their maker: nobody opens them unless a recipe says so in so many words."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import StageError
from export.student import check_parts
from factory.models.clip import Clip
from factory.models.image import Painter
from factory.models.text import open_writer
from factory.plan import sample_id
from factory.recipe import DiffusersTeacher, OpenClipScorer, TransformersWriter
from trainer.models import open_pipeline, open_unet


def pickled(place: Path) -> None:
    """Weights of a folder as pickles in place of safetensors."""
    for path in place.rglob("*.safetensors"):
        name = {"model": "pytorch_model", "open_clip_model": "open_clip_pytorch_model"}.get(path.stem, path.stem)
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models, tmp_path / "models"))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_pipeline_with_one_pickled_part_is_refused_and_opened_on_demand(models: Path, part: str) -> None:
    teacher = models / "teacher"
    before = open_pipeline(str(teacher))
    pickled(teacher / part)
    with pytest.raises(StageError, match="allow_pickle: true"):
        open_pipeline(str(teacher))
    after = open_pipeline(str(teacher), allow_pickle=True)
    for name, tensor in getattr(before, part).state_dict().items():
        assert torch.equal(tensor, getattr(after, part).state_dict()[name])


def test_a_folder_of_a_pickled_unet_alone_is_refused_by_its_key(models: Path) -> None:
    unet = models / "teacher" / "unet"
    pickled(unet)
    with pytest.raises(StageError, match=r"trainer\.allow_pickle: true"):
        open_unet(str(unet))
    open_unet(str(unet), allow_pickle=True)


def test_the_factorys_models_are_refused_by_their_key(models: Path) -> None:
    for name in ("teacher", "writer", "clip"):
        pickled(models / name)
    teacher = DiffusersTeacher(model=str(models / "teacher"), steps=2, size_px=32, batch_images=1)
    with pytest.raises(StageError, match=r"factory\.make\.teacher\.allow_pickle: true"):
        Painter(teacher)
    writer = TransformersWriter(model=str(models / "writer"))
    with pytest.raises(StageError, match=r"factory\.plan\.writer\.allow_pickle: true"):
        open_writer(writer)
    scorer = OpenClipScorer(model=str(models / "clip"))
    with pytest.raises(StageError, match=r"pickled weights \(open_clip_pytorch_model\.bin\).*") as caught:
        Clip(scorer)
    assert "allow_pickle: true" in str(caught.value)
    trusted = {"allow_pickle": True}
    assert np.isfinite(Clip(scorer.model_copy(update=trusted)).texts(["a fox"])).all()
    assert Painter(teacher.model_copy(update=trusted)).paint(["a fox"], [0])[0].shape == (32, 32, 3)
    open_writer(writer.model_copy(update=trusted))
    assert sample_id(teacher, "a fox", 0) == sample_id(teacher.model_copy(update=trusted), "a fox", 0)


def test_a_pickled_student_is_named_part_by_part(models: Path) -> None:
    student = models / "teacher"
    check_parts(student, allow_pickle=False)
    pickled(student / "vae")
    with pytest.raises(StageError, match=r"weights are pickled \(vae\)") as caught:
        check_parts(student, allow_pickle=False)
    assert "export.allow_pickle=true" in str(caught.value)
    check_parts(student, allow_pickle=True)
    (student / "vae" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(StageError, match=r"lacks vae/\*\.safetensors"):
        check_parts(student, allow_pickle=True)
