"""eval.py --table and --figure: numbers, what is trained and when, the paper's figures, bad input."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, environment
from PIL import Image
from sklearn.linear_model import Ridge
from test_baseline_rows import by_hand as ridge_by_hand
from test_baseline_rows import unit

import data
import eval
import train
import training.plan
from benchmarks import gpu
from mini import judge, naming, scenes
from tables import exhibit, probe, readouts, runs
from tables.compute import exhibit_of, row_cosines, summary_of
from tables.exhibit import interval, markdown, short
from tables.figures import undrawn_share
from tables.methods import DaklMethod, KnnMethod, Member, Method, PromptKnnMethod, members_of
from tables.prompts import rows_of
from tables.readouts import Features
from tables.registry import EXHIBITS, text_of
from tables.rows import ROW_TABLES, Row, Table
from tables.runs import MODELS, RECORDING, SOURCES, Plan, RunName, flags_of, with_phase_1
from training.config import TrainConfig, parse_args
from training.folder import saved_fields
from training.inputs import clip_texts, prepare
from training.metrics import (
    bootstrap_interval,
    cosines,
    holm,
    paired_test,
    percentiles,
    rank_correlation,
    ranks,
    seeds_p,
    spearman,
    student_interval,
    student_p,
)

QUICK = shlex.split("--epochs 1 --batch-size 12 --val-size 12 --test-size 12 --train-blocks 0")
QUICK += ["--unet-features", "middle"]  # ridge regression on all blocks' would take seconds


class Here:
    """In place of subprocess.Popen: train.py in this process, without another import of torch."""

    started: list[list[str]] = []

    def __init__(self, command: list[str], **_: object):
        assert command[:2] == [sys.executable, str(ROOT / "train.py")]
        self.started.append(command[2:])
        torch.set_num_threads(1)
        self.returncode = train.main(command[2:])

    def poll(self) -> int:
        return self.returncode


@pytest.fixture(autouse=True)
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(Popen=Here, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(runs, "subprocess", here)
    Here.started = []


@pytest.fixture(scope="module")
def make(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run eval.py on a few scenes; all calls share the runs."""
    folder = tmp_path_factory.mktemp("made")

    def call(*flags: str, status: int = 0) -> Path:
        where = ["--data", str(few_scenes), "--runs", str(folder / "runs")]
        where += ["--results", str(folder / "results")]
        assert eval.main([*flags, *where, "--jobs", "1", "--device", "cpu"]) == status
        return folder

    return call


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text())


# -- a table ----------------------------------------


