"""The simulator where the answer is known by other means, and the laws that hold for any dice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.needs import Phase
from cluster.simulate import Scenario, measured_rates, simulate
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
    st.integers(1, 6), st.integers(0, 400), st.integers(1, 64), st.floats(0, 30), st.integers(0, 99), st.floats(0, 200)
)
def test_all_that_is_held_is_accounted_for_and_all_work_is_done_once(
    gpus: int, samples: int, unit: int, losses: float, seed: int, load: float
) -> None:
    play = Scenario(gpus, samples, unit, 2.0, ((replace(PHASE, steps=20), 4.0),), 2, 5.0, losses, 60, load)
    out = simulate(play, seed)
    assert out.useful_s == pytest.approx(samples / 2.0 + 20 * 64 / 4.0)
    assert min(out.lost_s, out.loading_s, out.waiting_s) >= 0
    assert out.held_s <= gpus * (out.make_s + out.train_s) + 1e-6
    assert (out.lost_s > 0) <= (out.preemptions > 0)
    assert simulate(play, seed) == out


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


def test_rates_come_from_a_run(tmp_path: Path) -> None:
    recipe = {"cluster": {"runner": "ray", "train_workers": 2}, "factory": {"make": {"render_workers": 4}}}
    facts = {"recipe": recipe, "funnel": {"planned": 800}, "seconds": {"make": 50.0}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "training" / "adapt").mkdir(parents=True)
    (tmp_path / "training" / "adapt" / "metrics.jsonl").write_text('{"images_per_s": 1}\n{"images_per_s": 30}\n{"im')
    assert measured_rates(tmp_path) == {"make": 4.0, "adapt": 15.0}
    with pytest.raises(EdgeFusionError, match="holds no run"):
        measured_rates(tmp_path / "training")


def test_the_command_says_that_it_predicts() -> None:
    words = ["cluster", "simulate", "recipes/edgefusion.yaml", "--gpus", "8", "--repeats", "3", "--train-per-s", "20"]
    with pytest.raises(EdgeFusionError, match="no rate is known for make"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    more = ["--make-per-s", "0.5", "--preemptions-per-hour", "0.1", "--price-per-gpu-hour", "2"]
    said = CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "140"})
    assert said.exit_code == 0 and said.output.count("predicted") >= 2 and "utilisation" in said.output


def test_training_holds_every_node_but_the_one_that_is_being_replaced() -> None:
    play = Scenario(4, 0, 1, 1.0, ((PHASE, 10.0),), preemptions_per_hour=6.0, provision_s=100, load_s=20)
    out = simulate(play, 3)
    assert out.preemptions > 3 and out.lost_s > 0
    assert out.held_s == pytest.approx(4 * out.train_s - 100 * out.preemptions)
