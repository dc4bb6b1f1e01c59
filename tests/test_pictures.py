"""The sheets of training/pictures.py: which picture and which text stands where."""

import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import data
from reverse_sd import Vocabulary
from training import pictures

GREY, BLUE, BROWN = "#777777", "#1b4f8a", "#8a3b1b"
PROMPTS = [f"prompt {i}" for i in range(6)]
EMBEDDINGS = np.eye(6)[[0, 1, 2, 3, 1, 2]] @ (0.8 * np.eye(6) + 0.1)  # 4 and 5 are those of 1 and 2
EMBEDDINGS /= np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)
SIZES = [(64, 64), (64, 64), (64, 64), (64, 64), (40, 20), (300, 600)]


def image(i: int) -> Image.Image:
    """Another gradient for each number, so that a picture cut or turned is seen."""
    width, height = SIZES[i]
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 60, width))
    return Image.fromarray(np.stack([ramp + 10 * i, ramp, 255 - ramp], axis=2).astype(np.uint8))


def pairs(meta: list[dict] | None = None) -> data.Pairs:
    return SimpleNamespace(prompts=PROMPTS, image=image, meta=meta)  # type: ignore[return-value]


def assert_text(page: Image.Image, at: tuple[int, int], text: str, colour: str, size: int) -> None:
    """The text stands at the place, in its colour, on white, with nothing right of it for 6 pixels."""
    font = ImageFont.load_default(size=size)
    box = (int(font.getlength(text)) + 6, size + 1)
    expected = Image.new("RGB", box, "white")
    ImageDraw.Draw(expected).text((0, 0), text, colour, font)
    assert page.crop((*at, at[0] + box[0], at[1] + box[1])).tobytes() == expected.tobytes(), text


def test_examples_show_each_image_beside_its_prompts_and_words(tmp_path: Path):
    prepared = SimpleNamespace(
        pairs=pairs(), targets=EMBEDDINGS, splits={"train": np.arange(4), "test": np.array([4, 5])}
    )
    run = SimpleNamespace(vocabulary=Vocabulary(["cat", "owl"]))
    predicted = EMBEDDINGS[[4, 2]] + 0.3 * EMBEDDINGS[[0, 3]]
    words = np.array([[0.25, 0.875]] * 2)
    pictures.examples_picture(tmp_path / "examples.png", run, prepared, predicted, words)
    page = Image.open(tmp_path / "examples.png")
    assert page.size == (980, 2 * 156 + 12)
    order = np.random.default_rng(0).choice(2, size=2, replace=False)
    for k, i in enumerate(order):
        y, row = 12 + 156 * k, (4, 5)[i]
        shown = image(row)
        if row == 5:
            shown.thumbnail((144, 144))
        shown = shown.resize((144, 144 * shown.height // shown.width), Image.Resampling.LANCZOS)
        if row == 4:  # a tall picture is cut by the next row
            assert page.crop((12, y, 12 + 144, y + 72)).tobytes() == shown.tobytes()
        cosines = EMBEDDINGS[:4] @ predicted[i]
        nearest = np.argsort(-cosines, kind="stable")[:3]
        lines = [
            ("true prompt", PROMPTS[row], "black"),
            ("", f"cosine {predicted[i] @ EMBEDDINGS[row]:.3f}", GREY),
            *((f"nearest {n}", f"{PROMPTS[j]} ({cosines[j]:.2f})", BLUE) for n, j in enumerate(nearest, 1)),
            ("likely words", "owl 88%, cat 25%", BROWN),
        ]  # fmt: skip
        for n, (label, text, colour) in enumerate(lines):
            assert_text(page, (144 + 28, y + 19 * n), label, GREY, 12)
            assert_text(page, (144 + 112, y + 19 * n), text, colour, 12)
        end = page.crop((144 + 28, y + 19 * len(lines), 980, y + 144))
        assert end.getcolors() == [(end.width * end.height, (255, 255, 255))]


def test_examples_show_eight_images_at_most_and_two_lines_of_a_text(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pictures, "nearest", lambda query, rows, n: [])
    long = SimpleNamespace(prompts=["word " * 200] * 9, image=lambda i: image(0))
    splits = dict.fromkeys(("train", "test"), np.arange(9))
    prepared = SimpleNamespace(pairs=long, targets=np.eye(9), splits=splits)
    run = SimpleNamespace(vocabulary=Vocabulary(["cat"]))
    pictures.examples_picture(tmp_path / "a.png", run, prepared, np.eye(9), np.ones((9, 1)))
    page = Image.open(tmp_path / "a.png")
    assert page.size == (980, 8 * 156 + 12)
    lines = pictures.wrap("word " * 200, ImageFont.load_default(size=12), 980 - 144 - 132)
    assert len(lines) > 2
    for n, text in enumerate((*lines[:2], "cosine 1.000")):
        colour, y = ("black", 12 + 15 * n) if n < 2 else (GREY, 12 + 2 * 15 + 4)
        assert_text(page, (144 + 112, y), text, colour, 12)


def test_a_difficulty_sheet_has_a_row_a_chunk_with_cosines_prompts_and_undrawn_words():
    meta = [{}, {"undrawn": ["red", "cat"]}, {}, {}, {}, {}]
    rows, easiness = np.array([5, 4, 3, 2, 1, 0]), np.arange(6) / 10
    picked = [np.array([5, 4]), np.array([1]), np.array([0])]
    png = pictures.difficulty_sheet(pairs(meta), rows, easiness, picked)
    page = Image.open(io.BytesIO(png))
    assert page.size == (2 * 136 + 8, 3 * 248)
    for k, (name, chosen) in enumerate(zip(("easy", "medium", "hard"), picked, strict=True)):
        assert_text(page, (8, 248 * k + 5), name, "black", 14)
        for column, i in enumerate(chosen):
            x, y, row = 8 + 136 * column, 248 * k + 24, rows[i]
            width, height = SIZES[row]
            shape = (128 * width // max(SIZES[row]), 128 * height // max(SIZES[row]))
            shown = image(row).resize(shape, Image.Resampling.LANCZOS)
            assert page.crop((x, y, x + shape[0], y + shape[1])).tobytes() == shown.tobytes()
            assert_text(page, (x, y + 130), f"cosine {easiness[i]:.2f}", GREY, 11)
            text = PROMPTS[row] + (" [red, cat]" if row == 1 else "")
            assert_text(page, (x, y + 144), text, BLUE, 11)
    long = pairs(meta)
    long.prompts = ["word " * 100] * 6
    page = Image.open(io.BytesIO(pictures.difficulty_sheet(long, rows, easiness, picked)))
    lines = pictures.wrap("word " * 100, ImageFont.load_default(size=11), 128)
    for n in range(5):
        assert_text(page, (8, 24 + 144 + 13 * n), lines[n], BLUE, 11)
    assert page.crop((8, 24 + 144 + 65, 136, 248)).getcolors() == [(128 * 15, (255, 255, 255))]


@pytest.mark.parametrize("text", ["", "one", "a " * 60, "words of several lengths, one extraordinarily-long"])
def test_lines_are_as_full_as_their_width_allows(text: str):
    font, width = ImageFont.load_default(size=12), 70
    lines = pictures.wrap(text, font, width)
    assert " ".join(lines).split() == text.split() and len(lines) >= 1
    assert all(font.getlength(line) <= width or " " not in line for line in lines)
    for line, following in pairwise(lines):
        assert line and font.getlength(f"{line} {following.split()[0]}") > width
