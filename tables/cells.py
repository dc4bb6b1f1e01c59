"""Cosines of named runs and contrasts between them, for tables that are no list of methods: from finished
runs, and by ridge regression on the frozen features of the runs' backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tables.compute import summary_of
from tables.exhibit import COMPARED, comparison, interval, markdown
from tables.methods import members_of
from tables.readouts import fitted
from tables.runs import Plan, RunName
from training.inputs import prepare
from training.metrics import cosines, paired_test, student_interval

MEAN = "mean training embedding"
Cells = Mapping[str, RunName]
Cosines = dict[str, np.ndarray]  # by cell, of each test pair (n,)


def trained_cosines(plan: Plan, cells: Cells, seed: int) -> Cosines:
    """The cosines of finished runs, and of the first one's mean training embedding."""
    members = members_of(plan, tuple(cells.values()), seed)
    mean, targets = members[0].targets("train").astype(np.float64).mean(axis=0), members[0].targets("test")
    by_cell = zip(cells, members, strict=True)
    return {MEAN: cosines(mean, targets)} | {
        cell: cosines(member.predicted("test"), targets) for cell, member in by_cell
    }


def frozen_cosines(plan: Plan, cells: Cells, seed: int) -> Cosines:
    """The cosines of ridge regression on the frozen features of each run's backbone, and of the first run's
    mean training embedding."""
    found: Cosines = {}
    for cell, run in cells.items():
        prepared = prepare(dataclasses.replace(plan.config(run, seed), train_blocks=0), plan.device)
        features, rows = prepared.inputs[0], prepared.splits["test"]
        if not found:
            mean = prepared.targets[prepared.splits["train"]].astype(np.float64).mean(axis=0)
            found[MEAN] = cosines(mean, prepared.targets[rows])
        solution, _ = fitted(features, prepared, plan.device)
        x = torch.from_numpy(np.asarray(features[rows], np.float32)).to(plan.device)
        found[cell] = cosines(solution.predict(x).cpu().numpy(), prepared.targets[rows])
    return found


# The sum of the first cells less the sum of the second, by name.
Contrasts = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def part(seeds: Sequence[int], contrasts: Contrasts, cosines_of: Callable[[int], Cosines]) -> dict:
    """The cells and contrasts of one kind of reading; `cosines_of` maps a seed to its cosines."""
    by_seed = [cosines_of(seed) for seed in seeds]

    def sums(cells: Sequence[str]) -> list[np.ndarray]:
        return [sum(found[cell] for cell in cells) for found in by_seed]

    tests = [{"name": name} | paired_test(sums(a), sums(b)) for name, (a, b) in contrasts.items()]
    rows = [{"name": cell} | summary_of([found[cell] for found in by_seed]) for cell in by_seed[0]]
    return {"seeds": list(seeds), "rows": rows, "contrasts": tests}


def cell_texts(part: dict) -> dict[str, tuple[float, str]]:
    """(cosine, 95 % interval over seeds) by cell."""
    return {row["name"]: (row["cosine"], interval(student_interval(row["per_seed"]))) for row in part["rows"]}


def contrasts_text(part: dict) -> str:
    return markdown(
        f"contrast | {COMPARED}", [(test["name"], *comparison(test)) for test in part["contrasts"]]
    )
