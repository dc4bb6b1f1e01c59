"""Backdrops of mini scenes: places, and light with sky and weather.

A picture is laid down from the back: the light's sky and what it draws behind (sun, clouds, stars), the place
over it, the things, and what the light draws in front (rain, petals, fog).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from mini.pen import BARK, PAINT, SHADE, Pen, gradient, mix, pick, ring, unit_grid


# ------------------------------------------------------------------------------------------------- the places
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
    """A place's drawing function (over the sky), the y of its ground, and whether things float there."""
    draw: Callable
    base: float = 0.93
    floats: bool = False
    sinks: bool = False                                               # a wave covers the foot of things there


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
    for a, b in pairwise(bolt):
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
