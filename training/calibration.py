"""The calibration of a run: the cosine to expect, the cosines to compare with, and single words.

All is computed from a unit-length predicted embedding f(x), by two ridge regressions on the training pairs:

* To the embeddings y of the prompts. The length of a least-squares prediction of unit vectors estimates its
  own cosine: if m(x) is the mean of the embeddings of all prompts that fit image x, the mean of cos(m(x), y)
  over them is |m(x)|. A slope, fitted on the validation pairs, corrects the length. (The length of the
  trained prediction itself is of no use, since the loss is the cosine; tables/confidence.py.)
* To the words of the prompts: a score for each word, which estimates the probability that a prompt has it.
  P(shown) = sigmoid(a score_j + b log-odds of the word's base rate + c) is the probability that the word is
  from the image's own prompt and not from another pair's, both equally likely beforehand. Logistic regression
  on the validation pairs fits a, b and c (Platt 1999, with the base rate as a second variable). P(in the
  prompt) has the score's log-odds in place of the score, and no such premise: of "lamp" and "lantern", both
  shown, a prompt has one. The vocabulary head is not used: a short training leaves it far from its optimum
  (tables/words.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baselines import RidgeSums, ridge
from files import DataError, read_array, write_array, write_json
from schema import many, number, read_json
from training.metrics import cosines

FILES = "calibration.json", "calibration.npy"
FIELDS = "cosines", "slope", "to_shown", "to_prompt"  # of calibration.json
QUANTILES = np.linspace(0, 1, 101)
BLOCK = 1024  # training pairs at once
WORDS_FITTED = 1 << 22  # words of validation pairs that P(in the prompt) is fitted on, at most


@dataclass(frozen=True)
class Calibration:
    """`cosines`: the QUANTILES of the validation pairs' cosines; `slope`: of the cosine on the length;
    `to_shown`, `to_prompt` (1 + V,): slope and offsets from the words' scores, or their log-odds, to the
    log-odds of P(shown) and P(in the prompt); `maps` (1 + E, E + V): constant and weights of both
    regressions."""

    cosines: list[float]
    slope: float
    to_shown: list[float]
    to_prompt: list[float]
    maps: np.ndarray

    @property
    def width(self) -> int:
        return len(self.maps) - 1

    def expected(self, embedding: np.ndarray) -> np.ndarray:
        """The expected cosine (...) of predictions (..., E)."""
        lengths = np.linalg.norm(mapped(self.maps[:, : self.width], embedding), axis=-1)
        return np.minimum(1, self.slope * lengths)

    def rank(self, cosine: float) -> float:
        """The share of the validation pairs with a lower cosine."""
        return float(np.interp(cosine, self.cosines, QUANTILES))

    def scores(self, embedding: np.ndarray) -> np.ndarray:
        """The scores of every word (..., V) for predictions (..., E)."""
        return mapped(self.maps[:, self.width :], embedding)

    def shown(self, embedding: np.ndarray) -> np.ndarray:
        """P(shown) of every word (..., V) for predictions (..., E)."""
        slope, *offsets = self.to_shown
        return sigmoid(slope * self.scores(embedding) + np.array(offsets))

    def in_prompt(self, embedding: np.ndarray) -> np.ndarray:
        """P(in the prompt) of every word (..., V) for predictions (..., E)."""
        slope, *offsets = self.to_prompt
        return sigmoid(slope * score_odds(self.scores(embedding)) + np.array(offsets))


def mapped(affine: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows x (..., E) by an affine map (1 + E, k): (..., k)."""
    return x @ affine[1:] + affine[0]


def affine_ridge(x: dict[str, Tensor], y: Iterable[Tensor], y_val: Tensor) -> np.ndarray:
    """The affine map (1 + E, k) of ridge regression from x["train"] (n, E) to y, given in blocks of BLOCK
    rows, with the penalty that has the highest mean cosine on x["val"] and `y_val`."""
    sums = RidgeSums(x["train"].shape[1], y_val.shape[1])
    for rows, block in zip(x["train"].split(BLOCK), y, strict=True):
        sums.add(rows, block)
    solution = ridge(sums, x["val"], y_val)
    weight = solution.weight / solution.deviation[:, None]
    return torch.cat([(solution.bias - solution.mean @ weight)[None], weight]).numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def logit(p: np.ndarray) -> np.ndarray:
    """Log-odds, of probabilities at least 1e-7 away from 0 and 1."""
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


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


def score_odds(scores: np.ndarray) -> np.ndarray:
    """The log-odds of scores as probabilities, at least .01 away from 0 and 1."""
    return logit(scores.clip(0.01, 0.99))


