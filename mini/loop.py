"""The loop that trains every miniature, and the pictures that they are trained on.

A step draws its rows and its noise from a generator seeded by the run's seed and the step's number, so that a
training that was stopped goes on from its last checkpoint as if nothing had happened. The weights that count
are an exponential moving average of those that the optimizer moves.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

import weights
from data import Pairs, Preprocessing, atomic_write, cached_images, read_pairs
from mini import scenes

log = logging.getLogger("pretrain")

HELD_OUT = 500  # pictures on which the quality is measured, the last ones
CHECKPOINT_EVERY = 500  # steps
PER_PART = 1000  # pictures
AVERAGE_DECAY = 0.999  # of the moving average, once it is warm


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a part is trained. The rate rises over `warmup` steps and falls as a cosine."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)

    def rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class World:
    """Scenes that show every word of their prompts: uint8 pictures (n, 3, 64, 64), prompts, what is said."""

    images: np.ndarray
    prompts: list[str]
    views: list[scenes.View]

    def __len__(self) -> int:
        return len(self.prompts)


def training_pairs(parts: int) -> Pairs:
    """`parts` thousand truthful scenes, drawn into the cache unless they are there."""
    folder = weights.cache_dir() / f"pretrain-scenes-{scenes.VERSION}-truthful"
    images = scenes.build(folder, parts=parts, seed=scenes.PRETRAIN_SEED, truthful=True)
    return read_pairs(images).subset(np.arange(parts * PER_PART))


def training_world(parts: int) -> World:
    """The same with all pictures in one array and the views that were drawn."""
    pairs = training_pairs(parts)
    pixels, _ = cached_images(
        weights.cache_dir(),
        "pretrain-pixels",
        pairs,
        {"size": 64},
        Preprocessing.square(64),
        (3, 64, 64),
        np.uint8,
        lambda batch: ((batch + 1) * 127.5).round().to(torch.uint8),
        batch_size=256,
    )
    chosen = scenes.kept_indices(parts * PER_PART, scenes.PRETRAIN_SEED)
    views = [scenes.candidate(scenes.PRETRAIN_SEED, index, truthful=True).said for index in chosen]
    return World(pixels, pairs.prompts, views)


def batch_of(images: np.ndarray, rows: Tensor) -> Tensor:
    """Rows of uint8 pictures as float32 (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images[rows.numpy()]).float() / 127.5 - 1


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[Tensor, torch.Generator], dict[str, Tensor]],
    n: int,
    recipe: Recipe,
    seed: int,
) -> float:
    """Train `model` in place and leave the averaged weights in it; returns the minutes it took.

    `loss(rows, generator)` is given the positions of a batch (B,) among `n` and returns named terms, the
    first of which is minimised. The checkpoint in the cache's pretrain-`name` is `forget`'s to remove.
    """
    folder = weights.cache_dir() / f"pretrain-{name}"
    parameters = dict(model.named_parameters())
    average = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=1e-8, weight_decay=recipe.weight_decay
    )
    said = {"recipe": asdict(recipe), "seed": seed, "n": n}
    step, seconds = resume(folder, said, model, average, optimizer)
    model.train()
    started = time.monotonic()
    bar = tqdm(total=recipe.steps, initial=step, desc=name, mininterval=5)
    while step < recipe.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(n, (recipe.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        terms = loss(rows, generator)
        optimizer.zero_grad(set_to_none=True)
        next(iter(terms.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(AVERAGE_DECAY, step / (step + 9))
        for key, p in parameters.items():
            average[key].lerp_(p.detach(), 1 - decay)
        bar.update()
        if step % 50 == 0:
            bar.set_postfix({key: f"{term.item():.4f}" for key, term in terms.items()}, refresh=False)
        if step % CHECKPOINT_EVERY == 0 or step == recipe.steps:
            seconds, started = seconds + time.monotonic() - started, time.monotonic()
            save_checkpoint(folder, said | {"step": step, "seconds": seconds}, model, average, optimizer)
            entry = {"step": step, "minutes": round(seconds / 60, 2), "lr": recipe.rate(step - 1)}
            entry |= {key: round(term.item(), 5) for key, term in terms.items()}
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
    bar.close()
    model.load_state_dict(model.state_dict() | average)
    model.eval()
    return seconds / 60


def save_checkpoint(
    folder: Path, state: dict, model: nn.Module, average: dict, optimizer: torch.optim.Optimizer
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for key, p in model.named_parameters():
        tensors[f"first.{key}"] = optimizer.state[p]["exp_avg"]
        tensors[f"second.{key}"] = optimizer.state[p]["exp_avg_sq"]
    name = f"{state['step']}.safetensors"
    atomic_write(folder / name, save({k: v.contiguous() for k, v in tensors.items()}))
    atomic_write(folder / "state.json", json.dumps(state))
    for old in folder.glob("*.safetensors"):
        if old.name != name:
            old.unlink()


def resume(
    folder: Path, said: dict, model: nn.Module, average: dict, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load the last checkpoint, if there is one; the steps done and the seconds they took.

    Raises WeightsError for one of another recipe, seed or amount of data than `said`.
    """
    if not (folder / "state.json").exists():
        return 0, 0.0
    state = json.loads((folder / "state.json").read_text())
    if json.loads(json.dumps(said)) != {key: state.get(key) for key in said}:
        raise weights.WeightsError(f"{folder}: of another recipe; give its options again, or delete it")
    tensors = load_file(folder / f"{state['step']}.safetensors")
    model.load_state_dict({k: tensors[f"model.{k}"] for k in model.state_dict()})
    for key in average:
        average[key] = tensors[f"average.{key}"]
    slots = optimizer.state_dict()
    slots["state"] = {
        i: {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": tensors[f"first.{key}"],
            "exp_avg_sq": tensors[f"second.{key}"],
        }
        for i, key in enumerate(average)
    }
    optimizer.load_state_dict(slots)
    log.info("%s: resumed at step %d", folder.name, state["step"])
    return state["step"], state["seconds"]


def forget(name: str) -> None:
    """Remove the checkpoint of a part that has been written."""
    shutil.rmtree(weights.cache_dir() / f"pretrain-{name}", ignore_errors=True)
