"""CLIP's text tower, as Stable Diffusion reads it.

Home dialect: the `text_encoder` folder of the published Stable Diffusion models, `text_model.` included.
Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention, quick_gelu


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes, under the names of the published `config.json`. `hidden_act` is "quick_gelu" or "gelu"."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float


CONFIGS: dict[str, CLIPTextConfig] = {
    # openai/clip-vit-large-patch14, the text half
    "sd-1": CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
    # laion/CLIP-ViT-H-14-laion2B-s32B-b79K has 24 layers. SD 2 reads the last but one through the final norm,
    # and its published text_encoder folder is cut there: the penultimate layer is the last of these 23.
    "sd-2": CLIPTextConfig(
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, max_position_embeddings=77, hidden_act="gelu", layer_norm_eps=1e-5,
    ),
    # Ours
    "sd-mini": CLIPTextConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """OpenAI trained with quick_gelu, LAION with the exact gelu; nothing in the weights tells which."""
    if name == "quick_gelu":
        return quick_gelu
    if name == "gelu":
        return lambda x: F.gelu(x, approximate="none")
    raise ValueError(f"hidden_act is {name!r}: CLIP's are 'quick_gelu' and 'gelu'")


class SelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=causal))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, inner: int, heads: int, hidden_act: str, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Namespace(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.hidden_act = hidden_act

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        h = _activation(self.hidden_act)(self.mlp.fc1(self.layer_norm2(x)))
        return x + self.mlp.fc2(h)


class CLIPText(nn.Module):
    """Token ids to the states that Stable Diffusion's U-Net attends to."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        act, eps = config.hidden_act, config.layer_norm_eps
        _activation(act)  # a misspelt name must fail here, not at the first batch
        layers = (EncoderLayer(width, inner, heads, act, eps) for _ in range(config.num_hidden_layers))
        self.text_model = Namespace(
            embeddings=Namespace(
                token_embedding=nn.Embedding(config.vocab_size, width),
                position_embedding=nn.Embedding(config.max_position_embeddings, width),
            ),
            encoder=Namespace(layers=nn.ModuleList(layers)),
            final_layer_norm=nn.LayerNorm(width, eps=eps),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, N), N at most 77 -> the last layer's states after the final norm, (B, N, D).

        Attention is causal and reads padding like any token: Stable Diffusion was trained without a mask.
        """
        text = self.text_model
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(positions)  # (B, N, D)
        for layer in text.encoder.layers:
            x = layer(x, causal=True)
        return text.final_layer_norm(x)
