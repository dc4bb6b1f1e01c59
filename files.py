"""Users' files and tables, read within limits, so that none waits, fills the memory or loses a row unseen;
atomic writes; the lock of a folder."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from tokenize import TokenError  # by NumPy, for a damaged header
from typing import IO, Any, TextIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: there processes that share a folder do not wait for each other
    fcntl = None

logger = logging.getLogger(__name__)

MAX_JSON = 1 << 26  # bytes of one JSON file; as Python's objects it may take thirty times as much
MAX_LINE = 1 << 24  # characters of a line of a table
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # NFS locks no folder
ZIP_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, RuntimeError,
              ValueError)
has_drive = re.compile("[A-Za-z]:").match


class DataError(ValueError):
    """Something is wrong with the user's data or disk; one line says which file, what, and what to do."""


def cache_dir() -> Path:
    """The folder of everything that is built or fetched once: $REVERSE_SD_CACHE, or ~/.cache/reverse-sd."""
    return expanded(os.environ.get("REVERSE_SD_CACHE") or "~/.cache/reverse-sd")


def number_in_environment(name: str, least: int) -> int:
    """The whole number in a variable, `least` where it is not set. Raises DataError for any other text."""
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise DataError(f"{name}={text}: must be a whole number from {least} on; unset it")
    return int(text)


def expanded(path: str | os.PathLike) -> Path:
    """The path with the home folder for its ~. Raises DataError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no such home folder; write the folder out, or set "
                        "REVERSE_SD_CACHE to one for everything that is fetched or built") from error


def sha256(text: str) -> str:
    """The hexadecimal SHA-256 of a text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def stamp(path: Path) -> str:
    """A file's name, size and time of change, equal while the file is the same."""
    try:
        state = path.stat()
    except OSError:
        return f"{path.name} is missing"
    return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def files_below(root: Path, unreadable: Callable[[str, str], None]) -> list[Path]:
    """All files below a folder, sorted; links to folders are followed, but no folder is read twice.

    unreadable: called with a folder that cannot be listed, and why. Files that a Mac writes beside those of
    others (`._a.png`, __MACOSX) are left out.
    """
    files, seen, roots = [], set(), deque([str(root)])

    def failed(error: OSError) -> None:
        unreadable(error.filename, error.strerror)

    while roots:
        for folder, below, names in os.walk(roots.popleft(), onerror=failed):
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in seen:
                below.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            inner = (os.path.join(folder, name) for name in sorted(below))
            roots += [path for path in inner if os.path.islink(path)]  # last: a folder's own name comes first
            files += [Path(folder, name) for name in names if not is_junk(name)]
    return sorted(file for file in files if not is_junk(str(file.relative_to(root))))


def is_junk(name: str) -> bool:
    """Whether a Mac wrote the file for itself, beside one of the same name."""
    if "__MACOSX" not in name and "._" not in name:
        return False
    parts = name.replace("\\", "/").split("/")
    return "__MACOSX" in parts or parts[-1].startswith("._")


def is_safe(name: str) -> bool:
    """Whether the name of a member stays within its archive."""
    parts = name.replace("\\", "/").split("/")
    return bool(parts[0]) and ".." not in parts and not has_drive(name)


def require_file(path: Path, limit: int = sys.maxsize) -> None:
    """Raise DataError unless the path is a regular file of at most `limit` bytes: a pipe may have no end."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: no such file or folder ({why}); check the path") from error
    if not S_ISREG(state.st_mode):
        raise DataError(f"{path}: is no regular file; give one, or a folder")
    if state.st_size > limit:
        raise DataError(f"{path}: is larger than {limit >> 20} MB; split it, or write one line a pair")


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes. Raises DataError for any other."""
    require_file(path, limit)
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error


def read_array(
    path: Path, dtype: Any, shape: tuple[int | None, ...], mode: str | None = None
) -> np.ndarray:
    """The array of a .npy file, or a memory map of it by NumPy's `mode`. Raises DataError unless it is a
    regular file with that dtype and shape, None for any length; OSError for one that may not be read.
    """
    require_file(path)
    try:
        array = np.load(path, mode, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TokenError, MemoryError) as error:
        raise DataError(f"{path}: is no sound .npy file ({error}); restore it") from error
    found = getattr(array, "shape", ()), getattr(array, "dtype", None)  # neither has the .npz of several
    if len(found[0]) != len(shape) or any(b not in (None, a) for a, b in zip(found[0], shape, strict=True)):
        raise DataError(f"{path}: has the shape {found[0]}, not {shape}; restore it")
    if found[1] != dtype:
        raise DataError(f"{path}: holds {found[1]}, not {np.dtype(dtype)}; restore it")
    return array


