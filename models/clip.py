"""CLIP: the text tower, as used in Stable Diffusion, and the visual tower with its projection.

Home dialect: Hugging Face's. The text tower is the `text_encoder` folder of the published Stable Diffusion
models, `text_model.` included; the visual tower is CLIPVisionModelWithProjection, `vision_model.` included.
Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention, quick_gelu, run


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
    projection_dim: int | None = None  # None: the file holds no projection, as those of Stable Diffusion
    # -1: the last of the vocabulary; 2: the largest id of each text, as transformers reads the number that
    # its early versions wrote
    eos_token_id: int = -1


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
    # openai/clip-vit-base-patch32, the text half
    "clip-b-32": CLIPTextConfig(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        projection_dim=512,
    ),
}
# The text halves of whole CLIPs: openai/clip-vit-large-patch14, laion/CLIP-ViT-H-14-laion2B-s32B-b79K, ours
CONFIGS |= {
    "clip-l-14": replace(CONFIGS["sd-1"], projection_dim=768),
    "clip-h-14": replace(CONFIGS["sd-2"], num_hidden_layers=24, projection_dim=1024),
    "clip-mini": replace(CONFIGS["sd-mini"], projection_dim=128),
}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes, under the names of the published `config.json`. `hidden_act` is "quick_gelu" or "gelu".

    `image_size` and `patch_size` are in pixels: a side where square, else (height, width).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    num_channels: int
    projection_dim: int
    hidden_act: str
    layer_norm_eps: float


VISION_CONFIGS: dict[str, CLIPVisionConfig] = {
    # openai/clip-vit-base-patch32, the visual half
    "clip-b-32": CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=32, num_channels=3, projection_dim=512,
        hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
    # openai/clip-vit-large-patch14, the visual half
    "clip-l-14": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=224, patch_size=14, num_channels=3, projection_dim=768,
        hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
    # laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the visual half
    "clip-h-14": CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, num_channels=3, projection_dim=1024,
        hidden_act="gelu", layer_norm_eps=1e-5,
    ),
    # Ours
    "clip-mini": CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2,
        image_size=64, patch_size=8, num_channels=3, projection_dim=128,
        hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """OpenAI trained with quick_gelu, LAION with the exact gelu; the weights do not show which."""
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
    """Token ids to the states that Stable Diffusion's U-Net attends to, and to CLIP's text embeddings."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        act, eps = config.hidden_act, config.layer_norm_eps
        _activation(act)  # fail here on an unknown activation, not at the first batch
        layers = (EncoderLayer(width, inner, heads, act, eps) for _ in range(config.num_hidden_layers))
        self.text_model = Namespace(
            embeddings=Namespace(
                token_embedding=nn.Embedding(config.vocab_size, width),
                position_embedding=nn.Embedding(config.max_position_embeddings, width),
            ),
            encoder=Namespace(layers=nn.ModuleList(layers)),
            final_layer_norm=nn.LayerNorm(width, eps=eps),
        )
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, N), N at most 77 -> the last layer's states after the final norm, (B, N, D).

        Attention is causal and includes padding tokens, as Stable Diffusion was trained without a mask.
        """
        text = self.text_model
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(positions)  # (B, N, D)
        for layer in text.encoder.layers:
            x = layer(x, causal=True)
        return text.final_layer_norm(x)

    def pooled(self, ids: Tensor) -> Tensor:
        """Ids (B, N), N at most 77 -> embeddings (B, P), not of unit length: the state at each text's first
        end mark, projected.

        The end mark is `eos_token_id`. Tokens after it, end marks (OpenAI) or zeros (open_clip), have no
        effect. Raises ValueError for a text without end mark and a tower without projection.
        """
        if self.config.projection_dim is None:
            raise ValueError("this text tower has no text_projection, as the files of Stable Diffusion hold "
                             "none; load that of a whole CLIP, such as clip-b-32")
        end = self.config.eos_token_id % self.config.vocab_size
        is_end = ids == (ids.amax(dim=1, keepdim=True) if self.config.eos_token_id == 2 else end)
        if not is_end.any(dim=1).all():
            raise ValueError(f"a text has no end mark (id {end}); end long texts with it where they are cut, "
                             f"as weights.ClipTokenizer does")
        ends = is_end.int().argmax(dim=1)  # the first one                                  (B,)
        return self.text_projection(self(ids)[torch.arange(len(ids), device=ids.device), ends])  # (B, P)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class CLIPVision(nn.Module):
    """Images to CLIP's image embeddings. With `checkpointing`, training stores only layer inputs and
    recomputes activations in the backward pass."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config, self.width, self.checkpointing = config, config.projection_dim, False
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        act, eps, patch = config.hidden_act, config.layer_norm_eps, _pair(config.patch_size)
        _activation(act)  # fail here on an unknown activation, not at the first batch
        self.image_size = _pair(config.image_size)
        tokens = 1 + (self.image_size[0] // patch[0]) * (self.image_size[1] // patch[1])
        layers = (EncoderLayer(width, inner, heads, act, eps) for _ in range(config.num_hidden_layers))
        self.vision_model = Namespace(
            embeddings=Namespace(
                patch_embedding=nn.Conv2d(
                    config.num_channels, width, kernel_size=patch, stride=patch, padding=0, bias=False
                ),
                position_embedding=nn.Embedding(tokens, width),
            ),
            pre_layrnorm=nn.LayerNorm(width, eps=eps),  # misspelt in the published files
            encoder=Namespace(layers=nn.ModuleList(layers)),
            post_layernorm=nn.LayerNorm(width, eps=eps),
        )
        embeddings = self.vision_model.embeddings
        embeddings.class_embedding = nn.Parameter(torch.empty(width))
        for table in (embeddings.class_embedding, embeddings.position_embedding.weight):
            nn.init.normal_(table, std=width**-0.5)  # OpenAI's initialisation; torch's default 1 is too large
        self.visual_projection = nn.Linear(width, config.projection_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised with CLIP's mean and deviation -> embeddings (B, P), not of unit
        length. Raises ValueError for images of another size than the model's.
        """
        if images.shape[-2:] != self.image_size:
            actual, wanted = ("x".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise ValueError(f"images are {actual}, this CLIP takes {wanted} (height x width)")
        vision = self.vision_model
        patches = vision.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)   # (B, N - 1, D)
        first = vision.embeddings.class_embedding.expand(len(images), 1, -1)             # (B, 1, D)
        x = torch.cat([first, patches], dim=1) + vision.embeddings.position_embedding.weight
        x = vision.pre_layrnorm(x)                                                       # (B, N, D)
        for layer in vision.encoder.layers:
            x = run(layer, x, False, recompute=self.checkpointing and self.training)  # not causal
        return self.visual_projection(vision.post_layernorm(x[:, 0]))                    # (B, P)
