"""Reverse Stable Diffusion: predict the sentence embedding of the prompt from the image that it made.

The method in the paper's order: the objective (eq. 1), the vocabulary and its targets (eq. 2), the losses
(eq. 3 and 4), the three placements of the vocabulary head (fig. 3) and the regressor that joins any
backbone to them. The last part opens a trained run and reads one's own images:

    python reverse_sd.py image.png --run runs/unet-mini-seed0

Letters in shape comments: B batch, N tokens, D feature width, E embedding width (384), V vocabulary words,
h w latent height and width.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_WIDTH = 384  # all-MiniLM-L6-v2

# ============================================================================================================
# Section 3, main objective: equation (1)
# ============================================================================================================


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cos(f(x_i), y_i) for each sample: (B, E), (B, E) -> (B,). The mean over samples is equation (1)."""
    return 1 - F.cosine_similarity(predicted, target, dim=-1, eps=1e-8)


# ============================================================================================================
# Section 3, multi-label vocabulary classification: the words, equations (2), (3) and (4)
# ============================================================================================================

# "The most frequent adjectives, nouns and verbs" are the open classes of English but for the adverbs, so
# instead of tagging each word we drop the closed classes, a short list that hardly ever changes, and the
# adverbs, most of which end in -ly. benchmarks/vocabulary.py measures how well that agrees with a
# part-of-speech tagger.
CLOSED_CLASSES = frozenset(
    # determiners, quantifiers and numerals
    """a an the this that these those each every either neither some any no all both half such what which
    whose many much more most few fewer less least several enough another other others one two three four
    five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand million dozen
    first second third"""
    # pronouns
    """ i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we
    us our ours ourselves they them their theirs themselves who whom someone somebody something anyone
    anybody anything everyone everybody everything nobody nothing none there here where when why how whoever
    whatever whichever"""
    # prepositions and particles
    """ of in on at by for with without within from to into onto upon over under above below beneath beside
    besides between among amongst amid amidst behind before after around about across along against through
    throughout during near toward towards off out outside inside up down away back past since until till per
    via versus vs like unlike despite except as than together apart ahead forth beyond underneath atop
    opposite"""
    # conjunctions
    """ and or but nor so yet if because while whereas although though unless whether plus"""
    # auxiliaries, modals and their contractions
    """ be am is are was were been being do does did done doing have has had having can could will would
    shall should may might must ought cannot can't don't doesn't didn't isn't aren't wasn't weren't won't
    wouldn't couldn't shouldn't haven't hasn't hadn't it's he's she's that's there's i'm i've you're we're
    they're let's"""
    # adverbs that do not end in -ly, and what prompts abbreviate
    """ not never ever always often again also too very quite rather almost just even still already soon now
    then once twice maybe perhaps instead else ever far away forever everywhere nowhere somewhere elsewhere
    well however therefore thus hence etc eg ie st nd rd th""".split()
)
# Words in -ly that are no adverbs.
NOT_ADVERBS = frozenset(
    """fly butterfly dragonfly firefly family lily lovely ugly holy unholy ghostly heavenly friendly elderly
    belly jelly assembly italy july silly daily curly woolly wooly lonely deadly early godly orderly cuddly
    bubbly wrinkly otherworldly worldly earthly motherly fatherly likely lively monthly weekly bully ally
    rally reply supply multiply apply sly ply oily hilly chilly smelly gnarly sparkly prickly fully-rigged
    billy molly emily sally kelly polly homely costly comely princely scholarly manly womanly beastly
    ghastly grisly burly surly pearly jellyfly""".split()
)
_WORD = re.compile(r"[a-z](?:[a-z'-]*[a-z])")


def words(prompt: str) -> list[str]:
    """The prompt's words of two letters or more in lower case; inner hyphens and apostrophes are kept."""
    return _WORD.findall(prompt.lower())


def is_content_word(word: str) -> bool:
    """Whether a lower-case word counts as an adjective, a noun or a verb (see `CLOSED_CLASSES`)."""
    if word in CLOSED_CLASSES:
        return False
    return not word.endswith("ly") or word in NOT_ADVERBS


class Vocabulary:
    """The m most frequent adjectives, nouns and verbs of the training prompts, and the targets of equation
    (2).

    Matching ignores case on both sides. Paper: the number of words is not restated per data set; where the
    prompts hold fewer than m different words the vocabulary is as long as they allow.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.words = [word.lower() for word in vocabulary]
        self._column = {word: j for j, word in enumerate(self.words)}

    @classmethod
    def of(cls, training_prompts: Iterable[str], size: int) -> Vocabulary:
        """Count a word once a prompt and keep the `size` most frequent, ties in alphabetical order."""
        counts = Counter(
            word for prompt in training_prompts for word in set(words(prompt)) if is_content_word(word)
        )
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in ranked[:size]])

    def __len__(self) -> int:
        return len(self.words)

    def targets(self, prompts: Sequence[str]) -> Tensor:
        """Equation (2): t_ij = 1 if word j is in prompt i, else 0, as float32 (B, V)."""
        t = torch.zeros(len(prompts), len(self.words))
        for i, prompt in enumerate(prompts):
            t[i, [self._column[word] for word in set(words(prompt)) if word in self._column]] = 1
        return t


def vocabulary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation (3) for each sample: the binary cross-entropy of sigmoid(logits), mean over the words. (B,
    V) -> (B,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)


def joint_loss(cosine: Tensor, vocabulary: Tensor, mlc_weight: float = 0.1) -> Tensor:
    """Equation (4): L = L_cos + lambda * L_mlc, sample by sample. The default lambda is the authors'
    code's."""
    return cosine + mlc_weight * vocabulary


