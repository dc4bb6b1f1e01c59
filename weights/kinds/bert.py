"""all-MiniLM-L6-v2: names in Hugging Face's files, sizes."""

import torch

from models.bert import CONFIGS, BertConfig, SentenceEncoder, sentence_embeddings
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
})


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
    tokenizer=lambda folder: read_tokenizer(folder / "tokenizer.json"),
    example_inputs=_example, outputs=_outputs,
    constants=lambda config, inputs: {"position_ids": torch.arange(inputs["input_ids"].shape[1])},
)
