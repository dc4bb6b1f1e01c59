"""Equations (1) to (4) where training uses them: the terms of a step and its gradients, worked out in NumPy;
and the scales of constants that AUDIT.md speaks of.

Each equation alone: tests/test_reverse_sd.py for (1) to (4), tests/test_dakl.py for (5) to (7).
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from baselines import cbs_sigma, lerac_rate
from reverse_sd import Dakl, Vocabulary, cosine_loss, curriculum_batches, rbf
from training.config import TrainConfig, resolve
from training.inputs import prepare
from training.loop import Process, epoch_batches, learning_rate

LAMBDA = 0.3


@pytest.fixture(scope="module")
def step(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One step of the loop on 8 pairs, heads (1) on frozen features, and what it read, in float64."""
    config = resolve(
        TrainConfig(
            data=str(few_scenes), train_blocks=0, heads=1, mlc_weight=LAMBDA, words=40, batch_size=8,
            epochs=1, val_size=12, test_size=12, clip_norm=0.0, device="cpu",
        )
    )
    prepared = prepare(config)
    vocabulary = Vocabulary.of((prepared.pairs.prompts[i] for i in prepared.splits["train"]), config.words)
    folder = tmp_path_factory.mktemp("equations")
    trainer = train.RegressorTrainer(config, folder, Process(0, 1, "cpu"), prepared, vocabulary)
    heads = {name: p.detach().double().numpy().copy() for name, p in trainer.model.named_parameters()}
    (batch,) = trainer.loader(epoch_batches(len(trainer.train_samples), 8, config.seed, 0)[:1])
    features, target, _, rows = (x.double().numpy() for x in batch)
    terms = trainer.train_step((8, trainer.on_device(batch, np.arange(8))))
    gradients = {name: p.grad.double().numpy() for name, p in trainer.model.named_parameters()}
    present = [
        [float(word in prepared.pairs.prompts[int(row)].lower()) for word in vocabulary.words] for row in rows
    ]
    embedding = features @ heads["heads.embedding.weight"].T + heads["heads.embedding.bias"]
    logits = features @ heads["heads.vocabulary.weight"].T + heads["heads.vocabulary.bias"]
    t = np.array([vocabulary.targets([prepared.pairs.prompts[int(row)]])[0].numpy() for row in rows])
    return {"terms": terms, "gradients": gradients, "f": embedding, "y": target, "g": logits, "t": t,
            "present": np.array(present)}


def cosines(step: dict) -> np.ndarray:
    return (step["f"] * step["y"]).sum(1) / np.linalg.norm(step["f"], axis=1)  # |y| = 1


def test_the_logged_terms_are_the_means_of_equations_1_and_3_and_their_sum_is_equation_4(step: dict):
    p = 1 / (1 + np.exp(-step["g"]))
    vocabulary = -(step["t"] * np.log(p) + (1 - step["t"]) * np.log(1 - p)).mean()
    expected = (cosines(step).mean(), vocabulary, (1 - cosines(step)).mean() + LAMBDA * vocabulary)
    found = tuple(step["terms"][name] for name in ("cosine", "vocabulary_loss", "loss"))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_targets_of_a_step_are_equation_2(step: dict):
    """A word of the vocabulary that stands in a prompt is marked, and none that does not."""
    assert step["t"].sum() > 8 and (step["t"] <= step["present"]).all()


