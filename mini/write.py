"""Files of trained miniatures: float16 safetensors and config.json under the published names."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

import weights
from files import atomic_write


def write_part(kind: str, model: nn.Module, folder: Path, config: dict) -> None:
    """Write a part of a diffusers folder: config.json and half-precision safetensors in its dialect."""
    name = "model" if kind == "clip-text" else "diffusion_pytorch_model"
    write_tensors(weights.from_home(kind, model.state_dict()), folder / f"{name}.safetensors")
    write_json(config, folder / "config.json")


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.half().contiguous() for name, value in tensors.items()}
    atomic_write(path, save(halves, metadata={"format": "pt"}))


def write_json(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1) + "\n")
