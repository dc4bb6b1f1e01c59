"""The miniature CLIP: a joint space for pictures and prompts, `python -m mini.pretrain clip`.

Its text tower becomes that of the miniature Stable Diffusion, frozen from then on, as OpenAI's in Stable
Diffusion 1; its visual tower is the backbone clip-mini.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from files import write_json
from mini.loop import HELD_OUT, MiniTrainer, Recipe, World, batch_of
from mini.write import write_part, write_tensors
from models import clip

RECIPE = Recipe(steps=2000, batch_size=192, lr=1e-3, warmup=200, weight_decay=0.1, betas=(0.9, 0.98))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """Both towers, the text's projection and the temperature: Hugging Face's CLIPModel, names included."""

    def __init__(self, text: clip.CLIPTextConfig, vision: clip.CLIPVisionConfig):
        super().__init__()
        tower, pictures = clip.CLIPText(text), clip.CLIPVision(vision)
        self.text_model, self.vision_model = tower.text_model, pictures.vision_model
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)
        self.visual_projection = pictures.visual_projection
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.towers = {"text": tower, "vision": pictures}  # a dict, which registers no parameters

    def embed_texts(self, ids: Tensor, last: Tensor) -> Tensor:
        """Ids (B, N) and the position of each end mark (B,) -> unit embeddings (B, P)."""
        states = self.towers["text"](ids)
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), last]), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit embeddings (B, P)."""
        return F.normalize(self.towers["vision"](images), dim=-1)


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric contrastive loss of unit rows (B, P).

    Source: Radford et al. 2021, figure 3. The temperature is at least 1 / 100, as in their code.
    """
    logits = logit_scale.exp().clamp(max=100.0) * images @ texts.T
    own = torch.arange(len(images))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(folder: Path, world: World, recipe: Recipe, seed: int) -> dict:
    """The card's fields; writes folder/clip-mini, and the text tower to folder/sd-mini/text_encoder."""
    torch.manual_seed(seed)
    model = CLIP(clip.CONFIGS["sd-mini"], clip.VISION_CONFIGS["clip-mini"])
    init_embeddings(model)
    tokenizer = weights.load_tokenizer("sd-mini")
    ids = tokenizer(world.prompts)
    last = (ids != tokenizer.end).cumprod(dim=1).sum(dim=1)  # the first end mark; padding looks the same
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    def embeddings(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = ((batch_of(world.images, rows) + 1) / 2 - mean) / std
        n = int(last[rows].max()) + 1  # the mask is causal, so tokens after the end mark have no effect
        return model.embed_images(x), model.embed_texts(ids[rows, :n], last[rows])

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        images, texts = embeddings(rows)
        with torch.no_grad():
            right = (images @ texts.T).argmax(dim=1) == torch.arange(len(rows))
        return {"loss": contrastive_loss(images, texts, model.logit_scale), "right": right.float().mean()}

    minutes = MiniTrainer("clip", model, loss, len(world) - HELD_OUT, recipe, seed).fit()
    with torch.no_grad():
        images, texts = embeddings(torch.arange(len(world) - HELD_OUT, len(world)))
        right = (images @ texts.T).argmax(dim=1) == torch.arange(HELD_OUT)
    write_clip(model, folder)
    return {
        "minutes": round(minutes, 1),
        f"retrieval_top_1_of_{HELD_OUT}": round(right.float().mean().item(), 4),
    }


def init_embeddings(model: CLIP) -> None:
    """Initialise the embeddings as OpenAI does: torch's standard deviation of 1 is fifty times too large."""
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.01)


def write_clip(model: CLIP, folder: Path) -> None:
    text, vision = (model.towers[name].config for name in ("text", "vision"))
    text_sizes = {name: size for name, size in asdict(text).items() if size not in (None, -1)}
    both = {"text_config": text_sizes, "vision_config": asdict(vision)}
    config = {"model_type": "clip", "projection_dim": vision.projection_dim, **both}
    write_json(folder / "clip-mini" / "config.json", config)
    preprocessing = {
        "crop_size": 64,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "size": 64,
    }
    write_json(folder / "clip-mini" / "preprocessor_config.json", preprocessing)
    write_tensors(model.state_dict(), folder / "clip-mini" / "model.safetensors")
    config = {"model_type": "clip_text_model", **text_sizes}
    write_part("clip-text", model.towers["text"], folder / "sd-mini" / "text_encoder", config)
