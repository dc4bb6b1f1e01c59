"""Ridge regression on frozen features, in closed form: how much of the prompt each pretrained network shows
before any training, and which features of the U-Net read best. No training run is needed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import weights
from backbones import BACKBONES, SDReader, UNetFeatures, captioner_of
from baselines import Ridge, RidgeSums, ridge
from tables.exhibit import Exhibit, bullets, interval, markdown, page, provenance_text
from tables.runs import Plan, RunName
from training.cache import Encoder, as_texts, cached_rows, image_caches
from training.inputs import Prepared, captions_encoder, captions_of, prepare, prompt_targets
from training.metrics import cosines, student_interval

log = logging.getLogger("tables")

TIMESTEPS = (0, 50, 150, 400)
POOLED = ("mean", "maximum", "mean and maximum")
CAPTIONED = RunName("unet", "mlc")  # its captions are those of the default captioner


@dataclass(frozen=True)
class Features:
    """The features of a row: a name and an array (n, width) of all pairs."""

    name: str
    rows: np.ndarray

    def beside(self, other: Features) -> Features:
        return Features(f"{self.name} + {other.name}", np.concatenate([self.rows, other.rows], axis=1))


def unet_levels(plan: Plan, captions: str, timestep: int) -> tuple[np.ndarray, list[int]]:
    """(mean and maximum of every block's output, (n, 2 sum of widths), the width of each block)."""
    config = plan.config(RunName("unet", "mlc"), plan.seeds[0])
    config = dataclasses.replace(config, captions=captions, train_blocks=None)
    prepared = prepare(config, plan.device)
    latents, contexts = prepared.inputs
    source = config.weights
    with torch.device("meta"):
        unet = weights.build("unet-encoder", weights.config("unet-encoder", source))
        widths = [*unet.skip_widths, unet.width]

    @functools.cache
    def backbone() -> UNetFeatures:
        model = weights.load("unet-encoder", source, device=plan.device).eval()
        return UNetFeatures(model, "levels", timestep)

    @torch.no_grad()
    def encode(rows: np.ndarray) -> Tensor:
        inputs = (torch.from_numpy(np.asarray(x[rows], np.float32)) for x in (latents, contexts))
        return backbone()(*(x.to(plan.device) for x in inputs))

    texts = hashlib.sha256(np.ascontiguousarray(contexts.index).tobytes())
    key = {
        "unet": weights.fingerprint("unet-encoder", source),
        "vae": weights.fingerprint("vae", source),
        "captions": captions,
        "texts": texts.hexdigest(),
        "preprocessing": dataclasses.asdict(prepared.preprocessing),
        "timestep": timestep,
    }
    encoder = Encoder("unet-levels", key, (2 * sum(widths),), np.float32, 32, encode)
    return cached_rows(weights.cache_dir(), prepared.pairs, encoder), widths


def pooled(levels: np.ndarray, widths: list[int], only_middle: bool, pooling: str) -> np.ndarray:
    """The columns of `unet_levels` that belong to a pooling, of all blocks or of the middle block."""
    columns, start = [], 0
    for number, width in enumerate(widths):
        for k, name in enumerate(("mean", "maximum")):
            if name in pooling and (not only_middle or number == len(widths) - 1):
                columns += range(start + k * width, start + (k + 1) * width)
        start += 2 * width
    return levels[:, columns]


def caption_features(plan: Plan, run: RunName = CAPTIONED) -> Features:
    """The sentence embedding of each image's caption, as the U-Net of `run` reads it."""
    config = plan.config(run, plan.seeds[0])
    pairs = prepare(config, plan.device).pairs
    encoders = captions_encoder(SDReader(config.weights, captioner_of(config.captions), plan.device))
    made = image_caches(weights.cache_dir(), pairs, encoders, config.workers, plan.device) if encoders else []
    captions = as_texts(made[0][0]) if made else captions_of(config, pairs)
    embedded = prompt_targets(captions, plan.device)
    return Features("caption", embedded[np.arange(len(pairs))])


def frozen(plan: Plan, run: RunName, seed: int) -> Prepared:
    """The inputs of a run's heads if its backbone were frozen: the features of all pairs."""
    return prepare(dataclasses.replace(plan.config(run, seed), train_blocks=0), plan.device)


def black_box(plan: Plan, backbone: str) -> Features:
    """The features of a frozen black box."""
    prepared = frozen(plan, RunName(backbone, "plain"), plan.seeds[0])
    return Features(BACKBONES[backbone].title, np.asarray(prepared.inputs[0]))


def all_features(plan: Plan) -> Iterator[Features]:
    """The features of every row, one after the other."""
    caption = caption_features(plan)
    yield caption
    for backbone in BACKBONES:
        if not BACKBONES[backbone].white_box:
            features = black_box(plan, backbone)
            yield features
            yield features.beside(caption)
    captioner = plan.sources["blip"]
    for text, captions in (("empty text", "empty"), ("captions", captioner)):
        levels, widths = unet_levels(plan, captions, 0)
        for only_middle, place in ((True, "middle block"), (False, "all blocks")):
            for pooling in POOLED:
                yield Features(
                    f"U-Net, {text}, {place}, {pooling}", pooled(levels, widths, only_middle, pooling)
                )
    for timestep in TIMESTEPS[1:]:
        levels, _ = unet_levels(plan, "empty", timestep)
        yield Features(f"U-Net, empty text, all blocks, mean and maximum, timestep {timestep}", levels)


def fitted(features: np.ndarray, prepared: Prepared, device: str) -> tuple[Ridge, float]:
    """Ridge regression on the training pairs, and its mean cosine on the test pairs."""

    def of(split: str) -> tuple[Tensor, Tensor]:
        rows = prepared.splits[split]
        arrays = np.asarray(features[rows], np.float32), prepared.targets[rows]
        return tuple(torch.from_numpy(array).to(device) for array in arrays)

    sums = RidgeSums(features.shape[1], prepared.targets.rows.shape[1], device)
    sums.add(*of("train"))
    solution = ridge(sums, *of("val"))
    x, y = of("test")
    return solution, float(cosines(solution.predict(x).cpu().numpy(), y.cpu().numpy()).mean())


def compute(plan: Plan) -> dict:
    """Test cosines of each row by seed; the features are those of all pairs, only the splits differ."""
    by_seed = [prepare(plan.config(RunName("unet", "mlc"), seed), plan.device) for seed in plan.seeds]
    mean = []
    for prepared in by_seed:
        centre = prepared.targets[prepared.splits["train"]].astype(np.float64).mean(axis=0)
        mean.append(float(cosines(centre, prepared.targets[prepared.splits["test"]]).mean()))
    rows = [{"name": "mean training embedding", "width": None, "val": None, "penalties": []} | summary(mean)]
    for features in all_features(plan):
        log.info("%s, %d numbers", features.name, features.rows.shape[1])
        fits = [fitted(features.rows, prepared, plan.device) for prepared in by_seed]
        best = [max(cosine for _, cosine in solution.tried) for solution, _ in fits]
        row = {"name": features.name, "width": features.rows.shape[1], "val": float(np.mean(best))}
        row["penalties"] = [solution.penalty for solution, _ in fits]
        rows.append(row | summary([test for _, test in fits]))
    return {"n_test": [len(p.splits["test"]) for p in by_seed], "rows": rows}


def summary(per_seed: list[float]) -> dict:
    return {
        "cosine": float(np.mean(per_seed)),
        "seeds_95": student_interval(per_seed),
        "per_seed": per_seed,
    }


def text(result: dict) -> str:
    cells = [
        (row["name"], row["width"] or "", row["val"], row["cosine"], interval(row["seeds_95"]))
        for row in result["rows"]
    ]
    columns = "features | numbers | validation | test | 95 % interval over seeds"
    notes = (
        "Ridge regression from standardised features to the prompt's embedding, fitted on the training "
        "pairs; the penalty has the highest cosine on validation. No network is trained.",
        "Each seed has its own split. Intervals are Student's over seeds.",
        "Caption: the sentence embedding of the captioner's text, without an image model. The miniature's "
        "captioner was trained on prompts of this grammar.",
        "The paper's features are the maximum of the U-Net's middle block at timestep 0.",
    )
    title = "Ridge regression on frozen features"
    return page(title, provenance_text(result), markdown(columns, cells), bullets(notes))


READOUTS = {"readouts": Exhibit((), compute, text)}
