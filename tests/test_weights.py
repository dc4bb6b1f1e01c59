"""weights.load: every sort of source gives the numbers of the library that wrote it."""

import dataclasses
import gzip
import inspect
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, SHARED
from diffusers import AutoencoderKL, UNet2DConditionModel
from parity import randomise
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import weights
from models import clip, vae
from weights import kinds
from weights.files import FIELDS
from weights.kinds import KINDS
from weights.sources import read

ATOL = 1e-10
UNET = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 768,
        "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNET_2 = UNET | {"block_out_channels": (64, 128), "cross_attention_dim": 1024,
                 "attention_head_dim": [1, 2], "use_linear_projection": True}
VAE = {"block_out_channels": (32, 64), "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CLIP = {"vocab_size": 99, "hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 12, "hidden_act": "quick_gelu", "eos_token_id": 98, "bos_token_id": 97}
CLIP_2 = CLIP | {"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu", "num_hidden_layers": 3}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make(build, config) -> nn.Module:
    """A reference model with random float32 values; computing in float64 it is an exact oracle."""
    return randomise(build(config) if build is CLIPTextModel else build(**config)).float().eval()


def save(model: nn.Module, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def assert_same_unet(ours: nn.Module, theirs: nn.Module) -> None:
    x, t = noise(2, 4, 8, 8), torch.tensor([3, 801])
    context = noise(2, 5, theirs.config.cross_attention_dim)
    expected = theirs.double()(x, t, context).sample
    assert (ours(x, t, context) - expected).abs().max() < ATOL
    theirs.float()


@torch.no_grad()
def assert_same_vae(ours: nn.Module, theirs: nn.Module) -> None:
    x, z = noise(1, 3, 16, 16), noise(1, 4, 8, 8)
    theirs.double()
    assert (ours.encode(x) - theirs.encode(x).latent_dist.mean).abs().max() < ATOL
    assert (ours.decode(z) - theirs.decode(z).sample).abs().max() < ATOL
    theirs.float()


@torch.no_grad()
def assert_same_text(ours: nn.Module, theirs: nn.Module, layer: int = -1) -> None:
    ids = torch.randint(0, 97, (2, 77), generator=torch.Generator().manual_seed(2))
    out = theirs.double()(ids, output_hidden_states=True)
    norm = dict(theirs.named_modules())
    norm = norm.get("text_model.final_layer_norm") or norm["final_layer_norm"]
    expected = out.last_hidden_state if layer == -1 else norm(out.hidden_states[layer])
    assert (ours(ids) - expected).abs().max() < ATOL
    theirs.float()


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return make(UNet2DConditionModel, UNET)


@pytest.fixture(scope="module")
def autoencoder() -> nn.Module:
    return make(AutoencoderKL, VAE)


@pytest.fixture(scope="module")
def text() -> nn.Module:
    return make(CLIPTextModel, CLIPTextConfig(**CLIP))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, unet: nn.Module, autoencoder: nn.Module, text: nn.Module) -> Path:
    """A diffusers folder, as save_pretrained writes it."""
    root = tmp_path_factory.mktemp("pipeline")
    save(unet, root / "unet")
    save(autoencoder, root / "vae")
    save(text, root / "text_encoder")
    (root / "model_index.json").write_text("{}")
    return root


@pytest.fixture
def published(pipeline: Path, monkeypatch) -> None:
    """The tiny sizes, as if they were published ones: then a file without config.json is recognised."""
    for kind in ("unet", "vae", "clip-text"):
        monkeypatch.setitem(KINDS[kind].configs, "tiny", weights.config(kind, pipeline))


def load64(kind: str, source: Path) -> nn.Module:
    return weights.load(kind, source, dtype=torch.float64)


