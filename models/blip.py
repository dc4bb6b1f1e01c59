"""BLIP's captioner: a ViT for the image, and a BERT with cross-attention in every layer for the caption.

Home dialect: Hugging Face's BlipForConditionalGeneration as published, without `cls.predictions.decoder`,
which is tied to the word embeddings. Li et al., BLIP: Bootstrapping Language-Image Pre-training, 2022.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention, mean_cross_entropy
from models.search import KeysValues, Step, beam_search, sampled


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes: `vision_` or `text_`, and the names in that half of the published `config.json`.

    A caption begins with text_bos_token_id, [DEC], and ends with text_sep_token_id, [SEP]; `eos_token_id` of
    the file is unused in BLIP and transformers.
    """

    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_hidden_layers: int
    vision_num_attention_heads: int
    vision_image_size: int
    vision_patch_size: int
    vision_layer_norm_eps: float
    text_vocab_size: int
    text_hidden_size: int
    text_intermediate_size: int
    text_num_hidden_layers: int
    text_num_attention_heads: int
    text_max_position_embeddings: int
    text_layer_norm_eps: float
    text_bos_token_id: int
    text_pad_token_id: int
    text_sep_token_id: int


# Settings common to both published captioners
_PUBLISHED = dict(
    vision_image_size=384, vision_patch_size=16, vision_layer_norm_eps=1e-5,
    text_vocab_size=30524, text_hidden_size=768, text_intermediate_size=3072, text_num_hidden_layers=12,
    text_num_attention_heads=12, text_max_position_embeddings=512, text_layer_norm_eps=1e-12,
    text_bos_token_id=30522, text_pad_token_id=0, text_sep_token_id=102,
)
CONFIGS: dict[str, BLIPConfig] = {
    # Salesforce/blip-image-captioning-base, config.json
    "blip-base": BLIPConfig(
        vision_hidden_size=768, vision_intermediate_size=3072, vision_num_hidden_layers=12,
        vision_num_attention_heads=12, **_PUBLISHED,
    ),
    # Salesforce/blip-image-captioning-large, config.json
    "blip-large": BLIPConfig(
        vision_hidden_size=1024, vision_intermediate_size=4096, vision_num_hidden_layers=24,
        vision_num_attention_heads=16, **_PUBLISHED,
    ),
    # Ours; the words of mini/blip-mini/vocab.txt, then [DEC] and [ENC]
    "blip-mini": BLIPConfig(
        vision_hidden_size=128, vision_intermediate_size=512, vision_num_hidden_layers=3,
        vision_num_attention_heads=2, vision_image_size=64, vision_patch_size=8, vision_layer_norm_eps=1e-5,
        text_vocab_size=512, text_hidden_size=128, text_intermediate_size=512, text_num_hidden_layers=3,
        text_num_attention_heads=2, text_max_position_embeddings=77, text_layer_norm_eps=1e-12,
        text_bos_token_id=510, text_pad_token_id=0, text_sep_token_id=3,
    ),
}
CONFIGS["blip-plain-mini"] = CONFIGS["blip-mini"]


class VisionLayer(nn.Module):
    """Pre-norm transformer layer, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        width, inner = config.vision_hidden_size, config.vision_intermediate_size
        self.heads, eps = config.vision_num_attention_heads, config.vision_layer_norm_eps
        self.self_attn = Namespace(qkv=nn.Linear(width, 3 * width), projection=nn.Linear(width, width))
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Namespace(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.self_attn.qkv(self.layer_norm1(x)).chunk(3, dim=-1)
        x = x + self.self_attn.projection(attention(q, k, v, self.heads))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="none"))


def _attention_names(width: int, source: int, eps: float) -> Namespace:
    """BERT's names of one attention: queries of width `width`, keys and values from width `source`."""
    return Namespace(
        self=Namespace(
            query=nn.Linear(width, width), key=nn.Linear(source, width), value=nn.Linear(source, width)
        ),
        output=Namespace(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps)),
    )


