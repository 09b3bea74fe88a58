"""The whole chain on tiny untrained models: what is promised about reruns, kills, runners and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline

from chain import Chain, Recipe
from cluster.errors import EdgeFusionError
from cluster.events import read_events
from cluster.recipe import load_recipe
from cluster.status import read_status
from factory.verify import verify

FRONT_DOOR = Path(__file__).parent.parent / "edgefusion.py"


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(FRONT_DOOR), "run", str(recipe), "--out", str(out), *more]


def data_bytes(out: Path) -> dict[str, bytes]:
    """Every file of the data set but the index, a copy of the ledger's columns that notes when each entry was written."""
    data = out / "dataset"
    files = [p for p in sorted(data.rglob("*")) if p.is_file() and p.parent.name != "index"]
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def undisturbed(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, finished output folder)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_settings(tiny_models)))
    Chain(load_recipe(Recipe, recipe), folder / "out").run()
    return recipe, folder / "out"


def tiny_settings(models: Path) -> dict:
    """recipes/pocket.yaml with the tiny models and tiny counts, in this process."""
    recipe = yaml.safe_load((FRONT_DOOR.parent / "recipes" / "pocket.yaml").read_text())
    recipe["cluster"]["runner"] = "in-process"
    plan, make, trainer = recipe["factory"]["plan"], recipe["factory"]["make"], recipe["trainer"]
    plan |= {"taxonomy": str(models / "taxonomy.yaml"), "prompts": 24}
    plan["writer"]["model"] = str(models / "writer")
    make["teacher"] |= {"model": str(models / "teacher"), "size_px": 32, "steps": 2, "batch_images": 4}
    make |= {"scorer": {"kind": "open_clip", "model": str(models / "clip")}, "unit_images": 8, "threads": 1}
    recipe["factory"]["select"] = {"min_clip": -1.0, "max_hamming_bits": 0, "max_colour_difference": 0}
    trainer |= {"teacher": str(models / "teacher"), "start": None, "size_px": 32, "threads": 1}
    trainer["adapt"] |= {"steps": 3, "batch_images": 4}
    trainer["distill"] |= {"steps": 3, "batch_images": 4}
    trainer["grid_prompts"] = ["a fox", "a key"]
    gates = {"quantised_psnr_db": 5.0, "ssim": None, "block_snr_db": None}
    recipe["export"] |= {"calibration_prompts": 2, "parity_prompts": 2, "latency_runs": 1, "gates": gates}
    return recipe


def test_a_run_leaves_what_it_promises(undisturbed: tuple[Path, Path]) -> None:
    _, out = undisturbed
    facts = json.loads((out / "run.json").read_text())
    funnel = facts["funnel"]
    assert funnel["planned"] == 24 == funnel["kept"] + funnel["rejected"] + funnel["dead"]
    assert verify(out / "dataset") == funnel["kept"] > 8
    pipeline = DiffusionPipeline.from_pretrained(out / "student")
    assert pipeline.unet.config["block_out_channels"] == [8, 16, 16]
    for target, names in {"onnx": {"fp32", "w8a16", "w8"}, "openvino": {"fp32", "w8"}}.items():
        builds = json.loads((out / "export" / target / "bundle.json").read_text())["builds"]
        assert set(builds) == names
        assert min(builds["fp32"]["parity"]["graph_snr_db"].values()) > 60
    said = list(read_events(out))
    assert [e["event"] for e in said if e["event"].endswith(" ended")] == [
        *(f"step {step} ended" for step in Chain.STEPS),
        "run ended",
    ]
    assert {e["run"] for e in said} == {facts["run"]} and len({e["start"] for e in said}) == 1
    noted = [e["unit"] for e in said if e["event"] == "unit" and e["stage"] == "commit"]
    assert sorted(f"{unit}.parquet" for unit in noted) == sorted(p.name for p in (out / "dataset" / "ledger").iterdir())
    compared = (out / "compare.html").read_text()
    assert "PyTorch fp32, stored in onnx" in compared and compared.count("all hold") == 5
    page = (out / "report.html").read_text()
    assert '<a href="compare.html">' in page and f"edgefusion export try {out / 'export' / 'onnx'}" in page
    assert page.count("data:image/png") > 8 and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://localhost", ""
    )


def test_a_finished_run_does_nothing_again(undisturbed: tuple[Path, Path]) -> None:
    recipe, out = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    said = subprocess.run(command(recipe, out), capture_output=True, text=True, check=True)
    assert "nothing to do" in said.stdout
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_what_was_stopped_in_a_step_is_said_to_be_in_no_sum(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = copy
    chain = load_recipe(Recipe, recipe)
    page = (out / "report.html").read_text()
    assert "for the whole chain</div>" in page and "stopped or killed" not in page

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    (out / "report.html").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Chain, "_report", stopped)
        Chain(chain, out).run()
    Chain(chain, out).run()
    facts = json.loads((out / "run.json").read_text())
    assert facts["cut_off"] == {"report": 1} and "under_way" not in facts
    page = (out / "report.html").read_text()
    assert "for the whole chain, without 1 step stopped or killed" in page and "report (1×)." in page
    assert rate_of_make(out) is not None
    (out / "run.json").write_text(json.dumps({**facts, "cut_off": {"make": 1}}))
    assert rate_of_make(out) is None, "its pictures are counted, and its seconds are not"


def rate_of_make(out: Path) -> float | None:
    return next(row["per_s"] for row in read_status(out)["stages"] if row["stage"] == "make")


KILL_POINTS: dict[str, Callable[[Path], bool]] = {
    "while planning": lambda out: (out / "run.json").exists(),
    "while making": lambda out: (out / "dataset" / "ledger" / "unit-00000.parquet").exists(),
    "while training": lambda out: (out / "training" / "adapt" / "metrics.jsonl").exists(),
    "while exporting": lambda out: (out / "export" / ".graphs").exists(),
}


