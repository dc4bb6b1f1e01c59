"""Predictions of a table's row: one run, the ensemble of several, ridge regression, DAKL, k-NN.

A method maps the finished runs of one seed to (test predictions (n, E), settings chosen on validation). The
predictions of a method with a `version` are cached (compute.py): raise it when its numbers change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
import data
import reverse_sd
from tables import readouts
from tables.runs import Plan, RunName
from training.inputs import (
    Prepared,
    Samples,
    clip_texts,
    evaluation_batches,
    prepare,
    sample_readers,
)
from training.loop import Process

CLIP, CAPTIONED = RunName("clip", "plain"), RunName("unet", "plain")


class Member:
    """The predictions of a finished run, as memory maps."""

    def __init__(self, folder: Path):
        self.folder = folder

    def array(self, name: str) -> np.ndarray:
        path = self.folder / "predictions" / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise data.DataError(
                f"{path}: cannot be read ({error}); write it again with python eval.py {self.folder}"
            ) from error

    def predicted(self, split: str) -> np.ndarray:
        """Unit-length predictions (n, E) of "train", "val" or "test"."""
        return self.array(split)

    def targets(self, split: str) -> np.ndarray:
        return self.array(f"{split}-targets")


def members_of(plan: Plan, runs: Sequence[RunName], seed: int, like: Member | None = None) -> list[Member]:
    """The runs of one seed. Raises DataError unless all have the same split, that of `like` if given."""
    members = [Member(plan.run_folder(run, seed)) for run in runs]
    like = like or members[0]
    for member in members:
        for split in ("val", "test"):
            if not np.array_equal(member.targets(split), like.targets(split)):
                raise data.DataError(
                    f"{member.folder}: its {split} pairs are not those of {like.folder}; remove the run on "
                    "other data and repeat the command"
                )
    return members


class Method(Protocol):
    version: ClassVar[int | None] = None

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]: ...


@dataclass(frozen=True)
class SingleRun(Method):
    """The predictions of the row's only run."""

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        return members[0].predicted("test"), {}


def tensor(array: np.ndarray, device: str = "cpu") -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


@dataclass(frozen=True)
class EnsembleMethod(Method):
    """The "mean" or "median" of the runs, or their mean with weights "fitted" on the validation pairs."""

    average: str = "mean"

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        test = [tensor(member.predicted("test")) for member in members]
        if self.average != "fitted":
            return reverse_sd.ensemble(test, self.average).numpy(), {}
        val = [tensor(member.predicted("val")) for member in members]
        fitted = fit_ensemble_weights(val, tensor(members[0].targets("val")))
        return reverse_sd.ensemble(test, weights=fitted).numpy(), {"weights": fitted.tolist()}


def fit_ensemble_weights(predictions: Sequence[Tensor], targets: Tensor, iterations: int = 200) -> Tensor:
    """Weights (m,) float64, at least 0 and of sum 1, that raise the mean cosine of the weighted mean.

    predictions: m tensors (n, E) of validation samples; targets (n, E). Exponentiated gradient from equal
    weights; only steps that raise the cosine are kept, so on these samples the result is never worse than the
    mean. Raises ValueError as `ensemble`, and for targets that are not finite. Paper: section 4.9 has no
    weights; the authors' code has weights chosen by hand.
    """
    reverse_sd.ensemble(predictions)
    members = torch.stack([F.normalize(p.double(), dim=-1) for p in predictions])
    products = torch.einsum("mne,lne->nml", members, members)
    along = torch.einsum("mne,ne->nm", members, F.normalize(targets.double(), dim=-1))

    def cosine(weights: Tensor) -> Tensor:
        length = torch.einsum("m,nml,l->n", weights, products, weights).clamp_min(1e-24).sqrt()
        return (along @ weights / length).mean()

    weights, step = torch.full_like(along[0], 1 / len(members)), 1.0
    best = cosine(weights)
    if not best.isfinite():
        raise ValueError("the targets of an ensemble's weights are not finite")
    for _ in range(iterations):
        slope = torch.func.grad(cosine)(weights)
        trial = torch.softmax(weights.log() + step * slope, dim=0)
        if (value := cosine(trial)) > best:
            weights, best, step = trial, value, step * 2
        else:
            step /= 4
    return weights


