"""Ridge regression as a baseline and as the start of the embedding head."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import entries, train_here
from sklearn.linear_model import Ridge as TheirRidge
from torch import nn

import data
import eval
import weights
from backbones import UNetFeatures
from baselines import PENALTIES, RidgeSums, ridge
from reverse_sd import Heads, Regressor, Vocabulary, load_run
from tables import readouts
from tables.cells import MEAN, frozen_cosines
from tables.readouts import POOLED, fitted, pooled
from tables.runs import SOURCES, Plan, RunName
from training.config import TrainConfig, resolve
from training.folder import saved_config
from training.inputs import Samples, evaluation_batches, prepare
from training.loop import Process
from training.metrics import cosines


def problem() -> tuple[torch.Tensor, ...]:
    """Training features, targets, validation features, targets; features of unequal scale, one constant."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(230, 6, generator=random) * torch.tensor([1.0, 50.0, 0.01, 3.0, 1.0, 0.0]) + 7
    true = torch.randn(6, 4, generator=random)
    y = ((x - 7) / (x.std(dim=0) + 1e-9)) @ true + 2 * torch.randn(230, 4, generator=random)
    return x[:200], y[:200], x[200:], y[200:]


def test_ridge_is_scikit_learns_on_standardised_features():
    x, y, rows, truth = problem()
    sums = RidgeSums(6, 4)
    for part in range(0, 200, 64):
        sums.add(x[part : part + 64], y[part : part + 64])
    found = ridge(sums, rows, truth)
    mean, deviation = x.double().mean(dim=0), x.double().std(dim=0, correction=0)
    deviation[5] = 1
    scale = lambda part: ((part.double() - mean) / deviation).numpy()  # noqa: E731
    cosines = []
    for penalty in PENALTIES:
        theirs = TheirRidge(alpha=penalty * 200).fit(scale(x), y.double().numpy())
        predicted = torch.from_numpy(theirs.predict(scale(rows)))
        cosines.append(float(F.cosine_similarity(predicted, truth.double()).mean()))
        if penalty == found.penalty:
            np.testing.assert_allclose(found.predict(rows).numpy(), predicted.numpy(), atol=1e-9)
    np.testing.assert_allclose([cosine for _, cosine in found.tried], cosines, atol=1e-9)
    assert found.penalty == PENALTIES[int(np.argmax(cosines))]


def test_ridge_by_hand():
    """y = 1, 2, 6 at x = 0, 1, 2 of deviation s = sqrt(2/3): weight 5/3 / s / (1 + penalty), bias 3."""
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0], [6.0]])
    sums = RidgeSums(1, 1)
    sums.add(x, y)
    found = ridge(sums, x, y)  # cosines of single numbers are all 1: the first penalty
    assert found.penalty == PENALTIES[0] == 10 and found.bias.item() == pytest.approx(3)
    s = (2 / 3) ** 0.5
    assert found.weight.item() == pytest.approx(5 / 3 / s / 11)
    assert found.predict(torch.tensor([[4.0]])).item() == pytest.approx(3 + 3 / s * (5 / 3 / s / 11))


def test_processes_that_share_the_rows_find_the_same():
    """Sums over two shares of the training rows, cosines over two shares of the validation rows."""
    x, y, rows, truth = problem()
    whole, half = RidgeSums(6, 4), RidgeSums(6, 4)
    whole.add(x, y)
    half.add(x[:100], y[:100])
    half.add(x[100:], y[100:])
    expected = ridge(whole, rows, truth)
    others = ridge(whole, rows[:10], truth[:10]).tried
    rest = torch.tensor([cosine * 10 for _, cosine in others] + [10.0])
    found = ridge(half, rows[10:], truth[10:], lambda values: values + rest)
    np.testing.assert_allclose([c for _, c in found.tried], [c for _, c in expected.tried], atol=1e-9)
    np.testing.assert_allclose(found.weight.numpy(), expected.weight.numpy(), atol=1e-9)
    last = ridge(half, None, None, lambda values: values + rest)  # a process without a validation row
    np.testing.assert_allclose([c for _, c in last.tried], [c for _, c in others], atol=1e-9)


