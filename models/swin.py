"""Swin Transformer, version 1 and version 2.

Home dialect: timm's (`layers.1.downsample.reduction`, `layers.0.blocks.0.attn.qkv`), without its classifier.
Liu et al., Swin Transformer, 2021; Liu et al., Swin Transformer V2, 2022.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, run


@dataclass(frozen=True)
class SwinConfig:
    """Sizes, under the names of timm's arguments.

    window_size is one for all stages or one per stage; a grid that is smaller shrinks it. version is 1 or 2.
    pretrained_window_sizes is version 2's, one per stage: the pretraining window of a fine-tuned model; 0 if
    there was none; () in version 1.
    """

    version: int
    img_size: tuple[int, int]  # height, width
    patch_size: tuple[int, int]  # height, width
    in_chans: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int | tuple[int, ...]
    mlp_ratio: float
    qkv_bias: bool
    pretrained_window_sizes: tuple[int, ...]


_T = SwinConfig(
    version=1, img_size=(224, 224), patch_size=(4, 4), in_chans=3, embed_dim=96, depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24), window_size=7, mlp_ratio=4.0, qkv_bias=True, pretrained_window_sizes=(),
)
_B = replace(_T, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_L = replace(_B, embed_dim=192, num_heads=(6, 12, 24, 48))
_MINI = replace(_T, img_size=(64, 64), embed_dim=48, depths=(2, 2, 4), num_heads=(2, 4, 8), window_size=4)
CONFIGS: dict[str, SwinConfig] = {
    "swin-t": _T,  # timm, swin_tiny_patch4_window7_224
    "swin-b": _B,  # timm, swin_base_patch4_window7_224
    "swin-l": _L,  # timm, swin_large_patch4_window7_224
    # timm, swinv2_large_window12to16_192to256; at 192 pixels the last stage's grid was only 6 wide
    "swinv2-l": replace(
        _L, version=2, img_size=(256, 256), window_size=16, pretrained_window_sizes=(12, 12, 12, 6)
    ),
    # Ours
    "swin-mini": _MINI,
    "swinv2-mini": replace(_MINI, version=2, pretrained_window_sizes=(0, 0, 0)),
}

# Added to a score instead of minus infinity, so it does not mask completely for a version 2 head whose
# logit_scale is at its bound. (transformers adds it twice in version 2; Microsoft's code and timm once.)
MASKED = -100.0
Pair = tuple[int, int]  # height, width


def stage_windows(config: SwinConfig) -> tuple[int, ...]:
    """The window of each stage whose grid is large enough."""
    window = config.window_size
    return (window,) * len(config.depths) if isinstance(window, int) else window


def stage_grids(config: SwinConfig) -> list[Pair]:
    """Each stage's grid. Incomplete patches at an image's edge are dropped; odd grids are padded."""
    h, w = (size // patch for size, patch in zip(config.img_size, config.patch_size, strict=True))
    return [(math.ceil(h / 2**i), math.ceil(w / 2**i)) for i in range(len(config.depths))]


def _device() -> torch.device:
    """The device of the three tables below. The stages hold them as buffers, which no checkpoint has, so they
    must be real when loading builds the rest of the model on the meta device."""
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default


def relative_index(window: Pair) -> Tensor:
    """Number, below (2h-1)(2w-1), of the offset from place j of a window to place i: (N, N) int64, N = hw."""
    h, w = window
    place = torch.arange(h * w, device=_device())
    row, column = place // w, place % w
    return (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1


def log_offsets(window: Pair, pretrained: int) -> Tensor:
    """Version 2's offsets within a window, spaced by their logarithm: ((2h-1)(2w-1), 2) float32.

    The unit is the width of the *pretraining* window, so that a larger window continues the same scale
    (section 3.3). In float32 at any precision of the model, as in the published training.
    """
    axes = []
    for size in window:
        offset = torch.arange(1 - size, size, dtype=torch.float32, device=_device())
        offset = offset / max((pretrained or size) - 1, 1) * 8
        axes.append(offset.sign() * torch.log2(offset.abs() + 1.0) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def shift_mask(grid: Pair, window: Pair, shift: Pair) -> Tensor:
    """Mask that separates opposite image edges within windows of the shifted grid.

    (windows, 1, N, N), MASKED or 0.
    """
    edges = []
    for size, side, by in zip(grid, window, shift, strict=True):
        place = torch.arange(math.ceil(size / side) * side, device=_device())
        edges.append(place >= len(place) - by)
    edge = edges[0][:, None] * 2 + edges[1]                                      # (h, w)
    edge = partition(edge[None, :, :, None], window)[:, :, 0]                    # (windows, N)
    return MASKED * (edge[:, None, :, None] != edge[:, None, None, :]).to(torch.get_default_dtype())


def partition(x: Tensor, window: Pair) -> Tensor:
    """Grids (B, h, w, D) -> their windows (B · windows, N, D)."""
    h, w = window
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)            # (B, ., ., h, w, D)
    return x.reshape(-1, h * w, x.shape[-1])


def merge(x: Tensor, window: Pair, grid: Pair) -> Tensor:
    """The reverse of `partition`: (B · windows, N, D) -> (B, h, w, D)."""
    h, w = window
    x = x.view(-1, grid[0] // h, grid[1] // w, h, w, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, *grid, x.shape[-1])


class WindowAttention(nn.Module):
    """Attention within windows: (B · windows, N, D) -> the same.

    Version 1 learns a bias for every offset. In version 2 a small network makes it, the scores are cosines
    times a learnt factor, and the keys' projection has no bias.
    """

    def __init__(self, config: SwinConfig, width: int, heads: int, window: Pair):
        super().__init__()
        self.version, self.heads = config.version, heads
        if config.version == 1:
            offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        else:
            self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
            self.v_bias = nn.Parameter(torch.zeros(width)) if config.qkv_bias else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, index: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
        bias = self.qkv.bias
        if self.version == 2 and self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x) if self.version == 1 else F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B · windows, H, N, D/H)
        if self.version == 1:
            table, scale = self.relative_position_bias_table, q.shape[-1] ** -0.5
        else:
            sharpness = self.logit_scale.clamp(max=math.log(100)).exp()          # (H, 1, 1)
            q, k = F.normalize(q, dim=-1, eps=1e-12) * sharpness, F.normalize(k, dim=-1, eps=1e-12)
            table, scale = 16 * self.cpb_mlp(offsets).sigmoid(), 1.0             # (offsets, H)
        return self.proj(attend(q, k, v, table[index].permute(2, 0, 1), mask, scale))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q kᵀ + bias + mask) v, by heads.

    q, k, v (B · windows, H, N, D/H), bias (H, N, N), mask (windows, 1, N, N) or None -> (B · windows, N, D)
    """
    batch, heads = q.shape[:2]
    if mask is not None:
        # Windows beside heads, not beside images: then the sum of bias and mask serves every image.
        windows = mask.shape[0]
        q, k, v = (x.unflatten(0, (-1, windows)).flatten(1, 2) for x in (q, k, v))
        bias = (bias + mask.to(bias.dtype)).flatten(0, 1)                        # (windows · H, N, N)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], dropout_p=0.0, scale=scale)
    return mixed.reshape(batch, heads, *mixed.shape[2:]).transpose(1, 2).flatten(2)  # (B · windows, N, D)


