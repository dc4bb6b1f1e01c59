"""A table, ours beside the paper's: its numbers from runs that are there, and these as Markdown. Here too is
what every file of results says of its origin, and the writing of these files."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import baselines
import data
import reverse_sd
from tables.methods import Dakl, Member, Neighbours, members_of
from tables.rows import TABLES, Row
from tables.runs import MODELS, Plan, with_phase_1
from training.folder import saved_fields
from training.loop import save_array
from training.metrics import RESAMPLES, bootstrap_interval, cosines, paired_test

log = logging.getLogger("tables")


def row_cosines(plan: Plan, row: Row, seed: int, like: Member) -> tuple[np.ndarray, dict]:
    """The cosine of each test pair (n,), those of `like`, under a row's method; and what the method chose.

    What takes long is kept in the folder of the runs, under a hash of all that it follows from.
    """
    members = members_of(plan, row.runs, seed, like)
    targets = like.targets("test")
    if not isinstance(row.method, Dakl | Neighbours):
        predicted, chose = row.method(members, plan, seed)
        return cosines(predicted, targets), chose
    digest = hashlib.sha256(f"{row.method} {row.runs}".encode())
    for path in (Path(reverse_sd.__file__), Path(baselines.__file__)):
        digest.update(path.read_bytes())
    for member in members:
        for split in ("train", "val", "test"):
            digest.update(np.ascontiguousarray(member.predicted(split)))
            digest.update(np.ascontiguousarray(member.targets(split)))
    kept = plan.folder / "kept" / f"{digest.hexdigest()[:16]}-seed{seed}"
    if not kept.with_suffix(".json").exists():
        log.info("%s, seed %d", row.name, seed)
        kept.parent.mkdir(exist_ok=True)
        predicted, chose = row.method(members, plan, seed)
        save_array(kept.with_suffix(".npy"), predicted)
        data.atomic_write(kept.with_suffix(".json"), json.dumps(chose))
    predicted = np.load(kept.with_suffix(".npy"), allow_pickle=False)
    return cosines(predicted, targets), json.loads(kept.with_suffix(".json").read_text())


def mean_embedding_cosines(member: Member) -> np.ndarray:
    """The cosine of each test pair with the mean training embedding."""
    return cosines(member.targets("train").astype(np.float64).mean(axis=0), member.targets("test"))


def numbers_of(values: Sequence[np.ndarray]) -> dict:
    """The numbers of a row: `values` are the test pairs' cosines (n,), an array a seed."""
    per_seed = [float(v.mean()) for v in values]
    return {
        "cosine": float(np.mean(per_seed)),
        "cosine_95": bootstrap_interval(np.concatenate(values), resamples=RESAMPLES),
        "deviation_of_seeds": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        "per_seed": per_seed,
    }


def compute_table(plan: Plan, number: int | str, command: str) -> dict:
    """All numbers of a table, from runs that are there."""
    table = TABLES[number]
    first = [Member(plan.run_folder(table.rows[0].runs[0], seed)) for seed in plan.seeds]
    baseline = {"name": "mean training embedding", "paper": None, "runs": []}
    rows = [baseline | numbers_of([mean_embedding_cosines(member) for member in first])]
    done = {
        row.name: [row_cosines(plan, row, seed, like) for seed, like in zip(plan.seeds, first, strict=True)]
        for row in table.rows
    }
    values = {name: [cosine for cosine, _ in by_seed] for name, by_seed in done.items()}
    for row in table.rows:
        entry = {"name": row.name, "paper": row.paper, "runs": list(row.runs)}
        entry |= numbers_of(values[row.name])
        entry["tests"] = [
            {"against": other} | paired_test(values[row.name], values[other]) for other in row.against
        ]
        if any(chose := [chose for _, chose in done[row.name]]):
            entry["chose"] = chose
        rows.append(entry)
    return stated(plan, command) | {
        "table": number,
        "caption": table.caption,
        "notes": list(table.notes),
        "n_test": [len(v) for v in values[table.rows[0].name]],
        "n_train": [len(member.targets("train")) for member in first],
        "rows": rows,
        "runs": {
            run: said_of(plan, run) for run in with_phase_1(run for row in table.rows for run in row.runs)
        },
    }


