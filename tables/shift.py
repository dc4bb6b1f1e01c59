"""Ridge regression and DAKL where training and test pictures differ: what are unlabelled target rows worth?

Readers trained on pictures of one origin are applied to pictures of another. Scenes drawn by program and the
pictures of the diffusion model have the same prompts and the same splits; other pictures of its test prompts
are drawn with other guidance scales. Penalties are chosen on the source's validation pairs, or on the
target's, which have labels that a domain adaptation does not have.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

import data
import reverse_sd
from tables.compute import mean_embedding_cosines, summary_of
from tables.exhibit import (
    COMPARED,
    Exhibit,
    bullets,
    comparison,
    markdown,
    p_text,
    page,
    provenance_text,
)
from tables.generation import batch_size, draw_into, open_pipeline, picture_file, predicted, spread
from tables.methods import DaklMethod, Member, Predicted, RidgeMethod, members_of, tensor
from tables.runs import RECIPES, Plan, RunName
from training.evaluate import shared_predictions
from training.folder import saved_config
from training.inputs import Samples, pairs_folder, prepare, sample_readers, split_pairs
from training.loop import Process
from training.metrics import cosines, holm, paired_test, seeds_p
from training.reading import split_prompts

log = logging.getLogger("tables")

READERS = {"U-Net, empty text": ("unet", "captions-empty"), "Swin": ("swin", "mlc")}
OTHER = "-drawn"  # ends the names of their recipes on the other pictures
GUIDANCES, STEPS = (2.0, 15.0), 50  # 7.5 made the embedded pictures
PICTURES = 500  # of validation and of test prompts, for each guidance scale
LINEAR = {"k": None, "form": "linear"}
METHODS = {
    "ridge": RidgeMethod(),
    "DAKL": DaklMethod(**LINEAR),
    "DAKL, noise": DaklMethod(**LINEAR, target_rows="noise"),
    "DAKL, no target rows": DaklMethod(**LINEAR, target_rows="none"),
    "DAKL, exact": DaklMethod(),
}
COMPARISONS = (
    ("ridge", "as predicted"),
    *(("DAKL", other) for other in ("ridge", "DAKL, noise", "DAKL, no target rows")),
)
REFERENCES = ("mean embedding", "as predicted", "trained on the target")
WHERE = "reader | source → target | penalty chosen on"
NOTES = (
    "Readers are trained on the source's pictures and applied to the target's. drawn: scenes drawn by "
    "program; mini: the diffusion model's pictures of the same prompts, with guidance 7.5; guidance: its "
    f"pictures of the same test prompts with another scale, {STEPS} steps and other noise. No test prompt of "
    "the target is a training or validation prompt of the source.",
    "Ridge regression and DAKL are fitted on the source's training predictions. DAKL: its target rows are "
    "the predictions for the target's validation and test pictures, or as many unit rows in random "
    "directions (noise), or none; linear limit, gamma 0.001. DAKL, exact: the exact form, with the target's "
    "rows.",
    "The penalty is chosen on the source's validation pairs, as without labels of the target, or on the "
    "target's, with their labels.",
    "Mean embedding: of the source's training prompts. Trained on the target: the same recipe on the "
    "target's pictures.",
    "Over seeds: Student's interval and test; by Holm: adjusted for the number of tests in this table. Over "
    "pairs: bootstrap over the test pairs of all seeds, which does not cover chance in training.",
)


@dataclasses.dataclass(frozen=True)
class Shift:
    """Source and target: ends of the recipes' names, or the guidance scale of the target's pictures."""

    name: str
    source: str
    target: str | float


def shifts_of(plan: Plan) -> list[Shift]:
    """The shifts between --data and the other pictures, if these are others, and to each guidance scale."""
    other = RECIPES[f"mlc{OTHER}"]["data"]
    ours, theirs = (Path(name).name for name in (plan.data, other))
    shifts = [Shift(f"{ours} → {ours}, no shift", "", "")]
    if Path(plan.data).resolve() != Path(other).resolve():
        shifts += [Shift(f"{ours} → {theirs}", "", OTHER), Shift(f"{theirs} → {ours}", OTHER, "")]
    return shifts + [Shift(f"{ours} → guidance {scale:g}", "", scale) for scale in GUIDANCES]


# ============================================================================================================
# Predictions for the target's pictures
# ============================================================================================================


def require_unseen(seen: Iterable[str], tested: Iterable[str], name: str) -> None:
    """Raises DataError if a tested prompt was seen in training, but for case and spacing."""
    seen, tested = ({" ".join(prompt.casefold().split()) for prompt in of} for of in (seen, tested))
    if common := seen & tested:
        raise data.DataError(
            f"--table shift: {len(common)} test prompts of {name} are training or validation prompts of the "
            f'source, e.g. "{min(common)}"; give --data with the prompts and the order of the other pictures'
        )


def require_unseen_prompts(plan: Plan) -> None:
    """Raises DataError if a test prompt of one set of pictures is in the other's training or validation."""
    for seed in plan.seeds:
        sets = {}
        for end in ("", OTHER):
            config = plan.config(RunName("swin", f"mlc{end}"), seed)
            _, pairs, splits = split_pairs(config, pairs_folder(config.data))
            sets[config.data] = {name: [pairs.prompts[i] for i in rows] for name, rows in splits.items()}
        for (_, source), (name, target) in permutations(sets.items(), 2):
            require_unseen(source["train"] + source["val"], target["test"], name)


