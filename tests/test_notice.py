"""Values whose change no other test sees: settings of the published tables, flags' help, rare paths."""

import argparse
import contextlib
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train
from inversion import Denoising
from models.search import beam_search
from tables import cells
from tables.runs import RECIPES
from training import calibration
from training.config import TrainConfig

# Settings of the published tables, by module. Whoever changes one makes the tables again.
SETTINGS = {
    "budget": {"WORDINGS": 12, "SHOWN": (1, 4, 12)},
    "crossed": {"FROZEN_SEEDS": (0, 1, 2, 3, 4)},
    "denoised": {"TEXTS": 16, "FROZEN_SEEDS": (0, 1, 2, 3, 4)},
    "difficulty": {"PROMPTS": 150, "DRAWS": 8, "LOST": 0.25, "FOLDS": 10},
    "generation": {
        "STEPS": 50, "GUIDANCE": 7.5, "SWAP_AFTER": 1, "MINI_PROMPTS": 200, "PROMPTS": 2500, "VOTES": 100,
        "NOISE_PROMPTS": 100, "NOISE_SEEDS": 10, "PAPER_VOTES": ((52, 30, 18), (36, 10, 54), (31, 5, 64)),
        "PAPER": {"DrawBench": (0.4594, 0.5067), "test prompts": (0.6417, 0.6443)},
    },
    "judges": {
        "SEED": 5_000_011, "DRAWINGS": {1: 1000, 2: 500}, "NATURAL": 2000, "RESAMPLES": 1000, "NOISE": 25,
        "BLEND": 0.3,
    },
    "probe": {"WORDINGS": 24, "ALPHAS": [1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 1, 10, 100, 1000]},
    "prompts": {"SENTENCES": 10_000, "SENTENCES_SEED": 6_000_011, "EXAMPLES": 8, "LIKELY": 0.5},
    "readouts": {"TIMESTEPS": (0, 50, 150, 400)},
    "redrawn": {
        "IMAGES": 100, "NOISE": 20_000_003, "MINI_STEPS": {"pez": 1000, "ph2p": 500, "swaps": 200},
        "RANDOM_PROMPTS": 100, "SHEET_IMAGES": 8, "FIGURE_PROMPTS": 3, "FIGURE_DRAWS": 5,
    },
    "shift": {"GUIDANCES": (2.0, 15.0), "STEPS": 50, "PICTURES": 500},
    "swap": {
        "SHARES": (0.1, 0.25, 0.5, 0.75, 1.0), "RANDOM_SHARES": (0.25, 1.0), "RATES": (1e-3, 1e-4),
        "NOISE_WEIGHT": 1.0,
    },
    "sweep": {"FLAT": 0.002},
    "votes": {"LOSSLESS": 256, "PAPER_AGREEMENTS": (21, 2, 14), "PAPER_AVERAGE": ("39.6", "15.0", "45.4")},
    "words": {"SEED": 7_000_003, "PARTS": 6, "PER_PART": 1000, "RESAMPLES": 500},
}  # fmt: skip
COMMANDS = ("train", "eval", "generate", "inversion", "reverse_sd", "weights.__main__")


@pytest.mark.parametrize("name, settings", SETTINGS.items())
def test_the_settings_of_the_published_tables(name: str, settings: dict):
    module = importlib.import_module(f"tables.{name}")
    assert {setting: getattr(module, setting) for setting in settings} == settings


def test_the_heads_and_options_of_each_recipe():
    heads = {"plain": 0, "cl": 0, "lerac": 0, "cbs": 0, "head-1": 1, "head-2": 2}
    for name, recipe in RECIPES.items():
        base = name.removesuffix("-tuned")
        if "heads" in recipe:
            assert recipe["heads"] == heads.get(base, 3), name
        assert recipe.get("curriculum") == {"mlc-cl": "difficulty", "cl": "difficulty"}.get(
            base, base if base in ("lerac", "cbs") else None
        )
        named = next((kind for kind in ("empty", "prompt") if f"captions-{kind}" in name), None)
        assert named is None or recipe["captions"] == named


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    actions, add = [], argparse._ActionsContainer._add_action
    monkeypatch.setattr(
        argparse._ActionsContainer, "_add_action", lambda self, a: actions.append(a) or add(self, a)
    )
    module = importlib.import_module(command)
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and actions
    assert [action.option_strings for action in actions if action.option_strings and not action.help] == []
    if command != "reverse_sd":  # the others print their examples, line by line
        assert getattr(module, "EPILOG", module.__doc__).strip() in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# One part at a time
