"""Sizes: what a config.json says in our configs' terms, and what the tensors' shapes tell where there is
none.

A config.json of diffusers or transformers knows many options; the tables below name those that would change
the computation, with the values that models/ implements. Any other value is refused: loading such a model
would give numbers that are near, not right.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from models import bert, clip, unet, vae
from weights.strict import WeightsError, listed

Config = bert.BertConfig | clip.CLIPTextConfig | unet.UNetConfig | vae.VAEConfig

KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "minilm":       (bert.SentenceEncoder, bert.BertConfig),
    "clip-text":    (clip.CLIPText, clip.CLIPTextConfig),
    "vae":          (vae.VAE, vae.VAEConfig),
    "unet":         (unet.UNet, unet.UNetConfig),
    "unet-encoder": (unet.UNetEncoder, unet.UNetConfig),
}
CONFIGS: dict[str, Mapping[str, Config]] = {
    "minilm": bert.CONFIGS, "clip-text": clip.CONFIGS, "vae": vae.CONFIGS, "unet": unet.CONFIGS,
    "unet-encoder": unet.CONFIGS,
}


def build(kind: str, config: Config | Mapping[str, Any]) -> nn.Module:
    """The kind's model with fresh values, on torch's default device. `config` may be the dict that JSON gave
    back.

    Raises WeightsError for an unknown kind, and for sizes that are missing or unknown.
    """
    model, config_type = KINDS[known(kind)]
    if isinstance(config, Mapping):
        wanted = {field.name for field in fields(config_type)}
        if wanted != set(config):
            raise WeightsError(f"a {kind} has the sizes {', '.join(sorted(wanted))}; got {', '.join(config)}")
        config = config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    return model(config)


def known(kind: str) -> str:
    """`kind` itself. Raises WeightsError if there is no such kind."""
    if kind not in KINDS:
        raise WeightsError(f"no kind of model is called {kind!r}; the kinds are {', '.join(KINDS)}")
    return kind


# ------------------------------------------------------------------------------------------------------------
# config.json
# ------------------------------------------------------------------------------------------------------------

# option -> the values that models/ implements. An option that is absent has diffusers' default, which is the
# first.
UNET_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
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
    "norm_num_groups": (unet.GROUPS,),
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
UNET_READ = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types", "cross_attention_dim", "attention_head_dim", "num_attention_heads",
    "use_linear_projection",
}
# These change nothing in evaluation, or only the precision of a step.
UNET_WITHOUT_EFFECT = {
    "sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim",
}

VAE_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),                   # Stable Diffusion 3
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
VAE_READ = {
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types", "latent_channels", "norm_num_groups", "scaling_factor",
}
VAE_WITHOUT_EFFECT = {"sample_size", "force_upcast"}

BERT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "hidden_act": ("gelu",),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}

CLASSES = {  # what config.json calls each kind, in `_class_name` or `model_type`
    "unet": {"UNet2DConditionModel"}, "unet-encoder": {"UNet2DConditionModel"}, "vae": {"AutoencoderKL"},
    "clip-text": {"clip_text_model", "clip"}, "minilm": {"bert"},
}


def from_config(kind: str, config: Mapping[str, Any], where: str) -> Config:
    """Our sizes from a config.json of diffusers or transformers.

    `where` names the file in errors. Raises WeightsError if it belongs to another kind of model, lacks a
    size, or has an option that models/ does not implement.
    """
    called = config.get("_class_name") or config.get("model_type")
    if called and called not in CLASSES[kind]:
        right = " or ".join(sorted(CLASSES[kind]))
        raise WeightsError(f"{where} describes a {called}, not a {kind} ({right})")
    reader = {"unet": _unet, "unet-encoder": _unet, "vae": _vae, "clip-text": _clip, "minilm": _bert}[kind]
    try:
        return reader(config, where)
    except (KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"{where}: a size is missing or of the wrong type ({error!r})") from error


def _implemented(config: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], where: str) -> None:
    odd = [f"{k} = {config[k]!r}" for k, allowed in table.items() if k in config and config[k] not in allowed]
    if odd:
        raise WeightsError(f"{where}: this kind of model is not implemented here: {listed(odd)}")


def _no_more_options(config: Mapping[str, Any], options: set[str], where: str) -> None:
    """Whatever option the tables do not know must be switched off."""
    odd = [
        f"{k} = {v!r}" for k, v in config.items()
        if not k.startswith("_") and k not in options and v is not None and v is not False
    ]
    if odd:
        raise WeightsError(f"{where}: options unknown here, which may change the model: {listed(odd)}")


def _unet(config: Mapping[str, Any], where: str) -> unet.UNetConfig:
    _implemented(config, UNET_IMPLEMENTED, where)
    _no_more_options(config, set(UNET_IMPLEMENTED) | UNET_READ | UNET_WITHOUT_EFFECT, where)
    widths = config["block_out_channels"]
    attended = _attention_levels(config, where)
    per_level = config.get("num_attention_heads") or config["attention_head_dim"]
    # diffusers' oldest mistake, kept for its published files: `attention_head_dim` is the number of heads.
    heads = list(per_level) if isinstance(per_level, list | tuple) else [per_level] * len(widths)
    head_widths = {width // head for width, head in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(head_widths) > 1:
        raise WeightsError(f"{where}: neither the number of heads ({heads}) nor their width is constant")
    same = len(set(heads)) == 1
    return unet.UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=widths[0],
        num_res_blocks=_one(config["layers_per_block"], "layers_per_block", where),
        channel_mult=_multiples(widths, where),
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


def _multiples(widths: list[int], where: str) -> tuple[int, ...]:
    if any(width % widths[0] for width in widths):
        raise WeightsError(f"{where}: block_out_channels = {widths}: not multiples of the first")
    return tuple(width // widths[0] for width in widths)


def _vae(config: Mapping[str, Any], where: str) -> vae.VAEConfig:
    _implemented(config, VAE_IMPLEMENTED, where)
    _no_more_options(config, set(VAE_IMPLEMENTED) | VAE_READ | VAE_WITHOUT_EFFECT, where)
    if {*config["down_block_types"], *config["up_block_types"]} != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: these blocks are not implemented here: "
                           f"{', '.join([*config['down_block_types'], *config['up_block_types']])}")
    widths = config["block_out_channels"]
    return vae.VAEConfig(
        ch=widths[0],
        ch_mult=_multiples(widths, where),
        num_res_blocks=config["layers_per_block"],
        in_channels=config["in_channels"],
        out_ch=config["out_channels"],
        z_channels=config["latent_channels"],
        embed_dim=config["latent_channels"],
        scale_factor=config.get("scaling_factor", SD_VAE.scale_factor),  # older folders leave it out
        norm_groups=config.get("norm_num_groups", 32),
    )


def _clip(config: Mapping[str, Any], where: str) -> clip.CLIPTextConfig:
    config = config.get("text_config") or config  # a whole CLIP holds both towers' sizes
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{where}: hidden_act = {act!r} is not implemented here (quick_gelu, gelu)")
    return clip.CLIPTextConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        max_position_embeddings=config.get("max_position_embeddings", 77),
        hidden_act=act,
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
    )


def _bert(config: Mapping[str, Any], where: str) -> bert.BertConfig:
    _implemented(config, BERT_IMPLEMENTED, where)
    return bert.BertConfig(**{field.name: config[field.name] for field in fields(bert.BertConfig)})


# ------------------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------------------

SD_VAE = vae.CONFIGS["sd-1"]


def from_shapes(kind: str, tensors: Mapping[str, Tensor], where: str) -> Config:
    """Our sizes from the shapes of tensors under our names, as far as Stable Diffusion's own are concerned.

    What shapes cannot tell (number of heads, activation, groups, scale of the latents) is Stable Diffusion's:
    version 1 if the U-Net reads a context of 768 or the text tower is so wide, version 2 if 1024. Raises
    WeightsError for any other width, and for tensors that are not a `kind`.
    """
    reader = {"unet": _unet_shapes, "unet-encoder": _unet_shapes, "vae": _vae_shapes,
              "clip-text": _clip_shapes, "minilm": _bert_shapes}[kind]
    try:
        return reader(tensors, where)
    except KeyError as error:
        raise WeightsError(f"{where}: {error.args[0]} is missing; without it or a config.json beside the "
                           f"file the sizes cannot be told") from error


def _numbers(names: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The numbers that the regex's group takes, each once, ascending."""
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def _version(widths: Mapping[str, int], width: int, what: str, where: str) -> str:
    for version in ("sd-1", "sd-2"):
        if widths[version] == width:
            return version
    raise WeightsError(f"{where}: {what} is {width}, neither {widths['sd-1']} as in Stable Diffusion 1 nor "
                       f"{widths['sd-2']} as in 2; give a folder with its config.json")


