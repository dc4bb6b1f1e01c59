"""What a row of a table makes of its finished runs: the prediction of one, their ensemble, DAKL, k-NN, or a
captioner beside them. A method takes the runs of one seed and returns the test predictions (n, E) and what it
chose on validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import baselines
import data
import reverse_sd
from tables.runs import Plan
from training import captioner
from training.inputs import prepare


class Member:
    """A finished run of one seed, as methods read it. Arrays stay on the disk until they are used."""

    def __init__(self, folder: Path):
        self.folder = folder

    def array(self, name: str) -> np.ndarray:
        path = self.folder / "predictions" / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise data.DataError(
                f"{path}: cannot be read ({error}); write it again: python eval.py {self.folder}"
            ) from error

    def predicted(self, split: str) -> np.ndarray:
        """Unit-length predictions (n, E) of "train", "val" or "test"."""
        return self.array(split)

    def targets(self, split: str) -> np.ndarray:
        return self.array(f"{split}-targets")


def members_of(plan: Plan, runs: Sequence[str], seed: int, like: Member | None = None) -> list[Member]:
    """The runs of one seed. Raises DataError unless all have the same split, that of `like` if given."""
    members = [Member(plan.run_folder(run, seed)) for run in runs]
    like = like or members[0]
    for member in members:
        for split in ("val", "test"):
            if not np.array_equal(member.targets(split), like.targets(split)):
                raise data.DataError(
                    f"{member.folder}: its {split} pairs are not those of {like.folder}; remove the one of "
                    "other data and call again"
                )
    return members


@dataclass(frozen=True)
class Single:
    """The prediction of the one run itself."""

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        return members[0].predicted("test"), {}


def tensor(array: np.ndarray, device: str = "cpu") -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


@dataclass(frozen=True)
class Ensemble:
    """The runs' mean or median, or a mean whose weights are fitted on the validation pairs."""

    how: str = "mean"

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        test = [tensor(member.predicted("test")) for member in members]
        if self.how != "fitted":
            return reverse_sd.ensemble(test, self.how).numpy(), {}
        val = [tensor(member.predicted("val")) for member in members]
        fitted = reverse_sd.fit_ensemble_weights(val, tensor(members[0].targets("val")))
        return reverse_sd.ensemble(test, weights=fitted).numpy(), {"weights": fitted.tolist()}


@dataclass(frozen=True)
class Dakl:
    """DAKL on the runs' mean: its sources are `k` centroids of the training predictions, or these themselves
    where they are no more than k; its target rows the validation and test predictions."""

    k: int | None = 10_000
    gamma: float = 1e-3
    form: str = "exact"

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        sources, val, test = (
            reverse_sd.ensemble([tensor(member.predicted(split), plan.device) for member in members])
            for split in ("train", "val", "test")
        )
        targets, val_targets = (tensor(members[0].targets(split), plan.device) for split in ("train", "val"))
        if self.k and self.k < len(sources):
            centroids, _ = reverse_sd.kmeans(sources, self.k)
            sources, targets = centroids, reverse_sd.centroid_targets(centroids, sources, targets)
        dakl = reverse_sd.Dakl(self.gamma, form=self.form)
        dakl.fit(sources, targets, torch.cat([val, test]), (val, val_targets))
        chose = {
            "sources": len(sources),
            "alpha": dakl.alpha,
            "in units of its scale": dakl.alpha / dakl.scale,
        }
        return dakl.predict(test).float().cpu().numpy(), chose


@dataclass(frozen=True)
class Neighbours:
    """k-NN regression; k and temperature are chosen on validation.

    Paper: a fine-tuned CLIP compares the image with the training prompts. Here the run's prediction is
    compared with their sentence embeddings. `pretrained`: CLIP's own features, compared with those of the
    training images, which needs no training at all.
    """

    pretrained: bool = False

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        member = members[0]
        targets = np.array(member.targets("train"))
        if self.pretrained:
            frozen = dataclasses.replace(plan.config("clip-plain", seed), train_blocks=0)
            prepared = prepare(frozen, plan.device)
            query = {split: prepared.inputs[0][rows] for split, rows in prepared.splits.items()}
            reference = query["train"]
        else:
            query, reference = (
                {split: np.array(member.predicted(split)) for split in ("val", "test")},
                targets,
            )
        chose = baselines.choose_neighbours(
            query["val"], member.targets("val"), reference, targets, plan.device
        )
        k, temperature = chose["k"], chose["temperature"]
        predicted = baselines.knn_regression(query["test"], reference, targets, k, temperature, plan.device)
        return predicted, {"k": k, "temperature": temperature}


@dataclass(frozen=True)
class Captioner:
    """BLIP, fine-tuned to write the prompt: the sentence embedding of what it writes."""

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        prepared = prepare(plan.config("clip-plain", seed), plan.device)
        source = plan.sources["blip"]
        config = captioner.CAPTIONERS.get(source) or captioner.CaptionerConfig(source)
        names = ("epochs", "batch_size", "checkpoint_every", "workers")
        given = {name: plan.given[name] for name in names if name in plan.given}
        config = dataclasses.replace(config, seed=seed, **given)
        predicted = captioner.blip_regressor(
            plan.run_folder("blip", seed), config, prepared.pairs, prepared.splits, plan.device, ("test",)
        )
        return predicted["test"], {"source": source, "epochs": config.epochs}
