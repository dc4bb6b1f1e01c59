"""Files of trained miniatures: float16 safetensors and config.json under the published names."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

import weights
from files import atomic_write, write_json


def write_part(kind: str, model: nn.Module, folder: Path, config: dict) -> None:
    """Write a part of a diffusers folder: config.json and half-precision safetensors in its dialect."""
    name = "model" if kind == "clip-text" else "diffusion_pytorch_model"
    write_tensors(weights.from_home(kind, model.state_dict()), folder / f"{name}.safetensors")
    write_json(folder / "config.json", config)


def write_tensors(tensors: dict[str, Tensor], path: Path, full_precision: str = "") -> None:
    """Write half-precision safetensors; names that match the regex `full_precision` stay in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (value if re.fullmatch(full_precision, name) else value.half()).contiguous()
        for name, value in tensors.items()
    }
    atomic_write(path, save(stored, metadata={"format": "pt"}))


def write_preprocessor(folder: Path, side: int) -> None:
    """Write preprocessor_config.json of a captioner: pictures resized to `side` px, pixels in [-1, 1]."""
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_json(folder / "preprocessor_config.json", settings)


def write_card(folder: Path, command: str, **content: Any) -> None:
    """Write card.json: the command that made the folder, `content`, and the date."""
    write_json(folder / "card.json", {"command": command} | content | {"date": str(date.today())})
