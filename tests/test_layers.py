"""The faster nn.Linear computes what nn.Linear does, forward and backward, by either route."""

import pytest
import torch
from torch import nn

from models.layers import Linear, linear

SHAPES = [(300, 24), (2, 3, 24), (16, 17, 24), (1, 256, 24), (5, 8, 8, 24), (0, 4, 24)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_linear(shape: tuple[int, ...], bias: bool, threads: int):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    results = []
    for layer in (ours, theirs):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.sin().sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in layer.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_many_rows_on_the_cpu_go_through_a_convolution(monkeypatch: pytest.MonkeyPatch):
    called = []
    convolution = torch.nn.functional.conv2d
    monkeypatch.setattr("models.layers.F.conv2d", lambda *a, **k: called.append(1) or convolution(*a, **k))
    weight = torch.randn(8, 4)
    linear(torch.randn(2, 100, 4), weight, None)
    linear(torch.randn(2, 200, 4).double(), weight.double(), None)
    assert not called
    linear(torch.randn(2, 200, 4), weight, None)
    assert called


def test_rows_need_not_be_contiguous(threads: int):
    x = torch.randn(2, 24, 300).transpose(1, 2)
    weight, bias = torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias, atol=2e-5, rtol=2e-5)
