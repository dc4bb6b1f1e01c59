"""Settings of a run: one dataclass that defines train.py's flags and their checks."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data
from backbones import BACKBONES, CAPTIONERS, READERS
from command import Parser, text
from command import number as number_of
from schema import FLAG, NULL, OBJECT, TEXT, Rule, check, checked, many, number, one_of, read_json, record

EMBEDDED = ("mini", "drawn")  # --data without a folder
# Flags that --resume may change, because they do not affect the result.
RESUMABLE = {"workers", "device", "compile", "checkpoint_every", "activation_checkpointing"}
# Fields of older config.json files -> their names today.
RENAMED = {
    "difficulty": "phase_1",
    "record_difficulty": "record_cosines",
    "difficulty_weights": "epoch_weights",
}
# Fields that older config.json files lack.
ADDED = {"unet_features", "head_start", "head_lr", "order", "recipe", "target_texts", "difficulty_by"}
GROUPS = {
    "data": "image-prompt pairs, their cleaning and splits",
    "model": "backbone, weights and heads",
    "curriculum": "order of samples: the paper's curriculum and the compared ones",
    "optimisation": "steps and rates",
    "machine": "settings that do not affect the result; --resume may change most of them",
}


DIFFICULTY, LERAC, CBS = (("curriculum", (name,)) for name in ("difficulty", "lerac", "cbs"))
WHITE_BOX, REGRESSOR, CAPTIONER = (("backbone", tuple(x)) for x in (("unet",), BACKBONES, CAPTIONERS))
VOCABULARY_HEAD, THRESHOLDS = ("heads", (1, 2, 3)), ("chunks", ("thresholds",))


def option(
    group: str, default: Any, help: str, choices: tuple = (), only: tuple[str, tuple] | None = None,
    **bounds: float,
) -> Any:  # fmt: skip
    """A field with its flag's help and check. `only`: another field and the values with which this one has
    an effect; `bounds`: above, least, below, most."""
    metadata = {"group": group, "help": help, "choices": choices, "only": only, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings that determine a run's result. None = the default for `weights` in `SOURCE_DEFAULTS`.

    Raises data.DataError, in one line, for a value out of its range.
    """

    # fmt: off
    # -- data
    data: str = option(
        "data", "mini", "'mini', pictures that the miniature Stable Diffusion made; 'drawn', mini scenes "
        "drawn by program at first use; or a folder: DiffusionDB parts, a JSONL or CSV manifest, a .txt "
        "beside each image, or images with an embedded prompt"
    )
    clean: str = option(
        "data", "auto", "paper = section 4.1; duplicates = section 4.1 with equal prompts as the only "
        "duplicates; off = none; auto = paper, or duplicates if paper keeps less than a tenth",
        ("auto", "paper", "duplicates", "off")
    )
    val_size: int | None = option(
        "data", None, "validation pairs (default: an eighth of the pairs, at most 30,000)",
        least=1, most=10**9
    )
    test_size: int | None = option(
        "data", None, "test pairs (default: an eighth of the pairs, at most 30,000)", least=1, most=10**9
    )
    seed: int = option(
        "data", 0, "random seed for split, head initialisation and sample order", least=0, most=2**63 - 1
    )
    target_texts: str | None = option(
        "data", None, "train on other targets: a file of JSON lines {\"prompt\": \"...\", \"texts\": "
        "[\"...\", ...]}; a training prompt's target is the mean embedding of its texts, e.g. paraphrases. "
        "Validation, test and the vocabulary keep the prompt (default: the prompt's own embedding)",
        only=REGRESSOR
    )
    # -- model
    backbone: str = option(
        "model", "unet", "image encoder: unet = white box (the diffusion model's encoder); vit, swin, clip "
        "= black boxes; or a captioner, which is trained to write the prompt: blip, blip2", tuple(READERS)
    )
    weights: str | None = option(
        "model", None, "pretrained weights: a name of `python -m weights list`, a file or a folder "
        "(default: the backbone's miniature, e.g. sd-mini)"
    )
    random_start: bool = option(
        "model", False, "ablation: same architecture, random weights", only=REGRESSOR
    )
    captions: str | None = option(
        "model", None, "text for the U-Net's cross-attention: a BLIP that captions the images (as in the "
        "paper); empty = the empty text; prompt = the true prompt (upper bound only); or a file of captions "
        "(.jsonl, .csv, .json, .txt) (default: blip-mini with sd-mini, else blip-base)", only=WHITE_BOX
    )
    image_size: int | None = option(
        "model", None, "side in pixels to which the U-Net's images are cropped (default: 64 with sd-mini, "
        "else 256)", least=8, most=4096, only=WHITE_BOX
    )
    unet_features: str | None = option(
        "model", None, "features of the U-Net: middle = maximum of the middle block (paper); levels = mean "
        "and maximum of every block (default: levels with sd-mini, else middle)", ("middle", "levels"),
        only=WHITE_BOX
    )
    train_blocks: int | None = option(
        "model", None, "train only the last N blocks of the backbone; 0 = train only the heads, on cached "
        "features (default: all)", least=0, most=10**6, only=REGRESSOR
    )
    heads: int | None = option(
        "model", None, "placement of the vocabulary head in figure 3; 0 = none; a captioner's is 0 or 1, a "
        "linear layer on states of the image alone (default: 3; captioners: 1)", (0, 1, 2, 3)
    )
    words: int = option("model", 1000, "vocabulary size m", least=1, most=10**6, only=VOCABULARY_HEAD)
    head_start: str | None = option(
        "model", None, "initial embedding head: random (paper), or ridge = ridge regression on the "
        "pretrained backbone's features of the training images, penalty chosen on validation (default: "
        "ridge for miniatures, else random)", ("random", "ridge"), only=REGRESSOR
    )
    # -- curriculum
    curriculum: str = option(
        "curriculum", "none", "difficulty = the paper's curriculum (two trainings, the second from easy to "
        "hard); lerac, cbs = the compared methods of table 7", ("none", "difficulty", "lerac", "cbs")
    )
    chunks: str = option(
        "curriculum", "thirds", "how samples are split into easy, medium and hard: equal thirds, or two "
        "cosine thresholds", ("thirds", "thresholds"), only=DIFFICULTY
    )
    order: str = option(
        "curriculum", "easy-first", "order of the chunks: easy-first = the paper's; controls: hard-first; "
        "shuffled = by the scores of other samples; mixed = each sample as often as easy-first, in one stage",
        ("easy-first", "hard-first", "shuffled", "mixed"), only=DIFFICULTY
    )
    # Paper: "a significant portion" and "a small subset".
    easy_share: float = option(
        "curriculum", 0.5, "with --chunks thresholds: share of samples that are easy", above=0, most=1,
        only=THRESHOLDS
    )
    hard_share: float = option(
        "curriculum", 0.1, "with --chunks thresholds: share of samples that are hard", least=0, below=1,
        only=THRESHOLDS
    )
    record_cosines: bool = option(
        "curriculum", False, "record each training sample's cosine after every epoch, as phase 1 of the "
        "curriculum does"
    )
    difficulty_by: str = option(
        "curriculum", "likelihood", "captioners: the score of a training sample in phase 1: likelihood = the "
        "true prompt's mean token likelihood; caption = the cosine of the sentence embeddings of the prompt "
        "and of a greedy caption, the paper's words", ("likelihood", "caption"), only=CAPTIONER
    )
    phase_1: str | None = option(
        "curriculum", None, "skip phase 1 and reuse the cosines of this run (same pairs and split, trained "
        "with --record-cosines)", only=DIFFICULTY
    )
    epoch_weights: str | None = option(
        "curriculum", None, "weights of phase 1's epochs in the mean cosine, e.g. 0,0,0,.2,.3,.5, the "
        "authors' code (default: equal, the paper's)", only=DIFFICULTY
    )
    lerac_epochs: float = option(
        "curriculum", 1.0, "epochs until LeRaC's learning rates meet; with --head-lr the last norm and the "
        "heads do not take part, as its authors train a pretrained transformer", above=0, only=LERAC
    )
    lerac_min_lr: float = option(
        "curriculum", 1e-8, "LeRaC: first learning rate of the output layer (input layer: --lr)", above=0,
        only=LERAC
    )
    cbs_every: float | None = option(
        "curriculum", None, "epochs after which CBS multiplies sigma by 0.9; 5 in its authors' code "
        "(default: a twentieth of the run, so that smoothing also ends in short runs)", above=0, only=CBS
    )
    # -- optimisation
    recipe: str = option(
        "optimisation", "default", "where the unset flags come from: default = the defaults stated here; "
        "paper = the paper's training, also for miniatures: 3 epochs, heads that start at random and learn "
        "at --lr, the U-Net's middle block", ("default", "paper")
    )
    epochs: int | None = option(
        "optimisation", None, "passes over the training pairs (default: 4 or 6 for miniatures, else 3, "
        "the paper's)", least=1, most=10**6
    )
    batch_size: int | None = option(
        "optimisation", None, "samples per step over all processes (default: 32 for miniatures, else 64, "
        "the paper's)", least=1, most=10**6
    )
    accumulate: int = option(
        "optimisation", 1, "gradient accumulation: micro-batches per step and process", least=1,
        most=10**6
    )
    optimizer: str | None = option(
        "optimisation", None, "adam (paper) or adamw (authors' code) (default: adam; captioners: adamw)",
        ("adam", "adamw")
    )
    lr: float | None = option(
        "optimisation", None, "peak learning rate of the cosine schedule (default: 3e-4 to 2e-3 for "
        "miniatures, blip-mini 1e-4, else 1e-4, the paper's; captioners 1e-5, blip-large 2e-6, by their "
        "authors)",
        above=0, most=1e3
    )
    head_lr: float | None = option(
        "optimisation", None, "peak learning rate of the embedding head (default: 5e-5 for miniatures, "
        "whose head starts at ridge regression, else --lr)",
        above=0, most=1e3, only=REGRESSOR
    )
    layer_decay: float | None = option(
        "optimisation", None, "factor between the learning rates of neighbouring blocks, falling towards the "
        "input; 1 = one rate for all (default: 1; miniatures: as in the sweep)", above=0, most=1,
        only=REGRESSOR
    )
    weight_decay: float | None = option(
        "optimisation", None, "weight decay of adamw, or L2 penalty of adam (default: 0; captioners: 0.05)",
        least=0, most=1e3
    )
    clip_norm: float = option("optimisation", 1.0, "gradient clipping norm; 0 = no clipping", least=0)
    mlc_weight: float = option(
        "optimisation", 0.1, "lambda of equation (4)", least=0, most=1e6, only=VOCABULARY_HEAD
    )
    # -- machine
    device: str = option("machine", "auto", "auto, cpu, cuda")
    precision: str = option(
        "machine", "auto", "of training and, on CUDA, of the cached latents, caption states and black boxes' "
        "features: auto = bf16 on CUDA, float32 on the CPU", ("auto", "float32", "bf16")
    )
    compile: bool = option("machine", False, "torch.compile the regressor")
    activation_checkpointing: bool = option(
        "machine", False, "recompute activations in the backward pass to save memory", only=REGRESSOR
    )
    workers: int | None = option(
        "machine", None, "processes that read images, for each training process (default: 0 where all inputs "
        "are cached or reading an image takes less than 1 ms on a GPU, 20 ms on a CPU; else the machine's "
        "cores / training processes)", least=0, most=1024
    )
    checkpoint_every: int = option("machine", 100, "optimizer steps between checkpoints", least=1, most=10**9)
    # fmt: on

    def __post_init__(self) -> None:
        for name, rule in rules().items():
            if not rule.fits(getattr(self, name)):
                raise data.DataError(f"{flag_of(name)} {getattr(self, name)}: must be {rule.words}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def type_of(name: str) -> type:
    """The type of a field's values other than None."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return next(t for t in (typing.get_args(hint) or (hint,)) if t is not type(None))


@functools.cache
def rules() -> dict[str, Rule]:
    """The values that each field may have; None where it is the default."""
    found = {}
    for f in dataclasses.fields(TrainConfig):
        kind, choices = type_of(f.name), f.metadata["choices"]
        usual = {bool: FLAG, str: TEXT}.get(kind) or number(kind, **f.metadata["bounds"])
        rule = one_of(*choices) if choices else usual
        rule = rule | NULL if f.default is None else rule
        found[f.name] = rule.or_else(f.default) if f.name in ADDED else rule
    return found


SIDE = number(int, 1, 2**13)
PREPROCESSING = {
    "size": many(SIDE, 2, 2), "resize": SIDE | many(SIDE, 2, 2) | NULL, "filter": TEXT, "rules": TEXT,
    "mean": many(number(), 3, 3), "std": many(number(above=0), 3, 3), "squash": FLAG,
}  # fmt: skip


def is_preprocessing(values: Any) -> bool:
    """Whether these are the fields of a data.Preprocessing, and fit one another."""
    try:
        return record(PREPROCESSING).fits(values) and bool(data.Preprocessing(**values))
    except (TypeError, ValueError):
        return False


def read_run(folder: Path) -> dict[str, Any]:
    """A run's config.json, under today's names: TrainConfig's fields, `model`, `preprocessing` (see
    `write_run`), `vocabulary`, the hash of its words, and `origin`, those of what made the inputs (None in
    older runs), and, of --curriculum cbs, `smoothing`. Raises data.DataError if the folder is not a run."""
    path = folder / "config.json"
    if not path.is_file():
        raise data.DataError(f"{folder}: not a run of train.py (no config.json); give a run's folder")
    saved = read_json(path)
    values = {RENAMED.get(name, name): value for name, value in saved.items()}
    if len(values) < len(saved):
        raise data.DataError(f"{path}: a field stands in it under an older name too ({RENAMED}); remove one")
    preprocessing = Rule("a data.Preprocessing, as train.py wrote it", is_preprocessing)
    derived = {"model": OBJECT, "preprocessing": preprocessing, "smoothing": number(least=0).or_else(None)}
    derived |= {"vocabulary": (TEXT | NULL).or_else(None), "origin": (OBJECT | NULL).or_else(None)}
    content = checked(values, rules() | derived, path, closed=True)
    white_box = READERS[content["backbone"]].white_box
    resolved = {"weights", *PAPER_DEFAULTS} - ADDED - set(() if white_box else WHITE_BOX_FIELDS)
    check(content, dict.fromkeys(resolved, Rule("stated", lambda value: value is not None)), path)
    sides = [side for name, side in content["model"].items() if name.endswith(("img_size", "image_size"))]
    if sides and list(content["preprocessing"]["size"]) not in (sides[0], [sides[0]] * 2):
        raise data.DataError(f"{path}: preprocessing makes pictures of another size than the model reads")
    return content


# Paper: three epochs of batches of 64 (section 4.2); a schedule and a limit on the gradient's norm are not
# stated. 1e-4 with cosine decay is the authors' code's.
PAPER_DEFAULTS = {
    "epochs": 3, "batch_size": 64, "lr": 1e-4, "head_start": "random", "heads": 3, "optimizer": "adam",
    "weight_decay": 0.0,
    "image_size": 256, "captions": "blip-base", "unet_features": "middle", "layer_decay": 1.0,
}  # fmt: skip
# Chosen on validation: results/table-sweep.json.
CHOSEN = {
    "clip-mini": {"epochs": 6, "head_lr": 5e-05, "layer_decay": 1.0, "lr": 0.0003},
    "sd-mini": {"epochs": 4, "head_lr": 5e-05, "layer_decay": 1.0, "lr": 0.002},
    "swin-mini": {"epochs": 4, "head_lr": 5e-05, "layer_decay": 1.0, "lr": 0.001},
    "vit-mini": {"epochs": 4, "head_lr": 5e-05, "layer_decay": 1.0, "lr": 0.001},
}
MINI_DEFAULTS = {"epochs": 4, "batch_size": 32, "lr": 1e-3, "head_start": "ridge", "head_lr": 5e-5}
SD_MINI_DEFAULTS = {"image_size": 64, "captions": "blip-mini", "unet_features": "levels"}
PAPER_RECIPE = {name: PAPER_DEFAULTS[name] for name in ("epochs", "head_start", "unet_features")}
PAPER_RECIPE |= {"head_lr": None, "layer_decay": 1.0}
SOURCE_DEFAULTS = {source: MINI_DEFAULTS | chosen for source, chosen in CHOSEN.items()}
SOURCE_DEFAULTS["sd-mini"] |= SD_MINI_DEFAULTS  # also of a folder of this name
WHITE_BOX_FIELDS = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["only"] == WHITE_BOX}
# Paper: only that BLIP and BLIP-2 are fine-tuned. Optimizer, weight decay (of all parameters) and rates are
# those of their fine-tuning on COCO (salesforce/BLIP and LAVIS), without its random crops and flips, since
# prompts may name positions, and without dropout.
CAPTIONER_DEFAULTS = {"heads": 1, "optimizer": "adamw", "weight_decay": 0.05, "lr": 1e-5}
MINI_CAPTIONER = {"epochs": 6, "batch_size": 32, "lr": 1e-3}
# At 1e-3 blip-mini, which has been trained on prompts, is worse on validation after an epoch than before.
CAPTIONER_SOURCES = {"blip-large": {"lr": 2e-6}, "blip-mini": MINI_CAPTIONER | {"lr": 1e-4, "epochs": 3}}


def defaults_of(config: TrainConfig, source: str) -> dict[str, Any]:
    """The defaults of the unset fields for the weights `source`."""
    backbone, name = READERS[config.backbone], Path(source).name
    mini = name.endswith("-mini")
    if config.backbone in CAPTIONERS:
        own = CAPTIONER_SOURCES.get(name, MINI_CAPTIONER if mini else {})
        defaults = PAPER_DEFAULTS | CAPTIONER_DEFAULTS | own
    else:
        defaults = PAPER_DEFAULTS | SOURCE_DEFAULTS.get(name, MINI_DEFAULTS if mini else {})
    if config.recipe == "paper":
        defaults |= PAPER_RECIPE
    if not backbone.white_box:
        defaults = {k: v for k, v in defaults.items() if k not in WHITE_BOX_FIELDS}
    if config.curriculum == "lerac":  # it sets the rates of all layers
        defaults |= {"head_lr": None, "layer_decay": 1.0}
    return defaults


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with the defaults for its `weights` in place of None.

    Raises data.DataError for flags that conflict or have no effect.
    """
    source = config.weights or READERS[config.backbone].mini
    defaults = defaults_of(config, source)
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, weights=source, **unset)
    defaults = {f.name: f.default for f in dataclasses.fields(config)} | defaults
    for name, reason in without_effect(vars(config)).items():
        if getattr(config, name) != defaults[name]:
            raise data.DataError(f"{flag_of(name)}: {reason}; leave it out")
    for message, occurs in conflicts(config).items():
        if occurs:
            raise data.DataError(message)
    return config


