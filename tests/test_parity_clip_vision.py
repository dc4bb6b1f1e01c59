"""models/clip.py's visual tower against transformers and open_clip: numbers; names and sizes in files."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from models.clip import VISION_CONFIGS, CLIPVision, CLIPVisionConfig
from tests.parity import (
    assert_parity,
    assert_same_shapes,
    first_difference,
    fit,
    home_names,
    misnamed,
    parameters,
    randomise,
)
from weights import WeightsError, from_home, to_home
from weights.kinds.clip import VISION as KIND
from weights.options import sizes_of

TINY = CLIPVisionConfig(
    hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=16,
    patch_size=4, num_channels=3, projection_dim=24, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)
HEADS_OF_64 = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2)
VARIANTS: dict[str, CLIPVisionConfig] = {
    "quick_gelu": TINY,
    "gelu": replace(TINY, hidden_act="gelu"),
    "heads-of-64": HEADS_OF_64,
    "odd": replace(TINY, hidden_size=33, intermediate_size=50, num_hidden_layers=1, num_attention_heads=3,
                   image_size=23, patch_size=5, projection_dim=7, layer_norm_eps=1e-6),
}
IN_HF = VARIANTS | {"one-channel": replace(TINY, num_channels=1)}
IN_OPEN_CLIP = VARIANTS | {"not-square": replace(TINY, image_size=(24, 8), patch_size=(4, 2))}
LIKE_OPEN_CLIP = {
    "clip-b-32": "ViT-B-32-quickgelu", "clip-l-14": "ViT-L-14-quickgelu", "clip-h-14": "ViT-H-14",
}


def of_hf(config: CLIPVisionConfig) -> nn.Module:
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**asdict(config)))


def model_cfg(config: CLIPVisionConfig) -> dict[str, Any]:
    """What open_clip_config.json holds."""
    vision = {
        "layers": config.num_hidden_layers, "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        # open_clip rounds down: half a unit more, so that no quotient falls below the whole number
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        "patch_size": config.patch_size, "image_size": config.image_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }
    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": config.projection_dim, "quick_gelu": config.hidden_act == "quick_gelu",
            "vision_cfg": vision, "text_cfg": text}


def of_open_clip(config: CLIPVisionConfig) -> nn.Module:
    return open_clip.model.CLIP(**model_cfg(config))


def redraw(theirs: nn.Module) -> nn.Module:
    """The visual side drawn anew; `randomise` cannot draw a whole CLIP's temperature, which has no axis."""
    for name, module in theirs.named_children():
        if name in ("visual", "vision_model", "visual_projection"):
            randomise(module)
    return theirs.double().eval()


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_home("clip-vision", tensors)


def pair(config: CLIPVisionConfig, theirs: nn.Module) -> tuple[CLIPVision, nn.Module]:
    theirs = redraw(theirs)
    ours = CLIPVision(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours, theirs


def images(config: CLIPVisionConfig, batch: int = 2) -> Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, config.num_channels, height, width, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_HF)
def test_embeddings_and_gradients_of_transformers(name: str) -> None:
    config = IN_HF[name]
    ours, theirs = pair(config, of_hf(config))
    given = images(config)
    assert ours(given).shape == (2, config.projection_dim) == (2, ours.width)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs(given).image_embeds)


@pytest.mark.parametrize("name", IN_OPEN_CLIP)
def test_embeddings_and_gradients_of_open_clip(name: str) -> None:
    config = IN_OPEN_CLIP[name]
    ours, theirs = pair(config, of_open_clip(config))
    given = images(config)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs.visual(given))


def test_open_clips_blocks_without_their_options_are_the_same() -> None:
    entry = model_cfg(TINY)
    entry["vision_cfg"] |= {"block_type": "custom", "final_ln_after_pool": True, "patch_dropout": 0.5}
    ours, theirs = pair(TINY, open_clip.model.CLIP(**entry))
    given = images(TINY)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs.visual(given))
    assert sizes_of(KIND, {"model_cfg": entry}, parameters(ours), "x") == TINY


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_full_size_names_and_shapes_of_transformers(name: str) -> None:
    config = VISION_CONFIGS[name]
    with torch.device("meta"):
        ours, theirs = CLIPVision(config), of_hf(config)
    assert_same_shapes(ours, home(parameters(theirs)))
    assert sizes_of(KIND, theirs.config.to_dict(), parameters(ours), "x") == config


@pytest.mark.parametrize("name", LIKE_OPEN_CLIP)
def test_full_size_names_and_shapes_of_open_clip(name: str) -> None:
    entry = open_clip.get_model_config(LIKE_OPEN_CLIP[name])
    with torch.device("meta"):
        ours, theirs = CLIPVision(VISION_CONFIGS[name]), open_clip.model.CLIP(**entry)
    assert_same_shapes(ours, home(parameters(theirs)))
    assert sizes_of(KIND, {"model_cfg": entry}, parameters(ours), "x") == VISION_CONFIGS[name]


