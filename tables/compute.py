"""Numbers of the tables of rows.py, from finished runs, and their Markdown beside the paper's numbers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from backbones import READERS
from files import write_array, write_json
from schema import read_json
from tables.exhibit import (
    COMPARED,
    Exhibit,
    bullets,
    comparison,
    interval,
    markdown,
    p_text,
    page,
    provenance_text,
    short,
)
from tables.methods import Member, members_of
from tables.rows import ROW_TABLES, Row, Table
from tables.runs import Plan, RunName, result_of, with_phase_1
from training.folder import saved_fields
from training.metrics import (
    RESAMPLES,
    bootstrap_interval,
    cosines,
    holm,
    paired_test,
    seeds_p,
    student_interval,
)

log = logging.getLogger("tables")

# The fields of TrainConfig that a results file repeats.
SETTINGS = ("backbone", "weights", "heads", "curriculum", "epochs", "batch_size", "optimizer", "lr")
SETTINGS += ("train_blocks", "captions")


def row_cosines(plan: Plan, row: Row, seed: int, like: Member) -> tuple[np.ndarray, dict]:
    """(cosine of each test pair (n,), settings chosen on validation) by a row's method.

    Slow results are cached in the runs' folder, keyed by a hash of their inputs and the method's version.
    `like`: a member whose pairs all members must have.
    """
    members = members_of(plan, row.runs, seed, like)
    targets = like.targets("test")
    if row.method.version is None:
        predicted, chosen = row.method(members, plan, seed)
        return cosines(predicted, targets), chosen
    key = hashlib.sha256(f"{row.method} {row.method.version} {[run.name for run in row.runs]}".encode())
    if not members:  # pretrained networks alone
        key.update(f"{plan.data} {plan.sources} {plan.options}".encode())
    for split in ("train", "val", "test"):
        for array in (like.targets(split), *(member.predicted(split) for member in members)):
            key.update(np.ascontiguousarray(array))
    cached = plan.folder / "kept" / f"{key.hexdigest()[:16]}-seed{seed}"
    if not cached.with_suffix(".json").exists():
        log.info("%s, seed %d", row.name, seed)
        predicted, chosen = row.method(members, plan, seed)
        write_array(cached.with_suffix(".npy"), predicted)
        write_json(cached.with_suffix(".json"), chosen)
    predicted = np.load(cached.with_suffix(".npy"), allow_pickle=False)
    return cosines(predicted, targets), read_json(cached.with_suffix(".json"))


def mean_embedding_cosines(member: Member) -> np.ndarray:
    """The cosine of each test pair with the mean training embedding."""
    return cosines(member.targets("train").astype(np.float64).mean(axis=0), member.targets("test"))


def summary_of(values: Sequence[np.ndarray]) -> dict:
    """The numbers of a row from the cosines of its test pairs, one array (n,) per seed."""
    per_seed = [float(v.mean()) for v in values]
    return {
        "cosine": float(np.mean(per_seed)),
        "cosine_95": bootstrap_interval(np.concatenate(values), resamples=RESAMPLES),
        "deviation_of_seeds": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        "per_seed": per_seed,
    }


def first_members(table: Table, plan: Plan) -> list[Member]:
    """The table's first run, seed by seed; all others must have its pairs."""
    return [Member(plan.run_folder(table.rows[0].runs[0], seed)) for seed in plan.seeds]


def table_cosines(table: Table, plan: Plan) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """(cosines of the test pairs (n,), settings chosen on validation) of each seed, by row."""
    first, values, chosen = first_members(table, plan), {}, {}
    for row in (*table.baselines, *table.rows):
        by_seed = [row_cosines(plan, row, seed, like) for seed, like in zip(plan.seeds, first, strict=True)]
        values[row.name], chosen[row.name] = zip(*by_seed, strict=True)
    return values, chosen


def compute_table(table: Table, plan: Plan) -> dict:
    """All numbers of a table, from finished runs."""
    first = first_members(table, plan)
    baseline = {"name": "mean training embedding", "paper": None, "runs": []}
    entries = [baseline | summary_of([mean_embedding_cosines(member) for member in first])]
    values, chosen = table_cosines(table, plan)
    for row in (*table.baselines, *table.rows):
        entry = {"name": row.name, "paper": row.paper, "runs": [run.name for run in row.runs]}
        entry |= summary_of(values[row.name])
        entry["tests"] = [
            {"against": other} | paired_test(values[row.name], values[other]) for other in row.against
        ]
        if any(chosen[row.name]):
            entry["chose"] = list(chosen[row.name])
        entries.append(entry)
    return {
        "caption": table.caption,
        "notes": list(table.notes),
        "n_test": [len(v) for v in values[table.rows[0].name]],
        "n_train": [len(member.targets("train")) for member in first],
        "rows": entries,
        "runs": {run.name: run_settings(plan, run) for run in with_phase_1(table.runs)},
    }