class TextLayer(nn.Module):
    """Post-norm transformer layer with causal self-attention and cross-attention to the image."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        width, inner = config.text_hidden_size, config.text_intermediate_size
        self.heads, eps = config.text_num_attention_heads, config.text_layer_norm_eps
        self.attention = _attention_names(width, width, eps)
        self.crossattention = _attention_names(width, config.vision_hidden_size, eps)
        self.intermediate = Namespace(dense=nn.Linear(width, inner))
        self.output = Namespace(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=eps))

    def forward(self, x: Tensor, image: KeysValues, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """New words (B·beams, N, D) -> the same, and the keys and values of all words so far.

        `image` holds keys and values of the B images, `past` of the words before: then N = 1.
        """
        read, write = self.attention.self, self.attention.output
        k, v = read.key(x), read.value(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        h = attention(read.query(x), k, v, self.heads, causal=past is None)
        x = write.LayerNorm(x + write.dense(h))
        read, write = self.crossattention.self, self.crossattention.output
        q = read.query(x).reshape(len(image[0]), -1, x.shape[-1])  # beams are more queries
        h = attention(q, *image, self.heads).reshape(x.shape)
        x = write.LayerNorm(x + write.dense(h))
        h = F.gelu(self.intermediate.dense(x), approximate="none")
        return self.output.LayerNorm(x + self.output.dense(h)), (k, v)


class BLIP(nn.Module):
    """Images to captions. `tokenizer` is a `tokenizers.Tokenizer`; only `generate` needs it."""

    def __init__(self, config: BLIPConfig, tokenizer: Any = None):
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

        width, vocabulary, eps = config.text_hidden_size, config.text_vocab_size, config.text_layer_norm_eps
        words = nn.Embedding(vocabulary, width, padding_idx=config.text_pad_token_id)
        places = nn.Embedding(config.text_max_position_embeddings, width)
        for table in (words, places):
            # torch's default of 1 is too large, because the head shares these weights
            nn.init.normal_(table.weight, std=0.02)
        layers = [TextLayer(config) for _ in range(config.text_num_hidden_layers)]
        head = Namespace(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps))
        self.text_decoder = Namespace(
            bert=Namespace(
                embeddings=Namespace(
                    word_embeddings=words, position_embeddings=places, LayerNorm=nn.LayerNorm(width, eps=eps)
                ),
                encoder=Namespace(layer=nn.ModuleList(layers)),
            ),
            cls=Namespace(predictions=Namespace(transform=head)),
        )
        self.text_decoder.cls.predictions.bias = nn.Parameter(torch.zeros(vocabulary))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised by the caller -> states (B, 1 + h·w, D), the class token's first.

        Raises ValueError for images of another size than the configuration's.
        """
        size, names = self.config.vision_image_size, self.vision_model.embeddings
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images are (B, 3, {size}, {size}) for this model, not {tuple(images.shape)}")
        patches = names.patch_embedding(images).flatten(2).transpose(1, 2)                # (B, h·w, D)
        x = torch.cat([names.class_embedding.expand(len(images), -1, -1), patches], dim=1)
        x = x + names.position_embedding
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return self.vision_model.post_layernorm(x)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Images and their captions' ids (B, N) -> logits (B, N, V) of the token after each.

        Attention is causal, so padding at the end needs no mask; exclude it from the loss.
        """
        x, _ = self._states(ids, self._image_keys_values(self.encode_image(images)), None)
        return self._logits(x)

    def loss(
        self, images: Tensor, ids: Tensor, n_prompt: int = 1, label_smoothing: float = 0.0,
        states: Tensor | None = None,
    ) -> Tensor:
        """Images and their texts' ids (B, N), [DEC] prompt text [SEP] and padding -> (B,): the mean
        cross-entropy of each text's tokens, given the image and all tokens before.

        The first `n_prompt` ids, [DEC] among them, and padding are not counted. BLIP takes the mean over all
        tokens of the batch, with a label_smoothing of 0.1: weight by `(ids != pad).sum(1) - n_prompt` for
        that. `states`: of `encode_image`, if they exist already.
        """
        states = self.encode_image(images) if states is None else states
        x, _ = self._states(ids[:, :-1], self._image_keys_values(states), None)
        counted = ids[:, 1:] != self.config.text_pad_token_id
        counted[:, : n_prompt - 1] = False
        return mean_cross_entropy(self._logits(x), ids[:, 1:], counted, label_smoothing)

    def _image_keys_values(self, states: Tensor) -> list[KeysValues]:
        """Cross-attention keys and values of the images, computed once per image."""
        read = [layer.crossattention.self for layer in self.text_decoder.bert.encoder.layer]
        return [(names.key(states), names.value(states)) for names in read]

    def _states(
        self, ids: Tensor, image: list[KeysValues], past: list[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """States of new ids (B·beams, N) appended to the cache `past`, and the extended cache."""
        names, present = self.text_decoder.bert.embeddings, []
        start = past[0][0].shape[1] if past else 0
        end, most = start + ids.shape[1], self.config.text_max_position_embeddings
        if end > most:
            raise ValueError(f"{end} tokens are more than this model's {most} positions")
        x = names.LayerNorm(names.word_embeddings(ids) + names.position_embeddings.weight[start:end])
        for i, layer in enumerate(self.text_decoder.bert.encoder.layer):
            x, keys_values = layer(x, image[i], past[i] if past else None)
            present.append(keys_values)
        return x, present

    def _logits(self, x: Tensor) -> Tensor:
        """States (B, N, D) -> logits (B, N, V). The head's matrix is that of the words."""
        names, words = self.text_decoder.cls.predictions, self.text_decoder.bert.embeddings.word_embeddings
        x = names.transform.LayerNorm(F.gelu(names.transform.dense(x), approximate="none"))
        return F.linear(x, words.weight, names.bias)

    def generate(self, images: Tensor, prompt: str = "a picture of ", **settings: Any) -> list[str]:
        """Images (B, 3, H, W) -> the text after the prompt, as in BLIP's own code.

        `settings` and their defaults as in `generate_ids`. Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("BLIP has no tokenizer: set it, or load a folder that holds its vocabulary")
        begin, end = self.config.text_bos_token_id, self.config.text_sep_token_id
        words = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = self.generate_ids(images, torch.tensor([[begin, *words, end]]), **settings)
        written = [takewhile(lambda token: token != end, row) for row in ids[:, 1 + len(words) :].tolist()]
        return [self.tokenizer.decode(list(row), skip_special_tokens=True).strip() for row in written]

    @torch.no_grad()
    def generate_ids(
        self, images: Tensor, prompt_ids: Tensor, num_beams: int = 3, min_length: int = 5,
        max_length: int = 20, length_penalty: float = 1.0, generator: torch.Generator | None = None,
        top_p: float = 1.0,
    ) -> Tensor:
        """Images and prompts (B or 1, n), [CLS] ... [SEP], from BERT's tokenizer -> captions
        [DEC] ... [SEP], (B, N), padded; equal to transformers' output token by token.

        [CLS] becomes [DEC] and the prompt's [SEP] is cut. Lengths count prompt, [DEC] and [SEP]. One beam
        takes the most probable token each time. With more, a caption's score is the sum of its new tokens'
        log-probabilities over their number to the power of length_penalty (early_stopping=False). With a
        `generator` and one beam, tokens are sampled (see `sampled`). The defaults are BLIP's. Raises
        ValueError for padded prompts, and for those that leave no room below max_length.
        """
        prompt = prompt_ids[:, :-1].to(images.device).expand(len(images), -1).clone()
        prompt[:, :1] = self.config.text_bos_token_id
        start, most = prompt.shape[1], self.config.text_max_position_embeddings
        if not 0 < start < max_length <= most:
            raise ValueError(
                f"max_length = {max_length} must be above the prompt's {start} tokens, and at most {most}"
            )
        if (prompt == self.config.text_pad_token_id).any():
            raise ValueError("a prompt holds padding: give prompts of one length at a time")
        step = self._step(self.encode_image(images))
        if generator is not None:
            step = sampled(step, generator, top_p)
        return beam_search(
            step, prompt, num_beams, end=self.config.text_sep_token_id, pad=self.config.text_pad_token_id,
            min_new=min_length - start, max_new=max_length - start, length_penalty=length_penalty,
        )

    def _step(self, states: Tensor) -> Step:
        """The step of a beam search that reads image states (B, N, D)."""
        image = self._image_keys_values(states)

        def step(new: Tensor, past: list[KeysValues] | None) -> tuple[Tensor, list[KeysValues]]:
            x, present = self._states(new, image, past)
            return self._logits(x[:, -1]), present

        return step