class Predicted(NamedTuple):
    """Predictions to be improved by a regression, and the true embeddings: rows (n, E) of each.

    train, val: with truth, the second to choose a penalty; domain: unlabelled target rows; test.
    """

    train: Tensor
    train_targets: Tensor
    val: Tensor
    val_targets: Tensor
    domain: Tensor
    test: Tensor


def predicted_by(members: Sequence[Member], average: str, device: str) -> Predicted:
    """The members' predictions, their "mean", "median" or "side by side", with all validation and test pairs
    as the target domain."""

    def of(split: str) -> Tensor:
        parts = [tensor(member.predicted(split), device) for member in members]
        return torch.cat(parts, dim=1) if average == "side by side" else reverse_sd.ensemble(parts, average)

    train, val, test = map(of, ("train", "val", "test"))
    targets, val_targets = (tensor(members[0].targets(split), device) for split in ("train", "val"))
    return Predicted(train, targets, val, val_targets, torch.cat([val, test]), test)


@dataclass(frozen=True)
class RidgeMethod(Method):
    """Ridge regression on the runs' training predictions: their "mean", "median" or "side by side". It has no
    target rows and is the baseline of DAKL."""

    version: ClassVar = 1
    average: str = "mean"

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        return self.improved(predicted_by(members, self.average, plan.device), seed)

    def improved(self, p: Predicted, seed: int) -> tuple[np.ndarray, dict]:
        """(test predictions (n, E), settings chosen on validation)."""
        sums = baselines.RidgeSums(p.train.shape[1], p.train_targets.shape[1], p.train.device)
        sums.add(p.train, p.train_targets)
        solution = baselines.ridge(sums, p.val, p.val_targets)
        return solution.predict(p.test).float().cpu().numpy(), {"penalty": solution.penalty}


