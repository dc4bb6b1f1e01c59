"""Swin Transformer, both versions: names in timm's, Microsoft's and Hugging Face's files, sizes."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.swin import CONFIGS, Swin, SwinConfig, stage_grids
from weights.kinds.common import Dialect, Kind, Numbers, Row, Third, implemented, no_more_options, taken
from weights.strict import WeightsError

# Home: timm's. Microsoft's files, and timm's older ones, put the merging of patches at the end of a stage and
# not at the beginning of the next; otherwise they are the same. No single name tells them apart, so a file of
# Microsoft's is taken for timm's: where its stage 0 has a `downsample`, the numbers fill in {next} there too.
TIMM: dict[str, Row] = {
    "head":                                                None,  # the classifier
    "layers.{s}.blocks.{n}.attn_mask":                     None,  # a table that follows from the sizes
    "layers.{s}.blocks.{n}.attn.relative_position_index":  None,  # likewise
    "layers.{s}.blocks.{n}.attn.relative_coords_table":    None,  # likewise
    "layers.{s}.downsample":                               "layers.{next}.downsample",
}
MICROSOFT = TIMM
WRAPPED: dict[str, Row] = {f"model.{name}": row for name, row in MICROSOFT.items()} | {"model": ""}

# Hugging Face. `decoder` and `mask_token` belong to the models pretrained by masking.
_HF: dict[str, Row] = {
    "embeddings.patch_embeddings.projection":                  "patch_embed.proj",
    "embeddings.norm":                                         "patch_embed.norm",
    "embeddings.mask_token":                                   None,  # stood for what pretraining hid
    "encoder.layers.{s}.blocks.{n}.layernorm_before":          "layers.{s}.blocks.{n}.norm1",
    "encoder.layers.{s}.blocks.{n}.layernorm_after":           "layers.{s}.blocks.{n}.norm2",
    "encoder.layers.{s}.downsample":                           "layers.{next}.downsample",
    "layernorm":                                               "norm",
}
_DENSE: dict[str, Row] = {
    "encoder.layers.{s}.blocks.{n}.attention.output.dense":    "layers.{s}.blocks.{n}.attn.proj",
    "encoder.layers.{s}.blocks.{n}.intermediate.dense":        "layers.{s}.blocks.{n}.mlp.fc1",
    "encoder.layers.{s}.blocks.{n}.output.dense":              "layers.{s}.blocks.{n}.mlp.fc2",
}
_SELF = "encoder.layers.{s}.blocks.{n}.attention.self"
HF_1: dict[str, Row] = _HF | _DENSE | {
    f"{_SELF}.query":                        Third("layers.{s}.blocks.{n}.attn.qkv", 0),
    f"{_SELF}.key":                          Third("layers.{s}.blocks.{n}.attn.qkv", 1),
    f"{_SELF}.value":                        Third("layers.{s}.blocks.{n}.attn.qkv", 2),
    f"{_SELF}.relative_position_bias_table": "layers.{s}.blocks.{n}.attn.relative_position_bias_table",
    f"{_SELF}.relative_position_index":      None,  # a table that follows from the sizes
}
HF_2: dict[str, Row] = _HF | _DENSE | {
    f"{_SELF}.query.weight":                 Third("layers.{s}.blocks.{n}.attn.qkv.weight", 0),
    f"{_SELF}.key.weight":                   Third("layers.{s}.blocks.{n}.attn.qkv.weight", 1),
    f"{_SELF}.value.weight":                 Third("layers.{s}.blocks.{n}.attn.qkv.weight", 2),
    f"{_SELF}.query.bias":                   "layers.{s}.blocks.{n}.attn.q_bias",
    f"{_SELF}.value.bias":                   "layers.{s}.blocks.{n}.attn.v_bias",
    f"{_SELF}.logit_scale":                  "layers.{s}.blocks.{n}.attn.logit_scale",
    f"{_SELF}.continuous_position_bias_mlp": "layers.{s}.blocks.{n}.attn.cpb_mlp",
    f"{_SELF}.relative_position_index":      None,  # a table that follows from the sizes
    f"{_SELF}.relative_coords_table":        None,  # likewise
}
# transformers 5 names version 1 so in memory, and by the older names when it saves.
TRANSFORMERS_5: dict[str, Row] = _HF | {
    "encoder.layers.{s}.blocks.{n}.attention.q_proj":          Third("layers.{s}.blocks.{n}.attn.qkv", 0),
    "encoder.layers.{s}.blocks.{n}.attention.k_proj":          Third("layers.{s}.blocks.{n}.attn.qkv", 1),
    "encoder.layers.{s}.blocks.{n}.attention.v_proj":          Third("layers.{s}.blocks.{n}.attn.qkv", 2),
    "encoder.layers.{s}.blocks.{n}.attention.o_proj":          "layers.{s}.blocks.{n}.attn.proj",
    "encoder.layers.{s}.blocks.{n}.attention.relative_position_bias.relative_position_bias_table":
        "layers.{s}.blocks.{n}.attn.relative_position_bias_table",
    "encoder.layers.{s}.blocks.{n}.attention.relative_position_bias.relative_position_index":
        None,  # a table that follows from the sizes
    "encoder.layers.{s}.blocks.{n}.mlp":                       "layers.{s}.blocks.{n}.mlp",
}


def _beneath(prefix: str, table: Mapping[str, Row]) -> dict[str, Row]:
    """The names of a model with a head of its own."""
    return {f"{prefix}.{name}": row for name, row in table.items()} | {
        "classifier": None,  # of ImageNet's classes
        "decoder":    None,  # of the pixels that were hidden in pretraining
    }


def _pairs(names: Iterable[str], ends: bool) -> list[Numbers]:
    """{s} and {n} for every block, and for every stage but the last {s} and {next} if `ends`."""
    found = (re.match(r"(?:\w+\.)*?layers\.(\d+)\.blocks\.(\d+)\.", name) for name in names)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    merged = [{"s": s, "next": s + 1} for s in range(blocks[-1][0] if blocks and ends else 0)]
    return [{"s": s, "n": n} for s, n in blocks] + merged


def _numbers_home(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    return _pairs(names, ends=any(name.startswith("layers.0.downsample.") for name in names))


def _numbers(names: Iterable[str]) -> list[Numbers]:
    return _pairs(names, ends=True)


# ------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------

IN_HF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_python"),     # both the exact one
    "layer_norm_eps": (1e-5,),
    "use_absolute_embeddings": (False,),
}
IN_TIMM: dict[str, tuple[Any, ...]] = {        # model_args
    "act_layer": ("gelu",),
    "always_partition": (False,),
    "embed_layer": (None,),
    "global_pool": ("avg",),
    "norm_layer": (None, "layernorm"),
}
READ_IN_TIMM = {"img_size", "window_size", "mlp_ratio", "pretrained_window_sizes"}
SHOWN_BY_SHAPES = {"patch_size", "in_chans", "embed_dim", "depths", "num_heads", "head_dim", "qkv_bias"}
WITHOUT_EFFECT_IN_TIMM = {  # in evaluation, on images of the configured size
    "num_classes", "weight_init", "dynamic_img_size", "strict_img_size", "drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate",
}
# timm's swinv2_large_window12to16_192to256: window and image in pretraining, then those of the fine-tuning.
NAMED = r"_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?$"


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> SwinConfig:
    """Stages, widths, heads and version 1's windows from shapes; the image's size, version 2's windows and
    those of its pretraining from Hugging Face's config.json, or timm's and the architecture's name in it.

    Without config.json a version 1 is taken to be square and its last grid to be one window, as all published
    ones are (patches of 4 and four stages: 32 times the window). Nothing in a version 2 shows its window, so
    it is refused.
    """
    found = _from_shapes(tensors, where)
    if config is None:
        if found.version == 2:
            raise WeightsError(f"{where}: nothing in the tensors of a Swin V2 tells its window and image "
                               f"size; put its config.json (Hugging Face's or timm's) beside the file")
        patches = _window_of(_tables(found, tensors)[-1], where) * 2 ** (len(found.depths) - 1)
        size = (patches * found.patch_size[0], patches * found.patch_size[1])
        return _with_windows(replace(found, img_size=size), None, tensors, where)
    read = _from_timm if "architecture" in config else _from_hf
    return read(config, found, tensors, where)


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> SwinConfig:
    """What shapes tell; the image and the windows are left empty."""
    conv = tensors["patch_embed.proj.weight"]
    stages = range(max(taken(tensors, r"layers\.(\d+)\.blocks\.")) + 1)
    version = 2 if "layers.0.blocks.0.attn.logit_scale" in tensors else 1
    heads = "logit_scale" if version == 2 else "relative_position_bias_table"
    inner, width = tensors[f"layers.{stages[-1]}.blocks.0.mlp.fc1.weight"].shape
    for s in stages:  # a KeyError here is a stage without blocks
        shape = tuple(tensors[f"layers.{s}.blocks.0.attn.qkv.weight"].shape)
        if shape != (3 * conv.shape[0] * 2**s, conv.shape[0] * 2**s):
            raise WeightsError(f"{where}: q, k and v of stage {s} are {shape}; only widths that double with "
                               f"every stage and heads that share them are implemented")
    ratio = inner / width
    if int(width * ratio) != inner:  # rounded below it
        ratio = (inner + 0.5) / width
    return SwinConfig(
        version=version,
        img_size=(0, 0),
        patch_size=(conv.shape[2], conv.shape[3]),
        in_chans=conv.shape[1],
        embed_dim=conv.shape[0],
        depths=tuple(len(taken(tensors, rf"layers\.{s}\.blocks\.(\d+)\.")) for s in stages),
        num_heads=tuple(
            tensors[f"layers.{s}.blocks.0.attn.{heads}"].shape[0 if version == 2 else 1] for s in stages
        ),
        window_size=0,
        mlp_ratio=ratio,
        qkv_bias=f"layers.0.blocks.0.attn.{'q_bias' if version == 2 else 'qkv.bias'}" in tensors,
        pretrained_window_sizes=(0,) * len(stages) if version == 2 else (),
    )


def _from_timm(
    config: Mapping[str, Any], found: SwinConfig, tensors: Mapping[str, Tensor], where: str
) -> SwinConfig:
    args = config.get("model_args") or {}
    if "_cr_" in config["architecture"]:
        raise WeightsError(f"{where}: {config['architecture']}, timm's own variant, is not implemented")
    implemented(config, IN_TIMM, where)
    implemented(args, IN_TIMM, where)
    no_more_options(args, {*IN_TIMM, *READ_IN_TIMM, *SHOWN_BY_SHAPES, *WITHOUT_EFFECT_IN_TIMM}, where)
    name = re.search(NAMED, config["architecture"])
    window, tuned_window, image, tuned_image = name.groups() if name else (None, None, None, None)
    cfg = config.get("pretrained_cfg") or {}
    size = args.get("img_size") or cfg.get("input_size", [None])[1:] or int(tuned_image or image or 224)
    found = replace(found, img_size=_pair(size), mlp_ratio=args.get("mlp_ratio") or found.mlp_ratio)
    if found.version == 2 and "pretrained_window_sizes" in args:
        found = replace(found, pretrained_window_sizes=tuple(args["pretrained_window_sizes"]))
    elif found.version == 2 and tuned_window:
        # In pretraining the last grids were smaller than the window: 12 became 12, 12, 12, 6.
        grids = stage_grids(replace(found, img_size=_pair(int(image))))
        found = replace(found, pretrained_window_sizes=tuple(min(int(window), *grid) for grid in grids))
    given = args.get("window_size")
    if given is None and found.version == 2:
        if not window:
            raise WeightsError(f"{where}: neither model_args nor the name {config['architecture']} tells the "
                               f"window; give window_size in model_args")
        given = int(tuned_window or window)
    return _with_windows(found, given, tensors, where)


def _from_hf(
    config: Mapping[str, Any], found: SwinConfig, tensors: Mapping[str, Tensor], where: str
) -> SwinConfig:
    implemented(config, IN_HF, where)
    found = replace(found, img_size=_pair(config["image_size"]), mlp_ratio=config["mlp_ratio"])
    before = config.get("pretrained_window_sizes")
    if found.version == 2 and before:
        found = replace(found, pretrained_window_sizes=tuple(before[: len(found.depths)]))
    _agree_with_transformers(found, config["window_size"], where)
    return _with_windows(found, config["window_size"], tensors, where)


def _agree_with_transformers(config: SwinConfig, full: int, where: str) -> None:
    """Refuse the sizes at which transformers does something else than timm and Microsoft's code."""
    (height, width), (h, w) = config.img_size, config.patch_size
    odd = ""
    if height % h or width % w:
        odd = f"patches of {h} x {w} do not fill the image, which transformers pads"
    for s, grid in enumerate(stage_grids(config)):
        if config.version == 1:
            window, still = min(full, *grid), min(grid) <= full
            if window < full:
                odd = f"stage {s} has a grid {grid} below the window {full}, which transformers cannot run"
        else:
            rounded = height // h // 2**s  # theirs: a grid halved downwards, its height alone
            window, still = min(full, rounded), rounded <= full
        moves = config.depths[s] > 1 and full > 1
        if any(min(full, size) != window or (moves and (size <= full) != still) for size in grid):
            odd = odd or f"transformers has other windows on the grid {grid} of stage {s}"
        # Half a window of padding only changes places with the half that comes from the opposite edge.
        if moves and not still and any(size % window not in (0, window / 2) for size in grid):
            odd = odd or f"transformers shifts the grid {grid} of stage {s} after padding it, not before"
    if odd:
        raise WeightsError(f"{where}: a Swin of {height} x {width} pixels with windows of {full} is not "
                           f"implemented: {odd}")


