"""The little world's prompts and pictures are those of scenes.VERSION, everywhere and for ever.

If words or drawings change on purpose, raise VERSION and write the new world with

    PYTHONPATH=. python tests/test_drawn_pictures.py
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mini import scenes
from mini.scenes import Scene, Thing, View, candidate, render

WORLD = Path(__file__).parent / "drawn_pictures.json"


def views() -> dict[str, View]:
    """A view for each key of each table, the other slots filled in turn."""
    subjects, colours = list(scenes.SUBJECTS), list(scenes.COLOURS)
    star = View((Thing("star", "red"),), place="snow", light=None)
    pair = View((Thing("cat", "blue"), Thing("tree", None, "wood")), place="desert")
    found = {f"subject {s}": View((Thing(s, None),)) for s in subjects}
    found |= {f"colour {c}": View((Thing(subjects[i], c, "glow"),)) for i, c in enumerate(colours)}
    found |= {f"material {m}": View((Thing("house", "green", m),)) for m in scenes.MATERIALS}
    found |= {f"count {n}": replace(star, count=n) for n in scenes.COUNTS}
    found |= {f"relation {r}": replace(pair, relation=r) for r in scenes.RELATIONS}
    found |= {f"position {p}": replace(star, position=p) for p in scenes.POSITIONS}
    found |= {f"place {p}": replace(star, place=p) for p in scenes.PLACES}
    found |= {f"light {x}": replace(star, light=x) for x in scenes.LIGHTS}
    found |= {f"style {s}": replace(star, style=s, place="lake") for s in scenes.STYLES}
    found |= {f"{p} of all": replace(pair, place=p, relation="left", light="night") for p in scenes.PLACES}
    return found


def quarters(view: View) -> list[float]:
    """The mean level of each colour in each quarter of the picture: 12 numbers."""
    pixels = np.asarray(render(Scene("", (), (), view, view, 7))).astype(float)
    return pixels.reshape(2, 32, 2, 32, 3).mean(axis=(1, 3)).flatten().round(3).tolist()


def digest() -> str:
    """Of the first 300 scenes' prompts, words, views and names, truthful ones too."""
    made = [(candidate(0, i, t), scenes.image_name(0, i, t)) for i in range(150) for t in (False, True)]
    return hashlib.sha256(repr(made).encode()).hexdigest()


@pytest.fixture(scope="module")
def world() -> dict:
    return json.loads(WORLD.read_text())


def test_the_scenes_are_those_of_their_version(world: dict):
    assert (world["version"], world["scenes"]) == (scenes.VERSION, digest())


@pytest.mark.parametrize("name", views())
def test_the_pictures_are_those_of_their_version(name: str, world: dict):
    assert world["pictures"].keys() == views().keys()
    # of 1,024 pixels ten may differ by a level
    np.testing.assert_allclose(quarters(views()[name]), world["pictures"][name], atol=0.01)


def test_the_build_writes_eight_parts_of_a_thousand():
    assert (scenes.PARTS, scenes.PER_PART, scenes.OVERSAMPLE) == (8, 1000, 3)


if __name__ == "__main__":
    pictures = {name: quarters(view) for name, view in views().items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in pictures.items())
    head = f'{{"version": {scenes.VERSION}, "scenes": "{digest()}", "pictures": {{\n'
    WORLD.write_text(f"{head}{lines}\n}}}}\n")
