"""BERT, and all-MiniLM-L6-v2, the sentence encoder of the regression targets.

Home dialect: Hugging Face's BertModel without pooler (`encoder.layer.0.attention.self.query`).
Devlin et al., BERT, 2019; Reimers and Gurevych, Sentence-BERT, 2019.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention

MAX_TOKENS = 256  # all-MiniLM-L6-v2, sentence_bert_config.json: max_seq_length


@dataclass(frozen=True)
class BertConfig:
    """Sizes, under the names of the published `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    max_seq_length: int = MAX_TOKENS  # with [CLS] and [SEP]


CONFIGS: dict[str, BertConfig] = {
    # sentence-transformers/all-MiniLM-L6-v2, config.json
    "minilm": BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
    ),
}

MAX_TEXT = 1_000_000  # characters of a text that are tokenised, for MiniLM as for CLIP
TOKENISE_AT_ONCE = 8192  # sentences: large enough for the tokenizer's threads, small in memory


class Layer(nn.Module):
    """Post-norm transformer layer, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention = Namespace(
            self=Namespace(
                query=nn.Linear(width, width), key=nn.Linear(width, width), value=nn.Linear(width, width)
            ),
            output=Namespace(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps)),
        )
        self.intermediate = Namespace(dense=nn.Linear(width, inner))
        self.output = Namespace(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=eps))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        read, write = self.attention.self, self.attention.output
        h = attention(read.query(x), read.key(x), read.value(x), self.heads, mask)
        x = write.LayerNorm(x + write.dense(h))
        h = F.gelu(self.intermediate.dense(x), approximate="none")
        return self.output.LayerNorm(x + self.output.dense(h))


class Bert(nn.Module):
    """BertModel for single sentences: token type 0 throughout, no dropout, no pooler."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = Namespace(
            word_embeddings=nn.Embedding(config.vocab_size, width),
            position_embeddings=nn.Embedding(config.max_position_embeddings, width),
            token_type_embeddings=nn.Embedding(config.type_vocab_size, width),
            LayerNorm=nn.LayerNorm(width, eps=config.layer_norm_eps),
        )
        self.encoder = Namespace(layer=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids (B, N) -> the last layer's states (B, N, D).

        `attention_mask` (B, N) is true or 1 for words and false or 0 for padding; None = no padding.
        """
        names = self.embeddings
        words = names.word_embeddings(input_ids)                            # (B, N, D)
        positions = names.position_embeddings.weight[: input_ids.shape[1]]  # (N, D)
        x = names.LayerNorm(words + positions + names.token_type_embeddings.weight[0])
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, N)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x


class SentenceEncoder(Bert):
    """Sentences to unit vectors: BERT, mean over the tokens, L2 norm (all-MiniLM-L6-v2's modules.json).

    `tokenizer` is a `tokenizers.Tokenizer`; `encode` sets its padding (none) and its truncation
    (`max_seq_length`).
    """

    def __init__(self, config: BertConfig, tokenizer: Any = None):
        super().__init__(config)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(
        self,
        sentences: list[str],
        batch_size: int = 64,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Unit rows (len(sentences), D), float32 on the CPU, in the order of `sentences`.

        Computed on the weights' device, from at most `max_seq_length` tokens per sentence. `progress` wraps
        the batches, as `tqdm` does. Raises ValueError without a tokenizer.
        """
        ids, counts = self._tokenise(sentences)
        starts = counts.cumsum(0) - counts
        # Longest first: little padding, and an out-of-memory batch fails at once.
        order = counts.argsort(descending=True, stable=True)
        batches = order.split(batch_size) if len(order) else ()
        out = torch.empty(len(sentences), self.config.hidden_size, dtype=torch.float32)
        device = self.embeddings.word_embeddings.weight.device
        for rows in progress(batches) if progress else batches:
            places = torch.arange(int(counts[rows[0]]))
            real = places < counts[rows, None]                                          # (B, N)
            padded = ids[torch.where(real, starts[rows, None] + places, starts[rows, None])]
            mask = None if real.all() else real.to(device)
            states = self(padded.to(device), mask)                                      # (B, N, D)
            out[rows] = sentence_embeddings(states, mask).to("cpu", torch.float32)
        return out

    def _tokenise(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """The concatenated token ids of all sentences, and the number of tokens of each."""
        if self.tokenizer is None:
            raise ValueError("SentenceEncoder has no tokenizer: set it, or use weights.load('minilm')")
        self.tokenizer.no_padding()
        length = min(self.config.max_seq_length, self.config.max_position_embeddings)
        self.tokenizer.enable_truncation(max_length=length)
        ids, counts = [torch.empty(0, dtype=torch.int32)], []
        for start in range(0, len(sentences), TOKENISE_AT_ONCE):
            texts = sentences[start : start + TOKENISE_AT_ONCE]
            # Without lone surrogates; the rest of a longer text would take minutes, and is cut anyway
            texts = [text[:MAX_TEXT].encode("utf-8", "replace").decode() for text in texts]
            chunk = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
            counts += [len(tokens) for tokens in chunk]
            ids.append(torch.tensor([token for tokens in chunk for token in tokens], dtype=torch.int32))
        return torch.cat(ids), torch.tensor(counts, dtype=torch.int64)


def sentence_embeddings(states: Tensor, mask: Tensor | None) -> Tensor:
    """Unit rows (B, D), in float32 at least: the mean of the states (B, N, D) over the unmasked tokens."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        means = states.mean(dim=1)
    else:
        mask = mask[:, :, None].to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return F.normalize(means, p=2, dim=1, eps=1e-12)
