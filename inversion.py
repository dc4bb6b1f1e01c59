"""Prompts found image by image: PEZ and PH2P, which table 4 compares with, and three controls.

    python inversion.py IMAGE... --method pez         gradient search for CLIP's cosine (Wen et al. 2023)
    python inversion.py IMAGE... --method ph2p        for Stable Diffusion's loss (Mahajan et al. 2024)
    python inversion.py IMAGE... --method swaps       random swaps of tokens that raise CLIP's cosine
    python inversion.py IMAGE... --method best-of     the best by CLIP's cosine of sampled BLIP captions
    python inversion.py IMAGE... --method nearest --prompts FILE     the best of given prompts, one a line

Both gradient searches keep continuous slots for the tokens of a prompt. Each evaluation projects the slots to
the nearest tokens and applies the gradient at the projection to the slots (the straight-through estimator).
Every method prints the cosine of CLIP's image and text embeddings, where the text is the printed prompt: the
tokens of a search often become others when their text is encoded, so the score of the slots is not that of
the prompt. With --candidates surviving they stay the same.

Finished images are lines of --out: image, prompt, cosine, settings. The same command continues where it was
stopped; an image that was not finished begins anew. Each image has its own random numbers, so that results
do not depend on the other images. Published settings, full size, on a GPU:

    python inversion.py IMAGE... --method pez --clip clip-l-14
    python inversion.py IMAGE... --method ph2p --clip clip-l-14 --weights sd-1 --keep drawing

Letters in shape comments: B rows (images times restarts), L slots, N tokens of a text, D the text tower's
width, P CLIP's width, C candidates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import tqdm

import data
import generate
import weights
from command import Parser, number, one_line, run_command
from files import atomic_write, read_text, records
from models.clip import CLIPText, CLIPVision

METHODS = ("pez", "ph2p", "swaps", "best-of", "nearest")
COUNT, PART = number(int, 1, 10**6), number(float, 0.01, 1)
# Option: its type or values, the default of each method that has it, help. Defaults without a comment: PEZ's
# sample_config.json and optim_utils.py, PH2P's inversion_config.yaml and ddpm.py.
OPTIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tokens": (number(int, 1, 75), {"pez": 16, "ph2p": 15, "swaps": 16}, "slots of a prompt"),
    # PH2P: 500 steps of 20 evaluations. Swaps: with 16 tries about the text encodings of PEZ.
    "steps": (COUNT, {"pez": 3000, "ph2p": 10_000, "swaps": 600}, "updates"),
    # Paper: PH2P names L-BFGS (rate 2.4, 20 evaluations a step). In the code it owns a tensor that each
    # evaluation overwrites, and a hook moves the slots by 2.4 times the gradient of 100 / 3 times the error:
    # SGD of rate 80. "lbfgs" is L-BFGS on the slots themselves, which no published code does.
    "optimiser": (("adamw", "sgd", "lbfgs"), {"pez": "adamw", "ph2p": "sgd"}, "of the slots"),
    "lr": (number(float, 0, 1e6), {"pez": 0.1, "ph2p": 80.0}, "learning rate; use 2.4 for lbfgs"),
    "weight-decay": (number(float, 0, 1), {"pez": 0.1, "ph2p": 0.0}, "of adamw and sgd"),
    "nearest-by": (("cosine", "l2"), {"pez": "cosine", "ph2p": "l2"}, "distance of the projection"),
    # PEZ also draws and projects to special tokens. PH2P encodes each key of the vocabulary as a text, takes
    # the row of its first token and writes the key, without "." and special tokens.
    "candidates": (
        ("all", "surviving", "keys"), {"pez": "all", "ph2p": "keys", "swaps": "surviving"},
        "tokens of slots: all; only tokens that survive decoding and encoding; keys, as in PH2P's code",
    ),
    "start": (str, {"pez": "", "ph2p": "A photo of bus of color ."}, "first tokens, empty = random"),
    "restarts": (COUNT, {"pez": 1, "swaps": 1}, "searches for each image, of which the best is kept"),
    # Paper: PH2P's code draws a picture with each prompt and keeps the one nearest to the image for CLIP-L,
    # which takes more time than the search. The default keeps the lowest error at fixed draws of noise.
    "keep": (
        ("slots", "text", "drawing", "last"), {"pez": "slots", "ph2p": "text"},
        "the prompt with the lowest loss of the slots; of its text; whose drawing is nearest to the image in "
        "CLIP (ph2p); or the last",
    ),
    "keep-every": (COUNT, {"pez": 1, "ph2p": 20}, "evaluations between the prompts that may be kept"),
    "timesteps": (number(int, 0, 999), {"ph2p": [500, 899]}, "first and last timestep of the noise"),
    "crop": (PART, {"ph2p": 0.5}, "smallest random crop, part of the shorter side; 1 = none"),
    "posterior": (("sample", "mean"), {"ph2p": "sample"}, "latents of the autoencoder"),
    "draws": (COUNT, {"ph2p": 16}, "fixed draws of noise that judge a prompt"),
    "tries": (COUNT, {"swaps": 16}, "swaps of which a step takes the best"),
    "captions": (COUNT, {"best-of": 16}, "captions sampled for each image"),
    "top-p": (PART, {"best-of": 0.9}, "probability of the tokens to sample from (BLIP's own code)"),
    "max-length": (number(int, 6, 512), {"best-of": 77}, "tokens of a caption, within the captioner's limit"),
    "captioner": (str, {"best-of": "blip-mini"}, "a BLIP"),
    "weights": (str, {"ph2p": "sd-mini"}, "a Stable Diffusion"),
    "prompts": (str, {"nearest": ""}, "file of prompts, one a line"),
}  # fmt: skip
Options = argparse.Namespace
Draws = Sequence[Generator]  # one for each row
# (pictures, their unit embeddings (B, P), their generators) -> each one's prompt and further scores
Find = Callable[[Sequence[Image.Image], Tensor, Draws], list[dict[str, Any]]]


def settings(method: str, **changes: Any) -> Options:
    """The defaults of a method with changes. Raises DataError for an unknown method, for an option that the
    method lacks and for options that exclude each other."""
    if method not in METHODS:
        raise data.DataError(f"--method {method}: unknown; give one of {', '.join(METHODS)}")
    own = {"method": method, "seed": 0, "clip": "clip-mini"}
    own |= {name.replace("-", "_"): row[1][method] for name, row in OPTIONS.items() if method in row[1]}
    if strays := sorted(changes.keys() - own.keys()):
        raise data.DataError(f"--{strays[0].replace('_', '-')}: {method} has no such option; remove it")
    own |= changes
    if method == "pez" and own["keep"] == "drawing":
        raise data.DataError("--keep drawing: pez has no Stable Diffusion; give slots, text or last")
    if method == "ph2p" and own["timesteps"][0] > own["timesteps"][1]:
        raise data.DataError("--timesteps: the first must not be above the last")
    if method == "nearest" and not own["prompts"]:
        raise data.DataError("--method nearest: give --prompts FILE, one prompt a line")
    return Options(**own)


# ============================================================================================================
# CLIP's cosine, and the text tower from token embeddings
# ============================================================================================================


def framed(model: CLIPText, tokenizer: weights.ClipTokenizer, slots: Tensor, length: int) -> Tensor:
    """Slots (B, L, D) between the rows of the start mark and the end mark, padded to (B, length, D)."""
    marks = [tokenizer.start, tokenizer.end, *[tokenizer.pad] * (length - slots.shape[1] - 2)]
    rows = model.text_model.embeddings.token_embedding.weight[marks].expand(len(slots), -1, -1)
    return torch.cat([rows[:, :1], slots, rows[:, 1:]], dim=1)


def states_from_embeddings(model: CLIPText, embeddings: Tensor) -> Tensor:
    """The text tower's last states (B, N, D) of token embeddings (B, N, D) without positions."""
    text = model.text_model
    x = embeddings + text.embeddings.position_embedding.weight[: embeddings.shape[1]]
    for layer in text.encoder.layers:
        x = layer(x, causal=True)
    return text.final_layer_norm(x)