@pytest.fixture(scope="module")
def single(tmp_path_factory, unet: nn.Module, autoencoder: nn.Module, text: nn.Module) -> Path:
    """A single file in LDM's names, with what such files drag along."""
    models = {"unet": unet, "vae": autoencoder, "clip-text": text}
    tensors = {
        KINDS[kind].single_file[0] + name: tensor.contiguous()
        for kind, model in models.items()
        for name, tensor in weights.to_home(kind, model.state_dict()).items()
    }
    for extra in ("betas", "v_pred", "sqrt_one_minus_alphas_cumprod", "model_ema.diffusion_modelout2bias",
                  "model_ema.decay", "posterior_mean_coef1",
                  "cond_stage_model.transformer.text_model.embeddings.position_ids"):
        tensors[extra] = torch.zeros(2)
    path = tmp_path_factory.mktemp("single") / "v1-5-pruned.safetensors"
    save_file(tensors, path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------------------


def test_diffusers_folder(pipeline: Path, unet: nn.Module, autoencoder: nn.Module, text: nn.Module):
    assert_same_unet(load64("unet", pipeline), unet)
    assert_same_unet(load64("unet", pipeline / "unet"), unet)
    assert_same_unet(load64("unet", pipeline / "unet" / "diffusion_pytorch_model.safetensors"), unet)
    assert_same_vae(load64("vae", pipeline), autoencoder)
    assert_same_text(load64("clip-text", pipeline), text)


def test_dtypes_and_devices_that_no_model_can_have_are_refused():
    with pytest.raises(weights.WeightsError, match="floating"):
        weights.load("vit", "vit-mini", dtype=torch.int8)
    with pytest.raises(weights.WeightsError, match="--device x: not available"):
        weights.load("vit", "vit-mini", device="x")


def test_loaded_model_is_ready(pipeline: Path):
    model = weights.load("unet", pipeline)
    assert not model.training
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loaded_values_are_a_copy_of_the_file(tmp_path: Path, autoencoder: nn.Module):
    folder = save(autoencoder, tmp_path / "vae")
    model = weights.load("vae", folder)
    (file := folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * file.stat().st_size)
    for parameter in model.parameters():
        assert parameter.abs().sum() > 0


def test_shards(tmp_path: Path, unet: nn.Module, text: nn.Module):
    save(unet, tmp_path / "unet", max_shard_size="1MB")
    save(text, tmp_path / "text_encoder", max_shard_size="1MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same_unet(load64("unet", tmp_path), unet)
    assert_same_text(load64("clip-text", tmp_path), text)


def test_half_precision_on_disk(tmp_path: Path, autoencoder: nn.Module):
    half = make(AutoencoderKL, VAE).half()
    save(half, tmp_path / "vae", variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert weights.load("vae", tmp_path).quant_conv.weight.dtype == torch.float32
    assert_same_vae(load64("vae", tmp_path), half)
    save(autoencoder, tmp_path / "vae")  # beside the half one, the full one is preferred
    assert_same_vae(load64("vae", tmp_path), autoencoder)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_variants_in_shards(variant: str, tmp_path: Path):
    half = make(AutoencoderKL, VAE).half()
    save(half, folder := tmp_path / "vae", variant=variant, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_vae(load64("vae", tmp_path), half)
    index = next(folder.glob("*.index.*"))
    index.rename(folder / f"diffusion_pytorch_model.{variant}.safetensors.index.json")  # as other versions
    assert_same_vae(load64("vae", tmp_path), half)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    if variant != "fp16":
        with pytest.raises(weights.WeightsError, match="give or rename one"):
            weights.load("vae", tmp_path)


@pytest.mark.usefixtures("published")
def test_single_file_of_version_1(single: Path, unet: nn.Module, autoencoder: nn.Module, text: nn.Module):
    assert_same_unet(load64("unet", single), unet)
    assert_same_vae(load64("vae", single), autoencoder)
    assert_same_text(load64("clip-text", single), text)
    assert weights.config("vae", single).scale_factor == 0.18215


def test_the_scale_in_a_single_file_counts(single: Path, tmp_path: Path, published: None):
    save_file(load_file(single) | {"scale_factor": torch.tensor(0.5)}, path := tmp_path / "one.safetensors")
    assert weights.load("vae", path).config.scale_factor == 0.5
    save_file(load_file(single) | {"scale_factor": torch.tensor(0.0)}, path)
    with pytest.raises(weights.WeightsError, match=f"^{path}: scale_factor is 0.0; it must be"):
        weights.config("vae", path)
    name = "first_stage_model.quant_conv.weight"
    save_file(load_file(single) | {name: torch.full_like(load_file(single)[name], torch.inf)}, path)
    with pytest.raises(weights.WeightsError, match=rf"not finite \(NaN or infinity\): {name}$"):
        weights.load("vae", path)


def test_single_file_of_version_2(tmp_path: Path, monkeypatch):
    unet, text = make(UNet2DConditionModel, UNET_2), make(CLIPTextModel, CLIPTextConfig(**CLIP_2))
    sizes = weights.config("unet", save(unet, tmp_path / "unet"))
    monkeypatch.setitem(KINDS["unet"].configs, "tiny", sizes)
    sizes = weights.config("clip-text", save(text, tmp_path / "text_encoder"))
    sizes = dataclasses.replace(sizes, num_hidden_layers=sizes.num_hidden_layers - 1)  # the last is dropped
    monkeypatch.setitem(KINDS["clip-text"].configs, "tiny", sizes)
    home = weights.to_home("clip-text", text.state_dict())
    tensors = {f"model.diffusion_model.{k}": v for k, v in weights.to_home("unet", unet.state_dict()).items()}
    tensors |= {f"cond_stage_model.model.{k}": v
                for k, v in weights.from_home("clip-text", home, "open_clip").items()}
    tensors |= {"cond_stage_model.model.text_projection": torch.zeros(4, 4),
                "cond_stage_model.model.logit_scale": torch.zeros(())}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path := tmp_path / "v2.safetensors")
    assert_same_unet(load64("unet", path), unet)
    assert_same_text(load64("clip-text", path), text, layer=-2)
    assert weights.config("unet", path).num_head_channels == 64


def test_folder_of_version_2(tmp_path: Path):
    unet, text = make(UNet2DConditionModel, UNET_2), make(CLIPTextModel, CLIPTextConfig(**CLIP_2))
    save(unet, tmp_path / "unet")
    save(text, tmp_path / "text_encoder")
    assert_same_unet(load64("unet", tmp_path), unet)
    assert_same_text(load64("clip-text", tmp_path), text)  # a folder is used whole


def test_published_and_resaved_text_towers_are_one(tmp_path: Path, text: nn.Module):
    resaved = save(text, tmp_path / "resaved")
    names = load_file(resaved / "model.safetensors")
    home = weights.to_home("clip-text", names)
    published = tmp_path / "published"
    published.mkdir()
    save_file(home | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
              published / "model.safetensors")
    (published / "config.json").write_text((resaved / "config.json").read_text())
    no_prefix = tmp_path / "no_prefix"
    no_prefix.mkdir()
    save_file({k.removeprefix("text_model."): v for k, v in home.items()}, no_prefix / "model.safetensors")
    (no_prefix / "config.json").write_text((resaved / "config.json").read_text())
    for folder in (resaved, published, no_prefix):
        assert_same_text(load64("clip-text", folder), text)


@pytest.mark.usefixtures("published")
def test_bare_files_without_config(tmp_path: Path, autoencoder: nn.Module, unet: nn.Module):
    home = weights.to_home("vae", autoencoder.state_dict())
    old = weights.from_home("vae", home, "diffusers-old")
    extras = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    for name, tensors in {"ldm": home | extras, "old": old, "new": autoencoder.state_dict()}.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, path := tmp_path / f"{name}.safetensors")
        assert_same_vae(load64("vae", path), autoencoder)
    save_file(unet.state_dict(), path := tmp_path / "unet.safetensors")
    assert_same_unet(load64("unet", path), unet)


@pytest.mark.usefixtures("published")
def test_encoder_half(pipeline: Path, single: Path):
    x, t, context = noise(1, 4, 8, 8), torch.tensor([0]), noise(1, 5, 768)
    with torch.no_grad():
        whole = load64("unet", pipeline)
        for source in (pipeline, single):
            half = load64("unet-encoder", source)
            assert not any(name.startswith(("output_blocks", "out.")) for name in half.state_dict())
            assert torch.equal(half.encode(x, t, context), whole.encode(x, t, context))


def test_inpainting_unet_with_nine_channels(tmp_path: Path):
    theirs = make(UNet2DConditionModel, UNET | {"in_channels": 9})
    ours = load64("unet", save(theirs, tmp_path / "unet"))
    assert ours.config.in_channels == 9 and ours.config.out_channels == 4


def test_scale_factor_comes_from_the_config(tmp_path: Path, autoencoder: nn.Module):
    folder = save(autoencoder, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text()) | {"scaling_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert weights.load("vae", folder).config.scale_factor == 0.5


def test_what_a_config_leaves_out_is_what_its_library_assumes():
    import open_clip

    def arguments(model: type) -> SimpleNamespace:
        parameters = inspect.signature(model).parameters.items()
        return SimpleNamespace(**{name: parameter.default for name, parameter in parameters})

    for options, part, theirs in (
        (kinds.unet.OPTIONS, "", arguments(UNet2DConditionModel)),
        (kinds.vae.OPTIONS, "", arguments(AutoencoderKL)),
        (kinds.clip.TEXT_IN_HF, "", CLIPTextConfig()),
        (kinds.clip.VISION_IN_HF, "", transformers.CLIPVisionConfig()),
        (kinds.clip.TEXT_IN_OPEN_CLIP, "", open_clip.CLIPTextCfg()),
        (kinds.clip.VISION_IN_OPEN_CLIP, "", open_clip.CLIPVisionCfg()),
        (kinds.vit.IN_HF, "", transformers.ViTConfig()),
        (kinds.blip.OPTIONS, "vision_config.", transformers.BlipVisionConfig()),
        (kinds.blip.OPTIONS, "text_config.", transformers.BlipTextConfig()),
        (kinds.blip2.OPTIONS, "vision_config.", transformers.Blip2VisionConfig()),
        (kinds.blip2.OPTIONS, "qformer_config.", transformers.Blip2QFormerConfig()),
        (kinds.blip2.OPTIONS, "text_config.", transformers.OPTConfig()),
    ):
        ours, assumed = options.read({}, "here"), vars(theirs)
        told = {field: assumed.get(option.removeprefix(part)) for option, field in options.told.items()
                if option.startswith(part) and option.removeprefix(part) in assumed and field in ours}
        assert told and {field: ours[field] for field in told} == told
        for option, implemented in options.only.items():
            name = option.removeprefix(part)
            assert not option.startswith(part) or name not in assumed or assumed[name] in implemented, option


def test_missing_parts_of_the_miniature_are_initialised_always_alike(monkeypatch, tmp_path: Path, caplog):
    entry = weights.sources.ENTRIES["sd-mini"]
    monkeypatch.setitem(weights.sources.ENTRIES, "sd-mini", dataclasses.replace(entry, folder=tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights.load("vae", "sd-mini")
    assert "NOT TRAINED" in caplog.text and torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = weights.load("vae", "sd-mini")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config == vae.CONFIGS["sd-mini"] and not first.training
    torch.manual_seed(0)
    seeded = vae.VAE(vae.CONFIGS["sd-mini"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), seeded.parameters(), strict=True))
    before = weights.fingerprint("vae", "sd-mini")
    monkeypatch.setattr(torch, "__version__", "another")  # which may draw other numbers
    assert weights.fingerprint("vae", "sd-mini") != before
    blip = weights.sources.ENTRIES["blip-mini"]
    shutil.copy(blip.folder / "vocab.txt", tmp_path)
    monkeypatch.setitem(weights.sources.ENTRIES, "blip-mini", dataclasses.replace(blip, folder=tmp_path))
    assert weights.load("blip", "blip-mini").tokenizer.token_to_id("[DEC]") == 510
    whole, half = (weights.load(kind, "sd-mini").state_dict() for kind in ("unet", "unet-encoder"))
    assert all(torch.equal(whole[name], half[name]) for name in half)


# As they were before the tables of sizes: caches and runs are kept under these.
FINGERPRINTS = {
    ("vae", "sd-mini"): "df50e899f1e72e85927c8261bc8ab4687f29731cab036a466b5f3d5ee14b7da5",
    ("unet", "sd-mini"): "f024961fce5a2f6e6e90cbd7a913773da37db6926fd0bf07fbcb3c0d8b85c8da",
    ("unet-encoder", "sd-mini"): "c66060dc00c793a38aae0856fb24f4cc934fbd5f44448bc0ebd90287e2cf1664",
    ("clip-text", "sd-mini"): "4754df2a966c75c25fda99268d18e4f3f00eb4550fa4f4b7dbaaab4625b2649f",
    ("clip-text", "clip-mini"): "663af94f8e9b048d05687dc70352e7960b59f10d663ca4ada6d1474f47b454ac",
    ("vit", "vit-mini"): "45042e4d83c7f11dda7472935cecfe6f8c8b0851bff7c7edbee4356ef2f6f984",
    ("swin", "swin-mini"): "9323dbbac08c28a602885af2cdd14222275511b77cfb28994ba30c5cb5930797",
    ("clip-vision", "clip-mini"): "82c94989463cb896baac8bd86470a9877c6411be7c689c7b27ca4ea5948cec6d",
    ("blip", "blip-mini"): "3490bb05ab36fe0934149a6d0b8d0c858d34a4fbc2927a6c94888f064d396ebc",
    ("blip", "blip-plain-mini"): "1e1c035cbeee8099591b3617ac726543d721d8fcd720267ef4250b498168b7a6",
    ("blip2", "blip2-mini"): "bbbc1ccb5f5878bb70c0c4e203792cf0b6c53bb09d9a2d94a88039c6f9f7636a",
    ("minilm", "minilm"): "f5c162f72d8287058c4cace93e3d7bd2ba41f827634a7f5dfaf958bc3b71a371",
}


@pytest.mark.parametrize("kind, source", FINGERPRINTS)
def test_fingerprints_and_sizes_do_not_change(kind: str, source: str):
    assert weights.fingerprint(kind, source) == FINGERPRINTS[kind, source]
    shipped, table = weights.config(kind, source), KINDS[kind].configs[source]
    if kind == "vae":  # measured on the trained one
        table = dataclasses.replace(table, scale_factor=shipped.scale_factor)
    assert shipped == table


def test_a_source_is_parsed_once_until_it_changes(tmp_path: Path, autoencoder: nn.Module):
    folder = save(autoencoder, tmp_path / "vae")
    first = read("vae", folder)
    assert read("vae", folder) is first
    stated = json.loads((folder / "config.json").read_text()) | {"scaling_factor": 0.25}
    (folder / "config.json").write_text(json.dumps(stated))
    assert weights.config("vae", folder).scale_factor == 0.25


def test_minilm_is_what_sentence_transformers_computes(minilm_folder: Path):
    model = weights.load("minilm")
    rows = model.encode(["a red fox in the snow", "", "Ein Fuchs"])
    assert rows.shape == (3, 384) and torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)
    again = weights.load("minilm", minilm_folder).encode(["a red fox in the snow"])
    assert torch.allclose(again, rows[:1], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# What does not fit
# ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 4)


def two() -> dict[str, Tensor]:
    return {k: torch.ones_like(v) for k, v in Two().state_dict().items()}


def test_load_strict_takes_values_dtypes_and_prefix():
    with torch.device("meta"):
        model = Two()
    given = {f"net.{k}": v.half() for k, v in two().items()} | {"other.x": torch.zeros(1)}
    weights.load_strict(model, given, prefix="net.")
    assert all(torch.equal(p, torch.ones_like(p)) and p.dtype == torch.float32 for p in model.parameters())
    assert model.body.weight.data_ptr() != given["net.body.weight"].data_ptr()


def test_load_strict_fresh_and_ignore():
    model = Two()
    head = model.head.weight.detach().clone()
    tensors = {k: v for k, v in two().items() if not k.startswith("head")} | {"old.head": torch.zeros(3)}
    weights.load_strict(model, tensors, ignore={r"old\..*": "another head"}, fresh=[r"head\..*"])
    assert torch.equal(model.head.weight, head) and torch.equal(model.body.bias, torch.ones(3))
    assert model.body.bias.data_ptr() != tensors["body.bias"].data_ptr()  # training would change both


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("body.bias"), "1 missing: body.bias"),
    (lambda t: t.update({"body.bais": t.pop("body.bias")}), "1 missing: body.bias; 1 unexpected: body.bais"),
    (lambda t: t.update({"body.bias": torch.ones(2)}), r"wrong shape: body.bias \(2,\) instead of \(3,\)"),
    (lambda t: t["body.bias"].fill_(float("nan")), r"not finite \(NaN or infinity\): body.bias"),
    (lambda t: t["body.weight"][0].fill_(float("inf")), "not finite .*: body.weight"),
    (lambda t: t.update({f"x{i:02}": torch.ones(1) for i in range(15)}),
     r"15 unexpected: .*x11, ... and 3 more$"),
    (lambda t: t.update({f"x{i:02}": torch.ones(1) for i in range(13)}), ", x11, ... and 1 more$"),
    (lambda t: t.update({f"x{i:02}": torch.ones(1) for i in range(12)}), ", x11$"),
    (lambda t: t.update({"x" * 300: torch.ones(1)}), r'1 unexpected: "x{75} \.\.\.$'),
    (lambda t: t.update({"x\ny": torch.ones(1)}), r'1 unexpected: "x\\ny"$'),
])
def test_load_strict_lists_what_is_wrong_and_touches_nothing(change, says: str):
    model = Two()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = two()
    change(tensors)
    with pytest.raises(weights.WeightsError, match=says) as error:
        weights.load_strict(model, tensors)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_load_strict_lists_everything_in_one_error():
    tensors = two() | {"extra": torch.ones(1), "head.weight": torch.ones(1)}
    del tensors["body.bias"]
    says = "missing: body.bias.*unexpected: extra.*wrong shape: head.weight"
    with pytest.raises(weights.WeightsError, match=says):
        weights.load_strict(Two(), tensors)


def test_load_strict_leaves_nothing_on_meta():
    with torch.device("meta"):
        model = Two()
    tensors = {k: v for k, v in two().items() if not k.startswith("head")}
    with pytest.raises(weights.WeightsError, match="left without values: head"):
        weights.load_strict(model, tensors, fresh=[r"head\..*"])
    assert model.body.weight.is_meta
    with torch.device("meta"):
        model = Two()
        model.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(weights.WeightsError, match="left without values: table"):
        weights.load_strict(model, two())


def test_load_strict_refuses_a_fresh_head_that_the_file_holds():
    with pytest.raises(weights.WeightsError, match="meant to be fresh, yet in the file: head"):
        weights.load_strict(Two(), two(), fresh=[r"head\..*"])


ATTENTION = "decoder.mid_block.attentions.0"


def resave(folder: Path, change) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("encoder.conv_out.bias"), "1 missing: encoder.conv_out.bias"),
    (lambda t: t.update({f"{ATTENTION}.to_kk.bias": t.pop(f"{ATTENTION}.to_k.bias")}),
     f"missing: {ATTENTION}.to_k.bias; 1 unexpected: {ATTENTION}.to_kk.bias"),
    (lambda t: t.update({"decoder.up_blocks.0.resnets.0.conv1.bias": torch.ones(7)}),
     r"decoder.up_blocks.0.resnets.0.conv1.bias \(7,\) instead of \(64,\)"),
    (lambda t: t["quant_conv.weight"].fill_(float("nan")), "not finite.*: quant_conv.weight"),
])
def test_faults_are_named_as_the_file_spells_them(tmp_path: Path, autoencoder: nn.Module, change, says: str):
    folder = save(autoencoder, tmp_path / "vae")
    resave(folder, change)
    with pytest.raises(weights.WeightsError, match=says) as error:
        weights.load("vae", folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_values_too_large_for_half_precision_are_refused(tmp_path: Path, autoencoder: nn.Module):
    folder = save(autoencoder, tmp_path / "vae")
    resave(folder, lambda t: t["quant_conv.weight"].fill_(1e6))
    weights.load("vae", folder)
    with pytest.raises(weights.WeightsError, match="not finite"):
        weights.load("vae", folder, dtype=torch.float16)


@pytest.mark.parametrize("part, option, value", [
    ("unet", "addition_embed_type", "text_time"), ("unet", "transformer_layers_per_block", [1, 2]),
    ("unet", "class_embed_type", "timestep"), ("unet", "norm_num_groups", 16), ("unet", "norm_eps", 1e-6),
    ("unet", "act_fn", "gelu"), ("unet", "some_future_option", 3), ("unet", "layers_per_block", [1, 2]),
    ("unet", "attention_head_dim", [8, 4]), ("unet", "block_out_channels", [32, 48]),
    ("unet", "attention_head_dim", 5),
    ("unet", "down_block_types", ["DownBlock2D", "DownBlock2D"]),
    ("vae", "shift_factor", 0.1), ("vae", "latents_mean", [0.0] * 4), ("vae", "use_quant_conv", False),
    ("vae", "_class_name", "AutoencoderTiny"), ("vae", "down_block_types", ["Other"] * 2),
    ("text_encoder", "hidden_act", "relu"), ("text_encoder", "num_attention_heads", 7),
])
def test_a_config_that_is_not_implemented_is_refused(pipeline: Path, tmp_path: Path, part, option, value):
    (tmp_path / part).mkdir()
    for file in (pipeline / part).iterdir():
        (tmp_path / part / file.name).symlink_to(file)
    path = tmp_path / part / "config.json"
    config = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(config | {option: value}))
    kind = {"text_encoder": "clip-text"}.get(part, part)
    with pytest.raises(weights.WeightsError, match=f"^{path}"):
        weights.load(kind, tmp_path)