def unzip(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's bytes. Raises one of ZIP_ERRORS where it is damaged or unpacks to more than `limit`."""
    if archive.getinfo(name).file_size > limit:
        raise ValueError(f"{name} unpacks to more than {limit >> 20} MB")
    return archive.read(name)


def sizes_and_sums(files: Sequence[Path], others: set[int]) -> list[tuple[int, int]]:
    """(size, CRC-32) of each file. Only those are read that have the size of another or one of `others`; a
    file that cannot be read has a size below zero that no other has."""
    sizes = {file: _size(file) for file in dict.fromkeys(files)}
    count, marks = Counter(sizes.values()), {}
    for k, (file, size) in enumerate(sizes.items()):
        alike = size is not None and (count[size] > 1 or size in others)
        marks[file] = (-1 - k if size is None else size, zlib.crc32(file.read_bytes()) if alike else 0)
    return [marks[file] for file in files]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if os.access(path, os.R_OK) and path.is_file() else None
    except OSError:
        return None


def numbered(values: Iterable[Hashable]) -> list[int]:
    """Equal numbers for equal values, in the order of their first."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def json_object(text: str) -> dict | None:
    """The JSON object of a text, None if it is no such."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def records(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number, object with lower-case keys, or what is wrong with it) of a JSONL or CSV file.

    Raises DataError for a file that is not regular, not UTF-8, or has a line of MAX_LINE characters.
    """
    require_file(path)
    limit = csv.field_size_limit(MAX_LINE)  # prompts of 10,000 words pass csv's own limit
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = _lines(path, file)
            yield from _csv_rows(lines) if path.suffix.lower() == ".csv" else _json_rows(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 {path.suffix}") from error
    finally:
        csv.field_size_limit(limit)


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for line in iter(lambda: file.readline(MAX_LINE), ""):
        if len(line) == MAX_LINE:
            raise DataError(f"{path}: a line has {MAX_LINE:,} characters or more; shorten it or remove it")
        yield line


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict | str]]:
    for k, line in enumerate(lines, 1):
        if line.strip():
            row = json_object(line)
            yield k, "does not parse" if row is None else {key.lower(): row[key] for key in row}


def _csv_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict | str]]:
    reader = csv.reader(lines, strict=True)  # else an open quote swallows rows, and others lose their quotes
    keys = [key.strip().lower() for key in next(reader, [])]
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"does not parse ({error})"
            continue
        if fields is None:
            return
        if len(fields) > len(keys):
            yield reader.line_num, "has more fields than the first line; put texts with commas in quotes"
        elif fields:
            yield reader.line_num, dict.fromkeys(keys) | dict(zip(keys[:len(fields)], fields, strict=True))


def parquet_names(table: Path, name: str, column: str, value: float) -> set[str]:
    """The `name`s of the rows whose `column` is `value`; none, and a warning, without pyarrow.

    In batches: as Python's objects DiffusionDB's 14 million rows would take 4 GB.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        logger.warning("%s is not read: `pip install pyarrow` to drop rows of %s %s", table, column, value)
        return set()
    names: set[str] = set()
    try:
        file = parquet.ParquetFile(table, buffer_size=1 << 20, pre_buffer=False)
        for batch in file.iter_batches(columns=[name, column], use_threads=False):
            rows = np.flatnonzero(np.asarray(batch.column(column), np.float64) == value)
            names.update(batch.column(name).take(rows).to_pylist())
    except (ArrowException, OSError, KeyError) as error:
        raise DataError(f"{table}: cannot be read ({error}); fetch it again or remove it") from error
    return names


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write the file whole or not at all: a temporary file beside it, synced, takes its place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # not the temporary's
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, and its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically, and its folder if missing."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


@contextmanager
def exclusive(folder: str | Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the folder's lock: wait for another process that holds it, logging `waiting`, or, where `waiting`
    is None, raise BlockingIOError. The system releases the lock however the process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            logger.warning(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: cannot be locked; use it in one command at a time", folder)
        yield
    finally:
        os.close(descriptor)


def lock_bytes(file: IO, start: int, length: int, wait: bool = False) -> bool:
    """Whether this process now holds the lock of bytes of a file open for writing, of all if `length` is 0;
    with `wait`, once it does. True also where there are no locks.

    The lock is the process's own: closing any descriptor of the file gives it up, and so does the process's
    end.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def unlock_bytes(file: IO, start: int, length: int) -> None:
    """Give up a lock by `lock_bytes`."""
    if fcntl is not None:
        with suppress(OSError):  # there are no locks
            fcntl.lockf(file, fcntl.LOCK_UN, length, start)
