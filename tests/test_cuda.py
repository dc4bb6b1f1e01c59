"""CUDA without a GPU: models, heads, losses, DAKL, k-means, ridge, samplers on fake tensors of device "cuda".

Fake tensors have a shape, dtype and device, and no values: a tensor that a function leaves on the CPU, or a
dtype that an operator refuses, fails. Models run under CUDA's bf16 autocast. Not reached, because they need
values or a device: the backward pass, results that a loop reads (k-means' end and its repair of empty
clusters, DAKL's choice of alpha, the end of beam search), memory and speed of kernels, rounding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import reverse_sd
import weights
from backbones import BACKBONES, as_backbone
from baselines import PENALTIES, RidgeSums, Smoothing, ridge
from models.search import beam_search
from weights.kinds import KINDS

CUDA = torch.device("cuda")


class SameDtype(TorchDispatchMode):
    """Raises where matrices or a norm's weights differ in dtype: CUDA's kernels refuse, fake ones do not."""

    NAMES = ("mm", "addmm", "addmm_", "convolution", "native_group_norm")
    OPERATORS = [getattr(torch.ops.aten, name) for name in NAMES]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if function.overloadpacket in self.OPERATORS and len({tensor.dtype for tensor in tensors}) > 1:
            raise RuntimeError(f"{function}: dtype {[tensor.dtype for tensor in tensors]}")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_cuda(bf16: bool = True) -> Iterator[None]:
    """Context manager: fake tensors, CUDA's autocast to bf16, no gradients.

    `torch.autocast("cuda")` refuses to work without a GPU, so its switch is set here.
    """
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", bf16)
    torch.set_autocast_cache_enabled(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), SameDtype(), torch.no_grad():
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)


def model_of(kind: str, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of these sizes on the fake device, in eval mode; call it under `on_cuda`."""
    with torch.device("meta"):
        model = weights.build(kind, KINDS[kind].configs[name])
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=CUDA, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return model.eval()


def regressor_of(backbone: str, model: nn.Module) -> reverse_sd.Regressor:
    with torch.device(CUDA):
        return reverse_sd.Regressor(as_backbone(backbone, model), model.width, 50, 3).train()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA)


def ids(*shape: int, below: int = 100) -> Tensor:
    return torch.randint(0, below, shape, device=CUDA)


