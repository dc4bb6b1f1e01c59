"""Train a regressor from images to prompt embeddings: one loop for every backbone.

    python train.py --backbone unet                                      the embedded default
    python train.py --backbone unet --data FOLDER                        one's own image-prompt pairs
    python train.py --backbone vit                                       a black box: ViT, Swin or CLIP
    python train.py --backbone unet --data DIFFUSIONDB --weights sd-1    the paper's rows (a GPU is wanted)
    python train.py --backbone clip --data DIFFUSIONDB --weights clip-h-14 --train-blocks 0
    python train.py --resume runs/unet-mini-seed0                        go on where a run stopped
    torchrun --nproc-per-node 2 train.py --backbone unet ...             the same on several processes
    python train.py --backbone unet --curriculum difficulty              phase 1 and phase 2 of the curriculum

The run's folder holds config.json, vocabulary.json, log.jsonl, model.safetensors (the best on validation),
last/ (all that resuming needs), and, once training has ended, what eval.py writes: result.json,
predictions/ and a picture. With --record-difficulty or --curriculum difficulty also cosines.npy (epochs, n),
each training sample's cosine after each epoch of phase 1, difficulty.npy (n,), and difficulty.json, which
says what they belong to and how they were used; phase 1 is a run of its own in phase-1/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import weights
from baselines import Smoothing, cbs_sigma, lerac_initial, lerac_rate
from reverse_sd import (
    BACKBONES,
    EMBEDDING_WIDTH,
    Regressor,
    Vocabulary,
    as_backbone,
    by_thresholds,
    captioner_of,
    cosine_loss,
    curriculum_batches,
    curriculum_stages,
    difficulty,
    difficulty_thresholds,
    joint_loss,
    thirds,
    vocabulary_loss,
)

log = logging.getLogger("train")

MINIATURES = {"unet": "sd-mini", "vit": "vit-mini", "swin": "swin-mini", "clip": "clip-mini"}
# The beginning of a parameter's name that tells the backbone's blocks, from input to output.
BLOCKS = {
    "unet": r"unet\.(input_blocks\.\d+|middle_block)\.",
    "vit": r"blocks\.\d+\.",
    "swin": r"layers\.\d+\.blocks\.\d+\.",
    "clip": r"vision_model\.encoder\.layers\.\d+\.",
}

# ============================================================================================================
# Configuration: one dataclass, from which the flags are made
# ============================================================================================================


def option(default: typing.Any, help: str, choices: tuple = ()) -> typing.Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result. None = chosen from `weights`, see `DEFAULTS`."""

    backbone: str = option(
        "unet", "image encoder: the diffusion model's own, or one that knows nothing of it", tuple(BACKBONES)
    )
    data: str = option(
        "mini",
        "'mini', pictures that the miniature Stable Diffusion made; 'drawn', mini scenes drawn by program at "
        "first use; or a folder: DiffusionDB parts, a JSONL or CSV manifest, a .txt beside each image, or "
        "PNGs with a front end's text",
    )
    weights: str | None = option(
        None,
        "pretrained: a name of `python -m weights list`, a file or a folder "
        "(default: the backbone's miniature, as sd-mini)",
    )
    random_start: bool = option(
        False,
        "the backbone has the sizes of --weights, but starts from random values, always the same: what "
        "pretraining is worth",
    )
    captions: str | None = option(
        None,
        "what the U-Net reads of an image by cross-attention: empty = the empty text; prompt = the true one, "
        "an upper bound that no method may use; a BLIP to write them (blip-base, a folder), as in the paper; "
        "or a file of captions (.jsonl, .csv, .json, .txt) (sd-mini: blip-mini, else blip-base)",
    )
    train_blocks: int | None = option(
        None,
        "train only the last so many blocks of the backbone; 0 = none: its features are computed once and "
        "cached, and the heads train on them (default: all)",
    )
    layer_decay: float = option(
        1.0, "learning rate of each block, as a multiple of that of the block above it; 1 = the same for all"
    )
    heads: int = option(3, "vocabulary head of figure 3; 0 = none", (0, 1, 2, 3))
    words: int = option(1000, "vocabulary size m")
    mlc_weight: float = option(0.1, "lambda of equation (4)")
    curriculum: str = option(
        "none",
        "difficulty: the paper's, which trains twice, the second time from easy to hard; lerac and cbs: what "
        "it is compared with",
        ("none", "difficulty", "lerac", "cbs"),
    )
    chunks: str = option(
        "thirds",
        "how easy, medium and hard are told apart: equal thirds, or two thresholds for the cosine",
        ("thirds", "thresholds"),
    )
    # Paper: "a significant portion" and "a small subset".
    easy_share: float = option(0.5, "of --chunks thresholds: the share of samples above the first")
    hard_share: float = option(0.1, "of --chunks thresholds: the share of samples below the second")
    record_difficulty: bool = option(
        False, "compute each training sample's cosine after every epoch, as phase 1 of the curriculum does"
    )
    difficulty: str | None = option(
        None, "take the place of phase 1: a run on the same pairs and split, trained with --record-difficulty"
    )
    difficulty_weights: str | None = option(
        None,
        "weights of phase 1's epochs in the difficulty, as 0,0,0,.2,.3,.5 in the authors' code (default: the "
        "plain mean, the paper's)",
    )
    lerac_epochs: float = option(1.0, "epochs until LeRaC's learning rates meet")
    lerac_min_lr: float = option(1e-8, "LeRaC's first learning rate at the output; at the input it is --lr")
    cbs_every: float | None = option(
        None,
        "epochs after which CBS multiplies sigma by 0.9; its authors': 5 (default: a twentieth of the run, "
        "so that a short one too ends without smoothing)",
    )
    epochs: int | None = option(None, "passes over the training pairs (paper: 3; miniatures: 6)")
    batch_size: int | None = option(
        None, "samples of a step, all processes together (paper: 64; miniatures: 32)"
    )
    accumulate: int = option(1, "parts in which each process computes its share of a batch, to save memory")
    optimizer: str = option("adam", "adam: the paper's; adamw: the authors' code's", ("adam", "adamw"))
    lr: float | None = option(None, "peak learning rate of the cosine schedule (paper: 1e-4; sd-mini: 1e-3)")
    weight_decay: float = option(0.0, "of adamw, or the L2 penalty of adam")
    clip_norm: float = option(1.0, "largest norm of the gradient; 0 = do not clip")
    image_size: int | None = option(
        None, "the U-Net's images are cropped to this side in pixels (sd-mini: 64, else 256)"
    )
    seed: int = option(0, "of the split, the heads' initial weights and the order of samples")
    val_size: int | None = option(None, "validation pairs (30,000 or an eighth, whichever is less)")
    test_size: int | None = option(None, "test pairs (30,000 or an eighth, whichever is less)")
    clean: str = option(
        "auto",
        "paper = as in section 4.1; duplicates = the same, but only equal prompts are duplicates; off; "
        "auto = paper, or duplicates where prompts follow a template and the paper's rule would leave few",
        ("auto", "paper", "duplicates", "off"),
    )
    precision: str = option("auto", "auto = bf16 on CUDA, float32 on the CPU", ("auto", "float32", "bf16"))
    compile: bool = option(False, "torch.compile the regressor")
    activation_checkpointing: bool = option(False, "compute activations twice, to save memory")
    checkpoint_every: int = option(100, "optimizer steps between checkpoints")
    workers: int = option(0, "processes that read images")
    device: str = option("auto", "auto, cpu, cuda")


