"""Tables that list images with their prompts: which of a folder's tables do, and their pairs."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from columns import PairsBuilder
from embedded import NoPrompt, sidecar_prompt
from files import DataError, json_object, records

MANIFEST_SUFFIXES = (".jsonl", ".csv")
TABLE_SUFFIXES = (".jsonl", ".csv", ".json", ".json1", ".ndjson", ".tsv", ".parquet", ".arrow", ".xlsx")
IMAGE_KEYS = ("file_name", "image", "path", "filename", "name")
TEXT_KEYS = ("text", "prompt", "caption", "p")
COLUMNS = f"the image ({', '.join(IMAGE_KEYS)}) and the prompt ({', '.join(TEXT_KEYS)})"


def manifests_among(
    files: list[Path], root: Path, images: Iterable[Path], builder: PairsBuilder
) -> list[Path]:
    """Hugging Face's metadata files anywhere, or else the one table in the root that is a manifest. Other
    tables are passed over by name where there is none: the user may have meant one of them."""
    tables = [f for f in files if f.suffix.lower() in TABLE_SUFFIXES]
    manifests, wrong = [], {}
    for group in ([f for f in tables if f.stem == "metadata"],
                  [f for f in tables if f.parent == root and f.suffix.lower() in MANIFEST_SUFFIXES]):
        wrong = {f: why for f in group if (why := why_no_manifest(f))}
        if manifests := [f for f in group if f not in wrong]:
            break
    if len(manifests) > 1 and any(f.stem != "metadata" for f in manifests):
        names = ", ".join(f.name for f in manifests)
        raise DataError(f"{root}: several manifests ({names}); give the path of the one to read")
    beside = {image.with_suffix("") for image in images}
    for table in [f for f in wrong if f.stem == "metadata"] if manifests else tables:
        if why := why_no_manifest(table):
            if table.with_suffix("") not in beside:
                builder.skip(table, f"no manifest, which is a .jsonl or .csv with {COLUMNS}", why)
        elif not manifests:
            builder.skip(table, "a manifest, but in a folder below and not named metadata; give its path")
    return manifests


def why_no_manifest(path: Path) -> str:
    """The columns that a table has instead of a manifest's, in its first rows; "" for a manifest."""
    if path.suffix.lower() not in MANIFEST_SUFFIXES:
        return f"it is a {path.suffix}"
    try:
        rows = (row for _, row in records(path) if isinstance(row, dict))
        columns = dict.fromkeys(key for row in islice(rows, 100) for key in row)  # JSON's may lack some
    except DataError as error:
        return str(error)
    if all(any(key in columns for key in keys) for keys in (IMAGE_KEYS, TEXT_KEYS)):
        return ""
    return "it has " + (", ".join(columns)[:100] or "no rows")


def first_value(row: dict, keys: Sequence[str]) -> Any:
    """The first text or list under the keys that is not empty, or else the first value."""
    there = [row[key] for key in keys if row.get(key) is not None]
    texts = (value for value in there if isinstance(value, str | list) and value)
    return next(texts, there[0] if there else None)


def read_manifest(path: Path, builder: PairsBuilder, unlisted: dict[str, Path]) -> None:
    """Adds the pairs to the builder, and takes their images' paths out of `unlisted`."""
    for k, row in records(path):
        name = first_value(row, IMAGE_KEYS) if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            builder.skip(f"{path}, line {k}", row if isinstance(row, str) else "names no image")
            continue
        slashes = name.replace("\\", "/")  # Windows writes the others; a Mac splits accents from letters
        spellings = (name, slashes, *(normalize(form, slashes) for form in ("NFC", "NFD")))
        name = next((spelling for spelling in spellings if os.path.isfile(path.parent / spelling)), slashes)
        if not os.path.isfile(path.parent / name):
            builder.skip(path.parent / name, "in the manifest but not there")
        else:
            meta = {key: value for key, value in row.items() if key not in IMAGE_KEYS + TEXT_KEYS}
            text = _texts(first_value(row, TEXT_KEYS))
            try:
                text, settings = sidecar_prompt(text) if isinstance(text, str) else (text, {})
                builder.add(path.parent, name, text, settings | meta)
            except NoPrompt as error:
                builder.skip(path.parent / name, f"its text is no prompt: {error.reason}")
        unlisted.pop(os.path.normpath(path.parent / name), None)


def _texts(value: Any) -> Any:
    """The list that a text is as JSON or, as pandas writes it, in Python; anything else as it is."""
    if not (isinstance(value, str) and value.startswith("[")):
        return value
    texts = (json_object(f'{{"texts": {value}}}') or {}).get("texts")
    if texts is None:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            texts = ast.literal_eval(value)
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else value
