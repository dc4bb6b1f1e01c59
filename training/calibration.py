"""The calibration of a run, fitted on its validation pairs: expected cosine, cosines for comparison, words.

* The length of a least-squares prediction of unit vectors estimates its own cosine: if f(x) is the mean of
  the embeddings y of all prompts that fit image x, the mean of cos(f(x), y) over them is |f(x)|. Training by
  the cosine leaves the length free, so it is multiplied by a slope.
* A vocabulary head estimates P(word j in the prompt | image), which depends on the word's frequency. A word's
  score is P(shown) = sigmoid(a logit_j + b log-odds of its base rate + c): the probability that the word is
  from the image's own prompt and not from another pair's, both equally likely beforehand. Logistic regression
  fits a, b and c (Platt 1999, with the base rate as a second variable).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from files import write_json
from schema import NULL, many, number, read_json

FILE = "calibration.json"
QUANTILES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Calibration:
    """`cosines`: the QUANTILES of the validation pairs' cosines; `length_slope`: expected cosine per length;
    `slope` and `offsets` (V): of the words' logits; None without a vocabulary head."""

    cosines: list[float]
    length_slope: float
    slope: float | None = None
    offsets: list[float] | None = None

    def expected(self, length: float) -> float:
        """The expected cosine of a prediction of this length."""
        return min(1.0, self.length_slope * length)

    def rank(self, cosine: float) -> float:
        """The share of the validation pairs with a lower cosine."""
        return float(np.interp(cosine, self.cosines, QUANTILES))

    def shown(self, probabilities: np.ndarray) -> np.ndarray:
        """P(shown) of every word from the head's probabilities (..., V)."""
        return sigmoid(self.slope * logit(probabilities) + np.asarray(self.offsets))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def logit(p: np.ndarray) -> np.ndarray:
    """Log-odds, of probabilities at least 1e-7 away from 0 and 1."""
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def length_slope(lengths: np.ndarray, cosines: np.ndarray) -> float:
    """The slope of `cosines` (n,) on `lengths` (n,) by least squares, without intercept."""
    return float(lengths @ cosines / (lengths @ lengths))


def logistic_regression(x: np.ndarray, truth: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Coefficients (d,) of logistic regression of `truth` (n,) on rows x (n, d), by Newton's method.

    Minimises the sum of the cross-entropies plus penalty / 2 times the squared norm of the coefficients.
    """
    coefficients = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ coefficients)
        gradient = x.T @ (p - truth) + penalty * coefficients
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + penalty * np.eye(x.shape[1]), gradient)
        coefficients -= step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def own_and_other(present: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pair, word, whether it is the pair's own) of each word (k,) that is in a pair's prompt or in the next
    pair's, but not in both. `present` (n, V) bool: the words of each prompt."""
    other = np.roll(present, 1, axis=0)
    pair, word = np.nonzero(present != other)
    return pair, word, present[pair, word]


def log_odds(counts: np.ndarray, n: int) -> np.ndarray:
    """Log-odds of the share of n prompts that contain each word, half a prompt added to both sides."""
    return np.log(counts + 0.5) - np.log(n - counts + 0.5)


def fit_words(scores: np.ndarray, present: np.ndarray, base: np.ndarray) -> tuple[float, np.ndarray]:
    """(slope, offset of each word (V,)) such that P(shown) = sigmoid(slope * score + offset), from validation
    pairs: scores (n, V), the words of each prompt (n, V) bool, the log-odds of the words' base rates (V,)."""
    pair, word, own = own_and_other(present)
    x = np.stack([scores[pair, word], base[word], np.ones(len(word))], axis=1)
    slope, of_base, constant = logistic_regression(x, own)
    return float(slope), of_base * base + constant


def fit_calibration(
    cosines: np.ndarray, lengths: np.ndarray, words: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> Calibration:
    """From the validation pairs' cosines (n,), lengths (n,) and the arguments of `fit_words`."""
    slope, offsets = fit_words(*words) if words else (None, None)
    quantiles = np.quantile(cosines, QUANTILES).tolist()
    offsets = offsets if offsets is None else offsets.tolist()
    return Calibration(quantiles, length_slope(lengths, cosines), slope, offsets)


def write_calibration(folder: Path, calibration: Calibration) -> None:
    write_json(folder / FILE, asdict(calibration))


def read_calibration(folder: Path, n_words: int) -> Calibration | None:
    """The calibration of a run with a vocabulary of `n_words`; None if an older version evaluated the run.
    Raises DataError for a damaged file."""
    if not (folder / FILE).exists():
        return None
    fields = {
        "cosines": many(number(), len(QUANTILES), len(QUANTILES)),
        "length_slope": number(),
        "slope": number() | NULL,
        "offsets": many(number(), n_words, n_words) | NULL,
    }
    return Calibration(**read_json(folder / FILE, fields, closed=True))
