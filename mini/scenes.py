"""Mini scenes: a small drawn world with prompts in the style of Stable Diffusion users.

    python -m mini.scenes --sheet sheet.png          look at 64 of them
    python -m mini.scenes --build FOLDER             write 8,000 of them as DiffusionDB parts

A Scene holds the content of its prompt and of its picture. They differ in words that are omitted on purpose,
as Stable Diffusion omits words: label noise with known truth. Order of this file: words, scene and sampling,
prompt, picture, DiffusionDB parts. Other files draw the parts of a picture: subjects.py subjects and
materials, backdrops.py places and light, styles.py styles; pen.py holds their shared tools.
"""

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from command import Parser, run_command
from command import number as number_of
from data import clean
from files import DataError, atomic_write
from mini.backdrops import GROUNDS, SKIES
from mini.pen import INK, PAINT, SHADE, Pen, floats, gradient, mix, pick, picture, stream, unit_grid
from mini.styles import STYLE_PAINT
from mini.subjects import SHAPES, draw_thing

PARTS, PER_PART = 8, 1000      # of the default data set, which is drawn with seed 0
PRETRAIN_SEED = 1_000_003      # of the scenes that the miniatures learn from
VERSION = 5                    # part of every image's name: raise it when words or drawings change
OVERSAMPLE = 3                 # pictures are drawn three times as large and averaged down
NOISE = (0.20, 2.80)           # Beta(a, b) of a sample's noise level: mean 0.07, most near 0, a few above 0.5

# -------------------------------------------------------------------------------------------------- the words
# Everything that can be drawn, and its words, separated by "|". Text before a "*" only leads up to the word.
# Within a table no word means two things, so a prompt's words describe its picture.

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
# common style tags of real prompts without visible content
BOILERPLATE = ("highly detailed|trending on artstation|8 k|sharp focus|intricate|masterpiece|award winning"
               "|4 k|concept art|beautiful composition|very detailed|hd|artstation hq|stunning").split("|")
INDOORS = ("space", "cave", "underwater", "room")                     # no sky: only these lights reach in
EVERYWHERE = ("rays", "candle")


def words_of(table: dict, key) -> list[tuple[str, str]]:
    """Phrases for `key`: pairs of the words leading up to it ("in a ", often empty) and the word itself."""
    return [(text.rpartition("*")[0], text.rpartition("*")[2]) for text in table[key].split("|")]


def distinct_prompts() -> int:
    """A lower bound of the number of distinct prompts (one thing, one form of sentence)."""
    tables = (SUBJECTS, COLOURS, MATERIALS, PLACES, STYLES)
    return math.prod(sum(len(words_of(table, key)) for key in table) for table in tables)


# -------------------------------------------------------------------------------------------------- the scene
@dataclass(frozen=True)
class Thing:
    """One kind of thing: keys of SUBJECTS, COLOURS, MATERIALS; None if unnamed."""
    subject: str
    colour: str | None = None
    material: str | None = None


@dataclass(frozen=True)
class View:
    """The content of a prompt or picture, by the keys of the tables above."""
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

    `words` are the content words as written in the prompt (some, e.g. "stained glass", are two or more),
    `undrawn` those that the picture does not show. `seed` fixes the jitter of the drawing.
    """
    prompt: str
    words: tuple[str, ...]
    undrawn: tuple[str, ...]
    said: View
    drawn: View
    seed: int


def sample_scene(rng: np.random.Generator, truthful: bool = False) -> Scene:
    """A random scene: content, words, and the words that stay undrawn (none if `truthful`)."""
    said = sample_view(rng)
    spoken = choose_words(said, rng)
    prompt = say(spoken, rng)
    level = 0.0 if truthful else rng.beta(*NOISE)
    drawn, lost = undraw(said, {slot for slot in spoken if rng.random() < level}, rng)
    words = {slot: word for slot, (_, word) in spoken.items()}
    undrawn = tuple(word for slot, word in words.items() if slot in lost)
    return Scene(prompt, tuple(words.values()), undrawn, said, drawn, int(rng.integers(2**32)))


def sample_view(rng: np.random.Generator) -> View:
    """A prompt's content: usually a colour and a place, sometimes a light, a style, a count."""
    things = []
    for _ in range(2 if rng.random() < 0.1 else 1):
        subject = pick(rng, SUBJECTS, [thing.subject for thing in things])
        colour = pick(rng, COLOURS, [thing.colour for thing in things]) if rng.random() < 0.85 else None
        material = pick(rng, MATERIALS, [thing.material for thing in things]) if rng.random() < 0.12 else None
        things.append(Thing(subject, colour, material))
    view = View(tuple(things))
    if len(things) == 2:
        view = replace(view, relation=pick(rng, RELATIONS) if rng.random() < 0.7 else None)
    elif rng.random() < 0.1:
        view = replace(view, count=pick(rng, COUNTS))
    elif rng.random() < 0.1:
        view = replace(view, position=pick(rng, POSITIONS))
    place = pick(rng, PLACES) if rng.random() < 0.94 else None
    lights = EVERYWHERE if place in INDOORS else LIGHTS
    light = pick(rng, lights) if rng.random() < (0.3 if place in INDOORS else 0.45) else None
    style = pick(rng, STYLES) if rng.random() < 0.15 or not (place or light) else None
    return replace(view, place=place, light=light, style=style)


