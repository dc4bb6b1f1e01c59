"""Reverse Stable Diffusion: predict a prompt's sentence embedding from the generated image.

The method in the paper's order: the objective (eq. 1), the vocabulary and its targets (eq. 2), the losses
(eq. 3 and 4), the three placements of the vocabulary head (fig. 3), the regressor that joins any backbone to
them, easiness and the curriculum, the ensemble (section 4.9), k-means, and domain-adaptive kernel learning
(DAKL, eq. 5, 6 and 7). The last part loads a trained run and predicts for your own images:

    python reverse_sd.py image.png --run runs/unet-mini-seed0

Letters in shape comments: B batch, N tokens, D feature width, E embedding width (384), V vocabulary words,
h w latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import BACKBONES, Backbone, SDReader, Standardise, as_backbone, captioner_of
from files import DataError
from schema import TEXT, many, read_value
from words import is_content_word, words

EMBEDDING_WIDTH = 384  # all-MiniLM-L6-v2

# ============================================================================================================
# Section 3, main objective: equation (1)
# ============================================================================================================


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cos(f(x_i), y_i) for each sample: (B, E), (B, E) -> (B,). Its mean is equation (1)."""
    return 1 - F.cosine_similarity(predicted, target, dim=-1, eps=1e-8)


# ============================================================================================================
# Section 3, multi-label vocabulary classification: the words, equations (2), (3) and (4)
# ============================================================================================================

class Vocabulary:
    """The m most frequent adjectives, nouns and verbs of the training prompts, and the targets of equation
    (2).

    Matching ignores case on both sides. Paper: the number of words is not restated per data set; if the
    prompts have fewer than m distinct content words, the vocabulary holds all of them.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.words = [word.lower() for word in vocabulary]
        self._column = {word: j for j, word in enumerate(self.words)}
        if len(self._column) < len(self.words):
            raise DataError("a vocabulary holds each word once; remove the others")

    @classmethod
    def of(cls, training_prompts: Iterable[str], size: int) -> Vocabulary:
        """The `size` most frequent content words, counted once per prompt, ties in alphabetical order."""
        counts = Counter(
            word for prompt in training_prompts for word in set(words(prompt)) if is_content_word(word)
        )
        if size < 0:
            raise ValueError(f"a vocabulary has at least 0 words, not {size}")
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in ranked[:size]])

    def __len__(self) -> int:
        return len(self.words)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the words in their order."""
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()

    def targets(self, prompts: Sequence[str]) -> Tensor:
        """Equation (2): t_ij = 1 if word j is in prompt i, else 0, as float32 (B, V)."""
        t = torch.zeros(len(prompts), len(self.words))
        for i, prompt in enumerate(prompts):
            t[i, [self._column[word] for word in set(words(prompt)) if word in self._column]] = 1
        return t

    def likely(self, probabilities: np.ndarray, n: int) -> str:
        """The `n` most probable words, each with its probability (V,) in per cent."""
        order = np.argsort(-probabilities)[:n]
        return ", ".join(f"{self.words[j]} {probabilities[j]:.0%}" for j in order)


def vocabulary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation (3) for each sample: the binary cross-entropy of sigmoid(logits), mean over the words. (B,
    V) -> (B,). Paper: mean or sum over the words is not clear; the authors' code takes the mean."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)


def joint_loss(cosine: Tensor, vocabulary: Tensor, mlc_weight: float = 0.1) -> Tensor:
    """Equation (4): L = L_cos + lambda * L_mlc, sample by sample. The default lambda is the authors'
    code's."""
    return cosine + mlc_weight * vocabulary


# ============================================================================================================
# Section 3, figure 3: placement of the vocabulary head, and the regressor
# ============================================================================================================


@dataclass
class Prediction:
    """`embedding` (B, E), not normalised; `logits` (B, V), or None without a vocabulary head."""

    embedding: Tensor
    logits: Tensor | None


