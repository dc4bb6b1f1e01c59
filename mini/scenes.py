"""Mini scenes: a small drawn world with prompts as people write them for Stable Diffusion.

    python -m mini.scenes --sheet sheet.png          look at 64 of them
    python -m mini.scenes --build FOLDER             write 8,000 of them as DiffusionDB parts

A Scene holds what its prompt says and what its picture shows. The two differ where words were left undrawn,
on purpose, as Stable Diffusion leaves out words: label noise whose truth is known. The file reads from top to
bottom: the words, the scene and how it is sampled, how it is said, the pen, the subjects, the materials, the
places, the light, the styles, the picture, the DiffusionDB parts.
"""

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import textwrap
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from data import atomic_write, clean

VERSION = 2                    # part of every image's name: raise it when words or drawings change
OVERSAMPLE = 3                 # pictures are drawn three times as large and averaged down
NOISE = (0.30, 2.20)           # Beta(a, b) of a sample's noise level: mean 0.12, most near 0, a few above 0.5

# -------------------------------------------------------------------------------------------------- the words
# What can be drawn, and the words that may say it, separated by "|". What stands before a "*" only leads up
# to the word. Within a table no word says two things, so a prompt's words name its picture.

SUBJECTS = {
    "star": "star", "moon": "moon|crescent moon", "cat": "cat|kitten", "fish": "fish|goldfish",
    "tree": "tree|oak", "house": "house|cottage", "boat": "boat|sailboat", "flower": "flower|daisy",
    "mushroom": "mushroom|toadstool", "cactus": "cactus|saguaro", "castle": "castle|fortress",
    "heart": "heart", "cup": "cup|mug", "umbrella": "umbrella|parasol", "balloon": "balloon|hot air balloon",
    "rocket": "rocket|spaceship", "bird": "bird|sparrow", "butterfly": "butterfly|moth",
    "crown": "crown|tiara", "key": "key", "lantern": "lantern|lamp", "apple": "apple",
    "robot": "robot|android", "snowman": "snowman", "owl": "owl", "whale": "whale", "car": "car|automobile",
    "ghost": "ghost|phantom",
}
PLURALS = {
    "fish": "fish", "goldfish": "goldfish", "cactus": "cacti", "snowman": "snowmen", "daisy": "daisies",
    "butterfly": "butterflies", "fortress": "fortresses",
}
COLOURS = {
    "red": "red|crimson|scarlet", "orange": "orange|tangerine", "yellow": "yellow|golden|lemon yellow",
    "green": "green|emerald", "turquoise": "turquoise|teal|cyan", "blue": "blue|azure|cobalt blue",
    "purple": "purple|violet", "pink": "pink|fuchsia", "brown": "brown|chestnut", "white": "white|ivory",
    "black": "black|ebony", "grey": "grey|silver",
}
MATERIALS = {
    "wood": "wooden", "metal": "metallic|chrome", "glass": "glass|transparent", "stripes": "striped",
    "spots": "spotted|polka dot", "wool": "knitted|woollen", "checks": "checkered|plaid",
    "glow": "glowing|luminous", "paper": "origami|folded paper", "stone": "stone|marble",
}
COUNTS = {2: "two|a pair of", 3: "three", 4: "four", 5: "five"}
RELATIONS = {
    "left": "to the *left of", "right": "to the *right of", "above": "above", "below": "below|underneath",
    "front": "in *front of", "behind": "behind",
}
POSITIONS = {
    "left": "on the *left", "right": "on the *right", "corner": "in the *corner", "close": "*close - up",
    "far": "in the *distance",
}
PLACES = {
    "snow": "in a *snowy field|in the *snow|on the *frozen tundra",
    "desert": "in the *desert|among *sand dunes|in the *sahara",
    "sea": "on the *sea|on the *ocean|on *rolling waves",
    "forest": "in a *forest|in the *woods|among *tall pine trees",
    "city": "in a *city|before a *city skyline|among *skyscrapers",
    "meadow": "in a *meadow|in a *field of flowers|on a *grassy hill",
    "mountains": "in the *mountains|before *snowy peaks|in the *alps",
    "space": "in *outer space|in a *galaxy|among the *planets",
    "beach": "on the *beach|on a *tropical beach|on a *sandy shore",
    "cave": "in a *cave|inside a *dark cavern|in a *grotto",
    "underwater": "*underwater|on a *coral reef|at the *bottom of the sea",
    "volcano": "near a *volcano|beside *flowing lava",
    "room": "in a *cosy room|in a *library|in a *living room",
    "lake": "by a *lake|beside a *calm pond",
}
LIGHTS = {
    "rain": "in the *rain|on a *rainy day|in a *downpour",
    "fog": "in thick *fog|in the *mist|on a *foggy morning",
    "sunset": "at *sunset|at *dusk", "sunrise": "at *sunrise|at *dawn",
    "night": "at *night|under a *starry sky|at *midnight", "storm": "in a *thunderstorm|under *lightning",
    "snowfall": "in falling *snow flakes|in a *blizzard|during *snowfall", "rainbow": "under a *rainbow",
    "aurora": "under the *aurora|under *northern lights", "leaves": "with *falling autumn leaves|in *autumn",
    "blossom": "with *cherry blossom petals|in *spring", "rays": "in *god rays|with *sun beams",
    "candle": "in *candlelight|in warm *firelight", "clouds": "under *fluffy clouds|under a *cloudy sky",
}
STYLES = {
    "watercolor": "watercolor painting|aquarelle|watercolor",
    "pixel": "pixel art|8 - bit pixel art|retro game sprite",
    "sketch": "pencil sketch|pencil drawing|graphite drawing",
    "oil": "oil painting|impasto painting|oil on canvas",
    "woodcut": "woodcut|linocut|block print", "neon": "neon sign|neon art|synthwave art",
    "pastel": "pastel drawing|chalk drawing|soft pastel art",
    "lowpoly": "low poly render|low poly art|polygonal art",
    "glass": "stained glass|stained glass window|cathedral window",
    "comic": "comic book panel|pop art|halftone print", "blueprint": "blueprint|technical drawing|cyanotype",
    "mosaic": "mosaic|tile mosaic|roman mosaic",
    "vintage": "vintage photograph|old photograph|sepia photograph",
    "stitch": "cross stitch|embroidery|needlework",
}
MASS_NOUNS = ("art", "canvas", "glass", "stitch", "embroidery", "needlework")        # no "a" before these
# what real prompts are full of and no picture shows
BOILERPLATE = ("highly detailed|trending on artstation|8 k|sharp focus|intricate|masterpiece|award winning"
               "|4 k|concept art|beautiful composition|very detailed|hd|artstation hq|stunning").split("|")
INDOORS = ("space", "cave", "underwater", "room")                     # no sky: only these lights reach in
EVERYWHERE = ("rays", "candle")


def words_of(table: dict, key) -> list[tuple[str, str]]:
    """What may say `key`: pairs of the words leading up to it ("in a ", often empty) and the word itself."""
    return [(text.rpartition("*")[0], text.rpartition("*")[2]) for text in table[key].split("|")]


def distinct_prompts() -> int:
    """A lower bound of the number of distinct prompts: one thing, in one form of sentence."""
    tables = (SUBJECTS, COLOURS, MATERIALS, PLACES, STYLES)
    return math.prod(sum(len(words_of(table, key)) for key in table) for table in tables)


# -------------------------------------------------------------------------------------------------- the scene
@dataclass(frozen=True)
class Thing:
    """One kind of thing: keys of SUBJECTS, COLOURS, MATERIALS; None where nothing is said."""
    subject: str
    colour: str | None = None
    material: str | None = None


@dataclass(frozen=True)
class View:
    """Everything that a prompt can say and a picture can show, by the keys of the tables above."""
    things: tuple[Thing, ...]
    count: int = 1                                                    # of the first thing
    relation: str | None = None                                       # of the first thing to the second
    position: str | None = None
    place: str | None = None
    light: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class Scene:
    """A prompt and its picture.

    `words` are its content words, each as it stands in the prompt (some, as "stained glass", are two
    or more), `undrawn` those of them that the picture does not show. `seed` fixes the jitter of the drawing.
    """
    prompt: str
    words: tuple[str, ...]
    undrawn: tuple[str, ...]
    said: View
    drawn: View
    seed: int


def pick(rng: np.random.Generator, options, besides=()):
    """One of `options` that is not among `besides`."""
    options = [option for option in options if option not in besides]
    return options[int(rng.integers(len(options)))]


def stream(*key: int) -> np.random.Generator:
    """The random numbers that belong to a key of whole numbers, the same on every platform."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: what is said, in which words, and which of these stay undrawn."""
    said = sample_view(rng)
    spoken = choose_words(said, rng)
    prompt = say(spoken, rng)
    level = rng.beta(*NOISE)
    drawn, lost = undraw(said, {slot for slot in spoken if rng.random() < level}, rng)
    words = {slot: word for slot, (_, word) in spoken.items()}
    undrawn = tuple(word for slot, word in words.items() if slot in lost)
    return Scene(prompt, tuple(words.values()), undrawn, said, drawn, int(rng.integers(2**32)))


def sample_view(rng: np.random.Generator) -> View:
    """What a prompt asks for. Nearly all name a colour and a place; most name a light and a style."""
    things = []
    for _ in range(2 if rng.random() < 0.3 else 1):
        subject = pick(rng, SUBJECTS, [thing.subject for thing in things])
        colour = pick(rng, COLOURS, [thing.colour for thing in things]) if rng.random() < 0.85 else None
        material = pick(rng, MATERIALS, [thing.material for thing in things]) if rng.random() < 0.3 else None
        things.append(Thing(subject, colour, material))
    view = View(tuple(things))
    if len(things) == 2:
        view = replace(view, relation=pick(rng, RELATIONS) if rng.random() < 0.7 else None)
    elif rng.random() < 0.3:
        view = replace(view, count=pick(rng, COUNTS))
    elif rng.random() < 0.15:
        view = replace(view, position=pick(rng, POSITIONS))
    place = pick(rng, PLACES) if rng.random() < 0.94 else None
    lights = EVERYWHERE if place in INDOORS else LIGHTS
    light = pick(rng, lights) if rng.random() < (0.3 if place in INDOORS else 0.68) else None
    style = pick(rng, STYLES) if rng.random() < 0.72 or not (place or light) else None
    return replace(view, place=place, light=light, style=style)


def undraw(said: View, lost: set[str], rng: np.random.Generator) -> tuple[View, set[str]]:
    """The view that is drawn instead when the slots in `lost` are not heeded, and all slots lost by that."""
    things = list(said.things)
    for i, thing in enumerate(said.things):
        if f"subject {i}" in lost:
            others = [other.subject for other in said.things]
            thing = replace(thing, subject=pick(rng, SUBJECTS, others))
        if f"colour {i}" in lost:
            thing = replace(thing, colour=pick(rng, COLOURS, [other.colour for other in said.things]))
        if f"material {i}" in lost:
            thing = replace(thing, material=pick(rng, [None, *MATERIALS], [thing.material]))
        things[i] = thing
    drawn = replace(said, things=tuple(things))
    if "count" in lost:
        drawn = replace(drawn, count=pick(rng, [1, *COUNTS], [said.count]))
    if "relation" in lost:
        drawn = replace(drawn, relation=pick(rng, RELATIONS, [said.relation]))
    if "position" in lost:
        drawn = replace(drawn, position=pick(rng, [None, *POSITIONS], [said.position]))
    if "light" in lost:
        lights = EVERYWHERE if said.place in INDOORS else LIGHTS
        drawn = replace(drawn, light=pick(rng, [None, *lights], [said.light]))
    if "place" in lost:
        closed = () if drawn.light is None or drawn.light in EVERYWHERE else INDOORS
        drawn = replace(drawn, place=pick(rng, [None, *PLACES], [said.place, *closed]))
    if "style" in lost:
        drawn = replace(drawn, style=pick(rng, [None, *STYLES], [said.style]))
    if "subject 1" in lost and rng.random() < 0.5:                    # missing, with all its words
        drawn = replace(drawn, things=drawn.things[:1], relation=None)
        lost = lost | {"colour 1", "material 1", "relation"}
    return drawn, lost