def _with_windows(
    config: SwinConfig, given: int | Sequence[Any] | None, tensors: Mapping[str, Tensor], where: str
) -> SwinConfig:
    """The config with its windows: those `given`, else (version 1) those that fit its tables of offsets."""
    grids, stages = stage_grids(config), range(len(config.depths))
    windows = None if given is None else _per_stage(given, len(stages), where)
    if config.version == 1:
        fitting = []
        for s, (h, w), rows in zip(stages, grids, _tables(config, tensors), strict=True):
            tried = range(1, max(h, w) + 1) if windows is None else (windows[s],)
            fits = [n for n in tried if (2 * min(n, h) - 1) * (2 * min(n, w) - 1) == rows]
            if not fits:
                size = f"window of {windows[s]}" if windows else "square window"
                raise WeightsError(f"{where}: no {size} has {rows} offsets on stage {s}'s grid {(h, w)}; the "
                                   f"sizes of config.json are not this file's, or not implemented")
            fitting.append(fits[0])
        windows = tuple(fitting)
    full = max(windows)
    if all(min(full, size) == min(windows[s], size) for s in stages for size in grids[s]):
        windows = full  # one for all: where a stage has less, its grid is no larger
    for s in stages:
        inner, width = tensors[f"layers.{s}.blocks.0.mlp.fc1.weight"].shape
        if int(width * config.mlp_ratio) != inner:
            raise WeightsError(f"{where}: stage {s}'s MLP is {inner} wide, not {config.mlp_ratio} x {width}")
    return replace(config, window_size=windows)


