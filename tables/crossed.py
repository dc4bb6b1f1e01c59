"""Two generators and their pictures, crossed: does the white box read well because it made the picture?

Generator A is the embedded sd-mini (--weights) with its pictures (--data); generator B, of another seed, is
in the folder --second. Each reader is trained on both sets of pictures, which have the same prompts and
splits. The interaction (A on A - B on A) - (A on B - B on B) is positive if a U-Net reads its own pictures
better than the other U-Net does. It does not depend on which U-Net is better or which pictures are easier.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import torch

import data
from tables.compute import summary_of
from tables.exhibit import COMPARED, Exhibit, bullets, comparison, interval, markdown, page, provenance_text
from tables.methods import members_of
from tables.readouts import fitted
from tables.runs import Plan, RunName
from training.inputs import pairs_folder, prepare, split_pairs
from training.metrics import cosines, paired_test, student_interval

log = logging.getLogger("tables")

READERS = {  # backbone, its recipes on the pictures of A and of B
    "U-Net A": ("unet", "captions-empty", "captions-empty-on-second"),
    "U-Net B": ("unet", "second", "second-on-second"),
    "Swin": ("swin", "mlc", "mlc-on-second"),
    "ViT": ("vit", "mlc", "mlc-on-second"),
}
CELLS = {
    f"{reader} on {pictures}": RunName(backbone, recipe)
    for reader, (backbone, *recipes) in READERS.items()
    for pictures, recipe in zip("AB", recipes, strict=True)
}
MEAN = "mean training embedding"
CONTRASTS = {  # the sum of the first cells less the sum of the second
    "(U-Net A on A − U-Net B on A) − (U-Net A on B − U-Net B on B)": (
        ("U-Net A on A", "U-Net B on B"),
        ("U-Net B on A", "U-Net A on B"),
    ),
    "(U-Net A on A − Swin on A) − (U-Net A on B − Swin on B)": (
        ("U-Net A on A", "Swin on B"),
        ("Swin on A", "U-Net A on B"),
    ),
    "U-Net A on A − Swin on A": (("U-Net A on A",), ("Swin on A",)),
    "U-Net A on B − Swin on B": (("U-Net A on B",), ("Swin on B",)),
    "U-Net B on A − Swin on A": (("U-Net B on A",), ("Swin on A",)),
    "U-Net B on B − Swin on B": (("U-Net B on B",), ("Swin on B",)),
}
FROZEN_SEEDS = (0, 1, 2, 3, 4)  # splits of the part without training


def require_same_pairs(plan: Plan) -> None:
    """Raises DataError unless both sets of pictures have the same prompts and the same split."""
    configs = [plan.config(CELLS[f"Swin on {pictures}"], plan.seeds[0]) for pictures in "AB"]
    (_, ours, splits), (_, others, their_splits) = (split_pairs(c, pairs_folder(c.data)) for c in configs)
    same = all(np.array_equal(rows, their_splits[name]) for name, rows in splits.items())
    if ours.prompts != others.prompts or not same:
        raise data.DataError(
            f"{configs[1].data}: its prompts or their split are not those of --data {plan.data}; draw the "
            "same prompts with both generators: python -m mini.generated"
        )


def trained_cosines(plan: Plan, seed: int) -> dict[str, np.ndarray]:
    """The cosine of each test pair (n,) by cell, from finished runs."""
    members = members_of(plan, tuple(CELLS.values()), seed)
    mean = members[0].targets("train").astype(np.float64).mean(axis=0)
    found = {MEAN: cosines(mean, members[0].targets("test"))}
    for cell, member in zip(CELLS, members, strict=True):
        found[cell] = cosines(member.predicted("test"), member.targets("test"))
    return found


def frozen_cosines(plan: Plan, run: RunName, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each test pair (n,) by ridge regression on the frozen features of a run's backbone, and
    by the mean training embedding."""
    prepared = prepare(dataclasses.replace(plan.config(run, seed), train_blocks=0), plan.device)
    features, rows = prepared.inputs[0], prepared.splits["test"]
    solution, _ = fitted(features, prepared, plan.device)
    x = torch.from_numpy(np.asarray(features[rows], np.float32)).to(plan.device)
    mean = prepared.targets[prepared.splits["train"]].astype(np.float64).mean(axis=0)
    predicted = solution.predict(x).cpu().numpy(), mean
    return tuple(cosines(each, prepared.targets[rows]) for each in predicted)


def all_frozen_cosines(plan: Plan, seed: int) -> dict[str, np.ndarray]:
    log.info("ridge regression on frozen features, seed %d", seed)
    found = {cell: frozen_cosines(plan, run, seed) for cell, run in CELLS.items()}
    return {MEAN: found["Swin on A"][1]} | {cell: own for cell, (own, _) in found.items()}


def part(plan: Plan, seeds: tuple[int, ...], of: Callable[[Plan, int], dict[str, np.ndarray]]) -> dict:
    """The cells and contrasts of one way to read; `of`: cosines by cell, of one seed."""
    by_seed = [of(plan, seed) for seed in seeds]
    rows = [{"name": cell} | summary_of([found[cell] for found in by_seed]) for cell in by_seed[0]]
    contrasts = [
        {"name": name}
        | paired_test(*([sum(found[cell] for cell in side) for found in by_seed] for side in sides))
        for name, sides in CONTRASTS.items()
    ]
    return {"seeds": list(seeds), "rows": rows, "contrasts": contrasts}


def compute(plan: Plan) -> dict:
    trained = part(plan, plan.seeds, trained_cosines)
    return trained | {"frozen": part(plan, FROZEN_SEEDS, all_frozen_cosines)}


def part_text(part: dict) -> tuple[str, str]:
    rows = {row["name"]: (row["cosine"], interval(student_interval(row["per_seed"]))) for row in part["rows"]}
    cells = [(MEAN, *rows[MEAN], *rows[MEAN])]
    cells += [(reader, *rows[f"{reader} on A"], *rows[f"{reader} on B"]) for reader in READERS]
    columns = "reader | pictures of A | 95 % interval over seeds | pictures of B | 95 % interval over seeds"
    contrasts = [(test["name"], *comparison(test)) for test in part["contrasts"]]
    return markdown(columns, cells), markdown(f"contrast | {COMPARED}", contrasts)


def text(result: dict) -> str:
    frozen = result["frozen"]
    notes = (
        "A is the embedded sd-mini, B an autoencoder and a U-Net of another seed with A's text tower. Both "
        "drew the same prompts; the splits are the same. Swin and ViT are the embedded miniatures. A U-Net "
        "reads through its own autoencoder, with the empty text, so that no captioner takes part.",
        "The first contrast is the claim: it is positive if a U-Net reads its own pictures better than the "
        "other U-Net reads them. Half of it is the mean advantage of the U-Net that made the picture. The "
        "second contrast takes Swin in place of U-Net B. The others are shown for reference, without "
        "correction for their number.",
        "Student's intervals and tests over seeds; each seed has its own split. Bootstrap over the test "
        "pairs of all seeds, which does not cover chance in training. One pair of generators: chance in "
        "their training is not covered either.",
        f"Frozen features: no network is trained; seeds {', '.join(map(str, frozen['seeds']))}.",
    )
    frozen_title = "## Ridge regression on frozen features"
    return page(
        "Two generators and their pictures, crossed",
        provenance_text(result),
        *part_text(result),
        frozen_title,
        *part_text(frozen),
        bullets(notes),
    )


CROSSED = {
    "crossed": Exhibit(tuple(CELLS.values()), compute, text, needs_second=True, before=require_same_pairs)
}