def pooled_from_embeddings(model: CLIPText, embeddings: Tensor, end: int) -> Tensor:
    """The projected state (B, P) at position `end` of token embeddings (B, N, D), not of unit length."""
    return model.text_projection(states_from_embeddings(model, embeddings)[:, end])


@dataclass
class Clip:
    """Both towers of a CLIP, on one device, and what their inputs need."""

    text: CLIPText
    vision: CLIPVision
    tokenizer: weights.ClipTokenizer
    preprocessing: data.Preprocessing

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit image embeddings (B, P)."""
        return F.normalize(self.vision(as_batch(pictures, self.preprocessing, self.text)), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings (B, P); texts are cut to 75 tokens."""
        batches = (self.tokenizer(list(texts[i : i + 256])) for i in range(0, len(texts), 256))
        pooled = [self.text.pooled(ids.to(device_of(self.text))) for ids in batches]
        return F.normalize(torch.cat(pooled), dim=-1)

    def slots(self, slots: Tensor) -> Tensor:
        """Unit embeddings (B, P) of slots (B, L, D). A slot that holds an end mark does not end the text,
        unlike the end mark of an encoded text."""
        n = slots.shape[1] + 2  # tokens after the end mark have no effect
        embeddings = framed(self.text, self.tokenizer, slots, n)
        return F.normalize(pooled_from_embeddings(self.text, embeddings, n - 1), dim=-1)

    def loss(self, slots: Tensor, targets: Tensor) -> Tensor:
        """1 - cosine (B,) of slots and unit targets (B, P), or fewer, each for as many rows in succession.

        For the mean of several unit targets it is the mean loss, as PEZ has it for several images or texts.
        """
        targets = targets.repeat_interleave(len(slots) // len(targets), 0)
        return 1 - (self.slots(slots) * targets).sum(dim=-1)


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def as_batch(
    pictures: Sequence[Image.Image], preprocessing: data.Preprocessing, model: torch.nn.Module
) -> Tensor:
    """Pictures as (B, 3, H, W) on the model's device."""
    return torch.stack([data.image_tensor(x, preprocessing) for x in pictures]).to(device_of(model))


def load_clip(source: str, device: str = "cpu") -> Clip:
    """The CLIP of a source of both towers. Raises WeightsError if its text tower has no projection."""
    if weights.config("clip-text", source).projection_dim is None:
        raise weights.WeightsError(
            f"--clip {source}: its text tower has no text_projection; give a whole CLIP, such as clip-l-14"
        )
    weights.require_fed(source, "clip-text", "clip-vision")
    kinds = ("clip-text", "clip-vision")
    towers = (weights.load(kind, source, device=device).requires_grad_(False) for kind in kinds)
    preprocessing = data.Preprocessing(**weights.preprocessing("clip-vision", source))
    return Clip(*towers, weights.load_tokenizer(source), preprocessing)


# ============================================================================================================
# Candidates: the tokens that a slot may hold
# ============================================================================================================


class Candidates:
    """`rows` (C, D) of the token table, and the bytes that each adds to the text."""

    def __init__(
        self, model: CLIPText, tokenizer: weights.ClipTokenizer, choice: str, nearest_by: str = "cosine"
    ):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # byte-level BPE's characters for bytes:
        others = iter(sorted(set(range(256)) - set(map(ord, alphabet))))  # printable ones are themselves
        byte = {char: ord(char) if ord(char) < 256 else next(others) for char in alphabet}
        special = (tokenizer.start, tokenizer.end)

        def encoded(text: str) -> list[int]:
            return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids

        ids, self.words = [], []
        for token, i in sorted(tokenizer.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            bare = token.removesuffix("</w>")
            word = bytes(byte[char] for char in bare) + b" " * (bare != token)
            if choice == "keys":
                word = b"" if i in special else bare.replace(".", "").encode() + b" "
                i = (encoded(token) or [i])[0]
            elif choice == "surviving" and (i in special or encoded(word.decode("utf-8", "replace")) != [i]):
                continue
            ids.append(i)
            self.words.append(word)
        self.rows = model.text_model.embeddings.token_embedding.weight.detach()[ids]
        self.keys, self.offset = F.normalize(self.rows, dim=-1), 0.0
        if nearest_by == "l2":  # the largest s·r - r·r / 2 has the smallest (s - r)^2
            self.keys, self.offset = self.rows, -self.rows.square().sum(dim=1) / 2

    def nearest(self, slots: Tensor) -> Tensor:
        """Numbers (B, L) of the candidates nearest to slots (B, L, D), by cosine or distance."""
        return (slots.detach() @ self.keys.T + self.offset).argmax(dim=-1)

    def texts(self, index: Tensor) -> list[str]:
        """The texts of candidates' numbers (B, L); bytes that are no UTF-8 are replaced."""
        joined = (b"".join(self.words[i] for i in row) for row in index.tolist())
        return [text.decode("utf-8", "replace").strip() for text in joined]


# ============================================================================================================
# PEZ and PH2P: projected gradient descent with the straight-through estimator
# ============================================================================================================


def drawn(draw: Callable[[Generator], Tensor], draws: Draws, like: Tensor) -> Tensor:
    """A row from each generator, on the device of `like`."""
    return torch.stack([draw(generator) for generator in draws]).to(like.device)


def integers(below: int, shape: tuple[int, ...], draws: Draws, like: Tensor) -> Tensor:
    """Integers from 0 to below - 1, (B, *shape)."""
    return drawn(lambda g: torch.randint(below, shape, generator=g), draws, like)


def start(
    model: CLIPText, tokenizer: weights.ClipTokenizer, allowed: Candidates, draws: Draws, o: Options
) -> Tensor:
    """The first slots (B, L, D): random candidates, or the tokens of a text and end marks."""
    if not o.start:
        return allowed.rows[integers(len(allowed.words), (o.tokens,), draws, allowed.rows)]
    ids = tokenizer.tokenizer.encode(o.start, add_special_tokens=False).ids + [tokenizer.end] * o.tokens
    rows = model.text_model.embeddings.token_embedding.weight.detach()[ids[: o.tokens]]
    return rows.repeat(len(draws), 1, 1)


def descend(
    slots: Tensor, allowed: Candidates, loss: Callable[[Tensor], Tensor],
    judged: Callable[[list[str], list[int]], Tensor], o: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Candidates' numbers (B, L) of the prompt to keep of each row, and the losses (B,) by which it was kept.

    Each evaluation adds the gradient of `loss` (B,) at the projection of the slots (B, L, D) to the slots.
    `judged`(texts, their rows) are the losses of texts, each computed once. As in PEZ's code a prompt is
    judged before the update, so the result of the last update never is.
    """
    slots = slots.clone().requires_grad_()
    decay = {"weight_decay": o.weight_decay}
    optimizer = {
        "adamw": lambda: torch.optim.AdamW([slots], lr=o.lr, **decay),
        "sgd": lambda: torch.optim.SGD([slots], lr=o.lr, **decay),
        "lbfgs": lambda: torch.optim.LBFGS([slots], lr=o.lr, max_iter=20),
    }[o.optimiser]()
    best, kept = torch.full_like(slots[:, 0, 0], torch.inf).detach(), allowed.nearest(slots)
    evaluations, seen = 0, set()

    def offered(index: Tensor, losses: Tensor) -> Tensor:
        if o.keep == "last":
            return torch.full_like(losses, -evaluations)
        if o.keep == "slots" and evaluations % o.keep_every == 0:
            return losses
        scores = torch.full_like(losses, torch.inf)
        if evaluations % o.keep_every == 0:
            fresh = {row: text for row, text in enumerate(allowed.texts(index)) if (row, text) not in seen}
            seen.update(fresh.items())
            if fresh:
                scores[list(fresh)] = judged(list(fresh.values()), list(fresh)).to(scores)
        return scores

    def evaluate() -> Tensor:
        nonlocal best, kept, evaluations
        index = allowed.nearest(slots)
        projected = allowed.rows[index].requires_grad_()
        losses = loss(projected)
        (slots.grad,) = torch.autograd.grad(losses.sum(), projected)
        with torch.no_grad():
            scores = offered(index, losses.detach())
            kept = torch.where((scores < best)[:, None], index, kept)
            best, evaluations = torch.minimum(best, scores), evaluations + 1
        return losses.detach().sum()

    for _ in tqdm(range(o.steps), desc=o.method, unit="step", leave=False):
        optimizer.step(evaluate)
    return kept, best


def pez(o: Options, clip: Clip) -> Find:
    """PEZ, whose rows also have "slots_cosine", the cosine of the kept tokens before decoding."""
    allowed = Candidates(clip.text, clip.tokenizer, o.candidates, o.nearest_by)

    def find(pictures: Sequence[Image.Image], targets: Tensor, draws: Draws) -> list[dict[str, Any]]:
        rows, draws = targets.repeat_interleave(o.restarts, 0), [g for g in draws for _ in range(o.restarts)]

        def judged(texts: list[str], some: list[int]) -> Tensor:
            return 1 - (clip.texts(texts) * rows[some]).sum(dim=-1)

        slots = start(clip.text, clip.tokenizer, allowed, draws, o)
        kept = descend(slots, allowed, lambda projected: clip.loss(projected, rows), judged, o)
        return best_restarts(clip, targets, allowed, *kept)

    return find


@torch.no_grad()
def best_restarts(
    clip: Clip, targets: Tensor, allowed: Candidates, index: Tensor, losses: Tensor
) -> list[dict[str, Any]]:
    """The text of the restart with the lowest loss of each target, and the cosine of its slots."""
    n = len(index) // len(targets)
    index = index[torch.arange(0, len(index), n) + losses.unflatten(0, (-1, n)).argmin(dim=1).cpu()]
    cosines = (1 - clip.loss(allowed.rows[index], targets)).tolist()
    found = zip(allowed.texts(index), cosines, strict=True)
    return [{"prompt": text, "slots_cosine": round(cosine, 6)} for text, cosine in found]


class Denoising:
    """Stable Diffusion's loss of slots and texts: the mean squared error of the predicted noise."""

    def __init__(self, pipeline: generate.Pipeline, images: Tensor, draws: Draws, o: Options):
        """`images` (B, 3, H, W) in [-1, 1], each with the generator of its noise."""
        self.pipeline, self.images, self.draws, self.o, self.evaluations = pipeline, images, draws, o, 0
        mean, _ = self.moments(images)
        self.fixed = [(mean, *self.noise(mean)) for _ in range(o.draws)]

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, (B, 4, h, w), scaled as in diffusion training."""
        mean, logvar = self.pipeline.vae.moments(images)
        scale = self.pipeline.vae.config.scale_factor
        return mean * scale, (logvar / 2).exp() * scale

    def normal(self, like: Tensor) -> Tensor:
        return drawn(lambda g: torch.randn(like.shape[1:], generator=g), self.draws, like)

    def noise(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, 4, h, w)."""
        first, last = self.o.timesteps
        return first + integers(last + 1 - first, (), self.draws, like), self.normal(like)

    def cropped(self) -> Tensor:
        """A random square of each image, enlarged to its size.

        Paper: PH2P's code crops the original image, then reduces it by area; here it is reduced first.
        """
        height, width = self.images.shape[-2:]
        crops = []
        for image, generator in zip(self.images, self.draws, strict=True):
            part, down, right = torch.rand(3, generator=generator).tolist()
            side = max(1, round((self.o.crop + (1 - self.o.crop) * part) * min(height, width)))
            top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
            square = image[None, :, top : top + side, left : left + side]
            crops.append(F.interpolate(square, (height, width), mode="bilinear", align_corners=False))
        return torch.cat(crops)

    def error(self, states: Tensor, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error (B,) of the noise predicted with text states (B, 77, D)."""
        alpha = self.pipeline.alphas.to(latents)[t][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.pipeline.unet(noisy, t, states)
        if self.pipeline.predicts_v:
            predicted = generate.noise_from_v(predicted, noisy, alpha)
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    def loss(self, slots: Tensor) -> Tensor:
        """The error (B,) of slots (B, L, D) at new draws; the crop changes at every 20th evaluation."""
        if self.evaluations % 20 == 0:
            self.mean, self.deviation = self.moments(self.cropped())
        self.evaluations += 1
        latents = self.mean
        if self.o.posterior == "sample":
            latents = latents + self.deviation * self.normal(latents)
        text = self.pipeline.text
        states = states_from_embeddings(text, framed(text, self.pipeline.tokenizer, slots, 77))
        return self.error(states, latents, *self.noise(latents))

    @torch.no_grad()
    def judged(self, texts: Sequence[str], rows: Sequence[int]) -> Tensor:
        """The mean error (n,) of texts for the images `rows` at the fixed draws."""
        states = self.pipeline.states(texts)
        return torch.stack([self.error(states, *(x[rows] for x in draw)) for draw in self.fixed]).mean(dim=0)


def ph2p(o: Options, clip: Clip) -> Find:
    """PH2P, whose rows also have "loss", the prompt's mean error at the fixed draws."""
    pipeline = generate.load_pipeline(o.weights, device_of(clip.text))
    side, _ = generate.trained_as(o.weights)
    for network in (pipeline.unet, pipeline.vae, pipeline.text):
        network.requires_grad_(False)
    allowed = Candidates(pipeline.text, pipeline.tokenizer, o.candidates, o.nearest_by)

    def find(pictures: Sequence[Image.Image], targets: Tensor, draws: Draws) -> list[dict[str, Any]]:
        images = as_batch(pictures, data.Preprocessing.square(side), clip.text)
        denoising = Denoising(pipeline, images, draws, o)

        def by_drawing(texts: list[str], rows: list[int]) -> Tensor:
            noise = pipeline.noise([draws[row].initial_seed() for row in rows], (side, side))
            pixels = pipeline.decode(pipeline.sample(texts, noise))
            return 1 - (clip.images([generate.picture(x) for x in pixels]) * targets[rows]).sum(dim=-1)

        slots = start(pipeline.text, pipeline.tokenizer, allowed, draws, o)
        judged = by_drawing if o.keep == "drawing" else denoising.judged
        texts = allowed.texts(descend(slots, allowed, denoising.loss, judged, o)[0])
        losses = denoising.judged(texts, range(len(texts))).tolist()
        return [{"prompt": text, "loss": round(loss, 6)} for text, loss in zip(texts, losses, strict=True)]

    return find


# ============================================================================================================
# Controls
# ============================================================================================================


def swaps(o: Options, clip: Clip) -> Find:
    """Greedy search: each step takes the best of `tries` random swaps of a token if it is an improvement."""
    allowed = Candidates(clip.text, clip.tokenizer, o.candidates)

    @torch.no_grad()
    def find(pictures: Sequence[Image.Image], targets: Tensor, draws: Draws) -> list[dict[str, Any]]:
        draws, n = [g for g in draws for _ in range(o.restarts)], len(allowed.words)
        index = integers(n, (o.tokens,), draws, targets)  # (B, L)
        best = clip.loss(allowed.rows[index], targets)
        for _ in tqdm(range(o.steps), desc="swaps", unit="step", leave=False):
            place, token = (integers(below, (o.tries, 1), draws, targets) for below in (o.tokens, n))
            trial = index[:, None].expand(-1, o.tries, -1).scatter(2, place, token)  # (B, tries, L)
            losses = clip.loss(allowed.rows[trial.flatten(0, 1)], targets).unflatten(0, (-1, o.tries))
            lowest, which = losses.min(dim=1)
            swapped = trial[torch.arange(len(trial), device=which.device), which]
            index = torch.where((lowest < best)[:, None], swapped, index)
            best = torch.minimum(best, lowest)
        return best_restarts(clip, targets, allowed, index, best)

    return find


def best_of(o: Options, clip: Clip) -> Find:
    """The sampled caption with the highest cosine."""
    model = weights.load("blip", o.captioner, device=device_of(clip.text))
    preprocessing = data.Preprocessing(**weights.preprocessing("blip", o.captioner))
    options = {"num_beams": 1, "top_p": o.top_p}
    options["max_length"] = min(o.max_length, model.config.text_max_position_embeddings)

    def find(pictures: Sequence[Image.Image], targets: Tensor, draws: Draws) -> list[dict[str, Any]]:
        found = []
        for image, target, draw in zip(as_batch(pictures, preprocessing, model), targets, draws, strict=True):
            texts = model.generate(image.expand(o.captions, -1, -1, -1), generator=draw, **options)
            found.append({"prompt": texts[(clip.texts(texts) @ target).argmax()]})
        return found

    return find


def nearest(o: Options, clip: Clip) -> Find:
    """The line of --prompts with the highest cosine. Raises DataError for a file without any."""
    lines = map(str.strip, read_text(Path(o.prompts), 2**30).splitlines())
    prompts = [line for line in dict.fromkeys(lines) if line]
    if not prompts:
        raise data.DataError(f"{o.prompts}: holds no prompts; give a file with one a line")
    embeddings = clip.texts(prompts)
    return lambda _, targets, __: [{"prompt": prompts[i]} for i in (targets @ embeddings.T).argmax(dim=1)]


# ============================================================================================================
# The command line
# ============================================================================================================


def digest(picture: Image.Image) -> str:
    """A hash of a picture's size and colours."""
    return hashlib.sha256(str(picture.size).encode() + picture.tobytes()).hexdigest()[:16]


def inverter(o: Options, device: str = "cpu") -> Callable[[Sequence[Image.Image]], list[dict[str, Any]]]:
    """A function from pictures to rows: "prompt", "cosine" of CLIP, further scores of the method.

    Raises WeightsError as weights.load, and DataError for --prompts.
    """
    clip = load_clip(o.clip, device)
    find = dict(zip(METHODS, (pez, ph2p, swaps, best_of, nearest), strict=True))[o.method](o, clip)

    def invert(pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        targets = clip.images(pictures)
        seeds = [hashlib.sha256(f"{o.seed} {digest(picture)}".encode()).digest()[:7] for picture in pictures]
        found = find(pictures, targets, [Generator().manual_seed(int.from_bytes(seed)) for seed in seeds])
        cosines = (clip.texts([row["prompt"] for row in found]) * targets).sum(dim=-1).tolist()
        return [row | {"cosine": round(cosine, 6)} for row, cosine in zip(found, cosines, strict=True)]

    return invert


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command's arguments, and the method's options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE")
    add("--method", choices=METHODS, required=True, help="pez or ph2p, or a control: swaps, best-of, nearest")
    add("--clip", default="clip-mini", help="a whole CLIP: clip-mini (default), clip-l-14, a file, a folder")
    add("--out", type=Path, metavar="FILE", help="lines of JSON (default prompts-METHOD.jsonl)")
    add("--batch-size", type=COUNT, default=16, help="images at a time (default 16)")
    add("--seed", type=number(int, 0), default=0, help="(default 0)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    for name, (kind, defaults, about) in OPTIONS.items():
        stated = ", ".join(f"{method} {value!r}" for method, value in defaults.items())
        extra = {"nargs": 2, "metavar": ("FIRST", "LAST")} if name == "timesteps" else {}
        extra |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        add(f"--{name}", help=f"{about} ({stated})", **extra)
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"prompts-{args.method}.jsonl")
    names = ["seed", "clip", *(name.replace("-", "_") for name in OPTIONS)]
    try:
        changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        options = settings(args.method, **changes)
    except data.DataError as error:
        parser.error(str(error))
    if args.optimiser == "lbfgs" and max(args.batch_size, args.restarts or 1) > 1:
        parser.error("--optimiser lbfgs couples the searches of a batch: give --batch-size 1 --restarts 1")
    return args, options


def run(args: argparse.Namespace, o: Options) -> int:
    """The exit status: 2 if an image was skipped. Prints and writes the prompt of each image."""
    lines = [row for _, row in records(args.out) if isinstance(row, dict)] if args.out.exists() else []
    done = {(row.get("image"), row.get("sha256")): row for row in lines if row.get("settings") == vars(o)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    invert, skipped, waiting = inverter(o, weights.resolve_device(args.device)), [], []
    bar = tqdm(total=len(args.images), desc="images", unit="image")

    def show(row: dict[str, Any]) -> None:
        tqdm.write(f"{row['image']}\n  {row['cosine']:.3f}  {one_line(row['prompt'])}", file=sys.stdout)
        bar.update()

    def invert_waiting() -> None:
        found = invert([picture for _, _, picture in waiting]) if waiting else []
        for (path, key, _), row in zip(waiting, found, strict=True):
            lines.append({"image": str(path), "sha256": key} | row | {"settings": vars(o)})
        atomic_write(args.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for line in lines[len(lines) - len(waiting) :]:
            show(line)
        waiting.clear()

    with bar:
        invert_waiting()  # a file that cannot be written is refused before the search
        for path in args.images:
            try:
                picture = data.load_image(path)
            except data.DataError as error:
                skipped.append(f"skipped: {one_line(error)}")
                bar.update()
                continue
            key = digest(picture)
            if row := done.get((str(path), key)):
                show(row)
            else:
                waiting.append((path, key, picture))
            if len(waiting) == args.batch_size:
                invert_waiting()
        invert_waiting()
    if skipped:
        print(*skipped, f"{len(skipped)} of {len(args.images)} images skipped", sep="\n", file=sys.stderr)
    return 2 if skipped else 0


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args, options = parse(argv)
    return run_command(lambda: run(args, options), f"stopped; finished images are kept in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
