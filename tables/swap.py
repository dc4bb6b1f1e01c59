"""Section 4.5 with controls: is there a way to learn to read that improves drawing?

    python eval.py --table swap --jobs 8

The encoder half of the U-Net is changed in many ways (`CONDITIONS`): by parts of a trained run's change, by
random changes of the same size, and by new trainings (`ARMS`), some of which keep predicting noise through
the frozen decoder half. Each U-Net draws the prompts of table 6 from the same noise, and judges compare the
pictures with those of the original U-Net.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import clipscore
import data
import generate
import weights
from backbones import SDReader, UNetFeatures
from files import exclusive
from mini.diffusion import EMPTY_PROMPTS
from models.unet import UNet
from reverse_sd import Regressor, Vocabulary, cosine_loss, joint_loss, vocabulary_loss
from tables.exhibit import (
    Exhibit,
    bullets,
    interval,
    markdown,
    one_by_one,
    p_text,
    page,
    provenance_text,
    short,
)
from tables.generation import (
    ALL_HEARD,
    RUN,
    SWAP_AFTER,
    Request,
    drawing_settings,
    judges_of,
    kept_pictures,
    labels_shown,
    open_pipeline,
    predicted,
    prompt_sets,
    slot_shares,
)
from tables.readouts import fitted
from tables.runs import Plan, cores
from training.config import TrainConfig
from training.inputs import Distinct, Prepared, encoder_autocast, prepare, text_states
from training.loop import Trainer, epoch_batches, learning_rate
from training.metrics import cosines, holm, seeds_p, student_interval

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the trained run's change
RANDOM_SHARES = (0.25, 1.0)
RATES = (1e-3, 1e-4)  # train.py's for sd-mini, and a lower one
NOISE_WEIGHT = 1.0  # mu
CHUNK = 256
JUDGES = {
    "probe": f"The share of the things in the prompt, {ALL_HEARD}, that the probe finds. It had no part in "
    "training.",
    "reader": "The cosine between the prompt's embedding and that predicted by {run} of the next seed, which "
    "was trained on pictures of the original U-Net: any change of the pictures costs cosine.",
    "CLIP": "The cosine of picture and prompt by clip-mini. Its image half had no part in training; its text "
    "half is that of the generator.",
}

# ============================================================================================================
# Conditions
# ============================================================================================================


@dataclass(frozen=True)
class Arm:
    """A new training of the encoder half; its loss is the sum of the terms that are set.

    `reading`: equation (4), of clean latents at timestep 0 or, with `drawn`, of noisy ones at timesteps drawn
    evenly from all; `noise`: the squared error of the noise predicted through the frozen decoder half.
    """

    name: str
    reading: bool
    noise: bool
    drawn: bool
    lr: float


@dataclass(frozen=True)
class Condition:
    """A U-Net with `share` of the change of its encoder half by `arm`, by default by the trained run; with
    `random`, a random change of that size. It draws after the first `after` steps."""

    title: str
    share: float = 1.0
    random: bool = False
    arm: Arm | None = None
    after: int = SWAP_AFTER

    def unet(self, plan: Plan, pipeline: generate.Pipeline, seed: int) -> UNet:
        if self.arm:
            trained = train_arm(plan, self.arm, pipeline.unet, seed)
        else:
            folder = plan.run_folder(RUN, seed)
            trained = generate.swapped_by_run(pipeline.unet, folder, plan.sources["unet"])
        return changed(pipeline.unet, trained, self.share, seed if self.random else None)


ORIGINAL = Condition("original", share=0.0)
LOSSES = {  # reading, noise, drawn
    "reading": (True, False, False),
    "noise": (False, True, False),
    "reading + noise": (True, True, False),
    "noisy reading": (True, False, True),
    "noisy reading + noise": (True, True, True),
}
ARMS = tuple(
    Condition(f"{name}, rate {lr:g}", arm=Arm(name, *terms, lr))
    for lr in RATES
    for name, terms in LOSSES.items()
)
PARTS = tuple(Condition(f"{share:g} of the run's change", share) for share in SHARES)
RANDOM = tuple(Condition(f"random, {share:g} of its size", share, random=True) for share in RANDOM_SHARES)
FROM_START = Condition("the run's change, from step 0", after=0)
CONDITIONS = (ORIGINAL, *PARTS, FROM_START, *RANDOM, *ARMS)
CONTRASTS = [  # of which the second is the control of the first
    (f"{name} + noise, rate {lr:g}", f"noise, rate {lr:g}")
    for lr in RATES
    for name in ("reading", "noisy reading")
] + [(part.title, other.title) for part in PARTS for other in RANDOM if part.share == other.share]


def encoder_names(unet: UNet) -> list[str]:
    """The parameters of the encoder half, time embedding included."""
    return [name for name, _ in unet.named_parameters() if not name.startswith(("output_blocks.", "out."))]


@torch.no_grad()
def changed(original: UNet, trained: UNet, share: float, seed: int | None = None) -> UNet:
    """A copy of `original` with `share` of the trained encoder half's change, parameter by parameter.

    With a seed: with a random change of the same norm in each parameter tensor.
    """
    merged = copy.deepcopy(original).eval()
    theirs = dict(trained.named_parameters())
    own = dict(merged.named_parameters())
    generator = torch.Generator().manual_seed(seed or 0)
    for name in encoder_names(original):
        if seed is None:
            own[name].copy_(torch.lerp(own[name], theirs[name].to(own[name]), share))
        else:
            norm = (theirs[name].to(own[name]) - own[name]).norm()
            noise = torch.randn(own[name].shape, generator=generator).to(own[name])
            own[name].add_(noise, alpha=float(share * norm / noise.norm()))
    return merged


@torch.no_grad()
def relative_change(original: UNet, merged: UNet) -> float:
    """The norm of the encoder half's change over that of its weights."""
    before, after = (dict(unet.named_parameters()) for unet in (original, merged))
    names = encoder_names(original)
    squares = sum(float((after[name] - before[name]).double().square().sum()) for name in names)
    return math.sqrt(squares / sum(float(before[name].double().square().sum()) for name in names))