def test_a_wrong_weight_and_a_wrong_activation_are_found_where_they_are() -> None:
    ours, theirs = pair(TINY, of_hf(TINY))
    names = home_names(theirs, home)
    given = images(TINY)
    runs = [lambda: ours(given), lambda: theirs(given).image_embeds]
    assert first_difference(ours, theirs, names, *runs) == ""
    layer = "vision_model.encoder.layers.1.self_attn.v_proj"
    with torch.no_grad():
        ours.get_submodule(layer).bias[0].add_(1e-6)
    assert first_difference(ours, theirs, names, *runs).startswith(f"{layer} is the first layer that gives")
    ours.vision_model.encoder.layers[0].hidden_act = "gelu"
    layer = "vision_model.encoder.layers.0.mlp.fc2"
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that reads something else"):
        assert_parity(ours, theirs, home, *runs)


@pytest.mark.parametrize("of", [of_hf, of_open_clip])
def test_every_broken_layer_is_named(of: Callable[[CLIPVisionConfig], nn.Module]) -> None:
    (ours, theirs), given = pair(TINY, of(TINY)), images(TINY)
    run_theirs = theirs.visual if of is of_open_clip else lambda images: theirs(images).image_embeds
    said = misnamed(ours, theirs, home, lambda: ours(given), lambda: run_theirs(given))
    tables = {"class_embedding", "position_embedding.weight"}  # no layer: they show at the first one behind
    assert said.keys() == {f"vision_model.embeddings.{table}" for table in tables}
    assert all(found.startswith("vision_model.pre_layrnorm is the first layer that reads")
               for found in said.values())


@pytest.mark.parametrize("letter", "qkv")
def test_one_broken_projection_is_named_where_open_clip_has_one_for_all_three(letter: str) -> None:
    (ours, theirs), given = pair(TINY, of_open_clip(TINY)), images(TINY)
    layer = f"vision_model.encoder.layers.1.self_attn.{letter}_proj"
    with torch.no_grad():
        ours.get_submodule(layer).weight[3, 4].add_(1e-6)
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that gives something else"):
        assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs.visual(given))


def test_every_patch_has_its_place() -> None:
    ours, _ = pair(TINY, of_hf(TINY))
    given = images(TINY)
    assert (ours(given) - ours(given.transpose(2, 3))).abs().max() > 1e-3


def test_checkpointing_changes_no_gradient() -> None:
    ours, _ = pair(TINY, of_hf(TINY))
    ours.train()
    found = []
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        ours(images(TINY)).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_wrong_pictures_and_an_unknown_activation_are_refused() -> None:
    with pytest.raises(ValueError, match="^images are 16x20, this CLIP takes 16x16"):
        CLIPVision(TINY)(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        CLIPVision(replace(TINY, hidden_act="relu"))


# ------------------------------------------------------------------------------------------------------------
# Files: names and sizes
# ------------------------------------------------------------------------------------------------------------


def of_whole_hf(config: CLIPVisionConfig) -> transformers.CLIPModel:
    text = dict(vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=4,
                num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    # The tower's own projection_dim is left at 512, as in LAION's published files: the outer one counts.
    vision = asdict(config) | {"projection_dim": 512}
    return transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=config.projection_dim))


