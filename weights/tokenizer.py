"""CLIP's tokenizer: text to the 77 token ids that the text tower reads."""

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from weights.fetch import ensure
from weights.files import read_json, read_tokenizer, stored_tensors
from weights.kinds import KINDS
from weights.registry import ENTRIES, FOLDERS
from weights.sources import resolve
from weights.strict import WeightsError

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
# Contractions, runs of letters, single digits, runs of anything else that is not a space.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts -> ids (B, 77) int64: start, tokens, end, padding. Lower-cased, white space collapsed.

    A text of more than 75 tokens is cut, keeping the end token; `truncated` counts the texts that were, ever
    since the tokenizer was made.
    """

    def __init__(self, tokenizer: Tokenizer, pad: str = END, source: str = "tokenizer"):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.start, self.end, self.pad = (tokenizer.token_to_id(token) for token in (START, END, pad))
        self.truncated = 0
        if None in (self.start, self.end, self.pad):
            raise WeightsError(
                f"{source}: the vocabulary lacks {START}, {END} or {pad}: it is no CLIP tokenizer's"
            )

    def __call__(self, texts: list[str]) -> Tensor:
        ids = torch.full((len(texts), LENGTH), self.pad, dtype=torch.int64)
        for row, encoding in zip(
            ids, self.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            self.truncated += len(encoding.ids) > LENGTH - 2
            tokens = [self.start, *encoding.ids[: LENGTH - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def load_tokenizer(source: str | os.PathLike | None = None) -> ClipTokenizer:
    """The tokenizer that belongs to a source of a text tower, as for `weights.load`; None = "sd-1".

    Padding is the end token for Stable Diffusion 1 and "!" (id 0) for 2, as the folder's
    tokenizer_config.json or special_tokens_map.json states. A single file holds no vocabulary: CLIP's own is
    fetched once. Raises WeightsError if none is found or it is damaged.
    """
    path = resolve("sd-1" if source is None else source, "tokenizer")
    if path.is_dir():
        return _from_folder(path)
    names = stored_tensors(path)
    second = any(name.startswith(KINDS["clip-text"].single_file[1]) for name in names)
    return _from_folder(ensure(ENTRIES["clip-tokenizer"]), pad="!" if second else END)


def _from_folder(root: Path, pad: str | None = None) -> ClipTokenizer:
    files = _tokenizer_files(root)
    if not files:
        raise WeightsError(
            f"{root}: no tokenizer (vocab.json and merges.txt, or tokenizer.json), here or in tokenizer/"
        )
    first, second = files[0], files[1:2]
    tokenizer = read_tokenizer(first) if first.name == "tokenizer.json" else byte_pairs(first, *second)
    return ClipTokenizer(tokenizer, pad or _pad(first.parent) or END, str(first.parent))


def _tokenizer_files(root: Path) -> list[Path]:
    """The tokenizer in root/tokenizer, root or beside it: vocabulary first, then settings; [] if there is
    none."""
    settings = ["tokenizer_config.json", "special_tokens_map.json"]
    for folder in (root / FOLDERS["tokenizer"], root, root.parent / FOLDERS["tokenizer"]):
        for vocabulary in (["vocab.json", "merges.txt"], ["tokenizer.json"]):
            if all((folder / name).is_file() for name in vocabulary):
                return [folder / name for name in vocabulary + settings if (folder / name).is_file()]
    return []


def _pad(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token: Any = read_json(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return token
    return None


def byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's byte-level BPE from its two published files."""
    words = read_json(vocabulary)
    if START not in words or END not in words:
        raise WeightsError(f"{vocabulary} lacks {START} or {END}: it is no CLIP tokenizer's")
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        model = BPE(words, pairs, end_of_word_suffix="</w>", unk_token=END)
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{merges}: does not fit {vocabulary.name} ({error}); fetch both again") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return tokenizer