# ============================================================================================================
# Training
# ============================================================================================================


def noisy(clean: Tensor, alphas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, 4, h, w) with noise, timesteps (B,) drawn evenly from all, and the noise."""
    random = {"generator": generator, "device": clean.device}
    noise = torch.randn(clean.shape, **random)
    t = torch.randint(generate.TRAIN_STEPS, (len(clean),), **random)
    alpha = alphas[t][:, None, None, None]
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t, noise


class EncoderTrainer(Trainer):
    """Trains the encoder half of a copy of `unet`, and heads, as `arm` defines.

    `prompts`: text states of all pairs' prompts and, last, of the empty one. The latents are posterior means,
    unlike in the generator's training, which draws from the posterior.
    """

    clip_norm = 1.0

    def __init__(
        self,
        folder: Path,
        unet: UNet,
        arm: Arm,
        config: TrainConfig,
        prepared: Prepared,
        prompts: Distinct,
        device: str,
    ):
        texts, train = prepared.pairs.prompts, prepared.splits["train"]
        vocabulary = Vocabulary.of((texts[i] for i in train), config.words)
        self.words = vocabulary.targets(texts)
        torch.manual_seed(config.seed)
        backbone = UNetFeatures(copy.deepcopy(unet), config.unet_features)
        model = Regressor(backbone, backbone.width, len(vocabulary), config.heads, standardise=True)
        model = model.to(device)
        trained = {f"backbone.unet.{name}" for name in encoder_names(unet)}
        encoder, heads = {}, {}
        for name, parameter in model.named_parameters():
            if name in trained:
                encoder[name] = parameter
            elif arm.reading and name.startswith("heads."):
                heads[name] = parameter
            else:
                parameter.requires_grad_(False)
        groups = [{"params": list(encoder.values())}]
        if heads:
            scale = (config.head_lr or arm.lr) / arm.lr
            groups.append({"params": list(heads.values()), "scale": scale})
        optimizer = torch.optim.Adam(groups, lr=arm.lr, betas=(0.9, 0.999), eps=1e-8)
        fields = ("weights", "seed", "captions", "unet_features", "heads", "head_lr", "words", "batch_size")
        options = {name: getattr(config, name) for name in (*fields, "mlc_weight")}
        identity = json.dumps([prepared.fingerprint, vars(arm), options, NOISE_WEIGHT])
        identity = hashlib.sha256(identity.encode()).hexdigest()
        super().__init__(folder, model, optimizer, [*encoder, *heads], identity)
        self.arm, self.config, self.device = arm, config, device
        self.prepared, self.prompts = prepared, prompts
        self.alphas = generate.alphas_bar().to(device)
        self.label = folder.name
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        self.checkpoint_every = self.steps_per_epoch

    @property
    def unet(self) -> UNet:
        return self.model.backbone.unet

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
        train, size = self.prepared.splits["train"], self.config.batch_size
        for part in epoch_batches(len(train), size, self.config.seed, epoch)[first:]:
            yield len(part), train[part]

    def rate(self) -> float:
        return learning_rate(self.arm.lr, self.step, self.total)

    def random(self) -> torch.Generator:
        """The random numbers of this step: the same in all arms, and after resuming."""
        return torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step)

    def loss(self, batch: np.ndarray) -> dict[str, Tensor]:
        generator = self.random()
        clean = tensor(self.prepared.inputs[0][batch], self.device)
        latents, t, noise = noisy(clean, self.alphas, generator)
        terms = {}
        if self.arm.reading:
            terms["reading"] = self.reading_loss(batch, *((latents, t) if self.arm.drawn else (clean, None)))
        if self.arm.noise:
            empty = torch.rand(len(batch), generator=generator, device=self.device) < EMPTY_PROMPTS
            rows = np.where(empty.cpu().numpy(), len(self.prompts.index) - 1, batch)
            context = tensor(self.prompts[rows], self.device)
            terms["noise"] = NOISE_WEIGHT * F.mse_loss(self.unet(latents, t, context), noise)
        return {"loss": sum(terms.values())} | terms

    def reading_loss(self, batch: np.ndarray, latents: Tensor, t: Tensor | None) -> Tensor:
        """Equation (4), the mean over the samples."""
        captions = tensor(self.prepared.inputs[1][batch], self.device)
        prediction = self.model(latents, captions, t)
        cosine = cosine_loss(prediction.embedding, tensor(self.prepared.targets[batch], self.device))
        vocabulary = torch.zeros_like(cosine)
        if prediction.logits is not None:
            vocabulary = vocabulary_loss(prediction.logits, self.words[batch].to(self.device))
        return joint_loss(cosine, vocabulary, self.config.mlc_weight).mean()

    def restore(self) -> None:
        """Restore the last checkpoint; without one, start the heads at ridge regression on the features of
        the arm's own inputs, as train.py does."""
        super().restore()
        if self.step == 0 and self.arm.reading:
            drawn = (self.alphas, self.random()) if self.arm.drawn else None
            features = features_of(self.model.backbone, self.prepared, self.device, drawn)
            solution, _ = fitted(features, self.prepared, self.device)
            self.model.standardise.set(solution.mean, solution.deviation)
            self.model.heads.start_at(solution.weight, solution.bias)


