"""Checkpoints: the registry, fetching, second dialects, strict loading.

    strict.py     every tensor accounted for, or an error
    files.py      safetensors, JSON and tokenizer files
    dialects.py   other files' names to ours and back, by tables
    options.py    a kind as data: its sizes from shapes and config.json, by tables
    kinds/        these tables, a file for each architecture
    registry.py   checkpoints known by name, with hashes and licences
    fetch.py      bringing them into the cache
    sources.py    finding, parsing, reading and hashing a source; `load`
    preprocessing.py  how a checkpoint's pictures are prepared
    golden.py     activations to test a port against; compare.py compares them
    whole.py      golden files of the regressor and the sampler
    tokenizer.py  CLIP's tokenizer
"""

from weights.fetch import cache_dir
from weights.files import read_json, read_tensors
from weights.preprocessing import preprocessing
from weights.sources import (
    build,
    config,
    fingerprint,
    from_home,
    load,
    load_tokenizer,
    resolve,
    resolve_device,
    to_home,
)
from weights.strict import WeightsError, load_strict
from weights.tokenizer import ClipTokenizer

__all__ = [
    "ClipTokenizer", "WeightsError", "build", "cache_dir", "config", "fingerprint", "from_home", "load",
    "load_strict", "load_tokenizer", "preprocessing", "read_json", "read_tensors", "resolve",
    "resolve_device", "to_home",
]
