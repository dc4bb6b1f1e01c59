"""The plan of a run, before it starts: pairs and steps, sizes of the caches, memory of a training step.

`train.py FLAGS --plan [--memory GIB]` prints it. It loads no weights, fills no cache and creates no run
(drawn scenes are drawn if missing). The step runs on fake tensors, which have shapes but no values.

    python -m training.plan --memory 24      the paper's rows on such a card -> results/plan.md and .json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import math
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import weights
from backbones import BACKBONES, CAPTIONERS, READERS, as_backbone, captioner_of
from files import atomic_write, json_object, write_json
from reverse_sd import EMBEDDING_WIDTH, Regressor, cosine_loss, joint_loss, vocabulary_loss
from training.cache import CAPTION_BYTES
from training.captioner import Captioner
from training.config import TrainConfig, resolve
from training.inputs import pairs_folder, split_pairs
from weights.fetch import missing
from weights.kinds import find_kind
from weights.registry import ENTRIES

GIB, GB = 2**30, 10**9
fingerprint = functools.cache(weights.fingerprint)
# Of a card's memory: CUDA's context, the workspaces of cuBLAS and cuDNN, gaps between the allocator's blocks.
RESERVED = 1.0  # GiB, an estimate
WAYS = tuple(product(("float32", "bf16"), (False, True)))  # precision, activation checkpointing
RESULTS = Path(__file__).resolve().parent.parent / "results"

# ============================================================================================================
# Memory of a training step
# ============================================================================================================


@dataclass(frozen=True)
class Sizes:
    """A backbone's configuration, and the shape of one sample of each of its inputs."""

    model: Any
    inputs: tuple[tuple[int, ...], ...]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are still referenced: `now`, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, nbytes: int) -> None:
        self.storages.discard(key)
        self.now -= nbytes


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Context manager: on the CPU, the dtypes and saved tensors that CUDA has for norms and attention.

    The backward pass of fake tensors runs only on a device that exists. Two things differ on CUDA: autocast
    computes norms in float32, and attention has fused kernels, with an additive mask too.
    """
    layer_norm, group_norm = F.layer_norm, F.group_norm

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.bfloat16() for x in (q, k, v))
            attn_mask = None if attn_mask is None else attn_mask.bfloat16()
        if attn_mask is None and q.dtype == torch.bfloat16:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
        mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]

    def in_float32(norm: Callable) -> Callable:
        return lambda x, *args: norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args)

    kernels = {
        "layer_norm": in_float32(layer_norm),
        "group_norm": in_float32(group_norm),
        "scaled_dot_product_attention": attention,
    }
    with patch.multiple(F, **kernels):
        yield


def model_sizes(kind: str, source: str) -> Any:
    """The sizes of weights, also of a registry name whose files are not here; nothing is fetched."""
    return find_kind(kind).configs[source] if absent(kind, source) else weights.config(kind, source)


def absent(kind: str, source: str) -> bool:
    """Whether the source is a registry name whose files have not been fetched."""
    entry = ENTRIES.get(source)
    return entry is not None and not entry.folder and bool(missing(entry, kind))


def sizes_of(config: TrainConfig) -> Sizes:
    """The sizes of a resolved configuration. Raises WeightsError as `weights.config`."""
    backbone = READERS[config.backbone]
    model = model_sizes(backbone.kind, config.weights)
    if config.backbone in CAPTIONERS:
        return Sizes(model, ((3, model.vision_image_size, model.vision_image_size),))
    if config.train_blocks == 0:
        whole = on_meta(dataclasses.replace(config, train_blocks=None), model)
        return Sizes(model, ((whole.backbone.width,),))
    if not backbone.white_box:
        size = getattr(model, "img_size", None) or model.image_size
        return Sizes(model, ((3, *((size, size) if isinstance(size, int) else size)),))
    channels = model_sizes("vae", config.weights).embed_dim
    side, width = config.image_size // 8, model_sizes("clip-text", config.weights).hidden_size
    return Sizes(model, ((channels, side, side), (77, width)))


def on_meta(config: TrainConfig, model: Any) -> nn.Module:
    """The run's regressor or captioner without values; with a frozen backbone only the regressor's heads."""
    with torch.device("meta"):
        network = weights.build(READERS[config.backbone].kind, model)
        if config.backbone in CAPTIONERS:
            captioner = Captioner(config.backbone, network, config.words * config.heads)
            captioner.n_prompt = 0  # needs no tokenizer
            for parameter in captioner.parameters():
                if config.precision == "bf16" and not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
            return captioner.train()
        network.checkpointing = config.activation_checkpointing
        backbone = as_backbone(config.backbone, network, config.unet_features)
        return Regressor(
            nn.Identity() if config.train_blocks == 0 else backbone,
            backbone.width,
            config.words,
            config.heads,
            standardise=config.head_start == "ridge",
        ).train()


def step_bytes(
    config: TrainConfig, sizes: Sizes, cuda: bool = True, groups: Callable[..., dict] | None = None
) -> int:
    """The peak of one process's tensors in a training step: weights, gradients, Adam's moments, activations.

    By `batch_size`, `accumulate`, `precision` ("float32" or "bf16") and `activation_checkpointing` of the
    configuration. `cuda`: as CUDA's kernels save activations, else the CPU's. `groups` freezes the parameters
    that do not train (train.py's `parameter_groups`). Workspaces of the kernels are not counted.
    """
    network = on_meta(config, sizes.model)
    kernels = cuda_kernels() if cuda else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, kernels:
        network.to_empty(device="cpu")
        if groups and config.backbone in BACKBONES:
            groups(network, config)
        optimizer = optimizer_of(network, config, foreach=cuda)
        batch = random_batch(config, sizes, network)
        for _ in range(2):  # Adam's moments exist from the second step on
            training_step(network, optimizer, batch, config, parts=min(config.accumulate, 2))
        return live.peak


def optimizer_of(network: nn.Module, config: TrainConfig, foreach: bool | None = None) -> Any:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(trained, lr=1e-4, foreach=foreach)


def random_batch(
    config: TrainConfig, sizes: Sizes, network: nn.Module, device: str = "cpu"
) -> list[Tensor]:
    """Inputs, target embeddings or the longest texts' tokens, and words of one part of a batch: batch_size /
    accumulate samples."""
    samples = math.ceil(config.batch_size / config.accumulate)
    target = torch.rand(samples, EMBEDDING_WIDTH)
    if isinstance(network, Captioner):
        target = torch.randint(network.pad + 1, sizes.model.text_vocab_size, (samples, network.max_tokens))
    inputs = [torch.rand(samples, *shape) for shape in sizes.inputs]
    return [tensor.to(device) for tensor in (*inputs, target, torch.rand(samples, config.words))]


def training_step(
    network: Callable, optimizer: Any, batch: list[Tensor], config: TrainConfig, parts: int
) -> None:
    """A step like train.py's, with the same batch for each of its parts."""
    *inputs, target, words = batch
    captions = isinstance(network, Captioner)
    optimizer.zero_grad(set_to_none=True)
    for _ in range(parts):  # gradients exist from the second part on
        with torch.autocast(words.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = network(*inputs, target) if captions else network(*inputs)
        if captions:
            loss, logits = outputs
        else:
            loss, logits = cosine_loss(outputs.embedding.float(), target), outputs.logits
        if logits is not None:
            loss = joint_loss(loss, vocabulary_loss(logits.float(), words))
        torch.autograd.backward(loss.sum())
        del outputs, loss, logits
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


@dataclass(frozen=True)
class Variant:
    """One way to run the step: its flags, bytes, and the flags and bytes with the least --accumulate that
    fits (None: none does)."""

    precision: str
    checkpointing: bool
    nbytes: int
    fitting: tuple[int, int] | None  # --accumulate, bytes

    def flags(self) -> str:
        """The flags that make the step fit."""
        if self.fitting is None:
            return "none"
        parts = f" --accumulate {self.fitting[0]}" * (self.fitting[0] > 1)
        return f"--precision {self.precision}{parts}{' --activation-checkpointing' * self.checkpointing}"


def variants(
    config: TrainConfig, memory: float, cuda: bool = True, groups: Callable[..., dict] | None = None
) -> list[Variant]:
    """The step of a resolved configuration in each precision, without and with activation checkpointing,
    beside `memory` GiB."""
    sizes, room = sizes_of(config), (memory - RESERVED * cuda) * GIB
    measure = functools.partial(step_bytes, sizes=sizes, cuda=cuda, groups=groups)
    result = []
    for precision, checkpointing in WAYS:
        if checkpointing and config.backbone in CAPTIONERS:
            continue
        variant = dataclasses.replace(config, precision=precision, activation_checkpointing=checkpointing)
        nbytes = measure(variant)
        fitting = least_parts(variant, nbytes, room, measure)
        result.append(Variant(precision, checkpointing, nbytes, fitting))
    return result


def least_parts(
    config: TrainConfig, nbytes: int, room: float, measure: Callable[[TrainConfig], int]
) -> tuple[int, int] | None:
    """The least --accumulate, doubled from the configuration's, with which a step fits, and its bytes."""
    parts = config.accumulate
    while nbytes > room:
        parts *= 2
        if parts >= 2 * config.batch_size:
            return None
        nbytes = measure(dataclasses.replace(config, accumulate=min(parts, config.batch_size)))
    return min(parts, config.batch_size), nbytes


# ============================================================================================================
# Caches and steps
# ============================================================================================================


@dataclass(frozen=True)
class CachePlan:
    """A cache of at most `rows` rows; `done` of them are on disk."""

    name: str
    rows: int
    row_bytes: int
    done: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def cache_plans(config: TrainConfig, pairs: data.Pairs) -> list[CachePlan]:
    """The caches of a resolved configuration, in the order in which they are filled."""
    n, distinct = len(pairs), len(set(pairs.prompts))
    backbone, source, plans = READERS[config.backbone], config.weights, []

    def add(name: str, rows: int, shape: tuple[int, ...], dtype: Any, kind: str, origin: str) -> None:
        done = 0 if kind and absent(kind, origin) else rows_done(name, rows, shape, kind, origin)
        plans.append(CachePlan(name, rows, math.prod(shape) * np.dtype(dtype).itemsize, done))

    add("targets", distinct, (EMBEDDING_WIDTH,), np.float32, "minilm", "minilm")
    if config.target_texts:
        add("target-texts", distinct, (EMBEDDING_WIDTH,), np.float32, "minilm", "minilm")
    if backbone.white_box:
        latents, states = sizes_of(dataclasses.replace(config, train_blocks=None)).inputs
        if captioner := captioner_of(config.captions):
            add("made-captions", n, (CAPTION_BYTES,), np.uint8, "blip", captioner)
        texts = {"empty": 1, "prompt": distinct}.get(config.captions, n)
        add("latents", n, latents, np.float16, "vae", source)
        add("captions", texts, states, np.float16, "clip-text", source)
    elif config.train_blocks != 0:
        add("readable", n, (1,), np.uint8, "", "")
    if config.train_blocks == 0:
        add(f"{config.backbone}-features", n, sizes_of(config).inputs[0], np.float32, backbone.kind, source)
    return plans


def rows_done(name: str, rows: int, shape: tuple[int, ...], kind: str, source: str) -> int:
    """The number of finished rows in the fullest cache of that name, encoder and shape, of at most `rows`
    rows. Its pairs are not compared."""
    most = 0
    for path in sorted(weights.cache_dir().glob(f"{name}-*/key.json")):
        identity = json_object(path.read_text("utf-8")) or {"shape": [0], "key": {}}  # not written yet
        n, *row = identity["shape"]
        key = identity["key"].get("encoder", identity["key"])
        if n <= rows and tuple(row) == shape and (not kind or key.get("model") == fingerprint(kind, source)):
            try:
                state = np.load(path.with_name("done.npy"), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                continue
            most = max(most, int(np.count_nonzero(state)))
    return most


def run_bytes(config: TrainConfig) -> int:
    """The most that a run's folder takes while it trains: the best weights, and two checkpoints with Adam's
    moments; of a captioner those of its trained part."""
    network = on_meta(config, sizes_of(config).model)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return 4 * parameters * (1 + 2 * 3)


# ============================================================================================================
# The plan as text
# ============================================================================================================


def memory_of(device: str, stated: float | None) -> float:
    """GiB: the stated ones, else those of the GPU or of the machine."""
    if stated is not None:
        return stated
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def plan_lines(
    config: TrainConfig, memory: float | None, groups: Callable[..., dict] | None = None
) -> Iterator[str]:
    """The plan of a resolved configuration, line by line. Raises DataError and WeightsError as the run
    would. With `memory`, in GiB, the step is that of such a card, else that of the run's device."""
    device = weights.resolve_device(config.device)
    cuda = device.startswith("cuda") or (memory is not None and config.device != "cpu")
    found, pairs, splits = split_pairs(config, pairs_folder(config.data))
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items())
    yield f"pairs    {found:,} found, {len(pairs):,} kept: {counts}"
    steps = math.ceil(len(splits["train"]) / config.batch_size)
    phases = "twice: phase 1 and phase 2" if config.curriculum == "difficulty" and not config.phase_1 else ""
    yield (f"steps    {steps * config.epochs:,} of {config.batch_size} samples: {config.epochs} epochs of "
           f"{steps:,}{', ' * bool(phases)}{phases}")  # fmt: skip
    yield from disk_lines(config, pairs)
    limit = memory_of(device, memory)
    left = f", of which about {RESERVED:g} is CUDA's own" if cuda else ""
    yield f"memory   of a step of {config.batch_size} samples, {config.weights}; {limit:.1f} GiB{left}"
    for variant in variants(config, limit, cuda, groups):
        name = variant.precision + ", checkpointing" * variant.checkpointing
        parts, nbytes = variant.fitting or (None, 0)
        fits = "fits" if parts == config.accumulate else "does not fit"
        if parts not in (None, config.accumulate):
            fits += f"; {nbytes / GIB:.1f} GiB with"
        yield f"  {name:24}{variant.nbytes / GIB:6.1f} GiB  {fits}  {variant.flags()}"


def disk_lines(config: TrainConfig, pairs: data.Pairs) -> Iterator[str]:
    """Weights to fetch, the caches and the run's folder, beside the free room."""
    folder = weights.cache_dir()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    plans, phases = cache_plans(config, pairs), 1 + (config.curriculum == "difficulty")
    needed = sum(plan.nbytes * (plan.done == 0) for plan in plans)  # a cache reserves all of its room at once
    room = "enough" if needed < free else f"{(needed - free) / GB:,.1f} GB too few"
    yield f"caches   {needed / GB:,.2f} GB to write, {free / GB:,.1f} GB free ({room}) in {folder}"
    for plan in plans:
        yield (f"  {plan.name:16}{plan.nbytes / GB:9,.2f} GB  {plan.rows:,} rows of {plan.row_bytes:,} "
               f"bytes, {plan.done:,} done")  # fmt: skip
    yield f"  {'run folder':16}{phases * run_bytes(config) / GB:9,.2f} GB  under runs/ or --out, at most"
    backbone = READERS[config.backbone]
    kinds = {backbone.kind: config.weights}
    if backbone.white_box:
        kinds |= {"vae": config.weights, "clip-text": config.weights}
        if captioner := captioner_of(config.captions):
            kinds["blip"] = captioner
    if names := sorted({f"{source} ({kind})" for kind, source in kinds.items() if absent(kind, source)}):
        yield f"weights  to be fetched: {', '.join(names)}"


# ============================================================================================================
# The paper's rows
# ============================================================================================================


def paper_rows(memory: float) -> dict:
    """The steps of table 1's backbones at full size and batch 64, as CUDA runs them, beside `memory` GiB."""
    rows = []
    for name, backbone in BACKBONES.items():
        config = resolve(TrainConfig(backbone=name, weights=backbone.paper))
        regressor = on_meta(config, sizes_of(config).model)
        rows.append({
            "backbone": backbone.title,
            "weights": backbone.paper,
            "parameters": sum(p.numel() for p in regressor.parameters()),
            "variants": [asdict(variant) for variant in variants(config, memory)],
        })  # fmt: skip
    return {
        "command": f"python -m training.plan --memory {memory:g}",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "memory": memory,
        "reserved": RESERVED,
        "batch_size": config.batch_size,
        "rows": rows,
    }


def text_of(result: dict) -> str:
    """The Markdown of `paper_rows`."""
    columns = [precision + ", checkpointing" * checkpointing for precision, checkpointing in WAYS]
    lines = [
        f"# Memory of the paper's rows on a card of {result['memory']:g} GiB",
        "",
        f"`{result['command']}`, {result['date']}, torch {result['torch']}. GiB at the peak of a training "
        f"step at batch {result['batch_size']}, by running it on fake tensors: weights, gradients, Adam's "
        f"moments, activations. About {result['reserved']:g} GiB of a card is CUDA's own; the flags "
        "are those that fit beside it, in each column's precision.",
        "",
        "| backbone | weights | parameters | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    each = [[Variant(**fields) for fields in row["variants"]] for row in result["rows"]]
    for row, ways in zip(result["rows"], each, strict=True):
        cells = [row["backbone"], row["weights"], f"{row['parameters'] / 1e6:.0f} M"]
        lines.append(f"| {' | '.join(cells + [f'{v.nbytes / GIB:.1f}' for v in ways])} |")
    lines += ["", "| backbone | flags that fit | GiB |", "|---|---|---|"]
    for row, ways in zip(result["rows"], each, strict=True):
        for v in ways:
            size = f"{v.fitting[1] / GIB:.1f}" if v.fitting else ""
            lines.append(f"| {row['backbone']} | `{v.flags()}` | {size} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the memory of the paper's rows to results/plan.md.")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB of the card (default 24)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default results)")
    args = parser.parse_args(argv)
    result = paper_rows(args.memory)
    text = text_of(result)
    write_json(args.results / "plan.json", result)
    atomic_write(args.results / "plan.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
