"""Golden files for porters: a model's outputs for given inputs, layer by layer; compare.py reads them.

A folder holds index.json (kind, sizes, names and shapes in the order in which the layers ran) and six files
of safetensors:

    inputs       in the precision in which a port is to compute
    constants    tensors that depend on neither weights nor layers: the timestep's sinusoids, masks, positions
    activations  the output of every layer under its name, float64
    outputs      float64
    epsilons     the change of each norm's output where its epsilon is a tenth smaller, float32
    weights      under our names, in the precision of the inputs

The model runs in float64 and in float32 on equal numbers. index.json holds the differences of the two, so
that a float32 port is compared at the rounding of each tensor.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.clip import CLIPTextConfig
from models.unet import UNetConfig
from weights.kinds import find_kind
from weights.sources import build, load
from weights.strict import WeightsError

VERSION = 2
NORMS = (nn.GroupNorm, nn.LayerNorm)
NUDGE = 0.1  # the share by which an epsilon is made smaller in epsilons.safetensors

# Random models with the parts of Stable Diffusion 2 that sd-mini lacks: projections as matrices, heads of one
# width, the exact gelu. Their U-Net predicts v in a golden file of the sampler.
SD_2_TINY = {
    "unet": UNetConfig(
        in_channels=4, out_channels=4, model_channels=64, num_res_blocks=1, channel_mult=(1, 2, 2),
        attention_levels=(0, 1), num_heads=None, num_head_channels=32, context_dim=96,
        use_linear_in_transformer=True,
    ),
    "clip-text": CLIPTextConfig(
        vocab_size=1024, hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=77, hidden_act="gelu", layer_norm_eps=1e-5,
    ),
}
TINY = {"sd-2-tiny": SD_2_TINY | {"unet-encoder": SD_2_TINY["unet"]}}


@dataclass(frozen=True)
class Draw:
    """Random inputs, `batch` at once, always the same for one seed."""

    batch: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, dtype=torch.float32)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (self.batch, *shape), generator=self.generator)


@dataclass(frozen=True)
class Subject:
    """A model in float32, its inputs and its configuration.

    `run` maps the model and its inputs to the outputs; `constants` are as in the golden files.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    run: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
    constants: Mapping[str, Tensor]
    config: Mapping[str, Any]
    layers: tuple[str, ...] | None = None  # those to record; None: all


def golden(
    kind: str,
    folder: str | os.PathLike,
    source: str | os.PathLike | None = None,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write the golden files of `kind` in `source` to `folder`; returns the activations' names in order.

    source  as in `load`, or a name of TINY: a random model
    dtype   of inputs and weights, float32 or float64: the precision in which the port is to compute

    Raises WeightsError as `load` does, and if the folder holds anything already.
    """
    folder = new_folder(folder)
    entry, model = find_kind(kind), load_or_draw(kind, source)
    inputs = entry.example_inputs(model.config, Draw(batch, torch.Generator().manual_seed(seed)))
    constants = entry.constants(model.config, inputs)
    # Without what is at a default, as in a fingerprint; None stands in these files for what is not there
    sizes = {f.name: value for f in fields(model.config)
             if (value := getattr(model.config, f.name)) is None or value != f.default}
    subject = Subject(model, inputs, entry.outputs, constants, sizes)
    return write(folder, kind, subject, dtype, seed=seed)


def new_folder(folder: str | os.PathLike) -> Path:
    """The folder, made if it is missing. Raises WeightsError if it holds anything or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already, and not an empty folder; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_or_draw(kind: str, source: str | os.PathLike | None) -> nn.Module:
    """`load(kind, source)`, or a random model of TINY. Raises WeightsError as `load` does."""
    if str(source) not in TINY:
        return load(kind, source)
    if kind not in TINY[str(source)]:
        raise WeightsError(f"{source} has no {kind}; it has {', '.join(TINY[str(source)])}")
    return randomised(build(kind, TINY[str(source)][kind])).eval()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """The model with new random parameters, norms' near 1: fresh norms and zero biases would hide faults."""
    generator = torch.Generator().manual_seed(0)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, NORMS)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.copy_(1 + 0.1 * noise if id(parameter) in norms else scale * noise)
    return model


@dataclass(frozen=True)
class Nudge:
    """A norm's epsilon and the change of its output where that is smaller by NUDGE.

    `blur` is the share of the change that float32's rounding of each row's deviation looks like.
    """

    epsilon: float
    change: Tensor
    blur: float