def all_on_cuda(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cuda" for tensor in tensors)


def inputs_of(kind: str, config: object) -> list[Tensor]:
    """Two samples of a kind's inputs."""
    match kind:
        case "vit" | "swin":
            return [random(2, 3, *config.img_size)]
        case "clip-vision":
            return [random(2, 3, config.image_size, config.image_size)]
        case "clip-text":
            return [ids(2, 77)]
        case "minilm":
            return [ids(2, 9), torch.ones(2, 9, dtype=torch.long, device=CUDA)]
        case "unet":
            context = random(2, 77, config.context_dim)
            return [random(2, 4, 16, 16), torch.full((2,), 981, device=CUDA), context]
        case "blip" | "blip2":
            side = config.vision_image_size
            return [random(2, 3, side, side), ids(2, 7)]
    raise ValueError(kind)


MODELS = [(kind, name) for kind, found in KINDS.items() if kind not in ("vae", "unet-encoder")
          for name in found.configs]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_every_model_runs_forward(kind: str, name: str):
    with on_cuda():
        model = model_of(kind, name)
        result = model(*inputs_of(kind, model.config))
        assert all_on_cuda(result) and len(result) == 2


@pytest.mark.parametrize("name", KINDS["vae"].configs)
def test_the_autoencoder_encodes_and_decodes(name: str):
    with on_cuda():
        vae = model_of("vae", name)
        latents = vae.encode(random(2, 3, 64, 64))
        assert all_on_cuda(latents, vae.decode(latents))


@pytest.mark.parametrize("name", ["sd-mini", "sd-1", "sd-2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_autocast(name: str, dtype: torch.dtype):
    """generate.py --dtype: the whole pipeline's weights in half precision."""
    with on_cuda(bf16=False):
        unet, vae = (model_of(kind, name, dtype) for kind in ("unet", "vae"))
        context = random(2, 77, unet.config.context_dim).to(dtype)
        noise = unet(random(2, 4, 8, 8).to(dtype), torch.ones(2, dtype=torch.long, device=CUDA), context)
        assert noise.dtype == vae.decode(noise).dtype == dtype


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_regressor_and_its_losses(backbone: str, checkpointing: bool):
    """Training mode, and the terms of RegressorTrainer.loss."""
    kind = BACKBONES[backbone].kind
    with on_cuda():
        model = model_of(kind, BACKBONES[backbone].mini).train()
        model.checkpointing = checkpointing
        regressor = regressor_of(backbone, model)
        inputs = inputs_of("unet" if backbone == "unet" else kind, model.config)
        prediction = regressor(*(inputs[::2] if backbone == "unet" else inputs))
        assert prediction.embedding.dtype == torch.bfloat16
        cosine = reverse_sd.cosine_loss(prediction.embedding.float(), random(2, 384))
        vocabulary = reverse_sd.vocabulary_loss(prediction.logits.float(), torch.zeros(2, 50, device=CUDA))
        joint = reverse_sd.joint_loss(cosine, vocabulary)
        assert all_on_cuda(joint) and joint.dtype == torch.float32


@pytest.mark.parametrize("placement", [0, 1, 2, 3])
def test_the_heads(placement: int):
    with on_cuda():
        with torch.device(CUDA):
            heads = reverse_sd.Heads(16, 50, placement)
        prediction = heads(random(2, 16))
        assert all_on_cuda(*(t for t in (prediction.embedding, prediction.logits) if t is not None))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cbs_smooths_on_the_device(backbone: str):
    kind = BACKBONES[backbone].kind
    with on_cuda():
        model = model_of(kind, BACKBONES[backbone].mini).train()
        regressor = regressor_of(backbone, model)
        Smoothing(regressor, 1.0)
        inputs = inputs_of("unet" if backbone == "unet" else kind, model.config)
        assert all_on_cuda(regressor(*(inputs[::2] if backbone == "unet" else inputs)).embedding)


# -- samplers ----------------------------------------


class Tokens:
    """In place of a tokenizer: ids on the CPU, as the real one's."""

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), 77, dtype=torch.long)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("predicts_v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ddim(guidance: float, predicts_v: bool, dtype: torch.dtype):
    """Noise drawn on the CPU, text states, guidance, every step, decoding."""
    with on_cuda(bf16=False):
        parts = [model_of(kind, "sd-mini", dtype) for kind in ("unet", "vae", "clip-text")]
        pipeline = generate.Pipeline(*parts, Tokens(), predicts_v)
        noise = torch.randn(2, 4, 8, 8).to(next(parts[0].parameters()))
        latents = pipeline.sample(["a", "b"], noise, steps=3, guidance=guidance)
        assert all_on_cuda(latents)
        assert pipeline.decode(latents.to(dtype)).device.type == "cpu"


def test_attention_maps_come_back_to_the_cpu():
    with on_cuda():
        unet = model_of("unet", "sd-mini")
        with generate.attention_maps(unet) as maps:
            unet(*inputs_of("unet", unet.config))
        assert maps and not any(map(all_on_cuda, maps))


@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_but_for_its_end(beams: int):
    """Every step; whether a caption can still win, and the longest caption's length, are answered here."""
    with (
        on_cuda(),
        patch.object(torch.Tensor, "__bool__", lambda tensor: True),
        patch.object(torch.Tensor, "__index__", lambda tensor: 5),
    ):
        blip = model_of("blip", "blip-mini")
        step = blip._step(blip.encode_image(random(2, 3, 64, 64)))
        assert all_on_cuda(beam_search(step, ids(2, 5), beams, end=3, pad=0, min_new=1, max_new=13))


# -- curriculum, ensemble, k-means, DAKL ----------------------------------------


def test_the_ensemble():
    with on_cuda():
        members = [random(5, 16), random(5, 16)]
        for options in ({}, {"average": "median"}, {"weights": [0.3, 0.7]}):
            assert all_on_cuda(reverse_sd.ensemble(members, **options))


def test_k_means_but_for_its_loop():
    """Nearest rows, cluster means, targets. The loop's end, the drawing of the start and the repair of empty
    clusters read values, so nothing of them is tested here; nor is bincount without a known length."""
    counted = patch.object(torch, "bincount", lambda labels, minlength: ids(minlength))
    with on_cuda(bf16=False), counted:
        rows, centroids = random(50, 16), random(7, 16)
        labels, distances = reverse_sd.nearest_rows(rows, centroids, block=16)
        means = reverse_sd.cluster_means(rows, labels, 7, block=32)
        assert all_on_cuda(labels, distances, means)
        assert all_on_cuda(reverse_sd.centroid_targets(centroids, rows, random(50, 384)))


@pytest.mark.parametrize("centred", [False, True])
def test_dakl_literal(centred: bool):
    with on_cuda(bf16=False):
        rows = reverse_sd.dakl_literal(random(9, 8), random(9, 4), random(6, 8), 1e-3, 0.1, centred)
        assert all_on_cuda(rows)


@pytest.mark.parametrize("form", ["exact", "linear"])
@pytest.mark.parametrize("centred", [False, True])
def test_dakl_with_a_given_alpha(form: str, centred: bool):
    """fit and predict; the checks of values (finite, Cholesky's success) are answered by "well". The choice
    of alpha on validation compares values, so nothing is tested of it here."""
    with (
        on_cuda(bf16=False),
        patch.object(torch.Tensor, "__bool__", lambda tensor: tensor.dtype == torch.bool),
        patch.object(torch.Tensor, "__float__", lambda _: 1.0),
    ):
        dakl = reverse_sd.Dakl(alpha=0.1, form=form, centred=centred, block=16)
        dakl.fit(random(20, 8), random(20, 4), random(30, 8))
        assert all_on_cuda(dakl.predict(random(5, 8)))


def test_ridge_but_for_its_choice_of_the_penalty():
    """Sums, solution, predictions; the best penalty and the cosines to report are answered here."""
    with (
        on_cuda(bf16=False),
        patch.object(torch.Tensor, "__int__", lambda _: 0),
        patch.object(FakeTensor, "tolist", lambda _: [0.0] * len(PENALTIES)),
    ):
        sums = RidgeSums(6, 4, "cuda")
        sums.add(random(20, 6), random(20, 4))
        assert all_on_cuda(ridge(sums, random(5, 6), random(5, 4)).predict(random(3, 6)))


# -- the test itself ----------------------------------------


def test_such_faults_fail():
    """A tensor left on the CPU; a dtype that does not fit, in a convolution, a matrix product, attention."""
    with on_cuda(bf16=False):
        x, image = random(4, 4), random(1, 4, 8, 8)
        faults = [
            lambda: x + torch.arange(4),
            lambda: F.embedding(torch.zeros(2, dtype=torch.long), x),
            lambda: F.conv2d(image, random(4, 4, 3, 3).half()),
            lambda: F.linear(x, x.half()),
            lambda: F.group_norm(image, 2, random(4).half()),
            lambda: F.scaled_dot_product_attention(image, image.half(), image),
        ]
        for fault in faults:
            with pytest.raises(RuntimeError, match=r"device|dtype|type \("):
                fault()
