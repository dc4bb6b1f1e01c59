"""BLIP's captioner: names in Hugging Face's files, sizes, tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

from models.blip import BLIP, CONFIGS, BLIPConfig
from weights.dialects import Dialect, Row
from weights.files import read_tokenizer
from weights.options import CLIP, Kind, Options, Pictures, causal, from_shapes
from weights.strict import WeightsError
from weights.tokenizer import add_tokens

# Home, and what transformers 5 saves. The head's matrix is the word embeddings: the published files hold it
# once more, transformers 5 leaves the second copy out; one parameter is kept.
HF: dict[str, Row] = {
    "text_decoder.bert.embeddings.position_ids":       None,  # 0, 1, 2, ...
    "text_decoder.cls.predictions.decoder.weight":     None,  # the word embeddings once more
    "text_decoder.cls.predictions.decoder.bias":       None,  # `predictions.bias` once more
}

TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

SHAPES = {
    "vision_hidden_size":          ("vision_model.embeddings.patch_embedding.weight", 0),
    "vision_patch_size":           ("vision_model.embeddings.patch_embedding.weight", 3),
    "vision_intermediate_size":    ("vision_model.encoder.layers.0.mlp.fc1.weight", 0),
    "vision_num_hidden_layers":    r"vision_model\.encoder\.layers\.(\d+)\.",
    "text_vocab_size":             ("text_decoder.bert.embeddings.word_embeddings.weight", 0),
    "text_hidden_size":            ("text_decoder.bert.embeddings.word_embeddings.weight", 1),
    "text_intermediate_size":      ("text_decoder.bert.encoder.layer.0.intermediate.dense.weight", 0),
    "text_num_hidden_layers":      r"text_decoder\.bert\.encoder\.layer\.(\d+)\.",
    "text_max_position_embeddings": ("text_decoder.bert.embeddings.position_embeddings.weight", 0),
}
_TOLD = {f"{half}_config.{field.name.removeprefix(f'{half}_')}": field.name
        for half in ("vision", "text") for field in fields(BLIPConfig) if field.name.startswith(half)}
_ONLY = {
    "tie_word_embeddings": (True,),                            # at the top and in both halves
    "vision_config.tie_word_embeddings": (True,),
    "vision_config.hidden_act": ("gelu", "gelu_python"),       # both the exact one
    "vision_config.num_channels": (3,),
    "text_config.tie_word_embeddings": (True,),
    "text_config.hidden_act": ("gelu", "gelu_python"),
    "text_config.is_decoder": (True,),
    "text_config.position_embedding_type": ("absolute",),
}
# transformers' defaults for the settings that shapes do not show. The published files state all of these;
# their decoders have 12 heads, not 8.
OPTIONS = Options(_TOLD, _ONLY, {
    "vision_image_size": 384, "vision_num_attention_heads": 12, "vision_layer_norm_eps": 1e-5,
    "text_num_attention_heads": 8, "text_layer_norm_eps": 1e-12,
    "text_bos_token_id": 30522, "text_pad_token_id": 0, "text_sep_token_id": 102,
})


def _read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    sizes = OPTIONS.read(config, where)
    words = sizes.get("text_vocab_size", from_shapes(SHAPES, tensors).get("text_vocab_size", 0))
    for name in ("text_bos_token_id", "text_pad_token_id", "text_sep_token_id"):
        if not 0 <= sizes[name] < words:
            raise WeightsError(f"{where}: {name} = {sizes[name]} is not among its {words} words; config.json "
                               f"must state it")
    return sizes


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
        add_tokens(tokenizer, folder)
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
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in words]
    if missing:
        raise WeightsError(f"{path} lacks {', '.join(missing)}: it is no BERT tokenizer's; fetch it again")
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


KIND = Kind(
    name="blip", model=BLIP, config=BLIPConfig, configs=CONFIGS,
    dialects=(Dialect("hf", r"text_decoder\.", HF),),
    classes={"blip"},
    read=_read,
    shapes=SHAPES,
    heads={f"{half}_num_attention_heads": f"{half}_hidden_size" for half in ("vision", "text")},
    tokenizer=load_tokenizer,
    tokens={"text_bos_token_id": "[DEC]", "text_sep_token_id": "[SEP]"},
    tied=TIED,
    pictures=Pictures("vision_image_size", "Blip", CLIP),
    example_inputs=lambda config, draw: {
        "images": draw.normal(3, config.vision_image_size, config.vision_image_size),
        "ids": draw.below(config.text_vocab_size, 8),
    },
    constants=lambda config, inputs: causal(inputs["ids"]),
)
