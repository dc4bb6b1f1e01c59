"""models/swin.py against timm and transformers: numbers, and the names and sizes in their files."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

from models.swin import CONFIGS, Swin, SwinConfig, stage_windows
from tests import in_memory, parity
from tests.parity import assert_parity, assert_same_shapes, misnamed, parameters, randomise, timm_features
from weights import WeightsError, from_home, load_strict
from weights.kinds.swin import KIND
from weights.options import sizes_of

# Grids of 8, 4 and 2: one that is shifted, one that is the window, one that is smaller.
TINY = SwinConfig(
    version=1, img_size=(32, 32), patch_size=(4, 4), in_chans=3, embed_dim=8, depths=(2, 2, 2),
    num_heads=(1, 2, 4), window_size=4, mlp_ratio=4.0, qkv_bias=True, pretrained_window_sizes=(),
)
ODD = replace(
    TINY, img_size=(28, 34), patch_size=(3, 5), in_chans=1, embed_dim=10, depths=(1, 3), num_heads=(1, 5),
    window_size=2, mlp_ratio=2.33,
)
VARIANTS: dict[str, SwinConfig] = {
    "plain": TINY,
    "padded": replace(TINY, window_size=3),
    # Grids of 12 x 8, 6 x 4 and 3 x 2: the second is shifted and padded along one axis only.
    "not-square": replace(TINY, img_size=(48, 32)),
    "odd": ODD,
    "no-qkv-bias": replace(TINY, qkv_bias=False),
    "windows-by-stage": replace(TINY, window_size=(2, 4, 1)),
    "one-stage": replace(TINY, depths=(2,), num_heads=(2,)),
}
# Windows no larger than any grid; padded by half a window, or where nothing is shifted; grids halved evenly.
IN_HF: dict[str, SwinConfig] = {
    "plain": replace(TINY, depths=(2, 3), num_heads=(1, 2)),
    "padded": replace(TINY, depths=(1, 1), num_heads=(1, 2), window_size=3),
    "half-padded": replace(TINY, img_size=(40, 40), depths=(2,), num_heads=(2,)),
    "not-square": replace(TINY, img_size=(32, 48), depths=(2, 2), num_heads=(1, 2), window_size=2),
    "odd": replace(ODD, img_size=(24, 40), depths=(3, 2), num_heads=(2, 1)),
    "no-qkv-bias": replace(TINY, depths=(2, 2), num_heads=(1, 2), qkv_bias=False),
}


def of_version(config: SwinConfig, version: int) -> SwinConfig:
    """Version 2 with windows pretrained smaller, not at all and larger than they are."""
    if version == 1:
        return config
    return replace(config, version=2, pretrained_window_sizes=(3, 0, 5)[: len(config.depths)])


def timm_arguments(config: SwinConfig) -> dict[str, Any]:
    given = asdict(config)
    if given.pop("version") == 1:
        del given["pretrained_window_sizes"]
    return given


def of_timm(config: SwinConfig, num_classes: int = 5) -> nn.Module:
    """With its head; the architecture's own sizes are overridden one by one."""
    name = "swin_tiny_patch4_window7_224" if config.version == 1 else "swinv2_tiny_window8_256"
    return timm.create_model(name, num_classes=num_classes, **timm_arguments(config))


def hf_config(config: SwinConfig) -> transformers.PreTrainedConfig:
    given = timm_arguments(config)
    given["image_size"], given["num_channels"] = list(given.pop("img_size")), given.pop("in_chans")
    return (transformers.SwinConfig if config.version == 1 else transformers.Swinv2Config)(**given)


def of_hf(config: SwinConfig, head: bool = False) -> nn.Module:
    called = "Swin" if config.version == 1 else "Swinv2"
    return getattr(transformers, called + ("ForImageClassification" if head else "Model"))(hf_config(config))


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return in_memory.home("swin", tensors)


