"""k-means beside scikit-learn's MiniBatchKMeans and BisectingKMeans: time and inertia in one run.

    OMP_NUM_THREADS=2 python benchmarks/kmeans.py [--n 50000] [--k 2000] [--peers NAME...] [--full]

The rows are unit vectors in broad gaussians around many centres, 384-d. Inertia is the mean squared distance
of all rows to their nearest centroid, computed by one function for all. Ours is run with more and more
iterations until it reaches a peer's inertia; its time includes the initialisation. `--full`:
670,000 rows to 10,000 clusters, ours alone, in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from reverse_sd import EMBEDDING_WIDTH, kmeans, nearest_rows  # noqa: E402  (run from any folder)


def synthetic(n: int, seed: int = 0) -> Tensor:
    """n unit rows (n, E) float32 around n / 100 centres with uneven shares, cosine to them about .8."""
    generator = torch.Generator().manual_seed(seed)
    n_centres = max(1, n // 100)
    spectrum = torch.arange(1, EMBEDDING_WIDTH + 1) ** -0.3
    centres = F.normalize(torch.randn(n_centres, EMBEDDING_WIDTH, generator=generator) * spectrum, dim=1)
    shares = torch.rand(n_centres, generator=generator) ** 2 + 0.01
    rows = centres[torch.multinomial(shares, n, replacement=True, generator=generator)]
    for part in rows.split(50_000):
        noise = torch.randn(len(part), EMBEDDING_WIDTH, generator=generator) * spectrum
        part += 0.75 * F.normalize(noise, dim=1)
        part /= part.norm(dim=1, keepdim=True)
    return rows


def inertia(rows: Tensor, centroids: Tensor) -> float:
    return float(nearest_rows(rows, centroids)[1].double().mean())


def timed(cluster: Callable[[], Tensor], rows: Tensor) -> tuple[float, float]:
    """Seconds, inertia."""
    started = time.perf_counter()
    centroids = cluster()
    return time.perf_counter() - started, inertia(rows, centroids)


def peers(rows: Tensor, k: int, names: list[str]) -> None:
    from sklearn.cluster import BisectingKMeans, MiniBatchKMeans

    models = {
        "minibatch": lambda: MiniBatchKMeans(k, random_state=0),
        "bisecting": lambda: BisectingKMeans(k, random_state=0),
    }
    runs = {}
    kmeans(rows[:5000], 500)  # warms up
    for iterations in (0, 1, 2, 3, 5, 8, 12, 20):
        work = partial(kmeans, rows, k, max_iterations=iterations, tolerance=0)
        seconds, value = runs[iterations] = timed(lambda: work()[0], rows)  # noqa: B023
        print(f"ours, {iterations:2d} iterations  {seconds:7.2f} s  inertia {value:.5f}")
    seconds, value = timed(lambda: kmeans(rows, k)[0], rows)
    print(f"ours, by default     {seconds:7.2f} s  inertia {value:.5f}")
    for name in names:
        model = models[name]()
        data = rows.numpy()
        work = partial(model.fit, data)
        seconds, value = timed(lambda: torch.as_tensor(work().cluster_centers_), rows)  # noqa: B023
        print(f"{type(model).__name__:19s}  {seconds:7.2f} s  inertia {value:.5f}")
        reached = [s for s, ours in runs.values() if ours <= value]
        if reached:
            ratio = seconds / min(reached)
            print(f"  ours at its inertia or below: {min(reached):.2f} s, {ratio:.1f} times as fast")
        else:
            print("  ours does not reach its inertia")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--k", type=int, default=2_000)
    names = ["minibatch", "bisecting"]
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--full", action="store_true", help="670,000 rows to 10,000 clusters as well")
    args = parser.parse_args()
    print(f"threads {torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')})")
    print(f"{args.n:,} x {EMBEDDING_WIDTH} to {args.k:,} clusters")
    peers(synthetic(args.n), args.k, args.peers)
    if args.full:
        rows, k = synthetic(670_000), 10_000
        print(f"{len(rows):,} x {EMBEDDING_WIDTH} to {k:,} clusters")
        for iterations in (0, 5):
            seconds, value = timed(lambda: kmeans(rows, k, max_iterations=iterations)[0], rows)  # noqa: B023
            print(f"ours, {iterations:2d} iterations  {seconds:7.1f} s  inertia {value:.5f}")


if __name__ == "__main__":
    main()
