"""Image-prompt pairs: reading, cleaning and splitting them (section 4.1), and pictures as tensors."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import embedded
from archives import LOOSE, Zips, members_of
from columns import Arrays, PairsBuilder, Records, Texts, is_zip, kept, place_of
from embedded import NoPrompt, sidecar_prompt
from files import (
    MAX_JSON,
    MAX_LINE,
    ZIP_ERRORS,
    DataError,
    files_below,
    is_junk,
    is_safe,
    json_object,
    numbered,
    parquet_names,
    read_text,
    records,
    require_file,
    sha256,
    sizes_and_sums,
    stamp,
    unzip,
)
from manifests import (
    COLUMNS,
    IMAGE_KEYS,
    MANIFEST_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_KEYS,
    first_value,
    manifests_among,
    read_manifest,
    why_no_manifest,
)

logger = logging.getLogger(__name__)


# ============================================================================================================
# Pairs
# ============================================================================================================

class Pairs:
    """n image-prompt pairs as columns, so that millions of them fit; images are read when asked for.

    prompts  Texts: n strings, stripped; "" where the source gave none
    names    Texts: n member names (in a zip) or paths relative to the folder
    meta     Records: n dicts of what else the source said: se seed, c guidance, st steps, sa sampler, ...
    archives the zips and folders that the names live in; archive (n,) int32 says which
    member   (n,) MEMBER: where an image lies in its zip, and its CRC-32
    skipped  "where: why" for everything that was passed over in reading
    row      (n,) int64 position among the n_read pairs first read, kept through `subset`

    A subset has a `row` of its own and shares all else, as forked workers do. Safe to use from threads, after
    a fork and after pickling.
    """

    def __init__(self, columns: Arrays, words: list[str], zips: Zips, skipped: list[str],
                 row: np.ndarray | None = None) -> None:
        self.n_read = len(columns["archive"])
        self.row = row = np.arange(self.n_read) if row is None else row
        self.prompts, self.names = Texts.of(columns, "prompts", row), Texts.of(columns, "names", row)
        self.meta = Records.of(columns, "meta", words, row)
        self.archives, self.skipped = zips.paths, skipped
        self._columns, self._zips = columns, zips

    def __len__(self) -> int:
        return len(self.row)

    @property
    def archive(self) -> np.ndarray:
        return self._columns["archive"][self.row]

    @property
    def member(self) -> np.ndarray:
        return self._columns["member"][self.row]

    def subset(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order."""
        index = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), np.int64)
        return Pairs(self._columns, self.meta.words, self._zips, self.skipped, self.row[index])

    def where(self, i: int) -> str:
        """How errors name image i: `archive.zip!member`, or the file's path."""
        return place_of(self.archives[self._columns["archive"][self.row[i]]], self.names[i])

    def image(self, i: int) -> Image.Image:
        """Image i as `load_image` gives it. Raises DataError with the image's `where`."""
        name, row = self.names[i], self.row[i]
        k, member = (self._columns[column][row].item() for column in ("archive", "member"))
        where = place_of(self.archives[k], name)
        if not is_zip(self.archives[k]):
            return load_image(where)
        try:
            content = self._zips.read(k, name, member, MAX_BYTES)
        except ZIP_ERRORS as error:
            raise DataError(f"{where}: cannot be read ({error}); fetch the zip again") from error
        return load_image(content, where)


def _pairs(path: Path, columns: Arrays, facts: dict) -> Pairs:
    """The pairs that a builder gathered; one warning counts what it has passed over."""
    skipped, reasons = facts["skipped"], Counter(facts["reasons"])
    first = "; ".join(skipped[:3]) + (" ..." if len(skipped) > 3 else "")
    if not len(columns["archive"]):
        raise DataError(f"{path}: no usable image-prompt pair; {len(skipped)} passed over: {first}")
    if skipped:
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        logger.warning("%s: %d passed over (%s): %s", path, len(skipped), why, first)
    return Pairs(columns, facts["words"], Zips(list(map(Path, facts["archives"]))), skipped)


