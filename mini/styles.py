"""The styles of mini scenes, from watercolor to cross stitch.

Each takes the finished picture, larger than it will be in the end, and returns one as wide or narrower.
"""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mini.pen import blend, floats, picture, stream, unit_grid


@lru_cache(maxsize=64)
def patches(kind: str, n: int, variant: int) -> tuple[np.ndarray, int]:
    """A map (n, n) of patch numbers, and their count: triangles, tiles, cells or brush strokes."""
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
    """Distance of each pixel (n, n) from the picture's border, 0 to 0.5."""
    x, y = unit_grid(n)
    return np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))


def edges(image: Image.Image) -> np.ndarray:
    """Strength of colour edges (n, n), 0 to about 255, one unit wide per 64 pixels."""
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
