"""The command `python reverse_sd.py IMAGE|FOLDER...`: its options, the images, and the record of each.

A record is JSON, also a line of --jsonl; null or [] where a run has nothing to give:

    image, stamp      the path as found from the command line; size and time of change of the file
    settings          a hash of the run and of the options that the record depends on
    prompt            the captioner's text, with --add-words followed by the words that were added
    caption, added    its two parts
    clip_score, clip  CLIPScore of `prompt`, and the CLIP that gave it
    nearest           [{prompt, cosine}], of the training prompts or of --prompts
    words             [{word, p}], the words that are most probably in the prompt: calibrated, by the
                      predicted embedding; of a run that lacks its calibration by the vocabulary head
    expected_cosine   of the predicted embedding with the true prompt's
    judged            {prompt, cosine, rank, clip_score, words: [{word, shown}]} of --prompt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import weights
from backbones import BACKBONES, captioner_of
from clipscore import Scorer, clip_score
from command import Parser, decodable, one_line, positive, text
from data import DataError
from files import files_below, read_array, sha256, stamp
from models.bert import CONFIGS, MAX_TOKENS
from schema import TEXT, many, read_json, read_value, record
from training.bank import Bank, bank_of, open_bank
from training.calibration import read_calibration
from training.captioner import trained_model
from training.config import read_run
from training.report import Outputs, lines, stamp_of
from weights.fetch import missing
from weights.registry import ENTRIES
from words import is_content_word, words

BATCH, BATCH_PIXELS = 8, 1 << 26  # images that are read together, at most, and their pixels
LIKELY = 10  # words of a record
PRESENT = 0.5  # probability from which on --add-words adds a word
QUIET = 10  # images without a progress bar

Predictor = Callable[..., tuple[np.ndarray, np.ndarray | None]]

# ============================================================================================================
# The command line
# ============================================================================================================


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Print for each image its prompt as text, the nearest training prompts, the likely "
        "words, the cosine to expect with its prompt and, with --prompt, whether that prompt fits: its "
        "cosine, the rank of that among the run's validation pairs, and for each word the probability that "
        "the image shows it. Folders are searched to the bottom; hidden and other files are passed over.",
        epilog="Train a run first: python train.py --backbone unet. The exit status is 2 if an image could "
        "not be read.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    add("--run", type=Path, help="a run's folder (default: the newest under runs/)")
    add("--prompt", type=text, help="a prompt to judge, word by word")
    captioner = "a BLIP, a BLIP-2 or a run of either that writes the text, or none (default: the run's "
    captioner += "captioner, or blip-mini for a miniature)"
    add("--captioner", metavar="SOURCE", help=captioner)
    add("--add-words", type=positive, default=0, metavar="N", help="add up to N likely words to the text")
    add("--clip", metavar="SOURCE", help="the CLIP of CLIPScore, or none (default: clip-mini or clip-b-32)")
    add("--caption", help="text for the U-Net (default: a caption by the run's captioner)")
    add("--prompts", type=Path, metavar="FILE", help="search these prompts, one a line, or .jsonl or .csv")
    add("-n", type=positive, default=5, help="number of prompts to list (default 5)")
    add("--jsonl", type=Path, metavar="FILE", help="write a line for each image; the same command goes on")
    add("--sidecar", action="store_true", help="write the text as a .txt beside each image that has none")
    add("--html", type=Path, metavar="FILE", help="write one page with all images")
    add("--overwrite", action="store_true", help="replace existing files of these three options")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    return parser.parse_args(argv)


def newest_run() -> Path:
    """The folder under runs/ with the newest result of a regressor. Raises DataError if there is none."""
    finished = sorted(Path("runs").glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in finished:
        if read_json(path.with_name("config.json"), {"backbone": TEXT})["backbone"] in BACKBONES:
            return path.parent
    raise DataError("no finished run under runs/; train one: python train.py --backbone unet")


@dataclass
class Images:
    """The images to read, how many have been, why others cannot be, and the files passed over, by kind."""

    paths: list[Path]
    skipped: list[str]
    others: Counter[str]
    read: int = 0

    def summary(self) -> str:
        others = ", ".join(f"{n:,} {kind}" for kind, n in self.others.most_common(5))
        text = f"{self.read:,} of {len(self.paths):,} images read, {len(self.skipped):,} skipped"
        return text + (f"; passed over: {others}" if others else "")


def find_images(paths: Sequence[Path]) -> Images:
    """The images named and those in folders, in order, each once. Raises DataError for a folder without."""
    images, skipped, others = [], [], Counter()
    for path in paths:
        if not path.is_dir():
            images.append(path)
            continue
        before = len(images)
        for file in files_below(path, lambda *why: skipped.append(": cannot be listed: ".join(why))):
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                others["hidden"] += 1
            elif file.suffix.lower() in data.IMAGE_SUFFIXES:
                images.append(file)
            else:
                others[file.suffix.lower() or file.name] += 1
        if len(images) == before:
            kinds = ", ".join(sorted(data.IMAGE_SUFFIXES))
            raise DataError(f"{path}: holds no image ({kinds}); give another folder")
    return Images(list(dict.fromkeys(images)), skipped, others)


# ============================================================================================================
# Records
# ============================================================================================================


def read_training_prompts(folder: Path) -> tuple[list[str], np.ndarray]:
    """The training prompts of a run and their embeddings (n, E), a memory map. Raises DataError if the run is
    not evaluated."""
    try:
        (prompts,) = split_prompts(folder, "train")
        shape = len(prompts), CONFIGS["minilm"].hidden_size
        targets = read_array(folder / "predictions" / "train-targets.npy", np.float32, shape, "c")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not evaluated yet ({error}); run: python eval.py {folder}") from error
    return prompts, targets


def split_prompts(folder: Path, *splits: str) -> list[list[str]]:
    """The prompts of each of these splits of an evaluated run, in the order of its predictions."""
    rule = record({split: many(record({"prompt": TEXT})) for split in splits})
    rows = read_value(folder / "predictions" / "rows.json", rule, sys.maxsize)
    return [[row["prompt"] for row in rows[split]] for split in splits]


class Captioner:
    """A BLIP or BLIP-2 that writes the text of images. `source`: one of `weights.load`, or a run of train.py,
    whose texts are as long as in its evaluation. Raises weights.WeightsError as `weights.load`."""

    def __init__(self, source: str, device: str):
        self.device, self.settings = device, {}
        if (Path(source) / "vocabulary.json").is_file():  # a run
            config = read_run(Path(source))
            captioner = trained_model(Path(source), config, device=device)
            self.model, self.settings = captioner.model, captioner.settings
            self.preprocessing = data.Preprocessing(**config["preprocessing"])
            return
        weights.require_fed(source, kind := captioner_kind(source))
        self.preprocessing = data.Preprocessing(**weights.preprocessing(kind, source))
        self.model = weights.load(kind, source, device=device)

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        tensors = torch.stack([data.image_tensor(image, self.preprocessing) for image in images])
        return self.model.generate(tensors.to(self.device), **self.settings)


def captioner_kind(source: str) -> str:
    try:
        weights.config("blip2", source)
        return "blip2"
    except DataError:  # also of a source that is neither; loading a BLIP then names the reason
        return "blip"


class Judge:
    """The judgement of a run's predictions, and of a prompt beside them.

    `known`: the words of the run's vocabulary. Raises DataError, in one line, if the prompt is too long for
    the sentence encoder or contains none of these words.
    """

    def __init__(self, folder: Path, known: Sequence[str], prompt: str | None):
        if prompt and not set(words(prompt)) & set(known):
            raise DataError(
                f"--prompt {prompt}: none of its words is among the {len(known)} of this run; use some of "
                f"{folder}/vocabulary.json, e.g. {', '.join(known[:5])}"
            )
        self.known, self.prompt = known, prompt
        self.calibration = read_calibration(folder, len(known))
        if prompt and not self.calibration:
            again = f"evaluate this run again: python eval.py {folder}"
            print(f"for a score of each word, {again}", file=sys.stderr)
        self.embedding = embedded(prompt) if prompt else None

    def expected(self, embedding: np.ndarray) -> float | None:
        """The cosine to expect of a predicted embedding (E,) with the true prompt's."""
        return float(self.calibration.expected(embedding)) if self.calibration else None

    def judged(self, embedding: np.ndarray, clip_score: float | None) -> dict | None:
        """The prompt's cosine with a predicted embedding (E,), the share of the validation pairs below it,
        and P(shown) of each content word, None for a word that the run lacks."""
        if self.embedding is None:
            return None
        cosine, shown, rank = float(embedding @ self.embedding), {}, None
        if self.calibration:
            rank = self.calibration.rank(cosine)
            shown = dict(zip(self.known, self.calibration.shown(embedding).tolist(), strict=True))
        content = filter(is_content_word, dict.fromkeys(words(self.prompt))) if self.calibration else ()
        by_word = [{"word": word, "shown": shown.get(word)} for word in content]
        scores = {"cosine": cosine, "rank": rank, "clip_score": clip_score}
        return {"prompt": self.prompt} | scores | {"words": by_word}