# --------------------------------------------------------------------------------------------- how it is said
def choose_words(view: View, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """Slot -> (lead, word) for everything the view says, with synonyms chosen and plurals made."""
    spoken = {}
    if view.count > 1:
        spoken["count"] = pick(rng, words_of(COUNTS, view.count))
    for i, thing in enumerate(view.things):
        if thing.colour:
            spoken[f"colour {i}"] = pick(rng, words_of(COLOURS, thing.colour))
        if thing.material:
            spoken[f"material {i}"] = pick(rng, words_of(MATERIALS, thing.material))
        lead, word = pick(rng, words_of(SUBJECTS, thing.subject))
        spoken[f"subject {i}"] = (lead, PLURALS.get(word, word + "s") if view.count > 1 else word)
    tables = {"relation": RELATIONS, "position": POSITIONS, "place": PLACES, "light": LIGHTS, "style": STYLES}
    for slot, table in tables.items():
        if getattr(view, slot):
            spoken[slot] = pick(rng, words_of(table, getattr(view, slot)))
    return spoken


def with_article(words: str) -> str:
    """"an ivory owl", "a cat", but "pixel art"."""
    if words.split()[-1] in MASS_NOUNS:
        return words
    return ("an " if words[0] in "aeio" or words.startswith("umbrella") else "a ") + words


def say(spoken: dict[str, tuple[str, str]], rng: np.random.Generator) -> str:
    """Put the words into one of the forms real prompts have: a sentence, a comma list, or the scene first."""
    phrases = {slot: lead + word for slot, (lead, word) in spoken.items()}
    nouns = []
    for i in range(1 + ("subject 1" in phrases)):
        kinds = ("colour", "material") if rng.random() < 0.5 else ("material", "colour")
        noun = " ".join(phrases[f"{kind} {i}"] for kind in (*kinds, "subject") if f"{kind} {i}" in phrases)
        nouns.append(f"{phrases['count']} {noun}" if "count" in phrases else with_article(noun))
    core = f" {phrases.get('relation', 'and')} ".join(nouns)
    if "position" in phrases:
        core += " " + phrases["position"]
    tags = [BOILERPLATE[i] for i in rng.permutation(len(BOILERPLATE))[:int(rng.integers(3))]]
    if "style" in phrases and rng.random() < 0.6:
        core = f"{with_article(phrases['style'])} of {core}"
    elif "style" in phrases:
        tags.append(phrases["style"])
    form = rng.random()
    setting = [slot for slot in ("place", "light") if slot in spoken]
    if form < 0.5:                                                    # a cat in a forest at night, tags
        core = " ".join([core, *(phrases[slot] for slot in setting)])
    elif form < 0.8:                                                  # a cat, forest, tag, night in any order
        tags += [spoken[slot][1] for slot in setting]
    else:                                                             # at night in a forest, a cat, tags
        core = " ".join([phrases[slot] for slot in reversed(setting)]) + (", " if setting else "") + core
    return ", ".join([core, *(tags[i] for i in rng.permutation(len(tags)))])


# ---------------------------------------------------------------------------------------------------- the pen
CREAM, INK, LEAF, BARK, GOLD = (250, 243, 224), (42, 36, 52), (92, 156, 78), (124, 84, 54), (250, 204, 84)
SHADE = (36, 26, 62)                                                  # what shadows lean towards
PAINT = {
    "red": (208, 48, 50), "orange": (240, 134, 40), "yellow": (248, 204, 60), "green": (64, 160, 82),
    "turquoise": (48, 182, 178), "blue": (50, 100, 208), "purple": (136, 78, 188), "pink": (242, 122, 168),
    "brown": (132, 86, 52), "white": (248, 244, 234), "black": (50, 46, 58), "grey": (148, 152, 164),
}


def mix(a, b, share: float) -> tuple[int, int, int]:
    """Colour `a` with `share` of colour `b` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def ring(cx: float, cy: float, rx: float, ry: float, n=24, start: float = 0, turn: float = 360) -> list:
    """n + 1 points along an ellipse from `start` degrees through `turn`, clockwise, 0 at the right."""
    angles = [math.radians(start + turn * i / n) for i in range(n + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


class Pen:
    """Draws on an image in unit coordinates, (0, 0) upper left.

    With a colour `main`, shapes in its tones `main`, `dark` and `light` are marked in `own`; materials
    go there. `glows` collects lights (x, y, radius, colour, strength), laid on when all else is drawn.
    """

    def __init__(self, image: Image.Image, main: tuple[int, int, int] | None = None):
        self.image, self.n, self.glows = image, image.width, []
        self.draws, self.tones = [ImageDraw.Draw(image)], ()
        if main:
            self.main, self.light = main, mix(main, (255, 255, 255), 0.38)
            self.dark = mix(main, SHADE, 0.38) if sum(main) > 240 else mix(main, (120, 116, 140), 0.3)
            self.tones = (self.main, self.dark, self.light)
            self.own = Image.new("L", image.size)
            self.draws.append(ImageDraw.Draw(self.own))

    def inks(self, fill):
        """Each canvas with the ink for it: the colour, and whether it is one of the pen's own tones."""
        return zip(self.draws, (fill, 255 * (fill in self.tones)), strict=False)

    def poly(self, points, fill):
        points = [(x * self.n, y * self.n) for x, y in points]
        for draw, ink in self.inks(fill):
            draw.polygon(points, ink)

    def oval(self, cx, cy, rx, ry, fill):
        box = [(cx - rx) * self.n, (cy - ry) * self.n, (cx + rx) * self.n, (cy + ry) * self.n]
        for draw, ink in self.inks(fill):
            draw.ellipse(box, ink)

    def rect(self, x0, y0, x1, y1, fill):
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def line(self, points, width, fill):
        """A round-ended stroke, `width` in unit coordinates."""
        pixels, wide = [(x * self.n, y * self.n) for x, y in points], max(1, round(width * self.n))
        for draw, ink in self.inks(fill):
            draw.line(pixels, ink, wide, "curve")
        if wide > 3:
            for x, y in (points[0], points[-1]):
                self.oval(x, y, width / 2, width / 2, fill)

    def glow(self, x, y, radius, colour, strength=1.0):
        self.glows.append((x, y, radius, colour, strength))


def floats(image: Image.Image) -> np.ndarray:
    """A picture as float32 (n, n, channels), 0 to 255."""
    return np.asarray(image).astype(np.float32)


def picture(pixels: np.ndarray) -> Image.Image:
    """The picture of an array as `floats` gives it, clipped."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ----------------------------------------------------------------------------------------------- the subjects
# One function a subject, in a unit square; what stands has its feet near y = 0.97.

def draw_star(p: Pen):
    outer, inner = ring(.5, .54, .5, .5, 5, -90), ring(.5, .54, .22, .22, 5, -54)
    for i in range(5):
        p.poly([(.5, .54), inner[i - 1], outer[i]], p.light)
        p.poly([(.5, .54), outer[i], inner[i]], p.main)


def draw_moon(p: Pen):
    p.poly(ring(.48, .5, .46, .46, 32, 37.7, 259.6) + ring(.66, .46, .37, .37, 32, -85.2, -214.7), p.main)
    for x, y, r in ((.17, .5, .06), (.3, .75, .045), (.27, .27, .04)):
        p.oval(x, y, r, r, p.dark)


def draw_cat(p: Pen):
    p.line(ring(.76, .72, .16, .2, 12, 110, -200), .08, p.dark)
    p.oval(.5, .74, .27, .24, p.main)
    p.oval(.5, .8, .13, .16, p.light)
    for s in (-1, 1):
        p.poly([(.5 + s * .29, .06), (.5 + s * .04, .24), (.5 + s * .27, .4)], p.main)
        p.poly([(.5 + s * .25, .14), (.5 + s * .12, .25), (.5 + s * .24, .33)], (236, 160, 160))
        p.oval(.5 + s * .14, .94, .09, .045, p.light)
    p.oval(.5, .38, .3, .24, p.main)
    for s in (-1, 1):
        p.oval(.5 + s * .13, .36, .065, .075, (222, 236, 130))
        p.oval(.5 + s * .13, .36, .03, .07, INK)
        for y in (.44, .5):
            p.line([(.5 + s * .1, .46), (.5 + s * .38, y)], .012, CREAM)
    p.poly([(.455, .435), (.545, .435), (.5, .49)], (226, 120, 130))


def draw_fish(p: Pen):
    p.poly([(.3, .5), (.0, .2), (.08, .5), (.0, .8)], p.dark)
    p.poly([(.38, .3), (.5, .1), (.72, .28)], p.dark)
    p.poly([(.45, .7), (.5, .9), (.65, .72)], p.dark)
    p.oval(.58, .5, .4, .26, p.main)
    p.poly(ring(.6, .56, .34, .17, 20, 0, 180), p.light)
    for x in (.38, .5):
        p.line(ring(x, .5, .1, .16, 10, -60, 120), .025, p.dark)
    p.oval(.82, .43, .07, .07, CREAM)
    p.oval(.835, .43, .035, .035, INK)


def draw_tree(p: Pen):
    p.poly([(.43, .55), (.57, .55), (.6, .9), (.68, .97), (.32, .97), (.4, .9)], BARK)
    p.line([(.5, .75), (.68, .55)], .05, BARK)
    for x, y, r in ((.26, .48, .23), (.74, .48, .23), (.5, .56, .22)):
        p.oval(x, y, r, r * .9, p.dark)
    for x, y, r in ((.35, .32, .24), (.65, .34, .23), (.5, .22, .21)):
        p.oval(x, y, r, r * .9, p.main)
    for x, y, r in ((.32, .25, .1), (.5, .14, .09), (.64, .28, .07)):
        p.oval(x, y, r, r * .75, p.light)


def draw_house(p: Pen):
    p.rect(.68, .12, .8, .4, (150, 90, 80))
    p.rect(.14, .45, .86, .97, p.main)
    p.rect(.14, .45, .86, .52, p.dark)
    p.poly([(.5, .06), (.98, .48), (.02, .48)], mix(p.main, (92, 52, 60), .72))
    p.rect(.42, .66, .6, .97, BARK)
    for x in (.2, .67):
        p.rect(x, .6, x + .14, .76, CREAM)
        p.rect(x + .02, .62, x + .12, .74, GOLD)
        p.glow(x + .07, .68, .12, GOLD, .5)
    p.oval(.5, .33, .07, .07, GOLD)


def draw_boat(p: Pen):
    p.rect(.485, .04, .525, .75, BARK)
    p.poly([(.55, .06), (.92, .64), (.55, .64)], CREAM)
    p.poly([(.46, .14), (.14, .64), (.46, .64)], (228, 218, 204))
    p.poly([(.02, .7), (.98, .7), (.8, .95), (.2, .95)], p.main)
    p.poly([(.02, .7), (.98, .7), (.945, .76), (.055, .76)], p.light)
    p.poly([(.53, .03), (.7, .08), (.53, .13)], p.main)


def draw_flower(p: Pen):
    p.line([(.5, .4), (.48, .7), (.5, .97)], .05, LEAF)
    p.poly([(.5, .88), (.62, .66), (.84, .62), (.72, .82)], LEAF)
    p.poly([(.5, .92), (.36, .74), (.16, .72), (.28, .88)], mix(LEAF, SHADE, .2))
    for i, (x, y) in enumerate(ring(.5, .34, .22, .22, 8)[:8]):
        p.oval(x, y, .125, .125, p.main if i % 2 else p.light)
    p.oval(.5, .34, .13, .13, GOLD if p.main != PAINT["yellow"] else BARK)
    p.oval(.47, .31, .05, .05, CREAM)


def draw_mushroom(p: Pen):
    p.poly([(.38, .5), (.62, .5), (.68, .92), (.6, .97), (.4, .97), (.32, .92)], CREAM)
    p.poly([(.53, .5), (.62, .5), (.68, .92), (.6, .97), (.55, .97)], (222, 206, 184))
    p.poly(ring(.5, .54, .47, .46, 24, 180, 180), p.main)
    p.oval(.5, .54, .47, .07, p.dark)
    for x, y, r in ((.5, .2, .075), (.27, .36, .065), (.73, .36, .07), (.5, .42, .05)):
        p.oval(x, y, r, r * .85, CREAM)


def draw_cactus(p: Pen):
    p.line([(.2, .38), (.2, .6), (.5, .62)], .14, p.main)
    p.line([(.8, .26), (.8, .5), (.5, .52)], .14, p.main)
    p.line([(.5, .14), (.5, .9)], .24, p.main)
    p.rect(.38, .88, .62, .97, p.main)
    for x, top, bottom in ((.44, .1, .94), (.5, .08, .94), (.56, .1, .94), (.2, .36, .58), (.8, .24, .48)):
        p.line([(x, top), (x, bottom)], .014, p.light if x < .5 else p.dark)
    for x, y in ((.5, .05), (.8, .2)):
        p.oval(x, y, .07, .05, (240, 120, 160))


def draw_castle(p: Pen):
    roof = mix(p.main, (70, 50, 110), .7)
    for x, top, wide in ((.06, .4, .2), (.74, .4, .2), (.37, .24, .26)):
        p.rect(x, top, x + wide, .97, p.main)
        p.rect(x + wide * .65, top, x + wide, .97, p.dark)
        p.poly([(x + wide / 2, top - .24), (x + wide + .04, top + .02), (x - .04, top + .02)], roof)
        p.line([(x + wide / 2, top - .22), (x + wide / 2, top - .24)], .02, GOLD)
        p.rect(x + wide * .4, top + .1, x + wide * .6, top + .2, GOLD)
        p.glow(x + wide / 2, top + .15, .08, GOLD, .5)
    for x in (.25, .35, .45, .55, .65):
        p.rect(x, .58, x + .07, .66, p.light)
    p.rect(.22, .64, .78, .97, p.light)
    p.poly(ring(.5, .8, .1, .1, 12, 180, 180) + [(.6, .97), (.4, .97)], INK)


def draw_heart(p: Pen):
    turns = [math.tau * i / 48 for i in range(48)]
    waves = ((1, 13), (2, -5), (3, -2), (4, -1))
    curve = [(math.sin(t) ** 3, sum(a * math.cos(k * t) for k, a in waves) / 16) for t in turns]
    p.poly([(.5 + .49 * x, .47 - .49 * y) for x, y in curve], p.dark)
    p.poly([(.49 + .44 * x, .45 - .44 * y) for x, y in curve], p.main)
    p.line(ring(.3, .34, .14, .14, 10, 180, 80), .06, CREAM)


def draw_cup(p: Pen):
    p.line(ring(.74, .58, .2, .19, 20, -90, 180), .08, p.dark)
    p.poly([(.1, .34), (.76, .34), (.7, .9), (.62, .97), (.24, .97), (.16, .9)], p.main)
    p.poly([(.16, .4), (.26, .4), (.3, .9), (.22, .88)], p.light)
    p.oval(.43, .34, .33, .085, p.light)
    p.oval(.43, .345, .28, .06, (96, 56, 40))
    for x in (.32, .5):
        p.line([(x, .24), (x + .05, .16), (x - .02, .1), (x + .04, .02)], .03, CREAM)


def draw_umbrella(p: Pen):
    p.line([(.5, .08), (.5, .84)] + ring(.6, .84, .1, .1, 10, 180, -180), .045, BARK)
    for i, left in enumerate((-.48, -.24, 0., .24)):
        rib, next_rib = (ring(.5, .52, x, -.44, 8, 0, 90) for x in (left, left + .24))
        hem = ring(.62 + left, .52, .12, .06, 8, 0, -180)
        p.poly(rib + next_rib[::-1] + hem, p.main if i % 2 else p.light)


def draw_balloon(p: Pen):
    for s in (-1, 1):
        p.line([(.5 + s * .2, .6), (.5 + s * .08, .85)], .015, BARK)
    for k, fill in ((1., p.main), (.72, p.light), (.4, p.main), (.14, p.light)):
        p.oval(.5, .36, .38 * k, .36, fill)
        p.poly([(.5 - .345 * k, .5), (.5 + .345 * k, .5), (.5 + .1 * k, .76), (.5 - .1 * k, .76)], fill)
    p.rect(.41, .84, .59, .98, BARK)
    p.rect(.41, .84, .59, .88, (176, 128, 82))


def draw_rocket(p: Pen):
    for s in (-1, 1):
        p.poly([(.5 + s * .18, .5), (.5 + s * .4, .78), (.5 + s * .36, .86), (.5 + s * .14, .74)], p.dark)
    p.poly([(.4, .78), (.6, .78), (.5, 1.)], (255, 150, 50))
    p.poly([(.44, .78), (.56, .78), (.5, .92)], (255, 236, 140))
    p.glow(.5, .88, .16, (255, 170, 70), .8)
    p.poly([(.5, .0), (.64, .16), (.69, .4), (.62, .8), (.38, .8), (.31, .4), (.36, .16)], p.main)
    p.poly([(.5, .0), (.64, .16), (.36, .16)], mix(p.main, (200, 60, 70), .6))
    p.poly([(.36, .18), (.44, .18), (.42, .78), (.38, .78), (.32, .4)], p.light)
    p.oval(.5, .38, .1, .1, CREAM)
    p.oval(.5, .38, .07, .07, (90, 170, 214))


def draw_bird(p: Pen):
    p.poly([(.3, .56), (.0, .38), (.02, .6), (.26, .7)], p.dark)
    p.line([(.46, .8), (.46, .96)], .03, GOLD)
    p.line([(.56, .8), (.56, .96)], .03, GOLD)
    p.oval(.5, .6, .28, .24, p.main)
    p.oval(.7, .34, .19, .18, p.main)
    p.poly(ring(.54, .66, .22, .17, 16, 0, 180), p.light)
    p.poly([(.86, .3), (1., .36), (.86, .42)], (244, 160, 50))
    p.poly(ring(.42, .54, .22, .16, 14, 0, 180) + [(.12, .42)], p.dark)
    p.oval(.75, .31, .045, .045, CREAM)
    p.oval(.76, .31, .025, .03, INK)


def draw_butterfly(p: Pen):
    for s in (-1, 1):
        p.oval(.5 + s * .27, .32, .24, .25, p.dark)
        p.oval(.5 + s * .2, .7, .17, .19, p.dark)
        p.oval(.5 + s * .26, .33, .19, .2, p.main)
        p.oval(.5 + s * .19, .69, .125, .14, p.light)
        p.oval(.5 + s * .32, .27, .06, .06, CREAM)
        p.oval(.5 + s * .2, .72, .05, .05, p.main)
        p.line([(.5, .2), (.5 + s * .1, .08), (.5 + s * .15, .05)], .02, INK)
    p.oval(.5, .5, .045, .32, INK)


def draw_crown(p: Pen):
    p.poly([(.06, .82), (.0, .3), (.25, .56), (.5, .14), (.75, .56), (1., .3), (.94, .82)], p.main)
    p.poly([(.5, .14), (.75, .56), (1., .3), (.94, .82), (.5, .82)], p.dark)
    p.rect(.06, .76, .94, .92, p.light)
    for x, y in ((.02, .27), (.5, .11), (.98, .27)):
        p.oval(x * .94 + .03, y, .06, .06, GOLD)
    for x, gem in ((.25, (70, 160, 220)), (.5, (214, 50, 80)), (.75, (80, 180, 110))):
        p.oval(x, .84, .055, .055, gem)


def draw_key(p: Pen):
    p.line([(.36, .38), (.84, .86)], .11, p.main)
    p.line([(.84, .86), (.94, .74)], .1, p.dark)
    p.line([(.68, .7), (.78, .58)], .1, p.dark)
    p.line(ring(.27, .28, .18, .18), .13, p.main)
    p.line(ring(.27, .28, .19, .19, 12, 170, 120), .035, p.light)


def draw_lantern(p: Pen):
    p.line(ring(.5, .16, .14, .13, 16, 180, 180), .04, p.dark)
    p.poly([(.3, .26), (.4, .14), (.6, .14), (.7, .26)], p.main)
    p.rect(.27, .3, .73, .8, (255, 214, 110))
    p.oval(.5, .56, .15, .2, (255, 246, 206))
    p.poly([(.5, .42), (.58, .6), (.5, .68), (.42, .6)], (255, 150, 60))
    for x in (.23, .71):
        p.rect(x, .28, x + .06, .82, p.dark)
    p.rect(.2, .24, .8, .32, p.main)
    p.poly([(.2, .8), (.8, .8), (.86, .95), (.14, .95)], p.main)
    p.glow(.5, .55, .5, (255, 206, 110), .9)


def draw_apple(p: Pen):
    p.line([(.5, .3), (.52, .16), (.58, .05)], .05, BARK)
    p.poly([(.56, .2), (.66, .06), (.86, .04), (.76, .2)], LEAF)
    for s in (-1, 1):
        p.oval(.5 + s * .19, .55, .28, .31, p.main)
        p.oval(.5 + s * .11, .78, .2, .19, p.main)
    p.oval(.5, .26, .13, .05, p.dark)
    p.line(ring(.36, .52, .18, .2, 10, 175, 70), .06, p.light)


def draw_robot(p: Pen):
    p.line([(.5, .16), (.5, .06)], .03, p.dark)
    p.oval(.5, .05, .05, .05, (232, 70, 70))
    for s in (-1, 1):
        p.line([(.5 + s * .26, .56), (.5 + s * .4, .76)], .09, p.dark)
        p.rect(.5 + s * .14 - .07, .84, .5 + s * .14 + .07, .97, p.dark)
    p.rect(.24, .5, .76, .86, p.main)
    p.rect(.2, .14, .8, .47, p.main)
    p.rect(.2, .14, .8, .19, p.light)
    p.rect(.26, .23, .74, .4, INK)
    for x in (.38, .62):
        p.oval(x, .315, .06, .06, (120, 240, 230))
        p.glow(x, .315, .1, (120, 240, 230), .5)
    p.rect(.34, .57, .66, .76, p.light)
    for x, fill in ((.41, (232, 70, 70)), (.5, GOLD), (.59, (90, 190, 110))):
        p.oval(x, .66, .035, .035, fill)


def draw_snowman(p: Pen):
    for s in (-1, 1):
        p.line([(.5 + s * .18, .52), (.5 + s * .44, .38), (.5 + s * .46, .3)], .025, BARK)
    p.oval(.5, .76, .27, .22, p.main)
    p.oval(.5, .5, .2, .18, p.main)
    p.oval(.5, .29, .16, .15, p.main)
    p.rect(.33, .15, .67, .19, INK)
    p.rect(.39, .0, .61, .17, INK)
    p.rect(.39, .11, .61, .15, (206, 60, 60))
    for x in (.44, .56):
        p.oval(x, .27, .022, .025, INK)
    p.poly([(.5, .29), (.5, .34), (.68, .34)], (244, 140, 40))
    p.line([(.36, .41), (.5, .44), (.64, .41)], .06, (206, 60, 60))
    p.line([(.6, .43), (.63, .56)], .06, (206, 60, 60))
    for y in (.55, .68, .8):
        p.oval(.5, y, .022, .025, INK)


def draw_owl(p: Pen):
    for s in (-1, 1):
        p.poly([(.5 + s * .3, .06), (.5 + s * .04, .2), (.5 + s * .29, .34)], p.dark)
        p.oval(.5 + s * .1, .94, .08, .04, GOLD)
    p.oval(.5, .58, .31, .38, p.main)
    p.oval(.5, .68, .19, .24, p.light)
    for s in (-1, 1):
        p.poly(ring(.5 + s * .28, .62, .1, .24, 16), p.dark)
        p.oval(.5 + s * .14, .34, .145, .145, CREAM)
        p.oval(.5 + s * .13, .34, .085, .085, GOLD)
        p.oval(.5 + s * .13, .34, .05, .05, INK)
    p.poly([(.45, .42), (.55, .42), (.5, .53)], (240, 150, 50))
    for x, y in ((.42, .64), (.58, .64), (.5, .72), (.42, .8), (.58, .8)):
        p.line(ring(x, y - .02, .05, .04, 6, 0, 180), .02, p.dark)


def draw_whale(p: Pen):
    p.poly([(.1, .52), (.0, .2), (.13, .3), (.3, .2), (.22, .5), (.36, .62), (.3, .88), (.13, .74)], p.main)
    p.poly(ring(.6, .66, .4, .3, 24, 180, 180) + ring(.6, .66, .4, .28, 24, 0, 180), p.main)
    p.poly(ring(.62, .74, .35, .19, 24, -8, 196), p.light)
    for x in (.52, .62, .72):
        p.line(ring(x, .7, .06, .16, 8, 30, 60), .018, p.main)
    p.poly([(.4, .76), (.54, .78), (.4, .98)], p.dark)
    p.oval(.84, .6, .04, .045, CREAM)
    p.oval(.845, .6, .025, .03, INK)
    for s in (-1, 1):
        spout = [(.64, .34), (.64 + s * .04, .18), (.64 + s * .13, .1), (.64 + s * .18, .18)]
        p.line(spout, .04, (196, 230, 248))


def draw_car(p: Pen):
    p.poly([(.22, .5), (.34, .26), (.68, .26), (.82, .5)], p.main)
    p.poly([(.29, .5), (.37, .32), (.49, .32), (.49, .5)], (176, 220, 238))
    p.poly([(.53, .5), (.53, .32), (.66, .32), (.75, .5)], (150, 200, 226))
    p.poly([(.02, .56), (.1, .48), (.9, .48), (.99, .58), (.99, .8), (.02, .8)], p.main)
    p.rect(.02, .72, .99, .8, p.dark)
    p.oval(.95, .6, .04, .05, GOLD)
    p.glow(.97, .6, .12, GOLD, .7)
    for x in (.25, .76):
        p.oval(x, .8, .15, .15, INK)
        p.oval(x, .8, .075, .075, (206, 206, 214))


def draw_ghost(p: Pen):
    hem = [(.86 - .72 * i / 12, .94 - .09 * (i % 2) - (.02 if i % 4 == 0 else 0)) for i in range(13)]
    p.poly(ring(.5, .4, .36, .36, 24, 180, 180) + hem, p.main)
    p.poly([(.64, .1), (.84, .3), (.86, .9), (.74, .86), (.74, .4)], p.dark)
    for s in (-1, 1):
        p.oval(.48 + s * .13, .38, .06, .085, INK)
        p.oval(.5 + s * .13, .35, .02, .025, CREAM)
    p.oval(.48, .56, .06, .075, INK)


@dataclass(frozen=True)
class Shape:
    """How a subject is drawn, the colour it has when none is said, and whether it hovers."""
    draw: Callable[[Pen], None]
    colour: str
    hovers: bool = False


SHAPES = {
    "star": Shape(draw_star, "yellow", True), "moon": Shape(draw_moon, "white", True),
    "cat": Shape(draw_cat, "orange"), "fish": Shape(draw_fish, "orange", True),
    "tree": Shape(draw_tree, "green"), "house": Shape(draw_house, "white"), "boat": Shape(draw_boat, "red"),
    "flower": Shape(draw_flower, "pink"), "mushroom": Shape(draw_mushroom, "red"),
    "cactus": Shape(draw_cactus, "green"), "castle": Shape(draw_castle, "grey"),
    "heart": Shape(draw_heart, "red", True), "cup": Shape(draw_cup, "white"),
    "umbrella": Shape(draw_umbrella, "red", True), "balloon": Shape(draw_balloon, "red", True),
    "rocket": Shape(draw_rocket, "white", True), "bird": Shape(draw_bird, "blue"),
    "butterfly": Shape(draw_butterfly, "orange", True), "crown": Shape(draw_crown, "yellow", True),
    "key": Shape(draw_key, "yellow", True), "lantern": Shape(draw_lantern, "black"),
    "apple": Shape(draw_apple, "red"), "robot": Shape(draw_robot, "grey"),
    "snowman": Shape(draw_snowman, "white"), "owl": Shape(draw_owl, "brown"),
    "whale": Shape(draw_whale, "blue", True), "car": Shape(draw_car, "red"),
    "ghost": Shape(draw_ghost, "white", True),
}


# ---------------------------------------------------------------------------------------------- the materials
# Each paints rgb (n, n, 3) anew, given unit coordinates x, y (n, n) and a random phase.

def blend(rgb, colour, share):
    """`colour` (3) or (n, n, 3) laid over rgb with `share` (n, n) or a number."""
    share = np.asarray(share, np.float32)
    return rgb + (np.asarray(colour, np.float32) - rgb) * (share[..., None] if share.ndim else share)


def contrast(rgb):
    """Cream beside dark paint, a deep tone of itself beside bright paint."""
    bright = np.clip((rgb.sum(2) / 3 - 158) / 8, 0, 1)
    return blend(np.full_like(rgb, 246), rgb * (0.45, 0.42, 0.58), bright)


def paint_wood(rgb, x, y, phase):
    grain = np.sin(34 * y + 5 * np.sin(3.1 * x + phase) + 2.2 * np.sin(7 * x * y + phase))
    return blend(rgb, (150, 98, 58), 0.38) * (0.92 + 0.17 * grain)[..., None]


def paint_metal(rgb, x, y, phase):
    band = np.cos(9.5 * (x * 0.8 + y * 0.55) + phase % 1)
    return blend(rgb * (0.62 + 0.3 * (band + 1) / 2)[..., None], 255, np.clip(band - 0.45, 0, 1) * 1.5)


def paint_glass(rgb, x, y, phase):
    streak = (np.abs((x + y * 0.8 + phase % 0.2) % 0.5 - 0.2) < 0.06) * 0.75
    return blend(blend(rgb, (214, 240, 250), 0.3), 255, streak)


def paint_stripes(rgb, x, y, phase):
    return blend(rgb, contrast(rgb), np.sin(40 * x + phase) > 0.1)


def paint_spots(rgb, x, y, phase):
    u, v = 5.6 * x + phase, 5.6 * y
    u = u + 0.5 * (np.floor(v) % 2)
    return blend(rgb, contrast(rgb), (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.085)


def paint_wool(rgb, x, y, phase):
    loops = np.sin(62 * (y + 0.35 * np.abs((x * 9 + phase) % 1 - 0.5)))
    rib = np.abs((x * 9 + phase) % 1 - 0.5)
    return rgb * (0.86 + 0.16 * loops + 0.22 * (rib - 0.25))[..., None] + 10


def paint_checks(rgb, x, y, phase):
    rows, columns = np.sin(25 * y) > 0, np.sin(25 * x + phase) > 0
    return blend(rgb, contrast(rgb), 0.42 * rows + 0.42 * columns)


def paint_glow(rgb, x, y, phase):
    return blend(rgb * 1.25, (255, 252, 226), np.clip(0.85 - 1.6 * np.hypot(x - 0.5, y - 0.5), 0, 1))


def paint_paper(rgb, x, y, phase):
    folds = sum(np.where(np.cos(a + phase) * (x - 0.5) + np.sin(a + phase) * (y - 0.5) > b, 1, -1)
                for a, b in ((0.3, 0.05), (1.5, -0.1), (2.4, 0.12), (0.9, 0.22)))
    return blend(rgb, (255, 252, 240), 0.12) * (1.02 + 0.075 * folds)[..., None]


def paint_stone(rgb, x, y, phase):
    vein = np.abs(np.sin(7 * x + 4 * np.sin(5 * y + phase) + 3 * np.sin(9 * x - 4 * y)))
    grey = blend(rgb, (176, 172, 172), 0.5)
    grey = blend(grey, 250, 0.25 * np.sin(11 * x * y + phase) + 0.1)
    return grey * (0.62 + 0.38 * np.minimum(1, vein * 4))[..., None]


MATERIAL_PAINT = {"wood": paint_wood, "metal": paint_metal, "glass": paint_glass, "stripes": paint_stripes,
                  "spots": paint_spots, "wool": paint_wool, "checks": paint_checks, "glow": paint_glow,
                  "paper": paint_paper, "stone": paint_stone}


@lru_cache(maxsize=64)
def unit_grid(n: int):
    """x and y (n, n) at the centres of n x n pixels of the unit square."""
    line = ((np.arange(n) + 0.5) / n).astype(np.float32)
    return np.broadcast_to(line[None, :], (n, n)), np.broadcast_to(line[:, None], (n, n))


def draw_thing(thing: Thing, n: int, tint, rng: np.random.Generator) -> tuple[Image.Image, list]:
    """A thing on a transparent n x n tile in light of colour `tint`, and its glows in tile coordinates."""
    shape = SHAPES[thing.subject]
    paint = PAINT[thing.colour or shape.colour]
    tile = Image.new("RGBA", (n, n), (*mix(paint, SHADE, 0.6), 0))
    pen = Pen(tile, paint)
    shape.draw(pen)
    x, y = unit_grid(n)
    pixels = floats(tile)                                             # (n, n, 4), painted in place
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    if thing.material:
        own = np.asarray(pen.own) > 0
        rgb[own] = MATERIAL_PAINT[thing.material](rgb, x, y, rng.random() * 6.28)[own]
        if thing.material == "glass":
            alpha[own] *= 0.62
    if thing.material == "glow":
        pen.glow(0.5, 0.5, 0.75, mix(paint, (255, 255, 255), 0.45), 0.8)
    else:                                                             # light falls from the upper left
        rgb *= (1.1 - 0.16 * x - 0.14 * y)[..., None] * np.asarray(tint, np.float32)
    return picture(pixels), pen.glows


# ------------------------------------------------------------------------------------------------- the places
def gradient(n: int, *stops: tuple[float, tuple[int, int, int]]) -> Image.Image:
    """An n x n picture of colours between stops (y, colour) from top to bottom."""
    ys, colours = zip(*stops, strict=True)
    at = np.linspace(0, 1, n)
    rows = np.stack([np.interp(at, ys, channel) for channel in zip(*colours, strict=True)], 1)
    return Image.fromarray(rows.round().astype(np.uint8)[:, None, :]).resize((n, n), Image.Resampling.NEAREST)


def ridge(rng, y: float, height: float, n: int = 6, rough: float = 0.0) -> list:
    """The points of a hill line about `y`, closed along the bottom: soft waves plus `rough` jags."""
    phase, x = rng.random(3) * 6.28, np.linspace(0, 1, 48)
    wave = np.sin(n * x + phase[0]) * 0.6 + np.sin(2.3 * n * x + phase[1]) * 0.3
    if rough:
        jags = np.abs((x * n * 0.8 + phase[2]) % 2 - 1) * 2 - 1 + 0.35 * rng.standard_normal(48)
        wave = wave * 0.5 + rough * jags
    return [(0, 1.01), *zip(x.tolist(), (y - height * wave).tolist(), strict=True), (1, 1.01)]


def ground(p: Pen, rng, y: float, height: float, far, near, n: int = 4):
    """Rolling ground from `y` down, paler in the distance."""
    for i in range(3):
        p.poly(ridge(rng, y + i * (1 - y) * 0.36, height * (0.6 + 0.4 * i), n), mix(far, near, i / 2))


def place_nowhere(p: Pen, rng):
    tint = pick(rng, [(226, 214, 196), (206, 220, 226), (224, 206, 214), (210, 222, 204), (214, 208, 228)])
    p.oval(.5, 1.05, .95, .36, mix(tint, SHADE, .16))
    p.oval(.5, 1.08, .75, .3, mix(tint, SHADE, .08))


def pine(p: Pen, x: float, y: float, size: float, tone, top_tone):
    """A pine of three storeys with its foot at (x, y)."""
    p.rect(x - size * .03, y - size * .12, x + size * .03, y + .05, mix(tone, BARK, .6))
    for k in range(3):
        top, wide = y - size * (1 - k * .24), size * (.13 + .06 * k)
        low = top + size * .42
        p.poly([(x, top), (x + wide, low), (x - wide, low)], mix(top_tone, tone, k / 2))


def place_snow(p: Pen, rng):
    p.poly(ridge(rng, .52, .07, 7, .6), (176, 198, 226))
    ground(p, rng, .58, .04, (214, 228, 244), (248, 250, 255))
    for x in rng.random(4).tolist():
        pine(p, x, .6 + rng.uniform(0, .03), rng.uniform(.16, .26), (74, 116, 112), (228, 238, 248))


def place_desert(p: Pen, rng):
    p.poly(ridge(rng, .55, .06, 5), (226, 170, 112))
    ground(p, rng, .62, .06, (238, 190, 124), (224, 158, 86), 3)
    for y in (.72, .82, .92):
        p.line([(x, yy - .6 + y + .02) for x, yy in ridge(rng, .6, .012, 5)[1:-1]], .008, (204, 138, 74))


def place_sea(p: Pen, rng):
    p.rect(0, .56, 1, 1, (40, 116, 176))
    for i in range(6):
        y = .58 + i * i * .0125
        shade = mix((70, 156, 204), (22, 84, 150), i / 5)
        crest = [(x, y + .02 * (1 + i * .3) * math.sin(x * (26 - 3 * i) + i * 2 + rng.random() * .2)) for x in
                 np.linspace(0, 1, 40).tolist()]
        p.poly([(0, 1), *crest, (1, 1)], shade)
        p.line(crest, .006 + .002 * i, mix(shade, (255, 255, 255), .45))


def place_forest(p: Pen, rng):
    for depth, (y, size) in enumerate(((.6, .3), (.66, .42), (.74, .58))):
        tone = mix((148, 188, 160), (36, 88, 66), depth / 2)
        for i in range(9 - 2 * depth):
            x = (i + rng.random()) / (9 - 2 * depth)
            pine(p, x, y, size * rng.uniform(.8, 1.2), tone, mix(tone, (255, 255, 255), .14))
        p.poly(ridge(rng, y, .02), mix(tone, (120, 164, 84), .55))


def place_city(p: Pen, rng):
    for depth in range(2):
        tone, x = mix((150, 164, 190), (74, 84, 120), depth), -.03
        while x < 1:
            wide, top = .1 + .09 * rng.random(), .12 + .24 * depth + .28 * rng.random()
            p.rect(x, top, x + wide, .85, mix(tone, (110, 90, 130), .35 * rng.random()))
            for wy in np.arange(top + .04, .76, .062).tolist():
                for wx in np.arange(x + .02, x + wide - .025, .04).tolist():
                    if rng.random() < .55:
                        p.rect(wx, wy, wx + .017, wy + .028, (255, 222, 140))
                        if rng.random() < .3:
                            p.glow(wx + .01, wy + .014, .03, (255, 216, 130), .75)
            x += wide + .012
    p.rect(0, .8, 1, 1, (92, 92, 108))
    p.rect(0, .8, 1, .83, (164, 160, 166))
    for x in (.05, .38, .71):
        p.rect(x, .91, x + .2, .925, (226, 216, 170))


def place_meadow(p: Pen, rng):
    p.poly(ridge(rng, .56, .05, 5), (142, 192, 134))
    ground(p, rng, .62, .03, (138, 196, 96), (88, 160, 66))
    petals = [(250, 240, 240), (246, 190, 70), (236, 110, 130), (190, 130, 220)]
    for x, y in rng.uniform((0, .64), (1, .99), (46, 2)).tolist():
        p.oval(x, y, .02 * y, .016 * y, pick(rng, petals))


def place_mountains(p: Pen, rng):
    for y, tone, tall in ((.62, (150, 172, 204), .26), (.7, (96, 118, 160), .34)):
        for x in (np.array([.12, .5, .88]) + .16 * (rng.random(3) - .5)).tolist():
            top, wide = y - tall * (.75 + .45 * rng.random()), .34
            p.poly([(x, top), (x + wide, y + .05), (x - wide, y + .05)], tone)
            shady = [(x, top), (x + wide, y + .05), (x + .06, y + .05), (x - .02, top + .12)]
            p.poly(shady, mix(tone, SHADE, .2))
            cap = [(.1, .11), (.04, .09), (0, .13), (-.04, .09), (-.1, .11)]
            p.poly([(x, top), *((x + dx, top + dy) for dx, dy in cap)], (244, 248, 255))
    ground(p, rng, .72, .03, (104, 146, 110), (74, 116, 84))


def place_space(p: Pen, rng):
    p.image.paste(gradient(p.n, (0, (20, 14, 52)), (.6, (50, 26, 92)), (1, (22, 18, 58))))
    for colour in ((170, 70, 170), (60, 110, 210), (220, 110, 150)):
        x, y = rng.random(2).tolist()
        p.glow(x, y, .42, colour, .45)
    scatter_stars(p, rng, 70, 1.)
    x, y = pick(rng, [.16, .84]), pick(rng, [.16, .8])
    tone = pick(rng, [(226, 150, 96), (120, 176, 206), (196, 130, 180)])
    p.oval(x, y, .12, .12, mix(tone, SHADE, .4))
    p.oval(x - .015, y - .015, .1, .1, tone)
    p.line(ring(x, y, .19, .045, 24, 20, 320), .014, (236, 220, 190))


def place_beach(p: Pen, rng):
    p.rect(0, .5, 1, .75, (58, 168, 196))
    for y in (.55, .6):
        crest = [(x, y + .008 * math.sin(20 * x + 9 * y)) for x in np.linspace(0, 1, 30).tolist()]
        p.line(crest, .008, (150, 220, 228))
    shore = ridge(rng, .68, .02, 5)
    p.poly([(x, y - .03) for x, y in shore], (236, 248, 246))
    p.poly(shore, (244, 216, 158))
    p.poly([(x, y + .16) for x, y in shore], (236, 200, 134))
    side = pick(rng, [-1, 1])
    foot = .5 + side * .44
    trunk = [(foot - side * .1 * t * t, .84 - .56 * t) for t in np.linspace(0, 1, 8).tolist()]
    p.line(trunk, .035, (140, 100, 64))
    for angle in range(-200, 60, 42):
        x, y = trunk[-1]
        dx, dy = ring(0, 0, .24, .17, 1, angle)[0]
        leaf = [(x, y), (x + dx / 2, y + dy / 2 - .07), (x + dx, y + dy + .06), (x + dx / 2, y + dy / 2)]
        p.poly(leaf, pick(rng, [(62, 140, 80), (84, 166, 90)]))


def place_cave(p: Pen, rng):
    p.image.paste(gradient(p.n, (0, (40, 32, 44)), (.55, (124, 96, 90)), (1, (58, 46, 54))))
    p.glow(.5, .5, .55, (250, 206, 150), .6)
    for i in range(11):
        x, tall = (i + rng.random()) / 11, .1 + .3 * rng.random() * abs(i - 5) / 4
        tone = mix((44, 34, 44), (80, 62, 66), rng.random())
        p.poly([(x - .08, -.01), (x + .08, -.01), (x, tall)], tone)
    for s, edge in ((0, 1), (1, -1)):
        wall = [(s, 0), *((s + edge * (.06 + .1 * rng.random() + .1 * abs(t - .5)), t) for t in
                          np.linspace(0, 1, 9).tolist()), (s, 1)]
        p.poly(wall, (46, 36, 46))
    p.poly(ridge(rng, .82, .03, 9, .4), (70, 56, 60))
    for x, tone in ((.1, (120, 220, 230)), (.9, (200, 140, 240))):
        for dx in (-.05, 0, .05):
            p.poly([(x + dx - .025, .92), (x + dx * 2, .74 + abs(dx)), (x + dx + .025, .92)], tone)
        p.glow(x, .84, .16, tone, .5)


def place_underwater(p: Pen, rng):
    p.image.paste(gradient(p.n, (0, (112, 214, 226)), (.5, (34, 134, 188)), (1, (14, 62, 118))))
    p.poly(ridge(rng, .86, .03), (196, 178, 138))
    for x in (np.array([.05, .14, .27, .74, .86, .95]) + .06 * (rng.random(6) - .5)).tolist():
        if rng.random() < .5:
            tone = pick(rng, [(236, 104, 120), (244, 160, 84), (190, 100, 190)])
            for a in (-130, -105, -78, -50):
                tip = ring(x, .9, .13, .2, 1, a)[0]
                p.line([(x, .94), tip], .03, tone)
        else:
            sway, along = rng.random() * 6, np.linspace(0, 1, 12).tolist()
            p.line([(x + .025 * math.sin(9 * t + sway), .95 - t * .5) for t in along], .03, (46, 142, 92))
    for x, y in rng.random((14, 2)).tolist():
        p.oval(x, y * .8, .014, .014, (190, 236, 244))
    for x in (.2, .45, .75):
        p.glow(x, 0, .3, (210, 250, 250), .4)


def place_volcano(p: Pen, rng):
    x = .5 + .5 * (rng.random() - .5)
    p.oval(x - .08, .08, .2, .1, (96, 84, 92))
    p.oval(x + .1, .05, .22, .1, (116, 100, 104))
    p.poly([(x - .1, .24), (x + .1, .24), (x + .5, .76), (x - .5, .76)], (92, 62, 66))
    p.poly([(x + .02, .24), (x + .1, .24), (x + .5, .76), (x + .14, .76)], (70, 46, 56))
    spill = [(-.1, .24), (.1, .24), (.06, .36), (.02, .3), (-.02, .5), (-.05, .32)]
    p.poly([(x + dx, y) for dx, y in spill], (255, 120, 40))
    p.poly(ridge(rng, .74, .03, 8, .4), (66, 48, 56))
    river = [(x - .02, .46), (x + .04, .6), (x - .1, .74), (x + .06, .86), (x - .2, 1.02)]
    p.line(river, .07, (236, 84, 30))
    p.line(river, .03, (255, 206, 90))
    p.glow(x, .25, .3, (255, 120, 50), .8)
    p.glow(x - .03, .82, .3, (255, 110, 40), .55)


def place_room(p: Pen, rng):
    wall = pick(rng, [(222, 186, 150), (176, 196, 182), (206, 170, 172), (170, 184, 208)])
    p.image.paste(gradient(p.n, (0, mix(wall, SHADE, .16)), (.7, wall), (1, wall)))
    p.rect(0, .74, 1, 1, (158, 108, 70))
    for y in (.8, .88):
        p.line([(0, y), (1, y)], .008, (130, 86, 56))
    p.rect(0, .72, 1, .75, (242, 230, 208))
    side = pick(rng, [0, .62])
    p.rect(side + .04, .08, side + .34, .5, (246, 238, 220))
    p.rect(side + .06, .1, side + .32, .48, (160, 208, 236))
    p.rect(side + .18, .1, side + .2, .48, (246, 238, 220))
    p.rect(side + .06, .28, side + .32, .3, (246, 238, 220))
    shelf = .62 - side
    p.rect(shelf + .02, .1, shelf + .37, .74, (104, 68, 48))
    for y in (.13, .34, .55):
        x = shelf + .04
        while x < shelf + .33:
            wide, tall = .02 + .02 * rng.random(), .1 + .06 * rng.random()
            p.rect(x, y + .17 - tall, x + wide, y + .17, pick(rng, list(PAINT.values())[:9]))
            x += wide + .006
    p.oval(.5, .9, .38, .07, pick(rng, [(176, 70, 70), (80, 110, 150), (110, 130, 90)]))


def place_lake(p: Pen, rng):
    p.poly(ridge(rng, .46, .08, 6), (126, 166, 150))
    p.poly(ridge(rng, .52, .04, 9), (84, 136, 100))
    p.rect(0, .55, 1, 1, (104, 170, 196))
    p.poly([(0, .55), *((x, 1.12 - y) for x, y in ridge(rng, .5, .03, 7)[1:-1]), (1, .55)], (86, 144, 150))
    p.rect(0, .54, 1, .56, (206, 226, 206))
    for x, y in rng.random((10, 2)).tolist():
        p.line([(x, .6 + .2 * y), (x + .12, .6 + .2 * y)], .008, (190, 224, 232))
    p.poly([(x, y + .04 * (x - .5)) for x, y in ridge(rng, .84, .02, 5)], (108, 160, 86))
    for x in (.04, .09, .13, .88, .93, .97):
        p.line([(x, .98), (x + .01, .7 + .1 * rng.random())], .014, (70, 122, 66))
        p.oval(x + .01, .72, .014, .04, (124, 84, 54))


@dataclass(frozen=True)
class Place:
    """How a place is drawn over the sky, the y where things stand, and whether all things float there."""
    draw: Callable
    base: float = 0.93
    floats: bool = False
    sinks: bool = False                                               # a wave laps over what stands there


GROUNDS = {
    None: Place(place_nowhere, .9), "snow": Place(place_snow), "desert": Place(place_desert),
    "sea": Place(place_sea, .89, sinks=True), "forest": Place(place_forest), "city": Place(place_city),
    "meadow": Place(place_meadow), "mountains": Place(place_mountains),
    "space": Place(place_space, floats=True), "beach": Place(place_beach), "cave": Place(place_cave),
    "underwater": Place(place_underwater, floats=True),
    "volcano": Place(place_volcano), "room": Place(place_room), "lake": Place(place_lake, .95),
}


# -------------------------------------------------------------------------------------------------- the light
def scatter_stars(p: Pen, rng, n: int, low: float):
    for x, y, s in rng.random((n, 3)).tolist():
        p.oval(x, y * low, .003 + .006 * s * s, .003 + .006 * s * s, (255, 250, 228))
        if s > .9:
            p.glow(x, y * low, .04, (255, 250, 228), .8)


def cloud(p: Pen, x, y, size, tone):
    for dx, dy, r in ((-.9, .1, .5), (-.3, -.15, .65), (.4, -.05, .6), (.95, .15, .42)):
        p.oval(x + dx * size, y + dy * size, r * size, r * size * .62, tone)
    p.oval(x, y + .22 * size, 1.3 * size, .26 * size, mix(tone, (140, 158, 196), .16))


def behind_day(p, rng):
    for _ in range(2):
        cloud(p, rng.random(), rng.uniform(.08, .28), rng.uniform(.07, .12), (246, 250, 255))


def cloud_bank(p: Pen, rng, n: int, low: float, size: float, bright, dim):
    """n clouds side by side, their height down to `low`."""
    for i in range(n):
        tone = mix(bright, dim, rng.random())
        cloud(p, (i + rng.random()) / n, rng.uniform(.03, low), size * rng.uniform(.9, 1.4), tone)


def behind_clouds(p, rng):
    cloud_bank(p, rng, 6, .36, .12, (255, 255, 255), (222, 228, 240))


def behind_grey(p, rng):
    cloud_bank(p, rng, 7, .18, .15, (158, 168, 184), (128, 136, 156))


def behind_sunset(p, rng):
    x = .2 + .6 * rng.random()
    p.glow(x, .46, .55, (255, 170, 90), .6)
    p.oval(x, .44, .12, .12, (255, 226, 150))
    for _ in range(3):
        y, cx = .1 + .26 * rng.random(), rng.random()
        p.oval(cx, y, .26, .018, (255, 176, 140))
        p.oval(cx + .1, y + .03, .18, .012, (226, 120, 140))


def behind_sunrise(p, rng):
    x = .2 + .6 * rng.random()
    p.glow(x, .5, .5, (255, 244, 196), .75)
    p.oval(x, .5, .09, .09, (255, 252, 226))
    for _ in range(3):
        cloud(p, rng.random(), .1 + .2 * rng.random(), .09, (255, 224, 220))


def behind_night(p, rng):
    scatter_stars(p, rng, 60, .6)
    x = pick(rng, [.14, .86])
    p.oval(x, .13, .07, .07, (250, 246, 220))
    p.glow(x, .13, .2, (220, 226, 255), .5)


def behind_storm(p, rng):
    cloud_bank(p, rng, 8, .2, .16, (112, 112, 136), (70, 70, 96))
    x, bolt = .15 + .7 * rng.random(), []
    for i in range(6):
        bolt.append((x, .12 + .09 * i))
        x += .14 * (rng.random() - .5)
    p.line(bolt, .024, (255, 252, 220))
    p.glow(*bolt[2], .3, (206, 206, 255), .7)
    for a, b in zip(bolt, bolt[1:], strict=False):
        p.glow((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, .06, (255, 252, 226), 1.)


def behind_rainbow(p, rng):
    behind_day(p, rng)
    x = .5 + .3 * (rng.random() - .5)
    bands = ((226, 74, 76), (244, 152, 64), (250, 220, 90), (108, 190, 100), (80, 140, 220), (144, 96, 196))
    for i, tone in enumerate(bands):
        p.line(ring(x, .74, .56 - .03 * i, .66 - .03 * i, 40, 180, 180), .036, tone)


def behind_aurora(p, rng):
    scatter_stars(p, rng, 40, .5)
    veil, phase, n = Image.new("L", (p.n, p.n)), rng.random(2) * 6.28, p.n
    curtain = ImageDraw.Draw(veil)
    for x in np.linspace(0, 1, 60).tolist():
        low = .34 + .1 * math.sin(5 * x + phase[0]) + .04 * math.sin(13 * x + phase[1])
        for k in range(6):
            y = low - .3 + .05 * k
            curtain.line([x * n, y * n, x * n, (y + .05) * n], 40 + 30 * k, 5)
    tones = gradient(n, (0, (190, 90, 220)), (.2, (80, 190, 200)), (.4, (110, 250, 160)), (1, (90, 250, 170)))
    p.image.paste(tones, mask=veil.filter(ImageFilter.BoxBlur(n // 50)))


def scattered(p, rng, n, tones, rx, ry):
    """Small tumbling ovals all over the picture: leaves, petals."""
    for x, y, a, s in rng.random((n, 4)).tolist():
        turn, size = a * 360, .7 + .6 * s
        p.poly([(x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn))
                for u, v in ring(0, 0, rx * size, ry * size, 8)], pick(rng, tones))


def front_leaves(p, rng):
    scattered(p, rng, 34, [(226, 110, 40), (204, 66, 40), (240, 176, 60), (160, 84, 46)], .036, .02)


def front_blossom(p, rng):
    for x0, y0, x1, y1 in ((-.02, .1, .42, .02), (1.02, .16, .6, .02)):
        p.line([(x0, y0), ((x0 + x1) / 2, y0 - .02), (x1, y1)], .025, (104, 70, 66))
        for t in rng.random(12).tolist():
            x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0) + .06 * (rng.random() - .5)
            p.oval(x, y, .032, .032, pick(rng, [(252, 190, 210), (246, 160, 190), (255, 226, 234)]))
    scattered(p, rng, 30, [(252, 190, 210), (246, 160, 190), (255, 226, 234)], .024, .015)


def front_rain(p, rng, strength=120):
    mask = Image.new("L", (p.n, p.n))
    d, n = ImageDraw.Draw(mask), p.n
    for x, y, s in rng.random((70, 3)).tolist():
        x, long = x * 1.2, .06 + .08 * s
        d.line([x * n, y * n, (x - long * .3) * n, (y + long) * n], int(strength * (.6 + .6 * s)), 2)
    p.image.paste((214, 228, 246), mask=mask)


def front_storm(p, rng):
    front_rain(p, rng, 100)


def front_snowfall(p, rng):
    for x, y, s in rng.random((90, 3)).tolist():
        p.oval(x, y, .006 + .012 * s * s, .006 + .012 * s * s, (255, 255, 255))


def front_fog(p, rng):
    phase = rng.random(2) * 6.28
    x, y = unit_grid(p.n)
    bank = .5 + .16 * np.sin(15 * y + 2 * np.sin(4 * x + phase[0])) + .12 * np.sin(7 * x - 9 * y + phase[1])
    p.image.paste((226, 230, 236), mask=Image.fromarray((255 * np.clip(bank, 0, .8)).astype(np.uint8)))


def front_rays(p, rng):
    mask, sign = Image.new("L", (p.n, p.n)), pick(rng, [0, 1])
    d, n = ImageDraw.Draw(mask), p.n
    for i in range(5):
        a = .12 + .3 * i + .1 * rng.random()
        xs = [(a - .1, a + .06), (a * 1.5 + .05, a * 1.5 + .42)]
        quad = [(xs[0][0], -.02), (xs[0][1], -.02), (xs[1][1], 1.02), (xs[1][0], 1.02)]
        d.polygon([((1 - u if sign else u) * n, v * n) for u, v in quad], 150)
    fade = gradient(n, (0, (255,) * 3), (1, (90,) * 3)).convert("L")
    mask = ImageChops.multiply(mask.filter(ImageFilter.BoxBlur(n // 40)), fade)
    p.image.paste((255, 244, 196), mask=mask)


def front_candle(p, rng):
    x, y = unit_grid(p.n)
    far = np.clip(np.hypot(x - .5, y - .56) * 1.55 - .28, 0, .86)
    p.image.paste((38, 16, 20), mask=Image.fromarray((255 * far).astype(np.uint8)))
    p.glow(.5, .56, .55, (255, 180, 90), .3)


@dataclass(frozen=True)
class Light:
    """A sky from top to horizon, the colour everything is multiplied by, what it draws behind, in front."""
    sky: tuple = ((96, 164, 226), (208, 234, 246))
    tint: tuple = (1.0, 1.0, 1.0)
    behind: Callable = behind_day
    front: Callable | None = None


SKIES = {
    None: Light(), "rain": Light(((120, 134, 158), (176, 186, 198)), (.8, .86, .96), behind_grey, front_rain),
    "fog": Light(((204, 210, 218), (226, 228, 230)), (.94, .96, 1.), behind_grey, front_fog),
    "sunset": Light(((96, 60, 140), (255, 150, 96)), (1.04, .8, .74), behind_sunset),
    "sunrise": Light(((150, 190, 236), (255, 222, 190)), (1.06, .97, .9), behind_sunrise),
    "night": Light(((24, 34, 96), (84, 96, 178)), (.58, .64, .9), behind_night),
    "storm": Light(((60, 62, 92), (132, 132, 160)), (.64, .66, .84), behind_storm, front_storm),
    "snowfall": Light(((170, 186, 210), (222, 230, 240)), (.92, .97, 1.06), behind_grey, front_snowfall),
    "rainbow": Light(((116, 176, 232), (224, 240, 246)), (1., 1., 1.), behind_rainbow),
    "aurora": Light(((22, 30, 84), (56, 96, 140)), (.6, .74, .86), behind_aurora),
    "leaves": Light(((206, 176, 140), (248, 226, 180)), (1.05, .92, .76), behind_day, front_leaves),
    "blossom": Light(((160, 206, 240), (250, 226, 234)), (1.04, .97, 1.), behind_day, front_blossom),
    "rays": Light(((104, 140, 168), (236, 216, 172)), (.9, .86, .76), behind_day, front_rays),
    "candle": Light(((70, 50, 60), (150, 96, 70)), (1.06, .84, .62), lambda p, rng: None, front_candle),
    "clouds": Light(((82, 148, 216), (190, 220, 240)), (.97, .98, 1.), behind_clouds),
}


# ------------------------------------------------------------------------------------------------- the styles
# Each takes the finished picture, OVERSAMPLE * size pixels wide, and returns one as wide or narrower.

@lru_cache(maxsize=64)
def patches(kind: str, n: int, variant: int) -> tuple[np.ndarray, int]:
    """A map (n, n) of patch numbers, and how many there are: triangles, tiles, cells or brush strokes."""
    rng, image = stream(n, variant), Image.new("I", (n, n))
    draw, count = ImageDraw.Draw(image), 0
    if kind == "cells":
        k = 9
        corners = np.stack(np.meshgrid(np.arange(k), np.arange(k)), -1)
        points = (corners + rng.uniform(.1, .9, (k, k, 2))) / k
        x, y = unit_grid(n)
        near = (x[..., None] - points[..., 0].ravel()) ** 2 + (y[..., None] - points[..., 1].ravel()) ** 2
        return near.argmin(-1), k * k
    if kind == "strokes":
        for x, y, a in rng.random((1500, 3)).tolist():
            count += 1
            angle = 2.6 * math.sin(3 * x + variant) + 1.7 * math.cos(4 * y) + a
            dx, dy = .045 * math.cos(angle), .045 * math.sin(angle)
            draw.line([(x - dx) * n, (y - dy) * n, (x + dx) * n, (y + dy) * n], count, max(2, n // 32))
        return np.asarray(image), count + 1
    k, jitter = (17, .3) if kind == "triangles" else (16, .0)
    grid = np.stack(np.meshgrid(np.arange(k + 1), np.arange(k + 1)), -1).astype(float)
    grid[1:-1, 1:-1] += jitter * rng.uniform(-1, 1, (k - 1, k - 1, 2))
    grid *= n / k
    for i in range(k):
        for j in range(k):
            a, b, c, d = (tuple(grid[u].tolist()) for u in ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j)))
            if kind == "tiles":
                corners = np.array([a, b, c, d])
                corners += (corners.mean(0) - corners) * rng.uniform(.1, .22)
                faces = [[tuple(corner) for corner in corners.tolist()]]
            else:
                faces = [[a, b, c], [a, c, d]] if (i + j) % 2 else [[a, b, d], [b, c, d]]
            for face in faces:
                count += 1
                draw.polygon(face, count)
    return np.asarray(image), count + 1


def patch_means(rgb: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The mean colour of each patch (count, 3)."""
    flat = labels.ravel()
    sums = np.stack([np.bincount(flat, channel, count) for channel in rgb.reshape(-1, 3).T], 1)
    return sums / np.maximum(np.bincount(flat, minlength=count), 1)[:, None]


@lru_cache(maxsize=32)
def noise(n: int, cells: int, variant: int) -> np.ndarray:
    """Smooth noise (n, n) in [-1, 1] with features of n / cells pixels."""
    coarse = stream(cells, variant).integers(0, 256, (cells, cells)).astype(np.uint8)
    return floats(Image.fromarray(coarse).resize((n, n), Image.Resampling.BICUBIC)) / 127.5 - 1


def luma(rgb: np.ndarray) -> np.ndarray:
    return .3 * rgb[..., 0] + .59 * rgb[..., 1] + .11 * rgb[..., 2]


def highest(rgb: np.ndarray) -> np.ndarray:
    """The largest channel (n, n); an order of magnitude faster than rgb.max(2)."""
    return np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])


