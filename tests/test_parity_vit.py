"""models/vit.py against timm and transformers: numbers, and the names and sizes in their files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

from models.vit import CONFIGS, ViT, ViTConfig
from tests import in_memory, parity
from tests.parity import (
    assert_parity,
    assert_same_shapes,
    first_difference,
    home_names,
    misnamed,
    parameters,
    randomise,
    timm_features,
)
from weights import WeightsError, from_home
from weights.kinds.vit import KIND
from weights.options import sizes_of

TINY = ViTConfig(
    img_size=(16, 16), patch_size=(4, 4), in_chans=3, embed_dim=24, depth=3, num_heads=3, hidden_features=80,
    qkv_bias=True, class_token=True, global_pool="token", fc_norm=False, norm_eps=1e-6,
)
VARIANTS: dict[str, ViTConfig] = {
    "token": TINY,
    "mean": replace(TINY, global_pool="avg", fc_norm=True),
    "mean-norm-first": replace(TINY, global_pool="avg"),
    "token-norm-last": replace(TINY, fc_norm=True),
    "no-class-token": replace(TINY, class_token=False, global_pool="avg", fc_norm=True),
    "no-qkv-bias": replace(TINY, qkv_bias=False),
    "not-square": replace(TINY, img_size=(24, 8), patch_size=(4, 2)),
    "odd": replace(TINY, img_size=(17, 23), patch_size=(5, 5), in_chans=1, depth=1, num_heads=1,
                   embed_dim=21, hidden_features=43),
}
IN_HF = ("token", "no-qkv-bias", "not-square", "odd")


def timm_arguments(config: ViTConfig) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in (
        "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "class_token",
        "global_pool", "fc_norm",
    )}
    # timm rounds down: half a unit more, so that no quotient falls below the whole number
    return given | {"mlp_ratio": (config.hidden_features + 0.5) / config.embed_dim}


def of_timm(config: ViTConfig, num_classes: int = 5) -> nn.Module:
    """With its head; the architecture's own sizes are overridden one by one."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **timm_arguments(config))


def hf_config(config: ViTConfig) -> transformers.ViTConfig:
    return transformers.ViTConfig(
        hidden_size=config.embed_dim, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        intermediate_size=config.hidden_features, image_size=list(config.img_size),
        patch_size=list(config.patch_size), num_channels=config.in_chans, qkv_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
    )


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return in_memory.home("vit", tensors)


