"""The name tables: both directions, every dialect, against the names that diffusers and transformers use."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

import weights
from models import clip, unet, vae, vit
from weights import dialects
from weights.kinds import KINDS
from weights.kinds.clip import OPEN_CLIP_CUT
from weights.options import from_shapes, sizes_of

# n ResBlocks a level, levels, levels with a transformer; diffusers' defaults are Stable Diffusion's.
UNETS = {
    "sd-1": {"cross_attention_dim": 768},
    "sd-2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
             "use_linear_projection": True},
    "sd-mini": {"cross_attention_dim": 128, "attention_head_dim": 4, "layers_per_block": 1,
                "block_out_channels": (64, 128, 256),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")},
}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def meta(build, *args, **options) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(*args, **options).state_dict()


def numbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes in which no two numbers are alike."""
    out, start = {}, 0
    for name, tensor in tensors.items():
        out[name] = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        start += tensor.numel()
    return out


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert shapes(a) == shapes(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def small_vae() -> dict[str, Tensor]:
    config = dataclasses.replace(vae.CONFIGS["sd-mini"], ch=8, norm_groups=4)
    return numbered(meta(vae.VAE, config))


def small_unet(**changes) -> dict[str, Tensor]:
    config = dataclasses.replace(unet.CONFIGS["sd-mini"], model_channels=32, context_dim=8, **changes)
    return numbered(meta(unet.UNet, config))


def small_clip(layers: int = 3) -> dict[str, Tensor]:
    return numbered(meta(clip.CLIPText, clip.CLIPTextConfig(9, 8, 16, layers, 2, 7, "gelu", 1e-5)))


@pytest.mark.parametrize("name", UNETS)
def test_full_size_unet_has_diffusers_names_and_shapes(name: str):
    theirs = meta(UNet2DConditionModel, **UNETS[name])
    ours = meta(unet.UNet, unet.CONFIGS[name])
    assert shapes(weights.to_home("unet", theirs)) == shapes(ours)
    assert shapes(weights.from_home("unet", ours)) == shapes(theirs)


@pytest.mark.parametrize("name", ["sd-1", "sd-mini"])
def test_full_size_vae_has_diffusers_names_and_shapes(name: str):
    config = vae.CONFIGS[name]
    levels = len(config.ch_mult)
    theirs = meta(
        AutoencoderKL, block_out_channels=[config.ch * m for m in config.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.num_res_blocks, norm_num_groups=config.norm_groups,
    )
    ours = meta(vae.VAE, config)
    assert shapes(weights.to_home("vae", theirs)) == shapes(ours)
    assert shapes(weights.from_home("vae", ours)) == shapes(theirs)


@pytest.mark.parametrize("changes", [
    {}, {"num_res_blocks": 2}, {"num_res_blocks": 3, "attention_levels": (1,)}, {"attention_levels": ()},
    {"channel_mult": (1, 2), "attention_levels": (0,)}, {"channel_mult": (1,), "attention_levels": (0,)},
])
def test_unet_round_trip_for_any_numbering(changes: dict):
    ours = small_unet(**changes)
    theirs = weights.from_home("unet", ours)
    assert not theirs.keys() & ours.keys()
    assert_equal(weights.to_home("unet", theirs), ours)


@pytest.mark.parametrize("dialect", ["diffusers", "diffusers-old", "ldm"])
def test_vae_round_trip(dialect: str):
    ours = small_vae()
    theirs = weights.from_home("vae", ours, dialect)
    assert KINDS["vae"].dialect_of(theirs).name == dialect
    assert_equal(weights.to_home("vae", theirs), ours)


def test_old_vae_attention_names_are_matrices_beside_the_new_ones():
    ours = small_vae()
    new, old = (weights.from_home("vae", ours, d) for d in ("diffusers", "diffusers-old"))
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new_name, old_name in pairs.items():
        a = new[f"encoder.mid_block.attentions.0.{new_name}.weight"]
        b = old[f"encoder.mid_block.attentions.0.{old_name}.weight"]
        assert a.ndim == 2 and torch.equal(a, b)


@pytest.mark.parametrize("dialect", ["diffusers", "transformers-5", "open_clip"])
def test_clip_round_trip(dialect: str):
    ours = small_clip()
    theirs = weights.from_home("clip-text", ours, dialect)
    if dialect == "open_clip":  # home has no layer after the one that is read; a file does
        last = {k.replace(".2.", ".3."): v for k, v in theirs.items() if ".2." in k}
        theirs |= last
    assert KINDS["clip-text"].dialect_of(theirs).name == dialect
    assert_equal(weights.to_home("clip-text", theirs), ours)


@pytest.mark.parametrize("dialect", ["diffusers", "transformers-5", "open_clip"])
def test_a_whole_clip_keeps_all_its_layers_and_its_projection(dialect: str):
    ours = small_clip() | {"text_projection.weight": torch.arange(32.0).view(4, 8)}
    theirs = weights.from_home("clip-text", ours, dialect)
    name = "text_projection" if dialect == "open_clip" else "text_projection.weight"
    assert theirs[name].shape == ((8, 4) if dialect == "open_clip" else (4, 8))
    other = {"visual.class_embedding": torch.zeros(1)} if dialect == "open_clip" else {}
    assert_equal(weights.to_home("clip-text", theirs | other), ours)


def test_open_clip_that_was_cut_before_keeps_its_last_layer():
    ours = small_clip(layers=OPEN_CLIP_CUT)
    assert_equal(weights.to_home("clip-text", weights.from_home("clip-text", ours, "open_clip")), ours)
    assert clip.CONFIGS["sd-2"].num_hidden_layers == OPEN_CLIP_CUT


def test_open_clip_stacks_q_k_and_v_in_that_order():
    theirs = weights.from_home("clip-text", small_clip(), "open_clip")
    ours = weights.to_home("clip-text", theirs)
    stacked = theirs["transformer.resblocks.1.attn.in_proj_weight"]
    for row, letter in enumerate("qkv"):
        part = ours[f"text_model.encoder.layers.1.self_attn.{letter}_proj.weight"]
        assert torch.equal(part, stacked[8 * row : 8 * row + 8])


def test_dropped_on_purpose():
    ours = small_clip()
    extras = {name: torch.zeros(1) for name in (
        "text_model.embeddings.position_ids", "logit_scale", "vision_model.a.b", "visual_projection.weight")}
    assert_equal(weights.to_home("clip-text", ours | extras), ours)
    bert = {"encoder.layer.0.attention.self.x": torch.zeros(1), "embeddings.y": torch.zeros(2)}
    extras = {"pooler.dense.weight": torch.zeros(1), "embeddings.position_ids": torch.zeros(1)}
    assert_equal(weights.to_home("minilm", bert | extras), bert)
    assert_equal(weights.to_home("minilm", {f"bert.{k}": v for k, v in (bert | extras).items()}), bert)


def test_a_name_without_a_row_is_kept_for_the_strict_load_to_find():
    theirs = weights.from_home("unet", small_unet())
    theirs["down_blocks.0.resnets.0.norm9.weight"] = torch.zeros(1)
    assert "down_blocks.0.resnets.0.norm9.weight" in weights.to_home("unet", theirs)


def test_conversion_is_linear_so_gradients_convert_too():
    theirs = {k: v.double() for k, v in weights.from_home("vae", small_vae()).items()}
    twice = weights.to_home("vae", {k: 2 * v for k, v in theirs.items()})
    once = weights.to_home("vae", theirs)
    assert all(torch.equal(twice[k], 2 * once[k]) for k in once)


def test_messages_spell_our_names_as_the_file_does():
    theirs = weights.from_home("unet", small_unet())
    spell = dialects.their_names(KINDS["unet"].dialect_of(theirs), theirs)
    assert [spell(ours) for ours in weights.to_home("unet", theirs)] == list(theirs)
    assert spell("out.2.weight") == "conv_out.weight" and spell("nonsense") == "nonsense"


def test_a_stranger_is_refused():
    with pytest.raises(weights.WeightsError, match=r"no unet in any dialect .* are a.b, c, d \.\.\.$"):
        weights.to_home("unet", dict.fromkeys(("a.b", "c", "d", "e"), torch.zeros(1)))
    with pytest.raises(weights.WeightsError, match="no dialect 'klingon'; it has ldm, diffusers"):
        weights.from_home("unet", small_unet(), "klingon")
    with pytest.raises(weights.WeightsError, match="needs all of"):
        weights.from_home("clip-text", {"text_model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(2)},
                          "open_clip")
    with pytest.raises(weights.WeightsError, match="two tensors for encoder.norm_out"):
        weights.to_home("vae", weights.from_home("vae", small_vae())
                        | {"encoder.norm_out.weight": torch.zeros(1)})
    part, two = "encoder.layer.0.attention.attention", torch.zeros(2)
    for bias, message in (
        ({f"{part}.value.bias": torch.zeros(3)}, r"qkv.bias is .*, whose shapes differ: \[\(2,\), \(3,"),
        ({f"{part}.value.bias": two, "blocks.0.attn.qkv.bias": two}, "two tensors for blocks.0.attn.qkv"),
        ({}, "blocks.0.attn.qkv.bias is made of q, k and v, of which there is no v$"),
    ):
        biases = {f"{part}.query.bias": two, f"{part}.key.bias": two} | bias
        with pytest.raises(weights.WeightsError, match=message):
            weights.to_home("vit", biases, "hf-model")


@pytest.mark.parametrize("kind", ["unet", "vae", "clip-text"])
def test_every_row_of_every_table_is_used_by_some_model(kind: str):
    """A misspelt row would never be missed otherwise."""
    name = "clip-l-14" if kind == "clip-text" else "sd-1"
    ours = meta(weights.build, kind, KINDS[kind].configs[name])
    beginnings = {".".join(name.split(".")[:n]) for name in ours for n in range(1, name.count(".") + 2)}
    for dialect in KINDS[kind].dialects:
        for theirs, row in dialect.table.items():
            filled = [
                row.format(**values) for values in (dialect.numbers(ours) if dialect.numbers else [{}])
                if set(re.findall(r"{(\w+)}", f"{theirs} {row}")) <= values.keys() | {""}
            ] if row else []
            names = {name.replace("*", letter) for name in filled for letter in "qkv"}
            plain = {row} if row and "{" not in row else set()
            assert row is None or (names | plain) & beginnings, (dialect.name, theirs)


@pytest.mark.parametrize("kind, name", [("unet", "sd-1"), ("unet", "sd-2"), ("unet-encoder", "sd-2"),
                                        ("vae", "sd-1"), ("clip-text", "sd-1"), ("clip-text", "sd-2"),
                                        ("clip-text", "clip-l-14")])
def test_sizes_of_the_published_models_are_read_from_shapes_alone(kind: str, name: str):
    config = KINDS[kind].configs[name]
    assert sizes_of(KINDS[kind], None, meta(weights.build, kind, config), "file", single=True) == config


def alone(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A file without a config.json beside it."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, path := folder / "alone.safetensors")
    return path


@pytest.mark.parametrize("dialect, eps", [("timm", 1e-6), ("hf", 1e-12), ("hf-model", 1e-12)])
def test_a_lone_vit_has_the_eps_of_its_dialect(dialect: str, eps: float, tmp_path: Path, monkeypatch):
    small = {"depth": 1, "embed_dim": 64, "num_heads": 1, "hidden_features": 80}
    config = dataclasses.replace(vit.CONFIGS["vit-mini"], **small)
    monkeypatch.setitem(vit.CONFIGS, "small", config)
    theirs = weights.from_home("vit", vit.ViT(config).state_dict(), dialect)
    path = alone(theirs, tmp_path)
    assert weights.load("vit", path).config == dataclasses.replace(config, norm_eps=eps)
    # A configuration beside it comes before the dialect.
    stated = {"model_type": "vit", "image_size": 64, "patch_size": 8, "hidden_size": 64,
              "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 80,
              "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert weights.load("vit", path).config.norm_eps == 1e-3


@pytest.mark.parametrize("kind, dialect", [
    (kind, dialect.name) for kind in ("clip-text", "clip-vision") for dialect in KINDS[kind].dialects
])
def test_a_lone_clip_is_refused_for_its_activation(kind: str, dialect: str, tmp_path: Path):
    if kind == "clip-text":
        ours = small_clip()
    else:
        ours = meta(clip.CLIPVision, clip.VISION_CONFIGS["clip-mini"])
    ours = {name: torch.zeros(tensor.shape) for name, tensor in ours.items()}
    theirs = weights.from_home(kind, ours, dialect)
    path = alone(theirs, tmp_path)
    with pytest.raises(weights.WeightsError, match=r"do not show CLIP's activation .*config\.json") as raised:
        weights.load(kind, path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("kind, config, nearest", [
    ("vae", {"ch": 24, "norm_groups": 24}, "sd-"), ("unet", {"model_channels": 96}, "sd-"),
    ("unet", {"context_dim": 24}, "sd-2, which differs in input_blocks.1.1.transformer_blocks.0.attn2.to_k"),
    ("unet", {"in_channels": 9}, "sd-2, which differs in input_blocks.0.0.weight;"),
])
def test_a_lone_file_of_unpublished_sizes_is_refused(kind: str, config: dict[str, int], nearest: str):
    ours = meta(weights.build, kind, dataclasses.replace(KINDS[kind].configs["sd-2"], **config))
    says = rf"^file: without a config.json only published sizes are read \(sd-1, .*\); nearest is {nearest}"
    with pytest.raises(weights.WeightsError, match=says) as raised:
        sizes_of(KINDS[kind], None, ours, "file")
    assert "\n" not in str(raised.value) and str(raised.value).endswith("give a folder with its config.json")


def test_fields_that_tensors_show_by_hand():
    tensors = {"w": torch.zeros(3, 5), "a.0.b": torch.zeros(1), "a.2.b": torch.zeros(1)}
    shapes = {"one": ("w", 1), "two": ("w", 1, 0), "none": ("w", 2), "no": ("v", 0), "has": ("w",),
              "lacks": ("v",), "count": r"a\.(\d+)\."}
    expected = {"one": 5, "two": (5, 3), "has": True, "lacks": False, "count": 2}
    assert from_shapes(shapes, tensors) == expected


def test_names_and_shapes_tell_every_published_model_from_every_other():
    for name, kind in KINDS.items():
        for entry, config in kind.configs.items():
            found = sizes_of(kind, None, meta(kind.model, config), entry, single=True)
            assert found == config, (name, entry)


def test_no_file_but_those_of_kinds_compares_with_a_kind_s_name():
    """A new kind then needs a file in kinds/, a row in kinds/__init__.py and its entries in the registry."""
    comparison = rf"""(?:[=!]=|\bin|\bcase)[ (]+["'](?:{'|'.join(KINDS)})["']"""
    for path in (ROOT / "weights").glob("*.py"):
        assert not re.findall(comparison, path.read_text()), path.name
