"""k-means: start, distances, repair, determinism."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

import reverse_sd
from reverse_sd import centroid_targets, cluster_means, fill_empty, kmeans, kmeans_start, nearest_rows

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def blobs(k: int, each: int, width: int = 8, spread: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows around k centres, shuffled, and the blob of each."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(k).repeat(each)[torch.randperm(k * each, generator=g)]
    centres = F.normalize(torch.randn(k, width, generator=g), dim=1)
    return F.normalize(centres[labels] + spread * torch.randn(k * each, width, generator=g), dim=1), labels


def test_nearest_rows_by_blocks_is_what_one_matrix_of_distances_says():
    g = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(67, 5, generator=g).double(), torch.randn(43, 5, generator=g).double()
    value, index = torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    for block in (3, 8, 1024):
        position, distance = nearest_rows(queries, rows, block)
        assert torch.equal(position, index)
        assert torch.allclose(distance, value**2, atol=1e-12)
    assert nearest_rows(queries, rows[[4, 4, 4]])[0].tolist() == [0] * 67  # ties go to the first


def test_the_start_prefers_what_is_far_away():
    """90 rows in one place, and ten far apart: uniform draws would miss most of the ten."""
    rows = torch.cat([torch.zeros(90, 10), 5 * torch.eye(10)])
    start = kmeans_start(rows, 11, torch.Generator().manual_seed(0))
    assert len(start.unique(dim=0)) == 11


def test_the_start_draws_by_the_squared_distance():
    """From 0, a row at 3 is drawn nine times as often as one at 1."""
    rows, drawn = torch.tensor([0.0] * 98 + [1, 3])[:, None], []
    for seed in range(300):
        first, second = kmeans_start(rows, 2, torch.Generator().manual_seed(seed)).flatten().tolist()
        drawn += [second] if first == 0 else []
    assert 0.85 < drawn.count(3) / len(drawn) < 0.95 and drawn.count(0) == 0


@pytest.mark.parametrize("k", [1, 2, 40, 100])
def test_the_start_draws_different_rows(k: int):
    rows = torch.arange(100.0)[:, None]
    assert len(kmeans_start(rows, k, torch.Generator().manual_seed(1)).unique()) == k


@pytest.mark.parametrize("device", DEVICES)
def test_blobs_are_found(device: str):
    rows, blob = blobs(12, 50)
    found = []
    for seed in range(5):  # one start may put two centroids into one blob
        centroids, labels = kmeans(rows.to(device), 12, seed)
        found.append(len({*zip(blob.tolist(), labels.tolist(), strict=True)}))
    assert min(found) == 12 and max(found) <= 15
    assert torch.allclose(centroids, cluster_means(rows.to(device), labels, 12), atol=1e-6)


def test_inertia_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(3000, 16, generator=g), dim=1)
    centroids, labels = kmeans(rows, 60, max_iterations=100, tolerance=1e-5)
    position, distance = nearest_rows(rows, centroids)
    assert torch.equal(position, labels)
    theirs = KMeans(60, n_init=1, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    assert float(distance.mean()) < 1.01 * theirs


def test_every_iteration_lowers_the_inertia():
    rows, _ = blobs(40, 20, spread=0.3)
    inertia = [float(nearest_rows(rows, kmeans(rows, 40, 0, i, 0)[0])[1].mean()) for i in range(6)]
    assert inertia == sorted(inertia, reverse=True) and inertia[-1] < 0.97 * inertia[0]


def plain_steps(rows: Tensor, k: int, steps: int) -> list[tuple[Tensor, float]]:
    """The centroids after 0, 1, ... iterations of Lloyd's from the start that seed 0 gives; their inertia."""
    centroids, labels = kmeans(rows, k, max_iterations=0)
    found = []
    for _ in range(steps + 1):
        distances = torch.cdist(rows, centroids).square()
        found.append((centroids, float(distances.min(dim=1).values.mean())))
        labels = distances.argmin(dim=1)
        centroids = torch.stack([rows[labels == cluster].mean(dim=0) for cluster in range(k)])
    return found


def test_max_iterations_are_so_many_steps_of_lloyd():
    rows = blobs(40, 20, spread=0.3)[0].double()
    for iterations, (centroids, _) in enumerate(plain_steps(rows, 20, 5)):
        ours, labels = kmeans(rows, 20, max_iterations=iterations, tolerance=0)
        assert torch.allclose(ours, centroids, atol=1e-12)
        assert torch.equal(labels, nearest_rows(rows, ours)[0])