def without_effect(fields: Mapping[str, Any]) -> dict[str, str]:
    """The fields that have no effect beside the others, e.g. lerac_epochs without LeRaC, with the reason."""
    values, found = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | dict(fields), {}
    for f in dataclasses.fields(TrainConfig):
        other, needed = f.metadata["only"] or (f.name, (values[f.name],))
        if f.name in fields and values[other] not in needed:
            found[f.name] = f"only {flag_of(other)} {', '.join(map(str, needed))} uses it"
            values[f.name] = f.default
    return found


def conflicts(c: TrainConfig) -> dict[str, Any]:
    """Whether each conflict between flags of a resolved configuration occurs, by its message."""
    weights, lerac, compared = epoch_weights(c) or [], c.curriculum == "lerac", f"--curriculum {c.curriculum}"
    captioner = c.backbone in CAPTIONERS
    recorded = c.phase_1 and (Path(c.phase_1) / "cosines.npy").is_file()
    # fmt: off
    return {
        f"--phase-1 {c.phase_1}: {NO_COSINES}": c.phase_1 and not recorded,
        f"--epoch-weights: {len(weights)} weights for {c.epochs} epochs; give one for each":
            weights and not c.phase_1 and len(weights) != c.epochs,
        "--order mixed: needs --chunks thirds": c.order == "mixed" and c.chunks != "thirds",
        "--easy-share and --hard-share: together they are at most 1": c.easy_share + c.hard_share > 1,
        f"{compared}: needs blocks that train; leave out --train-blocks 0":
            c.curriculum in ("lerac", "cbs") and c.train_blocks == 0,
        f"{compared}: sets the rates of all layers; remove --layer-decay": lerac and c.layer_decay != 1,
        f"--lerac-min-lr: must be at most --lr, {c.lr:g}": lerac and c.lerac_min_lr > c.lr,
        f"--lerac-epochs: must be below --epochs, {c.epochs}, when the rate is 0":
            lerac and c.lerac_epochs >= c.epochs,
        "--random-start: trains all blocks; remove --train-blocks":
            c.random_start and c.train_blocks is not None,
        f"--image-size {c.image_size}: must be a multiple of 8, the latents' grid":
            c.image_size and c.image_size % 8,
        f"--heads {c.heads}: a captioner has no embedding head; give 0 or 1": captioner and c.heads > 1,
        f"{compared}: not for captioners; give none or difficulty":
            captioner and c.curriculum in ("lerac", "cbs"),
    }
    # fmt: on


