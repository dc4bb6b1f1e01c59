"""Runs, checkpoints and caches that were made at commit 24701ab are read, resumed and not computed again."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import losses

import backbones
import reverse_sd
import train
import weights
from models.unet import UNetConfig
from training.folder import saved_config

MADE = Path(__file__).parent / "made_at_24701ab"
UNET = "d8aa1d426f9594fa9bafebcfcec191984a5e82610495ca8533a9be138d249c67"  # sd-mini's, of four levels
WHEN = 1_700_000_000 * 10**9  # the pictures' time of change, which is part of a cache's identity


@pytest.fixture
def before(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was made, in the working directory; loading an encoder fails. sd-mini's U-Net has the
    sizes and the hash of that time."""
    for path in shutil.copytree(MADE, tmp_path / "made").joinpath("pairs").iterdir():
        os.utime(path, ns=(WHEN, WHEN))
    shutil.copytree(MADE / "cache", cache, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "made")
    monkeypatch.setattr(backbones.SDReader, "network", lambda self, kind: pytest.fail(f"loaded {kind}"))
    sizes = json.loads((MADE / "finished" / "config.json").read_text())["model"]
    sizes = UNetConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()})
    for name, value in (("fingerprint", UNET), ("config", sizes)):
        monkeypatch.setattr(weights, name, partial(of_that_time, getattr(weights, name), value))
    return tmp_path / "made"


def of_that_time(today: Callable, value: object, kind: str, *source: str) -> object:
    return value if kind == "unet-encoder" else today(kind, *source)


def test_the_renamed_fields_are_read(before: Path):
    config = saved_config(before / "finished")
    assert config.record_cosines and config.phase_1 is None and config.words == 20 and config.batch_size == 8


def test_a_stopped_run_is_resumed_from_its_checkpoint_and_caches(before: Path, cache: Path):
    cached = sorted(cache.iterdir())
    assert json.loads((before / "stopped" / "last" / "state.json").read_text())["step"] == 6
    assert train.main(["--resume", "stopped"]) == 0
    assert len(losses(before / "stopped")) == 16 and sorted(cache.iterdir()) == cached
    np.testing.assert_allclose(losses(before / "stopped"), losses(before / "finished"), rtol=1e-3)
    results = [json.loads((before / name / "result.json").read_text()) for name in ("stopped", "finished")]
    assert results[0]["test_cosine"] == pytest.approx(results[1]["test_cosine"], abs=2e-3)
    recorded = [np.load(before / name / "cosines.npy") for name in ("stopped", "finished")]
    np.testing.assert_allclose(*recorded, atol=2e-3)


def test_recorded_cosines_serve_as_phase_1(before: Path):
    flags = ["--data", "pairs", "--train-blocks", "0", "--captions", "empty", "--words", "20"]
    flags += ["--head-start", "random", "--unet-features", "middle"]
    flags += ["--epochs", "4", "--batch-size", "8", "--val-size", "6", "--test-size", "6", "--clean", "off"]
    flags += ["--curriculum", "difficulty", "--phase-1", "finished", "--out", "second"]
    assert train.main(flags) == 0
    np.testing.assert_allclose(np.load("second/easiness.npy"), np.load("finished/difficulty.npy"))


def test_a_frozen_run_on_weights_that_have_changed_is_refused_in_one_line(cache: Path):
    run = reverse_sd.load_run(MADE / "finished")
    with pytest.raises(weights.WeightsError, match="sd-mini had other sizes when this run was trained"):
        reverse_sd.image_predictor(run, "cpu")
