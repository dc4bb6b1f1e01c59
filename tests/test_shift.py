"""The table "shift": the check of overlapping prompts, its numbers by hand, and the whole on few scenes."""

import dataclasses
import json
import shlex
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_here
from PIL import ImageOps
from test_baseline_rows import Known, by_hand, unit
from test_tables import make, read, trained_here  # noqa: F401  (fixtures)

import data
import reverse_sd
from tables import shift
from tables.exhibit import short
from tables.methods import Member, tensor
from tables.runs import RECIPES, SOURCES, Plan, RunName
from tables.shift import READERS, Shift, cosines_of, require_unseen, require_unseen_prompts, shifts_of
from training.config import TrainConfig
from training.metrics import cosines

SMALL = {"val_size": 12, "test_size": 12}


def plan_of(pictures: Path, folder: Path) -> Plan:
    return Plan(str(pictures), SOURCES["mini"], (0,), folder, 1, "cpu", dict(SMALL))


@pytest.fixture(scope="module")
def negatives(few_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few scenes in the complementary colours: other pictures of the same prompts, in the same order."""
    folder, pairs = tmp_path_factory.mktemp("negatives"), data.read_pairs(few_scenes)
    for i in range(len(pairs)):
        ImageOps.invert(pairs.image(i).convert("RGB")).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(pairs.prompts[i])
    return folder


def test_pictures_of_another_guidance_are_others(few_scenes: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shift, "STEPS", 2)
    weak, strong = (shift.drawn(plan_of(few_scenes, tmp_path), ["a red cat"], scale) for scale in (2.0, 15.0))
    assert weak.shape == strong.shape == (1, 64, 64, 3) and (weak != strong).any()
    assert (shift.drawn(plan_of(few_scenes, tmp_path), ["a red cat"], 2.0) == weak).all()


@pytest.fixture
def two_sets(negatives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in ("mlc-drawn", "captions-empty-drawn"):
        monkeypatch.setitem(RECIPES, recipe, RECIPES[recipe] | {"data": str(negatives)})


# -- no test prompt was seen ----------------------------------------


def test_a_test_prompt_that_was_seen_is_refused():
    require_unseen(["a cat", "a dog"], ["a bird"], "drawn")
    with pytest.raises(data.DataError, match='1 test prompts of drawn .* e.g. "a red cat"'):
        require_unseen(["A  red Cat", "a dog"], ["a red cat", "a bird"], "drawn")


def test_other_pictures_need_the_split_of_these(
    few_scenes: Path, two_sets: None, tmp_path: Path, monkeypatch
):
    require_unseen_prompts(plan_of(few_scenes, tmp_path))
    pairs = data.read_pairs(few_scenes)
    for i in range(len(pairs)):  # the same pairs in the opposite order
        pairs.image(i).save(tmp_path / f"{99 - i:03d}.png")
        (tmp_path / f"{99 - i:03d}.txt").write_text(pairs.prompts[i])
    monkeypatch.setitem(RECIPES, "mlc-drawn", {"heads": 3, "data": str(tmp_path)})
    with pytest.raises(
        data.DataError, match="test prompts of .* are training or validation prompts of the s"
    ):
        require_unseen_prompts(plan_of(few_scenes, tmp_path))


def test_the_shifts_of_the_data(tmp_path: Path):
    mini = [s.name for s in shifts_of(plan_of(Path("mini"), tmp_path))]
    assert mini == [
        "mini → mini, no shift",
        "mini → drawn",
        "drawn → mini",
        "mini → guidance 2",
        "mini → guidance 15",
    ]
    drawn = [s.name for s in shifts_of(plan_of(Path("drawn"), tmp_path))]
    assert drawn == ["drawn → drawn, no shift", "drawn → guidance 2", "drawn → guidance 15"]


# -- the numbers ----------------------------------------


def test_the_numbers_of_a_shift_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fitted on the source's training predictions; target rows of the target; labels of either."""
    source, target, seen = Known(1, noise=2), Known(2, noise=0.1), Known(3, noise=1.5).arrays
    source.folder, target.folder = tmp_path / "source", tmp_path / "target"
    monkeypatch.setattr(shift, "members_of", lambda plan, runs, seed: [source, target])
    monkeypatch.setattr(shift, "predicted_for_run", lambda plan, a, b: {s: seen[s] for s in ("val", "test")})
    plan = plan_of(Path("mini"), tmp_path)
    found = cosines_of(plan, "Swin", Shift("", "", "-drawn"), 0)
    truth = source.truth["test"]
    mean = unit(source.truth["train"].mean(axis=0, keepdims=True))
    assert found["", "mean embedding"] == pytest.approx(cosines(mean, truth), abs=1e-6)
    assert found["", "as predicted"] == pytest.approx(cosines(seen["test"], truth))
    assert found["", "trained on the target"] == pytest.approx(cosines(target.arrays["test"], truth))

    rows, sources = tensor(seen["test"]), [tensor(source.arrays["train"]), tensor(source.truth["train"])]
    domain, labelled = torch.cat([tensor(seen["val"]), rows]), {"source": source.arrays, "target": seen}
    for labels, arrays in labelled.items():
        validation = tensor(arrays["val"]), tensor(source.truth["val"])
        for name, target_rows in (("DAKL", domain), ("DAKL, no target rows", domain[:0])):
            dakl = reverse_sd.Dakl(form="linear").fit(*sources, target_rows, validation)
            expected = cosines(dakl.predict(rows).numpy(), truth)
            assert found[labels, name] == pytest.approx(expected, abs=1e-6), (labels, name)
        x = {"train": source.arrays["train"], "val": arrays["val"], "test": seen["test"]}
        ridge = by_hand({split: array.astype(np.float64) for split, array in x.items()}, source.truth)
        assert found[labels, "ridge"] == pytest.approx(cosines(ridge, truth), abs=1e-5)
    methods = [found["source", name] for name in ("DAKL", "DAKL, noise", "DAKL, no target rows", "ridge")]
    assert all(abs(a - b).max() > 1e-3 for a, b in combinations(methods, 2))
    assert found["source", "DAKL, exact"] == pytest.approx(methods[0], abs=0.01)


def test_the_pictures_of_a_guidance_are_compared_with_their_own_prompts(tmp_path: Path, monkeypatch):
    """Also where only some of the prompts are drawn: a reader of all that is in a picture is right."""
    source, plan, run = Known(1), plan_of(Path("mini"), tmp_path), RunName("swin", "mlc")
    prompts = {split: [f"{split} {i}" for i in range(len(source.truth[split]))] for split in ("val", "test")}
    listed = {split: [{"prompt": prompt} for prompt in of] for split, of in prompts.items()}
    (plan.run_folder(run, 0) / "predictions").mkdir(parents=True)
    (plan.run_folder(run, 0) / "predictions" / "rows.json").write_text(json.dumps(listed))
    meant = {prompt: source.truth[split][i] for split, of in prompts.items() for i, prompt in enumerate(of)}
    monkeypatch.setattr(shift, "PICTURES", 7)
    monkeypatch.setattr(shift, "members_of", lambda plan, runs, seed: [source])
    monkeypatch.setattr(shift, "drawn", lambda plan, prompts, guidance: prompts)
    monkeypatch.setattr(shift, "predicted", lambda plan, seed, of, run: np.stack([meant[p] for p in of]))
    found = cosines_of(plan, "Swin", Shift("", "", 2.0), 0)
    assert found["", "as predicted"] == pytest.approx(np.ones(7))
    mean = unit(source.truth["train"].mean(axis=0, keepdims=True))
    rows = shift.spread(source.truth["test"], 7)
    assert found["", "mean embedding"] == pytest.approx(cosines(mean, np.stack(rows)), abs=1e-6)


def test_the_table_of_known_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each row and comparison holds its own reader, shift, labels and methods, seed by seed."""
    plan = dataclasses.replace(plan_of(Path("mini"), tmp_path), seeds=(0, 1))
    shifts, labels = shifts_of(plan), ("source", "target")
    keys = [("", name) for name in shift.REFERENCES] + list(product(labels, shift.METHODS))
    places = ((reader, of.name, *key) for reader, of, key in product(READERS, shifts, keys))
    value = {place: i / 1000 for i, place in enumerate(places)}

    def known(plan: Plan, reader: str, of: Shift, seed: int) -> dict[tuple[str, str], np.ndarray]:
        spread = np.array([0, 0.001, 0.002]) + 0.2 * seed
        return {key: (1 + (key[1] == "ridge") * seed) * value[reader, of.name, *key] + spread for key in keys}

    monkeypatch.setattr(shift, "cosines_of", known)
    monkeypatch.setattr(shift, "saved_config", lambda folder: TrainConfig(data=folder.name, epochs=7))
    monkeypatch.setattr(shift, "Member", lambda folder: Known(0))
    result = shift.compute(plan)
    for row in result["rows"]:
        at = value[row["reader"], row["shift"], row["labels"], row["method"]]
        second = at * (2 if row["method"] == "ridge" else 1) + 0.201
        assert row["per_seed"] == pytest.approx([at + 0.001, second]) and row["n_test"] == [3, 3]
    assert len(result["rows"]) == len(value)
    for test in result["tests"]:
        other = test["labels"] if test["against"] != "as predicted" else ""
        a, b = (value[test["reader"], test["shift"], *key] for key in (
            (test["labels"], test["method"]), (other, test["against"])))  # fmt: skip
        twice = (1 + (name == "ridge") for name in (test["method"], test["against"]))
        assert test["per_seed"] == pytest.approx([a - b, next(twice) * a - next(twice) * b])
    assert len(result["tests"]) == len(READERS) * len(shifts) * 2 * len(shift.COMPARISONS)
    assert result["n_train"] == [60, 60]
    assert {name: run["data"] for name, run in result["runs"].items()} == {
        run.name: f"{run.name}-seed0" for run in shift.RUNS
    }
    text = shift.text(result | {"seeds": [0, 1], "command": "", "date": "", "data": "mini"})
    first = value["Swin", "mini → drawn", "source", "ridge"]
    row = next(line for line in text.splitlines() if line.startswith("| Swin | mini → drawn | source |"))
    assert short(1.5 * first + 0.101) in row.split(" | ")
    monkeypatch.setattr(shift, "shifts_of", lambda plan: shifts[:1])
    alone = shift.compute(dataclasses.replace(plan, seeds=(0,)))["rows"]
    rows = [row for row in result["rows"] if row["shift"] == shifts[0].name]
    assert [row["per_seed"] for row in alone] == [row["per_seed"][:1] for row in rows]


def test_a_run_predicts_for_the_pictures_of_another(few_scenes: Path, cache: Path, negatives: Path, tmp_path):
    run = train_here(few_scenes, tmp_path / "run", "--backbone", "swin", "--train-blocks", "0")
    config = json.loads((run / "config.json").read_text()) | {"data": str(negatives)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for split in ("val", "test"):
        own, theirs = (
            shift.predicted_for_run(plan_of(few_scenes, tmp_path), run, of)[split] for of in (run, tmp_path)
        )
        assert own == pytest.approx(Member(run).predicted(split), abs=1e-5)
        assert own.shape == theirs.shape and abs(own - theirs).max() > 0.01


@pytest.mark.slow
def test_the_table_on_few_scenes(make, few_scenes: Path, two_sets: None, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shift, "STEPS", 2)
    monkeypatch.setattr(shift, "PICTURES", 8)
    flags = shlex.split("--table shift --seeds 0,1 --epochs 1 --batch-size 12 --val-size 12 --test-size 12")
    folder = make(*flags)
    result = read(folder, "table-shift")
    assert len(result["runs"]) == 4 and result["runs"]["swin-mlc-drawn"]["data"].endswith("negatives0")
    rows = {(r["reader"], r["shift"], r["labels"], r["method"]): r for r in result["rows"]}
    names = [s.name for s in shifts_of(plan_of(few_scenes, folder))]
    for reader, (backbone, recipe) in READERS.items():

        def own(end: str, name: str = f"{backbone}-{recipe}") -> list[float]:
            folders = [folder / "runs" / f"{name}{end}-seed{seed}" for seed in (0, 1)]
            return [json.loads((f / "result.json").read_text())["test_cosine"] for f in folders]

        ours, theirs = own(""), own("-drawn")
        assert rows[reader, names[0], "", "as predicted"]["per_seed"] == pytest.approx(ours)
        assert rows[reader, names[1], "", "trained on the target"]["per_seed"] == pytest.approx(theirs)
        assert rows[reader, names[2], "", "trained on the target"]["per_seed"] == pytest.approx(ours)
        assert rows[reader, names[1], "", "as predicted"]["per_seed"] != pytest.approx(ours, abs=1e-3)
        assert rows[reader, names[3], "", "as predicted"]["n_test"] == [8, 8]
        # The pictures of the target's run, read again, are those that it was evaluated on.
        run = folder / "runs" / f"{backbone}-{recipe}-seed0"
        again = shift.predicted_for_run(plan_of(few_scenes, folder), run, run)["test"]
        assert again == pytest.approx(Member(run).predicted("test"), abs=1e-5)
    assert len(result["tests"]) == len(READERS) * len(names) * 2 * len(shift.COMPARISONS)
    kept = sorted((folder / "runs" / "kept").glob("guidance-*.npy"))
    assert len(kept) == 8  # two scales, two seeds, validation and test
    text = (folder / "results" / "table-shift.md").read_text()
    assert "| DAKL − DAKL, noise |" in text and f"| Swin | {names[1]} | source |" in text
    saved = [path.stat().st_mtime_ns for path in kept]
    make(*flags)
    assert [path.stat().st_mtime_ns for path in kept] == saved and read(folder, "table-shift") == result


def test_recipes_on_the_other_pictures(tmp_path: Path):
    plan = dataclasses.replace(plan_of(Path("mini"), tmp_path), options={})
    configs = [plan.config(run, 0) for run in shift.RUNS]
    assert [config.data for config in configs] == ["mini", "drawn"] * 2
    assert [config.captions for config in configs] == ["empty", "empty", None, None]
    assert RunName("swin", "mlc-drawn") in shift.RUNS
