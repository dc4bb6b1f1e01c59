"""CLIP's visual tower with its projection: names in other files, sizes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.clip import VISION_CONFIGS, CLIPVision, CLIPVisionConfig
from weights.dialects import Dialect, Row, StackedQkv, Transposed, numbers
from weights.options import CLIP, Kind, Options, Pictures, pair, require_known
from weights.strict import WeightsError

# Home: Hugging Face's CLIPVisionModelWithProjection. The published files hold a whole CLIP.
HF: dict[str, Row] = {
    "vision_model.embeddings.position_ids":         None,  # 0, 1, 2, ...
    "text_model":                                   None,  # the other tower of a whole CLIP
    "text_projection":                              None,  # likewise
    "logit_scale":                                  None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPVisionModel, which has no projection: such a file
# is recognised here, so that the error can name what it lacks.
TRANSFORMERS_5: dict[str, Row] = {
    "embeddings.position_ids":                      None,  # 0, 1, 2, ...
    "embeddings":                                   "vision_model.embeddings",
    "pre_layrnorm":                                 "vision_model.pre_layrnorm",
    "encoder":                                      "vision_model.encoder",
    "post_layernorm":                               "vision_model.post_layernorm",
}

# open_clip's names are OpenAI's own.
OPEN_CLIP: dict[str, Row] = {
    "visual.class_embedding":                       "vision_model.embeddings.class_embedding",
    "visual.conv1":                                 "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding":                  "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre":                                "vision_model.pre_layrnorm",
    "visual.transformer.resblocks.{n}.ln_1":        "vision_model.encoder.layers.{n}.layer_norm1",
    "visual.transformer.resblocks.{n}.attn.in_proj_weight":
                                                StackedQkv("vision_model.encoder.layers.{n}.self_attn.*_proj.weight"),
    "visual.transformer.resblocks.{n}.attn.in_proj_bias":
                                                StackedQkv("vision_model.encoder.layers.{n}.self_attn.*_proj.bias"),
    "visual.transformer.resblocks.{n}.attn.out_proj":
                                                    "vision_model.encoder.layers.{n}.self_attn.out_proj",
    "visual.transformer.resblocks.{n}.ln_2":        "vision_model.encoder.layers.{n}.layer_norm2",
    "visual.transformer.resblocks.{n}.mlp.c_fc":    "vision_model.encoder.layers.{n}.mlp.fc1",
    "visual.transformer.resblocks.{n}.mlp.c_proj":  "vision_model.encoder.layers.{n}.mlp.fc2",
    "visual.ln_post":                               "vision_model.post_layernorm",
    "visual.proj":                       Transposed("visual_projection.weight"),
    "token_embedding":                              None,  # from here on the other tower of a whole CLIP
    "positional_embedding":                         None,
    "transformer":                                  None,
    "ln_final":                                     None,
    "text_projection":                              None,
    "attn_mask":                                    None,  # the causal mask, a constant
    "text":                                         None,  # the text tower of the later models
    "logit_scale":                                  None,  # CLIP's temperature, used by its loss alone
    "logit_bias":                                   None,  # SigLIP's, likewise
    "input_resolution":                             None,  # OpenAI's files: sizes, as numbers
    "context_length":                               None,
    "vocab_size":                                   None,
}

SHAPES = {"projection_dim": ("visual_projection.weight", 0)}
ACTIVATIONS = {"hidden_act": ("quick_gelu", "gelu")}
# Each upstream's own defaults: published config.json files leave out what equals them.
HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}
IN_HF = Options({option: option for option in HF_DEFAULTS}, ACTIVATIONS, HF_DEFAULTS)

IN_OPEN_CLIP = Options(   # vision_cfg
    told={
        "layers": "num_hidden_layers", "width": "hidden_size", "head_width": "head_width",
        "mlp_ratio": "mlp_ratio", "patch_size": "patch_size", "image_size": "image_size",
    },
    only={
        "act_kwargs": (None, {}),
        "attentional_pool": (False,),                   # CoCa
        "block_type": (None, "default", "custom"),      # custom blocks without their options compute the same
        "ls_init_value": (None,),
        "no_ln_pre": (False,),                          # CLIPA
        "pool_type": ("tok",),
        "qk_norm": (False,),
        "scale_attn": (False,),
        "scale_attn_inner": (False,),
        "scale_fc": (False,),
        "scale_heads": (False,),
        "scaled_cosine_attn": (False,),
        "timm_model_name": (None, ""),
    },
    defaults={
        "num_hidden_layers": 12, "hidden_size": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
        "image_size": 224,
    },
    # These change nothing in evaluation, or concern what is refused above. The class token is normalised
    # alike before and after pooling; fixed positions are in the file like learnt ones.
    harmless={
        "attn_pooler_heads", "attn_pooler_queries", "final_ln_after_pool", "norm_kwargs", "output_tokens",
        "patch_dropout", "pos_embed_type", "timm_drop", "timm_drop_path", "timm_model_pretrained",
        "timm_pool", "timm_proj", "timm_proj_bias",
    },
)


def _hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """From Hugging Face's config.json, of the tower alone or of a whole CLIP."""
    options = config.get("vision_config") or ({} if "text_config" in config else config)
    # Written by early versions beside `vision_config`; transformers lets it win, defaults included.
    if config.get("vision_config_dict"):
        options = {**options, **HF_DEFAULTS, **config["vision_config_dict"]}
    return IN_HF.read(options, tensors, where)


