"""Names that transformers 5 uses in memory alone: `save_pretrained` writes those that are published."""

from collections.abc import Mapping

from torch import Tensor

from weights import to_home
from weights.dialects import Dialect, OneOfQkv, Row, beneath, numbers, to_ours
from weights.kinds import swin, vit

VIT: dict[str, Row] = vit.EMBEDDINGS | {
    "layers.{n}.layernorm_before":                    "blocks.{n}.norm1",
    "layers.{n}.attention.q_proj":                    OneOfQkv("blocks.{n}.attn.qkv", 0),
    "layers.{n}.attention.k_proj":                    OneOfQkv("blocks.{n}.attn.qkv", 1),
    "layers.{n}.attention.v_proj":                    OneOfQkv("blocks.{n}.attn.qkv", 2),
    "layers.{n}.attention.o_proj":                    "blocks.{n}.attn.proj",
    "layers.{n}.layernorm_after":                     "blocks.{n}.norm2",
    "layers.{n}.mlp.fc1":                             "blocks.{n}.mlp.fc1",
    "layers.{n}.mlp.fc2":                             "blocks.{n}.mlp.fc2",
}
SWIN: dict[str, Row] = swin.HF_SHARED | {
    "encoder.layers.{s}.blocks.{n}.attention.q_proj":          OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 0),
    "encoder.layers.{s}.blocks.{n}.attention.k_proj":          OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 1),
    "encoder.layers.{s}.blocks.{n}.attention.v_proj":          OneOfQkv("layers.{s}.blocks.{n}.attn.qkv", 2),
    "encoder.layers.{s}.blocks.{n}.attention.o_proj":          "layers.{s}.blocks.{n}.attn.proj",
    "encoder.layers.{s}.blocks.{n}.attention.relative_position_bias.relative_position_bias_table":
        "layers.{s}.blocks.{n}.attn.relative_position_bias_table",
    "encoder.layers.{s}.blocks.{n}.attention.relative_position_bias.relative_position_index":
        None,  # a table that follows from the sizes
    "encoder.layers.{s}.blocks.{n}.mlp":                       "layers.{s}.blocks.{n}.mlp",
}
_vit_numbers = numbers(r"(?:vit\.)?layers\.(\d+)\.")
IN_MEMORY: dict[str, dict[str, Dialect]] = {  # by a name that only this dialect has
    "vit": {
        "vit.layers.0.layernorm_before.weight":
            Dialect("head", "", beneath("vit", VIT, "classifier", "decoder"), _vit_numbers),
        "layers.0.layernorm_before.weight": Dialect("bare", "", VIT, _vit_numbers),
    },
    "swin": {
        "swin.encoder.layers.0.blocks.0.attention.q_proj.weight":
            Dialect("head", "", beneath("swin", SWIN, *swin.HEADS), swin.stage_numbers),
        "encoder.layers.0.blocks.0.attention.q_proj.weight": Dialect("bare", "", SWIN, swin.stage_numbers),
    },
}


def home(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`to_home`, for these names too."""
    dialects = (dialect for name, dialect in IN_MEMORY[kind].items() if name in tensors)
    dialect = next(dialects, None)
    return to_ours(dialect, tensors) if dialect else to_home(kind, tensors)
