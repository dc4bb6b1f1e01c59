"""Names: tables from another file's names to ours, and the interpreter that applies them in both directions.

Every model keeps the names of one published checkpoint (its home dialect, see models/). A table holds the
names of another file. A row reads `their name: our name`; it renames a module or a parameter and with it
everything beneath it.

    {level}, {n}, ...         a number: every value that the model at hand has
    "name"                    renamed
    Conv1x1("name")           their matrix (out, in) is our 1x1 convolution (out, in, 1, 1)
    Transposed("name")        their matrix is ours transposed
    StackedQkv("*_proj.weight")   their tensor is our q, k and v stacked along the first axis
    OneOfQkv("qkv", 0)        their tensor is the q (0), k (1) or v (2) of our stacked one
    None                      dropped on purpose, the reason beside it
    "": "name"                every other name lies beneath ours

A name without a row is left as it is, so that strict loading reports it. Nothing here does more than rename,
reshape, split and stack: it works on meta tensors and on gradients as on weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weights.strict import WeightsError


class Conv1x1(str):
    """Our name of a 1x1 convolution that the other dialect stores as a matrix."""


class Transposed(str):
    """Our name of a matrix that the other dialect stores transposed."""


class StackedQkv(str):
    """Our names of three tensors, * standing for q, k and v, that the other dialect stacks into one."""

    def parts(self) -> list[str]:
        return [self.replace("*", letter) for letter in "qkv"]


class OneOfQkv(str):
    """Our name of a stack of three, of which the other dialect's tensor is the one at `index`."""

    index: int

    def __new__(cls, name: str, index: int) -> "OneOfQkv":
        part = super().__new__(cls, name)
        part.index = index
        return part


Row = str | None
Numbers = dict[str, int | str]  # a value for some of a table's fields
Recipe = Callable[[Callable[[str], Tensor]], Tensor]  # one of our tensors, from a function that gives theirs


@dataclass(frozen=True)
class Dialect:
    """One set of names for a kind of model, recognised where `sign` matches the beginning of some name."""

    name: str
    sign: str  # a regex
    table: Mapping[str, Row]
    # From the names in use (theirs or ours): the values that the table's fields take together
    numbers: Callable[[Iterable[str]], list[Numbers]] = lambda names: []
    # Sizes that files of this dialect share, for one without config.json
    lone_file_defaults: Mapping[str, Any] = field(default_factory=dict)
    pictures: str = "hf"  # whose rules resize the pictures of such a checkpoint: "hf", "timm" or "open_clip"


def beneath(prefix: str, table: Mapping[str, Row], *heads: str) -> dict[str, Row]:
    """The table of a model that lies beneath `prefix`, beside heads of its own, which are dropped."""
    return {f"{prefix}.{theirs}": ours for theirs, ours in table.items()} | dict.fromkeys(heads)


