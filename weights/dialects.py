"""Names: from any dialect of a kind to our own, and back (the tables stand in weights/kinds/).

Renaming is all that happens here, with reshaping, splitting and stacking: it works on meta tensors and on
gradients as on weights.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from weights.kinds import KINDS
from weights.kinds.common import Conv1x1, Dialect, Qkv, Row, Third, Transposed
from weights.strict import WeightsError


def dialect_of(kind: str, names: Iterable[str]) -> Dialect:
    """The dialect of `kind` that these tensor names speak. Raises WeightsError if it is none of them."""
    names = list(names)
    for dialect in KINDS[kind].dialects:
        if any(re.match(dialect.sign, name) for name in names):
            return dialect
    spoken = ", ".join(dialect.name for dialect in KINDS[kind].dialects)
    shown = ", ".join(names[:3]) or "nothing at all"
    raise WeightsError(f"no {kind} in any dialect known here ({spoken}); the names are {shown} ...")


def named(kind: str, name: str) -> Dialect:
    """The kind's dialect of that name. Raises WeightsError if it has none."""
    for dialect in KINDS[kind].dialects:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in KINDS[kind].dialects)
    raise WeightsError(f"{kind} has no dialect {name!r}; it has {known}")


def speaks(kind: str, names: Iterable[str]) -> bool:
    """Whether these tensor names are of that kind, in any dialect."""
    try:
        return bool(dialect_of(kind, names))
    except WeightsError:
        return False


def spelling(dialect: Dialect, names: Iterable[str]) -> dict[str, Row]:
    """The dialect's table with every number filled in, for a model with these tensor names (theirs or
    ours)."""
    numbers = dialect.numbers(list(names)) if dialect.numbers else []
    rows: dict[str, Row] = {}
    for theirs, ours in dialect.table.items():
        fields = set(re.findall(r"{(\w+)}", theirs + (ours or "")))
        for values in numbers if fields else [{}]:
            if fields <= values.keys():
                row = ours
                if isinstance(ours, Third):
                    row = ours.format(**values)
                elif ours is not None:
                    row = type(ours)(ours.format(**values))
                rows[theirs.format(**values)] = row
    return rows


# ------------------------------------------------------------------------------------------------------------
# Theirs -> ours
# ------------------------------------------------------------------------------------------------------------


def to_home(kind: str, tensors: Mapping[str, Tensor], dialect: str | None = None) -> dict[str, Tensor]:
    """Tensors of any dialect under our names (and in our shapes); the dialect is told from the names.

    kind: one of weights.kinds.KINDS; names come without a single file's prefix. Names without a row stay as
    they are. What is not stacked shares memory with `tensors`. Raises WeightsError for names of no known
    dialect, for two tensors that claim one name, and for a part that is missing from a stack.
    """
    spoken = named(kind, dialect) if dialect else dialect_of(kind, tensors)
    home: dict[str, Tensor] = {}
    for name, tensor in homeward(spelling(spoken, tensors), tensors.items()):
        if name in home:
            raise WeightsError(f"two tensors for {name}")
        home[name] = tensor
    return home


