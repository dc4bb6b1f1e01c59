"""Captioners that never saw a prompt: blip-plain-mini, and blip2-mini in two stages.

    python -m mini.pretrain plain|opt|qformer

blip-plain-mini is a BLIP of blip-mini's sizes, trained on plain descriptions of scenes (plain.py). blip2-mini
has its image half, frozen; a small OPT, trained on text alone and then frozen; and between them a Q-Former,
trained on plain descriptions. As in the published BLIP-2, only the language model has read all kinds of text,
prompts among it; fine-tuning teaches the captioner to write them.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn

import weights
from files import atomic_write, write_json
from mini import scenes
from mini.loop import HELD_OUT, MiniTrainer, Recipe, World, batch_of
from mini.pen import stream
from mini.plain import describe
from mini.write import write_preprocessor, write_tensors
from models import blip, blip2
from models.layers import Namespace
from weights.kinds import blip as blip_files
from weights.kinds import blip2 as blip2_files

PLAIN, BLIP_2 = "blip-plain-mini", "blip2-mini"
PLAIN_RECIPE = Recipe(steps=2500, batch_size=16, lr=1e-3, warmup=100, weight_decay=0.05)
OPT_RECIPE = Recipe(steps=2000, batch_size=16, lr=2e-3, warmup=100, weight_decay=0.05)
QFORMER_RECIPE = Recipe(steps=3000, batch_size=16, lr=2e-3, warmup=200, weight_decay=0.05)
PROMPT = "a picture of "  # of BLIP; BLIP-2 is trained and used without one
SMOOTHING = 0.1  # of labels, BLIP's
AT_ONCE = 50  # pictures captioned for the card


def count(module: nn.Module) -> int:
    """The number of its parameters."""
    return sum(p.numel() for p in module.parameters())


def padded(lines: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Lines of ids as a table (B, N), padded at the end."""
    return nn.utils.rnn.pad_sequence([torch.tensor(line) for line in lines], True, pad)


