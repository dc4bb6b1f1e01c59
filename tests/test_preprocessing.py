"""Pictures prepared as each checkpoint's own processor does it, to the grey level."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from conftest import ROOT, environment
from PIL import Image
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, save_for_hf
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import data
from data import Preprocessing, image_tensor, load_image
from models.vit import CONFIGS
from weights import WeightsError
from weights.preprocessing import CLIP, HALVES, IMAGENET, defaults, from_files, preprocessing

ONE_LEVEL = 1.01
SHAPES = [(120, 160), (161, 119), (64, 64), (37, 53), (5, 7), (97, 260), (260, 97), (90, 89), (1, 3)]


def picture(height, width, how):
    generator = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    if how == "noise":
        pixels = generator.integers(0, 256, (height, width, 3))
    elif how == "black and white":
        pixels = generator.integers(0, 2, (height, width, 1)).repeat(3, 2) * 255
    elif how == "smooth":
        pixels = 255 * np.stack([x, y, (np.sin(9 * x) * np.cos(7 * y) + 1) / 2], -1)
    else:  # like a photograph: soft shading, hard edges, some noise
        pixels = 255 * np.stack([x, 1 - y, x * y], -1) + generator.normal(0, 6, (height, width, 3))
        for _ in range(12):
            a, b, r = generator.random(3)
            pixels[(x - a) ** 2 + (y - b) ** 2 < (r / 5) ** 2] = generator.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


KINDS = ["noise", "black and white", "smooth", "photo"]
PICTURES = [picture(*shape, KINDS[k % 4]) for k, shape in enumerate(SHAPES * 4)]


def apart(ours, theirs, std):
    """The largest difference in grey levels."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    return ((ours - theirs).abs() * torch.tensor(std)[:, None, None] * 255).max().item()


def preparing(fields):
    """Through JSON, as a run's folder keeps it."""
    how = Preprocessing(**json.loads(json.dumps(fields)))
    assert asdict(how) == fields and Preprocessing(**asdict(how)) == how
    return how