def test_the_embedding_head_follows_the_gradient_of_equation_1(step: dict):
    """d/df (1 - cos(f, y)) = (cos f/|f| - y) / |f|, its mean over the batch: heads (1) add nothing."""
    length, cosine = np.linalg.norm(step["f"], axis=1)[:, None], cosines(step)[:, None]
    expected = ((cosine * step["f"] / length - step["y"]) / length).mean(axis=0)
    np.testing.assert_allclose(step["gradients"]["heads.embedding.bias"], expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_the_vocabulary_head_follows_the_gradient_of_equations_3_and_4(step: dict):
    """d/dg_ij = lambda (sigma(g_ij) - t_ij) / (B m)."""
    error = 1 / (1 + np.exp(-step["g"])) - step["t"]
    expected = LAMBDA * error.mean(axis=0) / error.shape[1]
    np.testing.assert_allclose(step["gradients"]["heads.vocabulary.bias"], expected, atol=1e-7)
    assert np.abs(expected).max() > 1e-3


# Scales: what AUDIT.md says of the published code's constants and of LeRaC, CBS and the curriculum ---------


def unit(n: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, 384, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1)


def test_equation_7_applied_once_a_row_leaves_nothing_but_ones():
    """exp(-gamma (1 - x) / 2) with gamma = .01: 1 - x shrinks by gamma / 2 each time, below float64 in 8."""
    kernel = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for _ in range(8):
        kernel = rbf(kernel, 0.01 / 2)
    assert (kernel == 1).all()


def test_a_kernel_of_ones_predicts_the_mean_target_for_every_row():
    """F_S = 1 (k, n), F_T = 1 (t, n): F_T F_S' (F_S F_S' + alpha I)^-1 Y = k n / (k n + alpha) mean(Y)."""
    k, n, alpha, y = 5, 12, 10.0, unit(5)
    f_s, f_t = torch.ones(k, n).double(), torch.ones(n - k, n).double()
    predicted = f_t @ f_s.T @ torch.linalg.solve(f_s @ f_s.T + alpha * torch.eye(k), y)
    torch.testing.assert_close(predicted, (k * n / (k * n + alpha) * y.mean(dim=0)).expand(n - k, -1))


def test_what_alpha_is_measured_against_is_gamma_squared_times_k_times_n():
    """Centred, phi_S M phi_S' has the eigenvalues of (gamma e^-gamma)^2 k n C_S C, C the covariances."""
    gamma, sources, targets = 1e-3, unit(60), unit(90, seed=1)
    dakl = Dakl(gamma, alpha=10.0, form="linear").fit(sources, unit(60, seed=2), targets)
    c_s, c = (torch.cov(rows.T, correction=0) for rows in (sources, torch.cat([sources, targets])))
    expected = (gamma * math.exp(-gamma)) ** 2 * 60 * 150 * float((c_s @ c).trace()) / 384
    assert dakl.scale == pytest.approx(expected, rel=1e-9)


def test_huber_s_loss_of_unit_rows_is_a_384th_of_equation_1():
    """Half the mean square: |a - b|^2 = 2 (1 - cos), as long as no coordinate differs by more than 1."""
    a, b = unit(9), unit(9, seed=1)
    assert float(F.huber_loss(a, b)) == pytest.approx(float(cosine_loss(a, b).mean()) / 384)


def test_cbs_at_its_authors_interval_smooths_by_1_through_all_of_three_epochs():
    assert {cbs_sigma(step, every=5 * 100) for step in range(3 * 100)} == {1.0}


def test_the_base_of_lerac_cancels():
    rates = [lerac_rate(1e-7, 1e-4, 3, 10, c) for c in (2, math.e, 10, 1000)]
    assert rates == pytest.approx([1e-7**0.7 * 1e-4**0.3] * 4)


def test_by_thirds_an_easy_sample_is_seen_five_times_as_often_as_a_hard_one():
    """Three epochs' steps: easy 3 + 3/2 + 1 = 5.5 times, medium 3/2 + 1, hard 1, all hard ones at the end."""
    chunks = list(np.arange(3 * 640).reshape(3, 640))
    batches = curriculum_batches(chunks, total=90, batch_size=64, seed=0, start=0, stop=90)
    seen = np.bincount(np.concatenate(batches)).reshape(3, 640).mean(axis=1)
    assert seen == pytest.approx([5.5, 2.5, 1.0], abs=0.01)
    assert learning_rate(1.0, 60, 90) == pytest.approx(0.25)
