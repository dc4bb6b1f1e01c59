"""The miniature's U-Net: trained to predict the noise in latents, `python -m mini.pretrain unet`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import weights
from files import write_json
from generate import TRAIN_STEPS, alphas_bar
from mini.loop import HELD_OUT, MiniTrainer, Recipe, World, batch_of
from mini.write import write_part
from models import unet

RECIPE = Recipe(steps=10_000, batch_size=128, lr=1e-3, warmup=500, betas=(0.9, 0.99))
EMPTY_PROMPTS = 0.1  # share of samples trained with an empty prompt (classifier-free guidance)
CHUNK = 256


@torch.no_grad()
def latent_moments(images: np.ndarray, source: str, device: str) -> tuple[Tensor, Tensor]:
    """Posterior mean and deviation of all pictures by the autoencoder of `source`, (n, 4, 8, 8), scaled."""
    vae = weights.load("vae", source, device=device)
    means, deviations = [], []
    for rows in tqdm(torch.arange(len(images), device=device).split(CHUNK), "encoding pictures"):
        mean, logvar = vae.moments(batch_of(images, rows))
        means.append(mean * vae.config.scale_factor)
        deviations.append((0.5 * logvar).exp() * vae.config.scale_factor)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def prompt_states(prompts: list[str], device: str) -> Tensor:
    """Text states of each prompt, (n, 77, D) float16, from the trained text tower."""
    text = weights.load("clip-text", "sd-mini", device=device)
    ids = weights.load_tokenizer("sd-mini")(prompts).to(device)
    states = torch.empty(*ids.shape, text.config.hidden_size, dtype=torch.float16, device=device)
    for rows in tqdm(torch.arange(len(prompts), device=device).split(CHUNK), "encoding prompts"):
        states[rows] = text(ids[rows]).half()
    return states


def zero_output_layers(model: unet.UNet) -> None:
    """Zero the last layer of each block and of the network, as in LDM: blocks start as the identity."""
    for module in model.modules():
        if isinstance(module, unet.ResBlock):
            last = module.out_layers[3]
        elif isinstance(module, unet.SpatialTransformer):
            last = module.proj_out
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    nn.init.zeros_(model.out[2].weight)
    nn.init.zeros_(model.out[2].bias)


def train_unet(folder: Path, world: World, recipe: Recipe, seed: int, device: str) -> dict:
    """The card's fields; writes folder/sd-mini/unet and its scheduler. The autoencoder is that of the folder.

    Mean squared error of the noise at timesteps drawn evenly from all 1000 (Ho et al. 2020, equation 14), on
    samples of the autoencoder's posterior, a tenth of them with the empty prompt.
    """
    torch.manual_seed(seed)
    model = unet.UNet(unet.CONFIGS["sd-mini"])
    zero_output_layers(model)
    model = model.to(device, memory_format=torch.channels_last)
    mean, deviation = latent_moments(world.images, str(folder / "sd-mini"), device)
    states = prompt_states([*world.prompts, ""], device)
    alphas = alphas_bar().to(device)

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        n, random = len(rows), {"generator": generator, "device": device}
        clean = mean[rows] + deviation[rows] * torch.randn(n, *mean.shape[1:], **random)
        noise = torch.randn(clean.shape, **random)
        t = torch.randint(TRAIN_STEPS, (n,), **random)
        alpha = alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        rows = torch.where(torch.rand(n, **random) < EMPTY_PROMPTS, len(world), rows)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return {"loss": F.mse_loss(model(noisy, t, states[rows].float()), noise)}

    minutes = MiniTrainer("unet", model, loss, len(world) - HELD_OUT, recipe, seed).fit()
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(seed)
        held_out = torch.arange(len(world) - HELD_OUT, len(world), device=device).repeat(8)
        losses = [loss(rows, generator)["loss"] for rows in held_out.split(HELD_OUT)]
    write_unet(model, folder / "sd-mini")
    return {"minutes": round(minutes, 1), "held_out_loss": round(torch.stack(losses).mean().item(), 4)}


def write_unet(model: unet.UNet, folder: Path) -> None:
    """Write diffusers' UNet2DConditionModel and, beside it, the sampler's settings."""
    sizes = model.config
    levels = range(len(sizes.channel_mult))
    kinds = ["CrossAttn" if level in sizes.attention_levels else "" for level in levels]
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": sizes.num_heads,  # diffusers' name for their number
        "block_out_channels": [sizes.model_channels * mult for mult in sizes.channel_mult],
        "cross_attention_dim": sizes.context_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "in_channels": sizes.in_channels,
        "layers_per_block": sizes.num_res_blocks,
        "norm_eps": 1e-5,
        "norm_num_groups": unet.GROUPS,
        "out_channels": sizes.out_channels,
        "sample_size": 8,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": sizes.use_linear_in_transformer,
    }
    write_part("unet", model, folder / "unet", config)
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": TRAIN_STEPS,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