def tensor(rows: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.float32)).to(device)


@torch.no_grad()
def features_of(
    backbone: UNetFeatures,
    prepared: Prepared,
    device: str,
    drawn: tuple[Tensor, torch.Generator] | None = None,
) -> np.ndarray:
    """The features of all pairs, (n, width); of `noisy` latents with `drawn`, its last arguments."""
    latents, captions = prepared.inputs
    parts = []
    for rows in np.split(np.arange(len(latents)), range(CHUNK, len(latents), CHUNK)):
        x, t = tensor(latents[rows], device), None
        if drawn:
            x, t, _ = noisy(x, *drawn)
        parts.append(backbone(x, tensor(captions[rows], device), t).cpu().numpy())
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def material(config: TrainConfig, device: str) -> tuple[Prepared, Distinct]:
    """The pairs of a configuration, and the states of all their prompts and the empty one."""
    prepared = prepare(config, device)
    sd, autocast = SDReader(config.weights, None, device), encoder_autocast(config, device)
    return prepared, text_states(sd, [*prepared.pairs.prompts, ""], autocast)


def train_arm(plan: Plan, arm: Arm, unet: UNet, seed: int) -> UNet:
    """The U-Net of a training, which is resumed or made if missing."""
    config, name = plan.config(RUN, seed), arm.name.replace(" + ", "-").replace(" ", "-")
    folder = plan.folder / f"swap-{name}-{arm.lr:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder, f"{folder}: another process trains it; waiting for it"):
        trainer = EncoderTrainer(folder, unet, arm, config, *material(config, plan.device), plan.device)
        trainer.fit()
    return trainer.unet


# ============================================================================================================
# Judging
# ============================================================================================================


@torch.no_grad()
def noise_error(unet: UNet, prepared: Prepared, prompts: Distinct, device: str) -> float:
    """The mean squared error of the predicted noise in the test pairs' latents, with their prompts."""
    generator, alphas = torch.Generator(device).manual_seed(0), generate.alphas_bar().to(device)
    test, total = prepared.splits["test"], 0.0
    for rows in np.split(test, range(CHUNK, len(test), CHUNK)):
        latents, t, noise = noisy(tensor(prepared.inputs[0][rows], device), alphas, generator)
        error = F.mse_loss(unet(latents, t, tensor(prompts[rows], device)), noise)
        total += float(error) * len(rows)
    return total / len(test)


