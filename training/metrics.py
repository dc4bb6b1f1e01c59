"""Metrics on NumPy arrays: cosine, intervals and tests over pairs and over seeds, the average precision of
words, the area under the ROC curve, Spearman's rank correlation of two scores and the agreement of raters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the tables' bootstrap intervals


def cosines(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of each row of `predicted` (n, E) with the unit row of `target` (n, E), or with the one row
    (E,)."""
    predicted = predicted.astype(np.float64)
    predicted /= np.linalg.norm(predicted, axis=-1, keepdims=True)
    return (predicted * target.astype(np.float64)).sum(-1)


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 10_000, groups: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (n,), resampled with replacement; with `groups` (n,)
    whole groups of values are resampled."""
    rng, counts = np.random.default_rng(seed), np.ones(len(values))
    if groups is not None:
        _, groups = np.unique(groups, return_inverse=True)
        values, counts = np.bincount(groups, values), np.bincount(groups)
    means = np.empty(resamples)
    for start in range(0, resamples, 200):
        rows = rng.integers(len(values), size=(min(200, resamples - start), len(values)))
        means[start : start + len(rows)] = values[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_weights(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights (resamples, n): the number of times that a sample has each of n items."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(np.float64)


def percentiles(draws: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of bootstrap draws; None if more than 1 of 40 is undefined."""
    return None if np.isnan(draws).mean() > 0.025 else np.nanquantile(draws, [0.025, 0.975]).tolist()


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean average precision over the words that occur in `truth` (n, V), pairs ranked by `scores`."""
    precisions = []
    for j in np.flatnonzero(truth.any(axis=0)):
        hits = truth[np.argsort(-scores[:, j], kind="stable"), j].astype(np.float64)
        precisions.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits > 0].mean())
    return float(np.mean(precisions))


def auroc(
    scores: np.ndarray,
    truth: np.ndarray,
    groups: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Area under the ROC curve: the share of pairs of a true and a false item, of `truth` (n,) bool, in which
    the true one has the higher of `scores` (n,); equal scores count one half. NaN without such pairs.

    With `groups` (n,) only pairs within a group count. A pair's weight is the product of its items' `weights`
    (..., n), whose first axes the result has.
    """
    groups = np.zeros(len(scores), int) if groups is None else groups
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.lexsort((scores, groups))
    new_group = np.diff(groups[order], prepend=-1) != 0
    blocks = np.flatnonzero(new_group | (np.diff(scores[order], prepend=0) != 0))  # of equal scores
    first = np.flatnonzero(new_group[blocks])  # the first block of each group
    true, false = (
        np.add.reduceat(weights[..., order] * of[order], blocks, axis=-1) for of in (truth, ~truth)
    )
    below = np.cumsum(false, axis=-1) - false
    below -= np.repeat(below[..., first], np.diff(first, append=len(blocks)), axis=-1)
    pairs = np.add.reduceat(true, first, axis=-1) * np.add.reduceat(false, first, axis=-1)
    with np.errstate(invalid="ignore"):
        return (true * (below + false / 2)).sum(axis=-1) / pairs.sum(axis=-1)


def binned(predicted: np.ndarray, true: np.ndarray, bins: int = 10) -> np.ndarray:
    """(mean prediction, mean truth, number) of each bin (bins, 3): equal numbers of items (n,), in the order
    of the predictions. Fewer bins than items."""
    parts = np.array_split(np.argsort(predicted, kind="stable"), bins)
    return np.array([(predicted[part].mean(), true[part].mean(), len(part)) for part in parts])


