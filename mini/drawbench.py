"""DrawBench for mini scenes: prompts with one difficulty each, by category.

DrawBench (Saharia et al. 2022) has 200 prompts in 11 categories; this has as many in 8, those of its
categories that mini scenes can show. None of the prompts is in the miniatures' training data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mini import scenes
from mini.pen import pick, stream
from mini.scenes import COLOURS, COUNTS, LIGHTS, MATERIALS, PLACES, RELATIONS, STYLES, SUBJECTS, Thing, View

SEED = 2_000_003
TRAINING_CANDIDATES = 50_000  # at least as many as mini.loop takes
PER_CATEGORY = 25


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, its content and its category."""

    prompt: str
    view: View
    category: str


def simple(rng: np.random.Generator) -> View:
    """A thing of a colour in a place."""
    return View((Thing(pick(rng, SUBJECTS), pick(rng, COLOURS)),), place=pick(rng, PLACES))


def two(rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Two things of different kinds and colours."""
    first = Thing(pick(rng, SUBJECTS), pick(rng, COLOURS))
    return first, Thing(pick(rng, SUBJECTS, [first.subject]), pick(rng, COLOURS, [first.colour]))


def made_of(rng: np.random.Generator) -> View:
    view = simple(rng)
    return replace(view, things=(replace(view.things[0], material=pick(rng, MATERIALS)),))


def outdoors(rng: np.random.Generator) -> View:
    """A place that has a sky."""
    return replace(simple(rng), place=pick(rng, PLACES, scenes.INDOORS))


CATEGORIES = {
    "colours": simple,
    "counting": lambda rng: replace(simple(rng), count=pick(rng, COUNTS)),
    "two things": lambda rng: View(two(rng), place=pick(rng, PLACES)),
    "positions": lambda rng: View(two(rng), relation=pick(rng, RELATIONS), place=pick(rng, PLACES)),
    "materials": made_of,
    "light": lambda rng: replace(outdoors(rng), light=pick(rng, LIGHTS)),
    "styles": lambda rng: replace(simple(rng), style=pick(rng, STYLES)),
    "descriptions": lambda rng: replace(
        outdoors(rng), things=(*made_of(rng).things, *two(rng)[1:]), relation=pick(rng, RELATIONS),
        light=pick(rng, LIGHTS),
    ),
}  # fmt: skip


@cache
def training_prompts() -> frozenset[str]:
    """The prompts of the miniatures' training scenes, and some more."""
    return frozenset(scenes.candidate(scenes.PRETRAIN_SEED, i).prompt for i in range(TRAINING_CANDIDATES))


def prompts(seen: set[str], per_category: int = PER_CATEGORY) -> list[BenchPrompt]:
    """The list of prompts, without those in `seen`."""
    seen = seen | training_prompts()
    chosen: list[BenchPrompt] = []
    for number, (category, sample) in enumerate(CATEGORIES.items()):
        rng, n = stream(SEED, number), 0
        while n < per_category:
            view = sample(rng)
            if len({thing.subject for thing in view.things}) < len(view.things):
                continue
            prompt = scenes.say(scenes.choose_words(view, rng), rng)
            if prompt not in seen:
                chosen.append(BenchPrompt(prompt, view, category))
                seen = seen | {prompt}
                n += 1
    return chosen
