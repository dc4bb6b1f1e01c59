"""Swin Transformer, both versions: names in timm's, Microsoft's and Hugging Face's files, sizes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.swin import CONFIGS, Swin, SwinConfig, stage_grids
from weights.dialects import Dialect, Numbers, OneOfQkv, Row, beneath, indices_in
from weights.options import IMAGENET, RGB, Kind, Options, Pictures, pair
from weights.strict import WeightsError

# Home: timm's. Microsoft's files, and timm's older ones, put the merging of patches at the end of a stage and
# not at the beginning of the next. Both use the same names: Microsoft's files are treated as timm's and
# detected by a `downsample` in stage 0, for which the numbers fill in {next} too.
TIMM: dict[str, Row] = {
    "head":                                                None,  # the classifier
    "layers.{s}.blocks.{n}.attn_mask":                     None,  # a table that follows from the sizes
    "layers.{s}.blocks.{n}.attn.relative_position_index":  None,  # likewise
    "layers.{s}.blocks.{n}.attn.relative_coords_table":    None,  # likewise
    "layers.{s}.downsample":                               "layers.{next}.downsample",
}

# Hugging Face's
HF_SHARED: dict[str, Row] = {
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
HF_1: dict[str, Row] = HF_SHARED | _DENSE | {
    f"{_SELF}.query":                        OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 0),
    f"{_SELF}.key":                          OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 1),
    f"{_SELF}.value":                        OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 2),
    f"{_SELF}.relative_position_bias_table": "layers.{s}.blocks.{n}.attn.relative_position_bias_table",
    f"{_SELF}.relative_position_index":      None,  # a table that follows from the sizes
}
HF_2: dict[str, Row] = HF_SHARED | _DENSE | {
    f"{_SELF}.query.weight":                 OneOfQkv("layers.{s}.blocks.{n}.attn.qkv.weight", 0),
    f"{_SELF}.key.weight":                   OneOfQkv("layers.{s}.blocks.{n}.attn.qkv.weight", 1),
    f"{_SELF}.value.weight":                 OneOfQkv("layers.{s}.blocks.{n}.attn.qkv.weight", 2),
    f"{_SELF}.query.bias":                   "layers.{s}.blocks.{n}.attn.q_bias",
    f"{_SELF}.value.bias":                   "layers.{s}.blocks.{n}.attn.v_bias",
    f"{_SELF}.logit_scale":                  "layers.{s}.blocks.{n}.attn.logit_scale",
    f"{_SELF}.continuous_position_bias_mlp": "layers.{s}.blocks.{n}.attn.cpb_mlp",
    f"{_SELF}.relative_position_index":      None,  # a table that follows from the sizes
    f"{_SELF}.relative_coords_table":        None,  # likewise
}
HEADS = ("classifier", "decoder")  # of ImageNet's classes, of the pixels that were hidden in pretraining


def stage_numbers(names: Iterable[str], ends: bool = True) -> list[Numbers]:
    """{s} and {n} for every block, and for every stage but the last {s} and {next} if `ends`."""
    found = (re.match(r"(?:\w+\.)*?layers\.(\d+)\.blocks\.(\d+)\.", name) for name in names)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    merged = [{"s": s, "next": s + 1} for s in range(blocks[-1][0] if blocks and ends else 0)]
    return [{"s": s, "n": n} for s, n in blocks] + merged


def _home_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    return stage_numbers(names, ends=any(name.startswith("layers.0.downsample.") for name in names))


IN_HF = Options(
    told={"image_size": "img_size", "mlp_ratio": "mlp_ratio"},
    only={
        "hidden_act": ("gelu", "gelu_python"),     # both the exact one
        "layer_norm_eps": (1e-5,),
        "use_absolute_embeddings": (False,),
    },
)
IN_TIMM = Options(                                 # model_args
    told={"img_size": "img_size", "mlp_ratio": "mlp_ratio"},
    only={"act_layer": ("gelu",), "global_pool": ("avg",), "norm_layer": (None, "layernorm")},
    harmless={
        "window_size", "pretrained_window_sizes",                                           # read below
        "patch_size", "in_chans", "embed_dim", "depths", "num_heads", "head_dim", "qkv_bias",   # in shapes
        # in evaluation, on images of the configured size:
        "num_classes", "weight_init", "dynamic_img_size", "strict_img_size", "drop_rate", "proj_drop_rate",
        "attn_drop_rate", "drop_path_rate",
    },
)
# timm's swinv2_large_window12to16_192to256: window and image in pretraining, then those of the fine-tuning.
NAMED = r"_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?$"


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Stages, widths, heads and version 1's windows from shapes; the image's size, version 2's windows and
    those of its pretraining from Hugging Face's config.json, or timm's and the architecture's name in it."""
    sizes, timm = _from_shapes(tensors), bool(config.get("architecture"))
    if timm:
        stated, windows = _timm(config, sizes.version, where)
    else:
        stated, windows = IN_HF.read(config, where), config["window_size"]
    sizes = replace(sizes, **stated | {"img_size": pair(stated["img_size"])})
    if sizes.version == 2:
        sizes = replace(sizes, pretrained_window_sizes=_windows_before(config, sizes))
    if not timm:
        _agree_with_transformers(sizes, windows, where)
    return vars(sizes) | {"window_size": _windows(sizes, windows, tensors, where)}


