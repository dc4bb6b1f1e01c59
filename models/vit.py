"""The Vision Transformer: a pre-norm transformer over image patches.

Home dialect: timm's VisionTransformer without its head (`blocks.0.attn.qkv`).
Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, 2021.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention, run


@dataclass(frozen=True)
class ViTConfig:
    """Sizes, under the names of timm's arguments; pixels are (height, width).

    hidden_features  the MLP's width (a ratio cannot express every width)
    class_token      whether a learned token precedes the patches
    global_pool      the features: "token" (the class token) or "avg" (the mean over the patches)
    fc_norm          whether the last norm comes after the pooling (`fc_norm`) and not before it (`norm`)
    norm_eps         1e-6 in timm and the original, 1e-12 in Hugging Face's files
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    hidden_features: int
    qkv_bias: bool
    class_token: bool
    global_pool: str
    fc_norm: bool
    norm_eps: float


# timm's vit_base_patch16_224
_B = ViTConfig(
    img_size=(224, 224), patch_size=(16, 16), in_chans=3, embed_dim=768, depth=12, num_heads=12,
    hidden_features=3072, qkv_bias=True, class_token=True, global_pool="token", fc_norm=False, norm_eps=1e-6,
)

CONFIGS: dict[str, ViTConfig] = {
    # ViT-Base and ViT-Large of the paper's table 1; timm's tiny and small are known for their files alone
    "vit-b-16": _B,
    "vit-l-16": replace(_B, embed_dim=1024, depth=24, num_heads=16, hidden_features=4096),
    "vit-s-16": replace(_B, embed_dim=384, num_heads=6, hidden_features=1536),
    "vit-t-16": replace(_B, embed_dim=192, num_heads=3, hidden_features=768),
    # Ours
    "vit-mini": ViTConfig(
        img_size=(64, 64), patch_size=(8, 8), in_chans=3, embed_dim=128, depth=6, num_heads=2,
        hidden_features=512, qkv_bias=True, class_token=True, global_pool="token", fc_norm=False,
        norm_eps=1e-6,
    ),
}


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, inner, eps = config.embed_dim, config.hidden_features, config.norm_eps
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Namespace(
            qkv=nn.Linear(width, 3 * width, bias=config.qkv_bias), proj=nn.Linear(width, width)
        )
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Namespace(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)  # each (B, N, D)
        x = x + self.attn.proj(attention(q, k, v, self.heads))
        h = F.gelu(self.mlp.fc1(self.norm2(x)), approximate="none")
        return x + self.mlp.fc2(h)


class ViT(nn.Module):
    """Images to the features before timm's classifier: no head, no dropout.

    With `checkpointing`, training stores only block inputs and recomputes activations in the backward pass.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.global_pool not in (("token", "avg") if config.class_token else ("avg",)):
            raise ValueError(f"global_pool is {config.global_pool!r}: 'token', with a class token, or 'avg'")
        self.config, self.width, self.checkpointing = config, config.embed_dim, False
        (height, width), patch = config.img_size, config.patch_size
        tokens = int(config.class_token) + (height // patch[0]) * (width // patch[1])
        self.patch_embed = Namespace(
            # Without padding: pixels beyond the last whole patch are ignored.
            proj=nn.Conv2d(config.in_chans, self.width, kernel_size=patch, stride=patch, padding=0)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, self.width))
        nn.init.normal_(self.pos_embed, std=0.02)  # as the original
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        name = "fc_norm" if config.fc_norm else "norm"
        self.add_module(name, nn.LayerNorm(self.width, eps=config.norm_eps))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> features (B, D).

        Raises ValueError for images of another size than the model's: positions are learned, one per patch.
        """
        config = self.config
        if images.shape[-2:] != config.img_size:
            actual, wanted = ("x".join(map(str, size)) for size in (images.shape[-2:], config.img_size))
            raise ValueError(f"images are {actual}, this ViT takes {wanted} (height x width)")
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)          # (B, h·w, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D), N = 1 + h·w
        x = x + self.pos_embed
        for block in self.blocks:
            x = run(block, x, recompute=self.checkpointing and self.training)
        if not config.fc_norm:
            x = self.norm(x)
        x = x[:, 0] if config.global_pool == "token" else x[:, int(config.class_token):].mean(dim=1)
        return self.fc_norm(x) if config.fc_norm else x                       # (B, D)