class Heads(nn.Module):
    """Features -> prompt embedding and vocabulary logits; each head is one fully connected layer (figure 3).

    placement 0: no vocabulary head.
              1: both heads read the features.
              2: the embedding head reads the features and the vocabulary logits.
              3: the vocabulary head reads the predicted embedding (the paper's choice).

    Paper: whether an embedding is read before or after normalisation, and words as logits or probabilities,
    is not stated; here before, and logits.
    """

    def __init__(self, width: int, n_words: int, placement: int = 3, embedding_width: int = EMBEDDING_WIDTH):
        super().__init__()
        if placement not in (0, 1, 2, 3):
            raise ValueError(f"heads must be 0, 1, 2 or 3, not {placement}")
        self.placement = placement
        self.embedding = nn.Linear(width + (n_words if placement == 2 else 0), embedding_width)
        self.vocabulary = (
            nn.Linear(embedding_width if placement == 3 else width, n_words) if placement else None
        )

    def forward(self, features: Tensor) -> Prediction:
        match self.placement:
            case 0:
                return Prediction(self.embedding(features), None)
            case 1:
                return Prediction(self.embedding(features), self.vocabulary(features))
            case 2:
                logits = self.vocabulary(features)
                return Prediction(self.embedding(torch.cat([features, logits], dim=-1)), logits)
            case _:
                embedding = self.embedding(features)
                return Prediction(embedding, self.vocabulary(embedding))

    @torch.no_grad()
    def start_at(self, weight: Tensor, bias: Tensor) -> None:
        """Set the embedding head to features @ weight + bias: (width, E), (E,); logits get no weight."""
        self.embedding.weight.zero_()[:, : len(weight)] = weight.T
        self.embedding.bias.copy_(bias)


class Regressor(nn.Module):
    """Any backbone with the heads of figure 3 on top.

    `backbone(*inputs)` must return features (B, width); inputs: images for the black boxes, latents and
    caption states for the U-Net. With `standardise` the heads read standardised features.
    """

    def __init__(
        self, backbone: nn.Module, width: int, n_words: int, placement: int = 3, standardise: bool = False
    ):
        super().__init__()
        self.backbone = backbone
        self.standardise = Standardise(width) if standardise else nn.Identity()
        self.heads = Heads(width, n_words, placement)

    def forward(self, *inputs: Tensor) -> Prediction:
        return self.heads(self.standardise(self.backbone(*inputs)))


# ============================================================================================================
# Section 3, curriculum learning
# ============================================================================================================


