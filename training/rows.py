"""Cached rows on disk: one folder per cache, filled by any number of processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import DataError
from files import lock_bytes, read_array, unlock_bytes, write_array, write_json
from schema import TEXT, by_name, read_value

log = logging.getLogger("cache")

COMMIT_SECONDS = 2.0  # seconds between commits: a killed process loses at most this much and one batch
MISSING, DONE, BROKEN = 0, 1, 2
BLOCK = 256  # rows that share a checksum
SYNCED = getattr(os, "O_DSYNC", 0)


@dataclass(frozen=True)
class Encoder:
    """The encoder of one cache.

    name        of the cache's folder, before a hash
    key         JSON of the weights and options that the rows depend on (the pairs are added)
    shape       of a row;  dtype  of the cache, NumPy's
    batch_size  number of inputs per call of `encode`, fewer at the end of a share of rows
    encode      a batch of inputs -> (b, *shape): strings, images (b, 3, h, w) float32, or row numbers
    autocast    type of device on which the rows are encoded under bf16 autocast, with a key of their own,
                unless float32 rows were begun; "" = float32
    """

    name: str
    key: Any
    shape: tuple[int, ...]
    dtype: Any
    batch_size: int
    encode: Callable[[Any], Tensor]
    autocast: str = ""


# ============================================================================================================
# Shares of rows
# ============================================================================================================


@dataclass
class Share:
    """Consecutive rows that this process has claimed: `rows` (k, *shape), `state` (k,), whether each is `new`
    since the last commit, and the `reasons` of broken ones."""

    start: int
    rows: np.ndarray
    state: np.ndarray
    new: np.ndarray
    reasons: dict[str, str] = field(default_factory=dict)

    def store(self, rows: list[int], state: int, values: np.ndarray | None = None) -> None:
        """Set the state, and the values, of those of the rows that are missing."""
        places = np.asarray(rows, np.int64) - self.start
        missing = self.state[places] == MISSING
        places = places[missing]
        self.state[places], self.new[places] = state, True
        if values is not None:
            self.rows[places] = values[missing]


@contextmanager
def filling(caches: Sequence[RowCache]) -> Iterator[Iterator[tuple[list[RowCache], Iterator[list[int]]]]]:
    """Context manager: passes, each (caches that lack rows, batches of row numbers to give to their
    `encode`). All caches have the same number of rows."""
    with contextlib.ExitStack() as stack:
        for cache in caches:
            stack.enter_context(cache.opened())
        lacking = [cache for cache in caches if cache.files]
        label = "caching " + ", ".join(cache.encoder.name for cache in lacking)
        quiet = not lacking or not log.isEnabledFor(logging.WARNING)  # as in all processes but the first
        bar = stack.enter_context(tqdm(total=caches[0].shape[0], desc=label, disable=quiet))
        yield _passes(lacking, bar)


def _passes(caches: list[RowCache], bar: tqdm) -> Iterator[tuple[list[RowCache], Iterator[list[int]]]]:
    while lacking := [cache for cache in caches if len(cache.missing())]:
        bar.reset()
        yield lacking, _claimed(lacking, bar)
        for cache in lacking:
            cache.wait()


def _claimed(caches: list[RowCache], bar: tqdm) -> Iterator[list[int]]:
    """Batches of the shares that no other process encodes, each claimed when its first batch is taken.

    Shares and batches are the same whichever process encodes them, and an interrupted batch is encoded whole
    again: an encoder's results may depend on a batch's other inputs in the last bits.
    """
    n, size = caches[0].shape[0], max(cache.encoder.batch_size for cache in caches)
    share = math.ceil(size / BLOCK) * BLOCK
    for start in range(0, n, share):
        stop = min(start + share, n)
        all(cache.claim(start, stop) for cache in caches)  # none after one of another process, who claims all
        for first in range(start, stop, size):
            rows = range(first, min(first + size, stop))
            if any(cache.lacks(rows) for cache in caches):
                yield list(rows)
            bar.update(len(rows))


class Column:
    """The items of a .npy file, read and written in place.

    Not by a memory map: that writes whole pages, over NFS also the neighbouring rows of other machines, and a
    full disk would end the process. A write is on the disk when it returns.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "r+b", 0, opener=lambda name, flags: os.open(name, flags | SYNCED))
        np.lib.format.read_magic(self.file)
        shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
        self.first, self.shape = self.file.tell(), shape[1:]
        self.bytes = math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        self.file.seek(self.first + start * self.bytes)
        content = bytearray(self.file.read((stop - start) * self.bytes))
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape)

    def write(self, start: int, values: np.ndarray) -> None:
        self.file.seek(self.first + start * self.bytes)
        content = memoryview(np.ascontiguousarray(values)).cast("B")
        while content:
            content = content[self.file.write(content) :]

    def lock(self, start: int, stop: int, wait: bool = False) -> bool:
        """Whether this process now holds the lock of these items."""
        return lock_bytes(self.file, self.first + start * self.bytes, (stop - start) * self.bytes, wait)

    def unlock(self, start: int, stop: int) -> None:
        unlock_bytes(self.file, self.first + start * self.bytes, (stop - start) * self.bytes)