def indices_in(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that the regex's group matches at the names' beginnings."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def numbers(pattern: str, field: str = "n") -> Callable[[Iterable[str]], list[Numbers]]:
    """For a table with one field: its values are what the regex's group matches at the names' beginnings."""
    return lambda names: [{field: n} for n in sorted(indices_in(names, pattern))]


def filled_table(dialect: Dialect, names: Iterable[str]) -> dict[str, Row]:
    """The table with every number filled in, for a model with these tensor names (theirs or ours)."""
    numbered = dialect.numbers(list(names))
    rows: dict[str, Row] = {}
    for theirs, ours in dialect.table.items():
        needed = set(re.findall(r"{(\w+)}", theirs + (ours or "")))
        for values in numbered if needed else [{}]:
            if needed <= values.keys():
                rows[theirs.format(**values)] = _filled(ours, values)
    return rows


def _filled(row: Row, values: Numbers) -> Row:
    if row is None:
        return None
    name = row.format(**values)
    return OneOfQkv(name, row.index) if isinstance(row, OneOfQkv) else type(row)(name)


def _split(name: str, rows: Mapping[str, Row]) -> tuple[str, str]:
    """The longest dotted beginning of `name` that has a row, and the rest; ("", name) if there is none."""
    end = len(name)
    while end > 0:
        if name[:end] in rows:
            return name[:end], name[end:]
        end = name.rfind(".", 0, end)
    return "", ("." if "" in rows else "") + name


def map_names(dialect: Dialect, names: Iterable[str]) -> dict[str, Recipe]:
    """Our names, each with its recipe.

    Raises WeightsError for two tensors that claim one name, and for a part that is missing from a stack.
    """
    names = list(names)
    rows = filled_table(dialect, names)
    pieces: dict[str, dict[str, Recipe]] = {}  # our name -> {"": the whole} or {"q": .., "k": .., "v": ..}
    for name in names:
        known, rest = _split(name, rows)
        row = rows.get(known, "")
        if row is None:
            continue
        letter = "qkv"[row.index] if isinstance(row, OneOfQkv) else ""
        made = {(row + rest).removeprefix("."): partial(_reshaped, name, row)}
        if isinstance(row, StackedQkv):
            made = {ours: partial(_third, name, index) for index, ours in enumerate(row.parts())}
        for ours, recipe in made.items():
            held = pieces.setdefault(ours, {})
            if letter in held or (held and "" in (letter, *held)):
                raise WeightsError(f"two tensors for {letter and f'the {letter} of '}{ours}, one is {name}")
            held[letter] = recipe
    for ours, held in pieces.items():
        if "" not in held and (missing := [letter for letter in "qkv" if letter not in held]):
            raise WeightsError(f"{ours} is made of q, k and v, of which there is no {', '.join(missing)}")
    return {ours: held.get("") or partial(_stack, ours, held) for ours, held in pieces.items()}


def to_ours(dialect: Dialect, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of that dialect under our names, in our shapes. Raises WeightsError as `map_names`."""
    return {ours: make(tensors.__getitem__) for ours, make in map_names(dialect, tensors).items()}


def _reshaped(name: str, row: str, theirs: Callable[[str], Tensor]) -> Tensor:
    tensor = theirs(name)
    if isinstance(row, Conv1x1) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor.T if isinstance(row, Transposed) and tensor.ndim == 2 else tensor


def _third(name: str, index: int, theirs: Callable[[str], Tensor]) -> Tensor:
    tensor = theirs(name)
    part = tensor.tensor_split(3)[index] if tensor.ndim else tensor  # strict loading reports wrong shapes
    return part if part.is_meta else part.clone()  # the whole stack need not stay in memory


def _stack(ours: str, held: Mapping[str, Recipe], theirs: Callable[[str], Tensor]) -> Tensor:
    parts = [held[letter](theirs) for letter in "qkv"]
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise WeightsError(f"{ours} is made of q, k and v, whose shapes differ: {sorted(shapes)}")
    first = parts[0]
    if first.is_meta:  # torch.cat on meta would import the whole compiler: 150 MB
        return first.new_empty(3 * len(first), *first.shape[1:])
    return torch.cat(parts)


def to_theirs(dialect: Dialect, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_ours`. Tensors that we drop are not invented: the result lacks them.

    Raises WeightsError for a q without its k and v where they are stored as one.
    """
    rows = filled_table(dialect, tensors)
    backwards = _backwards(rows)
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, rest = _split(name, backwards)
        row = rows.get(backwards.get(known, ""))
        whole = _renamed(name, backwards)
        if isinstance(row, StackedQkv):
            if not all(part in tensors for part in row.parts()):
                raise WeightsError(f"{whole} needs all of {', '.join(row.parts())}")
            if whole not in theirs:
                theirs[whole] = torch.cat([tensors[part] for part in row.parts()])
        elif isinstance(row, OneOfQkv):
            thirds = {other: r.index for other, r in rows.items() if isinstance(r, OneOfQkv) and r == row}
            theirs |= {other + rest: tensor.unflatten(0, (3, -1))[index] for other, index in thirds.items()}
        elif isinstance(row, Conv1x1) and tensor.ndim == 4:
            theirs[whole] = tensor[:, :, 0, 0]
        else:
            theirs[whole] = tensor.T if isinstance(row, Transposed) and tensor.ndim == 2 else tensor
    return theirs


def their_names(dialect: Dialect, names: Iterable[str]) -> Callable[[str], str]:
    """A function from our names to the dialect's, for messages; `names` are those of the file."""
    backwards = _backwards(filled_table(dialect, names))
    return lambda name: _renamed(name, backwards)


def _renamed(name: str, backwards: Mapping[str, str]) -> str:
    known, rest = _split(name, backwards)
    return (backwards.get(known, "") + rest).removeprefix(".")


def _backwards(rows: Mapping[str, Row]) -> dict[str, str]:
    """Our names -> theirs."""
    theirs: dict[str, str] = {}
    for name, row in rows.items():
        if isinstance(row, StackedQkv):
            theirs |= dict.fromkeys(row.parts(), name)
        elif row is not None:
            theirs.setdefault(str(row), name)
    return theirs
