"""Compare a model with another implementation of it, in float64, down to the first layer that differs.

A strict load cannot see an eps, an activation or a padding, and a loose tolerance hides them. So: every
parameter of the reference is drawn anew (an untrained norm or a zeroed convolution would hide its block), the
weights go through the project's own name tables, and outputs and gradients must agree to 1e-10.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weights import load_strict
from weights.options import Kind, build_on_meta, sizes_of

ATOL = 1e-10
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Run = Callable[[], Tensor | tuple[Tensor, ...]]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, at a size that neither fades nor explodes with depth; float64, eval."""
    generator = torch.Generator().manual_seed(seed)
    norms = (nn.GroupNorm, nn.LayerNorm)
    scales = {id(m.weight) for m in model.modules() if isinstance(m, norms)}
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) in scales:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients under their parameters' names, zero where nothing flowed."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@dataclass(frozen=True)
class Part:
    """A parameter of theirs, or those rows of it that are ours where it stacks several (q, k and v)."""

    name: str
    rows: tuple[int, int] | None = None  # first and one behind the last; None: all of it

    @property
    def layer(self) -> "Part":
        """The module that holds it."""
        return replace(self, name=self.name.rpartition(".")[0])


def home_names(theirs: nn.Module, convert: Convert) -> dict[str, tuple[Part, ...]]:
    """Our key -> what it is made of, read off by sending numbered rows through the conversion."""
    known, numbered, start = list(parameters(theirs).items()), {}, 0
    owners: list[tuple[str, int]] = []
    for name, tensor in known:
        rows = len(tensor) if tensor.ndim else 1
        numbers = torch.arange(start, start + rows, dtype=torch.float64)
        numbered[name] = numbers.view(tensor.shape[:1] + (1,) * (tensor.ndim - 1)).expand_as(tensor)
        owners += [(name, row) for row in range(rows)]
        start += rows
    return {ours: _parts(tensor, dict(known), owners) for ours, tensor in convert(numbered).items()}


def _parts(
    numbered: Tensor, known: dict[str, Tensor], owners: list[tuple[str, int]]
) -> tuple[Part, ...]:
    """Which of their rows these numbers stand for, neighbours together."""
    name = owners[int(numbered.flatten()[0])][0]
    if {owners[int(n)][0] for n in numbered.unique()} == {name} and numbered.numel() == known[name].numel():
        return (Part(name),)  # whole, be it transposed
    parts: list[Part] = []
    for number in numbered.flatten(1)[:, 0] if numbered.ndim > 1 else numbered:
        name, row = owners[int(number)]
        if parts and parts[-1].name == name and parts[-1].rows[1] == row:
            parts[-1] = Part(name, (parts[-1].rows[0], row + 1))
        else:
            parts.append(Part(name, (row, row + 1)))
    return tuple(parts)


def first_difference(
    ours: nn.Module,
    theirs: nn.Module,
    names: dict[str, tuple[Part, ...]],
    run_ours: Run,
    run_theirs: Run,
    atol: float = ATOL,
) -> str:
    """One line about the first layer, in the order in which ours run, that reads or gives something else.

    `names` is our key -> their keys of the parameters (`home_names`); layers are the modules that hold them.
    Where one side computes q, k and v at once, the three are compared one by one, or put together. A layer
    is passed over where nothing of theirs has the same output; a fault in it shows at the next one. An empty
    string when all agree.
    """
    layers: dict[str, set[tuple[Part, ...]]] = {}
    for key, parts in names.items():
        layers.setdefault(key.rpartition(".")[0], set()).add(tuple(part.layer for part in parts))
    modules = {
        name: next(iter(others)) for name, others in layers.items()
        # Where layers lie inside, only a namesake ends at the same place; the whole model is no layer.
        if name and len(others) == 1
        and (others == {(Part(name),)} or not list(ours.get_submodule(name).children()))
    }
    seen_ours = _record(ours, set(modules), run_ours)
    seen_theirs = _record(theirs, {part.name for parts in modules.values() for part in parts}, run_theirs)
    for name, calls in seen_ours.items():
        other = " + ".join(part.name for part in modules[name])
        found = [seen_theirs.get(part.name, []) for part in modules[name]]
        if any(len(calls) != len(others) for others in found):
            return f"{name} ran {len(calls)} times, {other} {' and '.join(str(len(o)) for o in found)} times"
        for call, *others in zip(calls, *found, strict=True):
            for theirs_read in (one.read for one in others):
                if call.read is not None and theirs_read is not None:
                    if problem := difference(call.read, theirs_read, atol):
                        return f"{name} is the first layer that reads something else than {other}: {problem}"
            if problem := difference(call.gave, _joined(others, modules[name]), atol):
                return f"{name} is the first layer that gives something else than {other}: {problem}"
    return ""


def _joined(calls: list["Call"], parts: tuple[Part, ...]) -> Tensor:
    """Their output of our layer, cut out of theirs or put together from them."""
    gave = [
        call.gave if part.rows is None else call.gave[..., slice(*part.rows)]
        for call, part in zip(calls, parts, strict=True)
    ]
    return gave[0] if len(gave) == 1 else torch.cat(gave, dim=-1)


