"""A kind of model as data, and the one interpreter of its tables: from a config.json to our sizes.

    SHAPES  field -> the tensor and the axes that show it, or a regex whose group's numbers are counted
    TOLD    option of config.json -> field
    ONLY    option -> the values that models/ implements

A config.json of diffusers, transformers, timm or open_clip has many options. ONLY holds those that would
change the computation; any other value is refused: such a model would give numbers that are near, not right.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from schema import Rule, one_of
from weights.dialects import Dialect, indices_in
from weights.strict import WeightsError, listed

Shape = str | tuple[Any, ...]

# Mean and deviation of pictures in [0, 1]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


RGB, LATENTS = one_of(3), one_of(4)  # channels that are fed here


@dataclass(frozen=True)
class Options:
    """One sort of config.json. An option of a part is written "text_config.hidden_size"."""

    told: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # Our field -> what upstream assumes where the option is absent
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Options that change nothing here. With it, any option that stands nowhere above must be None or False.
    harmless: set[str] | None = None

    def read(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our fields, as the config.json states them. Raises WeightsError for what is not implemented."""
        flat: dict[str, Any] = {}
        for option, value in config.items():
            parts = value if isinstance(value, Mapping) else None
            flat |= {option: value} if parts is None else {f"{option}.{k}": v for k, v in parts.items()}
        known = {*self.told, *self.only, *(flat if self.harmless is None else self.harmless)}
        # diffusers also takes one value per level
        each = {name: x if isinstance(x, list) and x else [x] for name, x in flat.items()}
        faults = {
            "this kind of model is not implemented here": [
                option for option, values in self.only.items()
                if option in flat and flat[option] not in values
                and not all(value in values for value in each[option])
            ],
            "options unknown here, which may change the model": [
                option for option in flat if option not in known and option[0] != "_"
                and any(value is not None and value is not False for value in each[option])
            ],
        }
        for fault, options in faults.items():
            if options:
                shown = listed([f"{option} = {flat[option]!r}" for option in options])
                raise WeightsError(f"{where}: {fault}: {shown}")
        stated = {field: flat[option] for option, field in self.told.items() if flat.get(option) is not None}
        return {**self.defaults, **stated}


def same_names(config: type) -> dict[str, str]:
    """TOLD of a config.json that names its options as our configuration does."""
    return {field.name: field.name for field in fields(config)}


@dataclass(frozen=True)
class Pictures:
    """The usual preparation of pictures for a kind."""

    size: str  # the field of its configuration with their size
    processor: str  # of transformers
    colours: Mapping[str, tuple[float, float, float]]  # mean and deviation
    filter: str = "bicubic"  # of Hugging Face's checkpoints


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of model."""

    name: str
    model: type[nn.Module]
    config: type
    configs: Mapping[str, Any]  # the published sizes, by the registry's names
    dialects: tuple[Dialect, ...]  # the first is home
    # Values of `_class_name`, `model_type` or timm's `architecture`; a trailing `_` makes one a prefix
    classes: set[str]
    # (config.json, tensors under our names, name of the source for errors) -> our fields
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], Mapping[str, Any]]
    # (configuration, golden.Draw) -> forward's inputs
    example_inputs: Callable[[Any, Any], dict[str, Tensor]]
    outputs: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] = (  # of a golden file
        lambda model, inputs: {"output": model(**inputs)}
    )
    # (configuration, inputs) -> a golden file's constants, beside the model's own buffers
    constants: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]] = lambda config, inputs: {}
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # for fields that a config.json leaves out
    forms: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)  # field -> theirs to our form
    heads: Mapping[str, str] = field(default_factory=dict)  # number of heads -> the width that they share
    # Tensor -> a setting that such weights do not show: without a config.json they are refused, except in a
    # Stable Diffusion single file
    not_in_weights: Mapping[str, str] = field(default_factory=dict)
    # Folder -> fields that its other files state. Raises WeightsError for what is not implemented.
    beside: Callable[[Path], Mapping[str, Any]] = lambda folder: {}
    second_config: str = ""  # another name than config.json under which folders state the sizes
    single_file: tuple[str, ...] = ()  # the prefixes under which a Stable Diffusion single file holds it
    single_sizes: Mapping[str, str] = field(default_factory=dict)  # a tensor of that file -> its field
    part_of: str = ""  # the kind whose files this one reads, if it is but a part of it
    ignore: Mapping[str, str] = field(default_factory=dict)  # regex of our names -> why it may be left over
    tokenizer: Callable[[Path], Tokenizer] | None = None  # of the model, from the folder of the weights
    clip_tokenizer: bool = False  # whether weights.load_tokenizer reads its tokenizer
    tokens: Mapping[str, str] = field(default_factory=dict)  # field with an id -> its token
    fed: Mapping[str, Rule] = field(default_factory=dict)  # field -> values that fit what is fed here
    # Field -> the kind, and its field of the same value, whose output is fed
    reads: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)  # a dropped copy -> ours, with the same values
    full_precision: str = ""  # regex of the names that stay in float32 where the rest is in half precision
    pictures: Pictures | None = None  # None: it reads none

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes this kind."""
        named = name_in(config) or ""
        return any(named == name or (name[-1] == "_" and named.startswith(name)) for name in self.classes)

    def find_dialect(self, names: Iterable[str]) -> Dialect | None:
        """The dialect that has such tensor names; None if it is none of this kind's."""
        names = list(names)
        return next((d for d in self.dialects if any(re.match(d.sign, name) for name in names)), None)

    def dialect_of(self, names: Iterable[str]) -> Dialect:
        """The same. Raises WeightsError if it is none of this kind's."""
        names = list(names)
        if dialect := self.find_dialect(names):
            return dialect
        known = ", ".join(dialect.name for dialect in self.dialects)
        shown = ", ".join(names[:3]) or "nothing at all"
        raise WeightsError(f"no {self.name} in any dialect known here ({known}); the names are {shown} ...")

    def dialect(self, name: str) -> Dialect:
        """The dialect of that name. Raises WeightsError if the kind has none."""
        dialects = {dialect.name: dialect for dialect in self.dialects}
        if name not in dialects:
            raise WeightsError(f"{self.name} has no dialect {name!r}; it has {', '.join(dialects)}")
        return dialects[name]


