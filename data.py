"""Image-prompt pairs: reading, cleaning and splitting them (section 4.1), and pictures as tensors."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import sys
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there processes that share a folder do not wait for each other
    fcntl = None

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Something is wrong with the user's data or disk; one line says which file, what, and what to do."""


# ============================================================================================================
# Pairs
# ============================================================================================================

OPEN_ARCHIVES = 32  # zips held open at once by one process
ZIP_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, ValueError)


class Pairs:
    """n image-prompt pairs as columns, so that millions of them fit; images are read when asked for.

    prompts  n strings, stripped; "" where the source gave none
    names    n member names (in a zip) or paths relative to the folder
    archives the zips and folders that the names live in; archive (n,) int32 says which
    meta     n dicts of what else the source said: se seed, c guidance, st steps, sa sampler, ...
    skipped  "where: why" for everything that was passed over in reading
    row      (n,) int64 position among the n_read pairs first read, kept through `subset`

    Safe to use from threads, after a fork and after pickling: each process opens its own archives.
    """

    def __init__(self, prompts: list[str], names: list[str], archives: list[Path], archive: np.ndarray,
                 meta: list[dict], skipped: Iterable[str] = (), row: np.ndarray | None = None,
                 n_read: int | None = None) -> None:
        self.prompts, self.names, self.archives, self.meta = prompts, names, archives, meta
        self.archive = np.asarray(archive, np.int32)
        self.skipped = list(skipped)
        self.row = np.arange(len(prompts)) if row is None else row
        self.n_read = len(prompts) if n_read is None else n_read
        self._reopen()

    def _reopen(self) -> None:
        self._open: OrderedDict[int, zipfile.ZipFile] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock", "_pid")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reopen()

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order."""
        index = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), np.int64)
        prompts, names, meta = ([column[i] for i in index.tolist()]
                                for column in (self.prompts, self.names, self.meta))
        return Pairs(prompts, names, self.archives, self.archive[index], meta, self.skipped,
                     self.row[index], self.n_read)

    def where(self, i: int) -> str:
        """How errors name image i: `archive.zip!member`, or the file's path."""
        archive = self.archives[self.archive[i]]
        return f"{archive}!{self.names[i]}" if archive.suffix == ".zip" else str(archive / self.names[i])

    def image(self, i: int) -> Image.Image:
        """Image i as `load_image` gives it. Raises DataError with the image's `where`."""
        k = int(self.archive[i])
        if self.archives[k].suffix != ".zip":
            return load_image(self.archives[k] / self.names[i])
        if self._pid != os.getpid():
            self._reopen()  # a forked child shares its parent's file offsets: never read through them
        try:
            with self._lock:
                if k not in self._open:
                    self._open[k] = zipfile.ZipFile(self.archives[k])
                    if len(self._open) > OPEN_ARCHIVES:
                        self._open.popitem(last=False)[1].close()
                self._open.move_to_end(k)
                content = _unzip(self._open[k], self.names[i])
        except ZIP_ERRORS as error:
            raise DataError(f"{self.where(i)}: cannot be read ({error}); fetch the zip again") from error
        return load_image(content, self.where(i))