@pytest.mark.parametrize("placement", [0, 1, 2, 3])
def test_heads_start_at_the_given_map(placement: int):
    regressor = Regressor(nn.Identity(), 5, 7, placement, standardise=True)
    weight, bias, x = torch.randn(5, 384), torch.randn(384), torch.randn(9, 5)
    regressor.standardise.set(torch.full((5,), 2.0), torch.full((5,), 4.0))
    regressor.heads.start_at(weight, bias)
    expected = (x - 2) / 4 @ weight + bias
    torch.testing.assert_close(regressor(x).embedding, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(regressor.heads, Heads)


def test_levels_are_the_mean_and_the_maximum_of_every_block():
    unet = weights.load("unet-encoder", "sd-mini").eval()
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 128)
    with torch.no_grad():
        backbone = UNetFeatures(unet, "levels")
        features, middle = backbone(latents, context), UNetFeatures(unet)(latents, context)
        levels = unet.levels(latents, torch.zeros(2, dtype=torch.long), context)
    assert [tuple(level.shape[1:]) for level in levels[:2]] == [(64, 8, 8), (64, 8, 8)]
    assert features.shape == (2, backbone.width)
    expected = [level.flatten(2).mean(dim=2) for level in levels]
    pairs = zip(levels, expected, strict=True)
    expected = [part for level, mean in pairs for part in (mean, level.amax((2, 3)))]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))
    torch.testing.assert_close(features[:, -unet.width :], middle)


def test_a_run_starts_at_ridge_regression(few_scenes: Path, cache: Path, tmp_path: Path, caplog):
    """After steps too small to change anything the run predicts as ridge regression on the features."""
    caplog.set_level("INFO")
    run = train_here(few_scenes, tmp_path / "run", "--lr", "1e-12", "--head-lr", "1e-13")
    prepared = prepare(saved_config(run))
    backbone = UNetFeatures(weights.load("unet-encoder", "sd-mini").eval(), "levels")

    def of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = prepared.splits[split]
        samples = Samples(prepared, rows, load_run(run).vocabulary)
        with torch.no_grad():
            batches, _ = evaluation_batches(samples, Process(), 0)
            features = torch.cat([backbone(*inputs) for *inputs, _, _, _ in batches])
        return features, torch.from_numpy(prepared.targets[rows])

    sums = RidgeSums(backbone.width, 384)
    sums.add(*of("train"))
    expected = F.normalize(ridge(sums, *of("val")).predict(of("test")[0]), dim=1)
    predicted = np.load(run / "predictions" / "test.npy")
    np.testing.assert_allclose(predicted, expected.numpy(), atol=1e-4)
    logged = [entry["val_cosine"] for entry in entries(run) if "val_cosine" in entry]
    assert logged[0] == pytest.approx(max(c for _, c in ridge(sums, *of("val")).tried), abs=1e-4)
    stated = re.search(r"heads: ridge regression on .* validation cosine ([.\d]+)", caplog.text)
    assert float(stated[1]) == pytest.approx(logged[0], abs=2e-4)


def test_the_paper_starts_at_random_and_the_miniature_at_ridge():
    paper = resolve(TrainConfig(weights="sd-1", captions="empty"))
    assert (paper.head_start, paper.unet_features, paper.head_lr) == ("random", "middle", None)
    mini = resolve(TrainConfig())
    assert (mini.head_start, mini.unet_features) == ("ridge", "levels")
    assert resolve(TrainConfig(backbone="vit")).unet_features is None


def test_the_embedding_head_has_its_own_rate(few_scenes: Path, cache: Path, tmp_path: Path):
    """With a rate of nearly nothing for it, the backbone and the vocabulary head move."""
    run = train_here(few_scenes, tmp_path / "run", "--head-start", "random", "--head-lr", "1e-12")
    moved = weights.read_tensors(run / "model.safetensors")
    torch.manual_seed(json.loads((run / "config.json").read_text())["seed"])
    words = len(json.loads((run / "vocabulary.json").read_text()))
    start = Heads(moved["heads.embedding.weight"].shape[1], words, 3).state_dict()
    torch.testing.assert_close(moved["heads.embedding.weight"], start["embedding.weight"], atol=1e-7, rtol=0)
    assert (moved["heads.vocabulary.weight"] - start["vocabulary.weight"]).abs().max() > 1e-4
    pretrained = weights.load("unet-encoder", "sd-mini").state_dict()
    name = "middle_block.0.in_layers.2.weight"
    assert not torch.equal(moved[f"backbone.unet.{name}"], pretrained[name])


