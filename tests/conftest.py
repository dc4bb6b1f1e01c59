"""Fixtures that several test files share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def entries(run: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in entries(run) if "loss" in entry]


def assert_same_end(a: Path, b: Path) -> None:
    """The same losses, the same bits in the best and in the last weights and optimizer states, and the same
    result where both have one."""
    assert losses(a) == losses(b)
    last = [next((run / "last").glob("step-*.safetensors")) for run in (a, b)]
    for x, y in ((a / "model.safetensors", b / "model.safetensors"), last):
        x, y = load_file(x), load_file(y)
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []
    results = [result_of(run) for run in (a, b)]
    assert None in results or results[0] == results[1]


def result_of(run: Path) -> dict | None:
    """result.json but for the time it took; None for a phase 1, which has none."""
    path = run / "result.json"
    return json.loads(path.read_text()) | {"seconds": 0} if path.exists() else None
