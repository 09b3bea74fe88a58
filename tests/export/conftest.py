import os
from pathlib import Path

import pytest
from filelock import FileLock

from export.bundle import export_student
from export.recipe import ExportRecipe
from factory.models import resolve
from tests.export import guided

PROMPTS = ("a 3d render of a red apple on a white background", "a flat icon of a fox on a blue background")


@pytest.fixture(scope="session")
def student_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `onnx` (fp32, w8a16, w8) and `openvino` (fp32, w8) bundles of the shipped student. Read only: copy before damage."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # all workers' own
    folder = shared / "bundles"
    recipe = ExportRecipe(calibration_prompts=2, parity_prompts=2, latency_runs=1, threads=1)
    with FileLock(shared / "bundles.lock"):  # whoever comes second finds them finished
        export_student(Path(resolve("zoo:student-fewstep")), PROMPTS, recipe, folder)
    return folder


@pytest.fixture(scope="session")
def guided_students(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the untrained students `guided`, which hears guidance, and `plain`, which takes none. Read only."""
    folder = tmp_path_factory.mktemp("students")
    guided.save_students(tiny_models / "teacher", folder)
    return folder


@pytest.fixture(scope="session")
def guided_bundles(guided_students: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `onnx` (fp32, w8a16, w8) and `openvino` (fp32, w8a8) bundles that take guidance, of the first. Read only."""
    folder = tmp_path_factory.mktemp("guided")
    for target in ("onnx", "openvino"):
        recipe = guided.recipe(target, guidance_range=[guided.LOW, guided.HIGH])
        export_student(guided_students / "guided", guided.PROMPTS, recipe, folder)
    return folder