def easiness(cosines: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """The easiness of each training sample: its mean cosine over the epochs of phase 1.

    cosines (epochs, n) -> (n,) float64. `weights`, one for each epoch, make it a weighted mean, as in the
    authors' code. Raises ValueError if their number is not `epochs` or their sum is not above 0, and for
    cosines of no epoch or that are not finite.

    Paper: the difficulty score, although high means easy.
    """
    if weights is not None and (len(weights) != len(cosines) or not 0 < sum(weights) < math.inf):
        raise ValueError(f"{len(weights)} weights for {len(cosines)} epochs, or none above 0")
    if not len(cosines) or not np.isfinite(cosines).all():
        raise ValueError("the cosines of an epoch are missing or not finite")
    return np.average(cosines.astype(np.float64), axis=0, weights=weights)


def thirds(easiness: np.ndarray) -> list[np.ndarray]:
    """Easy, medium and hard chunks of equal size (to one sample): the first splitting heuristic.

    easiness (n,) -> three arrays of positions; ties go by position.
    """
    return np.array_split(np.argsort(-easiness, kind="stable"), 3)


def easiness_thresholds(
    easiness: np.ndarray, easy_share: float = 0.5, hard_share: float = 0.1
) -> tuple[float, float]:
    """The two cosines that separate easy from medium and medium from hard.

    Paper: easy is "a significant portion", hard "a small subset"; the shares are not stated. Here: quantiles
    of `easiness` (n,) such that `easy_share` of the samples lies above and `hard_share` below.
    """
    easy, hard = np.quantile(easiness, [1 - easy_share, hard_share])
    return float(easy), float(hard)


def by_thresholds(easiness: np.ndarray, easy: float, hard: float) -> list[np.ndarray]:
    """Easy (at least `easy`), medium and hard (below `hard`) chunks: the second splitting heuristic.

    easiness (n,) -> three arrays of positions.
    """
    return [
        np.flatnonzero(part)
        for part in (easiness >= easy, (easiness < easy) & (easiness >= hard), easiness < hard)
    ]


def curriculum_stages(chunks: Sequence[np.ndarray], total: int) -> list[tuple[int, int, np.ndarray]]:
    """(first step, end step, sample pool) of each stage: easy; easy and medium; all.

    The stages share the `total` steps equally (to one step). Paper: the share of each stage is not stated.
    """
    steps = [total * k // len(chunks) for k in range(len(chunks) + 1)]
    pools = [np.sort(np.concatenate(chunks[: k + 1])) for k in range(len(chunks))]
    return list(zip(steps[:-1], steps[1:], pools, strict=True))


def curriculum_batches(
    chunks: Sequence[np.ndarray], total: int, batch_size: int, seed: int, start: int, stop: int
) -> list[np.ndarray]:
    """The samples of steps `start` to `stop` - 1 out of `total`: a pure function of its arguments.

    Each stage makes passes over its pool, each in another shuffled order. As in plain training, the last
    batch of a pass may be smaller. Raises ValueError for a stage without samples.
    """
    batches = []
    for number, (first, end, pool) in enumerate(curriculum_stages(chunks, total)):
        if not len(pool) or batch_size < 1:
            raise ValueError(f"curriculum: {len(pool)} samples cannot make batches of {batch_size}")
        begin, finish = max(start, first) - first, min(stop, end) - first  # requested steps within this stage
        steps = math.ceil(len(pool) / batch_size)  # of a pass
        for k in range(begin // steps, math.ceil(finish / steps)):
            order = np.random.default_rng([seed, number, k]).permutation(pool)
            whole = [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
            batches += whole[max(begin - k * steps, 0) : finish - k * steps]
    return batches


# ============================================================================================================
# Section 4.9: ensemble
# ============================================================================================================


def ensemble(
    predictions: Sequence[Tensor], average: str = "mean", weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Several models' predictions of the same samples as one: m tensors (n, E) -> unit rows (n, E).

    Each is L2-normalised first, then "mean" or "median" is taken coordinate by coordinate. Section 4.9 uses
    the mean, the introduction the median. `weights`, one for each model, make it a weighted mean, as in the
    authors' code (see tables/methods.py). Raises ValueError for another `average`, for weights with the
    median, for shapes that do not match, and on the CPU where a result is zero or not finite.
    """
    shapes = {tuple(p.shape) for p in predictions}
    if len(shapes) != 1:
        raise ValueError(f"an ensemble needs predictions of one shape, not of {sorted(shapes)}")
    members = torch.stack([F.normalize(p, dim=-1) for p in predictions])  # (m, n, E)
    if average == "median":
        if weights is not None:
            raise ValueError("weights are for the mean; the median takes none")
        m = len(members)
        ranked = members.sort(dim=0).values
        return _directions((ranked[(m - 1) // 2] + ranked[m // 2]) / 2)
    if average != "mean":
        raise ValueError(f'average must be "mean" or "median", not {average!r}')
    weights = torch.ones(len(members)) if weights is None else torch.as_tensor(weights)
    if weights.shape != (len(members),):
        raise ValueError(f"{len(members)} predictions need as many weights, not {tuple(weights.shape)}")
    return _directions(torch.einsum("m,mne->ne", weights.to(members), members))


def _directions(rows: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    if rows.is_cpu and not ((lengths > 0) & lengths.isfinite()).all():  # a GPU would have to be waited for
        raise ValueError("an ensemble's predictions or weights are zero or not finite, or cancel out")
    return F.normalize(rows, dim=-1)


# ============================================================================================================
# Section 3, meta-regression: k-means
# ============================================================================================================


def nearest_rows(queries: Tensor, rows: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Position (q,) and squared distance (q,) of the row (n, E) closest to each query (q, E).

    Distances come from matrix products, `block` queries and 2 x `block` rows at a time. Ties go to the first.
    """
    if not len(rows):
        raise ValueError("there are no rows of which one could be nearest")
    half = rows.square().sum(dim=1) / 2
    positions, distances = [], []
    for query in queries.split(block):
        best = torch.full_like(query[:, 0], torch.inf)
        position = torch.zeros(len(query), dtype=torch.long, device=rows.device)
        for start in range(0, len(rows), 2 * block):
            part = slice(start, start + 2 * block)
            value, index = (query @ rows[part].T).neg_().add_(half[part]).min(dim=1)
            closer = value < best
            best = torch.where(closer, value, best)
            position = torch.where(closer, index + start, position)
        positions.append(position)
        distances.append((2 * best + query.square().sum(dim=1)).clamp_min(0))
    return torch.cat(positions), torch.cat(distances)


def kmeans_start(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ in rounds: rows (n, E) -> k different rows of them (k, E).

    As in k-means++ a row is drawn with a probability proportional to its squared distance to the nearest
    centroid so far, but each round draws a quarter of the current number of centroids at once: about 40
    rounds for 10,000 centroids instead of 10,000 passes. `generator` is a CPU generator, whatever the device.
    """
    chosen = torch.randint(len(rows), (1,), generator=generator)
    new, distance = chosen, torch.full((len(rows),), torch.inf)
    while True:
        distance = torch.minimum(distance, nearest_rows(rows, rows[new.to(rows.device)])[1].cpu().float())
        if len(chosen) == k:
            return rows[chosen.to(rows.device)]
        chances = distance.clamp_min(1e-30)  # so that equal rows can be drawn if no others remain
        chances[chosen] = 0
        n_new = min(max(1, len(chosen) // 4), k - len(chosen))
        new = torch.multinomial(chances, n_new, generator=generator)
        chosen = torch.cat([chosen, new])


def cluster_means(rows: Tensor, labels: Tensor, k: int, block: int = 65536) -> Tensor:
    """The mean of each cluster's rows: (n, E), (n,) -> (k, E); a cluster without rows gets zeros.

    Rows are summed sorted by cluster, so the result is reproducible on every device.
    """
    sums = torch.zeros(k, rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, label in zip(rows.split(block), labels.split(block), strict=True):
        order = label.argsort(stable=True)
        lengths = torch.bincount(label, minlength=k)
        sums += torch.segment_reduce(part[order].double(), "sum", lengths=lengths, initial=0)
    return (sums / torch.bincount(labels, minlength=k).clamp_min(1)[:, None]).to(rows.dtype)


def fill_empty(centroids: Tensor, rows: Tensor, labels: Tensor, distances: Tensor) -> int:
    """Number of empty clusters repaired: each gets the row farthest from its own centroid.

    Changes centroids (k, E), labels (n,) and distances (n,) in place and returns how many were moved. A row
    that is alone in its cluster stays there. Needs n >= k.
    """
    counts = torch.bincount(labels, minlength=len(centroids)).tolist()
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    if not empty:
        return 0
    # A skipped row is alone in its cluster, so fewer rows are skipped than there are clusters.
    farthest = iter(distances.topk(min(len(rows), len(empty) + len(centroids))).indices.tolist())
    for cluster in empty:
        row = next(row for row in farthest if counts[int(labels[row])] > 1)
        counts[int(labels[row])] -= 1
        counts[cluster] = 1
        centroids[cluster], labels[row], distances[row] = rows[row], cluster, 0
    return len(empty)


def kmeans(
    rows: Tensor, k: int, seed: int = 0, max_iterations: int = 20, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """k-means (Lloyd): rows (n, E) float32 or float64 -> centroids (k, E), labels (n,), on the rows' device.

    The start is `kmeans_start` on a sample of at most 10 k rows. An iteration labels all rows with their
    nearest centroid, repairs empty clusters, and moves the centroids to the means; it ends when the mean
    squared distance falls by less than `tolerance` of itself, or after `max_iterations`. The labels are those
    of the centroids that are returned. The same rows and seed give the same result on the same device. Beside
    the rows, memory holds blocks, the sample and (k, E). Raises ValueError unless 1 <= k <= n, E >= 1 and all
    is finite.

    Paper: k = 10,000; initialisation and iterations are not stated. The authors' code uses bisecting k-means.
    """
    if rows.ndim != 2 or not rows.shape[1] or rows.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"k-means: rows are (n, E) float32 or float64, not {rows.dtype} {(*rows.shape,)}")
    if not 1 <= k <= len(rows) or max_iterations < 0:
        raise ValueError(f"k-means: {len(rows):,} rows cannot make {k:,} clusters, or iterations below 0")
    if not torch.isfinite(rows.sum()):
        raise ValueError("k-means: the rows hold values that are not finite")
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(rows), generator=generator)[: 10 * k].sort().values
    centroids = kmeans_start(rows[sample.to(rows.device)], k, generator)
    before = torch.inf
    for iteration in range(max_iterations + 1):
        labels, distances = nearest_rows(rows, centroids)
        moved = fill_empty(centroids, rows, labels, distances)
        inertia = float(distances.double().mean())
        if iteration == max_iterations or (not moved and before - inertia <= tolerance * inertia):
            return centroids, labels
        centroids, before = cluster_means(rows, labels, k), inertia


def centroid_targets(centroids: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Targets (k, E) of centroids: the target of each centroid's nearest row.

    Paper: a centroid's target is not stated; this follows the authors' code.
    """
    if len(rows) != len(targets):
        raise ValueError(f"{len(rows):,} rows need as many targets, not {len(targets):,}")
    return targets[nearest_rows(centroids, rows)[0]]


# ============================================================================================================
# Section 3, meta-regression: DAKL, equations (5), (6), (7)
# ============================================================================================================


def linear_kernel(rows: Tensor) -> Tensor:
    """Equation (5): K_ij = <x_i, x_j>, for source and target rows alike. (n, E) -> (n, n)."""
    return rows @ rows.T


def normalise_kernel(kernel: Tensor) -> Tensor:
    """Equation (6): K^_ij = K_ij / sqrt(K_ii K_jj). (n, n) -> (n, n)."""
    diagonal = kernel.diagonal()
    return kernel / torch.sqrt(diagonal[:, None] * diagonal[None, :])


def rbf(kernel: Tensor, gamma: float) -> Tensor:
    """Equation (7): F_ij = exp(-gamma (1 - K^_ij)), the second-order features of sample i, one for each j."""
    return torch.exp(-gamma * (1 - kernel))


def dakl_literal(
    sources: Tensor,
    source_targets: Tensor,
    targets: Tensor,
    gamma: float,
    alpha: float,
    centred: bool = False,
) -> Tensor:
    """DAKL as the paper writes it, on full matrices in float64: predictions (t, E) for `targets` (t, E).

    sources (k, E): predictions on training samples, or centroids of them; source_targets (k, E): their true
    embeddings; targets: predictions in the target domain. Read this first; tests compare `Dakl` with it. It
    needs (k + t)^2 numbers. `centred` is the deviation that `Dakl` makes by default.
    """
    f = rbf(normalise_kernel(linear_kernel(torch.cat([sources, targets]).double())), gamma)  # (5) (6) (7)
    f = f - f.mean(dim=1, keepdim=True) if centred else f
    f_s, f_t, y = f[: len(sources)], f[len(sources) :], source_targets.double()
    middle_f, middle_y = (f_s.mean(dim=0), y.mean(dim=0)) if centred else (0, 0)
    f_s, f_t, y = f_s - middle_f, f_t - middle_f, y - middle_y
    gram = f_s @ f_s.T  # the linear kernel again
    a = torch.linalg.solve(gram + alpha * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), y)
    return f_t @ f_s.T @ a + middle_y


# The penalties tried, in units of `Dakl.scale`, which grows as gamma^2 n k: a fixed alpha, as in the authors'
# code (10), is a different penalty for each gamma and each n.
RELATIVE_ALPHAS = tuple(10 ** (half / 2) for half in range(2, -13, -1))


@dataclass
class Dakl:
    """Domain-adaptive kernel learning: better predictions from predictions, with unlabelled target rows.

        dakl = Dakl(gamma=1e-3).fit(centroids, their_targets, targets, validation=(rows, embeddings))
        better = dakl.predict(test_rows)

    `form` "exact" is equations (5) to (7) in float64. F is made in blocks of columns, so memory holds two
    (k, k) matrices, the rows and blocks. "linear" is the limit of small gamma, where F_ij is
    e^-gamma (1 + gamma K^_ij): ridge regression in E + 1 unknowns, for any number of sources. AUDIT.md bounds
    the difference. After `fit`: `alpha`, chosen on validation unless given; `scale`, the trace of this form's
    F_S F_S', columns centred, divided by E; `tried`, the pairs (alpha / scale, validation cosine).

    Paper: F is centred, its rows at their means over the k + t columns, then its columns and y at their means
    over the sources. Uncentred, the constant part of F F' is gamma^-2 times larger than the rest and takes
    half of float64's digits at gamma 1e-4. Centring changes predictions by O(gamma); `centred=False` follows
    the equations to the letter.
    """

    gamma: float = 1e-3
    alpha: InitVar[float | None] = None
    form: str = "exact"
    centred: bool = True
    relative_alphas: Sequence[float] = RELATIVE_ALPHAS  # tried in turn until three in a row are no better
    validation_limit: int = 2000  # of validation rows that compare them, evenly spaced
    block: int = 1000  # rows and columns worked on at a time

    def __post_init__(self, alpha: float | None) -> None:
        if self.form not in ("exact", "linear"):
            raise ValueError(f'form must be "exact" or "linear", not {self.form!r}')
        if not self.gamma > 0 or not (alpha is None or alpha > 0):
            raise ValueError(f"gamma and alpha must be above 0, not {self.gamma} and {alpha}")
        self._given = alpha

    @torch.no_grad()
    def fit(
        self, sources: Tensor, y: Tensor, targets: Tensor, validation: tuple[Tensor, Tensor] | None = None
    ) -> Dakl:
        """This object, fitted to sources (k, E), their true embeddings y (k, D) and all rows of the target
        domain (t, E), in the paper those of validation and test. `validation`: rows (v, E) and their true
        embeddings (v, D), for the choice of alpha alone. All lie on one device. Raises ValueError for shapes
        that do not fit and for rows that are zero or not finite."""
        if self._given is None and not (validation and len(validation[0])):
            raise ValueError("DAKL: alpha is chosen on validation rows; give them, or alpha")
        rows, truth = validation if self._given is None else (sources[:0], y[:0])
        shapes = [tuple(x.shape) for x in (sources, y, targets, rows, truth)]
        k, n, v, e, d = len(sources), len(sources) + len(targets), len(rows), sources.shape[-1], y.shape[-1]
        if not k or shapes != [(k, e), (k, d), (n - k, e), (v, e), (v, d)]:
            raise ValueError(f"DAKL: shapes {shapes} are not (k, E), (k, D), (t, E), (v, E), (v, D), k > 0")
        if not bool(y.isfinite().all()):
            raise ValueError("DAKL: a source's true embedding is not finite")
        v = min(v, self.validation_limit)
        keep = torch.linspace(0, len(rows) - 1, v, dtype=torch.float64, device=rows.device).long()
        pool, rows, truth = _unit(torch.cat([sources, targets])), _unit(rows[keep]), _unit(truth[keep])
        self._mean_y = y.double().mean(dim=0) * self.centred
        sources, y, linear = pool[:k], y.double() - self._mean_y, self.form == "linear"
        self._parts = [self._root(pool)] if linear else pool.split(self.block)
        self._means = [0.0] * len(self._parts)
        means = [f.mean(dim=0) for f in self._columns(sources)]
        self._means = [mean * self.centred for mean in means]
        if linear:
            f, cross = (next(self._columns(x)) for x in (sources, rows))
            gram, right = f.T @ f, f.T @ y
        else:
            gram, cross = self._products(torch.cat([sources, rows]), k, n).tensor_split([k])
            right = y
        uncentred = k * sum(float(mean.square().sum()) for mean in means) * (not self.centred)
        self.scale = (float(gram.trace()) - uncentred) / e
        self._weights = [self._ridge(gram, right, cross, truth)]
        if not linear:
            weights = torch.cat([f.T @ self._weights[0] for f in self._columns(sources)])  # F_S' A
            self._weights = (weights - weights.mean(dim=0) * self.centred).split(self.block)
        return self

    @torch.no_grad()
    def predict(self, rows: Tensor, unit: bool = True) -> Tensor:
        """Predictions (b, E) -> better ones (b, D), float64, L2-normalised unless `unit` is False."""
        better = [
            sum(f @ w for f, w in zip(self._columns(_unit(part)), self._weights, strict=True)) + self._mean_y
            for part in rows.split(self.block)
        ]
        return F.normalize(torch.cat(better), dim=1) if unit else torch.cat(better)

    def _columns(self, x: Tensor) -> Iterator[Tensor]:
        """The features of unit rows (b, E), less the sources' means, in blocks of columns."""
        for part, mean in zip(self._parts, self._means, strict=True):
            if self.form == "linear":
                yield F.pad(x, (1, 0), value=1.0) @ part - mean
            else:
                z = (x @ part.T).sub_(1).mul_(self.gamma)  # -gamma (1 - K^)
                yield (z.expm1_() if self.centred else z.exp_()).sub_(mean)  # centred, F and F - 1 are equal

    def _root(self, pool: Tensor) -> Tensor:
        """B (E + 1, E + 1) with which F F' = f f' in the linear limit, f = [1, x] B."""
        psi = F.pad(pool, (1, 0), value=1.0)
        psi -= psi.mean(dim=0) * self.centred
        values, vectors = torch.linalg.eigh(psi.T @ psi)
        root = math.exp(-self.gamma) * vectors * values.clamp_min(0).sqrt()
        root[1:] *= self.gamma
        return root

    def _products(self, x: Tensor, k: int, n: int) -> Tensor:
        """F F_S' (b, k) of unit rows (b, E), first the k sources, whose upper triangle is not computed."""
        products, sums = x.new_zeros(len(x), k), x.new_zeros(len(x))
        for f in self._columns(x):
            sums += f.sum(dim=1)
            for start in range(0, len(x), self.block):
                part, end = slice(start, start + self.block), min(start + self.block, k)
                products[part, :end].addmm_(f[part], f[:end].T)
        return products.addr_(sums, sums[:k], alpha=-self.centred / n)  # less n m m', m the rows' means

    def _ridge(self, gram: Tensor, y: Tensor, cross: Tensor, truth: Tensor) -> Tensor:
        """A = (G + alpha I)^-1 Y for the given alpha, or for that whose predictions, cross A, have the
        highest mean cosine to `truth`. Reads the lower triangle of G and changes its diagonal."""
        self.tried: list[tuple[float, float]] = []
        diagonal, best, solution, worse = gram.diagonal().clone(), -torch.inf, None, 0
        for alpha in [self._given] if self._given else [part * self.scale for part in self.relative_alphas]:
            gram.diagonal().copy_(diagonal + alpha)
            factor, lost = torch.linalg.cholesky_ex(gram)
            if lost:  # in the rounding of G
                continue
            lower = torch.linalg.solve_triangular(factor, y, upper=False)
            trial = torch.linalg.solve_triangular(factor.mT, lower, upper=True)  # cholesky_solve copies
            del factor  # before the next one is made
            if self._given:
                self.alpha = alpha
                return trial
            cosine = float((F.normalize(cross @ trial + self._mean_y, dim=1) * truth).sum(dim=1).mean())
            self.tried.append((alpha / self.scale, cosine))
            if cosine > best:
                best, solution, self.alpha, worse = cosine, trial, alpha, 0
            elif (worse := worse + 1) == 3:
                break
        if solution is None:
            raise ValueError(f"DAKL: alpha is below the rounding of F F' (gamma {self.gamma}); raise it")
        return solution


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1 in float64: their inner products are equations (5) and (6) at once."""
    lengths = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise ValueError("DAKL: a row is zero or not finite, and equation (6) divides by its length")
    return rows.double() / lengths


# ============================================================================================================
# A trained run, and one's own images
# ============================================================================================================


@dataclass
class Run:
    """A loaded run: trained regressor in eval mode, vocabulary, configuration."""

    folder: Path
    config: dict[str, Any]
    regressor: Regressor
    vocabulary: Vocabulary
    sizes: Any = None  # of the backbone

    @property
    def backbone(self) -> Backbone:
        return BACKBONES[self.config["backbone"]]

    @property
    def frozen(self) -> bool:
        """Whether the regressor's inputs are the cached features of a frozen backbone."""
        return self.config.get("train_blocks") == 0


def read_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a run. Raises DataError if its words are not those in the hash of the run's
    config."""
    vocabulary = Vocabulary(read_value(folder / "vocabulary.json", many(TEXT)))
    if config["vocabulary"] not in (None, vocabulary.fingerprint):  # None: an older run
        raise DataError(
            f"{folder / 'vocabulary.json'}: not the words that this run was trained with; restore the file"
        )
    return vocabulary


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """A run that train.py wrote; the regressor holds the weights that were best on validation.

    Raises weights.WeightsError, in one line, if the folder is not a finished run.
    """
    import weights
    from training.config import read_run

    folder = Path(folder)
    config = read_run(folder)
    if config["backbone"] not in BACKBONES:
        raise weights.WeightsError(f"{folder}: holds a captioner, not a regressor; give another run")
    vocabulary = read_vocabulary(folder, config)
    run = Run(folder, config, nn.Module(), vocabulary)
    with torch.device("meta"):
        model = weights.build(run.backbone.kind, config["model"], f"{folder / 'config.json'}, model")
        run.sizes = model.config
        backbone = as_backbone(config["backbone"], model, config.get("unet_features"))
        run.regressor = Regressor(
            nn.Identity() if run.frozen else backbone,
            backbone.width,
            len(vocabulary),
            config["heads"],
            standardise=config.get("head_start") == "ridge",
        )
    path = folder / "model.safetensors"
    weights.load_strict(run.regressor, weights.read_tensors(path), source=str(path))
    if config["smoothing"] is not None:  # the network of --curriculum cbs
        from baselines import Smoothing

        Smoothing(run.regressor, config["smoothing"])
    run.regressor = run.regressor.to(device).eval()
    return run


@torch.no_grad()
def predict(
    regressor: nn.Module, batches: Iterable[tuple[Tensor, ...]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Unit-length embeddings (n, E) and word probabilities (n, V) or None, float32, batch by batch."""
    embeddings, probabilities = [], []
    for inputs in batches:
        prediction = regressor(*inputs)
        embeddings.append(F.normalize(prediction.embedding.float(), dim=-1).cpu().numpy())
        if prediction.logits is not None:
            probabilities.append(prediction.logits.float().sigmoid().cpu().numpy())
    return np.concatenate(embeddings), np.concatenate(probabilities) if probabilities else None


def nearest(query: np.ndarray, rows: np.ndarray, n: int) -> list[tuple[int, float]]:
    """The `n` unit rows of `rows` (m, E) closest to the unit vector `query` (E,), with their cosines."""
    similarities = rows @ query
    order = np.argsort(-similarities, kind="stable")[:n]
    return [(int(i), float(similarities[i])) for i in order]


def frozen_backbone(run: Run, device: str) -> nn.Module:
    """The pretrained backbone whose features a frozen run's regressor reads. Raises weights.WeightsError if
    its weights have other sizes than when the run was trained."""
    import weights

    kind, source = run.backbone.kind, run.config["weights"]
    if weights.config(kind, source) != run.sizes:
        raise weights.WeightsError(
            f"{run.folder}: {source} had other sizes when this run was trained; train it again"
        )
    model = weights.load(kind, source, device=device)
    return as_backbone(run.config["backbone"], model, run.config.get("unet_features"))


def image_predictor(run: Run, device: str) -> Callable[..., tuple[np.ndarray, np.ndarray | None]]:
    """A function images -> predictions (see `predict`) of PIL images, with the run's preprocessing.

    Its second argument holds captions for the U-Net; None = by the run's captioner, or the empty text
    without one.
    """
    import data
    import weights

    source = run.config["weights"]
    preprocessing = data.Preprocessing(**run.config["preprocessing"])
    captioner = captioner_of(run.config["captions"]) if run.backbone.white_box else None
    sd = SDReader(source, captioner, device)
    kinds = (run.backbone.kind,) if run.frozen else ()
    weights.require_fed(source, *kinds, *(("vae", "clip-text") if run.backbone.white_box else ()))
    backbone = frozen_backbone(run, device) if run.frozen else None

    def tensors(images: Sequence[Any], preprocessing: data.Preprocessing) -> Tensor:
        return torch.stack([data.image_tensor(image, preprocessing) for image in images]).to(device)

    @torch.no_grad()
    def predict_images(images: Sequence[Any], captions: Sequence[str] | None = None) -> tuple:
        inputs = (tensors(images, preprocessing),)
        if run.backbone.white_box:
            if captions is None and captioner:
                blip_preprocessing = data.Preprocessing(**weights.preprocessing("blip", captioner))
                captions = sd.captions(tensors(images, blip_preprocessing))
            inputs = (sd.latents(*inputs), sd.states(captions or [""] * len(images)))
            if (tokenizer := sd.network("tokenizer")).truncated:
                print("a caption was cut to 75 tokens, the text tower's limit", file=sys.stderr)
                tokenizer.truncated = 0
        if backbone is not None:
            inputs = (backbone(*inputs),)
        return predict(run.regressor, [inputs])

    return predict_images


def main(argv: list[str] | None = None) -> int:
    import weights
    from command import run_command
    from training.reading import newest_run, parse, read_images

    args = parse(argv)

    def read() -> int:
        device = weights.resolve_device(args.device)
        run = load_run(args.run or newest_run(), device)
        return read_images(args, run, image_predictor(run, device), device)

    return run_command(read, "stopped; what was written is kept")


if __name__ == "__main__":
    sys.exit(main())
