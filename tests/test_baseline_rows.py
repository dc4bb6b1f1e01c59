"""Rows without a training, and the baselines and controls of DAKL, by hand."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reverse_sd
from baselines import PENALTIES
from tables.methods import DaklMethod, EnsembleMethod, FrozenMethod, RidgeMethod, predicted_by
from tables.rows import ROW_TABLES
from tables.runs import SOURCES, Plan, RunName

SIZES = {"train": 60, "val": 20, "test": 30}


class Known:
    """A run in memory: noisy predictions of random unit rows."""

    def __init__(self, seed: int, noise: float = 0.5):
        truth, rng = np.random.default_rng(0), np.random.default_rng(seed)
        self.truth = {split: unit(truth.normal(size=(n, 6)) + 0.5) for split, n in SIZES.items()}
        self.arrays = {s: unit(y + noise * rng.normal(size=y.shape)) for s, y in self.truth.items()}

    def predicted(self, split: str) -> np.ndarray:
        return self.arrays[split]

    def targets(self, split: str) -> np.ndarray:
        return self.truth[split]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan("mini", SOURCES["mini"], (0,), tmp_path, 1, "cpu", {})


def by_hand(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> np.ndarray:
    """Ridge regression on standardised columns as least squares with penalty rows; test predictions."""
    mean, deviation, centre = x["train"].mean(axis=0), x["train"].std(axis=0), y["train"].mean(axis=0)
    scaled = {split: (rows - mean) / deviation for split, rows in x.items()}
    n, width = x["train"].shape
    fits = []
    for penalty in PENALTIES:
        rows = np.concatenate([scaled["train"], np.sqrt(n * penalty) * np.eye(width)])
        right = np.concatenate([y["train"] - centre, np.zeros((width, centre.size))])
        slope = np.linalg.lstsq(rows, right, rcond=None)[0]
        fits.append({split: scaled[split] @ slope + centre for split in ("val", "test")})
    return max(fits, key=lambda fit: (unit(fit["val"]) * y["val"]).sum())["test"]


@pytest.mark.parametrize("average", ["mean", "side by side"])
def test_the_ridge_row_is_least_squares_with_penalty_rows(average: str, plan: Plan):
    members = [Known(1), Known(2)]
    found, chosen = RidgeMethod(average)(members, plan, 0)
    x = {
        split: np.concatenate([m.predicted(split) for m in members], axis=1).astype(np.float64)
        if average == "side by side"
        else unit(sum(m.predicted(split) for m in members)).astype(np.float64)
        for split in SIZES
    }
    assert found == pytest.approx(by_hand(x, members[0].truth), abs=1e-5)
    assert chosen["penalty"] in PENALTIES


def test_target_rows_are_the_only_thing_that_differs(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    fits = {}
    fit = reverse_sd.Dakl.fit

    def recorded(self: reverse_sd.Dakl, *rows) -> reverse_sd.Dakl:
        fits[target_rows] = rows
        return fit(self, *rows)

    monkeypatch.setattr(reverse_sd.Dakl, "fit", recorded)
    members, found = [Known(1, noise=2), Known(2, noise=2)], {}
    for target_rows in ("both", "noise", "none"):
        found[target_rows], _ = DaklMethod(target_rows=target_rows)(members, plan, 3)
    both, noise, none = (fits[target_rows] for target_rows in ("both", "noise", "none"))
    for other in (noise, none):
        assert torch.equal(both[0], other[0]) and torch.equal(both[1], other[1])
        assert all(map(torch.equal, both[3], other[3]))
    means = [torch.tensor(sum(m.predicted(split) for m in members)) for split in ("val", "test")]
    torch.testing.assert_close(both[2], F.normalize(torch.cat(means), dim=1))
    assert noise[2].shape == both[2].shape and none[2].shape == (0, 6)
    torch.testing.assert_close(noise[2].norm(dim=1), torch.ones(50))
    assert noise[2].mean(dim=0).norm() < 0.3  # in all directions
    for one, other in combinations(found.values(), 2):
        assert abs(one - other).max() > 1e-3
    again, _ = DaklMethod(target_rows="noise")(members, plan, 3)
    assert np.array_equal(found["noise"], again)


def test_dakl_without_target_rows_is_the_plain_form_on_the_sources(plan: Plan):
    p = predicted_by([Known(1)], "mean", "cpu")
    found, chosen = DaklMethod(target_rows="none")([Known(1)], plan, 0)
    # The test rows are not among the columns of F, so the plain form is applied to each of them by hand.
    sources, gamma = F.normalize(p.train.double(), dim=1), 1e-3
    f = torch.exp(-gamma * (1 - sources @ sources.T))
    g = torch.exp(-gamma * (1 - F.normalize(p.test.double(), dim=1) @ sources.T))
    f, g = f - f.mean(dim=1, keepdim=True), g - g.mean(dim=1, keepdim=True)
    mean = f.mean(dim=0)
    f, g, y = f - mean, g - mean, p.train_targets.double()
    scale = float((f**2).sum()) / 6  # the trace of F_S F_S' over the 6 numbers of a row
    relative = {"sources": 60, "in units of its scale": chosen["alpha"] / scale}
    assert chosen == pytest.approx(relative | {"alpha": chosen["alpha"]})
    solution = torch.linalg.solve(f @ f.T + chosen["alpha"] * torch.eye(60).double(), y - y.mean(dim=0))
    expected = F.normalize(g @ f.T @ solution + y.mean(dim=0), dim=1)
    assert found == pytest.approx(expected.numpy(), abs=1e-5)


def test_weighted_centroids_of_four_points():
    """Three points around (1, 0) and one at (0, 1): the centroid stands three times, with the mean target."""
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2], [0.3, 0.3]])
    sources, theirs = DaklMethod(2, centroids="weighted mean").sources(rows, targets)
    torch.testing.assert_close(sources, torch.tensor([[0.9, 0.1]] * 3 + [[0.0, 1.0]]))
    torch.testing.assert_close(theirs, torch.tensor([[0.5, 0.4]] * 3 + [[0.3, 0.3]]))
    sources, theirs = DaklMethod(2).sources(rows, targets)
    order = sources[:, 0].argsort()
    torch.testing.assert_close(sources[order], torch.tensor([[0.0, 1.0], [0.9, 0.1]]))
    torch.testing.assert_close(theirs[order], torch.tensor([[0.3, 0.3], [0.0, 1.0]]))  # the nearest row's
    assert DaklMethod(4).sources(rows, targets)[0] is rows


def test_fitted_weights_are_those_of_the_prediction(plan: Plan):
    members = [Known(1, noise=0.3), Known(2, noise=2)]
    found, chosen = EnsembleMethod("fitted")(members, plan, 0)
    (a, b), (x, y) = chosen["weights"], (m.predicted("test") for m in members)
    assert a > b and found == pytest.approx(unit(a * x + b * y), abs=1e-6)


def test_dakl_on_the_median(plan: Plan):
    members = [Known(seed) for seed in (1, 2, 3)]
    stacked = torch.stack([torch.from_numpy(m.predicted("train")) for m in members])
    found = predicted_by(members, "median", "cpu").train
    torch.testing.assert_close(found, F.normalize(stacked.median(dim=0).values, dim=1))
    mean, median = (DaklMethod(average=average)(members, plan, 0)[0] for average in ("mean", "median"))
    assert not np.allclose(mean, median, atol=1e-3)


BASELINES = {
    **dict.fromkeys((1, 11, "paper-recipe"), ["CLIP", "U-Net", "Swin", "ViT", "caption", "Swin + caption"]),
    2: ["Swin"],
    7: ["ViT"],
    **dict.fromkeys((8, 9, 10), ["CLIP + U-Net + Swin + ViT", "caption", "Swin + caption"]),
    "captions": ["U-Net, empty text", "U-Net", "U-Net, the true prompt", "caption", "Swin + caption"],
    "white-box": [
        "Swin", "U-Net, empty text", "U-Net", "U-Net, plain captions", "caption", "Swin + caption",
        "plain caption", "Swin + plain caption",
    ],
}


def test_the_baselines_of_each_table():
    for number, names in BASELINES.items():
        assert [row.name for row in ROW_TABLES[number].baselines] == [f"ridge: {name}" for name in names]
        assert not any(row.runs for row in ROW_TABLES[number].baselines)  # nothing is trained for them
    by_name = {row.name: row.method for row in ROW_TABLES["captions"].baselines}
    assert by_name["ridge: U-Net, empty text"] == FrozenMethod((RunName("unet", "captions-empty"),))
    captioned = FrozenMethod((RunName("swin", "plain"),), RunName("unet", "mlc"))
    assert by_name["ridge: Swin + caption"] == captioned
    plain = next(row for row in ROW_TABLES["white-box"].baselines if row.name == "ridge: plain caption")
    assert plain.method == FrozenMethod((), RunName("unet", "captions-plain"))


def test_the_papers_recipe_beside_the_chosen_ones(plan: Plan):
    table, chosen = ROW_TABLES["paper-recipe"], ROW_TABLES[1]
    ours = dict(zip(table.rows[-4:], ("CLIP", "U-Net", "Swin", "ViT"), strict=True))
    for row, other in zip(table.rows[:-7], chosen.rows, strict=True):
        assert (row.name, row.paper, row.against) == (other.name, other.paper, other.against)
        (run,), (same,) = row.runs, other.runs
        config, default = plan.config(run, 0), plan.config(same, 0)
        assert run.name == f"{same.name}-recipe=paper" and config.heads == default.heads
        assert (config.epochs, config.head_start, config.head_lr) == (3, "random", None)
        assert (config.lr, config.batch_size) == (default.lr, default.batch_size)
        assert config.unet_features == ("middle" if run.backbone == "unet" else None)
        if run.phase_1:
            assert run.phase_1.name == f"{same.phase_1.name}-recipe=paper"
            assert plan.config(run.phase_1, 0).record_cosines
    for row, name in ours.items():
        assert row.against == (name,) and row.runs == (RunName(row.runs[0].backbone, "plain"),)
        assert row.name == f"{name}, recipe chosen on validation" and row.paper is None
    for row, order in zip(table.rows[-7:-4], ("hard-first", "shuffled", "mixed"), strict=True):
        run, against = row.runs[0], ("Swin, MLC", "Swin, MLC, CL")
        assert run.name == f"swin-mlc-cl-recipe=paper-order={order}" and row.against == against
        assert run.phase_1 == RunName("swin", "mlc", (("recipe", "paper"),))
    frozen = {row.name: row.method for row in table.baselines}
    assert frozen["ridge: U-Net"] == FrozenMethod((RunName("unet", "plain", (("recipe", "paper"),)),))
