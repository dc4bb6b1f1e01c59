"""Golden files for porters: a model's outputs for given inputs, layer by layer, and how a port compares.

A folder holds index.json (kind, sizes, names and shapes in the order in which the layers ran) and four files
of safetensors: inputs, activations (the output of every layer under its name), outputs, and weights under
our names.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weights.files import read_json, read_tensors
from weights.kinds import find_kind
from weights.sources import load
from weights.strict import WeightsError

VERSION = 1


@dataclass(frozen=True)
class Draw:
    """Random inputs, `batch` at once, always the same for one seed."""

    batch: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, dtype=torch.float32)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (self.batch, *shape), generator=self.generator)


@torch.no_grad()
def golden(
    kind: str,
    folder: str | os.PathLike,
    source: str | os.PathLike | None = None,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write the golden files of `kind` in `source` to `folder`; returns the activations' names in order.

    Computed on the CPU in `dtype`. A layer that runs more than once has its later outputs under `name#1`, and
    so on. Raises WeightsError as `load` does, and if the folder holds anything already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already, and not an empty folder; give another one")
    entry, model = find_kind(kind), load(kind, source, dtype=dtype)
    drawn = entry.example_inputs(model.config, Draw(batch, torch.Generator().manual_seed(seed)))
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in drawn.items()}
    activations: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output  # BLIP's layers give their cache too
            if isinstance(output, Tensor):
                times = sum(key.partition("#")[0] == name for key in activations)
                activations[f"{name}#{times}" if times else name] = output.detach().clone().contiguous()
        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        outputs = entry.outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    folder.mkdir(parents=True, exist_ok=True)
    index = {"version": VERSION, "kind": kind, "seed": seed, "torch": torch.__version__,
             "config": asdict(model.config)}
    for part, tensors in {"inputs": inputs, "activations": activations, "outputs": outputs}.items():
        _save(tensors, folder / f"{part}.safetensors")
        index[part] = [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype).split(".")[1]}
                       for name, value in tensors.items()]
    _save(model.state_dict(), folder / "weights.safetensors")
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")  # last: it makes the folder whole
    return list(activations)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)


@dataclass(frozen=True)
class Difference:
    """One tensor of both sides: the largest difference, as a share of the largest value of the golden one."""

    name: str
    share: float
    problem: str  # "" where it is within the tolerance


def compare(
    folder: str | os.PathLike, other: str | os.PathLike, tolerance: float = 1e-4
) -> Iterator[Difference]:
    """Every activation and output that `other` has too, in the order in which the layers ran.

    other: a folder written as `golden` does it (index.json is not needed, nor every activation), one
    .safetensors file, or an .npz of arrays. Raises WeightsError where there is nothing to compare.
    """
    folder, other = Path(folder), Path(other)
    if not (folder / "index.json").is_file():
        raise WeightsError(f"{folder} holds no index.json; write it: python -m weights golden KIND DIR")
    index = read_json(folder / "index.json")
    theirs, found = _port(other), 0
    for part in ("activations", "outputs"):
        ours = read_tensors(folder / f"{part}.safetensors")
        for entry in index[part]:
            name = entry["name"]
            if name in theirs:
                found += 1
                yield Difference(name, *_difference(ours[name], theirs[name], tolerance))
    if not found:
        raise WeightsError(f"{other}: none of its names ({', '.join(list(theirs)[:3])} ...) is in {folder}")


def _difference(a: Tensor, b: Tensor, tolerance: float) -> tuple[float, str]:
    if a.shape != b.shape:
        return float("inf"), f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
    a, b = a.double(), b.double()
    scale = float(a.abs().max()) if a.numel() else 0.0
    worst = float((a - b).abs().max()) if a.numel() else 0.0
    share = worst / scale if scale else worst
    return share, "" if share <= tolerance else f"off by {worst:.2e}, values reach {scale:.2e}"  # NaN too


def _port(path: Path) -> dict[str, Tensor]:
    """The tensors of a port's folder or file, by name."""
    if path.is_dir():
        parts = ("activations.safetensors", "outputs.safetensors")
        files = [path / part for part in parts if (path / part).is_file()]
        if not files:
            raise WeightsError(f"{path} holds neither {' nor '.join(parts)}")
        return {name: value for file in files for name, value in read_tensors(file).items()}
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: no arrays can be read from it ({error})") from error
    return read_tensors(path)