def clip_cosines(pictures: np.ndarray, texts: Sequence[str], device: str) -> np.ndarray:
    """The cosines (n,) of pictures uint8 (n, 64, 64, 3) and their prompts by clip-mini."""
    clip = clipscore.Scorer("clip-mini", device, prefix="")
    return clipscore.cosines(clip.images([Image.fromarray(pixels) for pixels in pictures]), clip.texts(texts))


def measure(
    plan: Plan, condition: Condition, seed: int, reader: int | None, sets: dict[str, list[Request]]
) -> dict:
    """The reading and noise errors of a condition's U-Net and, for each set of prompts, the judges' means.

    `reader` is the seed of the run that judges.
    """
    pipeline = open_pipeline(plan)
    unet = condition.unet(plan, pipeline, seed)
    config = plan.config(RUN, seed)
    prepared, prompts = material(config, plan.device)
    features = features_of(UNetFeatures(unet, config.unet_features), prepared, plan.device)
    solution, test = fitted(features, prepared, plan.device)
    result = {
        "change": relative_change(pipeline.unet, unet),
        "val": max(cosine for _, cosine in solution.tried),
        "test": test,
        "noise": noise_error(unet, prepared, prompts, plan.device),
    }
    digest = hashlib.sha256()
    for value in unet.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    swap = () if condition == ORIGINAL else (digest.hexdigest(), condition.after)

    def unet_at() -> Callable[[int], UNet]:
        return generate.after(condition.after, pipeline.unet, unet)

    minilm = weights.load("minilm", device=plan.device)
    for name, requests in sets.items():
        texts = [request.prompt for request in requests]
        pictures = kept_pictures(plan, pipeline, texts, range(len(texts)), swap, unet_at if swap else None)
        judged = {"probe": slot_shares(labels_shown(pictures, requests, plan.device))[ALL_HEARD]}
        if reader is not None:
            targets = minilm.encode(texts).cpu().numpy()
            judged["reader"] = cosines(predicted(plan, reader, pictures), targets)
        judged["CLIP"] = clip_cosines(pictures, texts, plan.device)
        result[name] = {judge: float(np.mean(values)) for judge, values in judged.items()}
    return result


def measure_and_end(*task: object) -> dict:
    """`measure` in a process of its own, which Ctrl-C ends with all others."""
    try:
        return measure(*task)
    except KeyboardInterrupt:
        os._exit(130)


