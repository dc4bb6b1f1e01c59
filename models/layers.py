"""Shared parts of the architectures: stateless functions, and a class that only adds names.

It holds no blocks, so that every model file can be read beside its own checkpoint.
Letters used in all of models/: B batch, N tokens, D width, H heads, C channels, V vocabulary; h, w a grid's
height and width (H, W a picture's).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Namespace(nn.Module):
    """A module without a forward: it only adds the prefix `name.` to its children's keys."""

    def __init__(self, /, **children: nn.Module):  # BERT has a child that is called `self`
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / sqrt(D / heads)) v, by heads.

    q (B, N, D), k and v (B, M, D) -> (B, N, D). `mask` is boolean, broadcasts to (B, heads, N, M), and is
    True where a key may be read. `causal`: token i reads tokens 0..i only.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, D/heads)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)                                      # (B, N, D)


def mean_cross_entropy(
    logits: Tensor, ids: Tensor, counted: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """The mean cross-entropy of each row's counted tokens: logits (B, N, V), ids (B, N) and counted (B, N)
    bool -> (B,), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)     # (B · N, V)
    each = F.cross_entropy(logits, ids.flatten(), reduction="none", label_smoothing=label_smoothing)
    return (each.view_as(ids) * counted).sum(dim=1) / counted.sum(dim=1)


def run(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """block(*inputs). With `recompute` only inputs are stored; the backward pass recomputes the block."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of gelu: x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of (B,) timesteps -> (B, width) float32: all cosines, then all sines (LDM's order).

    `width` is even; frequencies fall geometrically from 1 towards 1 / max_period. Computed in float32 in
    every model, as in the published training: half precision is too coarse for such angles.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
