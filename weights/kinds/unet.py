"""The U-Net: names in LDM's and diffusers' files, sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.layers import timestep_embedding
from models.unet import CONFIGS, GROUPS, UNet, UNetConfig, UNetEncoder
from weights.dialects import Dialect, Numbers, Row, indices_in
from weights.kinds.sd import multiples
from weights.options import LATENTS, Kind, Options
from weights.strict import WeightsError

# U-Net. Home: LDM (`model.diffusion_model.` of a single file). LDM counts all blocks in one row, diffusers by
# level and by sort. With n ResBlocks a level going down and n + 1 going up:
#
#   down = 1 + (n + 1) level + i     down_last = (n + 1) (level + 1)     input_blocks.0 is a convolution
#   up   =     (n + 1) level + j     up_last   = (n + 1) level + n       both count from the coarsest level
#   slot = 2 after a transformer, 1 where the level has none
DIFFUSERS: dict[str, Row] = {
    "time_embedding.linear_1":                    "time_embed.0",
    "time_embedding.linear_2":                    "time_embed.2",
    "conv_in":                                    "input_blocks.0.0",

    "down_blocks.{level}.resnets.{i}.{theirs}":   "input_blocks.{down}.0.{ours}",  # RESNET
    "down_blocks.{level}.attentions.{i}":         "input_blocks.{down}.1",  # the same inside
    "down_blocks.{level}.downsamplers.0.conv":    "input_blocks.{down_last}.0.op",

    "mid_block.resnets.0.{theirs}":               "middle_block.0.{ours}",
    "mid_block.attentions.0":                     "middle_block.1",
    "mid_block.resnets.1.{theirs}":               "middle_block.2.{ours}",

    "up_blocks.{level}.resnets.{j}.{theirs}":     "output_blocks.{up}.0.{ours}",
    "up_blocks.{level}.attentions.{j}":           "output_blocks.{up}.1",
    "up_blocks.{level}.upsamplers.0.conv":        "output_blocks.{up_last}.{slot}.conv",

    "conv_norm_out":                              "out.0",
    "conv_out":                                   "out.2",
}
RESNET = {  # theirs -> ours
    "norm1":         "in_layers.0",
    "conv1":         "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2":         "out_layers.0",
    "conv2":         "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    if any(name.startswith("input_blocks.") for name in names):
        steps = indices_in(names, r"input_blocks\.(\d+)\.0\.op\.")
        n = min(steps) - 1 if steps else max(indices_in(names, r"input_blocks\.(\d+)\."))
        levels = len(steps) + 1
        attended = {block // (n + 1) for block in indices_in(names, r"output_blocks\.(\d+)\.1\.norm\.")}
    else:
        n = len(indices_in(names, r"down_blocks\.\d+\.resnets\.(\d+)\."))
        levels = len(indices_in(names, r"down_blocks\.(\d+)\."))
        attended = indices_in(names, r"up_blocks\.(\d+)\.attentions\.")
    resnet = [{"theirs": theirs, "ours": ours} for theirs, ours in RESNET.items()]
    numbers: list[Numbers] = [*resnet]
    for level in range(levels):
        first = (n + 1) * level
        numbers += [{"level": level, "i": i, "down": 1 + first + i} | r for i in range(n) for r in resnet]
        numbers += [{"level": level, "j": j, "up": first + j} | r for j in range(n + 1) for r in resnet]
        slot = 2 if level in attended else 1
        numbers += [{"level": level, "down_last": first + n + 1, "up_last": first + n, "slot": slot}]
    return numbers


# An absent option has diffusers' default, which is the first. SDXL, unCLIP, upscalers and latent consistency
# models set options that stand nowhere here, which is refused too.
ONLY = {
    "act_fn": ("silu",),
    "attention_type": ("default",),            # GLIGEN
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (GROUPS,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),      # SDXL has 2 and 10
}
OPTIONS = Options(
    {
        "in_channels": "in_channels", "out_channels": "out_channels",
        "use_linear_projection": "use_linear_in_transformer",
    },
    ONLY, {"use_linear_in_transformer": False},
    # The first are read below; the others change nothing in evaluation, or only the precision of a step.
    harmless={
        "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "cross_attention_dim",
        "attention_head_dim", "num_attention_heads", "sample_size", "dropout", "upcast_attention",
        "addition_embed_type_num_heads", "addition_time_embed_dim",
        # Of the average over training that diffusers' trainers write into unet_ema/
        "decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step",
        "use_ema_warmup",
    },
)


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    sizes = OPTIONS.read(config, where)
    widths = config["block_out_channels"]
    # diffusers' oldest mistake, kept for its published files: `attention_head_dim` is the number of heads.
    per_level = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = list(per_level) if isinstance(per_level, list | tuple) else [per_level] * len(widths)
    head_widths = {width // head for width, head in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(head_widths) > 1:
        raise WeightsError(f"{where}: neither the number of heads ({heads}) nor their width is constant")
    attended, same = _attention_levels(config, where), len(set(heads)) == 1
    for level in {*attended, len(widths) - 1}:
        if widths[level] % heads[level]:
            raise WeightsError(f"{where}: {widths[level]} channels are not {heads[level]} equal heads; a "
                               f"config.json must state the attention_head_dim of these weights")
    return sizes | {
        "model_channels": widths[0],
        "num_res_blocks": _one(config["layers_per_block"], "layers_per_block", where),
        "channel_mult": multiples(widths, where),
        "attention_levels": attended,
        "num_heads": heads[0] if same else None,
        "num_head_channels": None if same else head_widths.pop(),
        "context_dim": _one(config["cross_attention_dim"], "cross_attention_dim", where),
    }


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


_DIALECTS = (
    Dialect("ldm", r"(input_blocks|middle_block|time_embed|output_blocks)\.", {}),
    Dialect("diffusers", r"(down_blocks|mid_block|up_blocks|time_embedding)\.", DIFFUSERS, _numbers),
)
KIND = Kind(
    name="unet", model=UNet, config=UNetConfig, configs=CONFIGS, dialects=_DIALECTS,
    classes={"UNet2DConditionModel"},
    read=_read,
    single_file=("model.diffusion_model.",),
    fed={"in_channels": LATENTS, "out_channels": LATENTS},
    reads={"context_dim": ("clip-text", "hidden_size")},
    example_inputs=lambda config, draw: {
        "latents": draw.normal(config.in_channels, 16, 16),
        # Small: in float32 the angles of large ones are rounded more than anything after them.
        "timesteps": draw.below(50), "context": draw.normal(77, config.context_dim),
    },
    constants=lambda config, inputs: {
        "sinusoids": timestep_embedding(inputs["timesteps"], config.model_channels),
    },
)
ENCODER = replace(
    KIND, name="unet-encoder", model=UNetEncoder, part_of="unet",
    ignore={r"(output_blocks|out)\..*": "the decoder half of the U-Net, which the encoder does without"},
    outputs=lambda model, inputs: {"middle": model.encode(**inputs)},
)
