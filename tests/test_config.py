"""The settings of a run: flags, defaults, bounds, conflicts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
import weights
from training.config import TrainConfig, epoch_weights, resolve
from training.inputs import prepare


def test_every_field_is_a_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"]
        default = "" if field.default is None else f"(default: {field.default})"
        assert "".join((field.metadata["help"] + default).split()) in text
    assert "(default:None)" not in text


def test_defaults_are_the_papers_row_but_for_the_miniature():
    paper = resolve(TrainConfig(weights="sd-1"))
    assert (paper.epochs, paper.batch_size, paper.lr, paper.optimizer) == (3, 64, 1e-4, "adam")
    assert (paper.heads, paper.words, paper.mlc_weight, paper.image_size) == (3, 1000, 0.1, 256)
    assert paper.captions == "blip-base"
    assert (paper.weight_decay, paper.clip_norm, paper.layer_decay, paper.accumulate) == (0, 1, 1, 1)
    mini, vit = resolve(TrainConfig()), resolve(TrainConfig(backbone="vit"))
    for small, lr in ((mini, 2e-3), (vit, 1e-3)):
        assert (small.epochs, small.batch_size, small.lr, small.head_lr) == (4, 32, lr, 5e-5)
    assert (mini.image_size, mini.captions) == (64, "blip-mini")
    assert (vit.image_size, vit.captions) == (None, None)
    own = resolve(TrainConfig(backbone="vit", weights="my/own-mini"))  # of a miniature without a sweep
    assert (own.epochs, own.batch_size, own.lr, own.head_lr, own.head_start) == (4, 32, 1e-3, 5e-5, "ridge")
    again = resolve(TrainConfig(recipe="paper"))
    assert (again.epochs, again.head_start, again.unet_features) == (3, "random", "middle")
    assert (again.head_lr, again.layer_decay, again.lr, again.image_size) == (None, 1, 2e-3, 64)
    assert paper.checkpoint_every == 100


# The least and the most that each flag takes, and what lies just beyond; `tiny` stands for "above 0".
TINY, HUGE = 1e-300, 10**6
ENDS: dict[str, tuple[list, list]] = {
    **dict.fromkeys(("val_size", "test_size", "checkpoint_every"), ([1, 10**9], [0, 10**9 + 1])),
    **dict.fromkeys(("words", "epochs", "batch_size", "accumulate"), ([1, HUGE], [0, HUGE + 1])),
    **dict.fromkeys(("lerac_epochs", "lerac_min_lr", "cbs_every"), ([TINY], [0.0, np.inf, np.nan])),
    **dict.fromkeys(("easy_share", "layer_decay"), ([TINY, 1.0], [0.0, 1.0001])),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "image_size": ([8, 4096], [7, 4097]),
    "train_blocks": ([0, HUGE], [-1, HUGE + 1]),
    "heads": ([0, 3], [-1, 4]),
    "hard_share": ([0.0, 0.9999], [-TINY, 1.0]),
    **dict.fromkeys(("lr", "head_lr"), ([TINY, 1e3], [0.0, 1000.0001])),
    "weight_decay": ([0.0, 1e3], [-TINY, 1000.0001]),
    "clip_norm": ([0.0], [-TINY, np.inf]),
    "mlc_weight": ([0.0, 1e6], [-TINY, 1000000.1]),
    "workers": ([0, 1024], [-1, 1025]),
}


def test_each_flag_takes_values_up_to_its_bounds_and_none_beyond():
    for name, (good, bad) in ENDS.items():
        for value in good:
            assert getattr(TrainConfig(**{name: value}), name) == value
        for value in bad:
            with pytest.raises(data.DataError, match=f"--{name.replace('_', '-')} "):
                TrainConfig(**{name: value})
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if f.type.split(" ")[0] in ("int", "float")}
    assert ENDS.keys() == numbers


def test_flags_that_just_agree_and_flags_that_just_do_not():
    for flags in (
        {"curriculum": "difficulty", "chunks": "thresholds", "easy_share": 0.9, "hard_share": 0.1},
        {"curriculum": "lerac", "lr": 1e-3, "lerac_min_lr": 1e-3},
        {"curriculum": "lerac", "epochs": 2, "lerac_epochs": 1.99},
        {"curriculum": "difficulty", "epochs": 2, "epoch_weights": "0,1"},
        {"image_size": 72},
    ):
        assert flags.items() <= vars(resolve(TrainConfig(**flags))).items()
    for message, flags in {
        "--lerac-epochs: must be below": {"curriculum": "lerac", "epochs": 2, "lerac_epochs": 2.0},
        "--random-start: trains all blocks": {"random_start": True, "train_blocks": 0},
    }.items():
        with pytest.raises(data.DataError, match=message):
            resolve(TrainConfig(**flags))


@pytest.mark.parametrize("given", ["1,-0.5", "-1,2", "0,0", "inf,1", "nan,1", ""])
def test_weights_of_the_epochs_are_at_least_0_and_not_all_0(given: str):
    with pytest.raises(data.DataError, match="must be numbers of at least 0"):
        epoch_weights(TrainConfig(epoch_weights=given))


@pytest.mark.parametrize("size", [32, 72])
def test_image_size_is_that_of_the_latents(few_scenes: Path, cache: Path, size: int):
    config = resolve(TrainConfig(data=str(few_scenes), image_size=size, captions="empty"))
    prepared = prepare(config)
    vae = weights.load("vae", "sd-mini")
    image = data.image_tensor(prepared.pairs.image(0), data.Preprocessing.square(size))
    with torch.no_grad():
        expected = vae.encode(image[None])[0] * vae.config.scale_factor
    assert expected.shape == (4, size // 8, size // 8)
    np.testing.assert_allclose(prepared.inputs[0][0], expected.numpy(), atol=5e-3, rtol=5e-3)
