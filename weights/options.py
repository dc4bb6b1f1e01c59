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

from weights.dialects import Dialect, indices_in
from weights.strict import WeightsError, listed

Shape = str | tuple[Any, ...]

# Mean and deviation of pictures in [0, 1]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass(frozen=True)
class Options:
    """One sort of config.json. An option of a part is written "text_config.hidden_size".

    told      option -> our field
    only      option -> the values that models/ implements
    defaults  our field -> what upstream assumes where the option is absent
    harmless  options that change nothing here; with it, any option that stands nowhere above is refused
    """

    told: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    harmless: set[str] | None = None

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
        """Our fields, as the config.json states them. Raises WeightsError for what is not implemented."""
        if self.harmless is not None:
            require_known(config, {*self.told, *self.only, *self.harmless}, where)
        flat = dict(config)
        for part, options in config.items():
            if isinstance(options, Mapping):
                flat |= {f"{part}.{option}": value for option, value in options.items()}
        require_supported(flat, self.only, where)
        stated = {field: flat[option] for option, field in self.told.items() if flat.get(option) is not None}
        return {**self.defaults, **stated}


def require_supported(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raise WeightsError for an option whose value is not among those of the table; absent ones pass."""
    unsupported = [
        f"{option} = {config[option]!r}" for option, allowed in only.items()
        if option in config and config[option] not in allowed
    ]
    if unsupported:
        raise WeightsError(f"{where}: this kind of model is not implemented here: {listed(unsupported)}")


def require_known(config: Mapping[str, Any], options: set[str], where: str) -> None:
    """Raise WeightsError for an option outside `options` that is not switched off."""
    unknown = [
        f"{k} = {v!r}" for k, v in config.items()
        if not k.startswith("_") and k not in options and v is not None and v is not False
    ]
    if unknown:
        raise WeightsError(f"{where}: options unknown here, which may change the model: {listed(unknown)}")


@dataclass(frozen=True)
class Pictures:
    """How pictures are usually prepared for a kind: the field of its configuration with their size, the
    transformers processor, mean and deviation, and the filter of Hugging Face's checkpoints."""

    size: str
    processor: str
    colours: Mapping[str, tuple[float, float, float]]
    filter: str = "bicubic"


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of model.

    dialects        the first is home
    classes         values of `_class_name`, `model_type` or timm's `architecture` that mean this kind; a
                    trailing `_` makes it a prefix
    second_config   another name than config.json under which folders state the sizes
    read            (config.json, tensors under our names, name of the source for errors) -> our fields
    shapes          SHAPES, for the fields that a config.json leaves out
    forms           field -> the function that brings what config.json states into our form
    heads           field with a number of heads -> field with the width that they share
    not_in_weights  tensor of ours -> a setting that such weights do not show; without a config.json they are
                    refused, except in a Stable Diffusion single file
    single_file     the prefixes under which a Stable Diffusion single file holds it
    single_sizes    tensor beside them in that file -> the field that it states
    part_of         the kind whose files this one reads, if it is but a part of it
    ignore          regex of our names -> why such a tensor may be left over
    tokenizer       reads the tokenizer that the model holds from the folder of the weights
    clip_tokenizer  whether weights.load_tokenizer reads its tokenizer
    tied            a name that files may hold twice: the dropped one -> ours, with the same values
    pictures        None for a kind that reads none
    example_inputs  (configuration, `golden.Draw`) -> inputs for a golden file, by their names in forward
    outputs         (model, those inputs) -> the golden file's outputs
    """

    name: str
    model: type[nn.Module]
    config: type
    configs: Mapping[str, Any]
    dialects: tuple[Dialect, ...]
    classes: set[str]
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], Mapping[str, Any]]
    example_inputs: Callable[[Any, Any], dict[str, Tensor]]
    outputs: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] = (
        lambda model, inputs: {"output": model(**inputs)}
    )
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    forms: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    not_in_weights: Mapping[str, str] = field(default_factory=dict)
    second_config: str = ""
    single_file: tuple[str, ...] = ()
    single_sizes: Mapping[str, str] = field(default_factory=dict)
    part_of: str = ""
    ignore: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Callable[[Path], Tokenizer] | None = None
    clip_tokenizer: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    pictures: Pictures | None = None

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json describes this kind."""
        named = name_in(config)
        prefixes = tuple(name for name in self.classes if name.endswith("_"))
        return named in self.classes or bool(prefixes and named and named.startswith(prefixes))

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
        for dialect in self.dialects:
            if dialect.name == name:
                return dialect
        known = ", ".join(dialect.name for dialect in self.dialects)
        raise WeightsError(f"{self.name} has no dialect {name!r}; it has {known}")


def name_in(config: Mapping[str, Any]) -> str | None:
    """The name of the model in a config.json; None if it has none."""
    keys = ("_class_name", "model_type", "architecture")
    return next((config[key] for key in keys if config.get(key)), None)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or of a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------


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
        stated = from_shapes(kind.shapes, tensors) | dict(kind.read(config, tensors, where))
        sizes = {name: kind.forms.get(name, lambda size: size)(size) for name, size in stated.items()}
        found = kind.config(**{field.name: sizes[field.name] for field in fields(kind.config)})
        for heads, width in kind.heads.items():
            if sizes[heads] < 1 or sizes[width] % sizes[heads]:
                raise WeightsError(f"{where}: {width} = {sizes[width]} is not {sizes[heads]} equal heads; "
                                   f"config.json must state the {heads} of these weights")
    except WeightsError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{where}: a size is missing or of the wrong type ({error!r})") from error
    return found


def recognise(kind: Kind, tensors: Mapping[str, Tensor], where: str) -> Any:
    """The entry of CONFIGS whose model has exactly these names and shapes. Raises WeightsError for none."""
    found = {(name, tuple(tensor.shape)) for name, tensor in tensors.items()
             if not any(re.fullmatch(pattern, name) for pattern in kind.ignore)}
    different: dict[str, list[str]] = {}
    for entry, config in kind.configs.items():
        wanted = build_on_meta(kind, config, where).state_dict()
        odd = found ^ {(name, tuple(tensor.shape)) for name, tensor in wanted.items()}
        if not odd:
            return config
        different[entry] = sorted({name for name, _ in odd})
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
    """The kind's model without values. Raises WeightsError for sizes that do not fit one another."""
    try:
        with torch.device("meta"), Unfilled():
            return kind.model(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{where}: no {kind.name} can have these sizes ({error})") from error