@dataclass(frozen=True)
class DaklMethod(Method):
    """DAKL on the runs' mean or median. Its sources are `k` centroids of the training predictions, or all if
    there are at most k.

    target_rows: "both", the validation and test predictions, or a control: "noise", as many unit rows in
    random directions, or "none". centroids: "nearest", the target of the nearest training row; or "weighted
    mean", the mean target of the cluster, with the cluster's size as weight: the centroid then stands in the
    sources once for each row of its cluster. Paper: a centroid's target is not stated, and none has a weight.
    """

    version: ClassVar = 2
    k: int | None = 10_000
    gamma: float = 1e-3
    form: str = "exact"
    average: str = "mean"
    target_rows: str = "both"
    centroids: str = "nearest"

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        return self.improved(predicted_by(members, self.average, plan.device), seed)

    def improved(self, p: Predicted, seed: int) -> tuple[np.ndarray, dict]:
        """(test predictions (n, E), settings chosen on validation)."""
        sources, targets = self.sources(p.train, p.train_targets)
        dakl = reverse_sd.Dakl(self.gamma, form=self.form)
        dakl.fit(sources, targets, self.target_domain(p.domain, seed), (p.val, p.val_targets))
        relative = dakl.alpha / dakl.scale
        chosen = {"sources": len(sources), "alpha": dakl.alpha, "in units of its scale": relative}
        return dakl.predict(p.test).float().cpu().numpy(), chosen

    def sources(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sources and their targets, of training predictions (n, E) and true embeddings (n, E)."""
        if not self.k or self.k >= len(rows):
            return rows, targets
        centroids, labels = reverse_sd.kmeans(rows, self.k)
        if self.centroids == "nearest":
            return centroids, reverse_sd.centroid_targets(centroids, rows, targets)
        return centroids[labels], reverse_sd.cluster_means(targets, labels, self.k)[labels]

    def target_domain(self, rows: Tensor, seed: int) -> Tensor:
        """The target rows (t, E) in place of `rows`."""
        if self.target_rows == "noise":
            generator = torch.Generator().manual_seed(seed)
            return F.normalize(torch.randn(rows.shape, generator=generator), dim=1).to(rows)
        return rows if self.target_rows == "both" else rows[:0]


@dataclass(frozen=True)
class FrozenMethod(Method):
    """Ridge regression on the features of the runs' frozen backbones, side by side, and on the sentence
    embedding of the captions of the U-Net's run `caption`, if given. Nothing is trained."""

    version: ClassVar = 1
    runs: tuple[RunName, ...] = ()
    caption: RunName | None = None

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        frozen = [readouts.frozen(plan, run, seed) for run in self.runs or (CAPTIONED,)]
        features = [np.asarray(prepared.inputs[0]) for prepared in frozen[: len(self.runs)]]
        features += [readouts.caption_features(plan, self.caption).rows] if self.caption else []
        rows = np.concatenate(features, axis=1)
        solution, _ = readouts.fitted(rows, frozen[0], plan.device)
        test = tensor(rows[frozen[0].splits["test"]], plan.device)
        return solution.predict(test).float().cpu().numpy(), {"penalty": solution.penalty}


@dataclass(frozen=True)
class KnnMethod(Method):
    """k-NN regression; k and temperature are chosen on validation.

    Paper: a fine-tuned CLIP compares the image with the training prompts. Here the run's prediction is
    compared with their sentence embeddings. `pretrained`: the features of the pretrained CLIP are compared
    with those of the training images, without any training. PromptKnnMethod compares images with prompts.
    """

    version: ClassVar = 1
    pretrained: bool = False

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        member = members[0]
        targets = np.array(member.targets("train"))
        if self.pretrained:
            frozen = dataclasses.replace(plan.config(CLIP, seed), train_blocks=0)
            prepared = prepare(frozen, plan.device)
            query = {split: prepared.inputs[0][rows] for split, rows in prepared.splits.items()}
            reference = query["train"]
        else:
            query = {split: np.array(member.predicted(split)) for split in ("val", "test")}
            reference = targets
        return knn(query, reference, member, plan.device)


@dataclass(frozen=True)
class PromptKnnMethod(Method):
    """k-NN regression as in section 4.10: CLIP's embedding of the image is compared with its embeddings of
    the training prompts.

    Paper: CLIP is fine-tuned, and how is not stated. With `fine_tuned` the image half is that of the run,
    which learnt to predict sentence embeddings, and the text half is the pretrained one; else both are
    pretrained.
    """

    version: ClassVar = 1
    fine_tuned: bool = False

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        member, config = members[0], plan.config(CLIP, seed)
        if self.fine_tuned:
            prepared = prepare(config, plan.device)
            query = {split: run_features(member, prepared, split, plan.device) for split in ("val", "test")}
        else:
            prepared = prepare(dataclasses.replace(config, train_blocks=0), plan.device)
            query = {split: prepared.inputs[0][prepared.splits[split]] for split in ("val", "test")}
        prompts = [prepared.pairs.prompts[i] for i in prepared.splits["train"]]
        texts = clip_texts(config.weights, prompts, plan.device)
        return knn(query, texts[np.arange(len(prompts))], member, plan.device)


@torch.no_grad()
def run_features(member: Member, prepared: Prepared, split: str, device: str) -> np.ndarray:
    """The features (n, width) of a split's images by the backbone of a run."""
    run = reverse_sd.load_run(member.folder, device)
    samples = Samples(prepared, prepared.splits[split], run.vocabulary)
    workers = sample_readers(run.config.get("workers"), prepared, device)
    batches, _ = evaluation_batches(samples, Process(device=device), workers)
    parts = [run.regressor.backbone(images.to(device)).float().cpu().numpy() for images, *_ in batches]
    return np.concatenate(parts)


def knn(
    query: dict[str, np.ndarray], reference: np.ndarray, member: Member, device: str
) -> tuple[np.ndarray, dict]:
    """(predictions (n, E) of query["test"], {"k", "temperature"} chosen on query["val"]); `reference` (m, P)
    of the training pairs of `member`."""
    targets = np.array(member.targets("train"))
    chosen = baselines.choose_neighbours(query["val"], member.targets("val"), reference, targets, device)
    k, temperature = chosen["k"], chosen["temperature"]
    predicted = baselines.knn_regression(query["test"], reference, targets, k, temperature, device)
    return predicted, {"k": k, "temperature": temperature}
