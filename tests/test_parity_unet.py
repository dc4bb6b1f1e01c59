"""models/unet.py against diffusers' UNet2DConditionModel, in the shapes of Stable Diffusion 1 and 2."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from models.unet import CONFIGS, ResBlock, UNet, UNetConfig, UNetEncoder
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

home = partial(to_home, "unet")

TINY = {
    "sd-1": UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, num_res_blocks=2, channel_mult=(1, 2, 2),
        attention_levels=(0, 1), num_heads=8, num_head_channels=None, context_dim=24,
        use_linear_in_transformer=False,
    ),
    "sd-2": UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 2, 3, 3),
        attention_levels=(0, 1, 2), num_heads=None, num_head_channels=16, context_dim=20,
        use_linear_in_transformer=True,
    ),
}


def reference(config: UNetConfig) -> nn.Module:
    """diffusers calls the number of heads `attention_head_dim`: one number, or one for each level."""
    widths = [config.model_channels * m for m in config.channel_mult]
    cross = [level in config.attention_levels for level in range(len(widths))]
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=widths,
        layers_per_block=config.num_res_blocks, cross_attention_dim=config.context_dim,
        down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        attention_head_dim=config.num_heads or tuple(w // config.num_head_channels for w in widths),
        use_linear_projection=config.use_linear_in_transformer,
    )


def pair(name: str = "sd-1") -> tuple[UNet, nn.Module]:
    theirs = randomise(reference(TINY[name]))
    ours = UNet(TINY[name]).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours, theirs


def inputs(config: UNetConfig, height: int = 8, width: int = 8, tokens: int = 7) -> tuple[Tensor, ...]:
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return draw(2, 4, height, width), torch.tensor([0, 981]), draw(2, tokens, config.context_dim)


@pytest.mark.parametrize(("height", "width", "tokens"), [(8, 8, 77), (8, 16, 1), (24, 8, 13), (7, 9, 5)])
@pytest.mark.parametrize("name", TINY)
def test_noise_and_gradients(name: str, height: int, width: int, tokens: int) -> None:
    ours, theirs = pair(name)
    given = inputs(TINY[name], height, width, tokens)
    assert_parity(ours, theirs, home, lambda: ours(*given), lambda: theirs(*given).sample)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (5, 11)])
@pytest.mark.parametrize("name", TINY)
def test_encode_is_the_state_after_the_middle_block(name: str, size: tuple[int, int]) -> None:
    ours, theirs = pair(name)
    given = inputs(TINY[name], *size)

    def run_theirs() -> Tensor:
        states: list[Tensor] = []
        handle = theirs.mid_block.register_forward_hook(lambda module, args, output: states.append(output))
        theirs(*given)
        handle.remove()
        return states[0]

    assert ours.encode(*given).shape[1] == ours.width
    assert_parity(ours, theirs, home, lambda: ours.encode(*given), run_theirs)


@pytest.mark.parametrize("name", TINY)
def test_the_encoder_alone_has_some_of_the_keys_and_the_same_answer(name: str) -> None:
    ours, _ = pair(name)
    encoder = UNetEncoder(TINY[name]).double().eval()
    whole, half = parameters(ours), parameters(encoder)
    assert half.keys() < whole.keys()
    assert {key.split(".")[0] for key in whole.keys() - half.keys()} == {"output_blocks", "out"}
    encoder.load_state_dict({key: whole[key] for key in half}, strict=True)
    given = inputs(TINY[name])
    assert torch.equal(encoder.encode(*given), ours.encode(*given))
    assert encoder.width == ours.width


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_gives_identical_gradients(name: str) -> None:
    ours, _ = pair(name)
    given = inputs(TINY[name])
    runs: list[int] = []
    for module in ours.modules():
        if isinstance(module, ResBlock):
            module.register_forward_pre_hook(lambda module, args: runs.append(1))

    def backward(checkpointing: bool, training: bool) -> tuple[int, list[Tensor]]:
        ours.checkpointing = checkpointing
        ours.train(training).zero_grad(set_to_none=True)
        runs.clear()
        (ours(*given).square().mean() + ours.encode(*given).square().mean()).backward()
        return len(runs), [p.grad.clone() for p in ours.parameters()]

    once, plain = backward(checkpointing=False, training=True)
    twice, checkpointed = backward(checkpointing=True, training=True)
    assert twice == 2 * once, "nothing was computed again: checkpointing did not happen"
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert backward(checkpointing=True, training=False)[0] == once


@pytest.mark.parametrize(("name", "count"), [("sd-1", 859_520_964), ("sd-2", 865_910_724), ("sd-mini", None)])
def test_full_size_names_and_shapes(name: str, count: int | None) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(CONFIGS[name]), reference(CONFIGS[name])
    assert_same_shapes(ours, home(parameters(theirs)))
    if count is not None:
        assert sum(p.numel() for p in ours.parameters()) == count


def test_a_wrong_weight_is_found_where_it_is() -> None:
    ours, theirs = pair()
    given = inputs(TINY["sd-1"])
    names = home_names(theirs, home)
    runs = [lambda: ours(*given), lambda: theirs(*given).sample]
    assert first_difference(ours, theirs, names, *runs) == ""
    for layer in [
        "output_blocks.5.2.conv",
        "output_blocks.5.1.proj_in",
        "middle_block.1.transformer_blocks.0.attn2.to_k",
        "input_blocks.4.0.emb_layers.1",
        "time_embed.2",
    ]:  # last to first: each new fault comes before the one that is already there
        with torch.no_grad():
            ours.get_submodule(layer).weight.view(-1)[0].add_(1e-5)
        found = first_difference(ours, theirs, names, *runs)
        assert found.startswith(f"{layer} is the first layer that gives something else")


@pytest.mark.parametrize("name", TINY)
def test_every_broken_layer_is_named(name: str) -> None:
    ours, theirs = pair(name)
    given = inputs(TINY[name])
    runs = [lambda: ours(*given), lambda: theirs(*given).sample]
    assert misnamed(ours, theirs, home, *runs, every=23) == {}


@pytest.mark.parametrize(
    ("layer", "eps"),
    [("middle_block.1.norm", 1e-5), ("input_blocks.1.0.in_layers.0", 1e-6), ("out.0", 1e-6)],
)
def test_a_wrong_eps_is_found_where_it_is(layer: str, eps: float) -> None:
    ours, theirs = pair()
    given = inputs(TINY["sd-1"])
    ours.get_submodule(layer).eps = eps
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that gives something else"):
        assert_parity(ours, theirs, home, lambda: ours(*given), lambda: theirs(*given).sample)


def test_wrong_heads_are_found_behind_the_attention() -> None:
    ours, theirs = pair()
    given = inputs(TINY["sd-1"])
    ours.input_blocks[1][1].transformer_blocks[0].attn1.heads = 4
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that reads something else"):
        assert_parity(ours, theirs, home, lambda: ours(*given), lambda: theirs(*given).sample)


def test_a_wrong_gradient_is_named() -> None:
    ours, theirs = pair()
    given = inputs(TINY["sd-1"])
    weight = ours.get_submodule("input_blocks.0.0").weight
    handle = weight.register_hook(lambda gradient: gradient * (1 + 1e-6))
    with pytest.raises(AssertionError, match=r"gradients differ: \{'input_blocks.0.0.weight'"):
        assert_parity(ours, theirs, home, lambda: ours(*given), lambda: theirs(*given).sample)
    handle.remove()


def test_options_that_change_nothing_and_those_that_would() -> None:
    config = {
        "block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 32,
        "attention_head_dim": 8, "layers_per_block": 1, "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    plain = KINDS["unet"].read(config, {}, "here")
    same = {"transformer_layers_per_block": [1, 1], "only_cross_attention": [False, False]}  # one per level
    same |= {"decay": 0.9999, "optimization_step": 5, "use_ema_warmup": True, "power": 2 / 3}  # of unet_ema/
    assert KINDS["unet"].read(config | same, {}, "here") == plain
    other = [("transformer_layers_per_block", x) for x in ([1, 2], [], 2)] + [("unknown", [])]
    for option, value in [*other, ("only_cross_attention", [False, True])]:
        with pytest.raises(WeightsError, match=f"here: .* {option} = "):
            KINDS["unet"].read(config | {option: value}, {}, "here")
