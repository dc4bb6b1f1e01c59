"""Loading that fails loudly: every tensor accounted for, or one error that lists everything wrong."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from files import DataError
from schema import shown

LISTED = 12  # names shown of each sort of mistake
WeightsError = DataError  # one line with the file, the fault and the remedy


def load_strict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    ignore: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    fresh: Iterable[str] = (),
    *,
    source: str = "weights",
    their_name: Callable[[str], str] = str,
    copy: bool = True,
) -> None:
    """Give `model` the tensors whose names begin with `prefix`, all or nothing.

    model       usually built on the meta device; it decides shapes and dtypes
    tensors     name -> tensor; they are converted one by one, and copied unless `copy` is False
    ignore      regex of a whole name (without prefix) -> the reason why such a tensor may be left over
    fresh       regexes of names that the file must *not* hold (a new head): they keep the model's own values
    source      the file's name in the error
    their_name  our name -> the file's, for the error

    Raises WeightsError once, listing every missing, unexpected, misshapen or whole-numbered tensor, NaN or
    infinity, and everything that would be left on the meta device. The model is then untouched.
    """
    held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    ignored, fresh = [re.compile(pattern) for pattern in dict(ignore)], [re.compile(p) for p in fresh]
    wanted = model.state_dict()
    is_fresh = {name for name in wanted if any(pattern.fullmatch(name) for pattern in fresh)}

    unexpected = [k for k in held if k not in wanted and not any(p.fullmatch(k) for p in ignored)]
    misshapen = [k for k in wanted if k in held and held[k].shape != wanted[k].shape]
    integers = [k for k in wanted.keys() & held.keys()
                if wanted[k].is_floating_point() and not held[k].is_floating_point()]
    _refuse(source, {
        "missing": [their_name(k) for k in wanted if k not in held and k not in is_fresh],
        "unexpected": [their_name(k) for k in unexpected],
        "meant to be fresh, yet in the file": [their_name(k) for k in held if k in is_fresh],
        "of a wrong shape": [f"{their_name(k)} {tuple(held[k].shape)} instead of {tuple(wanted[k].shape)}"
                             for k in misshapen],
        "of whole numbers, as a quantised file has them": [their_name(k) for k in integers],
        "left without values": [
            *(their_name(k) for k in is_fresh if wanted[k].is_meta),
            *(k for k, buffer in model.named_buffers() if buffer.is_meta and k not in wanted),
        ],
    })

    loaded: dict[str, Tensor] = {}
    for name, slot in wanted.items():
        if name in is_fresh:
            loaded[name] = slot
            continue
        device = "cpu" if slot.is_meta else slot.device
        value = held[name].detach().to(device, slot.dtype, copy=copy).contiguous()
        # A part of a stack must not keep the whole of it, nor share it.
        loaded[name] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    bad = [their_name(name) for name, value in loaded.items() if name not in is_fresh and not _finite(value)]
    _refuse(source, {"not finite (NaN or infinity)": bad})
    model.load_state_dict(loaded, strict=True, assign=True)


def _finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; without a mask of the tensor's size."""
    if torch.isfinite(tensor.sum(dtype=torch.float32)):  # quick; sound values may still overflow it
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _refuse(source: str, wrong: Mapping[str, list[str]]) -> None:
    faults = [f"{len(names)} {fault}: {listed(names)}" for fault, names in wrong.items() if names]
    if faults:
        raise WeightsError(f"{source} does not fit the model, nothing was loaded; " + "; ".join(faults))


def listed(names: list[str]) -> str:
    """The names in one line, a long list or name cut."""
    more = len(names) - LISTED
    plain = [name if name.isprintable() and len(name) < 300 else shown(name) for name in names[:LISTED]]
    return ", ".join(plain) + (f", ... and {more} more" if more > 0 else "")
