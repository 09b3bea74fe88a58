import numpy as np
import pytest

from trainer.metrics import clip_scores, cmmd, frechet_distance, interval, recalled


def unit(rng: np.random.Generator, rows: int, width: int = 8) -> np.ndarray:
    found = rng.normal(size=(rows, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_recall_of_right_wrong_and_equal_answers() -> None:
    texts = np.eye(4)
    assert recalled(texts, texts, 4).tolist() == [1, 1, 1, 1]
    assert recalled(texts, texts[[1, 0, 2, 3]], 4).tolist() == [0, 0, 1, 1]
    assert recalled(texts, np.ones((4, 4)) / 2, 4).tolist() == [0.25] * 4  # the same text for all: chance
    with pytest.raises(ValueError, match="recall among 5"):
        recalled(texts, texts, 5)


def test_recall_looks_only_within_a_block() -> None:
    texts = np.concatenate([np.eye(3), np.eye(3)])
    assert recalled(texts, texts, 3).tolist() == [1] * 6
    assert recalled(texts, texts, 6).tolist() == [0.5] * 6


def test_clip_score_is_the_cosine() -> None:
    assert clip_scores(np.array([[1.0, 0], [0.6, 0.8]]), np.array([[0, 1.0], [0.6, 0.8]])).tolist() == [0, 1]


def test_cmmd_by_hand_and_its_zero() -> None:
    a, b = np.array([[1.0, 0]]), np.array([[0, 1.0]])
    # k(a, a) + k(b, b) - 2 k(a, b), with |a - b|^2 = 2 and sigma = 10
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), rel=1e-6)
    rng = np.random.default_rng(0)
    assert cmmd(unit(rng, 50), unit(rng, 50)) < cmmd(unit(rng, 50), np.abs(unit(rng, 50)))


def test_frechet_of_two_known_gaussians() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(200_000, 2))
    b = a * np.array([2.0, 3.0]) + np.array([1.0, 0.0])
    # |mean|^2 + sum (s1 - s2)^2 = 1 + 1 + 4
    assert frechet_distance(a, b) == pytest.approx(6, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_interval_holds_the_mean_and_narrows() -> None:
    values = np.random.default_rng(2).normal(5, 1, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
