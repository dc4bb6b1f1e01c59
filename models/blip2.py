"""BLIP-2: EVA's ViT-g reads the image, the Q-Former makes 32 vectors of it, and OPT continues them in words.

Home dialect: Hugging Face's Blip2ForConditionalGeneration as published, without `language_model.lm_head`,
which is tied to the word embeddings. Li et al., BLIP-2: Bootstrapping Language-Image Pre-training with Frozen
Image Encoders and Large Language Models, 2023; Zhang et al., OPT, 2022; Fang et al., EVA, 2023. No dropout.

EVA's layers are BLIP's. Its keys have no bias: the published files hold zeros for it among `qkv`'s, and other
values would cancel in the softmax.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blip import VisionLayer
from models.layers import Namespace, attention, mean_cross_entropy
from models.search import KeysValues, beam_search

FIRST_POSITION = 2  # the row of OPT's position table for the first token; the two before it are unused
OPT_EPS = 1e-5  # of all layer norms in OPT; stated in no config.json


@dataclass(frozen=True)
class BLIP2Config:
    """Sizes: `vision_`, `qformer_` or `text_`, and the names in that part of the published `config.json`.

    A text begins with text_bos_token_id, "</s>", and ends with text_eos_token_id, a line break.
    """

    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_hidden_layers: int
    vision_num_attention_heads: int
    vision_image_size: int
    vision_patch_size: int
    vision_layer_norm_eps: float
    num_query_tokens: int
    qformer_hidden_size: int
    qformer_intermediate_size: int
    qformer_num_hidden_layers: int
    qformer_num_attention_heads: int
    qformer_cross_attention_frequency: int
    qformer_layer_norm_eps: float
    text_vocab_size: int
    text_hidden_size: int
    text_ffn_dim: int
    text_num_hidden_layers: int
    text_num_attention_heads: int
    text_max_position_embeddings: int
    text_bos_token_id: int
    text_pad_token_id: int
    text_eos_token_id: int


CONFIGS: dict[str, BLIP2Config] = {
    # Salesforce/blip2-opt-2.7b, config.json; what it leaves out: transformers, configuration_blip_2.py and
    # configuration_opt.py. Before November 2024 the vocabulary had 50,272 rows.
    "blip2-opt-2.7b": BLIP2Config(
        vision_hidden_size=1408, vision_intermediate_size=6144, vision_num_hidden_layers=39,
        vision_num_attention_heads=16, vision_image_size=224, vision_patch_size=14,
        vision_layer_norm_eps=1e-6, num_query_tokens=32, qformer_hidden_size=768,
        qformer_intermediate_size=3072, qformer_num_hidden_layers=12, qformer_num_attention_heads=12,
        qformer_cross_attention_frequency=2, qformer_layer_norm_eps=1e-12, text_vocab_size=50304,
        text_hidden_size=2560, text_ffn_dim=10240, text_num_hidden_layers=32, text_num_attention_heads=32,
        text_max_position_embeddings=2048, text_bos_token_id=2, text_pad_token_id=1, text_eos_token_id=50118,
    ),
    # Ours; the image half is blip-plain-mini's
    "blip2-mini": BLIP2Config(
        vision_hidden_size=128, vision_intermediate_size=512, vision_num_hidden_layers=3,
        vision_num_attention_heads=2, vision_image_size=64, vision_patch_size=8, vision_layer_norm_eps=1e-6,
        num_query_tokens=16, qformer_hidden_size=64, qformer_intermediate_size=256,
        qformer_num_hidden_layers=4, qformer_num_attention_heads=4, qformer_cross_attention_frequency=2,
        qformer_layer_norm_eps=1e-12, text_vocab_size=1280, text_hidden_size=128, text_ffn_dim=512,
        text_num_hidden_layers=3, text_num_attention_heads=4, text_max_position_embeddings=128,
        text_bos_token_id=2, text_pad_token_id=1, text_eos_token_id=202,
    ),
}


class QFormerLayer(nn.Module):
    """Post-norm transformer layer: attention among the queries and, with `reads_image`, to the image."""

    def __init__(self, config: BLIP2Config, reads_image: bool):
        super().__init__()
        width, inner, eps = (config.qformer_hidden_size, config.qformer_intermediate_size,
                             config.qformer_layer_norm_eps)
        self.heads = config.qformer_num_attention_heads

        def names(source: int) -> Namespace:
            """Of one attention whose keys and values have width `source`."""
            return Namespace(
                attention=Namespace(query=nn.Linear(width, width), key=nn.Linear(source, width),
                                    value=nn.Linear(source, width)),
                output=Namespace(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps)),
            )

        self.attention = names(width)
        self.crossattention = names(config.vision_hidden_size) if reads_image else None
        self.intermediate_query = Namespace(dense=nn.Linear(width, inner))
        self.output_query = Namespace(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=eps))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Queries (B, Q, D) and image states (B, M, D') -> (B, Q, D)."""
        x = self._attend(self.attention, x, x)
        if self.crossattention is not None:
            x = self._attend(self.crossattention, x, image)
        h = F.gelu(self.intermediate_query.dense(x), approximate="none")
        return self.output_query.LayerNorm(x + self.output_query.dense(h))

    def _attend(self, names: Namespace, x: Tensor, source: Tensor) -> Tensor:
        read, write = names.attention, names.output
        h = attention(read.query(x), read.key(source), read.value(source), self.heads)
        return write.LayerNorm(x + write.dense(h))


