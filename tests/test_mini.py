"""The miniature that the repository ships, and how it is trained."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import data
import weights
from mini import pretrain, scenes

FOLDER = pretrain.FOLDER


@pytest.fixture(scope="module")
def some_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.build(folder, parts=1, per_part=60, seed=77, progress=False)
    return folder


def test_the_shipped_autoencoder_is_as_good_as_its_card_says(some_scenes: Path):
    card = json.loads((FOLDER / "vae" / "card.json").read_text())
    quality = pretrain.vae_quality(weights.load("vae", "sd-mini"), pretrain.load_images(some_scenes))
    assert quality["psnr_db"] > card["psnr_db"] - 1
    assert quality["latent_deviation"] == pytest.approx(card["latent_deviation"], rel=0.1)
    scale = weights.config("vae", "sd-mini").scale_factor
    assert scale == pytest.approx(1 / card["latent_deviation"], rel=1e-4)


def test_diffusers_reads_the_shipped_autoencoder():
    theirs = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float64).eval()
    ours = weights.load("vae", "sd-mini", dtype=torch.float64)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(images)
        torch.testing.assert_close(latents, theirs.encode(images).latent_dist.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-10, rtol=0)
    assert theirs.config.scaling_factor == ours.config.scale_factor


def test_transformers_reads_the_shipped_tokenizer(some_scenes: Path):
    theirs = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    prompts = [*data.read_pairs(some_scenes).prompts, "", "zebra's XYLOPHONE, 123!", "snow " * 100]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert weights.load_tokenizer("sd-mini")(prompts).tolist() == expected


def test_stopped_and_resumed_training_of_the_autoencoder_ends_alike(
    some_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pretrain, "training_scenes", lambda parts: some_scenes)
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)

    def train(name: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(pretrain, "FOLDER", tmp_path / name)
        pretrain.train_vae(parts=1, steps=5, batch_size=4, lr=1e-3, seed=0)
        return load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")

    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache-1"))
    whole = train("whole")
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache-2"))
    reconstruct = pretrain.reconstruction_loss
    calls = iter(range(100))

    def stopping(*images: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return reconstruct(*images)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "reconstruction_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    resumed = train("stopped")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
