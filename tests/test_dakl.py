"""DAKL: equations (5), (6), (7) by hand; the plain, the streamed and the linear form against one another."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from reverse_sd import Dakl, dakl_literal, kmeans, linear_kernel, nearest_rows, normalise_kernel, rbf

WIDTH = 16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def pairs(n: int, noise: float, seed: int, rotation: float = 0.0) -> tuple[Tensor, Tensor]:
    """n predictions with isotropic noise of that length, and the truth: unit rows with a falling spectrum.

    `rotation` turns predictions by so many radians in the plane of the first two axes.
    """
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, WIDTH + 1) ** -1.0
    truth = torch.randn(n, WIDTH, generator=g) * spectrum
    truth[:, 2] += 0.6
    truth = F.normalize(truth, dim=1)
    x = truth + noise * F.normalize(torch.randn(n, WIDTH, generator=g), dim=1)
    turn = torch.eye(WIDTH)
    turn[:2, :2] = torch.tensor(
        [[math.cos(rotation), math.sin(rotation)], [-math.sin(rotation), math.cos(rotation)]]
    )
    return F.normalize(x @ turn, dim=1), truth


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.double(), b.double(), dim=1)


# Equations ----------------------------------------------------------------------------------------------


def test_equation_5_is_the_inner_product():
    x = torch.tensor([[1.0, 2], [3, 4], [0, -1]])
    assert linear_kernel(x).tolist() == [[5, 11, -2], [11, 25, -4], [-2, -4, 1]]


def test_equation_6_divides_by_the_roots_of_the_diagonal():
    kernel = torch.tensor([[4.0, 6], [3, 9]])  # asymmetric on purpose: each entry is its own
    assert torch.equal(normalise_kernel(kernel), torch.tensor([[1.0, 1.0], [0.5, 1.0]]))
    assert kernel.tolist() == [[4, 6], [3, 9]]  # not in place


def test_equation_7_is_an_rbf_of_the_distance_from_one():
    f = rbf(torch.tensor([[1.0, 0.5], [0.0, -1.0]]).double(), gamma=2.0)
    expected = torch.tensor([[1.0, math.exp(-1)], [math.exp(-2), math.exp(-4)]]).double()
    assert torch.allclose(f, expected, atol=1e-15)


def test_the_plain_form_by_hand():
    """Two orthogonal sources, a target on the first; q = e^-gamma: F_S = [1 q 1; q 1 q], F_T = [1 q 1]."""
    gamma, alpha = math.log(2), 0.75  # q = 1/2; F_S F_S' = [2.25 1.5; 1.5 1.5]; F_T F_S' = [2.25 1.5]
    sources, y = torch.tensor([[3.0, 0], [0, 2]]), torch.tensor([[1.0, 0], [0, 1]])
    predicted = dakl_literal(sources, y, torch.tensor([[0.1, 0]]), gamma, alpha)
    # [3 1.5; 1.5 2.25]^-1 = [2.25 -1.5; -1.5 3] / 4.5
    expected = torch.tensor([[(2.25 * 2.25 - 1.5 * 1.5) / 4.5, (-1.5 * 2.25 + 3 * 1.5) / 4.5]]).double()
    assert torch.allclose(predicted, expected, atol=1e-14)


# Three forms --------------------------------------------------------------------------------------------


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sources, y = pairs(90, 0.3, seed=0)
    targets, truth = pairs(130, 0.8, seed=1)
    return 3 * sources, y, targets, truth  # the length of a source must not matter


@pytest.mark.parametrize("gamma", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 20.0])
def test_streamed_is_plain(gamma: float):
    sources, y, targets, truth = problem()
    for block in (7, 64, 1000):
        dakl = Dakl(gamma, block=block).fit(sources, y, targets, (targets, truth))
        plain = dakl_literal(sources, y, targets, gamma, dakl.alpha, centred=True)
        assert torch.allclose(dakl.predict(targets, unit=False), plain, atol=1e-11)
        assert torch.allclose(dakl.predict(targets), F.normalize(plain, dim=1), atol=1e-11)


@pytest.mark.parametrize("form", ["exact", "linear"])
def test_float32_rows_are_taken_as_the_float64_rows_of_the_same_values(form: str):
    rows = problem()
    single, double = (
        Dakl(form=form).fit(*given[:3], given[2:]) for given in (rows, [x.double() for x in rows])
    )
    predicted = single.predict(rows[2])
    assert predicted.dtype == torch.float64
    assert single.tried == double.tried and torch.equal(predicted, double.predict(rows[2].double()))


@pytest.mark.parametrize("form", ["exact", "linear"])
@pytest.mark.parametrize("device", DEVICES)
def test_all_that_it_makes_lies_with_its_rows(device: str, form: str):
    expected = Dakl(form=form).fit(*problem()[:3], problem()[2:]).predict(problem()[2])
    sources, y, targets, truth = (x.to(device) for x in problem())
    with torch.device("meta"):  # a tensor made without a device would lie there
        predicted = Dakl(form=form).fit(sources, y, targets, (targets, truth)).predict(targets)
    assert predicted.device.type == device
    assert torch.allclose(predicted.cpu(), expected, atol=1e-10)


@pytest.mark.parametrize("gamma", [1e-2, 0.1, 1.0])
def test_streamed_is_plain_to_the_letter_uncentred(gamma: float):
    sources, y, targets, truth = problem()
    dakl = Dakl(gamma, centred=False, block=50).fit(sources, y, targets, (targets, truth))
    plain = dakl_literal(sources, y, targets, gamma, dakl.alpha)
    assert torch.allclose(dakl.predict(targets, unit=False), plain, atol=1e-6)


def test_centring_changes_predictions_by_no_more_than_gamma():
    sources, y, targets, truth = problem()
    apart = []
    for gamma in (1e-1, 1e-2, 1e-3):
        dakl = Dakl(gamma).fit(sources, y, targets, (targets, truth))
        letter = dakl_literal(sources, y, targets, gamma, dakl.alpha)
        apart.append(float((dakl.predict(targets, unit=False) - letter).abs().max()) / gamma)
    assert max(apart) < 1


@pytest.mark.parametrize("centred", [True, False])
def test_the_linear_limit_is_ridge_on_the_linear_features(centred: bool):
    """The plain page again, with e^-gamma (1 + gamma K^) in place of equation (7)."""
    gamma, alpha = 0.05, 0.3
    sources, y, targets, _ = problem()
    kernel = normalise_kernel(linear_kernel(torch.cat([sources, targets]).double()))
    f = math.exp(-gamma) * (1 + gamma * kernel)
    f = f - f.mean(dim=1, keepdim=True) if centred else f
    f_s, f_t, y64 = f[:90], f[90:], y.double()
    middle_f, middle_y = (f_s.mean(0), y64.mean(0)) if centred else (0, 0)
    f_s, f_t, y64 = f_s - middle_f, f_t - middle_f, y64 - middle_y
    expected = f_t @ f_s.T @ torch.linalg.solve(f_s @ f_s.T + alpha * torch.eye(90), y64) + middle_y
    dakl = Dakl(gamma, alpha, "linear", centred, block=40).fit(sources, y, targets)
    assert torch.allclose(dakl.predict(targets, unit=False), expected, atol=1e-7)


@pytest.mark.parametrize("gamma", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_the_bounds_of_the_linear_limit_hold(gamma: float):
    sources, y, targets, truth = problem()
    kernel = normalise_kernel(linear_kernel(torch.cat([sources, targets]).double()))
    approximate = math.exp(-gamma) * (1 + gamma * kernel)
    error = (rbf(kernel, gamma) - approximate).abs()
    assert float(error.max()) <= gamma**2 / 2 + 1e-15
    assert float(error.max()) >= 0.3 * gamma**2 * math.exp(-gamma)  # and are no idle ones: K_ii = 1

    exact = Dakl(gamma).fit(sources, y, targets, (targets, truth))
    linear = Dakl(gamma, exact.alpha, "linear").fit(sources, y, targets)
    k, n, alpha = len(sources), len(kernel), exact.alpha
    d = math.sqrt(n) * gamma**2 / 2
    rows = approximate - approximate.mean(dim=1, keepdim=True)
    f = (rows[k:] - rows[:k].mean(dim=0)).norm(dim=1)
    norm_y = float(torch.linalg.matrix_norm((y - y.mean(dim=0)).double(), 2))
    bound = norm_y * (d / math.sqrt(alpha) + 5 * math.sqrt(k) * d * f / (4 * alpha))
    apart = (exact.predict(targets, unit=False) - linear.predict(targets, unit=False)).norm(dim=1)
    assert bool((apart <= bound).all())


def test_the_forms_meet_as_gamma_falls():
    """1 - cos goes with gamma^2, and at the paper's gamma = 1e-3 it is next to nothing."""
    sources, y, targets, truth = problem()
    apart = []
    for gamma in (1e-1, 1e-2, 1e-3):
        exact = Dakl(gamma).fit(sources, y, targets, (targets, truth))
        linear = Dakl(gamma, exact.alpha, "linear").fit(sources, y, targets)
        apart.append(float((1 - cosine(exact.predict(targets), linear.predict(targets))).mean()))
    assert apart[2] < 1e-7
    assert 50 < apart[0] / apart[1] < 200 and 50 < apart[1] / apart[2] < 200