def misnamed(
    ours: nn.Module, theirs: nn.Module, convert: Convert, run_ours: Run, run_theirs: Run, every: int = 1
) -> dict[str, str]:
    """Break our parameters one by one (or each `every`-th): what `first_difference` says where it does not
    begin with the broken layer."""
    names = home_names(theirs, convert)
    whole = first_difference(ours, theirs, names, run_ours, run_theirs)
    assert whole == "", whole
    generator, said = torch.Generator().manual_seed(3), {}
    for name, parameter in list(ours.named_parameters())[::every]:
        with torch.no_grad():
            before = parameter.clone()
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            found = first_difference(ours, theirs, names, run_ours, run_theirs)
            parameter.copy_(before)
        if not found.startswith(f"{name.rpartition('.')[0]} is the first layer that gives something else"):
            said[name] = found
    return said


def difference(a: Tensor, b: Tensor, atol: float = ATOL) -> str:
    """What differs between two tensors, or an empty string.

    Where one has more axes, a grid (B, C, h, w) may meet the same places in a row, (B, C, h·w) or
    (B, h·w, C), tokens (B, N, D) their first ones alone, and (..., D) any other arrangement of its rows.
    """
    a, b = sorted((a.detach(), b.detach()), key=lambda tensor: -tensor.ndim)
    readings = [(a, b)]
    if a.ndim > b.ndim:
        readings = [(tensor.reshape(-1, tensor.shape[-1]) for tensor in (a, b))]
    if (a.ndim, b.ndim) == (4, 3):
        readings += [(a.flatten(2), b), (a.flatten(2).transpose(1, 2), b)]
    if (a.ndim, b.ndim) == (3, 2):
        readings += [(a[:, 0], b)]
    off = [float((x - y).abs().max()) for x, y in readings if x.shape == y.shape]
    if not off:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    return "" if min(off) <= atol else f"off by {min(off):.1e}"  # a NaN is not <= atol either


def assert_parity(
    ours: nn.Module, theirs: nn.Module, convert: Convert, run_ours: Run, run_theirs: Run, atol: float = ATOL
) -> None:
    """Same outputs, and same gradients of every parameter for one random weighting of the outputs."""
    outputs = [_tuple(run()) for run in (run_ours, run_theirs)]
    for a, b in zip(*outputs, strict=True):
        assert b.abs().mean() > 1e-3, "the reference's signal has faded: this test would see nothing"
        if problem := difference(a, b, atol):
            where = first_difference(ours, theirs, home_names(theirs, convert), run_ours, run_theirs, atol)
            raise AssertionError(where or f"every layer agrees but the output is {problem}")
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    weights = [draw(output.shape) / output.numel() ** 0.5 for output in outputs[0]]
    for model, output in zip((ours, theirs), outputs, strict=True):
        model.zero_grad(set_to_none=True)
        sum((o * w).sum() for o, w in zip(output, weights, strict=True)).backward()
    found, expected = gradients(ours), convert(gradients(theirs))
    assert found.keys() == expected.keys()
    room = {name: atol * max(1.0, float(tensor.abs().max())) for name, tensor in expected.items()}
    differences = {name: difference(found[name], expected[name], room[name]) for name in found}
    wrong = {name: problem for name, problem in differences.items() if problem}
    assert not wrong, f"gradients differ: {wrong}"


def fit(kind: Kind, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> None:
    """Go as far as `weights.load` does before it looks at values. Raises WeightsError as it does."""
    sizes = sizes_of(kind, config, tensors, "here")
    model = build_on_meta(kind, sizes, "here")
    load_strict(model, {name: tensor.to("meta") for name, tensor in tensors.items()}, source="here")


def pictures(channels: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    """Random images (B, C, H, W) in float64, always the same."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def timm_features(model: nn.Module, images: Tensor) -> Tensor:
    """What timm's classifier would read."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def assert_same_shapes(ours: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Our parameters and these tensors have the same names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in parameters(ours).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(found.items()) ^ set(expected.items()) == set()


class Call(NamedTuple):
    """What a layer read, if that can be compared, and what it gave."""

    read: Tensor | None
    gave: Tensor


def _record(model: nn.Module, names: set[str], run: Run) -> dict[str, list[Call]]:
    """Every call of the named modules, in the order in which the first calls ended.

    What a module with layers inside reads is not recorded: the other side may cut there in another way, and
    the layers inside tell more. torch's own attention has no layers for its projections: they are computed
    again.
    """
    seen: dict[str, list[Call]] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            value = (args[0] if args else next(iter(kwargs.values()))).detach()
            gave = _tuple(output)[0].detach().clone()  # what comes behind may write into it
            if isinstance(module, nn.MultiheadAttention):
                projected = F.linear(value, module.in_proj_weight, module.in_proj_bias)
                seen.setdefault(name, []).append(Call(value, projected))
                seen.setdefault(f"{name}.out_proj", []).append(Call(None, gave))
                return
            comparable = value.is_floating_point() and not list(module.children())
            seen.setdefault(name, []).append(Call(value if comparable else None, gave))
        return note

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules() if name in names
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