def _from_shapes(tensors: Mapping[str, Tensor]) -> SwinConfig:
    """The config that shapes show; the image and the windows are left empty."""
    stages = range(max(indices_in(tensors, r"layers\.(\d+)\.blocks\.")) + 1)
    version = 2 if "layers.0.blocks.0.attn.logit_scale" in tensors else 1
    heads = ("logit_scale", 0) if version == 2 else ("relative_position_bias_table", 1)
    inner, width = tensors[f"layers.{stages[-1]}.blocks.0.mlp.fc1.weight"].shape
    ratio = inner / width
    embed_dim, in_chans, *patch_size = tensors["patch_embed.proj.weight"].shape
    return SwinConfig(
        version=version,
        img_size=(0, 0),
        patch_size=tuple(patch_size),
        in_chans=in_chans,
        embed_dim=embed_dim,
        depths=tuple(len(indices_in(tensors, rf"layers\.{s}\.blocks\.(\d+)\.")) for s in stages),
        num_heads=tuple(tensors[f"layers.{s}.blocks.0.attn.{heads[0]}"].shape[heads[1]] for s in stages),
        window_size=0,
        mlp_ratio=ratio if int(width * ratio) == inner else (inner + 0.5) / width,  # rounded below it
        qkv_bias=f"layers.0.blocks.0.attn.{'q_bias' if version == 2 else 'qkv.bias'}" in tensors,
        pretrained_window_sizes=(),
    )


def _timm(config: Mapping[str, Any], version: int, where: str) -> tuple[dict[str, Any], Any]:
    args, name = config.get("model_args") or {}, config["architecture"]
    if "_cr_" in name:
        raise WeightsError(f"{where}: {name}, timm's own variant, is not implemented")
    window, tuned_window, image, tuned_image = _named(name)
    size = (config.get("pretrained_cfg") or {}).get("input_size", [None])[1:] or tuned_image or image or 224
    windows = args.get("window_size") or (version == 2 and (tuned_window or window)) or None
    if windows is None and version == 2:
        raise WeightsError(f"{where}: neither model_args nor the name {name} states the window; give "
                           f"window_size in model_args")
    options = {"global_pool": config.get("global_pool", "avg")} | args
    return {"img_size": size} | IN_TIMM.read(options, where), windows


def _named(architecture: str) -> tuple[int | None, ...]:
    """The numbers of NAMED in timm's name of an architecture."""
    name = re.search(NAMED, architecture)
    return tuple(number and int(number) for number in name.groups()) if name else (None,) * 4


def _windows_before(config: Mapping[str, Any], sizes: SwinConfig) -> tuple[int, ...]:
    """Version 2's windows in pretraining, 0 where there was none."""
    stages = len(sizes.depths)
    stated = (config.get("model_args") or config).get("pretrained_window_sizes")
    if stated:
        return tuple(stated[:stages])
    window, tuned_window, image, _ = _named(config.get("architecture", ""))
    if not tuned_window:
        return (0,) * stages
    # The last grids were smaller than the window: 12 became 12, 12, 12, 6.
    return tuple(min(window, *grid) for grid in stage_grids(replace(sizes, img_size=pair(image))))


