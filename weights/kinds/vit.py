"""The Vision Transformer: names in timm's and Hugging Face's files, sizes."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from models.vit import CONFIGS, ViT, ViTConfig
from weights.kinds.common import Dialect, Kind, Row, Third, implemented, no_more_options, numbers, taken
from weights.strict import WeightsError

# Home: timm's.
TIMM: dict[str, Row] = {
    "head":                                           None,  # the classifier
    "pre_logits":                                     None,  # in old files: a layer that timm left out later
}

EMBEDDINGS: dict[str, Row] = {
    "embeddings.cls_token":                           "cls_token",
    "embeddings.mask_token":                          None,  # of masked pretraining
    "embeddings.position_embeddings":                 "pos_embed",
    "embeddings.patch_embeddings.projection":         "patch_embed.proj",
    "layernorm":                                      "norm",
    "pooler":                                         None,  # ViTModel's own, which no classifier reads
}

# ViTModel as it is published, and as transformers 5 saves it too.
HF: dict[str, Row] = EMBEDDINGS | {
    "encoder.layer.{n}.layernorm_before":             "blocks.{n}.norm1",
    "encoder.layer.{n}.attention.attention.query":    Third("blocks.{n}.attn.qkv", 0),
    "encoder.layer.{n}.attention.attention.key":      Third("blocks.{n}.attn.qkv", 1),
    "encoder.layer.{n}.attention.attention.value":    Third("blocks.{n}.attn.qkv", 2),
    "encoder.layer.{n}.attention.output.dense":       "blocks.{n}.attn.proj",
    "encoder.layer.{n}.layernorm_after":              "blocks.{n}.norm2",
    "encoder.layer.{n}.intermediate.dense":           "blocks.{n}.mlp.fc1",
    "encoder.layer.{n}.output.dense":                 "blocks.{n}.mlp.fc2",
}

# As transformers 5 calls its parameters; its save_pretrained goes back to the names above.
TRANSFORMERS_5: dict[str, Row] = EMBEDDINGS | {
    "layers.{n}.layernorm_before":                    "blocks.{n}.norm1",
    "layers.{n}.attention.q_proj":                    Third("blocks.{n}.attn.qkv", 0),
    "layers.{n}.attention.k_proj":                    Third("blocks.{n}.attn.qkv", 1),
    "layers.{n}.attention.v_proj":                    Third("blocks.{n}.attn.qkv", 2),
    "layers.{n}.attention.o_proj":                    "blocks.{n}.attn.proj",
    "layers.{n}.layernorm_after":                     "blocks.{n}.norm2",
    "layers.{n}.mlp.fc1":                             "blocks.{n}.mlp.fc1",
    "layers.{n}.mlp.fc2":                             "blocks.{n}.mlp.fc2",
}

HEADS_OF_HF: dict[str, Row] = {
    "classifier":                                     None,  # ViTForImageClassification's
    "decoder":                                        None,  # ViTForMaskedImageModeling's
}


def _with_a_head(table: Mapping[str, Row]) -> dict[str, Row]:
    """The table for models with a head of their own, which keep ViTModel beneath `vit.`."""
    return {f"vit.{theirs}": ours for theirs, ours in table.items()} | HEADS_OF_HF


_numbers = numbers(r"(?:blocks|(?:vit\.)?(?:encoder\.layer|layers))\.(\d+)\.")

# Tensors of relatives of the plain ViT -> what they are.
RELATIVES: dict[str, str] = {
    r"blocks\.\d+\.(ls[12]\.|gamma_[12])":            "layer scale (init_values)",
    r"blocks\.\d+\.attn\.[qk]_norm\.":                "norms of q and k (qk_norm)",
    r"blocks\.\d+\.(attn|mlp)\.norm\.":               "norms within the blocks (scale_attn_norm, ...)",
    r"blocks\.\d+\.mlp\.(fc1_[gx]|w12)\.":            "a gated MLP (SwiGLU)",
    r"blocks\.\d+\.attn\.(gate|q_bias|rel_pos)":      "another attention (a gate, a bias of its own)",
    r"(norm_pre|ln_pre)\.":                           "a norm before the blocks (pre_norm)",
    r"reg_token":                                     "register tokens (reg_tokens)",
    r"dist_token":                                    "a distillation token",
    r"attn_pool\.":                                   "pooling by attention (global_pool map)",
    r"patch_embed\.(norm|backbone)\.":                "patches by more than one convolution (a hybrid)",
}

HF_EPS = {"norm_eps": 1e-12}  # of the norms, in every ViT that Hugging Face publishes; timm's is 1e-6

# Option -> the values that models/vit.py implements; an absent option has the first.
IN_HF: dict[str, tuple[Any, ...]] = {
    "model_type": ("vit",),                    # vit_mae and others share the beginning of their name
    "hidden_act": ("gelu", "gelu_python"),     # both the exact one
}
IN_TIMM: dict[str, tuple[Any, ...]] = {        # model_args
    "act_layer": (None, "gelu"),
    "attn_layer": (None,),
    "block_fn": (None,),
    "dynamic_img_pad": (False,),
    "embed_layer": (None,),
    "embed_norm_layer": (None,),
    "final_norm": (True,),
    "global_pool": ("token", "avg"),
    "init_values": (None, 0),
    "mlp_layer": (None,),
    "no_embed_class": (False,),
    "norm_layer": (None, "layernorm"),
    "pool_include_prefix": (False,),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "proj_bias": (True,),
    "qk_norm": (False,),
    "reg_tokens": (0,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
}
READ_IN_TIMM = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "class_token", "fc_norm",
}
WITHOUT_EFFECT_IN_TIMM = {
    "num_classes", "weight_init", "fix_init", "dynamic_img_size", "strict_img_size", "drop_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}

# timm's names of plain ViTs. Others that begin so have blocks, activations or an eps of their own, which
# their tensors do not always show (siglip, rpn, quickgelu).
PLAIN = r"(?:vit|deit)_(\w+?)_patch\d+_(?:gap_)?\d+(?:_(?:in21k|miil|sam|dino|augreg))*"
OWN_SIZES = {  # embed_dim, depth, num_heads
    "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
    "huge": (1280, 32, 16), "giant": (1408, 40, 16), "gigantic": (1664, 48, 16),
    "vit_base_patch16_gap_224": (768, 12, 16), "test_vit": (64, 6, 2),
}
# The published widths whose heads are not 64 wide: huge, giant, gigantic.
HEADS_BY_WIDTH = {1280: 16, 1408: 16, 1664: 16}


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or of a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _from_hf(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config.json of Hugging Face says; what it leaves out has transformers' defaults."""
    implemented(config, IN_HF, where)
    return {
        "img_size": _pair(config.get("image_size", 224)),
        "patch_size": _pair(config.get("patch_size", 16)),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "hidden_features": config.get("intermediate_size", 3072),
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", HF_EPS["norm_eps"]),
        "class_token": True, "global_pool": "token", "fc_norm": False,
    }


