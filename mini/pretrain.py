"""Trains the parts of the miniature Stable Diffusion, `sd-mini`, from scratch on mini scenes.

    python -m mini.pretrain tokenizer        the byte-level BPE vocabulary of the text tower, CLIP's format
    python -m mini.pretrain vae              the autoencoder: 64 px pictures <-> 8 x 8 latents
    python -m mini.pretrain vocabulary       the words of the miniature captioner, `blip-mini`, BERT's format
    python -m mini.pretrain captioner        blip-mini itself: 64 px pictures -> prompts, to mini/blip-mini/

Each part is written to mini/sd-mini/<part>/ as a diffusers folder holds it, beside a card.json with the
command, seed, steps, time, data and quality. Training that was stopped resumes from its last checkpoint when
the same command runs again. The pictures are drawn with a seed of their own, so that no scene of the default
data set is among them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import string
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from tqdm import tqdm

import baselines
import weights
from data import Preprocessing, atomic_write, image_tensor, read_pairs
from mini import scenes
from models import blip, clip, vae

log = logging.getLogger("pretrain")
FOLDER = Path(__file__).parent / "sd-mini"
SCENES_SEED = 1_000_003  # the default data set is drawn with seed 0
HELD_OUT = 500  # pictures on which the quality is measured
CHECKPOINT_EVERY = 500  # steps


def training_scenes(parts: int) -> Path:
    """Draw `parts` thousand scenes into the cache, unless they are there."""
    folder = weights.cache_dir() / f"pretrain-scenes-{scenes.VERSION}"
    scenes.build(folder, parts=parts, seed=SCENES_SEED)
    return folder


def write_card(part: str, card: dict) -> None:
    atomic_write(FOLDER / part / "card.json", json.dumps(card | {"date": str(date.today())}, indent=1) + "\n")


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
    tokenizer.train_from_iterator(read_pairs(training_scenes(parts)).prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in tokens]
    tokens = tokens[: size - 2] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [pair for pair in merges if pair[0] + pair[1] in vocabulary]
    folder = FOLDER / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "vocab.json", json.dumps(vocabulary))
    atomic_write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=1))
    write_card(
        "tokenizer",
        {
            "command": "python -m mini.pretrain tokenizer",
            "data": f"{parts},000 mini prompts",
            "tokens": len(vocabulary),
            "merges": len(merges),
        },
    )


# ------------------------------------------------------------------------------------------------------------
# autoencoder
# ------------------------------------------------------------------------------------------------------------


def load_images(folder: Path) -> Tensor:
    """All pictures of a folder of parts as uint8 (n, 3, 64, 64)."""
    pairs = read_pairs(folder)
    tensors = (image_tensor(pairs.image(i), Preprocessing.square(64)) for i in range(len(pairs)))
    return torch.stack([((x + 1) * 127.5).round().to(torch.uint8) for x in tqdm(tensors, "read", len(pairs))])


def reconstruction_loss(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Absolute error of pixels, and of their differences to the right and downwards, for sharp edges."""
    loss = F.l1_loss(rebuilt, images)
    for dim in (2, 3):
        loss = loss + 0.5 * F.l1_loss(rebuilt.diff(dim=dim), images.diff(dim=dim))
    return loss