def run_settings(plan: Plan, run: RunName) -> dict:
    """Training settings of a run and its seconds by seed."""
    config = saved_fields(plan.run_folder(run, plan.seeds[0]))
    results = [result_of(plan.run_folder(run, seed)) for seed in plan.seeds]
    settings = {name: config.get(name) for name in SETTINGS}
    return settings | {"seconds": [result["seconds"] for result in results]}


def table_text(result: dict) -> str:
    """A table as Markdown."""
    rows = result["rows"]
    counts = [" or ".join(sorted({f"{n:,}" for n in result[name]})) for name in ("n_train", "n_test")]
    introduction = "{} {} training and {} test pairs per seed.".format(provenance_text(result), *counts)
    title = result["caption"]
    if any(row["paper"] is not None for row in rows):
        title = f"Table {result['table']}: {title}"
        introduction += (
            " The paper's numbers come from a different data set (DiffusionDB, 670,000 training pairs, "
            "pretrained weights) and are shown for reference."
        )
    cells = [
        (row["name"], row["cosine"], interval(student_interval(row["per_seed"])), interval(row["cosine_95"]))
        + (length_of(row, result), row["paper"])
        for row in rows
    ]
    columns = "method | cosine | 95 % interval over seeds | 95 % interval over pairs | steps × batch | paper"
    methods = markdown(columns, cells)
    return page(title, introduction, methods, comparisons_text(rows), bullets(notes_of(result)))


def length_of(row: dict, result: dict) -> str:
    """The steps and the batch size of each training of a row, "2 x" with the curriculum's two phases."""
    lengths = {}
    for run in (result["runs"][name] for name in row["runs"]):
        steps = math.ceil(result["n_train"][0] / run["batch_size"]) * run["epochs"]
        phases = "2 × " if run["curriculum"] == "difficulty" else ""
        lengths[f"{phases}{steps:,} × {run['batch_size']}"] = None
    return " or ".join(lengths)


def comparisons_text(rows: Sequence[dict]) -> str:
    """The paired tests of a table's rows, with the paper's differences; p of the paper's claims by Holm."""
    paper = {row["name"]: row["paper"] for row in rows}
    tests = [(row["name"], test) for row in rows for test in row.get("tests", ())]
    claims = [test for name, test in tests if None not in (paper[name], paper[test["against"]])]
    p_values = [1.0 if (p := seeds_p(test["per_seed"])) is None else p for test in claims]
    adjusted = {id(test): p for test, p in zip(claims, holm(p_values), strict=True)}
    lines = []
    for name, test in tests:
        theirs = short(paper[name] - paper[test["against"]], True) if id(test) in adjusted else ""
        pair = f"{name} − {test['against']}"
        lines.append((pair, *comparison(test), p_text(adjusted.get(id(test))), theirs))
    return markdown(f"paired comparison | {COMPARED} | p by Holm | paper", lines)


def notes_of(result: dict) -> list[str]:
    rows, runs = result["rows"], result["runs"].values()
    notes = list(result["notes"])
    if any(row["paper"] is None for row in rows[1:]):
        notes.insert(0, "Rows without a number in the column `paper` are not in the paper.")
    notes.append(
        "Each seed has its own split, initial heads and sample order. Over seeds: Student's interval and "
        "test of the seeds' means; by Holm: adjusted for the number of the paper's claims in this table. "
        "Over pairs: bootstrap over the test pairs of all seeds, which does not cover chance in training."
    )
    notes.append(
        "Steps × batch is the number of samples that each training sees, but for smaller last batches; 2 ×: "
        "the curriculum's two phases have as many steps each."
    )
    if any(row["name"].startswith("ridge: ") for row in rows):
        notes.append(
            "ridge: ridge regression, in closed form, on the pretrained features of the frozen backbone or, "
            "caption, on the sentence embedding of the captioner's text; nothing is trained."
        )
    for row in rows:
        if row.get("chose"):
            choices = "; ".join(map(choice_text, row["chose"]))
            notes.append(f'Chosen on validation for "{row["name"]}", seed by seed: {choices}.')
    weights = {READERS[run["backbone"]].title: run["weights"] for run in runs}
    sources = ", ".join(f"{name} {source}" for name, source in weights.items())
    if captions := dict.fromkeys(run["captions"] for run in runs if run["captions"]):
        sources += f"; captions for the U-Net: {', '.join(captions)}"
    trainings, seconds = len(runs) * len(result["seeds"]), sum(sum(run["seconds"]) for run in runs)
    return [*notes, f"Weights: {sources}. {trainings} trainings, {seconds:,.0f} s in all."]


def choice_text(choice: dict) -> str:
    def number(value: Any) -> str:
        if isinstance(value, list):
            return f"({', '.join(map(number, value))})"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {number(value)}" for name, value in choice.items())


def exhibit_of(table: Table) -> Exhibit:
    return Exhibit(table.runs, partial(compute_table, table), table_text, table.needs)


COMPUTED_TABLES = {number: exhibit_of(table) for number, table in ROW_TABLES.items()}