# ============================================================================================================
# Section 3, figure 3: where the vocabulary head stands, and the regressor
# ============================================================================================================


@dataclass
class Prediction:
    """`embedding` (B, E), not normalised; `logits` (B, V), or None without a vocabulary head."""

    embedding: Tensor
    logits: Tensor | None


class Heads(nn.Module):
    """Features -> prompt embedding and vocabulary logits; each head is one fully connected layer (figure 3).

    placement 0: no vocabulary head.
              1: both heads read the features.
              2: the vocabulary logits are fed, beside the features, to the embedding head.
              3: the vocabulary head reads the predicted embedding (the paper's choice).
    """

    def __init__(self, width: int, n_words: int, placement: int = 3, embedding_width: int = EMBEDDING_WIDTH):
        super().__init__()
        if placement not in (0, 1, 2, 3):
            raise ValueError(f"heads must be 0, 1, 2 or 3, not {placement}")
        self.placement = placement
        self.embedding = nn.Linear(width + (n_words if placement == 2 else 0), embedding_width)
        self.vocabulary = (
            nn.Linear(embedding_width if placement == 3 else width, n_words) if placement else None
        )

    def forward(self, features: Tensor) -> Prediction:
        match self.placement:
            case 0:
                return Prediction(self.embedding(features), None)
            case 1:
                return Prediction(self.embedding(features), self.vocabulary(features))
            case 2:
                logits = self.vocabulary(features)
                return Prediction(self.embedding(torch.cat([features, logits], dim=-1)), logits)
            case _:
                embedding = self.embedding(features)
                return Prediction(embedding, self.vocabulary(embedding))


class Regressor(nn.Module):
    """Any backbone with the heads of figure 3 on top.

    `backbone(*inputs)` must return features (B, width); the inputs are whatever it reads: images for the
    black boxes, latents and caption states for the U-Net.
    """

    def __init__(self, backbone: nn.Module, width: int, n_words: int, placement: int = 3):
        super().__init__()
        self.backbone = backbone
        self.heads = Heads(width, n_words, placement)

    def forward(self, *inputs: Tensor) -> Prediction:
        return self.heads(self.backbone(*inputs))


BACKBONES = {"unet": "unet-encoder", "vit": "vit", "swin": "swin", "clip": "clip-vision"}  # kinds of weights


class UNetFeatures(nn.Module):
    """The white-box backbone: the encoder half of Stable Diffusion's U-Net, its middle block pooled over
    all places.

    Reads VAE latents, scaled as in diffusion training, and the text states of a caption of the image, which
    enter by cross-attention. Paper: neither the timestep nor the pooling is stated; as in the authors' code
    the timestep is 0 (no noise) and the pooling is the maximum.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        timesteps = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        middle = self.unet.encode(latents, timesteps, context)  # (B, D, h/8, w/8)
        return middle.amax(dim=(2, 3))  # (B, D)


def captioner_of(captions: str) -> str | None:
    """The BLIP that a run's `captions` names; None for "empty", "prompt" and a file of captions."""
    given = captions in ("empty", "prompt") or Path(captions).suffix in (".txt", ".json", ".jsonl", ".csv")
    return None if given else captions


def as_backbone(name: str, model: nn.Module) -> nn.Module:
    """A model of kind BACKBONES[name] as a module from inputs to features (B, width)."""
    return UNetFeatures(model) if name == "unet" else model


# ============================================================================================================
# A trained run, and one's own images
# ============================================================================================================


@dataclass
class Run:
    """A run's folder, opened: the trained regressor in eval mode, its vocabulary and configuration."""

    folder: Path
    config: dict[str, Any]
    regressor: Regressor
    vocabulary: Vocabulary


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """Open `folder` as train.py left it; the regressor holds the weights that were best on validation.

    Raises weights.WeightsError, with one line that says what is missing, for a folder that is no finished
    run.
    """
    import weights

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        vocabulary = Vocabulary(json.loads((folder / "vocabulary.json").read_text()))
    except (OSError, ValueError) as error:
        raise weights.WeightsError(
            f"{folder}: not a run of train.py ({error}); give the folder it wrote"
        ) from error
    tensors = weights.read_tensors(folder / "model.safetensors")
    with torch.device("meta"):
        model = weights.build(BACKBONES[config["backbone"]], config["model"])
        frozen = config.get("train_blocks") == 0  # then its features are the regressor's input
        backbone = nn.Identity() if frozen else as_backbone(config["backbone"], model)
        regressor = Regressor(backbone, model.width, len(vocabulary), config["heads"])
    weights.load_strict(regressor, tensors)
    return Run(folder, config, regressor.to(device).eval(), vocabulary)


