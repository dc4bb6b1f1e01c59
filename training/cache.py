"""Cached encodings of texts and images, made once and read as memory maps (training/rows.py).

Callers pass encoders as records; no model is imported here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import DataError, Pairs, Preprocessing, image_tensor
from files import number_in_environment, stamp
from training.rows import DONE, Encoder, RowCache, filling

CAPTION_BYTES = 1024
SLOW = {"cuda": 0.001, "cpu": 0.02}  # seconds to read an image: below, other processes would gain nothing


def cached_texts(folder: Path, texts: Sequence[str], encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """(rows (u, *shape), index (n,)): one row per distinct text; the row of texts[i] is rows[index[i]].

    The rows are a read-only memory map. The texts are part of the cache key. Interrupted runs resume.
    Raises DataError as `RowCache` does.
    """
    position: dict[str, int] = {}
    index = np.asarray([position.setdefault(text, len(position)) for text in texts], np.int64)
    distinct = list(position)
    content = hashlib.sha256()
    for text in distinct:
        raw = text.encode("utf-8", "surrogatepass")
        content.update(len(raw).to_bytes(8, "little") + raw)
    cache = RowCache(folder, encoder, encoder.key, content.hexdigest(), len(distinct))
    return cache.filled(lambda rows: [distinct[i] for i in rows]), index


def cached_rows(folder: Path, pairs: Pairs, encoder: Encoder) -> np.ndarray:
    """Rows (n, *shape) of pairs, computed from other caches: `encode` takes row numbers.

    Names, sizes and modification times of archives and members are part of the cache key. Raises DataError as
    `RowCache` does.
    """
    cache = RowCache(folder, encoder, encoder.key, image_identity(pairs), len(pairs))
    return cache.filled(np.asarray)


def cached_images(
    folder: Path, pairs: Pairs, preprocessing: Preprocessing, encoder: Encoder, workers: int | None = 0,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """(rows (n, *shape), ok (n,) bool) of the pairs' images, as by `image_caches`."""
    return image_caches(folder, pairs, [(preprocessing, encoder)], workers, device)[0]


def image_caches(
    folder: Path, pairs: Pairs, encoders: Sequence[tuple[Preprocessing, Encoder]], workers: int | None = 0,
    device: str = "cpu",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows (n, *shape), ok (n,) bool) of the pairs' images by each encoder; `readers` processes read them.

    An image is decoded once for all encoders that lack it. Unreadable images get zero rows and ok False, and
    are listed in skipped.json. The key is that of `cached_rows` with the preprocessing. Batch sizes divide
    the largest. Raises DataError as `RowCache` does.
    """
    content, caches = image_identity(pairs), {}
    for preprocessing, encoder in encoders:
        key = {"encoder": encoder.key, "preprocessing": asdict(preprocessing)}
        caches[RowCache(folder, encoder, key, content, len(pairs))] = preprocessing

    def stacked(batch: dict[int, list[np.ndarray]], k: int) -> Callable[[list[int]], Tensor]:
        return lambda rows: torch.from_numpy(np.stack([batch[row][k] for row in rows]))

    with filling(list(caches)) as passes:
        for lacking, batches in passes:
            images = ImageRows(pairs, [caches[cache] for cache in lacking])
            for batch in in_batches(images, batches, readers(workers, images, device), dict):
                reasons = {row: views for row, views in batch.items() if isinstance(views, str)}
                for k, cache in enumerate(lacking):
                    cache.encode(list(batch), stacked(batch, k), reasons)
    for cache in caches:
        cache.warn()
    return [(cache.rows, cache.state == DONE) for cache in caches]


def in_batches(
    rows: Dataset, batches: Iterable[Sequence[int]], workers: int, collate: Callable[[list], Any]
) -> DataLoader:
    """The batches of `rows`, each made by `collate`, by `workers` processes beside this one (0: none).

    They must be arrays: each tensor that another process hands over takes an open file and shared memory, of
    which there are few; torch then waits for ever. A separate generator: the loader would draw from torch's
    global one, and a run that resumes or fills a cache would differ from one that does not.
    """
    return DataLoader(
        rows, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )


def readers(workers: int | None, images: ImageRows, device: str) -> int:
    """`workers`, or if that is None the number of processes that are to read images: this machine's cores
    divided by its training processes where the median of a few images takes SLOW seconds or more, else 0."""
    if workers is not None:
        return workers
    seconds = []
    for i in np.linspace(0, len(images) - 1, 7).astype(int).tolist():
        started = time.perf_counter()
        images[i]
        seconds.append(time.perf_counter() - started)
    if np.median(seconds) < SLOW[device.split(":")[0]]:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // number_in_environment("LOCAL_WORLD_SIZE", 1))


def as_bytes(encoder: Encoder) -> Encoder:
    """An encoder of images whose `encode` returns strings, for `cached_images`: its rows are their UTF-8 in
    CAPTION_BYTES zero-padded bytes; longer ones are cut. Its shape and dtype are not used."""

    def encode(images: Tensor) -> Tensor:
        rows = np.zeros((len(images), CAPTION_BYTES), np.uint8)
        for row, text in zip(rows, encoder.encode(images), strict=True):
            raw = text.encode("utf-8")[:CAPTION_BYTES]
            row[: len(raw)] = np.frombuffer(raw, np.uint8)
        return torch.from_numpy(rows)

    return replace(encoder, shape=(CAPTION_BYTES,), dtype=np.uint8, encode=encode)


def as_texts(rows: np.ndarray) -> list[str]:
    """The strings of rows by `as_bytes`; "" if the image cannot be read."""
    return [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in np.asarray(rows)]


class ImageRows(Dataset):
    """Item i: (i, the image as each preprocessing's array), or (i, error message)."""

    def __init__(self, pairs: Pairs, preprocessings: Sequence[Preprocessing]) -> None:
        self.pairs, self.preprocessings = pairs, preprocessings

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, list[np.ndarray] | str]:
        try:
            image = self.pairs.image(i)
            return i, [image_tensor(image, preprocessing).numpy() for preprocessing in self.preprocessings]
        except DataError as error:
            return i, str(error)


def image_identity(pairs: Pairs) -> str:
    """A hash of the archives' names, sizes and modification times, and of the members' names."""
    content = hashlib.sha256()
    zips = {
        k: stamp(pairs.archives[k])
        for k in np.unique(pairs.archive).tolist()
        if pairs.archives[k].suffix == ".zip"
    }
    for k, name in zip(pairs.archive.tolist(), pairs.names, strict=True):
        line = f"{zips.get(k) or stamp(pairs.archives[k] / name)}\0{name}\n"
        content.update(line.encode("utf-8", "surrogatepass"))
    return content.hexdigest()
