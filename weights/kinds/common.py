"""What every kind of model states: its dialects as tables of names, and how its sizes are told.

Every model keeps the names of one published checkpoint (its home dialect, see models/). A table holds how
another file spells them. A row reads `their name: our name`; it renames a module or a parameter and with it
everything beneath it.

    {level}, {n}, ...         a number: every value that the model at hand has
    "name"                    renamed
    Conv1x1("name")           their matrix (out, in) is our 1x1 convolution (out, in, 1, 1)
    Transposed("name")        their matrix is ours transposed
    Qkv("*_proj.weight")      their tensor is our q, k and v stacked along the first axis
    Third("qkv", 0)           their tensor is the q (0), k (1) or v (2) of our stacked one
    None                      dropped on purpose, the reason beside it

A name without a row is left as it is, so that strict loading reports it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn

from weights.strict import WeightsError, listed


class Conv1x1(str):
    """Our name of a 1x1 convolution that the other dialect stores as a matrix."""


class Transposed(str):
    """Our name of a matrix that the other dialect stores transposed."""


class Qkv(str):
    """Our names of three tensors, * standing for q, k and v, that the other dialect stacks into one."""


class Third(str):
    """Our name of a stack of three, of which the other dialect's tensor is the one at `index`."""

    index: int

    def __new__(cls, name: str, index: int) -> "Third":
        third = super().__new__(cls, name)
        third.index = index
        return third

    def format(self, *args: object, **values: object) -> "Third":
        return Third(super().format(*args, **values), self.index)


Row = str | None
Numbers = dict[str, int | str]  # a value for some of a table's fields


@dataclass(frozen=True)
class Dialect:
    """One way to spell a kind of model, spoken where the regex `sign` matches the beginning of some name.

    `numbers` reads from the names in use (theirs or ours) which values the table's fields take together;
    `alone` holds sizes that are this dialect's custom, for a file without config.json that cannot tell them.
    """

    name: str
    sign: str
    table: Mapping[str, Row]
    numbers: Callable[[Iterable[str]], list[Numbers]] | None = None
    alone: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """All that is known here of one kind of model.

    dialects     the first is home
    classes      what config.json calls it in `_class_name`, `model_type` or, a name that ends in _ being the
                 beginning of many, timm's `architecture`
    sizes        (config.json or None, tensors under our names, what errors call the source) -> our
                 configuration; only names and shapes of the tensors are looked at
    single_file  the prefixes under which a single file of Stable Diffusion holds it
    untold       what weights alone do not tell, if a file without config.json is refused for that (a single
                 file of Stable Diffusion is not: there it is known)
    tokenizer    reads from the folder of the weights the tokenizer that the model holds, if it holds one
    copies       what a file may hold twice: the name that is dropped -> ours, whose values it must have
    """

    model: type[nn.Module]
    config: type
    configs: Mapping[str, Any]
    dialects: tuple[Dialect, ...]
    classes: frozenset[str] | set[str]
    sizes: Callable[[Mapping[str, Any] | None, Mapping[str, Tensor], str], Any]
    single_file: tuple[str, ...] = ()
    untold: str = ""
    tokenizer: Callable[[Path], Tokenizer] | None = None
    copies: Mapping[str, str] = field(default_factory=dict)

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json says that it describes this kind."""
        called = name_in(config)
        prefixes = tuple(name for name in self.classes if name.endswith("_"))
        return called in self.classes or bool(prefixes and called and called.startswith(prefixes))


def name_in(config: Mapping[str, Any]) -> str | None:
    """What a config.json calls the model that it describes; None if it does not say."""
    keys = ("_class_name", "model_type", "architecture")
    return next((config[key] for key in keys if config.get(key)), None)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises WeightsError if it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing: it is needed beside the weights")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{path}: no tokenizer can be read from it ({error}); fetch it again") from error


def taken(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that the regex's group takes at the names' beginnings."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def numbers(pattern: str, field: str = "n") -> Callable[[Iterable[str]], list[Numbers]]:
    """For a table with one field: its values are what the regex's group takes at the names' beginnings."""
    return lambda names: [{field: n} for n in sorted(taken(names, pattern))]


def implemented(config: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raise WeightsError for an option whose value is not among those of the table; absent ones pass."""
    odd = [f"{k} = {config[k]!r}" for k, allowed in table.items() if k in config and config[k] not in allowed]
    if odd:
        raise WeightsError(f"{where}: this kind of model is not implemented here: {listed(odd)}")


def no_more_options(config: Mapping[str, Any], options: set[str], where: str) -> None:
    """Raise WeightsError for an option outside `options` that is not switched off."""
    odd = [
        f"{k} = {v!r}" for k, v in config.items()
        if not k.startswith("_") and k not in options and v is not None and v is not False
    ]
    if odd:
        raise WeightsError(f"{where}: options unknown here, which may change the model: {listed(odd)}")
