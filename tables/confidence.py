"""Expected against true cosines: how well the length of a prediction estimates its cosine with the prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tables.exhibit import Exhibit, bullets, interval, markdown, page, provenance_text, short
from tables.methods import Member
from tables.readouts import black_box, fitted
from tables.runs import MODELS, Plan, RunName
from training.calibration import length_slope
from training.inputs import prepare
from training.metrics import binned, calibration_error, cosines, student_interval

BACKBONES = ("swin", "unet")
SPLITS = ("val", "test")


def frozen(plan: Plan, backbone: str) -> list[dict[str, np.ndarray]]:
    """By seed: for "val" and "test" the predictions (n, E), not normalised, of ridge regression on frozen
    features."""
    features, by_seed = black_box(plan, backbone).rows, []
    for seed in plan.seeds:
        prepared = prepare(plan.config(RunName(backbone, "mlc"), seed), plan.device)
        solution, _ = fitted(features, prepared, plan.device)
        rows = {split: torch.from_numpy(np.array(features[prepared.splits[split]])) for split in SPLITS}
        by_seed.append({s: solution.predict(x.to(plan.device)).cpu().numpy() for s, x in rows.items()})
    return by_seed


def trained(plan: Plan, backbone: str) -> list[dict[str, np.ndarray]]:
    """The same by trained runs."""
    members = [Member(plan.run_folder(RunName(backbone, "mlc"), seed)) for seed in plan.seeds]
    return [{s: m.predicted(s) * m.array(f"{s}-lengths")[:, None] for s in SPLITS} for m in members]


def line(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The least-squares line of y (n,) on x (n,)."""
    return np.polynomial.Polynomial.fit(x, y, 1)


def estimates(predicted: dict[str, np.ndarray], member: Member) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the true cosine of each test pair (n,), its estimates (n,) by name); what is fitted is fitted on the
    validation pairs."""
    true = {s: cosines(predicted[s], member.targets(s)) for s in SPLITS}
    lengths = {s: np.linalg.norm(predicted[s].astype(np.float64), axis=1) for s in SPLITS}
    prompts = np.array(member.targets("train")).T
    nearest = {s: (predicted[s] @ prompts).max(axis=1) / lengths[s] for s in SPLITS}
    return true["test"], {
        "constant": np.full(len(true["test"]), true["val"].mean()),
        "length": lengths["test"],
        "length x slope": length_slope(lengths["val"], true["val"]) * lengths["test"],
        "line of length": line(lengths["val"], true["val"])(lengths["test"]),
        "line of the nearest training prompt's cosine": line(nearest["val"], true["val"])(nearest["test"]),
    }


def measures(expected: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Calibration error, Pearson's correlation (None for a constant) and the explained share of variance."""
    constant = not np.ptp(expected)
    return {
        "calibration error": calibration_error(expected, true),
        "correlation": None if constant else float(np.corrcoef(expected, true)[0, 1]),
        "explained": float(1 - np.square(true - expected).sum() / np.square(true - true.mean()).sum()),
    }


def compute(plan: Plan) -> dict:
    """The measures of each reader and estimate by seed, and the bins of its test pairs."""
    rows = []
    for kind, predictions in (("ridge on frozen features", frozen), ("trained", trained)):
        for backbone in BACKBONES:
            members = [Member(plan.run_folder(RunName(backbone, "mlc"), seed)) for seed in plan.seeds]
            by_seed = [
                estimates(predicted, member)
                for predicted, member in zip(predictions(plan, backbone), members, strict=True)
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
    scaled = [row for row in result["rows"] if row["estimate"] == "length x slope"]
    curves = zip(*([f"{short(x)}: {short(y)}" for x, y, _ in row["bins"]] for row in scaled), strict=True)
    tenths = [(k, *cells) for k, cells in enumerate(curves, 1)]
    notes = (
        "Length: of the prediction before it is normalised. For a least-squares prediction of unit vectors "
        "it estimates the cosine without any fit. Slope and lines are fitted on the validation pairs.",
        "Calibration error: mean distance between mean expected and mean true cosine over tenths of the test "
        "pairs by expected cosine. Explained: 1 - squared error / variance of the true cosines.",
        "Constant: the mean cosine of the validation pairs. Intervals are Student's over seeds.",
    )
    return page(
        "The expected cosine of a prediction",
        provenance_text(result),
        markdown("prediction | estimate | calibration error | correlation | explained", cells),
        "Expected and true cosine of each tenth of the test pairs, by length x slope, mean over the seeds:",
        markdown(f"tenth | {' | '.join(row['reader'] for row in scaled)}", tenths),
        bullets(notes),
    )


RUNS = tuple(RunName(backbone, "mlc") for backbone in BACKBONES)
CONFIDENCE = {"confidence": Exhibit(RUNS, compute, text)}
