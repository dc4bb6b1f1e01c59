"""models/clip.py's text tower against transformers' CLIPTextModel and open_clip."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import weights
from models.clip import CONFIGS, CLIPText, CLIPTextConfig
from tests.parity import (
    assert_parity,
    assert_same_shapes,
    first_difference,
    home_names,
    misnamed,
    parameters,
    randomise,
)
from weights import WeightsError, to_home
from weights.kinds import KINDS

TINY = CLIPTextConfig(
    vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)


PROJECTED = replace(TINY, projection_dim=24)


def reference(config: CLIPTextConfig) -> nn.Module:
    sizes = {name: size for name, size in asdict(config).items() if size not in (None, -1)}
    if config.projection_dim is None:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    sizes = {"eos_token_id": 2} | sizes
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes))


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 leaves `text_model.` out of its own names; every published file has it."""
    prefixes = ("text_model.", "text_projection.")
    named = {name if name.startswith(prefixes) else f"text_model.{name}": t for name, t in tensors.items()}
    return to_home("clip-text", named)


def pair(config: CLIPTextConfig) -> tuple[CLIPText, nn.Module]:
    theirs = randomise(reference(config))
    ours = CLIPText(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours, theirs


def ids(tokens: int = 77, batch: int = 2) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tokens", [77, 13, 1])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_last_layer_and_gradients(hidden_act: str, tokens: int) -> None:
    ours, theirs = pair(replace(TINY, hidden_act=hidden_act))
    given = ids(tokens)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs(given).last_hidden_state)


def test_one_layer_less_is_the_penultimate_layer_after_the_final_norm() -> None:
    config = replace(TINY, hidden_act="gelu")
    theirs = randomise(reference(config))
    ours = CLIPText(replace(config, num_hidden_layers=config.num_hidden_layers - 1)).double().eval()
    last = f"text_model.encoder.layers.{config.num_hidden_layers - 1}."

    def without_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in home(tensors).items() if not name.startswith(last)}

    ours.load_state_dict(without_last(parameters(theirs)), strict=True)
    norm = next(module for name, module in theirs.named_modules() if name.endswith("final_layer_norm"))

    def run_theirs() -> Tensor:
        return norm(theirs(ids(), output_hidden_states=True).hidden_states[-2])

    assert_parity(ours, theirs, without_last, lambda: ours(ids()), run_theirs)


def test_a_token_reads_nothing_behind_it() -> None:
    ours, _ = pair(TINY)
    given = ids()
    other = given.clone()
    other[:, 40:] = (other[:, 40:] + 1) % TINY.vocab_size
    a, b = ours(given), ours(other)
    assert torch.allclose(a[:, :40], b[:, :40], rtol=0, atol=1e-12)
    assert (a[:, 40:] - b[:, 40:]).abs().amin(dim=2).min() > 0


def texts(pad: int) -> Tensor:
    """Ids of texts whose first end mark is at places 76, 5 and 1, followed by `pad`."""
    given = ids(batch=3).clamp(max=TINY.vocab_size - 2)
    for row, place in zip(given, (76, 5, 1), strict=True):
        row[place:] = pad
        row[place] = TINY.vocab_size - 1
    return given


