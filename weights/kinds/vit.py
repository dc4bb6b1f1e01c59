"""The Vision Transformer: names in timm's and Hugging Face's files, sizes."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.vit import CONFIGS, ViT, ViTConfig
from weights.dialects import Dialect, OneOfQkv, Row, beneath, numbers
from weights.options import HALVES, RGB, Kind, Options, Pictures, pair
from weights.strict import WeightsError

# Home: timm's.
TIMM: dict[str, Row] = {
    "head":                                           None,  # the classifier
    "pre_logits":                                     None,  # in old files: a layer that timm left out later
}

# ViTModel as it is published, and as transformers 5 saves it too.
EMBEDDINGS: dict[str, Row] = {
    "embeddings.cls_token":                           "cls_token",
    "embeddings.mask_token":                          None,  # of masked pretraining
    "embeddings.position_embeddings":                 "pos_embed",
    "embeddings.patch_embeddings.projection":         "patch_embed.proj",
    "layernorm":                                      "norm",
    "pooler":                                         None,  # ViTModel's own, which no classifier reads
}
HF: dict[str, Row] = EMBEDDINGS | {
    "encoder.layer.{n}.layernorm_before":             "blocks.{n}.norm1",
    "encoder.layer.{n}.attention.attention.query":    OneOfQkv("blocks.{n}.attn.qkv", 0),
    "encoder.layer.{n}.attention.attention.key":      OneOfQkv("blocks.{n}.attn.qkv", 1),
    "encoder.layer.{n}.attention.attention.value":    OneOfQkv("blocks.{n}.attn.qkv", 2),
    "encoder.layer.{n}.attention.output.dense":       "blocks.{n}.attn.proj",
    "encoder.layer.{n}.layernorm_after":              "blocks.{n}.norm2",
    "encoder.layer.{n}.intermediate.dense":           "blocks.{n}.mlp.fc1",
    "encoder.layer.{n}.output.dense":                 "blocks.{n}.mlp.fc2",
}

_numbers = numbers(r"(?:blocks|(?:vit\.)?encoder\.layer)\.(\d+)\.")

SHAPES = {
    "patch_size":      ("patch_embed.proj.weight", 2, 3),
    "in_chans":        ("patch_embed.proj.weight", 1),
    "embed_dim":       ("patch_embed.proj.weight", 0),
    "depth":           r"blocks\.(\d+)\.",
    "hidden_features": ("blocks.0.mlp.fc1.weight", 0),
    "qkv_bias":        ("blocks.0.attn.qkv.bias",),
    "class_token":     ("cls_token",),
    "fc_norm":         ("fc_norm.weight",),
}

HF_EPS = {"norm_eps": 1e-12}  # of the norms, in every ViT that Hugging Face publishes; timm's is 1e-6

IN_HF = Options(
    told={
        "image_size": "img_size", "patch_size": "patch_size", "num_channels": "in_chans",
        "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
        "intermediate_size": "hidden_features", "qkv_bias": "qkv_bias", "layer_norm_eps": "norm_eps",
    },
    only={
        "model_type": ("vit",),                    # vit_mae and others share the beginning of their name
        "hidden_act": ("gelu", "gelu_python"),     # both the exact one
    },
    defaults={                                     # transformers'
        "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768, "depth": 12, "num_heads": 12,
        "hidden_features": 3072, "qkv_bias": True,
        "class_token": True, "global_pool": "token", "fc_norm": False,
    } | HF_EPS,
)
IN_TIMM = Options(                                 # model_args
    told={name: name for name in (
        "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
        "class_token", "fc_norm", "global_pool",
    )},
    only={
        "act_layer": (None, "gelu"),
        "final_norm": (True,),
        "global_pool": ("token", "avg"),
        "init_values": (None, 0),
        "norm_layer": (None, "layernorm"),
        "pos_embed": ("learn",),
        "proj_bias": (True,),
        "reg_tokens": (0,),
    },
    defaults={"norm_eps": 1e-6},
    harmless={
        "num_classes", "weight_init", "fix_init", "dynamic_img_size", "strict_img_size", "drop_rate",
        "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    },
)

# timm's names of plain ViTs. Others that begin so have blocks, activations or an eps of their own, which
# their tensors do not always show (siglip, rpn, quickgelu).
PLAIN = r"(?:vit|deit)_(\w+?)_patch\d+_(?:gap_)?\d+(?:_(?:in21k|miil|sam|dino|augreg))*"
OWN_SIZES = {  # embed_dim, depth, num_heads
    "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
    "huge": (1280, 32, 16), "giant": (1408, 40, 16), "gigantic": (1664, 48, 16),
    "vit_base_patch16_gap_224": (768, 12, 16), "test_vit": (64, 6, 2),
}


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """From Hugging Face's config.json, or timm's: arguments that override what its architecture has.

    Where timm's leaves the pooling out, features are the class token, or the mean where there is none or the
    norm is an `fc_norm`.
    """
    if not config.get("architecture"):
        return IN_HF.read(config, where)
    architecture = config["architecture"].partition(".")[0]  # what follows the point names the training
    args = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or config      # older files have it all on one level
    plain = re.fullmatch(PLAIN, architecture)
    own = OWN_SIZES.get(architecture) or OWN_SIZES.get(plain[1] if plain else "")
    if own is None:
        raise WeightsError(f"{where}: {architecture} is not implemented here; the plain ViTs of timm are "
                           f"called vit_base_patch16_224 and the like")
    mean = "fc_norm.weight" in tensors or "cls_token" not in tensors
    pools = (args.get("global_pool"), pretrained.get("global_pool"), config.get("global_pool"))
    options = dict(zip(("embed_dim", "depth", "num_heads"), own, strict=True)) | args | {
        "img_size": args.get("img_size") or (pretrained.get("input_size") or [3, 224, 224])[-2:],
        "global_pool": next((pool for pool in pools if pool is not None), "avg" if mean else "token"),
    }
    options = {name: value for name, value in options.items() if value is not None}
    sizes = IN_TIMM.read(options, where)
    if "mlp_ratio" in sizes:
        sizes["hidden_features"] = int(sizes["embed_dim"] * sizes["mlp_ratio"])
    return sizes


KIND = Kind(
    name="vit", model=ViT, config=ViTConfig, configs=CONFIGS,
    dialects=(  # a classifier: ViTForImageClassification's; a decoder: ViTForMaskedImageModeling's
        Dialect("timm", r"blocks\.\d+\.attn\.qkv\.", TIMM, pictures="timm"),
        Dialect("hf", r"vit\.encoder\.layer\.", beneath("vit", HF, "classifier", "decoder"), _numbers,
                HF_EPS),
        Dialect("hf-model", r"encoder\.layer\.\d+\.layernorm_before\.", HF, _numbers, HF_EPS),
    ),
    classes={"vit", "vit_", "deit_", "test_vit"},
    read=_read,
    shapes=SHAPES,
    forms={"img_size": pair, "patch_size": pair},
    heads={"num_heads": "embed_dim"},
    fed={"in_chans": RGB},
    pictures=Pictures("img_size", "ViT", HALVES, "bilinear"),
    example_inputs=lambda config, draw: {"images": draw.normal(config.in_chans, *config.img_size)},
)
