"""The calibration of a run, fitted on its predictions: expected cosine, cosines for comparison, words.

* The length of a least-squares prediction of unit vectors estimates its own cosine: if f(x) is the mean of
  the embeddings y of all prompts that fit image x, the mean of cos(f(x), y) over them is |f(x)|. Training by
  the cosine leaves the length free, so it is multiplied by a slope.
* Ridge regression from the predictions f(x) of the training images to the words of their prompts scores each
  word. P(shown) = sigmoid(a score_j + b log-odds of the word's base rate + c) is the probability that the
  word is from the image's own prompt and not from another pair's, both equally likely beforehand. Logistic
  regression on the validation pairs fits a, b and c (Platt 1999, with the base rate as a second variable).
  The vocabulary head is not used: short trainings leave it far from converged (tables/words.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baselines import RidgeSums, ridge
from files import DataError, write_array, write_json
from schema import many, number, read_json

FILES = "calibration.json", "words.npy"
QUANTILES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Calibration:
    """`cosines`: the QUANTILES of the validation pairs' cosines; `length_slope`: expected cosine per length;
    `words` (1 + E, V): P(shown) = sigmoid([1, f] @ words)."""

    cosines: list[float]
    length_slope: float
    words: np.ndarray

    def expected(self, length: float) -> float:
        """The expected cosine of a prediction of this length."""
        return min(1.0, self.length_slope * length)

    def rank(self, cosine: float) -> float:
        """The share of the validation pairs with a lower cosine."""
        return float(np.interp(cosine, self.cosines, QUANTILES))

    def shown(self, predicted: np.ndarray) -> np.ndarray:
        """P(shown) of every word (..., V) from predictions (..., E), not normalised."""
        return sigmoid(predicted @ self.words[1:] + self.words[0])


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


def word_map(
    targets: Callable[[Sequence[str]], Tensor],
    predicted: dict[str, np.ndarray],
    prompts: dict[str, list[str]],
) -> np.ndarray:
    """`Calibration.words`, from the predictions (n, E), not normalised, and the prompts of "train" and "val".
    `targets`: prompts -> their words (n, V), equation (2)."""
    x = {split: torch.from_numpy(predicted[split]) for split in ("train", "val")}
    present = targets(prompts["val"])
    sums = RidgeSums(x["train"].shape[1], present.shape[1])
    for start in range(0, len(x["train"]), 1024):
        rows = slice(start, start + 1024)
        sums.add(x["train"][rows], targets(prompts["train"][rows]))
    solution = ridge(sums, x["val"], present)
    base = log_odds(sums.products[0, 1 + sums.width :].numpy(), len(x["train"]))
    slope, offsets = fit_words(solution.predict(x["val"]).numpy(), present.numpy() > 0, base)
    weight = (solution.weight / solution.deviation[:, None]).numpy()
    constant = solution.bias.numpy() - solution.mean.numpy() @ weight
    return np.concatenate([[slope * constant + offsets], slope * weight]).astype(np.float32)


def write_calibration(folder: Path, cosines: np.ndarray, lengths: np.ndarray, words: np.ndarray) -> None:
    """Write a run's calibration from its validation pairs' cosines (n,) and lengths (n,) and `word_map`."""
    write_array(folder / FILES[1], words)
    quantiles = np.quantile(cosines, QUANTILES).tolist()
    write_json(folder / FILES[0], {"cosines": quantiles, "length_slope": length_slope(lengths, cosines)})


def read_calibration(folder: Path, n_words: int) -> Calibration | None:
    """The calibration of a run with a vocabulary of `n_words`; None if an older version evaluated the run.
    Raises DataError for damaged files."""
    path, array = (folder / name for name in FILES)
    if not path.exists():
        return None
    fields = {"cosines": many(number(), len(QUANTILES), len(QUANTILES)), "length_slope": number()}
    try:
        words = np.load(array, allow_pickle=False)
        if words.dtype != np.float32 or words.shape[1:] != (n_words,) or not np.isfinite(words).all():
            raise ValueError(f"{words.dtype} {words.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{array}: cannot be read ({error}); run: python eval.py {folder}") from error
    return Calibration(**read_json(path, fields, closed=True), words=words)