def _unzip(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_BYTES:
        raise ValueError(f"unpacks to more than {MAX_BYTES >> 20} MB")
    return archive.read(name)


class _Found:
    """What a reader has gathered so far."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.names: list[str] = []
        self.meta: list[dict] = []
        self.archive: list[int] = []
        self.archives: list[Path] = []
        self.skipped: list[str] = []
        self.reasons: Counter[str] = Counter()

    def add(self, archive: Path, name: str, prompt: Any, meta: dict) -> None:
        if not self.archives or self.archives[-1] != archive:
            self.archives.append(archive)
        self.prompts.append(prompt.strip() if isinstance(prompt, str) else "")
        self.names.append(name)
        self.meta.append(meta)
        self.archive.append(len(self.archives) - 1)

    def skip(self, where: object, why: str, detail: object = None) -> None:
        self.skipped.append(f"{where}: {why}" + ("" if detail is None else f" ({detail})"))
        self.reasons[why] += 1

    def pairs(self, path: Path) -> Pairs:
        first = "; ".join(self.skipped[:3]) + (" ..." if len(self.skipped) > 3 else "")
        if not self.prompts:
            raise DataError(f"{path}: no usable image-prompt pair; {len(self.skipped)} passed over: {first}")
        if self.skipped:
            why = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
            logger.warning("%s: %d passed over (%s): %s", path, len(self.skipped), why, first)
        archive = np.asarray(self.archive, np.int32)
        return Pairs(self.prompts, self.names, self.archives, archive, self.meta, self.skipped)


# ============================================================================================================
# Readers
# ============================================================================================================

IMAGE_SUFFIXES = frozenset((".png", ".webp", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"))
IMAGE_KEYS = ("file_name", "image", "path", "filename", "name")
TEXT_KEYS = ("text", "prompt", "caption", "p")
COLUMNS = f"the image ({', '.join(IMAGE_KEYS)}) and the prompt ({', '.join(TEXT_KEYS)})"
OUTSIDE = "the name leaves the archive"


def read_pairs(path: str | Path) -> Pairs:
    """Read image-prompt pairs in a fixed order. The kind is detected; the first that fits is taken:

    1. DiffusionDB: one `part-000001.zip`, or a folder with such zips or unpacked `part-000001/` folders
       anywhere below it. Each holds images and `part-000001.json`, {image: {"p": prompt, "se", "c", "st",
       "sa"}}, of which any key may be missing. Images stay in the zip. Images that DiffusionDB blurred are
       dropped if its metadata.parquet (or metadata-large.parquet) lies beside and pyarrow is installed.
    2. a manifest: JSONL or CSV, itself or in a folder, with the image's path relative to the manifest under
       file_name, image, path, filename or name and its prompt under text, prompt, caption or p; Hugging
       Face's metadata.jsonl is one. As it is the user's own list it may name files anywhere.
    3. a folder, searched to the bottom, of images with a `.txt` of the same name beside them, or else with
       the text that Stable Diffusion front ends leave in the file (see `embedded_prompt`).

    What cannot be used is passed over, listed in `.skipped` and counted in one warning.
    Raises DataError when there is nothing at `path`, no known kind, or nothing usable.
    """
    path, found = Path(path), _Found()
    if path.is_file():
        if path.suffix == ".zip":
            _read_parts([path], path, found)
        elif path.suffix not in (".jsonl", ".csv"):
            raise DataError(f"{path}: neither a part's .zip nor a .jsonl or .csv manifest; give one of them")
        elif not _is_manifest(path):
            raise DataError(f"{path}: its first line does not name {COLUMNS}; name them so")
        else:
            _read_manifest(path, found)
        return found.pairs(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; give a folder of images with prompts")

    files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    parts = [f for f in files if f.name.startswith("part-") and f.suffix == ".zip"]
    zipped = {f.with_suffix("") for f in parts}  # somebody may have unpacked a zip and kept it
    parts += [f for f in files if re.fullmatch(r"part-\d+\.json", f.name)
              and f.parent not in zipped and f.with_suffix("") not in zipped]
    manifests = [f for f in files if f.name in ("metadata.jsonl", "metadata.csv") and _is_manifest(f)]
    if not manifests and not parts:
        tables = [f for f in files if f.parent == path and f.suffix in (".jsonl", ".csv")]
        manifests = [f for f in tables if _is_manifest(f)]
        if len(manifests) > 1:
            names = ", ".join(f.name for f in manifests)
            raise DataError(f"{path}: several manifests ({names}); give the path of the one to read")
    if parts:
        _read_parts(parts, path, found)
    elif manifests:
        for manifest in manifests:
            _read_manifest(manifest, found)
    else:
        _read_images(files, path, found)
    if not found.prompts and not found.skipped:
        kinds = Counter(f.suffix or f.name for f in files).most_common(5)
        raise DataError(f"{path}: no image-prompt pairs. Looked for part-*.zip, part-*.json, a .jsonl or "
                        f".csv with {COLUMNS}, and images with a .txt beside or a prompt inside; found "
                        + (", ".join(f"{n} {kind}" for kind, n in kinds) or "no file"))
    return found.pairs(path)


def _read_parts(parts: list[Path], root: Path, found: _Found) -> None:
    blurred = _blurred_names(root)
    for part in tqdm(parts, desc="reading parts", unit="part", disable=len(parts) < 50):
        try:
            if part.suffix == ".json":
                members, listing, content = sorted(os.listdir(part.parent)), part.name, part.read_bytes()
            else:
                with zipfile.ZipFile(part) as archive:
                    members = archive.namelist()
                    listings = [m for m in members if m.endswith(".json") and "__MACOSX" not in m]
                    named = [m for m in listings if PurePosixPath(m).stem == part.stem]
                    if len(named or listings) != 1:
                        found.skip(part, "no JSON with its prompts", f"{len(listings)} with other names")
                        continue
                    listing = (named or listings)[0]
                    content = _unzip(archive, listing)
        except ZIP_ERRORS as error:
            found.skip(part, "cannot be read, fetch it again", error)
            continue
        home = part if part.suffix == ".zip" else part.parent
        _read_part(home, members, listing, content, blurred, found)


def _read_part(part: Path, members: list[str], listing: str, content: bytes, blurred: set[str],
               found: _Found) -> None:
    """One part, zipped or not: `content` is the JSON `listing` that lies among `members`."""
    spot = f"{part}!" if part.suffix == ".zip" else f"{part}{os.sep}"
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found.skip(spot + listing, "the JSON does not parse", error)
        return
    if not isinstance(entries, dict):
        found.skip(spot + listing, "the JSON is not an object {image: {...}}")
        return
    folder = listing[:-len(PurePosixPath(listing).name)]
    there, listed = set(members), {folder + name for name in entries}
    for name, entry in entries.items():
        if not _is_safe(name):
            found.skip(spot + name, OUTSIDE)
        elif folder + name not in there:
            found.skip(spot + folder + name, "in the JSON but not there")
        elif not isinstance(entry, dict | str):
            found.skip(spot + folder + name, "its JSON entry is no object")
        elif name in blurred:
            found.skip(spot + folder + name, "blurred by DiffusionDB, image_nsfw 2.0")
        else:
            entry = {"p": entry} if isinstance(entry, str) else entry
            found.add(part, folder + name, entry.pop("p", None), entry)
    for member in members:
        suffix = PurePosixPath(member).suffix.lower()
        if member not in listed and suffix in IMAGE_SUFFIXES and "__MACOSX" not in member:
            found.skip(spot + member, "not in the JSON" if _is_safe(member) else OUTSIDE)


def _is_safe(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return bool(parts[0]) and ".." not in parts and not re.match("[A-Za-z]:", name)


def _blurred_names(root: Path) -> set[str]:
    """The images to which DiffusionDB's metadata gives image_nsfw 2.0: its maker replaced them by a blur."""
    blurred: set[str] = set()
    for folder in (root, *root.parents[:2]):
        for table in (folder / "metadata.parquet", folder / "metadata-large.parquet"):
            if not table.is_file():
                continue
            try:
                from pyarrow import ArrowException, parquet
            except ImportError:
                logger.warning("%s says which images are blurred; `pip install pyarrow` to drop them", table)
                return blurred
            try:
                columns = parquet.read_table(table, columns=["image_name", "image_nsfw"]).to_pydict()
            except (ArrowException, OSError, KeyError) as error:
                raise DataError(f"{table}: cannot be read ({error}); fetch it again or remove it") from error
            scores = zip(columns["image_name"], columns["image_nsfw"], strict=True)
            blurred.update(name for name, score in scores if score == 2.0)
    return blurred


def _records(path: Path) -> Iterator[tuple[int, dict | None]]:
    """(line number, object with lower-case keys, None where it does not parse) of a JSONL or CSV file."""
    limit = csv.field_size_limit(1 << 27)  # prompts of 10,000 words pass csv's own limit
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                for row in (reader := csv.DictReader(file)):
                    yield reader.line_num, {(key or "").strip().lower(): value for key, value in row.items()}
                return
            for k, line in enumerate(file, 1):
                if line.strip():
                    row = _json_object(line)
                    yield k, None if row is None else {key.lower(): value for key, value in row.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 {path.suffix}") from error
    finally:
        csv.field_size_limit(limit)


def _json_object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _value(row: dict, keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _is_manifest(path: Path) -> bool:
    first = next((row for _, row in _records(path) if row is not None), {})
    return any(key in first for key in IMAGE_KEYS) and any(key in first for key in TEXT_KEYS)


def _read_manifest(path: Path, found: _Found) -> None:
    for k, row in _records(path):
        name = _value(row or {}, IMAGE_KEYS)
        if not isinstance(name, str) or not name:
            found.skip(f"{path}, line {k}", "does not parse" if row is None else "names no image")
        elif "\0" in name or not os.path.isfile(path.parent / name):
            found.skip(path.parent / name, "in the manifest but not there")
        else:
            meta = {key: value for key, value in row.items() if key not in IMAGE_KEYS + TEXT_KEYS}
            found.add(path.parent, name, _value(row, TEXT_KEYS), meta)


def _read_images(files: list[Path], root: Path, found: _Found) -> None:
    texts = {f for f in files if f.suffix == ".txt"}
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    for file in tqdm(images, desc="reading prompts", unit="image", disable=len(images) < 5000):
        beside = file.with_suffix(".txt")
        try:
            inside = (beside.read_text("utf-8-sig"), {}) if beside in texts else embedded_prompt(file)
        except (DataError, OSError, UnicodeDecodeError) as error:
            found.skip(beside if beside in texts else file, "cannot be read", error)
            continue
        if inside is None:
            found.skip(file, "no .txt beside it and no prompt inside")
        else:
            found.add(root, file.relative_to(root).as_posix(), *inside)


# prompts inside images --------------------------------------------------------------------------------------


def embedded_prompt(path: str | Path) -> tuple[str, dict] | None:
    """(prompt, {se, st, c, sa if known}) from the text a front end left in an image, None if there is none.

    Understood: AUTOMATIC1111 and Forge (`parameters`, or EXIF UserComment in JPEG and WebP), ComfyUI
    (`prompt`, a graph), InvokeAI (`invokeai_metadata`, `sd-metadata`, `Dream`), NovelAI (`Description` and
    `Comment`), and JSON under `parameters` (Fooocus, SwarmUI). Raises DataError for a file that is no
    image.
    """
    with _opened(path, str(path)) as image:
        texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
        if "parameters" not in texts and image.format in ("JPEG", "WEBP"):
            comment = image.getexif().get_ifd(0x8769).get(0x9286)  # UserComment in EXIF's own directory
            if isinstance(comment, bytes):
                coding = "utf-16-be" if comment.startswith(b"UNICODE\0") else "utf-8"
                texts["parameters"] = comment[8:].decode(coding, "replace")
    for key, parse in (("parameters", _from_parameters), ("prompt", _from_comfy), ("Dream", _from_dream),
                       ("invokeai_metadata", _from_json), ("sd-metadata", _from_json),
                       ("Comment", _from_json)):
        prompt, meta = (parse(texts[key]) if texts.get(key, "").strip() else None) or (None, {})
        if key == "Comment" and meta:  # NovelAI: settings are here, the prompt may be in Description alone
            prompt = prompt or texts.get("Description")
        if prompt is not None:
            return prompt.strip(), meta
    return None


def _settings(row: dict) -> dict:
    names = {"se": ("seed", "noise_seed"), "st": ("steps",), "c": ("cfg_scale", "cfg", "cfgscale", "scale"),
             "sa": ("sampler", "sampler_name", "scheduler")}
    values = {key: _value(row, keys) for key, keys in names.items()}
    return {key: value for key, value in values.items() if isinstance(value, int | float | str)}


def _matched(patterns: dict[str, str], text: str) -> dict:
    """What follows each pattern in `text`; a value not of its key's type is a front end's own, left out."""
    meta: dict[str, Any] = {}
    for key, pattern in patterns.items():
        value, kind = re.search(pattern, text), {"c": float, "sa": str}.get(key, int)
        try:
            meta |= {key: kind(value[1].strip())} if value else {}
        except ValueError:
            continue
    return meta


def _from_parameters(text: str) -> tuple[str | None, dict]:
    if text.lstrip().startswith("{") and (answer := _from_json(text)):
        return answer
    cut = re.search(r"^(Negative prompt:|Steps: *\d)", text, re.MULTILINE)
    line = re.search(r"^Steps: *\d.*$", text, re.MULTILINE)
    names = {"se": "Seed", "c": "CFG scale", "st": "Steps", "sa": "Sampler"}
    meta = _matched({key: rf"\b{name}: *([^,]+)" for key, name in names.items()}, line[0] if line else "")
    return text[:cut.start()] if cut else text, meta


def _from_json(text: str) -> tuple[str | None, dict] | None:
    row = _json_object(text)
    if row is None:
        return None
    for key in ("image", "sui_image_params"):  # InvokeAI 2 and SwarmUI nest what others keep flat
        row = row[key] if isinstance(row.get(key), dict) else row
    prompt = _value(row, ("positive_prompt", "prompt"))
    if isinstance(prompt, list):  # InvokeAI 2: [{"prompt", "weight"}, ...]
        prompt = ", ".join(str(p["prompt"]) for p in prompt if isinstance(p, dict) and "prompt" in p)
    return prompt if isinstance(prompt, str) else None, _settings(row)


def _from_dream(text: str) -> tuple[str, dict]:
    quoted = re.match(r'\s*"(.*)"(?=\s+-|\s*$)', text, re.DOTALL)
    prompt = quoted[1] if quoted else re.split(r"\s-[A-Za-z]\s*[\d.k]", text, maxsplit=1)[0]
    flags = {"st": "s", "se": "S", "c": "C", "sa": "A"}
    meta = _matched({key: rf"\s-{flag}\s*([\w.]+)" for key, flag in flags.items()}, text[len(prompt):])
    return re.sub(r"\s*\[[^\]]*\]", "", prompt), meta  # [in brackets] is what InvokeAI steers away from


def _from_comfy(text: str) -> tuple[str, dict] | None:
    graph = _json_object(text)
    if graph is None:  # Easy Diffusion keeps the prompt itself under the same key
        return None if text.lstrip().startswith(("{", "[")) else (text, {})
    nodes = {key: node["inputs"] for key, node in graph.items()
             if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    for wanted in ("positive", "guider"):
        for inputs in nodes.values():
            sampler = wanted in inputs and {"steps", "seed", "noise_seed", "sampler"} & inputs.keys()
            if sampler and (prompt := _comfy_text(nodes, inputs[wanted], set())):
                return prompt, _settings(inputs)
    return None


COMFY_TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "value")
COMFY_LINKS = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")


def _comfy_text(nodes: dict[str, dict], link: Any, seen: set[str]) -> str:
    """The text at the end of `link`: what the linked node's text inputs, else its conditionings, lead to."""
    if isinstance(link, str):
        return link.strip()
    if not (isinstance(link, list) and len(link) == 2) or str(link[0]) in seen:
        return ""
    inputs = nodes.get(str(link[0]), {})
    seen.add(str(link[0]))
    side = "negative" if link[1] == 1 and "negative" in inputs else "positive"  # ControlNet hands on both
    for keys in (COMFY_TEXTS, (*COMFY_LINKS, side)):
        texts = [_comfy_text(nodes, inputs[key], seen) for key in keys if key in inputs]
        if any(texts):
            return ", ".join(dict.fromkeys(text for text in texts if text))
    return ""


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


def split(prompts: Sequence[str], seed: int, val: int | None = None,
          test: int | None = None) -> dict[str, np.ndarray]:
    """Rows of "train", "val" and "test": sorted int64 indices, disjoint, covering, equal on every platform.

    val, test: rows wanted; None = 30,000 as in the paper (670K / 30K / 30K), or an eighth of all if that is
    less. Rows whose prompts are equal but for case and spacing stay together, so where prompts repeat the
    counts may differ a little. Raises DataError where there are too few distinct prompts.
    """
    n = len(prompts)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(" ".join(prompt.casefold().split()), []).append(i)
    default = max(1, min(30_000, n // 8))
    wanted = {"test": default if test is None else test, "val": default if val is None else val}
    if len(groups) < 3 or min(wanted.values()) < 1 or sum(wanted.values()) >= n:
        raise DataError(f"{n} pairs with {len(groups)} distinct prompts cannot give {wanted['val']} for "
                        f"validation, {wanted['test']} for test and more for training; give more pairs or "
                        "ask for fewer")
    chosen: dict[str, list[list[int]]] = {"test": [], "val": [], "train": []}
    room = dict(wanted)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))
    members = list(groups.values())
    for group in (members[g] for g in order.tolist()):
        name = next((name for name in wanted if len(group) <= room[name]), "train")
        chosen[name].append(group)
        if name != "train":
            room[name] -= len(group)
    for name in (name for name in wanted if not chosen[name]):  # all groups were too large: take the smallest
        smallest = min(range(len(chosen["train"])), key=lambda g: len(chosen["train"][g]))
        chosen[name].append(chosen["train"].pop(smallest))
    if not chosen["train"]:
        raise DataError(f"{n} pairs with {len(groups)} distinct prompts leave none to train on; give more")
    return {name: np.sort(np.asarray([i for group in chosen[name] for i in group], np.int64))
            for name in ("train", "val", "test")}


# ============================================================================================================
# Images
# ============================================================================================================

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 29
FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "GIF", "TIFF")  # for an EPS named x.png Pillow starts Ghostscript


@contextmanager
def _opened(source: str | Path | bytes, where: str) -> Iterator[Image.Image]:
    """The image, opened and not yet decoded; whatever goes wrong inside the block becomes a DataError."""
    try:
        if not (len(source) if isinstance(source, bytes) else os.stat(source).st_size):
            raise DataError(f"{where}: the file is empty (0 bytes); fetch it again or remove it")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            yield image
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

    Raises DataError, naming `where` (the path by default), for a missing, empty, damaged, truncated or
    unknown file and, before anything is decoded, for more than 100 megapixels.
    """
    with _opened(source, where or ("image" if isinstance(source, bytes) else str(source))) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


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
TENSORS_BY_LANCZOS = tuple(map(int, torchvision.__version__.split(".")[:2])) >= (0, 27)


def image_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """The picture resized, cropped to the centre and normalised -> (3, h, w) float32.

    Pillow resizes strips, and by lanczos before torchvision 0.27, under either rules: hard edges and noise
    may differ by some grey levels there, as they do between versions of Pillow.
    """
    image = _rgb(image)
    height, width = preprocessing.scaled(image.height, image.width)
    h, w = preprocessing.size
    top, left = preprocessing.offset(height, h), preprocessing.offset(width, w)
    interpolation = InterpolationMode[preprocessing.filter.upper()]
    if max(height / h, width / w) > STRIP:  # enlarged whole, one of 1 x 20,000 would take gigabytes
        rows, columns = (max(top, 0), min(top + h, height)), (max(left, 0), min(left + w, width))
        image = _resized_part(image, (height, width), rows, columns, preprocessing.filter)
        levels, top, left = TF.pil_to_tensor(image), min(top, 0), min(left, 0)
    elif preprocessing.rules == "transformers" and (preprocessing.filter != "lanczos" or TENSORS_BY_LANCZOS):
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
    given: dict[str, Any] = {}
    if path.suffix in (".txt", ".json"):
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
        if path.suffix == ".txt":
            lines = text.removesuffix("\n").split("\n")
            if len(lines) != pairs.n_read:
                raise DataError(f"{path}: {len(lines)} lines for {pairs.n_read} pairs; give one line a pair")
            return [lines[i].strip() for i in pairs.row.tolist()]
        given = _json_object(text)
        if given is None:
            raise DataError(f"{path}: is not a JSON object {{image: caption}}; write it so")
    else:
        for _, row in _records(path):
            name = _value(row or {}, IMAGE_KEYS)
            given |= {name: _value(row, ("caption", *TEXT_KEYS))} if isinstance(name, str) else {}
    given = {name: text.strip() for name, text in given.items() if isinstance(text, str)}
    by_file = {PurePosixPath(name).name: text for name, text in given.items() if "!" not in name}
    names, files = Counter(pairs.names), Counter(PurePosixPath(name).name for name in pairs.names)
    captions: list[str | None] = []
    for k, name in zip(pairs.archive.tolist(), pairs.names, strict=True):
        file = PurePosixPath(name).name
        caption = given.get(f"{pairs.archives[k].name}!{name}")
        if caption is None and names[name] == 1:
            caption = given.get(name)
        if caption is None and files[file] == 1:
            caption = by_file.get(file)
        captions.append(caption)
    missing = captions.count(None)
    if missing == len(captions):
        raise DataError(f"{path}: none of {len(given)} captions is for one of the {len(pairs)} images; name "
                        f"them like {', '.join(pairs.names[:1])}")
    if missing:
        logger.warning("%s: no caption for %d of %d images; theirs are empty", path, missing, len(pairs))
    return [caption or "" for caption in captions]


# ============================================================================================================
# Files
# ============================================================================================================


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write the file whole or not at all: a temporary file beside it, synced, takes its place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: str | Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the folder's lock: wait for another process that holds it, logging `waiting`, or, where `waiting`
    is None, raise BlockingIOError. The system releases the lock however the process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            logger.warning(waiting)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