def _tables(config: SwinConfig, tensors: Mapping[str, Tensor]) -> list[int]:
    """The number of offsets in each stage's windows (version 1)."""
    name = "attn.relative_position_bias_table"
    return [tensors[f"layers.{s}.blocks.0.{name}"].shape[0] for s in range(len(config.depths))]


def _window_of(offsets: int, where: str) -> int:
    """The square window that has so many offsets."""
    window = (math.isqrt(offsets) + 1) // 2
    if (2 * window - 1) ** 2 != offsets:
        raise WeightsError(f"{where}: windows with {offsets} offsets are not square, so the image is not; "
                           f"put its config.json beside the file")
    return window


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _per_stage(given: int | Sequence[Any], stages: int, where: str) -> tuple[int, ...]:
    """timm's window_size: one, (height, width), or either of them for every stage."""
    if isinstance(given, int):
        given = [given] * stages
    elif len(given) == 2 and isinstance(given[0], int):
        given = [given] * stages
    windows = [{side} if isinstance(side, int) else set(side) for side in given]
    if len(windows) != stages or any(len(sides) != 1 for sides in windows):
        raise WeightsError(f"{where}: window_size = {given!r} is not implemented, only a square one a stage")
    return tuple(side for sides in windows for side in sides)


_BLOCK = r"encoder\.layers\.\d+\.blocks\.\d+\.attention\."

