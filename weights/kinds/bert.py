"""all-MiniLM-L6-v2: names in Hugging Face's files, sizes."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from models.bert import CONFIGS, BertConfig, SentenceEncoder
from weights.kinds.common import Dialect, Kind, Row, implemented, read_tokenizer
from weights.strict import WeightsError

HF: dict[str, Row] = {
    "embeddings.position_ids":       None,  # 0, 1, 2, ...
    "pooler":                        None,  # the sentence embedding is a mean over the tokens
}

PREFIXED: dict[str, Row] = {
    "bert.embeddings.position_ids":  None,  # 0, 1, 2, ...
    "bert.pooler":                   None,  # the sentence embedding is a mean over the tokens
    "bert":                          "",    # as models with a head of their own save it
    "cls":                           None,  # the head that pretraining used
}

IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "hidden_act": ("gelu",),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}


def _from_config(config: Mapping[str, Any], where: str) -> BertConfig:
    implemented(config, IMPLEMENTED, where)
    return BertConfig(**{field.name: config[field.name] for field in fields(BertConfig)})


def _from_shapes(tensors: Mapping[str, Tensor], where: str) -> BertConfig:
    minilm = CONFIGS["minilm"]
    words = tensors["embeddings.word_embeddings.weight"]
    if tuple(words.shape) != (minilm.vocab_size, minilm.hidden_size):
        raise WeightsError(f"{where}: word vectors {tuple(words.shape)} are not all-MiniLM-L6-v2's; "
                           f"give a folder with its config.json")
    return minilm


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> BertConfig:
    """From config.json; without it all-MiniLM-L6-v2's."""
    return _from_config(config, where) if config else _from_shapes(tensors, where)


KIND = Kind(
    SentenceEncoder, BertConfig, CONFIGS,
    (
        Dialect("hf", r"encoder\.layer\.\d+\.attention\.self\.", HF),
        Dialect("hf-prefixed", r"bert\.", PREFIXED),
    ),
    {"bert"}, _sizes, tokenizer=lambda folder: read_tokenizer(folder / "tokenizer.json"),
)
