"""Methods compared with the paper's: ridge regression, LeRaC and CBS (section 4.8), k-NN (section 4.10).

LeRaC and CBS are the other curricula: `python train.py --curriculum lerac` or `cbs`. Letters in shape
comments as in reverse_sd.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.swin import PatchMerging

# ============================================================================================================
# Ridge regression on the features of a frozen backbone
# ============================================================================================================

PENALTIES = tuple(10 ** (half / 2) for half in range(2, -13, -1))


class RidgeSums:
    """Sums over training rows, all that `ridge` needs of them: any number of rows in (width + E)^2 memory.

    products (1 + width, 1 + width + E) float64: [1, x]' [1, x, y], summed over features x and targets y.
    """

    def __init__(self, width: int, embedding_width: int, device: str = "cpu"):
        self.width = width
        self.products = torch.zeros(
            1 + width, 1 + width + embedding_width, dtype=torch.float64, device=device
        )

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows (b, width) with their targets (b, E)."""
        x = F.pad(features.double(), (1, 0), value=1.0)
        self.products.addmm_(x.T, torch.cat([x, targets.double()], dim=1))


@dataclass
class Ridge:
    """Standardised features @ weight + bias; `tried`: (penalty, validation cosine) of each penalty.

    mean, deviation (width,), of the training features; weight (width, E); bias (E,); all float64.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float
    tried: list[tuple[float, float]]

    def predict(self, features: Tensor) -> Tensor:
        """Features (b, width) -> embeddings (b, E), not normalised."""
        return (features.double() - self.mean) / self.deviation @ self.weight + self.bias


def ridge(
    sums: RidgeSums,
    rows: Tensor | None,
    targets: Tensor | None,
    summed: Callable[[Tensor], Tensor] = lambda values: values,
) -> Ridge:
    """Ridge regression from features to prompt embeddings in closed form, features standardised.

    Minimises |y - x W - b|^2 / n + penalty |W|^2, with the one of PENALTIES that has the highest mean cosine
    on validation rows (v, width) and targets (v, E). Several processes give their shares of the rows (None =
    no row) and a function that sums a tensor over them.
    """
    w, n = sums.width, sums.products[0, 0]
    mean, bias = sums.products[0, 1 : w + 1] / n, sums.products[0, w + 1 :] / n
    covariance = sums.products[1:, 1 : w + 1] / n - mean[:, None] * mean
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    deviation[deviation <= 1e-6 * deviation.max()] = 1.0  # constant features
    values, vectors = torch.linalg.eigh(covariance / deviation / deviation[:, None])
    right = vectors.T @ ((sums.products[1:, w + 1 :] / n - mean[:, None] * bias) / deviation[:, None])
    cosines = torch.zeros(len(PENALTIES) + 1, dtype=torch.float64, device=mean.device)
    if rows is not None and targets is not None:
        projected = (rows.double() - mean) / deviation @ vectors
        for k, penalty in enumerate(PENALTIES):
            predicted = projected @ (right / (values.clamp_min(0) + penalty)[:, None]) + bias
            cosines[k] = F.cosine_similarity(predicted, targets.double()).sum()
        cosines[-1] = len(rows)
    cosines = summed(cosines)
    best = int(cosines[:-1].argmax())
    weight = vectors @ (right / (values.clamp_min(0) + PENALTIES[best])[:, None])
    tried = list(zip(PENALTIES, (cosines[:-1] / cosines[-1]).tolist(), strict=True))
    return Ridge(mean, deviation, weight, bias, PENALTIES[best], tried)


# ============================================================================================================
# Controls of the curriculum
# ============================================================================================================


def control_scores(easiness: np.ndarray, order: str, seed: int) -> np.ndarray:
    """The scores (n,) by which samples are ordered: those of other samples if `order` is "shuffled", with the
    opposite sign if it is "hard-first"."""
    if order == "shuffled":
        return np.random.default_rng(seed).permutation(easiness)
    return -easiness if order == "hard-first" else easiness


def mixed(chunks: Sequence[np.ndarray]) -> np.ndarray:
    """One pool of three equal chunks with each sample as often as in the paper's three stages.

    A third of the steps is on chunk 1, a third on chunks 1 and 2, a third on all: 1 + 1/2 + 1/3, 1/2 + 1/3
    and 1/3 visits, as 11 to 5 to 2.
    """
    return np.concatenate([np.repeat(chunk, n) for chunk, n in zip(chunks, (11, 5, 2), strict=True)])


# ============================================================================================================
# Section 4.8: LeRaC, Learning Rate Curriculum (Croitoru et al., 2024)
# ============================================================================================================


def lerac_initial(highest: float, lowest: float, layers: int) -> list[float]:
    """The learning rates at step 0 from input to output: `highest`, ..., `lowest`, in equal ratios.

    Paper: the (tuned) range is not stated. LeRaC's default falls from the normal rate to 1e-8.
    """
    if layers < 2:
        return [highest] * layers
    return [highest * (lowest / highest) ** (j / (layers - 1)) for j in range(layers)]


def lerac_rate(initial: float, final: float, t: float, k: float, c: float = 10.0) -> float:
    """eta_j(t) = eta_j(0) c^{(t/k)(log_c eta(k) - log_c eta_j(0))}, the rate of a layer at step t of k.

    initial eta_j(0); final eta(k), the same for all layers. From t = k on the rate is `final`, and the caller
    continues with its own schedule. The base c cancels: the logarithm is linear in t for every c.
    """
    if t >= k:
        return final
    return initial * c ** (t / k * (math.log(final, c) - math.log(initial, c)))


# ============================================================================================================
# Section 4.8: CBS, Curriculum by Smoothing (Sinha et al., 2020)
# ============================================================================================================


def cbs_sigma(step: int, every: float) -> float:
    """CBS's sigma at `step`: 1, multiplied by 0.9 after each `every` steps."""
    return 0.9 ** int(step / every)