# Paper: three epochs of batches of 64 (section 4.2). 1e-4 with cosine decay is the authors' code's. With
# 6,000 pairs both would leave the miniatures half trained; their rates are the best, on validation, of a
# series in steps of two.
_MINI = {"epochs": 6, "batch_size": 32, "lr": 1e-3}
DEFAULTS = {
    "sd-mini": _MINI | {"lr": 2e-3, "image_size": 64, "captions": "blip-mini"},
    **dict.fromkeys(("vit-mini", "swin-mini", "swinv2-mini", "clip-mini"), _MINI),
    "": {"epochs": 3, "batch_size": 64, "lr": 1e-4},
}
EMBEDDED = ("mini", "drawn")  # what --data knows by name
MINI_PAIRS = Path(__file__).resolve().parent / "mini" / "generated"  # by mini/generated.py
# Flags that may change when a run is resumed: they do not decide its result.
RESUMABLE = {"workers", "device", "compile", "checkpoint_every", "activation_checkpointing"}
NO_DIFFICULTY = "holds no recorded difficulty; give a finished run of train.py --record-difficulty"


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what was left to `DEFAULTS`."""
    config = dataclasses.replace(config, weights=config.weights or MINIATURES[config.backbone])
    defaults = DEFAULTS.get(config.weights, DEFAULTS[""])
    if config.backbone == "unet":
        defaults = {"image_size": 256, "captions": "blip-base"} | defaults
    elif config.image_size:
        raise data.DataError(f"--image-size: the {config.backbone} reads images as its weights want them")
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **unset)
    check_flags(config)
    return config


def check_flags(config: TrainConfig) -> None:
    """Raises DataError for flags that contradict each other."""
    wrong = None
    if config.difficulty and config.curriculum != "difficulty":
        wrong = "--difficulty: only --curriculum difficulty reads it"
    elif config.difficulty and not (Path(config.difficulty) / "cosines.npy").exists():
        wrong = f"--difficulty {config.difficulty}: {NO_DIFFICULTY}"
    elif (given := difficulty_weights(config)) and not config.difficulty and len(given) != config.epochs:
        wrong = f"--difficulty-weights: {len(given)} weights for {config.epochs} epochs; give one for each"
    elif not (0 < config.easy_share <= 1 - config.hard_share <= 1):
        wrong = "--easy-share must be above 0, --hard-share at least 0, and together they are at most 1"
    elif config.curriculum in ("lerac", "cbs") and config.train_blocks == 0:
        wrong = f"--curriculum {config.curriculum}: the heads alone give it nothing to do; train some blocks"
    elif config.curriculum == "lerac" and config.layer_decay != 1:
        wrong = "--curriculum lerac: decides the layers' rates itself; leave out --layer-decay"
    elif config.curriculum == "lerac" and not 0 < config.lerac_min_lr <= config.lr:
        wrong = f"--lerac-min-lr must be above 0 and at most --lr, {config.lr:g}"
    elif config.curriculum == "lerac" and not 0 < config.lerac_epochs < config.epochs:
        wrong = f"--lerac-epochs must be above 0 and below --epochs, {config.epochs}, where the rate is 0"
    elif config.cbs_every is not None and config.cbs_every <= 0:
        wrong = "--cbs-every must be above 0"
    elif config.random_start and config.train_blocks is not None:
        wrong = "--random-start: all blocks have to be trained; leave out --train-blocks"
    if wrong:
        raise data.DataError(wrong)


def difficulty_weights(config: TrainConfig) -> list[float] | None:
    """The --difficulty-weights as numbers; None = equal weights."""
    if config.difficulty_weights is None:
        return None
    try:
        given = [float(weight) for weight in config.difficulty_weights.split(",")]
    except ValueError:
        given = []
    if not given or min(given) < 0 or not 0 < sum(given) < math.inf:
        raise data.DataError(
            f"--difficulty-weights {config.difficulty_weights}: must be numbers of at least 0, not all "
            "0, with commas between"
        )
    return given


def parse_args(argv: list[str]) -> tuple[dict[str, typing.Any], Path | None, Path | None]:
    """The flags given, by field name; the folder of --out; the folder of --resume."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    types = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if types[f.name] is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, help=f"{text} (default: {f.default})"
            )
            continue
        kind = next(t for t in (typing.get_args(types[f.name]) or (types[f.name],)) if t is not type(None))
        shown = "" if f.default in (None, "") else f" (default: {f.default})"
        parser.add_argument(flag, type=kind, choices=f.metadata["choices"] or None, help=text + shown)
    parser.add_argument(
        "--out", type=Path, help="the run's folder (default: runs/BACKBONE-DATA[-CURRICULUM]-seedN)"
    )
    parser.add_argument("--resume", type=Path, help="go on with the run in this folder")
    given = vars(parser.parse_args(argv))
    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume and (out or given.keys() - RESUMABLE):
        parser.error(
            f"--resume takes the run's own configuration; only these may be given too: {sorted(RESUMABLE)}"
        )
    if positive := [
        n
        for n in ("epochs", "batch_size", "accumulate", "words", "image_size", "checkpoint_every")
        if given.get(n) is not None and given[n] < 1
    ]:
        parser.error(f"--{positive[0].replace('_', '-')} must be at least 1")
    return given, out, resume


