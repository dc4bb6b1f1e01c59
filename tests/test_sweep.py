"""The sweep of recipes: axis by axis on validation, of several lengths the shortest within FLAT."""

import json
from pathlib import Path

import pytest

from tables import sweep
from tables.runs import SOURCES, TUNED, Plan, last_quarter
from training.config import CHOSEN

COSINE = {  # of validation, by field and value; what they lack adds nothing
    "lr": {1e-3: 0.03, 2e-3: 0.01}, "head_lr": {2e-4: 0.02}, "layer_decay": {0.7: 0.001},
    "epochs": {6: 0.0015}, "lerac_epochs": {0.08: 0.004}, "cbs_every": {0.2: -0.1}, "easy_share": {0.8: 0.01},
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, list]:
    trained = []

    def train(plan: Plan, runs: list) -> set:
        for run in runs:
            trained.append(run)
            worth = sum(COSINE.get(name, {}).get(value, 0) for name, value in run.changes)
            curve = [0.5, 0.6, 0.7 + worth - 0.0004, 0.7 + worth]
            for seed, more in zip(plan.seeds, (-0.01, 0.01), strict=True):
                folder = plan.run_folder(run, seed)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.json").write_text(json.dumps(vars(plan.config(run, seed))))
                entries = [{"step": 188 * k, "val_cosine": value + more} for k, value in enumerate(curve, 1)]
                lines = [{"step": 1, "loss": 1.0}, *entries]
                (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return set()

    monkeypatch.setattr(sweep, "train_missing", train)
    plan = Plan("mini", SOURCES["mini"], (100, 101), tmp_path, 1, "cpu", {}, "python eval.py --table sweep")
    return sweep.compute(plan), trained


def test_each_axis_is_tried_with_the_best_of_those_before_it(made: tuple[dict, list]):
    result, trained = made
    best = {"lr": 1e-3, "head_lr": 2e-4, "layer_decay": 0.7, "epochs": 4}
    assert result["chosen"]["U-Net"] == result["chosen"]["ViT"] == best
    thresholds = {"chunks": "thresholds", "easy_share": 0.8, "hard_share": 0.1}
    assert result["chosen"]["ViT, cl"] == best | thresholds
    assert result["chosen"]["ViT, lerac"]["lerac_epochs"] == 0.08
    assert result["chosen"]["ViT, lerac"]["layer_decay"] == 1.0  # LeRaC sets the rates of all layers
    of_backbones = [dict(run.changes) for run in trained if run.recipe == "mlc"]
    assert {(c["layer_decay"], c["epochs"]) for c in of_backbones[:24]} == {(1.0, 4)}  # the first axis
    last = [run for run in trained if run.recipe == "mlc" and dict(run.changes)["epochs"] == 6]
    assert last and all(dict(run.changes) == best | {"epochs": 6} for run in last)
    rows = [row for row in result["rows"] if row["sweep"] == "Swin" and row["chosen"]]
    assert [row["steps"] for row in rows] == [752] * 3
    assert rows[0]["last_quarter"] == pytest.approx(0.0004)
    assert rows[0]["val_by_epoch"] == pytest.approx([0.5, 0.6, 0.7496, 0.75]) and len(rows) == 3
    text = sweep.text(result | {"command": "x", "date": "today", "seeds": [100], "data": "mini"})
    assert "| Swin | lr 0.001, head_lr 0.0002 | 752 | .7500 | +.0004 | cpu | chosen |" in text


@pytest.mark.parametrize("curve, gain", [
    ([0.1, 0.2, 0.4], 0.2), ([0.1, 0.2, 0.4, 0.5], 0.1), ([0.1, 0.2, 0.4, 0.5, 0.6, 0.65], 0.05),
    ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9], 0.4),
])  # fmt: skip
def test_the_gain_in_the_last_quarter(curve: list[float], gain: float):
    assert last_quarter(curve) == pytest.approx(gain)


def test_the_defaults_of_the_miniatures_are_those_of_the_results_file():
    result = json.loads((Path(__file__).parent.parent / "results" / "table-sweep.json").read_text())
    made, chosen = [(row["sweep"], row["values"]) for row in result["rows"]], result["chosen"]
    tried = [(name, values) for name, s in sweep.sweeps().items() for axis in s.axes for values in axis]
    assert sorted(map(str, made)) == sorted(map(str, tried))
    names = {"CLIP": "clip-mini", "U-Net": "sd-mini", "Swin": "swin-mini", "ViT": "vit-mini"}
    assert {names[title]: values for title, values in chosen.items() if title in names} == CHOSEN
    for recipe, values in TUNED.items():
        head = {"head_lr": chosen["ViT"]["head_lr"]} if recipe == "lerac" else {}
        assert values == dict(chosen[f"ViT, {recipe}"].items() - chosen["ViT"].items()) | head