def _agree_with_transformers(config: SwinConfig, full: int, where: str) -> None:
    """Refuse the sizes at which transformers does something else than timm and Microsoft's code."""
    (height, width), (h, w) = config.img_size, config.patch_size
    problem = ""
    if height % h or width % w:
        problem = f"patches of {h} x {w} do not fill the image, which transformers pads"
    for s, grid in enumerate(stage_grids(config)):
        if config.version == 1:
            window, still = min(full, *grid), min(grid) <= full
            if window < full:
                problem = f"stage {s}'s grid {grid} is below the window {full}, which transformers cannot run"
        else:
            rounded = height // h // 2**s  # theirs: a grid halved downwards, its height alone
            window, still = min(full, rounded), rounded <= full
        moves = config.depths[s] > 1 and full > 1
        if any(min(full, size) != window or (moves and (size <= full) != still) for size in grid):
            problem = problem or f"transformers has other windows on the grid {grid} of stage {s}"
        # Half a window of padding only changes places with the half that comes from the opposite edge.
        if moves and not still and any(size % window not in (0, window / 2) for size in grid):
            problem = problem or f"transformers shifts stage {s}'s grid {grid} after padding it, not before"
    if problem:
        raise WeightsError(f"{where}: a Swin of {height} x {width} pixels with windows of {full} is not "
                           f"implemented: {problem}")


def _windows(
    sizes: SwinConfig, stated: int | Sequence[Any] | None, tensors: Mapping[str, Tensor], where: str
) -> int | tuple[int, ...]:
    """The windows: those `stated`, else (version 1) those that fit the tables of offsets."""
    grids, stages = stage_grids(sizes), range(len(sizes.depths))
    if stated is None:
        windows = tuple(_window_that_fits(s, grids[s], tensors, where) for s in stages)
    else:
        windows = _per_stage(stated, len(stages), where)
    full = max(windows)
    # One for all, if a stage's grid is no larger than its window wherever that is less.
    same = all(min(full, size) == min(windows[s], size) for s in stages for size in grids[s])
    return full if same else windows


def _window_that_fits(s: int, grid: tuple[int, int], tensors: Mapping[str, Tensor], where: str) -> int:
    """The square window whose offsets are as many as stage s's table has rows."""
    rows = tensors[f"layers.{s}.blocks.0.attn.relative_position_bias_table"].shape[0]
    for window in range(1, max(grid) + 1):
        if (2 * min(window, grid[0]) - 1) * (2 * min(window, grid[1]) - 1) == rows:
            return window
    raise WeightsError(f"{where}: no square window has {rows} offsets on stage {s}'s grid {grid}; the sizes "
                       f"of config.json are not this file's, or not implemented")


def _per_stage(stated: int | Sequence[Any], stages: int, where: str) -> tuple[int, ...]:
    """timm's window_size: one, (height, width), or either of them for every stage."""
    if isinstance(stated, int) or (len(stated) == 2 and isinstance(stated[0], int)):
        stated = [stated] * stages
    windows = [{side} if isinstance(side, int) else set(side) for side in stated]
    if len(windows) != stages or any(len(sides) != 1 for sides in windows):
        raise WeightsError(f"{where}: window_size = {stated!r} is not implemented, only a square one a stage")
    return tuple(side for sides in windows for side in sides)


_BLOCK = r"encoder\.layers\.\d+\.blocks\.\d+\.attention\."

KIND = Kind(
    name="swin", model=Swin, config=SwinConfig, configs=CONFIGS,
    dialects=(
        Dialect("timm", r"layers\.\d+\.blocks\.\d+\.attn\.", TIMM, _home_numbers, pictures="timm"),
        Dialect("microsoft", r"layers\.0\.downsample\.", TIMM, stage_numbers, pictures="timm"),
        Dialect("microsoft-wrapped", r"model\.layers\.\d+\.blocks\.\d+\.attn\.",
                beneath("model", TIMM) | {"model": ""}, stage_numbers, pictures="timm"),
        Dialect("hf", rf"swin\.{_BLOCK}self\.", beneath("swin", HF_1, *HEADS), stage_numbers),
        Dialect("hf-v2", rf"swinv2\.{_BLOCK}self\.", beneath("swinv2", HF_2, *HEADS), stage_numbers),
        Dialect("hf-bare", rf"{_BLOCK}self\.relative_position_bias_table", HF_1, stage_numbers),
        Dialect("hf-v2-bare", rf"{_BLOCK}self\.logit_scale", HF_2, stage_numbers),
    ),
    classes={"swin", "swinv2", "swin_", "swinv2_"},
    read=_read,
    fed={"in_chans": RGB},
    not_in_weights={"layers.0.blocks.0.attn.logit_scale": "a Swin V2's window and image size"},
    pictures=Pictures("img_size", "ViT", IMAGENET),
    example_inputs=lambda config, draw: {"images": draw.normal(config.in_chans, *config.img_size)},
)