def filled(config: SwinConfig, theirs: nn.Module) -> Swin:
    ours = Swin(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours


def pictures(config: SwinConfig = TINY, batch: int = 2) -> Tensor:
    return parity.pictures(config.in_chans, config.img_size, batch)


def sizes(config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> SwinConfig:
    return sizes_of(KIND, config, home(tensors), "here")


def fit(config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
    parity.fit(KIND, config, home(tensors))


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def as_microsoft(tensors: dict[str, Tensor], wrapped: bool = False) -> dict[str, Tensor]:
    """timm's names as Microsoft has them, with the tables that its files hold."""
    theirs = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", name):
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        theirs[name.replace("head.fc.", "head.")] = tensor
    for block in {name.split(".attn.")[0] for name in tensors if ".attn." in name}:
        for table in ("attn_mask", "attn.relative_position_index", "attn.relative_coords_table"):
            theirs[f"{block}.{table}"] = torch.zeros(4, 4)
    return {f"model.{name}": tensor for name, tensor in theirs.items()} if wrapped else theirs


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_features_and_gradients_as_in_timm(name: str, version: int) -> None:
    config = of_version(VARIANTS[name], version)
    theirs, given = randomise(of_timm(config, num_classes=0)), pictures(config)
    ours = filled(config, theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: timm_features(theirs, given))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name, head", [*((name, False) for name in IN_HF), ("plain", True)])
def test_features_and_gradients_as_in_transformers(name: str, head: bool, version: int) -> None:
    config = of_version(IN_HF[name], version)
    theirs, given = randomise(of_hf(config, head)), pictures(config)
    ours = filled(config, theirs)
    encoder = (theirs.swin if version == 1 else theirs.swinv2) if head else theirs
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: encoder(given).pooler_output)


def test_version_2_as_in_transformers_where_the_grid_is_smaller_than_the_window() -> None:
    config = of_version(TINY, 2)
    theirs, given = randomise(of_hf(config)), pictures(config)
    ours = filled(config, theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs(given).pooler_output)


def test_the_scale_of_the_cosines_is_bounded_and_the_mask_is_not_infinite() -> None:
    # In heads of width 1 every cosine is 1 or -1: a masked 100 meets unmasked -100s.
    config = of_version(replace(TINY, num_heads=(8, 16, 32)), 2)
    theirs, given = randomise(of_timm(config)), pictures(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("logit_scale"):
                parameter.add_(5.0)  # log 100 is 4.6: below and above it
    ours = filled(config, theirs)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: timm_features(theirs, given))


def test_short_queries_and_keys_have_a_direction() -> None:
    config = of_version(replace(TINY, qkv_bias=False), 2)
    theirs, given = randomise(of_timm(config)), pictures(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("qkv.weight"):
                parameter[: 2 * parameter.shape[1]].mul_(1e-12)
    ours = filled(config, theirs)
    assert torch.allclose(ours(given), timm_features(theirs, given), rtol=0, atol=1e-10)


@pytest.mark.parametrize("version", [1, 2])
def test_features_are_what_the_classifiers_read(version: int) -> None:
    config = of_version(IN_HF["plain"], version)
    theirs, given = randomise(of_timm(config)), pictures(config)
    assert torch.allclose(theirs.head.fc(filled(config, theirs)(given)), theirs(given), rtol=0, atol=1e-10)
    theirs = randomise(of_hf(config, head=True))
    logits = theirs.classifier(filled(config, theirs)(given))
    assert torch.allclose(logits, theirs(given).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("oracle", ["timm", "transformers"])
@pytest.mark.parametrize("version", [1, 2])
def test_every_broken_layer_is_named(version: int, oracle: str) -> None:
    config = of_version(TINY if oracle == "timm" else IN_HF["plain"], version)
    theirs = randomise(of_timm(config, num_classes=0) if oracle == "timm" else of_hf(config))
    ours, given = filled(config, theirs), pictures(config)
    said = misnamed(
        ours, theirs, home, lambda: ours(given),
        lambda: timm_features(theirs, given) if oracle == "timm" else theirs(given).pooler_output,
    )
    # These are read by no layer's call: they show at the attention's last layer.
    loose = "relative_position_bias_table" if version == 1 else "(logit_scale|[qv]_bias|qkv.weight)"
    for name, found in said.items():
        attention = re.fullmatch(rf"(.*\.attn)\.{loose}", name)
        assert attention and found.startswith(f"{attention[1]}.proj is the first layer that reads"), found


@pytest.mark.parametrize("version", [1, 2])
def test_checkpointing_changes_no_gradient(version: int) -> None:
    config = of_version(TINY, version)
    ours, given = filled(config, randomise(of_timm(config))).train(), pictures(config)
    found = []
    for ours.checkpointing in (False, True):
        ours.zero_grad(set_to_none=True)
        ours(given).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_built_on_meta_has_its_tables(version: int) -> None:
    config = of_version(TINY, version)
    theirs, given = randomise(of_timm(config)), pictures(config)
    with torch.device("meta"):
        ours = Swin(config).double().eval()
    load_strict(ours, home(parameters(theirs)))
    assert torch.equal(ours(given), filled(config, theirs)(given))


def test_images_of_another_size_and_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match="^images are 32x28, this Swin takes 32x32"):
        Swin(TINY)(torch.zeros(1, 3, 32, 28))
    with pytest.raises(ValueError, match="version is 3"):
        Swin(replace(TINY, version=3))


# ------------------------------------------------------------------------------------------------------------
# Names and sizes
# ------------------------------------------------------------------------------------------------------------

TIMM_NAMES = {
    "swin-t": "swin_tiny_patch4_window7_224", "swin-b": "swin_base_patch4_window7_224",
    "swin-l": "swin_large_patch4_window7_224", "swinv2-l": "swinv2_large_window12to16_192to256",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_names_and_shapes(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        ours, in_hf = Swin(config), of_hf(config)
        in_timm = timm.create_model(TIMM_NAMES[name]) if name in TIMM_NAMES else of_timm(config)
    for reference in (in_timm, in_hf):
        assert_same_shapes(ours, home(parameters(reference)))
    assert ours.width == in_timm.num_features


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384", "swin_s3_tiny_224",
    "swinv2_tiny_window8_256", "swinv2_large_window12to16_192to256", "swinv2_base_window12to24_192to384",
])
def test_windows_from_the_names_of_timm_s_architectures(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
        cfg = {"input_size": list(theirs.default_cfg["input_size"])}
        config = sizes({"architecture": name, "pretrained_cfg": cfg}, parameters(theirs))
        ours = Swin(config)
    assert_same_shapes(ours, home(parameters(theirs)))
    assert config.img_size == theirs.patch_embed.img_size
    for stage, in_timm in zip(ours.layers, theirs.layers, strict=True):
        for block, other in zip(stage.blocks, in_timm.blocks, strict=True):
            assert (block.window, block.shift) == (other.window_size, other.shift_size)
    if config.version == 2:
        before = [stage.blocks[0].attn.pretrained_window_size for stage in theirs.layers]
        assert before == [(side, side) for side in config.pretrained_window_sizes]
    if name in TIMM_NAMES.values():
        assert config in CONFIGS.values()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_that_timm_saved(name: str, version: int, tmp_path: Path) -> None:
    config = of_version(VARIANTS[name], version)
    theirs = of_timm(config)
    save_for_hf(theirs, tmp_path, model_args=timm_arguments(config), safe_serialization=True)
    found, tensors = saved(tmp_path)
    assert sizes(found, tensors) == config
    images = pictures(config).float()
    ours = Swin(config).eval()
    ours.load_state_dict(home(tensors), strict=True)
    assert torch.allclose(ours(images), timm_features(theirs.eval(), images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name, head", [*((name, True) for name in IN_HF), ("plain", False)])
def test_a_folder_that_transformers_saved(name: str, head: bool, version: int, tmp_path: Path) -> None:
    config = of_version(IN_HF[name], version)
    theirs = of_hf(config, head)
    theirs.save_pretrained(tmp_path)
    found, tensors = saved(tmp_path)
    assert sizes(found, tensors) == config
    encoder = home(parameters(theirs))
    assert encoder.keys() == home(tensors).keys()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in home(tensors).items())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_files_of_microsoft(wrapped: bool, version: int) -> None:
    config = of_version(TINY, version)
    theirs = parameters(of_timm(config))
    expected = {name: tensor for name, tensor in theirs.items() if not name.startswith("head.")}
    found = home(as_microsoft(theirs, wrapped))
    assert found.keys() == expected.keys()
    assert all(found[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize("dialect, version", [
    (dialect.name, version) for dialect in KIND.dialects for version in (1, 2)
    if ("v2" in dialect.name) == (version == 2) or "timm" in dialect.name or "microsoft" in dialect.name
])
def test_every_dialect_there_and_back(dialect: str, version: int) -> None:
    ours = parameters(Swin(of_version(TINY, version)))
    theirs = from_home("swin", ours, dialect)
    assert (theirs.keys() == ours.keys()) == (dialect == "timm")
    back = home(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_names_that_published_files_hold() -> None:
    ours = parameters(Swin(IN_HF["plain"]))
    theirs = from_home("swin", ours, "hf")
    assert theirs["swin.encoder.layers.0.downsample.norm.weight"] is ours["layers.1.downsample.norm.weight"]
    block = "swin.encoder.layers.1.blocks.2.attention"
    assert torch.equal(theirs[f"{block}.self.value.bias"], ours["layers.1.blocks.2.attn.qkv.bias"][32:])
    extra = {
        f"{block}.self.relative_position_index": torch.zeros(2), "swin.embeddings.mask_token": torch.zeros(2),
        "classifier.weight": torch.zeros(2), "decoder.0.weight": torch.zeros(2),
    }
    assert home(theirs | extra).keys() == ours.keys()
    two = parameters(Swin(of_version(IN_HF["plain"], 2)))
    theirs = from_home("swin", two, "hf-v2-bare")
    block = "encoder.layers.1.blocks.2.attention.self"
    assert theirs[f"{block}.query.bias"] is two["layers.1.blocks.2.attn.q_bias"]
    assert theirs[f"{block}.value.bias"] is two["layers.1.blocks.2.attn.v_bias"]
    extra = {f"{block}.relative_{table}": torch.zeros(2) for table in ("coords_table", "position_index")}
    assert home(theirs | extra).keys() == two.keys()


def test_version_1_without_config() -> None:
    for name in ("swin-t", "swin-mini"):
        with torch.device("meta"):
            tensors = parameters(Swin(CONFIGS[name]))
        assert sizes(None, tensors) == CONFIGS[name]
        assert sizes(None, as_microsoft(tensors)) == CONFIGS[name]
    with pytest.raises(WeightsError, match="^here: without a config.json .*nearest is swin-mini"):
        sizes(None, parameters(Swin(TINY)))


def test_a_table_of_offsets_tells_the_window_of_a_picture_that_is_not_square() -> None:
    config = replace(TINY, img_size=(48, 16), window_size=6)  # windows of 6 x 4, 6 x 2 and 3 x 1
    tensors = parameters(Swin(config))
    timm_s = {"architecture": "swin_tiny_patch4_window7_224", "model_args": {"img_size": [48, 16]}}
    found = sizes(timm_s, tensors)
    assert stage_windows(found) == (6, 6, 6)


def test_every_width_of_the_mlp_is_found() -> None:
    for inner in range(1, 50):
        config = replace(TINY, embed_dim=49, depths=(1,), num_heads=(1,), mlp_ratio=(inner + 0.5) / 49)
        with torch.device("meta"):
            tensors = parameters(Swin(config))
            stated = {"architecture": "swin_tiny", "model_args": {"img_size": 32}}
            assert_same_shapes(Swin(sizes(stated, tensors)), tensors)


T1, T2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
V2 = of_version(TINY, 2)
HF_V1 = hf_config(IN_HF["plain"]).to_dict()
HF_V2 = hf_config(V2).to_dict()


@pytest.mark.parametrize("config, changed, message", [
    (V2, None, "a Swin V2's window and image size; give a folder with its config.json"),
    (V2, {"architecture": "swinv2_cr_tiny_224"}, "timm's own variant"),
    (V2, {"architecture": "swinv2_mine"}, "states the window"),
    (V2, {"architecture": T2, "model_args": {"window_size": [4, 2]}}, "window_size = "),
    (V2, {"architecture": T2, "model_args": {"always_partition": True}}, "always_part"),
    (V2, {"architecture": T2, "model_args": {"novelty": 1}}, "novelty"),
    (V2, {"architecture": T2, "global_pool": "max"}, "global_pool"),
    (TINY, {"architecture": T1, "model_args": {"mlp_ratio": 3.0}}, r"fc1.weight \(32, 8\) instead of"),
    (TINY, {"architecture": T1, "model_args": {"img_size": 24}}, "offsets on stage"),
    (TINY, {"architecture": T1, "model_args": {"window_size": 7}}, r"bias_table \(49, 1\) instead of"),
    (IN_HF["plain"], HF_V1 | {"use_absolute_embeddings": True}, "use_absolute_embeddings"),
    (IN_HF["plain"], HF_V1 | {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    (IN_HF["plain"], HF_V1 | {"hidden_act": "relu"}, "hidden_act"),
    (IN_HF["plain"], HF_V1 | {"image_size": 33}, "which transformers pads"),
    (IN_HF["plain"], HF_V1 | {"image_size": 24}, "which transformers cannot run"),
    (IN_HF["plain"], HF_V1 | {"image_size": [32, 64]}, "other windows on the grid"),
    (IN_HF["plain"], HF_V1 | {"image_size": 72}, "after padding it, not before"),
    (V2, HF_V2 | {"image_size": 20, "window_size": 8}, "other windows on the grid"),
    (V2, HF_V2 | {"image_size": [32, 64]}, "other windows on the grid"),
    (V2, HF_V2 | {"image_size": 80}, "after padding it, not before"),
])
def test_what_is_not_implemented_is_refused(config: SwinConfig, changed: dict | None, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        fit(changed, parameters(Swin(config)))
    assert str(caught.value).startswith("here") and "\n" not in str(caught.value)


def test_heads_wider_than_their_share_are_refused() -> None:
    tensors = parameters(timm.create_model(T1, head_dim=16, **timm_arguments(TINY)))
    with pytest.raises(WeightsError, match=r"layers.0.blocks.0.attn.qkv.weight \(48, 8\) instead of"):
        fit({"architecture": T1, "model_args": {"img_size": 32}}, tensors)
