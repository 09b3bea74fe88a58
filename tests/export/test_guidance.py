"""Guidance as an input of builds: pictures at a scale are those of the same student with guidance fixed there, whoever runs the build."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError, LedgerConflict, RecipeError
from cluster.recipe import load_recipe
from export.bundle import _calibrate, _mark_of, export_student, identity_of, open_bundle
from export.cli import app
from export.demo import write_demo
from export.guidance import embed_scale, spread_scales
from export.layers import HIGH_PRECISION, kept_layers
from export.parity import picture_parity, psnr_db
from export.proof import read_reference, write_sums
from export.recipe import ExportRecipe
from export.runtime import Build
from export.student import open_student
from export.targets.npu_unet import calibrate, meter_unet
from export.targets.unet import HostTime
from export.verify import verify_bundle
from export.words import tokenize
from tests.export.guided import HIGH, LOW, PROMPTS, recipe
from tests.export.test_npu_unet import row, small_unet
from trainer.guidance import embed_guidance


def drawn(bundle: Path, build: str, scale: float | None = None) -> list[np.ndarray]:
    opened, facts = open_bundle(bundle, build, 1)
    rows = tokenize(bundle, facts["tokenizer"], list(PROMPTS))
    return opened.at(scale).pictures(rows, [5, 6])


def test_a_hosts_embedding_is_the_trainers() -> None:
    for scale in (0.0, 1.0, 1.5, 7.5, 15.0):
        wanted = embed_guidance(torch.tensor([scale - 1])).numpy()
        got = embed_scale(scale, 256)
        assert got.dtype == np.float32 and got.shape == wanted.shape
        # In single precision, as the trainer has it, angles of 14,000 rad are a thousandth off.
        np.testing.assert_allclose(got, wanted, atol=2e-3)
    assert not np.allclose(embed_scale(7.5, 256), embed_scale(7.6, 256), atol=0.1)
    assert embed_scale(3.0, 64).shape == (1, 64)


def test_calibration_goes_from_end_to_end() -> None:
    table = {"guidance": {"scale": 4.0, "low": LOW, "high": HIGH, "width": 256}}
    assert spread_scales(table, 5) == [3, 4, 5, 6, 7] and spread_scales(table, 1) == [4]
    assert spread_scales({}, 2) == [None, None]
    still = {"t": 999, "c_skip": 1.0, "c_out": 0.0, "alpha": 1.0, "sigma": 0.0}
    calls = {"text_encoder": lambda _: np.zeros((1, 7, 16)), "unet": lambda given: given["latent"]}
    build = Build(calls, {**table, "prediction_type": "epsilon", "steps": [still]}, (1, 4, 8, 8))
    shown = _calibrate(build, [np.zeros((1, 7), np.int64)] * 3)["unet"]
    np.testing.assert_array_equal([one["guidance"][0] for one in shown], [embed_scale(s, 256)[0] for s in (3, 5, 7)])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["guidance_range=[7,3]"], r"guidance_range goes from 7 to 3"),
        (["guidance_range=[3,3]"], r"guidance_range goes from 3 to 3.*guidance_scale"),
        (["guidance_range=[3,7]", "guidance_scale=8"], r"guidance_scale \(8\) does not lie in export\.guidance_range"),
        (["guidance_range=[-1,7]"], r"guidance_range"),
        (["guidance_range=[1,.inf]"], r"guidance_range"),
        (["guidance_range=5"], r"guidance_range"),
    ],
)
def test_a_range_that_is_none_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(ExportRecipe, None, keys)


def test_a_recipe_without_the_key_is_what_it_was(guided_students: Path) -> None:
    """So that finished bundles, graphs of an interrupted export and digests of recipes stay what they are."""
    plain, ranged = recipe("onnx", guidance_scale=5), recipe("onnx", guidance_scale=5, guidance_range=[LOW, HIGH])
    assert "guidance_range" not in plain.model_dump(mode="json")
    before = identity_of(guided_students / "plain", PROMPTS, plain, "onnx")
    assert "guidance_range" not in before.facts["export"]
    now = identity_of(guided_students / "plain", PROMPTS, ranged, "onnx")
    assert now.changes(before.facts) == ["export.guidance_range: then null, now [3.0, 7.0]"]
    assert before.changes(now.facts) == ["export.guidance_range: then [3.0, 7.0], now no such key"]
    assert _mark_of(guided_students / "plain", plain) != _mark_of(guided_students / "plain", ranged)


def test_a_student_and_a_recipe_that_do_not_go_together_are_refused(guided_students: Path) -> None:
    with pytest.raises(EdgeFusionError, match=r"does not take guidance.*Leave export\.guidance_range out, or train"):
        open_student(guided_students / "plain", recipe("onnx", guidance_range=[LOW, HIGH]))
    with pytest.raises(EdgeFusionError, match=r"neither fixes it nor keeps it.*export\.guidance_scale.*guidance_range"):
        open_student(guided_students / "guided", recipe("onnx"))
    assert (
        open_student(guided_students / "guided", recipe("onnx", guidance_scale=5)).unet.config.time_cond_proj_dim
        is None
    )


def test_a_scale_that_a_build_does_not_take_is_refused() -> None:
    table = {"guidance": {"scale": 4.0, "low": LOW, "high": HIGH, "width": 256}, "steps": []}
    build = Build({}, table, (1, 4, 8, 8))
    assert build.at(None) is build and build.at(7).scheduler["guidance"]["scale"] == 7
    assert build.scheduler["guidance"]["scale"] == 4, "the build itself keeps its own"
    for wrong in (2.9, 7.1, float("nan")):
        with pytest.raises(EdgeFusionError, match="Choose one from 3 to 7"):
            build.at(wrong)
    with pytest.raises(EdgeFusionError, match=r"fixed.*export\.guidance_range"):
        Build({}, {"steps": []}, (1, 4, 8, 8)).at(4)


def test_the_npus_host_takes_guidance() -> None:
    unet = small_unet(time_cond_proj_dim=64)
    rows = [{**row(), "guidance": embed_scale(scale, 64)} for scale in (LOW, HIGH)]
    found, said = calibrate(unet, rows), []
    for given in rows:
        got, _ = meter_unet(unet, HostTime(unet), given, found)
        told = [torch.from_numpy(given[name]) for name in ("latent", "timestep", "text")]
        with torch.no_grad():
            wanted = unet(*told, timestep_cond=torch.from_numpy(given["guidance"])).sample.numpy()
        np.testing.assert_allclose(got, wanted, atol=2e-3)
        said.append(got)
    assert np.abs(said[0] - said[1]).max() > 0.02, "the two scales are heard"


@pytest.mark.long
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_pictures_at_a_scale_are_those_of_guidance_fixed_there(
    guided_students: Path, guided_bundles: Path, tmp_path: Path, target: str
) -> None:
    ways: list[list[np.ndarray]] = []
    for scale in (LOW, 6.5):
        fixed = tmp_path / f"{scale:g}"
        plain = recipe(target, guidance_scale=scale, precisions=["fp32"])
        export_student(guided_students / "guided", PROMPTS, plain, fixed)
        assert "guidance" not in json.loads((fixed / target / "bundle.json").read_text())["scheduler"]
        wanted, got = drawn(fixed / target, "fp32"), drawn(guided_bundles / target, "fp32", scale)
        assert picture_parity(wanted, got)["psnr_db_min"] > 55
        ways.append(got)
    assert psnr_db(np.stack(ways[0]), np.stack(ways[1])) < 40, "the two scales are told apart"
    np.testing.assert_array_equal(drawn(guided_bundles / target, "fp32"), drawn(guided_bundles / target, "fp32", 5.0))


@pytest.mark.long
def test_an_integer_file_with_a_host_takes_guidance(guided_students: Path, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    export_student(guided_students / "guided", PROMPTS, recipe("litert", guidance_range=[LOW, HIGH]), tmp_path)
    facts = json.loads((tmp_path / "litert" / "bundle.json").read_text())
    host = onnx.load(str(tmp_path / "litert" / "unet.w8a16.host.onnx"))
    assert "guidance" in [one.name for one in host.graph.input]
    ways: list[list[np.ndarray]] = []
    for scale in (LOW, HIGH):
        fixed = tmp_path / f"{scale:g}"
        export_student(
            guided_students / "guided", PROMPTS, recipe("onnx", guidance_scale=scale, precisions=["fp32"]), fixed
        )
        got = drawn(tmp_path / "litert", "w8a16", scale)
        assert picture_parity(drawn(fixed / "onnx", "fp32"), got)["psnr_db_min"] > 40
        ways.append(got)
    assert psnr_db(np.stack(ways[0]), np.stack(ways[1])) < 40
    ends = facts["builds"]["w8a16"]["parity"]["ends"]
    assert [ends[end]["scale"] for end in ("low", "high")] == [LOW, HIGH]
    assert min(one["psnr_db_min"] for one in ends.values()) > 40
    check_sample(tmp_path / "litert", "w8a16", tmp_path)


@pytest.mark.long
def test_a_bundle_says_what_it_takes_and_proves_itself(guided_bundles: Path, tmp_path: Path) -> None:
    for target in ("onnx", "openvino"):
        facts = json.loads((guided_bundles / target / "bundle.json").read_text())
        assert facts["scheduler"]["guidance"] == {"scale": 5.0, "low": LOW, "high": HIGH, "width": 256}
        assert facts["made_with"]["export"]["guidance_range"] == [LOW, HIGH]
        found = verify_bundle(guided_bundles / target, runs=1, threads=1)
        assert found["ok"]
        for name, build in found["builds"].items():
            recorded = facts["builds"][name]["parity"]["ends"]
            assert {end: one["psnr_db"] for end, one in build["parity"]["ends"].items()} == {
                end: pytest.approx(one["psnr_db"], abs=3) for end, one in recorded.items()
            }
        card = (guided_bundles / target / "README.md").read_text()
        assert "with guidance as an input" in card and "`--guidance` takes a guidance scale: 3 to 7, 5 where" in card
    reference = read_reference(guided_bundles / "onnx")
    np.testing.assert_array_equal(reference["unet.in.guidance"], embed_scale(5.0, 256))
    assert len(reference["pictures.low"]) == len(reference["pictures.high"]) == 2
    result = CliRunner().invoke(app, ["show", str(guided_bundles / "onnx")])
    assert "guidance scale: 3 to 7, 5 where none is said" in result.output
    page = tmp_path / "compare.html"
    result = CliRunner().invoke(
        app, ["compare", *(str(guided_bundles / t) for t in ("onnx", "openvino")), "--out", str(page), "--runs", "1"]
    )
    assert result.exit_code == 0 and page.stat().st_size > 10_000


@pytest.mark.long
def test_a_build_that_is_wrong_at_one_end_alone_misses_its_gate(guided_bundles: Path, tmp_path: Path) -> None:
    """The gates at the default scale cannot see it."""
    bundle = Path(shutil.copytree(guided_bundles / "onnx", tmp_path / "onnx"))
    path = bundle / "reference.npz"
    arrays = read_reference(bundle)
    arrays["pictures.high"] = 255 - arrays["pictures.high"]
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    write_sums(bundle)
    found = verify_bundle(bundle, builds=["fp32"], runs=1, threads=1)
    missed = found["builds"]["fp32"]["missed"]
    assert not found["ok"] and missed and all(what.startswith("at guidance 7: pictures: ") for what in missed)


@pytest.mark.long
def test_what_hears_guidance_stays_in_float(guided_bundles: Path) -> None:
    source = guided_bundles / "onnx" / "unet.onnx"
    hears = kept_layers(source, ["time_embedding.cond_proj"])
    assert len(hears) == 1 and set(hears) <= set(kept_layers(source, HIGH_PRECISION))
    for precision in ("w8", "w8a16"):
        graph = onnx.load(str(guided_bundles / "onnx" / f"unet.{precision}.onnx")).graph
        stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        (layer,) = (node for node in graph.node if node.name in hears)
        assert layer.input[0] == "guidance" and stored[layer.input[1]] == onnx.TensorProto.FLOAT
        assert onnx.TensorProto.INT8 in stored.values(), "others are not"


def check_sample(bundle: Path, build: str, place: Path) -> None:
    """The sample program draws what the build does, at a scale, at the bundle's own, and refuses others."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(bundle / "sample.py"), PROMPTS[0], "--seed", "5", "--build", build, *words]
        return subprocess.run([*command, "--out", str(place / "got.png")], cwd=place, capture_output=True, text=True)

    for words, scale in ((["--guidance", "6.5"], 6.5), ([], None)):
        done = run(*words)
        assert done.returncode == 0, done.stderr
        got = np.array(Image.open(place / "got.png"))
        assert np.abs(drawn(bundle, build, scale)[0].astype(int) - got).max() <= 2
    done = run("--guidance", "7.5")
    assert done.returncode == 2 and "--guidance goes from 3 to 7" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_sample_takes_a_scale(guided_bundles: Path, tmp_path: Path, target: str) -> None:
    check_sample(guided_bundles / target, "fp32", tmp_path)