def margin(n: int) -> np.ndarray:
    """How far each pixel (n, n) is from the picture's border, 0 to 0.5."""
    x, y = unit_grid(n)
    return np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))


def edges(image: Image.Image) -> np.ndarray:
    """How strongly colours change (n, n), 0 to about 255, one unit wide per 64 pixels."""
    rgb, step = floats(image), max(1, image.width // 64)
    change = np.zeros(rgb.shape[:2], np.float32)
    change[step:] += highest(np.abs(rgb[step:] - rgb[:-step]))
    change[:, step:] += highest(np.abs(rgb[:, step:] - rgb[:, :-step]))
    return change


def style_watercolor(image, rng):
    n, v = image.width, int(rng.integers(4))
    rgb = floats(image.filter(ImageFilter.BoxBlur(n / 110)))
    x, y = unit_grid(n)
    rgb = blend(rgb, luma(rgb)[..., None] * .4 + rgb * .6, .3)
    wash = 1 + .16 * noise(n, 7, v) + .07 * noise(n, 40, v)
    rgb = 255 - (255 - rgb) * (.8 * wash)[..., None]
    border = margin(n) + .05 * noise(n, 12, v + 1)
    rgb = blend(rgb, rgb * .82, np.exp(-((border - .055) / .014) ** 2))
    return picture(blend(rgb, (252, 249, 240), np.clip((.05 - border) / .012, 0, 1)))


def style_pixel(image, rng):
    small = image.resize((32, 32), Image.Resampling.BOX)
    rgb = floats(small)
    rgb = np.round((rgb - 128) * 1.2 / 36) * 36 + 128
    return picture(rgb)


def style_sketch(image, rng):
    n, v = image.width, int(rng.integers(4))
    grey = luma(floats(image))
    grey = grey * np.clip(150 / grey.mean(), .85, 2.4)
    x, y = unit_grid(n)
    hatch = (.5 + .5 * np.sin((x + y) * 150)) * np.clip((165 - grey) / 110, 0, 1)
    cross = (.5 + .5 * np.sin((x - y) * 150)) * np.clip((95 - grey) / 60, 0, .7)
    tone = 246 - 150 * np.clip(edges(image) / 90, 0, 1) - 85 * hatch - 70 * cross + 6 * noise(n, 90, v)
    return picture(blend(tone[..., None] * np.float32((1., .985, .95)), floats(image), .14))


def style_oil(image, rng):
    n, v = image.width // 2, int(rng.integers(4))
    labels, count = patches("strokes", n, v)
    rgb = floats(image.resize((n, n), Image.Resampling.BOX))
    rgb = blend(rgb, luma(rgb)[..., None], -.3)
    means = patch_means(rgb, labels, count)
    gain = 1 + .07 * stream(v).standard_normal(count)
    out = (means * gain[:, None])[labels]
    relief = np.zeros((n, n), np.float32)
    relief[1:, 1:] = np.sign((labels[1:, 1:] - labels[:-1, :-1]).astype(np.float32)) * 6
    return picture(blend(out, rgb, .3) + relief[..., None])


def style_woodcut(image, rng):
    rgb = floats(image)
    grey = luma(rgb)
    x, y = unit_grid(image.width)
    lines = np.sin(150 * y + 5 * np.sin(5 * x + rng.random() * 6))
    ink = grey + 46 * lines - .8 * edges(image) < min(122, .72 * float(grey.mean()))
    vivid = np.clip((highest(rgb) + highest(-rgb)) / 140, 0, .75)
    rgb = rgb * np.clip(150 / grey.mean(), 1, 2.2)
    paper = blend(np.full_like(rgb, 240) * np.float32((1., .96, .86)), rgb, vivid)
    return picture(np.where(ink[..., None], (34, 28, 34), paper))


def style_neon(image, rng):
    rgb = floats(image)
    low = -highest(-rgb)[..., None]
    hue = np.clip((rgb - low) * (255 / np.maximum(highest(rgb)[..., None] - low, 24)), 40, 255)
    line = np.clip(edges(image) / 80 - .15, 0, 1)[..., None]
    tube = picture(hue * line)
    halo = tube.reduce(3).filter(ImageFilter.BoxBlur(tube.width / 90))
    halo = halo.resize(tube.size, Image.Resampling.BILINEAR)
    wall = rgb * np.float32((.13, .1, .17)) + np.float32((12, 6, 30))
    return picture(wall + hue * line + 90 * line ** 3 + 1.5 * floats(halo))


def style_pastel(image, rng):
    n, v = image.width, int(rng.integers(4))
    rgb = floats(image.filter(ImageFilter.BoxBlur(n / 120)))
    rgb = blend(blend(rgb, luma(rgb)[..., None], .1), (255, 236, 234), .4)
    edge = margin(n) + .05 * noise(n, 60, v) + .03 * noise(n, 8, v)
    bare = np.clip(1 - edge / .09, 0, .9) + .16 * np.clip(noise(n, 64, v + 1) + noise(n, 30, v), 0, 1)
    return picture(blend(rgb, (255, 240, 226), np.clip(bare, 0, 1)))


def style_lowpoly(image, rng):
    n, v = image.width, int(rng.integers(4))
    labels, count = patches("triangles", n, v)
    rgb = floats(image)
    gain = 1 + .2 * stream(v).uniform(-1, 1, count)
    return picture(blend((patch_means(rgb, labels, count) * gain[:, None])[labels], rgb, .2))


def style_glass(image, rng):
    n, v = image.width, int(rng.integers(4))
    labels, count = patches("cells", n, v)
    rgb = floats(image)
    rgb = blend(rgb, luma(rgb)[..., None], -.6) * np.clip(130 / rgb.mean(), 1, 1.8)
    gain = 1.1 + .14 * stream(v).uniform(-1, 1, count)
    out = blend(patch_means(rgb, labels, count)[labels], rgb, .6) * gain[labels][..., None]
    lead = edges(image) > 110
    for step in range(1, n // 80 + 1):
        lead[step:] |= labels[step:] != labels[:-step]
        lead[:, step:] |= labels[:, step:] != labels[:, :-step]
    return picture(np.where(lead[..., None], (26, 22, 30), out))


def style_comic(image, rng):
    n = image.width
    rgb = floats(image.filter(ImageFilter.BoxBlur(n / 150)))
    flat = np.round(blend(rgb, luma(rgb)[..., None], -.5) / 64) * 64
    x, y = unit_grid(n)
    dots = np.sin((x + y) * 95) * np.sin((x - y) * 95)
    shade = np.clip((190 - luma(rgb)) / 190, 0, 1)
    flat = np.where((dots > 1.02 - 1.3 * shade)[..., None], flat * .7, flat)
    frame = margin(n)
    flat = np.where((edges(image) > 78)[..., None], (24, 20, 30), flat)
    return picture(np.where((frame < .03)[..., None], 250, np.where((frame < .048)[..., None], 24, flat)))


def style_blueprint(image, rng):
    n = image.width
    rgb = floats(image)
    x, y = unit_grid(n)
    grid = ((x * 12 % 1 < .06) | (y * 12 % 1 < .06)) * 22
    line = np.clip(edges(image) / 70, 0, 1)
    paper = np.array([24, 66, 150], np.float32) + grid[..., None] + .2 * (luma(rgb)[..., None] - 128)
    return picture(blend(blend(paper, rgb, .1), (232, 242, 255), line * .9))


def style_mosaic(image, rng):
    n, v = image.width, int(rng.integers(4))
    labels, count = patches("tiles", n, v)
    rgb = floats(image)
    rgb = blend(rgb, luma(rgb)[..., None], -.2)
    tiles = (patch_means(rgb, labels, count) * (1 + .13 * stream(v).uniform(-1, 1, (count, 1))))[labels]
    return picture(np.where((labels == 0)[..., None], (196, 188, 172), blend(tiles, rgb, .25)))


def style_vintage(image, rng):
    n, v = image.width, int(rng.integers(4))
    rgb = floats(image.filter(ImageFilter.BoxBlur(n / 200)))
    x, y = unit_grid(n)
    sepia = (luma(rgb)[..., None] * .85 + 44) * np.float32((1.08, .94, .72))
    fade = np.clip(1.26 - .9 * np.hypot(x - .5, y - .5), .5, 1.08) + .05 * noise(n, 96, v)
    frame = margin(n) < .045
    return picture(np.where(frame[..., None], (242, 234, 216), blend(sepia, rgb, .2) * fade[..., None]))


def style_stitch(image, rng):
    n, cell = image.width, max(2, image.width // 21)
    k = -(-n // cell)
    rgb = floats(image.resize((k, k), Image.Resampling.BOX))
    rgb = blend(rgb, luma(rgb)[..., None], -.15).repeat(cell, 0).repeat(cell, 1)[:n, :n]
    at = (np.arange(n) % cell + .5) / cell
    u, w = at[None, :] - at[:, None], at[None, :] + at[:, None] - 1
    thread = np.clip(1.6 - 5.4 * np.minimum(np.abs(u), np.abs(w)), 0, 1)
    return picture(blend(np.full_like(rgb, 236) * np.float32((1., .97, .9)), rgb, .12 + .88 * thread))


STYLE_PAINT = {
    "watercolor": style_watercolor, "pixel": style_pixel, "sketch": style_sketch, "oil": style_oil,
    "woodcut": style_woodcut, "neon": style_neon, "pastel": style_pastel, "lowpoly": style_lowpoly,
    "glass": style_glass, "comic": style_comic, "blueprint": style_blueprint, "mosaic": style_mosaic,
    "vintage": style_vintage, "stitch": style_stitch,
}


# ------------------------------------------------------------------------------------------------ the picture
def layout(view: View, rng: np.random.Generator) -> list[tuple[int, float, float, float]]:
    """Where things go, far ones first: (which thing, centre x, foot y relative to the place's base, size)."""
    near = (rng.random(2) - 0.5) * 0.07
    if len(view.things) == 2:
        swap = pick(rng, ["left", "right"])
        a, b = {"left": ((.28, 0, .47), (.73, 0, .47)), "right": ((.73, 0, .47), (.28, 0, .47)),
                "above": ((.5, -.46, .43), (.5, .03, .45)), "below": ((.5, .03, .45), (.5, -.46, .43)),
                "front": ((.4, .05, .42), (.6, -.1, .62)), "behind": ((.6, -.1, .62), (.4, .05, .42)),
                }[view.relation or swap]
        order = sorted([(0, *a), (1, *b)], key=lambda item: item[2])
        return [(i, x + near[0] / 2, foot, size) for i, x, foot, size in order]
    if view.count > 1:
        slots = {2: ((.27, 0), (.73, 0)), 3: ((.5, -.32), (.24, .02), (.76, .02)),
                 4: ((.28, -.38), (.73, -.4), (.26, .03), (.74, .02)),
                 5: ((.22, -.4), (.77, -.41), (.5, -.2), (.2, .03), (.79, .03))}[view.count]
        size = {2: .46, 3: .43, 4: .39, 5: .36}[view.count]
        wobble = (rng.random((len(slots), 2)) - 0.5) * 0.05
        return [(0, x + dx, y + dy, size) for (x, y), (dx, dy) in zip(slots, wobble.tolist(), strict=True)]
    x, foot, size = {None: (.5, 0, .64), "left": (.26, 0, .5), "right": (.74, 0, .5),
                     "corner": (.2, .04, .34), "close": (.5, .2, .98), "far": (.56, -.2, .27)}[view.position]
    return [(0, x + near[0], foot + near[1] * .4, size * (1 + near[1]))]


RIM = [min(255, v * 2) * 3 // 5 for v in range(256)]                  # blurred outline -> opacity of the rim


@lru_cache(maxsize=256)
def soft_disc(strength: float, power: float) -> Image.Image:
    """A disc (96 px) fading from 255 * strength at its centre to 0 at its rim."""
    x, y = unit_grid(96)
    fall = np.clip(1 - 2 * np.hypot(x - .5, y - .5), 0, 1) ** power
    return Image.fromarray((255 * strength * fall).astype(np.uint8))


def lay_disc(image: Image.Image, x, y, rx, ry, colour, strength: float, power: float = 1.6):
    """Lay a soft ellipse of colour on the picture, unit coordinates."""
    n = image.width
    size = max(2, round(2 * rx * n)), max(2, round(2 * ry * n))
    mask = soft_disc(round(strength, 2), power).resize(size, Image.Resampling.BILINEAR)
    image.paste(colour, (round((x - rx) * n), round((y - ry) * n)), mask)


def lay_glows(pen: Pen, strength: float):
    """Add the lights collected so far, and forget them."""
    for x, y, radius, colour, share in pen.glows:
        lay_disc(pen.image, x, y, radius, radius, colour, share * strength)
    pen.glows = []


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene's picture (size x size, RGB), the same every time."""
    view, n = scene.drawn, size * OVERSAMPLE
    place, light = GROUNDS[view.place], SKIES[view.light]
    top, horizon = light.sky
    pen = Pen(gradient(n, (0, top), (.62, horizon), (1, horizon)))
    if view.place not in INDOORS:
        light.behind(pen, stream(scene.seed, 1))
    place.draw(pen, stream(scene.seed, 2))
    if light.tint != (1., 1., 1.):
        pen.image.paste(picture(floats(pen.image) * np.float32(light.tint)))
    lay_glows(pen, .8)
    backdrop = pen.image.copy() if place.sinks else None
    tint = 1 - .65 * (1 - np.float32(light.tint))                     # less than the backdrop's, to stand out
    tiles, alone = [None] * len(view.things), len(view.things) == view.count == 1
    for which, x, foot, scale in layout(view, stream(scene.seed, 3)):
        thing, shape = view.things[which], SHAPES[view.things[which].subject]
        if place.floats:
            base = .5 + scale / 2 + (foot * .3 if alone else foot * .9 + .2)
        else:
            high = .17 if alone and view.position != "close" else .05 if foot > -.1 else 0
            base = place.base + foot - high * shape.hovers
            lay_disc(pen.image, x, place.base + min(foot, .03), scale * .5, scale * .09, SHADE,
                     .3 if shape.hovers else .62, .8)
        tiles[which] = tiles[which] or draw_thing(thing, round(scale * n), tint, stream(scene.seed, 4, which))
        tile, glows = tiles[which]
        corner = round((x - scale / 2) * n), round((base - scale * .97) * n)
        rim = tile.getchannel("A").filter(ImageFilter.BoxBlur(n / 96)).point(RIM)
        pen.image.paste(mix(PAINT[thing.colour or shape.colour], SHADE, .75), corner, rim)
        pen.image.paste(tile, corner, tile)
        pen.glows = [(corner[0] / n + gx * scale, corner[1] / n + gy * scale, radius * scale, colour, share)
                     for gx, gy, radius, colour, share in glows]
        lay_glows(pen, .8)
    if backdrop:
        wave = Pen(Image.new("L", (n, n)))
        crest = [(.025 * i, .865 + .014 * math.sin(.48 * i + scene.seed)) for i in range(41)]
        wave.poly([(0, 1.01), *crest, (1, 1.01)], 225)
        pen.image.paste(backdrop, mask=wave.image)
        pen.line(crest, .01, mix((206, 232, 244), SHADE, 1 - min(1, sum(light.tint) / 3)))
    if light.front:
        light.front(pen, stream(scene.seed, 5))
        lay_glows(pen, 1.)
    image = STYLE_PAINT[view.style](pen.image, stream(scene.seed, 6)) if view.style else pen.image
    shrinks = image.width > size
    return image.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


# -------------------------------------------------------------------------------------- the DiffusionDB parts
def candidate(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`."""
    return sample_scene(stream(seed, index))


def image_name(seed: int, index: int) -> str:
    """A uuid, as DiffusionDB names its images, made of VERSION, seed and index."""
    digest = hashlib.sha256(f"mini scenes {VERSION} {seed} {index}".encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}.png"


def kept_indices(n: int, seed: int) -> list[int]:
    """The first n candidates whose prompts survive the paper's cleaning (4.1) beside those before them."""
    prompts, kept = [], ()
    while len(kept) < n:
        start = len(prompts)
        prompts += [candidate(seed, index).prompt for index in range(start, start + n // 6 + 8)]
        kept, _ = clean(prompts)
    return kept[:n].tolist()


def draw_pair(job: tuple[int, int]) -> tuple[str, bytes, dict]:
    """(seed, index) -> the image's name, its PNG, and its entry in the part's JSON."""
    scene, file = candidate(*job), io.BytesIO()
    render(scene).save(file, "PNG", compress_level=3)
    entry = {"p": scene.prompt, "se": scene.seed, "undrawn": list(scene.undrawn)}
    return image_name(*job), file.getvalue(), entry


def part_bytes(number: int, pairs: list[tuple[str, bytes, dict]]) -> bytes:
    """One part as DiffusionDB has it: a zip of images and part-00000N.json; the same bytes every time."""
    listing = json.dumps({name: entry for name, _, entry in pairs}).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*((name, png) for name, png, _ in pairs), (f"part-{number:06d}.json", listing)]:
            info = zipfile.ZipInfo(name, (2022, 8, 22, 0, 0, 0))      # the day Stable Diffusion was released
            info.create_system = 3                                    # else the byte differs on Windows
            archive.writestr(info, content)
    return buffer.getvalue()


def is_complete(path: Path, names: list[str]) -> bool:
    """Whether the part at `path` is whole and holds these images."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:-1] == names
    except (OSError, zipfile.BadZipFile):
        return False


def build(folder: str | Path, parts: int = 8, per_part: int = 1000, seed: int = 0,
          progress: bool = True) -> Path:
    """Write parts x per_part pairs as folder/images/part-000001.zip ... and return folder/images.

    A part's JSON entries hold the prompt "p", the scene's seed "se" and the words left "undrawn". None of the
    prompts is dropped by `data.clean`. Parts that are there already are kept, so an interrupted build goes on
    where it was, and two builds with the same arguments write the same bytes.
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    indices, missing = kept_indices(parts * per_part, seed), []
    for number in range(1, parts + 1):
        path, chosen = images / f"part-{number:06d}.zip", indices[(number - 1) * per_part:number * per_part]
        if not is_complete(path, [image_name(seed, index) for index in chosen]):
            missing.append((path, number, chosen))
    jobs = [(seed, index) for _, _, chosen in missing for index in chosen]
    progress_bar = tqdm(total=len(jobs), desc="drawing mini scenes", disable=not progress or not jobs)
    with workers(len(jobs)) as pool, progress_bar as bar:
        drawn = pool.imap(draw_pair, jobs, 25) if pool else map(draw_pair, jobs)
        for path, number, chosen in missing:
            pairs = []
            for _ in chosen:
                pairs.append(next(drawn))
                bar.update()
            atomic_write(path, part_bytes(number, pairs))
    return images


@contextmanager
def workers(jobs: int):
    """A pool of processes, or None where it is not worth it or not possible. Only the parent writes files and
    hears Ctrl-C; the pool ends with the block."""
    count = min(os.cpu_count() or 1, 8, jobs // 50)
    if count < 2 or multiprocessing.current_process().daemon:
        yield None
        return
    try:
        pool = multiprocessing.Pool(count, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    except OSError:                                                   # no semaphores, no room for processes
        yield None
        return
    with pool:
        yield pool


def contact_sheet(scenes: list[Scene], columns: int = 8, zoom: int = 2, size: int = 64) -> Image.Image:
    """Pictures with their prompts underneath; undrawn words in brackets."""
    cell, caption = size * zoom + 8, 62
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * cell + 8, rows * (cell + caption) + 8), (250, 248, 244))
    draw = ImageDraw.Draw(sheet)
    for i, scene in enumerate(scenes):
        x, y = 8 + i % columns * cell, 8 + i // columns * (cell + caption)
        sheet.paste(render(scene, size).resize((size * zoom,) * 2, Image.Resampling.NEAREST), (x, y))
        text = scene.prompt + (f" [{', '.join(scene.undrawn)}]" if scene.undrawn else "")
        lines = textwrap.wrap(text, size * zoom // 6)[:5]
        draw.multiline_text((x, y + size * zoom + 2), "\n".join(lines), INK, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mini.scenes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", metavar="PNG", help="draw pictures with their prompts and [undrawn words]")
    parser.add_argument("--n", type=int, default=64, help="how many scenes on the sheet (default 64)")
    parser.add_argument("--seed", type=int, default=0,
                        help="which world: the same seed gives the same scenes everywhere (default 0)")
    parser.add_argument("--build", metavar="FOLDER",
                        help="write 8 parts of 1,000 pairs to FOLDER/images; what is there already is kept")
    arguments = parser.parse_args()
    if not (arguments.sheet or arguments.build):
        parser.error("nothing to do: give --sheet PNG, --build FOLDER or both")
    if arguments.sheet:
        contact_sheet([candidate(arguments.seed, i) for i in range(arguments.n)]).save(arguments.sheet)
    if arguments.build:
        build(arguments.build, seed=arguments.seed)


if __name__ == "__main__":
    main()
