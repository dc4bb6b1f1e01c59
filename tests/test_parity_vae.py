"""models/vae.py against diffusers' AutoencoderKL."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.vae import CONFIGS, VAE, VAEConfig
from tests.parity import (
    assert_parity,
    assert_same_shapes,
    first_difference,
    home_names,
    misnamed,
    parameters,
    randomise,
)
from weights import to_home

home = partial(to_home, "vae")

TINY = VAEConfig(
    ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=2, in_channels=3, out_ch=3, z_channels=4, embed_dim=4,
    scale_factor=0.18215, norm_groups=4,
)


def reference(config: VAEConfig) -> nn.Module:
    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels, out_channels=config.out_ch, latent_channels=config.z_channels,
        block_out_channels=[config.ch * m for m in config.ch_mult], layers_per_block=config.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config.norm_groups, act_fn="silu", scaling_factor=config.scale_factor,
    )


def pair(config: VAEConfig = TINY, seed: int = 0) -> tuple[VAE, nn.Module]:
    theirs = randomise(reference(config), seed)
    ours = VAE(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours, theirs


def images(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, height, width, dtype=torch.float64, generator=generator) * 2 - 1


def latents(height: int, width: int) -> Tensor:
    return torch.randn(2, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (24, 8)])
@pytest.mark.parametrize("config", [TINY, replace(TINY, ch_mult=(1, 2, 2, 4), num_res_blocks=1)])
def test_moments_and_pictures_and_their_gradients(config: VAEConfig, size: tuple[int, int]) -> None:
    ours, theirs = pair(config)
    x, z = images(*size), latents(size[0] // 8, size[1] // 8)

    def run_theirs() -> tuple[Tensor, ...]:
        posterior = theirs.encode(x).latent_dist
        return posterior.mean, posterior.logvar, theirs.decode(z).sample

    assert_parity(ours, theirs, home, lambda: (*ours.moments(x), ours.decode(z)), run_theirs)


def test_encode_is_the_mean_without_the_scale_factor() -> None:
    ours, theirs = pair()
    x = images(16, 24)
    mean = ours.encode(x)
    assert mean.shape == (2, 4, 2, 3)
    assert torch.equal(mean, ours.moments(x)[0])
    assert torch.allclose(mean, theirs.encode(x).latent_dist.mode(), rtol=0, atol=1e-10)


def test_log_variance_is_cut_on_both_sides() -> None:
    ours, theirs = pair()
    bias = torch.tensor([0, 0, 0, 0, -90, 90, 0, 0], dtype=torch.float64)
    with torch.no_grad():
        ours.quant_conv.bias.copy_(bias)
        theirs.quant_conv.bias.copy_(bias)
        found, expected = ours.moments(images(16, 16))[1], theirs.encode(images(16, 16)).latent_dist.logvar
    assert found.amin() == -30 and found.amax() == 20
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sd-1", "sd-2", "sd-mini"])
def test_full_size_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = VAE(CONFIGS[name]), reference(CONFIGS[name])
    assert_same_shapes(ours, home(parameters(theirs)))
    if name != "sd-mini":
        assert sum(p.numel() for p in ours.parameters()) == 83_653_863


@pytest.mark.parametrize(
    "layer", ["encoder.down.1.block.0.conv1", "encoder.mid.attn_1.q", "decoder.up.2.upsample.conv"]
)
def test_a_wrong_weight_is_found_where_it_is(layer: str) -> None:
    ours, theirs = pair()
    x, z = images(16, 16), latents(2, 2)
    names = home_names(theirs, home)
    runs = [
        lambda: (ours.encode(x), ours.decode(z)),
        lambda: (theirs.encode(x).latent_dist.mean, theirs.decode(z).sample),
    ]
    assert first_difference(ours, theirs, names, *runs) == ""
    with torch.no_grad():
        ours.get_submodule(layer).weight.add_(1e-6)
    assert first_difference(ours, theirs, names, *runs).startswith(f"{layer} is the first layer that gives")


def test_every_broken_layer_is_named() -> None:
    ours, theirs = pair()
    x, z = images(16, 16), latents(2, 2)
    runs = [
        lambda: (ours.encode(x), ours.decode(z)),
        lambda: (theirs.encode(x).latent_dist.mean, theirs.decode(z).sample),
    ]
    assert misnamed(ours, theirs, home, *runs, every=7) == {}


def test_a_wrong_eps_is_found_where_it_is() -> None:
    ours, theirs = pair()
    ours.decoder.mid.attn_1.norm.eps = 1e-5
    z = latents(2, 2)
    with pytest.raises(AssertionError, match="^decoder.mid.attn_1.norm is the first layer that gives"):
        assert_parity(ours, theirs, home, lambda: ours.decode(z), lambda: theirs.decode(z).sample)
