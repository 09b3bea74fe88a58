import json
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RecipeError
from export.blocks import Block, attention_blocks, read_architecture
from export.plan_view import plan_table, totals, write_plan
from export.profile import load_profile, profile_names
from export.solve import choices, predict, solve

SMALL = str(Path(__file__).with_name("small-npu.yaml"))
BIG = Block("a", queries=4096, keys=4096, width=320, key_width=320, heads=8, crossed=False)


def changed(tmp_path: Path, **values: object) -> str:
    lines = Path(SMALL).read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in values]
    added = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    (tmp_path / "npu.yaml").write_text("\n".join(kept + added))
    return str(tmp_path / "npu.yaml")


@pytest.mark.parametrize("macs", [128, 256, 512, 1024, 2048])
def test_bandwidths_of_an_ethos_u85_are_those_of_arms_file(macs: int) -> None:
    spec = find_spec("ethosu")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("Vela is not installed")
    arm = ConfigParser()
    arm.read(Path(next(iter(spec.submodule_search_locations))) / "config_files" / "Arm" / "vela.ini")
    chip = load_profile(f"ethos-u85-{macs}")
    assert chip.vela is not None and chip.vela.accelerator == f"ethos-u85-{macs}"
    told = arm[f"System_Config.{chip.vela.system}"]
    for memory, figure in (("Dram", chip.dram_bytes_per_s), ("Sram", chip.sram_bytes_per_s)):
        clock = float(told["core_clock"]) * float(told[f"{memory}_clock_scale"])
        assert figure.source and figure.value == clock * 16 * int(told[f"{memory}_ports_used"])


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_whole_and_named_like_their_files(name) -> None:
    assert load_profile(name).name == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sram_bytes": {"value": 12288}}, "give either `source` or `assumed`"),
        ({"sram_bytes": {"value": 1, "source": "a book", "assumed": "a test"}}, "give either"),
        ({"sram_bytes": {"value": -1, "assumed": "a test"}}, "greater than 0"),
        ({"sram_fill": {"value": 1.5, "assumed": "a test"}}, "at most 1, not 1.5"),
        ({"sram_bytes_per_s": {"value": 10, "assumed": "a test"}}, "nothing to gain"),
        ({"live_scores": None}, "live_scores is missing"),
        ({"srambytes": 4}, "Did you mean sram_bytes"),
    ],
)
def test_bad_profiles_are_refused_by_key(tmp_path, values, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_profile(changed(tmp_path, **values))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean ethos-u85-1024"):
        load_profile("ethos-u85-1025")


def test_a_budget_that_no_tile_fits_says_how_much_is_missing(tmp_path) -> None:
    profile = load_profile(changed(tmp_path, sram_bytes={"value": 1000, "assumed": "a test"}))
    with pytest.raises(RecipeError, match=r"a: even its smallest tile .* needs 65,536 bytes; small-npu has 1,000"):
        solve([BIG], profile)


@pytest.mark.parametrize("name", profile_names())
def test_the_paper_s_block_is_tiled_into_what_fits(name) -> None:
    profile = load_profile(name)
    plan = solve([BIG], profile).blocks[0]
    assert plan.is_tiled and plan.chosen.cost.working_set_bytes <= profile.budget_bytes
    assert plan.untiled.cost.working_set_bytes > profile.budget_bytes
    assert plan.chosen.cost.dram_bytes * 5 < plan.untiled.cost.dram_bytes
    assert plan.chosen.cost.latency_s < plan.untiled.cost.latency_s


def test_a_block_that_fits_stays_untiled() -> None:
    assert not solve([Block("a", 64, 64, 64, 64, 4, False)], load_profile("ethos-u85-1024")).tiled


@given(st.sampled_from([16, 64, 96, 256]), st.sampled_from([7, 64, 77]), st.sampled_from([1, 4, 6]), st.integers(1, 32))
def test_every_choice_is_an_even_cut_and_none_beats_the_chosen(queries, keys, heads, head_width) -> None:
    block = Block("a", queries, keys, heads * head_width, 24, heads, True)
    profile = load_profile(SMALL)
    tried = choices(block, profile)
    assert (tried[0].head_group, tried[0].query_tiles) == (heads, 1)
    assert len({(c.head_group, c.query_tiles) for c in tried}) == len(tried)
    assert all(heads % c.head_group == 0 and queries % c.query_tiles == 0 for c in tried)
    assert all(c.query_tiles == 1 or queries // c.query_tiles % profile.row_multiple == 0 for c in tried)
    chosen = solve([block], profile).blocks[0].chosen
    assert chosen.cost.latency_s <= min(c.cost.latency_s for c in tried) / 0.98


def test_traffic_by_hand_when_everything_fits_and_when_scores_spill(tmp_path) -> None:
    block = Block("a", queries=64, keys=32, width=16, key_width=8, heads=2, crossed=True)
    # tokens in and out of four projections, their weights, then Q, K, V and O of the products
    projected = 2 * (2 * 64 * 16 * 2 + 2 * 32 * (8 + 16)) + 2 * 16 * (16 + 8)
    operands = 2 * (2 * 64 * 16 + 2 * 32 * 16)
    roomy = load_profile(changed(tmp_path, sram_bytes={"value": 1e6, "assumed": "a test"}))
    assert predict(block, roomy, 2, 1).dram_bytes == projected + operands
    scores = 2 * 2 * 64 * 32
    half = load_profile(changed(tmp_path, keeps_keys=False, sram_bytes={"value": scores, "assumed": "a test"}))
    assert predict(block, half, 2, 1).dram_bytes == projected + operands + 4 * scores // 2


def test_bk_sdm_tiny_has_the_published_blocks() -> None:
    blocks = attention_blocks(*read_architecture("bk-sdm-tiny"))
    assert len(blocks) == 18 and sum(b.crossed for b in blocks) == 9
    assert blocks[0] == Block("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 4096, 4096, 320, 320, 8, False)
    assert (blocks[3].queries, blocks[3].keys, blocks[3].key_width) == (1024, 77, 768)
    assert attention_blocks(*read_architecture("bk-sdm-tiny", 256))[0].queries == 1024


def test_sizes_and_models_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match="multiple of 8"):
        read_architecture("bk-sdm-tiny", 500)
    with pytest.raises(RecipeError, match="cannot be halved 2 times"):
        attention_blocks(*read_architecture("bk-sdm-tiny", 8))
    with pytest.raises(RecipeError, match="bk-sdm-tiny"):
        read_architecture("no-such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="no UNet's config"):
        read_architecture(str(tmp_path))


def test_the_plan_is_written_whole(tmp_path) -> None:
    profile = load_profile("ethos-u85-1024")
    plan = solve(attention_blocks(*read_architecture("bk-sdm-tiny")), profile)
    facts, picture = write_plan(plan, profile, "bk-sdm-tiny", tmp_path)
    read = json.loads(facts.read_text())
    before, after = totals(plan)
    assert (
        read["predicted_totals"] == {"untiled": before, "chosen": after} and after["dram_bytes"] < before["dram_bytes"]
    )
    assert read["profile_values"]["sram_bytes"]["assumed"] and len(read["blocks"]) == 18
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert plan_table(plan, profile).row_count == 19
