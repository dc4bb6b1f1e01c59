"""Parts of `python reverse_sd.py IMAGE`: a run's training prompts, and the judgement of a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import weights
from command import decodable
from files import DataError
from models.bert import MAX_TOKENS
from schema import TEXT, many, read_value, record
from training.calibration import read_calibration
from words import is_content_word, words

BAR = 20  # characters of a certain word


def read_training_prompts(folder: Path) -> tuple[list[str], np.ndarray]:
    """The training prompts of a run and their embeddings (n, E), a memory map. Raises DataError if the run is
    not evaluated."""
    try:
        rule = record({"train": many(record({"prompt": TEXT}))})
        rows = read_value(folder / "predictions" / "rows.json", rule, sys.maxsize)["train"]
        targets = np.load(folder / "predictions" / "train-targets.npy", mmap_mode="r", allow_pickle=False)
        if targets.ndim != 2 or len(targets) != len(rows):
            raise ValueError(f"{len(rows)} rows in rows.json and {targets.shape} targets")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not evaluated yet ({error}); run: python eval.py {folder}") from error
    return [row["prompt"] for row in rows], targets


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
        self.folder, self.known, self.prompt = folder, known, prompt
        self.calibration = read_calibration(folder, len(known))
        self.embedding = embedded(prompt) if prompt else None

    def lines(self, embedding: np.ndarray) -> list[str]:
        """For an image's predicted embedding (E,): the expected cosine; the cosine with the prompt and its
        rank among the validation pairs; for each content word of the prompt P(shown), with a bar."""
        calibration, lines = self.calibration, []
        if calibration:
            lines.append(f"expected cosine with its prompt: {calibration.expected(embedding):.2f}")
        if self.embedding is None:
            return lines
        cosine = float(embedding @ self.embedding)
        text = f"cosine with the given prompt: {cosine:.3f}"
        if not calibration:
            return [text, f"for a score of each word, evaluate this run again: python eval.py {self.folder}"]
        lines.append(f"{text}, above {calibration.rank(cosine):.0%} of the validation pairs")
        shown = dict(zip(self.known, calibration.shown(embedding), strict=True))
        for word in filter(is_content_word, dict.fromkeys(words(self.prompt))):
            judgement = bar(shown[word]) if word in shown else "not judged: not in this run's vocabulary"
            lines.append(f"  {word:<16} {judgement}")
        return lines


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


def bar(p: float) -> str:
    return f"{p:4.0%} {'#' * round(BAR * p)}".rstrip()
