"""Stable Diffusion's U-Net: latents, a timestep and a text's states in, the noise in the latents out.

Home dialect: `model.diffusion_model.` of the published LDM checkpoints, without that prefix.
Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022. The white-box backbone of
Reverse Stable Diffusion is the first half, middle block included: `UNetEncoder`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Namespace, attention, run, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes, under LDM's names but for `attention_levels`: levels (0 = finest) with spatial transformers.

    Exactly one of `num_heads` and `num_head_channels` is set; it holds for all levels.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_heads: int | None
    num_head_channels: int | None
    context_dim: int
    use_linear_in_transformer: bool

    def heads(self, channels: int) -> int:
        """Attention heads in a block of that many channels."""
        return self.num_heads or channels // self.num_head_channels


CONFIGS: dict[str, UNetConfig] = {
    # LDM: configs/stable-diffusion/v1-inference.yaml
    "sd-1": UNetConfig(
        in_channels=4, out_channels=4, model_channels=320, num_res_blocks=2, channel_mult=(1, 2, 4, 4),
        attention_levels=(0, 1, 2), num_heads=8, num_head_channels=None, context_dim=768,
        use_linear_in_transformer=False,
    ),
    # stablediffusion: configs/stable-diffusion/v2-inference.yaml
    "sd-2": UNetConfig(
        in_channels=4, out_channels=4, model_channels=320, num_res_blocks=2, channel_mult=(1, 2, 4, 4),
        attention_levels=(0, 1, 2), num_heads=None, num_head_channels=64, context_dim=1024,
        use_linear_in_transformer=True,
    ),
    # Ours: SD 1 with a fifth of the channels and one level less, for 64 px pictures on a CPU.
    "sd-mini": UNetConfig(
        in_channels=4, out_channels=4, model_channels=64, num_res_blocks=1, channel_mult=(1, 2, 4),
        attention_levels=(0,), num_heads=4, num_head_channels=None, context_dim=128,
        use_linear_in_transformer=False,
    ),
}

GROUPS = 32  # of every GroupNorm, at every size: LDM's `GroupNorm32`


class ResBlock(nn.Module):
    """(B, in, h, w) and the time embedding (B, 4 model_channels) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, in_channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # LDM's dropout, of rate 0 as published; it makes the convolution number 3
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, padding=0)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention of tokens (B, N, D) to the context (B, M, context_dim), or to themselves without one."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """x · W₁ gated by gelu(x · W₂), both halves in one projection."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate="none")


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each after its norm and beside a residual."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        gate, dropout = GEGLU(width, 4 * width), nn.Identity()  # rate 0, as in ResBlock
        self.ff = Namespace(net=nn.Sequential(gate, dropout, nn.Linear(4 * width, width)))
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One TransformerBlock over the h·w places of (B, C, h, w)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.linear = linear = config.use_linear_in_transformer
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)  # not the 1e-5 of the ResBlocks
        self.proj_in = _projection(channels, linear)
        block = TransformerBlock(channels, config.context_dim, config.heads(channels))
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = _projection(channels, linear)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        # The same map either way; SD 2 stores it as a matrix, SD 1 as a 1x1 convolution.
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))  # (B, h·w, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        grid = x.shape[2:]
        h = _grid(self.proj_out(h), grid) if self.linear else self.proj_out(_grid(h, grid))  # (B, C, h, w)
        return x + h


def _projection(ch: int, linear: bool) -> nn.Module:
    return nn.Linear(ch, ch) if linear else nn.Conv2d(ch, ch, kernel_size=1, padding=0)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _grid(x: Tensor, size: torch.Size) -> Tensor:
    return x.transpose(1, 2).unflatten(2, size)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2), odd sizes rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size) by nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.ModuleList):
    """One entry of `input_blocks`, `middle_block` or `output_blocks`: passes each layer its inputs.

    `size` is the grid that an Upsample in it makes: that of the next skip, so that odd sizes match.
    """

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
        return h


class UNetEncoder(nn.Module):
    """The first half of the U-Net: the paper's backbone.

    `width` is the number of channels of `encode`'s output, `skip_widths` those of the input blocks' outputs.
    With `checkpointing` training stores only block inputs and recomputes activations in the backward pass.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        ch, time_dim = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(ch, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        conv_in = nn.Conv2d(config.in_channels, ch, kernel_size=3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([conv_in])])
        self.skip_widths = [ch]
        for level, multiple in enumerate(config.channel_mult):
            out = config.model_channels * multiple
            for _ in range(config.num_res_blocks):
                layers = [ResBlock(ch, out, time_dim)]
                if level in config.attention_levels:
                    layers.append(SpatialTransformer(out, config))
                self.input_blocks.append(Stage(layers))
                self.skip_widths.append(out)
                ch = out
            if level + 1 < len(config.channel_mult):
                self.input_blocks.append(Stage([Downsample(ch)]))
                self.skip_widths.append(ch)
        self.middle_block = Stage(
            [ResBlock(ch, ch, time_dim), SpatialTransformer(ch, config), ResBlock(ch, ch, time_dim)]
        )
        self.width = ch

    def encode(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The middle block's output, (B, width, h/8, w/8), for the arguments of `UNet.forward`."""
        return self._encode(latents, timesteps, context)[0]

    def levels(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """The outputs of all input blocks, finest first, and of the middle block, each (B, C, h', w')."""
        middle, skips, _ = self._encode(latents, timesteps, context)
        return [*skips, middle]

    def _encode(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> tuple:
        """Middle block's output, skips (finest first) and time embedding (B, 4 model_channels)."""
        sinusoids = timestep_embedding(timesteps, self.config.model_channels)
        emb = self.time_embed(sinusoids.to(self.time_embed[0].weight.dtype))
        recompute = self.checkpointing and self.training
        h, skips = latents, []
        for stage in self.input_blocks:
            h = run(stage, h, emb, context, recompute=recompute)
            skips.append(h)
        return run(self.middle_block, h, emb, context, recompute=recompute), skips, emb


class UNet(UNetEncoder):
    """The whole U-Net. Its keys without `output_blocks.` and `out.` are those of `UNetEncoder`."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        ch, time_dim, skips = self.width, 4 * config.model_channels, list(self.skip_widths)
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            out = config.model_channels * multiple
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), out, time_dim)]
                if level in config.attention_levels:
                    layers.append(SpatialTransformer(out, config))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(Stage(layers))
                ch = out
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, ch, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(ch, config.out_channels, kernel_size=3, padding=1),
        )

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The noise in `latents`.

        latents (B, 4, h, w), already times the VAE's scale factor; timesteps (B,) in 0..999;
        context (B, N, context_dim), any N -> (B, 4, h, w).
        """
        h, skips, emb = self._encode(latents, timesteps, context)
        for stage in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[2:] if skips else None
            h = run(stage, h, emb, context, size, recompute=self.checkpointing and self.training)
        return self.out(h)