def train_vae(
    parts: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    further: bool = False,
    kl_weight: float = 1e-6,
) -> None:
    """Pixel and edge error plus a slight pull of the posterior towards a unit Gaussian, as in latent
    diffusion.

    Source: Rombach et al. 2022, section 3.1 and its appendix G; without the perceptual and adversarial
    terms, which want a pretrained network and, on drawings of 64 px, little is left for them to mend.
    """
    torch.manual_seed(seed)
    model = weights.load("vae", "sd-mini") if further else vae.VAE(vae.CONFIGS["sd-mini"])
    model.train()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-8)
    images = load_images(training_scenes(parts))
    images, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
    checkpoint = weights.cache_dir() / "pretrain-vae"
    step, seconds = 0, 0.0
    if (checkpoint / "state.json").exists():
        state = json.loads((checkpoint / "state.json").read_text())
        step, seconds = state["step"], state["seconds"]
        tensors = load_file(checkpoint / f"{step}.safetensors")
        model.load_state_dict({k: tensors[f"model.{k}"] for k in model.state_dict()})
        average = {k: tensors[f"average.{k}"] for k in average}
        slots = optimizer.state_dict()
        slots["state"] = {
            i: {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{k}"],
                "exp_avg_sq": tensors[f"second.{k}"],
            }
            for i, k in enumerate(average)
        }
        optimizer.load_state_dict(slots)
        log.info("resumed at step %d", step)

    def save_checkpoint() -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in average.items()}
        for name, p in model.named_parameters():
            tensors |= {
                f"first.{name}": optimizer.state[p]["exp_avg"],
                f"second.{name}": optimizer.state[p]["exp_avg_sq"],
            }
        save_file(tensors, checkpoint / f"{step}.safetensors")
        atomic_write(checkpoint / "state.json", json.dumps({"step": step, "seconds": seconds}))
        for old in checkpoint.glob("*.safetensors"):
            if old.stem != str(step):
                old.unlink()

    started = time.monotonic()
    bar = tqdm(total=steps, initial=step, desc="vae")
    while step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = images[torch.randint(len(images), (batch_size,), generator=generator)].float() / 127.5 - 1
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        mean, logvar = model.moments(x)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        reconstruction = reconstruction_loss(x, model.decode(latents))
        loss = reconstruction + kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{reconstruction.item():.4f}", kl=f"{kl.item():.0f}")
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            seconds, started = seconds + time.monotonic() - started, time.monotonic()
            save_checkpoint()

    model.load_state_dict(average)
    card = {
        "command": f"python -m mini.pretrain vae --steps {steps}" + " --further" * further,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "minutes": round(seconds / 60, 1),
        "data": f"{len(images):,} mini scenes, version {scenes.VERSION}, seed {SCENES_SEED}",
        **vae_quality(model, held_out),
    }
    if further:
        card["before"] = json.loads((FOLDER / "vae" / "card.json").read_text())
    config = replace(model.config, scale_factor=round(1 / card["latent_deviation"], 5))
    write_vae(model, config)
    write_card("vae", card)
    shutil.rmtree(checkpoint)


@torch.no_grad()
def vae_quality(model: vae.VAE, held_out: Tensor) -> dict:
    """Mean peak signal-to-noise ratio (dB) on pictures held out, and the deviation of their latents."""
    errors, latents = [], []
    for batch in held_out.split(50):
        x = batch.float() / 127.5 - 1
        z = model.encode(x)
        errors.append((model.decode(z).clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)))
        latents.append(z)
    psnr = -10 * torch.log10(torch.cat(errors) / 4)  # the range of [-1, 1] is 2
    return {
        "psnr_db": round(psnr.mean().item(), 2),
        "latent_deviation": round(torch.cat(latents).std().item(), 4),
    }


def write_vae(model: vae.VAE, config: vae.VAEConfig) -> None:
    """Write mini/sd-mini/vae as diffusers would: config.json and half-precision safetensors."""
    (FOLDER / "vae").mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in weights.from_home("vae", model.state_dict()).items()}
    atomic_write(
        FOLDER / "vae" / "diffusion_pytorch_model.safetensors", save(tensors, metadata={"format": "pt"})
    )
    sizes = asdict(config)
    channels = [sizes["ch"] * mult for mult in sizes["ch_mult"]]
    atomic_write(
        FOLDER / "vae" / "config.json",
        json.dumps(
            {
                "_class_name": "AutoencoderKL",
                "act_fn": "silu",
                "block_out_channels": channels,
                "down_block_types": ["DownEncoderBlock2D"] * len(channels),
                "in_channels": sizes["in_channels"],
                "latent_channels": sizes["z_channels"],
                "layers_per_block": sizes["num_res_blocks"],
                "norm_num_groups": sizes["norm_groups"],
                "out_channels": sizes["out_ch"],
                "sample_size": 64,
                "scaling_factor": sizes["scale_factor"],
                "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            },
            indent=1,
        )
        + "\n",
    )


# ------------------------------------------------------------------------------------------------------------
# captioner
# ------------------------------------------------------------------------------------------------------------


def write_vocabulary(parts: int) -> None:
    """Write blip-mini's words, as bert-base-uncased's vocab.txt has them, and what else its folder states.

    Special tokens, [unused] ones, single characters, ## characters that go on a word, so that any English
    text can be spelled, and whole words, the most frequent of mini prompts first. [DEC] and [ENC], BLIP's
    own, stand behind them in no file.
    """
    config, folder = blip.CONFIGS["blip-mini"], baselines.BLIP_MINI
    lower, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    prompts = [lower.normalize_str(prompt) for prompt in read_pairs(training_scenes(parts)).prompts]
    counts = Counter(word for prompt in prompts for word, _ in split.pre_tokenize_str(prompt))
    letters = string.digits + string.ascii_lowercase
    tokens = [*letters, *string.punctuation, *("##" + letter for letter in letters), "picture"]
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    tokens += [word for word in ranked if word not in tokens]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    free = config.text_vocab_size - 2 - len(special) - len(tokens)
    unused = [f"[unused{i}]" for i in range(free)]
    tokens = (special + unused + tokens)[: config.text_vocab_size - 2]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "vocab.txt", "".join(f"{token}\n" for token in tokens))
    side = config.vision_image_size
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    atomic_write(folder / "preprocessor_config.json", json.dumps(settings, indent=1) + "\n")


