"""The simulator where the answer is known by other means, and the laws that hold for any dice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.needs import Phase
from cluster.scenario import Outcome, Scenario
from cluster.simulate import limits, simulate
from cluster.simulate_page import write_page
from edgefusion import app

pytest.importorskip("simpy", reason="simpy is not installed: pip install -e '.[dev]'")

CALM = Scenario(gpus=4, samples=640, unit_images=64, make_per_s=2.0, load_s=30, price_per_gpu_hour=3.6)
PHASE = Phase("adapt", steps=1000, batch_images=64, checkpoint_s=60)


def test_without_losses_the_clock_is_arithmetic() -> None:
    # Ten units of 32 s on four GPUs: three rounds, two GPUs idle in the last.
    out = simulate(CALM)
    assert out.make_s == pytest.approx(30 + 3 * 32)
    assert (out.useful_s, out.lost_s, out.waiting_s, out.preemptions) == (320, 0, 2 * 32, 0)
    assert out.cost == pytest.approx(4 * out.make_s / 1000)
    trained = simulate(replace(CALM, samples=0, phases=((PHASE, 10.0),)))
    assert trained.train_s == pytest.approx(30 + 1600) and trained.useful_s == pytest.approx(4 * 1600)


def test_a_slow_scorer_is_the_bottleneck_and_the_last_unit_may_be_short() -> None:
    out = simulate(replace(CALM, gpus=1, samples=100, score_per_s=1.0))
    # Units of 64 and 36: the first is scored from 62 to 126, the second from then to 162.
    assert out.make_s == pytest.approx(30 + 32 + 64 + 36)


def test_training_loses_what_a_poisson_process_says_it_must() -> None:
    """One GPU, no checkpoint within the phase: the expected time to finish t seconds at rate r is (e^(rt) - 1) / r."""
    phase = Phase("adapt", 360, 10, checkpoint_s=math.inf)
    play = Scenario(1, 0, 1, 1.0, ((phase, 1.0),), preemptions_per_hour=1.0, provision_s=0, load_s=0)
    mean = sum(simulate(play, seed).train_s for seed in range(4000)) / 4000
    assert mean == pytest.approx((math.e - 1) * 3600, rel=0.06)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 400),
    st.integers(1, 64),
    st.floats(0, 30),
    st.integers(0, 99),
    st.floats(0, 200),
    st.integers(1, 40),
    st.floats(0, 9),
)
def test_all_that_is_held_is_accounted_for_and_all_work_is_done_once(
    gpus: int, samples: int, unit: int, losses: float, seed: int, load: float, window: int, waits: float
) -> None:
    play = replace(
        Scenario(gpus, samples, unit, 2.0, ((replace(PHASE, steps=20), 4.0),), 2, 5.0, losses, 60, load),
        window_units=window,
        window_s=waits,
        driver_s=waits / 9,
        storage_latency_s=waits / 3,
    )
    out = simulate(play, seed, played_windows=1000)
    assert out.useful_s == pytest.approx(samples / 2.0 + 20 * 64 / 4.0)
    assert min(out.lost_s, out.loading_s, out.waiting_s) >= 0
    assert out.held_s <= gpus * (out.make_s + out.train_s) + 1e-6
    assert (out.lost_s > 0) <= (out.preemptions > 0)
    assert simulate(play, seed, played_windows=1000) == out


def test_more_losses_cost_more() -> None:
    def mean_held(losses: float) -> float:
        play = replace(CALM, phases=((PHASE, 10.0),), preemptions_per_hour=losses)
        return sum(simulate(play, seed).held_s for seed in range(30))

    assert mean_held(0) < mean_held(1) < mean_held(8)


def test_a_run_that_cannot_end_says_so() -> None:
    for play in (
        replace(CALM, unit_images=640, preemptions_per_hour=400, provision_s=3600),
        replace(
            CALM,
            samples=0,
            phases=((replace(PHASE, checkpoint_s=1e9), 1.0),),
            preemptions_per_hour=60,
            provision_s=3600,
        ),
    ):
        with pytest.raises(EdgeFusionError, match="does not end"):
            simulate(play)


def test_the_command_says_that_it_predicts() -> None:
    words = ["cluster", "simulate", "recipes/edgefusion.yaml", "--gpus", "8", "--repeats", "3", "--train-per-s", "20"]
    with pytest.raises(EdgeFusionError, match="no rate is known for make"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    more = ["--make-per-s", "0.5", "--preemptions-per-hour", "0.1", "--price-per-gpu-hour", "2"]
    said = CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "140"})
    assert said.exit_code == 0 and said.output.count("predicted") >= 2 and "utilisation" in said.output


def test_serial_queues_set_the_pace_when_they_are_the_slowest() -> None:
    # Ten units of 32 s on ten GPUs: all are rendered at 62; what is serial then takes its ten turns.
    wide = replace(CALM, gpus=10)
    assert simulate(replace(wide, storage_latency_s=3)).make_s == pytest.approx(62 + 30)
    slow = replace(wide, image_bytes=1e6, storage_mb_per_s=32)
    assert simulate(slow).make_s == pytest.approx(62 + 10 * 2)
    assert simulate(replace(wide, driver_s=40)).make_s == pytest.approx(10 * 40 + 32)
    assert simulate(replace(wide, start_s=5, listing_s=0.5)).make_s == pytest.approx(5 + 5 + 62)


def test_a_window_waits_for_its_last_unit_and_opens_the_models_again() -> None:
    # Windows of six units on four GPUs: two rounds, two, and the last four units in one.
    out = simulate(replace(CALM, samples=16 * 64, window_units=6, window_s=7))
    assert out.make_s == pytest.approx(3 * (7 + 30) + 5 * 32)
    assert out.waiting_s == pytest.approx(3 * 4 * 7 + 2 * 2 * 32) and out.loading_s == 3 * 4 * 30


def test_a_straggler_holds_what_it_has_in_hand() -> None:
    # Until the tenth unit is taken, at 128, the fast one ended four and holds two, the slow one (64 s a unit) ended two and holds two.
    play = replace(CALM, gpus=2, straggler_share=0.5, straggler_factor=2)
    out = simulate(play)
    assert out.make_s == pytest.approx(30 + 4 * 64) and out.useful_s == 6 * 32 + 4 * 64
    assert out.waiting_s == 2 * 32
    trained = simulate(replace(play, samples=0, phases=((PHASE, 10.0),)))
    assert trained.train_s == pytest.approx(30 + 64000 / 20 * 2)


def test_uneven_units_keep_their_mean() -> None:
    out = simulate(replace(CALM, samples=64 * 4000, unit_spread=0.5), 1)
    assert out.useful_s == pytest.approx(4000 * 32, rel=0.03) and out.make_s > 30 + 1000 * 32


def test_the_mean_of_played_windows_stands_for_the_others() -> None:
    play = replace(CALM, samples=64 * 64 * 120, window_units=64, window_s=5, preemptions_per_hour=2.0, unit_spread=0.2)

    def mean(played: int) -> Outcome:
        outs = [simulate(play, seed, played) for seed in range(24)]
        names = ("make_s", "useful_s", "lost_s", "loading_s", "waiting_s", "preemptions")
        return Outcome(**{name: sum(getattr(out, name) for out in outs) / len(outs) for name in names})

    exact, quick = mean(1000), mean(16)
    assert quick.useful_s == pytest.approx(exact.useful_s, rel=0.01)
    assert quick.make_s == pytest.approx(exact.make_s, rel=0.02)
    assert quick.held_s == pytest.approx(exact.held_s, rel=0.02)
    assert quick.preemptions == pytest.approx(exact.preemptions, rel=0.1)
    calm = replace(play, preemptions_per_hour=0, unit_spread=0)
    assert vars(simulate(calm)) == pytest.approx(vars(simulate(calm, played_windows=1000)))


def test_what_limits_is_what_was_made_slow() -> None:
    calm = replace(CALM, samples=64 * 400, load_s=5)
    for slow, name in (
        ({}, "rendering on the GPUs"),
        ({"driver_s": 40.0}, "the driver"),
        ({"storage_latency_s": 60.0}, "storage"),
        ({"score_per_s": 1.0}, "scoring"),
        ({"window_units": 8, "window_s": 200.0}, "opening models and windows"),
        ({"listing_s": 60.0}, "the ledger listing"),
    ):
        assert next(iter(limits(replace(calm, **slow)))) == name


def test_training_holds_every_node_but_the_one_that_is_being_replaced() -> None:
    play = Scenario(4, 0, 1, 1.0, ((PHASE, 10.0),), preemptions_per_hour=6.0, provision_s=100, load_s=20)
    out = simulate(play, 3)
    assert out.preemptions > 3 and out.lost_s > 0
    assert out.held_s == pytest.approx(4 * out.train_s - 100 * out.preemptions)


def test_the_page_holds_every_scale_and_needs_nothing_else(tmp_path: Path) -> None:
    phase = Phase("adapt", 50_000, 256, checkpoint_s=900)
    play = replace(CALM, phases=((phase, 20.0),), preemptions_per_hour=0.3, driver_s=0.015)
    write_page(tmp_path / "page.html", "wide", play, samples=(10**5, 10**8), gpus=(1, 512))
    text = (tmp_path / "page.html").read_text()
    assert all(f">{scale}</td>" in text for scale in ("10^5", "10^8", "1", "4", "512"))
    assert "rendering on the GPUs" in text and "does not end in three years" in text
    assert text.count("data:image/svg+xml") == 6 and "http" not in text


def test_bandwidth_without_sizes_says_nothing() -> None:
    words = ["cluster", "simulate", "recipes/edgefusion.yaml", "--make-per-s", "1", "--train-per-s", "1"]
    with pytest.raises(EdgeFusionError, match="size of a picture"):
        CliRunner().invoke(app, [*words, "--storage-mb-per-s", "100"], catch_exceptions=False)


def test_sources_of_unknown_size_are_no_run_of_nothing() -> None:
    words = ["cluster", "simulate", "recipes/edgefusion-wild.yaml", "--make-per-s", "1", "--train-per-s", "1"]
    with pytest.raises(EdgeFusionError, match=r"edgefusion-wild\.yaml: .*how many samples.*Give --samples"):
        CliRunner().invoke(app, words, catch_exceptions=False)