def embedded(prompt: str) -> np.ndarray:
    """The sentence embedding (E,) of a prompt. Raises DataError if it is too long for the encoder."""
    minilm = weights.load("minilm")
    minilm.tokenizer.no_truncation()
    prompt = decodable(prompt)
    if (tokens := len(minilm.tokenizer.encode(prompt).ids)) > MAX_TOKENS:
        raise DataError(
            f"--prompt: has {tokens} tokens, and the sentence encoder reads at most {MAX_TOKENS}; shorten it"
        )
    return minilm.encode([prompt])[0].numpy()


def words_to_add(caption: str, likely: Sequence[dict], n: int) -> list[str]:
    """Up to `n` of the likely words, of probability PRESENT or more, that a caption lacks."""
    there = set(words(caption))
    return [word["word"] for word in likely if word["p"] >= PRESENT and word["word"] not in there][:n]


def captioner_source(args: argparse.Namespace, run: Any) -> tuple[str | None, bool]:
    """The captioner of the text, None without; whether it is also the one whose captions the U-Net reads."""
    own = captioner_of(run.config["captions"]) if run.backbone.white_box else None
    mini = "blip-mini" if run.config["weights"] == run.backbone.mini else None
    source = args.captioner or own or mini
    return None if source == "none" else source, own is not None and source == own


