"""The curriculum, and LeRaC and CBS beside it."""

import json
import math
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_end, entries, losses, train_here

import baselines
import eval
import reverse_sd
import train
import weights
from baselines import control_scores, mixed
from mini import scenes
from reverse_sd import curriculum_batches, thirds
from training.config import TrainConfig, resolve
from training.folder import read_cosines, save_cosines, saved_fields
from training.inputs import prepare
from training.loop import Process, learning_rate


def stop_at(patch: pytest.MonkeyPatch, step: int, phase: str) -> None:
    """Ctrl-C while the step after `step` is under way, in the trainer whose folder is called `phase`."""
    train_step = train.RegressorTrainer.train_step

    def interrupted(self, *args):
        if self.step == step and self.folder.name == phase:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, *args)

    patch.setattr(train.RegressorTrainer, "train_step", interrupted)


def error_line(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run train.py, want exit status 2, and return its one line."""
    assert train.main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def recorded(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run that recorded its cosines."""
    return train_here(few_scenes, tmp_path_factory.mktemp("recorded") / "run", "--record-cosines")


@pytest.fixture(scope="module")
def learned(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both phases, never stopped."""
    return train_here(few_scenes, tmp_path_factory.mktemp("learned") / "run", "--curriculum", "difficulty")


# -- difficulty, chunks, stages ----------------------------------------


def test_difficulty_is_the_mean_cosine_over_the_epochs_or_a_weighted_one():
    cosines = np.array([[0.1, 0.5], [0.3, 0.7], [0.8, 0.3]], np.float32)
    np.testing.assert_allclose(reverse_sd.easiness(cosines), [0.4, 0.5], atol=1e-7)
    np.testing.assert_allclose(reverse_sd.easiness(cosines, [0, 1, 3]), [0.675, 0.4], atol=1e-7)
    for weights_ in ([1, 1], [0, 0, 0], [1, float("nan"), 1]):
        with pytest.raises(ValueError, match="weights"):
            reverse_sd.easiness(cosines, weights_)
    for wrong in (cosines[:0], cosines * np.float32("nan")):
        with pytest.raises(ValueError, match="missing or not finite"):
            reverse_sd.easiness(wrong)


def test_easy_is_a_high_cosine_whichever_way_the_samples_are_split():
    score = np.random.default_rng(0).permutation(np.linspace(-0.2, 0.9, 61))
    for chunks in (reverse_sd.thirds(score), reverse_sd.by_thresholds(score, 0.5, 0.0)):
        easy, medium, hard = chunks
        assert sorted(np.concatenate(chunks)) == list(range(61))
        assert score[easy].min() > score[medium].max() > score[medium].min() > score[hard].max()
    assert [len(chunk) for chunk in reverse_sd.thirds(score)] == [21, 20, 20]
    easy, medium, hard = reverse_sd.by_thresholds(score, 0.5, 0.0)
    assert (score[easy] >= 0.5).all() and (score[hard] < 0).all()
    at_the_bounds = reverse_sd.by_thresholds(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), 0.3, 0.2)
    assert [chunk.tolist() for chunk in at_the_bounds] == [[2, 3, 4], [1], [0]]
    assert [chunk.tolist() for chunk in reverse_sd.thirds(np.ones(7))] == [[0, 1, 2], [3, 4], [5, 6]]


def test_thresholds_leave_a_significant_portion_easy_and_a_small_subset_hard():
    score = np.random.default_rng(1).beta(5, 2, 1000)
    easy, hard = reverse_sd.easiness_thresholds(score)
    assert [len(chunk) for chunk in reverse_sd.by_thresholds(score, easy, hard)] == [500, 400, 100]
    easy, hard = reverse_sd.easiness_thresholds(score, 0.7, 0.05)
    assert [len(chunk) for chunk in reverse_sd.by_thresholds(score, easy, hard)] == [700, 250, 50]


def test_each_stage_holds_its_chunks_alone_and_all_of_them():
    chunks = [np.array([8, 3, 5, 0, 9]), np.array([1, 7]), np.array([2, 4, 6])]
    total, size = 31, 4
    stages = reverse_sd.curriculum_stages(chunks, total)
    assert [(first, end) for first, end, _ in stages] == [(0, 10), (10, 20), (20, 31)]
    batches = reverse_sd.curriculum_batches(chunks, total, size, 0, 0, total)
    assert len(batches) == total
    for k, (first, end, pool) in enumerate(stages):
        assert sorted(pool) == sorted(np.concatenate(chunks[: k + 1]))
        steps = math.ceil(len(pool) / size)
        passes = [np.concatenate(batches[s : s + steps]) for s in range(first, end - steps + 1, steps)]
        assert all(sorted(order) == sorted(pool) for order in passes)
        assert any((a != b).any() for a, b in pairwise(passes))
        assert set(np.concatenate(batches[first:end])) == set(pool)


def test_batches_depend_on_seed_and_step_alone():
    chunks = reverse_sd.thirds(np.random.default_rng(0).random(50))
    whole = reverse_sd.curriculum_batches(chunks, 40, 8, 0, 0, 40)
    for start, stop in ((0, 7), (7, 15), (12, 29), (39, 40)):
        part = reverse_sd.curriculum_batches(chunks, 40, 8, 0, start, stop)
        assert [list(batch) for batch in part] == [list(batch) for batch in whole[start:stop]]
    other = reverse_sd.curriculum_batches(chunks, 40, 8, 1, 0, 40)
    assert any(list(a) != list(b) for a, b in zip(whole, other, strict=True))


def test_a_chunk_may_be_empty():
    chunks = [np.arange(6), np.arange(0), np.arange(6, 7)]
    assert len(reverse_sd.curriculum_batches(chunks, 9, 4, 0, 0, 9)) == 9


# -- recording ----------------------------------------


def test_a_run_records_the_cosine_of_every_training_sample(recorded: Path, few_scenes: Path):
    cosines, score = np.load(recorded / "cosines.npy"), np.load(recorded / "easiness.npy")
    assert cosines.shape == (2, 60)
    np.testing.assert_allclose(score, cosines.mean(axis=0), atol=1e-6)
    # The last epoch was the best, so its cosines are those of the saved weights, in the order of rows.json.
    validated = [e["val_cosine"] for e in entries(recorded) if "val_cosine" in e]
    assert max(validated) == validated[-1]
    predicted, target = (np.load(recorded / "predictions" / f"train{end}.npy") for end in ("", "-targets"))
    np.testing.assert_allclose(cosines[-1], (predicted * target).sum(1), atol=1e-5)


def test_recording_changes_nothing_else(recorded: Path, few_scenes: Path, tmp_path: Path):
    plain = train_here(few_scenes, tmp_path / "plain")
    assert losses(plain) == losses(recorded)
    assert not (plain / "cosines.npy").exists()


def test_undrawn_words_of_mini_scenes_are_at_hand(recorded: Path):
    config = TrainConfig(**saved_fields(recorded))
    prepared = prepare(config)
    assert all(isinstance(meta["undrawn"], list) for meta in prepared.pairs.meta)


# -- both phases ----------------------------------------


def test_phase_1_is_the_plain_run(learned: Path, recorded: Path):
    assert_same_end(learned / "phase-1", recorded)
    assert saved_fields(learned / "phase-1") == saved_fields(recorded)
    for name in ("cosines.npy", "easiness.npy"):
        np.testing.assert_array_equal(np.load(learned / name), np.load(recorded / name))


def test_phase_2_takes_the_steps_rates_and_validations_of_the_plain_run(learned: Path, recorded: Path):
    for key in ("loss", "val_cosine"):
        assert [e["step"] for e in entries(learned) if key in e] == [
            e["step"] for e in entries(recorded) if key in e
        ]
    rates = [[e["lr"] for e in entries(run) if "lr" in e] for run in (learned, recorded)]
    assert rates[0] == rates[1]
    assert losses(learned) != losses(recorded)


def test_phase_2_sees_easy_samples_first_and_from_a_reset_model(
    recorded: Path, few_scenes: Path, tmp_path: Path, monkeypatch
):
    seen, starts = [], []
    on_device, fit = train.RegressorTrainer.on_device, train.RegressorTrainer.fit

    def watching(self, batch, size):
        seen.append(batch[-1].tolist())
        return on_device(self, batch, size)

    def starting(self):
        starts.append({name: value.clone() for name, value in self.model.state_dict().items()})
        assert not self.optimizer.state
        fit(self)

    monkeypatch.setattr(train.RegressorTrainer, "on_device", watching)
    monkeypatch.setattr(train.RegressorTrainer, "fit", starting)
    run = train_here(few_scenes, tmp_path / "run", "--curriculum", "difficulty", "--chunks", "thresholds")
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    prepared = prepare(TrainConfig(**saved_fields(run)))
    score = dict(zip(prepared.splits["train"].tolist(), np.load(run / "easiness.npy"), strict=True))
    said = json.loads((run / "curriculum.json").read_text())
    easy, hard = said["thresholds"]
    assert [stage["samples"] for stage in said["stages"]] == [30, 54, 60]
    assert [(stage["first_step"], stage["last_step"]) for stage in said["stages"]] == [(0, 2), (3, 5), (6, 9)]
    assert len(seen) == 20
    lowest = [min(score[row] for row in rows) for rows in seen[10:]]
    assert min(lowest[:3]) >= easy > min(lowest[3:6]) >= hard > min(lowest[6:])


def test_a_recorded_run_takes_the_place_of_phase_1(
    learned: Path, recorded: Path, few_scenes: Path, tmp_path: Path, monkeypatch
):
    phase = Path(shutil.copytree(recorded, tmp_path / "phase"))
    run = tmp_path / "run"
    flags = ["--curriculum", "difficulty", "--phase-1", str(phase)]
    with monkeypatch.context() as patch:
        stop_at(patch, 4, "run")
        assert train.main(["--data", str(few_scenes), "--out", str(run), *SMALL, *flags]) == 130
    shutil.rmtree(phase)  # what it recorded was kept
    assert train.main(["--resume", str(run)]) == 0
    assert not (run / "phase-1").exists()
    assert_same_end(run, learned)


@pytest.mark.parametrize("step, phase", [(7, "phase-1"), (9, "phase-1"), (7, "run")])
def test_ctrl_c_in_either_phase_and_resume_end_bit_for_bit_alike(
    learned: Path, few_scenes: Path, tmp_path: Path, monkeypatch, caplog, step: int, phase: str
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, phase)
        flags = ["--data", str(few_scenes), "--out", str(run), *SMALL, "--curriculum", "difficulty"]
        assert train.main(flags) == 130
    assert f"--resume {run}\n" in caplog.text
    assert train.main(["--resume", str(run)]) == 0
    assert_same_end(run / "phase-1", learned / "phase-1")
    assert_same_end(run, learned)
    for name in ("cosines.npy", "phase-1/cosines.npy", "curriculum.json"):
        assert (run / name).read_bytes() == (learned / name).read_bytes()


def test_weights_of_the_epochs_reach_the_difficulty(recorded: Path, few_scenes: Path, tmp_path: Path):
    flags = ["--curriculum", "difficulty", "--phase-1", str(recorded), "--epoch-weights", "0,1"]
    run = train_here(few_scenes, tmp_path / "run", *flags, "--train-blocks", "0")
    last = np.load(recorded / "cosines.npy")[1]
    np.testing.assert_allclose(np.load(run / "easiness.npy"), last, atol=1e-7)


def test_shares_reach_the_stages_and_phase_2_records_nothing(few_scenes: Path, cache: Path, tmp_path: Path):
    flags = ["--curriculum", "difficulty", "--record-cosines", "--train-blocks", "0", "--batch-size", "13"]
    flags += ["--chunks", "thresholds", "--easy-share", "0.7", "--hard-share", "0.2"]
    run = train_here(few_scenes, tmp_path / "run", *flags)
    for name in ("cosines.npy", "easiness.npy"):
        np.testing.assert_array_equal(np.load(run / name), np.load(run / "phase-1" / name))
    stages = json.loads((run / "curriculum.json").read_text())["stages"]
    assert [stage["samples"] for stage in stages] == [42, 48, 60]
    assert stages[-1]["last_step"] + 1 == len(losses(run)) == 10  # 60 is no multiple of 13


# -- bad input ----------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--phase-1", "nowhere"], "--phase-1: only --curriculum difficulty uses it; leave it out"),
        (["--chunks", "thresholds"], "--chunks: only --curriculum difficulty uses it"),
        (["--order", "mixed"], "--order: only --curriculum difficulty"),
        (["--epoch-weights", "0,1"], "--epoch-weights: only --curriculum difficulty"),
        (["--curriculum", "difficulty", "--easy-share", "0.3"], "--easy-share: only --chunks thresholds"),
        (["--curriculum", "difficulty", "--hard-share", "0.3"], "--hard-share: only --chunks thresholds"),
        (["--curriculum", "cbs", "--lerac-min-lr", "1e-5"], "--lerac-min-lr: only --curriculum lerac"),
        (["--lerac-epochs", "0.5"], "--lerac-epochs: only --curriculum lerac"),
        (["--curriculum", "lerac", "--cbs-every", "2"], "--cbs-every: only --curriculum cbs"),
        (["--heads", "0", "--mlc-weight", "0.5"], "--mlc-weight: only --heads 1, 2, 3 uses it"),
        (["--heads", "0", "--words", "5"], "--words: only --heads 1, 2, 3 uses it"),
        (["--backbone", "vit", "--captions", "empty"], "--captions: only --backbone unet uses it"),
        (["--curriculum", "difficulty", "--phase-1", "nowhere"], "nowhere: has no recorded cosines"),
        (["--curriculum", "difficulty", "--epoch-weights", "1,1,1"], "3 weights for 2 epochs"),
        (["--curriculum", "difficulty", "--epoch-weights", "1,x"], "must be numbers"),
        (["--curriculum", "difficulty", "--chunks", "thresholds", "--easy-share", "0.95"], "are at most 1"),
        (["--curriculum", "cbs", "--train-blocks", "0"], "leave out --train-blocks 0"),
        (["--curriculum", "lerac", "--layer-decay", "0.5"], "--layer-decay"),
        (["--curriculum", "lerac", "--lerac-min-lr", "1"], "--lerac-min-lr"),
        (["--curriculum", "lerac", "--lerac-epochs", "3"], "--lerac-epochs"),
        (["--curriculum", "cbs", "--cbs-every", "0"], "--cbs-every"),
    ],
)
def test_flags_that_make_no_sense(capsys, flags: list[str], said: str):
    assert said in error_line(capsys, *flags, *SMALL)


def test_difficulty_of_other_pairs_or_another_split_is_refused(
    recorded: Path, few_scenes: Path, tmp_path: Path, capsys
):
    scenes.build(tmp_path / "others", parts=1, per_part=84, seed=5, progress=False)
    flags = ["--curriculum", "difficulty", "--phase-1", str(recorded), *SMALL]
    flags += ["--out", str(tmp_path / "run")]
    assert "other pairs" in error_line(capsys, "--data", str(tmp_path / "others"), *flags)
    assert "another split" in error_line(capsys, "--data", str(few_scenes), "--seed", "1", *flags)
    flags += ["--epoch-weights", "1,1,1"]
    assert "3 weights for 2 epochs" in error_line(capsys, "--data", str(few_scenes), *flags)
    assert not (tmp_path / "run").exists()


def test_cosines_of_one_epoch_are_read(tmp_path: Path):
    cosines = np.array([[0.5, 0.25, 0.75]], np.float32)
    save_cosines(tmp_path, cosines, cosines[0], data="of these pairs")
    prepared = SimpleNamespace(fingerprint="of these pairs", splits={"train": np.arange(3)})
    assert np.array_equal(read_cosines(tmp_path, prepared), cosines)


# -- LeRaC ----------------------------------------


def test_lerac_by_hand():
    # From 1e-4 to 1e-2 in the logarithm: halfway 1e-3.
    rates = [baselines.lerac_rate(1e-4, 1e-2, t, 10) for t in (0, 5, 10, 12)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-2])
    assert baselines.lerac_rate(1e-4, 1e-2, 3, 10, c=2) == pytest.approx(10**-3.4)
    assert baselines.lerac_initial(1e-2, 1e-8, 4) == pytest.approx([1e-2, 1e-4, 1e-6, 1e-8])
    assert baselines.lerac_initial(1e-2, 1e-8, 1) == [1e-2]


def test_lerac_rates_fall_from_input_to_output_and_meet(
    few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch
):
    seen = []
    train_step = train.RegressorTrainer.train_step

    def watching(self, *args):
        terms = train_step(self, *args)
        rates = {}
        of = dict(zip((p for g in self.optimizer.param_groups for p in g["params"]), self.names, strict=True))
        for group in self.optimizer.param_groups:
            rates |= {of[parameter]: group["lr"] for parameter in group["params"]}
        seen.append([rates[f"backbone.{name}"] for name in ("pos_embed", "blocks.0.norm1.bias", "norm.bias")])
        return terms

    run, flags = tmp_path / "run", ["--backbone", "vit", "--curriculum", "lerac", "--lr", "1e-3"]
    with monkeypatch.context() as patch:
        patch.setattr(train.RegressorTrainer, "train_step", watching)
        train_here(few_scenes, run, *flags)
    config = TrainConfig(**saved_fields(run))
    meet = learning_rate(config.lr, 5, 10)
    assert seen[0] == pytest.approx([1e-3, 1e-3 * 1e-5 ** (1 / 7), 1e-8])
    assert seen[2][2] == pytest.approx(1e-8**0.6 * meet**0.4)
    assert seen[2][0] == pytest.approx(1e-3**0.6 * meet**0.4)
    for step in range(5, 10):
        assert seen[step] == [learning_rate(config.lr, step, 10)] * 3


# -- CBS ----------------------------------------


def test_cbs_kernel_and_its_decay():
    kernel = baselines.gaussian(1.0)
    assert kernel.shape == (3, 3) and float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    assert float(kernel[0, 1] / kernel[1, 1]) == pytest.approx(math.exp(-0.5))
    assert float(kernel[0, 0] / kernel[1, 1]) == pytest.approx(math.exp(-1))
    assert [baselines.cbs_sigma(t, 5) for t in (0, 4, 5, 9, 10)] == pytest.approx([1, 1, 0.9, 0.9, 0.81])
    last = baselines.gaussian(baselines.cbs_sigma(999, 1000 / 20))
    assert float(last[1, 1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "kind, source, first, count",
    [
        ("vit", "vit-mini", "patch_embed.proj", 1),
        ("clip-vision", "clip-mini", "vision_model.embeddings.patch_embedding", 1),
        ("swin", "swin-mini", "patch_embed.proj", 1 + 2),
        ("unet-encoder", "sd-mini", "input_blocks.0.0", 1 + 5 * 2 + 2),  # 5 ResBlocks, halved twice
    ],
)
@torch.no_grad()
def test_cbs_smooths_after_each_convolution(kind: str, source: str, first: str, count: int):
    model = weights.load(kind, source)
    before = list(model.state_dict())
    places = baselines.smoothed_layers(model)
    assert next(iter(places)) == first and len(places) == count, list(places)
    smoothing = baselines.Smoothing(model, 1.0)
    assert list(model.state_dict()) == before
    layer = places[first]
    x = torch.randn(2, layer.in_channels, 64, 64)
    sharp, smooth = layer.forward(x), layer(x)  # forward alone skips the hook
    kernel = baselines.gaussian(1.0)
    expected = (sharp[0, 1, 0:3, 1:4] * kernel).sum()
    assert float(smooth[0, 1, 1, 2]) == pytest.approx(float(expected), abs=1e-5)
    smoothing.sigma = 0.05
    torch.testing.assert_close(layer(x), sharp)


@torch.no_grad()
def test_cbs_smooths_swins_merging_over_the_grid():
    model = weights.load("swin", "swin-mini")
    baselines.Smoothing(model, 1.0)
    reduction = model.layers[1].downsample.reduction
    x = torch.randn(1, 4, 4, reduction.in_features)
    sharp, smooth = reduction.forward(x), reduction(x)
    expected = (sharp[0, 0:3, 1:4, 5] * baselines.gaussian(1.0)).sum()
    assert float(smooth[0, 1, 2, 5]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("every, steps", [(None, 0.5), (0.4, 2)])
def test_cbs_is_set_in_epochs_or_as_a_twentieth_of_the_run(
    every: float | None, steps: float, few_scenes: Path, cache: Path, tmp_path: Path
):
    trainer = trainer_of(few_scenes, tmp_path, curriculum="cbs", cbs_every=every)
    for trainer.step in range(11):
        assert trainer.rate() == pytest.approx(1e-3 * (1 + math.cos(math.pi * trainer.step / 10)) / 2)
        assert trainer.smoothing.sigma == pytest.approx(0.9 ** (trainer.step // steps))


@pytest.mark.parametrize("epochs, meet", [(1.0, 5), (0.5, 2), (0.01, 1)])
def test_lerac_s_rates_meet_after_its_epochs(
    epochs: float, meet: int, few_scenes: Path, cache: Path, tmp_path: Path
):
    trainer = trainer_of(few_scenes, tmp_path, curriculum="lerac", lerac_epochs=epochs, lerac_min_lr=1e-7)
    lowest = min(trainer.optimizer.param_groups, key=lambda group: group["scale"])
    common = [1e-3 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    for trainer.step in range(10):
        t = trainer.step / meet
        expected = 1e-7 ** (1 - t) * common[meet] ** t if t < 1 else common[trainer.step]
        assert trainer.group_rate(trainer.rate(), lowest) == pytest.approx(expected)


def test_with_a_rate_of_the_heads_lerac_falls_over_the_blocks_alone(
    few_scenes: Path, cache: Path, tmp_path: Path
):
    fields = {"curriculum": "lerac", "lerac_epochs": 0.5, "lerac_min_lr": 1e-5, "head_lr": 2e-4}
    few = trainer_of(few_scenes, tmp_path, train_blocks=2, **fields)  # the second block, the heads, the first
    assert sorted({group["scale"] for group in few.optimizer.param_groups}) == pytest.approx([0.01, 0.2, 1])
    trainer = trainer_of(few_scenes, tmp_path, **fields)
    groups = trainer.optimizer.param_groups
    rates = dict(zip(trainer.names, (g for g in groups for _ in g["params"]), strict=True))
    last = max(int(name.split(".")[2]) for name in trainer.names if name.startswith("backbone.blocks."))
    expected = {f"blocks.{last}.norm1.bias": 1e-5, "norm.bias": 1e-3}
    for name, rate in expected.items():
        assert trainer.group_rate(1e-3, rates[f"backbone.{name}"]) == pytest.approx(rate)
    assert trainer.group_rate(1e-3, rates["heads.embedding.bias"]) == pytest.approx(2e-4)
    trainer.step = 5
    assert trainer.group_rate(5e-4, rates["heads.embedding.bias"]) == pytest.approx(1e-4)
    assert [trainer.group_rate(5e-4, rates[f"backbone.{name}"]) for name in expected] == [5e-4] * 2


def trainer_of(few_scenes: Path, folder: Path, **fields: object) -> train.RegressorTrainer:
    """A ViT's trainer for ten steps, five an epoch."""
    sizes = {"val_size": 12, "test_size": 12, "epochs": 2, "batch_size": 12, "lr": 1e-3, "device": "cpu"}
    config = resolve(TrainConfig(data=str(few_scenes), backbone="vit", **sizes, **fields))
    prepared = prepare(config)
    return train.RegressorTrainer(config, folder, Process(), prepared, reverse_sd.Vocabulary(["red"]))


def test_cbs_needs_a_convolution():
    with pytest.raises(ValueError, match="no convolution"):
        baselines.Smoothing(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("curriculum", ["lerac", "cbs"])
def test_the_others_resume_exactly_and_are_evaluated_as_validated(
    curriculum: str, few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch, capsys
):
    # sigma 0.9**3 and 0.9**6 at the ends of the epochs: far from none, so a lost one would be seen
    flags = ["--backbone", "swin", "--curriculum", curriculum]
    flags += ["--cbs-every", "0.3"] if curriculum == "cbs" else []
    whole = train_here(few_scenes, tmp_path / "whole", *flags)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, 6, "stopped")
        assert train.main(["--data", str(few_scenes), "--out", str(stopped), *SMALL, *flags]) == 130
    assert train.main(["--resume", str(stopped)]) == 0
    assert_same_end(stopped, whole)
    config = json.loads((whole / "config.json").read_text())
    assert ("smoothing" in config) == (curriculum == "cbs")
    (whole / "result.json").unlink()
    assert eval.main([str(whole)]) == 0
    result = json.loads((whole / "result.json").read_text())
    best = max(e["val_cosine"] for e in entries(whole) if "val_cosine" in e)
    assert result["val_cosine"] == pytest.approx(best, abs=1e-5)
    if curriculum == "cbs":
        smooth = reverse_sd.load_run(whole).regressor
        config.pop("smoothing")
        (whole / "config.json").write_text(json.dumps(config))
        sharp = reverse_sd.load_run(whole).regressor
        image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(smooth(image).embedding, sharp(image).embedding, atol=1e-3)


# -- controls ----------------------------------------


def test_scores_of_the_controls():
    easiness = np.array([0.1, 0.5, 0.3, 0.9])
    assert control_scores(easiness, "easy-first", 0) is easiness
    assert control_scores(easiness, "hard-first", 0).tolist() == [-0.1, -0.5, -0.3, -0.9]
    shuffled = control_scores(easiness, "shuffled", 3)
    assert sorted(shuffled) == sorted(easiness) and shuffled.tolist() != easiness.tolist()
    assert control_scores(easiness, "shuffled", 3).tolist() == shuffled.tolist()


def test_mixed_shows_each_sample_as_often_as_the_papers_stages():
    """Counted over the batches of 18 x 6 steps of 5 samples on 15 samples."""
    chunks = thirds(np.linspace(1, 0, 15))
    total = 108

    def visits(chunks: list[np.ndarray]) -> np.ndarray:
        batches = curriculum_batches(chunks, total, 5, 0, 0, total)
        return np.bincount(np.concatenate(batches), minlength=15)

    paper, mixture = visits(chunks), visits([mixed(chunks)])
    assert paper.tolist() == [66] * 5 + [30] * 5 + [12] * 5
    assert mixture.tolist() == paper.tolist()
    alone = curriculum_batches([mixed(chunks)], total, 5, 0, 0, 18)
    assert len(set(np.concatenate(alone[:3]).tolist())) > 5  # not the easy ones first


@pytest.mark.parametrize(
    "order, pools",
    [("hard-first", [{0, 1}, {0, 1, 2, 3}]), ("shuffled", [{2, 3}, {0, 1, 2, 3}]), ("mixed", [])],
)
def test_chunks_of_each_control(order: str, pools: list[set[int]], tmp_path: Path):
    """Six samples, the last the easiest; `pools` are those of the first two stages."""
    config = resolve(TrainConfig(curriculum="difficulty", order=order, epochs=18, batch_size=2))
    prepared = SimpleNamespace(fingerprint="of these pairs")
    chunks = train.chunks_of(config, tmp_path, Process(), np.arange(6.0)[None] / 10, prepared)
    stages = reverse_sd.curriculum_stages(chunks, 54)
    assert [set(pool.tolist()) for _, _, pool in stages[:-1]] == pools
    assert set(stages[-1][2].tolist()) == set(range(6))
    about = json.loads((tmp_path / "curriculum.json").read_text())
    assert about["order"] == order and len(about["stages"]) == len(stages)


def test_a_run_of_a_control(few_scenes: Path, cache: Path, tmp_path: Path):
    run = train_here(few_scenes, tmp_path / "run", "--curriculum", "difficulty", "--order", "mixed")
    about = json.loads((run / "curriculum.json").read_text())
    assert [stage["samples"] for stage in about["stages"]] == [360]
