"""Networks that name what is in a scene: the miniature ViT and Swin, and the probe that judges pictures.

    python -m mini.pretrain vit|swin|probe

A label is one thing that a picture can show, as ("place", "snow"); a picture has several. ViT and Swin learn
them as their namesakes learnt ImageNet's, and are shipped without the classifier. The probe, a smaller Swin,
keeps it, and is trained on drawings and on what the autoencoder makes of them alike: it must read generated
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import weights
from mini import scenes
from mini.loop import HELD_OUT, Recipe, World, batch_of, train
from mini.subjects import SHAPES
from mini.write import write_json, write_tensors
from models import swin, vit

FOLDER = Path(__file__).parent
RECIPE = Recipe(steps=4000, batch_size=64, lr=1e-3, warmup=300, weight_decay=0.05, betas=(0.9, 0.99))
TABLES = {
    "subject": scenes.SUBJECTS, "colour": scenes.COLOURS, "material": scenes.MATERIALS,
    "count": scenes.COUNTS, "relation": scenes.RELATIONS, "position": scenes.POSITIONS,
    "place": scenes.PLACES, "light": scenes.LIGHTS, "style": scenes.STYLES,
}  # fmt: skip
LABELS = [(slot, key) for slot, table in TABLES.items() for key in table]
POSITION = {label: i for i, label in enumerate(LABELS)}
SLOTS = {slot: [i for i, label in enumerate(LABELS) if label[0] == slot] for slot in TABLES}
HALF = 0.5  # mean and deviation of the pixels that these networks read
PROBE = replace(swin.CONFIGS["swin-mini"], embed_dim=32)
REBUILT = 16_000  # of the pictures, for the probe


def said(view: scenes.View) -> list[tuple[str, str]]:
    """The labels of a view that its prompt names, one for each of `scenes.Scene.words` and in their order."""
    found = [("count", view.count)] * (view.count > 1)
    for thing in view.things:
        found += [("colour", thing.colour), ("material", thing.material), ("subject", thing.subject)]
    found += [(slot, getattr(view, slot)) for slot in ("relation", "position", "place", "light", "style")]
    return [label for label in found if label[1] is not None]


def shown(view: scenes.View) -> list[tuple[str, str]]:
    """The labels of a view that is drawn: a thing whose colour goes unsaid shows its own."""
    own = [("colour", SHAPES[thing.subject].colour) for thing in view.things if thing.colour is None]
    return said(view) + own


def targets(views: Sequence[scenes.View], labels: Callable[[scenes.View], list] = shown) -> Tensor:
    """(n, labels) uint8, 1 where the view shows it, or where its prompt says it with `labels` = `said`."""
    t = torch.zeros(len(views), len(LABELS), dtype=torch.uint8)
    for row, view in zip(t, views, strict=True):
        row[[POSITION[label] for label in labels(view)]] = 1
    return t


class Namer(nn.Module):
    """A backbone and one fully connected layer: pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, labels)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, len(LABELS))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def naming_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the labels of a picture."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(dim=1).mean()


def train_namer(name: str, folder: Path, world: World, recipe: Recipe, seed: int) -> dict:
    """Train "vit", "swin" or "probe", write folder/<name>-mini, and return what the card says."""
    torch.manual_seed(seed)
    if name == "vit":
        backbone = vit.ViT(vit.CONFIGS["vit-mini"])
    else:
        backbone = swin.Swin(PROBE if name == "probe" else swin.CONFIGS["swin-mini"])
    model, truth, n = Namer(backbone), targets(world.views), len(world) - HELD_OUT
    model = model.to(memory_format=torch.channels_last)
    rebuilt = reconstructed(world.images[: min(n, REBUILT)]) if name == "probe" else None

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch_of(world.images, rows)
        if rebuilt is not None:  # one half of the batch
            half = len(rows) // 2
            rows = torch.cat([rows[:half] % len(rebuilt), rows[half:]])
            x = torch.cat([batch_of(rebuilt, rows[:half]), x[half:]])
        return {"loss": naming_loss(model(x), truth[rows].float())}

    minutes = train(name, model, loss, n, recipe, seed)
    held_out, views = world.images[-HELD_OUT:], world.views[-HELD_OUT:]
    quality = {"drawn": accuracy(model, held_out, views)}
    if name == "probe":
        quality["reconstructed"] = accuracy(model, reconstructed(held_out), views)
    if name == "probe":
        write_tensors(model.state_dict(), folder / "probe" / "model.safetensors")
    else:
        write_backbone(model, name, folder / f"{name}-mini")
    return {"minutes": round(minutes, 1), "labels": len(LABELS), "found": quality}