def clip_source(args: argparse.Namespace, run: Any) -> str | None:
    """--clip, or clip-mini for a miniature, or clip-b-32 if it has been fetched, or None."""
    if args.clip:
        return None if args.clip == "none" else args.clip
    if run.config["weights"] == run.backbone.mini:
        return "clip-mini"
    return None if any(missing(ENTRIES[name]) for name in ("clip-b-32", "clip-tokenizer")) else "clip-b-32"


class Reader:
    """The records of images by a run (reverse_sd.Run) and its predictor."""

    def __init__(self, args: argparse.Namespace, run: Any, predict_images: Predictor, device: str):
        if args.caption is not None and not run.backbone.white_box:
            raise DataError(f"--caption: {run.folder} reads no text; leave it out")
        self.args, self.words, self.predict_images = args, run.vocabulary.words, predict_images
        self.judge = Judge(run.folder, self.words, args.prompt)
        self.bank: Bank = open_bank(args.prompts, device) if args.prompts else bank_of(
            *read_training_prompts(run.folder)
        )  # fmt: skip
        source, self.feeds = captioner_source(args, run)
        self.captioner = Captioner(source, device) if source else None
        self.clip = clip_source(args, run)
        self.scorer = Scorer(self.clip, device) if self.clip else None
        options = [args.prompt, args.caption, args.add_words, args.n, source, self.clip]
        files = [run.folder / "model.safetensors", run.folder / "calibration.json"]
        files += [args.prompts, source and Path(source) / "model.safetensors"]
        stamps = [file and stamp(file) for file in files]
        self.settings = sha256(json.dumps([str(run.folder.resolve()), stamps, options]))[:16]

    def records(self, paths: Sequence[Path], images: Sequence[Image.Image]) -> list[dict]:
        n, args = len(images), self.args
        captions = self.captioner.captions(images) if self.captioner else [None] * n
        fed = [args.caption] * n if args.caption is not None else captions if self.feeds else None
        embeddings, probabilities = self.predict_images(images, fed)
        if self.judge.calibration:
            probabilities = self.judge.calibration.in_prompt(embeddings)
        likely = [[]] * n if probabilities is None else [self.likely(p) for p in probabilities]
        added = [words_to_add(c or "", w, args.add_words) for c, w in zip(captions, likely, strict=True)]
        prompts = [
            None if caption is None else ", ".join([caption.rstrip(" ,"), *more]) if more else caption
            for caption, more in zip(captions, added, strict=True)
        ]
        scores, of_judged = self.clip_scores(images, prompts, [args.prompt] * n)
        nearest = self.bank.nearest(embeddings, args.n)
        return [
            {
                "image": str(path),
                "stamp": stamp_of(path),
                "settings": self.settings,
                "prompt": prompts[k],
                "caption": captions[k],
                "added": added[k] if captions[k] is not None else [],
                "clip_score": scores[k],
                "clip": self.clip,
                "nearest": [{"prompt": prompt, "cosine": cosine} for prompt, cosine in nearest[k]],
                "words": likely[k],
                "expected_cosine": self.judge.expected(embeddings[k]),
                "judged": self.judge.judged(embeddings[k], of_judged[k]),
            }
            for k, path in enumerate(paths)
        ]

    def likely(self, probabilities: np.ndarray) -> list[dict]:
        """The LIKELY most probable words and their probabilities, from those of all words (V,)."""
        order = np.argsort(-probabilities)[:LIKELY].tolist()
        return [{"word": self.words[j], "p": float(probabilities[j])} for j in order]

    def clip_scores(self, images: Sequence[Image.Image], *texts: Sequence[str | None]) -> list[list]:
        """For each list of texts the CLIPScore of each image's, None without a CLIP or a text."""
        pictures = self.scorer.images(images) if self.scorer else None
        return [
            clip_score(pictures, self.scorer.texts(of)).tolist()
            if self.scorer and None not in of
            else [None] * len(images)
            for of in texts
        ]


