"""Seconds to find the nearest of 2,000,000 prompts for one picture and for a batch, beside NumPy.

    python benchmarks/bank.py [--n 2000000] [--batch 8] [--rounds 5] [--folder FOLDER]

The embeddings are random unit rows (n, 384) float32 in files, mapped into memory as `open_bank` maps them.
NumPy takes `rows @ query` of one array and argpartition, for each picture. Both must find the same rows.
CPU seconds are the time to compare on a busy machine. The first search also reads the files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.bank import CHUNK, Bank  # noqa: E402  (run from any folder)

NEAREST = 5


def synthetic(folder: Path, n: int) -> tuple[Bank, np.ndarray]:
    """A bank whose prompts are the numbers of their rows, and the same rows as one array."""
    generator, rows, blocks = np.random.default_rng(0), np.empty((n, 384), np.float32), []
    for k, start in enumerate(range(0, n, CHUNK)):
        block = generator.standard_normal((min(CHUNK, n - start), 384), dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        rows[start : start + len(block)] = block
        np.save(folder / f"{k}.npy", block)
        blocks.append(np.load(folder / f"{k}.npy", mmap_mode="c"))
    return Bank([str(k) for k in range(n)], blocks), rows


def timed(search: Callable[[], list], rounds: int) -> tuple[list, float, float]:
    """The result; the least wall and CPU seconds of the rounds."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        result = search()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return result, min(walls), min(cpus)


def by_numpy(rows: np.ndarray, queries: np.ndarray) -> list[list[str]]:
    """The numbers of the nearest rows of each query."""
    found = []
    for query in queries:
        cosines = rows @ query
        best = np.argpartition(-cosines, NEAREST)[:NEAREST]
        found.append([str(row) for row in best[np.argsort(-cosines[best])]])
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=8, help="pictures (default: 8, as reverse_sd.py)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for 3 GB of files (default: the temporary folder)")
    args = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, {args.n:,} x 384 float32, the least of {args.rounds} rounds")
    with TemporaryDirectory(dir=args.folder) as scratch:
        bank, rows = synthetic(Path(scratch), args.n)
        queries = np.random.default_rng(1).standard_normal((args.batch, 384), dtype=np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        print(f"first search   {timed(lambda: bank.nearest(queries[:1], NEAREST), 1)[1]:.2f} s")
        for size in (1, args.batch):
            batch = queries[:size]
            ours, wall, cpu = timed(lambda: bank.nearest(batch, NEAREST), args.rounds)  # noqa: B023
            theirs, peer, peer_cpu = timed(lambda: by_numpy(rows, batch), args.rounds)  # noqa: B023
            same = [[text for text, _ in found] for found in ours] == theirs
            print(
                f"batch of {size}: a picture takes {wall / size:.3f} s (CPU {cpu / size:.3f}), by NumPy "
                f"{peer / size:.3f} s (CPU {peer_cpu / size:.3f}); NumPy / ours {peer_cpu / cpu:.2f} in CPU "
                f"seconds; the same rows: {same}"
            )


if __name__ == "__main__":
    main()
