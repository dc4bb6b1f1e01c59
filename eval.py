"""Evaluate trained runs on their test pairs.

    python eval.py RUN [RUN ...]

For each run: the mean cosine between predicted and true prompt embeddings with a 95 % bootstrap interval,
beside the baseline that predicts the mean training embedding for every image. Writes RUN/result.json,
RUN/predictions/*.npy (the unit-length predicted embeddings of each split and their targets, in the order of
RUN/predictions/rows.json) and RUN/examples.png.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
import train
import weights
from reverse_sd import Run, Vocabulary, load_run, nearest, predict

log = logging.getLogger("eval")

# ============================================================================================================
# Figures of merit
# ============================================================================================================


def cosines(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of each row of `predicted` (n, E) with the unit row of `target` (n, E), or with the one row
    (E,)."""
    predicted = predicted.astype(np.float64)
    predicted /= np.linalg.norm(predicted, axis=-1, keepdims=True)
    return (predicted * target.astype(np.float64)).sum(-1)


def bootstrap_interval(values: np.ndarray, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (n,), resampled with replacement."""
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 200):
        rows = rng.integers(len(values), size=(min(200, resamples - start), len(values)))
        means[start : start + len(rows)] = values[rows].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean average precision over the words that occur in `truth` (n, V), pairs ranked by `scores`."""
    precisions = []
    for j in np.flatnonzero(truth.any(axis=0)):
        hits = truth[np.argsort(-scores[:, j], kind="stable"), j].astype(np.float64)
        precisions.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits > 0].mean())
    return float(np.mean(precisions))


# ============================================================================================================
# One run
# ============================================================================================================


def evaluate(folder: Path, prepared: train.Prepared, device: str, seconds: float = 0.0) -> dict:
    """Predict every split of a run, write what the module's text lists, and return the content of
    result.json.

    `seconds`: time spent before this call, added to this call's own in `seconds` of the result.
    """
    started = time.time()
    run = load_run(folder, device)
    (folder / "predictions").mkdir(exist_ok=True)
    predictions, rows_by_split = {}, {}
    for split, rows in prepared.splits.items():
        samples = train.Samples(prepared, rows, run.vocabulary)
        predictions[split] = predict(run.regressor, train.input_batches(samples, device))
        write_array(folder / "predictions" / f"{split}.npy", predictions[split][0])
        write_array(folder / "predictions" / f"{split}-targets.npy", prepared.targets[rows])
        rows_by_split[split] = [
            {"image": prepared.pairs.where(i), "prompt": prepared.pairs.prompts[i]} for i in rows
        ]
    data.atomic_write(folder / "predictions" / "rows.json", json.dumps(rows_by_split, indent=0))

    test = prepared.splits["test"]
    targets = prepared.targets[test]
    mean_embedding = prepared.targets[prepared.splits["train"]].astype(np.float64).mean(axis=0)
    embedding, probabilities = predictions["test"]
    test_cosines = cosines(embedding, targets)
    baseline = cosines(mean_embedding, targets)
    low, high = bootstrap_interval(test_cosines)
    result = {
        "test_cosine": float(test_cosines.mean()),
        "test_cosine_95": [low, high],
        "mean_embedding_cosine": float(baseline.mean()),
        "error_ratio": float((1 - test_cosines.mean()) / (1 - baseline.mean())),
        "val_cosine": float(cosines(predictions["val"][0], prepared.targets[prepared.splits["val"]]).mean()),
        "n_train": len(prepared.splits["train"]),
        "n_val": len(prepared.splits["val"]),
        "n_test": len(test),
        "seed": run.config["seed"],
    }
    if probabilities is not None:
        truth = run.vocabulary.targets([prepared.pairs.prompts[i] for i in test]).numpy() > 0
        result["vocabulary_map"] = average_precision(probabilities, truth)
    result["seconds"] = round(seconds + time.time() - started, 1)
    data.atomic_write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    examples_picture(folder / "examples.png", run, prepared, embedding, probabilities)
    print(summary(folder, result))
    return result


def summary(folder: Path, result: dict) -> str:
    low, high = result["test_cosine_95"]
    return (
        f"{folder}\n"
        f"  test cosine            {result['test_cosine']:.4f}   95 % interval {low:.4f} to {high:.4f}, "
        f"{result['n_test']:,} pairs\n"
        f"  mean-embedding cosine  {result['mean_embedding_cosine']:.4f}   the same answer for every image\n"
        f"  error left             {result['error_ratio']:.1%}   (1 - test cosine) / (1 - that)\n"
        f"  seconds                {result['seconds']:.0f}\n"
        f"  written                result.json, predictions/, examples.png"
    )


def examples_picture(
    path: Path,
    run: Run,
    prepared: train.Prepared,
    embedding: np.ndarray,
    probabilities: np.ndarray | None,
    n: int = 8,
) -> None:
    """A row for each of `n` test images: the true prompt, the nearest training prompts, the likely words."""
    test, train_rows = prepared.splits["test"], prepared.splits["train"]
    train_targets = np.asarray(prepared.targets[train_rows])
    side, width, line = 144, 980, 15
    picked = np.random.default_rng(0).choice(len(test), size=min(n, len(test)), replace=False)
    sheet = Image.new("RGB", (width, len(picked) * (side + 12) + 12), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for k, i in enumerate(picked):
        y = 12 + k * (side + 12)
        image = prepared.pairs.image(int(test[i]))
        image.thumbnail((side, side)) if max(image.size) > side else None
        sheet.paste(
            image.resize((side, side * image.height // image.width), Image.Resampling.LANCZOS), (12, y)
        )
        cosine = float(embedding[i] @ prepared.targets[test[i]])
        lines = [
            ("true prompt", prepared.pairs.prompts[test[i]], "black"),
            ("", f"cosine {cosine:.3f}", "#777777"),
        ]
        for rank, (j, similarity) in enumerate(nearest(embedding[i], train_targets, 3)):
            lines.append(
                (
                    f"nearest {rank + 1}",
                    f"{prepared.pairs.prompts[train_rows[j]]}  ({similarity:.2f})",
                    "#1b4f8a",
                )
            )
        if probabilities is not None:
            lines.append(("likely words", likely_words(run.vocabulary, probabilities[i]), "#8a3b1b"))
        for label, text, colour in lines:
            draw.text((side + 28, y), label, "#777777", font)
            for part in wrap(text, font, width - side - 132)[:2]:
                draw.text((side + 112, y), part, colour, font)
                y += line
            y += 4
    data.atomic_write(path, png(sheet))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data.atomic_write(path, buffer.getvalue())


def likely_words(vocabulary: Vocabulary, probabilities: np.ndarray, n: int = 8) -> str:
    """The `n` most probable words, each with its probability in per cent."""
    return ", ".join(f"{vocabulary.words[j]} {probabilities[j]:.0%}" for j in np.argsort(-probabilities)[:n])


def wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# ============================================================================================================
# Command line
# ============================================================================================================


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        device = train.resolve_device(args.device)
        for folder in args.runs:
            config = train.TrainConfig(**train.saved_fields(folder))
            evaluate(folder, train.prepare(config, device), device)
    except (data.DataError, weights.WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
