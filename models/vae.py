"""Stable Diffusion's autoencoder: pictures to latents an eighth of their height and width, and back.

Home dialect: `first_stage_model.` of the published LDM checkpoints, without that prefix.
Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022 (AutoencoderKL, f = 8).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, under LDM's `ddconfig` names.

    The U-Net reads latents times `scale_factor`; the VAE's methods do not apply it.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    in_channels: int
    out_ch: int
    z_channels: int
    embed_dim: int
    scale_factor: float
    norm_groups: int


# LDM: configs/stable-diffusion/v1-inference.yaml; v2-inference.yaml of Stable Diffusion 2 has the same sizes.
_STABLE_DIFFUSION = VAEConfig(
    ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, in_channels=3, out_ch=3, z_channels=4, embed_dim=4,
    scale_factor=0.18215, norm_groups=32,
)

CONFIGS: dict[str, VAEConfig] = {
    "sd-1": _STABLE_DIFFUSION,
    "sd-2": _STABLE_DIFFUSION,
    # Ours. scale_factor is 1 / standard deviation of the latents; the trained config.json holds it.
    "sd-mini": VAEConfig(
        ch=16, ch_mult=(1, 2, 4, 8), num_res_blocks=1, in_channels=3, out_ch=3, z_channels=4, embed_dim=4,
        scale_factor=1.0, norm_groups=8,
    ),
}


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w): norm, silu, convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head of attention over all places of (B, C, h, w); the projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.k = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.v = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, h·w, C)
        h = attention(q, k, v, heads=1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))          # (B, C, h, w)


def _middle(channels: int, groups: int) -> Namespace:
    return Namespace(
        block_1=ResnetBlock(channels, channels, groups),
        attn_1=AttnBlock(channels, groups),
        block_2=ResnetBlock(channels, channels, groups),
    )


class Encoder(nn.Module):
    """Pictures (B, in_channels, H, W) -> (B, 2 z_channels, H/8, W/8), the input of `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.ch * m for m in config.ch_mult], config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        previous = config.ch
        for i, width in enumerate(widths):
            inputs = [previous] + [width] * (config.num_res_blocks - 1)
            level = Namespace(block=nn.ModuleList(ResnetBlock(c, width, groups) for c in inputs))
            if i + 1 < len(widths):
                level.downsample = Namespace(conv=nn.Conv2d(width, width, kernel_size=3, stride=2, padding=0))
            self.down.append(level)
            previous = width
        self.mid = _middle(previous, groups)
        self.norm_out = _norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, 2 * config.z_channels, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                # LDM pads on the right and at the bottom only, so the convolution itself must not pad.
                h = level.downsample.conv(F.pad(h, (0, 1, 0, 1), mode="constant", value=0.0))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents after `post_quant_conv` (B, z_channels, h, w) -> pictures (B, out_ch, 8h, 8w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = [config.ch * m for m in config.ch_mult], config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = _middle(widths[-1], groups)
        levels = []
        previous = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            inputs = [previous] + [width] * config.num_res_blocks
            level = Namespace(block=nn.ModuleList(ResnetBlock(c, width, groups) for c in inputs))
            if i > 0:
                level.upsample = Namespace(conv=nn.Conv2d(width, width, kernel_size=3, padding=1))
            levels.append(level)
            previous = width
        # Numbered like the encoder's levels: up.0 has the finest grid and runs last.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, config.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """The autoencoder. Pictures are (B, 3, H, W) in [-1, 1], H and W multiples of 8; latents (B, 4, h, w).

    The strided convolutions round other sizes down to a multiple of 8.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, kernel_size=1, padding=0)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, kernel_size=1, padding=0)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance, each (B, 4, H/8, W/8); log variance clamped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)

    def encode(self, images: Tensor) -> Tensor:
        """Posterior mean (B, 4, H/8, W/8), without `config.scale_factor`."""
        return self.moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w), without `config.scale_factor` -> pictures (B, 3, 8h, 8w), not clamped."""
        return self.decoder(self.post_quant_conv(latents))
