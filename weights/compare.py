"""The comparison of a port with golden files (golden.py): differences, lacking and unknown tensors."""

import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from files import require_file
from weights.files import Stored, read_json, stored_tensors
from weights.golden import NUDGE, VERSION, rms, share_of
from weights.strict import WeightsError, listed

# A float32 port may be this many times as far from float64 as this project's own float32 run: the largest
# difference, and the root mean square. Ports of the U-Net's encoder in NumPy and JAX reach 0.7 of that.
LARGEST, MEAN = 8.0, 4.0
# ... and the rounding of a tensor counts as this at least, as a share of its largest value and of its RMS
LEAST = 2.0**-23
FLOAT64 = 1e-10  # tolerance of a float64 port, as a share of the largest value
CONSTANTS = 1e-5  # of constants: sinusoids of angles that were computed in float32
# A norm's output differs where it holds this share of the change of a smaller epsilon. Where rounding alone
# looks like more than VISIBLE, the epsilon counts as not seen.
EPSILON, VISIBLE = 0.5, 0.12
TINY = 1e-300  # instead of 0 below a fraction bar
PARTS = ("constants", "activations", "outputs")


@dataclass(frozen=True)
class Difference:
    """One tensor of both sides. `size`: the largest difference, in float32 as a multiple of the rounding,
    else as a share of the golden one's largest value."""

    name: str
    size: float
    problem: str  # "" where it is within the tolerance


@dataclass(frozen=True)
class Report:
    """A port's comparison. Names are in the order in which the layers ran."""

    differences: list[Difference]  # of every tensor that both have
    total: int  # golden activations and outputs
    lacking: list[str]  # golden activations and outputs that the port lacks
    ends: list[str]  # lacking outputs, where the port has no activation equal to them either
    unknown: list[str]  # the port's tensors that no golden one is named like
    unseen: list[str]  # norms whose epsilon may be a tenth wrong at this precision
    precision: str  # of the port
    tolerance: str  # in words

    @property
    def wrong(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.problem]

    @property
    def status(self) -> int:
        """0: every output is there, nothing differs, no name is unknown; 1: a tensor differs; 3: else."""
        return 1 if self.wrong else 3 if self.ends or self.unknown else 0

    def lines(self) -> list[str]:
        """The report in words, the verdict first."""
        seen, wrong = self.differences, self.wrong
        if wrong:
            before = seen[: seen.index(wrong[0])]
            lines = [f"{wrong[0].name} is the first that differs: {wrong[0].problem}"]
            lines += [f"{len(before)} before it agree, the last of them {before[-1].name}"] if before else []
            lines += [f"{len(wrong)} of {len(seen)} tensors differ"]
        else:
            worst = max(seen, key=lambda difference: difference.size)
            count = f"{len(seen)} compared" if self.lacking or self.unknown else f"all {len(seen)}"
            lines = [f"{count} tensors agree in {self.precision}, {self.tolerance}; worst: {worst.name}, "
                     f"{worst.size:.1e}"]
        names = {
            f"no success: {len(self.unknown)} names are not in the golden files": self.unknown,
            f"no success: {len(self.ends)} outputs are not in OTHER": self.ends,
            f"{len(self.lacking)} of {self.total} golden tensors are not in OTHER": self.lacking,
            f"in {self.precision} an epsilon that is {NUDGE:.0%} wrong cannot be seen at {len(self.unseen)} "
            f"norms": self.unseen,
        }
        return lines + [f"{text}: {listed(some)}" for text, some in names.items() if some]


def compare(folder: str | os.PathLike, other: str | os.PathLike, tolerance: float | None = None) -> Report:
    """The comparison of `other` with the golden files in `folder`.

    other      a folder of a port's .safetensors named as the golden ones (constants, activations, outputs),
               one .safetensors file, or an .npz of arrays. A port may leave out constants and activations.
    tolerance  largest difference as a share of the largest value; None: 1e-10 in float64, and in float32
               the measured rounding of each tensor times LARGEST (root mean square: MEAN)

    Raises WeightsError for golden files or a port that cannot be read, for a port in half precision, and
    where there is nothing to compare.
    """
    folder, other = Path(folder), Path(other)
    wanted, index, ours = _index(folder)
    theirs = _port(other)
    compared = [(part, entry) for part in PARTS for entry in index[part] if entry["name"] in theirs]
    floats = {entry["name"]: str(theirs[entry["name"]].dtype).removeprefix("torch.")
              for part, entry in compared if part != "constants"}
    if not floats:
        shown = listed(list(theirs)[:3])
        raise WeightsError(f"{other}: none of its names ({shown} ...) is an activation or output of {folder}")
    for name, dtype in floats.items():
        if dtype not in ("float32", "float64"):
            raise WeightsError(f"{other}: {name} is {dtype}; a port is compared in float32 or float64 only")
    precision = min(floats.values())
    judge = _Judge(stored_tensors(folder / "epsilons.safetensors"), precision, wanted, tolerance)
    differences = [judge(part, entry, ours[part][entry["name"]], theirs[entry["name"]])
                   for part, entry in compared]
    golden = [entry for part in PARTS[1:] for entry in index[part]]
    known = {entry["name"] for part in index for entry in index[part]}
    return Report(
        differences,
        total=len(golden),
        lacking=[entry["name"] for entry in golden if entry["name"] not in theirs],
        ends=[entry["name"] for entry in index["outputs"]
              if not {entry["name"], *entry["equal"]} & theirs.keys()],
        unknown=[name for name in theirs if name not in known],
        unseen=judge.unseen,
        precision=precision,
        tolerance=judge.words,
    )