KIND = Kind(
    Swin, SwinConfig, CONFIGS,
    (
        Dialect("timm", r"layers\.\d+\.blocks\.\d+\.attn\.", TIMM, _numbers_home),
        Dialect("microsoft", r"layers\.0\.downsample\.", MICROSOFT, _numbers),
        Dialect("microsoft-wrapped", r"model\.layers\.\d+\.blocks\.\d+\.attn\.", WRAPPED, _numbers),
        Dialect("hf", rf"swin\.{_BLOCK}self\.", _beneath("swin", HF_1), _numbers),
        Dialect("hf-v2", rf"swinv2\.{_BLOCK}self\.", _beneath("swinv2", HF_2), _numbers),
        Dialect("hf-bare", rf"{_BLOCK}self\.relative_position_bias_table", HF_1, _numbers),
        Dialect("hf-v2-bare", rf"{_BLOCK}self\.logit_scale", HF_2, _numbers),
        Dialect("transformers-5", rf"swin\.{_BLOCK}q_proj\.", _beneath("swin", TRANSFORMERS_5), _numbers),
        Dialect("transformers-5-bare", rf"{_BLOCK}q_proj\.", TRANSFORMERS_5, _numbers),
    ),
    {"swin", "swinv2", "swin_", "swinv2_"}, _sizes,
)