def fit_words(scores: np.ndarray, present: np.ndarray, base: np.ndarray) -> tuple[float, np.ndarray]:
    """(slope, offset of each word (V,)) such that P(shown) = sigmoid(slope * score + offset), from validation
    pairs: scores (n, V), the words of each prompt (n, V) bool, the log-odds of the words' base rates (V,)."""
    pair, word, own = own_and_other(present)
    return fit_line(scores[pair, word], base, word, own)


def fit_in_prompt(scores: np.ndarray, present: np.ndarray, base: np.ndarray) -> tuple[float, np.ndarray]:
    """The same such that P(in the prompt) = sigmoid(slope * score_odds(score) + offset); of the pairs at most
    WORDS_FITTED / V are used, evenly spread."""
    rows = slice(None, None, -(-scores.size // WORDS_FITTED))
    scores, present = scores[rows], present[rows]
    word = np.tile(np.arange(len(base)), len(scores))
    return fit_line(score_odds(scores).ravel(), base, word, present.ravel())


def fit_line(
    x: np.ndarray, base: np.ndarray, word: np.ndarray, truth: np.ndarray
) -> tuple[float, np.ndarray]:
    """(slope, offset of each word (V,)) by logistic regression of `truth` (k,) on x (k,) and the log-odds
    `base` (V,) of the words (k,)."""
    rows = np.stack([x, base[word], np.ones(len(word))], axis=1)
    slope, of_base, constant = logistic_regression(rows, truth)
    return float(slope), of_base * base + constant


def fit_calibration(
    predicted: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    prompts: dict[str, list[str]],
    words_of: Callable[[Sequence[str]], Tensor],
) -> Calibration:
    """From the unit-length predictions and targets (n, E) and the prompts of "train" and "val". `words_of`:
    prompts -> their words (n, V), equation (2)."""
    x, y = ({s: torch.from_numpy(np.array(of[s])) for s in ("train", "val")} for of in (predicted, targets))
    to_embedding = affine_ridge(x, y["train"].split(BLOCK), y["val"])
    true = cosines(predicted["val"], targets["val"])
    lengths = np.linalg.norm(mapped(to_embedding, predicted["val"]), axis=1)

    n, present = len(prompts["train"]), words_of(prompts["val"])
    blocks = (words_of(prompts["train"][start : start + BLOCK]) for start in range(0, n, BLOCK))
    to_words = affine_ridge(x, blocks, present)
    # Ridge regression with a constant maps the mean of the rows to the mean of the targets: the base rates.
    base = log_odds(n * mapped(to_words, x["train"].double().mean(dim=0).numpy()).clip(0, 1), n)
    scores, true_words = mapped(to_words, predicted["val"]), present.numpy() > 0
    lines = [fit(scores, true_words, base) for fit in (fit_words, fit_in_prompt)]
    to_shown, to_prompt = ([line_slope, *offsets.tolist()] for line_slope, offsets in lines)
    maps = np.concatenate([to_embedding, to_words], axis=1).astype(np.float32)
    slope = length_slope(lengths, true)
    return Calibration(np.quantile(true, QUANTILES).tolist(), slope, to_shown, to_prompt, maps)


def length_slope(lengths: np.ndarray, cosines: np.ndarray) -> float:
    """The slope of `cosines` (n,) on `lengths` (n,) by least squares, without intercept."""
    return float(lengths @ cosines / (lengths @ lengths))


def write_calibration(folder: Path, calibration: Calibration) -> None:
    write_array(folder / FILES[1], calibration.maps)
    write_json(folder / FILES[0], {name: getattr(calibration, name) for name in FIELDS})


def read_calibration(folder: Path, n_words: int) -> Calibration | None:
    """The calibration of a run with a vocabulary of `n_words`; None if an older version evaluated the run.
    Raises DataError for damaged files."""
    path, array = (folder / name for name in FILES)
    if not path.exists():
        return None
    fields = {"cosines": many(number(), len(QUANTILES), len(QUANTILES)), "slope": number()}
    fields |= dict.fromkeys(FIELDS[2:], many(number(), 1 + n_words, 1 + n_words).or_else(None))
    try:
        maps = read_array(array, np.float32, (None, None))
        if maps.shape[1] != len(maps) - 1 + n_words or not np.isfinite(maps).all():
            raise ValueError(f"{maps.shape}, or not finite")
    except (OSError, ValueError) as error:
        raise DataError(f"{array}: cannot be read ({error}); run: python eval.py {folder}") from error
    saved = read_json(path, fields, closed=True)
    return Calibration(**saved, maps=maps) if saved["to_prompt"] and saved["to_shown"] else None


def require_calibration(folder: Path, n_words: int) -> Calibration:
    """`read_calibration`. Raises DataError, too, if there is none."""
    if (calibration := read_calibration(folder, n_words)) is None:
        raise DataError(f"{folder}: lacks its calibration; run: python eval.py {folder}")
    return calibration
