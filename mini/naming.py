"""Multi-label classifiers of scenes: miniature ViT and Swin, and the probe that judges pictures.

    python -m mini.pretrain vit|swin|probe|probe-vit

A label is one thing that a picture can show, as ("place", "snow"); a picture has several. ViT and Swin are
pretrained on these labels and stored without the classifier. The probe, a smaller Swin, keeps its classifier
and is trained on drawings and on their reconstructions by the autoencoder, because it reads generated
pictures. The second probe, a ViT, is trained on the same pictures and labels; it measures how far verdicts
depend on the probe.
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
from files import write_json
from mini import scenes
from mini.loop import HELD_OUT, MiniTrainer, Recipe, World, batch_of
from mini.subjects import SHAPES
from mini.write import write_tensors
from models import swin, vit

FOLDER = Path(__file__).parent
SECOND = Path("second")  # of the second probe, which is not shipped
RECIPE = Recipe(steps=4000, batch_size=64, lr=1e-3, warmup=300, weight_decay=0.05, betas=(0.9, 0.99))
TABLES = {
    "subject": scenes.SUBJECTS, "colour": scenes.COLOURS, "material": scenes.MATERIALS,
    "count": scenes.COUNTS, "relation": scenes.RELATIONS, "position": scenes.POSITIONS,
    "place": scenes.PLACES, "light": scenes.LIGHTS, "style": scenes.STYLES,
}  # fmt: skip
LABELS = [(slot, key) for slot, table in TABLES.items() for key in table]
POSITION = {label: i for i, label in enumerate(LABELS)}
SLOTS = {slot: [i for i, label in enumerate(LABELS) if label[0] == slot] for slot in TABLES}
HALF = 0.5  # mean and deviation of these networks' input pixels
PROBE = replace(swin.CONFIGS["swin-mini"], embed_dim=32)
BACKBONES = {
    "vit": lambda: vit.ViT(vit.CONFIGS["vit-mini"]),
    "swin": lambda: swin.Swin(swin.CONFIGS["swin-mini"]),
    "probe": lambda: swin.Swin(PROBE),
    "probe-vit": lambda: vit.ViT(vit.CONFIGS["vit-mini"]),
}
PROBES = ("probe", "probe-vit")
REBUILT = 16_000  # of the pictures, for the probes


def named_labels(view: scenes.View) -> list[tuple[str, str]]:
    """The labels that a view's prompt names, one per word of `scenes.Scene.words`, in that order."""
    labels = [("count", view.count)] * (view.count > 1)
    for thing in view.things:
        labels += [("colour", thing.colour), ("material", thing.material), ("subject", thing.subject)]
    labels += [(slot, getattr(view, slot)) for slot in ("relation", "position", "place", "light", "style")]
    return [label for label in labels if label[1] is not None]


def drawn_labels(view: scenes.View) -> list[tuple[str, str]]:
    """The labels of a drawn view: things without a named colour show their default colour."""
    own = [("colour", SHAPES[thing.subject].colour) for thing in view.things if thing.colour is None]
    return named_labels(view) + own


def targets(views: Sequence[scenes.View], labels: Callable[[scenes.View], list] = drawn_labels) -> Tensor:
    """(n, labels) uint8: 1 for each label in `labels(view)`."""
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


def train_namer(
    name: str, folder: Path, world: World, recipe: Recipe, seed: int, device: str = "cpu"
) -> dict:
    """The card's fields; trains one of BACKBONES and writes it to folder/<name> (probes) or <name>-mini."""
    torch.manual_seed(seed)
    model, truth, n = Namer(BACKBONES[name]()), targets(world.views).to(device), len(world) - HELD_OUT
    model = model.to(device, memory_format=torch.channels_last)
    rebuilt = reconstructed(world.images[: min(n, REBUILT)], device) if name in PROBES else None

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch_of(world.images, rows)
        if rebuilt is not None:  # one half of the batch
            half = len(rows) // 2
            rows = torch.cat([rows[:half] % len(rebuilt), rows[half:]])
            x = torch.cat([batch_of(rebuilt, rows[:half]), x[half:]])
        return {"loss": naming_loss(model(x), truth[rows].float())}

    minutes = MiniTrainer(name, model, loss, n, recipe, seed).fit()
    held_out, views = world.images[-HELD_OUT:], world.views[-HELD_OUT:]
    quality = {"drawn": accuracy(model, held_out, views)}
    if name in PROBES:
        quality["reconstructed"] = accuracy(model, reconstructed(held_out, device), views)
        write_tensors(model.state_dict(), folder / name / "model.safetensors")
    else:
        write_backbone(model, name, folder / f"{name}-mini")
    return {"minutes": round(minutes, 1), "labels": len(LABELS), "found": quality}