# ============================================================================================================
# Readers
# ============================================================================================================

IMAGE_SUFFIXES = frozenset((".png", ".apng", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif",
                            ".tif", ".tiff"))
OTHER_SUFFIXES = frozenset((".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".ico", ".ppm",
                            ".exr", ".hdr", ".dng", ".mp4", ".webm", ".mov"))  # pictures, too, but not read
TEXT_SUFFIXES = (".txt", ".caption", ".json")  # of texts beside images; the first wins
OUTSIDE = "the name leaves the archive"
KEEP, KEPT = 50, 1  # parts from which on their columns are kept; version of what is kept


def read_pairs(path: str | Path) -> Pairs:
    """Read image-prompt pairs in a fixed order. The kind is detected; the first that fits is taken:

    1. DiffusionDB: one `part-000001.zip`, or a folder with such zips or unpacked `part-000001/` folders
       anywhere below it. Each holds images and `part-000001.json`, {image: {"p": prompt, "se", "c", "st",
       "sa"}}, of which any key may be missing. Images stay in the zip. Images that DiffusionDB blurred are
       dropped if its metadata.parquet (or metadata-large.parquet) lies beside and pyarrow is installed.
    2. a manifest: JSONL or CSV, itself or in a folder, with the image's path relative to the manifest under
       file_name, image, path, filename or name and its prompt, or a list of prompts, under text, prompt,
       caption or p; Hugging Face's metadata.jsonl is one. As it is the user's own list it may name files
       anywhere.
    3. a folder, searched to the bottom and through links, of images with a text beside them (`a.txt`,
       `a.png.txt`, `a.caption` or `a.json` for a.png), or else with the text that Stable Diffusion front ends
       leave in the file (see `embedded_prompt`).

    Where a front end's infotext or JSON stands for a prompt, beside an image or in a manifest, its prompt is
    taken.

    Images that cannot be used, and tables that are not understood, are passed over, listed in `.skipped` and
    counted in one warning. Raises DataError when there is nothing at `path`, no known kind, or nothing
    usable.
    """
    path, builder = Path(path), PairsBuilder()
    if path.is_dir():
        return _pairs(path, *_read_folder(path, builder))
    require_file(path)
    if is_zip(path):
        _read_parts([path], path, builder)
    elif path.suffix.lower() not in MANIFEST_SUFFIXES:
        raise DataError(f"{path}: neither a part's .zip nor a .jsonl or .csv manifest; give one of them")
    elif why := why_no_manifest(path):
        raise DataError(f"{path}: its first lines do not name {COLUMNS}, {why}; name them so")
    else:
        read_manifest(path, builder, {})
    return _pairs(path, *builder.columns())


def _read_folder(path: Path, builder: PairsBuilder) -> tuple[Arrays, dict]:
    files = files_below(path, lambda folder, why: builder.skip(folder, "the folder cannot be listed", why))
    images = {os.path.normpath(f): f for f in files if f.suffix.lower() in IMAGE_SUFFIXES}
    if parts := _parts_among(files):
        homes = {part.parent for part in parts if not is_zip(part)}
        for file in images.values():
            if file.parent not in homes:
                builder.skip(file, "in no part of the DiffusionDB that the folder holds")
        return _kept_parts(parts, path, builder)
    if manifests := manifests_among(files, path, images.values(), builder):
        for manifest in manifests:
            read_manifest(manifest, builder, images)
        for file in images.values():
            builder.skip(file, "not in the manifest")
    else:
        _read_images(files, images.values(), path, builder)
    if not len(builder.prompts) and not builder.skipped:
        kinds = Counter(f.suffix or f.name for f in files).most_common(5)
        raise DataError(f"{path}: no image-prompt pairs. Looked for part-*.zip, part-*.json, a .jsonl or "
                        f".csv with {COLUMNS}, and images with a .txt beside or a prompt inside; found "
                        + (", ".join(f"{n} {kind}" for kind, n in kinds) or "no file"))
    return builder.columns()


