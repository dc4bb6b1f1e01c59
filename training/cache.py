"""Cached encodings on disk: one folder per cache, resumable, memory-mapped.

Callers pass encoders as records; no model is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import DataError, Pairs, Preprocessing, image_tensor
from files import exclusive, json_object, stamp, write_array, write_json

log = logging.getLogger("cache")

COMMIT_SECONDS = 2.0  # seconds between commits: a killed run loses at most this much encoding plus one batch
MISSING, DONE, BROKEN = 0, 1, 2
BLOCK = 256  # rows that share a checksum
CAPTION_BYTES = 1024


@dataclass(frozen=True)
class Encoder:
    """The encoder of one cache.

    name        of the cache's folder, before a hash
    key         JSON of the weights and options that the rows depend on (the pairs are added)
    shape       of a row;  dtype  of the cache, NumPy's
    batch_size  largest number of inputs per call of `encode`
    encode      a batch of inputs -> (b, *shape): strings, images (b, 3, h, w) float32, or row numbers
    """

    name: str
    key: Any
    shape: tuple[int, ...]
    dtype: Any
    batch_size: int
    encode: Callable[[Any], Tensor]


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
    return cache.filled(lambda rows: [distinct[i] for i in rows.tolist()]), index


def cached_rows(folder: Path, pairs: Pairs, encoder: Encoder) -> np.ndarray:
    """Rows (n, *shape) of pairs, computed from other caches: `encode` takes row numbers.

    Names, sizes and modification times of archives and members are part of the cache key. Raises DataError as
    `RowCache` does.
    """
    cache = RowCache(folder, encoder, encoder.key, image_identity(pairs), len(pairs))
    return cache.filled(lambda rows: rows)


def cached_images(
    folder: Path, pairs: Pairs, preprocessing: Preprocessing, encoder: Encoder, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(rows (n, *shape), ok (n,) bool) of the pairs' images; `workers` processes read them.

    Unreadable images get zero rows and ok False, and are listed in skipped.json. The key is that of
    `cached_rows` with `preprocessing`. Raises DataError as `RowCache` does.
    """
    key = {"encoder": encoder.key, "preprocessing": asdict(preprocessing)}
    cache = RowCache(folder, encoder, key, image_identity(pairs), len(pairs))
    with cache.filling() as bar:
        images = ImageRows(pairs, preprocessing, cache.missing())
        # A separate generator: drawing from torch's global one would change training in the run that fills
        # the cache.
        loader = DataLoader(
            images, encoder.batch_size, num_workers=workers, collate_fn=list, generator=torch.Generator()
        )
        for batch in loader:
            readable = [(row, image) for row, image in batch if isinstance(image, Tensor)]
            if readable:
                rows = np.asarray([row for row, _ in readable])
                cache.put(rows, encoder.encode(torch.stack([image for _, image in readable])))
            cache.skip({row: reason for row, reason in batch if isinstance(reason, str)})
            bar.update(len(batch))
    if cache.skipped:
        first = "; ".join(list(cache.skipped.values())[:3]) + (" ..." if len(cache.skipped) > 3 else "")
        log.warning(
            "%d of %d images cannot be used, listed in %s: %s",
            *(len(cache.skipped), len(pairs), cache.folder / "skipped.json", first),
        )
    return cache.rows, cache.state == DONE


def cached_captions(
    folder: Path, pairs: Pairs, preprocessing: Preprocessing, encoder: Encoder, workers: int = 0
) -> list[str]:
    """A caption of each image; "" if the image cannot be read.

    `encoder.encode` returns strings; its shape and dtype are not used: captions are stored as UTF-8 in
    CAPTION_BYTES zero-padded bytes; longer ones are cut. Otherwise as `cached_images`.
    """

    def encode(images: Tensor) -> Tensor:
        rows = np.zeros((len(images), CAPTION_BYTES), np.uint8)
        for row, text in zip(rows, encoder.encode(images), strict=True):
            raw = text.encode("utf-8")[:CAPTION_BYTES]
            row[: len(raw)] = np.frombuffer(raw, np.uint8)
        return torch.from_numpy(rows)

    as_bytes = replace(encoder, shape=(CAPTION_BYTES,), dtype=np.uint8, encode=encode)
    rows, _ = cached_images(folder, pairs, preprocessing, as_bytes, workers)
    return [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in np.asarray(rows)]