def test_labels_are_not_taken_for_options(tmp_path: Path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
             "image_size": 16, "patch_size": 8}
    save(randomise(transformers.ViTModel(transformers.ViTConfig(**sizes))).float(), tmp_path)
    expected, path = weights.config("vit", tmp_path), tmp_path / "config.json"
    stated, labels = json.loads(path.read_text()), dict.fromkeys([*FIELDS, "norm_kwargs"], -1)
    path.write_text(json.dumps(stated | {"label2id": labels, "label_descriptions": {"mean": "a number"}}))
    assert weights.config("vit", tmp_path) == expected
    weights.load("vit", tmp_path)
    for part in ("text_config", "vision_cfg", "text_config_dict", "norm_kwargs"):
        path.write_text(json.dumps({part: {"eps": -1}}))
        with pytest.raises(weights.WeightsError, match="config.json: eps is -1; it must be"):
            weights.read_config(path)


def test_unpublished_sizes_without_config_are_refused(tmp_path: Path):
    theirs = make(UNet2DConditionModel, UNET | {"cross_attention_dim": 96})
    save_file(theirs.state_dict(), path := tmp_path / "unet.safetensors")
    with pytest.raises(weights.WeightsError, match="only published sizes are read .sd-1, .*nearest is"):
        weights.load("unet", path)