# DiffusionDB ------------------------------------------------------------------------------------------------


def _parts_among(files: list[Path]) -> list[Path]:
    zips = [f for f in files if f.name.startswith("part-") and f.suffix == ".zip"]
    zipped = {f.with_suffix("") for f in zips}  # somebody may have unpacked a zip and kept it
    return zips + [f for f in files if re.fullmatch(r"part-\d+\.json", f.name)
                   and f.parent not in zipped and f.with_suffix("") not in zipped]


def _kept_parts(parts: list[Path], root: Path, builder: PairsBuilder) -> tuple[Arrays, dict]:
    """The columns of parts; those of many zips are kept in the cache's folder pairs-HASH, a hash of the path.

    They are read again when the names, sizes or times of the zips, or of metadata.parquet, have changed.
    """
    def read() -> tuple[Arrays, dict]:
        _read_parts(parts, root, builder)
        builder.archives = [archive.relative_to(root) for archive in builder.archives]
        return builder.columns()

    if len(parts) < KEEP or not all(map(is_zip, parts)):
        _read_parts(parts, root, builder)
        return builder.columns()
    files = parts + _metadata_tables(root)
    stamps = [f"{os.path.relpath(file.parent, root)} {stamp(file)}" for file in files]
    state = [KEPT, importlib.util.find_spec("pyarrow") is not None, builder.skipped, stamps]
    columns, facts = kept(f"pairs-{sha256(str(root.resolve()))[:16]}", sha256(json.dumps(state)), read)
    return columns, facts | {"archives": [root / archive for archive in facts["archives"]]}


def _read_parts(parts: list[Path], root: Path, builder: PairsBuilder) -> None:
    blurred = _blurred_names(root)
    for part in tqdm(parts, desc="reading parts", unit="part", disable=len(parts) < 50):
        try:
            if part.suffix == ".json":
                require_file(part, MAX_JSON)
                names = sorted(name for name in os.listdir(part.parent) if not is_junk(name))
                members = dict.fromkeys(names, LOOSE)
                listing, content = part.name, part.read_bytes()
            else:
                members, listing, content = _zip_listing(part)
        except ZIP_ERRORS as error:
            builder.skip(part, "cannot be read, fetch it again", error)
            continue
        home = part.parent if part.suffix == ".json" else part
        if listing is None:
            builder.skip(part, "no JSON with its prompts", content)
        else:
            _read_part(home, members, listing, content, blurred, builder)


def _zip_listing(part: Path) -> tuple[dict[str, bytes], str | None, Any]:
    """(members of the zip, name of the JSON with its prompts, its bytes), or (members, None, why)."""
    require_file(part)
    with zipfile.ZipFile(part) as archive:
        members = {name: member for name, member in members_of(archive).items() if not is_junk(name)}
        listings = [m for m in members if m.endswith(".json")]
        named = [m for m in listings if PurePosixPath(m).stem == part.stem] or listings
        if len(named) != 1:
            return members, None, f"{len(listings)} with other names"
        return members, named[0], unzip(archive, named[0], MAX_JSON)


def _read_part(part: Path, members: dict[str, bytes], listing: str, content: bytes, blurred: set[str],
               builder: PairsBuilder) -> None:
    """One part, zipped or not: `content` is the JSON `listing` that lies among `members`."""
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        builder.skip(place_of(part, listing), "the JSON does not parse", error)
        return
    if not isinstance(entries, dict):
        builder.skip(place_of(part, listing), "the JSON is not an object {image: {...}}")
        return
    folder = listing[:-len(PurePosixPath(listing).name)]
    listed = {folder + name for name in entries}
    for name, entry in entries.items():
        if not is_safe(name):
            builder.skip(place_of(part, name), OUTSIDE)
        elif folder + name not in members:
            builder.skip(place_of(part, folder + name), "in the JSON but not there")
        elif not isinstance(entry, dict | str):
            builder.skip(place_of(part, folder + name), "its JSON entry is no object")
        elif name in blurred:
            builder.skip(place_of(part, folder + name), "blurred by DiffusionDB, image_nsfw 2.0")
        else:
            entry = {"p": entry} if isinstance(entry, str) else entry
            builder.add(part, folder + name, entry.pop("p", None), entry, members[folder + name])
    for member in members:
        if member not in listed and PurePosixPath(member).suffix.lower() in IMAGE_SUFFIXES:
            builder.skip(place_of(part, member), "not in the JSON" if is_safe(member) else OUTSIDE)


