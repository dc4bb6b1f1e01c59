"""CLIP's two towers, the text tower as Stable Diffusion has it: names in other files, sizes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from models.clip import CONFIGS, VISION_CONFIGS, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from schema import number
from weights.dialects import Dialect, Numbers, Row, StackedQkv, Transposed, indices_in, numbers
from weights.options import CLIP, RGB, Kind, Options, Pictures, causal, pair, same_names
from weights.strict import WeightsError
from weights.tokenizer import LENGTH

# Text tower. Home: Hugging Face's, as the published `text_encoder` folders hold it; a single file of Stable
# Diffusion 1 holds the same beneath `cond_stage_model.transformer.`.
HF_TEXT: dict[str, Row] = {
    "text_model.embeddings.position_ids":    None,  # 0, 1, 2, ...
    "text_projection":                       None,  # the U-Net reads the states before it
    "vision_model":                          None,  # the other tower of a whole CLIP
    "visual_projection":                     None,  # likewise
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
}
# Visual tower. Home: Hugging Face's CLIPVisionModelWithProjection. The published files hold a whole CLIP.
HF_VISION: dict[str, Row] = {
    "vision_model.embeddings.position_ids":  None,  # 0, 1, 2, ...
    "text_model":                            None,  # the other tower of a whole CLIP
    "text_projection":                       None,  # likewise
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPTextModel, and when it saves a CLIPVisionModel. The
# latter has no projection: such a file is recognised here, so that the error can name what it lacks.
TRANSFORMERS_5_TEXT: dict[str, Row] = {
    "embeddings.position_ids":               None,  # 0, 1, 2, ...
    "":                                      "text_model",
}
TRANSFORMERS_5_VISION: dict[str, Row] = {
    "embeddings.position_ids":               None,  # 0, 1, 2, ...
    "visual_projection":                     "visual_projection",
    "":                                      "vision_model",
}


def _blocks(theirs: str, ours: str) -> dict[str, Row]:
    """OpenAI's names, which are open_clip's, of a tower's residual blocks."""
    return {
        f"{theirs}.ln_1":                    f"{ours}.layer_norm1",
        f"{theirs}.attn.in_proj_weight":     StackedQkv(f"{ours}.self_attn.*_proj.weight"),
        f"{theirs}.attn.in_proj_bias":       StackedQkv(f"{ours}.self_attn.*_proj.bias"),
        f"{theirs}.attn.out_proj":           f"{ours}.self_attn.out_proj",
        f"{theirs}.ln_2":                    f"{ours}.layer_norm2",
        f"{theirs}.mlp.c_fc":                f"{ours}.mlp.fc1",
        f"{theirs}.mlp.c_proj":              f"{ours}.mlp.fc2",
    }


# A single file of Stable Diffusion 2, beneath `cond_stage_model.model.`. SD 2 reads the last but one of
# OpenCLIP-H's 24 layers through the final norm: the `beyond` after it are never used.
OPEN_CLIP_TEXT: dict[str, Row] = _blocks(
    "transformer.resblocks.{n}", "text_model.encoder.layers.{n}"
) | {
    "token_embedding":                       "text_model.embeddings.token_embedding",
    "positional_embedding":                  "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.{beyond}":        None,  # after the penultimate layer
    "ln_final":                              "text_model.final_layer_norm",
    "text_projection":                       None,  # the U-Net reads the states before it
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
    "attn_mask":                             None,  # the causal mask, a constant
    "visual":                                None,  # the other tower of a whole CLIP
}
OPEN_CLIP_VISION: dict[str, Row] = _blocks(
    "visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}"
) | {
    "visual.class_embedding":                "vision_model.embeddings.class_embedding",
    "visual.conv1":                          "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding":           "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre":                         "vision_model.pre_layrnorm",
    "visual.ln_post":                        "vision_model.post_layernorm",
    "visual.proj":                           Transposed("visual_projection.weight"),
} | dict.fromkeys((
    # The other tower of a whole CLIP; `text` in the later models
    "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask",
    "text",
    "logit_scale", "logit_bias",  # CLIP's temperature and SigLIP's bias, used by the loss alone
    "input_resolution", "context_length", "vocab_size",  # OpenAI's files: sizes, as numbers
))
# Files converted back from a diffusers folder hold 23 layers: they were cut there before.
OPEN_CLIP_CUT = 23


def _text_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    theirs = max(indices_in(names, r"transformer\.resblocks\.(\d+)\."), default=-1) + 1
    ours = len(indices_in(names, r"text_model\.encoder\.layers\.(\d+)\."))
    read = ours or (theirs if theirs == OPEN_CLIP_CUT else theirs - 1)
    return [*({"n": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs))]


