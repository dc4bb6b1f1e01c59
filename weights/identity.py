"""The identity of a source: a hash that changes with its sizes, its values and its tokenizer."""

import hashlib
import os
from dataclasses import asdict

import torch

from weights.kinds import find_kind
from weights.registry import DEFAULTS
from weights.sources import config, missing_miniature, read
from weights.tokenizer import load_tokenizer


def fingerprint(kind: str, source: str | os.PathLike | None = None) -> str:
    """SHA-256 of the sizes and all tensors of the `kind` in `source`, and of its tokenizer."""
    entry = find_kind(kind)
    source = DEFAULTS[kind] if source is None else source
    digest = hashlib.sha256(f"{kind} {sorted(asdict(config(kind, source)).items())}".encode())
    if entry.clip_tokenizer:
        digest.update(load_tokenizer(source).tokenizer.to_str().encode())
    if missing_miniature(kind, source):
        digest.update(f"seed 0, torch {torch.__version__}".encode())
        return digest.hexdigest()
    found = read(kind, source)
    if entry.tokenizer:
        digest.update(entry.tokenizer(found.folder).to_str().encode())
    each = []
    for name, tensor in found.tensors():
        one = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        one.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        each.append(one.hexdigest())
    digest.update("".join(sorted(each)).encode())
    return digest.hexdigest()
