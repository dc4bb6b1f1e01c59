"""Which checkpoint is what: the registry, fetching, second dialects, strict loading.

    registry.py   checkpoints known by name, with hashes and licences
    dialects.py   the names that other files use, as tables
    sizes.py      config.json and shapes -> our configurations
    strict.py     every tensor accounted for, or an error
    sources.py    files: found, fetched, checked, read; `load`
    identity.py   what a source is, without loading it
    tokenizer.py  CLIP's tokenizer
"""

from weights.dialects import from_home, to_home
from weights.identity import config, fingerprint
from weights.sizes import build
from weights.sources import cache_dir, load, read_tensors, resolve
from weights.strict import WeightsError, load_strict
from weights.tokenizer import ClipTokenizer, load_tokenizer

__all__ = [
    "ClipTokenizer", "WeightsError", "build", "cache_dir", "config", "fingerprint", "from_home", "load",
    "load_strict", "load_tokenizer", "read_tensors", "resolve", "to_home",
]
