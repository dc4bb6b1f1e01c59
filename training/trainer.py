"""The trainer that train.py's regressor and the captioners share: batches, processes, the record of phase 1,
the best weights on validation."""

from __future__ import annotations

import contextlib
import functools
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from reverse_sd import curriculum_batches, easiness
from schema import NULL, OBJECT, number
from training.config import RESUMABLE, TrainConfig, epoch_weights
from training.folder import save_cosines
from training.inputs import Prepared, Samples, evaluation_batches, sample_batches, sample_readers
from training.loop import Process, Trainer, epoch_batches, learning_rate, save_tensors


class PairsTrainer(Trainer):
    """Trains `model` on prepared pairs by a run's configuration, on any number of processes.

    groups: trained parameters by name, grouped by the factor of their learning rate.
    samples: the training and the validation samples; the last tensor of a batch of them is the row numbers.
    chunks: positions among the training samples, easy, medium, hard, for phase 2 of the curriculum.

    A subclass defines `loss`, whose terms are sums over a batch's samples, so that the gradient does not
    depend on the number of processes or parts, and `scores_of`.
    """

    state_fields = {"best": number(least=-1.01, most=1.01) | NULL, "config": OBJECT.or_else({})}
    score = "cosine"  # the name of `scores_of` in the log

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        process: Process,
        prepared: Prepared,
        model: nn.Module,
        groups: dict[float, dict[str, nn.Parameter]],
        samples: tuple[Samples, Samples],
        chunks: list[np.ndarray] | None = None,
    ):
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        optimizer = kind(
            [{"params": list(group.values()), "scale": scale} for scale, group in groups.items()],
            lr=config.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
        )
        names = [name for group in groups.values() for name in group]
        super().__init__(folder, model, optimizer, names, prepared.fingerprint, process)
        self.config, self.chunks, self.clip_norm = config, chunks, config.clip_norm or math.inf
        self.autocast = functools.partial(
            torch.autocast, process.device.split(":")[0], dtype=torch.bfloat16,
            enabled=uses_bf16(config, process.device),
        )  # fmt: skip
        self.parallel: nn.Module = torch.compile(model) if config.compile else model
        if process.world > 1:
            self.parallel = DistributedDataParallel(self.parallel)
        self.train_samples, self.val_samples = samples
        self.steps_per_epoch = math.ceil(len(self.train_samples) / config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        self.checkpoint_every = config.checkpoint_every
        self.best = -math.inf
        self.workers = sample_readers(config.workers, prepared, process.device)
        # Phase 2 does not record; it uses phase 1's scores.
        self.recording = config.record_cosines and config.curriculum != "difficulty"
        self.cosines = np.empty((0, len(self.train_samples)), np.float32)

    # -- defined by a subclass ------------------------------------------------

    @abstractmethod
    def scores_of(self, samples: Samples) -> np.ndarray:
        """The score of each sample, (n,) float64, in every process; the higher the better."""

    def recorded_scores(self) -> np.ndarray:
        """The score of each training sample that phase 1 of the curriculum records."""
        return self.scores_of(self.train_samples)

    # -- batches and rates ------------------------------------------------

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, tuple[int, list[Tensor]]]]:
        """This process's share of each batch of the epoch, with the size of the whole batch.

        In phase 2 an epoch has as many steps as in the plain run and is not a pass over the data.
        """
        size, seed, start = self.config.batch_size, self.config.seed, epoch * self.steps_per_epoch
        if self.chunks is None:
            batches = epoch_batches(len(self.train_samples), size, seed, epoch)
        else:
            stop = start + self.steps_per_epoch
            batches = curriculum_batches(self.chunks, self.total, size, seed, start, stop)
        batches = batches[first:]
        for whole, tensors in zip(batches, self.loader(batches), strict=True):
            yield len(whole), (len(whole), self.on_device(tensors, whole))

    def loader(self, batches: list[np.ndarray]) -> Iterator[list[Tensor]]:
        """This process's share of the batches."""
        shares = [rank_share(batch, self.process.rank, self.process.world) for batch in batches]
        return sample_batches(self.train_samples, shares, self.workers)

    def on_device(self, batch: list[Tensor], whole: np.ndarray) -> list[Tensor]:
        """This process's share of a batch on the device, with each sample's weight in the loss in place of
        its row number. `whole`: the positions of the whole batch."""
        *tensors, rows = batch
        weight = torch.ones(len(rows))
        if self.process.rank >= len(whole):  # a last batch with fewer samples than processes: `rank_share`
            weight.zero_()
        return [t.to(self.process.device, non_blocking=True) for t in (*tensors, weight)]

    def rate(self) -> float:
        return learning_rate(self.config.lr, self.step, self.total)

    # -- a step ------------------------------------------------

    def forward_backward(self, batch: tuple[int, list[Tensor]]) -> dict[str, float]:
        """The means of the loss's terms over a whole batch; the parameters then hold their gradient.

        Each part's loss is the sum over its samples divided by the size of the whole batch.
        """
        size, tensors = batch
        parts = list(zip(*(t.chunk(self.config.accumulate) for t in tensors), strict=True))
        sums: Tensor | float = 0.0
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            with contextlib.nullcontext() if last or self.process.world == 1 else self.parallel.no_sync():
                terms = self.loss(part)
                # DistributedDataParallel averages gradients over processes; this undoes it.
                (terms["loss"] * self.process.world / size).backward()
            sums = sums + torch.stack([term.detach() for term in terms.values()])
        if self.process.world > 1:
            dist.all_reduce(sums)
        return dict(zip(terms, (sums / size).tolist(), strict=True))

    def bar_text(self, terms: dict[str, float]) -> dict[str, str]:
        best = f"{self.best:.3f}" if math.isfinite(self.best) else "-"
        name, value = next(iter(terms.items()))
        return {name: f"{value:.3f}", "best_val": best}

    # -- validation, phase 1's record ------------------------------------------------

    def validate(self, epoch: int) -> dict[str, float]:
        """The mean score on validation; saves the weights if it is the best, and records phase 1's scores."""
        score = float(self.scores_of(self.val_samples).mean())
        if self.recording:
            row = self.recorded_scores().astype(np.float32)
            self.cosines = np.concatenate([self.cosines, row[None]])
        if score > self.best:
            self.best = score
            if self.process.first:
                self.save_best()
        return {f"val_{self.score}": score}

    def save_best(self) -> None:
        """Write the model's weights for evaluation."""
        save_tensors(self.folder / "model.safetensors", self.tensors())

    def gathered(self, samples: Samples, score: Any) -> np.ndarray:
        """The score of each sample, (n,) float64, in every process, of which each computes a share: `score`
        maps a batch of samples to (B,)."""
        loader, places = evaluation_batches(samples, self.process, self.workers)
        self.model.eval()
        with torch.no_grad():
            parts = [torch.empty(0, device=self.process.device), *map(score, loader)]
        self.model.train()
        return self.process.gathered(torch.cat(parts).double(), places, len(samples)).cpu().numpy()

    # -- state ------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super().state()
        if self.recording:
            tensors["cosines"] = torch.from_numpy(self.cosines)
        best = self.best if math.isfinite(self.best) else None
        return state | {"best": best, "config": self.fixed_options()}, tensors

    def fixed_options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.config).items() if name not in RESUMABLE}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, value in state["config"].items():
            if value != (today := vars(self.config).get(name, value)):
                path = self.folder / "config.json"
                raise data.DataError(f"{path}: {name} is {today}, and the run began with {value}; restore it")
        super().load_state(state, tensors)
        if self.recording:
            self.cosines = tensors["cosines"].numpy()
        self.best = -math.inf if state["best"] is None else state["best"]

    def fit(self) -> None:
        super().fit()
        if self.recording and self.process.first:
            easiness = easiness_of(self.config, self.cosines)
            save_cosines(self.folder, self.cosines, easiness, data=self.identity)


def uses_bf16(config: TrainConfig, device: str) -> bool:
    """Whether a run trains in bf16 on a device, by --precision."""
    return config.precision == "bf16" or (config.precision == "auto" and device.startswith("cuda"))


def rank_share(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """A process's share of a batch; an empty share gets the first sample with weight 0."""
    part = batch[rank::world]
    return part if len(part) else batch[:1]


def easiness_of(config: TrainConfig, cosines: np.ndarray) -> np.ndarray:
    """The easiness (n,) of phase 1's scores (epochs, n), by the run's --epoch-weights."""
    try:
        return easiness(cosines, epoch_weights(config))
    except ValueError as error:
        raise data.DataError(f"--epoch-weights: {error}; give one weight for each") from error
