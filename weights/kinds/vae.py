"""The autoencoder: names in LDM's and diffusers' files, sizes."""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from torch import Tensor

from models.vae import CONFIGS, VAE, VAEConfig
from weights.kinds.common import Conv1x1, Dialect, Kind, Numbers, Row, implemented, no_more_options, taken
from weights.kinds.sd import multiples
from weights.strict import WeightsError

# Autoencoder. Home: LDM (`first_stage_model.` of a single file). Going down, both count levels from the
# finest. Going up, LDM keeps that numbering; diffusers counts from the coarsest: mirror = levels - 1 - level.
DIFFUSERS: dict[str, Row] = {
    "encoder.down_blocks.{level}.resnets.{i}.conv_shortcut": "encoder.down.{level}.block.{i}.nin_shortcut",
    "encoder.down_blocks.{level}.resnets.{i}":               "encoder.down.{level}.block.{i}",
    "encoder.down_blocks.{level}.downsamplers.0.conv":       "encoder.down.{level}.downsample.conv",
    "decoder.up_blocks.{level}.resnets.{j}.conv_shortcut":   "decoder.up.{mirror}.block.{j}.nin_shortcut",
    "decoder.up_blocks.{level}.resnets.{j}":                 "decoder.up.{mirror}.block.{j}",
    "decoder.up_blocks.{level}.upsamplers.0.conv":           "decoder.up.{mirror}.upsample.conv",

    "{coder}.mid_block.resnets.0":                           "{coder}.mid.block_1",
    "{coder}.mid_block.attentions.0.group_norm":             "{coder}.mid.attn_1.norm",
    "{coder}.mid_block.attentions.0.to_q":                   Conv1x1("{coder}.mid.attn_1.q"),
    "{coder}.mid_block.attentions.0.to_k":                   Conv1x1("{coder}.mid.attn_1.k"),
    "{coder}.mid_block.attentions.0.to_v":                   Conv1x1("{coder}.mid.attn_1.v"),
    "{coder}.mid_block.attentions.0.to_out.0":               Conv1x1("{coder}.mid.attn_1.proj_out"),
    "{coder}.mid_block.resnets.1":                           "{coder}.mid.block_2",
    "{coder}.conv_norm_out":                                 "{coder}.norm_out",
}

# What diffusers wrote before 0.15, and what the published Stable Diffusion folders still hold.
DIFFUSERS_OLD: dict[str, Row] = {
    theirs: ours for theirs, ours in DIFFUSERS.items() if ".attentions." not in theirs
} | {
    "{coder}.mid_block.attentions.0.group_norm":             "{coder}.mid.attn_1.norm",
    "{coder}.mid_block.attentions.0.query":                  Conv1x1("{coder}.mid.attn_1.q"),
    "{coder}.mid_block.attentions.0.key":                    Conv1x1("{coder}.mid.attn_1.k"),
    "{coder}.mid_block.attentions.0.value":                  Conv1x1("{coder}.mid.attn_1.v"),
    "{coder}.mid_block.attentions.0.proj_attn":              Conv1x1("{coder}.mid.attn_1.proj_out"),
}

LDM: dict[str, Row] = {
    "loss":        None,  # perceptual and adversarial loss of the training
    "model_ema":   None,  # a second, averaged copy kept for the training
}


def _numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    levels = len(taken(names, r"encoder\.down(?:_blocks)?\.(\d+)\."))
    n = len(taken(names, r"encoder\.down(?:_blocks)?\.\d+\.(?:resnets|block)\.(\d+)\."))
    numbers: list[Numbers] = [{"coder": "encoder"}, {"coder": "decoder"}]
    for level, j in product(range(levels), range(n + 1)):
        numbers += [{"level": level, "mirror": levels - 1 - level, "j": j}]
        numbers += [{"level": level, "i": j}] if j < n else []
    return numbers


# option -> the values that models/ implements; an absent option has diffusers' default, which is the first.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),                   # Stable Diffusion 3
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
READ = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types", "latent_channels", "norm_num_groups", "scaling_factor",
}
WITHOUT_EFFECT = {"sample_size", "force_upcast"}
SD = CONFIGS["sd-1"]


def _from_config(config: Mapping[str, Any], where: str) -> VAEConfig:
    implemented(config, IMPLEMENTED, where)
    no_more_options(config, set(IMPLEMENTED) | READ | WITHOUT_EFFECT, where)
    if {*config["down_block_types"], *config["up_block_types"]} != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: these blocks are not implemented here: "
                           f"{', '.join([*config['down_block_types'], *config['up_block_types']])}")
    widths = config["block_out_channels"]
    return VAEConfig(
        ch=widths[0],
        ch_mult=multiples(widths, where),
        num_res_blocks=config["layers_per_block"],
        in_channels=config["in_channels"],
        out_ch=config["out_channels"],
        z_channels=config["latent_channels"],
        embed_dim=config["latent_channels"],
        scale_factor=config.get("scaling_factor", SD.scale_factor),  # older folders leave it out
        norm_groups=config.get("norm_num_groups", 32),
    )


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> VAEConfig:
    first = tensors["encoder.conv_in.weight"]
    z_channels = tensors["decoder.conv_in.weight"].shape[1]
    if z_channels != SD.z_channels:
        raise WeightsError(f"{where}: latents of {z_channels} channels, not Stable Diffusion's "
                           f"{SD.z_channels}; give a folder with its config.json")
    levels = sorted(taken(tensors, r"encoder\.down\.(\d+)\."))
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    return VAEConfig(
        ch=first.shape[0],
        ch_mult=tuple(width // first.shape[0] for width in widths),
        num_res_blocks=len(taken(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
        in_channels=first.shape[1],
        out_ch=tensors["decoder.conv_out.weight"].shape[0],
        z_channels=z_channels,
        embed_dim=tensors["post_quant_conv.weight"].shape[1],
        scale_factor=SD.scale_factor,
        norm_groups=SD.norm_groups,
    )


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> VAEConfig:
    """From config.json, else from shapes: groups and the latents' scale as Stable Diffusion has them."""
    sizes = _from_config(config, where) if config else _from_shapes(tensors, where)
    if odd := [sizes.ch * m for m in sizes.ch_mult if sizes.ch * m % sizes.norm_groups]:
        raise WeightsError(f"{where}: {odd[0]} channels are not {sizes.norm_groups} equal groups; a "
                           f"config.json must state the norm_num_groups of these weights")
    return sizes


KIND = Kind(
    VAE, VAEConfig, CONFIGS,
    (
        Dialect("ldm", r"(encoder\.(down|mid)|decoder\.(up|mid))\.", LDM),
        Dialect("diffusers-old", r"(encoder|decoder)\.mid_block\.attentions\.0\.(query|proj_attn)\.",
                DIFFUSERS_OLD, _numbers),
        Dialect("diffusers", r"(encoder\.(down_blocks|mid_block)|decoder\.(up_blocks|mid_block))\.",
                DIFFUSERS, _numbers),
    ),
    {"AutoencoderKL"}, _sizes, single_file=("first_stage_model.",),
)