def following_loss(logits: Tensor, ids: Tensor, pad: int) -> Tensor:
    """The mean cross-entropy of ids (B, N) after the first, without padding; logits (B, N, V) of the token
    after each."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)


# ------------------------------------------------------------------------------------------------------------
# the captions' quality
# ------------------------------------------------------------------------------------------------------------


def caption_quality(model: nn.Module, world: World, **settings: int) -> dict[str, float]:
    """Of the held-out pictures: the share of subjects that the captions name, and mean cosines between
    sentence embeddings: captions and true prompts, plain descriptions and true prompts (the limit of such
    captions), captions and plain descriptions, one vector for all and true prompts.
    """
    images, views = world.images[-HELD_OUT:], world.views[-HELD_OUT:]
    written: list[str] = []
    for rows in torch.arange(len(images)).split(AT_ONCE):
        written += model.generate(batch_of(images, rows), **settings)
    named = [
        bool({thing.subject, scenes.PLURALS.get(thing.subject, thing.subject + "s")} & set(text.split()))
        for text, view in zip(written, views, strict=True)
        for thing in view.things
    ]
    encode = weights.load("minilm").encode
    captions, plain, prompts = map(encode, (written, list(map(describe, views)), world.prompts[-HELD_OUT:]))
    mean = encode(world.prompts[: 10 * HELD_OUT]).mean(dim=0, keepdim=True)
    cosines = {
        "prompt_cosine": (captions, prompts),
        "description_to_prompt_cosine": (plain, prompts),
        "description_cosine": (captions, plain),
        "mean_embedding_cosine": (mean, prompts),
    }
    measured = {name: round(F.cosine_similarity(*both).mean().item(), 4) for name, both in cosines.items()}
    return {"subjects_named": round(float(np.mean(named)), 4)} | measured


# ------------------------------------------------------------------------------------------------------------
# BLIP
# ------------------------------------------------------------------------------------------------------------


def write_words(folder: Path, texts: Iterable[str], config: blip.BLIPConfig) -> None:
    """Write the words of a BLIP, as bert-base-uncased's vocab.txt has them, and its pictures' settings.

    Special tokens, [unused] ones, single characters, ## characters that go on a word, so that any English
    text can be spelled, and whole words, the most frequent of `texts` first. [DEC] and [ENC], BLIP's own,
    stand behind them in no file.
    """
    lower, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))
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
    write_preprocessor(folder, config.vision_image_size)


# Names of vit-mini, timm's, and those of BLIP's image half
VIT_NAMES = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", "norm1": "layer_norm1",
    "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
}  # fmt: skip


def start_from_vit(vision: nn.Module) -> None:
    """Give BLIP's image half the values of vit-mini's first layers; its last norm stays new. BLIP's
    starts from a ViT that classifies ImageNet; vit-mini classifies the things in a picture."""
    wanted = vision.state_dict()
    for theirs, tensor in weights.load("vit", "vit-mini").state_dict().items():
        name = theirs
        for old, new in VIT_NAMES.items():
            name = name.replace(old, new)
        if name in wanted:
            wanted[name] = tensor
    vision.load_state_dict(wanted)


def train_plain(folder: Path, world: World, recipe: Recipe, seed: int) -> dict:
    """The card's fields; trains blip-plain-mini on plain descriptions and writes it to folder/."""
    folder, n, config = folder / PLAIN, len(world) - HELD_OUT, blip.CONFIGS[PLAIN]
    texts = [describe(view) for view in world.views]
    write_words(folder, texts[:n], config)
    torch.manual_seed(seed)
    model = blip.BLIP(config, blip_files.load_tokenizer(folder))
    start_from_vit(model.vision_model)
    begin, end, pad = config.text_bos_token_id, config.text_sep_token_id, config.text_pad_token_id
    lines = model.tokenizer.encode_batch([PROMPT + text for text in texts], add_special_tokens=False)
    lines = [[begin, *line.ids, end] for line in lines]
    n_prompt = 1 + len(model.tokenizer.encode(PROMPT, add_special_tokens=False).ids)

    def loss(rows: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        ids = padded([lines[i] for i in rows], pad)
        losses = model.loss(batch_of(world.images, rows), ids, n_prompt, SMOOTHING)
        counts = (ids != pad).sum(dim=1) - n_prompt
        return {"loss": (losses * counts).sum() / counts.sum()}  # the mean over all tokens, BLIP's

    minutes = MiniTrainer("plain", model, loss, n, recipe, seed).fit()
    tensors = weights.from_home("blip", model.state_dict(), "hf")
    write_tensors(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", blip_files.published(config))
    quality = caption_quality(weights.load("blip", folder), world, max_length=40)
    return {"parameters": count(model), "minutes": round(minutes, 1)} | quality


# ------------------------------------------------------------------------------------------------------------
# BLIP-2's language model
# ------------------------------------------------------------------------------------------------------------


def write_byte_pairs(folder: Path, texts: Iterable[str], size: int) -> None:
    """Write OPT's kind of vocabulary: four special tokens, bytes, and merges until each word of `texts` is
    one token, at most `size` in all."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", blip2_files.PAD, blip2_files.BEGIN, "<unk>"]  # 0 to 3
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    atomic_write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), blip2_files.BEGIN)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False}
    write_json(folder / "tokenizer_config.json", settings | marks | {"pad_token": blip2_files.PAD})


def documents(world: World, seed: int) -> list[list[str]]:
    """Three lines of text for each scene: its prompt, the same in other words, and its plain description.

    A language model learns to use its context from lines about one scene; the Q-Former's outputs become such
    a context. From single prompts it would learn to ignore all but the last few words.
    """
    other = [
        scenes.say(scenes.choose_words(view, rng), rng)
        for view, rng in ((view, stream(seed, i)) for i, view in enumerate(world.views))
    ]
    plain = [describe(view) for view in world.views]
    return [list(lines) for lines in zip(world.prompts, other, plain, strict=True)]


def train_opt(folder: Path, world: World, recipe: Recipe, seed: int) -> dict:
    """The card's fields; trains the tokenizer and the language model of blip2-mini on text alone and writes
    them to folder/, beside an image half and a Q-Former of random values."""
    folder, n, config = folder / BLIP_2, len(world) - HELD_OUT, blip2.CONFIGS[BLIP_2]
    texts = documents(world, seed)
    write_byte_pairs(folder, chain(*texts[:n]), config.text_vocab_size - 1)
    write_preprocessor(folder, config.vision_image_size)
    torch.manual_seed(seed)
    model = blip2.BLIP2(config, blip2_files.load_tokenizer(folder))
    encoded = model.tokenizer.encode_batch(list(chain(*texts)), add_special_tokens=False)
    lines = [[*line.ids, config.text_eos_token_id] for line in encoded]
    begin, pad, size = config.text_bos_token_id, config.text_pad_token_id, len(texts[0])

    def loss(rows: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        orders = [torch.randperm(size, generator=generator) for _ in rows]
        whole = [
            [begin, *(token for k in order for token in lines[size * i + k])]
            for i, order in zip(rows.tolist(), (order.tolist() for order in orders), strict=True)
        ]
        ids = padded(whole, pad)
        return {"loss": following_loss(text_logits(model, ids), ids, pad)}

    language = model.language_model
    minutes = MiniTrainer("opt", language, loss, n, recipe, seed).fit()
    write_blip2(model, folder)
    sizes = {"parameters": count(language), "tokens": model.tokenizer.get_vocab_size()}
    return sizes | {"minutes": round(minutes, 1)} | text_quality(model, texts[n:])


def text_logits(model: blip2.BLIP2, ids: Tensor) -> Tensor:
    """The language model's logits (B, N, V) of the token after each of ids (B, N), without an image."""
    none = torch.empty(len(ids), 0, model.config.text_hidden_size)
    return model._logits(model._states(ids, None, none)[0])


@torch.no_grad()
def text_quality(model: blip2.BLIP2, texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Cross-entropy per token, in nats, of prompts alone and of prompts after their scene's description."""
    config, encode = model.config, model.tokenizer.encode
    begin, end, pad = config.text_bos_token_id, config.text_eos_token_id, config.text_pad_token_id
    measured = {}
    for name, context in (("nats_alone", False), ("nats_after_description", True)):
        lines, starts = [], []
        for prompt, _, plain in texts:
            before = [begin, *encode(plain, add_special_tokens=False).ids, end] if context else [begin]
            starts.append(len(before))
            lines.append([*before, *encode(prompt, add_special_tokens=False).ids, end])
        ids = padded(lines, pad)
        logits = text_logits(model, ids)
        wanted = torch.arange(ids.shape[1]) < torch.tensor(starts)[:, None]
        measured[name] = round(following_loss(logits, ids.masked_fill(wanted, pad), pad).item(), 4)
    return measured


# ------------------------------------------------------------------------------------------------------------
# BLIP-2's Q-Former
# ------------------------------------------------------------------------------------------------------------


def image_half(source: blip.BLIP) -> dict[str, Tensor]:
    """BLIP's image half as BLIP-2's: the keys' bias, which cancels in the softmax, becomes 0."""
    tensors = source.vision_model.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias"):
            queries, keys, values = tensor.chunk(3)
            tensors[name] = torch.cat([queries, torch.zeros_like(keys), values])
    return tensors


def train_qformer(folder: Path, world: World, recipe: Recipe, seed: int) -> dict:
    """The card's fields; trains the Q-Former of blip2-mini, its queries and its projection on plain
    descriptions, between the image half of blip-plain-mini and the language model in folder/, both frozen."""
    plain, folder, n, config = folder / PLAIN, folder / BLIP_2, len(world) - HELD_OUT, blip2.CONFIGS[BLIP_2]
    card = json.loads((folder / "card.json").read_text())
    language = weights.load("blip2", folder).language_model.state_dict()
    torch.manual_seed(seed)
    model = blip2.BLIP2(config, blip2_files.load_tokenizer(folder)).requires_grad_(False)
    model.vision_model.load_state_dict(image_half(weights.load("blip", plain)))
    model.language_model.load_state_dict(language)
    trained = Namespace(qformer=model.qformer, language_projection=model.language_projection)
    trained.query_tokens = model.query_tokens
    trained.requires_grad_(True)
    encoded = model.tokenizer.encode_batch([describe(view) for view in world.views])
    lines = [[*line.ids, config.text_eos_token_id] for line in encoded]

    def loss(rows: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        ids = padded([lines[i] for i in rows], config.text_pad_token_id)
        return {"loss": model.loss(batch_of(world.images, rows), ids).mean()}

    minutes = MiniTrainer("qformer", trained, loss, n, recipe, seed).fit()
    write_blip2(model, folder)
    sizes = {"parameters": count(model), "trained_parameters": count(trained)}
    quality = {"minutes": round(minutes, 1)} | caption_quality(weights.load("blip2", folder), world)
    return sizes | quality | {"language_model": card.get("language_model", card)}


def write_blip2(model: blip2.BLIP2, folder: Path) -> None:
    """Write a published folder: the Q-Former's half in float32, the rest in float16, as LAVIS trains them.

    "<image>" has the id behind the tokenizer's tokens; rows behind it belong to no token.
    """
    config = model.config
    tensors = weights.from_home("blip2", model.state_dict(), "hf")
    write_tensors(tensors, folder / "model.safetensors", blip2_files.KIND.full_precision)
    image = {"image_token_index": model.tokenizer.get_vocab_size()}
    write_json(folder / "config.json", blip2_files.published(config) | image)
    ids = {name: getattr(config, f"text_{name}") for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
