"""Students that cannot be exported: the part is named, and nothing that looks built is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cluster.errors import EdgeFusionError, LedgerConflict, StageError
from export.build import _lower
from export.bundle import _mark_of, export_student, identity_of
from export.graph import Graph, to_onnx
from export.recipe import DecoderRecipe, ExportRecipe
from export.refusal import refusals
from export.student import open_student
from export.targets.registry import find_target
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, "is a PNDMScheduler, and builds draw in the few steps"),
        ({"prediction_type": "sample"}, "is for sample, not epsilon or v_prediction"),
        ({"thresholding": True}, "is told to clip what it predicts"),
    ],
)
def test_a_scheduler_whose_steps_no_build_makes_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    """The build and PyTorch's reference share the loop: parity alone would prove the wrong picture."""
    student = Path(shutil.copytree(resolve("zoo:student-fewstep"), tmp_path / "student"))
    if "_class_name" in change:
        index = json.loads((student / "model_index.json").read_text())
        (student / "model_index.json").write_text(
            json.dumps(index | {"scheduler": ["diffusers", change["_class_name"]]})
        )
    path = student / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StageError, match=said):
        open_student(student, RECIPE)


def test_a_finished_bundle_is_not_taken_for_another_students_or_recipes(tmp_path: Path) -> None:
    student = tmp_path / "student"
    for part in ("tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"):
        (student / part).parent.mkdir(parents=True, exist_ok=True)
        (student / part).write_text("{}")
    for part in ("text_encoder", "unet", "vae"):
        (student / part).mkdir()
        for name in ("config.json", "weights.safetensors"):
            (student / part / name).write_text("{}")
    recipe = RECIPE.model_copy(update={"targets": ["onnx"]})
    bundle = tmp_path / "out" / "onnx" / "bundle.json"
    bundle.parent.mkdir(parents=True)
    bundle.write_text(json.dumps({"made_with": identity_of(student, ["a fox"], recipe, "onnx").facts}))
    (tmp_path / "out" / ".openvino.partial-1-ffff").mkdir()  # a killed export's, of a target that is not asked for now
    export_student(student, ["a fox"], recipe.model_copy(update={"threads": 7, "latency_runs": 9}), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnx"]
    with pytest.raises(LedgerConflict, match=r"out/onnx.*export\.steps: then 2, now 4"):
        export_student(student, ["a fox"], recipe.model_copy(update={"steps": 4}), tmp_path / "out")
    idle = {
        "openvino_device": "GPU",
        "precisions": [*recipe.precisions, "bf16"],
        "allow_pickle": True,
    }  # none of the target's
    export_student(student, ["a fox"], recipe.model_copy(update=idle), tmp_path / "out")
    config = tmp_path / "vae" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    with_vae = recipe.model_copy(update={"vae": str(config.parent)})
    with pytest.raises(LedgerConflict, match=r"export\.vae: then null"):
        export_student(student, ["a fox"], with_vae, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    other = tmp_path / "other" / "onnx" / "bundle.json"
    other.write_text(json.dumps({"made_with": identity_of(student, ["a fox"], with_vae, "onnx").facts}))
    export_student(student, ["a fox"], with_vae, tmp_path / "other")
    config.write_text('{"trained": "again"}')  # at the same place
    with pytest.raises(LedgerConflict, match=r"export\.vae: then"):
        export_student(student, ["a fox"], with_vae, tmp_path / "other")
    with pytest.raises(LedgerConflict, match='prompts: then "'):
        export_student(student, ["a pizza"], recipe, tmp_path / "out")
    bundle.write_text("{}")  # an older version's
    export_student(student, ["a pizza"], recipe, tmp_path / "out")


def test_a_module_that_the_converter_refuses_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x  # hangs on the data

    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)  # which ONNX has not

    cases = (
        (Odd(), r"in 1 \(Odd\): Could not guard on"),
        (Bessel(), r"in 1 \(Bessel\), operator \S*bessel_j0: No ONNX"),
    )
    for part, said in cases:
        net = nn.Sequential(nn.Linear(2, 2), part)
        with pytest.raises(StageError, match=rf"odd does not lower to ONNX: {said}") as caught:
            to_onnx(Graph("odd", net.eval(), {"x": torch.ones(2)}, "y"), tmp_path / "odd.onnx")
        assert "\x1b" not in str(caught.value) and "step" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            RuntimeError("\x1b[96mno scale\x1b[0m for Einsum\nand more"),
            r"onnx: unet .* at w8a8: no scale for Einsum\. Leave w8a8",
        ),
        (RuntimeError(""), r"unet does not lower at w8a8: RuntimeError"),
        (MemoryError(), r"unet at w8a8 needs more memory"),
        (EdgeFusionError("Vela does not compile it"), r"Vela does not compile it\. Leave w8a8 out"),
        (EdgeFusionError("no", remedy="Do so"), r"^no\. Do so$"),
    ],
)
def test_what_a_quantiser_raises_names_the_build_and_a_way_round(
    raised: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's quantiser and NNCF ended an export in a traceback."""

    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr("export.targets.onnx_runtime.quantise_onnx", fails)
    graph = Graph("unet", nn.Identity().eval(), {"x": torch.ones(2)}, "y")
    work = SimpleNamespace(graphs=[graph], sources=tmp_path, calibration={"unet": []}, keep=[], plan=None)
    with pytest.raises(EdgeFusionError, match=said):
        _lower(find_target("onnx"), {"unet": "w8a8"}, tmp_path, work)  # type: ignore[arg-type]


def test_a_full_disk_is_no_refusal() -> None:
    with pytest.raises(OSError, match="No space"), refusals("onnx", "unet", "w8"):
        raise OSError(28, "No space left on device")


def test_a_graph_is_whole_or_absent_and_another_exports_graph_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(model: object, path: str, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    graph = Graph("twice", nn.Identity().eval(), {"x": torch.ones(2)}, "y")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("onnx_ir.save", dies)
        to_onnx(graph, tmp_path / "graphs" / "twice.onnx")
    assert not list((tmp_path / "graphs").iterdir())
    to_onnx(graph, tmp_path / "graphs" / "twice.onnx")
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["twice.onnx"]
    students = [tmp_path / "a", tmp_path / "b"]
    for i, student in enumerate(students):
        student.mkdir()
        (student / "weights").write_bytes(bytes([i]))
    cut = RECIPE.model_copy(update={"decoder": DecoderRecipe(tile=8)})
    marks = {_mark_of(student, recipe) for student in students for recipe in (RECIPE, cut)}
    assert len(marks) == 4 and _mark_of(students[0], RECIPE.model_copy(update={"threads": 7})) in marks
