"""Evaluation of a run: predictions of its splits, the test cosine beside its baseline, pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones import CAPTIONERS
from data import DataError
from files import write_array, write_json
from reverse_sd import EMBEDDING_WIDTH, Run, load_run, predict
from schema import read_json
from training.calibration import fit_calibration, write_calibration
from training.captions import caption_predictions
from training.config import read_run
from training.inputs import Prepared, Samples, evaluation_batches, sample_readers
from training.loop import STATE, Process
from training.metrics import average_precision, bootstrap_interval, cosines
from training.pictures import examples_picture

log = logging.getLogger("eval")


def evaluate(folder: Path, prepared: Prepared, process: Process, seconds: float = 0.0) -> dict | None:
    """The content of a run's result.json, from its predictions; None but in the first process.

    All processes predict. The first one writes result.json, predictions/*.npy (the unit-length predicted
    embeddings of each split and their targets, in the order of predictions/rows.json) and examples.png, and
    prints a summary. Of a regressor it also writes the calibration (calibration.json and .npy). A captioner's
    predictions are the sentence embeddings of its captions, of validation and test; captions.jsonl holds
    these and their scores, and blip/ the BLIP in the published format.

    `seconds`: time spent before this call, added to this call's own in `seconds` of the result. Raises
    DataError if the run was trained on other pairs.
    """
    started = time.time()
    config, progress = read_run(folder), training_progress(folder, prepared)
    read = caption_predictions if config["backbone"] in CAPTIONERS else regressor_predictions
    predictions, report = read(folder, prepared, process)
    if not process.first:
        return None
    rows_by_split = {}
    for split, rows in prepared.splits.items():
        if split in predictions:
            write_array(folder / "predictions" / f"{split}.npy", predictions[split])
        write_array(folder / "predictions" / f"{split}-targets.npy", prepared.targets[rows])
        rows_by_split[split] = [
            {"image": prepared.pairs.where(i), "prompt": prepared.pairs.prompts[i]} for i in rows
        ]
    write_json(folder / "predictions" / "rows.json", rows_by_split)
    result = cosine_result(prepared, predictions) | {"seed": config["seed"]} | progress | report()
    result["seconds"] = round(seconds + time.time() - started, 1)
    write_json(folder / "result.json", result)
    print(summary(folder, result))
    return result


def training_progress(folder: Path, prepared: Prepared) -> dict[str, int]:
    """{"step", "steps"} of the run's last checkpoint, {} without one; a run that was stopped is mentioned.
    Raises DataError if `prepared` has other pairs or another split than those of the training."""
    path = folder / "last" / "state.json"
    if not path.exists():
        return {}
    state = read_json(path, STATE)
    if (state["data"] or state["identity"]) != prepared.fingerprint:
        raise DataError(
            f"{folder}: was trained on other pairs, or on another split, than its data has now; training "
            "pairs could be among the test pairs. Give back its data, or train a new run"
        )
    if state["step"] < state["total"]:
        steps = state["step"], state["total"]
        log.warning("%s: stopped at step %d of %d; to go on: train.py --resume %s", folder, *steps, folder)
    return {"step": state["step"], "steps": state["total"]}


def cosine_result(prepared: Prepared, predictions: dict[str, np.ndarray]) -> dict[str, Any]:
    """The test cosine with its interval, beside the baseline of one vector for every image."""
    test = prepared.splits["test"]
    targets = prepared.targets[test]
    mean_embedding = prepared.targets[prepared.splits["train"]].astype(np.float64).mean(axis=0)
    test_cosines = cosines(predictions["test"], targets)
    baseline = cosines(mean_embedding, targets)
    low, high = bootstrap_interval(test_cosines)
    return {
        "test_cosine": float(test_cosines.mean()),
        "test_cosine_95": [low, high],
        "mean_embedding_cosine": float(baseline.mean()),
        "error_ratio": float((1 - test_cosines.mean()) / (1 - baseline.mean())),
        "val_cosine": float(cosines(predictions["val"], prepared.targets[prepared.splits["val"]]).mean()),
        "n_train": len(prepared.splits["train"]),
        "n_val": len(prepared.splits["val"]),
        "n_test": len(test),
    }


def regressor_predictions(
    folder: Path, prepared: Prepared, process: Process
) -> tuple[dict[str, np.ndarray], Callable[[], dict]]:
    """The predicted embeddings (n, 384) of each split, unit rows, and a function that writes the calibration
    and examples.png and returns further fields of result.json."""
    run = load_run(folder, process.device)
    workers = sample_readers(run.config.get("workers"), prepared, process.device)
    predictions, probabilities = {}, None
    for split, rows in prepared.splits.items():
        samples = Samples(prepared, rows, run.vocabulary)
        predictions[split], words = shared_predictions(run, samples, process, workers, split == "test")
        probabilities = words if split == "test" else probabilities

    def report() -> dict[str, Any]:
        by_split = prepared.splits.items()
        prompts = {split: [prepared.pairs.prompts[i] for i in rows] for split, rows in by_split}
        targets = {split: prepared.targets[rows] for split, rows in by_split}
        calibration = fit_calibration(predictions, targets, prompts, run.vocabulary.targets)
        write_calibration(folder, calibration)
        likely = calibration.in_prompt(predictions["test"])
        examples_picture(folder / "examples.png", run, prepared, predictions["test"], likely)
        if probabilities is None:
            return {}
        truth = run.vocabulary.targets(prompts["test"]).numpy() > 0
        return {"vocabulary_map": average_precision(probabilities, truth)}

    return predictions, report


def shared_predictions(
    run: Run, samples: Samples, process: Process, workers: int, with_words: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """`reverse_sd.predict` of all samples, in every process, each of which predicts its share; no word
    probabilities if not `with_words`: those of the training pairs would take gigabytes."""
    device, widths = process.device, (EMBEDDING_WIDTH, len(run.vocabulary))
    with_words = with_words and run.config["heads"] > 0
    parts = [[np.empty((0, width), np.float32)] for width in widths]
    loader, places = evaluation_batches(samples, process, workers)
    for *inputs, _, _, _ in loader:
        embeddings, words = predict(run.regressor, [tuple(x.to(device) for x in inputs)])
        parts[0].append(embeddings)
        if with_words:
            parts[1].append(words)

    def gathered(part: list[np.ndarray]) -> np.ndarray:
        rows = torch.from_numpy(np.concatenate(part)).to(device)
        return process.gathered(rows, places, len(samples)).cpu().numpy()

    return gathered(parts[0]), gathered(parts[1]) if with_words else None


def summary(folder: Path, result: dict) -> str:
    low, high = result["test_cosine_95"]
    lines = [
        f"{folder}",
        f"  test cosine            {result['test_cosine']:.4f}   95 % interval {low:.4f} to {high:.4f}, "
        f"{result['n_test']:,} pairs",
        f"  mean-embedding cosine  {result['mean_embedding_cosine']:.4f}   one vector for every image",
        f"  error left             {result['error_ratio']:.1%}   (1 - test cosine) / (1 - the line above)",
    ]
    for name, value in result.get("scores", {}).items():
        low, high = result["scores_95"][name]
        lines.append(f"  {name:<22} {value:.4f}   95 % interval {low:.4f} to {high:.4f}, {result['scorer']}")
    lines.append(f"  seconds                {result['seconds']:.0f}")
    lines.append("  written                result.json, predictions/, examples.png")
    return "\n".join(lines)
