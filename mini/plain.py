"""Plain descriptions of scenes, as people caption photographs: for models that never saw a prompt.

A description is one sentence of one form, with one word for each thing. It has neither the prompts' synonyms
nor their tags, lists and orders. It names every colour that is drawn, and no style.
"""

from __future__ import annotations

from mini.scenes import PLURALS, Thing, View, with_article
from mini.subjects import SHAPES

# Words for the keys of the tables in scenes.py; a subject's and a colour's word is its key but for these
COLOURS = {"turquoise": "blue green"}
MATERIALS = {
    "wood": "made of wood", "metal": "made of metal", "glass": "made of glass", "stripes": "with stripes",
    "spots": "with dots", "wool": "made of wool", "checks": "with squares", "glow": "that shines",
    "paper": "made of paper", "stone": "made of rock",
}  # fmt: skip
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = {
    "left": "on its right side", "right": "on its left side", "above": "under it", "below": "over it",
    "front": "at its back", "behind": "before it",
}  # fmt: skip
POSITIONS = {
    "left": "at the left edge", "right": "at the right edge", "corner": "near the edge",
    "close": "seen closely", "far": "far away",
}  # fmt: skip
PLACES = {
    "snow": "on snow", "desert": "on dry sand", "sea": "on the water", "forest": "between trees",
    "city": "near tall buildings", "meadow": "on grass", "mountains": "near mountains", "space": "in space",
    "beach": "at the shore", "cave": "inside a cave", "underwater": "below the water",
    "volcano": "near a volcano", "room": "inside a room", "lake": "near a lake",
}  # fmt: skip
LIGHTS = {
    "rain": "while it rains", "fog": "while it is foggy", "sunset": "in the evening",
    "sunrise": "in the morning", "night": "at night", "storm": "during a storm", "snowfall": "while it snows",
    "rainbow": "with a rainbow", "aurora": "with green light in the sky", "leaves": "while leaves fall",
    "blossom": "while petals fall", "rays": "with light from above", "candle": "lit by a candle",
    "clouds": "with clouds",
}  # fmt: skip


def describe(view: View) -> str:
    """A plain description of a drawn view: "a red cat made of wood and a white star between trees at night".
    """
    phrases = [describe_thing(view.things[0], view.count)]
    if view.position:
        phrases.append(POSITIONS[view.position])
    if len(view.things) == 2:
        second = describe_thing(view.things[1])
        phrases.append(f"with {second} {RELATIONS[view.relation]}" if view.relation else f"and {second}")
    phrases += [PLACES[view.place]] if view.place else []
    phrases += [LIGHTS[view.light]] if view.light else []
    return " ".join(phrases)


def describe_thing(thing: Thing, count: int = 1) -> str:
    """A thing's number, colour, name and material: "two red cats made of wood"."""
    colour, name = thing.colour or SHAPES[thing.subject].colour, thing.subject
    name = f"{COLOURS.get(colour, colour)} {PLURALS.get(name, name + 's') if count > 1 else name}"
    material = f" {MATERIALS[thing.material]}" if thing.material else ""
    return (f"{COUNTS[count]} {name}" if count > 1 else with_article(name)) + material