class TextLayer(nn.Module):
    """OPT's pre-norm transformer layer with causal attention."""

    def __init__(self, config: BLIP2Config):
        super().__init__()
        width, inner = config.text_hidden_size, config.text_ffn_dim
        self.heads = config.text_num_attention_heads
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = Namespace(**{name: nn.Linear(width, width) for name in names})
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=OPT_EPS)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=OPT_EPS)

    def forward(self, x: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """New states (B·beams, N, D) -> the same, and the keys and values of all so far.

        `past` holds those before: then N = 1.
        """
        names, h = self.self_attn, self.self_attn_layer_norm(x)
        k, v = names.k_proj(h), names.v_proj(h)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        x = x + names.out_proj(attention(names.q_proj(h), k, v, self.heads, causal=past is None))
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x)))), (k, v)


class BLIP2(nn.Module):
    """Images to captions. `tokenizer` is a `tokenizers.Tokenizer` that begins every text with "</s>"; only
    `generate` needs it.

    The image half, the Q-Former with its projection, and the language model may have different dtypes.
    """

    def __init__(self, config: BLIP2Config, tokenizer: Any = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        width, patch, eps = config.vision_hidden_size, config.vision_patch_size, config.vision_layer_norm_eps
        layers = [VisionLayer(config) for _ in range(config.vision_num_hidden_layers)]
        self.vision_model = Namespace(
            embeddings=Namespace(patch_embedding=nn.Conv2d(3, width, kernel_size=patch, stride=patch)),
            encoder=Namespace(layers=nn.ModuleList(layers)),
            post_layernorm=nn.LayerNorm(width, eps=eps),
        )
        embeddings, patches = self.vision_model.embeddings, (config.vision_image_size // patch) ** 2
        embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(1, 1, width))
        embeddings.position_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + patches, width))

        width, every = config.qformer_hidden_size, config.qformer_cross_attention_frequency
        layers = [QFormerLayer(config, n % every == 0) for n in range(config.qformer_num_hidden_layers)]
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_query_tokens, width))
        self.qformer = Namespace(
            layernorm=nn.LayerNorm(width, eps=config.qformer_layer_norm_eps),
            encoder=Namespace(layer=nn.ModuleList(layers)),
        )
        self.language_projection = nn.Linear(width, config.text_hidden_size)

        width = config.text_hidden_size
        words = nn.Embedding(config.text_vocab_size, width, padding_idx=config.text_pad_token_id)
        places = nn.Embedding(FIRST_POSITION + config.text_max_position_embeddings, width)
        for table in (words, places):
            # torch's default of 1 is too large, because the head shares these weights
            nn.init.normal_(table.weight, std=0.02)
        layers = [TextLayer(config) for _ in range(config.text_num_hidden_layers)]
        decoder = Namespace(
            embed_tokens=words, embed_positions=places, layers=nn.ModuleList(layers),
            final_layer_norm=nn.LayerNorm(width, eps=OPT_EPS),
        )
        self.language_model = Namespace(model=Namespace(decoder=decoder))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised by the caller -> states (B, 1 + h·w, D), the class token's first.

        Raises ValueError for images of another size than the configuration's.
        """
        size, names = self.config.vision_image_size, self.vision_model.embeddings
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images are (B, 3, {size}, {size}) for this model, not {tuple(images.shape)}")
        images = images.to(names.class_embedding.dtype)
        patches = names.patch_embedding(images).flatten(2).transpose(1, 2)                # (B, h·w, D)
        x = torch.cat([names.class_embedding.expand(len(images), -1, -1), patches], dim=1)
        x = x + names.position_embedding
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)

    def encode_queries(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the Q-Former's outputs (B, Q, D). Raises ValueError as `encode_image`."""
        image = self.encode_image(images).to(self.query_tokens.dtype)                     # (B, 1 + h·w, D')
        x = self.qformer.layernorm(self.query_tokens).expand(len(images), -1, -1)         # (B, Q, D)
        for layer in self.qformer.encoder.layer:
            x = layer(x, image)
        return x

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Images and their texts' ids (B, N) -> logits (B, N, V) of the token after each.

        Attention is causal, so padding at the end needs no mask; exclude it from the loss.
        """
        x, _ = self._states(ids, None, self.language_projection(self.encode_queries(images)))
        return self._logits(x[:, self.config.num_query_tokens :])

    def loss(
        self, images: Tensor, ids: Tensor, n_prompt: int = 0, label_smoothing: float = 0.0,
        states: Tensor | None = None,
    ) -> Tensor:
        """Images and their texts' ids (B, N), "</s>" prompt text "\\n" and padding -> (B,): the mean
        cross-entropy of each text's tokens, given the image and all tokens before.

        The first `n_prompt` ids and padding are not counted; without a prompt "</s>" is, as in LAVIS. LAVIS
        takes the mean over all tokens of the batch: weight by `(ids != pad).sum(1) - n_prompt` for that.
        `states`: of `encode_queries`, if they exist already.
        """
        states = self.encode_queries(images) if states is None else states
        x, _ = self._states(ids, None, self.language_projection(states))
        before = x[:, self.config.num_query_tokens - 1 : -1]  # the last query predicts the first token
        counted = ids != self.config.text_pad_token_id
        counted[:, :n_prompt] = False
        return mean_cross_entropy(self._logits(before), ids, counted, label_smoothing)

    def _states(
        self, ids: Tensor, past: list[KeysValues] | None, queries: Tensor
    ) -> tuple[Tensor, list[KeysValues]]:
        """OPT's states of new ids (B·beams, n) appended to the cache `past`, and the extended cache.

        Without a cache the projected queries (B, Q, D) precede the ids, and their states those of the ids.
        """
        names, present = self.language_model.model.decoder, []
        x = names.embed_tokens(ids)
        x = torch.cat([queries.to(x.dtype), x], dim=1) if past is None else x
        start = past[0][0].shape[1] if past else 0
        end, most = start + x.shape[1], self.config.text_max_position_embeddings
        if end > most:
            raise ValueError(f"{end} queries and tokens are more than this model's {most} positions")
        x = x + names.embed_positions.weight[FIRST_POSITION + start : FIRST_POSITION + end]
        for i, layer in enumerate(names.layers):
            x, keys_values = layer(x, past[i] if past else None)
            present.append(keys_values)
        return names.final_layer_norm(x), present

    def _logits(self, x: Tensor) -> Tensor:
        """States (B, N, D) -> logits (B, N, V). The head's matrix is that of the words."""
        return F.linear(x, self.language_model.model.decoder.embed_tokens.weight)

    def generate(self, images: Tensor, prompt: str = "", **settings: Any) -> list[str]:
        """Images (B, 3, H, W) -> the text after the prompt, as LAVIS's `generate`.

        `settings` and their defaults as in `generate_ids`. Rows of the vocabulary without a token are never
        written, nor is "<image>". Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("BLIP-2 has no tokenizer: set it, or load a folder that holds its vocabulary")
        ids, end = torch.tensor([self.tokenizer.encode(prompt).ids]), self.config.text_eos_token_id
        n_tokens = 1 + max(self.tokenizer.get_vocab(with_added_tokens=False).values())
        rows = self.generate_ids(images, ids, n_tokens=n_tokens, **settings)[:, ids.shape[1] :].tolist()
        written = [list(takewhile(lambda token: token != end, row)) for row in rows]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]

    @torch.no_grad()
    def generate_ids(
        self, images: Tensor, prompt_ids: Tensor, num_beams: int = 5, min_new_tokens: int = 1,
        max_new_tokens: int = 30, length_penalty: float = 1.0, repetition_penalty: float = 1.0,
        n_tokens: int | None = None,
    ) -> Tensor:
        """Images and prompts (B or 1, n), "</s>" ... -> prompt and text ... "\\n", (B, N), padded; equal to
        transformers' output token by token, without its image tokens.

        Settings as in `beam_search`. The defaults are those of LAVIS's `generate`; its captioning task sets
        repetition_penalty=1.15 and length_penalty=0. Raises ValueError for padded prompts, and where queries,
        prompt and max_new_tokens exceed the positions.
        """
        config, prompt = self.config, prompt_ids.to(images.device).expand(len(images), -1)
        if (prompt == config.text_pad_token_id).any():
            raise ValueError("a prompt holds padding: give prompts of one length at a time")
        start, most = config.num_query_tokens + prompt.shape[1], config.text_max_position_embeddings
        if not 0 < max_new_tokens <= most - start:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens} must be above 0 and at most {most - start}: {start} of "
                f"{most} positions hold queries and prompt"
            )
        queries = self.language_projection(self.encode_queries(images))

        def step(new: Tensor, past: list[KeysValues] | None) -> tuple[Tensor, list[KeysValues]]:
            x, present = self._states(new, past, queries)
            return self._logits(x[:, -1]), present

        return beam_search(
            step, prompt, num_beams, end=config.text_eos_token_id, pad=config.text_pad_token_id,
            min_new=min_new_tokens, max_new=max_new_tokens, length_penalty=length_penalty,
            repetition_penalty=repetition_penalty, n_tokens=n_tokens,
        )
