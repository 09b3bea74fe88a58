import json
import re
import signal
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgefusion
from cluster.errors import EdgeFusionError, RecipeError
from edgefusion import app
from trainer import zoo
from trainer.zoo import ROAD, build_all


def test_doctor_names_what_is_installed() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "torch" in result.output and "memory" in result.output


def test_doctor_names_what_is_missing_and_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr("cluster.cli.NEEDED", ["a-package-that-nobody-has"])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install a-package-that-nobody-has" in result.output


def test_doctor_takes_a_module_from_whoever_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu stands in the place of onnxruntime, and `pip install onnxruntime` would write over its files."""
    made = tmp_path / "a_module_gpu-1.2.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: a-module-gpu\nVersion: 1.2\n")
    (made / "top_level.txt").write_text("a_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("cluster.cli.NEEDED", ["a_module"])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "1.2 (by a-module-gpu)" in result.output


def test_an_unknown_zoo_model_is_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["zoo", "build", "unet", "--steps", "1"])
    assert result.exit_code == 2
    assert "'unet'" in result.output and "teacher" in result.output


def test_the_whole_zoo_is_built_in_the_order_of_its_readme_and_goes_on_where_it_stopped(tmp_path) -> None:
    """Of the order and the steps, not of the training."""
    lines = re.findall(r"edgefusion zoo build (\w+) --steps (\d+)", Path("factory/pocket/README.md").read_text())
    assert [(model, int(steps)) for model, steps in lines] == list(ROAD)
    walked: list[tuple[str, int]] = []

    def build_one(model: str, folder: Path, steps: int, go_on: bool) -> None:
        assert folder == tmp_path and not go_on
        walked.append((model, steps))
        if model == "judge" and walked.count((model, steps)) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_all(tmp_path, build_one, lambda words: None)
    build_all(tmp_path, build_one, lambda words: None)
    assert walked == [*ROAD[:3], *ROAD[2:]], "what was interrupted is begun again, what was finished is not"
    build_all(tmp_path, build_one, lambda words: None)
    assert len(walked) == len(ROAD) + 1
    (tmp_path / "built.json").write_text(json.dumps({**dict(ROAD), "decoder": 10}))
    build_all(tmp_path, build_one, lambda words: None)
    assert walked[-1] == ("decoder", 1500) and len(walked) == len(ROAD) + 2


def test_shipping_and_measuring_are_done_on_request_only(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(zoo, "_build_one", lambda model, *given: done.append(model))
    monkeypatch.setattr(zoo, "zoo_ship", lambda folder: done.append("ship"))
    monkeypatch.setattr(zoo, "zoo_report", lambda: done.append("report"))
    words = ["zoo", "build", "all", "--folder", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == 0 and len(done) == len(ROAD)
    assert CliRunner().invoke(app, [*words, "--ship", "--report"]).exit_code == 0 and done[len(ROAD) :] == [
        "ship",
        "report",
    ]
    for wrong in (["all", "--steps", "5"], ["vae"], ["vae", "--steps", "5", "--ship"]):
        said = CliRunner().invoke(app, ["zoo", "build", *wrong])
        assert isinstance(said.exception, EdgeFusionError) and len(done) == len(ROAD) + 2


def test_generate_refuses_an_empty_prompt_and_an_unknown_model(tiny_models, tmp_path) -> None:
    out = tmp_path / "x.png"
    for words, error in (
        (["generate", " ", "--model", str(tiny_models / "teacher"), "--out", str(out)], EdgeFusionError),
        (["generate", "a fox", "--model", "./no-such-folder", "--out", str(out)], RecipeError),
        (["generate", "a fox", "--model", "zoo:nobody", "--out", str(out)], RecipeError),
    ):
        with pytest.raises(error):
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"), [("x", "which kind of picture"), ("x.gif", "which kind"), (".", "a folder")]
)
def test_a_picture_that_could_not_be_written_is_not_drawn(tiny_models, tmp_path, name: str, words: str) -> None:
    asked = ["generate", "a fox", "--model", "./no-such-folder", "--out", str(tmp_path / name)]
    with pytest.raises(EdgeFusionError, match=words):
        CliRunner().invoke(app, asked, catch_exceptions=False)


def test_whoever_stops_a_run_is_told_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(edgefusion, "_run", stopped)
    monkeypatch.setattr("sys.argv", ["edgefusion", "run"])
    with pytest.raises(SystemExit) as end:
        edgefusion.main()
    assert end.value.code == 130 and "The same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize("runner", ["in-process", pytest.param("ray", marks=pytest.mark.ray)])
def test_sigterm_stops_a_run_as_ctrl_c_does(runner: str, tmp_path: Path) -> None:
    work = tmp_path / "work.py"
    work.write_text(STOPPED_AT_WORK.replace("RUNNER", runner))
    process = subprocess.Popen([sys.executable, str(work)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == ["closed", "Stopped. The same command goes on from here."]


STOPPED_AT_WORK = """
import sys, time
import edgefusion
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, start_ray, stop_ray