def _unet_shapes(tensors: Mapping[str, Tensor], where: str) -> unet.UNetConfig:
    first = tensors["input_blocks.0.0.weight"]
    ch = first.shape[0]
    steps = _numbers(tensors, r"input_blocks\.(\d+)\.0\.op\.")
    n = steps[0] - 1 if steps else len(_numbers(tensors, r"input_blocks\.(\d+)\.")) - 1
    starts = [1 + (n + 1) * level for level in range(len(steps) + 1)]   # each level's first ResBlock
    context_dim = tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    widths = {name: config.context_dim for name, config in unet.CONFIGS.items()}
    version = _version(widths, context_dim, "the context's width", where)
    return unet.UNetConfig(
        in_channels=first.shape[1],
        # The encoder half alone does not tell, nor does it need it.
        out_channels=tensors["out.2.weight"].shape[0] if "out.2.weight" in tensors else 4,
        model_channels=ch,
        num_res_blocks=n,
        channel_mult=tuple(tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] // ch for i in starts),
        attention_levels=tuple(
            level for level, i in enumerate(starts) if f"input_blocks.{i}.1.norm.weight" in tensors
        ),
        num_heads=unet.CONFIGS[version].num_heads,
        num_head_channels=unet.CONFIGS[version].num_head_channels,
        context_dim=context_dim,
        use_linear_in_transformer=tensors["middle_block.1.proj_in.weight"].ndim == 2,
    )


