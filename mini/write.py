"""Files of trained miniatures: float16 safetensors and config.json under the published names."""

from __future__ import annotations

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


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    atomic_write(path, save(halves, metadata={"format": "pt"}))


def write_card(folder: Path, command: str, **content: Any) -> None:
    """Write card.json: the command that made the folder, `content`, and the date."""
    write_json(folder / "card.json", {"command": command} | content | {"date": str(date.today())})
