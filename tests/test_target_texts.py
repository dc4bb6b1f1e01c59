"""train.py --target-texts: other targets for training pairs, the prompts' own for all others."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import train_here

import data
import train
import weights
from training.config import TrainConfig, resolve
from training.inputs import Prepared, prepare, read_target_texts

FROZEN = ["--backbone", "swin", "--train-blocks", "0"]


@pytest.fixture
def config(few_scenes: Path, cache: Path) -> TrainConfig:
    named = {"backbone": "swin", "train_blocks": 0, "val_size": 12, "test_size": 12}
    return resolve(TrainConfig(data=str(few_scenes), **named))


def write(path: Path, texts: dict[str, list[str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "texts": t}) + "\n" for p, t in texts.items()))
    return str(path)


def targets_of(prepared: Prepared) -> dict[str, np.ndarray]:
    return {split: prepared.targets[rows] for split, rows in prepared.splits.items()}


def test_training_targets_are_means_and_the_others_stay(config: TrainConfig, tmp_path: Path, caplog):
    plain = prepare(config)
    prompts = plain.pairs.prompts
    first, second = plain.splits["train"][:2]
    texts = {prompt: ["a cat"] for prompt in prompts if prompt != prompts[second]}
    texts[prompts[first]] = ["a red cat", "a dog", "a house by the sea"]
    path = write(tmp_path / "texts.jsonl", texts)
    with caplog.at_level(logging.WARNING):
        other = prepare(dataclasses.replace(config, target_texts=path))
    assert "no texts for 1 of 84 prompts" in caplog.text

    before, after = targets_of(plain), targets_of(other)
    for split in ("val", "test"):
        np.testing.assert_array_equal(after[split], before[split])
    mean = weights.load("minilm").encode(texts[prompts[first]]).mean(dim=0)
    np.testing.assert_allclose(after["train"][0], F.normalize(mean, dim=0).numpy(), atol=1e-6)
    np.testing.assert_allclose(after["train"][1], before["train"][1], atol=1e-6)  # has no line
    assert np.abs(after["train"] - before["train"]).max(axis=1)[2:].min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(after["train"], axis=1), 1, atol=1e-6)
    assert other.fingerprint != plain.fingerprint


def test_a_run_is_resumed_with_its_target_texts_alone(few_scenes: Path, cache: Path, tmp_path: Path, capsys):
    prompts = data.read_pairs(few_scenes).prompts
    path = write(tmp_path / "texts.jsonl", {prompt: ["a cat"] for prompt in prompts})
    run = train_here(few_scenes, tmp_path / "run", *FROZEN, "--target-texts", path)
    targets = {s: np.load(run / "predictions" / f"{s}-targets.npy") for s in ("train", "test")}
    cat = weights.load("minilm").encode(["a cat"]).numpy()
    np.testing.assert_allclose(targets["train"], np.repeat(cat, 60, axis=0), atol=1e-6)
    assert np.abs(targets["test"] @ cat.T).max() < 0.99
    predicted = np.load(run / "predictions" / "test.npy")
    assert (predicted @ cat.T).min() > 0.99  # it learned the targets that it was given

    assert train.main(["--resume", str(run)]) == 0
    write(tmp_path / "texts.jsonl", {prompt: ["a dog"] for prompt in prompts})
    capsys.readouterr()
    assert train.main(["--resume", str(run)]) == 2
    assert "other pairs or options" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"prompt": "a", "texts": ["b"]}\nno JSON\n', "line 2 does not parse"),
        ('{"prompt": "a"}\n', "line 1: lacks texts"),
        ('{"prompt": "a", "texts": []}\n', "line 1: texts is"),
        ('{"prompt": "a", "texts": ["b", 3]}\n', "line 1: texts is"),
        ('{"prompt": "x", "texts": ["b"]}\n', "no line is for one of the 1 prompts"),
        ("", "no line is for one of the 1 prompts"),
        (None, "texts.jsonl"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(content: str | None, fault: str, tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(data.DataError, match=fault) as error:
        read_target_texts(path, ["a"])
    assert "\n" not in str(error.value)
