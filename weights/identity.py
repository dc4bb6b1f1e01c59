"""What a source is, without loading it: its sizes, and a hash that changes with its values."""

import hashlib
import os
from dataclasses import asdict
from typing import Any

import torch

from weights.kinds import KINDS
from weights.registry import DEFAULTS
from weights.sources import read, untrained
from weights.tokenizer import load_tokenizer


def config(kind: str, source: str | os.PathLike | None = None) -> Any:
    """The sizes of the `kind` in `source` (see `load`). Raises WeightsError as `load` does."""
    source = DEFAULTS[kind] if source is None else source
    entry = untrained(kind, source)
    return KINDS[kind].configs[entry.name] if entry else read(kind, source).config


def fingerprint(kind: str, source: str | os.PathLike | None = None) -> str:
    """SHA-256 of the sizes and all tensors of the `kind` in `source`, and of its tokenizer."""
    source = DEFAULTS[kind] if source is None else source
    digest = hashlib.sha256(f"{kind} {sorted(asdict(config(kind, source)).items())}".encode())
    if kind == "clip-text":
        digest.update(load_tokenizer(source).tokenizer.to_str().encode())
    if untrained(kind, source):
        digest.update(f"seed 0, torch {torch.__version__}".encode())
        return digest.hexdigest()
    found = read(kind, source)
    if KINDS[kind].tokenizer:
        digest.update(KINDS[kind].tokenizer(found.folder).to_str().encode())
    each = []
    for name, tensor in found.values(found.tensors):
        one = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        one.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        each.append(one.hexdigest())
    digest.update("".join(sorted(each)).encode())
    return digest.hexdigest()