@torch.no_grad()
def reconstructed(images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Pictures through the autoencoder and back, uint8."""
    vae, rebuilt = weights.load("vae", "sd-mini", device=device), np.empty_like(images)
    vae = vae.to(memory_format=torch.channels_last)
    batches = torch.arange(len(images), device=device).split(32)
    for rows in tqdm(batches, "reconstructing", mininterval=5):
        x = batch_of(images, rows).contiguous(memory_format=torch.channels_last)
        x = vae.decode(vae.encode(x)).clamp(-1, 1)
        rebuilt[rows.cpu().numpy()] = ((x + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return rebuilt


@torch.no_grad()
def name_pictures(model: Namer, images: np.ndarray) -> Tensor:
    """Probabilities (n, labels), on the CPU, of uint8 pictures (n, 3, 64, 64)."""
    rows = torch.arange(len(images), device=model.head.weight.device)
    return torch.cat([model(batch_of(images, part)).sigmoid() for part in rows.split(256)]).cpu()


def shown_labels(probabilities: Tensor, view: scenes.View) -> dict[tuple[str, str], bool]:
    """Whether a picture shows each label that the prompt names, by its probabilities (labels,).

    A subject, colour or place is shown if it is among the n most probable of its kind, n being the number of
    things (or one place); an optional label, if its probability is above 1/2.
    """
    is_shown = {}
    for slot, key in named_labels(view):
        among, p = SLOTS[slot], probabilities[POSITION[slot, key]]
        n = len({label for label in drawn_labels(view) if label[0] == slot})
        if slot in ("subject", "colour", "place"):
            is_shown[slot, key] = bool((probabilities[among] > p).sum() < n)
        else:
            is_shown[slot, key] = bool(p > 0.5)
    return is_shown


def tally(model: Namer, images: np.ndarray, views: Sequence[scenes.View]) -> dict[str, list[bool]]:
    """For each kind of label: whether each named label is shown."""
    by_slot: dict[str, list[bool]] = {slot: [] for slot in TABLES}
    for row, view in zip(name_pictures(model, images), views, strict=True):
        for (slot, _), shows in shown_labels(row, view).items():
            by_slot[slot].append(shows)
    return {slot: shows for slot, shows in by_slot.items() if shows}


def accuracy(model: Namer, images: np.ndarray, views: Sequence[scenes.View]) -> dict[str, float]:
    """For each kind of label the share of the named labels that is shown."""
    return {slot: round(float(np.mean(shows)), 4) for slot, shows in tally(model, images, views).items()}


def write_backbone(model: Namer, name: str, folder: Path) -> None:
    """Write a timm folder: names and config.json, without the classifier."""
    config = asdict(model.backbone.config)
    if name == "vit":
        architecture, read = "vit_base_patch16_224", ("depth",)
    else:
        architecture, read = "swin_tiny_patch4_window7_224", ("depths", "window_size")
    read = ("img_size", "patch_size", "embed_dim", "num_heads", *read)
    content = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {field: config[field] for field in read},
        "pretrained_cfg": {
            "input_size": [3, 64, 64], "crop_pct": 1.0, "interpolation": "bicubic",
            "mean": [HALF] * 3, "std": [HALF] * 3, "num_classes": 0,
        },
    }  # fmt: skip
    write_json(folder / "config.json", content)
    write_tensors(model.backbone.state_dict(), folder / "model.safetensors")


def load_probe(folder: Path, name: str = "probe") -> Namer:
    """The probe, one of PROBES, that `train_namer` wrote."""
    with torch.device("meta"):
        model = Namer(BACKBONES[name]())
    path = folder / name / "model.safetensors"
    weights.load_strict(model, weights.read_tensors(path), source=str(path))
    return model.eval()
