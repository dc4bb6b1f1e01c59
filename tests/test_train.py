"""Training end to end on a few mini scenes: results, resuming, processes, faults."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, SMALL, assert_same_end, entries, environment, losses, train_here
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score

import data
import eval
import reverse_sd
import train
import weights
from clipscore import Scorer
from files import exclusive, write_json
from mini import scenes
from models import blip
from schema import read_json
from training import loop
from training.calibration import require_calibration
from training.config import EMBEDDED, RESUMABLE, TrainConfig, parse_args, resolve
from training.folder import WRITTEN, new_folder, saved_config
from training.inputs import cleaned, pairs_folder, prepare
from training.loop import Checkpoint, epoch_batches, learning_rate, save_tensors
from training.metrics import average_precision, bootstrap_interval
from training.reading import Captioner
from words import is_content_word, words


@pytest.fixture(scope="module")
def trained(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(few_scenes, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def uninterrupted(trained: Path, tmp_path: Path) -> Path:
    """A run that was never stopped, to be compared with or spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "uninterrupted"))


# -- a run's results ----------------------------------------


def test_a_run_holds_all_that_the_readme_names(uninterrupted: Path):
    result = json.loads((uninterrupted / "result.json").read_text())
    assert {"test_cosine", "mean_embedding_cosine", "n_test", "seconds", "seed"} <= result.keys()
    assert result["n_train"] == 60 and result["n_test"] == 12
    low, high = result["test_cosine_95"]
    assert low < result["test_cosine"] < high
    targets = np.load(uninterrupted / "predictions" / "test-targets.npy")
    predicted = np.load(uninterrupted / "predictions" / "test.npy")
    np.testing.assert_allclose(np.linalg.norm(predicted, axis=1), 1, rtol=1e-5)
    assert result["test_cosine"] == pytest.approx(float((predicted * targets).sum(1).mean()), abs=1e-6)
    mean = np.load(uninterrupted / "predictions" / "train-targets.npy").mean(axis=0)
    assert result["mean_embedding_cosine"] == pytest.approx(
        float((targets @ mean / np.linalg.norm(mean)).mean()), abs=1e-6
    )
    assert (uninterrupted / "examples.png").stat().st_size > 10_000
    entries = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 11))
    assert [e["step"] for e in entries if "val_cosine" in e] == [5, 10]
    assert result["val_cosine"] == pytest.approx(
        max(e["val_cosine"] for e in entries if "val_cosine" in e), abs=1e-5
    )


def test_eval_alone_gives_the_same_result(uninterrupted: Path, capsys: pytest.CaptureFixture):
    before = json.loads((uninterrupted / "result.json").read_text())
    (uninterrupted / "result.json").unlink()
    assert eval.main([str(uninterrupted)]) == 0
    after = json.loads((uninterrupted / "result.json").read_text())
    assert before | {"seconds": 0} == after | {"seconds": 0}
    assert f"{after['test_cosine']:.4f}" in capsys.readouterr().out