def predicted_for_run(plan: Plan, source: Path, target: Path) -> dict[str, np.ndarray]:
    """The predictions of the run `source` for the "val" and "test" pictures of the run `target`."""
    config = dataclasses.replace(saved_config(source), data=saved_config(target).data)
    prepared, run = prepare(config, plan.device), reverse_sd.load_run(source, plan.device)
    process, workers = Process(device=plan.device), sample_readers(config.workers, prepared, plan.device)

    samples = {split: Samples(prepared, prepared.splits[split], run.vocabulary) for split in ("val", "test")}
    return {split: shared_predictions(run, of, process, workers, False)[0] for split, of in samples.items()}


def predicted_for_guidance(plan: Plan, run: RunName, seed: int, guidance: float) -> dict[str, np.ndarray]:
    """The predictions of a run for pictures of validation and test prompts."""
    splits = zip(("val", "test"), split_prompts(plan.run_folder(run, seed), "val", "test"), strict=True)
    prompts = {split: spread(every, PICTURES) for split, every in splits}
    return {split: predicted(plan, seed, drawn(plan, of, guidance), run) for split, of in prompts.items()}


def drawn(plan: Plan, prompts: list[str], guidance: float) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3) of the prompts, cached in the runs' folder."""
    path, side = picture_file(plan, "guidance", [prompts, STEPS, guidance])
    if not path.exists():
        log.info("drawing %d pictures with guidance %g", len(prompts), guidance)
        pipeline, noise = open_pipeline(plan), range(len(prompts))
        draw_into(path, pipeline, prompts, noise, side, batch_size(plan), steps=STEPS, guidance=guidance)
    return np.load(path, mmap_mode="r", allow_pickle=False)


# ============================================================================================================
# The table
# ============================================================================================================