# Each upstream's own defaults: published config.json files leave out what equals them.
ACTIVATIONS = {"hidden_act": ("quick_gelu", "gelu")}
TEXT_IN_HF = Options(
    same_names(CLIPTextConfig), ACTIVATIONS,
    {"max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
)
HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}
VISION_IN_HF = Options({option: option for option in HF_DEFAULTS}, ACTIVATIONS, HF_DEFAULTS)
VISION_IN_OPEN_CLIP = Options(   # vision_cfg
    told={
        "layers": "num_hidden_layers", "width": "hidden_size", "head_width": "head_width",
        "mlp_ratio": "mlp_ratio", "patch_size": "patch_size", "image_size": "image_size",
        "norm_kwargs.eps": "layer_norm_eps",
    },
    only={
        "block_type": (None, "default", "custom"),      # custom blocks without their options compute the same
        "pool_type": ("tok",),
        "timm_model_name": (None, ""),
    },
    defaults={
        "num_hidden_layers": 12, "hidden_size": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
        "image_size": 224, "num_channels": 3, "layer_norm_eps": 1e-5,
    },
    # These change nothing in evaluation, or concern what is refused above. The class token is normalised
    # alike before and after pooling; fixed positions are in the file like learnt ones.
    harmless={
        "attn_pooler_heads", "attn_pooler_queries", "final_ln_after_pool", "output_tokens", "patch_dropout",
        "pos_embed_type", "timm_drop", "timm_drop_path", "timm_model_pretrained", "timm_pool", "timm_proj",
        "timm_proj_bias",
    },
)


def _read_text(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    whole = config.get("text_config")  # a whole CLIP holds both towers' sizes
    return TEXT_IN_HF.read(whole or config, where)


def _read_vision(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """From Hugging Face's config.json, of the tower alone or of a whole CLIP, or open_clip_config.json."""
    if "visual_projection.weight" not in tensors:
        raise WeightsError(f"{where}: visual_projection.weight is missing: the tower was saved without its "
                           f"projection; give a whole CLIP, or a CLIPVisionModelWithProjection")
    if "model_cfg" in config:
        return _open_clip(config["model_cfg"], where)
    options = config.get("vision_config") or ({} if "text_config" in config else config)
    # Written by early versions beside `vision_config`; transformers lets it win, defaults included.
    if config.get("vision_config_dict"):
        options = {**options, **HF_DEFAULTS, **config["vision_config_dict"]}
    return VISION_IN_HF.read(options, where)


def _open_clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    sizes = VISION_IN_OPEN_CLIP.read(config["vision_cfg"], where)
    if not isinstance(sizes["num_hidden_layers"], int):
        raise WeightsError(f"{where}: layers = {sizes['num_hidden_layers']}: CLIP's residual networks are "
                           f"not implemented here, only its vision transformers")
    return sizes | {
        "intermediate_size": int(sizes["hidden_size"] * sizes["mlp_ratio"]),
        "num_attention_heads": sizes["hidden_size"] // sizes["head_width"],
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }


def _side(size: int | list[int] | tuple[int, ...]) -> int | tuple[int, int]:
    """One number for a square, else (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


# Sizes do not show it: LAION trained OpenAI's own sizes with gelu, and others LAION's with quick_gelu.
_ACTIVATION = "CLIP's activation (quick_gelu or gelu)"
TEXT = Kind(
    name="clip-text", model=CLIPText, config=CLIPTextConfig, configs=CONFIGS,
    dialects=(
        Dialect("diffusers", r"text_model\.", HF_TEXT),
        Dialect("transformers-5", r"(embeddings\.token_embedding|final_layer_norm)\.", TRANSFORMERS_5_TEXT),
        Dialect("open_clip", r"transformer\.resblocks\.", OPEN_CLIP_TEXT, _text_numbers),
    ),
    classes={"clip_text_model", "clip"},
    read=_read_text,
    heads={"num_attention_heads": "hidden_size"},
    not_in_weights={"text_model.final_layer_norm.weight": _ACTIVATION},
    single_file=("cond_stage_model.transformer.",  # Stable Diffusion 1
                 "cond_stage_model.model."),       # Stable Diffusion 2
    clip_tokenizer=True,
    fed={"max_position_embeddings": number(int, LENGTH)},
    example_inputs=lambda config, draw: {
        "ids": draw.below(config.vocab_size, config.max_position_embeddings),
    },
    constants=lambda config, inputs: causal(inputs["ids"]),
)
VISION = Kind(
    name="clip-vision", model=CLIPVision, config=CLIPVisionConfig, configs=VISION_CONFIGS,
    dialects=(
        Dialect("hf", r"(vision_model\.pre_layrnorm|visual_projection)\.", HF_VISION),
        Dialect("transformers-5", r"(embeddings\.class_embedding|pre_layrnorm\.)", TRANSFORMERS_5_VISION),
        Dialect("open_clip", r"visual\.", OPEN_CLIP_VISION,
                numbers(r"(?:visual\.transformer\.resblocks|vision_model\.encoder\.layers)\.(\d+)\."),
                pictures="open_clip"),
    ),
    classes={"clip_vision_model", "clip"},
    second_config="open_clip_config.json",  # in timm's folders of CLIP, beside a config.json for timm
    read=_read_vision,
    shapes={"projection_dim": ("visual_projection.weight", 0)},
    forms={"image_size": _side, "patch_size": _side},
    heads={"num_attention_heads": "hidden_size"},
    not_in_weights={"visual_projection.weight": _ACTIVATION},
    fed={"num_channels": RGB},
    pictures=Pictures("image_size", "CLIP", CLIP),
    example_inputs=lambda config, draw: {
        "images": draw.normal(config.num_channels, *pair(config.image_size)),
    },
)
