"""Sheets of pictures with text: a run's examples.png, and the easy, medium and hard pairs of figure 9."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
from files import atomic_write
from reverse_sd import Run, nearest
from training.inputs import Prepared

CHUNKS = ("easy", "medium", "hard")


class Line(NamedTuple):
    """Text beside a picture."""

    label: str
    text: str
    colour: str = "black"


def examples_picture(
    path: Path,
    run: Run,
    prepared: Prepared,
    embedding: np.ndarray,
    probabilities: np.ndarray,
) -> None:
    """Test images with the true prompt, the training prompts nearest to the predicted embeddings (n, E), the
    likely words by their probabilities (n, V)."""
    test, train_rows = prepared.splits["test"], prepared.splits["train"]
    train_targets = np.asarray(prepared.targets[train_rows])

    def lines(i: int) -> list[Line]:
        cosine = float(embedding[i] @ prepared.targets[test[i]])
        found = [Line("true prompt", prepared.pairs.prompts[test[i]])]
        found.append(Line("", f"cosine {cosine:.3f}", "#777777"))
        for rank, (j, similarity) in enumerate(nearest(embedding[i], train_targets, 3)):
            text = f"{prepared.pairs.prompts[train_rows[j]]}  ({similarity:.2f})"
            found.append(Line(f"nearest {rank + 1}", text, "#1b4f8a"))
        found.append(Line("likely words", run.vocabulary.likely(probabilities[i], 8), "#8a3b1b"))
        return found

    examples_sheet(path, prepared, lines)


def examples_sheet(path: Path, prepared: Prepared, lines: Callable[[int], list[Line]], n: int = 8) -> None:
    """Write a sheet with a row for each of `n` test images: the image, and its lines."""
    test = prepared.splits["test"]
    picked = np.random.default_rng(0).choice(len(test), size=min(n, len(test)), replace=False)
    rows = (([prepared.pairs.image(int(test[i]))], lines(i)) for i in picked)
    atomic_write(path, sheet(rows, 144))


def sheet(rows: Iterable[tuple[Sequence[Image.Image], Sequence[Line]]], side: int = 96) -> bytes:
    """A PNG with a row for each item: its pictures, `side` pixels large, and its lines beside them."""
    rows, width, line = list(rows), 824, 15
    left = max(len(pictures) for pictures, _ in rows) * (side + 12)
    page = Image.new("RGB", (left + width, len(rows) * (side + 12) + 12), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    beside = max(84, *(int(font.getlength(label)) + 12 for _, lines in rows for label, *_ in lines))
    for k, (pictures, lines) in enumerate(rows):
        y = 12 + k * (side + 12)
        for column, image in enumerate(pictures):
            image.thumbnail((side, side)) if max(image.size) > side else None
            size = (side, side * image.height // image.width)
            page.paste(image.resize(size, Image.Resampling.LANCZOS), (12 + column * (side + 12), y))
        for label, text, colour in lines:
            draw.text((left + 16, y), label, "#777777", font)
            for part in wrap(text, font, width - beside - 36)[:2]:
                draw.text((left + 16 + beside, y), part, colour, font)
                y += line
            y += 4
    return png(page)


def difficulty_sheet(
    pairs: data.Pairs, rows: np.ndarray, easiness: np.ndarray, picked: Sequence[np.ndarray]
) -> bytes:
    """Sheet of easy, medium and hard pairs: pictures, phase 1's cosine, prompts, [undrawn words]."""
    side, caption, gap, band = 128, 88, 8, 24
    columns = max(map(len, picked))
    size = (columns * (side + gap) + gap, len(picked) * (band + side + caption + gap))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=11)
    draw = ImageDraw.Draw(sheet)
    for k, (name, chosen) in enumerate(zip(CHUNKS, picked, strict=True)):
        y = k * (band + side + caption + gap)
        draw.text((gap, y + 5), name, "black", ImageFont.load_default(size=14))
        for column, i in enumerate(chosen):
            x, row = gap + column * (side + gap), int(rows[i])
            image = pairs.image(row)
            scale = side / max(image.size)
            shape = tuple(max(1, round(length * scale)) for length in image.size)
            sheet.paste(image.resize(shape, Image.Resampling.LANCZOS), (x, y + band))
            undrawn = ", ".join(pairs.meta[row].get("undrawn", ()))
            text = pairs.prompts[row] + (f" [{undrawn}]" if undrawn else "")
            draw.text((x, y + band + side + 2), f"cosine {easiness[i]:.2f}", "#777777", font)
            for n, line in enumerate(wrap(text, font, side)[:5]):
                draw.text((x, y + band + side + 16 + 13 * n), line, "#1b4f8a", font)
    return png(sheet)


def wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """The text's lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
