"""The subjects of mini scenes, from the star to the ghost, and the materials they can be made of.

One function draws a subject, in a unit square; standing things have their feet near y = 0.97. A material
covers the parts in the pen's own tones, so that eyes, windows and stems keep their colours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mini.pen import (
    BARK,
    CREAM,
    GOLD,
    INK,
    LEAF,
    PAINT,
    SHADE,
    Pen,
    blend,
    floats,
    mix,
    picture,
    ring,
    unit_grid,
)


# ----------------------------------------------------------------------------------------------- the subjects
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
    """A subject's drawing function, default colour, and whether it hovers."""
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
# Each repaints rgb (n, n, 3), given unit coordinates x, y (n, n) and a random phase.

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


def draw_thing(shape: Shape, paint, material: str | None, n: int, tint,
               rng: np.random.Generator) -> tuple[Image.Image, list]:
    """A shape in `paint` on a transparent n x n tile in light of colour `tint`, and its glows in tile
    coordinates. `material` is a key of MATERIAL_PAINT; None leaves the paint plain."""
    tile = Image.new("RGBA", (n, n), (*mix(paint, SHADE, 0.6), 0))
    pen = Pen(tile, paint)
    shape.draw(pen)
    x, y = unit_grid(n)
    pixels = floats(tile)                                             # (n, n, 4), painted in place
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    if material:
        own = np.asarray(pen.own) > 0
        rgb[own] = MATERIAL_PAINT[material](rgb, x, y, rng.random() * 6.28)[own]
        if material == "glass":
            alpha[own] *= 0.62
    if material == "glow":
        pen.glow(0.5, 0.5, 0.75, mix(paint, (255, 255, 255), 0.45), 0.8)
    else:                                                             # light falls from the upper left
        rgb *= (1.1 - 0.16 * x - 0.14 * y)[..., None] * np.asarray(tint, np.float32)
    return picture(pixels), pen.glows
