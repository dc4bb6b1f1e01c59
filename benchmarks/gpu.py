"""One CUDA machine, measured once in under 8 minutes: parity with its CPU, speed, memory, caches, DAKL.

    python benchmarks/gpu.py                       -> results/gpu-NAME.json and .md, NAME the card's
    python benchmarks/gpu.py --again step-unet     measure these sections again
    python benchmarks/gpu.py --mini --results DIR  a dry run with miniatures, on the CPU without a GPU

Each section is a process of its own with a time limit. One that fails is recorded and the next one goes on;
a repeated call measures only the sections without a result. Weights are random: no file is needed.

parity     the relative distance |GPU - CPU| / |CPU| of outputs, in float32 without TF32 and in bf16 autocast
peak       the speed of products of 8,192 x 8,192 bf16 matrices, which stands for the card's peak
step-*     training steps of table 1's backbones at batch 64 in bf16, with the least --accumulate that fits by
           the plan (training/plan.py); their share of the peak counts products and convolutions
compile-*  the same with torch.compile, as by train.py --compile
caches     rows per second of each encoder in its batches, without reading and writing
dakl-*     fit and predict of 10,000 sources and 60,000 rows
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weights
from backbones import BACKBONES, SDReader
from files import atomic_write, write_json
from reverse_sd import Dakl
from training import plan
from training.config import TrainConfig, resolve
from weights.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
# Kind of weights -> published sizes, miniature
SIZES = {
    "minilm": ("minilm", "minilm"), "clip-text": ("sd-1", "sd-mini"), "vae": ("sd-1", "sd-mini"),
    "unet": ("sd-1", "sd-mini"), "vit": ("vit-b-16", "vit-mini"), "swin": ("swin-l", "swin-mini"),
    "clip-vision": ("clip-h-14", "clip-mini"), "blip": ("blip-base", "blip-mini"),
}  # fmt: skip


class Bench:
    """The device and the sizes of a run: published ones, or miniatures."""

    def __init__(self, device: str, mini: bool):
        self.device, self.mini = device, mini

    def model(self, kind: str, device: str | None = None) -> nn.Module:
        """A model with seeded random weights, in eval mode."""
        torch.manual_seed(0)
        with torch.device(device or self.device):
            return weights.build(kind, KINDS[kind].configs[SIZES[kind][self.mini]]).eval()

    def seconds(self, task: Callable[[], Any], rounds: int) -> float:
        """Seconds of one call, the mean of `rounds` after one to warm up."""
        for repeat in (1, rounds):
            started = self.now()
            for _ in range(repeat):
                task()
            ended = self.now()
        return (ended - started) / rounds

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory(self, task: Callable[[], Any]) -> int | None:
        """Bytes of tensors at the peak of a call; None without CUDA."""
        if self.device != "cuda":
            task()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        task()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def samples_of(kind: str, config: Any, n: int) -> list[Tensor]:
    """Random inputs of a kind, on the CPU."""
    random = torch.Generator().manual_seed(1)

    def images(size: Any) -> Tensor:
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(n, 3, height, width, generator=random)

    match kind:
        case "vit" | "swin":
            return [images(config.img_size)]
        case "clip-vision":
            return [images(config.image_size)]
        case "vae":
            return [images(256 if config.ch > 100 else 64).tanh()]
        case "unet":
            latents = torch.randn(n, 4, 32, 32, generator=random)
            context = torch.randn(n, 77, config.context_dim, generator=random)
            return [latents, torch.full((n,), 981), context]
        case "blip":
            words = torch.randint(5, config.text_vocab_size, (n, 16), generator=random)
            return [images(config.vision_image_size), words]
        case _:  # ids
            shape = (n, 77 if kind == "clip-text" else 24)
            return [torch.randint(5, config.vocab_size, shape, generator=random)]


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def parity(bench: Bench) -> dict:
    """Of every kind: the relative distance of two samples' outputs from the CPU's in float32."""
    result = {}
    for kind in SIZES:
        model = bench.model(kind, "cpu")
        inputs = samples_of(kind, model.config, 2)
        run = (lambda x, m: m.decode(m.encode(x))) if kind == "vae" else (lambda *x: x[-1](*x[:-1]))
        truth = run(*inputs, model)
        model = model.to(bench.device)
        there = [x.to(bench.device) for x in inputs]
        result[kind] = {"float32": distance(run(*there, model), truth)}
        with torch.autocast(bench.device, torch.bfloat16):
            result[kind]["bf16"] = distance(run(*there, model), truth)
    return result


def distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours.cpu().double() - truth.double()).norm() / truth.double().norm())


def peak(bench: Bench) -> dict:
    """The speed of a large product in bf16."""
    side = 256 if bench.mini else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return {"flops": 2 * side**3 / bench.seconds(lambda: a @ b, 3 if bench.mini else 30)}


def step(bench: Bench, name: str, compiled: bool) -> dict:
    """A training step of a backbone at batch 64 (miniatures: 4)."""
    source = BACKBONES[name].mini if bench.mini else BACKBONES[name].paper
    batch = 4 if bench.mini else 64
    config = resolve(TrainConfig(backbone=name, weights=source, batch_size=batch, precision="bf16"))
    sizes, cuda = plan.sizes_of(config), bench.device == "cuda"
    room = plan.memory_of(bench.device, None) * plan.GIB - plan.RESERVED * plan.GIB

    def measure(config: TrainConfig) -> int:
        return plan.step_bytes(config, sizes, cuda)

    fitting = plan.least_parts(config, measure(config), room, measure)
    if fitting is None:
        raise MemoryError("no --accumulate fits")
    config = dataclasses.replace(config, accumulate=fitting[0])
    regressor = plan.on_meta(config, sizes.model).to_empty(device=bench.device)
    for tensor in [*regressor.parameters(), *regressor.buffers()]:
        tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.data.zero_()
    optimizer = plan.optimizer_of(regressor, config)
    inputs = plan.random_batch(config, sizes, regressor, bench.device)
    with FlopCounterMode(display=False) as counter:
        plan.training_step(regressor, optimizer, inputs, config, 1)
    network = torch.compile(regressor) if compiled else regressor

    def task() -> None:
        plan.training_step(network, optimizer, inputs, config, config.accumulate)

    bytes_held, seconds = bench.peak_memory(task), bench.seconds(task, 2 if bench.mini else 8)
    return {
        "accumulate": config.accumulate,
        "images_per_second": batch / seconds,
        "flops": counter.get_total_flops() * config.accumulate / seconds,
        "bytes": bytes_held,
        "planned": fitting[1],
    }


@torch.no_grad()
def caches(bench: Bench) -> dict:
    """Rows per second of each cache's encoder, in its batches, without reading and writing."""
    reader, rounds = SDReader("", None, bench.device), 1 if bench.mini else 5
    reader.networks = {kind: bench.model(kind) for kind in ("vae", "clip-text", "blip")}
    result = {}

    def add(name: str, kind: str, n: int, encode: Callable[..., Any]) -> None:
        n = 2 if bench.mini else n
        inputs = samples_of(kind, KINDS[kind].configs[SIZES[kind][bench.mini]], n)
        result[name] = n / bench.seconds(lambda: encode(*inputs), rounds)

    sentences = bench.model("minilm")
    add("targets", "minilm", 64, lambda x: sentences(x.to(bench.device)).cpu())
    add("latents", "vae", 32, lambda x: reader.latents(x).cpu())
    add("captions", "clip-text", 32, lambda x: reader.network("clip-text")(x.to(bench.device)).cpu())
    blip, prompt = reader.network("blip"), torch.tensor([[101, 5, 6, 7, 102]])
    add("made-captions", "blip", 16, lambda x, _: blip.generate_ids(x.to(bench.device), prompt).cpu())
    clip = bench.model("clip-vision")
    add("clip-features", "clip-vision", 32, lambda x: clip(x.to(bench.device)).cpu())
    return result