# ============================================================================================================
# Data: pairs, splits and caches for a configuration
# ============================================================================================================


class Shared(typing.NamedTuple):
    """A row for each distinct text, and which of them each pair has."""

    rows: np.ndarray
    index: np.ndarray

    def __getitem__(self, i: int | np.ndarray) -> np.ndarray:
        return self.rows[self.index[i]]


class Images:
    """The picture of each pair as the backbone reads it, read anew each time."""

    def __init__(self, pairs: data.Pairs, how: data.Preprocessing):
        self.pairs, self.how = pairs, how

    def __getitem__(self, i: int) -> np.ndarray:
        return data.image_tensor(self.pairs.image(i), self.how).numpy()


@dataclass
class Prepared:
    """What training and evaluation read, row by row over the cleaned pairs; `splits` holds rows."""

    pairs: data.Pairs
    splits: dict[str, np.ndarray]
    targets: Shared  # (n, 384) float32, unit rows
    inputs: tuple[np.ndarray | Shared | Images, ...]  # what the backbone's forward takes, see `prepare`
    preprocessing: data.Preprocessing
    fingerprint: str  # of the prompts and their split


def prepare(config: TrainConfig, device: str = "cpu") -> Prepared:
    """Read, clean and split the pairs; compute what is cached once: targets and the backbone's inputs.

    These are, for the U-Net, latents (n, 4, h, w) and caption states (n, 77, D), both float16; for the black
    boxes the images; for a backbone of which no block trains its features (n, width) float32. Everything
    cached is kept under weights.cache_dir() and reused whatever the heads or the seed. Pairs whose image
    cannot be read are left out of every split.
    """
    cache = weights.cache_dir()
    # Read first, so that weights which cannot be had stop the run before anything long. The encoders
    # themselves are loaded only if their cache lacks rows.
    for kind in (BACKBONES[config.backbone], *(("vae", "clip-text") if config.backbone == "unet" else ())):
        weights.config(kind, config.weights)
    if config.backbone == "unet" and (captioner := captioner_of(config.captions)):
        weights.config("blip", captioner)
    how = preprocessing(config)
    minilm = functools.cache(lambda: weights.load("minilm", device=device))
    path = pairs_folder(config.data)
    pairs = data.read_pairs(path)
    pairs = pairs.subset(cleaned(pairs.prompts, config.clean))
    pictures = data.same_pictures(pairs)
    splits = data.split(pairs.prompts, config.seed, config.val_size, config.test_size, pictures)
    shape, key = (EMBEDDING_WIDTH,), {"model": weights.fingerprint("minilm")}
    targets = Shared(
        *data.cached_texts(
            cache, "targets", pairs.prompts, key, shape, np.float32, lambda p: minilm().encode(p), 1024
        )
    )
    if config.backbone == "unet":
        inputs, readable = unet_inputs(config, pairs, how, device)
    else:
        inputs, readable = image_inputs(config, pairs, how, device)
    splits = {name: rows[readable[rows]] for name, rows in splits.items()}
    for name, rows in splits.items():
        if not len(rows):
            raise data.DataError(f"{path}: no readable image is left for {name}; give more pairs")
    log.info("pairs: %s", ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()))
    digest = hashlib.sha256("\n".join(pairs.prompts).encode())
    for rows in splits.values():
        digest.update(rows.tobytes())
    return Prepared(pairs, splits, targets, inputs, how, digest.hexdigest())


def pairs_folder(name: str) -> Path:
    """Where the pairs of --data are; scenes are drawn into the cache unless they are there."""
    if name == "mini":
        return MINI_PAIRS
    if name != "drawn":
        return Path(name)
    from mini import scenes

    path = weights.cache_dir() / f"mini-scenes-{scenes.VERSION}"
    scenes.build(path)
    return path


def preprocessing(config: TrainConfig) -> data.Preprocessing:
    """How the run's images are prepared: for a black box as its checkpoint was trained."""
    if config.backbone != "unet":
        return data.Preprocessing(**weights.preprocessing(BACKBONES[config.backbone], config.weights))
    if config.image_size % 8:
        raise data.DataError(f"--image-size {config.image_size}: must be a multiple of 8, the latents' grid")
    return data.Preprocessing.square(config.image_size)