@pytest.mark.parametrize("pad", [TINY.vocab_size - 1, 0], ids=["padded as OpenAI", "padded as open_clip"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_pooled_texts_and_gradients(hidden_act: str, pad: int) -> None:
    ours, theirs = pair(replace(PROJECTED, hidden_act=hidden_act))
    given = texts(pad)
    assert_parity(ours, theirs, home, lambda: ours.pooled(given), lambda: theirs(given).text_embeds)


def of_open_clip(config: CLIPTextConfig) -> nn.Module:
    text = {
        "context_length": 77, "vocab_size": config.vocab_size, "width": config.hidden_size,
        "heads": config.num_attention_heads, "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }
    vision = {"image_size": 8, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    quick = config.hidden_act == "quick_gelu"
    return open_clip.model.CLIP(config.projection_dim, vision, text, quick_gelu=quick)


@pytest.mark.parametrize("pad", [TINY.vocab_size - 1, 0], ids=["padded as OpenAI", "padded as open_clip"])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_pooled_texts_are_open_clips(hidden_act: str, pad: int) -> None:
    config = replace(PROJECTED, hidden_act=hidden_act)
    theirs = of_open_clip(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs = theirs.double().eval()
    ours = CLIPText(config).double().eval()
    ours.load_state_dict(to_home("clip-text", theirs.state_dict()), strict=True)
    found, expected = ours.pooled(texts(pad)), theirs.encode_text(texts(pad))
    assert torch.allclose(found, expected, rtol=0, atol=1e-10) and expected.std() > 0.1


@pytest.mark.parametrize("dialect", ["hf", "open_clip"])
def test_a_folder_with_a_whole_clip(dialect: str, tmp_path: Path) -> None:
    if dialect == "hf":
        sizes = {name: size for name, size in asdict(PROJECTED).items() if name != "projection_dim"}
        sizes["eos_token_id"] = PROJECTED.vocab_size - 1
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 8, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=24)
        theirs = transformers.CLIPModel(config).double().eval()
        theirs.save_pretrained(tmp_path)
        expected = theirs.text_projection(theirs.text_model(texts(0)).pooler_output)
    else:
        theirs = of_open_clip(PROJECTED).double().eval()
        save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
        config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {}, "text_cfg": {
            "context_length": 77, "vocab_size": 50, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 2.5}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))
        expected = theirs.encode_text(texts(0))
    ours = weights.load("clip-text", tmp_path, dtype=torch.float64)
    assert ours.config == PROJECTED
    assert torch.allclose(ours.pooled(texts(0)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("end, state", [(40, 40), (2, 2), (49, -1), (49407, -1)])
def test_a_folder_states_the_end_mark(end: int, state: int, tmp_path: Path) -> None:
    """Of a table with rows after it, as added tokens have. Early files state 2 for the largest id."""
    theirs = randomise(reference(replace(PROJECTED, eos_token_id=end)))
    theirs.save_pretrained(tmp_path)
    ours = weights.load("clip-text", tmp_path, dtype=torch.float64)
    given = torch.randint(40, (2, 77), generator=torch.Generator().manual_seed(3))
    for row, place in zip(given, (5, 60), strict=True):
        row[place] = {2: 40, 49407: 49}.get(end, end)
        if end == 40:
            row[place + 3] = 49  # an added token after the mark
    if end == 49407:  # what transformers takes where a file states nothing, in a table without it
        theirs.text_model.eos_token_id = 49
    assert ours.config == replace(PROJECTED, eos_token_id=state)
    assert torch.allclose(ours.pooled(given), theirs(given).text_embeds, rtol=0, atol=1e-10)


@pytest.mark.parametrize("words, sizes", [(49408, {}), (49416, {"eos_token_id": 2})])
def test_the_end_mark_of_published_files_changes_no_fingerprint(words: int, sizes: dict) -> None:
    stated = {"vocab_size": words, "eos_token_id": 2}
    assert KINDS["clip-text"].read(stated, {}, "here")["eos_token_id"] == sizes.get("eos_token_id", -1)
    absent = KINDS["clip-text"].read({"vocab_size": words}, {}, "here")["eos_token_id"]
    assert absent == (-1 if words == 49408 else 49407)


def test_an_end_mark_that_is_no_number_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"here: eos_token_id is \[2\]; it must be a whole number"):
        KINDS["clip-text"].read({"eos_token_id": [2]}, {}, "here")


def test_a_text_cfg_of_other_pooling_is_refused(tmp_path: Path) -> None:
    save_file(of_open_clip(PROJECTED).state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"embed_dim": 24, "text_cfg": {"pool_type": "last", "width": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(weights.WeightsError, match="not implemented here: pool_type = 'last'"):
        weights.load("clip-text", tmp_path)


def test_without_projection_or_end_mark_there_is_no_embedding() -> None:
    with pytest.raises(ValueError, match="no text_projection, as the files of Stable Diffusion hold none"):
        CLIPText(TINY).pooled(texts(0))
    cut = texts(0)
    cut[0, -1] = 3
    with pytest.raises(ValueError, match=r"a text has no end mark \(id 49\); end long texts"):
        CLIPText(PROJECTED).pooled(cut)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = CLIPText(CONFIGS[name]), reference(CONFIGS[name])
    assert_same_shapes(ours, home(parameters(theirs)))


def test_a_wrong_weight_and_a_wrong_activation_are_found_where_they_are() -> None:
    ours, theirs = pair(TINY)
    names = home_names(theirs, home)
    runs = [lambda: ours(ids()), lambda: theirs(ids()).last_hidden_state]
    assert first_difference(ours, theirs, names, *runs) == ""
    layer = "text_model.encoder.layers.1.self_attn.v_proj"
    with torch.no_grad():
        ours.get_submodule(layer).bias[0].add_(1e-6)
    assert first_difference(ours, theirs, names, *runs).startswith(f"{layer} is the first layer that gives")
    ours.text_model.encoder.layers[0].hidden_act = "gelu"
    layer = "text_model.encoder.layers.0.mlp.fc2"
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that reads something else"):
        assert_parity(ours, theirs, home, *runs)


def test_every_broken_layer_is_named() -> None:
    ours, theirs = pair(TINY)
    assert misnamed(ours, theirs, home, lambda: ours(ids()), lambda: theirs(ids()).last_hidden_state) == {}


def test_an_unknown_activation_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        CLIPText(replace(TINY, hidden_act="relu"))
