"""CLIP's text tower as Stable Diffusion has it: names in other files, sizes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from models.clip import CONFIGS, CLIPText, CLIPTextConfig
from weights.dialects import Dialect, Numbers, Row, StackedQkv, indices_in
from weights.options import Kind, Options

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
                                           StackedQkv("text_model.encoder.layers.{n}.self_attn.*_proj.weight"),
    "transformer.resblocks.{n}.attn.in_proj_bias":
                                           StackedQkv("text_model.encoder.layers.{n}.self_attn.*_proj.bias"),
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
    theirs = max(indices_in(names, r"transformer\.resblocks\.(\d+)\."), default=-1) + 1
    ours = len(indices_in(names, r"text_model\.encoder\.layers\.(\d+)\."))
    read = ours or (theirs if theirs == OPEN_CLIP_CUT else theirs - 1)
    return [*({"n": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs))]


TOLD = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings", "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
ONLY = {"hidden_act": ("quick_gelu", "gelu")}
DEFAULTS = {"max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    text = config.get("text_config") or config  # a whole CLIP holds both towers' sizes
    return Options(TOLD, ONLY, DEFAULTS).read(text, tensors, where)


KIND = Kind(
    name="clip-text", model=CLIPText, config=CLIPTextConfig, configs=CONFIGS,
    dialects=(
        Dialect("diffusers", r"text_model\.", HF),
        Dialect("transformers-5", r"(embeddings\.token_embedding|final_layer_norm)\.", TRANSFORMERS_5),
        Dialect("open_clip", r"transformer\.resblocks\.", OPEN_CLIP, _open_clip_numbers),
    ),
    classes={"clip_text_model", "clip"},
    read=_read,
    heads={"num_attention_heads": "hidden_size"},
    # LAION trained the same sizes with gelu, and others with quick_gelu.
    not_in_weights={"text_model.final_layer_norm.weight": "CLIP's activation (quick_gelu or gelu)"},
    single_file=("cond_stage_model.transformer.",  # Stable Diffusion 1
                 "cond_stage_model.model."),       # Stable Diffusion 2
    clip_tokenizer=True,
    example_inputs=lambda config, draw: {
        "ids": draw.below(config.vocab_size, config.max_position_embeddings),
    },
)