def unet_inputs(
    config: TrainConfig, pairs: data.Pairs, how: data.Preprocessing, device: str
) -> tuple[tuple, np.ndarray]:
    """Latents and caption states of all pairs, or the frozen U-Net's features; and which images are
    readable."""
    cache, source = weights.cache_dir(), config.weights
    vae_config, text_config = weights.config("vae", source), weights.config("clip-text", source)
    vae = functools.cache(lambda: weights.load("vae", source, device=device))
    text = functools.cache(lambda: weights.load("clip-text", source, device=device))
    tokenizer = functools.cache(lambda: weights.load_tokenizer(source))

    @torch.no_grad()
    def latents_of(images: Tensor) -> Tensor:
        return vae().encode(images.to(device)) * vae_config.scale_factor

    @torch.no_grad()
    def states_of(captions: list[str]) -> Tensor:
        return text()(tokenizer()(captions).to(device))

    vae_key, text_key = weights.fingerprint("vae", source), weights.fingerprint("clip-text", source)
    captions = captions_of(config, pairs, device)
    shape = (vae_config.embed_dim, how.size[0] // 8, how.size[1] // 8)
    latents, readable = data.cached_images(
        cache, "latents", pairs, {"model": vae_key}, how, shape, np.float16, latents_of, 32, config.workers
    )
    shape, key = (77, text_config.hidden_size), {"model": text_key}
    contexts = Shared(*data.cached_texts(cache, "captions", captions, key, shape, np.float16, states_of, 32))
    if tokenizer.cache_info().currsize and tokenizer().truncated:
        log.warning(
            "captions: %d were cut after 75 tokens, all that the text tower reads", tokenizer().truncated
        )
    if config.train_blocks != 0:
        return (latents, contexts), readable

    unet = functools.cache(lambda: load_backbone(config).to(device).eval())

    @torch.no_grad()
    def features_of(rows: np.ndarray) -> Tensor:
        tensors = (torch.from_numpy(x[rows].astype(np.float32)).to(device) for x in (latents, contexts))
        return unet()(*tensors)

    said = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    key = {"model": weights.fingerprint("unet-encoder", source), "vae": vae_key, "text": text_key,
           "captions": said, "preprocessing": dataclasses.asdict(how)}
    features = data.cached_rows(
        cache, "unet-features", pairs, key, (backbone_width(config),), np.float32, features_of, 32
    )
    return (features,), readable


def captions_of(config: TrainConfig, pairs: data.Pairs, device: str) -> list[str]:
    """What is said of each image to the U-Net, by the `captions` of TrainConfig."""
    if config.captions == "prompt":
        log.warning("captions: the U-Net reads the true prompts: an upper bound, not a result")
        return pairs.prompts
    if config.captions == "empty":
        log.info("captions: none, the U-Net's cross-attention reads the empty text")
        return [""] * len(pairs)
    captioner = captioner_of(config.captions)
    if captioner is None:
        return data.read_captions(Path(config.captions), pairs)
    how = data.Preprocessing(**weights.preprocessing("blip", captioner))
    blip = functools.cache(lambda: weights.load("blip", captioner, device=device))

    def caption(images: Tensor) -> list[str]:
        return blip().generate(images.to(device))

    key = {"model": weights.fingerprint("blip", captioner), "generate": "defaults"}
    return data.cached_captions(weights.cache_dir(), pairs, key, how, caption, 16, config.workers)


def image_inputs(
    config: TrainConfig, pairs: data.Pairs, how: data.Preprocessing, device: str
) -> tuple[tuple, np.ndarray]:
    """The images of all pairs, or the frozen backbone's features; and which images are readable."""
    cache = weights.cache_dir()
    if config.train_blocks != 0:
        _, readable = data.cached_images(
            cache, "readable", pairs, {}, how, (1,), np.uint8,
            lambda images: torch.zeros(len(images), 1, dtype=torch.uint8), 256, config.workers,
        )
        return (Images(pairs, how),), readable
    backbone = functools.cache(lambda: load_backbone(config).to(device).eval())

    @torch.no_grad()
    def features_of(images: Tensor) -> Tensor:
        return backbone()(images.to(device))

    key = {"model": weights.fingerprint(BACKBONES[config.backbone], config.weights)}
    features, readable = data.cached_images(
        cache, f"{config.backbone}-features", pairs, key, how, (backbone_width(config),), np.float32,
        features_of, 32, config.workers,
    )
    return (features,), readable


def cleaned(prompts: list[str], how: str) -> np.ndarray:
    """Rows of the prompts that are kept, by the `clean` of TrainConfig; logs what was dropped."""
    if how == "off":
        return np.flatnonzero([bool(prompt) for prompt in prompts])
    kept, report = data.clean(prompts, near_duplicates=how != "duplicates")
    log.info("cleaning (section 4.1): %s", ", ".join(f"{n:,} {rule}" for rule, n in report.items()))
    if how == "auto" and len(kept) < 0.1 * len(set(prompts)):
        log.warning(
            "cleaning: these prompts follow a template: the paper's rule of 50 equal characters leaves %d of "
            "%d; dropping equal prompts only (--clean paper insists)",
            *(len(kept), len(prompts)),
        )
        return cleaned(prompts, "duplicates")
    return kept


# On a CPU a transformer takes 1.4 times as long for each sample at 256: its activations leave the cache.
EVALUATION_BATCH = 64


class Samples(Dataset):
    """Rows as tensors: the backbone's inputs, target, vocabulary targets, row number."""

    def __init__(self, prepared: Prepared, rows: np.ndarray, vocabulary: Vocabulary):
        self.prepared, self.rows, self.vocabulary = prepared, rows, vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor | int, ...]:
        p, row = self.prepared, int(self.rows[i])
        numbers = (torch.from_numpy(x[row].astype(np.float32)) for x in (*p.inputs, p.targets))
        return *numbers, self.vocabulary.targets([p.pairs.prompts[row]])[0], row


def input_batches(samples: Samples, device: str) -> Iterator[tuple[Tensor, ...]]:
    """The backbone's inputs in order, for `reverse_sd.predict`."""
    for *inputs, _, _, _ in DataLoader(samples, EVALUATION_BATCH, generator=torch.Generator()):
        yield tuple(tensor.to(device) for tensor in inputs)