def test_single_file_with_tensors_of_no_known_part_is_refused(single: Path, tmp_path: Path):
    tensors = load_file(single) | {"conditioner.embedders.0.x": torch.zeros(1)}
    save_file(tensors, path := tmp_path / "xl.safetensors")
    with pytest.raises(weights.WeightsError, match="no part of Stable Diffusion 1 or 2: conditioner"):
        weights.load("unet", path)


def test_wrong_kinds_are_refused(pipeline: Path, single: Path):
    with pytest.raises(weights.WeightsError, match="no kind of model is called 'vea'; the kinds are minilm"):
        weights.load("vea", pipeline)
    with pytest.raises(weights.WeightsError, match="minilm has no unet"):
        weights.load("unet", "minilm")
    with pytest.raises(weights.WeightsError, match="describes a UNet2DConditionModel, not a vae"):
        weights.load("vae", pipeline / "unet")
    with pytest.raises(weights.WeightsError, match="describes a blip-2, not a blip"):
        weights.load("blip", ROOT / "mini" / "blip2-mini")
    with pytest.raises(weights.WeightsError, match="without a minilm .nothing begins with a prefix of that"):
        weights.load("minilm", single)


def test_build_takes_what_json_gave_back():
    config = json.loads(json.dumps(vars(KINDS["unet"].configs["sd-mini"])))
    with torch.device("meta"):
        assert weights.build("unet-encoder", config).config == KINDS["unet"].configs["sd-mini"]
    with pytest.raises(weights.WeightsError, match="a unet: the sizes of a unet are"):
        weights.build("unet", {"width": 3})
    with pytest.raises(weights.WeightsError, match="a unet: model_channels is -1; it must be"):
        weights.build("unet", config | {"model_channels": -1})