# ============================================================================================================
# All images
# ============================================================================================================


@dataclass
class Item:
    """An image to read; `image` is None if only its record is wanted, `record` is None until it is made."""

    path: Path
    image: Image.Image | None
    record: dict | None


def batches(images: Images, done: dict[str, dict], pictures: bool) -> Iterator[list[Item]]:
    """Batches of images in order. Those in `done` are decoded only if `pictures` are wanted; the unreadable
    are added to `images.skipped`."""
    batch, pixels = [], 0
    for path in images.paths:
        before, image = done.get(str(path)), None
        if before is None or pictures:
            try:
                image = data.load_image(path)
            except DataError as error:
                images.skipped.append(one_line(error))
                continue
            pixels += image.width * image.height
        batch.append(Item(path, image, before))
        if len(batch) == BATCH or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def read_images(args: argparse.Namespace, run: Any, predict_images: Predictor, device: str) -> int:
    """The exit status: 2 if an image was skipped. Prints and writes the records of all images."""
    images = find_images(args.images)
    reader = Reader(args, run, predict_images, device)
    with Outputs(args, images, reader.settings) as outputs:
        n = len(images.paths)
        with tqdm(total=n, desc="reading images", unit="image", disable=n <= QUIET) as bar:
            for batch in batches(images, outputs.done, args.html is not None):
                if new := [item for item in batch if item.record is None]:
                    made = reader.records([item.path for item in new], [item.image for item in new])
                    for item, content in zip(new, made, strict=True):
                        item.record = content
                for item in batch:
                    outputs.write(item.path, item.image, item.record)
                    bar.write("\n".join(lines(item.record)))
                    images.read += 1
                bar.update(len(batch))
    return 2 if images.skipped else 0
