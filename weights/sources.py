"""Sources: finding, parsing and reading them, and `load`, which puts everything together."""

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from files import expanded
from schema import TEXT, by_name, check, one_of, read_json
from weights.dialects import Dialect, Recipe, map_names, their_names, to_ours, to_theirs
from weights.fetch import damage, ensure, name_of, where
from weights.files import FIELDS, Stored, read_config, refuse_pickle, stored_tensors
from weights.kinds import KINDS, find_kind
from weights.kinds.sd import SINGLE_FILE_IGNORED
from weights.options import Kind, build_on_meta, built, name_in, sizes_of
from weights.registry import DEFAULTS, ENTRIES, FOLDERS, Entry
from weights.strict import WeightsError, listed, load_strict
from weights.tokenizer import END, ClipTokenizer, read_folder

log = logging.getLogger("weights")

# Of a folder's weights: diffusers', transformers' and timm's, open_clip's
STEMS = ("diffusion_pytorch_model", "model", "open_clip_model", "open_clip_pytorch_model")
# Full precision first
WEIGHTS = [f"{stem}.{end}" for stem in STEMS for end in ("safetensors", "safetensors.index.json")] + [
    f"{stem}.{end}" for stem in STEMS
    for end in ("fp16.safetensors", "safetensors.index.fp16.json", "fp16.safetensors.index.json")
]
SHARD = r"-\d+-of-(?!0*1\b)\d+\b"  # of several
LORA = r"(^|[._])lora[._]"  # as PEFT, diffusers and kohya-ss name its tensors
FILE_OR_INDEX = r"\.safetensors(\.index(\.\w+)?\.json)?$"
SINGLE_FILE = tuple(prefix for kind in KINDS.values() for prefix in kind.single_file)
# Of torch.compile, DataParallel and others: they wrap modules and stay in the names
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load(
    kind: str,
    source: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of that kind with the weights of `source`, in eval mode.

    kind    a name of weights.kinds.KINDS; "unet-encoder" leaves the file's decoder half alone
    source  a name of the registry (fetched at first use), a .safetensors file, a folder of diffusers (its
            root or the part's own) or of Hugging Face, whole or in shards, a repository's folder in the hub's
            cache, or a single file of Stable Diffusion; None = the kind's default. A registry name wins over
            a file of that name. Prefixes that wrappers of modules leave in names are dropped.
    dtype   of the model, whatever the file holds; what needs float32 (Kind.full_precision) keeps it

    Sizes come from config.json; a file without one must have the names and shapes of a published model. A
    text_encoder folder is used whole, as Stable Diffusion 2's was cut before its last layer when it was
    published; from a single file of Stable Diffusion 2, which holds all 24 layers, the last is dropped.

    Raises WeightsError, one line, for anything that is not as it should be; nothing is half-loaded. A part of
    this repository's own that is not in it yet is initialised instead, and a warning states it.
    """
    if not dtype.is_floating_point:
        raise WeightsError(f"{dtype}: a model's numbers are floating ones; give torch.float32 or smaller")
    device = "meta" if str(device) == "meta" else resolve_device(str(device))
    source = _source(kind, source)
    if entry := missing_miniature(kind, source):
        return _initialised(KINDS[kind], entry).to(device, dtype).eval()
    entry, parsed = KINDS[kind], read(kind, source)
    model = build_on_meta(entry, parsed.config, parsed.where).to(dtype)
    for name, parameter in model.named_parameters():
        if dtype.itemsize < 4 and re.fullmatch(entry.full_precision, name):
            parameter.data = parameter.data.float()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.to(dtypes.get(name, dtype)) if tensor.is_floating_point() else tensor
               for name, tensor in parsed.tensors(skip=entry.ignore)}
    load_strict(model, tensors, source=parsed.where, their_name=parsed.their_name, copy=False)
    parsed.check_tied()
    if entry.tokenizer:
        model.tokenizer = _fitting_tokenizer(parsed)
    return model.to(device).eval()


def require_fed(source: str | os.PathLike | None, *kinds: str) -> None:
    """Raise WeightsError unless the `kinds` in `source` read what they are fed here: pictures in three
    colours, latents, texts of 77 known tokens, and each other's outputs. Nothing but tokenizers is loaded."""
    sizes = {kind: config(kind, source) for kind in kinds}
    for kind, found in sizes.items():
        entry, where = KINDS[kind], f"{source or DEFAULTS[kind]}: the {kind} cannot be used here"
        check(vars(found), entry.fed, where)
        for name, (other, theirs) in entry.reads.items():
            check(vars(found), {name: one_of(getattr(sizes[other], theirs))} if other in sizes else {}, where)
        if entry.clip_tokenizer:
            _require_known(load_tokenizer(source).tokenizer, found.vocab_size, where)
        elif entry.tokenizer and not missing_miniature(kind, _source(kind, source)):
            _fitting_tokenizer(read(kind, _source(kind, source)))


def _fitting_tokenizer(parsed: "WeightsSource") -> Tokenizer:
    """The model's tokenizer. Raises WeightsError if its numbers are not the model's."""
    tokenizer, sizes = parsed.kind.tokenizer(parsed.folder), asdict(parsed.config)
    _require_known(tokenizer, sizes.get("vocab_size") or sizes["text_vocab_size"], str(parsed.folder))
    for name, token in parsed.kind.tokens.items():
        if (number := tokenizer.token_to_id(token)) != sizes[name]:
            raise WeightsError(f"{parsed.folder}: {token} is {number} in the tokenizer and {sizes[name]} in "
                               f"the model ({name}); fetch the tokenizer again")
    return tokenizer


def _require_known(tokenizer: Tokenizer, size: int, where: str) -> None:
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:
        raise WeightsError(f"{where}: the tokenizer's ids reach {largest}, and the model has {size} tokens; "
                           f"fetch the tokenizer of these weights")


def config(kind: str, source: str | os.PathLike | None = None) -> Any:
    """The sizes of the `kind` in `source` (see `load`). Raises WeightsError as `load` does."""
    source = _source(kind, source)
    entry = missing_miniature(kind, source)
    return KINDS[kind].configs[entry.name] if entry else read(kind, source).config


def build(kind: str, config: Any, where: str = "") -> nn.Module:
    """The kind's model with fresh values, on torch's default device.

    `config` is the kind's configuration, or the dict that JSON gave back of it; `where` names it in errors.
    Raises WeightsError for an unknown kind, and for sizes that are missing, unless they have a default,
    unknown, or do not fit.
    """
    entry, where = find_kind(kind), where or f"a {kind}"
    if isinstance(config, Mapping):
        defaults = {field.name: field.default for field in fields(entry.config)}
        needed = {name for name, default in defaults.items() if default is MISSING}
        if not needed <= set(config) <= set(defaults):
            raise WeightsError(f"{where}: the sizes of a {kind} are {', '.join(sorted(defaults))}; got "
                               f"{', '.join(config)}")
        check({name: value for name, value in config.items() if value is not None}, FIELDS, where)
        config = entry.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    return built(entry, config, where)


def to_home(kind: str, tensors: Mapping[str, Tensor], dialect: str | None = None) -> dict[str, Tensor]:
    """Tensors of any dialect under our names (and in our shapes); None = the dialect that has such names.

    Names come without a single file's prefix; those without a row stay as they are. Tensors that are not
    stacked share memory with `tensors`. Raises WeightsError as `map_names`, and for an unknown dialect.
    """
    entry = find_kind(kind)
    return to_ours(entry.dialect(dialect) if dialect else entry.dialect_of(tensors), tensors)


def from_home(kind: str, tensors: Mapping[str, Tensor], dialect: str = "diffusers") -> dict[str, Tensor]:
    """The reverse of `to_home`, for writing: tensors under our names -> under the names of `dialect`.

    Tensors that we drop are not invented. Raises WeightsError for a dialect that the kind does not
    have, and for a q without its k and v where they are stored as one.
    """
    return to_theirs(find_kind(kind).dialect(dialect), tensors)


def _source(kind: str, source: str | os.PathLike | None) -> str | os.PathLike:
    """The source, or the kind's default. Raises WeightsError for a kind that is unknown or not in it."""
    find_kind(kind)
    source = DEFAULTS[kind] if source is None else source
    entry = ENTRIES.get(str(source))
    if entry and kind not in entry.kinds:
        raise WeightsError(f"{entry.name} has no {kind}; it has {', '.join(entry.kinds)}")
    return source


def missing_miniature(kind: str, source: str | os.PathLike) -> Entry | None:
    """The registry entry of `source` if it is this repository's own and that part is not trained yet."""
    entry = ENTRIES.get(str(source))
    return entry if entry and entry.folder and not holds(kind, entry.folder) else None


def _initialised(kind: Kind, entry: Entry) -> nn.Module:
    """A model of the entry's sizes with seeded random values: always the same ones."""
    log.warning("%s: the %s is NOT TRAINED: initialised with seed 0", entry.name, kind.name)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = kind.model(kind.configs[entry.name])
    if kind.tokenizer:
        model.tokenizer = kind.tokenizer(entry.folder)
    return model


@dataclass(frozen=True)
class WeightsSource:
    """One model in a source, its tensors unread."""

    kind: Kind
    where: str  # its name in errors
    folder: Path  # with its config.json, tokenizer and pictures' settings
    dialect: Dialect
    config: Any
    stored: Mapping[str, Stored]  # the file's tensors under their names
    recipes: Mapping[str, Recipe]  # our names -> how to make them of those
    their_name: Callable[[str], str]  # our name -> the file's

    def tensors(self, skip: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, read one after another in the order and the dtypes of the file; none whose
        name matches a regex of `skip`."""
        read = self._reader()
        for name, make in self.recipes.items():
            if not any(re.fullmatch(pattern, name) for pattern in skip):
                yield name, make(read)

    def _reader(self) -> Callable[[str], Tensor]:
        """Their name -> tensor; the last one is kept, as the parts of a stack come one after another."""
        return functools.lru_cache(maxsize=1)(lambda name: self.stored[name].read())

    def check_tied(self) -> None:
        """Raise WeightsError where a tensor that is dropped as a copy of ours has other values."""
        read = self._reader()
        for theirs, ours in self.kind.tied.items():
            if theirs in self.stored and not torch.equal(read(theirs), self.recipes[ours](read)):
                raise WeightsError(f"{self.where}: {theirs} differs from {self.their_name(ours)}; here both "
                                   f"are one parameter, so one of the two would be lost")


def read(kind: str, source: str | os.PathLike) -> WeightsSource:
    """The `kind` in `source`, parsed once for each state of its files. Raises WeightsError as `load`."""
    path = resolve(source, kind)
    path = part_folder(kind, path) if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    files = {path, *folder.glob("*.json"), *folder.glob("*.safetensors")}
    stats = [(file.absolute(), file.stat()) for file in sorted(files) if file.exists()]
    return _read(KINDS[kind], path, tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@functools.lru_cache(maxsize=32)
def _read(kind: Kind, path: Path, state: tuple) -> WeightsSource:
    folder, where = path if path.is_dir() else path.parent, str(path)
    raw = stored_in(path, kind)
    single = any(name.startswith(SINGLE_FILE) for name in raw)
    prefix = _part_prefix(kind, raw, where) if single else ""
    stored = {name.removeprefix(prefix): entry for name, entry in raw.items() if name.startswith(prefix)}
    for copy, ours in kind.tied.items():  # of two equal tensors, a file may hold the other one alone
        if copy in stored and ours not in stored:
            stored[ours] = stored.pop(copy)
    beside = None if single else _config_file(kind, folder, own=path.is_dir())
    stated = read_config(beside) if beside else None
    if stated and (named := name_in(stated)) and not kind.owns(stated):
        right = " or ".join(sorted(kind.classes))
        raise WeightsError(f"{beside} describes a {named}, not a {kind.name} ({right})")
    try:
        dialect = kind.dialect_of(stored)
        recipes = map_names(dialect, stored)
        home = {name: make(lambda theirs: stored[theirs].meta()) for name, make in recipes.items()}
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error
    sizes = sizes_of(kind, stated, home, str(beside or where), dialect, single)
    sizes = replace(sizes, **kind.beside(folder))
    if single:
        numbers = {field: raw[name] for name, field in kind.single_sizes.items() if name in raw}
        read_numbers = {field: entry.read() for field, entry in numbers.items()}
        sizes = replace(sizes, **{field: float(x) for field, x in read_numbers.items() if x.numel() == 1})
    check({name: value for name, value in vars(sizes).items() if value is not None}, FIELDS, beside or where)
    their_name = their_names(dialect, stored)
    return WeightsSource(
        kind, where, folder, dialect, sizes, stored, recipes, lambda name: prefix + their_name(name)
    )


def _part_prefix(kind: Kind, raw: Iterable[str], where: str) -> str:
    """The kind's prefix in a single file, all of whose tensors must belong to a part or be known."""
    prefix = next((p for p in kind.single_file if any(name.startswith(p) for name in raw)), None)
    if prefix is None:
        prefixes = " or ".join(kind.single_file) or "a prefix of that kind"
        raise WeightsError(f"{where}: a single file of Stable Diffusion without a {kind.name} (nothing "
                           f"begins with {prefixes})")
    if unknown := [name for name in raw if not name.startswith(SINGLE_FILE)
                   and not any(re.fullmatch(pattern, name) for pattern in SINGLE_FILE_IGNORED)]:
        raise WeightsError(f"{where}: {len(unknown)} tensors belong to no part of Stable Diffusion 1 or 2: "
                           f"{listed(unknown)}")
    return prefix


def _config_file(kind: Kind, folder: Path, own: bool) -> Path | None:
    """The file in the folder that states the sizes, if there is one. Beside a lone file (`own` False) it
    counts only if it is of that kind."""
    path, second = folder / "config.json", folder / (kind.second_config or "config.json")
    if path.is_file() and kind.owns(read_config(path)):
        return path
    if kind.second_config and second.is_file():
        return second
    return path if own and path.is_file() else None


def resolve(source: str | os.PathLike, part: str | None = None) -> Path:
    """The file or folder of a source; a registry entry's missing files of that part are fetched first."""
    entry = ENTRIES.get(str(source))
    if entry:
        return entry.folder or ensure(entry, part)
    path = expanded(source)
    if not path.exists():
        names = ", ".join(ENTRIES)
        raise WeightsError(f"{source}: no such file or folder, and no name of the registry ({names})")
    return _snapshot(path) if (path / "snapshots").is_dir() else path


def _snapshot(root: Path) -> Path:
    """The snapshot in a repository's folder of the hub's cache: that of refs/main, or the only one."""
    snapshots, main = sorted((root / "snapshots").iterdir()), root / "refs" / "main"
    current = root / "snapshots" / main.read_text("utf-8").strip() if main.is_file() else None
    if current in snapshots or len(snapshots) == 1:
        return current if current in snapshots else snapshots[0]
    names = listed([f"snapshots/{path.name}" for path in snapshots]) or "none"
    raise WeightsError(f"{root}: refs/main does not name one of its snapshots ({names}); give one of them")


def part_folder(kind: str, root: Path) -> Path:
    """The folder of one part: root/vae for "vae" and so on, or `root` itself where it is the part's own."""
    inside = root / FOLDERS.get(kind, kind)
    if not inside.is_dir() and (root / "model_index.json").is_file():
        raise WeightsError(f"{root} is a diffusers folder without {inside.name}/, where its {kind} would be")
    return inside if inside.is_dir() else root


def holds(kind: str, root: Path) -> bool:
    """Whether the folder has weights of that kind, without looking into them."""
    return weights_file(part_folder(kind, root)) is not None


def weights_file(folder: Path, kind: Kind | None = None) -> Path | None:
    """The folder's weights, or the index of their shards: full precision first, then fp16, then a lone one
    of any name; of several, as timm's and open_clip's side by side, the first that holds that kind."""
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if kind and len(named) > 1:
        return next((file for file in named if kind.find_dialect(_tensors(file))), named[0])
    files = [path for path in folder.glob("*.safetensors*") if re.search(FILE_OR_INDEX, path.name)]
    lone = [path for path in files if not re.search(SHARD, path.name)]
    return named[0] if named else lone[0] if len(lone) == 1 else None


def stored_in(path: Path, kind: Kind | None = None) -> dict[str, Stored]:
    """The tensors of a file, or of a folder's weights (of that kind): one file or shards with their index."""
    file = weights_file(path, kind) if path.is_dir() else path
    if file is None:
        for pickled in sorted(path.iterdir()):
            refuse_pickle(pickled)
        usual = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        others = sorted(x for x in path.iterdir() if re.search(r"\.safetensors|^models--", x.name))
        if lost := [other.name for other in others if not other.exists()]:
            raise WeightsError(f"{path}: {listed(lost)}: a link to a file that is gone; fetch it again")
        shards = others and all(re.search(SHARD, other.name) for other in others)
        do = "shards; fetch their index (.safetensors.index.json) too" if shards else "give or rename one"
        shown = f" but {listed([other.name for other in others])}; {do}" if others else ""
        raise WeightsError(f"{path} holds no weights ({usual}){shown}")
    return _tensors(file)


def _tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file, or of the shards of an index."""
    if file.suffix == ".json" and not re.search(FILE_OR_INDEX, file.name):
        raise WeightsError(f"{file}: neither a .safetensors file nor an index of shards; give its folder")
    stored = stored_tensors(file) if file.suffix != ".json" else _shards(file)
    if any(re.search(LORA, name) for name in stored):
        raise WeightsError(f"{file}: a LoRA, changes to the weights of a model; give that model itself")
    return _unwrapped(stored, file)


def _unwrapped(stored: Mapping[str, Stored], file: Path) -> dict[str, Stored]:
    """The tensors under their names without WRAPPERS and, if no kind has such names, without a beginning that
    all share."""
    names = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in stored}
    while names and not _known(".".join(parts) for parts in names.values()):
        if len({parts[0] for parts in names.values()}) > 1 or min(map(len, names.values())) < 2:
            return dict(stored)
        names = {name: parts[1:] for name, parts in names.items()}
    renamed = {".".join(parts): stored[name] for name, parts in names.items()}
    if len(renamed) < len(stored):
        raise WeightsError(f"{file}: several tensors have one name once {', '.join(WRAPPERS)} are left out")
    if changed := [name for name in stored if name not in renamed]:
        log.warning("%s: %d names begin otherwise than published ones (%s); that is left out", file,
                    len(changed), changed[0])
    return renamed


def _known(names: Iterable[str]) -> bool:
    names = list(names)
    return any(name.startswith(SINGLE_FILE) for name in names) or any(
        kind.find_dialect(names) for kind in KINDS.values()
    )


def _shards(file: Path) -> dict[str, Stored]:
    """The tensors of an index, each from the shard that it names."""
    names = read_json(file, {"weight_map": by_name(TEXT)})["weight_map"]
    if not names:
        raise WeightsError(f"{file}: its weight_map is empty, so it is no index of shards; fetch it again")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise WeightsError(f"{file} points outside its folder: {shard}")
        if not (file.parent / shard).is_file():
            raise WeightsError(f"{file} names the shard {shard}, which is missing; fetch it too")
        held = stored_tensors(file.parent / shard)
        stored |= {name: entry for name, entry in held.items() if names.get(name, shard) == shard}
    if missing := [name for name in names if name not in stored]:
        raise WeightsError(f"{file}: {len(missing)} tensors are not in the shard it names: {listed(missing)}")
    return stored


def resolve_device(device: str) -> str:
    """"auto" as "cuda" or "cpu". Raises WeightsError for a device that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the meta device holds no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"--device {device}: not available here ({reason})") from error
    return device


def load_tokenizer(source: str | os.PathLike | None = None) -> ClipTokenizer:
    """The tokenizer that belongs to a source of a text tower, as for `load`; None = "sd-1".

    Padding is the end token for Stable Diffusion 1 and "!" (id 0) for 2, as the folder's
    tokenizer_config.json or special_tokens_map.json states. A single file holds no vocabulary: CLIP's own is
    fetched once. Raises WeightsError if none is found or it is damaged.
    """
    source = "sd-1" if source is None else source
    entry = ENTRIES.get(name_of(source))
    path = resolve(entry.tokenizer if entry and entry.tokenizer else source, "tokenizer")
    if path.is_dir():
        return read_folder(path)
    second = any(name.startswith(KINDS["clip-text"].single_file[1]) for name in stored_in(path))
    return read_folder(ensure(ENTRIES["clip-tokenizer"]), pad="!" if second else END)


def fingerprint(kind: str, source: str | os.PathLike | None = None) -> str:
    """SHA-256 of the sizes and all tensors of the `kind` in `source`, and of its tokenizer."""
    source = _source(kind, source)
    entry = KINDS[kind]
    sizes = config(kind, source)
    # An optional size that is absent is left out, so that adding one to a kind changes no key.
    stated = [(f.name, value) for f in fields(sizes) if (value := getattr(sizes, f.name)) != f.default]
    digest = hashlib.sha256(f"{kind} {sorted(stated)}".encode())
    if entry.clip_tokenizer:
        digest.update(load_tokenizer(source).tokenizer.to_str().encode())
    if missing_miniature(kind, source):
        digest.update(f"seed 0, torch {torch.__version__}".encode())
        return digest.hexdigest()
    parsed = read(kind, source)
    if entry.tokenizer:
        digest.update(entry.tokenizer(parsed.folder).to_str().encode())
    each = []
    for name, tensor in parsed.tensors():
        one = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        one.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        each.append(one.hexdigest())
    digest.update("".join(sorted(each)).encode())
    return digest.hexdigest()


def kinds_in(path: Path) -> list[str]:
    """The kinds of model that a file or folder holds. Raises WeightsError if there is none."""
    kinds = [kind for kind in KINDS.values() if not kind.part_of]
    parts = [kind.name for kind in kinds if kind.name in FOLDERS and (path / FOLDERS[kind.name]).is_dir()]
    if parts:
        return parts
    raw = stored_in(path)
    found = [kind.name for kind in kinds if any(key.startswith(kind.single_file) for key in raw)]
    found = found or [kind.name for kind in kinds if kind.find_dialect(raw)]
    if not found:
        shown = listed(list(raw)[:3])
        raise WeightsError(f"{path}: no kind of model known here; its tensors are {shown} ...")
    return found


def verify(source: str | os.PathLike) -> Iterator[str]:
    """Hash (where hashes are registered), parse and strictly load all of a source; a line for each.

    Raises WeightsError at the first thing that is not sound.
    """
    entry = ENTRIES.get(str(source))
    path = where(entry) if entry else resolve(source)
    for name, sha256 in entry.files.items() if entry else ():
        if problem := damage(path / name, sha256):
            fetch = f"`python -m weights fetch {entry.name}` brings it"
            raise WeightsError(f"{path / name} is {problem}; {fetch}")
        yield f"{name}: {'sha256 as registered' if sha256 else 'here, no sha256 is registered'}"
    for kind in [kind for kind in entry.kinds if kind in KINDS] if entry else kinds_in(path):
        if missing_miniature(kind, source):
            yield f"{kind}: not in {path}: it would be initialised, untrained"
        elif not KINDS[kind].part_of:
            model = load(kind, path)
            count = sum(p.numel() for p in model.parameters())
            yield f"{kind}: {len(model.state_dict())} tensors, {count / 1e6:.1f}M parameters, all sound"
