"""A captioner's run, loaded and evaluated: captions of the validation and test pairs, and their scores."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipscore
import data
import weights
from files import atomic_write
from reverse_sd import Vocabulary, read_vocabulary
from training.cache import Encoder, as_bytes, as_texts, cached_images
from training.captioner import Captioner, trained_model, write_captioner
from training.config import read_run
from training.inputs import Prepared
from training.loop import Process
from training.metrics import average_precision, bootstrap_interval, cosines
from training.pictures import Line, examples_sheet
from weights.fetch import missing
from weights.registry import ENTRIES
from weights.sources import read

log = logging.getLogger("train")

GENERATE_AT_ONCE = 32  # images
SPLITS = "val", "test"  # that are captioned


@dataclass
class CaptionerRun:
    """A loaded run: the captioner with the weights that were best on validation, in eval mode on `device`."""

    folder: Path
    config: dict[str, Any]
    captioner: Captioner
    vocabulary: Vocabulary
    preprocessing: data.Preprocessing
    device: str

    def captions(self, images: Tensor) -> list[str]:
        """Captions of images (B, 3, H, W), by `preprocessing`."""
        return self.captioner.captions(images.to(self.device))

    def probabilities(self, images: Tensor) -> np.ndarray | None:
        """The probability of each word (B, V); None without a vocabulary head."""
        if self.captioner.vocabulary is None:
            return None
        return self.captioner.probabilities(images.to(self.device)).cpu().numpy()


def open_captioner_run(folder: str | Path, device: str = "cpu") -> CaptionerRun:
    """A captioner's run that train.py wrote.

    Raises weights.WeightsError, in one line, if the folder is not one, and as `trained_model`.
    """
    folder = Path(folder)
    config = read_run(folder)
    vocabulary = read_vocabulary(folder, config)
    captioner = trained_model(folder, config, len(vocabulary) if config["heads"] else 0, device)
    preprocessing = data.Preprocessing(**config["preprocessing"])
    return CaptionerRun(folder, config, captioner, vocabulary, preprocessing, device)


def written_prompts(
    captioner: Captioner,
    model_key: Any,
    preprocessing: data.Preprocessing,
    pairs: data.Pairs,
    device: str = "cpu",
    workers: int | None = 0,
) -> list[str]:
    """The captioner's text for each image; "" if unreadable. Cached under `model_key`, a hash of the weights,
    and resumable."""
    key = {"model": model_key, "generate": captioner.settings}
    write = lambda images: captioner.captions(images.to(device))  # noqa: E731
    encoder = as_bytes(Encoder("made-captions", key, (), None, GENERATE_AT_ONCE, write))
    return as_texts(cached_images(weights.cache_dir(), pairs, preprocessing, encoder, workers, device)[0])


def caption_predictions(
    folder: Path, prepared: Prepared, process: Process
) -> tuple[dict[str, np.ndarray], Callable[[], dict]]:
    """The sentence embeddings (n, 384) of the captions of each of SPLITS, unit rows, and a function that
    writes captions.jsonl, examples.png and, of a BLIP, blip/, and returns further fields of result.json.

    All processes caption; only the first one's results are whole.
    """
    run = open_captioner_run(folder, process.device)
    with (folder / "model.safetensors").open("rb") as file:
        key = [weights.fingerprint(run.config["backbone"], run.config["weights"])]
        key.append(hashlib.file_digest(file, "sha256").hexdigest())
    texts = {
        split: written_prompts(
            run.captioner, key, run.preprocessing, prepared.pairs.subset(prepared.splits[split]),
            process.device, run.config.get("workers"),
        )
        for split in SPLITS
    }  # fmt: skip
    if not process.first:
        return {}, dict
    minilm = weights.load("minilm", device=process.device)
    predictions = {split: minilm.encode(written).numpy() for split, written in texts.items()}
    return predictions, functools.partial(report, run, prepared, texts, predictions["test"])


def report(
    run: CaptionerRun, prepared: Prepared, texts: dict[str, list[str]], embedding: np.ndarray
) -> dict[str, Any]:
    """Further fields of result.json; writes captions.jsonl, examples.png and, of a BLIP, blip/."""
    test = prepared.splits["test"]
    source = scorer_source(run.config["weights"])
    scores, probabilities = measured(run, prepared, texts["test"], source)
    cosine = cosines(embedding, prepared.targets[test])
    write_captions(run.folder / "captions.jsonl", prepared, texts, scores)
    lines = caption_lines(run, prepared, texts["test"], cosine, scores, probabilities)
    examples_sheet(run.folder / "examples.png", prepared, lines)
    if run.captioner.kind == "blip":  # a source for --captions
        beside = read("blip", run.config["weights"]).folder
        write_captioner(run.captioner.model, run.folder / "blip", beside)
    fields: dict[str, Any] = {}
    if scores:
        fields["scorer"] = source
        fields["scores"] = {name: float(values.mean()) for name, values in scores.items()}
        fields["scores_95"] = {name: bootstrap_interval(values) for name, values in scores.items()}
    if probabilities is not None:
        truth = run.vocabulary.targets([prepared.pairs.prompts[i] for i in test]).numpy() > 0
        fields["vocabulary_map"] = average_precision(probabilities, truth)
    return fields


def scorer_source(source: str) -> str | None:
    """The CLIP that scores captions by a captioner of these weights: clip-mini for miniatures, else OpenAI's
    ViT-B/32, or None and a warning if its files are not here."""
    if Path(source).name.endswith("-mini"):
        return "clip-mini"
    if missing(ENTRIES["clip-b-32"]):
        log.warning("CLIPScore: left out; run: python -m weights fetch clip-b-32, then eval.py RUN")
        return None
    return "clip-b-32"


def measured(
    run: CaptionerRun, prepared: Prepared, captions: list[str], source: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """(scores (n,) of the captions of the test images, by the names of clipscore.py; the probability of each
    word (n, V)): none without `source`, and without a vocabulary head."""
    scorer = clipscore.Scorer(source, run.device) if source else None
    scores: dict[str, list[np.ndarray]] = {}
    probabilities, test = [], prepared.splits["test"]
    for start in range(0, len(test), clipscore.BATCH):
        rows = test[start : start + clipscore.BATCH]
        images = [prepared.pairs.image(i) for i in rows]
        if scorer:
            prompts = [[prepared.pairs.prompts[i]] for i in rows]
            part = scorer.scores(images, captions[start : start + clipscore.BATCH], prompts)
            for name in [name for name in part if name != "cos"]:
                scores.setdefault(name, []).append(part[name])
        if run.captioner.vocabulary is not None:
            tensors = torch.stack([data.image_tensor(image, run.preprocessing) for image in images])
            probabilities.append(run.probabilities(tensors))
    whole = {name: np.concatenate(parts) for name, parts in scores.items()}
    return whole, np.concatenate(probabilities) if probabilities else None


def write_captions(
    path: Path, prepared: Prepared, texts: dict[str, list[str]], scores: dict[str, np.ndarray]
) -> None:
    """Write one JSON object a line: split, image, prompt, caption and, of test images, the official CLIPScore
    and RefCLIPScore against the prompt."""
    lines = []
    for split, written in texts.items():
        for k, (row, caption) in enumerate(zip(prepared.splits[split], written, strict=True)):
            entry = {"split": split, "image": prepared.pairs.where(row)}
            entry |= {"prompt": prepared.pairs.prompts[row], "caption": caption}
            if split == "test" and scores:
                entry |= {name.lower(): float(scores[name][k]) for name in ("CLIPScore", "RefCLIPScore")}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))


def caption_lines(
    run: CaptionerRun,
    prepared: Prepared,
    captions: list[str],
    cosine: np.ndarray,
    scores: dict[str, np.ndarray],
    probabilities: np.ndarray | None,
) -> Callable[[int], list[Line]]:
    """The text beside a test image: true prompt, caption, its scores, likely words."""

    def lines(i: int) -> list[Line]:
        parts = [f"cosine {cosine[i]:.3f}"]
        parts += [f"{name} {scores[name][i]:.3f}" for name in ("CLIPScore", "RefCLIPScore") if scores]
        found = [
            Line("true prompt", prepared.pairs.prompts[prepared.splits["test"][i]]),
            Line("caption", captions[i], "#1b4f8a"),
            Line("", ", ".join(parts), "#777777"),
        ]
        if probabilities is not None:
            found.append(Line("likely words", run.vocabulary.likely(probabilities[i], 8), "#8a3b1b"))
        return found

    return lines
