"""BLIP's captioner: names in Hugging Face's files, sizes, tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

from models.blip import BLIP, CONFIGS, BLIPConfig
from weights.kinds.common import Dialect, Kind, Row, implemented, read_tokenizer, taken
from weights.strict import WeightsError

# Home, and what transformers 5 saves. The head's matrix is the word embeddings: the published files hold it
# once more, transformers 5 leaves the second copy out; one parameter is kept.
HF: dict[str, Row] = {
    "text_decoder.bert.embeddings.position_ids":       None,  # 0, 1, 2, ...
    "text_decoder.cls.predictions.decoder.weight":     None,  # the word embeddings once more
    "text_decoder.cls.predictions.decoder.bias":       None,  # `predictions.bias` once more
}

COPIES = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

# Option -> the values that models/blip.py implements.
IN_CONFIG: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,),            # at the top and in both halves
}
IN_VISION: dict[str, tuple[Any, ...]] = IN_CONFIG | {
    "hidden_act": ("gelu", "gelu_python"),     # both the exact one
    "num_channels": (3,),
}
IN_TEXT: dict[str, tuple[Any, ...]] = IN_CONFIG | {
    "hidden_act": ("gelu", "gelu_python"),
    "is_decoder": (True,),
    "position_embedding_type": ("absolute",),
}
# What shapes do not tell, where a config.json leaves it out: transformers' defaults. The published files
# state all of these; their decoders have 12 heads, not 8.
DEFAULTS: dict[str, Any] = {
    "vision_image_size": 384, "vision_num_attention_heads": 12, "vision_layer_norm_eps": 1e-5,
    "text_num_attention_heads": 8, "text_layer_norm_eps": 1e-12,
    "text_bos_token_id": 30522, "text_pad_token_id": 0, "text_sep_token_id": 102,
}


def _from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the config.json of a BlipForConditionalGeneration says."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    for half, options in ((config, IN_CONFIG), (vision, IN_VISION), (text, IN_TEXT)):
        implemented(half, options, where)
    halves = (("vision", vision), ("text", text))
    said = {f"{half}_{name}": value for half, options in halves for name, value in options.items()}
    return DEFAULTS | {field.name: said[field.name] for field in fields(BLIPConfig) if field.name in said}


def _from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors say by themselves."""
    patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"].shape
    return {
        "vision_hidden_size": patch[0],
        "vision_intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "vision_num_hidden_layers": max(taken(tensors, r"vision_model\.encoder\.layers\.(\d+)\.")) + 1,
        "vision_patch_size": patch[-1],
        "text_vocab_size": words[0],
        "text_hidden_size": words[1],
        "text_intermediate_size":
            tensors["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "text_num_hidden_layers": max(taken(tensors, r"text_decoder\.bert\.encoder\.layer\.(\d+)\.")) + 1,
        "text_max_position_embeddings":
            tensors["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
    }


def _by_rule(tensors: Mapping[str, Tensor], seen: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What holds for both published captioners."""
    for half in ("vision", "text"):
        if seen[f"{half}_hidden_size"] % 64:
            raise WeightsError(f"{where}: a {half} width of {seen[f'{half}_hidden_size']} is not whole heads "
                               f"of 64; give a folder whose config.json states the number of heads")
    side = math.isqrt(tensors["vision_model.embeddings.position_embedding"].shape[1] - 1)
    return DEFAULTS | {
        "vision_image_size": side * seen["vision_patch_size"],
        "vision_num_attention_heads": seen["vision_hidden_size"] // 64,
        "text_num_attention_heads": seen["text_hidden_size"] // 64,
        "text_bos_token_id": seen["text_vocab_size"] - 2,  # [DEC] and [ENC] are the last words
    }


def _sizes(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> BLIPConfig:
    """From shapes, and from config.json what they do not tell: image size, heads, eps, special tokens.

    Without config.json: the patches are a square without rest, heads are 64 wide, eps and special tokens are
    the published ones, and a caption begins with the last word but one.
    """
    seen = _from_shapes(tensors)
    said = _from_config(config, where) if config else _by_rule(tensors, seen, where)
    for name in seen.keys() & said.keys():
        if said[name] != seen[name]:
            raise WeightsError(f"{where}: config.json has {name} = {said[name]}, the weights {seen[name]}; "
                               f"give the config.json of these weights")
    sizes = BLIPConfig(**(said | seen))
    _fit(sizes, tensors, where)
    return sizes


def _fit(sizes: BLIPConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError where the sizes do not fit one another."""
    for half in ("vision", "text"):
        width, heads = getattr(sizes, f"{half}_hidden_size"), getattr(sizes, f"{half}_num_attention_heads")
        if heads < 1 or width % heads:
            raise WeightsError(f"{where}: a {half} width of {width} is not {heads} equal heads; config.json "
                               f"must state the number of heads of these weights")
    image, patch = sizes.vision_image_size, sizes.vision_patch_size
    tokens = (image // patch) ** 2 + 1
    positions = tensors["vision_model.embeddings.position_embedding"].shape[1]
    if positions != tokens:
        raise WeightsError(f"{where}: {positions} positions, yet images of {image} px in patches of {patch} "
                           f"make {tokens} tokens; config.json must state the image size of these weights")
    for name in ("text_bos_token_id", "text_pad_token_id", "text_sep_token_id"):
        if not 0 <= getattr(sizes, name) < sizes.text_vocab_size:
            raise WeightsError(f"{where}: {name} = {getattr(sizes, name)} is not among its "
                               f"{sizes.text_vocab_size} words; config.json must state it")


def published(config: BLIPConfig) -> dict[str, Any]:
    """The config.json of a BlipForConditionalGeneration of these sizes."""
    halves: dict[str, dict[str, Any]] = {"vision": {"hidden_act": "gelu", "num_channels": 3},
                                         "text": {"hidden_act": "gelu", "is_decoder": True,
                                                  "encoder_hidden_size": config.vision_hidden_size}}
    for name, value in asdict(config).items():
        half, _, option = name.partition("_")
        halves[half][option] = value
    return {"model_type": "blip", "architectures": ["BlipForConditionalGeneration"],
            "tie_word_embeddings": True, "vision_config": halves["vision"], "text_config": halves["text"]}


# ----------------------------------------------------------------------------------------------------------
# Tokenizer: that of bert-base-uncased, and behind its words two of BLIP's own
# ----------------------------------------------------------------------------------------------------------

BERTS_OWN = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLIPS_OWN = ("[DEC]", "[ENC]")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a published folder: from tokenizer.json, else from vocab.txt, without padding.

    Raises WeightsError if the folder holds neither, or a damaged one.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.txt").is_file():
        tokenizer = _word_pieces(folder / "vocab.txt")
    else:
        raise WeightsError(f"{folder}: no tokenizer.json and no vocab.txt; fetch one of them")
    known = [token for token in BERTS_OWN if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*known, *BLIPS_OWN)])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _word_pieces(path: Path) -> Tokenizer:
    """bert-base-uncased's from its vocabulary, one word a line."""
    try:
        words = WordPiece.read_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{path}: no words can be read from it ({error}); fetch it again") from error
    lacking = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in words]
    if lacking:
        raise WeightsError(f"{path} lacks {', '.join(lacking)}: it is no BERT tokenizer's; fetch it again")
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


KIND = Kind(
    BLIP, BLIPConfig, CONFIGS, (Dialect("hf", r"text_decoder\.", HF),), {"blip"}, _sizes,
    tokenizer=load_tokenizer, copies=COPIES,
)