class ImageRows(Dataset):
    """Item k: (row, image tensor), or (row, error message)."""

    def __init__(self, pairs: Pairs, preprocessing: Preprocessing, rows: np.ndarray) -> None:
        self.pairs, self.preprocessing, self.rows = pairs, preprocessing, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[int, Tensor | str]:
        row = int(self.rows[k])
        try:
            return row, image_tensor(self.pairs.image(row), self.preprocessing)
        except DataError as error:
            return row, str(error)


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


class RowCache:
    """One cache folder: key.json (its dependencies), rows.npy, done.npy (one byte per row), skipped.json,
    and, once it is complete, sums.npy (a checksum for each block of rows).

    The folder's name ends in a hash of key.json. One process writes at a time; others wait for it. Rows are
    flushed before they are marked as done; rows of a block with a wrong checksum are encoded again. Raises
    DataError if the folder cannot be written, if the disk is full (finished rows stay), and if the encoder's
    rows have another shape or are not finite.
    """

    def __init__(self, folder: Path, encoder: Encoder, key: Any, content: str, n: int) -> None:
        if not n:
            raise DataError(f"no pairs to cache in {encoder.name!r}; give at least one pair")
        self.encoder, self.root = encoder, Path(folder)
        self.shape, self.dtype = (n, *encoder.shape), np.dtype(encoder.dtype)
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        self.identity = {"content": content, "dtype": self.dtype.name, "key": key, "name": encoder.name}
        self.identity["shape"] = self.shape
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        self.folder = self.root / f"{encoder.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        self.pending: list[tuple[Any, int]] = []
        self.skipped: dict[str, str] = {}

    # -- filling ------------------------------------------------

    def filled(self, inputs: Callable[[np.ndarray], Any]) -> np.ndarray:
        """All rows; missing ones are encoded from `inputs(row numbers)`."""
        with self.filling() as bar:
            missing, size = self.missing(), self.encoder.batch_size
            for start in range(0, len(missing), size):
                rows = missing[start : start + size]
                self.put(rows, self.encoder.encode(inputs(rows)))
                bar.update(len(rows))
        return self.rows

    @contextmanager
    def filling(self) -> Iterator[tqdm]:
        """Context manager: writer's lock, progress bar, commit on exit."""
        with contextlib.ExitStack() as stack:
            with self._disk():
                maps = self._map("r")
                if maps is None or not maps[1].all() or self._damaged(*maps):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    waiting = f"{self.folder}: another process fills this cache; waiting for it"
                    stack.enter_context(exclusive(self.folder, waiting))
                    maps = self._open()
            self.rows, self.state = maps
            with contextlib.suppress(OSError, UnicodeDecodeError):  # none yet, or damaged
                self.skipped = json_object((self.folder / "skipped.json").read_text("utf-8")) or {}
            self.committed = time.monotonic()
            n, missing = len(self.state), len(self.missing())
            with tqdm(
                total=n, initial=n - missing, desc=f"caching {self.encoder.name}", disable=not missing
            ) as bar:
                try:
                    yield bar
                finally:
                    self._commit()
            with self._disk():
                self.rows, self.state = self._map("r")
            if self.state.all() and not (self.folder / "sums.npy").exists():
                with contextlib.suppress(OSError):  # an older cache, complete but read-only
                    write_array(self.folder / "sums.npy", _checksums(self.rows))

    def missing(self) -> np.ndarray:
        """Row numbers to encode."""
        return np.flatnonzero(self.state == MISSING)

    def put(self, rows: np.ndarray, values: Tensor) -> None:
        """Store an encoder's rows (b, *shape)."""
        name, shape, values = self.encoder.name, (len(rows), *self.shape[1:]), values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if values.shape != shape:
            raise DataError(f"the encoder for {name!r} gave {values.shape}, not {shape}; check it")
        with np.errstate(over="ignore"):
            values = values.astype(self.dtype)
        if not np.isfinite(values).all():
            raise DataError(
                f"the encoder for {name!r} gave NaN or more than {self.dtype.name} holds; check its weights"
            )
        self.rows[rows] = values
        self.pending.append((rows, DONE))
        self._commit(COMMIT_SECONDS)

    def skip(self, reasons: dict[int, str]) -> None:
        """Mark rows as broken, each with its reason."""
        self.skipped |= {str(row): reason for row, reason in reasons.items()}
        self.pending += [(row, BROKEN) for row in reasons]

    def _commit(self, interval: float = 0.0) -> None:
        if not self.pending or time.monotonic() - self.committed < interval:
            return
        with self._disk():
            self.rows.flush()
            if self.skipped:
                write_json(self.folder / "skipped.json", self.skipped)
            for rows, state in self.pending:
                self.state[rows] = state
            self.state.flush()
        self.pending, self.committed = [], time.monotonic()

    # -- files ------------------------------------------------

    def _map(self, mode: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows, state) of the files; None if one is missing, truncated or of another shape."""
        try:
            rows, state = (
                np.load(self.folder / file, mmap_mode=mode, allow_pickle=False)
                for file in ("rows.npy", "done.npy")
            )
        except (FileNotFoundError, ValueError, EOFError):
            return None
        fits = (rows.shape, rows.dtype, state.shape) == (self.shape, self.dtype, self.shape[:1])
        return (rows, state) if fits else None

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        """Writable (rows, state), recreated if they do not fit; damaged rows are marked as missing."""
        if (maps := self._map("r+")) is None:
            for file in ("done.npy", "rows.npy", "skipped.json", "sums.npy"):
                (self.folder / file).unlink(missing_ok=True)
            if shutil.disk_usage(self.folder).free < self.bytes + self.shape[0]:
                raise self._no_space()
            write_json(self.folder / "key.json", self.identity)
            np.lib.format.open_memmap(self.folder / "rows.npy", "w+", self.dtype, self.shape)
            self._reserve()
            np.lib.format.open_memmap(self.folder / "done.npy", "w+", np.uint8, self.shape[:1])
            return self._map("r+")
        rows, state = maps
        if damaged := self._damaged(rows, state):
            log.warning("%s: %d rows are damaged and are computed again", self.folder, len(damaged))
            state[damaged] = MISSING
            (self.folder / "sums.npy").unlink()
        return rows, state

    def _damaged(self, rows: np.ndarray, state: np.ndarray) -> list[int]:
        """Numbers of the done rows in blocks that differ from their checksum, if the cache has checksums."""
        try:
            sums = np.load(self.folder / "sums.npy", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return []
        fits = _checksums(rows) == sums
        return [row for row in np.flatnonzero(state == DONE).tolist() if not fits[row // BLOCK]]

    def _reserve(self) -> None:
        """Allocate the file's blocks: on a full disk, writing to a hole of a mapped file raises SIGBUS."""
        if not hasattr(os, "posix_fallocate"):
            return
        with open(self.folder / "rows.npy", "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    return  # a file system without reservations
                (self.folder / "rows.npy").unlink()
                raise

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Errors of the cache's disk as DataErrors."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise DataError(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}); set "
                "REVERSE_SD_CACHE to a writable folder"
            ) from error

    def _no_space(self) -> DataError:
        free = shutil.disk_usage(next(f for f in (self.folder, *self.folder.parents) if f.exists())).free
        return DataError(
            f"no space left in {self.root}: needs {math.ceil(self.bytes / 1e6):,} MB, {free // 10**6:,} MB "
            "free; set REVERSE_SD_CACHE to a larger disk"
        )


def _checksums(rows: np.ndarray) -> np.ndarray:
    """The CRC-32 of each block of rows, uint32."""
    blocks = (np.ascontiguousarray(rows[k : k + BLOCK]) for k in range(0, len(rows), BLOCK))
    return np.array([zlib.crc32(block) for block in blocks], np.uint32)