@pytest.mark.long
def test_try_takes_a_scale(guided_bundles: Path, student_bundles: Path, tmp_path: Path) -> None:
    def run(bundle: Path, *words: str) -> Any:
        out = ["--seed", "5", "--out", str(tmp_path / "got.png")]
        return CliRunner().invoke(app, ["try", str(bundle), PROMPTS[0], *out, *words])

    assert run(guided_bundles / "onnx", "--guidance", "6.5").exit_code == 0
    wanted = drawn(guided_bundles / "onnx", "fp32", 6.5)[0]
    assert np.abs(wanted.astype(int) - np.array(Image.open(tmp_path / "got.png"))).max() <= 2
    refused = run(guided_bundles / "onnx", "--guidance", "2").exception
    assert isinstance(refused, EdgeFusionError) and "Choose one from 3 to 7" in str(refused)
    refused = run(student_bundles / "onnx", "--guidance", "2").exception
    assert isinstance(refused, EdgeFusionError) and "guidance of this build is fixed" in str(refused)


@pytest.mark.long
def test_a_finished_bundle_without_guidance_is_not_taken_for_one_with_it(
    guided_students: Path, guided_bundles: Path
) -> None:
    with pytest.raises(LedgerConflict, match=r"export\.guidance_range: then \[3\.0, 7\.0\]"):
        export_student(guided_students / "guided", PROMPTS, recipe("onnx", guidance_scale=5), guided_bundles)
    export_student(
        guided_students / "guided", PROMPTS, recipe("onnx", guidance_range=[LOW, HIGH]), guided_bundles
    )  # left alone


@pytest.mark.long
def test_the_page_is_told_of_the_range(guided_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.ort_web.copy_ort_web", lambda folder, tarball: folder.mkdir())
    write_demo(guided_bundles / "onnx", tmp_path / "page")
    told = json.loads((tmp_path / "page" / "demo.json").read_text())
    assert told["scheduler"]["guidance"] == {"scale": 5.0, "low": LOW, "high": HIGH, "width": 256}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_pages_embedding_is_the_hosts() -> None:
    code = "import { embedScale } from './export/web/sampler.js'; console.log(JSON.stringify([1, 3.5, 15].map((s) => Array.from(embedScale(s, 256)))))"
    said = subprocess.run(["node", "--input-type=module", "-e", code], capture_output=True, text=True, check=True)
    for scale, got in zip((1, 3.5, 15), json.loads(said.stdout), strict=True):
        np.testing.assert_allclose(np.array(got, np.float32), embed_scale(scale, 256)[0], atol=1e-6)
