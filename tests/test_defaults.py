"""Defaults and constants that results depend on: the paper's, the authors' code's, or stated by the docs."""

import argparse
import inspect
import re
from collections.abc import Callable

import pytest

import baselines
import eval as evaluation
import generate
import inversion
import reverse_sd
from mini import generated, judge, pretrain, scenes
from mini.loop import Recipe
from models import bert
from tables import generation, methods
from training import metrics, plan
from training.decoder import DecoderConfig

DEFAULTS = [
    (reverse_sd.Heads, {"placement": 3, "embedding_width": 384}),
    (reverse_sd.Regressor, {"placement": 3}),
    (reverse_sd.joint_loss, {"mlc_weight": 0.1}),
    (reverse_sd.easiness_thresholds, {"easy_share": 0.5, "hard_share": 0.1}),
    (reverse_sd.ensemble, {"average": "mean", "weights": None}),
    (reverse_sd.kmeans, {"seed": 0, "max_iterations": 20, "tolerance": 1e-3}),
    (reverse_sd.dakl_literal, {"centred": False}),
    (reverse_sd.Dakl.predict, {"unit": True}),
    (generate.Pipeline.sample, {"negative": "", "steps": 50, "guidance": 7.5}),
    (baselines.lerac_rate, {"c": 10.0}),
    (baselines.Smoothing, {"sigma": 1.0}),
    (metrics.bootstrap_interval, {"seed": 0, "resamples": 10_000}),
    (metrics.bootstrap_weights, {"seed": 0}),
    (metrics.rank_correlation, {"resamples": 1000}),
    (DecoderConfig, {"pretrained": False, "epochs": 8, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05}),
    (methods.EnsembleMethod, {"average": "mean"}),
    (methods.fit_ensemble_weights, {"iterations": 200}),
    (methods.KnnMethod, {"pretrained": False}),
    (Recipe, {"warmup": 0, "weight_decay": 0.0, "betas": (0.9, 0.99)}),
]


@pytest.mark.parametrize("function, expected", DEFAULTS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_the_documented_defaults(function: object, expected: dict):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_the_documented_constants():
    assert baselines.NEIGHBOURS == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert baselines.TEMPERATURES == (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert (metrics.RESAMPLES, bert.MAX_TOKENS) == (2000, 256)
    assert (generation.STEPS, generation.GUIDANCE, generation.SWAP_AFTER) == (50, 7.5, 1)
    assert (generation.MINI_PROMPTS, generation.PROMPTS, generation.VOTES) == (200, 2500, 100)
    assert (generation.NOISE_PROMPTS, generation.NOISE_SEEDS) == (100, 10)
    assert (generated.STEPS, generated.GUIDANCE) == (50, 7.5)


@pytest.mark.parametrize(
    "main",
    [evaluation.main, generate.main, inversion.main, plan.main, reverse_sd.main, generated.main, judge.main,
     pretrain.main, scenes.main],
    ids=lambda main: main.__module__,
)  # fmt: skip
def test_the_defaults_that_help_states(main: Callable, monkeypatch: pytest.MonkeyPatch):
    parsers = []

    def parse(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(SystemExit):
        main(*[[]] * len(inspect.signature(main).parameters))
    stated = re.compile(r"\(default:? (\d[\d.,]*|auto|sd-mini|float32)[,)]")
    found = [(stated.search(action.help or ""), action.default) for action in parsers[0]._actions]
    found = [(of[1], default) for of, default in found if of]
    assert found and [default for _, default in found] == [type(default)(of) for of, default in found]
