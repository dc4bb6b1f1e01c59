"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train
import weights
from mini import scenes

ROOT = Path(__file__).parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real data for trying things out; tests that want it skip without it

SMALL = [
    "--epochs",
    "2",
    "--batch-size",
    "12",
    "--val-size",
    "12",
    "--test-size",
    "12",
    "--checkpoint-every",
    "2",
]


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.build(folder, parts=1, per_part=84, progress=False)
    return folder


def train_here(few_scenes: Path, out: Path, *flags: str) -> Path:
    torch.set_num_threads(1)
    assert train.main(["--data", str(few_scenes), "--out", str(out), *SMALL, *flags]) == 0
    return out


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The published all-MiniLM-L6-v2, fetched into the user's cache like at its first use."""
    return weights.resolve("minilm")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[Path]:
    """A cache of the test file's own, empty but for MiniLM."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "weights").mkdir()
    (folder / "weights" / "minilm").symlink_to(minilm_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVERSE_SD_CACHE", str(folder))
        yield folder


def environment(**extra: str) -> dict[str, str]:
    """For subprocesses: this process's environment, one thread, and the project importable from anywhere."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | extra
