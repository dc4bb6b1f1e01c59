"""The miniature's autoencoder: 64 px pictures <-> 8 x 8 latents, `python -m mini.pretrain vae`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.loop import HELD_OUT, MiniTrainer, Recipe, World, batch_of
from mini.write import write_part
from models import vae

RECIPE = Recipe(steps=8000, batch_size=16, lr=1e-3, warmup=100)
KL_WEIGHT = 1e-6


def reconstruction_loss(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Absolute error of pixels, and of their differences to the right and downwards, for sharp edges."""
    loss = F.l1_loss(rebuilt, images)
    for dim in (2, 3):
        loss = loss + 0.5 * F.l1_loss(rebuilt.diff(dim=dim), images.diff(dim=dim))
    return loss


def train_vae(folder: Path, world: World, recipe: Recipe, seed: int, device: str) -> dict:
    """The card's fields; writes folder/sd-mini/vae. The loss is the error of pixels and edges plus a small KL
    term, as in latent diffusion.

    Source: Rombach et al. 2022, section 3.1 and its appendix G; without the perceptual and adversarial terms,
    which need a pretrained network and matter little at 64 px.
    """
    torch.manual_seed(seed)
    model = vae.VAE(vae.CONFIGS["sd-mini"]).to(device, memory_format=torch.channels_last)

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch_of(world.images, rows).contiguous(memory_format=torch.channels_last)
        mean, logvar = model.moments(x)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator, device=device)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        reconstruction = reconstruction_loss(x, model.decode(latents))
        return {
            "loss": reconstruction + KL_WEIGHT * kl,
            "reconstruction": reconstruction.detach(),
            "kl": kl.detach(),
        }

    minutes = MiniTrainer("vae", model, loss, len(world) - HELD_OUT, recipe, seed).fit()
    quality = vae_quality(model, world.images[-HELD_OUT:])
    config = replace(model.config, scale_factor=round(1 / quality["latent_deviation"], 5))
    write_part("vae", model, folder / "sd-mini" / "vae", published(config))
    return {"minutes": round(minutes, 1), **quality}


@torch.no_grad()
def vae_quality(model: vae.VAE, held_out: np.ndarray) -> dict:
    """Mean peak signal-to-noise ratio (dB) on pictures held out, and the deviation of their latents."""
    errors, latents = [], []
    device = next(model.parameters()).device
    for rows in torch.arange(len(held_out), device=device).split(50):
        x = batch_of(held_out, rows)
        z = model.encode(x)
        errors.append((model.decode(z).clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)))
        latents.append(z)
    psnr = -10 * torch.log10(torch.cat(errors) / 4)  # the range of [-1, 1] is 2
    return {
        "psnr_db": round(psnr.mean().item(), 2),
        "latent_deviation": round(torch.cat(latents).std().item(), 4),
    }


def published(config: vae.VAEConfig) -> dict:
    """config.json of diffusers' AutoencoderKL."""
    sizes = asdict(config)
    channels = [sizes["ch"] * mult for mult in sizes["ch_mult"]]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": sizes["in_channels"],
        "latent_channels": sizes["z_channels"],
        "layers_per_block": sizes["num_res_blocks"],
        "norm_num_groups": sizes["norm_groups"],
        "out_channels": sizes["out_ch"],
        "sample_size": 64,
        "scaling_factor": sizes["scale_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
