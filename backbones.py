"""The image encoders (section 3): one record each, the white box, and the networks that compute its inputs;
and the captioners (section 4.4), which train.py trains too.

Letters in shape comments as in reverse_sd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Backbone:
    """A backbone: `kind` of weights; `title` in tables; `blocks`, regex of each block's parameter prefix, in
    order from input to output; `mini` and `paper`, the weights of the miniature and of the paper;
    `white_box`, whether its inputs are latents and captions instead of images."""

    kind: str
    title: str
    blocks: str
    mini: str
    paper: str
    white_box: bool = False


BACKBONES = {  # in the paper's order
    "clip": Backbone(
        "clip-vision", "CLIP", r"vision_model\.encoder\.layers\.\d+\.", "clip-mini", "clip-h-14"
    ),
    "unet": Backbone(
        "unet-encoder", "U-Net", r"unet\.(input_blocks\.\d+|middle_block)\.", "sd-mini", "sd-1", True
    ),
    "swin": Backbone("swin", "Swin", r"layers\.\d+\.blocks\.\d+\.", "swin-mini", "swin-l"),
    "vit": Backbone("vit", "ViT", r"blocks\.\d+\.", "vit-mini", "vit-b-16"),
}


CAPTIONERS = {  # trained as a whole, so without a list of blocks
    "blip": Backbone("blip", "BLIP", "", "blip-mini", "blip-base"),
    "blip2": Backbone("blip2", "BLIP-2", "", "blip2-mini", "blip2-opt-2.7b"),
}
READERS = BACKBONES | CAPTIONERS  # of train.py --backbone


class UNetFeatures(nn.Module):
    """The white-box backbone: the encoder half of Stable Diffusion's U-Net and a global pooling.

    Inputs: VAE latents, scaled as in diffusion training, and the text states of a caption of the image, for
    cross-attention. Paper: timestep and pooling are not stated; timestep 0 (no noise) and the maximum follow
    the authors' code. `features` "middle" is the paper's: the maximum of the middle block. "levels" is the
    mean and the maximum of the outputs of all blocks.
    """

    def __init__(self, unet: nn.Module, features: str = "middle", timestep: int = 0):
        super().__init__()
        self.unet, self.features, self.timestep = unet, features, timestep
        self.width = unet.width if features == "middle" else 2 * (sum(unet.skip_widths) + unet.width)

    def forward(self, latents: Tensor, context: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Features (B, width); `timesteps` (B,) replace the one of all samples."""
        if timesteps is None:
            timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        if self.features == "middle":
            middle = self.unet.encode(latents, timesteps, context)  # (B, D, h/8, w/8)
            return middle.amax(dim=(2, 3))  # (B, D)
        levels = self.unet.levels(latents, timesteps, context)
        pooled = [pool(level, dim=(2, 3)) for level in levels for pool in (torch.mean, torch.amax)]
        return torch.cat(pooled, dim=1)


class Standardise(nn.Module):
    """Features (B, width) less their mean, divided by their deviation; unchanged before `set`."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the mean (width,) and deviation (width,) of the training features."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


def as_backbone(name: str, model: nn.Module, unet_features: str | None = None) -> nn.Module:
    """A model of kind BACKBONES[name].kind as a module from inputs to features (B, width)."""
    return UNetFeatures(model, unet_features or "middle") if BACKBONES[name].white_box else model


def captioner_of(captions: str) -> str | None:
    """The BLIP source in the option `captions`; None for "empty", "prompt" and a caption file."""
    no_model = captions in ("empty", "prompt") or Path(captions).suffix in (".txt", ".json", ".jsonl", ".csv")
    return None if no_model else captions


class SDReader:
    """The U-Net's inputs from images: latents, captions, caption states.

    Used by training and by `image_predictor`. `source`: weights of autoencoder and text tower; `captioner`:
    weights of a BLIP, or None. Each network is loaded at its first use. Raises weights.WeightsError as
    weights.load.
    """

    def __init__(self, source: str, captioner: str | None, device: str = "cpu"):
        self.source, self.captioner, self.device = source, captioner, device
        self.networks: dict[str, Any] = {}

    def network(self, kind: str) -> Any:
        """The network of a kind of weights, in eval mode, or the "tokenizer" of the text tower."""
        import weights

        if kind not in self.networks:
            source = self.captioner if kind == "blip" else self.source
            self.networks[kind] = (
                weights.load_tokenizer(source)
                if kind == "tokenizer"
                else weights.load(kind, source, device=self.device)
            )
        return self.networks[kind]

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), scaled as in diffusion training."""
        vae = self.network("vae")
        return vae.encode(images.to(self.device)) * vae.config.scale_factor

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """Captions of images (B, 3, H, W) with the captioner's preprocessing."""
        return self.network("blip").generate(images.to(self.device))

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> Tensor:
        """The text tower's states of captions, (B, 77, D); longer texts are cut to 75 tokens."""
        ids = self.network("tokenizer")(list(captions))
        return self.network("clip-text")(ids.to(self.device))
