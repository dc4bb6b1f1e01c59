"""What the embedded pictures give away, by the probe: how far any reader of them could come.

The probe (mini/naming.py) has learnt from drawings what each thing looks like, and names what it finds in a
picture. What it names is turned into an embedding in two ways: said again in the words of mini scenes and
encoded, or by ridge regression on its probabilities. Beside it stands a reader who is told all that the
prompt says and lacks its wording alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

import data
import weights
from mini import naming, scenes
from tables.methods import Member
from tables.runs import Plan
from training.inputs import prepare
from training.metrics import cosines

SAYINGS = 4  # of each reading: other synonyms, other forms of sentence
ALPHAS = [10.0**power for power in range(-2, 4)]


@cache
def default_views() -> dict[str, scenes.View]:
    """What the prompts of the embedded default ask for."""
    indices = scenes.kept_indices(scenes.PARTS * scenes.PER_PART, 0)
    return {scene.prompt: scene.said for scene in (scenes.candidate(0, index) for index in indices)}


def view_of(probabilities: Tensor) -> scenes.View:
    """What the probe reads, by its probabilities (labels,): what is likelier than not, at most two things,
    and the likeliest subject in any case. Which colour is whose it does not say."""
    p = dict(zip(naming.LABELS, probabilities.tolist(), strict=True))

    def read(slot: str) -> list:
        """Keys, the likeliest first, and None for what is not there."""
        keys = sorted(naming.TABLES[slot], key=lambda key: -p[slot, key])
        return [key if p[slot, key] > 0.5 else None for key in keys]

    first = max(naming.TABLES["subject"], key=lambda key: p["subject", key])
    second = read("subject")[1]
    things = [scenes.Thing(first, read("colour")[0], read("material")[0])]
    if second:
        things.append(scenes.Thing(second, read("colour")[1], read("material")[1]))
    return scenes.View(
        tuple(things),
        count=1 if second else read("count")[0] or 1,
        relation=read("relation")[0] if second else None,
        position=None if second else read("position")[0],
        place=read("place")[0],
        light=read("light")[0],
        style=read("style")[0],
    )


def ridge(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope (d, e) and intercept (e,) of ridge regression of rows y (n, e) on rows x (n, d), in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x0, y0 = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = np.linalg.solve(x0.T @ x0 + alpha * np.eye(x.shape[1]), x0.T @ y0)
    return slope, y.mean(axis=0) - x.mean(axis=0) @ slope


@dataclass(frozen=True)
class Reading:
    """`how` "encoded": the probe's reading, said again and encoded. "ridge": ridge regression on the probe's
    probabilities. "told": ridge regression on what the prompt says; no picture is read. Alpha is chosen on
    validation. Raises DataError for pairs that are not the embedded default's."""

    how: str

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        views = default_views()
        prepared = prepare(plan.config("unet-mlc", seed), plan.device)
        pairs, splits = prepared.pairs, prepared.splits
        if not set(pairs.prompts) <= views.keys():
            raise data.DataError(f"--data {plan.data}: the probe knows the embedded scenes alone")
        if self.how == "told":
            read = naming.targets([views[prompt] for prompt in pairs.prompts], naming.said).float()
        else:
            read = readings(pairs, splits["test"] if self.how == "encoded" else np.arange(len(pairs)))
        if self.how == "encoded":
            return encoded([view_of(row) for row in read], seed, plan.device), {}
        x = {split: read[torch.from_numpy(rows)].numpy() for split, rows in splits.items()}
        y = {split: members[0].targets(split) for split in splits}
        fits = {alpha: ridge(x["train"], y["train"], alpha) for alpha in ALPHAS}
        merit = {a: cosines(x["val"] @ slope + at, y["val"]).mean() for a, (slope, at) in fits.items()}
        alpha = max(merit, key=merit.get)
        slope, intercept = fits[alpha]
        return x["test"] @ slope + intercept, {"alpha": alpha}


def readings(pairs: data.Pairs, rows: Sequence[int]) -> Tensor:
    """The probe's probabilities (n, labels) for these pictures."""
    probe = naming.load_probe(naming.FOLDER)
    images = np.stack([np.asarray(pairs.image(i).convert("RGB")).transpose(2, 0, 1) for i in rows])
    return naming.name_pictures(probe, images)


def encoded(views: Sequence[scenes.View], seed: int, device: str) -> np.ndarray:
    """The mean embedding (n, E) of some prompts that ask for each view."""
    rng = np.random.default_rng(seed)
    prompts = [scenes.say(scenes.choose_words(view, rng), rng) for view in views for _ in range(SAYINGS)]
    rows = weights.load("minilm", device=device).encode(prompts).cpu().numpy()
    return rows.reshape(len(views), SAYINGS, -1).mean(axis=1)
