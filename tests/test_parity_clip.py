"""models/clip.py's text tower against transformers' CLIPTextModel."""

from dataclasses import asdict, replace

import pytest
import torch
import transformers
from torch import Tensor, nn

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
from weights import to_home

TINY = CLIPTextConfig(
    vocab_size=50, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)


def reference(config: CLIPTextConfig) -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**asdict(config)))


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 leaves `text_model.` out of its own names; every published file has it."""
    prefix = "text_model."
    return to_home("clip-text", {prefix + name.removeprefix(prefix): t for name, t in tensors.items()})


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
