"""CLIP's two towers, the text tower as Stable Diffusion has it: names in other files, sizes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from models.clip import CONFIGS, VISION_CONFIGS, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from schema import check, number
from weights.dialects import Dialect, Numbers, Row, StackedQkv, Transposed, indices_in, numbers
from weights.options import CLIP, RGB, Kind, Options, Pictures, causal, pair
from weights.strict import WeightsError
from weights.tokenizer import LENGTH

# Text tower. Home: Hugging Face's, as the published `text_encoder` folders hold it; a single file of Stable
# Diffusion 1 holds the same beneath `cond_stage_model.transformer.`.
HF_TEXT: dict[str, Row] = {
    "text_model.embeddings.position_ids":    None,  # 0, 1, 2, ...
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
    "text_projection":                       "text_projection",
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


# A whole CLIP, or a single file of Stable Diffusion 2, beneath `cond_stage_model.model.`. SD 2 reads the last
# but one of OpenCLIP-H's 24 layers through the final norm: `beyond` and `unread` after it are never used.
OPEN_CLIP_TEXT: dict[str, Row] = _blocks(
    "transformer.resblocks.{n}", "text_model.encoder.layers.{n}"
) | {
    "token_embedding":                       "text_model.embeddings.token_embedding",
    "positional_embedding":                  "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.{beyond}":        None,  # after the penultimate layer
    "ln_final":                              "text_model.final_layer_norm",
    "{projection}":                          Transposed("text_projection.weight"),
    "{unread}":                              None,  # SD 2's projection of the last layer
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
    "attn_mask":                             None,  # the causal mask, a constant
    "visual":                                None,  # the other tower of a whole CLIP
} | dict.fromkeys(("input_resolution", "context_length", "vocab_size"))  # OpenAI's files: sizes, as numbers
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
    whole = any(name.startswith(("visual.", "text_projection.")) for name in names)  # theirs, ours
    read = ours or (theirs if whole or theirs == OPEN_CLIP_CUT else theirs - 1)
    projection: Numbers = {"projection" if whole else "unread": "text_projection"}
    return [*({"n": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs)), projection]


# Each upstream's own defaults: published config.json files leave out what equals them.
ACTIVATIONS = {"hidden_act": ("quick_gelu", "gelu")}
HF_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}
TEXT_IN_HF = Options({option: option for option in HF_TEXT_DEFAULTS}, ACTIVATIONS, HF_TEXT_DEFAULTS)
TEXT_IN_OPEN_CLIP = Options(   # text_cfg
    told={
        "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
        "mlp_ratio": "mlp_ratio", "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
        "norm_kwargs.eps": "layer_norm_eps",
    },
    only={
        "block_type": (None, "default", "custom"),
        "pool_type": ("argmax",),
        "proj_type": ("linear",),
    },
    defaults={
        "num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "mlp_ratio": 4.0,
        "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
    },
    # Padding has no effect on the states before it; the final norm is the same before and after pooling;
    # the others concern what is refused above.
    harmless={
        "eos_id", "final_ln_after_pool", "hf_model_pretrained", "hf_pooler_type", "hf_proj_type",
        "output_tokens", "pad_id",
    },
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
    """From Hugging Face's config.json, of the tower alone or of a whole CLIP, or open_clip_config.json."""
    if "model_cfg" in config:
        sizes = TEXT_IN_OPEN_CLIP.read(config["model_cfg"]["text_cfg"], where)
        sizes |= {
            "intermediate_size": int(sizes["hidden_size"] * sizes["mlp_ratio"]),
            "hidden_act": _open_clip_activation(config["model_cfg"]),
        }
    else:
        sizes = TEXT_IN_HF.read(_part(config, "text_config", HF_TEXT_DEFAULTS), where)
        check(sizes, {"eos_token_id": number(int, -1)}, where)
        end, words = sizes["eos_token_id"], sizes["vocab_size"]
        if end >= words - 1 or (end, words) == (2, 49408):  # OpenAI's files, whose largest id is the last
            del sizes["eos_token_id"]
    projection = tensors.get("text_projection.weight")
    return {"eos_token_id": -1} | sizes | {"projection_dim": None if projection is None else len(projection)}


def _part(config: Mapping[str, Any], part: str, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of one tower in Hugging Face's config.json, of the tower alone or of a whole CLIP."""
    options = config.get(part) or ({} if {"text_config", "vision_config"} & config.keys() else config)
    # Written by early versions beside `vision_config`; transformers lets it win, defaults included.
    earlier = config.get(f"{part}_dict")
    return {**options, **defaults, **earlier} if earlier else options


def _read_vision(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """From Hugging Face's config.json, of the tower alone or of a whole CLIP, or open_clip_config.json."""
    if "visual_projection.weight" not in tensors:
        raise WeightsError(f"{where}: visual_projection.weight is missing: the tower was saved without its "
                           f"projection; give a whole CLIP, or a CLIPVisionModelWithProjection")
    if "model_cfg" in config:
        return _open_clip(config["model_cfg"], where)
    return VISION_IN_HF.read(_part(config, "vision_config", HF_DEFAULTS), where)


def _open_clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    sizes = VISION_IN_OPEN_CLIP.read(config["vision_cfg"], where)
    if not isinstance(sizes["num_hidden_layers"], int):
        raise WeightsError(f"{where}: layers = {sizes['num_hidden_layers']}: CLIP's residual networks are "
                           f"not implemented here, only its vision transformers")
    return sizes | {
        "intermediate_size": int(sizes["hidden_size"] * sizes["mlp_ratio"]),
        "num_attention_heads": sizes["hidden_size"] // sizes["head_width"],
        "projection_dim": config["embed_dim"],
        "hidden_act": _open_clip_activation(config),
    }


def _open_clip_activation(config: Mapping[str, Any]) -> str:
    return "quick_gelu" if config.get("quick_gelu") else "gelu"


def _side(size: int | list[int] | tuple[int, ...]) -> int | tuple[int, int]:
    """One number for a square, else (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


def _text_inputs(config: CLIPTextConfig, draw: Any) -> dict[str, Tensor]:
    ids = draw.below(config.vocab_size, config.max_position_embeddings)
    if config.projection_dim is not None:
        ids[:, -1] = config.eos_token_id % config.vocab_size  # the end mark, which is read
    return {"ids": ids}


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
    second_config="open_clip_config.json",  # of a whole CLIP
    read=_read_text,
    heads={"num_attention_heads": "hidden_size"},
    not_in_weights={"text_model.final_layer_norm.weight": _ACTIVATION},
    single_file=("cond_stage_model.transformer.",  # Stable Diffusion 1
                 "cond_stage_model.model."),       # Stable Diffusion 2
    clip_tokenizer=True,
    fed={"max_position_embeddings": number(int, LENGTH)},
    example_inputs=_text_inputs,
    outputs=lambda model, inputs: (
        {"output": model(**inputs)} if model.config.projection_dim is None
        else {"pooled": model.pooled(**inputs)}
    ),
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
