"""Training of miniatures, and their training pictures.

A step draws its rows and its noise from a generator seeded by the run's seed and the step's number, so that a
training that was stopped resumes exactly from its last checkpoint. The final weights are an exponential
moving average of the trained ones.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import weights
from data import Pairs, Preprocessing, read_pairs
from mini import scenes
from schema import number
from training.cache import Encoder, cached_images
from training.loop import Trainer, learning_rate

HELD_OUT = 500  # pictures on which the quality is measured, the last ones
CHECKPOINT_EVERY = 500  # steps
PER_PART = 1000  # pictures
AVERAGE_DECAY = 0.999  # decay of the moving average after warm-up


@dataclass(frozen=True)
class Recipe:
    """Training schedule of a part. The rate rises over `warmup` steps and falls as a cosine."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)

    def rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rising * learning_rate(self.lr, step, self.steps)


@dataclass(frozen=True)
class World:
    """Scenes that show every word of their prompts: uint8 pictures (n, 3, 64, 64), prompts, views."""

    images: np.ndarray
    prompts: list[str]
    views: list[scenes.View]

    def __len__(self) -> int:
        return len(self.prompts)


def training_pairs(parts: int) -> Pairs:
    """`parts` thousand truthful scenes, drawn into the cache if missing."""
    folder = weights.cache_dir() / f"pretrain-scenes-{scenes.VERSION}-truthful"
    images = scenes.build(folder, parts=parts, seed=scenes.PRETRAIN_SEED, truthful=True)
    return read_pairs(images).subset(np.arange(parts * PER_PART))


def training_world(parts: int) -> World:
    """`training_pairs` with all pictures in one array, and their views."""
    pairs = training_pairs(parts)
    encoder = Encoder(
        "pretrain-pixels", {"size": 64}, (3, 64, 64), np.uint8, 256,
        lambda batch: ((batch + 1) * 127.5).round().to(torch.uint8),
    )  # fmt: skip
    pixels, _ = cached_images(weights.cache_dir(), pairs, Preprocessing.square(64), encoder)
    chosen = scenes.kept_indices(parts * PER_PART, scenes.PRETRAIN_SEED)
    views = [scenes.candidate(scenes.PRETRAIN_SEED, index, truthful=True).said for index in chosen]
    return World(pixels, pairs.prompts, views)


def batch_of(images: np.ndarray, rows: Tensor) -> Tensor:
    """Rows of uint8 pictures as float32 (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images[rows.numpy()]).float() / 127.5 - 1


class MiniTrainer(Trainer):
    """Trains a miniature by its recipe; `average` holds the moving average of its parameters.

    `terms(rows, generator)` takes the positions of a batch (B,) among `n` and returns the loss's terms. The
    checkpoint stays until `remove_checkpoint`.
    """

    clip_norm = 1.0

    state_fields = {"seconds": number(least=0)}

    def __init__(
        self,
        name: str,
        model: nn.Module,
        terms: Callable[[Tensor, torch.Generator], dict[str, Tensor]],
        n: int,
        recipe: Recipe,
        seed: int,
    ):
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=1e-8, weight_decay=recipe.weight_decay
        )
        identity = json.dumps({"recipe": asdict(recipe), "seed": seed, "n": n})
        super().__init__(checkpoint_folder(name), model, optimizer, list(parameters), identity)
        self.label, self.terms, self.n, self.recipe, self.seed = name, terms, n, recipe, seed
        self.average = {key: p.detach().clone() for key, p in parameters.items()}
        self.seconds, self.started = 0.0, time.monotonic()
        self.total = self.steps_per_epoch = recipe.steps
        self.checkpoint_every = CHECKPOINT_EVERY

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, tuple[Tensor, torch.Generator]]]:
        """Rows drawn by a separate generator per step, which also draws the loss's noise."""
        for step in range(first, self.total):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = torch.randint(self.n, (self.recipe.batch_size,), generator=generator)
            yield len(rows), (rows, generator)

    def fit(self) -> float:
        """The minutes that training took; `model` then holds the averaged weights, in eval mode."""
        super().fit()
        self.model.load_state_dict(self.model.state_dict() | self.average)
        self.model.eval()
        return self.seconds / 60

    def rate(self) -> float:
        return self.recipe.rate(self.step)

    def loss(self, batch: tuple[Tensor, torch.Generator]) -> dict[str, Tensor]:
        return self.terms(*batch)

    def train_step(self, batch: tuple[Tensor, torch.Generator]) -> dict[str, float]:
        values = super().train_step(batch)
        decay = min(AVERAGE_DECAY, (self.step + 1) / (self.step + 10))
        for key, p in self.model.named_parameters():
            self.average[key].lerp_(p.detach(), 1 - decay)
        return values

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        now = time.monotonic()
        self.seconds, self.started = self.seconds + now - self.started, now
        state, tensors = super().state()
        tensors |= {f"average.{key}": value for key, value in self.average.items()}
        return state | {"seconds": self.seconds}, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_state(state, tensors)
        self.average = {key: tensors[f"average.{key}"] for key in self.average}
        self.seconds = state["seconds"]


def checkpoint_folder(name: str) -> Path:
    return weights.cache_dir() / f"pretrain-{name}"


def remove_checkpoint(name: str) -> None:
    """Remove the checkpoint of a part that has been written."""
    shutil.rmtree(checkpoint_folder(name), ignore_errors=True)