def train_captioner(parts: int, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Train blip-mini from random values by `baselines.finetune_captioner`, and write its folder.

    Beside its loss the card states what it is good for: the mean cosine between the sentence embeddings of
    what it writes of pictures held out and of their true prompts, and that of one answer for all of them.
    """
    config = replace(
        baselines.CAPTIONERS["blip-mini"], epochs=epochs, batch_size=batch_size, lr=lr, seed=seed
    )
    model, how = baselines.new_captioner(seed)
    pairs = read_pairs(training_scenes(parts))
    rows = np.arange(len(pairs))
    splits = {"train": rows[:-HELD_OUT], "val": rows[-HELD_OUT:]}
    folder = weights.cache_dir() / "pretrain-captioner"
    baselines.finetune_captioner(model, how, config, pairs, splits, folder)
    baselines.write_captioner(model, baselines.BLIP_MINI, baselines.BLIP_MINI, torch.float16)

    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    held_out = pairs.subset(splits["val"])
    model, how, _ = baselines.open_captioner("blip-mini")  # as it was written
    written = baselines.written_prompts(model, how, config, held_out)
    minilm = weights.load("minilm")
    said, true = minilm.encode(written), minilm.encode(held_out.prompts)
    mean = minilm.encode(pairs.prompts[: 10 * HELD_OUT]).mean(dim=0, keepdim=True)
    card = {
        "command": f"python -m mini.pretrain captioner --parts {parts} --epochs {epochs} "
        f"--batch-size {batch_size} --lr {lr:g}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "minutes": round(sum(batch_size / speed for speed in speeds) / 60, 1),
        "data": f"{len(splits['train']):,} mini scenes, version {scenes.VERSION}, seed {SCENES_SEED}",
        "val_loss": round(entries[-1]["val_loss"], 4),
        "prompt_cosine": round(F.cosine_similarity(said, true).mean().item(), 4),
        "mean_embedding_cosine": round(F.cosine_similarity(mean, true).mean().item(), 4),
        "date": str(date.today()),
    }
    atomic_write(baselines.BLIP_MINI / "card.json", json.dumps(card, indent=1) + "\n")
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mini.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["tokenizer", "vae", "vocabulary", "captioner"])
    parser.add_argument("--parts", type=int, default=16, help="thousands of scenes to draw (default 16)")
    parser.add_argument(
        "--steps", type=int, default=6000, help="optimizer steps of the autoencoder (default 6000)"
    )
    parser.add_argument("--epochs", type=int, default=12, help="of the captioner (default 12)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak of the cosine schedule (default 1e-3)")
    parser.add_argument("--further", action="store_true", help="start from the weights that are there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    np.random.seed(args.seed)
    if args.part == "tokenizer":
        train_tokenizer(args.parts)
    elif args.part == "vocabulary":
        write_vocabulary(args.parts)
    elif args.part == "captioner":
        train_captioner(args.parts, args.epochs, args.batch_size, args.lr, args.seed)
    else:
        train_vae(args.parts, args.steps, args.batch_size, args.lr, args.seed, args.further)


if __name__ == "__main__":
    main()