def _from_timm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config.json of timm says: arguments that override what its architecture has by itself."""
    architecture = config["architecture"].partition(".")[0]  # what follows the point names the training
    args = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or config      # older files have it all on one level
    plain = re.fullmatch(PLAIN, architecture)
    own = OWN_SIZES.get(architecture) or OWN_SIZES.get(plain[1] if plain else "")
    if own is None:
        raise WeightsError(f"{where}: {architecture} is not implemented here; the plain ViTs of timm are "
                           f"called vit_base_patch16_224 and the like")
    pools = (args.get("global_pool"), pretrained.get("global_pool"), config.get("global_pool"))
    said = dict(zip(("embed_dim", "depth", "num_heads"), own, strict=True)) | dict(args) | {
        "img_size": args.get("img_size") or list(pretrained.get("input_size") or [])[-2:],
        "global_pool": next((pool for pool in pools if pool is not None), None),
        "norm_eps": 1e-6,
    }
    said = {name: value for name, value in said.items() if value not in (None, [])}
    implemented(said, IN_TIMM, where)
    no_more_options(args, {*IN_TIMM, *READ_IN_TIMM, *WITHOUT_EFFECT_IN_TIMM}, where)
    return said | {name: _pair(said[name]) for name in ("img_size", "patch_size") if name in said}


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What the tensors say by themselves."""
    for pattern, what in RELATIVES.items():
        if found := next((name for name in tensors if re.match(pattern, name)), None):
            raise WeightsError(f"{where}: {found}: {what} is not implemented here; give a plain ViT")
    patch = tensors["patch_embed.proj.weight"]
    if patch.ndim != 4:
        raise WeightsError(f"{where}: patch_embed.proj.weight {tuple(patch.shape)} is no convolution over "
                           f"patches; give a plain ViT")
    return {
        "patch_size": (patch.shape[2], patch.shape[3]),
        "in_chans": patch.shape[1],
        "embed_dim": patch.shape[0],
        "depth": max(taken(tensors, r"blocks\.(\d+)\."), default=-1) + 1,
        "hidden_features": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "class_token": "cls_token" in tensors,
        "fc_norm": "fc_norm.weight" in tensors,
    }


