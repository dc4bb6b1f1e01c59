"""Section 4.9: ensembles and the weights fitted on validation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reverse_sd import ensemble
from tables.methods import fit_ensemble_weights


def members(*noises: float, n: int = 400, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """A prediction of each noise, of other lengths than 1, and the truth, unit rows (n, 16)."""
    g = torch.Generator().manual_seed(seed)
    truth = F.normalize(torch.randn(n, 16, generator=g), dim=1)
    return [7 * (truth + noise * torch.randn(n, 16, generator=g)) for noise in noises], truth


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=1).mean())


def test_the_mean_is_of_normalised_predictions():
    a, b = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.allclose(ensemble([a, b]), torch.tensor([[0.5**0.5, 0.5**0.5]]))
    assert torch.allclose(ensemble([a, b], weights=[3, 4]), torch.tensor([[0.6, 0.8]]))


def test_the_median_is_taken_by_coordinates():
    rows = [torch.tensor([row]) for row in ([1.0, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8])]
    assert torch.allclose(ensemble(rows, "median"), torch.tensor([[2**-0.5, 2**-0.5, 0]]))
    # of an even number: the mean of the two in the middle
    assert torch.allclose(ensemble(rows[:2], "median"), F.normalize(torch.tensor([[0.8, 0.4, 0]])))


@pytest.mark.parametrize("how", ["mean", "median"])
def test_results_are_unit_rows_and_better_than_members(how: str):
    predictions, truth = members(0.3, 0.3, 0.3, 0.3)
    result = ensemble(predictions, how)
    assert torch.allclose(result.norm(dim=1), torch.ones(len(truth)))
    assert cosine(result, truth) > max(cosine(p, truth) for p in predictions) + 0.03


def test_fitted_weights_prefer_what_is_better():
    predictions, truth = members(0.1, 0.5, 2.0)
    weights = fit_ensemble_weights(predictions, truth)
    assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1)
    assert weights[0] > weights[1] > weights[2]
    assert cosine(ensemble(predictions, weights=weights), truth) > cosine(ensemble(predictions), truth) + 0.01
    assert torch.equal(weights, fit_ensemble_weights(predictions, truth))
    lengths = torch.linspace(0.1, 9, len(truth))[:, None]
    again = fit_ensemble_weights([p * lengths for p in predictions], truth * lengths)
    assert torch.allclose(weights, again, atol=1e-4)  # directions count, no lengths


def test_fitted_weights_find_the_best_of_a_grid():
    predictions, truth = members(0.2, 0.4)
    fitted = cosine(ensemble(predictions, weights=fit_ensemble_weights(predictions, truth)), truth)
    steps = [(i / 100, 1 - i / 100) for i in range(101)]
    grid = max(cosine(ensemble(predictions, weights=step), truth) for step in steps)
    assert fitted >= grid - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_fitted_weights_are_never_worse_than_the_mean_where_they_were_fitted(seed: int):
    predictions, truth = members(0.3, 0.3, 0.3, n=12, seed=seed)
    fitted = ensemble(predictions, weights=fit_ensemble_weights(predictions, truth))
    assert cosine(fitted, truth) >= cosine(ensemble(predictions), truth) - 1e-7


def test_one_member_and_equal_members_keep_equal_weights():
    predictions, truth = members(0.3)
    assert fit_ensemble_weights(predictions, truth).tolist() == [1]
    assert fit_ensemble_weights(predictions * 2, truth).tolist() == pytest.approx([0.5, 0.5])
    for wrong in ([], [predictions[0] * float("nan")]):
        with pytest.raises(ValueError, match="ensemble"):
            fit_ensemble_weights(wrong, truth)
    with pytest.raises(ValueError, match="not finite"):
        fit_ensemble_weights(predictions, truth * float("nan"))


def test_what_does_not_fit_is_said():
    a = torch.ones(3, 4)
    for arguments in (
        ([],),
        ([a, a[:2]],),
        ([a, a], "mode"),
        ([a, a], "median", [1, 1]),
        ([a, a], "mean", [1, 1, 1]),
        ([a, a], "mean", [0, 0]),
        ([a, a], "mean", [float("nan"), 1]),
        ([a, -a], "mean"),
        ([a * float("nan"), a], "median"),
    ):
        with pytest.raises(ValueError):
            ensemble(*arguments)
