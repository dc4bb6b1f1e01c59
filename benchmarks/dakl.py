"""DAKL at the paper's scale: time and memory of the exact streamed form, time of the linear limit; then, at
a size whose features fit in memory, beside scikit-learn's KernelRidge on those features.

    OMP_NUM_THREADS=2 python benchmarks/dakl.py [--only scale|accuracy|peer] [--gamma 1e-3]

Rows are synthetic unit vectors around a common direction with a falling spectrum, as prompt embeddings are;
predictions are these with noise. Seconds are wall time, memory is the peak of the whole process, data
included. Exact: fit (which tries the penalties on 2,000 of the validation rows) and the prediction of all
test rows. The peer solves the same centred problem with the same alpha: KernelRidge(kernel="linear") on rows
of F.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from reverse_sd import EMBEDDING_WIDTH, Dakl, dakl_literal  # noqa: E402  (run from any folder)

CPU: list[float] = []  # of each call of `timed`: what other programs on the machine change less


def synthetic(n: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """n predictions and their true embeddings, unit rows (n, E) float32 around a common direction."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, EMBEDDING_WIDTH + 1) ** -0.5
    basis = torch.linalg.qr(
        torch.randn(EMBEDDING_WIDTH, EMBEDDING_WIDTH, generator=torch.Generator().manual_seed(1))
    )[0]
    latent = F.normalize(torch.randn(n, EMBEDDING_WIDTH, generator=generator) * spectrum, dim=1)
    latent[:, 0] += 0.5
    truth = F.normalize(latent @ basis, dim=1)
    error = F.normalize(torch.randn(n, EMBEDDING_WIDTH, generator=generator), dim=1)
    return F.normalize(truth + noise * error, dim=1), truth


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds and the result; the seconds of all threads together go to `CPU`."""
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    CPU.append(time.process_time() - cpu)
    return time.perf_counter() - started, result


def peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cosine(a: Tensor, b: Tensor) -> float:
    return float((F.normalize(a, dim=1).double() * F.normalize(b, dim=1)).sum() / len(a))


def scale(gamma: float, k: int = 10_000, n_target: int = 30_000) -> None:
    sources, source_truth = synthetic(k, 0.3, seed=2)
    validation, validation_truth = synthetic(n_target, 0.8, seed=3)
    test, test_truth = synthetic(n_target, 0.8, seed=4)
    targets = torch.cat([validation, test])
    print(f"{k:,} sources, {n_target:,} + {n_target:,} target rows, {EMBEDDING_WIDTH}-d, gamma {gamma:g}")
    print(f"input          cosine {cosine(test, test_truth):.5f}")
    predictions = {}
    for form in ("linear", "exact"):
        dakl = Dakl(gamma, form=form)
        fit, _ = timed(partial(dakl.fit, sources, source_truth, targets, (validation, validation_truth)))
        predict, predictions[form] = timed(partial(dakl.predict, test))
        gb = peak_gb()
        print(
            f"{form:7s}{fit + predict:7.1f} s (fit {fit:.1f}, predict {predict:.1f}), peak {gb:.2f} GB, "
            f"CPU {sum(CPU[-2:]):.0f} s, cosine {cosine(predictions[form], test_truth):.5f}, "
            f"alpha {dakl.alpha / dakl.scale:.1e} x scale"
        )
    print(f"1 - cosine between the two forms: {1 - cosine(*predictions.values()):.1e}")


def accuracy(k: int = 1_000, n_target: int = 1_500) -> None:
    """The distance of the exact form from `dakl_literal`, and of the linear limit from the exact form."""
    sources, source_truth = synthetic(k, 0.3, seed=2)
    validation, validation_truth = synthetic(n_target, 0.8, seed=3)
    test, test_truth = synthetic(n_target, 0.8, seed=4)
    targets = torch.cat([validation, test])
    print(f"{k:,} sources, {n_target:,} + {n_target:,} target rows; all at the alpha that exact chose")
    for gamma in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        exact = Dakl(gamma).fit(sources, source_truth, targets, (validation, validation_truth))
        linear = Dakl(gamma, exact.alpha, "linear").fit(sources, source_truth, targets)
        a, b = exact.predict(test), linear.predict(test)
        plain = dakl_literal(sources, source_truth, targets, gamma, exact.alpha, centred=True)[n_target:]
        print(
            f"gamma {gamma:6g}  alpha {exact.alpha / exact.scale:.1e} x scale  "
            f"exact {cosine(a, test_truth):.5f}  linear {cosine(b, test_truth):.5f}  "
            f"1 - cos of the two {1 - cosine(a, b):.1e}  "
            f"exact - plain: largest difference {float((a - F.normalize(plain, dim=1)).abs().max()):.1e}"
        )


def peer(gamma: float, k: int = 6_000, n_target: int = 12_000) -> None:
    from sklearn.kernel_ridge import KernelRidge

    sources, source_truth = synthetic(k, 0.3, seed=2)
    validation, validation_truth = synthetic(n_target, 0.8, seed=3)
    test, _ = synthetic(n_target, 0.8, seed=4)
    targets = torch.cat([validation, test])
    linear = Dakl(gamma, form="linear")
    alpha = linear.fit(sources, source_truth, targets, (validation, validation_truth)).alpha

    def ours() -> Tensor:
        return Dakl(gamma, alpha).fit(sources, source_truth, targets).predict(targets, unit=False)

    def features() -> tuple[Tensor, Tensor]:
        x = torch.cat([sources, targets]).double()
        x /= x.norm(dim=1, keepdim=True)
        f = torch.mm(x, x.T).sub_(1).mul_(gamma).exp_()
        f -= f.mean(dim=1, keepdim=True)
        f -= f[:k].mean(dim=0)
        return f[:k], f[k:]

    def theirs() -> Tensor:
        y = source_truth.double()
        model = KernelRidge(kernel="linear", alpha=alpha).fit(f_s.numpy(), (y - y.mean(dim=0)).numpy())
        return torch.from_numpy(model.predict(f_t.numpy())) + y.mean(dim=0)

    ours_s, a = timed(ours)
    features_s, (f_s, f_t) = timed(features)
    theirs_s, b = timed(theirs)
    print(f"{k:,} sources, {2 * n_target:,} target rows, all predicted, gamma {gamma:g}, alpha {alpha:.2e}")
    ours_cpu, features_cpu, theirs_cpu = CPU[-3:]
    print(f"ours           {ours_s:6.1f} s, features included")
    gb = (f_s.numel() + f_t.numel()) * 8 / 1e9
    print(f"KernelRidge    {theirs_s:6.1f} s on features that took {features_s:.1f} s and {gb:.1f} GB")
    for name, ours_t, features_t, theirs_t in (
        ("wall", ours_s, features_s, theirs_s),
        ("CPU", ours_cpu, features_cpu, theirs_cpu),
    ):
        with_features = (theirs_t + features_t) / ours_t
        print(f"ratio, {name:8s}{theirs_t / ours_t:6.2f} without their features, {with_features:.2f} with")
    print(f"largest difference of a prediction {float((a - b).abs().max()):.1e}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=("scale", "accuracy", "peer"))
    parser.add_argument("--gamma", type=float, default=1e-3)
    args = parser.parse_args()
    print(f"threads {torch.get_num_threads()}")
    if args.only in (None, "scale"):
        scale(args.gamma)
    if args.only in (None, "accuracy"):
        accuracy()
    if args.only in (None, "peer"):
        peer(args.gamma)


if __name__ == "__main__":
    main()
