"""Tables probe and difficulty: statistics by hand and on synthetic data, exchanged negatives, small runs."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tables import QUICK, make, read, trained_here, undrawn_of  # noqa: F401  (fixtures)

from mini import drawbench, naming, scenes
from tables import difficulty, generation, judges
from tables.probe import default_views
from tables.registry import EXHIBITS
from tables.runs import RunName
from training.metrics import student_interval

# -- exchanged negatives ----------------------------------------


def test_exchanged_drawings_differ_in_exactly_one_label_and_in_pixels():
    chosen = [scenes.candidate(11, index, truthful=True) for index in range(150)]
    made = judges.exchanged_scenes(chosen, np.random.default_rng(0))
    asked = sum(len(set(naming.named_labels(scene.said))) for scene in chosen)
    assert len(made) > 0.98 * asked  # hardly a label is without an alternative
    assert {label[0] for _, label, _ in made} == set(naming.TABLES)
    for i, label, scene in made:
        old, new = (Counter(naming.drawn_labels(view)) for view in (chosen[i].drawn, scene.drawn))
        ((slot, key),) = (new - old).elements()
        assert list((old - new).elements()) == [label] and slot == label[0] and key != label[1]
        assert (scene.prompt, scene.said, scene.seed) == (
            chosen[i].prompt, chosen[i].said, chosen[i].seed,
        )  # fmt: skip
        assert label not in new and scene.drawn in judges.exchanges(chosen[i].said, label)
        if scene.drawn.place in scenes.INDOORS:
            assert scene.drawn.light in (None, *scenes.EVERYWHERE)
    for i, _, scene in made[:40]:
        assert scenes.render(scene).tobytes() != scenes.render(chosen[i]).tobytes()


def test_a_thing_keeps_its_colour_when_its_subject_is_exchanged():
    view = scenes.View((scenes.Thing("heart"),), place="snow")  # hearts are red unless a colour is named
    for exchanged in judges.exchanges(view, ("subject", "heart")):
        (thing,) = exchanged.things
        assert thing.colour == "red" and thing.subject != "heart" and exchanged.place == "snow"
    things = scenes.Thing("cat", "red"), scenes.Thing("star", "blue")
    two = scenes.View(things, place="snow", light="night")
    colours = {view.things[0].colour for view in judges.exchanges(two, ("colour", "red"))}
    assert colours == set(scenes.COLOURS) - {"red", "blue"}


# -- rates ----------------------------------------


def test_rogan_gladen_by_hand():
    # Of 100 labels 80 are shown: .9 * 80 + .2 * 20 = 76 are found.
    assert judges.rogan_gladen(0.76, 0.9, 0.8) == pytest.approx(0.8)
    assert judges.rogan_gladen(np.array([0.76, 0.05, 0.99]), 0.9, 0.8) == pytest.approx(
        [0.8, -15 / 70, 79 / 70]
    )
    assert np.isnan(judges.rogan_gladen(0.5, 0.3, 0.7))  # no better than chance


def test_the_interval_of_a_corrected_share_covers_the_truth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judges, "RESAMPLES", 200)
    rng, values, covered = np.random.default_rng(0), [], 0

    def answers(p: float) -> dict[str, np.ndarray]:
        return {"colour": np.stack([rng.random(150) < p, np.ones(150)], axis=1).astype(float)}

    for _ in range(100):
        rates = judges.Calibration({"drawing": answers(0.7)}, {"drawing": answers(0.1)}, {})
        found = answers(0.6 * 0.7 + 0.4 * 0.1)["colour"]  # 60 % are shown
        value, (low, high) = rates.corrected("colour", found, "drawing")
        values.append(value)
        covered += low < 0.6 < high
    assert np.mean(values) == pytest.approx(0.6, abs=0.02) and 88 <= covered <= 100
    assert rates.corrected("style", found, "drawing") == (None, None)
    right, wrong = (np.array([(1, 1)] * n + [(0, 1)] * (100 - n), float) for n in (30, 25))
    rates = judges.Calibration({"drawing": {"colour": right}}, {"drawing": {"colour": wrong[::-1]}}, {})
    assert rates.corrected("colour", found, "drawing") == (None, None)  # better than chance by luck
    right[:] = 1
    value, _ = rates.corrected("colour", found, "drawing")
    assert value == pytest.approx((found[:, 0].mean() - 0.25) / 0.75)


def test_kappa_by_hand():
    a = np.array([1] * 25 + [0] * 25)
    b = np.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    assert judges.kappa(a, b) == pytest.approx(0.4)  # .7 observed, .5 by chance
    assert judges.kappa(np.ones(3), np.ones(3)) is None


def test_verdicts_undrawn_by_hand():
    scene = scenes.Scene("", (), (), *[scenes.View((scenes.Thing("cat", "red"),), place=place)
                                       for place in ("snow", "desert")], 0)  # fmt: skip
    cat, red, snow = ("subject", "cat"), ("colour", "red"), ("place", "snow")
    found = [{cat: True, red: False, snow: False}, {cat: True, red: True, snow: True}]
    rows = judges.undrawn_rows(found, [scene, scene])
    assert (rows["all"]["verdicts"], rows["all"]["right"], rows["all"]["detected"]) == (2, 0.5, 0.5)
    assert (rows["colour"]["right"], rows["colour"]["detected"]) == (0, None)
    assert (rows["place"]["right"], rows["place"]["detected"]) == (1, 0.5)


def test_what_two_probes_find_by_hand():
    one, two = scenes.Thing("cat", "red", None), scenes.Thing("star", "blue", None)
    views = [scenes.View((one,)), scenes.View((one,)), scenes.View((one, two)), scenes.View((one,))]
    labels = ("subject", "cat"), ("colour", "red")
    first = [dict(zip(labels, of, strict=True)) for of in ((1, 1), (0, 0), (1, 1), (1, 0))]
    second = [dict(zip(labels, of, strict=True)) for of in ((1, 1), (1, 0), (0, 0), (1, 1))]

    def corrected(slot: str, counts: np.ndarray, form: str) -> tuple:
        return f"{slot}, {form}", counts.tolist()

    of = SimpleNamespace(corrected=corrected)
    found = {"probe": first, "second": second}
    rows = judges.found_rows(found, views, {1: {"probe": of, "second": of}}, "drawing")
    subject, colour = rows
    assert [subject[key] for key in ("things", "kind", "labels")] == [1, "subject", 3]
    assert subject["found"] == {"probe": pytest.approx(2 / 3), "second": 1}
    assert subject["kappa"] == pytest.approx(0) and colour["kind"] == "colour"
    assert colour["found"] == {"probe": pytest.approx(1 / 3), "second": pytest.approx(2 / 3)}
    assert colour["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert subject["corrected"]["probe"] == "subject, drawing"
    assert subject["corrected_95"]["probe"] == [[1, 1], [0, 1], [1, 1]]


def test_rates_by_hand():
    def of(*counts: tuple[int, int]) -> judges.Counts:
        return {"colour": np.array(counts, float)}

    rates = judges.Calibration({"drawing": of((1, 2), (2, 2))}, {"drawing": of((0, 1), (1, 3))}, of((1, 2)))
    rows = [judges.rate_rows({2: {"probe": rates}}, {(2, "probe"): left})[0] for left in (of((0, 3)), {})]
    numbers = {"exchanged, drawing": 4, "another prompt": 2, "left out": 3}
    assert rows[0] == {"probe": "probe", "things": 2, "kind": "colour", "drawn": 4} | {
        "sensitivity": {"drawing": 3 / 4}, "not drawn": numbers,
        "specificity": {"exchanged, drawing": 3 / 4, "another prompt": 1 / 2, "left out": 1},
    }  # fmt: skip
    assert [list(row["specificity"]) for row in rows] == [list(numbers), list(numbers)[:2]]


def test_the_degraded_forms_of_pictures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(naming, "reconstructed", lambda pictures, device: 255 - pictures)
    pictures = np.stack([np.full((3, 64, 64), level, np.uint8) for level in (0, 100, 200, 250)])
    forms = judges.forms_of(pictures, "cpu")
    assert list(forms) == ["drawing", "autoencoder", "noise", "blend"] and forms["drawing"] is pictures
    assert np.array_equal(forms["autoencoder"], 255 - pictures)
    assert np.unique(forms["blend"], axis=2)[:, 0, :, 0].tolist() == [[60], [145], [140], [205]]
    noisy = forms["noise"].astype(float)
    assert (noisy[1].mean(), noisy[1].std()) == pytest.approx((100, judges.NOISE), abs=1)
    assert noisy[0].mean() == pytest.approx(judges.NOISE / np.sqrt(2 * np.pi), abs=1)
    assert noisy[0].min() == 0  # cut off there
    assert noisy[3].min() > 100 and {form.dtype.name for form in forms.values()} == {"uint8"}


# -- difficulty ----------------------------------------


def test_the_instruments_and_what_is_compared_by_hand():
    probes, truth = {"probe": np.array([0.5, 0.0]), "probe-vit": np.array([1, 1])}, np.array([0.25, 0.5])
    noise = difficulty.instruments(probes, truth)
    assert {name: of.tolist() for name, of in noise.items()} == {
        "truth": [0.25, 0.5], "probe": [0.5, 0], "probe-vit": [1, 1],
        "probe, errors": [0.25, -0.5], "probe-vit, errors": [0.75, 0.5],
    }  # fmt: skip
    assert difficulty.instruments(probes, None) is probes
    scores = {"vit-mlc": np.array([0.1, 0.2])}
    pairs = difficulty.compared(scores, noise)
    assert list(pairs) == [("vit-mlc", name) for name in noise] + [(name, "truth") for name in probes]
    for (reader, name), pair in pairs.items():
        assert pair[0] is (scores | noise)[reader] and pair[1] is noise[name]


def test_a_mean_over_seeds_needs_a_number_of_each():
    found = difficulty.mean_over_seeds([0.1, 0.3])
    assert found["mean"] == pytest.approx(0.2) and found["seeds_95"] == student_interval([0.1, 0.3])
    lacking = {"mean": None, "seeds_95": None, "per_seed": [0.1, None]}
    assert difficulty.mean_over_seeds([0.1, None]) == lacking


def test_the_correlation_within_prompts_by_hand():
    a = np.array([[0.0, 1, 2], [10, 11, 12]])
    b = np.array([[5.0, 6, 7], [3, 1, 2]])  # centred: (-1, 0, 1) and (1, -1, 0); those of a (-1, 0, 1)
    of = difficulty.within(a, b)
    assert of["within"] == pytest.approx((2 - 1) / np.sqrt(4 * 4)) and of["slope"] == pytest.approx(1 / 4)
    assert of["spearman"] == pytest.approx((1 - 0.5) / 2) and of["prompts_that_vary"] == 2
    assert of["between"] == pytest.approx(-1)
    constant = difficulty.within(a, np.ones((2, 3)))
    assert constant["within"] is None and constant["within_95"] is None and constant["spearman"] is None


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_beyond_content_there_is_a_correlation_only_where_the_noise_matters(weight: float):
    rng = np.random.default_rng(2)
    content = rng.integers(2, size=(3000, 20)).astype(float)
    shared, own, chance = content @ rng.normal(size=20), rng.normal(size=3000), rng.normal(size=3000)
    y = np.stack([shared + weight * own + chance, shared + own], axis=1) + 7  # difficulty and noise
    of = difficulty.beyond_content(y, difficulty.cross_fitted(content, y))
    alone = weight**2 / (weight**2 + 1)  # of what content does not explain
    assert of["residual"] == pytest.approx(np.sqrt(alone), abs=0.04)
    # difficulty and what content predicts of the noise, which is what it predicts of difficulty
    assert of["from content"] ** 2 == pytest.approx(of["explained by content"], abs=0.02)
    assert of["added by noise"] == pytest.approx(alone * (1 - of["explained by content"]), abs=0.02)
    assert of["explained by content"] == pytest.approx(1 - (weight**2 + 1) / y[:, 0].var(), abs=0.02)
    assert difficulty.pearson(*y.T) > 0.7  # with weight 0, by content alone


def test_cross_fitting_does_not_explain_chance():
    """The first column is chance, the second follows from x: each has the penalty of its least error."""
    rng = np.random.default_rng(1)
    x, chance = rng.normal(size=(300, 100)), rng.normal(size=300)
    y = np.stack([chance, x @ rng.normal(size=100)], axis=1) + 5
    fitted = difficulty.cross_fitted(x, y)
    assert -0.2 < difficulty.explained(y[:, 0], fitted[:, 0]) < 0.05  # in sample: .3
    assert difficulty.explained(y[:, 1], fitted[:, 1]) > 0.99


def test_redrawn_scenes_leave_out_the_recorded_share():
    scene, rng = scenes.candidate(3, 4, truthful=True), np.random.default_rng(0)
    made = [difficulty.redrawn(scene.said, scene.prompt, rng) for _ in range(300)]
    shares = [difficulty.missing_share(judges.truth_of(one)) for one in made]
    assert len({one.seed for one in made}) == 300 and all(one.said == scene.said for one in made)
    assert np.mean(shares) == pytest.approx(difficulty.LOST, abs=0.04)
    complete = [one.drawn == scene.said for one in made]
    assert complete == [share == 0 for share in shares] and any(complete)


# -- small tables ----------------------------------------


@pytest.fixture
def two_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of random weights, with cards, in folders of their own, and few pictures."""
    torch.manual_seed(0)
    for name, place in zip(naming.PROBES, ("FOLDER", "SECOND"), strict=True):
        model = naming.Namer(naming.BACKBONES[name]())
        naming.write_tensors(model.state_dict(), tmp_path / place / name / "model.safetensors")
        (tmp_path / place / name / "card.json").write_text(json.dumps({"command": f"train {name}"}))
        monkeypatch.setattr(naming, place, tmp_path / place)
    monkeypatch.setattr(drawbench, "TRAINING_CANDIDATES", 10)
    few = {
        judges: {"DRAWINGS": {1: 4, 2: 4}, "NATURAL": 8, "RESAMPLES": 50},
        difficulty: {"PROMPTS": 4, "DRAWS": 3, "FOLDS": 2, "PHASE_1_RUNS": (RunName("vit", "mlc"),)},
        generation: {"STEPS": 2},
    }
    for module, values in few.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def test_the_table_of_the_probes(make: Callable[..., Path], two_probes: None):  # noqa: F811
    folder = make("--table", "probe", "--seeds", "0", *QUICK)
    result = read(folder, "table-probe")
    assert list(result["probes"]) == ["probe", "probe-vit"] and result["pairs"] == 84
    assert isinstance(result["data"], str)  # the fields do not replace those of the provenance
    subject = next(row for row in result["rates"] if (row["kind"], row["things"]) == ("subject", 2))
    assert subject["drawn"] == 8 and subject["not drawn"]["exchanged, drawing"] == 8
    # The rates of the second probe by hand, from the pictures themselves.
    chosen = judges.new_scenes(4, 2, judges.SEED)
    of = naming.tally(
        naming.load_probe(naming.SECOND, "probe-vit"), judges.drawings(chosen), [s.said for s in chosen]
    )
    second = next(
        r for r in result["rates"] if (r["probe"], r["kind"], r["things"]) == ("probe-vit", "subject", 2)
    )
    assert second["sensitivity"]["drawing"] == pytest.approx(np.mean(of["subject"]))
    shown: dict[tuple[int, str], list[bool]] = {}
    for scene in (scenes.candidate(judges.SEED + 1, index) for index in range(8)):
        for label, drawn in judges.truth_of(scene).items():
            shown.setdefault((len(scene.said.things), label[0]), []).append(drawn)
    check = {(row["things"], row["kind"]): (row["labels"], row["drawn"]) for row in result["check"]}
    assert check == {key: (len(of), pytest.approx(np.mean(of))) for key, of in shown.items()}
    for row in result["rates"]:
        left_out = shown.get((row["things"], row["kind"]), []).count(False)
        assert row["not drawn"].get("left out", 0) == left_out
    text = (folder / "results" / "table-probe.md").read_text()
    assert "## Rates of the second probe, `train probe-vit`" in text and "kappa" in text
    alone = judges.text(result | {"probes": {"probe": result["probes"]["probe"]}})
    assert "second probe" not in alone
    of_both, of_one = (whole.rpartition("\n\n")[2].splitlines() for whole in (text, alone))
    assert all(a.startswith(b.removesuffix(" |")) for a, b in zip(of_both, of_one, strict=True))