NO_COSINES = "has no recorded cosines; give a finished run trained with --record-cosines"


def epoch_weights(config: TrainConfig) -> list[float] | None:
    """The --epoch-weights as numbers; None = equal weights."""
    if config.epoch_weights is None:
        return None
    try:
        weights = [float(weight) for weight in config.epoch_weights.split(",")]
    except ValueError:
        weights = []
    if not weights or not min(weights) >= 0 or not 0 < sum(weights) < math.inf:
        raise data.DataError(
            f"--epoch-weights {config.epoch_weights}: must be numbers of at least 0, not all 0, separated by "
            "commas"
        )
    return weights


def parse_args(argv: list[str], description: str) -> tuple[dict[str, Any], Path | None, Path | None]:
    """(flags by name, folder of --out, folder of --resume) from the command line; `plan` and `memory` are the
    only flags that are no fields."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    for f in dataclasses.fields(TrainConfig):
        group, kind, help = groups[f.metadata["group"]], type_of(f.name), f.metadata["help"]
        default = "" if f.default is None else f" (default: {f.default})"
        if kind is bool:
            group.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=help + default)
        else:
            choices = f.metadata["choices"] or None
            kind = text if kind is str else kind
            group.add_argument(flag_of(f.name), type=kind, choices=choices, help=help + default)
    folder = parser.add_argument_group("folder")
    folder.add_argument(
        "--out", type=Path, help="the run's folder (default: runs/BACKBONE-DATA[-CURRICULUM]-seedN)"
    )
    folder.add_argument("--resume", type=Path, help="continue the run in this folder")
    plan = parser.add_argument_group("plan", "what the run would need, without starting it")
    plan.add_argument(
        "--plan",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print pairs, steps, sizes of caches, memory of a step",
    )
    kind = number_of(float, 0, 1e6)
    plan.add_argument("--memory", type=kind, help="with --plan: a card's GiB (default: the device's own)")
    flags = vars(parser.parse_args(argv))
    out, resume = flags.pop("out", None), flags.pop("resume", None)
    if "memory" in flags and not (flags.get("plan") and flags["memory"]):
        parser.error("--memory: takes GiB above 0, with --plan")
    if resume and (out or flags.keys() - RESUMABLE - {"plan", "memory"}):
        parser.error(f"--resume uses the run's configuration; the only other flags are {sorted(RESUMABLE)}")
    return flags, out, resume
