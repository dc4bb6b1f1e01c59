"""Seconds in which one process and two processes fill the same cache, one thread each, and a third run that
finds nothing to do.

    python benchmarks/caches.py [--images 4096] [--size 64]

Latents of sd-mini and pictures of random colours, in a temporary folder. Processes begin together once they
have loaded what they need; the time is that of the last one. The two caches must have the same bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402  (run from any folder)
import weights  # noqa: E402
from backbones import SDReader  # noqa: E402
from training.cache import Encoder, cached_images  # noqa: E402


def pictures(folder: Path, n: int) -> None:
    """n pictures with a prompt beside each."""
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)
    for k, content in enumerate(colours):
        Image.fromarray(content).resize((128, 128)).save(folder / f"{k:06}.png", compress_level=1)
        (folder / f"{k:06}.txt").write_text(f"picture {k}")


def fill(folder: Path, cache: Path, size: int) -> None:
    """Fill the cache once standard input is closed; print wall seconds, CPU seconds and the number of rows
    that were encoded here."""
    torch.set_num_threads(1)
    pairs, sd, encoded = data.read_pairs(folder), SDReader("sd-mini", None), []

    def latents(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return sd.latents(images)

    latents(torch.zeros(1, 3, size, size))
    data.image_tensor(pairs.image(0), data.Preprocessing.square(size))
    encoded.clear()
    print("ready", flush=True)
    sys.stdin.read()
    started, cpu = time.perf_counter(), time.process_time()
    encoder = Encoder("latents", "benchmark", (4, size // 8, size // 8), np.float16, 32, latents)
    cached_images(cache, pairs, data.Preprocessing.square(size), encoder)
    print(time.perf_counter() - started, time.process_time() - cpu, sum(encoded))


def timed(processes: int, *arguments: object) -> tuple[float, float, list[int]]:
    """(wall seconds and CPU seconds of the slowest process, rows that each has encoded)."""
    command = [sys.executable, __file__, "--fill", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    # Each in a session of its own, as by torchrun: Linux shares a busy machine out by sessions.
    running = [subprocess.Popen(command, **pipes, start_new_session=True) for _ in range(processes)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.close()
    seconds, cpu, rows = zip(*(process.stdout.read().split() for process in running), strict=True)
    return max(map(float, seconds)), max(map(float, cpu)), list(map(int, rows))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=64, help="pixels, a multiple of 8 (default: 64)")
    parser.add_argument("--fill", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    if args.fill:
        fill(*args.fill, args.size)
        return
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures(folder / "pictures", args.images)
        weights.config("vae", "sd-mini")
        times, contents = [], []
        for processes, name in ((1, "one"), (2, "two"), (1, "two")):
            seconds, cpu, rows = timed(processes, folder / "pictures", folder / name, "--size", args.size)
            label = f"{processes} processes, cache {name}"
            print(f"{label}: {seconds:6.1f} s, CPU {cpu:6.1f} s, rows {rows}", flush=True)
            times.append(seconds)
            contents.append({path.name: path.read_bytes() for path in (folder / name).rglob("*.npy")})
        print(f"two / one {times[1] / times[0]:.2f}, the same bytes: {contents[0] == contents[1]}")


if __name__ == "__main__":
    main()