def _blurred_names(root: Path) -> set[str]:
    """The images to which DiffusionDB's metadata gives image_nsfw 2.0: its maker replaced them by a blur."""
    return set().union(*(parquet_names(table, "image_name", "image_nsfw", 2.0)
                         for table in _metadata_tables(root)))


def _metadata_tables(root: Path) -> list[Path]:
    tables = (folder / name for folder in (root, *root.parents[:2])
              for name in ("metadata.parquet", "metadata-large.parquet"))
    return [table for table in tables if table.is_file()]


# images with their prompts beside or inside -----------------------------------------------------------------


def _read_images(
    files: list[Path], images: Collection[Path], root: Path, builder: PairsBuilder
) -> None:
    beside: dict[Path, Path] = {}  # the text of `a` (for all of a.png, a.jpg) and of `a.png`
    for suffix in reversed(TEXT_SUFFIXES):
        beside |= {f.with_suffix(""): f for f in files if f.suffix.lower() == suffix}
    for file in files:
        suffix, stem = file.suffix.lower(), file.with_suffix("")
        has_text = stem in beside and suffix not in (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
        if suffix not in IMAGE_SUFFIXES and (has_text or suffix in OTHER_SUFFIXES):
            builder.skip(file, "in a format that is not read; save it as PNG, JPEG or WebP")
    for file in tqdm(images, desc="reading prompts", unit="image", disable=len(images) < 5000):
        text = beside.get(file) or beside.get(file.with_suffix(""))
        try:
            prompt, meta = _prompt_beside(text, file) if text else _prompt_inside(file)
        except NoPrompt as error:
            builder.skip(file, f"no text beside it and {error.reason}", error.detail)
        except DataError as error:
            builder.skip(text or file, "cannot be read", error)
        else:
            builder.add(root, file.relative_to(root).as_posix(), prompt, meta)


def _prompt_beside(text: Path, image: Path) -> tuple[str, dict]:
    try:
        return sidecar_prompt(read_text(text, MAX_LINE))
    except NoPrompt:
        if text.suffix.lower() != ".json":
            raise
        return _prompt_inside(image)  # JSON may be of anything


def embedded_prompt(path: str | Path) -> tuple[str, dict] | None:
    """(prompt, {se, st, c, sa if known}) from the text a front end left in an image, None if none is certain.

    Read are AUTOMATIC1111's infotext, ComfyUI's graph, JSON of settings (InvokeAI, NovelAI, Fooocus, SwarmUI
    and others) and InvokeAI's command line, in PNG's texts, EXIF, XMP and comments. Raises DataError for a
    file that is no image.
    """
    try:
        return _prompt_inside(Path(path))
    except NoPrompt:
        return None


def _prompt_inside(path: Path) -> tuple[str, dict]:
    with _opened(path, str(path), header=True) as (image, file):
        texts = embedded.texts_of(image, file)
    try:
        return embedded.find_prompt(texts)
    except NoPrompt:
        with _opened(path, str(path)) as (image, _):
            text = embedded.hidden_text(image)
        if text is None:
            raise
        return embedded.find_prompt({"parameters": text})


# ============================================================================================================
# Cleaning (section 4.1)
# ============================================================================================================

SHARED_CHARACTERS = 50
has_word = re.compile(r"[^\W_]").search


def clean(prompts: Iterable[Any], near_duplicates: bool = True) -> tuple[np.ndarray, dict[str, int]]:
    """The cleaning of section 4.1, in its order -> (kept (k,) int64 indices, how many each rule dropped).

    empty           None, NaN, "null" or "nan" alone in any case, prompts without a letter or digit
    non_english     prompts with a character outside ASCII
    near_duplicate  prompts that share their first, or their last, 50 characters with one kept before;
                    `duplicate`, equal prompts only, with near_duplicates=False
    The report also counts `read` and `kept`. Prompts are compared without outer whitespace, which
    `read_pairs` has stripped already.

    Paper: does not say which characters are non-English; ASCII is our reading.
    Paper: a prompt shorter than 50 characters cannot share 50. Ours is dropped if the same one was kept
    before, since it could otherwise stand in two splits.
    """
    kept: list[int] = []
    heads: set[str] = set()  # the strings, not their hashes: exact, and 2 million fit (benchmarks/clean.py)
    tails: set[str] = set()
    shared = SHARED_CHARACTERS if near_duplicates else sys.maxsize
    read = empty = foreign = 0
    for i, prompt in enumerate(prompts):
        read += 1
        prompt = prompt.strip() if isinstance(prompt, str) else ""
        if not has_word(prompt) or (len(prompt) < 5 and prompt.casefold() in ("null", "nan")):
            empty += 1
        elif not prompt.isascii():
            foreign += 1
        else:
            head, tail = prompt[:shared], prompt[-shared:]
            if head not in heads and tail not in tails:
                heads.add(head)
                tails.add(tail)
                kept.append(i)
    return np.asarray(kept, np.int64), {"read": read, "empty": empty, "non_english": foreign,
                                        "near_duplicate" if near_duplicates else "duplicate":
                                            read - empty - foreign - len(kept),
                                        "kept": len(kept)}


# ============================================================================================================
# Splits (section 4.1)
# ============================================================================================================


def split(prompts: Sequence[str], seed: int, val: int | None = None, test: int | None = None,
          pictures: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test": sorted int64 indices, disjoint, covering, equal on every platform.

    val, test: rows wanted; None = 30,000 as in the paper (670K / 30K / 30K), or an eighth of all if that is
    less. Rows whose prompts are equal but for case and spacing stay together, and so do rows of one picture
    (`pictures`, from `same_pictures`), so where either repeats the counts may differ a little. Raises
    DataError where there are too few distinct prompts or pictures, or for numbers that cannot be.
    """
    n = len(prompts)
    if any(not isinstance(x, int | np.integer) for x in (seed, val or 0, test or 0)) or seed < 0:
        raise DataError(f"seed {seed}, {val} for validation, {test} for test: give whole numbers from 0 on")
    groups = _groups(_prompt_numbers(prompts), *([] if pictures is None else [np.asarray(pictures)]))
    sizes = np.bincount(groups)
    default = max(1, min(30_000, n // 8))
    wanted = {"test": default if test is None else test, "val": default if val is None else val}
    if len(sizes) < 3 or min(wanted.values()) < 1 or sum(wanted.values()) >= n:
        raise DataError(f"{n} pairs with {len(sizes)} distinct prompts and pictures cannot give "
                        f"{wanted['val']} for validation, {wanted['test']} for test and more for training; "
                        "give more pairs or ask for fewer")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(sizes))
    chosen, room = np.full(len(sizes), "train"), dict(wanted)
    for group, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if name := next((name for name in wanted if size <= room[name]), None):
            chosen[group] = name
            room[name] -= size
        elif not any(room.values()):
            break
    for name in (name for name in wanted if name not in chosen):  # all groups were too large: the smallest
        rest = order[chosen[order] == "train"]
        chosen[rest[np.argmin(sizes[rest])]] = name
    if "train" not in chosen:
        raise DataError(f"{n} pairs with {len(sizes)} distinct prompts leave none to train on; give more")
    return {name: np.flatnonzero((chosen == name)[groups]) for name in ("train", "val", "test")}


def _prompt_numbers(prompts: Iterable[Any]) -> np.ndarray:
    """(n,) equal numbers for prompts that are equal but for case and spacing: by hashes of 16 bytes, since
    14 million strings would take 3 GB."""
    texts = (" ".join((prompt or "").casefold().split()) for prompt in prompts)
    digests = (blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return _numbers(np.frombuffer(b"".join(digests), "S16"))


def _numbers(values: np.ndarray) -> np.ndarray:
    """(n,) int64: equal numbers for equal values, in the order of their first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _groups(*columns: np.ndarray) -> np.ndarray:
    """(n,) int64: equal numbers for rows that equal values in any column join, also through other rows."""
    first = np.arange(len(columns[0]))  # the first row known to be of the same group
    columns, before = [_numbers(column) for column in columns], None
    while not np.array_equal(first, before):
        before = first
        for column in columns:
            least = np.full(len(column), len(column))
            np.minimum.at(least, column, first)
            first = least[column]
        first = first[first]
    return _numbers(first)


def same_pictures(pairs: Pairs) -> np.ndarray:
    """(n,) int64: equal numbers where the picture is the same: one file, or files of the same bytes.

    Compared are sizes and CRC-32, which zips have in their directories; on disk only those files are read
    that have the size of another. A file that cannot be read is equal only to itself. Where that leaves fewer
    than three pictures, files are told apart by name: they are blanks.
    """
    archive, member = pairs.archive, pairs.member
    loose = np.flatnonzero(~np.array(list(map(is_zip, pairs.archives)))[archive])
    sizes, sums = member["size"].astype(np.int64), member["crc"].astype(np.int64)
    if len(loose):
        files = [pairs.archives[archive[i]] / pairs.names[i] for i in loose.tolist()]
        sizes[loose], sums[loose] = np.array(sizes_and_sums(files, set(np.delete(sizes, loose).tolist()))).T
    numbers = _numbers(_numbers(sizes) << 32 | sums)
    if len(numbers) and numbers.max() > 1:
        return numbers
    homes = (pairs.archives[k] for k in archive.tolist())
    return np.asarray(numbered(zip(homes, pairs.names, strict=True)))


# ============================================================================================================
# Images
# ============================================================================================================

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # JPEG's own; each row has memory of its own, so that a thin picture takes far more
MAX_BYTES = 1 << 29
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "GIF", "TIFF")  # for an EPS named x.png Pillow starts Ghostscript


@contextmanager
def _opened(source: str | Path | bytes, where: str,
            header: bool = False) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, opened and not yet decoded, and its file; whatever goes wrong becomes a DataError.

    header: the pixels are not wanted.
    """
    try:
        if not isinstance(source, bytes):
            require_file(Path(source), MAX_BYTES)
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            start = file.read(len(embedded.PNG))
            if not start:
                raise DataError(f"{where}: the file is empty (0 bytes); fetch it again or remove it")
            file.seek(0)
            pixels = embedded.png_pixels(file, header) if start == embedded.PNG else file
            with Image.open(pixels, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height}")
                if max(image.size) > MAX_SIDE:
                    raise DataError(f"{where}: a side of {max(image.size):,} pixels; cut it or remove it")
                yield image, file
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"more than {MAX_PIXELS // 10**6} megapixels ({error})"
        raise DataError(f"{where}: {what}; scale it down or remove it") from error
    except Exception as error:  # Pillow's decoders raise nearly any kind on damaged files
        what = "in no known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"{where}: cannot be read as an image ({what}); replace or remove it") from error


def load_image(source: str | Path | bytes, where: str | None = None) -> Image.Image:
    """An image file, or its bytes, as an upright RGB image, transparent parts on white, 16 bits scaled to 8.

    Damaged or large texts and colour profiles do not matter. Raises DataError, naming `where` (the path by
    default), for a missing, empty, damaged, truncated or unknown file, for anything but a regular file and,
    before anything is decoded, for more than 100 megapixels or a side of more than 65,535.
    """
    with _opened(source, where or ("image" if isinstance(source, bytes) else str(source))) as (image, _):
        image.load()
        return _rgb(embedded.upright(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        values, clear = np.asarray(image), image.info.get("transparency")
        grey = np.clip(values.astype(np.float64) / 257 + 0.5, 0, 255)
        if isinstance(clear, int):
            grey[values == clear] = 255
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes what one checkpoint reads; `dataclasses.asdict` and JSON keep it.

    size       (height, width) of what the model reads
    resize     what the picture is resized to before the centre crop: its shorter side; or (height, width),
               which it then just covers, keeping its proportions; or None: it is squashed to `size`
    filter     "bicubic", "bilinear" or "lanczos", as Pillow has them: stretched where a picture is reduced
    mean, std  of red, green and blue in [0, 1]; taken off, then divided by
    rules      whose grey levels are matched where libraries differ. "torchvision" (timm and open_clip):
               Pillow's resize; a crop that cannot lie in the middle goes half a pixel to the even side.
               "transformers": torch's resize of bytes; the crop goes half a pixel up and to the left
    squash     a `resize` to (height, width) gives up the proportions

    Raises ValueError where these do not fit each other.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None
    filter: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rules: str = "torchvision"
    squash: bool = False

    def __post_init__(self) -> None:
        for field in ("size", "resize", "mean", "std"):  # JSON has no tuples
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        box = self.size if self.resize is None else self.resize
        box = box if isinstance(box, tuple) else (box, box)
        good = (len(self.size) == len(box) == 2 and len(self.mean) == len(self.std) == 3
                and min(*self.size, *box) > 0 and min(self.std) > 0
                and all(map(math.isfinite, (*self.mean, *self.std)))
                and self.filter in ("bicubic", "bilinear", "lanczos")
                and self.rules in ("torchvision", "transformers")
                and not (self.squash and isinstance(self.resize, int)))
        if not good:
            raise ValueError(f"no such preprocessing of images: {self}")

    @classmethod
    def square(cls, size: int) -> Preprocessing:
        """Shorter side to `size` (bicubic), centre crop, [-1, 1]: what the autoencoder reads."""
        return cls((size, size), size, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of such a picture after the resize."""
        if self.resize is None or self.squash:
            return self.resize or self.size
        if isinstance(self.resize, int):
            short = min(height, width)
            return int(self.resize * height / short), int(self.resize * width / short)
        ratio = min(height / self.resize[0], width / self.resize[1])
        return round(height / ratio), round(width / ratio)

    def offset(self, side: int, size: int) -> int:
        """Where a crop of `size` begins; below zero where it is larger: what it lacks is black."""
        if size > side:
            return -((size - side) // 2)
        return round((side - size) / 2) if self.rules == "torchvision" else (side - size) // 2


STRIP = 8  # a picture so many times longer than what is kept of it is cropped before it is enlarged


def image_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """The picture resized, cropped to the centre and normalised -> (3, h, w) float32.

    Pillow resizes strips, and by lanczos before torchvision 0.27, under either rules: hard edges and noise
    may differ by some grey levels there, as they do between versions of Pillow.
    """
    import torchvision  # here, since it takes 1.5 s: most commands read rows of caches alone
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as TF

    tensors_by_lanczos = tuple(map(int, torchvision.__version__.split(".")[:2])) >= (0, 27)
    image = _rgb(image)
    height, width = preprocessing.scaled(image.height, image.width)
    h, w = preprocessing.size
    top, left = preprocessing.offset(height, h), preprocessing.offset(width, w)
    interpolation = InterpolationMode[preprocessing.filter.upper()]
    if max(height / h, width / w) > STRIP:  # enlarged whole, one of 1 x 20,000 would take gigabytes
        rows, columns = (max(top, 0), min(top + h, height)), (max(left, 0), min(left + w, width))
        image = _resized_part(image, (height, width), rows, columns, preprocessing.filter)
        levels, top, left = TF.pil_to_tensor(image), min(top, 0), min(left, 0)
    elif preprocessing.rules == "transformers" and (preprocessing.filter != "lanczos" or tensors_by_lanczos):
        levels = TF.resize(TF.pil_to_tensor(image), [height, width], interpolation, antialias=True)
    else:
        levels = TF.pil_to_tensor(TF.resize(image, [height, width], interpolation))
    levels = TF.crop(levels, top, left, h, w)  # what the crop lacks is black
    return TF.normalize(levels.float() / 255, preprocessing.mean, preprocessing.std).contiguous()


def _resized_part(image: Image.Image, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int],
                  filter: str) -> Image.Image:
    """Those rows and columns (begin, end) of the picture resized to `size` (height, width)."""
    axes = []
    for old, new, (begin, end) in ((image.width, size[1], columns), (image.height, size[0], rows)):
        scale = old / new
        reach = 4 * math.ceil(max(scale, 1))  # no filter reaches further
        low, high = max(int(begin * scale) - reach, 0), min(math.ceil(end * scale) + reach, old)
        axes.append((low, high, begin * scale - low, min(end * scale, old) - low))
    (left, right, x, end_x), (top, bottom, y, end_y) = axes
    part = image.crop((left, top, right, bottom))
    shape = (columns[1] - columns[0], rows[1] - rows[0])
    return part.resize(shape, Image.Resampling[filter.upper()], (x, y, end_x, end_y))


# ============================================================================================================
# Captions
# ============================================================================================================


def read_captions(path: str | Path, pairs: Pairs) -> list[str]:
    """A caption for each pair, "" (and one warning with the count) where the file has none.

    path: JSONL or CSV with an image and a text column as in `read_pairs`, or a JSON object {image:
    caption}; images by name, by file name alone, or, where several archives hold the same name, as
    `part-000001.zip!name`. Or a .txt with one caption a line, in the order in which the pairs were read.
    Raises DataError if nothing fits.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".json", ".jsonl", ".csv"):
        raise DataError(f"{path}: captions come as .jsonl, .csv, .json or .txt; save them so")
    if path.suffix == ".txt":
        lines = read_text(path, MAX_BYTES).removesuffix("\n").split("\n")
        if len(lines) != pairs.n_read:
            raise DataError(f"{path}: {len(lines)} lines for {pairs.n_read} pairs; give one line a pair")
        return [lines[i].strip() for i in pairs.row.tolist()]
    texts = _captions_by_name(path)
    captions = _matched_captions(pairs, texts)
    missing = captions.count(None)
    if missing == len(captions):
        raise DataError(f"{path}: none of {len(texts)} captions is for one of the {len(pairs)} images; name "
                        f"them like {', '.join(pairs.names[:1])}")
    if missing:
        logger.warning("%s: no caption for %d of %d images; theirs are empty", path, missing, len(pairs))
    return [caption or "" for caption in captions]


def _captions_by_name(path: Path) -> dict[str, str]:
    if path.suffix == ".json":
        texts = json_object(read_text(path, MAX_JSON))
        if texts is None:
            raise DataError(f"{path}: is not a JSON object {{image: caption}}; write it so")
    else:
        rows = (row for _, row in records(path) if isinstance(row, dict))
        texts = {first_value(row, IMAGE_KEYS): first_value(row, ("caption", *TEXT_KEYS)) for row in rows
                 if isinstance(first_value(row, IMAGE_KEYS), str)}
    return {name.replace("\\", "/"): text.strip() for name, text in texts.items() if isinstance(text, str)}


def _matched_captions(pairs: Pairs, texts: dict[str, str]) -> list[str | None]:
    """Each image's caption by `archive!name`, or by name or file name where only one image has it."""
    by_file = {PurePosixPath(name).name: text for name, text in texts.items() if "!" not in name}
    names, files = Counter(pairs.names), Counter(PurePosixPath(name).name for name in pairs.names)
    captions: list[str | None] = []
    for k, name in zip(pairs.archive.tolist(), pairs.names, strict=True):
        file = PurePosixPath(name).name
        caption = texts.get(f"{pairs.archives[k].name}!{name}")
        if caption is None and names[name] == 1:
            caption = texts.get(name)
        if caption is None and files[file] == 1:
            caption = by_file.get(file)
        captions.append(caption)
    return captions
