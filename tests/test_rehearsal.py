"""The paper's networks at full size, with random weights from files of the published layout, through the
commands: two training steps, evaluation, one's own image, generation with the swapped U-Net.

Each needs up to 14 GB of memory, 10 GB of disk and minutes of one core. Files are float16, as large as the
hub's, and are deleted after use.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, entries, environment
from PIL import Image

import data
from benchmarks.loading import Case, write
from training.inputs import MINI_PAIRS
from weights.registry import FOLDERS

BLACK_BOXES = {  # backbone, kind, dialect of the published file
    "vit-b-16": ("vit", "vit", "timm"),
    "swin-l": ("swin", "swin", "timm"),
    "clip-h-14": ("clip", "clip-vision", "open_clip"),
}


@pytest.fixture(scope="module")
def eight_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of the embedded pairs as images, each beside its prompt."""
    folder, pairs = tmp_path_factory.mktemp("eight"), data.read_pairs(MINI_PAIRS)
    for i in range(8):
        pairs.image(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pairs.prompts[i])
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes go when its test ends."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def command(*argv: object) -> str:
    """Standard output of a command of the project, which must end well and without a traceback."""
    words = [sys.executable, *map(str, argv)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def train_two_steps(run: Path, pairs: Path, *flags: object) -> None:
    command(
        *("train.py", "--data", pairs, "--out", run, "--batch-size", 2, "--epochs", 1),
        *("--val-size", 2, "--test-size", 2, "--clean", "duplicates", *flags),
    )
    losses = [entry["loss"] for entry in entries(run) if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()


def read_again(run: Path, image: Path) -> None:
    """eval.py gives the result of the run's end, and reverse_sd.py reads an image."""
    before = json.loads((run / "result.json").read_text())
    command("eval.py", run)
    after = json.loads((run / "result.json").read_text())
    assert after["test_cosine"] == pytest.approx(before["test_cosine"], abs=1e-6)
    assert "words" in command("reverse_sd.py", image, "--run", run)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLACK_BOXES)
def test_a_black_box_of_full_size(name: str, eight_pairs: Path, cache: Path, place: Path):
    backbone, kind, dialect = BLACK_BOXES[name]
    (source := place / name).mkdir()
    write(Case(name, kind, dialect), source, "float16")
    train_two_steps(place / "run", eight_pairs, "--backbone", backbone, "--weights", source)
    read_again(place / "run", eight_pairs / "0.png")


@pytest.fixture
def stable_diffusion(place: Path) -> Path:
    """A diffusers folder of Stable Diffusion 1.5's sizes, with a small tokenizer."""
    root = place / "sd"
    for kind in ("unet", "vae", "clip-text"):
        (folder := root / FOLDERS[kind]).mkdir(parents=True)
        write(Case("sd-1", kind, "diffusers"), folder, "float16")
    shutil.copytree(ROOT / "mini" / "sd-mini" / "tokenizer", root / "tokenizer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root


@pytest.mark.slow
def test_stable_diffusion_of_full_size(stable_diffusion: Path, eight_pairs: Path, cache: Path, place: Path):
    (blip := place / "blip").mkdir()
    write(Case("blip-base", "blip", "hf"), blip, "float16")
    run = place / "run"
    flags = ("--backbone", "unet", "--weights", stable_diffusion, "--captions", blip)
    train_two_steps(run, eight_pairs, *flags)
    shutil.rmtree(run / "last")  # 4 GB
    read_again(run, eight_pairs / "0.png")
    command(
        *("generate.py", "a red bird", "--weights", stable_diffusion, "--swap", run),
        *("--steps", 2, "--size", 128, 128, "--out", place / "drawn"),
    )
    with Image.open(next((place / "drawn").glob("*.png"))) as picture:
        assert picture.size == (128, 128)
