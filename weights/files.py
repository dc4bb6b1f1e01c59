"""Files: safetensors, JSON and tokenizers, read or refused in one line.

Tensors are read, not mapped: a mapped file counts in the process's memory beside the model that is made from
it, and one that is changed or cut short while it is mapped changes or kills the process.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from schema import FLAG, NULL, OBJECT, TEXT, Rule, check, many, number, read_json
from weights.strict import WeightsError

PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}

SIZE, LAYERS, SIDE, POSITIVE = (number(int, 1, 2**20), number(int, 1, 256), number(int, 1, 2**13),
                                number(above=0, most=2**20))
SIZES, SIDES = many(SIZE, 1, 16), SIDE | many(SIDE, 2, 2)
# Fields of a config.json, a pictures' processor or our configurations, wherever they stand in them
FIELDS: dict[str, Rule] = {name: rule for rule, names in (
    (SIZE, """hidden_size intermediate_size vocab_size max_position_embeddings type_vocab_size projection_dim
              embed_dim width head_width num_channels in_channels out_channels latent_channels in_chans
              hidden_features norm_num_groups norm_groups ch model_channels out_ch z_channels context_dim
              encoder_hidden_size ffn_dim word_embed_proj_dim num_query_tokens"""),
    (SIZE | NULL, "num_head_channels"),
    (SIZE | SIZES | NULL, "num_heads num_attention_heads attention_head_dim cross_attention_dim"),
    (SIZES, "block_out_channels ch_mult channel_mult"),
    (LAYERS, "depth num_hidden_layers num_res_blocks cross_attention_frequency"),
    (LAYERS | many(LAYERS, 1, 16), "layers layers_per_block"),
    (many(LAYERS, 1, 16), "depths"),
    (many(number(int, 0, 255), 0, 16), "attention_levels pretrained_window_sizes"),
    (number(int, 0, 2**20), "bos_token_id pad_token_id sep_token_id"),
    (SIDES, "image_size img_size patch_size"),
    (SIDES | OBJECT, "size crop_size"),
    (SIDE, "shortest_edge height"),
    (SIDE | many(SIDE, 1, 3), "sample_size"),
    (many(SIDE, 3, 3), "input_size"),
    (SIDES | many(SIDES, 1, 16) | NULL, "window_size"),
    (number(above=0, most=1), "layer_norm_eps norm_eps eps"),
    (number(least=0.1, most=1), "crop_pct"),
    (POSITIVE, "mlp_ratio scaling_factor scale_factor rescale_factor"),
    (many(number(least=0, most=1), 1, 16), "mean"),
    (many(number(above=0, most=1), 1, 16), "std"),
    (many(number(least=0, most=255), 1, 16), "image_mean"),  # of grey levels where nothing rescales them
    (many(number(above=0, most=255), 1, 16), "image_std"),
    (FLAG, """do_resize do_rescale do_normalize do_convert_rgb do_center_crop qkv_bias class_token quick_gelu
              use_linear_projection use_linear_in_transformer"""),
    (TEXT, """_class_name model_type architecture hidden_act global_pool interpolation resize_mode crop_mode
              image_processor_type feature_extractor_type"""),
    (many(TEXT, 1, 16), "down_block_types up_block_types"),
    (number(int, 0, 5), "resample"),
    (OBJECT, """text_config vision_config vision_config_dict qformer_config model_args pretrained_cfg
                text_config_dict model_cfg text_cfg vision_cfg norm_kwargs preprocess_cfg
                image_processor"""),
) for name in names.split()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes
    nbytes: int

    def meta(self) -> Tensor:
        """A tensor of that shape without values."""
        return torch.empty(self.shape, device="meta")

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises WeightsError if the file was cut short meanwhile."""
        try:
            flat = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.start)
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read ({error.strerror or error})") from error
        if len(flat) < self.nbytes:
            raise WeightsError(f"{self.path}: cut short while it was read; fetch it again")
        values = torch.from_numpy(flat).view(self.dtype) if self.nbytes else torch.empty(0, dtype=self.dtype)
        return values.reshape(self.shape)


def stored_tensors(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a .safetensors file by name, unread, in the order in which they lie there.

    Raises WeightsError for a pickled, missing, truncated or otherwise damaged file.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        if path.stat().st_size == 0:
            raise WeightsError(f"{path} is empty (0 bytes); fetch it again")
        with safe_open(path, framework="pt", device="cpu"):  # checks that header and length agree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        fault = f"truncated or not a safetensors file ({error})"
        raise WeightsError(f"{path}: {fault}; fetch it again") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    header.pop("__metadata__", None)
    if unknown := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise WeightsError(f"{path}: holds tensors of dtype {', '.join(unknown)}, which is not read here")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = Stored(path, dtype, shape, 8 + length + start, end - start)
    return tensors


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises WeightsError as `stored_tensors`."""
    stored_tensors(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, by name, on the CPU. Raises WeightsError as `stored_tensors`."""
    return {name: entry.read() for name, entry in stored_tensors(path).items()}


def refuse_pickle(path: Path) -> None:
    """Raise WeightsError for a file that only unpickling could read."""
    if path.suffix in PICKLES:
        raise WeightsError(f"{path} is pickled, and reading such a file can run any program hidden in it; "
                           f"get the .safetensors file of the same weights, or convert it where you trust it")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or another that describes a model. Raises WeightsError if it breaks FIELDS, in itself or
    in an object that FIELDS names; others, such as one of labels, may hold any names."""
    config = read_json(path)
    level: list[Mapping[str, Any]] = [config]
    while level:
        for part in level:
            check({name: value for name, value in part.items() if value is not None}, FIELDS, path)
        level = [value for part in level for name, value in part.items()
                 if name in FIELDS and isinstance(value, Mapping)]
    return config


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises WeightsError if it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing: it is needed beside the weights")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{path}: no tokenizer can be read from it ({error}); fetch it again") from error