@pytest.mark.parametrize("kind, heads", [
    (name, f.name) for name, kind in KINDS.items() for f in dataclasses.fields(kind.config)
    if f.name.endswith("heads") and f.type in (int, "int")])  # fmt: skip
def test_heads_that_do_not_divide_their_width_are_refused(kind: str, heads: str):
    sizes = vars(next(iter(KINDS[kind].configs.values()))) | {heads: 7}
    with pytest.raises(weights.WeightsError, match=f"is not 7 equal heads; .* state the {heads} of these"):
        weights.build(kind, sizes)


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """CLIP's published vocab.json and merges.txt, made from the merges that open_clip ships."""
    import open_clip

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(line.split()) for line in lines]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return folder


PROMPTS = ["", "a cat", "  a   CAT\n\tsat.", "it's 2024, isn't it?!!", "Café naïve é ﬁ", "日本語 🙂",
           "a" * 400, "word " * 100, "<|endoftext|> inside",
           "x_y-z ((very)) [[odd]] {a|b}", "ａ wide", "İstanbul ß"]


def prompts() -> list[str]:
    path = SHARED / "prompts" / "diffusiondb_10k.txt"
    return PROMPTS + (path.read_text().splitlines()[:2000] if path.is_file() else [])


def test_tokenizer_is_transformers(vocabulary: Path):
    theirs = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    texts = prompts()
    padded = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    expected = padded.input_ids
    ours = weights.load_tokenizer(vocabulary)
    ids = ours(texts)
    assert ids.dtype == torch.int64 and ids.shape == (len(texts), 77)
    wrong = [text for text, a, b in zip(texts, ids, expected, strict=True) if not torch.equal(a, b)]
    assert not wrong, wrong[:5]
    whole = theirs(texts).input_ids
    assert ours.truncated == sum(len(row) > 77 for row in whole) >= 1