def cosines_of(plan: Plan, reader: str, shift: Shift, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """The cosine of each test pair (n,) of a reader under a shift, by (labels of the penalty, method)."""
    backbone, recipe = READERS[reader]
    ends = [end for end in (shift.source, shift.target) if isinstance(end, str)]
    runs = [RunName(backbone, recipe + end) for end in ends]
    source, *target = members_of(plan, runs, seed)
    truth, mean = {split: source.targets(split) for split in ("val", "test")}, mean_embedding_cosines(source)
    if not target:
        seen = predicted_for_guidance(plan, runs[0], seed, shift.target)
        truth = {split: np.stack(spread(rows, PICTURES)) for split, rows in truth.items()}
        mean = np.array(spread(mean, PICTURES))
    elif source.folder == target[0].folder:
        seen = {split: source.predicted(split) for split in ("val", "test")}
    else:
        seen = predicted_for_run(plan, source.folder, target[0].folder)
    found = {
        ("", "mean embedding"): mean,
        ("", "as predicted"): cosines(seen["test"], truth["test"]),
    }
    if target:
        found["", "trained on the target"] = cosines(target[0].predicted("test"), truth["test"])
    val, test = (tensor(seen[split], plan.device) for split in ("val", "test"))
    labelled = {"source": (source.predicted("val"), source.targets("val"))}
    labelled["target"] = seen["val"], truth["val"]
    for labels, pairs in labelled.items():
        arrays = source.predicted("train"), source.targets("train"), *pairs
        p = Predicted(*(tensor(x, plan.device) for x in arrays), torch.cat([val, test]), test)
        for name, method in METHODS.items():
            if labels == "source" or name != "DAKL, exact":
                found[labels, name] = cosines(method.improved(p, seed)[0], truth["test"])
    return found


def compute(plan: Plan) -> dict:
    rows, tests, shifts = [], [], shifts_of(plan)
    for reader in READERS:
        for shift in shifts:
            log.info("%s, %s", reader, shift.name)
            where = {"reader": reader, "shift": shift.name}
            by_seed = [cosines_of(plan, reader, shift, seed) for seed in plan.seeds]
            values = {key: [found[key] for found in by_seed] for key in by_seed[0]}
            for (labels, method), of in values.items():
                entry = where | {"labels": labels, "method": method, "n_test": [len(v) for v in of]}
                rows.append(entry | summary_of(of))
            for labels in ("source", "target"):
                for method, other in COMPARISONS:
                    pair = values[labels, method], values["" if other == "as predicted" else labels, other]
                    entry = where | {"labels": labels, "method": method, "against": other}
                    tests.append(entry | paired_test(*pair))
    runs = {run.name: saved_config(plan.run_folder(run, plan.seeds[0])) for run in RUNS}
    settings = ("data", "weights", "epochs", "batch_size", "captions")
    return {
        "rows": rows,
        "tests": tests,
        "runs": {name: {s: getattr(config, s) for s in settings} for name, config in runs.items()},
        "n_train": [len(Member(plan.run_folder(RUNS[0], seed)).targets("train")) for seed in plan.seeds],
    }


def text(result: dict) -> str:
    by_place: dict[tuple[str, str], dict] = {}
    for row in result["rows"]:
        by_place.setdefault((row["reader"], row["shift"]), {})[row["labels"], row["method"]] = row["cosine"]
    cells = [
        (*place, labels)
        + tuple(found.get(("", name)) for name in REFERENCES)
        + tuple(found.get((labels, name)) for name in METHODS)
        for labels in ("source", "target")
        for place, found in by_place.items()
    ]
    adjusted = holm([1.0 if (p := seeds_p(test["per_seed"])) is None else p for test in result["tests"]])
    lines = [
        (test["reader"], test["shift"], test["labels"], f"{test['method']} − {test['against']}")
        + (*comparison(test), p_text(p))
        for test, p in zip(result["tests"], adjusted, strict=True)
    ]
    n = " or ".join(sorted({f"{n:,}" for row in result["rows"] for n in row["n_test"]}))
    lengths = sorted(
        {f"{run['epochs']} epochs, batch {run['batch_size']}" for run in result["runs"].values()}
    )
    trainings = f"{len(result['runs']) * len(result['seeds'])} trainings: {' or '.join(lengths)}."
    columns = " | ".join((WHERE, *REFERENCES, *METHODS))
    return page(
        "Ridge regression and DAKL under a shift of domain",
        f"{provenance_text(result)} {result['n_train'][0]:,} training and {n} test pairs per seed.",
        markdown(columns, cells),
        markdown(f"{WHERE} | comparison | {COMPARED} | p by Holm", lines),
        bullets((*NOTES, trainings)),
    )


RUNS = tuple(RunName(backbone, recipe + end) for backbone, recipe in READERS.values() for end in ("", OTHER))
SHIFT = {"shift": Exhibit(RUNS, compute, text, needs="probe", before=require_unseen_prompts)}