def test_reverse_sd_reads_an_image(uninterrupted: Path, few_scenes: Path, tmp_path: Path, capsys):
    pairs = data.read_pairs(few_scenes)
    pairs.image(0).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    images = [str(tmp_path / "broken.png"), str(tmp_path / "mine.png")]
    status = reverse_sd.main([*images, "--run", str(uninterrupted), "--prompt", pairs.prompts[0], "-n", "3"])
    printed = capsys.readouterr()
    assert status == 2 and "broken.png" in printed.err and len(printed.err.strip().splitlines()) == 1
    lines = printed.out.splitlines()
    caption = Captioner("blip-mini", "cpu").captions([pairs.image(0)])[0]
    score = Scorer("clip-mini").scores([pairs.image(0)] * 2, [caption, pairs.prompts[0]])
    scores = [f"{value:.3f}" for value in score["CLIPScore"]]
    assert lines.pop(1) == f"  prompt  {caption}"
    assert lines.pop(6) == f"  CLIPScore of the text above, by clip-mini: {scores[0]}"
    assert lines.pop(7) == f"  CLIPScore of the given prompt: {scores[1]}"
    train_prompts = {
        row["prompt"] for row in json.loads((uninterrupted / "predictions/rows.json").read_text())["train"]
    }
    assert {line.split(maxsplit=1)[1] for line in lines[1:4]} <= train_prompts
    predictor = reverse_sd.image_predictor(reverse_sd.load_run(uninterrupted), "cpu")
    embedding = predictor([pairs.image(0)])[0][0]
    vocabulary = reverse_sd.load_run(uninterrupted).vocabulary
    calibration = require_calibration(uninterrupted, len(vocabulary))
    likely = vocabulary.likely(calibration.in_prompt(embedding), 10)
    cosine = float(weights.load("minilm").encode(pairs.prompts[:1])[0].numpy() @ embedding)
    val, val_targets = (np.load(uninterrupted / f"predictions/val{end}.npy") for end in ("", "-targets"))
    below = np.mean((val * val_targets).sum(axis=1) < cosine)
    assert lines[4] == f"  words  {likely}"
    assert re.fullmatch(r"  expected cosine with its prompt: (0\.\d\d|1\.00)", lines[5])
    start, rank = lines[6].split(", above ")
    assert start == f"  cosine with the given prompt: {cosine:.3f}"
    assert abs(float(rank.split("%")[0]) / 100 - below) <= 1 / 11  # of 12 pairs, interpolated
    assert rank.endswith("% of the validation pairs")
    judged = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[7:]}
    assert list(judged) == [w for w in dict.fromkeys(words(pairs.prompts[0])) if is_content_word(w)]
    known = json.loads((uninterrupted / "vocabulary.json").read_text())
    for word, judgement in judged.items():
        pattern = r"\d+%( #+)?" if word in known else "not judged: not in this run's vocabulary"
        assert re.fullmatch(pattern, judgement)


