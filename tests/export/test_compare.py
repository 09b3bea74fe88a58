import re
import shutil
from pathlib import Path

import pytest

from cluster.errors import CorruptShard, EdgeFusionError
from export.compare import _forecast, write_compare


def test_bundles_stand_side_by_side_with_full_precision(student_bundles: Path, tmp_path: Path) -> None:
    folders = [student_bundles / "onnx", student_bundles / "openvino"]
    page = write_compare(folders, tmp_path / "compare.html", prompts=2, runs=1, threads=1).read_text()
    pictures = re.findall(r'<img src="(data:image/png;base64,[^"]+)" alt="([^"]+)"', page)
    # Two prompts; full precision, then fp32, w8a16 and w8 of onnx, fp32 and w8 of openvino.
    assert len(pictures) == 2 * 6 and pictures[0][1].startswith("PyTorch fp32, stored in onnx")
    by_name = {alt.split(":")[0]: url for url, alt in pictures[:6]}
    assert by_name["w8, openvino"] != by_name["PyTorch fp32, stored in onnx"]
    assert len(set(by_name.values())) >= 3
    assert page.count("time emulated") == 1  # w8a16 alone
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


def test_a_damaged_bundle_and_the_same_twice_are_refused(student_bundles: Path, tmp_path: Path) -> None:
    sound = student_bundles / "onnx"
    with pytest.raises(EdgeFusionError, match="named twice"):
        write_compare([sound, sound / ".." / "onnx"], tmp_path / "page.html")
    broken = Path(shutil.copytree(sound, tmp_path / "broken"))
    (broken / "unet.onnx").write_bytes(b"")
    with pytest.raises(CorruptShard, match=r"unet\.onnx"):
        write_compare([broken, sound], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
