"""Time of loading beside reading the file, and memory beside the file's size.

    python benchmarks/loading.py                  every entry of the registry, in two dialects each
    python benchmarks/loading.py clip-h-14 vit-l-16 --rounds 9

Each case is a file of full size with random values, written for it and deleted after it. A separate process
imports the project, loads once and records the rise of its peak memory. Then reading (the whole file into
fresh memory) and loading take turns, both from the page cache. The time's ratio is the median over the
rounds of load / read of the same round; the peak's is bytes held / bytes of the file. At the end every
loaded tensor is compared with the file, bit by bit. Linux only (/proc).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weights
from weights.kinds import KINDS, blip, blip2
from weights.registry import ENTRIES

DTYPES = {"float32": (torch.float32, "F32"), "float16": (torch.float16, "F16"),
          "bfloat16": (torch.bfloat16, "BF16")}


@dataclass(frozen=True)
class Case:
    """One file: an entry's part of one kind, in one dialect; with a prefix it lies in a single file of Stable
    Diffusion, without one in a folder with a config.json."""

    entry: str
    kind: str
    dialect: str
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.entry} {self.kind} {self.dialect}"


@dataclass(frozen=True)
class Result:
    """Seconds, and bytes of memory; `same` where every tensor is the file's."""

    size: int
    read: float
    load: float
    ratio: float
    peak: int
    same: bool


def cases(entry: str) -> list[Case]:
    """The home dialect and, if any, a second one of each part of an entry."""
    kinds = [kind for kind in ENTRIES[entry].kinds if kind not in ("tokenizer", "unet-encoder")]
    return [Case(entry, kind, *dialect) for kind in kinds for dialect in _dialects(entry, kind)]


def _dialects(entry: str, kind: str) -> list[tuple[str, ...]]:
    if entry == "sd-mini":  # a single file does not contain its sizes
        return [("diffusers",)]
    if kind == "clip-text" and entry.startswith("clip"):
        return [("diffusers",)]
    if kind == "clip-text":
        one, two = KINDS[kind].single_file
        return [("diffusers",), ("open_clip", two) if entry == "sd-2" else ("diffusers", one)]
    if kind in ("unet", "vae"):
        return [("ldm", KINDS[kind].single_file[0]), ("diffusers",)]
    return {
        "minilm": [("hf",), ("hf-prefixed",)],
        "vit": [("timm",), ("hf",)],
        "swin": [("timm",), ("hf-v2" if entry.startswith("swinv2") else "hf",)],
        "clip-vision": [("hf",), ("open_clip",)],
        "blip": [("hf",)],
        "blip2": [("hf",)],
    }[kind]


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