def measured(plan: Plan, tasks: Sequence[tuple]) -> list[dict]:
    """`measure` of each task, in `plan.jobs` processes."""
    if plan.jobs == 1:
        return [measure(plan, *task) for task in tasks]
    context, threads = multiprocessing.get_context("spawn"), max(1, cores() // plan.jobs)
    os.environ["TQDM_DISABLE"] = "1"  # in these processes; this one has read it already
    with (
        ProcessPoolExecutor(plan.jobs, context, torch.set_num_threads, (threads,)) as pool,
        tqdm(total=len(tasks), desc="U-Nets", unit="U-Net") as bar,
    ):
        futures = [pool.submit(measure_and_end, plan, *task) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise data.DataError("--jobs: a process was ended, for lack of memory?; give fewer") from error
        finally:
            del os.environ["TQDM_DISABLE"]
            pool.shutdown(cancel_futures=True)


# ============================================================================================================
# The table
# ============================================================================================================


def compute(plan: Plan) -> dict:
    """Reading, noise and the judges' means of each condition, and its differences to the original."""
    readers = judges_of(plan)
    sets = {seed: prompt_sets(plan, seed) for seed in plan.seeds}
    for seed in plan.seeds:
        material(plan.config(RUN, seed), plan.device)  # fills the caches once
    longest_first = sorted(CONDITIONS, key=lambda c: bool(c.arm and c.arm.noise), reverse=True)
    tasks = [
        (condition, seed, readers[seed], sets[seed])
        for condition in longest_first
        for seed in plan.seeds
    ]
    by_title: dict[str, list[dict]] = {}
    for (condition, *_), of in zip(tasks, measured(plan, tasks), strict=True):
        by_title.setdefault(condition.title, []).append(of)
    by_title = {condition.title: by_title[condition.title] for condition in CONDITIONS}
    names = {name: len(requests) for name, requests in sets[plan.seeds[0]].items()}
    judges = list(by_title[ORIGINAL.title][0][next(iter(names))])
    against = [(title, ORIGINAL.title) for title in by_title if title != ORIGINAL.title]
    rows = []
    for name, judge in itertools.product(names, judges):
        for family in (against, CONTRASTS):
            rows += compared(by_title, family, name, judge)
    config = plan.config(RUN, plan.seeds[0])
    settings = {"prompts": names, "epochs": config.epochs, "batch_size": config.batch_size}
    settings |= {"noise_weight": NOISE_WEIGHT, "judges": judges}
    return drawing_settings() | settings | {"conditions": by_title, "rows": rows}


def compared(
    by_title: dict[str, list[dict]], family: Iterable[tuple[str, str]], name: str, judge: str
) -> list[dict]:
    """The differences between the conditions of each pair, over seeds; Holm's method over the family."""
    rows = []
    for first, second in family:
        ours, theirs = ([of[name][judge] for of in by_title[title]] for title in (first, second))
        per_seed = [a - b for a, b in zip(ours, theirs, strict=True)]
        row = {"prompts": name, "judge": judge, "condition": first, "against": second}
        row |= {"mean": float(np.mean(ours)), "difference": float(np.mean(per_seed))}
        rows.append(row | {"seeds_95": student_interval(per_seed), "per_seed": per_seed})
        rows[-1]["p"] = seeds_p(per_seed)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["holm"] = p
    return rows


def answer(rows: Sequence[dict]) -> str:
    """The conditions that draw better than the original by the probe."""
    rows = [row for row in rows if row["judge"] == "probe" and row["against"] == ORIGINAL.title]
    better = [row for row in rows if row["seeds_95"] and row["seeds_95"][0] > 0]
    worse = [row for row in rows if row["seeds_95"] and row["seeds_95"][1] < 0]
    sure = [row for row in better if row.get("holm", 1) < 0.05]

    def listed(rows: Sequence[dict]) -> str:
        return "; ".join(f"{row['condition']} ({row['prompts']})" for row in rows) or "none"

    return (
        f"By the probe, of {len(rows)} comparisons with the original, the interval lies above 0 in "
        f"{len(better)}: {listed(better)}. After Holm's correction p < .05: {listed(sure)}. The interval "
        f"lies below 0 in {len(worse)}."
    )


def text(result: dict) -> str:
    """The table as Markdown."""
    states = [
        (title, *(float(np.mean([of[key] for of in seeds])) for key in ("change", "val", "test", "noise")))
        for title, seeds in result["conditions"].items()
    ]
    columns = "encoder half | change | reads, validation | reads, test | error of the noise"
    parts = [markdown(columns, states)]
    columns = "encoder half | mean | difference | 95 % interval over seeds | p | p, Holm | seed by seed"
    for judge, name in itertools.product(result["judges"], result["prompts"]):
        heading = f"**{judge}, {name}** ({result['prompts'][name]} a seed)"
        rows = [row for row in result["rows"] if (row["judge"], row["prompts"]) == (judge, name)]
        cells = [
            (label(row), row["mean"], short(row["difference"], True), interval(row["seeds_95"], True))
            + (p_text(row["p"]), p_text(row.get("holm")))
            + (one_by_one(row["per_seed"]),)
            for row in rows
        ]
        parts += [heading, markdown(columns, cells)]
    samples = f"{result['epochs']} epochs in batches of {result['batch_size']}"
    notes = [f"{judge}: {JUDGES[judge].format(run=result['run'])}" for judge in result["judges"]]
    notes += [
        "Change: the norm of the encoder half's change over the norm of its weights.",
        "Reads: ridge regression on the features of clean latents and captions, fitted on the training "
        "pairs. Error of the noise: in latents of the test pairs, at timesteps drawn evenly, with their "
        "prompts.",
        f"The run is {result['run']}. Random: each parameter tensor is changed at random by as much as the "
        "run changed it.",
        f"New trainings ({samples}, the last weights): reading is equation (4) of clean latents at timestep "
        "0; noisy reading that of noisy latents at timesteps drawn evenly; noise the error of the noise "
        "predicted through the frozen decoder half, a tenth with the empty prompt; + noise the sum of both "
        f"(mu = {result['noise_weight']:g}). The latents are posterior means.",
        "Rows with a minus sign compare two conditions, of which the second is the control of the first. "
        "Holm's method corrects for the rows against the original and, apart, for those with a minus sign.",
    ]
    return page(
        "Section 4.5 with controls: drawing with an encoder half that learned to read",
        f"{provenance_text(result)} From step {result['swap_after'] + 1} of {result['steps']} on the U-Net "
        f"has the changed encoder half; guidance {result['guidance']:g}; the same noise for all.",
        answer(result["rows"]),
        *parts,
        bullets(notes),
    )


def label(row: dict) -> str:
    if row["against"] == ORIGINAL.title:
        return row["condition"]
    return f"{row['condition']} − {row['against']}"


SWAP = {"swap": Exhibit((RUN,), compute, text, needs="probe")}
