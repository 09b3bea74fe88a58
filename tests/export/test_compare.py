import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import CorruptShard, EdgeFusionError
from export.card import _text
from export.cli import app
from export.compare import _forecast, write_compare
from export.off_chip import fallbacks, off_lines
from export.proof import write_sums
from export.verify import verify_bundle
from export.verify_view import recorded_lines


def test_bundles_stand_side_by_side_with_full_precision(student_bundles: Path, tmp_path: Path) -> None:
    folders = [student_bundles / "onnx", student_bundles / "openvino"]
    page = write_compare(folders, tmp_path / "compare.html", prompts=2, runs=1, threads=1).read_text()
    pictures = re.findall(r'<img src="(data:image/png;base64,[^"]+)" alt="([^"]+)"', page)
    # Two prompts; full precision, then fp32, w8a16 and w8 of onnx, fp32 and w8 of openvino.
    assert len(pictures) == 2 * 6 and pictures[0][1].startswith("PyTorch fp32, stored in onnx")
    by_name = {alt.split(":")[0]: url for url, alt in pictures[:6]}
    assert by_name["w8, openvino"] != by_name["PyTorch fp32, stored in onnx"]
    assert len(set(by_name.values())) >= 3
    # Emulated times have columns of their own, and no ratio to what was measured: w8a16's alone.
    table = page.split("<h2>Size, time and memory</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line, re.S) for line in table.split("<tr>")[3:]]
    assert [row[1] for row in rows] == ["fp32", "w8a16", "w8", "fp32", "w8"] and {len(row) for row in rows} == {11}
    for row in rows:
        measured, emulated = row[3:7], row[7:]
        played = row[1] == "w8a16"
        assert all(emulated if played else measured) and not any(measured if played else emulated)
    assert "×" not in rows[1][7] and "×" in rows[2][3]
    assert page.count("all hold") == 5
    head = page.split("was taken in one go on")[1].split("Times with")[0]
    assert "onnxruntime" in head and "openvino" in head  # what each was measured on, not the first one's alone
    assert "None of these bundles holds predicted" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # whole by itself


def test_forecasts_are_summed_and_never_mixed() -> None:
    cost = {"untiled": {"dram_bytes": 4e6, "latency_s": 2e-3}, "chosen": {"dram_bytes": 1e6, "latency_s": 1e-3}}
    tiling = {"profile": "p", "predicted": {"a": cost, "b": cost}, "compiler_estimated": None, "emulated": None}
    told = _forecast(tiling)
    assert told is not None and told["compiler_estimated"] is None
    assert told["predicted"]["untiled"] == {"dram_mb": 8.0, "ms": 4.0} and told["predicted"]["chosen"]["ms"] == 2.0
    estimated = {"a": cost, "b": {"untiled": "the compiler died", "chosen": cost["chosen"]}}
    told = _forecast({**tiling, "compiler_estimated": estimated})
    assert told is not None and told["compiler_estimated"]["untiled"]["dram_mb"] == 4.0
    # Both over the block that the compiler told of, or the one would look half as dear as the other.
    assert told["predicted"]["untiled"]["dram_mb"] == 4.0 and told["blocks"] == "1 of 2"
    told = _forecast({**tiling, "compiler_estimated": {"b": estimated["b"]}})
    assert told is not None and told["compiler_estimated"] is None and told["blocks"] == "2 of 2"
    assert _forecast(None) is None


def test_a_bundle_that_does_not_run_here_ends_no_comparison(
    student_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.targets.contract.find_spec", lambda _: None)
    other = Path(shutil.copytree(student_bundles / "onnx", tmp_path / "coreml"))
    facts = json.loads((other / "bundle.json").read_text())
    facts |= {"target": "coreml", "measured_on": "a Mac"}
    (other / "bundle.json").write_text(json.dumps(facts))
    write_sums(other)
    page = write_compare([student_bundles / "openvino", other], tmp_path / "page.html", 1, 1, 1).read_text()
    assert page.count("all hold") == 2 and page.count("not run here: target coreml needs coremltools") == 3
    stored = page.split("<h2>Not run here</h2>")[1].split("</table>")[0]
    assert stored.count("<tr>") == 4 and stored.count("a Mac, onnxruntime") == 3
    assert str(facts["builds"]["w8a16"]["emulated_ms"]["picture"]) in stored
    assert re.search(r'alt="PyTorch fp32, stored in \S*openvino:', page) and not re.search(
        r'alt="\w+, \S*coreml:', page
    )
    (other / "unet.onnx").write_bytes(b"")
    with pytest.raises(CorruptShard, match=r"unet\.onnx"):
        write_compare([other], tmp_path / "page.html", 1, 1, 1)


VELA = {"profile": "ethos-u85-1024", "dram_bytes": 10_100_000, "sram_bytes": 1, "latency_s": 2.74e-3, "npu_cycles": 1}
FALLBACK = {"accelerated": 960, "not_accelerated": {"Softmax": 3}, "said_by": "Vela"}


def with_a_compilers_word(bundle: Path, place: Path) -> Path:
    """A copy of a bundle whose w8 build says what Arm's compiler told of it."""
    folder = Path(shutil.copytree(bundle, place))
    facts = json.loads((folder / "bundle.json").read_text())
    facts["builds"]["w8"] |= {
        "fallback": {"unet": FALLBACK, "vae_decoder": None},
        "compiler_estimated": {"unet": {**VELA, "said_by": "Vela; no device"}, "vae_decoder": None},
        "tiled": {"profile": "ethos-u85-1024", "blocks": 5},
    }
    (folder / "bundle.json").write_text(json.dumps(facts))
    write_sums(folder)
    return folder


def test_a_compilers_word_is_on_every_page(student_bundles: Path, tmp_path: Path) -> None:
    """compare said of such a bundle that it holds no compiler-estimated figure, and nothing read `fallback`."""
    folder = with_a_compilers_word(student_bundles / "onnx", tmp_path / "onnx")
    wanted = [
        "3 Softmax; on it 960 (Vela)",
        "2.74 ms and 10.1 MB of DRAM traffic a call on ethos-u85-1024 (Vela; no device)",
    ]
    page = write_compare([folder], tmp_path / "compare.html", prompts=1, runs=1, threads=1).read_text()
    assert all(words in page for words in wanted) and "None of these bundles holds" not in page
    card = _text(json.loads((folder / "bundle.json").read_text()))
    assert all(words in card for words in [*wanted, "5 blocks for ethos-u85-1024"])
    shown = CliRunner().invoke(app, ["show", str(folder)]).output
    assert all(words in shown for words in [*wanted, "5 blocks for ethos-u85-1024"])
    told = recorded_lines(verify_bundle(folder, builds=["w8"], runs=1, threads=1))
    assert told[0].startswith("As the bundle says") and all(words in "\n".join(told) for words in wanted)


def test_other_targets_words_are_told_too() -> None:
    exynos = {"accelerated": None, "not_accelerated": None, "said_by": "nobody", "operators": {"CONV_2D": 7, "ADD": 2}}
    executorch = {"accelerated_parts": 4, "not_accelerated": {}, "said_by": "the plan"}
    tensorrt = {"accelerated": 9, "not_accelerated": {"Sin": 1}, "on_cuda": {"Conv": 2}, "said_by": "its profile"}
    said = dict(fallbacks({"fallback": {"a": exynos, "b": executorch, "c": tensorrt, "d": None}}))
    assert said == {
        "a": "not known, nobody; its compiler will be shown 9",
        "b": "none; on it 4 parts (the plan)",
        "c": "1 Sin; by CUDA 2 Conv; on it 9 (its profile)",
    }
    assert off_lines("w8", {}) == []  # an older version's


def test_a_damaged_bundle_and_the_same_twice_are_refused(student_bundles: Path, tmp_path: Path) -> None:
    sound = student_bundles / "onnx"
    with pytest.raises(EdgeFusionError, match="named twice"):
        write_compare([sound, sound / ".." / "onnx"], tmp_path / "page.html")
    broken = Path(shutil.copytree(sound, tmp_path / "broken"))
    (broken / "unet.onnx").write_bytes(b"")
    with pytest.raises(CorruptShard, match=r"unet\.onnx"):
        write_compare([broken, sound], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
