"""CLIP's text tower as Stable Diffusion has it: names in other files, sizes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from models.clip import CONFIGS, CLIPText, CLIPTextConfig
from weights.kinds.common import Dialect, Kind, Numbers, Qkv, Row, taken
from weights.kinds.sd import version
from weights.strict import WeightsError

# Text tower. Home: Hugging Face's, as the published `text_encoder` folders hold it; a single file of Stable
# Diffusion 1 holds the same beneath `cond_stage_model.transformer.`.
HF: dict[str, Row] = {
    "text_model.embeddings.position_ids":    None,  # 0, 1, 2, ...
    "text_projection":                       None,  # the U-Net reads the states before it
    "vision_model":                          None,  # the other tower of a whole CLIP
    "visual_projection":                     None,  # likewise
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPTextModel.
TRANSFORMERS_5: dict[str, Row] = {
    "embeddings.position_ids":               None,  # 0, 1, 2, ...
    "embeddings":                            "text_model.embeddings",
    "encoder":                               "text_model.encoder",
    "final_layer_norm":                      "text_model.final_layer_norm",
}

# A single file of Stable Diffusion 2, beneath `cond_stage_model.model.`. SD 2 reads the last but one of
# OpenCLIP-H's 24 layers through the final norm: the `beyond` after it are never used.
OPEN_CLIP: dict[str, Row] = {
    "token_embedding":                         "text_model.embeddings.token_embedding",
    "positional_embedding":                    "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.{n}.ln_1":          "text_model.encoder.layers.{n}.layer_norm1",
    "transformer.resblocks.{n}.attn.in_proj_weight":
                                           Qkv("text_model.encoder.layers.{n}.self_attn.*_proj.weight"),
    "transformer.resblocks.{n}.attn.in_proj_bias":
                                           Qkv("text_model.encoder.layers.{n}.self_attn.*_proj.bias"),
    "transformer.resblocks.{n}.attn.out_proj": "text_model.encoder.layers.{n}.self_attn.out_proj",
    "transformer.resblocks.{n}.ln_2":          "text_model.encoder.layers.{n}.layer_norm2",
    "transformer.resblocks.{n}.mlp.c_fc":      "text_model.encoder.layers.{n}.mlp.fc1",
    "transformer.resblocks.{n}.mlp.c_proj":    "text_model.encoder.layers.{n}.mlp.fc2",
    "transformer.resblocks.{beyond}":          None,  # after the penultimate layer
    "ln_final":                                "text_model.final_layer_norm",
    "text_projection":                         None,  # the U-Net reads the states before it
    "logit_scale":                             None,  # CLIP's temperature, used by its loss alone
    "attn_mask":                               None,  # the causal mask, a constant
    "visual":                                  None,  # the other tower of a whole CLIP
}
# Files converted back from a diffusers folder hold 23 layers: they were cut there before.
OPEN_CLIP_CUT = 23


def _open_clip_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    theirs = max(taken(names, r"transformer\.resblocks\.(\d+)\."), default=-1) + 1
    ours = len(taken(names, r"text_model\.encoder\.layers\.(\d+)\."))
    read = ours or (theirs if theirs == OPEN_CLIP_CUT else theirs - 1)
    return [*({"n": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs))]


def _from_config(config: Mapping[str, Any], where: str) -> CLIPTextConfig:
    config = config.get("text_config") or config  # a whole CLIP holds both towers' sizes
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{where}: hidden_act = {act!r} is not implemented here (quick_gelu, gelu)")
    return CLIPTextConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        max_position_embeddings=config.get("max_position_embeddings", 77),
        hidden_act=act,
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
    )


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> CLIPTextConfig:
    words = tensors["text_model.embeddings.token_embedding.weight"]
    width = words.shape[1]
    widths = {name: config.hidden_size for name, config in CONFIGS.items()}
    known = version(widths, width, "the text tower's width", where)
    return CLIPTextConfig(
        vocab_size=words.shape[0],
        hidden_size=width,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(taken(tensors, r"text_model\.encoder\.layers\.(\d+)\.")),
        num_attention_heads=CONFIGS[known].num_attention_heads,
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        hidden_act=CONFIGS[known].hidden_act,
        layer_norm_eps=CONFIGS[known].layer_norm_eps,
    )


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> CLIPTextConfig:
    """From config.json, else, in a single file, from shapes: heads and activation as in Stable Diffusion 1
    or 2, by the width. (Elsewhere LAION trained the same sizes with gelu, and others with quick_gelu.)"""
    return _from_config(config, where) if config else _from_shapes(tensors, where)


KIND = Kind(
    CLIPText, CLIPTextConfig, CONFIGS,
    (
        Dialect("diffusers", r"text_model\.", HF),
        Dialect("transformers-5", r"(embeddings\.token_embedding|final_layer_norm)\.", TRANSFORMERS_5),
        Dialect("open_clip", r"transformer\.resblocks\.", OPEN_CLIP, _open_clip_numbers),
    ),
    {"clip_text_model", "clip"}, _sizes, untold="CLIP's activation (quick_gelu or gelu)",
    single_file=("cond_stage_model.transformer.",  # Stable Diffusion 1
                 "cond_stage_model.model."),       # Stable Diffusion 2
)