def write(case: Case, folder: Path, dtype: str = "float32") -> Path:
    """The source for `weights.load`; writes the case's file with random values, and the files beside it."""
    config = KINDS[case.kind].configs[case.entry]
    with torch.device("meta"):
        home = weights.build(case.kind, config).state_dict()
    theirs = weights.from_home(case.kind, home, case.dialect)
    path = folder / "model.safetensors"
    _write_random(path, {case.prefix + name: tensor for name, tensor in theirs.items()}, dtype)
    if case.prefix:
        return path
    open_clip = case.dialect == "open_clip"
    described = DESCRIBED[case.kind](config, case.dialect)
    (folder / ("open_clip_config.json" if open_clip else "config.json")).write_text(json.dumps(described))
    if KINDS[case.kind].tokenizer:
        own = (blip2.BEGIN, blip2.PAD) if case.kind == "blip2" else (*blip.BERTS_OWN, *blip.BLIPS_OWN)
        words = {word: i for i, word in enumerate(own)}
        words |= {token: getattr(config, name) for name, token in KINDS[case.kind].tokens.items()}
        Tokenizer(WordPiece(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


def _write_random(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """A safetensors file of these shapes, straight from one tile of random bytes: no tensor is ever made."""
    torch_dtype, code = DTYPES[dtype]
    tile = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch_dtype).view(torch.uint8)
    bytes_of, item = memoryview(tile.numpy()), torch_dtype.itemsize
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * item
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, tensor in enumerate(tensors.values()):
            left, at = tensor.numel() * item, 997 * i * item % len(bytes_of)  # no two tensors alike
            while left:
                part = bytes_of[at : at + left]
                file.write(part)
                left, at = left - len(part), 0
        file.flush()
        os.fsync(file.fileno())  # or writing would continue during the measurement


def _vit(c: Any, dialect: str) -> dict[str, Any]:
    if dialect == "timm":
        sizes = asdict(c)
        sizes["mlp_ratio"] = (sizes.pop("hidden_features") + 0.5) / c.embed_dim
        del sizes["norm_eps"]
        return {"architecture": "vit_base_patch16_224", "model_args": sizes}
    return {"model_type": "vit", "image_size": c.img_size, "patch_size": c.patch_size,
            "hidden_size": c.embed_dim, "num_hidden_layers": c.depth, "num_attention_heads": c.num_heads,
            "intermediate_size": c.hidden_features}


def _swin(c: Any, dialect: str) -> dict[str, Any]:
    sizes = asdict(c)
    version = sizes.pop("version")
    if version == 1:
        del sizes["pretrained_window_sizes"]
    if dialect == "timm":
        return {"architecture": f"swin{'v2' if version == 2 else ''}_tiny", "model_args": sizes}
    return sizes | {"model_type": "swinv2" if version == 2 else "swin", "image_size": sizes["img_size"]}


def _clip_vision(c: Any, dialect: str) -> dict[str, Any]:
    if dialect == "hf":
        return asdict(c) | {"model_type": "clip_vision_model"}
    return {"model_cfg": {
        "embed_dim": c.projection_dim, "quick_gelu": c.hidden_act == "quick_gelu",
        "vision_cfg": {"layers": c.num_hidden_layers, "width": c.hidden_size,
                       "head_width": c.hidden_size // c.num_attention_heads, "image_size": c.image_size,
                       "patch_size": c.patch_size, "mlp_ratio": c.intermediate_size / c.hidden_size},
    }}


def _unet(c: Any, dialect: str) -> dict[str, Any]:
    widths = [c.model_channels * m for m in c.channel_mult]
    cross = ["CrossAttn" if level in c.attention_levels else "" for level in range(len(widths))]
    return {"_class_name": "UNet2DConditionModel", "in_channels": c.in_channels,
            "out_channels": c.out_channels, "block_out_channels": widths,
            "layers_per_block": c.num_res_blocks,
            "down_block_types": [f"{kind}DownBlock2D" for kind in cross],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
            "cross_attention_dim": c.context_dim, "attention_head_dim": [c.heads(width) for width in widths],
            "use_linear_projection": c.use_linear_in_transformer}


def _vae(c: Any, dialect: str) -> dict[str, Any]:
    levels = len(c.ch_mult)
    return {"_class_name": "AutoencoderKL", "in_channels": c.in_channels, "out_channels": c.out_ch,
            "block_out_channels": [c.ch * m for m in c.ch_mult], "layers_per_block": c.num_res_blocks,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "latent_channels": c.z_channels,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": c.norm_groups,
            "scaling_factor": c.scale_factor}


# These sizes in a config.json or open_clip_config.json.
DESCRIBED: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "vit": _vit, "swin": _swin, "clip-vision": _clip_vision, "unet": _unet, "vae": _vae,
    "clip-text": lambda config, dialect: asdict(config) | {"model_type": "clip_text_model"},
    "minilm": lambda config, dialect: asdict(config) | {"model_type": "bert"},
    "blip": lambda config, dialect: blip.published(config),
    "blip2": lambda config, dialect: blip2.published(config),
}


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def run(entry: str, folder: Path, dtype: str = "float32", rounds: int = 5) -> Iterator[tuple[Case, Result]]:
    """Every case of an entry, one after another; `folder` holds one file at a time, and none at the end."""
    for case in cases(entry):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source = write(case, Path(place), dtype)
            command = [sys.executable, __file__, "--child", json.dumps([*asdict(case).values()]), str(source),
                       "--dtype", dtype, "--rounds", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{case}: {done.stderr.strip()}")
            yield case, Result(**json.loads(done.stdout))


def measure(case: Case, source: Path, dtype: torch.dtype, rounds: int) -> Result:
    """In a process that has loaded nothing yet."""
    path = source if case.prefix else source / "model.safetensors"

    def load() -> torch.nn.Module:
        return weights.load(case.kind, source, dtype=dtype)

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after the imports
    before = _memory("VmRSS")
    load()
    peak = _memory("VmHWM") - before
    reads, loads = [], []
    for _ in range(rounds):
        reads.append(_seconds(lambda: _read(path)))
        loads.append(_seconds(load))
    ratio = statistics.median(b / a for a, b in zip(reads, loads, strict=True))
    size, read, loaded = path.stat().st_size, statistics.median(reads), statistics.median(loads)
    return Result(size, read, loaded, ratio, peak, same(case, source, dtype))


def same(case: Case, source: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Whether every tensor of the loaded model is the file's, bit by bit."""
    path = source if case.prefix else source / "model.safetensors"
    loaded = weights.load(case.kind, source, dtype=dtype).state_dict()
    stored = {name.removeprefix(case.prefix): tensor for name, tensor in load_file(path).items()}
    expected = weights.to_home(case.kind, stored, case.dialect)
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


def _read(path: Path) -> None:
    """The whole file into fresh memory."""
    whole = torch.empty(path.stat().st_size, dtype=torch.uint8)
    view, done = memoryview(whole.numpy()), 0
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(view[done:]):
            done += read


def _seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def _memory(field: str) -> int:
    """Bytes: VmRSS is what this process holds, VmHWM the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


HEADING = f"{'entry':11} {'kind':11} {'dialect':11} {'file':>9} {'read':>8} {'load':>8}  load/read  peak/file"


def line(case: Case, result: Result) -> str:
    """A row of the table under HEADING."""
    return (f"{case.entry:11} {case.kind:11} {case.dialect:11} {result.size / 1e6:6.0f} MB "
            f"{result.read:7.3f}s {result.load:7.3f}s {result.ratio:10.3f} {result.peak / result.size:10.3f}"
            f"{'' if result.same else '  NOT THE FILE'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in ENTRIES if cases(name)]
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of file and model")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--folder", type=Path, help="for the files, up to 15 GB (default: the temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the case to measure in this process
    args = parser.parse_args()
    if args.child:
        case, source = Case(*json.loads(args.child)), Path(args.entries[0])
        print(json.dumps(asdict(measure(case, source, DTYPES[args.dtype][0], args.rounds))))
        return
    if unknown := set(args.entries) - set(known):
        parser.error(f"unknown entry: {', '.join(unknown)}; choose from {', '.join(known)}")
    print(f"{args.dtype}, torch {torch.__version__}, {args.rounds} rounds\n{HEADING}")
    for entry in args.entries or known:
        for case, result in run(entry, args.folder or Path(tempfile.gettempdir()), args.dtype, args.rounds):
            print(line(case, result), flush=True)


if __name__ == "__main__":
    main()