def told(folder, kind, size, dialect="hf", **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return preparing(from_files(folder, dialect, kind, size))


# Hugging Face -----------------------------------------------------------------------------------------------

CLIP_HF = {"image_mean": CLIP["mean"], "image_std": CLIP["std"]}
HALVES_HF = {"image_mean": HALVES["mean"], "image_std": HALVES["std"]}
IMAGENET_HF = {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]}
RESCALED = {"do_rescale": True, "rescale_factor": 1 / 255}
# kind, the size that the model reads, and a file as it was published or as an option allows
HUGGING_FACE = {
    "clip, 2022": ("clip-vision", 56, {"crop_size": 56, "do_center_crop": True, "do_normalize": True,
                                       "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
                                       "resample": 3, "size": 56, **CLIP_HF}),
    "clip, 2023": ("clip-vision", 56, {"crop_size": {"height": 56, "width": 56}, "do_center_crop": True,
                                       "do_convert_rgb": True, "do_normalize": True, "do_resize": True,
                                       "image_processor_type": "CLIPImageProcessor", "resample": 3,
                                       "size": {"shortest_edge": 56}, **RESCALED, **CLIP_HF}),
    "clip, odd crop": ("clip-vision", 51, {"image_processor_type": "CLIPImageProcessorFast",
                                           "size": {"shortest_edge": 64}, "crop_size": 51}),
    "clip, not square": ("clip-vision", (40, 57), {"image_processor_type": "CLIPImageProcessor", "size": 64,
                                                   "crop_size": {"height": 40, "width": 57}}),
    "clip, larger crop": ("clip-vision", 61, {"image_processor_type": "CLIPImageProcessor", "size": 56,
                                              "crop_size": 61}),
    "clip, defaults": ("clip-vision", 224, {"image_processor_type": "CLIPImageProcessor"}),
    "clip, no crop": ("clip-vision", 56, {"image_processor_type": "CLIPImageProcessor", "size": {
        "height": 56, "width": 56}, "do_center_crop": False}),
    "vit, 2021": ("vit", 64, {"do_normalize": True, "do_resize": True, "resample": 2, "size": 64,
                              "feature_extractor_type": "ViTFeatureExtractor", **HALVES_HF}),
    "vit, 2023": ("vit", 64, {"do_normalize": True, "do_resize": True, "resample": 2, **RESCALED, **HALVES_HF,
                              "image_processor_type": "ViTImageProcessor",
                              "size": {"height": 64, "width": 64}}),
    "vit, not square": ("vit", (48, 80), {"image_processor_type": "ViTImageProcessorFast",
                                          "size": {"height": 48, "width": 80}}),
    "vit, lanczos": ("vit", 64, {"image_processor_type": "ViTImageProcessor", "size": 64, "resample": 1}),
    "vit, squash and crop": ("vit", 56, {"image_processor_type": "ViTImageProcessor", "size": 64,
                                         "do_center_crop": True, "crop_size": 56}),
    "vit, defaults": ("vit", 224, {"image_processor_type": "ViTImageProcessor"}),
    "deit": ("vit", 224, {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
                          "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3, "size": 256,
                          **IMAGENET_HF}),
    "deit, defaults": ("vit", 224, {"image_processor_type": "DeiTImageProcessor"}),
    "swin": ("swin", 64, {"do_normalize": True, "do_resize": True, "resample": 3, "size": 64,
                          "feature_extractor_type": "ViTFeatureExtractor", **IMAGENET_HF}),
    "blip": ("blip", 96, {"do_normalize": True, "do_resize": True, "resample": 3, **RESCALED, **CLIP_HF,
                          "image_processor_type": "BlipImageProcessor", "size_divisor": 32,
                          "processor_class": "BlipProcessor", "size": {"height": 96, "width": 96}}),
    "blip2": ("blip2", 224, {"do_normalize": True, "do_resize": True, "resample": 3, **RESCALED, **CLIP_HF,
                             "image_processor_type": "BlipImageProcessor",
                             "processor_class": "Blip2Processor", "size": {"height": 224, "width": 224}}),
    "blip, defaults": ("blip", 384, {"image_processor_type": "BlipImageProcessor"}),
    "not normalised": ("vit", 64, {"image_processor_type": "ViTImageProcessor", "size": 64,
                                   "do_normalize": False}),
    "not rescaled": ("vit", 64, {"image_processor_type": "ViTImageProcessor", "size": 64, "do_rescale": False,
                                 "image_mean": [100.0, 120, 140], "image_std": [50.0, 60, 70]}),
    "rescaled otherwise": ("vit", 64, {"image_processor_type": "ViTImageProcessor", "size": 64,
                                       "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1, 1]}),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_processors(name, tmp_path):
    kind, size, config = HUGGING_FACE[name]
    how = told(tmp_path, kind, size, preprocessor_config=config)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    assert theirs.backend == "torchvision"
    for image in PICTURES[:12] if max(how.size) > 100 else PICTURES:
        assert apart(image_tensor(image, how), theirs(image).pixel_values[0], how.std) <= ONE_LEVEL


@pytest.mark.parametrize("kind", ["clip-vision", "vit", "swin", "blip"])
def test_the_processors_of_pillow(kind, tmp_path):
    """These resize with Pillow, to which torch's int16 weights are near; Pillow 13 takes the rows of a tall
    picture first, which torch never does."""
    colours = {"vit": HALVES_HF, "swin": IMAGENET_HF}.get(kind, CLIP_HF)
    config = {"size": 64, **colours, "resample": 2 if kind == "vit" else 3, "crop_size": 64}
    config |= {"do_center_crop": kind == "clip-vision"}
    classes = {"clip-vision": CLIPImageProcessorPil, "blip": BlipImageProcessorPil}
    theirs = classes.get(kind, ViTImageProcessorPil)(**config)
    how = told(tmp_path, kind, 64, preprocessor_config=config)
    for k, image in enumerate(PICTURES):
        if image.height <= image.width:
            expected = torch.from_numpy(theirs(image)["pixel_values"][0])
            bound = 2 * ONE_LEVEL if k % 4 < 2 else ONE_LEVEL  # noise overshoots
            assert apart(image_tensor(image, how), expected, how.std) <= bound


def test_processor_config_and_a_nearer_dialect(tmp_path):
    config = {"image_processor": {"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56}}
    assert told(tmp_path, "clip-vision", 56, processor_config=config).resize == 56
    near = {"size": {"height": 56, "width": 56}, "do_center_crop": False}
    assert told(tmp_path, "clip-vision", 56, preprocessor_config=near).resize is None
    told_by = {"open_clip_config": {"preprocess_cfg": {"mean": [0.1] * 3}}}
    assert told(tmp_path, "clip-vision", 56, **told_by).mean == CLIP["mean"]
    assert told(tmp_path, "clip-vision", 56, "open_clip").mean == (0.1,) * 3


# timm, open_clip --------------------------------------------------------------------------------------------

TIMM = {
    "vit": {"input_size": (3, 64, 64), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic",
            **HALVES},
    "vit, 384": {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "center", **HALVES},
    "swin": {"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bicubic", **IMAGENET},
    "odd": {"input_size": (3, 57, 57), "crop_pct": 0.77, "interpolation": "bilinear"},
    "silent": {"input_size": (3, 64, 64)},
    "lanczos": {"input_size": (3, 64, 64), "interpolation": "lanczos"},
    "wide": {"input_size": (3, 48, 80), "crop_pct": 0.9, **HALVES},
    "tall": {"input_size": (3, 83, 41), "crop_pct": 0.95, **HALVES},
    "squash": {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash", **HALVES},
    "squash, crop": {"input_size": (3, 64, 48), "crop_pct": 0.8, "crop_mode": "squash", **HALVES},
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_transform(name, tmp_path):
    config = TIMM[name]
    file = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": config}
    how = told(tmp_path, "vit", config["input_size"][1:], "timm", config=file)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    for image in PICTURES:
        assert apart(image_tensor(image, how), theirs(image), how.std) <= ONE_LEVEL
    flat = told(tmp_path, "vit", how.size, "timm", config={"architecture": "vit_tiny_patch16_224", **config})
    assert flat == how


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "vit_base_patch32_224.augreg_in21k", "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_large_patch4_window12_384.ms_in22k_ft_in1k", "swinv2_tiny_window8_256.ms_in1k",
    "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k",
])
def test_timms_usual_values(name, tmp_path):
    published, kind = get_pretrained_cfg(name).to_dict(), name[:4].strip("_")
    config = {key: published[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean",
                                              "std")}
    how = told(tmp_path, kind, config["input_size"][1:], "timm", config={"pretrained_cfg": config})
    assert preparing(defaults(kind, "timm", how.size)) == how


@pytest.mark.parametrize("size", [56, (40, 72), (83, 41)])
@pytest.mark.parametrize("mode", ["shortest", "squash", None])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random", None])
def test_open_clips_transform(size, mode, interpolation, tmp_path):
    config = {"mean": CLIP["mean"], "std": HALVES["std"]}
    config |= {"resize_mode": mode} if mode else {}
    config |= {"interpolation": interpolation} if interpolation else {}
    how = told(tmp_path, "clip-vision", size, "open_clip", open_clip_config={"preprocess_cfg": config})
    theirs = open_clip.image_transform(size, False, **config)
    for image in PICTURES[:18]:
        assert apart(image_tensor(image, how), theirs(image), how.std) <= ONE_LEVEL


# without files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dialect, published", [
    ("vit", "hf", HUGGING_FACE["vit, 2021"]), ("vit", "hf-model", HUGGING_FACE["vit, 2023"]),
    ("swin", "hf-bare", HUGGING_FACE["swin"]), ("clip-vision", "transformers-5", HUGGING_FACE["clip, 2022"]),
    ("blip", "hf", HUGGING_FACE["blip"]), ("blip2", "hf", HUGGING_FACE["blip2"]),
])
def test_hugging_faces_usual_values(kind, dialect, published, tmp_path):
    how = told(tmp_path, kind, published[1], preprocessor_config=published[2])
    (tmp_path / "preprocessor_config.json").unlink()
    assert told(tmp_path, kind, published[1], dialect) == how


def test_usual_values_of_the_others(tmp_path):
    assert defaults("swin", "microsoft", 224) == defaults("swin", "timm", (224, 224))
    told_by = {"open_clip_config": {"model_cfg": {"vision_cfg": {"image_size": 224}}}}
    assert told(tmp_path, "clip-vision", 224, "open_clip", **told_by) == preparing(
        defaults("clip-vision", "open_clip", 224))


REFUSED = [
    ("preprocessor_config", {"image_processor_type": "NoSuchProcessor"}, "a NoSuchProcessor are not known"),
    ("preprocessor_config", {"size": 64, "resample": 0}, "resample 0"),
    ("preprocessor_config", {"size": {"shortest_edge": 64}}, "without a crop"),
    ("preprocessor_config", {"size": {"shortest_edge": 64, "longest_edge": 80}}, "size .* is neither"),
    ("preprocessor_config", {"size": 32}, "pictures of 32 x 32, and the model reads 64 x 64"),
    ("preprocessor_config", {"size": 64, "do_pad": True}, "do_pad is not done"),
    ("preprocessor_config", {"size": 64, "image_mean": [0.5]}, "three numbers"),
    ("preprocessor_config", {"size": 64, "image_mean": [256.0] * 3}, "image_mean is"),
    ("preprocessor_config", {"size": 64, "image_std": [256.0] * 3}, "image_std is"),
    ("preprocessor_config", {"do_resize": False, "do_center_crop": True, "crop_size": 64}, "without a res"),
    ("config", {"pretrained_cfg": {"mean": [1.1] * 3}}, "mean is"),
    ("config", {"pretrained_cfg": {"std": [1.1] * 3}}, "std is"),
    ("config", {"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode 'border'"),
    ("config", {"pretrained_cfg": {"interpolation": "box"}}, "interpolation 'box'"),
    ("config", {"pretrained_cfg": {"input_size": [3, 32, 32]}}, "3 x 32 x 32, and the model reads 3 x 64"),
    ("config", {"pretrained_cfg": {"input_size": [1, 64, 64]}}, "1 x 64 x 64"),
    ("open_clip_config", {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode 'longest'"),
    ("open_clip_config", {"preprocess_cfg": {"interpolation": "lanczos"}}, "interpolation 'lanczos'"),
]


@pytest.mark.parametrize("file, config, words", REFUSED)
def test_what_is_not_done_is_refused_in_one_line(file, config, words, tmp_path):
    (tmp_path / f"{file}.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=words) as caught:
        from_files(tmp_path, "hf", "vit", 64)
    assert "\n" not in str(caught.value) and f"{file}.json" in str(caught.value)


def test_no_resize_reads_pictures_of_the_right_size(tmp_path):
    config = {"do_resize": False, "image_processor_type": "ViTImageProcessor"}
    how = told(tmp_path, "vit", 64, preprocessor_config=config)
    image = picture(64, 64, "noise")
    expected = AutoImageProcessor.from_pretrained(tmp_path)(image).pixel_values[0]
    assert apart(image_tensor(image, how), expected, how.std) < 0.01


def test_folders_and_lone_files_as_they_are_saved(tmp_path, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 32), depth=1)
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    how = Preprocessing((48, 32), (53, 35), "bicubic", **HALVES)
    assert preparing(preprocessing("vit", tmp_path / "timm")) == how
    (tmp_path / "timm" / "preprocessor_config.json").write_text('{"size": 7}')  # of something else there
    (tmp_path / "timm" / "config.json").write_text('{"model_type": "bert"}')
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    tiny = replace(CONFIGS["vit-b-16"], img_size=(48, 48), embed_dim=192, depth=1, num_heads=3,
                   hidden_features=768)
    monkeypatch.setitem(CONFIGS, "tiny", tiny)
    save_file(model.state_dict(), tmp_path / "timm" / "one.safetensors")
    assert preprocessing("vit", tmp_path / "timm" / "one.safetensors") == defaults("vit", "timm", 48)

    config = CLIPVisionConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                              image_size=64, patch_size=16, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    usual = preprocessing("clip-vision", tmp_path / "clip")
    assert usual == defaults("clip-vision", "hf", 64)
    CLIPImageProcessorPil(size=70, crop_size=64).save_pretrained(tmp_path / "clip")
    assert preprocessing("clip-vision", tmp_path / "clip") == usual | {"resize": 70}
    file = tmp_path / "clip" / "model.safetensors"
    assert preprocessing("clip-vision", file) == usual | {"resize": 70}


def test_the_miniatures_read_what_the_autoencoder_does():
    for kind, name in (("vit", "vit-mini"), ("swin", "swinv2-mini"), ("blip", "blip-mini")):
        assert preparing(preprocessing(kind, name)) == Preprocessing.square(64)
    assert preparing(preprocessing("clip-vision", "clip-mini")) == replace(Preprocessing.square(64), **CLIP)


def test_a_kind_without_pictures():
    with pytest.raises(WeightsError, match="a minilm reads no pictures"):
        preprocessing("minilm", "minilm")


GOOD = asdict(Preprocessing.square(8))


@pytest.mark.parametrize("wrong", [
    {"size": (8,)}, {"size": (0, 8)}, {"resize": 0}, {"resize": (8, 8, 8)}, {"filter": "box"},
    {"std": (1, 1, 0)}, {"mean": (0.5,)}, {"mean": (0, 0, float("nan"))}, {"rules": "floor"},
    {"squash": True},
])
def test_a_preprocessing_that_cannot_be(wrong):
    assert len({Preprocessing(**GOOD | {"size": (1, 1), "resize": side}) for side in (1, 1)}) == 1
    with pytest.raises(ValueError, match="no such preprocessing"):
        Preprocessing(**GOOD | wrong)


# grey levels of before, and strips --------------------------------------------------------------------------


# Of pictures 0 to 3, as image_tensor gave them when it called Pillow and torch by itself.
LEVELS = {
    ("bicubic", "torchvision"): [
        [132, 130, 128, 132, 127, 129, 125, 122, 129, 128, 123, 133, 134, 126, 123, 130, 128, 127],
        [130, 131, 128, 132, 140, 130, 130, 131, 128, 132, 140, 130, 130, 131, 128, 132, 140, 130],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 79, 209, 245, 91, 188, 215],
        [114, 140, 147, 88, 132, 85, 198, 194, 195, 88, 139, 191, 27, 33, 43, 20, 37, 75],
    ],
    ("bicubic", "transformers"): [
        [132, 130, 128, 132, 127, 129, 125, 122, 129, 128, 123, 133, 134, 126, 123, 130, 128, 127],
        [130, 131, 128, 132, 140, 130, 130, 131, 128, 132, 140, 130, 130, 131, 128, 132, 140, 130],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 79, 209, 245, 91, 188, 215],
        [86, 114, 140, 79, 88, 132, 197, 198, 194, 113, 88, 139, 21, 27, 33, 21, 20, 37],
    ],
    ("bilinear", "torchvision"): [
        [131, 130, 128, 131, 128, 129, 126, 123, 129, 128, 125, 132, 133, 127, 124, 130, 127, 127],
        [130, 132, 128, 132, 137, 130, 130, 132, 128, 132, 137, 130, 130, 132, 128, 132, 137, 130],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 86, 198, 229, 96, 180, 203],
        [112, 137, 139, 90, 124, 87, 193, 192, 197, 95, 138, 187, 26, 33, 45, 21, 37, 72],
    ],
    ("bilinear", "transformers"): [
        [131, 130, 128, 131, 128, 129, 126, 123, 129, 128, 125, 132, 133, 127, 124, 130, 127, 127],
        [130, 132, 128, 132, 137, 130, 130, 132, 128, 132, 137, 130, 130, 132, 128, 132, 137, 130],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 86, 198, 229, 96, 180, 203],
        [86, 112, 137, 79, 90, 124, 193, 193, 192, 116, 95, 138, 21, 26, 33, 20, 21, 37],
    ],
    ("lanczos", "torchvision"): [
        [131, 131, 129, 133, 127, 128, 125, 122, 130, 128, 123, 133, 134, 126, 123, 129, 128, 128],
        [130, 129, 128, 132, 140, 129, 130, 129, 128, 132, 140, 129, 130, 129, 128, 132, 140, 129],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 77, 212, 250, 90, 190, 219],
        [115, 141, 152, 84, 139, 83, 202, 195, 193, 85, 140, 194, 29, 33, 42, 19, 37, 77],
    ],
    ("lanczos", "transformers"): [
        [131, 131, 129, 133, 127, 128, 125, 122, 130, 128, 123, 133, 134, 126, 123, 129, 128, 128],
        [130, 129, 128, 132, 140, 129, 130, 129, 128, 132, 140, 129, 130, 129, 128, 132, 140, 129],
        [77, 109, 141, 77, 109, 141, 109, 109, 109, 141, 141, 141, 77, 212, 250, 90, 190, 219],
        [86, 115, 141, 80, 84, 139, 200, 202, 195, 114, 85, 140, 22, 29, 33, 21, 19, 37],
    ],
}


@pytest.mark.parametrize("filter, rules", LEVELS)
def test_the_levels_have_not_changed(filter, rules):
    """The latents and features that users have cached depend on them."""
    how = Preprocessing((2, 3), (7, 8), filter, (0, 0, 0), (1, 1, 1), rules)
    for image, expected in zip(PICTURES[:4], LEVELS[filter, rules], strict=True):
        assert (image_tensor(image, how) * 255).round().int().flatten().tolist() == expected


@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("rules, bound", [("torchvision", ONE_LEVEL), ("transformers", 2 * ONE_LEVEL)])
@pytest.mark.parametrize("shape", [(20, 400), (60, 700), (3, 200), (200, 3), (1, 90), (400, 20), (700, 60)])
def test_a_strip_is_resized_as_if_whole(filter, rules, bound, shape, monkeypatch):
    # Pillow 13 begins with the rows where much of a tall picture goes: edges and noise differ by that
    kinds = ["smooth"] if shape[0] > 300 else KINDS
    for size, resize in (((32, 32), 36), ((61, 40), 56), ((40, 61), (36, 40))):
        how = Preprocessing(size, resize, filter, **HALVES, rules=rules)
        for image in (picture(*shape, kind) for kind in kinds):
            with monkeypatch.context() as patch:
                ours = image_tensor(image, how)
                patch.setattr(data, "STRIP", 1000)
                assert apart(ours, image_tensor(image, how), how.std) <= bound


def test_the_longest_strips_take_no_gigabytes():
    code = """
import resource, sys
from PIL import Image
from data import Preprocessing, image_tensor
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
for rules in ("torchvision", "transformers"):
    how = Preprocessing((512, 512), 512, "bicubic", (0, 0, 0), (1, 1, 1), rules)
    for shape in ((1, 20_000), (20_000, 1)):
        assert image_tensor(Image.new("RGB", shape, "white"), how).eq(1).all()
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert run.returncode == 0 and float(run.stdout) < 200, run.stdout + run.stderr


# what a user expects ----------------------------------------------------------------------------------------


def levels(image, form="PNG", size=8, **options):
    """The picture saved, loaded and prepared, as grey levels (3, size, size)."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    tensor = image_tensor(load_image(buffer.getvalue()), Preprocessing.square(size))
    return ((tensor + 1) * 127.5).round()


def test_transparent_parts_are_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.paste(0, (0, 0, 4, 8))
    assert levels(palette)[:, 0, 0].tolist() == [200, 100, 50]
    clear = levels(palette, transparency=0)
    assert clear[:, 0, 0].tolist() == [255] * 3 and clear[:, 0, 4].tolist() == [10, 20, 30]
    assert levels(palette, "GIF", transparency=0)[:, 0, 0].tolist() == [255] * 3
    some = levels(palette, transparency=bytes([0, 255]))
    assert some[:, 0, 0].tolist() == [255] * 3 and some[:, 0, 4].tolist() == [10, 20, 30]
    assert levels(Image.new("LA", (8, 8), (0, 0))).eq(255).all()
    assert levels(Image.new("LA", (8, 8), (40, 255))).eq(40).all()
    assert levels(Image.new("RGBA", (8, 8), (255, 0, 0, 51)))[:, 0, 0].tolist() == [255, 204, 204]
    assert levels(Image.new("L", (8, 8), 7), transparency=7).eq(255).all()


def test_grey_is_grey_however_deep():
    assert levels(Image.new("1", (8, 8), 1)).eq(255).all() and levels(Image.new("1", (8, 8), 0)).eq(0).all()
    assert levels(Image.new("L", (8, 8), 77)).eq(77).all()
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    assert levels(deep).eq(128).all() and levels(deep, "TIFF").eq(128).all()
    assert levels(deep, transparency=128 * 257).eq(255).all()


def test_cmyk_has_its_colours():
    red = levels(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")[:, 0, 0]
    assert red.tolist() == [255, 0, 0]
    red = levels(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)[:, 0, 0]
    assert red[0] > 245 and red[1:].max() < 10


@pytest.mark.parametrize("turn, orientation", [
    (None, 1), ("FLIP_LEFT_RIGHT", 2), ("ROTATE_180", 3), ("FLIP_TOP_BOTTOM", 4),
    ("TRANSPOSE", 5), ("ROTATE_90", 6), ("TRANSVERSE", 7), ("ROTATE_270", 8),
])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_turned_camera_gives_an_upright_picture(turn, orientation, form):
    upright = picture(30, 20, "photo")
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(levels(stored, form, 16, exif=exif), levels(upright, form, 16))


@pytest.mark.parametrize("kind, source", [("clip-vision", "clip-mini"), ("blip", "blip-mini")])
def test_a_miniature_gets_the_colours_that_its_file_states(kind: str, source: str):
    stated = json.loads((ROOT / "mini" / source / "preprocessor_config.json").read_text())
    ours = preprocessing(kind, source)
    assert (list(ours["mean"]), list(ours["std"])) == (stated["image_mean"], stated["image_std"])