def _vae_shapes(tensors: Mapping[str, Tensor], where: str) -> vae.VAEConfig:
    first = tensors["encoder.conv_in.weight"]
    z_channels = tensors["decoder.conv_in.weight"].shape[1]
    if z_channels != SD_VAE.z_channels:
        raise WeightsError(f"{where}: latents of {z_channels} channels, not Stable Diffusion's "
                           f"{SD_VAE.z_channels}; give a folder with its config.json")
    levels = _numbers(tensors, r"encoder\.down\.(\d+)\.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    return vae.VAEConfig(
        ch=first.shape[0],
        ch_mult=tuple(width // first.shape[0] for width in widths),
        num_res_blocks=len(_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
        in_channels=first.shape[1],
        out_ch=tensors["decoder.conv_out.weight"].shape[0],
        z_channels=z_channels,
        embed_dim=tensors["post_quant_conv.weight"].shape[1],
        scale_factor=SD_VAE.scale_factor,
        norm_groups=SD_VAE.norm_groups,
    )


def _clip_shapes(tensors: Mapping[str, Tensor], where: str) -> clip.CLIPTextConfig:
    words = tensors["text_model.embeddings.token_embedding.weight"]
    width = words.shape[1]
    widths = {name: config.hidden_size for name, config in clip.CONFIGS.items()}
    version = _version(widths, width, "the text tower's width", where)
    return clip.CLIPTextConfig(
        vocab_size=words.shape[0],
        hidden_size=width,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(_numbers(tensors, r"text_model\.encoder\.layers\.(\d+)\.")),
        num_attention_heads=clip.CONFIGS[version].num_attention_heads,
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        hidden_act=clip.CONFIGS[version].hidden_act,
        layer_norm_eps=clip.CONFIGS[version].layer_norm_eps,
    )


def _bert_shapes(tensors: Mapping[str, Tensor], where: str) -> bert.BertConfig:
    minilm = bert.CONFIGS["minilm"]
    words = tensors["embeddings.word_embeddings.weight"]
    if tuple(words.shape) != (minilm.vocab_size, minilm.hidden_size):
        raise WeightsError(f"{where}: word vectors {tuple(words.shape)} are not all-MiniLM-L6-v2's; "
                           f"give a folder with its config.json")
    return minilm
