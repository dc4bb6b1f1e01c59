"""Loading that fails loudly: every tensor accounted for, or one error that lists everything wrong."""

import re
from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor, nn

LISTED = 12  # names shown of each sort of mistake


class WeightsError(ValueError):
    """Something is wrong with a file of weights: one line that says which file, what, and what to do."""


def load_strict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    ignore: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    fresh: Iterable[str] = (),
    *,
    source: str = "weights",
    spell: Callable[[str], str] = str,
    values: Callable[[Container[str]], Iterable[tuple[str, Tensor]]] | None = None,
) -> None:
    """Give `model` the tensors whose names begin with `prefix`, all or nothing.

    model    usually built on the meta device; it decides shapes and dtypes; tensors are converted one by one
    tensors  name -> tensor; they are copied, never aliased. On meta, with `values`: that is asked, once all
             fits, for the tensors of the names that the model wants, and gives them one by one, to keep
    ignore   regex of a whole name (without prefix) -> the reason why such a tensor may be left over
    fresh    regexes of names that the file must *not* hold (a new head): they keep what the model was built
             with
    source   what the error calls the file;  spell  turns our name into the file's, for the error

    Raises WeightsError once, listing every missing, unexpected or misshapen tensor, NaN or infinity, and
    everything that would be left on the meta device. The model is then untouched.
    """
    given = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    ignored = [
        re.compile(pattern) for pattern, _ in (ignore.items() if isinstance(ignore, Mapping) else ignore)
    ]
    fresh = [re.compile(pattern) for pattern in fresh]
    wanted = model.state_dict()
    is_fresh = {name for name in wanted if any(pattern.fullmatch(name) for pattern in fresh)}

    wrong: dict[str, list[str]] = {}
    wrong["missing"] = [spell(k) for k in wanted if k not in given and k not in is_fresh]
    wrong["unexpected"] = [
        spell(k) for k in given if k not in wanted and not any(pattern.fullmatch(k) for pattern in ignored)
    ]
    wrong["meant to be fresh, yet in the file"] = [spell(k) for k in given if k in is_fresh]
    wrong["of a wrong shape"] = [
        f"{spell(k)} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    wrong["left without values"] = [
        *(spell(k) for k in is_fresh if wanted[k].is_meta),
        *(k for k, buffer in model.named_buffers() if buffer.is_meta and k not in wanted),
    ]
    _refuse(source, wrong)

    loaded = {name: slot for name, slot in wanted.items() if name in is_fresh}
    asked = wanted.keys() - is_fresh
    bad = []
    for name, value in values(asked) if values else ((name, given[name]) for name in wanted if name in asked):
        if name not in asked:
            continue
        device = "cpu" if wanted[name].is_meta else wanted[name].device
        value = value.detach().to(device, wanted[name].dtype, copy=values is None).contiguous()
        # A part of a stack must not keep the whole of it, nor share it.
        loaded[name] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        if not _finite(loaded[name]):
            bad.append(spell(name))
    _refuse(source, {"not finite (NaN or infinity)": bad})
    model.load_state_dict(loaded, strict=True, assign=True)


def _finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; without a mask of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if torch.isfinite(tensor.sum(dtype=torch.float32)):  # quick; sound values may still overflow it
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _refuse(source: str, wrong: Mapping[str, list[str]]) -> None:
    faults = [f"{len(names)} {what}: {listed(names)}" for what, names in wrong.items() if names]
    if faults:
        raise WeightsError(f"{source} does not fit the model, nothing was loaded; " + "; ".join(faults))


def listed(names: list[str]) -> str:
    """The names in one line, a long list cut."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f", ... and {more} more" if more > 0 else "")