class _Judge:
    """The tolerance at one precision; `unseen` collects the norms whose epsilon cannot be judged."""

    def __init__(self, nudges: Mapping[str, Stored], precision: str, wanted: str, tolerance: float | None):
        self.nudges, self.wanted, self.unseen = nudges, wanted, []
        self.tolerance = FLOAT64 if tolerance is None and precision == "float64" else tolerance
        self.finer = 1 if precision == "float32" else 2.0**-22  # than float32: 2^-29, and some room
        self.words = f"within {LARGEST:g} times its rounding" if self.tolerance is None else (
            f"to {self.tolerance:.0e} of the largest value")

    def __call__(
        self, part: str, entry: Mapping[str, Any], ours: Stored, theirs: "Stored | Array"
    ) -> Difference:
        name = entry["name"]
        if ours.shape != theirs.shape:
            return Difference(name, math.inf, f"shape {theirs.shape} instead of {ours.shape}")
        a, b = ours.read().double(), theirs.read().double()
        off = b - a
        worst, largest = (float(x.abs().max()) if x.numel() else 0.0 for x in (off, a))
        share = worst / largest if largest else worst
        problem = f"off by {worst:.2e}, values reach {largest:.2e}"
        if part == "constants":
            most = CONSTANTS if ours.dtype.is_floating_point else 0
            return Difference(name, share, "" if share <= most else problem)
        if self.wanted == "float64" and str(theirs.dtype).endswith("float32"):
            return Difference(name, share, "float32 instead of float64, the precision of the golden inputs")
        size, most = share, self.tolerance
        if most is None:
            rounding = [max(value, LEAST * scale) for value, scale in
                        zip(entry["rounding"], (largest, rms(a)), strict=True)]
            size = max(worst / max(rounding[0], TINY), rms(off) / max(rounding[1], TINY) * LARGEST / MEAN)
            most, problem = LARGEST, f"{problem}, float32 rounds by {rounding[0]:.0e}"
        agrees = size <= most  # not for NaN
        epsilon = self._epsilon(entry, off, agrees) if "epsilon" in entry else ""
        problems = ("" if agrees else problem, epsilon)
        return Difference(name, size, ", ".join(text for text in problems if text))

    def _epsilon(self, entry: Mapping[str, Any], off: Tensor, agrees: bool) -> str:
        """The epsilon that the port's norm seems to have, where that is another one."""
        nudge = self.nudges[entry["name"]].read().double()
        share = share_of(off, nudge)
        rest = rms(off - share * nudge)
        blur = max(entry["blur"] * self.finer, rest / max(rms(nudge), TINY) / off.numel() ** 0.5)
        if agrees and not blur <= VISIBLE:
            self.unseen.append(entry["name"])
        elif abs(share) > EPSILON and (agrees or rest < rms(off) / 2):
            other = entry["epsilon"] * (1 - NUDGE * share)
            return f"as with an epsilon of {other:.1e} instead of {entry['epsilon']:.1e}"
        return ""


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------

Index = dict[str, list[dict[str, Any]]]
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _index(folder: Path) -> tuple[str, Index, dict[str, dict[str, Stored]]]:
    """The precision of the golden inputs, index.json's lists by part, and the tensors that they name."""
    path = folder / "index.json"
    if not path.is_file():
        raise WeightsError(f"{folder} holds no index.json; write it: python -m weights golden KIND DIR")
    index = read_json(path)
    if index.get("version") != VERSION:
        raise WeightsError(f"{path}: not of version {VERSION}; write the golden files again")
    lists: Index = {part: index.get(part) for part in ("inputs", *PARTS)}
    stored = {part: stored_tensors(folder / f"{part}.safetensors") for part in PARTS}
    nudges = stored_tensors(folder / "epsilons.safetensors")
    try:
        sound = index["dtype"] in ("float32", "float64") and isinstance(lists["inputs"], list)
        for part in PARTS:
            sound &= {entry["name"]: tuple(entry["shape"]) for entry in lists[part]} == {
                name: tensor.shape for name, tensor in stored[part].items()}
        for entry in lists["activations"] + lists["outputs"]:
            largest, mean = entry["rounding"]
            sound &= largest >= 0 and mean >= 0
            if "epsilon" in entry:
                sound &= entry["name"] in nudges and min(entry["blur"], entry["epsilon"]) >= 0
        sound &= all(isinstance(entry["equal"], list) for entry in lists["outputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: damaged ({error!r}); write the golden files again") from error
    if not sound:
        raise WeightsError(f"{path}: not of the tensors beside it; write the golden files again")
    return index["dtype"], lists, stored


@dataclass(frozen=True)
class Array:
    """One array in an .npz, unread."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> Tensor:
        """The array, in memory. Raises WeightsError for a damaged file."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise WeightsError(f"{self.path}: {self.member} is damaged ({error}); write it again") from error


def _arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by name; their headers alone are read."""
    arrays = {}
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    read = HEADERS[np.lib.format.read_magic(file)]
                    shape, _, dtype = read(file)
                arrays[member.removesuffix(".npy")] = Array(path, member, shape, dtype)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path}: no arrays can be read from it ({error}); write it again") from error
    return arrays


def _port(path: Path) -> dict[str, Stored | Array]:
    """The tensors of a port's folder or file by name, unread."""
    if path.suffix == ".npz" and not path.is_dir():
        return dict(_arrays(path))
    if not path.is_dir():
        return dict(stored_tensors(path))
    files = [path / f"{part}.safetensors" for part in PARTS]
    if not any(file.is_file() for file in files[1:]):
        raise WeightsError(f"{path} holds neither {files[1].name} nor {files[2].name}")
    return {name: tensor for file in files if file.is_file() for name, tensor in stored_tensors(file).items()}