@pytest.mark.parametrize("name", IN_HF)
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole"])
def test_folders_of_transformers(tmp_path: Path, name: str, whole: bool) -> None:
    config = IN_HF[name]
    theirs = redraw(of_whole_hf(config) if whole else of_hf(config))
    theirs.save_pretrained(tmp_path)
    tensors = home(load_file(tmp_path / "model.safetensors") | {
        "vision_model.embeddings.position_ids": torch.arange(3)[None]})  # files of 2021 hold it
    assert sizes_of(KIND, json.loads((tmp_path / "config.json").read_text()), tensors, "x") == config
    ours = CLIPVision(config).double().eval()
    ours.load_state_dict(tensors, strict=True)
    given = images(config)
    expected = theirs.get_image_features(given).pooler_output if whole else theirs(given).image_embeds
    assert (ours(given) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", IN_OPEN_CLIP)
def test_files_of_open_clip(name: str) -> None:
    config = IN_OPEN_CLIP[name]
    theirs = redraw(of_open_clip(config))
    scalars = {k: torch.tensor(1) for k in ("input_resolution", "context_length", "vocab_size")}  # OpenAI's
    tensors = home(theirs.state_dict() | scalars)
    assert sizes_of(KIND, json.loads(json.dumps({"model_cfg": model_cfg(config)})), tensors, "x") == config
    CLIPVision(config).double().load_state_dict(tensors, strict=True)


def test_the_later_text_tower_of_open_clip_is_dropped() -> None:
    theirs = open_clip.model.CustomTextCLIP(**model_cfg(TINY), init_logit_bias=-10)
    assert_same_shapes(CLIPVision(TINY), home(theirs.state_dict()))


@pytest.mark.parametrize("dialect", ["hf", "open_clip"])
def test_names_there_and_back(dialect: str) -> None:
    ours = parameters(CLIPVision(TINY))
    theirs = from_home("clip-vision", ours, dialect)
    known = parameters(of_hf(TINY)) if dialect == "hf" else {
        name: tensor for name, tensor in parameters(of_open_clip(TINY)).items() if name.startswith("visual.")}
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in known.items()}
    back = home(theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_defaults_and_the_older_second_table_count_as_in_transformers() -> None:
    """Published config.json files leave out what equals a default, and some hold `vision_config_dict`."""
    whole = {
        "model_type": "clip", "projection_dim": 24, "text_config": {},
        "vision_config": {
            "hidden_size": 96, "num_attention_heads": 3, "hidden_act": "gelu", "patch_size": 56,
        },
    }
    for extra in ({}, {"vision_config_dict": None}, {"vision_config": {"hidden_size": 96}},
                  {"vision_config_dict": {"hidden_size": 48, "num_attention_heads": 4, "patch_size": 56}}):
        expected = transformers.CLIPConfig.from_dict(deepcopy(whole | extra))  # it writes into its argument
        options = expected.vision_config.to_dict() | {"projection_dim": 24}
        config = CLIPVisionConfig(**{name: options[name] for name in asdict(TINY)})
        with torch.device("meta"):
            tensors = parameters(CLIPVision(config))
        assert sizes_of(KIND, whole | extra, tensors, "x") == config


def hf(**changes: Any) -> dict[str, Any]:
    return asdict(TINY) | {"model_type": "clip_vision_model"} | changes


def vision_cfg(**changes: Any) -> dict[str, Any]:
    entry = model_cfg(TINY)
    return {"model_cfg": entry | {"vision_cfg": entry["vision_cfg"] | changes}}


@pytest.mark.parametrize("config, wrong", [
    (None, "weights alone do not show CLIP's activation"),
    (hf(hidden_act="gelu_new"), "hidden_act = 'gelu_new'"),
    (hf(num_hidden_layers=4), "missing: vision_model.encoder.layers.3"),
    (hf(hidden_size=64, patch_size=8), "class_embedding (32,) instead of (64,)"),
    (hf(image_size=20), "position_embedding.weight (17, 32) instead of (26, 32)"),
    (hf(num_attention_heads=5), "hidden_size = 32 is not 5 equal heads"),
    (vision_cfg(timm_model_name="vit_base_patch16_224"), "timm_model_name"),
    (vision_cfg(attentional_pool=True), "attentional_pool"),
    (vision_cfg(ls_init_value=1e-4), "ls_init_value"),
    (vision_cfg(pool_type="avg"), "pool_type = 'avg'"),
    (vision_cfg(no_ln_pre=True), "no_ln_pre"),
    (vision_cfg(act_kwargs={"approximate": "tanh"}), "act_kwargs"),
    (vision_cfg(norm_kwargs={"bias": True}), "bias = True"),
    (vision_cfg(qk_norm=True), "qk_norm"),
    (vision_cfg(something_new=1), "something_new = 1"),
    (vision_cfg(layers=[3, 4, 6, 3]), "residual networks"),
    ({"model_cfg": model_cfg(TINY) | {"embed_dim": 512}}, "projection.weight (24, 32) instead of (512, 32)"),
])
def test_what_does_not_fit_is_refused(config: dict[str, Any] | None, wrong: str) -> None:
    with torch.device("meta"):
        tensors = parameters(CLIPVision(TINY))
    with pytest.raises(WeightsError, match="^here[: ]") as raised:
        fit(KIND, config, tensors)
    assert wrong in str(raised.value) and "\n" not in str(raised.value)


def test_a_tower_without_projection_is_refused(tmp_path: Path) -> None:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**asdict(TINY))).save_pretrained(tmp_path)
    tensors = home(load_file(tmp_path / "model.safetensors"))
    assert tensors.keys() == parameters(CLIPVision(TINY)).keys() - {"visual_projection.weight"}
    with pytest.raises(WeightsError, match=r"visual_projection\.weight is missing"):
        sizes_of(KIND, hf(), tensors, "x")