@dataclass(frozen=True)
class Recording:
    """Tensors of one run, in the order in which the layers ended."""

    activations: dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    nudges: dict[str, Nudge]

    def tensors(self) -> dict[str, Tensor]:
        return self.activations | dict(self.outputs)


@torch.no_grad()
def record(subject: Subject, dtype: torch.dtype) -> Recording:
    """One run in `dtype`, to which the model is converted in place.

    A layer that runs more than once has its later outputs under `name#1`, and so on.
    """
    model, activations, nudges, times = subject.model.to(dtype), {}, {}, Counter()

    def note(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output  # BLIP's layers give their cache too
            if not isinstance(output, Tensor):
                return
            key = f"{name}#{times[name]}" if times[name] else name
            times[name] += 1
            activations[key] = output.detach().clone().contiguous()
            if isinstance(module, NORMS):
                nudges[key] = _nudge(module, args[0], output)
        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()
               if name and (subject.layers is None or name in subject.layers)]
    try:
        outputs = subject.run(model, _converted(subject.inputs, dtype))
    finally:
        for handle in handles:
            handle.remove()
    return Recording(activations, outputs, nudges)


def _nudge(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor, output: Tensor) -> Nudge:
    epsilon, norm.eps = norm.eps, norm.eps * (1 - NUDGE)
    change, norm.eps = norm.forward(x) - output, epsilon
    rows = (len(x), norm.num_groups, -1) if isinstance(norm, nn.GroupNorm) else (-1, x.shape[-1])
    along = (output.reshape(rows) * change.reshape(rows)).sum(dim=-1).norm() / change.square().sum()
    return Nudge(epsilon, change, float(along) * 2**-24)


def write(
    folder: Path, kind: str, subject: Subject, dtype: torch.dtype = torch.float32, **about: Any
) -> list[str]:
    """Write a subject's golden files; returns the activations' names in order. `about` goes to index.json."""
    coarse = record(subject, torch.float32).tensors()
    fine = record(subject, torch.float64)
    index: dict[str, Any] = {"version": VERSION, "kind": kind, "dtype": _name(dtype)}
    index |= about | {"torch": torch.__version__, "config": dict(subject.config)}
    buffers = {name for name, _ in subject.model.named_buffers()} - set(subject.model.state_dict())
    constants = {name: subject.model.get_buffer(name) for name in sorted(buffers)} | dict(subject.constants)
    parts = {"inputs": _converted(subject.inputs, dtype), "constants": constants,
             "activations": fine.activations, "outputs": fine.outputs}
    for part, tensors in parts.items():
        _save(tensors, folder / f"{part}.safetensors")
        index[part] = [{"name": name, "shape": list(value.shape), "dtype": _name(value.dtype)}
                       for name, value in tensors.items()]
    for entry in index["activations"] + index["outputs"]:
        entry |= precision_of(entry["name"], fine, coarse[entry["name"]])
    for entry in index["outputs"]:
        entry["equal"] = [name for name, value in fine.activations.items()
                          if torch.equal(value, fine.outputs[entry["name"]])]
    changes = {name: nudge.change.float() for name, nudge in fine.nudges.items()}
    _save(changes, folder / "epsilons.safetensors")
    _save(subject.model.to(dtype).state_dict(), folder / "weights.safetensors")
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")  # last: it makes the folder whole
    return list(fine.activations)


def precision_of(name: str, fine: Recording, coarse: Tensor) -> dict[str, Any]:
    """The rounding of a tensor, float32 less float64: largest and root mean square. Of a norm also `epsilon`
    and `blur`: the rounding that looks like a smaller epsilon, as a share of that epsilon's change."""
    exact = fine.tensors()[name]
    off = coarse.double() - exact
    rounding = {"rounding": [float(off.abs().max()), rms(off)]}
    if name not in fine.nudges:
        return rounding
    nudge = fine.nudges[name]
    random = rms(off) / max(rms(nudge.change), 1e-300) / off.numel() ** 0.5  # of independent values
    blur = max(nudge.blur, random, abs(share_of(off, nudge.change)))
    return rounding | {"epsilon": nudge.epsilon, "blur": blur}


def rms(x: Tensor) -> float:
    """The root mean square."""
    return float(x.double().square().mean().sqrt())


def share_of(off: Tensor, nudge: Tensor) -> float:
    """The multiple of `nudge` that is nearest to `off`; 0 for a `nudge` of zero."""
    return float((off * nudge).sum() / nudge.square().sum().clamp_min(1e-300))


def _converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: cannot be written ({error}); make room") from error