def _open_clip(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """From open_clip_config.json."""
    whole = config["model_cfg"]
    vision = whole["vision_cfg"]
    sizes = IN_OPEN_CLIP.read(vision, tensors, where)
    norm = vision.get("norm_kwargs") or {}
    require_known(norm, {"eps"}, where)
    width = sizes["hidden_size"]
    if not isinstance(sizes["num_hidden_layers"], int):
        raise WeightsError(f"{where}: layers = {sizes['num_hidden_layers']}: CLIP's residual networks are "
                           f"not implemented here, only its vision transformers")
    return sizes | {
        "intermediate_size": int(width * sizes["mlp_ratio"]),
        "num_attention_heads": width // sizes["head_width"],
        "num_channels": 3,
        "projection_dim": whole["embed_dim"],
        "hidden_act": "quick_gelu" if whole.get("quick_gelu") else "gelu",
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    if "visual_projection.weight" not in tensors:
        raise WeightsError(f"{where}: visual_projection.weight is missing: the tower was saved without its "
                           f"projection; give a whole CLIP, or a CLIPVisionModelWithProjection")
    return (_open_clip if "model_cfg" in config else _hf)(config, tensors, where)


def _side(size: int | list[int] | tuple[int, ...]) -> int | tuple[int, int]:
    """One number for a square, else (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


KIND = Kind(
    name="clip-vision", model=CLIPVision, config=CLIPVisionConfig, configs=VISION_CONFIGS,
    dialects=(
        Dialect("hf", r"(vision_model|visual_projection)\.", HF),
        Dialect("transformers-5", r"(embeddings\.class_embedding|pre_layrnorm\.)", TRANSFORMERS_5),
        Dialect("open_clip", r"visual\.", OPEN_CLIP,
                numbers(r"(?:visual\.transformer\.resblocks|vision_model\.encoder\.layers)\.(\d+)\."),
                pictures="open_clip"),
    ),
    classes={"clip_vision_model", "clip"},
    second_config="open_clip_config.json",  # in timm's folders of CLIP, beside a config.json for timm
    read=_read,
    shapes=SHAPES,
    forms={"image_size": _side, "patch_size": _side},
    heads={"num_attention_heads": "hidden_size"},
    # Sizes do not help: LAION trained OpenAI's own sizes with gelu, and others LAION's with quick_gelu.
    not_in_weights={"visual_projection.weight": "CLIP's activation (quick_gelu or gelu)"},
    pictures=Pictures("image_size", "CLIP", CLIP),
    example_inputs=lambda config, draw: {
        "images": draw.normal(config.num_channels, *pair(config.image_size)),
    },
)