def homeward(
    rows: Mapping[str, Row], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """`to_home` one tensor at a time, by the filled-in table `rows`: a stack comes with its last part."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        known, rest = _split(name, rows)
        row = rows.get(known, "")
        if isinstance(row, Third):
            parts = stacks.setdefault(row + rest, {})
            if row.index in parts:
                raise WeightsError(f"two tensors for the {'qkv'[row.index]} of {row + rest}, one is {name}")
            parts[row.index] = tensor
            if len(parts) == 3:
                yield row + rest, _stacked(row + rest, [parts[i] for i in range(3)])
                del stacks[row + rest]
        elif row is not None:
            yield from _ours(row, rest, tensor)
    for name, parts in stacks.items():
        lost = ", ".join("qkv"[i] for i in range(3) if i not in parts)
        raise WeightsError(f"{name} is made of q, k and v, of which there is no {lost}")


def our_names(rows: Mapping[str, Row], name: str) -> list[str]:
    """What their tensor `name` becomes; several names for a stack, none for what is dropped."""
    known, rest = _split(name, rows)
    row = rows.get(known, "")
    return [] if row is None else [ours for ours, _ in _ours(row, rest, torch.empty(0, device="meta"))]


def _split(name: str, rows: Mapping[str, Row]) -> tuple[str, str]:
    """The longest dotted beginning of `name` that has a row, and what follows it; ("", name) if there is
    none."""
    end = len(name)
    while end > 0:
        if name[:end] in rows:
            return name[:end], name[end:]
        end = name.rfind(".", 0, end)
    return "", ("." if "" in rows else "") + name


def _ours(row: str, rest: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What one of their tensors is to us."""
    if isinstance(row, Qkv):
        whole = tensor.ndim > 0 and tensor.shape[0] % 3 == 0
        thirds = tensor.unflatten(0, (3, -1)) if whole and tensor.numel() else [tensor] * 3
        return [(row.replace("*", letter), third) for letter, third in zip("qkv", thirds, strict=True)]
    if isinstance(row, Conv1x1) and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    if isinstance(row, Transposed) and tensor.ndim == 2:
        tensor = tensor.T
    return [((row + rest).removeprefix("."), tensor)]


def _stacked(name: str, parts: list[Tensor]) -> Tensor:
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise WeightsError(f"{name} is made of q, k and v, whose shapes differ: {sorted(shapes)}")
    first = parts[0]
    if first.is_meta:  # to join what has no values, torch.cat would import the whole compiler: 150 MB
        return first.new_empty(3 * len(first), *first.shape[1:])
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------
# Ours -> theirs
# ------------------------------------------------------------------------------------------------------------


def from_home(kind: str, tensors: Mapping[str, Tensor], dialect: str = "diffusers") -> dict[str, Tensor]:
    """The reverse of `to_home`, for writing: tensors under our names -> under the names of `dialect`.

    What a dialect holds and we drop is not invented: the result lacks it. Raises WeightsError for a dialect
    that the kind does not have, and for a q without its k and v where they are stored as one.
    """
    rows = spelling(named(kind, dialect), tensors)
    backwards = _backwards(rows)
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, rest = _split(name, backwards)
        spelt = backwards.get(known, "")
        row = rows.get(spelt)
        if isinstance(row, Qkv):
            parts = [row.replace("*", letter) for letter in "qkv"]
            if not all(part in tensors for part in parts):
                raise WeightsError(f"{spelt} needs all of {', '.join(parts)}")
            if spelt not in theirs:
                theirs[spelt] = torch.cat([tensors[part] for part in parts])
            continue
        if isinstance(row, Third):
            for other, same in rows.items():
                if isinstance(same, Third) and same == row:
                    theirs[other + rest] = tensor.unflatten(0, (3, -1))[same.index]
            continue
        if isinstance(row, Conv1x1) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        if isinstance(row, Transposed) and tensor.ndim == 2:
            tensor = tensor.T
        theirs[(spelt + rest).removeprefix(".")] = tensor
    return theirs


def speller(dialect: Dialect, names: Iterable[str]) -> Callable[[str], str]:
    """A function from our names to the dialect's, for messages; `names` are those of the file."""
    backwards = _backwards(spelling(dialect, names))

    def spell(name: str) -> str:
        known, rest = _split(name, backwards)
        return (backwards.get(known, "") + rest).removeprefix(".")

    return spell


def _backwards(rows: Mapping[str, Row]) -> dict[str, str]:
    """Our names -> theirs."""
    theirs: dict[str, str] = {}
    for name, row in rows.items():
        if isinstance(row, Qkv):
            theirs |= {row.replace("*", letter): name for letter in "qkv"}
        elif row is not None:
            theirs.setdefault(str(row), name)
    return theirs