def _square(tensors: Mapping[str, Tensor], seen: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The image size if the patches form a square."""
    patches = tensors["pos_embed"].shape[1] - seen["class_token"]
    side = math.isqrt(patches)
    if side * side != patches:
        raise WeightsError(f"{where}: {patches} patches are not a square; give a folder whose config.json "
                           f"states the image size")
    return side * seen["patch_size"][0], side * seen["patch_size"][1]


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> ViTConfig:
    """From shapes, and from config.json what they do not tell: image size, heads, eps, pooling.

    Without config.json, and where timm's is silent: the patches are a square without rest, heads are 64 wide
    (16 heads at the widths of huge, giant and gigantic), eps is the dialect's, features are the class token,
    or the mean where there is none or the norm is an `fc_norm`.
    """
    seen = _from_shapes(tensors, where)
    read = _from_timm if config and "architecture" in config else _from_hf
    said = read(config, where) if config else {}
    if "mlp_ratio" in said:
        said["hidden_features"] = int(said.get("embed_dim", seen["embed_dim"]) * said["mlp_ratio"])
    for name in seen.keys() & said.keys():
        if said[name] != seen[name]:
            raise WeightsError(f"{where}: config.json has {name} = {said[name]}, the weights {seen[name]}; "
                               f"give the config.json of these weights (timm: with its model_args)")
    width = seen["embed_dim"]
    if "num_heads" not in said and width % 64:
        raise WeightsError(f"{where}: a width of {width} is not whole heads of 64; give a folder whose "
                           f"config.json states the number of heads")
    if not config and not seen["class_token"] and not seen["fc_norm"]:
        raise WeightsError(f"{where}: no class token, and a norm before the pooling: timm's gap models, "
                           f"whose heads and activations vary; give a folder with its config.json")
    mean = seen["fc_norm"] or not seen["class_token"]
    rules = {
        "img_size": said.get("img_size") or _square(tensors, seen, where),
        "num_heads": HEADS_BY_WIDTH.get(width, width // 64),
        "global_pool": "avg" if mean else "token",
        "norm_eps": 1e-6,
    }
    sizes = rules | said | seen
    sizes = ViTConfig(**{field.name: sizes[field.name] for field in fields(ViTConfig)})
    _fit(sizes, tensors, where)
    return sizes


def _fit(sizes: ViTConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError where the sizes do not fit one another."""
    if sizes.embed_dim % sizes.num_heads:
        raise WeightsError(f"{where}: a width of {sizes.embed_dim} is not {sizes.num_heads} equal heads; "
                           f"config.json must state the number of heads of these weights")
    grid = [side // patch for side, patch in zip(sizes.img_size, sizes.patch_size, strict=True)]
    tokens = sizes.class_token + grid[0] * grid[1]
    if tensors["pos_embed"].shape[1] != tokens:
        raise WeightsError(f"{where}: {tensors['pos_embed'].shape[1]} positions, yet images of "
                           f"{sizes.img_size} in patches of {sizes.patch_size} make {tokens} tokens; "
                           f"config.json must state the image size of these weights")
    if sizes.global_pool == "token" and not sizes.class_token:
        raise WeightsError(f"{where}: global_pool is 'token', yet there is no class token in the weights")


KIND = Kind(
    ViT, ViTConfig, CONFIGS,
    (
        Dialect("timm", r"blocks\.\d+\.attn\.qkv\.", TIMM),
        Dialect("hf", r"vit\.encoder\.layer\.", _with_a_head(HF), _numbers, HF_EPS),
        Dialect("hf-model", r"encoder\.layer\.\d+\.layernorm_before\.", HF, _numbers, HF_EPS),
        Dialect("transformers-5", r"vit\.layers\.\d+\.layernorm_before\.", _with_a_head(TRANSFORMERS_5),
                _numbers, HF_EPS),
        Dialect("transformers-5-model", r"layers\.\d+\.layernorm_before\.", TRANSFORMERS_5, _numbers, HF_EPS),
    ),
    {"vit", "vit_", "deit_", "test_vit"}, _sizes,
)