@pytest.mark.long
def test_killed_anywhere_and_run_again_gives_the_same_bytes(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = undisturbed
    out = tmp_path / "out"
    for moment, reached in KILL_POINTS.items():
        process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not reached(out) and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, f"the run ended before it could be killed {moment}"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "report.html").exists() and not (out / "compare.html").exists()
    subprocess.run(command(recipe, out), check=True, capture_output=True)
    assert data_bytes(out) == data_bytes(whole)
    unet = "student/unet/diffusion_pytorch_model.safetensors"
    assert (out / unet).read_bytes() == (whole / unet).read_bytes()
    assert not [p for p in out.rglob("*") if ".partial-" in p.name]


@pytest.mark.ray
@pytest.mark.long
def test_ray_gives_the_same_bytes(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = undisturbed
    more = ["--set", "cluster.runner=ray", "--set", "factory.make.render_workers=2"]
    said = subprocess.run(command(recipe, tmp_path / "out", *more), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    mine, theirs = data_bytes(tmp_path / "out"), data_bytes(whole)
    assert mine == theirs
    unet = "student/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / unet).read_bytes() == (whole / unet).read_bytes()


def fails(recipe: Path, out: Path, *overrides: str) -> str:
    """The message of the run's error, which must be one of ours."""
    with pytest.raises(EdgeFusionError) as caught:
        Chain(load_recipe(Recipe, recipe, overrides), out).run()
    return str(caught.value)


@pytest.fixture
def copy(undisturbed: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A finished run to damage."""
    shutil.copytree(undisturbed[1], tmp_path / "out")
    return undisturbed[0], tmp_path / "out"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("factory.make.teacher.model=./no-such-folder", "there is no model folder ./no-such-folder"),
        ("factory.make.teacher.model=zoo:teecher", "zoo:teecher is not in the zoo"),
        ("factory.plan.taxonomy=nowhere.yaml", "there is no taxonomy nowhere.yaml"),
        ("trainer.start=./nothing", "there is no model folder ./nothing"),
        ("factory.select.min_clip=1.0", "the data set is empty"),
    ],
)
def test_a_run_that_cannot_work_says_why(
    undisturbed: tuple[Path, Path], tmp_path: Path, override: str, words: str
) -> None:
    assert words in fails(undisturbed[0], tmp_path / "out", override)
    if "select" not in override:
        assert not (tmp_path / "out").exists(), "a recipe that cannot run took the folder"


def test_a_folder_of_another_recipe_or_of_someone_else_is_refused(copy: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, out = copy
    assert "another recipe: seed is 7 there and 8 now" in fails(recipe, out, "seed=8")
    # Where it runs is another matter: begun on a laptop, gone on with under a head of another address each time.
    elsewhere = ["cluster.runner=ray", "cluster.address=192.0.2.9:6379", "cluster.train_workers=2"]
    assert not Chain(load_recipe(Recipe, recipe, elsewhere), out).run(), "there is nothing to do"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "holds no run" in fails(recipe, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_stops_training(copy: tuple[Path, Path]) -> None:
    recipe, out = copy
    for folder in ("training", "student", "samples", "export"):
        shutil.rmtree(out / folder)
    (out / "report.html").unlink()
    flip(out / "dataset" / "shard-000000.tar")
    assert "shard-000000.tar" in fails(recipe, out)


@pytest.mark.parametrize(("name", "harm"), [("pictures/unit-00001", flip), ("ledger/unit-00001", cut), ("plan", cut)])
def test_a_damaged_ledger_stops_packing(copy: tuple[Path, Path], name: str, harm: Callable[[Path], None]) -> None:
    recipe, out = copy
    (out / "dataset" / "manifest.parquet").unlink()
    harm(out / "dataset" / f"{name}.parquet")
    assert f"{name}.parquet" in fails(recipe, out)


def test_a_lost_unit_is_made_again(copy: tuple[Path, Path], undisturbed: tuple[Path, Path]) -> None:
    recipe, out = copy
    (out / "dataset" / "manifest.parquet").unlink()
    (out / "dataset" / "ledger" / "unit-00001.parquet").unlink()
    (out / "dataset" / "pictures" / "unit-00001.parquet").unlink()
    Chain(load_recipe(Recipe, recipe), out).run()
    assert data_bytes(out) == data_bytes(undisturbed[1])


def test_errors_are_plain_and_exit_codes_differ_by_kind(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, out = undisturbed
    for more, code in ((["--set", "seeed=1"], 2), (["--set", "seed=9"], 5)):
        said = subprocess.run(command(recipe, out, *more), capture_output=True, text=True)
        assert said.returncode == code
        assert "Error:" in said.stderr and "Traceback" not in said.stderr
    said = subprocess.run(command(recipe, out, "--set", "seed=9", "--debug"), capture_output=True, text=True)
    assert "Traceback" in said.stderr


@pytest.mark.long
def test_a_build_that_misses_its_gate_is_not_called_built(copy: tuple[Path, Path], tmp_path: Path) -> None:
    from cluster.errors import ParityError
    from export.bundle import export_student
    from export.recipe import ExportRecipe

    strict = ExportRecipe.model_validate(
        {"targets": ["openvino"], "parity_prompts": 1, "calibration_prompts": 1, "gates": {"quantised_psnr_db": 150}}
    )
    with pytest.raises(ParityError, match="w8 build is too far"):
        export_student(copy[1] / "student", ["a fox"], strict, tmp_path / "export")
    assert not (tmp_path / "export" / "openvino").exists()
