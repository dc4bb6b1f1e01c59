"""Training of the miniatures from scratch on mini scenes, in order; later parts use earlier ones.

    python -m mini.pretrain tokenizer        the byte-level BPE vocabulary of the text tower, CLIP's format
    python -m mini.pretrain vae              the autoencoder: 64 px pictures <-> 8 x 8 latents
    python -m mini.pretrain clip             both towers: clip-mini, and the text tower of sd-mini
    python -m mini.pretrain unet             sd-mini's U-Net, on latents and text states of vae and clip
    python -m mini.pretrain vit              vit-mini, a classifier of the things in a scene
    python -m mini.pretrain swin             swin-mini, likewise
    python -m mini.pretrain probe            the probe that judges generated pictures
    python -m mini.pretrain vocabulary       the words of the miniature captioner, `blip-mini`, BERT's format
    python -m mini.pretrain captioner        blip-mini itself: 64 px pictures -> prompts
    python -m mini.pretrain plain            blip-plain-mini, likewise, which never saw a prompt
    python -m mini.pretrain opt              the language model of blip2-mini, and its byte-level BPE
    python -m mini.pretrain qformer          blip2-mini's Q-Former, on blip-plain-mini's image half and opt

Each part is written under mini/ under its published names, beside a card.json with the command, seed, steps,
time, data and quality. Repeat a command to resume an interrupted training. The pictures show every word of
their prompts, and have their own seed. On two cores all of it takes about six hours; vae, unet and
probe-vit can also be trained on a GPU (--device cuda).

A second generator, with a seed of its own and sd-mini's text tower, in another folder:

    python -m mini.pretrain vae --seed 1 --folder second
    python -m mini.pretrain unet --seed 1 --folder second
    python -m mini.generated second/generated --weights second/sd-mini

A second probe, of another architecture, for the tables probe and difficulty; it is not shipped:

    python -m mini.pretrain probe-vit --seed 1 --folder second
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

import weights
from command import Parser, number, positive, run_command
from files import atomic_write, write_json
from mini import captioning, scenes
from mini.autoencoder import RECIPE as VAE_RECIPE
from mini.autoencoder import train_vae
from mini.contrastive import RECIPE as CLIP_RECIPE
from mini.contrastive import train_clip
from mini.diffusion import RECIPE as UNET_RECIPE
from mini.diffusion import train_unet
from mini.loop import (
    HELD_OUT,
    Recipe,
    checkpoint_folder,
    remove_checkpoint,
    training_pairs,
    training_world,
)
from mini.naming import RECIPE as NAMING_RECIPE
from mini.naming import train_namer
from mini.write import write_card
from models import blip, clip
from reverse_sd import Vocabulary
from training import captioner
from training.caption_trainer import CaptionerTrainer
from training.captions import written_prompts
from training.config import TrainConfig, resolve
from training.inputs import Distinct, Images, Prepared
from training.loop import Process

MINI = Path(__file__).parent
FOLDER = MINI / "sd-mini"


@dataclass(frozen=True)
class Part:
    """A part that `mini.loop.train` trains: its recipe, its function, and where its card goes."""

    recipe: Recipe
    train: Callable[..., dict]  # of folder, world, recipe, seed and, for the parts in MOVABLE, device
    card: str


PARTS = {
    "vae": Part(VAE_RECIPE, train_vae, "sd-mini/vae"),
    "clip": Part(CLIP_RECIPE, train_clip, "clip-mini"),
    "unet": Part(UNET_RECIPE, train_unet, "sd-mini/unet"),
    "vit": Part(NAMING_RECIPE, partial(train_namer, "vit"), "vit-mini"),
    "swin": Part(NAMING_RECIPE, partial(train_namer, "swin"), "swin-mini"),
    "probe": Part(replace(NAMING_RECIPE, steps=9000), partial(train_namer, "probe"), "probe"),
    "probe-vit": Part(replace(NAMING_RECIPE, steps=8000), partial(train_namer, "probe-vit"), "probe-vit"),
    "plain": Part(captioning.PLAIN_RECIPE, captioning.train_plain, captioning.PLAIN),
    "opt": Part(captioning.OPT_RECIPE, captioning.train_opt, captioning.BLIP_2),
    "qformer": Part(captioning.QFORMER_RECIPE, captioning.train_qformer, captioning.BLIP_2),
}


GENERATOR = ("vae", "unet")  # of a second generator too
MOVABLE = (*GENERATOR, "probe-vit")  # can be written elsewhere than mini/, and trained on a GPU


def data_text(n: int) -> str:
    return f"{n:,} truthful mini scenes, version {scenes.VERSION}, seed {scenes.PRETRAIN_SEED}"


def train_part(
    name: str, recipe: Recipe, parts: int, seed: int, folder: Path | None = None, device: str = "cpu"
) -> None:
    """Train a part, write it and its card into `folder` (None: mini/), and remove its checkpoint."""
    part, world, folder = PARTS[name], training_world(parts), folder or MINI
    if folder != MINI and name in GENERATOR:
        for shared in ("text_encoder", "tokenizer"):
            shutil.copytree(FOLDER / shared, folder / "sd-mini" / shared, dirs_exist_ok=True)
    quality = part.train(folder, world, recipe, seed, *((device,) if name in MOVABLE else ()))
    command = f"python -m mini.pretrain {name} --parts {parts} --steps {recipe.steps} "
    command += f"--batch-size {recipe.batch_size} --lr {recipe.lr:g} --seed {seed}"
    command += f" --folder {folder}" if folder != MINI else ""
    settings = {"steps": recipe.steps, "batch_size": recipe.batch_size, "seed": seed}
    write_card(folder / part.card, command, **settings, data=data_text(len(world) - HELD_OUT), **quality)
    remove_checkpoint(name)


def training_prompts(parts: int) -> list[str]:
    """The prompts of `parts` thousand scenes."""
    chosen = scenes.kept_indices(parts * 1000, scenes.PRETRAIN_SEED)
    return [scenes.candidate(scenes.PRETRAIN_SEED, index).prompt for index in chosen]


# ------------------------------------------------------------------------------------------------------------
# tokenizer
# ------------------------------------------------------------------------------------------------------------


def train_tokenizer(parts: int) -> None:
    """Learn CLIP's kind of vocabulary from mini prompts: bytes, bytes that end a word, merges, two marks."""
    size = clip.CONFIGS["sd-mini"].vocab_size
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(training_prompts(parts), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in tokens]
    tokens = tokens[: size - 2] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [pair for pair in merges if pair[0] + pair[1] in vocabulary]
    folder = FOLDER / "tokenizer"
    write_json(folder / "vocab.json", vocabulary)
    atomic_write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", settings)
    command, prompts = f"python -m mini.pretrain tokenizer --parts {parts}", f"{parts},000 mini prompts"
    write_card(folder, command, data=prompts, tokens=len(vocabulary), merges=len(merges))


