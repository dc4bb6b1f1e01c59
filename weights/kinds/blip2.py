"""BLIP-2 with OPT: names in Hugging Face's files, sizes, tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from torch import Tensor

from models.blip2 import BLIP2, CONFIGS, FIRST_POSITION, BLIP2Config
from weights.dialects import Dialect, Row
from weights.files import read_tokenizer
from weights.options import CLIP, Kind, Options, Pictures, causal, from_shapes
from weights.strict import WeightsError
from weights.tokenizer import add_tokens, read_byte_pairs

WORDS = "language_model.model.decoder.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # the words once more: the .bin files hold it, transformers 5 does not
HF: dict[str, Row] = {
    HEAD:                              None,
    "qformer.embeddings.position_ids": None,  # 0, 1, 2, ..., of the text branch, which BLIP-2 lacks
}

SHAPES = {
    "vision_hidden_size":                ("vision_model.embeddings.patch_embedding.weight", 0),
    "vision_patch_size":                 ("vision_model.embeddings.patch_embedding.weight", 3),
    "vision_intermediate_size":          ("vision_model.encoder.layers.0.mlp.fc1.weight", 0),
    "vision_num_hidden_layers":          r"vision_model\.encoder\.layers\.(\d+)\.",
    "num_query_tokens":                  ("query_tokens", 1),
    "qformer_hidden_size":               ("query_tokens", 2),
    "qformer_intermediate_size":         ("qformer.encoder.layer.0.intermediate_query.dense.weight", 0),
    "qformer_num_hidden_layers":         r"qformer\.encoder\.layer\.(\d+)\.",
    "text_vocab_size":                   (WORDS, 0),
    "text_hidden_size":                  (WORDS, 1),
    "text_ffn_dim":                      ("language_model.model.decoder.layers.0.fc1.weight", 0),
    "text_num_hidden_layers":            r"language_model\.model\.decoder\.layers\.(\d+)\.",
}
PARTS = ("vision", "qformer", "text")
_TOLD = {f"{part}_config.{field.name.removeprefix(f'{part}_')}": field.name
         for part in PARTS for field in fields(BLIP2Config) if field.name.startswith(part)}
_TOLD |= {"num_query_tokens": "num_query_tokens", "text_config.word_embed_proj_dim": "word_embed_proj_dim"}
_ONLY = {
    "tie_word_embeddings": (True,),
    "use_decoder_only_language_model": (True,),
    "vision_config.hidden_act": ("gelu", "gelu_python"),       # both the exact one
    "vision_config.qkv_bias": (True,),
    "qformer_config.hidden_act": ("gelu", "gelu_python"),
    "qformer_config.position_embedding_type": ("absolute",),
    "qformer_config.use_qformer_text_input": (False,),
    "text_config.model_type": ("opt",),                        # not Flan-T5
    "text_config.activation_function": ("relu",),
    "text_config.do_layer_norm_before": (True,),               # not OPT-350m
    "text_config._remove_final_layer_norm": (False,),
    "text_config.enable_bias": (True,),
    "text_config.layer_norm_elementwise_affine": (True,),
    "text_config.tie_word_embeddings": (True,),
}
# transformers' defaults for the settings that shapes do not show. The published file leaves out those of the
# image half and the Q-Former, and states those of OPT.
OPTIONS = Options(_TOLD, _ONLY, {
    "vision_image_size": 224, "vision_num_attention_heads": 16, "vision_layer_norm_eps": 1e-6,
    "qformer_num_attention_heads": 12, "qformer_cross_attention_frequency": 2,
    "qformer_layer_norm_eps": 1e-12, "text_num_attention_heads": 12, "text_max_position_embeddings": 2048,
    "text_bos_token_id": 2, "text_pad_token_id": 1, "text_eos_token_id": 2,
})


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    sizes = from_shapes(SHAPES, tensors) | OPTIONS.read(config, where)
    width, words = sizes.get("text_hidden_size"), sizes.get("text_vocab_size", 0)
    if sizes.get("word_embed_proj_dim", width) != width:  # OPT-350m's
        raise WeightsError(f"{where}: this kind of model is not implemented here: word_embed_proj_dim = "
                           f"{sizes['word_embed_proj_dim']} is not the text's hidden_size = {width}")
    for name in ("text_bos_token_id", "text_pad_token_id", "text_eos_token_id"):
        if not 0 <= sizes[name] < words:
            raise WeightsError(f"{where}: {name} = {sizes[name]} is not among its {words} words; config.json "
                               f"must state it")
    return sizes


def published(config: BLIP2Config) -> dict[str, Any]:
    """The config.json of a Blip2ForConditionalGeneration of these sizes."""
    parts: dict[str, dict[str, Any]] = {
        "vision": {"model_type": "blip_2_vision_model"}, "qformer": {"model_type": "blip_2_qformer"},
        "text": {"model_type": "opt", "word_embed_proj_dim": config.text_hidden_size},
    }
    for name, value in asdict(config).items():
        part, _, option = name.partition("_")
        if part in parts:
            parts[part][option] = value
    return {"model_type": "blip-2", "architectures": ["Blip2ForConditionalGeneration"],
            "tie_word_embeddings": True, "use_decoder_only_language_model": True,
            "num_query_tokens": config.num_query_tokens,
            **{f"{part}_config": options for part, options in parts.items()}}


BEGIN, PAD, LINE_BREAK = "</s>", "<pad>", "Ċ"  # "\n" as byte-level BPE writes it


def load_tokenizer(folder: Path) -> Tokenizer:
    """OPT's tokenizer from a published folder: from tokenizer.json, else from vocab.json and merges.txt. It
    begins every text with "</s>", and neither pads nor truncates.

    Raises WeightsError if the folder holds neither, or a damaged one.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = Tokenizer(read_byte_pairs(
            folder / "vocab.json", folder / "merges.txt", (BEGIN, PAD, LINE_BREAK), "OPT",
            lambda word: word.startswith("Ġ") and len(word) > 1,
        ))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        add_tokens(tokenizer, folder)
    else:
        raise WeightsError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; fetch them")
    if missing := [token for token in (BEGIN, PAD, LINE_BREAK) if tokenizer.token_to_id(token) is None]:
        raise WeightsError(f"{folder}: the tokenizer lacks {', '.join(missing)}: it is no OPT tokenizer's; "
                           f"fetch it again")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $0", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _constants(config: BLIP2Config, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of queries and ids together; positions are rows of OPT's table."""
    length = config.num_query_tokens + inputs["ids"].shape[1]
    both = causal(torch.empty(1, length))
    return both | {"position_ids": both["position_ids"] + FIRST_POSITION}


KIND = Kind(
    name="blip2", model=BLIP2, config=BLIP2Config, configs=CONFIGS,
    dialects=(Dialect("hf", r"(query_tokens$|language_projection\.)", HF),),
    classes={"blip-2"},
    read=_read,
    shapes=SHAPES,
    heads={f"{part}_num_attention_heads": f"{part}_hidden_size" for part in PARTS},
    tokenizer=load_tokenizer,
    tokens={"text_bos_token_id": BEGIN, "text_eos_token_id": LINE_BREAK},
    tied={HEAD: WORDS},
    # The trained part; its loss diverges in half precision, and LAVIS and transformers keep it in float32 too
    full_precision=r"(query_tokens|qformer\.|language_projection\.).*",
    pictures=Pictures("vision_image_size", "Blip", CLIP),
    example_inputs=lambda config, draw: {
        "images": draw.normal(3, config.vision_image_size, config.vision_image_size),
        "ids": draw.below(config.text_vocab_size, 8),
    },
    constants=_constants,
)