def stated(plan: Plan, command: str) -> dict:
    """What every file of results says of its origin."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "data": Path(plan.data).resolve().name,
        "weights": plan.sources,
        "seeds": list(plan.seeds),
    }


def origin(result: dict) -> str:
    """`stated` as a sentence."""
    seeds = f"seed{'s' * (len(result['seeds']) > 1)} {', '.join(map(str, result['seeds']))}"
    return (
        f"`{result['command']}`, {result['date']}, torch {result['torch']}. Data: {result['data']}; {seeds}."
    )


def said_of(plan: Plan, run: str) -> dict:
    """How a run was trained, and for how long, seed by seed."""
    config = saved_fields(plan.run_folder(run, plan.seeds[0]))
    names = (
        "backbone",
        "weights",
        "heads",
        "curriculum",
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "train_blocks",
        "captions",
    )
    seconds = [
        json.loads((plan.run_folder(run, seed) / "result.json").read_text())["seconds"] for seed in plan.seeds
    ]
    return {name: config.get(name) for name in names} | {"seconds": seconds}


def short(value: float | None, sign: bool = False) -> str:
    """.6544, as the paper writes cosines; +.0012 for differences."""
    if value is None:
        return ""
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def table_text(result: dict) -> str:
    """A table as Markdown."""
    tests = sorted({f"{n:,}" for n in result["n_test"]})
    trains = sorted({f"{n:,}" for n in result["n_train"]})
    of_paper = any(row["paper"] is not None for row in result["rows"])
    title, pairs = result["caption"], f"{' or '.join(trains)} training and {' or '.join(tests)} test pairs"
    said = f"{origin(result)} {pairs} a seed."
    if of_paper:
        title = f"Table {result['table']}: {title}"
        said += " The paper's figures are of another world: DiffusionDB, 670,000 training pairs, pretrained "
        said += "weights."
    lines = [
        f"# {title}",
        "",
        said,
        "",
        "| method | cosine | 95 % interval | deviation of seeds | paper |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["cosine_95"]
        lines.append(
            f"| {row['name']} | {short(row['cosine'])} | {short(low)} to {short(high)} | "
            f"{short(row['deviation_of_seeds'])} | {short(row['paper'])} |"
        )
    lines += ["", "| compared, pair by pair | difference | 95 % interval | p | paper | seed by seed |"]
    lines.append("|---|---|---|---|---|---|")
    paper = {row["name"]: row["paper"] for row in result["rows"]}
    for row in result["rows"]:
        for test in row.get("tests", ()):
            low, high = test["difference_95"]
            known = paper[row["name"]] is not None and paper[test["against"]] is not None
            theirs = short(paper[row["name"]] - paper[test["against"]], True) if known else ""
            p = "< .0001" if test["p"] < 1e-4 else short(test["p"])
            by_seed = ", ".join(short(d, True) for d in test["per_seed"])
            lines.append(
                f"| {row['name']} − {test['against']} | {short(test['difference'], True)} | "
                f"{short(low, True)} to {short(high, True)} | {p} | {theirs} | {by_seed} |"
            )
    notes = [
        *result["notes"],
        "Each seed has its own split, initial heads and order. Intervals: bootstrap over the test pairs of "
        "all seeds. p: Student's paired test over the same pairs; how much of a difference is chance in "
        "training, the seeds show.",
    ]
    if any(row["paper"] is None for row in result["rows"][1:]):
        notes.insert(0, "Rows without a figure of the paper are ours, beyond it.")
    for row in result["rows"]:
        if row.get("chose"):
            notes.append(
                f"{row['name']} chose, seed by seed: " + "; ".join(map(chosen_text, row["chose"])) + "."
            )
    started_from = {MODELS[run["backbone"]]: run["weights"] for run in result["runs"].values()}
    sources = ", ".join(f"{name} {source}" for name, source in started_from.items())
    if captions := dict.fromkeys(run["captions"] for run in result["runs"].values() if run["captions"]):
        sources += f"; the U-Net reads captions: {', '.join(captions)}"
    seconds = sum(sum(run["seconds"]) for run in result["runs"].values())
    trainings = len(result["runs"]) * len(result["seeds"])
    notes.append(f"Weights: {sources}. {trainings} trainings, {seconds:,.0f} s in all.")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), ""])


def chosen_text(chose: dict) -> str:
    def said(value: Any) -> str:
        if isinstance(value, list):
            return "(" + ", ".join(map(said, value)) + ")"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {said(value)}" for name, value in chose.items())


def write_result(folder: Path, name: str, result: dict, text: str) -> None:
    """NAME.json and NAME.md in the folder of results."""
    data.atomic_write(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    data.atomic_write(folder / f"{name}.md", text)
    print(text)
    print(f"written: {folder / name}.md and .json")