def gaussian(sigma: float) -> Tensor:
    """A 3 x 3 Gaussian of standard deviation `sigma` pixels, of sum 1."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * sigma**2))
    kernel = line[:, None] * line
    return (kernel / kernel.sum()).float()


def smoothed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers after which CBS smooths, by name: convolutions wider than one pixel, and Swin's patch
    merging, which is such a convolution written as a linear layer.

    U-Net: the first convolution, both of each ResBlock, and the strided ones. ViT, CLIP: the patch
    embedding. Swin: patch embedding and each merging. Paper: the place of smoothing in a transformer is not
    stated; here after every convolution of pixels or patches, before its norm or sum.
    """
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            places[name] = module
        elif isinstance(module, PatchMerging):
            places[f"{name}.reduction"] = module.reduction
    return places


class Smoothing:
    """Hooks that apply a fixed depthwise 3 x 3 Gaussian after each of `smoothed_layers`.

    Not in the state_dict: set `sigma` again after rebuilding the model. Borders are padded with zeros, as in
    the convolutions. Raises ValueError for a model without such a layer.
    """

    def __init__(self, model: nn.Module, sigma: float = 1.0):
        places = smoothed_layers(model)
        if not places:
            raise ValueError("no convolution to smooth after")
        self.sigma = sigma
        for layer in places.values():
            layer.register_forward_hook(self._smooth)

    @property
    def sigma(self) -> float:
        return self._sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._sigma, self.kernel = sigma, gaussian(sigma)

    def _smooth(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        channels_last = isinstance(layer, nn.Linear)
        x = output.permute(0, 3, 1, 2) if channels_last else output      # (B, C, h, w)
        kernel = self.kernel.to(x).expand(x.shape[1], 1, 3, 3)
        x = F.conv2d(x, kernel, padding=1, groups=x.shape[1])
        return x.permute(0, 2, 3, 1) if channels_last else x


# ============================================================================================================
# Section 4.10: k-NN regression on CLIP's features
# ============================================================================================================

# Paper: k and the distance weighting are not stated; both are chosen on validation.
NEIGHBOURS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
TEMPERATURES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def neighbours(
    query: np.ndarray, reference: np.ndarray, k: int, device: str = "cpu", block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `reference` (m, P) with the largest cosine to each row of `query` (n, P).

    -> cosines (n, k) float32, largest first, and rows (n, k) int64; equal cosines in the order of the rows.
    `block` queries at a time (None: as many as give 2^25 cosines). Raises ValueError unless 1 <= k <= m.
    """
    m = len(reference)
    if not 1 <= k <= m:
        raise ValueError(f"k = {k}: there are {m} rows to choose from")
    block = block or max(1, 2**25 // m)
    texts = F.normalize(torch.as_tensor(np.asarray(reference, np.float32), device=device), dim=1)
    cosines, rows = [], []
    for start in range(0, len(query), block):
        part = torch.as_tensor(np.asarray(query[start : start + block], np.float32), device=device)
        near = F.normalize(part, dim=1) @ texts.T                                      # (b, m)
        least = near.topk(k).values[:, -1:]
        above, equal = near > least, near == least
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))    # k in each row
        row = chosen.nonzero()[:, 1].reshape(-1, k)                                    # in ascending order
        cosine, order = near.gather(1, row).sort(dim=1, descending=True, stable=True)
        cosines.append(cosine.cpu().numpy())
        rows.append(row.gather(1, order).cpu().numpy())
    return np.concatenate(cosines), np.concatenate(rows)


def neighbour_mean(
    cosines: np.ndarray, rows: np.ndarray, targets: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """Mean of the neighbours' targets, weighted by exp(cosine / temperature), as unit rows, one per
    temperature: (n, T, E) float32. cosines, rows (n, k) from `neighbours`; targets (m, E).
    """
    means = np.empty((len(rows), len(temperatures), targets.shape[1]), np.float32)
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        below = (cosines[part] - cosines[part, :1])[:, None]                           # (b, 1, k)
        weight = np.exp(below / np.asarray(temperatures, np.float32)[:, None])         # (b, T, k)
        means[part] = weight @ targets[rows[part]]                                     # (b, T, E)
    return means / np.linalg.norm(means, axis=2, keepdims=True)


def knn_regression(
    query: np.ndarray, reference: np.ndarray, targets: np.ndarray, k: int, temperature: float,
    device: str = "cpu", block: int | None = None,
) -> np.ndarray:
    """Prompt embeddings, unit rows (n, E) float32, by k-NN regression in CLIP's space (section 4.10).

    query      CLIP's embeddings of the images to predict, (n, P)
    reference  of training pairs, (m, P): CLIP's embeddings of their prompts, as in the paper, or of their
               images, which needs no text tower
    targets    sentence embeddings of the training prompts, (m, E)
    """
    return neighbour_mean(*neighbours(query, reference, k, device, block), targets, [temperature])[:, 0]


def choose_neighbours(
    query: np.ndarray, truth: np.ndarray, reference: np.ndarray, targets: np.ndarray, device: str = "cpu"
) -> dict[str, float]:
    """{"k", "temperature", "cosine"} with the highest mean cosine to `truth` (n, E) among NEIGHBOURS and
    TEMPERATURES. Give validation pairs as query and truth.
    """
    ks = [k for k in NEIGHBOURS if k <= len(reference)]
    cosines, rows = neighbours(query, reference, ks[-1], device)
    scores = np.zeros((len(ks), len(TEMPERATURES)))
    for start in range(0, len(query), 1024):
        part = slice(start, start + 1024)
        for i, k in enumerate(ks):
            means = neighbour_mean(cosines[part, :k], rows[part, :k], targets, TEMPERATURES)
            scores[i] += np.einsum("nte,ne->t", means, truth[part]) / len(query)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return {"k": ks[i], "temperature": TEMPERATURES[j], "cosine": float(scores[i, j])}
