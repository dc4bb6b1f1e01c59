"""A DrawBench of the little world: prompts that ask for one difficult thing at a time, by category.

DrawBench (Saharia et al. 2022) has 200 prompts in 11 categories; this has as many in 8, those of its
categories that mini scenes can show. None of the prompts is among those that the miniatures learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mini import scenes
from mini.pen import pick, stream
from mini.scenes import COLOURS, COUNTS, LIGHTS, MATERIALS, PLACES, RELATIONS, STYLES, SUBJECTS, Thing, View

SEED = 2_000_003
LEARNT_FROM = 50_000  # at least as many candidates as mini.loop takes
PER_CATEGORY = 25


@dataclass(frozen=True)
class Asked:
    """A prompt, what it asks for, and why it is in the list."""

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
def learnt_from() -> frozenset[str]:
    """The prompts of the scenes that the miniatures learnt from, and some more."""
    return frozenset(scenes.candidate(scenes.PRETRAIN_SEED, i).prompt for i in range(LEARNT_FROM))


def prompts(seen: set[str], per_category: int = PER_CATEGORY) -> list[Asked]:
    """The list, always the same but for prompts in `seen`, which are passed over too."""
    seen = seen | learnt_from()
    asked: list[Asked] = []
    for number, (category, sample) in enumerate(CATEGORIES.items()):
        rng, found = stream(SEED, number), 0
        while found < per_category:
            view = sample(rng)
            if len({thing.subject for thing in view.things}) < len(view.things):
                continue
            prompt = scenes.say(scenes.choose_words(view, rng), rng)
            if prompt not in seen:
                asked.append(Asked(prompt, view, category))
                seen = seen | {prompt}
                found += 1
    return asked