@pytest.mark.parametrize(
    "prompt, mentioned",
    [
        (" ", "must not be empty"),
        ("8 9, zzyzx", "none of its words is among the"),
        ("star " * 300, "the sentence encoder reads at most 256; shorten it"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused_in_one_line(prompt, mentioned, uninterrupted, capsys):
    known = json.loads((uninterrupted / "vocabulary.json").read_text())
    prompt = prompt.replace("star", known[0])
    try:
        status = reverse_sd.main(["no.png", "--run", str(uninterrupted), "--prompt", prompt])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and mentioned in printed.err.splitlines()[-1] and not printed.out


def test_a_run_without_a_calibration_gives_the_cosine_and_the_command(
    uninterrupted: Path, few_scenes: Path, tmp_path: Path, capsys
):
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "calibration.json").unlink()
    pairs = data.read_pairs(few_scenes)
    pairs.image(0).save(tmp_path / "mine.png")
    command = [str(tmp_path / "mine.png"), "--run", str(run), "--prompt", pairs.prompts[0], "-n", "1"]
    assert reverse_sd.main(command) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"  cosine with the given prompt: -?0\.\d{3}", printed.out.splitlines()[-2])
    assert f"for a score of each word, evaluate this run again: python eval.py {run}" in printed.err


def test_the_newest_run_reads_an_image_and_its_caption(
    uninterrupted: Path, few_scenes: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, age in (("a", 0), ("b", 60)):
        copy = Path(shutil.copytree(uninterrupted, tmp_path / "runs" / name))
        rows = json.loads((copy / "predictions" / "rows.json").read_text())
        for row in rows["train"]:
            row["prompt"] += f" in run {name}"
        (copy / "predictions" / "rows.json").write_text(json.dumps(rows))
        os.utime(copy / "result.json", (time.time() - age,) * 2)
    image = data.read_pairs(few_scenes).image(0)
    image.save("mine.png")
    predictor = reverse_sd.image_predictor(reverse_sd.load_run(uninterrupted), "cpu")
    targets = np.load(uninterrupted / "predictions" / "train-targets.npy")

    def expected(captions: list[str] | None) -> list[str]:
        nearest = reverse_sd.nearest(predictor([image], captions)[0][0], targets, 5)
        return [f"{cosine:.3f}  {rows['train'][i]['prompt'][:-1]}a" for i, cosine in nearest]

    caption = "a gold dragon in a storm"
    for flags, captions in (([], None), (["--caption", caption], [caption])):
        assert reverse_sd.main(["mine.png", *flags]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.strip() for line in printed[2:7]] == expected(captions)
    assert expected([caption]) != expected(None)


def test_reading_an_image_without_any_run_says_to_train_one(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reverse_sd.main(["image.png"]) == 2
    assert "python train.py" in capsys.readouterr().err


def test_an_image_read_alone_is_predicted_as_in_the_evaluation(uninterrupted: Path, few_scenes: Path):
    rows = json.loads((uninterrupted / "predictions" / "rows.json").read_text())["test"]
    pairs = data.read_pairs(few_scenes)
    i = pairs.prompts.index(rows[0]["prompt"])
    run = reverse_sd.load_run(uninterrupted)
    embedding, _ = reverse_sd.image_predictor(run, "cpu")([pairs.image(i)])
    evaluated = np.load(uninterrupted / "predictions" / "test.npy")[0]
    assert float(embedding[0] @ evaluated) > 0.9999  # the cached latents are half precision


def test_training_learns(few_scenes: Path, cache: Path, tmp_path: Path):
    run = train_here(few_scenes, tmp_path / "run", "--epochs", "8")
    assert np.mean(losses(run)[-3:]) < 0.75 * losses(run)[0]


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adamw --weight-decay 20 --clip-norm 0 --seed 3 --words 20 --lr 0.002",
        "--optimizer adam --weight-decay 0.1 --clip-norm 0.01 --seed 1 --lr 0.01 --mlc-weight 0.7",
    ],
)
def test_a_run_is_that_of_a_plain_loop(
    flags: str, few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch
):
    """Heads on frozen features, trained here by torch alone: losses, log and result."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=count(0, 2).__next__))  # 2 s a step
    monkeypatch.setattr(train, "time", SimpleNamespace(time=count(0, 1000).__next__))
    frozen = ["--train-blocks", "0", "--val-size", "13", "--precision", "float32"]
    frozen += ["--head-start", "random", "--head-lr", flags.split("--lr ")[1].split()[0]]
    run = train_here(few_scenes, tmp_path / "run", *frozen, *flags.split())
    config = saved_config(run)
    prepared = prepare(config)
    vocabulary = reverse_sd.Vocabulary(json.loads((run / "vocabulary.json").read_text()))
    assert len(vocabulary) == config.words if "--words" in flags else 20 < len(vocabulary) < config.words

    def read(split: str) -> tuple[torch.Tensor, ...]:
        rows = prepared.splits[split]
        words = vocabulary.targets([prepared.pairs.prompts[i] for i in rows])
        return torch.from_numpy(prepared.inputs[0][rows]), torch.from_numpy(prepared.targets[rows]), words

    x, y, t = read("train")
    torch.manual_seed(config.seed)
    heads = reverse_sd.Heads(x.shape[1], len(vocabulary), 3)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(heads.parameters(), weight_decay=config.weight_decay)
    expected, rates = [], config.lr * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    for epoch in (0, 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(59)
        for batch in (order[start : start + 12] for start in range(0, 59, 12)):
            p = heads(x[batch])
            loss = 1 - F.cosine_similarity(p.embedding, y[batch]).mean()
            loss = loss + config.mlc_weight * F.binary_cross_entropy_with_logits(p.logits, t[batch])
            optimizer.zero_grad()
            loss.backward()
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(heads.parameters(), config.clip_norm)
            optimizer.param_groups[0]["lr"] = rates[len(expected)]
            optimizer.step()
            expected.append(loss.item())
    np.testing.assert_allclose(losses(run), expected, rtol=1e-4)

    steps = [entry for entry in entries(run) if "loss" in entry]
    assert [entry["lr"] for entry in steps] == pytest.approx(rates)
    assert [entry["images_per_second"] for entry in steps] == [6, 6, 6, 6, 5.5] * 2
    assert [entry["epoch"] for entry in entries(run)] == [0] * 6 + [1] * 6  # five steps and a validation
    result = json.loads((run / "result.json").read_text())
    assert [result[f"n_{split}"] for split in ("train", "val", "test")] == [59, 13, 12]
    left = (1 - result["test_cosine"]) / (1 - result["mean_embedding_cosine"])
    assert result["error_ratio"] == pytest.approx(left)
    assert 1000 <= result["seconds"] < 2000
    x, _, t = read("test")
    with torch.no_grad():
        logits = reverse_sd.load_run(run).regressor(x).logits
    occur = t.any(dim=0)
    theirs = average_precision_score(t[:, occur], logits[:, occur], average="macro")
    assert result["vocabulary_map"] == pytest.approx(theirs, abs=1e-6)


def test_precision_is_what_is_asked_for(few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch):
    dtypes, forward = [], reverse_sd.Heads.forward

    def noted(self: reverse_sd.Heads, x: torch.Tensor) -> reverse_sd.Prediction:
        prediction = forward(self, x)
        dtypes.append(prediction.embedding.dtype)
        return prediction

    monkeypatch.setattr(reverse_sd.Heads, "forward", noted)
    frozen = ["--train-blocks", "0", "--device", "cpu", "--precision"]
    auto, single, half = (
        losses(train_here(few_scenes, tmp_path / name, *frozen, name)) for name in ("auto", "float32", "bf16")
    )
    assert auto == single != half
    assert dtypes[0] == torch.float32 and torch.bfloat16 in dtypes[-len(dtypes) // 3 :]
    np.testing.assert_allclose(half, single, rtol=0.02)


# -- one gradient whatever the parts and processes ----------------------------------------


def test_accumulation_does_not_change_the_losses(
    few_scenes: Path, cache: Path, tmp_path: Path, uninterrupted: Path
):
    parts = train_here(few_scenes, tmp_path / "parts", "--accumulate", "3")
    np.testing.assert_allclose(losses(parts), losses(uninterrupted), atol=2e-4)
    np.testing.assert_allclose(losses(parts)[:3], losses(uninterrupted)[:3], atol=1e-6)


@pytest.mark.parametrize("curriculum", [pytest.param("none", marks=pytest.mark.slow), "difficulty"])
def test_two_processes_have_the_losses_of_one(few_scenes: Path, cache: Path, tmp_path: Path, curriculum: str):
    # 59 training pairs in batches of 29: the last batch is one sample, so one process has none
    flags = ["--data", str(few_scenes), *SMALL, "--batch-size", "29", "--val-size", "13", "--device", "cpu"]
    flags += ["--curriculum", curriculum]
    one, two = tmp_path / "one", tmp_path / "two"
    torch.set_num_threads(1)
    assert train.main([*flags, "--out", str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags, "--out", str(two)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("pairs: 59 train") == 1  # the first process alone
    np.testing.assert_allclose(losses(two)[:2], losses(one)[:2], atol=1e-6)
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-4)
    results = [json.loads((run / "result.json").read_text())["test_cosine"] for run in (one, two)]
    assert results[0] == pytest.approx(results[1], abs=1e-3)


def test_activation_checkpointing_changes_nothing(
    few_scenes: Path, cache: Path, tmp_path: Path, uninterrupted: Path
):
    run = train_here(few_scenes, tmp_path / "checkpointing", "--activation-checkpointing")
    np.testing.assert_allclose(losses(run), losses(uninterrupted), atol=1e-5)


# -- interruptions ----------------------------------------


@pytest.mark.parametrize("stop_after", [3, 5, 8])
def test_ctrl_c_and_resume_end_bit_for_bit_alike(
    few_scenes: Path, cache: Path, tmp_path: Path, uninterrupted: Path, monkeypatch, stop_after: int
):
    run = tmp_path / "stopped"
    step = train.RegressorTrainer.train_step

    def interrupted(self, *args):
        if self.step == stop_after:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.RegressorTrainer, "train_step", interrupted)
        assert train.main(["--data", str(few_scenes), "--out", str(run), *SMALL]) == 130
    assert len(losses(run)) == stop_after + 1  # the step under way was finished
    assert train.main(["--resume", str(run)]) == 0
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize("second, best", [(0.4, 0.5), (0.5, 0.5), (0.75, 0.75)])
def test_the_best_epoch_stays_the_best_across_a_resume(
    few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch, second: float, best: float
):
    """Validation gives .5, then `second`; of equal epochs the first is kept."""
    values, step = iter([0.5, second]), train.RegressorTrainer.train_step
    of_all = lambda self, samples: np.full(len(samples), next(values))  # noqa: E731
    monkeypatch.setattr(train.RegressorTrainer, "scores_of", of_all)

    def interrupted(self, *args):
        if self.step == 4:  # the last of the first epoch
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.RegressorTrainer, "train_step", interrupted)
        flags = ["--data", str(few_scenes), "--out", str(run), *SMALL, "--train-blocks", "0"]
        assert train.main(flags) == 130
    before = (run / "model.safetensors").read_bytes()
    assert train.main(["--resume", str(run)]) == 0
    assert ((run / "model.safetensors").read_bytes() == before) == (second <= 0.5)
    assert json.loads((run / "last" / "state.json").read_text())["best"] == best


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch
):
    step, handler = train.RegressorTrainer.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, *args):
        for _ in range(2 * (self.step == 3)):
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(train.RegressorTrainer, "train_step", interrupted)
    run = tmp_path / "run"
    flags = ["--data", str(few_scenes), "--out", str(run), *SMALL, "--train-blocks", "0"]
    assert train.main(flags) == 130
    assert len(losses(run)) == 3
    assert json.loads((run / "last" / "state.json").read_text())["step"] == 2  # --checkpoint-every 2
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("dying", ["tensors", "renaming", "state", "cleaning"])
def test_dying_within_a_checkpoint_leaves_a_good_one(
    few_scenes: Path, cache: Path, tmp_path: Path, uninterrupted: Path, monkeypatch, dying: str
):
    """What kill -9 leaves behind at each point of the second checkpoint's writing."""

    class Killed(BaseException):
        pass

    run, count = tmp_path / "killed", {"saves": 0}
    save = Checkpoint.save

    def dying_save(self, state, tensors):
        count["saves"] += 1
        if count["saves"] < 2:
            return save(self, state, tensors)
        assert len(losses(run)) == state["step"]  # on the disk, not in a buffer
        name = self.folder / f"step-{state['step']:08d}.safetensors"
        if dying == "tensors":
            name.with_name(name.name + ".partial").write_bytes(b"half a file")
        elif dying == "renaming":
            save_tensors(name, tensors)
        elif dying == "state":
            save_tensors(name, tensors)
            (self.folder / ".state.json.123.tmp").write_text('{"step": 4, "tens')
        else:
            former = next(self.folder.glob("step-*.safetensors"))
            content = former.read_bytes()
            save(self, state, tensors)
            former.write_bytes(content)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", dying_save)
        with pytest.raises(Killed):
            train.main(["--data", str(few_scenes), "--out", str(run), *SMALL])
    assert train.main(["--resume", str(run)]) == 0
    assert_same_end(run, uninterrupted)
    assert len(list((run / "last").iterdir())) == 2


def test_kill_9_at_any_moment_loses_one_interval_at_most(
    few_scenes: Path, cache: Path, tmp_path: Path, uninterrupted: Path
):
    run = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(few_scenes), "--out", str(run), *SMALL]
    for wanted in (2, 5, 9):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = run / "log.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count('"loss"') >= wanted:
                time.sleep(0.03 * wanted)  # within the next step or the checkpoint
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        state = run / "last" / "state.json"
        saved = json.loads(state.read_text())["step"] if state.exists() else 0
        assert saved >= wanted - 2
        command = [sys.executable, str(ROOT / "train.py"), "--resume", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_end(run, uninterrupted)


def test_a_finished_run_resumed_only_evaluates_again(uninterrupted: Path):
    before = (uninterrupted / "model.safetensors").read_bytes()
    assert train.main(["--resume", str(uninterrupted)]) == 0
    assert (uninterrupted / "model.safetensors").read_bytes() == before


def test_a_stopped_run_is_said_to_be_and_other_pairs_are_refused(uninterrupted: Path, caplog, capsys):
    read = (read_json(uninterrupted / f"{name}.json") for name in ("last/state", "result", "config"))
    state, result, config = read
    assert result["step"] == result["steps"] == state["total"]
    assert {path.name for path in uninterrupted.iterdir()} <= {*WRITTEN, "config.json"}
    write_json(uninterrupted / "last/state.json", state | {"step": 3})
    assert eval.main([str(uninterrupted)]) == 0
    assert f"stopped at step 3 of {state['total']}" in caplog.text
    assert read_json(uninterrupted / "result.json")["step"] == 3
    write_json(uninterrupted / "config.json", config | {"seed": 5})
    assert eval.main([str(uninterrupted)]) == 2
    assert "was trained on other pairs, or on another split" in capsys.readouterr().err
    assert read_json(uninterrupted / "result.json")["step"] == 3


# -- bad input ----------------------------------------


def error_line(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run train.py, want exit status 2, and return its one line."""
    assert train.main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_a_runs_names_are_not_overwritten(name: str, tmp_path: Path, capsys):
    (tmp_path / name).write_text("mine")
    assert f"holds {name}, which a run would overwrite" in error_line(capsys, "--out", str(tmp_path))
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "config.json").exists()


def test_no_such_data(cache: Path, tmp_path: Path, capsys):
    assert "nowhere" in error_line(capsys, "--data", str(tmp_path / "nowhere"))


def test_the_embedded_pairs_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built: list[Path] = []
    cache = tmp_path / "new" / "deep"  # is made
    monkeypatch.setenv("REVERSE_SD_CACHE", str(cache))
    monkeypatch.setattr(scenes, "build", built.append)
    assert pairs_folder("mini") == ROOT / "mini" / "generated"
    assert pairs_folder("somewhere/mini") == Path("somewhere/mini") and built == []
    assert pairs_folder("drawn") == built[0] == pairs_folder("drawn") and cache in built[0].parents
    assert TrainConfig().data == "mini" and set(EMBEDDED) == {"mini", "drawn"}


def test_an_empty_folder(cache: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error_line(capsys, "--data", str(tmp_path / "empty"))


def test_prompts_without_a_word_for_the_vocabulary(few_scenes: Path, cache: Path, tmp_path: Path, capsys):
    with zipfile.ZipFile(next(few_scenes.rglob("*.zip"))) as archive:
        content = archive.read(next(name for name in archive.namelist() if not name.endswith(".json")))
    (tmp_path / "d").mkdir()
    rows = []
    for k in range(24):
        (tmp_path / f"d/{k}.webp").write_bytes(content + bytes(k))
        rows.append(json.dumps({"file_name": f"{k}.webp", "text": "红" * (k + 1)}))
    (tmp_path / "d/metadata.jsonl").write_text("\n".join(rows))
    flags = ["--clean", "off", "--val-size", "3", "--test-size", "3", "--out", str(tmp_path / "run")]
    line = error_line(capsys, *SMALL, *flags, "--data", str(tmp_path / "d"))
    assert "no training prompt has an English word" in line and not (tmp_path / "run").exists()


def test_no_run_to_resume(tmp_path: Path, capsys):
    assert "not a run" in error_line(capsys, "--resume", str(tmp_path))


def test_a_run_is_never_overwritten(uninterrupted: Path, few_scenes: Path, capsys):
    line = error_line(capsys, "--data", str(few_scenes), "--out", str(uninterrupted))
    assert "--resume" in line


@pytest.mark.parametrize("flags", [["--lr", "1"], ["--precision", "bf16"], ["--out", "elsewhere"]])
def test_resuming_takes_no_other_configuration(uninterrupted: Path, capsys, flags: list[str]):
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(uninterrupted), *flags])
    assert stop.value.code == 2 and "--resume uses the run's" in capsys.readouterr().err


def test_resuming_takes_what_does_not_decide_the_result(uninterrupted: Path, capsys):
    argv = "--resume here --workers 1 --device cpu --compile --checkpoint-every 7 --activation-checkpointing"
    flags, out, resume = parse_args(argv.split(), "")
    assert flags.keys() == RESUMABLE and out is None and resume == Path("here")
    assert "--device nonsense" in error_line(capsys, "--resume", str(uninterrupted), "--device", "nonsense")


def test_a_new_run_has_the_first_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data="some/pairs", seed=4)
    cbs = dataclasses.replace(config, backbone="vit", curriculum="cbs")
    names = [new_folder(c, None).name for c in (config, config, config, cbs)]
    assert names == ["unet-pairs-seed4", *(f"unet-pairs-seed4-{n}" for n in (2, 3)), "vit-pairs-cbs-seed4"]
    assert new_folder(config, tmp_path / "new" / "and" / "deep").is_dir()


def test_a_new_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    Path("mine").mkdir()
    (Path("mine") / "notes.txt").write_text("")
    assert new_folder(TrainConfig(), Path("mine")) == Path("mine")  # a folder without a run serves
    below = "cannot be created .*; give another --out"
    for out, fault in ((None, below), ("runs", "is a file; give a folder"), ("runs/below", below)):
        with pytest.raises(data.DataError, match=f"^runs[^:]*: {fault}"):
            new_folder(TrainConfig(), out and Path(out))


def test_a_run_that_another_process_uses_is_refused(uninterrupted: Path, capsys):
    with exclusive(uninterrupted):
        assert "another process uses this run" in error_line(capsys, "--resume", str(uninterrupted))


def test_resuming_on_other_pairs_is_refused(uninterrupted: Path, few_scenes: Path, tmp_path: Path, capsys):
    scenes.build(tmp_path / "others", parts=1, per_part=84, seed=5, progress=False)
    config = json.loads((uninterrupted / "config.json").read_text()) | {"data": str(tmp_path / "others")}
    (uninterrupted / "config.json").write_text(json.dumps(config))
    assert "other pairs" in error_line(capsys, "--resume", str(uninterrupted))


def test_a_truncated_checkpoint_is_one_clear_line(uninterrupted: Path, capsys):
    tensors = next((uninterrupted / "last").glob("step-*"))
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "checkpoint cannot be read" in error_line(capsys, "--resume", str(uninterrupted))


def test_a_run_without_its_weights(uninterrupted: Path, capsys):
    (uninterrupted / "model.safetensors").unlink()
    assert eval.main([str(uninterrupted)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_a_line(few_scenes: Path, cache: Path, tmp_path: Path, capsys):
    line = error_line(
        capsys,
        "--data",
        str(few_scenes),
        "--out",
        str(tmp_path / "run"),
        *SMALL,
        "--lr",
        "1000",
        "--clip-norm",
        "0",
    )
    assert "not finite" in line and "--lr" in line


def test_broken_images_are_left_out_of_training(few_scenes: Path, cache: Path, tmp_path: Path, caplog):
    folder = tmp_path / "loose"
    folder.mkdir()
    pairs = data.read_pairs(few_scenes)
    for i in range(60):
        pairs.image(i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(pairs.prompts[i])
    (folder / "07.png").write_bytes(b"")
    (folder / "08.png").write_bytes((folder / "08.png").read_bytes()[:300])
    run = train_here(folder, tmp_path / "run", "--epochs", "1")
    result = json.loads((run / "result.json").read_text())
    assert result["n_train"] + result["n_val"] + result["n_test"] == 58
    assert "2 of 60 images" in caplog.text


def test_unknown_device(few_scenes: Path, cache: Path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--device cuda" in error_line(capsys, "--data", str(few_scenes), "--device", "cuda")


def test_image_size_must_fit_the_latents(cache: Path, few_scenes: Path, capsys):
    assert "multiple of 8" in error_line(capsys, "--data", str(few_scenes), "--image-size", "60")


def test_missing_weights_stop_the_run_at_once(cache: Path, few_scenes: Path, tmp_path: Path, capsys):
    line = error_line(capsys, "--data", str(few_scenes), "--weights", str(tmp_path / "none.safetensors"))
    assert "none.safetensors" in line
    assert not (tmp_path / "run").exists()


# -- captions ---------------------------------------------------------------


def test_captions_from_a_file_reach_the_cross_attention(
    few_scenes: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pairs = data.read_pairs(few_scenes)
    captions = tmp_path / "captions.jsonl"
    entries = [{"image": name, "caption": f"a picture of {i % 7}"} for i, name in enumerate(pairs.names)]
    entries[5]["caption"] = "star " * 100
    captions.write_text("".join(json.dumps(entry) + "\n" for entry in entries[:-1]))
    config = TrainConfig(data=str(few_scenes), captions=str(captions))
    prepared = prepare(resolve(config))
    text = weights.load("clip-text", "sd-mini")
    with torch.no_grad():
        expected = text(weights.load_tokenizer("sd-mini")(["a picture of 3", ""]))
    np.testing.assert_allclose(prepared.inputs[1][3], expected[0].numpy(), atol=2e-3)
    np.testing.assert_allclose(prepared.inputs[1][len(pairs) - 1], expected[1].numpy(), atol=2e-3)
    assert len(prepared.inputs[1].rows) == 9 and "captions: 1 were cut to 75 tokens" in caplog.text


def tiny_blip(folder: Path) -> Path:
    """A captioner's folder as published, with random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "blue", "star", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 14, "max_position_embeddings": 24, "bos_token_id": 12, "sep_token_id": 3}
    config = {"model_type": "blip", "vision_config": sizes | {"image_size": 32, "patch_size": 16},
              "text_config": sizes | text}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    parsed = blip.BLIPConfig(**blip.CONFIGS["blip-mini"].__dict__ | {
        "vision_hidden_size": 32, "vision_intermediate_size": 64, "vision_num_hidden_layers": 1,
        "vision_image_size": 32, "vision_patch_size": 16, "text_hidden_size": 32,
        "text_intermediate_size": 64, "text_num_hidden_layers": 1, "text_vocab_size": 14,
        "text_max_position_embeddings": 24, "text_pad_token_id": 0, "text_bos_token_id": 12})
    model = blip.BLIP(parsed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_blip_captions_are_made_once_and_read(few_scenes: Path, cache: Path, tmp_path: Path, monkeypatch):
    config = TrainConfig(data=str(few_scenes), captions=str(tiny_blip(tmp_path)))
    prepared = prepare(resolve(config))
    how = data.Preprocessing(**weights.preprocessing("blip", tmp_path))
    assert how.size == (32, 32) and how.resize is None
    model = weights.load("blip", tmp_path)
    rows = range(0, len(prepared.pairs), 9)
    images = torch.stack([data.image_tensor(prepared.pairs.image(i), how) for i in rows])
    said = model.generate(images)
    assert len(set(said)) > 1
    with torch.no_grad():
        expected = weights.load("clip-text", "sd-mini")(weights.load_tokenizer("sd-mini")(said))
    for i, states in zip(rows, expected, strict=True):
        np.testing.assert_allclose(prepared.inputs[1][i], states.numpy(), atol=2e-3)
    monkeypatch.setattr(blip.BLIP, "generate", lambda *_: pytest.fail("captions were made again"))
    again = prepare(resolve(config))
    np.testing.assert_array_equal(again.inputs[1].rows, prepared.inputs[1].rows)


def test_true_prompts_can_be_read_as_an_upper_bound(few_scenes: Path, cache: Path, caplog):
    prompts = resolve(TrainConfig(data=str(few_scenes), captions="prompt"))
    prepared = prepare(prompts)
    with torch.no_grad():
        ids = weights.load_tokenizer("sd-mini")(prepared.pairs.prompts[:1])
        expected = weights.load("clip-text", "sd-mini")(ids)[0]
    np.testing.assert_allclose(prepared.inputs[1][0], expected.numpy(), atol=2e-3)
    assert "upper bound" in caplog.text


# -- cleaning ----------------------------------------

LIKE = [f"a photograph in the style of a truly great old painter, number {i}" for i in range(100)]


@pytest.mark.parametrize(
    "prompts, rule, kept",
    [
        (LIKE, "paper", [0]),
        (LIKE, "auto", list(range(100))),
        (LIKE + LIKE, "duplicates", list(range(100))),
        (["a cat", *LIKE[:19]], "auto", [0, 1]),  # 2 of 20 are a tenth, which is not few
        (["a cat", *LIKE[:20]], "auto", list(range(21))),
        (["a cat", *LIKE[:19]] * 5, "auto", [0, 1]),  # a tenth of the different prompts
        (["a cat", "", "a cat", "café"], "off", [0, 2, 3]),
    ],
)
def test_which_prompts_are_kept(prompts: list[str], rule: str, kept: list[int]):
    assert cleaned(prompts, rule).tolist() == kept


def test_the_learning_rate_falls_along_a_cosine_to_nothing():
    config = TrainConfig(lr=2.0)
    rates = [learning_rate(config.lr, step, 100) for step in (0, 50, 100)]
    assert rates == pytest.approx([2.0, 1.0, 0.0])


def test_every_epoch_is_another_shuffle_of_all_samples():
    first, second = (np.concatenate(epoch_batches(50, 8, 0, epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first != second).any()
    assert (np.concatenate(epoch_batches(50, 8, 0, 1)) == second).all()


# -- figures of merit ----------------------------------------


def test_the_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(0.5, 0.2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_average_precision_of_a_perfect_and_of_a_known_ranking():
    truth = np.array([[1, 0], [0, 1], [1, 0]], bool)
    assert average_precision(truth.astype(float), truth) == 1
    scores = np.array([[3.0, 3.0], [2.0, 1.0], [1.0, 2.0]])  # word 0: ranks 1 and 3; word 1: rank 3
    assert average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    for row in range(3):  # equal scores are ranked in their order
        assert average_precision(np.zeros((3, 1)), np.eye(3, dtype=bool)[:, row : row + 1]) == 1 / (row + 1)


# -- real pairs ----------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "portraits").exists(), reason="the real pairs are not here")
def test_real_pairs_beat_the_mean_embedding(cache: Path, tmp_path: Path):
    assert train.main(["--data", str(SHARED / "portraits"), "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_cosine"] > result["mean_embedding_cosine"]


def test_weights_have_a_fingerprint_that_changes_with_them(tmp_path: Path):
    assert weights.fingerprint("unet", "sd-mini") == weights.fingerprint("unet", "sd-mini")
    assert weights.fingerprint("unet", "sd-mini") != weights.fingerprint("vae", "sd-mini")