# ------------------------------------------------------------------------------------------------------------
# captioner
# ------------------------------------------------------------------------------------------------------------


def write_vocabulary(parts: int) -> None:
    """Write blip-mini's words, those of mini prompts, and what else its folder states."""
    captioning.write_words(captioner.BLIP_MINI, training_prompts(parts), blip.CONFIGS["blip-mini"])


def train_captioner(parts: int, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Train blip-mini from scratch by `CaptionerTrainer`, and write its folder.

    The card also reports its quality: the mean cosine between the sentence embeddings of its captions of
    held-out pictures and of the true prompts, and that of one vector for all pictures.
    """
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    config = resolve(TrainConfig(backbone="blip", heads=0, clip_norm=0.0, device="cpu", **settings))
    model, preprocessing = captioner.new_captioner(seed)
    pairs = training_pairs(parts)
    rows = np.arange(len(pairs))
    splits = {"train": rows[:-HELD_OUT], "val": rows[-HELD_OUT:]}
    folder = checkpoint_folder("captioner")
    identity = hashlib.sha256("\n".join(pairs.prompts).encode()).hexdigest()
    inputs, unused = (Images(pairs, preprocessing),), Distinct(np.empty((0, 384)), rows)
    prepared = Prepared(pairs, splits, unused, inputs, preprocessing, identity)
    arguments = config, folder, Process(), prepared, Vocabulary([])
    CaptionerTrainer(*arguments, model=model).fit()
    captioner.write_captioner(model, captioner.BLIP_MINI, captioner.BLIP_MINI, torch.float16)

    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    held_out = pairs.subset(splits["val"])
    model, preprocessing, _ = captioner.open_captioner(str(captioner.BLIP_MINI))  # the float16 weights
    key = weights.fingerprint("blip", captioner.BLIP_MINI)
    written = written_prompts(captioner.Captioner("blip", model), key, preprocessing, held_out)
    minilm = weights.load("minilm")
    predicted, true = minilm.encode(written), minilm.encode(held_out.prompts)
    mean = minilm.encode(pairs.prompts[: 10 * HELD_OUT]).mean(dim=0, keepdim=True)
    command = f"python -m mini.pretrain captioner --parts {parts} --epochs {epochs} "
    command += f"--batch-size {batch_size} --lr {lr:g} --seed {seed}"
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "minutes": round(sum(batch_size / speed for speed in speeds) / 60, 1),
        "data": data_text(len(splits["train"])),
        "val_likelihood": round(entries[-1]["val_likelihood"], 4),
        "prompt_cosine": round(F.cosine_similarity(predicted, true).mean().item(), 4),
        "mean_embedding_cosine": round(F.cosine_similarity(mean, true).mean().item(), 4),
    }
    write_card(captioner.BLIP_MINI, command, **card)
    remove_checkpoint("captioner")


def main() -> None:
    parser = Parser(
        prog="python -m mini.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["tokenizer", *PARTS, "vocabulary", "captioner"])
    parser.add_argument("--parts", type=positive, default=48, help="thousands of scenes to draw (default 48)")
    parser.add_argument("--steps", type=positive, help="optimizer steps (default: the part's own)")
    parser.add_argument("--epochs", type=positive, default=12, help="of the captioner (default 12)")
    parser.add_argument("--batch-size", type=positive, help="(default: the part's own)")
    rate = number(float, 1e-12, 1e3)
    parser.add_argument("--lr", type=rate, help="peak of the schedule (default: the part's own)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    parser.add_argument(
        "--folder", type=Path, help=f"of {', '.join(MOVABLE)}: where they are written (default mini)"
    )
    parser.add_argument("--device", help=f"of {', '.join(MOVABLE)}: cpu or cuda (default cpu)")
    args = parser.parse_args()
    for name in ("folder", "device"):
        if getattr(args, name) and args.part not in MOVABLE:
            parser.error(f"argument --{name}: only {', '.join(MOVABLE)} have it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = {name: getattr(args, name) for name in ("steps", "batch_size", "lr")}
    flags = {name: value for name, value in flags.items() if value is not None}
    if args.part == "tokenizer":
        train_tokenizer(args.parts)
    elif args.part == "vocabulary":
        write_vocabulary(args.parts)
    elif args.part == "captioner":
        train_captioner(
            args.parts, args.epochs, flags.get("batch_size", 32), flags.get("lr", 1e-3), args.seed
        )
    else:
        recipe = replace(PARTS[args.part].recipe, **flags)
        device = weights.resolve_device(args.device or "cpu")
        train_part(args.part, recipe, args.parts, args.seed, args.folder, device)


if __name__ == "__main__":
    sys.exit(run_command(main, "stopped; repeat the command to resume"))
