import json
from pathlib import Path

import pytest

from cluster.errors import EdgeFusionError
from export.blocks import Block
from export.bundle import export_student, open_bundle
from export.profile import load_profile
from export.recipe import ExportRecipe, TilingRecipe
from export.solve import solve
from export.tiled_build import tiling_facts
from factory.models import resolve

SMALL = str(Path(__file__).with_name("small-npu.yaml"))


def recipe(profile: str) -> ExportRecipe:
    return ExportRecipe(
        tiling=TilingRecipe(profile=profile),
        precisions=["fp32", "w8a16"],
        calibration_prompts=1,
        parity_prompts=1,
        latency_runs=1,
        threads=1,
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export_student(Path(resolve("zoo:student-fewstep")), ["a red apple"], recipe(SMALL), folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "builds"),
    [
        ("onnx", ["fp32", "fp32-tiled", "w8a16", "w8a16-tiled"]),
        ("openvino", ["fp32", "fp32-tiled"]),
    ],
)
def test_a_bundle_holds_proven_tiled_builds_beside_the_untiled(bundles, target, builds) -> None:
    facts = json.loads((bundles / target / "bundle.json").read_text())
    assert list(facts["builds"]) == builds
    assert facts["builds"]["fp32-tiled"]["parity"]["graph_snr_db"]["unet"] > 80
    assert facts["builds"]["fp32-tiled"]["graphs"]["unet"] != facts["builds"]["fp32"]["graphs"]["unet"]
    for name in builds[1::2]:
        tiling = facts["builds"][name]["tiling"]
        assert tiling["profile"] == "small-npu" and any(row["tiled"] for row in tiling["plan"])
        assert set(tiling["predicted"]) == {row["name"] for row in tiling["plan"]}
        kind, other = ("emulated", "measured") if name.startswith("w8a16") else ("measured", "emulated")
        assert facts["builds"][name]["tiled"] == {
            "profile": "small-npu",
            "blocks": sum(row["tiled"] for row in tiling["plan"]),
        }
        assert facts["builds"][name.removesuffix("-tiled")]["tiled"] == {"profile": None, "blocks": 0}
        assert tiling["compiler_estimated"] is None and tiling[other] is None
        assert tiling[kind]["unet_ms"] > 0 and "CPU, 1 thread" in tiling[kind]["where"]
    assert open_bundle(bundles / target, "fp32-tiled", 1)[0].shape == (1, 16, 8, 8)


@pytest.mark.long
def test_a_plan_without_tiles_makes_no_second_build(tmp_path) -> None:
    chosen = recipe("ethos-u85-1024").model_copy(update={"targets": ["onnx"], "precisions": ["fp32"]})
    export_student(Path(resolve("zoo:student-fewstep")), ["a red apple"], chosen, tmp_path)
    facts = json.loads((tmp_path / "onnx" / "bundle.json").read_text())
    assert list(facts["builds"]) == ["fp32"]
    assert facts["tiling"] == {"profile": "ethos-u85-1024", "blocks_planned": 0}


@pytest.mark.long
def test_a_recipe_may_ask_the_compiler_and_its_word_is_kept_apart(tmp_path) -> None:
    asked = recipe(SMALL).model_copy(update={"tiling": TilingRecipe(profile=SMALL, compile=True)})
    with pytest.raises(EdgeFusionError, match=r"not an Arm NPU|\[npu\]"):
        export_student(Path(resolve("zoo:student-fewstep")), ["a red apple"], asked, tmp_path)
    plan = solve([Block("a", 4096, 4096, 320, 320, 8, False)], load_profile("ethos-u85-1024"))
    facts = tiling_facts(plan, "measured", "x86_64 CPU", 1.0, 2.0, {"a": {"untiled": {}, "chosen": {}}})
    assert facts["compiler_estimated"] == {"a": {"untiled": {}, "chosen": {}}} and facts["emulated"] is None


def test_times_of_integers_that_a_cpu_plays_are_not_called_measured() -> None:
    plan = solve([Block("a", 4096, 4096, 320, 320, 8, False)], load_profile("ethos-u85-1024"))
    emulated, measured = (tiling_facts(plan, kind, "x86_64 CPU", 1.0, 2.0) for kind in ("emulated", "measured"))
    assert emulated["emulated"] == measured["measured"] and emulated["emulated"]["untiled_unet_ms"] == 2.0
    assert emulated["measured"] is None and measured["emulated"] is None
