"""The published architectures: their number of parameters, and the options that no tensor's shape shows."""

import pytest
import torch

from models import bert, blip, blip2, clip, swin, unet, vae, vit
from weights.golden import SD_2_TINY

SD_1 = dict(num_heads=8, num_head_channels=None, use_linear_in_transformer=False)
SD_2 = dict(num_heads=None, num_head_channels=64, use_linear_in_transformer=True)
FACTOR = dict(scale_factor=0.18215, norm_groups=32)
QUICK, EXACT = (dict(hidden_act=name, layer_norm_eps=1e-5) for name in ("quick_gelu", "gelu"))
TIMM_VIT = dict(norm_eps=1e-6, class_token=True, global_pool="token", fc_norm=False)
BLIP = dict(
    vision_layer_norm_eps=1e-5, text_layer_norm_eps=1e-12, text_num_attention_heads=12, vision_image_size=384,
    text_bos_token_id=30522, text_pad_token_id=0, text_sep_token_id=102,
)  # fmt: skip
BLIP_2 = dict(
    vision_layer_norm_eps=1e-6, vision_num_attention_heads=16, vision_image_size=224, num_query_tokens=32,
    qformer_layer_norm_eps=1e-12, qformer_num_attention_heads=12, qformer_cross_attention_frequency=2,
    text_num_attention_heads=32, text_max_position_embeddings=2048, text_bos_token_id=2,
    text_pad_token_id=1, text_eos_token_id=50118,
)  # fmt: skip
# (model, its configurations, name, parameters, options), the counts as the authors or timm state them.
PUBLISHED = [
    (unet.UNet, unet.CONFIGS, "sd-1", 859_520_964, SD_1),
    (unet.UNet, unet.CONFIGS, "sd-2", 865_910_724, SD_2),
    (vae.VAE, vae.CONFIGS, "sd-1", 83_653_863, FACTOR),
    (vae.VAE, vae.CONFIGS, "sd-2", 83_653_863, FACTOR),
    (clip.CLIPText, clip.CONFIGS, "sd-1", 123_060_480, QUICK | {"num_attention_heads": 12}),
    (clip.CLIPText, clip.CONFIGS, "sd-2", 340_387_840, EXACT | {"num_attention_heads": 16}),
    (clip.CLIPText, clip.CONFIGS, "clip-b-32", 63_428_096, QUICK | {"num_attention_heads": 8}),
    (clip.CLIPText, clip.CONFIGS, "clip-l-14", 123_650_304, QUICK | {"num_attention_heads": 12}),
    (clip.CLIPText, clip.CONFIGS, "clip-h-14", 354_032_640, EXACT | {"num_attention_heads": 16}),
    (clip.CLIPVision, clip.VISION_CONFIGS, "clip-b-32", 87_849_216, QUICK | {"num_attention_heads": 12}),
    (clip.CLIPVision, clip.VISION_CONFIGS, "clip-l-14", 303_966_208, QUICK | {"num_attention_heads": 16}),
    (clip.CLIPVision, clip.VISION_CONFIGS, "clip-h-14", 632_076_800, EXACT | {"num_attention_heads": 16}),
    (vit.ViT, vit.CONFIGS, "vit-b-16", 85_798_656, TIMM_VIT | {"num_heads": 12}),
    (vit.ViT, vit.CONFIGS, "vit-l-16", 303_301_632, TIMM_VIT | {"num_heads": 16}),
    (swin.Swin, swin.CONFIGS, "swin-t", 27_519_354, {"img_size": (224, 224), "window_size": 7}),
    (swin.Swin, swin.CONFIGS, "swin-b", 86_743_224, {"img_size": (224, 224), "window_size": 7}),
    (swin.Swin, swin.CONFIGS, "swin-l", 194_995_476, {"img_size": (224, 224), "window_size": 7}),
    (swin.Swin, swin.CONFIGS, "swinv2-l", 195_202_932, {"pretrained_window_sizes": (12, 12, 12, 6)}),
    (blip.BLIP, blip.CONFIGS, "blip-base", 223_971_644, BLIP | {"vision_num_attention_heads": 12}),
    (blip.BLIP, blip.CONFIGS, "blip-large", 446_290_492, BLIP | {"vision_num_attention_heads": 16}),
    (blip2.BLIP2, blip2.CONFIGS, "blip2-opt-2.7b", 3_744_761_856, BLIP_2),
    (unet.UNet, SD_2_TINY, "unet", 5_880_068, SD_2 | dict(num_head_channels=32, attention_levels=(0, 1))),
    (clip.CLIPText, SD_2_TINY, "clip-text", 441_408, EXACT | {"num_attention_heads": 3}),
    (bert.Bert, bert.CONFIGS, "minilm", 22_565_376, {"num_attention_heads": 12, "layer_norm_eps": 1e-12}),
]


@pytest.mark.parametrize("model, configs, name, parameters, options", PUBLISHED)
def test_the_published_sizes(model: type, configs: dict, name: str, parameters: int, options: dict):
    with torch.device("meta"):
        built = model(configs[name])
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    assert options.items() <= vars(configs[name]).items()
