"""Compare a model with another implementation of it, in float64, down to the first layer that differs.

A strict load cannot see an eps, an activation or a padding, and a loose tolerance hides them. So: every
parameter of the reference is drawn anew (an untrained norm or a zeroed convolution would hide its block), the
weights go through the project's own name tables, and outputs and gradients must agree to 1e-10.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

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
                parameter.copy_(noise * (0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients under their parameters' names, zero where nothing flowed."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def home_names(theirs: nn.Module, convert: Convert) -> dict[str, str]:
    """Our key -> their key, read off by sending numbered tensors through the conversion."""
    names = list(parameters(theirs))
    numbered = {
        name: torch.full_like(tensor, i, dtype=torch.float64)
        for i, (name, tensor) in enumerate(parameters(theirs).items())
    }
    return {ours: names[int(tensor.flatten()[0])] for ours, tensor in convert(numbered).items()}


def first_difference(
    ours: nn.Module,
    theirs: nn.Module,
    names: dict[str, str],
    run_ours: Run,
    run_theirs: Run,
    atol: float = ATOL,
) -> str:
    """One line about the first layer, in the order in which ours run, that reads or gives something else.

    `names` is our key -> their key of the parameters (`home_names`); layers are the modules that hold them.
    An empty string when all agree.
    """
    modules = {key.rpartition(".")[0]: other.rpartition(".")[0] for key, other in names.items()}
    seen_ours = _record(ours, set(modules), run_ours)
    seen_theirs = _record(theirs, set(modules.values()), run_theirs)
    for name, calls in seen_ours.items():
        other = modules[name]
        if len(calls) != len(seen_theirs.get(other, [])):
            return f"{name} ran {len(calls)} times, {other} {len(seen_theirs.get(other, []))} times"
        for (a_in, a_out), (b_in, b_out) in zip(calls, seen_theirs[other], strict=True):
            if a_in.is_floating_point() and (problem := difference(a_in, b_in, atol)):
                return f"{name} is the first layer that reads something else than {other}: {problem}"
            if problem := difference(a_out, b_out, atol):
                return f"{name} is the first layer that gives something else than {other}: {problem}"
    return ""


def difference(a: Tensor, b: Tensor, atol: float = ATOL) -> str:
    """What differs between two tensors, or an empty string.

    A grid (B, C, h, w) may meet the same places in a row, (B, C, h·w) or (B, h·w, C); (N, D) is (1, N, D).
    """
    a, b = a.detach(), b.detach()
    readings = [a]
    if {a.ndim, b.ndim} == {3, 4}:
        b = b.flatten(2)
        readings = [a.flatten(2), a.flatten(2).transpose(1, 2)]
    elif {a.ndim, b.ndim} == {2, 3}:
        b = b.squeeze(0)
        readings = [a.squeeze(0)]
    readings = [reading for reading in readings if reading.shape == b.shape]
    if not readings:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    worst = min(float((reading - b).abs().max()) for reading in readings)
    return "" if worst <= atol else f"off by {worst:.1e}"  # a NaN is not <= atol either


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


def _record(model: nn.Module, names: set[str], run: Run) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The input and output of every call of the named modules, in the order of the first calls."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, []).append((value.detach(), _tuple(output)[0].detach()))
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