def test_tokenizer_is_open_clips_where_texts_are_plain(vocabulary: Path):
    import open_clip

    texts = [text for text in prompts() if text.isascii() and "<" not in text and "&" not in text]
    expected = open_clip.tokenizer.SimpleTokenizer()(texts)
    (vocabulary / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    try:
        ids = weights.load_tokenizer(vocabulary)(texts)
    finally:
        (vocabulary / "special_tokens_map.json").unlink()
    assert len(texts) > 5 and torch.equal(ids, expected)  # "!" is id 0, with which open_clip pads


def test_tokenizer_from_any_folder_and_json(vocabulary: Path, tmp_path: Path):
    first = weights.load_tokenizer(vocabulary)
    beside = vocabulary.parent / "text_encoder"
    beside.mkdir()
    expected, marks = first(PROMPTS), (("<|endoftext|>", first.end), ("<|startoftext|>", first.start))
    first.tokenizer.enable_padding(length=80)  # files may state all this; ids are padded, cut and marked here
    first.tokenizer.enable_truncation(9)
    first.tokenizer.post_processor = processors.RobertaProcessing(*marks)
    first.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").write_text("{}")
    for source in (vocabulary.parent, beside, tmp_path):
        assert torch.equal(weights.load_tokenizer(source)(PROMPTS), expected)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    assert weights.load_tokenizer(tmp_path)([""])[0, -1] == 0


def test_added_tokens_are_those_of_transformers(vocabulary: Path, tmp_path: Path):
    texts = ["a <cat-toy> here", "A <CAT-TOY>, <cat-toy>s", "a star"]
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((vocabulary / name).read_bytes())
    added = tmp_path / "added_tokens.json"
    added.write_text('{"<star>": 49409, "<cat-toy>": 49408, "<|endoftext|>": 49407}')
    theirs = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    theirs.add_tokens(["<cat-toy>", "<star>"])
    expected = theirs(texts, padding="max_length", return_tensors="pt", max_length=77).input_ids
    assert expected[0, 2] == 49408
    assert torch.equal(weights.load_tokenizer(tmp_path)(texts), expected)
    added.write_text('{"<cat-toy>": 49409}')
    with pytest.raises(weights.WeightsError, match="added_tokens.json: the ids of <cat-toy> do not follow"):
        weights.load_tokenizer(tmp_path)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))  # with everything in it
    assert torch.equal(weights.load_tokenizer(tmp_path)(texts), expected)


