"""Expected against true cosines: how well the length of a prediction estimates its cosine with the prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from reverse_sd import load_run
from tables.exhibit import Exhibit, bullets, interval, markdown, page, provenance_text, short
from tables.methods import Member
from tables.readouts import black_box, fitted
from tables.runs import MODELS, Plan, RunName
from training.calibration import BLOCK, affine_ridge, length_slope, mapped
from training.inputs import Samples, evaluation_batches, prepare
from training.loop import Process
from training.metrics import binned, calibration_error, cosines, pearson, student_interval

BACKBONES = ("swin", "unet")
OURS = "length after ridge regression x slope"


def frozen(plan: Plan, backbone: str, seed: int) -> dict[str, np.ndarray]:
    """The predictions (n, E) of every split, not normalised, by ridge regression on frozen features."""
    features = black_box(plan, backbone).rows
    prepared = prepare(plan.config(RunName(backbone, "mlc"), seed), plan.device)
    solution, _ = fitted(features, prepared, plan.device)
    rows = {s: torch.from_numpy(np.asarray(features[of], np.float32)) for s, of in prepared.splits.items()}
    return {s: solution.predict(x.to(plan.device)).cpu().numpy() for s, x in rows.items()}


@torch.no_grad()
def trained(plan: Plan, backbone: str, seed: int) -> dict[str, np.ndarray]:
    """The same by a trained run; its predictions of the training pairs have the length 1."""
    name = RunName(backbone, "mlc")
    run = load_run(plan.run_folder(name, seed), plan.device)
    prepared = prepare(plan.config(name, seed), plan.device)
    predicted = {"train": Member(run.folder).predicted("train")}
    for split in ("val", "test"):
        samples = Samples(prepared, prepared.splits[split], run.vocabulary)
        loader, _ = evaluation_batches(samples, Process(), 0)
        parts = [run.regressor(*(x.to(plan.device) for x in inputs)).embedding for *inputs, _, _, _ in loader]
        predicted[split] = torch.cat(parts).float().cpu().numpy()
    return predicted


def line(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The least-squares line of y (n,) on x (n,)."""
    return np.polynomial.Polynomial.fit(x, y, 1)


def estimates(predicted: dict[str, np.ndarray], member: Member) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the true cosine of each test pair (n,), its estimates (n,) by name); what is fitted is fitted on the
    training and validation pairs."""
    raw = {s: np.linalg.norm(of.astype(np.float64), axis=1) for s, of in predicted.items()}
    unit = {s: (of / raw[s][:, None]).astype(np.float32) for s, of in predicted.items()}
    targets = {s: np.array(member.targets(s)) for s in predicted}
    true = {s: cosines(unit[s], targets[s]) for s in ("val", "test")}
    x, y = ({s: torch.from_numpy(rows) for s, rows in of.items()} for of in (unit, targets))
    again = affine_ridge(x, y["train"].split(BLOCK), y["val"])
    refitted = {s: np.linalg.norm(mapped(again, unit[s]), axis=1) for s in true}
    nearest = {s: (unit[s] @ targets["train"].T).max(axis=1) for s in true}
    return true["test"], {
        "constant": np.full(len(true["test"]), true["val"].mean()),
        "length": raw["test"],
        "length x slope": length_slope(raw["val"], true["val"]) * raw["test"],
        "line of length": line(raw["val"], true["val"])(raw["test"]),
        OURS: length_slope(refitted["val"], true["val"]) * refitted["test"],
        "line of the nearest training prompt's cosine": line(nearest["val"], true["val"])(nearest["test"]),
    }


def measures(expected: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Calibration error, Pearson's correlation (None for a constant) and the explained share of variance."""
    return {
        "calibration error": calibration_error(expected, true),
        "correlation": pearson(expected, true),
        "explained": float(1 - np.square(true - expected).sum() / np.square(true - true.mean()).sum()),
    }


def compute(plan: Plan) -> dict:
    """The measures of each reader and estimate by seed, and the bins of its test pairs."""
    rows = []
    for kind, predictions in (("ridge on frozen features", frozen), ("trained", trained)):
        for backbone in BACKBONES:
            folders = {seed: plan.run_folder(RunName(backbone, "mlc"), seed) for seed in plan.seeds}
            by_seed = [
                estimates(predictions(plan, backbone, seed), Member(folder))
                for seed, folder in folders.items()
            ]
            for name in by_seed[0][1]:
                pairs = [(of[name], true) for true, of in by_seed]
                row = {"reader": f"{MODELS[backbone]}, {kind}", "estimate": name}
                row["per_seed"] = [measures(expected, true) for expected, true in pairs]
                row["bins"] = np.mean([binned(expected, true) for expected, true in pairs], axis=0).tolist()
                rows.append(row)
    return {"rows": rows}


def over_seeds(row: dict, measure: str) -> str:
    values = [of[measure] for of in row["per_seed"]]
    if None in values:
        return ""
    limits = student_interval(values)
    return short(float(np.mean(values))) + (f" ({interval(limits)})" if limits else "")


def text(result: dict) -> str:
    names = ("calibration error", "correlation", "explained")
    cells = [
        (row["reader"], row["estimate"], *(over_seeds(row, name) for name in names)) for row in result["rows"]
    ]
    scaled = [row for row in result["rows"] if row["estimate"] == OURS]
    curves = zip(*([f"{short(x)}: {short(y)}" for x, y, _ in row["bins"]] for row in scaled), strict=True)
    tenths = [(k, *cells) for k, cells in enumerate(curves, 1)]
    notes = (
        "Length: of the prediction before it is normalised. For a least-squares prediction of unit vectors "
        "it estimates the cosine without any fit. Slope and lines are fitted on the validation pairs.",
        "After ridge regression: from the normalised prediction to the training prompts' embeddings "
        "(training/calibration.py); python reverse_sd.py prints this estimate.",
        "Calibration error: mean distance between mean expected and mean true cosine over tenths of the test "
        "pairs by expected cosine. Explained: 1 - squared error / variance of the true cosines.",
        "Constant: the mean cosine of the validation pairs. Intervals are Student's over seeds.",
    )
    return page(
        "The expected cosine of a prediction",
        provenance_text(result),
        markdown("prediction | estimate | calibration error | correlation | explained", cells),
        f"Expected and true cosine of each tenth of the test pairs by {OURS}, mean over the seeds:",
        markdown(f"tenth | {' | '.join(row['reader'] for row in scaled)}", tenths),
        bullets(notes),
    )


RUNS = tuple(RunName(backbone, "mlc") for backbone in BACKBONES)
CONFIDENCE = {"confidence": Exhibit(RUNS, compute, text)}