def filled(config: ViTConfig, theirs: nn.Module) -> ViT:
    ours = ViT(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours


def pictures(config: ViTConfig = TINY, batch: int = 2) -> Tensor:
    return parity.pictures(config.in_chans, config.img_size, batch)


def sizes(config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> ViTConfig:
    return sizes_of(KIND, config, home(tensors), "here")


def fit(config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
    parity.fit(KIND, config, home(tensors))


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", VARIANTS)
def test_features_and_gradients_as_in_timm(name: str) -> None:
    config = VARIANTS[name]
    theirs, given = randomise(of_timm(config)), pictures(config)
    ours = filled(config, theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: timm_features(theirs, given))


@pytest.mark.parametrize("name", IN_HF)
@pytest.mark.parametrize("model", ["ViTModel", "ViTForImageClassification"])
def test_features_and_gradients_as_in_transformers(model: str, name: str) -> None:
    config = replace(VARIANTS[name], norm_eps=1e-12)
    theirs, given = randomise(getattr(transformers, model)(hf_config(config))), pictures(config)
    ours, encoder = filled(config, theirs), getattr(theirs, "vit", theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: encoder(given).last_hidden_state[:, 0])


def test_features_are_what_the_classifiers_read() -> None:
    given = pictures()
    theirs = randomise(of_timm(TINY))
    assert torch.allclose(theirs.head(filled(TINY, theirs)(given)), theirs(given), rtol=0, atol=1e-10)
    config = replace(TINY, norm_eps=1e-12)
    theirs = randomise(transformers.ViTForImageClassification(hf_config(config)))
    logits = theirs.classifier(filled(config, theirs)(given))
    assert torch.allclose(logits, theirs(given).logits, rtol=0, atol=1e-10)


def test_eps_is_the_configuration_s() -> None:
    config = replace(TINY, norm_eps=1e-3)
    theirs, given = randomise(transformers.ViTModel(hf_config(config))), pictures()
    ours = filled(config, theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs(given).last_hidden_state[:, 0])


@pytest.mark.parametrize("config", [TINY, replace(TINY, global_pool="avg")])
def test_checkpointing_changes_no_gradient(config: ViTConfig) -> None:
    ours, given = filled(config, randomise(of_timm(config))).train(), pictures(config)
    found = []
    for ours.checkpointing in (False, True):
        ours.zero_grad(set_to_none=True)
        ours(given).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("name, theirs", [
    ("vit-b-16", "vit_base_patch16_224"), ("vit-l-16", "vit_large_patch16_224"),
])
def test_full_size_names_and_shapes(name: str, theirs: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        ours, in_timm = ViT(config), timm.create_model(theirs)
        in_hf = transformers.ViTModel(hf_config(config))
    for reference in (in_timm, in_hf):
        assert_same_shapes(ours, home(parameters(reference)))
        assert ours.width == config.embed_dim
    assert sizes(None, parameters(in_timm)) == config
    assert in_timm.blocks[0].attn.num_heads == config.num_heads
    assert {m.eps for m in in_timm.modules() if isinstance(m, nn.LayerNorm)} == {config.norm_eps}


def test_the_miniature_on_its_own_pictures() -> None:
    config = CONFIGS["vit-mini"]
    with torch.device("meta"):
        ours, theirs = ViT(config), of_timm(config)
    assert_same_shapes(ours, home(parameters(theirs)))
    assert sizes(None, parameters(theirs)) == config
    assert ViT(config)(torch.zeros(2, 3, 64, 64)).shape == (2, config.embed_dim)


def test_a_wrong_weight_and_a_wrong_eps_are_found_where_they_are() -> None:
    theirs, given = randomise(of_timm(TINY, num_classes=0)), pictures()
    ours = filled(TINY, theirs)
    names = home_names(theirs, home)
    runs = [lambda: ours(given), lambda: theirs(given)]
    assert first_difference(ours, theirs, names, *runs) == ""
    with torch.no_grad():
        ours.blocks[1].mlp.fc1.bias[0].add_(1e-6)
    with pytest.raises(AssertionError, match=r"^blocks\.1\.mlp\.fc1 is the first layer that gives"):
        assert_parity(ours, theirs, home, *runs)
    ours.blocks[0].norm2.eps = 1e-5
    assert first_difference(ours, theirs, names, *runs).startswith("blocks.0.norm2 is the first layer that")


def of_both(oracle: str) -> tuple[ViT, nn.Module, Any]:
    """Ours, theirs, and what runs theirs."""
    if oracle == "timm":
        theirs = randomise(of_timm(TINY, num_classes=0))
        return filled(TINY, theirs), theirs, theirs
    config = replace(TINY, norm_eps=1e-12)
    theirs = randomise(transformers.ViTModel(hf_config(config)))
    return filled(config, theirs), theirs, lambda images: theirs(images).last_hidden_state[:, 0]


@pytest.mark.parametrize("oracle", ["timm", "transformers"])
def test_every_broken_layer_is_named(oracle: str) -> None:
    (ours, theirs, run_theirs), given = of_both(oracle), pictures()
    said = misnamed(ours, theirs, home, lambda: ours(given), lambda: run_theirs(given))
    assert said.keys() == {"cls_token", "pos_embed"}  # no layer: they show at the first one behind them
    assert all(found.startswith("blocks.0.norm1 is the first layer that reads") for found in said.values())


@pytest.mark.parametrize("third", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("oracle", ["timm", "transformers"])
def test_a_broken_third_of_q_k_and_v_is_found_in_their_layer(oracle: str, third: int) -> None:
    (ours, theirs, run_theirs), given = of_both(oracle), pictures()
    with torch.no_grad():
        ours.blocks[1].attn.qkv.weight[24 * third + 5, 3].add_(1e-6)
    with pytest.raises(AssertionError, match=r"^blocks\.1\.attn\.qkv is the first layer that gives"):
        assert_parity(ours, theirs, home, lambda: ours(given), lambda: run_theirs(given))


@pytest.mark.parametrize("size", [(16, 20), (8, 16), (32, 32)])
def test_pictures_of_another_size_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^images are {size[0]}x{size[1]}, this ViT takes 16x16"):
        ViT(TINY)(torch.zeros(2, 3, *size))


@pytest.mark.parametrize("change", [{"global_pool": "max"}, {"class_token": False}])
def test_a_pooling_that_cannot_be_is_refused_at_once(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="global_pool is"):
        ViT(replace(TINY, **change))


# Names


@pytest.mark.parametrize("model", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_what_transformers_saves_is_what_it_published_and_is_read(model: str, tmp_path: Path) -> None:
    config = replace(TINY, norm_eps=1e-12)
    theirs = getattr(transformers, model)(hf_config(config))
    theirs.save_pretrained(tmp_path)
    stated, tensors = saved(tmp_path)
    prefix = "" if model == "ViTModel" else "vit."
    assert f"{prefix}encoder.layer.0.attention.attention.query.weight" in tensors
    assert sizes(stated, tensors) == config
    expected = home(parameters(theirs))  # from the names in memory, which are others
    found = home(tensors)
    assert found.keys() == expected.keys() == ViT(config).state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    back = from_home("vit", found, "hf-model" if model == "ViTModel" else "hf")
    assert back.keys() < tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())


def test_q_k_and_v_are_stacked_in_this_order() -> None:
    part = "encoder.layer.0.attention.attention."
    thirds = enumerate(["query", "key", "value"])
    tensors = {f"{part}{name}.bias": torch.full((2,), float(i)) for i, name in thirds}
    tensors["encoder.layer.0.layernorm_before.bias"] = torch.zeros(2)
    assert home(tensors)["blocks.0.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_layer_that_timm_once_had_before_its_head_is_dropped() -> None:
    tensors = parameters(of_timm(TINY))
    assert home(tensors | {"pre_logits.fc.weight": torch.zeros(24, 24)}).keys() == home(tensors).keys()


# Sizes


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_of_a_folder_of_timm(name: str, tmp_path: Path) -> None:
    save_for_hf(of_timm(VARIANTS[name]), tmp_path, safe_serialization=True)
    assert sizes(*saved(tmp_path)) == VARIANTS[name]


@pytest.mark.parametrize("name", IN_HF)
def test_sizes_of_a_folder_of_hugging_face(name: str) -> None:
    config = replace(VARIANTS[name], norm_eps=1e-12)
    with torch.device("meta"):
        theirs = transformers.ViTForImageClassification(hf_config(config))
    assert sizes(hf_config(config).to_dict(), parameters(theirs)) == config


@pytest.mark.parametrize("architecture", [
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch32_384", "vit_base_patch16_224_miil",
    "vit_base_patch16_gap_224", "vit_huge_patch14_gap_224", "vit_giant_patch14_224",
    "vit_gigantic_patch14_224", "deit_small_patch16_224", "test_vit",
])
@pytest.mark.parametrize("flat", [False, True])
def test_sizes_of_timm_s_architectures(architecture: str, flat: bool) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    described = {"input_size": list(theirs.pretrained_cfg["input_size"])}
    stated = {"architecture": architecture, "num_classes": 1000, "global_pool": theirs.global_pool}
    stated |= described if flat else {"pretrained_cfg": described}
    found = sizes(stated, parameters(theirs))
    with torch.device("meta"):
        assert_same_shapes(ViT(found), home(parameters(theirs)))
    assert found.num_heads == theirs.blocks[0].attn.num_heads
    assert found.img_size == theirs.patch_embed.img_size
    assert found.global_pool == theirs.global_pool
    assert {m.eps for m in theirs.modules() if isinstance(m, nn.LayerNorm)} == {found.norm_eps}
    if found.img_size == (224, 224):  # a file that states no size
        assert sizes(stated | {"pretrained_cfg": {}, "input_size": None}, parameters(theirs)) == found


def test_only_published_sizes_are_read_without_config_json(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="^here: without a config.json .*nearest is vit-.*config.json$"):
        sizes(None, parameters(of_timm(TINY)))
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    assert sizes(None, parameters(of_timm(TINY))) == TINY
    mean = replace(TINY, global_pool="avg", fc_norm=True)
    with pytest.raises(WeightsError, match="nearest is tiny, which differs in fc_norm.bias, fc_norm.weight"):
        sizes(None, parameters(of_timm(mean)))


HF_ODD = [
    ({"model_type": "vit_mae"}, "model_type = 'vit_mae'"),
    ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ({"num_attention_heads": 5}, "embed_dim = 24 is not 5 equal heads"),
    ({"image_size": 32}, r"pos_embed \(1, 17, 24\) instead of \(1, 65, 24\)"),
    ({"hidden_size": 48}, r"cls_token \(1, 1, 24\) instead of \(1, 1, 48\)"),
    ({"num_hidden_layers": 4}, "12 missing: blocks.3"),
    ({"qkv_bias": False}, "3 unexpected: blocks.0.attn.qkv.bias"),
]


@pytest.mark.parametrize("change, message", HF_ODD)
def test_what_hugging_face_can_and_models_cannot_is_refused(change: dict[str, Any], message: str) -> None:
    stated = hf_config(TINY).to_dict()
    with pytest.raises(WeightsError, match=f"^here.*{message}"):
        fit(stated | change, parameters(of_timm(TINY)))


TIMM_ODD = [
    ({"qk_norm": True}, "qk_norm"),
    ({"init_values": 1e-5}, "init_values = 1e-05"),
    ({"reg_tokens": 2}, "reg_tokens = 2"),
    ({"pre_norm": True}, "pre_norm"),
    ({"scale_mlp_norm": True}, "scale_mlp_norm"),
    ({"global_pool": "map"}, "global_pool = 'map'"),
    ({"no_embed_class": True}, "no_embed_class = True"),
    ({"proj_bias": False}, "proj_bias = False"),
    ({"final_norm": False}, "final_norm = False"),
    ({"pool_include_prefix": True}, "pool_include_prefix = True"),
    ({"global_pool": "max"}, "global_pool = 'max'"),
    ({"act_layer": "quick_gelu"}, "act_layer = 'quick_gelu'"),
    ({"norm_layer": "rmsnorm"}, "norm_layer = 'rmsnorm'"),
    ({"pos_embed": "none"}, "pos_embed = 'none'"),
]


@pytest.mark.parametrize("change, message", TIMM_ODD)
def test_what_timm_can_and_models_cannot_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = timm_arguments(TINY) | {"fc_norm": None} | change
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    stated, tensors = saved(tmp_path)
    with pytest.raises(WeightsError, match=f"^here: .*{message}"):
        sizes(stated, tensors)


def test_an_argument_that_is_not_known_is_refused() -> None:
    stated = {"architecture": "vit_tiny_patch16_224", "model_args": timm_arguments(TINY) | {"rope": "mixed"}}
    with pytest.raises(WeightsError, match="^here: options unknown here, .*rope = 'mixed'"):
        sizes(stated, parameters(of_timm(TINY)))


@pytest.mark.parametrize("architecture", [
    "vit_base_patch16_rpn_224", "vit_large_patch16_siglip_gap_512.v2_webli", "vit_base_patch16_clip_224",
    "vit_relpos_base_patch16_224", "vit_base_r50_s16_224",
])
def test_architectures_that_only_look_like_it_are_refused(architecture: str) -> None:
    with pytest.raises(WeightsError, match=f"^here: {architecture.partition('.')[0]} is not implemented"):
        sizes({"architecture": architecture}, parameters(of_timm(TINY)))


def test_weights_that_are_not_the_architecture_s_are_refused() -> None:
    stated = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 16, 16]}}
    with pytest.raises(WeightsError, match="^here does not fit the model.* missing: .* of a wrong shape: "):
        fit(stated, parameters(of_timm(TINY)))


def test_the_class_token_s_pooling_without_a_class_token_is_refused() -> None:
    config = VARIANTS["no-class-token"]
    stated = {"architecture": "vit_tiny_patch16_224", "model_args": timm_arguments(config)}
    stated["model_args"]["global_pool"] = "token"
    with pytest.raises(WeightsError, match="^here: .*global_pool is 'token': .* with a class token"):
        fit(stated, parameters(of_timm(config)))


def test_other_kinds_say_that_they_are_others() -> None:
    assert KIND.owns({"architecture": "vit_tiny_patch16_224.augreg"}) and KIND.owns({"model_type": "vit"})
    assert not KIND.owns({"architecture": "swin_tiny"}) and not KIND.owns({"model_type": "bert"})
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    ))
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    for other in (bert, swin):
        with pytest.raises(WeightsError, match="^no vit in any dialect"):
            home(parameters(other))