def test_tokenizer_cut_keeps_the_end_and_counts(vocabulary: Path):
    tokenizer = weights.load_tokenizer(vocabulary)
    ids = tokenizer(["cat " * 75, "cat " * 76, "cat"])
    assert tokenizer.truncated == 1
    assert ids[0, 76] == ids[1, 76] == tokenizer.end and ids[1, 75] == ids[1, 1]
    tokenizer(["cat " * 500])
    assert tokenizer.truncated == 2
    assert tokenizer([]).shape == (0, 77)


def test_tokenizer_faults(vocabulary: Path, tmp_path: Path, single: Path, monkeypatch):
    with pytest.raises(weights.WeightsError, match="no tokenizer"):
        weights.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(weights.WeightsError, match="tokenizer.json: no tokenizer can be read"):
        weights.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(weights.WeightsError, match="vocab.json lacks .* no CLIP tokenizer"):
        weights.load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    with pytest.raises(weights.WeightsError, match="merges.txt: does not fit vocab.json"):
        weights.load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    with pytest.raises(weights.WeightsError, match="no CLIP tokenizer"):
        weights.load_tokenizer(tmp_path)
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "weights" / "clip-tokenizer"
    place.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (place / name).write_bytes((vocabulary / name).read_bytes())
    ids = [weights.load_tokenizer(source)(["a cat"]) for source in (single, vocabulary)]
    assert torch.equal(*ids)
    save_file({"cond_stage_model.model.x": torch.zeros(1)}, path := tmp_path / "v2.safetensors")
    assert weights.load_tokenizer(path)(["a cat"])[0, -1] == 0  # "!", version 2's padding