def test_gamma_is_no_parameter_of_the_linear_limit():
    """Once alpha is in units of its scale the predictions are the same for every gamma."""
    sources, y, targets, truth = problem()
    a, b = (Dakl(g, form="linear").fit(sources, y, targets, (targets, truth)) for g in (1e-4, 1.0))
    assert a.tried == [pytest.approx(tried, abs=1e-9) for tried in b.tried]
    assert torch.allclose(a.predict(targets), b.predict(targets), atol=1e-9)


def test_the_peer_agrees():
    gamma, alpha = 1e-2, 1e-3
    sources, y, targets, _ = problem()
    f = rbf(normalise_kernel(linear_kernel(torch.cat([sources, targets]).double())), gamma)
    f = f - f.mean(dim=1, keepdim=True)
    f = f - f[:90].mean(dim=0)
    mean = y.double().mean(dim=0)
    model = KernelRidge(kernel="linear", alpha=alpha).fit(f[:90].numpy(), (y.double() - mean).numpy())
    ours = Dakl(gamma, alpha).fit(sources, y, targets).predict(targets, unit=False)
    assert torch.allclose(ours, torch.from_numpy(model.predict(f[90:].numpy())) + mean, atol=1e-6)


# Alpha and stability ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["exact", "linear"])
def test_alpha_is_chosen_on_validation_in_units_that_fit_every_gamma(form: str):
    sources, y, targets, truth = problem()
    chosen = []
    for gamma in (1e-4, 1e-3, 1e-2):
        dakl = Dakl(gamma, form=form).fit(sources, y, targets, (targets, truth))
        score = float(cosine(dakl.predict(targets), truth).mean())
        assert max(cos for _, cos in dakl.tried) == pytest.approx(score, abs=1e-6)
        chosen.append((dakl.alpha / dakl.scale, score))
    assert chosen[0] == pytest.approx(chosen[2], abs=1e-4)


