"""A bank of prompts to search: read once, embedded once, and the exact nearest of millions by cosine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import weights
from columns import LONE_SURROGATE, Arrays, Texts, TextsBuilder, kept
from data import TEXT_KEYS, DataError
from files import (
    MAX_LINE,
    cache_dir,
    exclusive,
    read_array,
    records,
    require_file,
    sha256,
    stamp,
    write_array,
)
from graphs import MAX_PROMPT

VERSION = 1  # of what is kept
CHUNK = 4096  # prompts of a chunk, on average: some 10 to 20 s on one core
# Rounding of a product of two unit rows of 384 numbers in float32, at most: 384 x 2^-24.
ROUNDING = 384 * 2.0**-24


class Bank:
    """Prompts and their embeddings: `texts` (m), `blocks` of unit rows (k, E) float32, whose lengths sum to
    m."""

    def __init__(self, texts: Sequence[str], blocks: Sequence[np.ndarray]):
        self.texts, self.blocks = texts, blocks
        self.starts = np.cumsum([0, *map(len, blocks)])

    def nearest(self, queries: np.ndarray, n: int) -> list[list[tuple[str, float]]]:
        """The `n` prompts with the highest cosine to each unit query (B, E), and these cosines.

        Exact, and independent of the other queries: products in float32 only select the rows that can be
        among the nearest whatever their rounding; cosines in float64 rank these, ties by position.
        """
        query, n = torch.from_numpy(np.ascontiguousarray(queries, np.float32)), min(n, len(self.texts))
        best, found = torch.full((len(query), n), -torch.inf), []
        for start, block in zip(self.starts[:-1].tolist(), self.blocks, strict=True):
            cosines = (torch.from_numpy(block) @ query.T).T  # (B, k)
            of_block = cosines.topk(min(n, len(block))).values
            best = torch.cat([best, of_block], dim=1).topk(n).values
            number, row = (cosines >= best[:, -1:] - 2 * ROUNDING).nonzero(as_tuple=True)
            found.append((number, row + start, cosines[number, row]))
        if not best.isfinite().all():
            raise DataError("an embedding of the searched prompts is not finite; evaluate the run again: "
                            "python eval.py RUN")
        number, row, cosine = (torch.cat(column) for column in zip(*found, strict=True))
        possible = cosine >= best[number, -1] - 2 * ROUNDING
        return [self._ranked(q, row[possible & (number == i)].numpy(), n) for i, q in enumerate(queries)]

    def _ranked(self, query: np.ndarray, rows: np.ndarray, n: int) -> list[tuple[str, float]]:
        block = np.searchsorted(self.starts, rows, side="right") - 1
        values = [self.blocks[b][row - self.starts[b]] for b, row in zip(block, rows, strict=True)]
        cosines = (np.stack(values).astype(np.float64) * query).sum(axis=1)
        order = np.lexsort((rows, -cosines))[:n]
        return [(self.texts[int(rows[i])], float(cosines[i])) for i in order]


def bank_of(texts: Sequence[str], rows: np.ndarray) -> Bank:
    """The bank of prompts whose embeddings (m, E) are at hand."""
    return Bank(texts, [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)])


def open_bank(path: Path, device: str = "cpu") -> Bank:
    """The bank of a file of prompts: one a line, or the text column of a .jsonl or .csv.

    Prompts that are equal but for case and spacing count once. The cache's folder bank-HASH, of the path,
    keeps them in chunks with an embedding file each, so that a stopped call goes on and a changed file is
    embedded only where it changed: a prompt's own hash ends a chunk, wherever the prompt stands. One process
    embeds, others wait. Raises DataError, in one line, for a file that cannot be read or holds no prompt.
    """
    require_file(path)
    name = f"bank-{sha256(str(path.resolve()))[:16]}"
    columns, facts = kept(name, sha256(json.dumps([VERSION, CHUNK, stamp(path)])), lambda: read_bank(path))
    texts = Texts.of(columns, "prompts")
    folder = cache_dir() / name / weights.fingerprint("minilm")[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, f"{folder}: another process embeds these prompts; waiting for it"):
            blocks = embedded_chunks(folder, texts, facts["chunks"], device)
    except OSError as error:
        raise DataError(
            f"{folder}: the embeddings of {path} cannot be kept ({error.strerror or error}); they need "
            f"{len(texts) * 1536 // 10**6 + 1:,} MB; set REVERSE_SD_CACHE to a larger or writable disk"
        ) from error
    return Bank(texts, blocks)


def read_bank(path: Path) -> tuple[Arrays, dict]:
    """The distinct prompts as the column "prompts", and {"chunks": (name, length) of each chunk}."""
    builder, seen, chunks = TextsBuilder(), set(), []
    name, size = blake2b(digest_size=16), 0
    for text in read_prompts(path):
        text = LONE_SURROGATE.sub("\ufffd", " ".join(text.split()))
        mark = int.from_bytes(blake2b(text.casefold().encode(), digest_size=8).digest())
        if not text or len(text) > MAX_PROMPT or mark in seen:
            continue
        seen.add(mark)
        builder.append(text)
        name.update(text.encode() + b"\n")
        size += 1
        if mark % CHUNK == 0 or size == 4 * CHUNK:
            chunks.append((name.hexdigest(), size))
            name, size = blake2b(digest_size=16), 0
    if size:
        chunks.append((name.hexdigest(), size))
    if not chunks:
        raise DataError(f"{path}: holds no prompt; give one prompt a line, or a table with {TEXT_COLUMNS}")
    return builder.texts().arrays("prompts"), {"chunks": chunks}


def embedded_chunks(
    folder: Path, texts: Texts, chunks: Sequence[tuple[str, int]], device: str
) -> list[np.ndarray]:
    """Memory maps of the embeddings (k, E) of each chunk (name, k); those that are missing or damaged are
    computed, and files of other chunks are removed."""
    starts = np.cumsum([0, *(size for _, size in chunks)]).tolist()
    blocks = [_mapped(folder / f"{name}.npy", size) for name, size in chunks]
    if lacking := [k for k, block in enumerate(blocks) if block is None]:
        minilm, left = weights.load("minilm", device=device), sum(chunks[k][1] for k in lacking)
        n = len(texts)
        with tqdm(total=n, initial=n - left, desc="embedding prompts", unit="prompt") as bar:
            for k in lacking:
                name, size = chunks[k]
                rows = minilm.encode(texts[starts[k] : starts[k + 1]], progress=partial(_counted, bar))
                write_array(folder / f"{name}.npy", rows.numpy())
                blocks[k] = _mapped(folder / f"{name}.npy", size)
    for stale in set(os.listdir(folder)) - {f"{name}.npy" for name, _ in chunks}:
        (folder / stale).unlink()
    return blocks


def _counted(bar: tqdm, batches: Iterable[Sequence]) -> Iterator[Sequence]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


def _mapped(path: Path, size: int) -> np.ndarray | None:
    """The rows of a file; None if it is missing or damaged."""
    try:
        return read_array(path, np.float32, (size, None), "c")  # "c": torch warns of read-only memory
    except (OSError, DataError):
        return None


# ============================================================================================================
# Files of prompts
# ============================================================================================================

TEXT_COLUMNS = f"a column {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}"


def read_prompts(path: Path) -> Iterator[str]:
    """The texts of a .jsonl or .csv table, or else the lines of a UTF-8 file."""
    if path.suffix.lower() in (".jsonl", ".csv"):
        rows = (row for _, row in records(path) if isinstance(row, dict))
        values = (next((row[key] for key in TEXT_KEYS if row.get(key) is not None), None) for row in rows)
        yield from (value for value in values if isinstance(value, str))
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from iter(lambda: file.readline(MAX_LINE), "")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