class RowCache:
    """One cache folder: key.json (its dependencies), rows.npy, done.npy (one byte per row), sums.npy (a
    checksum for each complete block of rows) and skipped.json. The folder's name ends in a hash of key.json.

    Any number of processes, on any number of machines, fill it together. A process claims a share of rows by
    locking its bytes of done.npy, encodes it, and writes rows, checksums and state in this order; the system
    gives up the locks of a process that ends, however it ends, and another takes over the rest of its share.
    Without locks (Windows, some network file systems) each process encodes all rows that it finds missing:
    the same result, later.

    Rows of a block with a wrong checksum are encoded again. Raises DataError if the folder cannot be written,
    if the disk is full (finished rows stay), and if the encoder's rows have another shape or are not finite.
    """

    def __init__(self, folder: Path, encoder: Encoder, key: Any, content: str, n: int) -> None:
        if not n:
            raise DataError(f"no pairs to cache in {encoder.name!r}; give at least one pair")
        self.encoder, self.root = encoder, Path(folder)
        self.shape, self.dtype = (n, *encoder.shape), np.dtype(encoder.dtype)
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        self.identity = {"content": content, "dtype": self.dtype.name, "key": key, "name": encoder.name}
        self.identity["shape"] = self.shape
        self.bf16 = bool(encoder.autocast) and not self.folder.exists()
        if self.bf16:
            self.identity["precision"] = "bf16"
        self.files: dict[str, Column] = {}  # while rows are missing
        self.shares: list[Share] = []

    @property
    def folder(self) -> Path:
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return self.root / f"{self.encoder.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"

    # -- filling ------------------------------------------------

    def filled(self, inputs: Callable[[list[int]], Any]) -> np.ndarray:
        """All rows; missing ones are encoded from `inputs(row numbers)`."""
        with filling([self]) as passes:
            for _, batches in passes:
                for rows in batches:
                    self.encode(rows, inputs)
        return self.rows

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Context manager: `files` are open if rows are missing; on exit all is written, and `rows` and
        `state` are read-only memory maps."""
        with contextlib.ExitStack() as stack:
            with self._disk():
                if not self._complete():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with self._alone():
                        self._mend()
                    for name in ("rows", "sums", "done"):
                        column = self.files[name] = Column(self.folder / f"{name}.npy")
                        stack.enter_context(column.file)
            self.committed = time.monotonic()
            try:
                yield
            finally:
                for share in list(self.shares):
                    self._commit(share)
        self.files = {}
        with self._disk():
            self.rows, self.state = self._map("r")
        if self._sums() is None:
            with contextlib.suppress(OSError):  # an older cache, complete but read-only
                write_array(self.folder / "sums.npy", _checksums(self.rows, self.state))

    def missing(self) -> np.ndarray:
        """Numbers of the missing rows."""
        return np.flatnonzero(self.files["done"].read(0, self.shape[0]) == MISSING)

    def wait(self) -> None:
        """Return once the process that encodes the first missing row, if any, has written it or ended."""
        for first in self.missing()[:1].tolist():
            log.info("%s: waiting for the last rows of other processes", self.folder)
            self.files["done"].lock(first, first + 1, wait=True)
            self.files["done"].unlock(first, first + 1)

    def claim(self, start: int, stop: int) -> bool:
        """Whether no other process encodes rows start ... stop - 1; if some are missing, this one is to."""
        done = self.files["done"]
        if done.read(start, stop).all():
            return True
        if not done.lock(start, stop):
            return False
        state = done.read(start, stop)  # again: they may have been written in between
        if state.all():
            done.unlock(start, stop)
        else:
            rows = self.files["rows"].read(start, stop)
            self.shares.append(Share(start, rows, state, np.zeros_like(state)))
        return True

    def lacks(self, rows: Sequence[int]) -> Share | None:
        """The share to which the rows belong, if this process is to encode one of them."""
        for share in self.shares:
            if 0 <= rows[0] - share.start < len(share.state):
                return None if share.state[np.asarray(rows) - share.start].all() else share
        return None

    def encode(
        self, rows: list[int], inputs: Callable[[list[int]], Any], reasons: Mapping[int, str] | None = None
    ) -> None:
        """Encode those batches of `rows` that lack one from `inputs(row numbers)`, and store missing rows.
        `reasons`: why some have no input."""
        size, broken = self.encoder.batch_size, reasons or {}
        autocast = torch.autocast(self.encoder.autocast or "cpu", torch.bfloat16, enabled=self.bf16)
        for batch in (rows[k : k + size] for k in range(0, len(rows), size)):
            if share := self.lacks(batch):
                if good := [row for row in batch if row not in broken]:
                    with autocast:
                        values = self.encoder.encode(inputs(good))
                    share.store(good, DONE, self._values(values, len(good)))
                bad = [row for row in batch if row in broken]
                share.store(bad, BROKEN)
                share.reasons |= {str(row): broken[row] for row in bad}
                if share.state.all() or time.monotonic() - self.committed >= COMMIT_SECONDS:
                    self._commit(share)

    def _values(self, values: Tensor, n: int) -> np.ndarray:
        """An encoder's rows (n, *shape), checked."""
        name, shape, values = self.encoder.name, (n, *self.shape[1:]), values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if values.shape != shape:
            raise DataError(f"the encoder for {name!r} gave {values.shape}, not {shape}; check it")
        with np.errstate(over="ignore"):
            values = values.astype(self.dtype)
        if not np.isfinite(values).all():
            raise DataError(
                f"the encoder for {name!r} gave NaN or more than {self.dtype.name} holds; check its weights"
            )
        return values

    def _commit(self, share: Share) -> None:
        """Write the new rows of a share; give it up if it is complete."""
        complete, new = share.state.all(), np.flatnonzero(share.new)
        if len(new):
            first, last = new[0], new[-1] + 1
            with self._disk():
                self.files["rows"].write(share.start + first, share.rows[first:last])
                if complete:
                    self.files["sums"].write(share.start // BLOCK, _checksums(share.rows, share.state))
                if share.reasons:
                    with self._alone():
                        write_json(self.folder / "skipped.json", self._skipped() | share.reasons)
                self.files["done"].write(share.start + first, share.state[first:last])
            share.new[:], self.committed = False, time.monotonic()
        if complete:
            self.shares.remove(share)
            self.files["done"].unlock(share.start, share.start + len(share.state))

    # -- files ------------------------------------------------

    def _map(self, mode: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows, state) of the files; None if one is missing, truncated or of another shape."""
        try:
            rows = read_array(self.folder / "rows.npy", self.dtype, self.shape, mode)
            return rows, read_array(self.folder / "done.npy", np.uint8, self.shape[:1], mode)
        except DataError:
            return None

    def _complete(self) -> bool:
        maps = self._map("r")
        return maps is not None and bool(maps[1].all()) and not self._damaged(*maps)

    def _mend(self) -> None:
        """Create the files if they do not fit; mark damaged rows as missing."""
        if (maps := self._map("r+")) is None:
            for file in ("done.npy", "rows.npy", "skipped.json", "sums.npy"):
                (self.folder / file).unlink(missing_ok=True)
            if shutil.disk_usage(self.folder).free < self.bytes + self.shape[0]:
                raise self._no_space()
            np.lib.format.open_memmap(self.folder / "rows.npy", "w+", self.dtype, self.shape)
            self._reserve()
            np.lib.format.open_memmap(self.folder / "done.npy", "w+", np.uint8, self.shape[:1])
            maps = self._map("r+")
        rows, state = maps
        if damaged := self._damaged(rows, state):
            log.warning("%s: %d rows are damaged and are computed again", self.folder, len(damaged))
            state[damaged] = MISSING
            state.flush()
        if self._sums() is None:
            write_array(self.folder / "sums.npy", _checksums(rows, state))

    def _sums(self) -> np.ndarray | None:
        """The checksums on the disk, if they fit."""
        try:
            return read_array(self.folder / "sums.npy", np.uint32, (math.ceil(self.shape[0] / BLOCK),))
        except DataError:
            return None

    def _damaged(self, rows: np.ndarray, state: np.ndarray) -> list[int]:
        """Numbers of the done rows in complete blocks that differ from their checksum."""
        state = np.array(state)  # before rows and checksums, since other processes may be writing
        if (sums := self._sums()) is None:
            return []
        damaged = _complete_blocks(state) & (_checksums(rows, state) != sums)
        return [row for row in np.flatnonzero(state == DONE).tolist() if damaged[row // BLOCK]]

    def _skipped(self) -> dict[str, str]:
        """The reasons of broken rows."""
        with contextlib.suppress(DataError):  # none yet, or damaged
            return read_value(self.folder / "skipped.json", by_name(TEXT), sys.maxsize)
        return {}

    def warn(self) -> None:
        """Log the number of broken rows and the first reasons."""
        if reasons := self._skipped():
            first = "; ".join(list(reasons.values())[:3]) + (" ..." if len(reasons) > 3 else "")
            listed = self.folder / "skipped.json"
            log.warning(
                "%d of %d images cannot be used, listed in %s: %s", len(reasons), self.shape[0], listed, first
            )

    def _reserve(self) -> None:
        """Allocate the file's blocks, so that a disk without room is found at once."""
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
    def _alone(self) -> Iterator[None]:
        """Context manager: one process at a time, by the lock of key.json, which the first one writes."""
        with open(self.folder / "key.json", "a") as file:
            lock_bytes(file, 0, 0, wait=True)
            if not os.fstat(file.fileno()).st_size:
                file.write(json.dumps(self.identity, indent=1) + "\n")
            yield

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


def _complete_blocks(state: np.ndarray) -> np.ndarray:
    """Whether each block of rows has no missing one."""
    return np.logical_and.reduceat(state != MISSING, np.arange(0, len(state), BLOCK))


def _checksums(rows: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The CRC-32 of each complete block of rows, uint32; 0 for the others."""
    blocks = [slice(block * BLOCK, (block + 1) * BLOCK) for block in range(math.ceil(len(rows) / BLOCK))]
    sums = [
        zlib.crc32(np.ascontiguousarray(rows[block])) if complete else 0
        for block, complete in zip(blocks, _complete_blocks(state), strict=True)
    ]
    return np.array(sums, np.uint32)
