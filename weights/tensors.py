"""Reading .safetensors: what a file holds, without its values, and the values one tensor at a time.

Files are read, not mapped: a mapped file counts in the process's memory beside the model that is made from
it, and one that is changed or cut short while it is mapped changes or kills the process.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.strict import WeightsError

READERS = 2  # tensors that are read at a time
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `nbytes` bytes from `start` in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def meta(self) -> Tensor:
        """A tensor of that dtype and shape without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def stored(path: str | os.PathLike) -> dict[str, Stored]:
    """What a .safetensors file holds, by name, in the order in which it lies there.

    Raises WeightsError for a pickled, missing, truncated or otherwise damaged file.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        if path.stat().st_size == 0:
            raise WeightsError(f"{path} is empty (0 bytes); fetch it again")
        with safe_open(path, framework="pt", device="cpu"):  # checks that header and length agree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: truncated or not a safetensors file ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    header.pop("__metadata__", None)
    if odd := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise WeightsError(f"{path}: holds tensors of dtype {', '.join(odd)}, which is not read here")
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]),
                     8 + length + entry["data_offsets"][0],
                     entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries
    }


def values(entries: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after another; each tensor's memory is its own. Raises WeightsError as
    `stored`.

    The next few are read while the caller looks at one: to check a tensor takes as long as to read it.
    """
    ahead: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(READERS) as readers:
        for name, entry in entries.items():
            ahead.append((name, readers.submit(_value, entry)))
            if len(ahead) > READERS:
                name, tensor = ahead.popleft()
                yield name, tensor.result()
        for name, tensor in ahead:
            yield name, tensor.result()


def _value(entry: Stored) -> Tensor:
    flat = torch.empty(entry.nbytes, dtype=torch.uint8)
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = memoryview(flat.numpy()), 0
            while done < entry.nbytes and (read := file.readinto(view[done:])):
                done += read
    except OSError as error:
        raise WeightsError(f"{entry.path} cannot be read ({error.strerror or error})") from error
    if done < entry.nbytes:
        raise WeightsError(f"{entry.path}: cut short while it was read; fetch it again")
    whole = flat if math.prod(entry.shape) else torch.empty(0, dtype=entry.dtype)
    return whole.view(entry.dtype).reshape(entry.shape)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, by name, on the CPU. Raises WeightsError as `stored`."""
    return dict(values(stored(path)))


def refuse_pickle(path: Path) -> None:
    """Raise WeightsError for a file that only unpickling could read."""
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path} is pickled, and reading such a file can run any program hidden in it; get the "
            f".safetensors file of the same weights, or convert it where you trust it"
        )
