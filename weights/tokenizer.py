"""CLIP's tokenizer: text to the 77 token ids that the text tower reads; the files of any byte-level BPE."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from models.bert import MAX_TEXT
from schema import NULL, TEXT, check, number, read_json, record
from weights.files import read_tokenizer
from weights.strict import WeightsError, listed

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
            raise WeightsError(f"{source}: the vocabulary lacks {START}, {END} or {pad}: it is no CLIP "
                               f"tokenizer's")

    def __call__(self, texts: list[str]) -> Tensor:
        ids = torch.full((len(texts), LENGTH), self.pad, dtype=torch.int64)
        # Without lone surrogates; the rest of a longer text would take minutes, and is cut anyway
        texts = [text[:MAX_TEXT].encode("utf-8", "replace").decode() for text in texts]
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(ids, encodings, strict=True):
            self.truncated += len(encoding.ids) > LENGTH - 2
            tokens = [self.start, *encoding.ids[: LENGTH - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def read_folder(root: Path, pad: str = "") -> ClipTokenizer:
    """The tokenizer in root/tokenizer, root or beside it. `pad` is the padding; "" = as the folder states it.

    Raises WeightsError if none is found or it is damaged.
    """
    for folder in (root / "tokenizer", root, root.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = byte_pairs(folder / "vocab.json", folder / "merges.txt")
            add_tokens(tokenizer, folder)
        else:
            continue
        return ClipTokenizer(tokenizer, pad or _pad(folder), str(folder))
    raise WeightsError(f"{root}: no tokenizer (vocab.json and merges.txt, or tokenizer.json), here or in "
                       f"tokenizer/")


def _pad(folder: Path) -> str:
    rule = (TEXT | NULL | record({"content": TEXT})).or_else(None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        token = read_json(path, {"pad_token": rule})["pad_token"] if path.is_file() else None
        if token:
            return token if isinstance(token, str) else token["content"]
    return END


def byte_pairs(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's byte-level BPE from its two published files."""
    model = read_byte_pairs(
        vocabulary, merges, (START, END), "CLIP",
        lambda word: word.endswith("</w>") and len(word) > len("x</w>"),
        end_of_word_suffix="</w>", unk_token=END,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase(),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return tokenizer


def add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens in the folder's added_tokens.json, if there is one, to a tokenizer of its other files.

    Raises WeightsError unless their ids are those that follow the vocabulary's, or the vocabulary's own.
    """
    path = folder / "added_tokens.json"
    added = read_json(path) if path.is_file() else {}
    check(added, dict.fromkeys(added, number(int, 0, 2**20)), path)
    in_order = sorted(added, key=added.__getitem__)
    tokenizer.add_tokens([token for token in in_order if tokenizer.token_to_id(token) is None])
    if unequal := [token for token in in_order if tokenizer.token_to_id(token) != added[token]]:
        raise WeightsError(f"{path}: the ids of {listed(unequal)} do not follow those of the vocabulary; "
                           f"fetch both again")


def read_byte_pairs(
    vocabulary: Path, merges: Path, needed: Sequence[str], owner: str, made: Callable[[str], bool],
    **options: str,
) -> BPE:
    """A byte-pair model from vocab.json and merges.txt.

    `needed` are tokens of the tokenizer of `owner`; `made` is true of words that only a merge can make.
    Raises WeightsError for damaged files, and for two that do not belong together.
    """
    words = read_json(vocabulary)
    if missing := [token for token in needed if token not in words]:
        raise WeightsError(f"{vocabulary} lacks {' or '.join(missing)}: it is no {owner} tokenizer's")
    check(words, dict.fromkeys(words, number(int, 0, 2**20)), vocabulary)
    if len(set(words.values())) < len(words):
        raise WeightsError(f"{vocabulary}: two tokens have one id; fetch it again")
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if unmade := {word for word in words if made(word)} - {"".join(pair) for pair in pairs}:
            raise ValueError(f"no line makes {listed(sorted(unmade)[:3])}")
        return BPE(words, pairs, **options)
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(f"{merges}: does not fit {vocabulary.name} ({error}); fetch both again") from error
