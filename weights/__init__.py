"""Which checkpoint is what: the registry, fetching, second dialects, strict loading.

    registry.py   checkpoints known by name, with hashes and licences
    kinds/        a file for each architecture: the names that other files use, as tables; its sizes
    dialects.py   from such names to ours and back
    sizes.py      a kind and its sizes -> a model; a source -> its sizes
    tensors.py    reading .safetensors
    strict.py     every tensor accounted for, or an error
    sources.py    files: found, fetched, checked, read; `load`
    preprocessing.py  what a checkpoint wants done to a picture
    identity.py   what a source is, without loading it
    golden.py     activations to test a port against
    tokenizer.py  CLIP's tokenizer
"""

from weights.dialects import from_home, to_home
from weights.identity import config, fingerprint
from weights.preprocessing import preprocessing
from weights.sizes import build
from weights.sources import cache_dir, load, read_json, resolve, resolve_device
from weights.strict import WeightsError, load_strict
from weights.tensors import read_tensors
from weights.tokenizer import ClipTokenizer, load_tokenizer

__all__ = [
    "ClipTokenizer", "WeightsError", "build", "cache_dir", "config", "fingerprint", "from_home", "load",
    "load_strict", "load_tokenizer", "preprocessing", "read_json", "read_tensors", "resolve",
    "resolve_device", "to_home",
]