def test_table_2_is_what_its_runs_say_and_a_second_call_trains_nothing(make, capsys):
    folder = make("--table", "2", "--seeds", "0,1", *QUICK)
    assert len(Here.started) == 8
    result = read(folder, "table-2")
    assert [row["paper"] for row in result["rows"]] == [None, None, 0.6624, 0.6620, 0.6632, 0.6671]
    assert result["seeds"] == [0, 1] and result["n_test"] == [12, 12] and result["n_train"] == [60, 60]
    heads = [json.loads((folder / "runs" / f"{run}-seed1" / "config.json").read_text())["heads"]
             for row in result["rows"] for run in row["runs"]]
    assert heads == [0, 1, 2, 3]

    def own(run: str) -> list[dict]:
        folders = [folder / "runs" / f"{run}-seed{seed}" for seed in (0, 1)]
        return [json.loads((f / "result.json").read_text()) for f in folders]

    measured = {run: "vocabulary_map" in own(run)[0] for run in ("swin-plain", "swin-head-1", "swin-mlc")}
    assert measured == {"swin-plain": False, "swin-head-1": True, "swin-mlc": True}
    expected = [r["mean_embedding_cosine"] for r in own("swin-plain")]
    assert result["rows"][0]["per_seed"] == pytest.approx(expected)
    assert result["rows"][1]["name"] == "ridge: Swin" and result["rows"][1]["runs"] == []
    for seed, found in enumerate(result["rows"][1]["per_seed"]):
        saved = saved_fields(folder / "runs" / f"swin-plain-seed{seed}")  # --train-blocks 0
        prepared = prepare(TrainConfig(**saved))
        x, y = ({s: np.float64(a[rows]) for s, rows in prepared.splits.items()}
                for a in (prepared.inputs[0], prepared.targets))
        assert found == pytest.approx(cosines(ridge_by_hand(x, y), y["test"]).mean(), abs=1e-4)
    for row in result["rows"][2:]:
        expected = [r["test_cosine"] for r in own(*row["runs"])]
        assert row["per_seed"] == pytest.approx(expected)
        assert row["cosine"] == pytest.approx(np.mean(expected))
        assert row["deviation_of_seeds"] == pytest.approx(np.std(expected, ddof=1))
        low, high = row["cosine_95"]
        assert low < row["cosine"] < high
    (test,) = result["rows"][5]["tests"]
    assert test["against"] == result["rows"][2]["name"] and test["n"] == 24
    pairs = []
    for run in ("swin-mlc", "swin-plain"):
        arrays = [folder / "runs" / f"{run}-seed{seed}" / "predictions" for seed in (0, 1)]
        pairs.append(np.concatenate([
            cosines(np.load(a / "test.npy"), np.load(a / "test-targets.npy")) for a in arrays
        ]))
    oracle = scipy.stats.ttest_rel(*pairs)
    assert (test["t"], test["p"]) == pytest.approx((oracle.statistic, oracle.pvalue), rel=1e-4)
    assert test["difference"] == pytest.approx((pairs[0] - pairs[1]).mean())
    assert result["rows"][5]["cosine_95"] == pytest.approx(bootstrap_interval(pairs[0], resamples=2000))

    text = (folder / "results" / "table-2.md").read_text()
    assert f"{text}\nwritten: {folder / 'results' / 'table-2.md'} and .json\n" in capsys.readouterr().out
    assert (folder / "results" / "table-2.json").read_text() == json.dumps(result, indent=1) + "\n"
    assert "\n* Rows without a number in the column" in text  # the first row, not trained, is one
    assert f"| Swin, head 3 | {short(result['rows'][5]['cosine'])} |" in text
    assert "| 5 × 12 | .6671 |" in text
    assert "--seeds 0,1" in text and f"torch {torch.__version__}" in text
    compared = f"| Swin, head 3 − {result['rows'][2]['name']} | {short(test['difference'], True)} |"
    assert sum(line.startswith(compared) for line in text.splitlines()) == 1

    Here.started = []
    make("--table", "2", "--seeds", "0,1", *QUICK)
    assert not Here.started and read(folder, "table-2") == result

    # A run that stopped before its evaluation is resumed, the others are left alone.
    (folder / "runs" / "swin-head-1-seed1" / "result.json").unlink()
    make("--table", "2", "--seeds", "0,1", *QUICK)
    assert [flags[0] for flags in Here.started] == ["--resume"]
    again = read(folder, "table-2")
    assert again["rows"] == result["rows"]

    make("--table", "2", "--seeds", "0", *QUICK, "--epochs", "2", status=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "was trained with epochs 1, not 2" in line


def test_all_that_the_ensemble_needs_is_trained_once(make, few_scenes: Path):
    folder = make("--table", "1,8,9,10", "--figure", "9,11", "--seeds", "0", *QUICK)
    # Of table 1's twelve runs two are table 2's, where that test has run before.
    new = {shlex.join(flags).split("--out ")[1].split("/runs/")[1].split()[0] for flags in Here.started}
    assert len(new) == len(Here.started) and new <= {
        f"{b}-{r}-seed0" for b in MODELS for r in ("plain", "mlc", "mlc-cl")
    }
    one, eight, nine, ten = (read(folder, f"table-{n}") for n in (1, 8, 9, 10))

    def of(result: dict, name: str) -> float:
        return next(row["cosine"] for row in result["rows"] if row["name"] == name)

    assert of(nine, "U-Net") == pytest.approx(of(one, "U-Net, MLC, CL"))
    assert of(nine, "CLIP + U-Net + Swin + ViT") == of(eight, "Ensemble, MLC, CL")
    assert of(ten, "DAKL, k = 10,000, gamma = 0.001") == of(eight, "Ensemble, MLC, CL, DAKL")
    assert len({round(row["cosine"], 6) for row in eight["rows"]}) >= 5  # each row does something else
    assert [row["paper"] for row in nine["rows"][8:11]] == [0.6785, 0.6887, 0.6854]
    # Phase 1 of the curriculum is the run of the row above.
    stated = json.loads((folder / "runs" / "vit-mlc-cl-seed0" / "config.json").read_text())
    assert stated["phase_1"] == str(folder / "runs" / "vit-mlc-seed0")

    # k-NN by the run's prediction, and by pretrained features of the images and of the prompts.
    p = dataclasses.replace(plan(folder / "runs", val_size=12, test_size=12), data=str(few_scenes))
    quick = dataclasses.replace(p, options=p.options | {"train_blocks": 0})
    clip = RunName("clip", "plain")
    prepared, member = prepare(quick.config(clip, 0)), Member(p.run_folder(clip, 0))
    train, test = (prepared.inputs[0][prepared.splits[split]] for split in ("train", "test"))
    prompts = [prepared.pairs.prompts[i] for i in prepared.splits["train"]]
    texts = clip_texts("clip-mini", prompts, "cpu")[np.arange(len(prompts))]
    for method, where, query, reference in (
        (KnnMethod(), p, member.predicted("test"), member.targets("train")),
        (KnnMethod(True), p, test, train),
        (PromptKnnMethod(), p, test, texts),
        (PromptKnnMethod(True), quick, test, texts),  # the image half of this run is the pretrained one
    ):
        found, chosen = method([member], where, 0)
        near = unit(query) @ unit(reference).T
        near[near < np.sort(near, axis=1)[:, [-chosen["k"]]]] = -np.inf
        weight = np.exp(near / chosen["temperature"])
        assert found == pytest.approx(unit(weight @ member.targets("train")), abs=1e-5), method

    # The same by hand.
    unet, vit = (folder / "runs" / f"{b}-mlc-cl-seed0" / "predictions" for b in ("unet", "vit"))
    mean = np.load(unet / "test.npy") + np.load(vit / "test.npy")
    targets = np.load(vit / "test-targets.npy")
    assert of(nine, "U-Net + ViT") == pytest.approx(cosines(mean, targets).mean(), abs=1e-6)

    levels = read(folder, "figure-11")["levels_of_quantiles"]
    assert levels == [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    (eleven, *_), edges = (read(folder, "figure-11")[key] for key in ("per_seed", "edges_of_histogram"))
    assert (edges[0], edges[-1]) == (-1, 1) and np.diff(edges) == pytest.approx(0.05)
    assert eleven["cosines"]["ensemble"]["mean"] == pytest.approx(of(eight, "Ensemble, MLC, CL"))
    assert sum(eleven["cosines"]["vit-mlc-cl"]["histogram"]) == 12
    quantiles = np.quantile(cosines(np.load(vit / "test.npy"), targets), levels)
    assert eleven["cosines"]["vit-mlc-cl"]["quantiles"] == pytest.approx(quantiles, abs=1e-6)

    figure = read(folder, "figure-9")
    for run, (entry,) in figure["runs"].items():
        score = np.load(folder / "runs" / f"{run}-seed0" / "easiness.npy")
        listed = (folder / "runs" / f"{run}-seed0" / "predictions" / "rows.json").read_text()
        rows = json.loads(listed)["train"]
        undrawn = [undrawn_of(row["image"]) for row in rows]
        share = [undrawn_share(row["prompt"], u) for row, u in zip(rows, undrawn, strict=True)]
        assert entry["spearman"] == pytest.approx(-scipy.stats.spearmanr(score, share).statistic)
        low, high = entry["spearman_95"]
        assert low < entry["spearman"] < high
        assert entry["cosine"]["easy"] > entry["cosine"]["medium"] > entry["cosine"]["hard"]
        if run == "unet-mlc":
            names = [row["image"].partition("!")[2] for row in rows]
            known = dict(zip(names, zip(score, undrawn, strict=True), strict=True))
    shown = sum(figure["examples"].values(), [])
    assert len({example["image"] for example in shown}) == len(shown) == 24
    assert all((pytest.approx(e["cosine"]), e["undrawn"]) == known[e["image"]] for e in shown)
    with Image.open(folder / "results" / "figure-9.png") as sheet:
        assert sheet.width == 8 * 136 + 8


def test_captions_are_what_the_row_says(make):
    folder = make("--table", "captions", "--seeds", "0", *QUICK)
    said = {"captions-empty": "empty", "mlc": "blip-mini", "captions-prompt": "prompt"}
    for recipe, captions in said.items():
        config = json.loads((folder / "runs" / f"unet-{recipe}-seed0" / "config.json").read_text())
        assert (config["captions"], config["heads"], config["backbone"]) == (captions, 3, "unet")
    result = read(folder, "table-captions")
    empty, *others = (row for row in result["rows"] if row["runs"])
    assert [test["against"] for test in empty["tests"]] == ["ridge: U-Net, empty text"]
    against = [[test["against"] for test in row["tests"][:2]] for row in others]
    assert against == [[empty["name"], f"ridge: {name}"] for name in ("U-Net", "U-Net, the true prompt")]
    assert len({round(row["cosine"], 6) for row in result["rows"]}) == 9
    text = (folder / "results" / "table-captions.md").read_text()
    assert text.startswith("# The text that the U-Net reads by cross-attention\n") and "670,000" not in text
    assert "captions for the U-Net: empty, blip-mini, prompt." in text
    other = Plan("-", SOURCES["mini"] | {"blip": "blip-base"}, (0,), folder, 1, "cpu", {})
    named = (RunName("unet", "plain"), RunName("unet", "captions-empty"), RunName("vit", "mlc"))
    assert [other.fields(run, 0).get("captions") for run in named] == ["blip-base", "empty", None]
    given = Plan("-", SOURCES["mini"], (0,), folder, 1, "cpu", {"captions": "empty"})
    assert given.fields(RunName("unet", "mlc-cl"), 0)["captions"] == "empty"


def test_the_ceiling_is_what_the_probe_reads(make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "WORDINGS", 4)
    folder = make("--table", "ceiling", "--seeds", "0", *QUICK)
    rows = {row["name"]: row["cosine"] for row in read(folder, "table-ceiling")["rows"]}
    mean, _, encoded, ridge, told = rows.values()
    assert mean < min(encoded, ridge, told)  # they know the world; 60 pairs teach the regressions

    everything = probe.default_views()
    monkeypatch.setattr(probe, "readings", lambda pairs, rows: torch.stack(
        [naming.targets([everything[pairs.prompts[i]]])[0].float() for i in rows]
    ))
    saved = saved_fields(folder / "runs" / "unet-mlc-seed0")
    given = {name: saved[name] for name in ("val_size", "test_size")}
    plan = Plan(saved["data"], SOURCES["mini"], (0,), folder / "runs", 1, "cpu", given)
    like = Member(folder / "runs" / "unet-mlc-seed0")
    every = {prompt: everything[prompt] for prompt in data.read_pairs(Path(saved["data"])).prompts}
    monkeypatch.setattr(probe, "default_views", lambda: every)  # the data are all of them
    said, _ = probe.ProbeMethod("encoded")([like], plan, 0)
    assert cosines(said, like.targets("test")).mean() > encoded  # nothing misread
    monkeypatch.setattr(probe, "readings", None)  # the prompt's content is known without a picture
    told, chosen = probe.ProbeMethod("prompt")([like], plan, 0)
    prepared = prepare(plan.config(RunName("unet", "mlc"), 0))
    labels = naming.targets([every[prompt] for prompt in prepared.pairs.prompts], naming.named_labels).numpy()
    x, y = {split: labels[rows] for split, rows in prepared.splits.items()}, like.targets
    fits = {alpha: Ridge(alpha=alpha).fit(x["train"], y("train")) for alpha in probe.ALPHAS}
    best = max(fits, key=lambda alpha: cosines(fits[alpha].predict(x["val"]), y("val")).mean())
    assert chosen == {"alpha": best} and told == pytest.approx(fits[best].predict(x["test"]), abs=1e-4)


def test_a_reading_becomes_a_view():
    view = scenes.View((scenes.Thing("cat", "red", "wood"), scenes.Thing("star", "blue", "glass")),
                       relation="left", place="snow", light="night", style="oil")
    read = probe.view_of(naming.targets([view])[0].float())
    assert {thing.subject for thing in read.things} == {"cat", "star"}
    assert {thing.colour for thing in read.things} == {"red", "blue"} and read.count == 1
    assert {thing.material for thing in read.things} == {"wood", "glass"}
    assert (read.relation, read.place, read.light, read.style) == ("left", "snow", "night", "oil")
    alone = scenes.View((scenes.Thing("cat", None, "wood"),), count=3, position="far")
    p = naming.targets([alone])[0].float()
    p[naming.POSITION["relation", "left"]] = 0.9  # makes no sense of one thing
    cat = scenes.Thing("cat", naming.SHAPES["cat"].colour, "wood")
    assert probe.view_of(p) == scenes.View((cat,), count=3, position="far")
    one = naming.targets([scenes.View((scenes.Thing("cat", None, None),))])[0].float()
    assert probe.view_of(one).count == 1  # of one thing no number is said
    p[naming.POSITION["place", "snow"]] = 0.5  # is not above one half
    assert probe.view_of(p).place is None


def test_ridge_by_hand():
    """Centred, the columns of x are (-1, 0, 1) and (1, -2, 1), at right angles: each has its own slope."""
    x, y = np.array([[0.0, 10], [1, 7], [2, 10]]), np.array([[1.0, 4], [2, 4], [6, 10]])
    slope, intercept = probe.ridge_regression(x, y, 2.0)
    assert slope == pytest.approx(np.array([[5 / (2 + 2), 6 / (2 + 2)], [3 / (6 + 2), 6 / (6 + 2)]]))
    assert intercept == pytest.approx(np.array([3 - 1.25 - 9 * 0.375, 6 - 1.5 - 9 * 0.75]))


def test_the_probe_refuses_other_prompts(few_scenes: Path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "default_views", dict)
    with pytest.raises(data.DataError, match="the probe can judge only the embedded default data"):
        probe.ProbeMethod("prompt")([], dataclasses.replace(plan(few_scenes), data=str(few_scenes)), 0)


def test_which_exhibits_are_selected():
    assert list(eval.selected("all", "table")) == [("table", number) for number in EXHIBITS["table"]]
    assert list(eval.selected("captions,9,2,9", "table")) == [("table", n) for n in (2, 9, "captions")]
    assert eval.selected("11", "figure") == {("figure", 11): EXHIBITS["figure"][11]}
    needs = {"crossed": "second", "words": "drawn", **dict.fromkeys(
        (5, "budget", "ceiling", "denoised", "difficulty", "probe", "shift", "swap"), "probe")}  # fmt: skip
    tables = EXHIBITS["table"].items()
    assert {name: table.needs for name, table in tables if table.needs} == needs
    assert {name for name, table in tables if table.before} == {"crossed", "denoised", "shift"}


def undrawn_of(where: str) -> list[str]:
    import zipfile

    archive, name = where.split("!")
    with zipfile.ZipFile(archive) as part:
        return json.loads(part.read(f"{Path(archive).stem}.json"))[name]["undrawn"]


def test_a_training_that_fails_is_named_and_the_others_go_on(make, monkeypatch, capsys, tmp_path: Path):
    class Breaks(Here):
        def __init__(self, command: list[str], **how):
            self.returncode = 1
            if "vit-plain" in shlex.join(command):
                errors = how["stdout"] if how["stderr"] == subprocess.STDOUT else how["stderr"]
                errors.write(b"epoch 1\rerror: the disk is full\n")
                self.started.append(command[2:])
            else:
                super().__init__(command, **how)

    monkeypatch.setattr(runs.subprocess, "Popen", Breaks)
    rows = tuple(Row(recipe, (RunName("vit", recipe),)) for recipe in ("plain", "cl", "mlc"))
    monkeypatch.setitem(EXHIBITS["table"], 7, exhibit_of(Table("", rows)))
    make("--table", "7", "--seeds", "3", *QUICK, status=2)
    said = capsys.readouterr().err
    assert "failed: vit-plain-seed3: the disk is full (full output: " in said
    assert "failed: vit-cl-seed3: needs vit-plain-seed3" in said and "vit-mlc-seed3: test cosine" in said
    assert said.strip().splitlines()[-1].startswith("error: 2 trainings failed")
    assert len(Here.started) == 2


def test_ctrl_c_stops_what_runs_and_starts_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Endless:
        started: list["Endless"] = []

        def __init__(self, *_: object, env: dict, start_new_session: bool, stdin: int, **__: object):
            assert env["OMP_NUM_THREADS"] == "1"  # three cores for two trainings
            assert start_new_session and stdin == subprocess.DEVNULL  # keys reach this process alone
            self.ends: list[str] = []
            self.started.append(self)

        def poll(self) -> None:
            if len(self.started) >= 2:
                raise KeyboardInterrupt

        def terminate(self) -> None:
            self.ends.append("terminated")

        def wait(self) -> None:
            self.ends.append("waited for")

    monkeypatch.setattr(runs.subprocess, "Popen", Endless)
    monkeypatch.setattr(runs, "prepare", lambda config, device: None)
    monkeypatch.setattr(runs, "cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    two_at_once = dataclasses.replace(plan(tmp_path / "new" / "runs"), jobs=2)
    with pytest.raises(KeyboardInterrupt):
        runs.train_missing(two_at_once, [RunName("vit", recipe) for recipe in ("mlc-cl", "plain", "lerac")])
    assert [process.ends for process in Endless.started] == [["terminated", "waited for"]] * 2


def test_a_training_without_a_result_failed(tmp_path: Path):
    (tmp_path / "run.log").write_bytes(b"\xff\nit stopped\n\n")
    assert runs.failure_of(tmp_path / "run", 0).startswith("it stopped (full output: ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").touch()
    assert runs.failure_of(tmp_path / "run", 0) is None and runs.failure_of(tmp_path / "run", 1)


# -- what is told to train.py ----------------------------------------


def plan(tmp_path: Path, **given: object) -> Plan:
    sources = dict(SOURCES["mini"])
    return Plan("mini", sources, (0,), tmp_path, 1, "cpu", given)


def test_flags_reach_the_runs_that_they_mean_something_to(tmp_path: Path):
    p = plan(tmp_path, chunks="thresholds", cbs_every=2.0, image_size=32, lr=0.5)
    named = (("vit", "plain"), ("vit", "mlc-cl"), ("vit", "cbs"), ("unet", "mlc"))
    plain, cl, cbs, unet = (p.fields(RunName(*name), 4) for name in named)
    assert plain == {"lr": 0.5, "backbone": "vit", "data": "mini", "weights": "vit-mini", "seed": 4,
                     "device": "cpu", "heads": 0, "record_cosines": True}
    assert cl["chunks"] == "thresholds" and cl["phase_1"] == str(tmp_path / "vit-mlc-seed4")
    assert cbs["cbs_every"] == 2.0 and "chunks" not in cbs and "image_size" not in cbs
    assert unet["image_size"] == 32 and unet["heads"] == 3 and unet["record_cosines"]
    parsed, out, resume = parse_args(flags_of(cl), "")
    assert parsed == cl and out is resume is None


def test_phase_1_comes_first_and_once():
    named = (RunName("vit", recipe) for recipe in ("mlc-cl", "cl", "mlc", "plain"))
    ordered = [run.name for run in with_phase_1(named)]
    assert ordered == ["vit-mlc", "vit-mlc-cl", "vit-plain", "vit-cl"]
    every = {run for table in ROW_TABLES.values() for run in table.runs}
    curricula = ("cl", "cl-tuned")
    assert {run for run in every if run.phase_1} == {run for run in every if run.recipe.endswith(curricula)}
    first = {run.phase_1 for run in every} - {None}
    assert {dataclasses.replace(run, changes=()) for run in first} <= RECORDING


def test_a_runs_folder_is_backbone_recipe_and_seed(tmp_path: Path):
    assert plan(tmp_path).run_folder(RunName("vit", "mlc-cl"), 3) == tmp_path / "vit-mlc-cl-seed3"


def test_a_finished_run_is_that_of_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    p, run = plan(tmp_path), RunName("vit", "mlc-cl")
    folder = p.run_folder(run, 0)
    folder.mkdir()
    saved = vars(p.config(run, 0)) | {"phase_1": "elsewhere", "device": "cuda"}
    monkeypatch.setattr(runs, "saved_fields", lambda _: saved)
    (folder / "config.json").touch()
    assert not p.finished(run, 0)
    for steps, whether in (({}, True), ({"step": 9, "steps": 9}, True), ({"step": 8, "steps": 9}, False)):
        (folder / "result.json").write_text(json.dumps({"test_cosine": 0.5, "seconds": 1.0} | steps))
        assert p.finished(run, 0) is whether
    (folder / "result.json").write_text('{"test_cos')
    with pytest.raises(data.DataError, match="result.json: cannot be read as JSON"):
        p.finished(run, 0)
    (folder / "result.json").write_text('{"test_cosine": 0.5, "seconds": 1.0}')
    assert p.finished(run, 0) and dataclasses.replace(p, data=str(Path("mini").resolve())).finished(run, 0)
    with pytest.raises(data.DataError, match="was trained with data mini, not drawn; give another --runs"):
        dataclasses.replace(p, data="drawn").finished(run, 0)


def test_settings_cannot_be_changed_by_accident():
    modules = [importlib.import_module(f"tables.{path.stem}") for path in (ROOT / "tables").glob("*.py")]
    classes = {c for module in modules for c in vars(module).values() if dataclasses.is_dataclass(c)}
    ours = {c for c in classes if isinstance(c, type) and c.__module__.startswith("tables.")}
    assert len(ours) > 20
    for c in ours:
        with pytest.raises(dataclasses.FrozenInstanceError):
            object.__new__(c).anything = 1


def test_sources():
    paper = eval.sources_of("paper,clip=clip-l-14")
    assert paper == SOURCES["paper"] | {"clip": "clip-l-14"} and paper["swin"] == "swin-l"
    assert eval.sources_of("mini")["unet"] == "sd-mini"


# -- the paper's figures ----------------------------------------


# The paper's number of each row, and with how many other rows the row is compared.
PAPER: dict[int | str, tuple[list[float | None], list[int]]] = {
    1: ([0.6725, 0.6739, 0.6750, 0.6130, 0.6455, 0.6497, 0.6624, 0.6671, 0.6671, 0.6526, 0.6539, 0.6550],
        [1, 1, 2, 1, 1, 6, 1, 1, 2, 1, 1, 2]),
    2: ([0.6624, 0.6620, 0.6632, 0.6671], [1, 1, 1, 1]),
    7: ([0.6526, 0.6525, 0.6254, 0.6544] + [None] * 3, [1, 1, 1, 3, 1, 1, 3]),
    8: ([0.6879, 0.6900, 0.6917, None, None, None, 0.6497, None] + [None] * 7,
        [1, 1, 1, 1, 1, 2, 1, 1] + [2, 1, 1, 1, 1, 2, 2]),
    9: ([0.6750, 0.6497, 0.6671, 0.6550, 0.6785, 0.6887, 0.6854, 0.6787, 0.6732, 0.6792, 0.6900, 0.6901,
         0.6901, 0.6820, 0.6917], [0] * 4 + [2] * 6 + [3] * 4 + [4]),
    10: ([0.6900, 0.6899, 0.6905, 0.6917, 0.6898, 0.6909, 0.6878, None] + [None] * 7,
         [0] + [1] * 6 + [2] + [2, 1, 1, 1, 1, 2, 2]),
    11: ([0.6725, 0.6624, 0.6526, 0.6130, 0.6189, 0.5129] + [None] * 3, [1] * 5 + [2, 1, 1, 1]),
    "captions": ([None] * 3, [1, 4, 2]),
    "ceiling": ([None] * 4, [0, 1, 1, 1]),
    "curriculum": ([None] * 5, [0, 1, 1, 1, 4]),
    "dakl": ([None] * 12, [0, 0, 2, 1, 2] + [2, 1, 1, 1, 1, 2, 2]),
    "white-box": ([None] * 4, [1, 2, 5, 6]),
}  # fmt: skip
PAPER["paper-recipe"] = (PAPER[1][0] + [None] * 7, PAPER[1][1] + [2] * 3 + [1] * 4)


def test_the_papers_figures():
    def row(number: int, name: str) -> Row:
        return next(row for row in ROW_TABLES[number].rows if row.name == name)

    rows = {number: table.rows for number, table in ROW_TABLES.items()}
    assert {n: ([r.paper for r in some], [len(r.against) for r in some]) for n, some in rows.items()} == PAPER
    assert row(9, "CLIP + Swin").paper == 0.6887 and row(9, "U-Net + ViT").paper == 0.6732
    assert row(9, "CLIP + Swin + ViT").paper == 0.6901 and row(9, "U-Net + Swin + ViT").paper == 0.6820
    for r in ROW_TABLES[10].rows[1:7]:
        assert r.name == f"DAKL, k = {r.method.k:,}, gamma = {r.method.gamma:g}" and r.method.form == "exact"
    settings = [(r.method.k, r.method.gamma) for r in ROW_TABLES[10].rows[1:7]]
    assert settings == [(1_000, 1e-3), (5_000, 1e-3), *((10_000, g) for g in (1e-3, 1e-4, 1e-2, 1e-1))]
    assert ROW_TABLES[8].rows[2].method == ROW_TABLES[10].rows[3].method
    ensembles = [r for number in (8, 10, "dakl") for r in ROW_TABLES[number].rows]
    linear = [r.method for r in ensembles if "linear limit" in r.name]
    weighted = [(m.k, m.form) for m in linear if m.centroids == "weighted mean"]
    assert weighted == [(1_000, "linear"), (5_000, "linear")] * 3
    assert [(m.k, m.form) for m in linear if m.centroids == "nearest"] == [(None, "linear")] * 4
    by_name = [(r.name, r.method) for r in ensembles]
    for name, change in (("noise as", {"target_rows": "noise"}), ("no", {"target_rows": "none"})):
        assert by_name.count((f"DAKL, {name} target rows", DaklMethod(**change))) == 3
    assert by_name.count(("DAKL on the median", DaklMethod(average="median"))) == 3
    assert [name for name, table in ROW_TABLES.items() if table.needs] == ["ceiling"]
    knn = [r.method for r in ROW_TABLES[11].rows if "k-NN" in r.name]
    assert knn == [KnnMethod(), KnnMethod(True), PromptKnnMethod(), PromptKnnMethod(True)]
    for table in ROW_TABLES.values():
        names = [row.name for row in (*table.baselines, *table.rows)]
        assert len(set(names)) == len(names)
        assert all(other in names for row in table.rows for other in row.against)


# -- figures of merit ----------------------------------------


@pytest.mark.parametrize("df", [1, 2, 9, 100, 2999, 89_999])
def test_students_p(df: int):
    for t in (0.0, 0.3, 1.96, -4.0, 8.0):
        assert student_p(t, df) == pytest.approx(2 * scipy.stats.t.sf(abs(t), df), rel=1e-4)


def test_the_paired_test():
    rng = np.random.default_rng(0)
    other = [rng.normal(size=n) for n in (40, 50)]
    ours = [o + rng.normal(0.1, 0.5, len(o)) for o in other]
    found = paired_test(ours, other)
    oracle = scipy.stats.ttest_rel(np.concatenate(ours), np.concatenate(other))
    assert (found["t"], found["p"]) == pytest.approx((oracle.statistic, oracle.pvalue), rel=1e-4)
    assert found["per_seed"] == pytest.approx([(a - b).mean() for a, b in zip(ours, other, strict=True)])
    assert found["difference_95"] == pytest.approx(
        oracle.confidence_interval(0.95)[:], abs=0.02
    ) and found["n"] == 90
    same = paired_test(other, other)
    assert same["difference"] == 0 and same["p"] == pytest.approx(1)
    for a, b in ((2.0, 1.0), (1.0, 2.0)):  # no deviation at all: t has no number, and chance no part
        always = paired_test([np.full(10, a)], [np.full(10, b)])
        assert (always["difference"], always["t"], always["p"]) == (a - b, None, 0)


@pytest.mark.parametrize("values", [[0.7, 0.71], [0.01, -0.02, 0.05], [0.1, 0.3, 0.2, 0.2, 0.4]])
def test_intervals_and_tests_over_seeds(values: list[float]):
    theirs = scipy.stats.ttest_1samp(values, 0)
    assert student_interval(values) == pytest.approx(theirs.confidence_interval(0.95)[:], rel=1e-6)
    assert seeds_p(values) == pytest.approx(theirs.pvalue, rel=1e-4)
    assert student_interval(values[:1]) is None and seeds_p(values[:1]) is None
    assert seeds_p([0.5, 0.5]) is None


def test_holm_by_hand():
    """.01 x 4, .02 x 3, .03 x 2 (no less than the one before), .9."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_spearman_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 200), rng.normal(size=200)
    assert ranks(a) == pytest.approx(scipy.stats.rankdata(a))
    assert spearman(a, a + b) == pytest.approx(scipy.stats.spearmanr(a, a + b).statistic)
    found = rank_correlation(a, a + b)
    z, half = math.atanh(found["spearman"]), 1.96 * math.sqrt(1.06 / 197)  # Fisher's
    low, high = math.tanh(z - half), math.tanh(z + half)
    assert found["spearman_95"] == pytest.approx([low, high], abs=0.05 * (high - low))
    assert math.isnan(spearman(np.zeros(9), b[:9]))
    assert rank_correlation(np.zeros(9), b[:9]) == {"spearman": None, "spearman_95": None}


def test_percentiles_leave_out_a_few_undefined_draws():
    draws = np.append(np.arange(39.0), np.nan)
    assert percentiles(draws) == pytest.approx([0.025 * 38, 0.975 * 38]) and percentiles(draws[1:]) is None


def test_undrawn_share():
    assert undrawn_share("a pair of purple ghosts, mist", ["a pair of", "mist"]) == pytest.approx(4 / 6)
    assert undrawn_share("a car", []) == 0 and undrawn_share("car", ["car"]) == 1


def test_numbers_are_written_as_the_paper_writes_them():
    assert [short(x) for x in (0.6544, -0.01, 1.0, None)] == [".6544", "-.0100", "1.0000", ""]
    assert [short(x, True) for x in (0.00123, -0.5)] == ["+.0012", "-.5000"]
    assert [exhibit.p_text(p) for p in (None, 9.9e-5, 1e-4, 1.9e-4)] == ["", "< .0001", ".0001", ".0002"]


def test_a_markdown_table():
    assert markdown("a | b", [("x", 1), (None, 0.5)]) == "| a | b |\n|---|---|\n| x | 1 |\n|  | .5000 |"
    assert interval((0.5, -0.25), True) == "+.5000 to -.2500" and interval(None) == ""


def test_the_numbers_of_a_row():
    one, two = np.array([0.25, 0.75, 0.5]), np.array([1.0, 0.5, 0.0])
    row = summary_of([one, two + 0.25])
    assert (row["cosine"], row["per_seed"]) == (0.625, [0.5, 0.75])
    assert row["deviation_of_seeds"] == pytest.approx(0.125 * 2**0.5)
    assert 0.25 <= row["cosine_95"][0] < 0.625 < row["cosine_95"][1] <= 1.25
    assert summary_of([one])["deviation_of_seeds"] is None


RESULTS = sorted(path for path in (ROOT / "results").rglob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_results_are_the_text_of_their_numbers(path: Path):
    """After a change of wording write them again, by `path.write_text(text)` for the paths of RESULTS."""
    result = json.loads(path.with_suffix(".json").read_text())
    others = {"generated": judge.text_of, "plan": training.plan.text_of, "gpu": gpu.text_of}
    assert path.read_text() == others.get(path.stem.partition("-")[0], text_of)(result)


@pytest.mark.parametrize("number", [n for n in ROW_TABLES if (ROOT / f"results/table-{n}.json").exists()])
def test_results_are_of_the_rows_as_they_are_defined(number: int | str):
    table, result = ROW_TABLES[number], json.loads((ROOT / f"results/table-{number}.json").read_text())
    defined = [(row.name, row.paper, [run.name for run in row.runs], list(row.against))
               for row in (*table.baselines, *table.rows)]
    made = [(row["name"], row["paper"], row["runs"], [test["against"] for test in row["tests"]])
            for row in result["rows"][1:]]
    assert made == defined and (result["caption"], result["notes"]) == (table.caption, list(table.notes))


def test_other_results_are_of_their_rows_as_they_are_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rows(name: str) -> list[dict]:
        return json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]

    defined = [(row.name, row.paper) for row in rows_of(plan(tmp_path))]
    assert [(row["name"], row["paper"]) for row in rows("table-3")] == defined
    for name, value in {
        "caption_features": lambda plan: Features("caption", np.zeros((1, 1))),
        "black_box": lambda plan, backbone: Features(MODELS[backbone], np.zeros((1, 1))),
        "unet_levels": lambda plan, captions, timestep: (np.full((1, 6), timestep), [2, 1]),
    }.items():
        monkeypatch.setattr(readouts, name, value)
    features = {of.name: of.rows.max() for of in readouts.all_features(plan(tmp_path))}
    assert [row["name"] for row in rows("table-readouts")] == ["mean training embedding", *features]
    assert features == {name: int(name.partition("timestep ")[2] or 0) for name in features}


def test_rows_of_pretrained_networks_are_made_again_for_other_settings(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Counted(Method):
        version = 1

        def __call__(self, members: list[Member], plan: Plan, seed: int) -> tuple[np.ndarray, dict]:
            made.append(plan)
            return np.eye(3), {}

    made: list[Plan] = []
    usual, like = plan(tmp_path), SimpleNamespace(targets=lambda split: np.eye(3))
    other = {"data": "drawn"}, {"sources": SOURCES["paper"]}, {"options": {"image_size": 32}}
    for change in ({}, {}, *other, *other):
        row_cosines(dataclasses.replace(usual, **change), Row("x", (), method=Counted()), 0, like)
    assert made == [usual, *(dataclasses.replace(usual, **change) for change in other)]
    like.targets = lambda split: 2 * np.eye(3)  # other pairs
    row_cosines(usual, Row("x", (), method=Counted()), 0, like)
    assert len(made) == 5


def test_provenance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = exhibit.provenance(dataclasses.replace(plan(tmp_path), command="python eval.py --table 2"))
    assert made["numpy"] == np.__version__ and made["processor"]
    if (cpus := Path("/proc/cpuinfo")).exists() and "model name" in cpus.read_text():
        assert f": {made['processor']}\n" in cpus.read_text()
    text = exhibit.provenance_text(made | {"date": "2026-01-31", "commit": "0123456789abcdef"})
    assert text == (
        f"`python eval.py --table 2`, 2026-01-31, commit 0123456789, torch {torch.__version__}, numpy "
        f"{np.__version__}, {made['processor']}. Data: mini; seed 0."
    )
    monkeypatch.setattr(exhibit, "ROOT", tmp_path)  # no checkout
    assert exhibit.commit() is None
    command = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    subprocess.run([*command, "init", "-q"], check=True)
    assert exhibit.commit() is None
    subprocess.run([*command, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", exhibit.commit())


# -- bad input ----------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--table", ""], "choose from 1, 2"),
        (["--figure", ""], "choose from 4, 9, 10, 11, all"),
        (["--table", "12"], "choose from 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, budget, captions"),
        (["--table", "2,x"], "--table x"),
        (["--figure", "5"], "--figure 5"),
        (["--table", "2", "--seeds", "0,x"], "--seeds 0,x"),
        (["--table", "2", "--seeds", "1,1"], "--seeds 1,1"),
        (["--table", "2", "--seeds", "1" + 19 * "0"], "--seeds 1" + 19 * "0"),
        (["--table", "2", "--seed", "1"], "--seed: is set by each row"),
        (["--table", "2", "--out", "x"], "--out: is set by each row"),
        (["--table", "2", "--weights", "large"], "--weights large"),
        (["--table", "2", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--table", "2", "--epochs", "many"], "invalid int value: 'many'"),
        (["--table", "2", "--data", "nowhere"], "nowhere"),
        (["nowhere"], "nowhere: not a run of train.py"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], said: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert eval.main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
    assert not (tmp_path / "results").exists()


def test_runs_of_other_pairs_are_not_mixed(make, tmp_path: Path):
    folder = make("--table", "2", "--seeds", "0", *QUICK)
    p = Plan("mini", {}, (0,), folder / "runs", 1, "cpu", {})
    other = Member(folder / "runs" / "swin-plain-seed0")
    other.targets = lambda split: np.zeros((12, 384), np.float32)
    with pytest.raises(data.DataError, match="are not those of"):
        members_of(p, [RunName("swin", "mlc")], 0, other)


# -- the real thing ----------------------------------------


def eval_py(few_scenes: Path, folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "eval.py"), "--data", str(few_scenes), "--jobs", "2", *flags]
    return subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_table_7_goes_on_after_it_was_stopped(how, few_scenes: Path, tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    flags = shlex.split("--table 7 --seeds 0 --epochs 2 --batch-size 12 --val-size 12 --test-size 12")
    first = eval_py(few_scenes, tmp_path, *flags)
    runs = tmp_path / "runs" / f"tables-{few_scenes.name}"
    written = tmp_path / "results" / few_scenes.name / "table-7.json"
    while not (runs / "vit-plain-seed0" / "log.jsonl").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    os.kill(first.pid, how)
    first.wait()
    # After SIGKILL its training goes on, and the folder refuses another process until that has ended.
    for _ in range(20):
        second = eval_py(few_scenes, tmp_path, *flags)
        stderr = second.communicate()[1]
        if "another process uses this run" not in stderr:
            break
    assert second.returncode == 0, stderr
    result = json.loads(written.read_text())
    assert [row["paper"] for row in result["rows"] if row["paper"]] == [0.6526, 0.6525, 0.6254, 0.6544]
    for run in ("vit-plain", "vit-cl", "vit-lerac", "vit-cbs"):
        steps = [json.loads(line) for line in (runs / f"{run}-seed0" / "log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in steps if "loss" in e] == list(range(1, 11)), run
    third = eval_py(few_scenes, tmp_path, *flags)
    assert third.communicate()[1].count("test cosine") == 0
    assert json.loads(written.read_text()) == result


@pytest.mark.slow
def test_table_11_with_knn_and_blip(make):
    folder = make("--table", "11", "--seeds", "0", *QUICK)
    rows = {row["name"]: row for row in read(folder, "table-11")["rows"]}
    predictions = np.load(folder / "runs" / "blip-plain-seed0" / "predictions" / "test.npy")
    targets = np.load(folder / "runs" / "clip-plain-seed0" / "predictions" / "test-targets.npy")
    assert rows["BLIP"]["cosine"] == pytest.approx(cosines(predictions, targets).mean())
    assert rows["CLIP + k-NN"]["chose"][0]["k"] in (1, 2, 5, 10, 20, 50)
    near = {name: row["cosine"] for name, row in rows.items() if "k-NN" in name}
    # The image half of a run with --train-blocks 0 is the pretrained one.
    assert near["CLIP + k-NN, prompts"] == pytest.approx(near["CLIP pretrained + k-NN, prompts"])
    assert len(near) == 4 and near["CLIP + k-NN"] != near["CLIP pretrained + k-NN"]
