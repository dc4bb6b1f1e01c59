"""Train a regressor from images to prompt embeddings, or a captioner: one loop for every backbone.

    python train.py --backbone unet                                      the embedded default
    python train.py --backbone unet --data FOLDER                        your own image-prompt pairs
    python train.py --backbone vit                                       a black box: ViT, Swin or CLIP
    python train.py --backbone unet --data DIFFUSIONDB --weights sd-1    the paper's rows (needs a GPU)
    python train.py --backbone clip --data DIFFUSIONDB --weights clip-h-14 --train-blocks 0
    python train.py --backbone blip                                      a captioner that writes the prompt
    python train.py --resume runs/unet-mini-seed0                        continue a run that stopped
    torchrun --nproc-per-node 2 train.py --backbone unet ...             train with several processes (README)
    python train.py --backbone unet --curriculum difficulty              phase 1 and phase 2 of the curriculum
    python train.py ... --plan --memory 24                               only count: pairs, steps, caches, and
                                                                         the memory of a step beside 24 GiB

The run's folder holds config.json, vocabulary.json, log.jsonl, model.safetensors (the best on validation),
last/ (the state for resuming) and, after training, result.json, predictions/ and examples.png. With
--record-cosines or --curriculum difficulty also cosines.npy (epochs, n), each training sample's cosine after
each epoch of phase 1 (of a captioner the score of --difficulty-by), easiness.npy (n,), their mean, and
curriculum.json, which describes both; phase 1 is a separate run in phase-1/. A captioner's run also holds
captions.jsonl, its captions of the validation and test images, and a BLIP's blip/, a source for --captions.

On a machine with other busy processes set GOMP_SPINCOUNT=1000: threads then wait less long for each other,
at the cost of some 6 % where it is quiet (benchmarks/busy.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import weights
from backbones import BACKBONES, CAPTIONERS
from baselines import (
    RidgeSums,
    Smoothing,
    cbs_sigma,
    control_scores,
    lerac_initial,
    lerac_rate,
    mixed,
    ridge,
)
from command import run_command
from files import atomic_write, exclusive, write_json
from reverse_sd import (
    EMBEDDING_WIDTH,
    Regressor,
    Vocabulary,
    by_thresholds,
    cosine_loss,
    curriculum_stages,
    easiness_thresholds,
    joint_loss,
    thirds,
    vocabulary_loss,
)
from schema import read_json
from training.caption_trainer import CaptionerTrainer
from training.config import TrainConfig, parse_args, resolve
from training.evaluate import evaluate
from training.folder import (
    mention_other_origin,
    new_folder,
    read_cosines,
    save_cosines,
    saved_fields,
    write_run,
)
from training.inputs import (
    Prepared,
    Samples,
    evaluation_batches,
    load_backbone,
    prepare,
)
from training.loop import Process, learning_rate, process_group
from training.plan import plan_lines
from training.trainer import PairsTrainer, easiness_of

log = logging.getLogger("train")

# ============================================================================================================
# The regressor and its parameters
# ============================================================================================================


def build_regressor(config: TrainConfig, prepared: Prepared, n_words: int) -> Regressor:
    """The pretrained backbone with new heads, whose initial weights depend on the seed.

    With train_blocks = 0 the regressor holds only the heads, and its inputs are the backbone's features.
    """
    if config.train_blocks == 0:
        backbone, width = nn.Identity(), prepared.inputs[0].shape[1]
    else:
        backbone = load_backbone(config)
        width = backbone.width
    torch.manual_seed(config.seed)
    return Regressor(backbone, width, n_words, config.heads, standardise=config.head_start == "ridge")


def depths_of(names: list[str], blocks: str) -> list[int]:
    """The depth of each parameter of a regressor: 0 before the first block, 1 in it, ...; one more than the
    last block after it, heads included. Parameters between two blocks have the depth of the second.

    `names` in the order of use, `blocks` from `backbones.Backbone`.
    """
    seen: list[str] = []
    depths = []
    for name in names:
        match = re.match(rf"backbone\.{blocks}", name)
        if match and match[0] not in seen:
            seen.append(match[0])
        if match:
            depths.append(1 + seen.index(match[0]))
        else:
            depths.append(len(seen) + 1 if seen or name.startswith("heads.") else 0)
    return depths


def parameter_groups(regressor: Regressor, config: TrainConfig) -> dict[float, dict[str, nn.Parameter]]:
    """Trained parameters by name, grouped by the factor of their learning rate; the others are frozen.

    With LeRaC the factor is that of the rate at step 0. With --head-lr its rates fall over the blocks alone,
    as its authors train a pretrained transformer: the last norm has the full rate and the heads theirs.
    """
    named = dict(regressor.named_parameters())
    depths = depths_of(list(named), BACKBONES[config.backbone].blocks)
    top = max(depths)
    first = 0 if config.train_blocks is None else max(0, top - config.train_blocks)
    factors = [config.layer_decay ** (top - depth) for depth in range(first, top + 1)]
    if config.curriculum == "lerac":
        falling = top + 1 - first - bool(config.head_lr)
        factors = lerac_initial(1.0, config.lerac_min_lr / config.lr, falling) + [1.0] * bool(config.head_lr)
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for depth, (name, parameter) in zip(depths, named.items(), strict=True):
        if depth >= first:
            factor = factors[depth - first]
            if config.head_lr and name.startswith("heads.embedding."):  # only it starts at ridge regression
                factor = config.head_lr / config.lr
            groups.setdefault(factor, {})[name] = parameter
        else:
            parameter.requires_grad_(False)
    return groups


# ============================================================================================================
# Training: the regressor's methods for `Trainer.fit` in training/loop.py; most are in training/trainer.py
# ============================================================================================================


class RegressorTrainer(PairsTrainer):
    """Trains a regressor by equations (1) to (4).

    `chunks`: positions among the training samples, easy, medium, hard, for phase 2 of the curriculum.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        process: Process,
        prepared: Prepared,
        vocabulary: Vocabulary,
        chunks: list[np.ndarray] | None = None,
    ):
        regressor = build_regressor(config, prepared, len(vocabulary)).to(process.device)
        groups = parameter_groups(regressor, config)
        self.smoothing = Smoothing(regressor) if config.curriculum == "cbs" else None
        train, val = (Samples(prepared, prepared.splits[split], vocabulary) for split in ("train", "val"))
        super().__init__(config, folder, process, prepared, regressor, groups, (train, val), chunks)

    # -- rates ------------------------------------------------

    def rate(self) -> float:
        """The schedule's learning rate; sets CBS's smoothing of this step."""
        if self.smoothing:
            every = self.config.cbs_every
            every = self.total / 20 if every is None else every * self.steps_per_epoch
            self.smoothing.sigma = cbs_sigma(self.step, every)
        return super().rate()

    def group_rate(self, lr: float, group: dict[str, Any]) -> float:
        scale, head_lr = group["scale"], self.config.head_lr
        if self.config.curriculum != "lerac" or (head_lr and scale == head_lr / self.config.lr):
            return lr * scale
        meet = max(1, round(self.config.lerac_epochs * self.steps_per_epoch))
        if self.step >= meet:
            return lr
        return lerac_rate(
            self.config.lr * scale, learning_rate(self.config.lr, meet, self.total), self.step, meet
        )

    # -- a step ------------------------------------------------

    def loss(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Equations (1), (3) and (4), each summed over the samples, times their weights."""
        *inputs, target, words, weight = batch
        with self.autocast():
            prediction = self.parallel(*inputs)
        cosine = cosine_loss(prediction.embedding.float(), target)  # (1)
        vocabulary = torch.zeros_like(cosine)
        if prediction.logits is not None:
            vocabulary = vocabulary_loss(prediction.logits.float(), words)  # (2), (3)
        joint = joint_loss(cosine, vocabulary, self.config.mlc_weight)  # (4)
        terms = {"cosine": 1 - cosine, "vocabulary_loss": vocabulary, "loss": joint}
        return {name: (term * weight).sum() for name, term in terms.items()}

    # -- validation ------------------------------------------------

    def scores_of(self, samples: Samples) -> np.ndarray:
        """The cosine of each sample's prediction and target."""

        def cosines(batch: list[Tensor]) -> Tensor:
            ((prediction, target),) = self.outputs(self.model, [batch])
            return 1 - cosine_loss(prediction.embedding.float(), target)

        return self.gathered(samples, cosines)

    def save_best(self) -> None:
        super().save_best()
        if self.smoothing:  # part of the network that was validated: `load_run` applies it again
            content = read_json(self.folder / "config.json")
            content["smoothing"] = self.smoothing.sigma
            write_json(self.folder / "config.json", content)

    def outputs(self, module: nn.Module, loader: Iterable[list[Tensor]]) -> Iterator[tuple[Any, Tensor]]:
        """The outputs of the regressor or a part of it and the targets, for each batch."""
        for *inputs, target, _, _ in loader:
            with self.autocast():
                output = module(*(x.to(self.process.device) for x in inputs))
            yield output, target.to(self.process.device)

    @torch.no_grad()
    def start_heads(self) -> None:
        """Standardise the features and set the embedding head to ridge regression on the pretrained
        backbone's features, with the penalty that has the highest cosine on validation.

        Paper: the heads start at random. Kumar et al. 2022 (linear probing, then fine-tuning).
        """
        self.model.eval()
        train, val = (
            self.outputs(self.model.backbone, evaluation_batches(samples, self.process, self.workers)[0])
            for samples in (self.train_samples, self.val_samples)
        )
        sums = RidgeSums(len(self.model.standardise.mean), EMBEDDING_WIDTH, self.process.device)
        for features, target in train:
            sums.add(features, target)
        self.process.summed(sums.products)
        held_out = [(features.float(), target) for features, target in val]
        rows, targets = map(torch.cat, zip(*held_out, strict=True)) if held_out else (None, None)
        solution = ridge(sums, rows, targets, self.process.summed)
        self.model.standardise.set(solution.mean, solution.deviation)
        self.model.heads.start_at(solution.weight, solution.bias)
        log.info(
            "heads: ridge regression on the pretrained features, penalty %.1e, validation cosine %.4f",
            *(solution.penalty, max(cosine for _, cosine in solution.tried)),
        )

    def restore(self) -> None:
        super().restore()
        if self.step == 0 and self.config.head_start == "ridge":
            self.start_heads()


# ============================================================================================================
# Curriculum: from phase 1 to phase 2
# ============================================================================================================


def phase_1(
    config: TrainConfig, folder: Path, process: Process, prepared: Prepared, vocabulary: Vocabulary
) -> np.ndarray:
    """The scores (epochs, n) of phase 1, recorded by this run, by the run of --phase-1, or by a plain run
    with the same configuration, which is trained here in phase-1/."""
    if (folder / "cosines.npy").exists():
        return read_cosines(folder, prepared)
    if config.phase_1:
        return read_cosines(Path(config.phase_1), prepared)
    first, plain = folder / "phase-1", dataclasses.replace(config, curriculum="none", record_cosines=True)
    if process.first and not (first / "config.json").exists():
        write_run(first, plain, prepared, vocabulary)
    process.wait()
    if not (first / "cosines.npy").exists():
        log.info("phase 1: plain training that records each sample's cosine")
        trainer_of(plain)(plain, first, process, prepared, vocabulary).fit()
    process.wait()
    return read_cosines(first, prepared)


def chunks_of(
    config: TrainConfig, folder: Path, process: Process, cosines: np.ndarray, prepared: Prepared
) -> list[np.ndarray]:
    """Easy, medium and hard positions among the training samples; curriculum.json describes them."""
    easiness, thresholds = easiness_of(config, cosines), None
    scores = control_scores(easiness, config.order, config.seed)
    if config.chunks == "thresholds":
        thresholds = easiness_thresholds(scores, config.easy_share, config.hard_share)
        log.info("curriculum: easy from cosine %.4f, hard below %.4f", *thresholds)
    chunks = by_thresholds(scores, *thresholds) if thresholds else thirds(scores)
    total = math.ceil(len(easiness) / config.batch_size) * config.epochs
    if config.order == "mixed":
        chunks = [mixed(chunks)]
    stages = [
        {"first_step": start, "last_step": stop - 1, "samples": len(pool)}
        for start, stop, pool in curriculum_stages(chunks, total)
    ]
    sizes = ", ".join(f"{stage['samples']:,}" for stage in stages)
    log.info("curriculum, %s: stages of %s samples; phase 2", config.order, sizes)
    if process.first and not (folder / "cosines.npy").exists():
        about = {"chunks": config.chunks, "order": config.order, "thresholds": thresholds, "stages": stages}
        save_cosines(folder, cosines, easiness, data=prepared.fingerprint, **about)
    return chunks


# ============================================================================================================
# Command line
# ============================================================================================================


def trainer_of(config: TrainConfig) -> Callable[..., PairsTrainer]:
    return CaptionerTrainer if config.backbone in CAPTIONERS else RegressorTrainer


def train_run(flags: dict[str, Any], out: Path | None, resume: Path | None) -> Path:
    """Train a new run or resume one, evaluate it on the test pairs, and return its folder."""
    started = time.time()
    config = TrainConfig(**saved_fields(resume) | flags) if resume else resolve(TrainConfig(**flags))
    with process_group(weights.resolve_device(config.device)) as process, contextlib.ExitStack() as stack:
        folder = own_folder(config, out, resume, process, stack)
        prepared = prepare(config, process.device)
        prompts = (prepared.pairs.prompts[i] for i in prepared.splits["train"])
        vocabulary = Vocabulary.of(prompts, config.words)
        if config.heads and not len(vocabulary):
            raise data.DataError("no training prompt has an English word for the vocabulary; give --heads 0")
        if config.phase_1 and not resume:
            # Check before the folder is created.
            easiness_of(config, read_cosines(Path(config.phase_1), prepared))
        if process.first and not (folder / "config.json").exists():
            write_run(folder, config, prepared, vocabulary)
        elif process.first:
            mention_other_origin(folder, prepared)
        process.wait()
        chunks = None
        try:
            if config.curriculum == "difficulty":
                cosines = phase_1(config, folder, process, prepared, vocabulary)
                chunks = chunks_of(config, folder, process, cosines, prepared)
            trainer_of(config)(config, folder, process, prepared, vocabulary, chunks).fit()
        except KeyboardInterrupt:
            log.warning("continue with: python train.py --resume %s", folder)
            raise
        process.wait()  # until the first one has written the weights
        evaluate(folder, prepared, process, seconds=time.time() - started)
    return folder


def own_folder(
    config: TrainConfig, out: Path | None, resume: Path | None, process: Process, stack: contextlib.ExitStack
) -> Path:
    """The run's folder, the same in all processes, locked until `stack` closes; an empty folder is removed on
    exit. Processes that torchrun has started again after a failure resume the run in --out.

    Raises data.DataError if another command uses the folder, if it cannot be written, and without --out if
    torchrun has started the processes again.
    """
    shared: list[str | None] = [None]
    if process.restarted() and not resume:
        if not out:
            raise data.DataError("--out: is needed for torchrun to continue the run after a failure")
        resume = out if (out / "config.json").exists() else None
    if process.first:
        folder = resume or new_folder(config, out)
        stack.callback(remove_if_empty, folder)
        try:
            stack.enter_context(exclusive(folder))
            atomic_write(folder / ".writable", b"")
            (folder / ".writable").unlink()
        except BlockingIOError as error:
            raise data.DataError(f"{folder}: another process uses this run; wait for it to end") from error
        except OSError as error:
            raise data.DataError(
                f"{folder}: cannot be written ({error.strerror or error}); make it writable"
            ) from error
        log.info("run: %s on %s", folder, process.device)
        shared = [str(folder)]
    if process.world > 1:
        dist.broadcast_object_list(shared, src=0)
    return Path(str(shared[0]))


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def main(argv: list[str] | None = None) -> int:
    flags, out, resume = parse_args(sys.argv[1:] if argv is None else argv, __doc__)
    only_plan, memory = flags.pop("plan", False), flags.pop("memory", None)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def train() -> None:
        if only_plan:
            config = TrainConfig(**saved_fields(resume) | flags) if resume else resolve(TrainConfig(**flags))
            for line in plan_lines(config, memory, parameter_groups):
                print(line, flush=True)
        else:
            train_run(flags, out, resume)

    return run_command(train, "stopped; progress is saved")


if __name__ == "__main__":
    sys.exit(main())