def dakl(bench: Bench, form: str) -> dict:
    """10,000 sources and 60,000 rows of the target domain: seconds of fit and predict, peak memory."""
    k, n = (50, 200) if bench.mini else (10_000, 60_000)
    torch.manual_seed(0)
    sources, y, targets = (torch.randn(rows, 384, device=bench.device) for rows in (k, k, n))
    started = bench.now()

    def task() -> None:
        Dakl(gamma=1e-3, form=form).fit(sources, y, targets, (sources[:100], y[:100])).predict(targets)

    held = bench.peak_memory(task)
    return {"seconds": bench.now() - started, "bytes": held}


# Section -> (what it runs, seconds at most)
SECTIONS: dict[str, tuple[Callable[[Bench], dict], int]] = {
    "parity": (parity, 75),
    "peak": (peak, 25),
    **{f"step-{name}": (lambda bench, name=name: step(bench, name, False), 40) for name in BACKBONES},
    "caches": (caches, 45),
    "dakl-linear": (lambda bench: dakl(bench, "linear"), 20),
    "dakl-exact": (lambda bench: dakl(bench, "exact"), 50),
    **{f"compile-{name}": (lambda bench, name=name: step(bench, name, True), 60) for name in BACKBONES},
}
LIMIT = 470  # seconds of all sections; those that do not fit are left for the next call


