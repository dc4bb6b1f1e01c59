"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import weights

ROOT = Path(__file__).parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real data for trying things out; tests that want it skip without it


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
