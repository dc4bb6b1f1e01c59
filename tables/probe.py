"""References for the readers' cosines on the embedded pictures, by the probe. None of them is an upper bound.

The probe (mini/naming.py) is a classifier that was trained on drawings and names the things in a picture. Its
output becomes an embedding in two ways: as new prompts in the words of mini scenes, which are encoded; or by
ridge regression on its probabilities. A third reference uses the content of the true prompt and no picture:
it lacks the wording, and what a linear map misses of the content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from mini import naming, scenes
from tables.methods import Member, Method
from tables.runs import Plan, RunName
from tables.wordings import embedded_wordings
from training.config import EMBEDDED
from training.inputs import prepare
from training.metrics import cosines

WORDINGS = 24  # prompts for each view; infinitely many would have a little more (table budget)
ALPHAS = [10.0**power for power in range(-6, 4)]
Verdicts = dict[tuple, bool]  # by label (kind, key): whether it is found in a picture


@cache
def default_scenes() -> dict[str, scenes.Scene]:
    """The scene of each prompt of the embedded default data."""
    indices = scenes.kept_indices(scenes.PARTS * scenes.PER_PART, 0)
    return {scene.prompt: scene for scene in (scenes.candidate(0, index) for index in indices)}


@cache
def default_views() -> dict[str, scenes.View]:
    """The view that each prompt of the embedded default data describes."""
    return {prompt: scene.said for prompt, scene in default_scenes().items()}


def only_default_prompts(name: str) -> bool:
    """Whether --data NAME has no prompts but those of the embedded default data."""
    return name in EMBEDDED or set(data.read_pairs(Path(name)).prompts) <= default_views().keys()


def view_of(probabilities: Tensor) -> scenes.View:
    """The view in a picture by the probe's probabilities (labels,): all labels above one half, at most two
    things, and always the most probable subject. The probe does not assign colours to things."""
    p = dict(zip(naming.LABELS, probabilities.tolist(), strict=True))

    def keys_of(slot: str) -> list:
        """Keys, the most probable first; None for those at 1/2 or below."""
        keys = sorted(naming.TABLES[slot], key=lambda key: -p[slot, key])
        return [key if p[slot, key] > 0.5 else None for key in keys]

    first = max(naming.TABLES["subject"], key=lambda key: p["subject", key])
    second = keys_of("subject")[1]
    things = [scenes.Thing(first, keys_of("colour")[0], keys_of("material")[0])]
    if second:
        things.append(scenes.Thing(second, keys_of("colour")[1], keys_of("material")[1]))
    return scenes.View(
        tuple(things),
        count=1 if second else keys_of("count")[0] or 1,
        relation=keys_of("relation")[0] if second else None,
        position=None if second else keys_of("position")[0],
        place=keys_of("place")[0],
        light=keys_of("light")[0],
        style=keys_of("style")[0],
    )


def ridge_regression(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope (d, e) and intercept (e,) of ridge regression of rows y (n, e) on rows x (n, d), in float64.

    Not `baselines.ridge`: labels have one scale, and to standardise them would magnify the rare ones.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    x0, y0 = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = np.linalg.solve(x0.T @ x0 + alpha * np.eye(x.shape[1]), x0.T @ y0)
    return slope, y.mean(axis=0) - x.mean(axis=0) @ slope


@dataclass(frozen=True)
class ProbeMethod(Method):
    """Predictions by the probe. `kind` "encoded": prompts for the view that it finds, encoded. "ridge": ridge
    regression on its probabilities. "prompt": ridge regression on the content of the true prompt, without a
    picture. Alpha is chosen on validation. Raises DataError for other pairs than the embedded default."""

    kind: str

    def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
        views = default_views()
        prepared = prepare(plan.config(RunName("unet", "mlc"), seed), plan.device)
        pairs, splits = prepared.pairs, prepared.splits
        if not set(pairs.prompts) <= views.keys():
            raise data.DataError(f"--data {plan.data}: the probe can judge only the embedded default data")
        if self.kind == "encoded":
            views_seen = [view_of(row) for row in readings(pairs, splits["test"])]
            return embedded_wordings(views_seen, WORDINGS, plan.device).mean(axis=1), {}
        if self.kind == "prompt":
            labels = naming.targets([views[prompt] for prompt in pairs.prompts], naming.named_labels).float()
        else:
            labels = readings(pairs, np.arange(len(pairs)))
        x = {split: labels[torch.from_numpy(rows)].numpy() for split, rows in splits.items()}
        y = {split: members[0].targets(split) for split in splits}
        fits = {alpha: ridge_regression(x["train"], y["train"], alpha) for alpha in ALPHAS}
        scores = {a: cosines(x["val"] @ slope + at, y["val"]).mean() for a, (slope, at) in fits.items()}
        alpha = max(scores, key=scores.get)
        slope, intercept = fits[alpha]
        return x["test"] @ slope + intercept, {"alpha": alpha}


def readings(pairs: data.Pairs, rows: Sequence[int]) -> Tensor:
    """The probe's probabilities (n, labels) for these pictures."""
    return naming.name_pictures(naming.load_probe(naming.FOLDER), pixels_of(pairs, rows))


def pixels_of(pairs: data.Pairs, rows: Sequence[int]) -> np.ndarray:
    """These pictures, uint8 (n, 3, H, W)."""
    return np.stack([np.asarray(pairs.image(i).convert("RGB")).transpose(2, 0, 1) for i in rows])


def verdicts(probe: naming.Namer, pictures: np.ndarray, views: Iterable[scenes.View]) -> list[Verdicts]:
    """For each picture uint8 (n, 3, H, W): whether it shows each label that a prompt of its view names."""
    rows = naming.name_pictures(probe, pictures)
    return [naming.shown_labels(row, view) for row, view in zip(rows, views, strict=True)]