def measured(name: str, bench: Bench, scratch: Path, limit: float) -> dict:
    """A section's result from a process of its own, or {"error": ...}."""
    path = scratch / f"{name}.json"
    command = [sys.executable, __file__, "--section", name, str(path)] + ["--mini"] * bench.mini
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit:.0f} s"}
    if done.returncode or not path.is_file():
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(path.read_text())


def run_section(name: str, path: Path, bench: Bench) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    path.write_text(json.dumps(SECTIONS[name][0](bench)))


# ------------------------------------------------------------------------------------------------------------
# Table
# ------------------------------------------------------------------------------------------------------------


def text_of(result: dict) -> str:
    """The Markdown of a results file."""
    sections = result["sections"]
    lines = [f"# {result['device']}", "",
             f"`{result['command']}`, {result['date']}, torch {result['torch']}. Random weights of "
             f"{'miniatures' if result['mini'] else 'the published sizes'}; its head explains each figure."]
    good = {name: part for name, part in sections.items() if "error" not in part}
    if "parity" in good:
        lines += table("distance from the CPU | float32 | bf16 autocast", [
            (kind, f"{d['float32']:.1e}", f"{d['bf16']:.1e}") for kind, d in good["parity"].items()
        ])  # fmt: skip
    top = good.get("peak", {}).get("flops")
    if top:
        lines += ["", f"Peak of bf16 products: {top / 1e12:.1f} TFLOP/s."]
    rows = []
    for name, part in good.items():
        kind, _, backbone = name.partition("-")
        if kind in ("step", "compile"):
            held = f"{part['bytes'] / 2**30:.1f}" if part["bytes"] else ""
            rows.append((
                BACKBONES[backbone].title + ", compiled" * (kind == "compile"), part["accumulate"],
                f"{part['images_per_second']:.0f}", f"{part['flops'] / top:.0%}" if top else "",
                held, f"{part['planned'] / 2**30:.1f}",
            ))  # fmt: skip
    if rows:
        lines += table("step | --accumulate | images/s | share of peak | GiB | GiB planned", rows)
    if "caches" in good:
        lines += table("cache | rows/s", [(n, f"{rate:,.0f}") for n, rate in good["caches"].items()])
    rows = [(name, f"{part['seconds']:.1f}", f"{part['bytes'] / 2**30:.1f}" if part["bytes"] else "")
            for name, part in good.items() if name.startswith("dakl")]  # fmt: skip
    if rows:
        lines += table(f"DAKL, {'50 + 200' if result['mini'] else '10,000 + 60,000'} rows | s | GiB", rows)
    if failed := {name: part["error"] for name, part in sections.items() if "error" in part}:
        lines += ["", *(f"* {name}: failed: {error}" for name, error in failed.items())]
    return "\n".join(lines) + "\n"


def table(header: str, rows: Sequence[tuple]) -> list[str]:
    head = ["", f"| {header} |", "|---" * len(header.split(" | ")) + "|"]
    return head + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--again", nargs="+", choices=SECTIONS, default=[], help="sections to measure again")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--mini", action="store_true", help="miniatures; on the CPU without a GPU")
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not args.mini:
        parser.error("no CUDA device; --mini is the dry run")
    bench = Bench("cuda" if cuda else "cpu", args.mini)
    if args.section:
        run_section(args.section[0], Path(args.section[1]), bench)
        return 0
    device = torch.cuda.get_device_name() if cuda else "CPU"
    name = "gpu-" + re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + "-mini" * args.mini
    path = args.results / f"{name}.json"
    result = json.loads(path.read_text()) if path.is_file() else {"sections": {}}
    result |= {
        "command": "python benchmarks/gpu.py" + " --mini" * args.mini, "device": device, "mini": args.mini,
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
    }  # fmt: skip
    deadline = time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as scratch:
        for section in args.only:
            left, old = deadline - time.monotonic(), result["sections"].get(section, {"error": "not yet"})
            if ("error" in old or section in args.again) and left > 5:
                print(f"{section} ...", flush=True)
                limit = LIMIT if args.mini else min(SECTIONS[section][1], left)
                result["sections"][section] = measured(section, bench, Path(scratch), limit)
                write_json(path, result)
    atomic_write(path.with_suffix(".md"), text_of(result))
    print(text_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