def test_a_fixed_alpha_shrinks_to_the_mean_where_a_chosen_one_gains():
    """The authors' code has alpha = 10, whatever gamma and n."""
    sources, y, targets, truth = problem()
    fixed = Dakl(1e-3, alpha=10.0).fit(sources, y, targets).predict(targets)
    assert torch.allclose(fixed, F.normalize(y.double().mean(dim=0), dim=0).expand_as(fixed), atol=1e-3)
    chosen = Dakl(1e-3).fit(sources, y, targets, (targets, truth)).predict(targets)
    assert cosine(chosen, truth).mean() > cosine(targets, truth).mean() > cosine(fixed, truth).mean()


@pytest.mark.parametrize("gamma", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("centred", [True, False])
def test_scale_is_a_trace_of_the_exact_features(gamma: float, centred: bool):
    """Columns at their means over the sources; rows, too, if the features are centred."""
    sources, y, targets, _ = problem()
    f = rbf(normalise_kernel(linear_kernel(torch.cat([sources, targets]).double())), gamma)
    f = f - f.mean(dim=1, keepdim=True) if centred else f
    expected = float((f[:90] - f[:90].mean(dim=0)).square().sum()) / WIDTH
    exact, linear = (Dakl(gamma, 1.0, form, centred).fit(sources, y, targets) for form in ("exact", "linear"))
    assert exact.scale == pytest.approx(expected, rel=1e-5)
    assert linear.scale == pytest.approx(expected, rel=gamma)


def by_cosine() -> tuple[list[float], Callable[..., Dakl]]:
    """Five penalties, the best one first; and a fit that tries what it is given."""
    sources, y, targets, truth = problem()

    def fit(*relative: float) -> Dakl:
        return Dakl(relative_alphas=relative).fit(sources, y, targets, (targets, truth))

    tried = fit(*[10.0**-i for i in range(-1, 3)]).tried + fit(1e-5).tried
    return [alpha for alpha, _ in sorted(tried, key=lambda pair: -pair[1])], fit


def test_the_search_ends_at_three_in_a_row_no_better():
    (best, second, third, fourth, fifth), fit = by_cosine()
    for relative, count in (
        ((second, third, fourth, fifth, best), 4),  # three worse than the first
        ((second, third, fourth, best, fifth, third), 6),  # two worse ones end nothing
        ((third, fourth, second, fifth, fourth, third, best), 6),  # counted from the best so far
        ((second, second, second, second, best), 4),  # equal is no better
        ((fifth, fourth, third, second, best), 5),
    ):
        dakl = fit(*relative)
        assert [alpha for alpha, _ in dakl.tried] == pytest.approx(relative[:count])
        cosines = [cosine for _, cosine in dakl.tried]
        assert dakl.alpha / dakl.scale == pytest.approx(relative[cosines.index(max(cosines))])


def test_validation_limit_compares_evenly_spaced_rows():
    sources, y, targets, truth = problem()
    some = torch.tensor([0, 32, 64, 96, 129])  # of 130
    limited = Dakl(validation_limit=5).fit(sources, y, targets, (targets, truth))
    by_hand = Dakl().fit(sources, y, targets, (targets[some], truth[some]))
    assert limited.tried == by_hand.tried and limited.alpha == by_hand.alpha
    whole = [Dakl(validation_limit=n).fit(sources, y, targets, (targets, truth)).tried for n in (130, 2000)]
    assert whole[0] == whole[1] != limited.tried


def test_the_documented_defaults():
    dakl = Dakl()
    assert (dakl.gamma, dakl.form, dakl.centred, dakl.validation_limit) == (1e-3, "exact", True, 2000)
    assert dakl.relative_alphas == pytest.approx([10 ** (1 - i / 2) for i in range(15)])


def test_penalties_below_the_rounding_are_passed_over():
    sources, y, targets, truth = problem()
    dakl = Dakl(1e-4, centred=False, relative_alphas=[1e-30, 0.1]).fit(sources, y, targets, (targets, truth))
    assert [relative for relative, _ in dakl.tried] == [pytest.approx(0.1)]
    relative = [0.1, 1e-30, 1e-30, 1e-30, 0.01]  # and are no three in a row that are no better
    dakl = Dakl(1e-4, centred=False, relative_alphas=relative).fit(sources, y, targets, (targets, truth))
    assert len(dakl.tried) == 2
    with pytest.raises(ValueError, match="below the rounding"):
        Dakl(1e-4, alpha=1e-30, centred=False).fit(sources, y, targets)


def test_what_does_not_fit_is_said():
    x, one, nan = torch.ones(3, 4), Dakl(alpha=1.0), float("nan")
    hole, null = x.clone(), x.clone()  # one bad value or row among good ones
    hole[1, 2], null[1] = nan, 0
    for message, call in (
        ("form", lambda: Dakl(form="quick")),
        ("above 0", lambda: Dakl(gamma=0)),
        ("above 0", lambda: Dakl(gamma=nan)),
        ("above 0", lambda: Dakl(alpha=-1.0)),
        (r"\(3, 4\), \(2, 4\).* are not", lambda: one.fit(x, x[:2], x)),
        ("are not", lambda: one.fit(x[:0], x[:0], x)),
        ("are not", lambda: one.fit(x, x, x[:, :2])),
        ("are not", lambda: one.fit(x, x[:, 0], x)),
        ("are not", lambda: Dakl().fit(x, x, x, (x, x[:2]))),
        ("are not", lambda: Dakl().fit(x, x, x, (x[:, :2], x))),
        ("are not", lambda: Dakl().fit(x, x, x, (x, x[:, :2]))),
        ("validation", lambda: Dakl().fit(x, x, x)),
        ("validation", lambda: Dakl().fit(x, x, x, (x[:0], x[:0]))),
        ("embedding is not finite", lambda: one.fit(x, hole, x)),
        ("zero or not finite", lambda: one.fit(null, x, x)),
        ("zero or not finite", lambda: one.fit(x, x, hole)),
        ("zero or not finite", lambda: one.fit(x, x, x / 0)),
        ("zero or not finite", lambda: Dakl().fit(x, x, x, (hole, x))),
        ("zero or not finite", lambda: Dakl().fit(x, x, x, (x, hole))),
        ("zero or not finite", lambda: one.fit(x, x, x).predict(null)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# What it gains, and what not ----------------------------------------------------------------------------


def gain(form: str, shift: bool, seed: int) -> tuple[float, float]:
    """The 95 % interval of DAKL's gain in cosine over its input, on 1,500 test rows.

    With a shift the target domain's predictions are noisier than the sources', as a network's are on images
    that it was not trained on; all are turned by a fifth of a radian. Without, both domains are alike, and
    predictions are what one should predict: the truth scatters around them evenly, so none are better.
    """
    sets = ((3000, 0.25 if shift else 0.5), (1500, 0.8 if shift else 0.5), (1500, 0.8 if shift else 0.5))
    drawn = [pairs(n, noise, 10 * seed + i, 0.2 if shift else 0) for i, (n, noise) in enumerate(sets)]
    if not shift:
        drawn = [(truth, x) for x, truth in drawn]
    (train, train_truth), (validation, validation_truth), (test, test_truth) = drawn
    sources, y = train, train_truth
    if form == "exact":
        sources, _ = kmeans(train, 300, seed=seed)
        y = train_truth[nearest_rows(sources, train)[0]]
    dakl = Dakl(form=form).fit(sources, y, torch.cat([validation, test]), (validation, validation_truth))
    difference = cosine(dakl.predict(test), test_truth) - cosine(test, test_truth)
    margin = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) - margin, float(difference.mean()) + margin


@pytest.mark.parametrize("form", ["exact", "linear"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_under_a_shift_dakl_beats_its_input(form: str, seed: int):
    low, _ = gain(form, shift=True, seed=seed)
    assert low > 0.02


@pytest.mark.parametrize("form", ["exact", "linear"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_a_shift_it_claims_no_gain(form: str, seed: int):
    low, high = gain(form, shift=False, seed=seed)
    assert low <= 0 and high - low < 0.01
