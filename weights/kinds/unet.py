"""The U-Net: names in LDM's and diffusers' files, sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.unet import CONFIGS, GROUPS, UNet, UNetConfig, UNetEncoder
from weights.kinds.common import Dialect, Kind, Numbers, Row, implemented, no_more_options, taken
from weights.kinds.sd import multiples, version
from weights.strict import WeightsError

# U-Net. Home: LDM (`model.diffusion_model.` of a single file). LDM counts all blocks in one row, diffusers by
# level and by sort. With n ResBlocks a level going down and n + 1 going up:
#
#   down = 1 + (n + 1) level + i     down_last = (n + 1) (level + 1)     input_blocks.0 is a convolution
#   up   =     (n + 1) level + j     up_last   = (n + 1) level + n       both count from the coarsest level
#   slot = 2 after a transformer, 1 where the level has none
DIFFUSERS: dict[str, Row] = {
    "time_embedding.linear_1":                         "time_embed.0",
    "time_embedding.linear_2":                         "time_embed.2",
    "conv_in":                                         "input_blocks.0.0",

    "down_blocks.{level}.resnets.{i}.norm1":           "input_blocks.{down}.0.in_layers.0",
    "down_blocks.{level}.resnets.{i}.conv1":           "input_blocks.{down}.0.in_layers.2",
    "down_blocks.{level}.resnets.{i}.time_emb_proj":   "input_blocks.{down}.0.emb_layers.1",
    "down_blocks.{level}.resnets.{i}.norm2":           "input_blocks.{down}.0.out_layers.0",
    "down_blocks.{level}.resnets.{i}.conv2":           "input_blocks.{down}.0.out_layers.3",
    "down_blocks.{level}.resnets.{i}.conv_shortcut":   "input_blocks.{down}.0.skip_connection",
    "down_blocks.{level}.attentions.{i}":              "input_blocks.{down}.1",  # inside, both speak alike
    "down_blocks.{level}.downsamplers.0.conv":         "input_blocks.{down_last}.0.op",

    "mid_block.resnets.0.norm1":                       "middle_block.0.in_layers.0",
    "mid_block.resnets.0.conv1":                       "middle_block.0.in_layers.2",
    "mid_block.resnets.0.time_emb_proj":               "middle_block.0.emb_layers.1",
    "mid_block.resnets.0.norm2":                       "middle_block.0.out_layers.0",
    "mid_block.resnets.0.conv2":                       "middle_block.0.out_layers.3",
    "mid_block.attentions.0":                          "middle_block.1",
    "mid_block.resnets.1.norm1":                       "middle_block.2.in_layers.0",
    "mid_block.resnets.1.conv1":                       "middle_block.2.in_layers.2",
    "mid_block.resnets.1.time_emb_proj":               "middle_block.2.emb_layers.1",
    "mid_block.resnets.1.norm2":                       "middle_block.2.out_layers.0",
    "mid_block.resnets.1.conv2":                       "middle_block.2.out_layers.3",

    "up_blocks.{level}.resnets.{j}.norm1":             "output_blocks.{up}.0.in_layers.0",
    "up_blocks.{level}.resnets.{j}.conv1":             "output_blocks.{up}.0.in_layers.2",
    "up_blocks.{level}.resnets.{j}.time_emb_proj":     "output_blocks.{up}.0.emb_layers.1",
    "up_blocks.{level}.resnets.{j}.norm2":             "output_blocks.{up}.0.out_layers.0",
    "up_blocks.{level}.resnets.{j}.conv2":             "output_blocks.{up}.0.out_layers.3",
    "up_blocks.{level}.resnets.{j}.conv_shortcut":     "output_blocks.{up}.0.skip_connection",
    "up_blocks.{level}.attentions.{j}":                "output_blocks.{up}.1",
    "up_blocks.{level}.upsamplers.0.conv":             "output_blocks.{up_last}.{slot}.conv",

    "conv_norm_out":                                   "out.0",
    "conv_out":                                        "out.2",
}


def _numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    if any(name.startswith("input_blocks.") for name in names):
        steps = taken(names, r"input_blocks\.(\d+)\.0\.op\.")
        n = min(steps) - 1 if steps else max(taken(names, r"input_blocks\.(\d+)\."))
        levels = len(steps) + 1
        attended = {block // (n + 1) for block in taken(names, r"output_blocks\.(\d+)\.1\.norm\.")}
    else:
        n = len(taken(names, r"down_blocks\.\d+\.resnets\.(\d+)\."))
        levels = len(taken(names, r"down_blocks\.(\d+)\."))
        attended = taken(names, r"up_blocks\.(\d+)\.attentions\.")
    numbers: list[Numbers] = []
    for level in range(levels):
        first = (n + 1) * level
        numbers += [{"level": level, "i": i, "down": 1 + first + i} for i in range(n)]
        numbers += [{"level": level, "j": j, "up": first + j} for j in range(n + 1)]
        slot = 2 if level in attended else 1
        numbers += [{"level": level, "down_last": first + n + 1, "up_last": first + n, "slot": slot}]
    return numbers


# option -> the values that models/ implements; an absent option has diffusers' default, which is the first.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),            # SDXL
    "attention_type": ("default",),            # GLIGEN
    "center_input_sample": (False,),
    "class_embed_type": (None,),               # unCLIP, upscalers
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (GROUPS,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),             # latent consistency models
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),      # SDXL has 2 and 10
}
READ = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types", "cross_attention_dim", "attention_head_dim", "num_attention_heads",
    "use_linear_projection",
}
# These change nothing in evaluation, or only the precision of a step.
WITHOUT_EFFECT = {
    "sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim",
}


def _from_config(config: Mapping[str, Any], where: str) -> UNetConfig:
    implemented(config, IMPLEMENTED, where)
    no_more_options(config, set(IMPLEMENTED) | READ | WITHOUT_EFFECT, where)
    widths = config["block_out_channels"]
    attended = _attention_levels(config, where)
    per_level = config.get("num_attention_heads") or config["attention_head_dim"]
    # diffusers' oldest mistake, kept for its published files: `attention_head_dim` is the number of heads.
    heads = list(per_level) if isinstance(per_level, list | tuple) else [per_level] * len(widths)
    head_widths = {width // head for width, head in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(head_widths) > 1:
        raise WeightsError(f"{where}: neither the number of heads ({heads}) nor their width is constant")
    same = len(set(heads)) == 1
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=widths[0],
        num_res_blocks=_one(config["layers_per_block"], "layers_per_block", where),
        channel_mult=multiples(widths, where),
        attention_levels=attended,
        num_heads=heads[0] if same else None,
        num_head_channels=None if same else head_widths.pop(),
        context_dim=_one(config["cross_attention_dim"], "cross_attention_dim", where),
        use_linear_in_transformer=bool(config.get("use_linear_projection", False)),
    )


def _attention_levels(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    down, up = config["down_block_types"], config["up_block_types"]
    with_attention = [kind == "CrossAttnDownBlock2D" for kind in down]
    mirrored = [kind == "CrossAttnUpBlock2D" for kind in reversed(up)]
    sorts = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    if not sorts >= {*down, *up} or with_attention != mirrored:
        raise WeightsError(f"{where}: these blocks are not implemented here: {', '.join([*down, *up])}")
    return tuple(level for level, attends in enumerate(with_attention) if attends)


def _one(value: Any, option: str, where: str) -> int:
    """The one number that a per-level list repeats."""
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1 or not isinstance(found := values.pop(), int):
        raise WeightsError(f"{where}: {option} = {value!r}; one number for all levels is implemented here")
    return found


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> UNetConfig:
    first = tensors["input_blocks.0.0.weight"]
    ch = first.shape[0]
    steps = sorted(taken(tensors, r"input_blocks\.(\d+)\.0\.op\."))
    n = steps[0] - 1 if steps else len(taken(tensors, r"input_blocks\.(\d+)\.")) - 1
    starts = [1 + (n + 1) * level for level in range(len(steps) + 1)]   # each level's first ResBlock
    context_dim = tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    widths = {name: config.context_dim for name, config in CONFIGS.items()}
    known = version(widths, context_dim, "the context's width", where)
    return UNetConfig(
        in_channels=first.shape[1],
        # The encoder half alone does not tell, nor does it need it.
        out_channels=tensors["out.2.weight"].shape[0] if "out.2.weight" in tensors else 4,
        model_channels=ch,
        num_res_blocks=n,
        channel_mult=tuple(tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] // ch for i in starts),
        attention_levels=tuple(
            level for level, i in enumerate(starts) if f"input_blocks.{i}.1.norm.weight" in tensors
        ),
        num_heads=CONFIGS[known].num_heads,
        num_head_channels=CONFIGS[known].num_head_channels,
        context_dim=context_dim,
        use_linear_in_transformer=tensors["middle_block.1.proj_in.weight"].ndim == 2,
    )


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> UNetConfig:
    """From config.json, else from shapes: heads as Stable Diffusion 1 or 2 has them, by the context's
    width."""
    sizes = _from_config(config, where) if config else _from_shapes(tensors, where)
    widths = [sizes.model_channels * m for m in sizes.channel_mult]
    if odd := [width for width in widths if width % GROUPS]:
        raise WeightsError(f"{where}: {odd[0]} channels are not {GROUPS} equal groups of a norm, which are "
                           f"all that is implemented here")
    for width in [widths[level] for level in sizes.attention_levels] + widths[-1:]:
        heads = sizes.heads(width)
        if heads < 1 or width % heads or width // heads != (sizes.num_head_channels or width // heads):
            raise WeightsError(f"{where}: {width} channels are not {heads} equal heads; a config.json "
                               f"must state the attention_head_dim of these weights")
    return sizes


_DIALECTS = (
    Dialect("ldm", r"(input_blocks|middle_block|time_embed|output_blocks)\.", {}),
    Dialect("diffusers", r"(down_blocks|mid_block|up_blocks|time_embedding)\.", DIFFUSERS, _numbers),
)
KIND = Kind(
    UNet, UNetConfig, CONFIGS, _DIALECTS, {"UNet2DConditionModel"}, _sizes,
    single_file=("model.diffusion_model.",),
)
ENCODER = replace(KIND, model=UNetEncoder)
