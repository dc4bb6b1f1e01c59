"""The preparation of a checkpoint's pictures: resize, crop, mean and deviation, from the files beside it.

All functions give the fields of `data.Preprocessing` as a dict; this package does not import data.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights.files import read_config
from weights.kinds import KINDS, find_kind
from weights.options import CLIP, HALVES, IMAGENET, Kind
from weights.registry import DEFAULTS, ENTRIES
from weights.sources import config, read
from weights.strict import WeightsError

RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
STEPS = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)


def _usual(resample: int, size: Any, crop: int | None, colours: Mapping[str, Any]) -> dict[str, Any]:
    return STEPS | {
        "resample": resample, "size": size, "do_center_crop": crop is not None, "crop_size": crop,
        "rescale_factor": 1 / 255, "image_mean": colours["mean"], "image_std": colours["std"],
    }


# transformers' processors: what each does where its file is silent. One number as size: the shorter side
# for CLIP's, a square for the others.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _usual(3, {"shortest_edge": 224}, 224, CLIP),
    "ViT": _usual(2, 224, None, HALVES),
    "DeiT": _usual(3, 256, 224, HALVES),
    "Blip": _usual(3, 384, None, CLIP),
}


def preprocessing(kind: str, source: str | os.PathLike | None = None) -> dict[str, Any]:
    """The preparation of pictures for the `kind` ("vit", "swin", "clip-vision", "blip", ...) in `source`.

    From the processor's file beside the weights; where there is none, as the checkpoints of that dialect were
    published (`defaults`). Raises WeightsError, one line, for what data.Preprocessing cannot do, and where
    the file makes pictures of another size than the model reads.
    """
    entry = find_kind(kind)
    if entry.pictures is None:
        reading = ", ".join(name for name, other in KINDS.items() if other.pictures)
        raise WeightsError(f"a {kind} reads no pictures; {reading} do")
    source = DEFAULTS[kind] if source is None else source
    registered = ENTRIES.get(str(source))
    if registered and registered.folder:  # this repository's miniatures
        size = _pair(getattr(config(kind, source), entry.pictures.size), "the model's image_size")
        file = registered.folder / "preprocessor_config.json"
        stated = read_config(file) if file.is_file() else {}
        colours = {key: tuple(stated.get(f"image_{key}", value)) for key, value in HALVES.items()}
        return _shorter_side(size, 1.0, "bicubic", colours)
    parsed = read(kind, source)
    size, beside = getattr(parsed.config, entry.pictures.size), parsed.folder / "config.json"
    if Path(parsed.where).is_file() and beside.is_file() and not entry.owns(read_config(beside)):
        return defaults(kind, parsed.dialect.name, size)
    return from_files(parsed.folder, parsed.dialect.name, kind, size)


def from_files(folder: Path, dialect: str, kind: str, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """The same from a folder, the dialect of its weights, and the size that the model reads.

    Where several processors' files lie there, first the one of the weights' own dialect.
    """
    size = _pair(image_size, "the model's image_size")
    readers = {"hf": _from_hugging_face, "open_clip": _from_open_clip, "timm": _from_timm}
    own = find_kind(kind).dialect(dialect).pictures
    for name in sorted(readers, key=lambda name: name != own):
        if (stated := readers[name](folder, KINDS[kind], size)) is not None:
            return stated
    return defaults(kind, dialect, size)


def defaults(kind: str, dialect: str, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """As the checkpoints of that dialect were published.

    timm's ViT (AugReg) and Swin, Microsoft's Swin: 0.9 of the shorter side, all of it from 384 pixels on
    (timm's pretrained_cfg of all of them). Hugging Face's ViT, Swin and BLIP: the whole picture squashed.
    CLIP: the whole of the shorter side.
    """
    size, usual = _pair(image_size, "the model's image_size"), find_kind(kind).pictures
    rules = find_kind(kind).dialect(dialect).pictures
    if rules == "timm":
        return _shorter_side(size, 0.9 if max(size) < 384 else 1.0, "bicubic", usual.colours)
    if PROCESSORS[usual.processor]["do_center_crop"]:
        rules = "torchvision" if rules == "open_clip" else "transformers"
        return _shorter_side(size, 1.0, usual.filter, usual.colours, rules)
    return _fields(size, None, usual.filter, usual.colours, "transformers")


def _fields(
    size: tuple[int, int], resize: Any, filter: str, colours: Mapping[str, Any], rules: str = "torchvision",
    squash: bool = False,
) -> dict[str, Any]:
    mean, std = tuple(colours["mean"]), tuple(colours["std"])
    return {"size": size, "resize": resize, "filter": filter, "mean": mean, "std": std, "rules": rules,
            "squash": squash}


def _shorter_side(
    size: tuple[int, int], crop: float, filter: str, colours: Mapping[str, Any], rules: str = "torchvision"
) -> dict[str, Any]:
    """The picture covers 1/crop of `size`, which is cut from its centre."""
    box = tuple(math.floor(side / crop) for side in size)
    return _fields(size, box[0] if size[0] == size[1] else box, filter, colours, rules)


def _from_hugging_face(folder: Path, kind: Kind, size: tuple[int, int]) -> dict[str, Any] | None:
    where = folder / "preprocessor_config.json"
    whole = folder / "processor_config.json"  # of a text and image processor, since transformers 5
    config = read_config(where) if where.is_file() else None
    if config is None and whole.is_file():
        where, config = whole, read_config(whole).get("image_processor")
    if not isinstance(config, dict):
        return None
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named or kind.pictures.processor))
    if name not in PROCESSORS:
        raise WeightsError(f"{where}: pictures for a {named} are not known here, only for "
                           f"{', '.join(PROCESSORS)}ImageProcessor")
    usual = PROCESSORS[name]
    if more := [key for key in config if key.startswith("do_") and config[key] and key not in usual]:
        raise WeightsError(f"{where}: {', '.join(more)} is not done here; set it to false")
    stated = {key: value for key, value in config.items() if value is not None}
    made = _processor(usual | stated, name, size, str(where))
    if made["size"] != size:
        raise WeightsError(f"{where}: makes pictures of {_by(made['size'])}, and the model reads "
                           f"{_by(size)}; correct its size, or remove it for what is usual")
    return made


def _processor(config: Mapping[str, Any], name: str, size: tuple[int, int], where: str) -> dict[str, Any]:
    """The fields of transformers' processor of that name and these settings."""
    if config["resample"] not in RESAMPLE:
        raise WeightsError(f"{where}: resample {config['resample']!r} is none of {RESAMPLE}")
    filter = RESAMPLE[config["resample"]]
    factor = float(config["rescale_factor"]) if config["do_rescale"] else 1.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if config["do_normalize"]:
        mean, std = (_three(config[f"image_{key}"], where) for key in ("mean", "std"))
    # (x * factor - mean) / std for grey levels x, written for x / 255
    scale = 255 * factor
    colours = {"mean": tuple(m / scale for m in mean), "std": tuple(s / scale for s in std)}

    to = config["size"]
    crop = _pair(config["crop_size"], f"{where}: crop_size") if config["do_center_crop"] else None
    if isinstance(to, int) and name == "CLIP":
        to = {"shortest_edge": to}
    shorter = to.get("shortest_edge") if isinstance(to, Mapping) and set(to) == {"shortest_edge"} else None
    if not config["do_resize"]:
        if crop:
            raise WeightsError(f"{where}: a crop without a resize is not done here; set do_resize to true")
        to = list(size)  # pictures must come in the size that the model reads
    elif shorter is not None:
        if not crop:
            raise WeightsError(f"{where}: size {to!r} without a crop leaves pictures of many sizes")
        return _fields(crop, shorter, filter, colours, "transformers")
    box = _pair(to, f"{where}: size")
    squash = crop is not None and crop != box
    return _fields(crop or box, box if squash else None, filter, colours, "transformers", squash)


def _from_open_clip(folder: Path, kind: Kind, size: tuple[int, int]) -> dict[str, Any] | None:
    """open_clip_config.json; it, too, takes the size from the model."""
    where = folder / "open_clip_config.json"
    if not where.is_file():
        return None
    config = read_config(where).get("preprocess_cfg") or {}
    colours = {key: _three(config.get(key) or CLIP[key], str(where)) for key in ("mean", "std")}
    filter = config.get("interpolation") or "bicubic"
    filter = "bicubic" if filter == "random" else _filter(filter, ("bicubic", "bilinear"), where)
    mode = config.get("resize_mode") or "shortest"
    if mode == "squash":
        return _fields(size, None, filter, colours)
    if mode != "shortest":
        raise WeightsError(f'{where}: resize_mode {mode!r} is not done here; "shortest" and "squash" are')
    # open_clip's resize for a size that is not square is bicubic, whatever the file states
    return _shorter_side(size, 1.0, filter if size[0] == size[1] else "bicubic", colours)


def _from_timm(folder: Path, kind: Kind, size: tuple[int, int]) -> dict[str, Any] | None:
    where = folder / "config.json"
    config = read_config(where) if where.is_file() else {}
    config = config.get("pretrained_cfg") or (config if "architecture" in config else None)
    if config is None:
        return None
    colours = {key: _three(config.get(key) or IMAGENET[key], str(where)) for key in ("mean", "std")}
    filter = _filter(config.get("interpolation") or "bicubic", tuple(RESAMPLE.values()), where)
    crop, mode = config.get("crop_pct") or 0.875, config.get("crop_mode") or "center"
    channels, *shape = config.get("input_size") or (3, *size)
    if channels != 3 or tuple(shape) != size:
        raise WeightsError(f"{where}: makes pictures of {channels} x {_by(shape)}, and the model reads "
                           f"3 x {_by(size)}; correct its input_size")
    if mode == "center":
        return _shorter_side(size, crop, filter, colours)
    if mode != "squash":
        raise WeightsError(f'{where}: crop_mode {mode!r} is not done here; "center" and "squash" are')
    box = tuple(math.floor(side / crop) for side in size)
    return _fields(size, None if box == size else box, filter, colours, "torchvision", box != size)


def _pair(value: Any, what: str) -> tuple[int, int]:
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        value = (value["height"], value["width"])
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise WeightsError(f"{what} {value!r} is neither one side nor height and width")
    return tuple(value)


def _three(value: Any, where: str) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise WeightsError(f"{where}: the mean and the deviation {value!r} are not three numbers")
    return tuple(float(v) for v in value)


def _filter(name: str, known: tuple[str, ...], where: Path) -> str:
    if name not in known:
        raise WeightsError(f"{where}: the interpolation {name!r} is not done here; {', '.join(known)} are")
    return name


def _by(size: Any) -> str:
    return " x ".join(str(side) for side in size)
