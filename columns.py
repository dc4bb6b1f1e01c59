"""Columns in NumPy of millions of texts and records: few bytes a row, shared by forked processes, kept."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from archives import LOOSE, MEMBER
from files import DataError, cache_dir, exclusive, json_object, write_json
from graphs import MAX_PROMPT

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
BLOCK = 4096  # rows that an iteration gathers at once


class Rows(Sequence):
    """n rows of shared columns: an index gives one row, a slice a list, equality compares with any sequence.

    row  (n,) int64: which of the stored rows each one is; None for all in order

    A subclass has `_stored(row)`, one stored row.
    """

    def __init__(self, stored: int, row: np.ndarray | None) -> None:
        self.row, self._length = row, stored if row is None else len(row)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._length))]
        i = range(self._length)[i]
        return self._stored(i if self.row is None else int(self.row[i]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str) or len(other) != len(self):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self[:3])) + (", ..." if len(self) > 3 else "")
        return f"{type(self).__name__}({len(self):,}: {first})"


class Texts(Rows):
    """n strings in one UTF-8 buffer, decoded when asked for.

    buffer (bytes,) uint8;  bounds (m + 1,) int64: stored text j is buffer[bounds[j]:bounds[j + 1]]
    """

    def __init__(self, buffer: np.ndarray, bounds: np.ndarray, row: np.ndarray | None = None) -> None:
        super().__init__(len(bounds) - 1, row)
        self.buffer, self.bounds = buffer, bounds

    def _stored(self, row: int) -> str:
        start, end = self.bounds[row : row + 2].tolist()
        return str(self.buffer[start:end], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        buffer = memoryview(self.buffer)
        for start in range(0, len(self), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self)))
            rows = rows if self.row is None else self.row[rows]
            for a, b in zip(self.bounds[rows].tolist(), self.bounds[rows + 1].tolist(), strict=True):
                yield str(buffer[a:b], "utf-8", "surrogatepass")

    def arrays(self, name: str) -> Arrays:
        """The columns to keep under a name; `of` reads them."""
        return {name: self.buffer, f"{name}.bounds": self.bounds}

    @classmethod
    def of(cls, arrays: Arrays, name: str, row: np.ndarray | None = None) -> Texts:
        return cls(arrays[name], arrays[f"{name}.bounds"], row)


class TextsBuilder:
    """Texts, one after the other."""

    def __init__(self) -> None:
        self.buffer, self.bounds = bytearray(), array("q", (0,))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def append(self, text: str) -> None:
        self.buffer += text.encode("utf-8", "surrogatepass")
        self.bounds.append(len(self.buffer))

    def texts(self) -> Texts:
        return Texts(np.frombuffer(self.buffer, np.uint8), np.frombuffer(self.bounds, np.int64))


# A record's usual keys: the type that its column holds, the column's type, and the mark of all other values.
USUAL = {"se": (int, "q", -(1 << 63)), "c": (float, "d", -math.inf), "st": (int, "i", -(1 << 31)),
         "sa": (str, "b", -1)}  # fmt: skip
WORDS = 127  # distinct strings of "sa", which a byte numbers


class Records(Rows):
    """n dicts: what USUAL names in columns of numbers, all else as JSON.

    columns {key: (m,)};  words: the strings that the column "sa" numbers;  rest: JSON or "" for each, or None
    """

    def __init__(self, columns: Arrays, words: list[str], rest: Texts | None,
                 row: np.ndarray | None = None) -> None:
        super().__init__(len(columns["se"]), row)
        self.columns, self.words, self.rest = columns, words, rest

    def _stored(self, row: int) -> dict:
        record = {}
        for key, (kind, _, other) in USUAL.items():
            value = self.columns[key][row].item()
            if value != other:
                record[key] = self.words[value] if kind is str else value
        return record | (json.loads(text) if self.rest and (text := self.rest[row]) else {})

    def arrays(self, name: str) -> Arrays:
        """The columns to keep under a name; `of` reads them."""
        columns = {f"{name}.{key}": column for key, column in self.columns.items()}
        return columns | (self.rest.arrays(f"{name}.rest") if self.rest else {})

    @classmethod
    def of(cls, arrays: Arrays, name: str, words: list[str], row: np.ndarray | None = None) -> Records:
        rest = Texts.of(arrays, f"{name}.rest") if f"{name}.rest" in arrays else None
        return cls({key: arrays[f"{name}.{key}"] for key in USUAL}, words, rest, row)


class RecordsBuilder:
    """Records, one after the other; they become columns in blocks."""

    def __init__(self) -> None:
        self.columns = {key: array(code) for key, (_, code, _) in USUAL.items()}
        self.words: dict[str, int] = {}
        self.rest, self.pending = TextsBuilder(), []

    def append(self, record: dict) -> None:
        self.pending.append(record)
        if len(self.pending) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        usual = np.zeros(len(self.pending), np.int64)
        for key, (kind, code, other) in USUAL.items():
            values = [record.get(key) for record in self.pending]
            values = [value if type(value) is kind else other for value in values]
            if kind is str:
                values = [self._number(word) for word in values]
            column = _array(code, values, other)
            self.columns[key] += column
            usual += np.asarray(column) != other
        for i, count in enumerate(usual.tolist(), -len(usual)):
            record = self.pending[i]
            rest = "" if count == len(record) else json.dumps(
                {key: value for key, value in record.items()
                 if key not in USUAL or self.columns[key][i] == USUAL[key][2]})  # fmt: skip
            self.rest.append(rest)
        self.pending = []

    def _number(self, word: str | int) -> int:
        """The number of a word; -1 for what is none, and for a new one if there are WORDS already."""
        if isinstance(word, str) and word not in self.words and len(self.words) < WORDS:
            self.words[word] = len(self.words)
        return self.words.get(word, -1)

    def records(self) -> Records:
        self._flush()
        columns = {key: np.frombuffer(column, column.typecode) for key, column in self.columns.items()}
        return Records(columns, list(self.words), self.rest.texts() if self.rest.buffer else None)


def _array(code: str, values: list, other: int | float) -> array:
    """The values as an array; `other` for those that it cannot hold."""
    try:
        return array(code, values)
    except OverflowError:
        limit = 1 << 8 * array(code).itemsize - 1
        return array(code, [value if -limit <= value < limit else other for value in values])


# ============================================================================================================
# Pairs
# ============================================================================================================

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON allows them; no tokenizer does


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def place_of(archive: Path, name: str) -> str:
    """An image's name in errors: `archive.zip!member`, or the file's path."""
    return f"{archive}!{name}" if is_zip(archive) else str(archive / name)


class PairsBuilder:
    """The pairs that a reader has gathered so far, and what it has passed over."""

    def __init__(self) -> None:
        self.prompts, self.names, self.meta = TextsBuilder(), TextsBuilder(), RecordsBuilder()
        self.archive, self.member = array("i"), bytearray()
        self.archives: list[Path] = []
        self.skipped: list[str] = []
        self.reasons: Counter[str] = Counter()

    def add(self, archive: Path, name: str, text: Any, meta: dict, member: bytes = LOOSE) -> None:
        """One pair, or one for each of a list of texts; "" stands for a missing one (None, NaN)."""
        if not self.archives or (archive is not self.archives[-1] and archive != self.archives[-1]):
            self.archives.append(archive)
        texts = text if isinstance(text, list) and text else [text]
        for text in texts:
            if text is None or text != text:
                text = ""
            if not isinstance(text, str):
                self.skip(place_of(archive, name), "its text is no string", type(text).__name__)
            elif len(text) > MAX_PROMPT:
                self.skip(place_of(archive, name), f"its prompt is longer than {MAX_PROMPT:,} characters")
            else:
                text = text.strip()
                self.prompts.append(text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text))
                self.names.append(name)
                self.meta.append(meta)
                self.archive.append(len(self.archives) - 1)
                self.member += member

    def skip(self, where: object, why: str, detail: object = None) -> None:
        self.skipped.append(f"{where}: {why}" + ("" if detail is None else f" ({detail})"))
        self.reasons[why] += 1

    def columns(self) -> tuple[Arrays, dict]:
        """All that was gathered: the columns, and JSON of the rest."""
        meta = self.meta.records()
        columns = self.prompts.texts().arrays("prompts") | self.names.texts().arrays("names")
        columns |= meta.arrays("meta") | {"archive": np.frombuffer(self.archive, np.int32),
                                          "member": np.frombuffer(self.member, MEMBER)}
        return columns, {"archives": list(map(str, self.archives)), "words": meta.words,
                         "skipped": self.skipped, "reasons": self.reasons}


# ============================================================================================================
# On disk
# ============================================================================================================


def kept(name: str, key: str, make: Callable[[], tuple[Arrays, dict]]) -> tuple[Arrays, dict]:
    """(columns, facts as JSON) of the cache's folder `name`, mapped into memory, if it holds those of `key`;
    else what `make` returns, and kept there.

    One process makes them, others wait. Damaged files are made again; where the cache cannot be written,
    nothing is kept.
    """
    with ExitStack() as stack:
        try:
            folder = cache_dir() / name
            if found := _loaded(folder, key):
                return found
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder, f"{folder}: another process fills it; waiting"))
        except (OSError, DataError) as error:  # no home
            log.info("%s is not kept: %s", name, error)
            return make()
        if found := _loaded(folder, key):
            return found
        arrays, facts = make()
        try:
            sums = {column: _save(folder / f"{column}.npy", values) for column, values in arrays.items()}
            index = {"key": key, "sums": sums, "facts": facts}
            write_json(folder / "index.json", index | {"sum": _sum_of(index)})
            return {column: _mapped(folder / f"{column}.npy") for column in arrays}, facts
        except OSError as error:
            log.info("%s is not kept: %s", name, error)
            return arrays, facts


def _loaded(folder: Path, key: str) -> tuple[Arrays, dict] | None:
    """The columns and facts of a folder; None unless they are those of `key` and undamaged."""
    try:
        index = json_object((folder / "index.json").read_text("utf-8")) or {}
        if index.pop("sum", None) != _sum_of(index) or index["key"] != key:
            return None
        files = {column: (folder / f"{column}.npy", value) for column, value in index["sums"].items()}
        if any(_checksum(file) != value for file, value in files.values()):
            return None
        return {column: _mapped(file) for column, (file, _) in files.items()}, index["facts"]
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _save(path: Path, values: np.ndarray) -> int:
    """The checksum of the .npy file written; a process that has mapped a former one keeps that."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return _checksum(path)


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped unless it is small: an empty one cannot be. A view as a plain array is
    read faster than a memmap."""
    mode = "r" if path.stat().st_size > BLOCK else None
    return np.load(path, mode, allow_pickle=False).view(np.ndarray)


def _sum_of(index: dict) -> int:
    """The CRC-32 of an index."""
    return zlib.crc32(json.dumps(index).encode())


def _checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