def test_it_ends_when_the_inertia_falls_by_less_than_the_tolerance_of_itself():
    rows = blobs(40, 20, spread=0.3)[0].double()
    steps = plain_steps(rows, 20, 5)
    falls = [(before - after) / after for (_, before), (_, after) in itertools.pairwise(steps)]
    assert falls == sorted(falls, reverse=True) and falls[-1] > 0
    for step, fall in enumerate(falls, start=1):
        at, below = (kmeans(rows, 20, tolerance=fall * near)[0] for near in (1 + 1e-9, 1 - 1e-9))
        assert torch.allclose(at, steps[step][0], atol=1e-12)
        assert not torch.allclose(below, steps[step][0], atol=1e-12)


@pytest.mark.parametrize(("tolerance", "steps"), [(1.0, 1), (0.999, 2)])
def test_a_fall_of_just_the_tolerance_ends_it(tolerance: float, steps: int, monkeypatch: pytest.MonkeyPatch):
    """One cluster of 0 and 2: the inertia falls from 2 to 1, by 1 times itself, and then no more."""
    calls = []
    monkeypatch.setattr(reverse_sd, "cluster_means", lambda *a: calls.append(a) or cluster_means(*a))
    assert kmeans(torch.tensor([[0.0], [2.0]]), 1, tolerance=tolerance)[0].tolist() == [[1]]
    assert len(calls) == steps


@pytest.mark.parametrize("device", DEVICES)
def test_the_seed_decides(device: str):
    rows = blobs(20, 30, spread=0.4)[0].to(device)
    a, b, c = (kmeans(rows, 25, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_empty_cluster_moves_to_the_farthest_row_of_another():
    rows = torch.tensor([[0.0], [1], [2], [50], [100]])
    centroids = torch.tensor([[1.0], [80], [-500], [-600]])
    labels, distances = nearest_rows(rows, centroids)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert fill_empty(centroids, rows, labels, distances) == 2
    # 50 is farthest; then 100, but it is alone by now; then 0 or 2
    assert labels[3] == 2 and labels[4] == 1 and labels.bincount().tolist() == [2, 1, 1, 1]
    assert centroids[2] == 50 and distances[3] == 0
    assert fill_empty(centroids, rows, labels, distances) == 0


@pytest.mark.parametrize("rows", [torch.ones(30, 4), torch.eye(30)[:, :8], torch.eye(6)])
def test_no_cluster_is_empty_even_where_rows_are_equal(rows: Tensor):
    k = min(10, len(rows))
    centroids, labels = kmeans(rows, k)
    assert labels.bincount(minlength=k).min() >= 1
    assert torch.isfinite(centroids).all()


def test_means_are_by_cluster_whatever_the_blocks():
    rows, labels = torch.arange(12.0).reshape(6, 2), torch.tensor([2, 0, 2, 0, 0, 2])
    expected = torch.tensor([[16 / 3, 19 / 3], [0, 0], [14 / 3, 17 / 3]])
    for block in (1, 4, 100):
        assert torch.allclose(cluster_means(rows, labels, 3, block), expected)


def test_a_centroids_target_is_its_nearest_rows():
    rows = torch.tensor([[0.0, 0], [1, 0], [5, 5]])
    targets = torch.tensor([[1.0], [2], [3]])
    centroids = torch.tensor([[0.9, 0.1], [4, 4], [0.1, 0]])
    assert centroid_targets(centroids, rows, targets).tolist() == [[2], [3], [1]]


def test_what_does_not_fit_is_said():
    rows = torch.ones(5, 2)
    with pytest.raises(ValueError, match="5 rows cannot make 6 clusters"):
        kmeans(rows, 6)
    with pytest.raises(ValueError, match="cannot make 0 clusters"):
        kmeans(rows, 0)
    for wrong in (rows[0], rows.long(), rows[:, :0], rows[None], rows.half()):
        with pytest.raises(ValueError, match="rows are"):
            kmeans(wrong, 2)
    with pytest.raises(ValueError, match="iterations below 0"):
        kmeans(rows, 2, max_iterations=-1)
    with pytest.raises(ValueError, match="as many targets"):
        centroid_targets(rows, rows, rows[:3])
    assert kmeans(rows, 5)[0].shape == (5, 2)
    rows[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        kmeans(rows, 2)