@torch.no_grad()
def predict(
    regressor: nn.Module, batches: Iterable[tuple[Tensor, ...]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Unit-length embeddings (n, E) and word probabilities (n, V) or None, float32, batch by batch."""
    embeddings, probabilities = [], []
    for inputs in batches:
        prediction = regressor(*inputs)
        embeddings.append(F.normalize(prediction.embedding.float(), dim=-1).cpu().numpy())
        if prediction.logits is not None:
            probabilities.append(prediction.logits.float().sigmoid().cpu().numpy())
    return np.concatenate(embeddings), np.concatenate(probabilities) if probabilities else None


def nearest(query: np.ndarray, rows: np.ndarray, n: int) -> list[tuple[int, float]]:
    """The `n` unit rows of `rows` (m, E) closest to the unit vector `query` (E,), with their cosines."""
    similarities = rows @ query
    order = np.argsort(-similarities, kind="stable")[:n]
    return [(int(i), float(similarities[i])) for i in order]


def read_images(
    run: Run, images: Sequence[Any], captions: Sequence[str] | None, device: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions (see `predict`) of a run for PIL images, prepared as its training images were.

    The U-Net reads the captions given; None = those of the captioner that the run used, else the empty text.
    """
    import data
    import weights

    name, source = run.config["backbone"], run.config["weights"]
    how = data.Preprocessing(**run.config["preprocessing"])
    inputs = (torch.stack([data.image_tensor(image, how) for image in images]).to(device),)
    with torch.no_grad():
        if name == "unet":
            vae = weights.load("vae", source, device=device)
            text = weights.load("clip-text", source, device=device)
            if captions is None and (captioner := captioner_of(run.config["captions"])):
                reads = data.Preprocessing(**weights.preprocessing("blip", captioner))
                pictures = torch.stack([data.image_tensor(image, reads) for image in images])
                captions = weights.load("blip", captioner, device=device).generate(pictures.to(device))
            ids = weights.load_tokenizer(source)(list(captions or [""] * len(images)))
            inputs = (vae.encode(*inputs) * vae.config.scale_factor, text(ids.to(device)))
        if run.config.get("train_blocks") == 0:
            backbone = as_backbone(name, weights.load(BACKBONES[name], source, device=device))
            inputs = (backbone(*inputs),)
        return predict(run.regressor, [inputs])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Read images: the training prompts nearest to the predicted embedding, the likely words, "
        "and, with --prompt, how well the image and that prompt agree.",
        epilog="Train a run first: python train.py --backbone unet",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--run", type=Path, help="a folder that train.py wrote (default: the newest under runs/)"
    )
    parser.add_argument("--prompt", help="a prompt to compare the images with")
    parser.add_argument(
        "--caption", help="what the U-Net reads of the images (default: what the run's captioner says)"
    )
    parser.add_argument("-n", type=int, default=5, help="how many prompts to list (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args(argv)

    import data
    import weights

    failed = 0
    try:
        finished = sorted(Path("runs").glob("*/result.json"), key=lambda path: path.stat().st_mtime)
        if args.run is None and not finished:
            raise data.DataError("no finished run under runs/; train one: python train.py --backbone unet")
        folder = args.run or finished[-1].parent
        run = load_run(folder, args.device)
        try:
            train_prompts = [
                row["prompt"]
                for row in json.loads((folder / "predictions" / "rows.json").read_text())["train"]
            ]
            train_targets = np.load(
                folder / "predictions" / "train-targets.npy", mmap_mode="r", allow_pickle=False
            )
        except (OSError, ValueError) as error:
            raise data.DataError(
                f"{folder}: not evaluated yet ({error}); run: python eval.py {folder}"
            ) from error
        asked = weights.load("minilm").encode([args.prompt])[0].numpy() if args.prompt else None
        for path in args.images:
            try:
                image = data.load_image(path)
            except data.DataError as error:
                print(f"skipped: {error}", file=sys.stderr)
                failed += 1
                continue
            embeddings, probabilities = read_images(
                run, [image], None if args.caption is None else [args.caption], args.device
            )
            print(path)
            for i, similarity in nearest(embeddings[0], train_targets, args.n):
                print(f"  {similarity:.3f}  {train_prompts[i]}")
            if probabilities is not None:
                likely = np.argsort(-probabilities[0])[:10]
                print(
                    "  words  "
                    + ", ".join(f"{run.vocabulary.words[j]} {probabilities[0, j]:.0%}" for j in likely)
                )
            if asked is not None:
                print(f"  cosine with the given prompt: {float(embeddings[0] @ asked):.3f}")
    except (data.DataError, weights.WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
