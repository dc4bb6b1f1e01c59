"""Shared drawing tools of mini scenes: paints, random numbers, curves, the pen, and work on pixels."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CREAM, INK, LEAF, BARK, GOLD = (250, 243, 224), (42, 36, 52), (92, 156, 78), (124, 84, 54), (250, 204, 84)
SHADE = (36, 26, 62)                                                  # the tint of shadows
PAINT = {
    "red": (208, 48, 50), "orange": (240, 134, 40), "yellow": (248, 204, 60), "green": (64, 160, 82),
    "turquoise": (48, 182, 178), "blue": (50, 100, 208), "purple": (136, 78, 188), "pink": (242, 122, 168),
    "brown": (132, 86, 52), "white": (248, 244, 234), "black": (50, 46, 58), "grey": (148, 152, 164),
}


def pick(rng: np.random.Generator, options, besides=()):
    """One of `options` that is not among `besides`."""
    options = [option for option in options if option not in besides]
    return options[int(rng.integers(len(options)))]


def stream(*key: int) -> np.random.Generator:
    """A random generator for a key of integers, the same on every platform."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


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
        return zip(self.draws, (fill, 255 * (fill in self.tones))[:len(self.draws)], strict=True)

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
    """The picture of an array from `floats`, clipped."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@lru_cache(maxsize=64)
def unit_grid(n: int):
    """x and y (n, n) at the centres of n x n pixels of the unit square."""
    line = ((np.arange(n) + 0.5) / n).astype(np.float32)
    return np.broadcast_to(line[None, :], (n, n)), np.broadcast_to(line[:, None], (n, n))


def blend(rgb, colour, share):
    """`colour` (3) or (n, n, 3) laid over rgb with `share` (n, n) or a number."""
    share = np.asarray(share, np.float32)
    return rgb + (np.asarray(colour, np.float32) - rgb) * (share[..., None] if share.ndim else share)


def gradient(n: int, *stops: tuple[float, tuple[int, int, int]]) -> Image.Image:
    """An n x n picture of colours between stops (y, colour) from top to bottom."""
    ys, colours = zip(*stops, strict=True)
    at = np.linspace(0, 1, n)
    rows = np.stack([np.interp(at, ys, channel) for channel in zip(*colours, strict=True)], 1)
    return Image.fromarray(rows.round().astype(np.uint8)[:, None, :]).resize((n, n), Image.Resampling.NEAREST)