def calibration_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean distance between the mean prediction and the mean truth of the bins."""
    expected, observed, number = binned(predicted, true).T
    return float(np.average(np.abs(expected - observed), weights=number))


def student_p(t: float, df: int) -> float:
    """Two-sided p-value of Student's t with `df` degrees of freedom.

    With t = sqrt(df) tan(x) the density is cos(x)^(df - 1); its area beyond |t| by the midpoint rule.
    """
    start = math.atan(abs(t) / math.sqrt(df))
    stop = min(math.pi / 2, start + 40 / math.sqrt(df))  # the remaining area is negligible
    x = start + (stop - start) * (np.arange(20_000) + 0.5) / 20_000
    area = np.exp((df - 1) * np.log(np.cos(x))).mean() * (stop - start)
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return min(1.0, float(area) / whole)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of `values`, one a seed, by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    low, high = 0.0, 1e3  # t, by bisection
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if student_p(t, len(values) - 1) > 0.05 else (low, t)
    half = t * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def seeds_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's test that `differences`, one a seed, have the mean 0; None for fewer than
    two or if all are equal."""
    n = len(differences)
    deviation = float(np.std(differences, ddof=1)) if n > 1 else 0.0
    return student_p(float(np.mean(differences)) / deviation * math.sqrt(n), n - 1) if deviation else None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the order given."""
    n, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (n - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def paired_test(ours: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict:
    """Student's paired test that two methods' cosines have the same mean, over the test pairs of all seeds.

    One array (n,) a seed, of the same pairs in both. Returns the mean difference, its 95 % bootstrap
    interval, t, p, the number of pairs and the mean difference of each seed. Interval and p do not cover
    chance in training; `student_interval` and `seeds_p` of the per-seed differences do.
    """
    by_seed = [a - b for a, b in zip(ours, other, strict=True)]
    difference = np.concatenate(by_seed)
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))
    t = float(mean / error) if error else (math.copysign(math.inf, mean) if mean else 0.0)
    return {
        "difference": float(mean),
        "difference_95": bootstrap_interval(difference, resamples=RESAMPLES),
        "t": t if math.isfinite(t) else None,
        "p": student_p(t, len(difference) - 1),
        "n": len(difference),
        "per_seed": [float(d.mean()) for d in by_seed],
    }


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that `differences` (n,) are symmetric about 0, by the normal
    approximation with the correction for ties; zeros are left out. For some 20 differences or more."""
    nonzero = differences[differences != 0]
    n, size = len(nonzero), ranks(np.abs(nonzero))
    ties = np.unique(size, return_counts=True)[1].astype(np.float64)
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (size[nonzero > 0].sum() - n * (n + 1) / 4) / math.sqrt(variance) if n else 0.0
    return math.erfc(abs(z) / math.sqrt(2))


def paired_by_group(
    ours: Sequence[np.ndarray], other: Sequence[np.ndarray], groups: Sequence[np.ndarray]
) -> dict:
    """`paired_test`, whose bootstrap resamples groups (n,), such as the pairs of one prompt, over all seeds;
    with the effect size d_z (mean over deviation of the differences; None if they are equal), the share of
    pairs "won" (ties count one half) and p of Wilcoxon's signed-rank test."""
    difference = np.concatenate([a - b for a, b in zip(ours, other, strict=True)])
    deviation = float(difference.std(ddof=1))
    return paired_test(ours, other) | {
        "difference_95": bootstrap_interval(difference, 0, RESAMPLES, np.concatenate(groups)),
        "d_z": float(difference.mean()) / deviation if deviation else None,
        "won": float((difference > 0).mean() + (difference == 0).mean() / 2),
        "wilcoxon_p": signed_rank_p(difference),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of (n,) and (n,); None if one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else None


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each of `values` (n,) from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of (n,) and (n,); NaN where one of them is constant."""
    correlation = pearson(ranks(a), ranks(b))
    return math.nan if correlation is None else correlation


def rank_correlation(a: np.ndarray, b: np.ndarray, resamples: int = 1000) -> dict:
    """Spearman's correlation of (n,) and (n,) with its 95 % bootstrap interval; None if undefined."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(len(a), size=len(a))
        drawn.append(spearman(a[rows], b[rows]))
    whole = spearman(a, b)
    if math.isnan(whole):
        return {"spearman": None, "spearman_95": None}
    return {"spearman": whole, "spearman_95": np.nanquantile(drawn, [0.025, 0.975]).tolist()}


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided exact p of the sign test that wins and losses are equally likely, without ties; None without
    either."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n) if n else None


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' kappa (1971), the agreement of raters beyond chance; None if it is undefined.

    counts: (subjects, categories), how many raters chose each category; each row has the same sum, at least
    2. It is undefined if all raters always chose one category.
    """
    raters = counts.sum(axis=1)[0]
    observed = float(((counts**2).sum(axis=1) - raters).mean() / (raters * (raters - 1)))
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None