def test_the_table_of_difficulty(make: Callable[..., Path], two_probes: None, monkeypatch):  # noqa: F811
    small = replace(EXHIBITS["table"]["difficulty"], runs=difficulty.PHASE_1_RUNS)
    monkeypatch.setitem(EXHIBITS["table"], "difficulty", small)
    monkeypatch.setattr(difficulty, "cosines", lambda *_: -np.arange(12.0))  # harder from draw to draw
    folder = make("--table", "difficulty", "--seeds", "0", *QUICK)
    result = read(folder, "table-difficulty")
    names = [(row["pictures"], row["reader"], row["instrument"]) for row in result["within"]]
    assert ("generated", "vit-mlc", "probe") in names and ("drawn", "vit-mlc", "truth") in names
    assert ("generated", "vit-mlc", "truth") not in names and ("generated", "probe-vit", "probe") in names
    truth = next(r for r in result["training"] if (r["reader"], r["instrument"]) == ("vit-mlc", "truth"))
    listed = json.loads((folder / "runs" / "vit-mlc-seed0" / "predictions" / "rows.json").read_text())
    rng, redrawn = np.random.default_rng(0), [row["prompt"] for row in listed["test"][::3] for _ in range(3)]
    made = [difficulty.redrawn(default_views()[prompt], prompt, rng) for prompt in redrawn]
    noise = np.reshape([difficulty.missing_share(judges.truth_of(scene)) for scene in made], (4, 3))
    expected = difficulty.within(np.arange(12.0).reshape(4, 3), noise)["within"]
    known = next(row for row, name in zip(result["within"], names, strict=True) if name[2] == "truth")
    assert known["reader"] == "vit-mlc" and known["per_seed"] == [pytest.approx(expected)]
    views = [default_views()[row["prompt"]] for row in listed["train"]]
    undrawn = [len(undrawn_of(row["image"])) for row in listed["train"]]
    share = [n / len(naming.named_labels(view)) for n, view in zip(undrawn, views, strict=True)]
    score = -np.load(folder / "runs" / "vit-mlc-seed0" / "easiness.npy")
    r = np.corrcoef(score, share)[0, 1]
    assert truth["pearson"]["per_seed"] == [pytest.approx(r)]
    assert truth["explained by noise"]["per_seed"] == [pytest.approx(r**2)]
    assert "| drawn | vit-mlc | truth |" in (folder / "results" / "table-difficulty.md").read_text()
