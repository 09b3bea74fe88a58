"""Of a wrong folder the one that was meant is named."""

from pathlib import Path

import pytest

from cluster.nearest import did_you_mean, wrong_folder

MARK = "here.json"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("run/export/onnx", "run/export/openvino", "run/student", "run/training/deep/er"):
        Path(place).mkdir(parents=True)
    for place in ("run/export/onnx", "run/export/openvino"):
        (Path(place) / MARK).touch()
    return Path("run")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("run/export", ["run/export/onnx", "run/export/openvino"]),
        ("run", ["run/export/onnx", "run/export/openvino"]),
        ("run/export/onnx/here.json", ["run/export/onnx"]),
        ("run/export/nope", ["run/export/openvino", "run/export/onnx"]),
        ("run/exprt/onnx", ["run/export/onnx", "run/export/openvino"]),
        ("run/training", []),
        ("run/training/deep", []),
        ("elsewhere", []),
        ("/elsewhere/altogether", []),
    ],
)
def test_the_nearest_folders_are_named(run: Path, given: str, named: list[str]) -> None:
    assert did_you_mean(Path(given), MARK) == (f"Did you mean {' or '.join(named)}?" if named else "")


def test_a_folder_beside_is_named_where_none_lies_below(run: Path) -> None:
    (run / "student" / "student.json").touch()
    assert did_you_mean(run / "training", "student.json") == "Did you mean run/student?"


def test_what_does_not_exist_is_said_so_and_else_the_remedy_stands(run: Path) -> None:
    error = wrong_folder(Path("nowhere"), MARK, "is no bundle", "Make one")
    assert str(error) == "nowhere: does not exist. Make one"
    assert (
        str(wrong_folder(run / "training", MARK, "is no bundle", "Make one")) == "run/training: is no bundle. Make one"
    )
