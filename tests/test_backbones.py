"""The black boxes through the same loop: whole, frozen, the last blocks, decaying learning rates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_here
from safetensors.torch import load_file, save_file

import backbones
import data
import eval
import reverse_sd
import train
import weights
from training.config import TrainConfig, resolve
from training.inputs import load_backbone, prepare


def assert_reads_images_as_evaluated(run: Path, few_scenes: Path) -> None:
    rows = json.loads((run / "predictions" / "rows.json").read_text())["test"]
    pairs = data.read_pairs(few_scenes)
    image = pairs.image(pairs.prompts.index(rows[0]["prompt"]))
    embedding, _ = reverse_sd.image_predictor(reverse_sd.load_run(run), "cpu")([image])
    evaluated = np.load(run / "predictions" / "test.npy")[0]
    assert float(embedding[0] @ evaluated) > 0.999


@pytest.mark.parametrize("backbone", ["vit", "swin", "clip"])
def test_black_boxes_train(backbone: str, few_scenes: Path, cache: Path, tmp_path: Path):
    run = train_here(few_scenes, tmp_path / "run", "--backbone", backbone)
    assert json.loads((run / "result.json").read_text())["n_train"] == 60
    record = backbones.BACKBONES[backbone]
    before = weights.load(record.kind, record.mini).state_dict()
    after = load_file(run / "model.safetensors")
    trained = {name.removeprefix("backbone.") for name in after if name.startswith("backbone.")}
    assert trained == before.keys()
    assert not any(torch.equal(after[f"backbone.{name}"], value) for name, value in before.items()
                   if name.endswith("weight"))
    assert_reads_images_as_evaluated(run, few_scenes)


@pytest.mark.parametrize("backbone", ["unet", "clip"])
def test_frozen_backbones_train_their_heads_on_cached_features(
    backbone: str, few_scenes: Path, cache: Path, tmp_path: Path
):
    run = train_here(few_scenes, tmp_path / "run", "--backbone", backbone, "--train-blocks", "0")
    assert not any(name.startswith("backbone.") for name in load_file(run / "model.safetensors"))
    assert len(list(cache.glob(f"{backbone}-features-*"))) == 1
    assert_reads_images_as_evaluated(run, few_scenes)


def test_only_the_last_blocks_train(few_scenes: Path, cache: Path, tmp_path: Path):
    run = train_here(few_scenes, tmp_path / "run", "--backbone", "vit", "--train-blocks", "2")
    before = weights.load("vit", "vit-mini").state_dict()
    after = load_file(run / "model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(after[f"backbone.{name}"], value)}
    assert changed == {name for name in before if name.startswith(("blocks.4.", "blocks.5.", "norm."))}


def test_frozen_blocks_take_no_gradient_so_that_clipping_ignores_them():
    config = resolve(TrainConfig(backbone="vit", train_blocks=2))
    regressor = train.build_regressor(config, None, n_words=5)
    trained = {name for group in train.parameter_groups(regressor, config).values() for name in group}
    last = ("heads.", "backbone.norm.", "backbone.blocks.4.", "backbone.blocks.5.")
    assert trained == {name for name, _ in regressor.named_parameters() if name.startswith(last)}
    assert trained == {name for name, parameter in regressor.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("backbone, blocks", [("unet", 7), ("vit", 6), ("swin", 8), ("clip", 6)])
def test_layers_are_counted_from_the_input(backbone: str, blocks: int):
    config = resolve(TrainConfig(backbone=backbone))
    regressor = train.build_regressor(config, None, n_words=5)
    names = [name for name, _ in regressor.named_parameters()]
    depths = dict(zip(names, train.depths_of(names, backbones.BACKBONES[backbone].blocks), strict=True))
    assert set(depths.values()) == set(range(blocks + 2))
    assert list(depths.values()) == sorted(depths.values())
    assert {depth for name, depth in depths.items() if name.startswith("heads.")} == {blocks + 1}


def test_each_block_learns_at_a_fraction_of_the_rate_above_it():
    config = resolve(TrainConfig(backbone="swin", layer_decay=0.5))
    groups = train.parameter_groups(train.build_regressor(config, None, n_words=5), config)
    scale = {name: factor for factor, group in groups.items() for name in group}
    assert scale["heads.embedding.weight"] == 5e-5 / 1e-3 and scale["backbone.norm.weight"] == 1
    assert scale["backbone.layers.2.blocks.3.mlp.fc1.weight"] == 0.5
    assert scale["backbone.layers.1.downsample.reduction.weight"] == scale[
        "backbone.layers.1.blocks.0.norm1.weight"] == 0.5**6
    assert scale["backbone.patch_embed.proj.weight"] == 0.5**9


def test_layer_decay_reaches_the_optimizer(few_scenes: Path, cache: Path, tmp_path: Path):
    run = train_here(few_scenes, tmp_path / "run", "--backbone", "vit", "--layer-decay", "1e-10")
    before, after = weights.load("vit", "vit-mini").state_dict(), load_file(run / "model.safetensors")
    for name in ("patch_embed.proj.weight", "blocks.4.mlp.fc1.weight"):
        assert torch.equal(after[f"backbone.{name}"], before[name])
    assert not torch.equal(after["backbone.norm.weight"], before["norm.weight"])


def test_weights_without_all_the_parts_stop_the_run_before_anything_long(
    few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    unet = tmp_path / "unet.safetensors"
    save_file(weights.load("unet", "sd-mini").state_dict(), unet)
    for flags in (["--weights", str(unet), "--captions", "empty"], ["--captions", str(tmp_path / "none")]):
        assert train.main(["--data", str(few_scenes), *flags]) == 2
        assert flags[1] in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "cache").iterdir())


def test_a_black_box_decides_its_own_image_size(few_scenes: Path, cache: Path, capsys):
    assert train.main(["--data", str(few_scenes), "--backbone", "vit", "--image-size", "32"]) == 2
    assert "--image-size: only --backbone unet uses it" in capsys.readouterr().err


def test_inputs_made_by_other_files_than_in_training_are_mentioned(
    few_scenes: Path, cache: Path, tmp_path: Path, caplog
):
    shutil.copytree(weights.resolve("vit-mini"), own := tmp_path / "own-mini")
    flags = ["--backbone", "vit", "--weights", str(own), "--train-blocks", "0"]
    run = train_here(few_scenes, tmp_path / "run", *flags)
    assert eval.main([str(run)]) == 0 and "other files" not in caplog.text
    save_file({k: v / 2 for k, v in load_file(own / "model.safetensors").items()}, own / "model.safetensors")
    for command in (eval.main([str(run)]), train.main(["--resume", str(run)])):
        assert command == 0
    assert caplog.text.count("made by other files than those of its training (model)") == 2


def test_the_files_that_make_the_white_boxs_inputs(few_scenes: Path, cache: Path, tmp_path: Path):
    (file := tmp_path / "captions.txt").write_text("a fox" + "\n" * 84)

    def origin(**fields) -> dict[str, str]:
        sizes = {"data": str(few_scenes), "val_size": 12, "test_size": 12}
        return prepare(resolve(TrainConfig(**sizes, **fields))).origin

    first, made, frozen = origin(captions=str(file)), origin(), origin(captions=str(file), train_blocks=0)
    assert made == first | {"captions": weights.fingerprint("blip", "blip-mini")}
    text = weights.fingerprint("clip-text", "sd-mini")
    assert first["vae"] == weights.fingerprint("vae", "sd-mini") != first["text"] == text
    assert frozen == first | {"model": weights.fingerprint("unet-encoder", "sd-mini")}
    file.write_text("a dog" + "\n" * 84)
    assert origin(captions=str(file)) == first | {"captions": origin(captions=str(file))["captions"]} != first
    assert origin(backbone="vit") == {}


def test_a_broken_image_is_left_out(few_scenes: Path, cache: Path, tmp_path: Path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    pairs = data.read_pairs(few_scenes)
    for i in range(12):
        pairs.image(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pairs.prompts[i])
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    config = TrainConfig(backbone="vit", data=str(folder), clean="off", val_size=2, test_size=2)
    prepared = prepare(resolve(config))
    rows = np.concatenate(list(prepared.splits.values()))
    assert len(rows) == 11
    assert {prepared.pairs.where(int(row)).rpartition("/")[2] for row in rows} == {
        f"{i}.png" for i in range(12) if i != 3}


def test_a_random_start_is_always_the_same_and_not_the_pretrained_one():
    def start(**fields) -> dict[str, torch.Tensor]:
        config = resolve(TrainConfig(backbone="clip", **fields))
        return load_backbone(config).state_dict()

    random, again, pretrained = start(random_start=True), start(random_start=True, seed=5), start()
    assert random.keys() == pretrained.keys()
    assert all(torch.equal(random[name], again[name]) for name in random)
    shipped = weights.load("clip-vision", "clip-mini").state_dict()
    assert all(torch.equal(pretrained[name], shipped[name]) for name in shipped)
    assert not any(torch.equal(random[name], shipped[name]) for name in shipped if shipped[name].dim() > 1)
    positions = next(value for name, value in random.items() if name.endswith("position_embedding.weight"))
    assert float(positions.std()) * positions.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)


def test_a_random_start_trains_all_blocks():
    with pytest.raises(data.DataError, match="--random-start: trains all blocks"):
        resolve(TrainConfig(backbone="vit", random_start=True, train_blocks=1))
