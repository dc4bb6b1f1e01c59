"""Sizes: from a kind and its configuration to a model, and from a source to that configuration.

A config.json of diffusers, transformers, timm or open_clip knows many options. The tables in weights/kinds/
name those that would change the computation, with the values that models/ implements; any other value is
refused: loading such a model would give numbers that are near, not right.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weights.kinds import KINDS
from weights.kinds.common import Dialect, name_in
from weights.strict import WeightsError


def known(kind: str) -> str:
    """`kind` itself. Raises WeightsError if there is no such kind."""
    if kind not in KINDS:
        raise WeightsError(f"no kind of model is called {kind!r}; the kinds are {', '.join(KINDS)}")
    return kind


def build(kind: str, config: Any) -> nn.Module:
    """The kind's model with fresh values, on torch's default device.

    `config` is the kind's configuration, or the dict that JSON gave back of it. Raises WeightsError for an
    unknown kind, and for sizes that are missing or unknown.
    """
    entry = KINDS[known(kind)]
    if isinstance(config, Mapping):
        wanted = {field.name for field in fields(entry.config)}
        if wanted != set(config):
            raise WeightsError(f"a {kind} has the sizes {', '.join(sorted(wanted))}; got {', '.join(config)}")
        config = entry.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    return entry.model(config)


class Unfilled(TorchFunctionMode):
    """Inside it, models on the meta device are built without drawing values, which they would not keep.

    Asked for random values on meta, torch first imports its whole compiler: 150 MB, and a second.
    """

    DRAWING = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_}

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in self.DRAWING and (drawn := [*args, *(kwargs or {}).values()][0]).is_meta:
            return drawn
        return func(*args, **(kwargs or {}))


def refuse_other_kinds(kind: str, config: Mapping[str, Any], where: str) -> None:
    """Raise WeightsError if a config.json says that it describes another kind of model."""
    if (called := name_in(config)) and not KINDS[kind].owns(config):
        right = " or ".join(sorted(KINDS[kind].classes))
        raise WeightsError(f"{where} describes a {called}, not a {kind} ({right})")


def sizes_of(
    kind: str,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    where: str,
    dialect: Dialect | None = None,
    single: bool = False,
) -> Any:
    """The kind's configuration from a config.json, if there is one, and tensors under our names.

    `where` names the source in errors, `dialect` is what its names were (None: home), `single` whether it is
    a single file of Stable Diffusion. Raises WeightsError if either lacks a size or has an option that
    models/ does not implement.
    """
    entry = KINDS[kind]
    if entry.untold and not config and not single:
        raise WeightsError(f"{where}: weights alone do not tell {entry.untold}; give a folder with its "
                           f"config.json")
    try:
        found = entry.sizes(config, tensors, where)
        return found if config else replace(found, **(dialect or entry.dialects[0]).alone)
    except (KeyError, TypeError, IndexError) as error:
        if config:
            raise WeightsError(f"{where}: a size is missing or of the wrong type ({error!r})") from error
        raise WeightsError(f"{where}: {error.args[0]} is missing; without it or a config.json beside the "
                           f"file the sizes cannot be told") from error
