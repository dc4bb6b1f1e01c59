"""JSON from outside: what each rule allows, and one line that names file and field for everything else."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, train_here
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import reverse_sd
import train
import weights
from files import DataError
from schema import FLAG, NULL, OBJECT, TEXT, by_name, checked, many, number, one_of, parse_json, record, shown
from training.folder import saved_config
from training.loop import Checkpoint
from weights import sources

MADE = Path(__file__).parent / "made_at_24701ab"
NESTED = "[" * 100_000


@pytest.mark.parametrize("rule, words, good, bad", [
    (number(int, 1, 9), "a whole number at least 1 and at most 9", [1, 9],
     [0, 10, 1.0, True, "1", None, [1], 10**30]),
    (number(above=0, most=1), "a finite number at most 1 and above 0",
     [1, 0.5, 1e-9], [0, 1.1, float("nan"), float("inf"), -1, "0.5", True]),
    (number(), "a finite number", [0, -1e30], [float("inf"), 10**400, {}]),
    (one_of("a"), '"a"', ["a"], [1]),
    (one_of("a", 1), "one of a, 1", ["a", 1], ["b", 1.0, True, None, ["a"]]),
    (many(TEXT), "a list of values, each a text", [[], ["a"] * 9], [[1]]),
    (many(TEXT, 3, 3), "a list of 3 values, each a text", [["a"] * 3], [["a"] * 2, ["a"] * 4]),
    (many(TEXT, 1, 2), "a list of at most 2 values, each a text", [["a"], ("a", "b")],
     [[], ["a"] * 3, "a", [1]]),
    (by_name(FLAG), "an object of values, each true or false", [{}, {"a": True}], [{"a": 1}, []]),
    (record({"a": TEXT, "b": TEXT.or_else("")}), "an object with a",
     [{"a": ""}, {"a": "", "c": 1}], [{}, {"a": "", "b": 1}]),
    (OBJECT | NULL, "a JSON object or null", [{}, None], [[], 0]),
])  # fmt: skip
def test_a_rule_allows_its_values_alone(rule, words, good, bad):
    assert rule.words == words
    assert [value for value in good if not rule.fits(value)] == []
    assert [value for value in bad if rule.fits(value)] == []


@pytest.mark.parametrize("text, message", {
    '{"a": NaN}': "NaN is no finite number",
    '{"a": [-Infinity]}': "-Infinity is no finite number",
    '{"a": 1e999}': "1e999 is no finite number",
    '{"a": 1, "a": 2}': '"a" stands in it twice',
    '{"a": 1': "cannot be read as JSON",
    NESTED: "more than 32 levels",
    "[" * 33 + "]" * 33: "more than 32 levels",
    "1" * 5000: "cannot be read as JSON",
}.items(), ids=range(8))  # fmt: skip
def test_unsound_json_is_refused(text: str, message: str):
    with pytest.raises(DataError, match=f"^there: .*{message}") as error:
        parse_json(text, "there")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert parse_json("[" * 32 + "]" * 32, "there")


def test_fields_are_required_known_and_within_their_rules():
    fields = {"a": number(int), "b": TEXT.or_else("usual")}
    assert checked({"a": 1, "c": 2}, fields, "there") == {"a": 1, "b": "usual", "c": 2}
    for values, message in (
        ({}, "there: lacks a; add it: a whole number"),
        ({"a": 1, "c": 2}, 'there: "c": no such field'),
        ({"a": "x" * 999}, 'there: a is "xxx.* ...; it must be a whole number'),
    ):
        with pytest.raises(DataError, match=message):
            checked(values, fields, "there", closed=True)
    assert [shown("x" * n) for n in (78, 79)] == [f'"{"x" * 78}"', f'"{"x" * 75} ...']
    assert shown(Path("a")) == '"a"'


# ============================================================================================================
# Weights
# ============================================================================================================


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "mini" / "sd-mini", tmp_path / "sd"))


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG = {
    "unet/config.json": {"in_channels": -1, "block_out_channels": 64, "down_block_types": [1],
                         "attention_head_dim": 0, "cross_attention_dim": "128", "use_linear_projection": 1},
    "vae/config.json": {"layers_per_block": 10**9, "latent_channels": 1e30, "scaling_factor": 0,
                        "norm_num_groups": [8], "_class_name": ["AutoencoderKL"]},
    "text_encoder/config.json": {"hidden_size": 128.5, "num_hidden_layers": 0, "layer_norm_eps": "1e-5",
                                 "hidden_act": 3, "vocab_size": 10**9},
}  # fmt: skip


@pytest.mark.parametrize("file, field", [(file, field) for file in WRONG for field in WRONG[file]])
def test_a_size_that_no_model_has_is_named(file: str, field: str, sd: Path):
    kind = {"unet": "unet", "vae": "vae", "text_encoder": "clip-text"}[file.partition("/")[0]]
    rewrite(sd / file, **{field: WRONG[file][field]})
    with pytest.raises(weights.WeightsError, match=f"{file}: {field} is .*; it must be "):
        weights.config(kind, sd)


@pytest.mark.parametrize("field, within, beyond", [
    ("hidden_size", [1, 2**20], [0, 2**20 + 1]),
    ("num_heads", [1, None, [1], [2**20] * 16], [0, [], [1] * 17]),
    ("block_out_channels", [[1], [1] * 16], [[], [0], [1] * 17]),
    ("depth", [1, 256], [0, 257]),
    ("layers", [1, [256], [1] * 16], [257, [], [0], [1] * 17]),
    ("depths", [[1], [256] * 16], [[], [0], [257], [1] * 17]),
    ("attention_levels", [[], [0, 255] * 8], [[-1], [256], [0] * 17]),
    ("bos_token_id", [0, 2**20], [-1, 2**20 + 1]),
    ("image_size", [1, 2**13, [1, 2**13]], [0, 2**13 + 1, [1], [1] * 3]),
    ("sample_size", [1, 2**13, [1], [1] * 3], [0, [], [1] * 4]),
    ("input_size", [[1, 2**13, 1]], [[1] * 2, [1] * 4]),
    ("window_size", [1, [1], [1, 1], [[1, 1]] * 16], [0, [], [1] * 17]),
    ("layer_norm_eps", [1e-12, 1], [0, 1.1]),
    ("crop_pct", [0.1, 1], [0.099, 1.1]),
    ("mlp_ratio", [1e-3, 2**20], [0, 2**20 + 1]),
    ("mean", [[0], [1] * 16], [[], [-0.1], [1.1], [1] * 17]),
    ("std", [[1e-3], [1] * 16], [[], [0], [1.1], [1] * 17]),
    ("image_mean", [[0], [255] * 16], [[], [-0.1], [256], [1] * 17]),
    ("image_std", [[1e-3], [255] * 16], [[], [0], [256], [1] * 17]),
    ("down_block_types", [["a"], ["a"] * 16], [[], [1], ["a"] * 17]),
    ("resample", [0, 5], [-1, 6]),
])  # fmt: skip
def test_values_are_read_up_to_their_bounds(field: str, within: list, beyond: list, tmp_path: Path):
    path = tmp_path / "config.json"
    for values in ({field: value} for value in within):
        path.write_text(json.dumps(values))
        assert weights.read_config(path) == values
    for value in beyond:
        path.write_text(json.dumps({"vision_config": {field: value}}))
        with pytest.raises(weights.WeightsError, match=f"config.json: {field} is .*; it must be "):
            weights.read_config(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "student.net."])
def test_wrapped_names_are_read(prefix: str, tmp_path: Path, caplog):
    tensors = load_file(ROOT / "mini" / "vit-mini" / "model.safetensors")
    shutil.copy(ROOT / "mini" / "vit-mini" / "config.json", tmp_path)
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    model = weights.load("vit", tmp_path).state_dict()
    assert torch.equal(model["blocks.0.attn.qkv.weight"], tensors["blocks.0.attn.qkv.weight"])
    assert f"begin otherwise than published ones ({prefix}" in caplog.text


def test_wrappers_within_names_are_left_out_and_doubles_refused(tmp_path: Path):
    tensors = load_file(ROOT / "mini" / "vit-mini" / "model.safetensors")
    shutil.copy(ROOT / "mini" / "vit-mini" / "config.json", tmp_path)
    within = {name.replace(".attn.", "._orig_mod.attn."): value for name, value in tensors.items()}
    save_file(within, tmp_path / "model.safetensors")
    assert torch.equal(weights.load("vit", tmp_path).cls_token, tensors["cls_token"])
    save_file(tensors | {"module.cls_token": tensors["cls_token"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(weights.WeightsError, match="several tensors have one name"):
        weights.load("vit", tmp_path)
    two = {f"{whose}.{name}": x.clone() for name, x in tensors.items() for whose in ("student", "teacher")}
    save_file(two, tmp_path / "model.safetensors")  # a beginning that not all share is no wrapper
    with pytest.raises(weights.WeightsError, match="no vit in any dialect known here"):
        weights.load("vit", tmp_path)


def test_a_folder_of_the_hubs_cache_is_its_snapshot(tmp_path: Path):
    for name in ("abc", "def"):
        shutil.copytree(ROOT / "mini" / "vit-mini", tmp_path / "snapshots" / name)
    with pytest.raises(weights.WeightsError, match="snapshots/abc, snapshots/def.*; give one of them"):
        weights.resolve(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("def")
    assert weights.resolve(tmp_path) == tmp_path / "snapshots" / "def"
    (tmp_path / "refs" / "main").write_text("gone")
    shutil.rmtree(tmp_path / "snapshots" / "abc")
    assert weights.resolve(tmp_path) == tmp_path / "snapshots" / "def"


def test_unusual_variants_are_named(sd: Path):
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("bf16", "non_ema"):
        shutil.copy(file, file.with_suffix(f".{name}.safetensors"))
    file.unlink()
    with pytest.raises(weights.WeightsError, match=r"model\.bf16\.safetensors, .*non_ema.*; give or rename"):
        weights.config("unet", sd)
    file.symlink_to(sd / "blobs" / "gone")
    with pytest.raises(weights.WeightsError, match=r"unet: .*: a link to a file that is gone"):
        weights.config("unet", sd)


def test_a_tensor_in_two_shards_is_that_of_the_named_one(tmp_path: Path):
    for k in (1, 2):
        save_file({"a": torch.full((2,), float(k)), f"b{k}": torch.zeros(1)}, tmp_path / f"{k}.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sources.stored_in(tmp_path)["a"].read().tolist() == [1, 1]


def test_whole_numbers_in_place_of_weights_are_refused(sd: Path):
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.bias": torch.ones(64, dtype=torch.int8)}, file)
    with pytest.raises(weights.WeightsError, match="1 of whole numbers, .*: conv_in.bias"):
        weights.load("unet", sd)


def nine_channels(sd: Path) -> None:
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, file)
    rewrite(sd / "unet" / "config.json", in_channels=9)


def small_vocabulary(sd: Path) -> None:
    file = sd / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file(tensors | {name: tensors[name][:1000].contiguous()}, file)
    rewrite(sd / "text_encoder" / "config.json", vocab_size=1000)


@pytest.mark.parametrize("change, message", [
    (nine_channels, "the unet.* cannot be used here: in_channels is 9; it must be 4"),
    (small_vocabulary, "the clip-text cannot be used here: the tokenizer's ids reach 1023, .* 1000 tokens"),
    (lambda sd: rewrite(sd / "unet" / "config.json", cross_attention_dim=64),
     "the unet.* cannot be used here: context_dim is 64; it must be 128"),
])  # fmt: skip
def test_weights_that_cannot_read_what_is_fed_are_refused_first(change, message, sd, tmp_path, cache, capsys):
    change(sd)
    files = set(cache.iterdir())
    assert train.main(["--weights", str(sd), "--captions", "empty", "--image-size", "64", "--out", "r"]) == 2
    assert generate.main(["a cat", "--weights", str(sd), "--out", str(tmp_path / "pictures")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for line in lines:
        assert re.search(message, line)
    assert len(lines) == 2 and set(cache.iterdir()) == files and not (tmp_path / "pictures").exists()
    assert not Path("r").exists()


@pytest.mark.parametrize("field, value", [("pad_token", 5), ("pad_token", ["!"]), ("pad_token", {"id": 1})])
def test_a_padding_that_is_no_text_is_refused(field: str, value, sd: Path):
    rewrite(sd / "tokenizer" / "tokenizer_config.json", **{field: value})
    with pytest.raises(weights.WeightsError, match="tokenizer_config.json: pad_token is "):
        weights.load_tokenizer(sd)


def test_damaged_vocabularies_are_refused(sd: Path):
    vocabulary, merges = sd / "tokenizer" / "vocab.json", sd / "tokenizer" / "merges.txt"
    words, lines = vocabulary.read_text(), merges.read_text().splitlines()
    for content in (lines[:300], lines[:1]):
        merges.write_text("\n".join(content))
        with pytest.raises(weights.WeightsError, match="merges.txt: does not fit vocab.json .no line makes"):
            weights.load_tokenizer(sd)
    for changes, message in (({"!": -1}, "vocab.json: ! is -1"), ({"!": 7}, "two tokens have one id"),
                             ({"!": 2**20 + 1}, "vocab.json: ! is 1048577")):
        vocabulary.write_text(words)
        rewrite(vocabulary, **changes)
        with pytest.raises(weights.WeightsError, match=message):
            weights.load_tokenizer(sd)


def test_a_captioner_whose_vocabulary_was_cut_or_grew_is_refused(tmp_path: Path):
    folder = shutil.copytree(ROOT / "mini" / "blip-mini", tmp_path / "blip")
    words = (folder / "vocab.txt").read_text().splitlines()
    for changed, message in ((words[:-10], r"\[DEC\] is .* in the tokenizer and .* in the model"),
                             ([*words, "anew"], "the tokenizer's ids reach 512, and the model has 512")):
        (folder / "vocab.txt").write_text("\n".join(changed) + "\n")
        for refused in (lambda: weights.load("blip", folder), lambda: weights.require_fed(folder, "blip")):
            with pytest.raises(weights.WeightsError, match=message):
                refused()


def test_no_home_folder_is_one_line(monkeypatch):
    monkeypatch.delenv("REVERSE_SD_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where no user has an entry
    with pytest.raises(weights.WeightsError, match="no such home folder; .* set REVERSE_SD_CACHE"):
        weights.cache_dir()


# ============================================================================================================
# The noise schedule
# ============================================================================================================


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_betas_of_a_folder_are_diffusers(schedule: str, sd: Path):
    stated = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": schedule}
    rewrite(sd / "scheduler" / "scheduler_config.json", **stated)
    assert torch.equal(generate.load_pipeline(str(sd)).alphas, DDIMScheduler(**stated).alphas_cumprod)
    (sd / "scheduler" / "scheduler_config.json").write_text("{}")
    assert torch.equal(generate.load_pipeline(str(sd)).alphas, DDIMScheduler().alphas_cumprod)
    published = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(generate.alphas_of("sd-1"), published.alphas_cumprod)


def test_every_sampler_of_the_process_has_the_betas_that_diffusers_assumes(sd: Path):
    path = sd / "scheduler" / "scheduler_config.json"
    for name in generate.SAMPLERS.keys() - {"DPMSolverSDEScheduler"}:  # it needs torchsde
        path.write_text(json.dumps({"_class_name": name}))
        assert torch.equal(generate.alphas_of(str(sd)), getattr(diffusers, name)().alphas_cumprod), name
        path.write_text(json.dumps({"_class_name": name, "beta_start": 0.001}))
        assert torch.equal(
            generate.alphas_of(str(sd)), getattr(diffusers, name)(beta_start=0.001).alphas_cumprod
        ), name


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "EDMEuler", "IPNDM",
                                  "EDMDPMSolverMultistep", "CogVideoXDDIM", "ScoreSdeVe"])  # fmt: skip
def test_samplers_of_another_process_are_refused(name: str, sd: Path):
    getattr(diffusers, f"{name}Scheduler")().save_pretrained(sd / "scheduler")
    named = f'scheduler_config.json: _class_name is "{name}Scheduler"; it must be one of DDPMScheduler, '
    with pytest.raises(weights.WeightsError, match=named):
        generate.load_pipeline(str(sd))


@pytest.mark.parametrize("field, value", [
    ("beta_schedule", "squaredcos_cap_v2"), ("rescale_betas_zero_snr", True), ("trained_betas", [0.1]),
    ("prediction_type", "sample"), ("num_train_timesteps", 500), ("beta_end", 1), ("beta_start", "0.1"),
    ("beta_start", 0), ("beta_start", 1), ("beta_end", 0), ("use_flow_sigmas", True),
])  # fmt: skip
def test_other_noise_schedules_are_refused(field: str, value, sd: Path):
    rewrite(sd / "scheduler" / "scheduler_config.json", **{field: value})
    with pytest.raises(weights.WeightsError, match=f"scheduler_config.json: {field} is .*; it must be "):
        generate.trained_as(str(sd))


# ============================================================================================================
# Runs
# ============================================================================================================


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE / "finished", tmp_path / "run"))


@pytest.mark.parametrize("field, value", {
    "heads": 7, "backbone": ["unet"], "lr": "0.1", "epochs": -1, "checkpoint_every": 0, "clean": "x",
    "model": [], "words": True, "data": None, "preprocessing": {"size": [64, 64]}, "captions": None,
    "smoothing": -0.1,
}.items())  # fmt: skip
def test_a_runs_configuration_is_read_by_its_rules(field: str, value, run: Path):
    rewrite(run / "config.json", **{field: value})
    for read in (saved_config, reverse_sd.load_run):
        with pytest.raises(DataError, match=rf"run/config.json: {field} is .*; it must be "):
            read(run)


@pytest.mark.parametrize("change", [
    {"rules": "x"}, {"squash": True}, {"std": [0, 1, 1]}, {"mean": [0.5] * 4}, {"std": [1, 1]}, {"size": [8]},
    {"size": [64, 2**13 + 1]}, {"resize": 2**13 + 1}, {"x": 1}], ids=str)  # fmt: skip
def test_a_preprocessing_that_cannot_be_is_refused(change: dict, run: Path):
    usual = json.loads((run / "config.json").read_text())["preprocessing"]
    rewrite(run / "config.json", preprocessing=usual | change)
    with pytest.raises(DataError, match="config.json: preprocessing is .*; it must be a data.Preprocessing"):
        saved_config(run)
    rewrite(run / "config.json", preprocessing=usual | {"resize": [1, 2**13]})
    assert saved_config(run).words == 20


def test_fields_of_a_run_are_neither_missing_nor_unknown_nor_doubled(run: Path):
    saved = json.loads((run / "config.json").read_text())
    for changed, message in (
        ({name: value for name, value in saved.items() if name != "data"}, "lacks data"),
        (saved | {"colour": 1}, '"colour": no such field'),
        (saved | {"phase_1": None}, "under an older name too"),
    ):
        (run / "config.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=f"config.json: .*{message}"):
            saved_config(run)


@pytest.mark.parametrize("content", [[1, 2], None, {"a": 1}], ids=str)
def test_a_vocabulary_is_a_list_of_words(content, run: Path):
    (run / "vocabulary.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="vocabulary.json: is .*; it must be a list of"):
        reverse_sd.load_run(run)


def test_a_vocabulary_is_that_of_its_run(run: Path):
    words = json.loads((run / "vocabulary.json").read_text())
    assert reverse_sd.load_run(run).vocabulary.words == words  # older runs hold no hash
    rewrite(run / "config.json", vocabulary=reverse_sd.Vocabulary(words).fingerprint)
    assert reverse_sd.load_run(run).vocabulary.words == words
    (run / "vocabulary.json").write_text(json.dumps(["zebra", *words[1:]]))
    with pytest.raises(DataError, match="vocabulary.json: not the words that this run was"):
        reverse_sd.load_run(run)


@pytest.mark.parametrize("field, value", [
    ("step", -5), ("step", 5), ("step", 6.5), ("best", "x"), ("best", -1.1), ("best", 1.1), ("total", None),
    ("data", 5), ("tensors", "../model.safetensors"), ("colour", 5),
])  # fmt: skip
def test_a_checkpoints_state_fits_its_tensors(field: str, value, tmp_path: Path):
    last = Path(shutil.copytree(MADE / "stopped" / "last", tmp_path / "last"))
    rewrite(last / "state.json", total=1, best=-1)  # the least
    assert Checkpoint(last).load(train.RegressorTrainer.state_fields)[0]["step"] == 6
    rewrite(last / "state.json", **{field: value})
    with pytest.raises(DataError, match=f'state.json: ("{field}": no such|({field}|tensors) is .*; it must)'):
        Checkpoint(last).load(train.RegressorTrainer.state_fields)


def test_a_caption_that_is_cut_is_mentioned(few_scenes: Path, cache: Path, tmp_path: Path, capsys):
    run = train_here(few_scenes, tmp_path / "run", "--train-blocks", "0", "--captions", "empty")
    predict = reverse_sd.image_predictor(reverse_sd.load_run(run), "cpu")
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    for caption, mentioned in (("a star", False), ("star " * 100, True), ("a star", False)):
        predict([image], [caption])
        assert ("was cut to 75 tokens" in capsys.readouterr().err) == mentioned
    assert np.array_equal(predict([image])[0], predict([image], [""])[0])  # this run's captions are empty