# ============================================================================================================
# Processes, checkpoints
# ============================================================================================================


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started; alone without it."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Process]:
    """Join torchrun's processes (gloo on CPUs, nccl on GPUs), and leave them in the end."""
    device = weights.resolve_device(device)
    if "RANK" not in os.environ:
        yield Process(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    from datetime import timedelta

    # The first process may fill the caches for hours while the others wait.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=2))
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors beside `path`, bring them to the disk, and rename: the file is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data.atomic_write(path, buffer.getvalue())


class Checkpoint:
    """last/: the tensors of one step in a file named after it, and state.json, whose renaming makes them
    count.

    A process killed at any moment leaves either the former state.json with its tensors or the new one with
    its own.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{state['step']:08d}.safetensors"
        save_tensors(self.folder / name, tensors)
        data.atomic_write(self.folder / "state.json", json.dumps(state | {"tensors": name}, indent=1))
        for other in self.folder.iterdir():  # former tensors, and what a killed process left half written
            if other.name not in (name, "state.json"):
                other.unlink()

    def load(self) -> tuple[dict, dict[str, Tensor]] | None:
        """The last complete checkpoint, or None where there is none yet."""
        if not (self.folder / "state.json").exists():
            return None
        try:
            state = json.loads((self.folder / "state.json").read_text())
            return state, load_file(self.folder / state["tensors"])
        except Exception as error:
            raise data.DataError(
                f"{self.folder}: the checkpoint cannot be read ({error}); remove it to start the run again"
            ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's moments and step counts under the names of their parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{slot}.{names[i]}": value for i, slots in state.items() for slot, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    slots = optimizer.state_dict()
    slots["state"] = {
        i: {slot: tensors[f"optimizer.{slot}.{name}"] for slot in ("step", "exp_avg", "exp_avg_sq")}
        for i, name in enumerate(names)
    }
    optimizer.load_state_dict(slots)


def rng_tensors() -> dict[str, Tensor]:
    return {"rng.cpu": torch.get_rng_state()} | (
        {"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    )


def load_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


# ============================================================================================================
# The loop
# ============================================================================================================


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """A cosine from `lr` at the first step to 0 after the last."""
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / total))


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The samples of each step of an epoch: a shuffle that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def load_backbone(config: TrainConfig) -> nn.Module:
    """The backbone, pretrained unless it is to start anew: its inputs -> features (B, width)."""
    kind = BACKBONES[config.backbone]
    if config.random_start:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = weights.build(kind, weights.config(kind, config.weights))
    else:
        model = weights.load(kind, config.weights)
    model.checkpointing = config.activation_checkpointing
    return as_backbone(config.backbone, model)


def backbone_width(config: TrainConfig) -> int:
    """The width of the backbone's features, without loading it."""
    kind = BACKBONES[config.backbone]
    with torch.device("meta"):
        return weights.build(kind, weights.config(kind, config.weights)).width


def build_regressor(config: TrainConfig, n_words: int) -> Regressor:
    """The pretrained backbone with new heads, whose initial weights depend on the seed.

    With train_blocks = 0 its features are the input, and the regressor holds the heads alone.
    """
    backbone = nn.Identity() if config.train_blocks == 0 else load_backbone(config)
    torch.manual_seed(config.seed)
    return Regressor(backbone, backbone_width(config), n_words, config.heads)


def layers(names: list[str], blocks: str) -> list[int]:
    """How deep each parameter of a regressor lies: 0 before the first block, 1 in it, ...; one more than the
    last block for what comes after it, heads included. What lies between two blocks goes with the second.

    `names` in the order of use, `blocks` from BLOCKS.
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
    """The parameters that train, by name, under the factor of their learning rate; the others are frozen.

    With LeRaC the factor is that of the rate at step 0.
    """
    named = dict(regressor.named_parameters())
    depths = layers(list(named), BLOCKS[config.backbone])
    top = max(depths)
    first = 0 if config.train_blocks is None else top - config.train_blocks
    factors = [config.layer_decay ** (top - depth) for depth in range(first, top + 1)]
    if config.curriculum == "lerac":
        factors = lerac_initial(1.0, config.lerac_min_lr / config.lr, top + 1 - first)
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for depth, (name, parameter) in zip(depths, named.items(), strict=True):
        if depth >= first:
            groups.setdefault(factors[depth - first], {})[name] = parameter
        else:
            parameter.requires_grad_(False)
    return groups


class Trainer:
    """Holds what one step needs; `fit` is the loop.

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
        self.config, self.folder, self.process, self.prepared = config, folder, process, prepared
        self.chunks = chunks
        self.regressor = build_regressor(config, len(vocabulary)).to(process.device)
        groups = parameter_groups(self.regressor, config)
        self.names = [name for group in groups.values() for name in group]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        self.optimizer = kind(
            [{"params": list(group.values()), "scale": scale} for scale, group in groups.items()],
            lr=config.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
        )
        bf16 = config.precision == "bf16" or (
            config.precision == "auto" and process.device.startswith("cuda")
        )
        self.autocast = functools.partial(
            torch.autocast, process.device.split(":")[0], dtype=torch.bfloat16, enabled=bf16
        )
        self.smoothing = Smoothing(self.regressor) if config.curriculum == "cbs" else None
        self.model: nn.Module = torch.compile(self.regressor) if config.compile else self.regressor
        if process.world > 1:
            self.model = DistributedDataParallel(self.model)
        self.train_samples = Samples(prepared, prepared.splits["train"], vocabulary)
        self.val_samples = Samples(prepared, prepared.splits["val"], vocabulary)
        self.steps_per_epoch = math.ceil(len(self.train_samples) / config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        self.step, self.best, self.stopping = 0, -math.inf, False
        # Only images are worth processes of their own; all else is a row of a cache.
        self.workers = config.workers if isinstance(prepared.inputs[0], Images) else 0
        self.checkpoint = Checkpoint(folder / "last")
        # Phase 2 uses what phase 1 has recorded.
        self.recording = config.record_difficulty and config.curriculum != "difficulty"
        self.cosines = np.empty((0, len(self.train_samples)), np.float32)

    # -- one optimizer step ------------------------------------------------

    def train_step(self, batch: list[Tensor], batch_size: int) -> dict[str, float]:
        """One step on this process's share of a batch of `batch_size` samples; returns the losses' means
        over it all.

        Each part's loss is the sum over its samples divided by the size of the whole batch, so that neither
        the number of processes nor of parts changes the gradient.
        """
        lr = learning_rate(self.config, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.group_rate(group["scale"], lr)
        if self.smoothing:
            every = self.config.cbs_every
            self.smoothing.sigma = cbs_sigma(
                self.step, self.total / 20 if every is None else every * self.steps_per_epoch
            )
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.process.device)  # 1 - cosine, vocabulary, joint
        parts = list(zip(*(t.chunk(self.config.accumulate) for t in batch), strict=True))
        for k, (*inputs, target, words, weight) in enumerate(parts):
            last = k == len(parts) - 1
            sync = contextlib.nullcontext() if last or self.process.world == 1 else self.model.no_sync()
            with sync:
                with self.autocast():
                    prediction = self.model(*inputs)
                cosine = cosine_loss(prediction.embedding.float(), target)  # (1)
                vocabulary = torch.zeros_like(cosine)
                if prediction.logits is not None:
                    vocabulary = vocabulary_loss(prediction.logits.float(), words)  # (2), (3)
                loss = joint_loss(cosine, vocabulary, self.config.mlc_weight)  # (4)
                # DistributedDataParallel averages gradients over processes; this undoes it.
                ((loss * weight).sum() * self.process.world / batch_size).backward()
            sums += torch.stack([(x.detach() * weight).sum() for x in (cosine, vocabulary, loss)])
        norm = nn.utils.clip_grad_norm_(self.regressor.parameters(), self.config.clip_norm or math.inf)
        if self.process.world > 1:
            dist.all_reduce(sums)
        means = (sums / batch_size).tolist()
        if not math.isfinite(means[2]) or not math.isfinite(norm):
            raise data.DataError(
                f"{self.folder}: the loss is not finite at step {self.step}; start a new run with a lower "
                f"--lr (this one: {self.config.lr:g}); the last checkpoint is kept"
            )
        self.optimizer.step()
        self.step += 1
        return {"cosine": 1 - means[0], "vocabulary_loss": means[1], "loss": means[2], "lr": lr}

    def group_rate(self, scale: float, lr: float) -> float:
        """The learning rate of a group of parameters where the schedule's is `lr`."""
        if self.config.curriculum != "lerac":
            return lr * scale
        meet = max(1, round(self.config.lerac_epochs * self.steps_per_epoch))
        if self.step >= meet:
            return lr
        final = learning_rate(self.config, meet, self.total)
        return lerac_rate(self.config.lr * scale, final, self.step, meet)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The samples of each of the epoch's steps, all processes together.

        In phase 2 of the curriculum an epoch is not a pass, but as many steps as one of the plain run.
        """
        size, seed = self.config.batch_size, self.config.seed
        if self.chunks is None:
            return epoch_batches(len(self.train_samples), size, seed, epoch)
        start = epoch * self.steps_per_epoch
        return curriculum_batches(self.chunks, self.total, size, seed, start, start + self.steps_per_epoch)

    def loader(self, batches: list[np.ndarray]) -> DataLoader:
        """This process's share of the batches.

        Loaders have a generator of their own here, since each iteration would else draw from the global one,
        and a resumed run iterates more often.
        """
        rank, world = self.process.rank, self.process.world
        shares = [share(batch, rank, world) for batch in batches]
        return DataLoader(
            self.train_samples, batch_sampler=shares, num_workers=self.workers, generator=torch.Generator()
        )

    # -- validation, difficulty ------------------------------------------------

    @torch.no_grad()
    def cosines_of(self, samples: Samples) -> np.ndarray:
        """The cosine of each sample's prediction and target, (n,) float64; each process computes a share."""
        self.regressor.eval()
        device, mine = self.process.device, range(self.process.rank, len(samples), self.process.world)
        subset = torch.utils.data.Subset(samples, mine)
        parts = []
        loader = DataLoader(
            subset, EVALUATION_BATCH, num_workers=self.workers, generator=torch.Generator()
        )
        for *inputs, target, _, _ in loader:
            with self.autocast():
                embedding = self.regressor(*(x.to(device) for x in inputs)).embedding
            parts.append(1 - cosine_loss(embedding.float(), target.to(device)))
        self.regressor.train()
        cosines = torch.zeros(len(samples), dtype=torch.float64, device=device)
        if parts:
            cosines[mine.start :: mine.step] = torch.cat(parts).double()
        if self.process.world > 1:
            dist.all_reduce(cosines)
        return cosines.cpu().numpy()

    # -- state ------------------------------------------------

    def save(self) -> None:
        if not self.process.first:
            return
        tensors = {f"model.{name}": value for name, value in self.regressor.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names) | rng_tensors()
        if self.recording:
            tensors["cosines"] = torch.from_numpy(self.cosines)
        state = {
            "step": self.step,
            "total": self.total,
            "best": self.best if math.isfinite(self.best) else None,
            "data": self.prepared.fingerprint,
        }
        self.checkpoint.save(state, tensors)

    def restore(self) -> None:
        """Go back to the last checkpoint, if there is one, and forget what was logged after it."""
        if (found := self.checkpoint.load()) is not None:
            state, tensors = found
            if state["data"] != self.prepared.fingerprint:
                raise data.DataError(
                    f"{self.config.data}: the pairs are not those that {self.folder} was trained on; "
                    "put them back, or start a new run"
                )
            # Copied into the parameters that the optimizer holds, not put in their place.
            self.regressor.load_state_dict(
                {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            )
            load_optimizer(self.optimizer, self.names, tensors)
            load_rng(tensors)
            if self.recording:
                self.cosines = tensors["cosines"].numpy()
            self.step = state["step"]
            self.best = -math.inf if state["best"] is None else state["best"]
            log.info("resumed at step %d of %d", self.step, self.total)
        if self.process.first and (self.folder / "log.jsonl").exists():
            lines = (self.folder / "log.jsonl").read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            data.atomic_write(self.folder / "log.jsonl", "".join(kept))

    # -- the loop ------------------------------------------------

    def fit(self) -> None:
        """Train to the last step. Ctrl-C saves first; kill -9 loses what came after the last checkpoint."""
        config, process = self.config, self.process
        self.restore()
        self.regressor.train()
        bar = tqdm(total=self.total, initial=self.step, desc="train", unit="step", disable=not process.first)
        with (
            (self.folder / "log.jsonl").open("a") if process.first else open(os.devnull, "w") as log_file,
            bar,
        ):

            def record(**entry: float) -> None:
                log_file.write(json.dumps({"step": self.step} | entry) + "\n")
                log_file.flush()

            with self.stop_between_steps():
                for epoch in range(self.step // self.steps_per_epoch, config.epochs):
                    batches = self.batches(epoch)[self.step - epoch * self.steps_per_epoch :]
                    started = time.perf_counter()
                    for size, batch in zip(map(len, batches), self.loader(batches), strict=True):
                        terms = self.train_step(self.on_device(batch, size), size)
                        now = time.perf_counter()
                        record(epoch=epoch, **terms, images_per_second=size / (now - started))
                        started = now
                        bar.update()
                        best = f"{self.best:.3f}" if math.isfinite(self.best) else "-"
                        bar.set_postfix(cosine=f"{terms['cosine']:.3f}", best_val=best, refresh=False)
                        if self.step % self.steps_per_epoch == 0:
                            continue  # the end of an epoch is saved below, after its validation
                        if self.stopping or self.step % config.checkpoint_every == 0:
                            self.save()
                        if self.stopping:
                            raise KeyboardInterrupt
                    self.end_epoch(epoch, record)
                    if self.stopping:
                        raise KeyboardInterrupt
        if self.recording and process.first:
            score = score_of(config, self.cosines)
            save_difficulty(self.folder, self.cosines, score, data=self.prepared.fingerprint)

    @contextlib.contextmanager
    def stop_between_steps(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait for the step under way: half a step cannot be resumed."""

        def request_stop(*_: object) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        former = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def end_epoch(self, epoch: int, record: typing.Callable) -> None:
        cosine = float(self.cosines_of(self.val_samples).mean())
        record(epoch=epoch, val_cosine=cosine)
        if self.recording:
            row = self.cosines_of(self.train_samples).astype(np.float32)
            self.cosines = np.concatenate([self.cosines, row[None]])
        if cosine > self.best:
            self.best = cosine
            if self.process.first:
                save_tensors(self.folder / "model.safetensors", self.regressor.state_dict())
                if self.smoothing:  # part of the network that was validated: `load_run` applies it again
                    stated = json.loads((self.folder / "config.json").read_text())
                    stated["smoothing"] = self.smoothing.sigma
                    data.atomic_write(self.folder / "config.json", json.dumps(stated, indent=1) + "\n")
        self.save()

    def on_device(self, batch: list[Tensor], size: int) -> list[Tensor]:
        """The batch on the device, with each sample's weight in the loss in place of its row number."""
        *tensors, rows = batch
        weight = torch.ones(len(rows))
        if self.process.rank >= size:  # a last batch with fewer samples than processes: see `share`
            weight.zero_()
        return [t.to(self.process.device, non_blocking=True) for t in (*tensors, weight)]


def share(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """A process's share of a batch. One left empty-handed computes the first sample too, with weight 0."""
    part = batch[rank::world]
    return part if len(part) else batch[:1]


# ============================================================================================================
# Curriculum: what phase 1 hands to phase 2
# ============================================================================================================


def save_difficulty(folder: Path, cosines: np.ndarray, score: np.ndarray, **said: typing.Any) -> None:
    """Write difficulty.npy, difficulty.json and, last, cosines.npy, which says that all are there."""
    save_array(folder / "difficulty.npy", score)
    said = {"epochs": len(cosines)} | said
    data.atomic_write(folder / "difficulty.json", json.dumps(said, indent=1) + "\n")
    save_array(folder / "cosines.npy", cosines)


def read_cosines(folder: Path, prepared: Prepared) -> np.ndarray:
    """The cosines (epochs, n) that a run recorded of these training samples."""
    try:
        said = json.loads((folder / "difficulty.json").read_text())
        cosines = np.load(folder / "cosines.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise data.DataError(f"{folder}: {NO_DIFFICULTY} ({error})") from error
    if said.get("data") != prepared.fingerprint or cosines.shape[1:] != prepared.splits["train"].shape:
        raise data.DataError(
            f"{folder}: recorded its difficulty on other pairs or another split (--data, --clean, --seed, "
            "--val-size, --test-size); give a run on these"
        )
    return cosines


def phase_1(
    config: TrainConfig, folder: Path, process: Process, prepared: Prepared, vocabulary: Vocabulary
) -> np.ndarray:
    """The cosines (epochs, n) of phase 1: those that the run holds already, those of the run that
    --difficulty names, or those of a plain run with the same configuration, trained here in phase-1/."""
    if (folder / "cosines.npy").exists():
        return read_cosines(folder, prepared)
    if config.difficulty:
        return read_cosines(Path(config.difficulty), prepared)
    first, plain = folder / "phase-1", dataclasses.replace(config, curriculum="none", record_difficulty=True)
    if process.first and not (first / "config.json").exists():
        write_run(first, plain, prepared, vocabulary)
    process.wait()
    if not (first / "cosines.npy").exists():
        log.info("phase 1: plain training, to learn which samples are difficult")
        Trainer(plain, first, process, prepared, vocabulary).fit()
    process.wait()
    return read_cosines(first, prepared)


def score_of(config: TrainConfig, cosines: np.ndarray) -> np.ndarray:
    """The difficulty (n,) that the run's configuration makes of the cosines (epochs, n)."""
    try:
        return difficulty(cosines, difficulty_weights(config))
    except ValueError as error:
        raise data.DataError(f"--difficulty-weights: {error}; give one weight for each") from error


def chunks_of(
    config: TrainConfig, folder: Path, process: Process, cosines: np.ndarray, prepared: Prepared
) -> list[np.ndarray]:
    """Easy, medium and hard positions among the training samples; `folder` is told what they follow from."""
    score = score_of(config, cosines)
    thresholds = None
    if config.chunks == "thresholds":
        thresholds = difficulty_thresholds(score, config.easy_share, config.hard_share)
        log.info("curriculum: easy from cosine %.4f, hard below %.4f", *thresholds)
    chunks = by_thresholds(score, *thresholds) if thresholds else thirds(score)
    total = math.ceil(len(score) / config.batch_size) * config.epochs
    stages = [
        {"first_step": start, "last_step": stop - 1, "samples": len(pool)}
        for start, stop, pool in curriculum_stages(chunks, total)
    ]
    log.info("curriculum: %d easy, %d medium, %d hard; phase 2", *map(len, chunks))
    if process.first and not (folder / "cosines.npy").exists():
        said = {"chunks": config.chunks, "thresholds": thresholds, "stages": stages}
        save_difficulty(folder, cosines, score, data=prepared.fingerprint, **said)
    return chunks


# ============================================================================================================
# Command line
# ============================================================================================================


def new_folder(config: TrainConfig, out: Path | None) -> Path:
    """The folder of a new run; never one that holds another run."""
    if out is not None:
        if (out / "config.json").exists():
            raise data.DataError(
                f"{out}: holds a run already; go on with it by --resume {out}, or give another --out"
            )
        return out
    kind = "" if config.curriculum == "none" else f"-{config.curriculum}"
    name = f"{config.backbone}-{Path(config.data).resolve().name}{kind}-seed{config.seed}"
    taken = [path for path in (Path("runs") / name, *Path("runs").glob(f"{name}-*")) if path.exists()]
    return Path("runs") / (f"{name}-{len(taken) + 1}" if taken else name)


def saved_fields(folder: Path) -> dict[str, typing.Any]:
    """The fields of TrainConfig as a run's folder states them."""
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise data.DataError(
            f"{folder}: not a run of train.py ({error}); give the folder that it wrote"
        ) from error
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in saved.items() if name in fields}


def write_run(folder: Path, config: TrainConfig, prepared: Prepared, vocabulary: Vocabulary) -> None:
    """Make a new run's folder, with what describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    data.atomic_write(folder / "vocabulary.json", json.dumps(vocabulary.words))
    model = weights.config(BACKBONES[config.backbone], config.weights)
    derived = {"model": model, "preprocessing": prepared.preprocessing}
    stated = {name: dataclasses.asdict(value) for name, value in derived.items()}
    data.atomic_write(
        folder / "config.json", json.dumps(dataclasses.asdict(config) | stated, indent=1) + "\n"
    )


def run(given: dict[str, typing.Any], out: Path | None, resume: Path | None) -> Path:
    """Train a new run or resume one, evaluate it on the test pairs, and return its folder."""
    started = time.time()
    if resume:
        config = TrainConfig(**saved_fields(resume) | given)
    else:
        config = resolve(TrainConfig(**given))
    with process_group(config.device) as process:
        logging.getLogger().setLevel(logging.INFO if process.first else logging.ERROR)
        folder = resume or new_folder(config, out)
        if process.world > 1:
            shared = [str(folder)]
            dist.broadcast_object_list(shared, src=0)
            folder = Path(shared[0])
        if process.first:
            log.info("run: %s on %s", folder, process.device)
            prepared = prepare(config, process.device)
        process.wait()
        if not process.first:
            prepared = prepare(config, process.device)
        vocabulary = Vocabulary.of(
            (prepared.pairs.prompts[i] for i in prepared.splits["train"]), config.words
        )
        if config.difficulty and not resume:
            # A wrong one must not leave a folder behind.
            score_of(config, read_cosines(Path(config.difficulty), prepared))
        if process.first and not resume:
            write_run(folder, config, prepared, vocabulary)
        process.wait()
        chunks = None
        try:
            if config.curriculum == "difficulty":
                cosines = phase_1(config, folder, process, prepared, vocabulary)
                chunks = chunks_of(config, folder, process, cosines, prepared)
            Trainer(config, folder, process, prepared, vocabulary, chunks).fit()
        except KeyboardInterrupt:
            log.warning("go on with: python train.py --resume %s", folder)
            raise
        if process.first:
            from eval import evaluate  # eval.py reads what this file prepares

            evaluate(folder, prepared, process.device, seconds=time.time() - started)
    return folder


def main(argv: list[str] | None = None) -> int:
    given, out, resume = parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(given, out, resume)
    except (data.DataError, weights.WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; all that was computed is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
