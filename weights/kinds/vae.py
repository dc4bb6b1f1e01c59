"""The autoencoder: names in LDM's and diffusers' files, sizes."""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from torch import Tensor

from models.vae import CONFIGS, VAE, VAEConfig
from schema import many
from weights.dialects import Conv1x1, Dialect, Numbers, Row, indices_in
from weights.files import SIZE
from weights.kinds.sd import multiples
from weights.options import LATENTS, RGB, Kind, Options
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
    levels = len(indices_in(names, r"encoder\.down(?:_blocks)?\.(\d+)\."))
    n = len(indices_in(names, r"encoder\.down(?:_blocks)?\.\d+\.(?:resnets|block)\.(\d+)\."))
    numbers: list[Numbers] = [{"coder": "encoder"}, {"coder": "decoder"}]
    for level, j in product(range(levels), range(n + 1)):
        numbers += [{"level": level, "mirror": levels - 1 - level, "j": j}]
        numbers += [{"level": level, "i": j}] if j < n else []
    return numbers


OPTIONS = Options(
    told={
        "layers_per_block": "num_res_blocks", "in_channels": "in_channels", "out_channels": "out_ch",
        "latent_channels": "z_channels", "scaling_factor": "scale_factor", "norm_num_groups": "norm_groups",
    },
    # An absent option has diffusers' default, which is the first. Stable Diffusion 3 has a `shift_factor`.
    only={
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    defaults={"scale_factor": CONFIGS["sd-1"].scale_factor, "norm_groups": 32},  # older folders lack them
    # The first three are read below; the others change nothing in evaluation.
    harmless={"block_out_channels", "down_block_types", "up_block_types", "sample_size", "force_upcast"},
)


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    sizes = OPTIONS.read(config, where)
    blocks = [*config["down_block_types"], *config["up_block_types"]]
    if set(blocks) != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: these blocks are not implemented here: {', '.join(blocks)}")
    widths = config["block_out_channels"]
    return sizes | {
        "ch": widths[0], "ch_mult": multiples(widths, where), "embed_dim": config["latent_channels"],
    }


KIND = Kind(
    name="vae", model=VAE, config=VAEConfig, configs=CONFIGS,
    dialects=(
        Dialect("ldm", r"(encoder\.(down|mid)|decoder\.(up|mid))\.", LDM),
        Dialect("diffusers-old", r"(encoder|decoder)\.mid_block\.attentions\.0\.(query|proj_attn)\.",
                DIFFUSERS_OLD, _numbers),
        Dialect("diffusers", r"(encoder\.(down_blocks|mid_block)|decoder\.(up_blocks|mid_block))\.",
                DIFFUSERS, _numbers),
    ),
    classes={"AutoencoderKL"},
    read=_read,
    single_file=("first_stage_model.",),
    fed={"in_channels": RGB, "out_ch": RGB, "embed_dim": LATENTS, "ch_mult": many(SIZE, 4, 4)},
    single_sizes={"scale_factor": "scale_factor"},
    example_inputs=lambda config, draw: {"images": draw.normal(config.in_channels, 64, 64).clamp(-1, 1)},
    outputs=lambda model, inputs: {
        "latents": (latents := model.encode(**inputs)), "images": model.decode(latents),
    },
)