def test_mini_tokenizer_fits_the_mini_text_tower():
    tokenizer = weights.load_tokenizer("sd-mini")
    ids = tokenizer(["a crimson fox in the snow"])
    assert int(ids.max()) < clip.CONFIGS["sd-mini"].vocab_size and ids.shape == (1, 77)


# ------------------------------------------------------------------------------------------------------------
# Full size
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_full_size_stable_diffusion_1_from_folder_and_single_file(tmp_path: Path):
    """Random U-Net and VAE, float16 from diffusers: the same answer from the folder and from LDM's file."""
    unet_config = {"cross_attention_dim": 768}
    vae_config = VAE | {"block_out_channels": (128, 256, 512, 512)}
    vae_config |= {types: VAE[types] * 2 for types in ("down_block_types", "up_block_types")}
    x, t, context = (v.float() if v.is_floating_point() else v
                     for v in (noise(1, 4, 16, 16), torch.tensor([500]), noise(1, 77, 768)))
    picture, latents = noise(1, 3, 64, 64).float(), noise(1, 4, 8, 8).float()
    torch.manual_seed(0)
    single = {}
    for kind, model in (("unet", partial(UNet2DConditionModel, **unet_config)),
                        ("vae", partial(AutoencoderKL, **vae_config))):
        model = model().half().eval()
        save(model, tmp_path / kind)
        prefix = KINDS[kind].single_file[0]
        single |= {prefix + k: v.contiguous() for k, v in weights.to_home(kind, model.state_dict()).items()}
        del model
    save_file(single, file := tmp_path / "v1.safetensors")
    del single

    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float32).eval()
    expected = theirs(x, t, context).sample
    del theirs
    for source in (tmp_path, file):
        ours = weights.load("unet", source)
        assert sum(p.numel() for p in ours.parameters()) == 859_520_964
        assert (ours(x, t, context) - expected).abs().max() < 1e-4 * expected.abs().max()
        del ours
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32).eval()
    mean, decoded = theirs.encode(picture).latent_dist.mean, theirs.decode(latents).sample
    for source in (tmp_path, file):
        ours = weights.load("vae", source)
        assert (ours.encode(picture) - mean).abs().max() < 1e-4 * mean.abs().max()
        assert (ours.decode(latents) - decoded).abs().max() < 1e-4 * decoded.abs().max()