@torch.no_grad()
def reconstructed(images: np.ndarray) -> np.ndarray:
    """Pictures through the autoencoder and back, uint8."""
    vae, rebuilt = weights.load("vae", "sd-mini").to(memory_format=torch.channels_last), np.empty_like(images)
    for rows in tqdm(torch.arange(len(images)).split(32), "reconstructing", mininterval=5):
        x = batch_of(images, rows).contiguous(memory_format=torch.channels_last)
        x = vae.decode(vae.encode(x)).clamp(-1, 1)
        rebuilt[rows.numpy()] = ((x + 1) * 127.5).round().to(torch.uint8).numpy()
    return rebuilt


@torch.no_grad()
def name_pictures(model: Namer, images: np.ndarray) -> Tensor:
    """Probabilities (n, labels) of uint8 pictures (n, 3, 64, 64)."""
    rows = torch.arange(len(images))
    return torch.cat([model(batch_of(images, part)).sigmoid() for part in rows.split(256)])


def realised(probabilities: Tensor, view: scenes.View) -> dict[tuple[str, str], bool]:
    """Which of the labels that the prompt names a picture shows, by its probabilities (labels,).

    A subject, colour or place is shown if it is among the likeliest of its kind, as many as there are things
    (or one place); what a picture may also go without, if its probability is above one half.
    """
    found = {}
    for slot, key in said(view):
        among, p = SLOTS[slot], probabilities[POSITION[slot, key]]
        n = len({label for label in shown(view) if label[0] == slot})
        if slot in ("subject", "colour", "place"):
            found[slot, key] = bool((probabilities[among] > p).sum() < n)
        else:
            found[slot, key] = bool(p > 0.5)
    return found


def tally(model: Namer, images: np.ndarray, views: Sequence[scenes.View]) -> dict[str, list[bool]]:
    """For each kind of label that is said: whether `realised` finds it, label by label."""
    found: dict[str, list[bool]] = {slot: [] for slot in TABLES}
    for row, view in zip(name_pictures(model, images), views, strict=True):
        for (slot, _), shows in realised(row, view).items():
            found[slot].append(shows)
    return {slot: shows for slot, shows in found.items() if shows}


def accuracy(model: Namer, images: np.ndarray, views: Sequence[scenes.View]) -> dict[str, float]:
    """For each kind of label the share of those said that is found, where all are shown."""
    return {slot: round(float(np.mean(shows)), 4) for slot, shows in tally(model, images, views).items()}


def write_backbone(model: Namer, name: str, folder: Path) -> None:
    """As timm writes one: its names, its config.json, without the classifier."""
    config = asdict(model.backbone.config)
    if name == "vit":
        architecture, read = "vit_base_patch16_224", ("depth",)
    else:
        architecture, read = "swin_tiny_patch4_window7_224", ("depths", "window_size")
    read = ("img_size", "patch_size", "embed_dim", "num_heads", *read)
    write_json(
        {
            "architecture": architecture,
            "num_classes": 0,
            "model_args": {field: config[field] for field in read},
            "pretrained_cfg": {
                "input_size": [3, 64, 64], "crop_pct": 1.0, "interpolation": "bicubic",
                "mean": [HALF] * 3, "std": [HALF] * 3, "num_classes": 0,
            },
        },
        folder / "config.json",
    )  # fmt: skip
    write_tensors(model.backbone.state_dict(), folder / "model.safetensors")


def load_probe(folder: Path) -> Namer:
    """The probe as `train_namer` wrote it."""
    with torch.device("meta"):
        model = Namer(swin.Swin(PROBE))
    weights.load_strict(model, weights.read_tensors(folder / "probe" / "model.safetensors"))
    return model.eval()
