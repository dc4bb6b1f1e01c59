"""Table crossed: two generators and their pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_tables import QUICK, Here, make, read, trained_here  # noqa: F401  (fixtures)

import eval
import weights
from mini import scenes
from tables import crossed
from tables.cells import MEAN, part
from tables.crossed import CELLS, CONTRASTS, READERS
from tables.exhibit import provenance
from tables.runs import SOURCES, Plan
from training.config import TrainConfig, resolve


def plan_of(pictures: Path, second: Path) -> Plan:
    options = {"val_size": 6, "test_size": 6}
    return Plan(str(pictures), SOURCES["mini"], (0,), Path("runs"), 1, "cpu", options, second=second)


def test_cells_differ_in_their_pictures_and_their_reader_alone():
    plan = plan_of(Path("a"), Path("b"))
    configs = {cell: vars(plan.config(run, 0)) for cell, run in CELLS.items()}
    for cell, config in configs.items():
        assert config["data"] == ("a" if cell.endswith("A") else "b/generated")
        assert (config["weights"] == "b/sd-mini") == cell.startswith("U-Net B")
    first = {"data", "record_cosines"}  # recorded by the runs that other tables use too
    for reader in READERS:
        a, b = configs[f"{reader} on A"], configs[f"{reader} on B"]
        assert {name for name in a if a[name] != b[name]} <= first
    a, b = configs["U-Net A on A"], configs["U-Net B on A"]
    assert {name for name in a if a[name] != b[name]} == {"weights"}
    assert a["unet_features"] == "levels" and a["captions"] == "empty" and a["head_start"] == "ridge"


def test_a_folder_has_the_defaults_of_its_name():
    named, folder = (resolve(TrainConfig(weights=name)) for name in ("sd-mini", "x/sd-mini"))
    assert vars(named) | {"weights": ""} == vars(folder) | {"weights": ""}
    assert resolve(TrainConfig(weights="x/sd-mini-copy")).image_size == 256


def test_contrasts_by_hand():
    """A U-Net reads its own pictures better by .03 and .01; every reader reads those of B better by .2."""
    cosines = {
        "U-Net A on A": 0.53, "U-Net B on A": 0.50, "U-Net A on B": 0.70, "U-Net B on B": 0.71,
        "Swin on A": 0.52, "Swin on B": 0.74, "ViT on A": 0.40, "ViT on B": 0.41, MEAN: 0.3,
    }  # fmt: skip

    def of(seed: int) -> dict[str, np.ndarray]:
        return {cell: np.array([value, value + 0.1 * seed]) for cell, value in cosines.items()}

    result = part((0, 1), CONTRASTS, of)
    found = {test["name"]: test["difference"] for test in result["contrasts"]}
    assert list(found.values()) == pytest.approx([0.04, 0.05, 0.01, -0.04, -0.02, -0.03])
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["Swin on B"]["per_seed"] == pytest.approx([0.74, 0.79])
    for name, (plus, minus) in CONTRASTS.items():  # each cell of a name has the sign that it has there
        assert len(plus) == len(minus) and all(cell in name for cell in (*plus, *minus))
    text = "".join(crossed.part_text(result))
    assert "| Swin | .5450 |" in text and "| +.0400 |" in text


def test_the_generators_are_described_by_their_cards(tmp_path: Path):
    """Those of the embedded generator; of a folder those that it has, with nothing for a damaged one."""
    ours = crossed.facts("sd-mini", "mini")
    assert "vae --parts 48 --steps 8000" in ours["autoencoder"] and "--steps 10000" in ours["U-Net"]
    mini = json.loads((ROOT / "mini" / "generated" / "card.json").read_text())["found by the probe"]
    assert ours["subjects, of two in a picture"] == mini["two subjects"]["subject"]
    assert [fact for fact, value in ours.items() if not value] == ["the autoencoder was trained on"]  # a CPU
    for name, card in (("unet", {"held_out_loss": 0.125}), ("pictures", {"found by the probe": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text(json.dumps(card))
    found = crossed.facts(str(tmp_path), str(tmp_path / "pictures"))
    assert {fact: v for fact, v in found.items() if v is not None} == {"its loss on held-out pictures": 0.125}


def test_pictures_of_other_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for name, seed in (("a", 0), ("b/generated", 0), ("c/generated", 1)):
        scenes.build(tmp_path / name, parts=1, per_part=20, seed=seed, progress=False)
    a, same, other = tmp_path / "a", plan_of(tmp_path / "a", tmp_path / "b"), tmp_path / "c"
    crossed.require_same_pairs(same)
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: pytest.fail("trained"))
    flags = ["--data", str(a), "--second", str(other), "--val-size", "6", "--test-size", "6"]
    assert eval.main(["--table", "crossed", "--device", "cpu", *flags]) == 2
    assert "c/generated: its prompts or their split are not those of" in capsys.readouterr().err


def test_both_parts_have_their_own_cosines_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained runs with the seeds of the plan, frozen features with five; the fingerprints of both U-Nets."""

    def known(offset: float) -> Callable[..., dict[str, np.ndarray]]:
        def of(plan: Plan, cells: dict, seed: int) -> dict[str, np.ndarray]:
            return {c: np.array([0.01 * i, 0.03 * i]) + offset + seed for i, c in enumerate([MEAN, *cells])}

        return of

    monkeypatch.setattr(crossed, "trained_cosines", known(0.5))
    monkeypatch.setattr(crossed, "frozen_cosines", known(0.25))
    shutil.copytree(ROOT / "mini" / "sd-mini", tmp_path / "sd-mini")
    ours = crossed.facts("sd-mini", "mini")
    pictures = [fact for fact, (card, *_) in crossed.FACTS.items() if card == "pictures"]  # B has none here
    plan = plan_of(Path("mini"), tmp_path)
    result = crossed.compute(plan)
    assert result["generators"] == {"A": ours, "B": ours | dict.fromkeys(pictures)}
    text = crossed.text(provenance(plan) | result)
    assert "| its loss on held-out pictures | .0991 | .0991 |" in text
    assert "| their places | .9739 |  |" in text
    for i, name in enumerate([MEAN, *CELLS]):
        trained, frozen = result["rows"][i], result["frozen"]["rows"][i]
        assert trained["name"] == frozen["name"] == name
        assert trained["per_seed"] == pytest.approx([0.5 + 0.02 * i])
        assert frozen["per_seed"] == pytest.approx([0.25 + 0.02 * i + seed for seed in range(5)])
    assert result["unets"]["A"] == result["unets"]["B"] == weights.fingerprint("unet", "sd-mini")
    other = load_file(path := next((tmp_path / "sd-mini" / "unet").glob("*.safetensors")))
    save_file({name: value + 1 for name, value in other.items()}, path)
    changed = crossed.compute(plan_of(Path("mini"), tmp_path))["unets"]
    assert changed["A"] == result["unets"]["A"] != changed["B"]


@pytest.mark.slow
def test_a_copy_of_the_generator_reads_as_the_generator(make: Callable[..., Path], few_scenes, tmp_path):  # noqa: F811
    """With a copy of sd-mini and of the pictures all contrasts between the generators are 0."""
    shutil.copytree(ROOT / "mini" / "sd-mini", tmp_path / "sd-mini")
    shutil.copytree(few_scenes, tmp_path / "generated")
    folder = make("--table", "crossed", "--second", str(tmp_path), "--seeds", "0", *QUICK)
    assert len(Here.started) == 8
    result = read(folder, "table-crossed")
    for kind in (result, result["frozen"]):
        rows = {row["name"]: row["per_seed"] for row in kind["rows"]}
        for reader in READERS:
            assert rows[f"{reader} on A"] == rows[f"{reader} on B"]
        assert rows["U-Net A on A"] == rows["U-Net B on A"] != rows["Swin on A"]
        assert [test["difference"] for test in kind["contrasts"][:2]] == [0, 0]
    config = json.loads((folder / "runs" / "unet-second-on-second-seed0" / "config.json").read_text())
    assert result["unets"]["A"] == result["unets"]["B"]
    assert config["weights"] == str(tmp_path / "sd-mini") and config["image_size"] == 64