def work(*_):
    try:
        if "RUNNER" == "ray":
            start_ray(build_recipe(ClusterRecipe, {"cpus": 1}, "test"))
            import ray
            wait = ray.remote(lambda: time.sleep(600)).remote()
        print("at work", flush=True)
        ray.get(wait) if "RUNNER" == "ray" else time.sleep(600)
    finally:
        stop_ray()
        print("closed", file=sys.stderr, flush=True)

edgefusion._run = work
sys.argv = ["edgefusion", "run"]
edgefusion.main()
"""


def test_verify_says_what_a_folder_is(tmp_path) -> None:
    (tmp_path / "run" / "dataset").mkdir(parents=True)
    (tmp_path / "run" / "dataset" / "manifest.parquet").write_bytes(b"")
    for folder, words in ((tmp_path, "is no data set folder"), (tmp_path / "run", r"Did you mean .*run/dataset\?")):
        with pytest.raises(EdgeFusionError, match=words):
            CliRunner().invoke(app, ["factory", "verify", str(folder)], catch_exceptions=False)


WRONG = """
export verify RUN/export | Did you mean RUN/export/onnx?
export try RUN/export fox | Did you mean RUN/export/onnx?
export show RUN | Did you mean RUN/export/onnx?
export verify RUN/export/nope | RUN/export/nope: does not exist
generate fox --model RUN | Did you mean RUN/student?
generate fox --model RUN/studnet | Did you mean RUN/student?
generate fox --model runs/nothere | there is no folder runs/nothere, and the hub's cache holds no such model
factory verify RUN | Did you mean RUN/dataset?
factory verify RUN-that-is-not | RUN-that-is-not: does not exist
trainer evaluate RUN --data RUN/dataset | Did you mean RUN/student?
trainer evaluate RUN/student --data RUN | Did you mean RUN/dataset?
trainer prefer RUN/student RUN/student --data RUN/nope | RUN/nope: does not exist
status RUN/dataset | Did you mean RUN?
"""


def test_a_wrong_folder_is_told_at_once_with_the_one_that_was_meant(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before PyTorch is imported, which takes as long as the work that was asked for."""
    for file in ("run.json", "export/onnx/bundle.json", "student/model_index.json", "dataset/manifest.parquet"):
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for heavy in ("torch", "diffusers", "open_clip"):
        monkeypatch.setitem(sys.modules, heavy, None)
    for line in WRONG.replace("RUN", str(tmp_path / "run")).strip().splitlines():
        words, said = line.split(" | ")
        with pytest.raises(EdgeFusionError) as error:
            CliRunner().invoke(app, words.split(), catch_exceptions=False)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_the_hub_does_not_know_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import RepositoryNotFoundError

    from trainer.models import open_pipeline

    def unknown(*_: object, **__: object) -> None:
        raise OSError("five\nlines") from RepositoryNotFoundError("401", response=unittest.mock.MagicMock())

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unknown)
    with pytest.raises(RecipeError, match="there is no folder owner/name, and no such model on the hub") as error:
        open_pipeline("owner/name")
    assert "\n" not in str(error.value)


def test_generate_writes_the_same_picture_for_the_same_seed(tiny_models, tmp_path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path, seed in zip(files, ("1", "1", "2"), strict=True):
        words = ["generate", "a fox", "--model", str(tiny_models / "teacher"), "--seed", seed, "--out", str(path)]
        assert CliRunner().invoke(app, words).exit_code == 0
    a, b, c = (path.read_bytes() for path in files)
    assert a == b != c


@pytest.mark.parametrize(
    "words", [[], ["run"], ["factory"], ["trainer"], ["export"], ["cluster"], ["zoo"], ["generate"]]
)
def test_every_command_has_help_worth_reading(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and len(result.output) > 300


def test_the_front_door_opens_without_the_heavy_libraries() -> None:
    """`--help` and errors in a recipe come at once, not after PyTorch."""
    heavy = "{'torch', 'diffusers', 'transformers', 'ray', 'open_clip', 'scipy'}"
    words = [sys.executable, "-c", f"import sys, edgefusion; print(sorted({heavy} & sys.modules.keys()))"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "[]"
