"""k-NN regression, a baseline of table 11."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor

import baselines
from baselines import knn_regression, neighbours


def rows(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def test_a_weighted_mean_worked_out_by_hand():
    """Cosines 1, 0.6, 0: the two nearest weigh exp(1 / 0.4) and exp(0.6 / 0.4), a ratio of e."""
    reference = np.array([[0, 5], [6, 8], [2, 0]], np.float32)  # lengths must not count
    targets = np.eye(3, dtype=np.float32)
    found = knn_regression(np.array([[3, 0]], np.float32), reference, targets, k=2, temperature=0.4)
    expected = np.array([0, 1, np.e]) / np.hypot(1, np.e)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    assert found.dtype == np.float32


def test_against_scikit_learn():
    query, reference, targets = rows(40, 16, 0), rows(300, 16, 1), rows(300, 7, 2)

    def weigh(distances: np.ndarray) -> np.ndarray:  # between unit rows: d^2 = 2 - 2 cos
        return np.exp((1 - distances**2 / 2) / 0.1)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    theirs = KNeighborsRegressor(9, weights=weigh, algorithm="brute").fit(unit(reference), targets)
    found = knn_regression(query, reference, targets, k=9, temperature=0.1)
    np.testing.assert_allclose(found, unit(theirs.predict(unit(query))), atol=2e-5)


def test_blocks_change_nothing():
    query, reference, targets = rows(33, 8, 0), rows(100, 8, 1), rows(100, 5, 2)
    whole, parts = (knn_regression(query, reference, targets, 7, 0.2, block=block) for block in (33, 4))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_of_equal_neighbours_the_first_rows_count():
    reference = np.array([[0, 1], [1, 0], [1, 1], [2, 0], [3, 0], [1, 0]], np.float32)
    cosines, found = neighbours(np.array([[1, 0]], np.float32), reference, 3)
    assert found.tolist() == [[1, 3, 4]] and cosines.tolist() == [[1, 1, 1]]
    assert neighbours(np.array([[1, 0]], np.float32), reference, 5)[1].tolist() == [[1, 3, 4, 5, 2]]


def test_as_many_neighbours_as_there_are_rows_and_no_more():
    reference = rows(4, 3, 0)
    assert sorted(neighbours(rows(1, 3, 1), reference, 4)[1][0].tolist()) == [0, 1, 2, 3]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k}: there are 4 rows"):
            neighbours(rows(1, 3, 1), reference, k)


def test_chosen_neighbours_are_the_best_of_the_grid(monkeypatch: pytest.MonkeyPatch):
    """Targets that a few neighbours tell and one, being noisy, does not."""
    monkeypatch.setattr(baselines, "NEIGHBOURS", (1, 8, 200, 1000))
    monkeypatch.setattr(baselines, "TEMPERATURES", (0.01, 1.0))
    query, reference = rows(60, 4, 0), rows(400, 4, 1)
    truth = query / np.linalg.norm(query, axis=1, keepdims=True)
    targets = reference / np.linalg.norm(reference, axis=1, keepdims=True) + 0.5 * rows(400, 4, 2)
    best = baselines.choose_neighbours(query, truth, reference, targets)
    scores = {
        (k, t): float((knn_regression(query, reference, targets, k, t) * truth).sum(1).mean())
        for k in (1, 8, 200) for t in (0.01, 1.0)
    }
    assert (best["k"], best["temperature"]) == max(scores, key=scores.get) != (1, 0.01)
    assert best["cosine"] == pytest.approx(max(scores.values()), abs=1e-6)


def test_all_rows_may_be_neighbours_and_all_queries_count(monkeypatch: pytest.MonkeyPatch):
    """1,025 queries are more than are worked on at once; the mean of all 8 rows is every query's answer."""
    monkeypatch.setattr(baselines, "NEIGHBOURS", (1, 8, 9))
    reference, targets = np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)
    query, truth = rows(1025, 8, 0), np.full((1025, 8), 8**-0.5)
    query[1024] *= -1
    best = baselines.choose_neighbours(query, truth, reference, targets)
    found = knn_regression(query, reference, targets, 8, best["temperature"])
    assert (best["k"], best["temperature"]) == (8, max(baselines.TEMPERATURES))
    assert best["cosine"] == pytest.approx(float((found * truth).sum(1).mean()), abs=1e-6)
