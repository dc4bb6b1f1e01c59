"""all-MiniLM-L6-v2: names in Hugging Face's files, sizes."""

from pathlib import Path

import torch

from models.bert import CONFIGS, MAX_TOKENS, BertConfig, SentenceEncoder, sentence_embeddings
from schema import NULL, TEXT, check, many, number, one_of, read_json, read_value, record
from weights.dialects import Dialect, Row, beneath
from weights.files import read_tokenizer
from weights.options import Kind, Options, same_names

HF: dict[str, Row] = {
    "embeddings.position_ids":       None,  # 0, 1, 2, ...
    "pooler":                        None,  # the sentence embedding is a mean over the tokens
}

OPTIONS = Options(same_names(BertConfig), {
    "add_cross_attention": (False,),
    "hidden_act": ("gelu",),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}, {"max_seq_length": MAX_TOKENS})

# sentence-transformers' files: the modules in modules.json; what the folder of Pooling states, in the form of
# version 6 and in the earlier one; where the number of tokens stands. The rows have unit length without
# Normalize too.
MODULE = record({"type": TEXT, "path": TEXT})
TYPES = {"type": one_of("Transformer", "Pooling", "Normalize")}
POOLING = {
    "pooling_mode": one_of("mean").or_else("mean"),
    **{f"pooling_mode_{mode}": one_of(mode == "mean_tokens").or_else(mode == "mean_tokens") for mode in (
        "mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken",
    )},
}
LENGTHS = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))


def _beside(folder: Path) -> dict[str, int]:
    modules, lengths = folder / "modules.json", LENGTHS[:1]
    if modules.is_file():
        lengths = LENGTHS
        for module in read_value(modules, many(MODULE)):
            name = module["type"].rpartition(".")[2]
            check({"type": name}, TYPES, modules)
            if name == "Pooling":
                read_json(folder / module["path"] / "config.json", POOLING)
    rule = (number(least=2) | NULL).or_else(None)
    stated = [read_json(folder / file, {name: rule})[name] for file, name in lengths
              if (folder / file).is_file()]
    length = next(filter(None, stated), None)
    return {"max_seq_length": int(length)} if length else {}


def _example(config: BertConfig, draw) -> dict[str, torch.Tensor]:
    mask = torch.arange(12) < torch.arange(12, 12 - draw.batch, -1)[:, None]  # one word less a row
    return {"input_ids": draw.below(config.vocab_size, 12), "attention_mask": mask.long()}


def _outputs(model: SentenceEncoder, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    states = model(**inputs)
    return {"output": states, "embedding": sentence_embeddings(states, inputs["attention_mask"])}


KIND = Kind(
    name="minilm", model=SentenceEncoder, config=BertConfig, configs=CONFIGS,
    dialects=(
        Dialect("hf", r"encoder\.layer\.\d+\.attention\.self\.", HF),
        Dialect("hf-prefixed", r"bert\.", beneath("bert", HF, "cls") | {"bert": ""}),  # `cls`: pretraining,
    ),
    classes={"bert"},
    read=lambda config, tensors, where: OPTIONS.read(config, where),
    heads={"num_attention_heads": "hidden_size"},
    beside=_beside,
    tokenizer=lambda folder: read_tokenizer(folder / "tokenizer.json"),
    example_inputs=_example, outputs=_outputs,
    constants=lambda config, inputs: {"position_ids": torch.arange(inputs["input_ids"].shape[1])},
)
