"""Views of mini scenes in other words, and how well the mean of infinitely many predicts a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mini import scenes
from training.inputs import prompt_targets


def random_of(view: scenes.View) -> np.random.Generator:
    """A generator for a view, equal for equal views and independent of the data's."""
    return scenes.stream(*hashlib.sha256(repr(view).encode()).digest())


def wordings(view: scenes.View, k: int) -> list[str]:
    """k prompts for a view by the rules that made the data's: synonyms, form, order and tags drawn anew."""
    rng = random_of(view)
    return [scenes.say(scenes.choose_words(view, rng), rng) for _ in range(k)]


def embedded_wordings(views: Sequence[scenes.View], k: int, device: str) -> np.ndarray:
    """The embeddings (n, k, E) of k wordings of each view, unit rows."""
    texts = [text for view in views for text in wordings(view, k)]
    return prompt_targets(texts, device)[np.arange(len(texts))].reshape(len(views), k, -1)


def limit_cosines(embeddings: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The cosine (n,) of each unit target (n, E) with the mean embedding of infinitely many wordings,
    estimated from the embeddings (n, k, E) of k of them.

    The mean of k wordings is on average longer than that of infinitely many, so that its cosine is too low.
    The squared length of the latter is the expected product of two different wordings.
    """
    k, embeddings = embeddings.shape[1], embeddings.astype(np.float64)
    total = embeddings.sum(axis=1)
    products = (total**2).sum(axis=-1) - (embeddings**2).sum(axis=(1, 2))  # of all ordered pairs
    return (total * targets).sum(axis=-1) / k / np.sqrt(products / (k * (k - 1)))