def name_in(config: Mapping[str, Any]) -> str | None:
    """The name of the model in a config.json; None if it has none."""
    keys = ("_class_name", "model_type", "architecture")
    return next((config[key] for key in keys if config.get(key)), None)


def causal(ids: Tensor) -> dict[str, Tensor]:
    """A golden file's constants of a causal text model for ids (B, N): positions (N,), and the mask (N, N),
    True where row i may read column j."""
    places = torch.arange(ids.shape[1])
    return {"position_ids": places, "causal_mask": places <= places[:, None]}


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or of a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def from_shapes(shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that tensors show: a size, several, a count of numbers, or whether a tensor is there."""
    sizes: dict[str, Any] = {}
    for field_, rule in shapes.items():
        if isinstance(rule, str):
            sizes[field_] = len(indices_in(tensors, rule))
            continue
        name, *axes = rule
        shape = tensors[name].shape if name in tensors else ()
        if not axes:
            sizes[field_] = name in tensors
        elif max(axes) < len(shape):
            sizes[field_] = shape[axes[0]] if len(axes) == 1 else tuple(shape[axis] for axis in axes)
    return sizes


def sizes_of(
    kind: Kind, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str,
    dialect: Dialect | None = None, single: bool = False,
) -> Any:
    """The kind's configuration, from a config.json, or from tensors under our names alone (`recognise`).

    `where` names the source in errors, `dialect` is that of the file (None: home), `single` is True for a
    Stable Diffusion single file. Only names and shapes of the tensors are read. Raises WeightsError for a
    missing size, an option that models/ does not implement, and weights that do not show a setting.
    """
    if config is None:
        for name, setting in kind.not_in_weights.items():
            if name in tensors and not single:
                raise WeightsError(f"{where}: weights alone do not show {setting}; give a folder with its "
                                   f"config.json")
        return replace(recognise(kind, tensors, where), **(dialect or kind.dialects[0]).lone_file_defaults)
    try:
        stated = from_shapes(kind.shapes, tensors) | kind.read(config, tensors, where)
        sizes = {name: kind.forms.get(name, lambda size: size)(size) for name, size in stated.items()}
        found = kind.config(**{field.name: sizes[field.name] for field in fields(kind.config)})
        require_equal_heads(kind, found, where)
    except WeightsError:
        raise
    except KeyError as error:
        raise WeightsError(f"{where}: a size is missing, {error.args[0]}; add it") from error
    except (TypeError, IndexError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{where}: its sizes do not fit one another ({error!r}); correct them") from error
    return found


def require_equal_heads(kind: Kind, config: Any, where: str) -> None:
    """Raise WeightsError unless each width is a multiple of its number of heads."""
    for heads, width in kind.heads.items():
        number, shared = getattr(config, heads), getattr(config, width)
        if number < 1 or shared % number:
            raise WeightsError(f"{where}: {width} = {shared} is not {number} equal heads; config.json must "
                               f"state the {heads} of these weights")


def recognise(kind: Kind, tensors: Mapping[str, Tensor], where: str) -> Any:
    """The entry of CONFIGS whose model has exactly these names and shapes. Raises WeightsError for none."""
    found = {(name, tuple(tensor.shape)) for name, tensor in tensors.items()
             if not any(re.fullmatch(pattern, name) for pattern in kind.ignore)}
    different: dict[str, list[str]] = {}
    for entry, config in kind.configs.items():
        wanted = build_on_meta(kind, config, where).state_dict()
        unequal = found ^ {(name, tuple(tensor.shape)) for name, tensor in wanted.items()}
        if not unequal:
            return config
        different[entry] = sorted({name for name, _ in unequal})
    nearest = min(different, key=lambda entry: len(different[entry]))
    raise WeightsError(
        f"{where}: without a config.json only published sizes are read ({', '.join(different)}); nearest is "
        f"{nearest}, which differs in {listed(different[nearest])}; give a folder with its config.json"
    )


class Unfilled(TorchFunctionMode):
    """Inside it, models on the meta device are built without drawing values, which they would not keep.

    For random values on meta, torch first imports its whole compiler: 150 MB, and a second.
    """

    DRAWING = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_}

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in self.DRAWING and (drawn := [*args, *(kwargs or {}).values()][0]).is_meta:
            return drawn
        return func(*args, **(kwargs or {}))


def build_on_meta(kind: Kind, config: Any, where: str) -> nn.Module:
    """The kind's model without values. Raises WeightsError as `built`."""
    with torch.device("meta"), Unfilled():
        return built(kind, config, where)


def built(kind: Kind, config: Any, where: str) -> nn.Module:
    """The kind's model with fresh values. Raises WeightsError for sizes that do not fit one another."""
    try:
        require_equal_heads(kind, config, where)
        return kind.model(config)
    except WeightsError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{where}: no {kind.name} can have these sizes ({error})") from error
