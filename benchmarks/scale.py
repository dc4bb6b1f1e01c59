"""Reading many parts of DiffusionDB at two sizes, beside `datasets` and `webdataset` on the same images.

    python benchmarks/scale.py [--parts 300 1200] [--reads 5000] [--folder FOLDER]

Parts of 1,000 tiny images and prompts are written to a temporary folder (2 GB at 1,200 parts, with the peers'
files). Each line is measured by a separate process, with the files in the page cache:

    read      seconds until the pairs are there, and of them the processor's: the first time, and with the
              columns in the cache
    bytes     of the columns a row, without the prompts' own text
    shuffled  ms of an image at a random position beyond decoding it, in one process and in two workers
    private   MB that each of the two workers has for itself (Linux)

`datasets` reads an Arrow file with the images' bytes, not decoded. `webdataset` has no random access: it
reads at most 50 tars in order, through a buffer of 1,000 samples. Packages that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PER_PART = 1000
WORKERS = 2


def samples(part: int) -> Iterator[tuple[str, bytes, dict]]:
    """(name, PNG, entry) of the images of a part; 166 characters of prompt on average."""
    words = "castle forest river portrait neon oil painting detailed light".split()
    number = random.Random(part)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for k in range(PER_PART):
        name = f"{number.getrandbits(32):08x}-1111-2222-3333-{number.getrandbits(48):012x}.png"
        prompt = f"image {k} of {part}, " + " ".join(number.choices(words, k=number.randint(12, 33)))
        content = buffer.getvalue() + part.to_bytes(4) + k.to_bytes(4)  # no decoder reads beyond the end
        yield name, content, {"p": prompt, "se": number.getrandbits(32), "c": 7.0, "st": 50, "sa": "k_lms"}


def build_parts(folder: Path, parts: int) -> None:
    folder.mkdir()
    for part in range(1, parts + 1):
        entries = {}
        with zipfile.ZipFile(folder / f"part-{part:06}.zip", "w") as archive:
            for name, content, entry in samples(part):
                archive.writestr(name, content)
                entries[name] = entry
            archive.writestr(f"part-{part:06}.json", json.dumps(entries))


def build_arrow(folder: Path, parts: int) -> None:
    import datasets

    def rows() -> Iterator[dict]:
        for part in range(1, parts + 1):
            for _, content, entry in samples(part):
                yield {"image": {"bytes": content, "path": None}, "prompt": entry["p"]}

    features = datasets.Features({"image": datasets.Image(decode=False), "prompt": datasets.Value("string")})
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder.parent / "cache"))
    made.save_to_disk(folder)


def build_tars(folder: Path, parts: int) -> None:
    folder.mkdir()
    for part in range(1, min(parts, 50) + 1):
        with tarfile.open(folder / f"{part:06}.tar", "w") as archive:
            for name, content, entry in samples(part):
                for file, data in ((name, content), (f"{name[:-4]}.txt", entry["p"].encode())):
                    info = tarfile.TarInfo(file)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


# ============================================================================================================
# One process each
# ============================================================================================================


def private_mb() -> float:
    """MB of this process that no other shares."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


class Timed:
    """Item i: (seconds of `read(rows[i])`, private MB afterwards, process)."""

    def __init__(self, read: Callable[[int], Any], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[float, float, int]:
        start = time.perf_counter()
        self.read(self.rows[i])
        seconds = time.perf_counter() - start
        return seconds, private_mb() if i > len(self.rows) - 100 else 0.0, os.getpid()


def shuffled(read: Callable[[int], Any], n: int, reads: int) -> dict[str, float]:
    """Milliseconds a read in one process and in each of two workers, medians; private MB of the workers."""
    from torch.utils.data import DataLoader

    rows = np.random.default_rng(0).permutation(n)[:reads].tolist()
    alone = [timed[0] for timed in map(Timed(read, rows).__getitem__, range(len(rows)))]
    items = DataLoader(Timed(read, rows), batch_size=20, num_workers=WORKERS, collate_fn=list)
    several = [timed for batch in items for timed in batch]
    private = {process: mb for _, mb, process in several if mb}
    return {
        "alone": 1e3 * statistics.median(alone),
        "workers": 1e3 * statistics.median(seconds for seconds, _, _ in several),
        "mb": max(private.values()),
    }


def measure_ours(folder: Path, reads: int) -> dict[str, Any]:
    import data

    start = time.perf_counter(), time.process_time()
    pairs = data.read_pairs(folder)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    columns = pairs._columns | {"row": pairs.row}
    text = columns["prompts"].nbytes
    bytes_a_row = (sum(column.nbytes for column in columns.values()) - text) / len(pairs)
    nothing = shuffled(lambda i: None, len(pairs), reads)
    decoding = shuffled(lambda i: pairs.image(0), len(pairs), 500)["alone"]
    data.load_image = lambda content, where: content
    reading = shuffled(pairs.image, len(pairs), reads)
    return reading | {"read": seconds, "before": nothing["mb"], "bytes": bytes_a_row,
                      "text": text / len(pairs), "decoding": decoding}  # fmt: skip


def measure_datasets(folder: Path, reads: int) -> dict[str, Any]:
    import datasets

    start = time.perf_counter(), time.process_time()
    rows = datasets.load_from_disk(folder)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return shuffled(lambda i: rows[i]["image"]["bytes"], len(rows), reads) | {"read": seconds}


def measure_webdataset(folder: Path, reads: int) -> dict[str, Any]:
    import webdataset

    tars = sorted(map(str, folder.iterdir()))
    stream = iter(webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(PER_PART))
    next(stream)
    alone = [timed[0] for timed in map(Timed(lambda _: next(stream), range(reads)).__getitem__, range(reads))]
    return {"alone": 1e3 * statistics.median(alone)}


MEASURES = {"ours": measure_ours, "datasets": measure_datasets, "webdataset": measure_webdataset}


# ============================================================================================================
# All of them
# ============================================================================================================


def measured(name: str, folder: Path, reads: int, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--reads", str(reads)]
    environment = os.environ | {"REVERSE_SD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, figures: dict[str, Any]) -> str:
    cells = {
        "read": "{0[0]:7.2f} s ({0[1]:.2f} s)",
        "alone": "{:8.3f} ms alone",
        "workers": "{:8.3f} ms in workers",
        "mb": "{:7.1f} MB private",
        "bytes": "{:6.1f} bytes a row",
        "text": "+ {:.1f} of text",
    }
    return f"  {name:24}" + " ".join(cells[key].format(figures[key]) for key in cells if key in figures)


def compare(folder: Path, parts: int, reads: int) -> None:
    print(f"{parts:,} parts, {parts * PER_PART:,} images", flush=True)
    build_parts(folder / "parts", parts)
    first = measured("ours", folder / "parts", reads, folder / "index")
    again = measured("ours", folder / "parts", reads, folder / "index")
    print(line("ours, the first time", first))
    print(line("ours, from the cache", again))
    print(f"  one image again and again, decoded: {again['decoding']:.3f} ms; "
          f"a worker that reads nothing has {again['before']:.1f} MB private", flush=True)  # fmt: skip
    for name, build in (("datasets", build_arrow), ("webdataset", build_tars)):
        if importlib.util.find_spec(name) is None:
            print(f"  {name} is not installed")
            continue
        build(folder / name, parts)
        print(line(name, measured(name, folder / name, reads, folder / "index")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, nargs="+", default=[300, 1200])
    parser.add_argument("--reads", type=int, default=5000, help="shuffled reads (default 5000)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.folder, args.reads)))
        return
    for parts in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            compare(Path(folder), parts, args.reads)


if __name__ == "__main__":
    main()
