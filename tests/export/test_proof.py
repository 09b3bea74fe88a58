import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.errors import CorruptShard, EdgeFusionError, ParityError
from export.bundle import open_bundle
from export.cli import app
from export.noise import noise, philox
from export.proof import write_sums
from export.ssim import ssim
from export.verify import raise_failed, verify_bundle
from export.words import tokenize

PROMPT = "a penguin on a pink background, 3d render, " + "and again " * 30


@pytest.fixture
def damaged(student_bundles: Path, tmp_path: Path) -> Path:
    """A copy of the onnx bundle to do harm to."""
    return Path(shutil.copytree(student_bundles / "onnx", tmp_path / "onnx"))


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # the known answers of Random123, the authors' own library
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, wanted) -> None:
    words = philox(np.array(counter, np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{int(word):08x}" for word in words) == wanted


def test_noise_is_normal_and_its_draws_are_strangers() -> None:
    first, again, other = noise(5, 0, (4, 64, 64)), noise(5, 1, (4, 64, 64)), noise(5 + 2**32, 0, (4, 64, 64))
    assert first.dtype == np.float32 and abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.02
    for stranger in (again, other):
        assert abs(np.corrcoef(first.ravel(), stranger.ravel())[0, 1]) < 0.03
    np.testing.assert_array_equal(noise(5, 0, (4, 64, 64)), first)


def test_ssim_is_the_papers_formula_window_by_window() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (16, 14, 3), np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a, b))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(6):
        for j in range(4):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq, pq = ((window * u).sum() for u in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
            found.append((2 * mp * mq + c1) * (2 * pq + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-4) and ssim(a, b) < 0.99
    assert ssim(a, a) == 1


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_sample_draws_without_this_project(student_bundles: Path, tmp_path: Path, target: str) -> None:
    bundle = shutil.copytree(student_bundles / target, tmp_path / target)
    source = (bundle / "sample.py").read_text()
    assert len(source.splitlines()) < 60
    tree = ast.walk(ast.parse(source))
    used = {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}
    ours = {"numpy", "tokenizers", {"onnx": "onnxruntime", "openvino": "openvino"}[target]}
    assert used - set(sys.stdlib_module_names) == ours
    # Another folder, no PYTHONPATH, and an import hook that bites whoever reaches for the project or PyTorch.
    guard = "import sys, runpy; sys.modules.update({n: None for n in ('cluster', 'factory', 'trainer', 'export', 'edgefusion', 'torch')}); "
    words = ["sample.py", PROMPT, "--seed", str(2**40 + 9), "--out", str(tmp_path / "got.png"), "--build", "fp32"]
    run = f"{guard}sys.argv = {words!r}; runpy.run_path({str(bundle / 'sample.py')!r}, run_name='__main__')"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    build, facts = open_bundle(student_bundles / target, "fp32", 1)
    wanted = build.picture(tokenize(bundle, facts["tokenizer"], [PROMPT])[0], 2**40 + 9)
    got = np.array(Image.open(tmp_path / "got.png"))
    assert np.abs(wanted.astype(int) - got).max() <= 2  # other thread counts add in another order


def test_tokens_are_those_of_transformers(student_bundles: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(student_bundles / "onnx" / "tokenizer")
    lines = ["", PROMPT, "A Fox!  it's 3d", "🦊 l'été"]
    wanted = theirs(lines, padding="max_length", truncation=True, max_length=theirs.model_max_length)["input_ids"]
    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    assert [row[0].tolist() for row in tokenize(student_bundles / "onnx", facts["tokenizer"], lines)] == wanted


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_sound_bundle_proves_itself(student_bundles: Path, target: str) -> None:
    found = verify_bundle(student_bundles / target, prompts=3, runs=2, threads=1)
    assert found["ok"] and found["prompts"] == 3 and "own fp32 build for 1" in found["reference"]
    assert list(found["builds"]) == ["fp32", *{"onnx": ["w8a16", "w8"], "openvino": ["w8"]}[target]]
    exact, rough, *_ = found["builds"].values()
    assert rough["bytes"]["unet"] < 0.5 * exact["bytes"]["unet"]
    assert min(exact["parity"]["graph_snr_db"].values()) > 60 and exact["parity"]["ssim_min"] > 0.99
    assert rough["parity"]["graph_snr_db"]["unet"] < exact["parity"]["graph_snr_db"]["unet"]
    for build in (exact, rough):
        # The CPU plays 16-bit activations, so that time is never called measured.
        kind = "emulated_ms" if target == "onnx" and build is rough else "measured_ms"
        spread, cold = build[kind]["picture"], build["cold"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert 0 < cold["open_s"] < cold["cold_start_s"]
        # More than its weights, and not this test's PyTorch besides.
        assert sum(build["bytes"].values()) / 2 < cold["peak_memory_bytes"] < 2**30
    json.dumps(found)


@pytest.mark.parametrize(
    "name", ["unet.onnx", "reference.npz", "tokenizer/tokenizer.json", "sample.py", "bundle.json", "SHA256SUMS"]
)
def test_a_flipped_bit_fails(damaged: Path, name: str) -> None:
    path = damaged / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = verify_bundle(damaged, runs=1, threads=1)
    assert not found["ok"] and found["broken_files"] and found["builds"] == {}
    if name != "SHA256SUMS":
        assert found["broken_files"] == [f"{name}: is not what SHA256SUMS says"]
    with pytest.raises(CorruptShard):
        raise_failed(found)
    result = CliRunner().invoke(app, ["verify", str(damaged)])
    assert isinstance(result.exception, CorruptShard) and result.exception.exit_code == 4


def test_a_list_that_names_too_little_or_a_place_outside_fails(damaged: Path, tmp_path: Path) -> None:
    sums = damaged / "SHA256SUMS"
    lines = sums.read_text().splitlines()
    sums.write_text("\n".join(line for line in lines if "unet.onnx" not in line) + "\n")
    assert verify_bundle(damaged)["broken_files"] == ["unet.onnx: is not in SHA256SUMS"]
    (tmp_path / "outside").write_text("")
    sums.write_text("\n".join([*lines, f"{'0' * 64}  ../outside"]) + "\n")
    assert verify_bundle(damaged)["broken_files"] == ["../outside: is missing"]
    sums.unlink()
    with pytest.raises(CorruptShard, match="nothing proves the files"):
        verify_bundle(damaged)
    with pytest.raises(EdgeFusionError, match="no finished bundle"):
        verify_bundle(tmp_path)


def test_a_picture_drawn_into_the_bundle_does_no_harm(damaged: Path) -> None:
    (damaged / "out.png").write_bytes(b"a picture")
    assert verify_bundle(damaged, builds=["fp32"], runs=1, threads=1)["ok"]


def test_a_model_that_computes_something_else_misses_its_gate(damaged: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(damaged / "unet.onnx"))
    heavy = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    heavy.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(heavy), heavy.name))
    onnx.save(model, str(damaged / "unet.onnx"))
    write_sums(damaged)  # a wrong model, not a broken file
    found = verify_bundle(damaged, builds=["fp32"], runs=1, threads=1)
    assert not found["ok"] and found["broken_files"] == []
    (missed,) = found["builds"]["fp32"]["missed"]
    assert missed.startswith("unet: SNR")
    with pytest.raises(ParityError):
        raise_failed(found)


def test_what_is_not_a_number_is_told(damaged: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(damaged / "vae_decoder.onnx"))
    heavy = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    heavy.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(heavy) * np.float32("nan"), heavy.name))
    onnx.save(model, str(damaged / "vae_decoder.onnx"))
    write_sums(damaged)  # a wrong model, not a broken file
    found = verify_bundle(damaged, builds=["fp32"], runs=1, threads=1)
    assert found["builds"]["fp32"]["missed"] == ["vae_decoder: gives what is not a number"]


def test_asking_for_too_much_is_answered_in_plain_words(damaged: Path) -> None:
    with pytest.raises(EdgeFusionError, match="there is no w4 build"):
        verify_bundle(damaged, builds=["w4"])
    facts = json.loads((damaged / "bundle.json").read_text())
    del facts["builds"]["fp32"]
    (damaged / "bundle.json").write_text(json.dumps(facts))
    write_sums(damaged)  # a wrong model, not a broken file
    with pytest.raises(EdgeFusionError, match="no fp32 build to draw more"):
        verify_bundle(damaged, prompts=64)