def undraw(said: View, lost: set[str], rng: np.random.Generator) -> tuple[View, set[str]]:
    """The view that is drawn without the slots in `lost`, and all slots lost by that."""
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
    """Slot -> (lead, word) for the view's content, with synonyms chosen and plurals made."""
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
    """A prompt from the words, in one of the forms of real prompts: sentence, comma list, scene first."""
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


# ------------------------------------------------------------------------------------------------ the picture
def layout(view: View, rng: np.random.Generator) -> list[tuple[int, float, float, float]]:
    """Positions, far things first: (thing, centre x, foot y relative to the place's base, size)."""
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
    x, foot, size = {None: (.5, 0, .8), "left": (.26, 0, .5), "right": (.74, 0, .5),
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
    """Draw the collected lights and clear the list."""
    for x, y, radius, colour, share in pen.glows:
        lay_disc(pen.image, x, y, radius, radius, colour, share * strength)
    pen.glows = []


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene's picture (size x size, RGB), deterministic."""
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
    tint = 1 - .65 * (1 - np.float32(light.tint))                     # weaker than the backdrop's tint
    tiles, alone = [None] * len(view.things), len(view.things) == view.count == 1
    for which, x, foot, scale in layout(view, stream(scene.seed, 3)):
        thing, shape = view.things[which], SHAPES[view.things[which].subject]
        paint = PAINT[thing.colour or shape.colour]
        if place.floats:
            base = .5 + scale / 2 + (foot * .3 if alone else foot * .9 + .2)
        else:
            high = .17 if alone and view.position != "close" else .05 if foot > -.1 else 0
            base = place.base + foot - high * shape.hovers
            lay_disc(pen.image, x, place.base + min(foot, .03), scale * .5, scale * .09, SHADE,
                     .3 if shape.hovers else .62, .8)
        tiles[which] = tiles[which] or draw_thing(shape, paint, thing.material, round(scale * n), tint,
                                                  stream(scene.seed, 4, which))
        tile, glows = tiles[which]
        corner = round((x - scale / 2) * n), round((base - scale * .97) * n)
        rim = tile.getchannel("A").filter(ImageFilter.BoxBlur(n / 96)).point(RIM)
        pen.image.paste(mix(paint, SHADE, .75), corner, rim)
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
def candidate(seed: int, index: int, truthful: bool = False) -> Scene:
    """Scene `index` of the world `seed`. A truthful one has the same prompt and draws every word."""
    return sample_scene(stream(seed, index), truthful)


def image_name(seed: int, index: int, truthful: bool = False) -> str:
    """A uuid, as in DiffusionDB, from VERSION, seed and index."""
    world = f"mini scenes {VERSION} {seed} {index}" + " truthful" * truthful
    digest = hashlib.sha256(world.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}.png"


def kept_indices(n: int, seed: int) -> list[int]:
    """The first n candidates whose prompts survive the paper's cleaning (4.1) beside those before them."""
    prompts, kept = [], ()
    while len(kept) < n:
        start = len(prompts)
        prompts += [candidate(seed, index).prompt for index in range(start, start + n // 6 + 8)]
        kept, _ = clean(prompts)
    return kept[:n].tolist()


def draw_pair(job: tuple[int, int, bool]) -> tuple[str, bytes, dict]:
    """(seed, index, truthful) -> the image's name, its PNG, and its entry in the part's JSON."""
    scene, file = candidate(*job), io.BytesIO()
    render(scene).save(file, "PNG", compress_level=3)
    entry = {"p": scene.prompt, "se": scene.seed, "undrawn": list(scene.undrawn)}
    return image_name(*job), file.getvalue(), entry


def part_bytes(number: int, pairs: list[tuple[str, bytes, dict]]) -> bytes:
    """A DiffusionDB part: a zip of images and part-00000N.json, with deterministic bytes."""
    listing = json.dumps({name: entry for name, _, entry in pairs}).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*((name, png) for name, png, _ in pairs), (f"part-{number:06d}.json", listing)]:
            info = zipfile.ZipInfo(name, (2022, 8, 22, 0, 0, 0))      # the day Stable Diffusion was released
            info.create_system = 3                                    # else the byte differs on Windows
            archive.writestr(info, content)
    return buffer.getvalue()


def is_complete(path: Path, names: list[str]) -> bool:
    """Whether the part at `path` is complete and holds these images."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:-1] == names
    except (OSError, zipfile.BadZipFile):
        return False


def build(folder: str | Path, parts: int = PARTS, per_part: int = PER_PART, seed: int = 0,
               progress: bool = True, truthful: bool = False) -> Path:
    """The path folder/images; writes parts x per_part pairs there as part-000001.zip ...

    A part's JSON entries hold the prompt "p", the scene's seed "se" and the words left "undrawn".
    `data.clean` drops none of the prompts. `truthful`: every word is drawn. Existing parts are kept, so an
    interrupted build resumes, and two builds with the same arguments write the same bytes.
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    indices, missing = kept_indices(parts * per_part, seed), []
    for number in range(1, parts + 1):
        path, chosen = images / f"part-{number:06d}.zip", indices[(number - 1) * per_part:number * per_part]
        if not is_complete(path, [image_name(seed, index, truthful) for index in chosen]):
            missing.append((path, number, chosen))
    jobs = [(seed, index, truthful) for _, _, chosen in missing for index in chosen]
    progress_bar = tqdm(total=len(jobs), desc="drawing mini scenes", disable=not progress or not jobs)
    with workers(len(jobs)) as pool, progress_bar as bar:
        drawn = pool.map(draw_pair, jobs, chunksize=25) if pool else map(draw_pair, jobs)
        for path, number, chosen in missing:
            pairs = []
            for _ in chosen:
                pairs.append(next(drawn))
                bar.update()
            atomic_write(path, part_bytes(number, pairs))
    return images


@contextmanager
def workers(jobs: int):
    """Context manager: a process pool, or None if not useful or not possible. Only the parent writes files
    and handles Ctrl-C. Workers end without a signal, since one that has just started could miss it."""
    count = min(os.cpu_count() or 1, 8, jobs // 50)
    if count < 2 or multiprocessing.current_process().daemon:
        yield None
        return
    try:
        pool = ProcessPoolExecutor(count, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        pool.submit(int).result()
    except OSError:                                                   # no semaphores, no room for processes
        yield None
        return
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError("drawing: a process was ended, for lack of memory?; repeat the command") from error
    finally:
        pool.shutdown(cancel_futures=True)


def bracketed(prompt: str, undrawn: Sequence[str]) -> str:
    """A prompt followed by its undrawn words in brackets."""
    return prompt + (f" [{', '.join(undrawn)}]" if undrawn else "")


def contact_sheet(pictures: list[tuple[Image.Image, str]], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures of one size with their texts underneath."""
    size = pictures[0][0].width
    cell, caption = size * zoom + 8, 62
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell + 8, rows * (cell + caption) + 8), (250, 248, 244))
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(pictures):
        x, y = 8 + i % columns * cell, 8 + i // columns * (cell + caption)
        sheet.paste(image.resize((size * zoom,) * 2, Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(text, size * zoom // 6)[:5]
        draw.multiline_text((x, y + size * zoom + 2), "\n".join(lines), INK, spacing=1)
    return sheet


def main() -> None:
    parser = Parser(prog="python -m mini.scenes", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", metavar="PNG", help="draw pictures with their prompts and [undrawn words]")
    parser.add_argument("--n", type=number_of(int, 1, 10_000), default=64,
                        help="scenes on the sheet (default 64)")
    parser.add_argument("--seed", type=number_of(int, 0), default=0,
                        help="which world: the same seed gives the same scenes everywhere (default 0)")
    parser.add_argument("--build", metavar="FOLDER",
                        help="write 8 parts of 1,000 pairs to FOLDER/images; what is there already is kept")
    arguments = parser.parse_args()
    if not (arguments.sheet or arguments.build):
        parser.error("nothing to do: give --sheet PNG, --build FOLDER or both")
    if arguments.sheet:
        drawn = [candidate(arguments.seed, i) for i in range(arguments.n)]
        pictures = [(render(scene), bracketed(scene.prompt, scene.undrawn)) for scene in drawn]
        contact_sheet(pictures).save(arguments.sheet, "PNG")
    if arguments.build:
        build(arguments.build, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(run_command(main, "stopped; the same command continues from what was saved"))