# -- the table of frozen features ----------------------------------------


def test_pooled_takes_the_columns_of_its_blocks():
    """Two blocks of 2 and 1 channels: mean, maximum of the first, then of the middle block."""
    levels = np.array([[1, 2, 3, 4, 5, 6]])
    found = {
        (middle, pooling): pooled(levels, [2, 1], middle, pooling).tolist()[0]
        for middle in (False, True)
        for pooling in POOLED
    }
    assert found == {
        (False, "mean"): [1, 2, 5],
        (False, "maximum"): [3, 4, 6],
        (False, "mean and maximum"): [1, 2, 3, 4, 5, 6],
        (True, "mean"): [5],
        (True, "maximum"): [6],
        (True, "mean and maximum"): [5, 6],
    }


def test_the_table_of_frozen_features(few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readouts, "TIMESTEPS", (0,))
    results = tmp_path / "new" / "results"
    argv = ["--table", "readouts", "--data", str(few_scenes), "--seeds", "1", "--results", str(results)]
    assert eval.main([*argv, "--val-size", "12", "--test-size", "12", "--captions", "empty"]) == 0
    result = json.loads((results / "table-readouts.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert {"mean training embedding", "caption", "Swin", "Swin + caption"} < rows.keys()
    assert rows["Swin + caption"]["width"] == rows["Swin"]["width"] + 384
    for name, width in (("middle block, maximum", 256), ("all blocks, mean and maximum", 1920)):
        assert rows[f"U-Net, empty text, {name}"]["width"] == width

    config = resolve(TrainConfig(data=str(few_scenes), captions="empty", val_size=12, test_size=12, seed=1))
    prepared = prepare(config)
    backbone = UNetFeatures(weights.load("unet-encoder", "sd-mini").eval())
    every = Samples(prepared, np.arange(len(prepared.pairs)), Vocabulary([]))
    with torch.no_grad():
        batches, _ = evaluation_batches(every, Process(), 0)
        features = torch.cat([backbone(*inputs) for *inputs, _, _, _ in batches]).numpy()
    _, expected = fitted(features, prepared, "cpu")
    found = rows["U-Net, empty text, middle block, maximum"]["per_seed"]
    assert found == pytest.approx([expected], abs=1e-4)
    captioned = rows["U-Net, captions, middle block, maximum"]["per_seed"]
    assert captioned != found and rows["Swin"]["penalties"][0] in PENALTIES
    truth = {split: prepared.targets[of] for split, of in prepared.splits.items()}
    of_mean = cosines(truth["train"].mean(axis=0), truth["test"]).mean()
    assert rows["mean training embedding"]["per_seed"] == pytest.approx([of_mean])
    swin = f"| {rows['Swin']['cosine']:.4f}".replace("0.", ".")
    assert swin in (results / "table-readouts.md").read_text()

    plan = Plan(str(few_scenes), SOURCES["mini"], (1,), tmp_path, 1, "cpu", {"val_size": 12, "test_size": 12})
    of_cells = frozen_cosines(plan, {"a": RunName("swin", "plain")}, 1)
    assert of_cells["a"].mean() == pytest.approx(rows["Swin"]["cosine"], abs=1e-6)
    assert of_cells[MEAN].mean() == pytest.approx(of_mean)
    read = data.Preprocessing(**weights.preprocessing("blip", "blip-mini"))
    images = torch.stack([data.image_tensor(prepared.pairs.image(i), read) for i in range(3)])
    texts = weights.load("blip", "blip-mini").eval().generate(images)
    captions = readouts.caption_features(plan).rows[:3]
    assert captions == pytest.approx(weights.load("minilm").encode(texts).numpy(), abs=1e-4)
    heads_alone = dataclasses.replace(plan, options=plan.options | {"train_blocks": 0})
    levels, widths = readouts.unet_levels(heads_alone, "empty", 0)  # not the frozen U-Net's own features
    assert pooled(levels, widths, True, "maximum") == pytest.approx(features, abs=1e-3)