class Block(nn.Module):
    """Attention within windows and an MLP, (B, h, w, D) -> the same. Every other block shifts its windows."""

    def __init__(self, config: SwinConfig, width: int, heads: int, window: Pair, shift: Pair):
        super().__init__()
        self.version, self.window, self.shift = config.version, window, shift
        inner = int(width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = WindowAttention(config, width, heads, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = Namespace(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))

    def forward(self, x: Tensor, index: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.version == 1:
            x = x + self._attend(self.norm1(x), index, offsets, mask)
            return x + self._mlp(self.norm2(x))
        # Version 2 normalises the branch's output instead of its input; this limits activation growth with
        # depth.
        x = x + self.norm1(self._attend(x, index, offsets, mask))
        return x + self.norm2(self._mlp(x))

    def _attend(self, x: Tensor, index: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
        """Shifted-window attention on the grid."""
        (h, w), (down, right) = x.shape[1:3], self.shift
        bottom, side = -h % self.window[0], -w % self.window[1]
        if down or right:
            x = x.roll((-down, -right), dims=(1, 2))
        if bottom or side:
            # As in timm: zeros after the last row and column *after* the shift, not masked in the attention.
            # (transformers pads before the shift.)
            x = F.pad(x, (0, 0, 0, side, 0, bottom))
        grid = (h + bottom, w + side)
        x = self.attn(partition(x, self.window), index, offsets, mask if down or right else None)
        x = merge(x, self.window, grid)[:, :h, :w]
        return x.roll((down, right), dims=(1, 2)) if down or right else x

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp.fc2(F.gelu(self.mlp.fc1(x), approximate="none"))


class PatchMerging(nn.Module):
    """Merge 2 x 2 neighbours into one place of twice the width: (B, h, w, D) -> (B, h/2, w/2, 2 D)."""

    def __init__(self, version: int, width: int):
        super().__init__()
        self.version = version
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        # Version 2 norms after the reduction: half as wide.
        self.norm = nn.LayerNorm(4 * width if version == 1 else 2 * width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        # The four in the order upper left, lower left, upper right, lower right.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)) if self.version == 1 else self.norm(self.reduction(x))


class Stage(nn.Module):
    """Blocks on one grid; all but the first stage merge the patches of the previous one."""

    def __init__(self, config: SwinConfig, number: int):
        super().__init__()
        grid, full = stage_grids(config)[number], stage_windows(config)[number]
        width, heads = config.embed_dim * 2**number, config.num_heads[number]
        # If the grid is not larger than the window, the grid is the window, without a shift.
        window = (min(grid[0], full), min(grid[1], full))
        shift = tuple(full // 2 if size > side else 0 for size, side in zip(grid, window, strict=True))
        self.downsample = PatchMerging(config.version, width // 2) if number else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config, width, heads, window, shift if i % 2 else (0, 0))
            for i in range(config.depths[number])
        )
        offsets = None if config.version == 1 else log_offsets(window, config.pretrained_window_sizes[number])
        mask = shift_mask(grid, window, shift) if any(shift) else None
        self.register_buffer("index", relative_index(window), persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x, self.index, self.offsets, self.mask, recompute=recompute)
        return x


class Swin(nn.Module):
    """Swin Transformer without a classifier.

    `checkpointing`: while training, recompute every block in the backward pass instead of storing it.
    """

    def __init__(self, config: SwinConfig):
        super().__init__()
        if config.version not in (1, 2):
            raise ValueError(f"version is {config.version!r}: Swin's are 1 and 2")
        self.config, self.checkpointing = config, False
        self.width = config.embed_dim * 2 ** (len(config.depths) - 1)
        patch = config.patch_size
        self.patch_embed = Namespace(
            proj=nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=patch, stride=patch),
            norm=nn.LayerNorm(config.embed_dim, eps=1e-5),
        )
        self.layers = nn.ModuleList(Stage(config, number) for number in range(len(config.depths)))
        self.norm = nn.LayerNorm(self.width, eps=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) of the size in the config -> features (B, width), the mean over all
        places after the last norm.

        Raises ValueError for images of another size.
        """
        if images.shape[2:] != self.config.img_size:
            actual, wanted = ("x".join(map(str, size)) for size in (images.shape[2:], self.config.img_size))
            raise ValueError(f"images are {actual}, this Swin takes {wanted} (height x width)")
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)                    # (B, h, w, D)
        x = self.patch_embed.norm(x)
        for stage in self.layers:
            x = stage(x, self.checkpointing and self.training)                   # (B, h/2, w/2, 2 D)
        return self.norm(x).mean(dim=(1, 2))                                     # (B, width)
