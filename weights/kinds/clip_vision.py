"""CLIP's visual tower with its projection: names in other files, sizes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.clip import VISION_CONFIGS, CLIPVision, CLIPVisionConfig
from weights.kinds.common import (
    Dialect,
    Kind,
    Qkv,
    Row,
    Transposed,
    implemented,
    no_more_options,
    numbers,
    taken,
)
from weights.strict import WeightsError, listed

# Home: Hugging Face's CLIPVisionModelWithProjection. The published files hold a whole CLIP.
HF: dict[str, Row] = {
    "vision_model.embeddings.position_ids":         None,  # 0, 1, 2, ...
    "text_model":                                   None,  # the other tower of a whole CLIP
    "text_projection":                              None,  # likewise
    "logit_scale":                                  None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPVisionModel, which has no projection: such a file
# is recognised here so that sizes() can say what it lacks.
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
                                                Qkv("vision_model.encoder.layers.{n}.self_attn.*_proj.weight"),
    "visual.transformer.resblocks.{n}.attn.in_proj_bias":
                                                Qkv("vision_model.encoder.layers.{n}.self_attn.*_proj.bias"),
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

# Each upstream's own defaults: published config.json files leave out what equals them.
HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}
OPEN_CLIP_DEFAULTS: dict[str, Any] = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
}

OPEN_CLIP_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
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
}
# These change nothing in evaluation, or concern what is refused above. The class token is normalised alike
# before and after pooling; fixed positions are in the file like learnt ones.
OPEN_CLIP_WITHOUT_EFFECT = {
    "attn_pooler_heads", "attn_pooler_queries", "final_ln_after_pool", "output_tokens", "patch_dropout",
    "pos_embed_type", "timm_drop", "timm_drop_path", "timm_model_pretrained", "timm_pool", "timm_proj",
    "timm_proj_bias",
}


def _hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The visual tower's options in Hugging Face's config.json, of the tower alone or of a whole CLIP."""
    options = HF_DEFAULTS | dict(config.get("vision_config") or ({} if "text_config" in config else config))
    # Written by early versions beside `vision_config`; transformers lets it win, defaults included.
    if config.get("vision_config_dict"):
        options |= HF_DEFAULTS | config["vision_config_dict"]
    return options


def _open_clip(config: Mapping[str, Any], projection: int, where: str) -> dict[str, Any]:
    """Hugging Face's options out of open_clip_config.json, whose tensors project to `projection`."""
    whole = config["model_cfg"]
    given = whole["vision_cfg"]
    implemented(given, OPEN_CLIP_IMPLEMENTED, where)
    known = {*OPEN_CLIP_IMPLEMENTED, *OPEN_CLIP_DEFAULTS, *OPEN_CLIP_WITHOUT_EFFECT, "norm_kwargs"}
    no_more_options(given, known, where)
    norm = given.get("norm_kwargs") or {}
    no_more_options(norm, {"eps"}, where)
    sizes = OPEN_CLIP_DEFAULTS | given
    if not isinstance(sizes["layers"], int):
        raise WeightsError(f"{where}: layers = {sizes['layers']}: CLIP's residual networks are not "
                           f"implemented here, only its vision transformers")
    if whole["embed_dim"] != projection:
        raise WeightsError(f"{where} does not fit the tensors: embed_dim = {whole['embed_dim']}, "
                           f"they project to {projection}")
    return {
        "hidden_size": sizes["width"],
        "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["width"] // sizes["head_width"],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "num_channels": 3,
        "hidden_act": "quick_gelu" if whole.get("quick_gelu") else "gelu",
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def _side(size: int | list[int] | tuple[int, ...]) -> int | tuple[int, int]:
    """One number for a square, else (height, width)."""
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


def _grid(image: int | tuple[int, int], patch: int | tuple[int, int]) -> int:
    """The number of patches."""
    (height, width), (down, right) = ((s, s) if isinstance(s, int) else s for s in (image, patch))
    return (height // down) * (width // right)


def _sizes(
    config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str
) -> CLIPVisionConfig:
    """Widths, depth and patches from shapes, and the configuration must agree with them; heads, activation,
    eps and the picture's size from the configuration: config.json of Hugging Face (the tower's or a whole
    CLIP's) or open_clip_config.json. What it leaves out has its upstream's default.

    Without a configuration always a WeightsError: nothing in the weights tells quick_gelu from gelu, and
    sizes do not help. LAION trained OpenAI's own sizes with gelu, and others trained LAION's with quick_gelu.
    """
    if "visual_projection.weight" not in tensors:
        raise WeightsError(f"{where}: visual_projection.weight is missing: the tower was saved without its "
                           f"projection; give a whole CLIP, or a CLIPVisionModelWithProjection")
    if not config:
        raise WeightsError(f"{where}: weights alone do not tell CLIP's activation (quick_gelu or gelu); give "
                           f"a folder with its config.json or open_clip_config.json")
    patches = tensors["vision_model.embeddings.patch_embedding.weight"].shape         # (D, C, h, w)
    tokens = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]    # 1 + patches
    projection = tensors["visual_projection.weight"].shape[0]
    found = {
        "hidden_size": patches[0],
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(taken(tensors, r"vision_model\.encoder\.layers\.(\d+)\.")),
        "patch_size": _side(tuple(patches[2:])),
        "num_channels": patches[1],
    }

    options = _open_clip(config, projection, where) if "model_cfg" in config else _hf(config)
    implemented(options, {"hidden_act": ("quick_gelu", "gelu")}, where)
    options["image_size"], options["patch_size"] = _side(options["image_size"]), _side(options["patch_size"])
    odd = [f"{name} = {options[name]}, not {size}" for name, size in found.items() if options[name] != size]
    if odd:
        raise WeightsError(f"{where} does not fit the tensors: {listed(odd)}")
    if 1 + _grid(options["image_size"], options["patch_size"]) != tokens:
        raise WeightsError(f"{where} does not fit the tensors: image_size = {options['image_size']} in "
                           f"patches of {options['patch_size']} does not make the {tokens} tokens "
                           f"of position_embedding")
    if options["hidden_size"] % options["num_attention_heads"]:
        raise WeightsError(f"{where}: {options['num_attention_heads']} heads do not divide the width "
                           f"{options['hidden_size']}")
    return CLIPVisionConfig(
        **found,
        num_attention_heads=options["num_attention_heads"],
        image_size=options["image_size"],
        projection_dim=projection,
        hidden_act=options["hidden_act"],
        layer_norm_eps=options["layer_norm_eps"],
    )


KIND = Kind(
    CLIPVision, CLIPVisionConfig, VISION_CONFIGS,
    (
        Dialect("hf", r"(vision_model|visual_projection)\.", HF),
        Dialect("transformers-5", r"(embeddings\.class_embedding|pre_layrnorm\.)", TRANSFORMERS_5),
        Dialect("open_clip", r"visual\.", OPEN_CLIP,
                numbers(r"(?:visual\.transformer\.resblocks|vision_model\.encoder\.layers)\.(\d+)\.")),
    ),
    {"clip_vision_model", "clip"}, _sizes,
)
