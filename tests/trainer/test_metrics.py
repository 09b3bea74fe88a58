"""The metrics against values known in closed form or from another implementation."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

import trainer.metrics as metrics
from trainer.metrics import (
    bootstrap,
    clip_scores,
    cmmd,
    cmmd_interval,
    frechet_distance,
    frechet_interval,
    inception_interval,
    mean_interval,
    recall_hits,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_recall_of_perfect_wrong_and_dumb_encoders(rng) -> None:
    texts = np.eye(8)
    assert recall_hits(texts * 3, texts, 8).mean() == 1.0
    assert recall_hits(np.roll(texts, 1, axis=0), texts, 8).mean() == 0.0
    assert recall_hits(np.ones((8, 8)), texts, 8).mean() == pytest.approx(1 / 8)
    chance = recall_hits(rng.normal(size=(2048, 32)), rng.normal(size=(2048, 32)), 16).mean()
    assert chance == pytest.approx(1 / 16, abs=0.025)


def test_recall_counts_only_the_rivals_it_names() -> None:
    # Picture 0 is nearest to text 2: a miss among all three, a hit among itself and its one successor.
    texts = np.eye(3)
    pictures = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert recall_hits(pictures, texts, 3).tolist() == [0, 1, 1]
    assert recall_hits(pictures, texts, 2).tolist() == [1, 1, 1]


def test_recall_does_not_depend_on_how_many_rows_are_held(monkeypatch, rng) -> None:
    pictures, texts = rng.normal(size=(50, 6)), rng.normal(size=(50, 6))
    whole = recall_hits(pictures, texts, 20)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    assert recall_hits(pictures, texts, 20).tolist() == whole.tolist()


def test_clip_scores_are_cosines() -> None:
    pictures, texts = np.array([[2.0, 0.0], [3.0, 3.0]]), np.array([[5.0, 0.0], [0.0, 1.0]])
    assert clip_scores(pictures, texts).tolist() == pytest.approx([1, math.sqrt(0.5)])


def test_cmmd_of_two_points_and_against_plain_loops(monkeypatch, rng) -> None:
    # Orthogonal unit vectors are sqrt(2) apart: k = exp(-2 / 200).
    assert cmmd(np.array([[1.0, 0.0]]), np.array([[0.0, 4.0]])) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)))
    made, real = rng.normal(size=(9, 5)), rng.normal(size=(12, 5)) + 1
    unit = [[row / np.linalg.norm(row) for row in part] for part in (made, real)]

    def mean_kernel(one, other):
        return np.mean([[math.exp(-((a - b) @ (a - b)) / 200) for b in other] for a in one])

    wanted = mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(unit[0], unit[1])
    assert cmmd(made, real) == pytest.approx(1000 * wanted, rel=1e-9)
    assert cmmd(made, made[::-1]) == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(metrics, "_ROWS", 4)
    assert cmmd(made, real) == pytest.approx(1000 * wanted, rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    spread = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # covariance 2/3 of the identity
    assert frechet_distance(spread, spread + np.array([3, 4])) == pytest.approx(25)
    # Covariances 2/3 and 4 * 2/3: 2 dimensions of (2 s - s)^2 with s^2 = 2/3.
    assert frechet_distance(spread, 2 * spread) == pytest.approx(2 * 2 / 3)


@pytest.mark.parametrize("count", [40, 4])
def test_frechet_distance_equals_scipys_matrix_root(count, rng) -> None:
    made, real = rng.normal(size=(count, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(50, 6)) * 2 + 1
    a, b = np.cov(made, rowvar=False), np.cov(real, rowvar=False)
    shift = made.mean(0) - real.mean(0)
    wanted = shift @ shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(made, real) == pytest.approx(wanted, rel=1e-5)


def test_the_interval_of_a_mean_is_the_normal_one(rng) -> None:
    values = rng.normal(size=400)
    found = mean_interval(values, draws=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)
    assert mean_interval(values, draws=4000) == found


def test_intervals_of_distances_hold_their_value_and_shrink_with_more_pictures(rng) -> None:
    widths = []
    for count in (64, 1024):
        made, real = rng.normal(size=(count, 4)) + 0.5, rng.normal(size=(count, 4))
        for interval, value in (
            (cmmd_interval(made, real), cmmd(made, real)),
            (frechet_interval(made, real), frechet_distance(made, real)),
        ):
            assert interval.value == pytest.approx(value)
            assert interval.low < value < interval.high
            widths.append(interval.high - interval.low)
    assert widths[2] < 0.5 * widths[0] and widths[3] < 0.5 * widths[1]


def test_the_quick_bootstrap_of_cmmd_is_the_plain_one(rng) -> None:
    made, real = rng.normal(size=(60, 4)) + 0.5, rng.normal(size=(60, 4))
    plain = bootstrap(lambda a, b: cmmd(made[a], real[b]), 60, 60, draws=2000)
    quick = cmmd_interval(made, real, draws=2000)
    assert list(quick) == pytest.approx(list(plain), rel=0.1)


def test_the_inception_score_of_known_classes_and_its_interval(rng) -> None:
    # Each of four classes for certain, equally often: exp(log 4). The same for all: 1.
    certain = np.tile(np.eye(4) * 100, (25, 1))
    assert inception_interval(certain, splits=1).value == pytest.approx(4)
    assert inception_interval(np.ones((20, 4))).value == pytest.approx(1)
    widths = []
    for count in (100, 1600):
        logits = rng.normal(size=(count, 6)) * 2
        found = inception_interval(logits)
        chunks = np.array_split(logits[np.random.RandomState(2020).permutation(count)], 10)
        plain = []
        for chunk in chunks:
            p = np.exp(chunk) / np.exp(chunk).sum(axis=1, keepdims=True)
            plain.append(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))
        assert found.value == pytest.approx(np.mean(plain))
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.5 * widths[0]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: recall_hits(np.eye(4), np.eye(4), 5), "at least as many pairs"),
        (lambda: recall_hits(np.eye(4), np.eye(5), 2), "not pairs"),
        (lambda: clip_scores(np.zeros((2, 2)), np.eye(2)), "no direction"),
        (lambda: cmmd(np.full((2, 2), np.nan), np.eye(2)), "not a number"),
        (lambda: cmmd(np.eye(2), np.eye(3)), "one width"),
        (lambda: frechet_distance(np.eye(2)[:1], np.eye(2)), "at least two"),
        (lambda: mean_interval(np.zeros(0)), "cannot draw"),
        (lambda: inception_interval(np.eye(4)), "do not divide into 10 splits"),
    ],
)
def test_what_no_metric_is_defined_on_is_refused(call, word) -> None:
    with pytest.raises(ValueError, match=word):
        call()