# ------------------------------------------------------------------------------------------------------------


def test_random_crops_are_squares_of_every_place_and_side():
    coordinates = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij"))
    draws = [torch.Generator().manual_seed(seed) for seed in range(300)]
    images = coordinates.expand(len(draws), -1, -1, -1)

    def cropped(images: torch.Tensor, crop: float) -> torch.Tensor:
        return Denoising.cropped(SimpleNamespace(images=images, draws=draws, o=SimpleNamespace(crop=crop)))

    crops = cropped(images, 0.5)
    assert crops.shape == images.shape
    first, last = crops.amin(dim=(2, 3)), crops.amax(dim=(2, 3))  # (B, 2): (y, x) of a square's corners
    side = last - first + 1
    torch.testing.assert_close(side[:, 0], side[:, 1])
    assert (side.min().round(), side.max().round()) == (6, 12)
    small = side[:, 0] < 9
    assert first[small].amin(dim=0).tolist() == [0, 0]
    assert last[small].amax(dim=0).round().tolist() == [11, 15]
    assert torch.equal(cropped(images[..., :12], 1), images[..., :12])  # of a square: no crop


def test_log_odds_are_finite_at_both_ends():
    p = np.array([0.0, 0.25, 1.0], np.float32)
    expected = [np.log(1e-7 / (1 - 1e-7)), np.log(1 / 3), -np.log(1e-7 / (1 - 1e-7))]
    assert calibration.logit(p) == pytest.approx(expected, rel=1e-6)
    assert calibration.sigmoid(calibration.logit(p)) == pytest.approx([1e-7, 0.25, 1 - 1e-7], rel=1e-9)
    near = calibration.score_odds(np.array([-1, 0.25, 2]))  # no nearer to 0 and 1 than .01
    assert near == pytest.approx([-np.log(99), -np.log(3), np.log(99)])
    assert calibration.log_odds(np.array([0, 2, 4]), 4) == pytest.approx([-np.log(9), 0, np.log(9)])


@pytest.mark.parametrize("beams, rest", [(1, 0), (2, 3)])
def test_a_padding_id_of_0_fills_what_one_beam_leaves(beams: int, rest: int):
    """As in transformers: with several beams the end token stands there."""

    def step(new: torch.Tensor, past: list | None) -> tuple[torch.Tensor, list]:
        image = torch.arange(len(new)) * 2 // len(new)
        logits = torch.full((len(new), 5), -9.0)
        logits[torch.arange(len(new)), torch.where((image == 0) | (new[:, -1] == 1), 3, 1)] = 9.0
        return logits, []

    found = beam_search(step, torch.tensor([[4], [4]]), beams, end=3, pad=0, min_new=0, max_new=4)
    assert found.tolist() == [[4, 3, rest], [4, 1, 3]]


def test_processes_that_torchrun_started_again_need_a_folder():
    process = SimpleNamespace(restarted=lambda: True, first=True)
    with contextlib.ExitStack() as stack, pytest.raises(data.DataError, match="--out: is needed for"):
        train.own_folder(TrainConfig(), None, None, process, stack)


def test_the_cosines_of_cells_are_those_of_their_runs(monkeypatch: pytest.MonkeyPatch):
    rows = {name: np.random.default_rng(i).normal(size=(5, 4)) for i, name in enumerate(("a", "b", "true"))}
    rows["true"] /= np.linalg.norm(rows["true"], axis=1, keepdims=True)  # as sentence embeddings are
    members = [
        SimpleNamespace(targets=lambda split, own=own: rows["true"][3:] if split == "test" else rows[own][:3],
                        predicted=lambda split, name=name: rows[name][3:] if split == "test" else None)
        for name, own in (("a", "true"), ("b", "b"))  # the second has other training targets
    ]  # fmt: skip
    monkeypatch.setattr(cells, "members_of", lambda plan, runs, seed: members if runs == (1, 2) else None)
    found = cells.trained_cosines(None, {"first": 1, "second": 2}, 0)
    expected = {"first": rows["a"][3:], "second": rows["b"][3:], cells.MEAN: rows["true"][:3].mean(axis=0)}
    for cell, x in expected.items():
        x, y = np.broadcast_to(x, (2, 4)), rows["true"][3:]
        by_hand = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1)
        assert found.pop(cell) == pytest.approx(by_hand)
    assert not found
