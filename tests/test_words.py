"""Single words and the expected cosine: their metrics, the calibration, tables words and confidence."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_baseline_rows import Known, by_hand
from test_tables import QUICK, make, read, trained_here  # noqa: F401  (fixtures)

import eval
from files import DataError
from mini import naming, scenes
from tables import confidence, words
from tables.runs import SOURCES, Plan
from training import calibration
from training.calibration import fit_calibration, fit_words, logistic_regression, own_and_other, sigmoid
from training.inputs import prepare
from training.metrics import auroc, binned, calibration_error

YES, NO = True, False


def plan_of(folder: Path) -> Plan:
    return Plan("drawn", SOURCES["mini"], (0,), folder, 1, "cpu", {})


def test_auroc_by_hand_counts_ties_as_one_half():
    scores, truth = np.array([3.0, 1.0, 2.0, 2.0]), np.array([YES, NO, YES, NO])
    assert auroc(scores, truth) == 3.5 / 4
    assert auroc(-scores, truth) == 0.5 / 4
    assert np.isnan(auroc(scores, np.ones(4, bool)))


def test_auroc_within_groups_by_hand():
    scores = np.array([9.0, 8.0, 1.0, 2.0, 2.0, 7.0])
    truth = np.array([YES, NO, NO, YES, NO, NO])
    groups = np.array([5, 5, 5, 0, 0, 3])
    assert auroc(scores, truth, groups) == 2.5 / 3  # 9 over 8 and 1; 2 beside 2; none in group 3


def test_weights_of_auroc_are_repetitions():
    scores, truth = np.array([3.0, 1.0, 2.0, 2.0]), np.array([YES, NO, YES, NO])
    repeated = np.repeat(np.arange(4), [1, 0, 2, 3])
    weights = np.array([[1, 0, 2, 3], [1, 1, 1, 1]])
    expected = [auroc(scores[repeated], truth[repeated]), 3.5 / 4]
    assert auroc(scores, truth, weights=weights).tolist() == pytest.approx(expected)


def test_calibration_error_by_hand():
    predicted, true = np.array([0.9, 0.1, 0.2, 0.8]), np.array([1, 0, 1, 1])
    assert binned(predicted, true, 2) == pytest.approx(np.array([[0.15, 0.5, 2], [0.85, 1, 2]]))
    predicted, true = (np.append(predicted, 0.5).repeat(4), np.append(true, 0).repeat(4))
    assert calibration_error(predicted, true) == pytest.approx((0.1 + 0.8 + 0.5 + 0.2 + 0.1) / 5)
    assert calibration_error(np.zeros(11), np.r_[1, 1, np.zeros(9)]) == pytest.approx(2 / 11)  # 2 in one bin


def test_logistic_regression_finds_the_coefficients():
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(size=(20_000, 2)), np.ones(20_000)]
    truth = rng.random(20_000) < sigmoid(x @ [1.5, -0.5, 0.3])
    assert logistic_regression(x, truth) == pytest.approx(np.array([1.5, -0.5, 0.3]), abs=0.06)
    theirs = LogisticRegression(fit_intercept=False, tol=1e-9).fit(x[:30], truth[:30])  # of penalty 1
    assert logistic_regression(x[:30], truth[:30]) == pytest.approx(theirs.coef_[0], abs=1e-5)


def test_own_words_and_those_of_the_next_pair_by_hand():
    present = np.array([[YES, YES, NO], [YES, NO, YES]])
    pair, word, own = own_and_other(present)
    assert list(zip(pair, word, own, strict=True)) == [(0, 1, YES), (0, 2, NO), (1, 1, NO), (1, 2, YES)]


def test_calibrated_words_do_not_depend_on_their_frequency():
    """Scores are log-odds of presence; calibrated, a frequent and a rare word of equal evidence are equal."""
    rng = np.random.default_rng(0)
    base = np.log(np.array([0.3, 0.03]) / (1 - np.array([0.3, 0.03])))
    present = rng.random((20_000, 2)) < sigmoid(base)
    evidence = rng.normal(np.where(present, 1, -1), 1)  # its log-likelihood ratio is 2 x
    scores = base + 2 * evidence
    slope, offsets = fit_words(scores, present, base)
    assert slope == pytest.approx(1, abs=0.07)
    assert slope * base + offsets == pytest.approx(np.zeros(2), abs=0.15)
    pair, word, own = own_and_other(present)
    p = sigmoid(slope * scores + offsets)[pair, word]
    assert calibration_error(p, own) < 0.02 < calibration_error(sigmoid(scores)[pair, word], own)


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> calibration.Calibration:
    """Pictures of two kinds: the first has one prompt embedding, the second either of two opposite ones."""
    rng = np.random.default_rng(0)
    kind = {"train": np.arange(400) % 2, "val": np.arange(200) % 2}
    predicted = {
        s: np.eye(3, dtype=np.float32)[k] + 0.01 * rng.normal(size=(len(k), 3)) for s, k in kind.items()
    }
    predicted = {s: (p / np.linalg.norm(p, axis=1)[:, None]).astype(np.float32) for s, p in predicted.items()}
    axes = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0.6, -0.8]], np.float32)
    targets = {s: axes[np.where(k == 0, 0, rng.integers(1, 3, len(k)))] for s, k in kind.items()}
    prompts = {s: [("a star", "an owl")[i] for i in k] for s, k in kind.items()}
    words_of = lambda texts: torch.tensor([["star" in text, "owl" in text] for text in texts]).float()  # noqa: E731
    monkeypatch.setattr(calibration, "BLOCK", 150)  # three blocks, the last one shorter
    return fit_calibration(predicted, targets, prompts, words_of)


def test_the_expected_cosine_is_the_length_of_the_mean_embedding(two_kinds):
    first, second = np.eye(3)[:2]
    assert two_kinds.expected(first) == pytest.approx(1, abs=0.01)
    assert two_kinds.expected(second) == pytest.approx(0.6, abs=0.06)
    together = two_kinds.expected(np.stack([second, 2 * first]))
    assert together == pytest.approx([two_kinds.expected(second), 1])  # no cosine is above 1


def test_words_of_the_picture_are_probable_and_others_not(two_kinds):
    shown = two_kinds.shown(np.eye(3)[:2])
    assert shown[[0, 1], [0, 1]].min() > 0.95 and shown[[0, 1], [1, 0]].max() < 0.05
    in_prompt = two_kinds.in_prompt(np.eye(3)[:2])
    assert in_prompt == pytest.approx(np.eye(2), abs=0.03)


def test_one_of_two_words_that_fit_equally_is_in_the_prompt():
    """Both are shown, surely; in the prompt each is with one half, and with the rate of any prompt unseen."""
    rng, n = np.random.default_rng(0), 3000
    kind = rng.integers(0, 8, n)
    scores = np.where(kind[:, None] == np.arange(8).repeat(2), 0.5, 0.0) + 0.01 * rng.normal(size=(n, 16))
    present = np.zeros((n, 16), bool)
    present[np.arange(n), 2 * kind + rng.integers(0, 2, n)] = True
    base = calibration.log_odds(present.sum(axis=0), n)
    slope, offsets = fit_words(scores, present, base)
    assert sigmoid(slope * 0.5 + offsets).min() > 0.9
    slope, offsets = calibration.fit_in_prompt(scores, present, base)
    p = sigmoid(slope * calibration.score_odds(np.array([[0.5], [0.0]])) + offsets)
    assert p[0] == pytest.approx(np.full(16, 0.5), abs=0.05) and p[1].max() < 0.01


def test_the_rank_of_a_cosine_among_validation_pairs(two_kinds):
    assert two_kinds.rank(-1) == 0 and two_kinds.rank(1.01) == 1
    assert two_kinds.rank(0.8) == pytest.approx(0.5, abs=0.02)


def test_a_calibration_is_read_as_written_and_refused_if_damaged(two_kinds, tmp_path: Path):
    assert calibration.read_calibration(tmp_path, 2) is None
    calibration.write_calibration(tmp_path, two_kinds)
    same = calibration.read_calibration(tmp_path, 2)
    assert (same.maps == two_kinds.maps).all() and same.cosines == two_kinds.cosines
    assert (same.to_shown, same.to_prompt) == (two_kinds.to_shown, two_kinds.to_prompt)
    older = json.loads((tmp_path / "calibration.json").read_text())
    assert len(older["cosines"]) == 101
    for lacking in (("to_prompt",), ("to_prompt", "to_shown")):
        held = {name: value for name, value in older.items() if name not in lacking}
        (tmp_path / "calibration.json").write_text(json.dumps(held))
        assert calibration.read_calibration(tmp_path, 2) is None
    with pytest.raises(DataError, match="lacks its calibration; run: python eval.py"):
        calibration.require_calibration(tmp_path, 2)
    calibration.write_calibration(tmp_path, two_kinds)
    with pytest.raises(DataError, match="calibration.npy.*python eval.py"):
        calibration.read_calibration(tmp_path, 3)
    damaged = {name: getattr(two_kinds, name) for name in calibration.FIELDS}
    for name in ("to_shown", "to_prompt", "cosines", "colour"):
        longer = damaged | {name: [*damaged.get(name, ()), 0.5]}
        (tmp_path / "calibration.json").write_text(json.dumps(longer))
        with pytest.raises(DataError, match=f"calibration.json.*{name}"):
            calibration.read_calibration(tmp_path, 2)
    calibration.write_calibration(tmp_path, two_kinds)
    (tmp_path / "calibration.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="calibration.npy.*python eval.py"):
        calibration.read_calibration(tmp_path, 2)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(DataError):
        calibration.read_calibration(tmp_path, 2)


# -- table words ----------------------------------------


def scene_with(
    prompt: str, said: scenes.View, in_prompt: tuple[str, ...], undrawn: tuple[str, ...]
) -> scenes.Scene:
    return scenes.Scene(prompt, in_prompt, undrawn, said, said, 0)


def test_the_items_of_a_scene():
    said = scenes.View((scenes.Thing("star", "yellow"),), count=2, place="snow", light="snowfall")
    phrases = ("a pair of", "lemon yellow", "stars", "snow", "snow flakes")
    items = words.items_of([scene_with("", said, phrases, ("lemon yellow", "snow flakes"))])
    assert dict(zip(items.words, items.shown.tolist(), strict=True)) == {
        "pair": YES, "lemon": NO, "yellow": NO, "stars": YES, "snow": YES, "flakes": NO
    }  # fmt: skip
    assert [naming.LABELS[i] for i in items.labels[4]] == [("place", "snow"), ("light", "snowfall")]


def test_number_words_are_items_though_no_content_words():
    said = scenes.View((scenes.Thing("owl"),), count=3)
    assert words.items_of([scene_with("", said, ("three", "owls"), ())]).words == ["three", "owls"]


def test_a_prompt_without_a_word():
    assert words.without("A red star, redder than red-hot, red", "red") == "a star, redder than red-hot,"


def test_areas_within_words_and_prompts_by_hand():
    items = words.Items(
        np.array([0, 0, 1, 1, 2]), ["red", "owl", "red", "owl", "red"], np.array([NO, YES, YES, NO, YES]), []
    )
    scores = {"column": np.array([0, 1, 0, 1, 0]), "s": np.array([1.0, 2.0, 3.0, 2.0, 0.5])}
    areas = {key: of[0] for key, of in words.measured(items, scores, ["s"], True).items()}
    assert areas["all words", "s"] == pytest.approx((1 + 0.5 + 1 + 1 + 0 + 0) / 6)
    assert areas["same word", "s"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert areas["same prompt", "s"] == pytest.approx(1)


def test_a_bootstrap_of_one_scene_draws_that_scene():
    items = words.Items(np.array([0, 0]), ["red", "owl"], np.array([NO, YES]), [])
    scores = {"column": np.array([0, 1]), "s": np.array([1.0, 2.0])}
    for of in words.measured(items, scores, ["s"], True).values():
        assert len(of) == 1 + words.RESAMPLES and (np.isnan(of).all() or (of == 1).all())


def test_an_interval_over_scenes_holds_all_resamples_and_not_the_estimate():
    found = words.summary([np.array([0.5, 0.1, 0.3]), np.array([0.7, 0.3, 0.5])])
    assert found["mean"] == pytest.approx(0.6) and found["per_seed"] == [0.5, 0.7]
    assert found["scenes_95"] == pytest.approx((0.205, 0.395))
    rare = words.summary([np.array([0.5, np.nan, *np.full(60, 0.25)])])  # one resample lacks a pair of words
    assert rare == {"mean": 0.5, "scenes_95": [0.25, 0.25], "per_seed": [0.5]}


def test_the_numbers_of_table_words_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With one seed; the fifth word is not in the vocabulary, and alone there."""
    items = words.Items(
        np.array([0, 0, 1, 1, 2]), ["red", "owl", "red", "owl", "eye"], np.array([NO, YES, YES, NO, YES]), []
    )
    scores = {"column": np.array([0, 1, 0, 1, -1]), words.OURS: np.array([1.0, 2.0, 3.0, 2.0, 0.5])}
    scores |= {name: items.shown.astype(float) for name in words.OUTSIDE}
    world = SimpleNamespace(items=items, prompts=["a", "b", "c"])
    monkeypatch.setattr(words, "RESAMPLES", 20)
    monkeypatch.setattr(words, "new_world", lambda plan: world)
    monkeypatch.setattr(words, "scores_of", lambda world, plan, run, seed: (scores, {"of": run.name}))
    result = words.compute(plan_of(tmp_path))
    counts = {"scenes": 3, "scenes with a word not shown": 2, "words": 5, "words not shown": 2}
    assert result["counts"] == counts
    assert result["reliability"] == {run.name: [{"of": run.name}] for run in words.RUNS}
    rows = {
        (row["backbone"], row["in vocabulary"], row["measure"], row["score"]): row["per_seed"]
        for row in result["rows"]
    }
    differences = {(test["measure"], test["score"]): test["per_seed"] for test in result["tests"]}
    for measure, area in zip(words.MEASURES, (3.5 / 4, 1.5 / 2, 1), strict=True):
        for backbone in ("unet", "swin"):
            assert rows[backbone, True, measure, words.OURS] == pytest.approx([area])
            assert rows[backbone, True, measure, "probe"] == pytest.approx([1])
            assert rows[backbone, False, measure, "probe"] is None
        assert differences[measure, "probe"] == pytest.approx([area - 1])
    assert len(differences) == len(words.MEASURES) * len(words.OUTSIDE)  # none with itself, none outside


def test_table_words_needs_drawn_scenes(capsys):
    assert eval.main(["--table", "words", "--device", "cpu"]) == 2
    assert "--table words: only drawn scenes record the words" in capsys.readouterr().err


def test_the_text_of_table_words():
    interval = {"mean": 0.9, "scenes_95": [0.8, 0.95], "per_seed": [0.9, 0.9, 0.9]}
    key = {"backbone": "unet", "in vocabulary": True, "score": words.OURS}
    rows = [key | {"measure": measure} | interval for measure in words.MEASURES]
    nothing = {"mean": None, "scenes_95": None, "per_seed": None}
    rows += [row | {"in vocabulary": False} | nothing for row in rows]
    difference = {"difference": 0.1, "difference_95": [0.0, 0.2], "per_seed": [0.1, 0.1, 0.1]}
    reliability = {
        "calibration error": {words.OURS: 0.01},
        "not shown, below .5": 0.9,
        "shown, below .5": 0.2,
    }
    result = {"command": "c", "date": "d", "seeds": [0], "data": "drawn", "counts": {"scenes": 6000}}
    tests = [key | {"measure": "all words"} | difference]
    text = words.text(result | {"rows": rows, "tests": tests, "reliability": {"unet-mlc": [reliability]}})
    assert "| U-Net | P(shown) | .9000 (.8000 to .9500; .9000 to .9000) |" in text
    assert "| U-Net | P(shown) |  |  |  |" in text and "| U-Net | .0100 | .9000 | .2000 |" in text
    assert "6,000 scenes." in text


# -- table confidence ----------------------------------------


def test_estimates_of_the_cosine_and_their_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Predictions whose length is their expected cosine: the length explains, a constant does not."""
    rng, predicted, targets = np.random.default_rng(0), {}, {}
    for split in ("train", "val", "test"):
        length = rng.uniform(0.2, 0.9, 2000)
        angle = rng.choice([-1, 1], 2000) * np.arccos(length)
        predicted[split] = np.stack([length, np.zeros(2000)], axis=1)
        targets[split] = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    true, by_name = confidence.estimates(predicted, SimpleNamespace(targets=targets.get))
    assert true == pytest.approx(np.linalg.norm(predicted["test"], axis=1), abs=1e-6)
    of = {name: confidence.measures(expected, true) for name, expected in by_name.items()}
    assert of["length"]["explained"] == pytest.approx(1) and of["length"]["calibration error"] < 1e-6
    assert of["length x slope"]["correlation"] == pytest.approx(1)
    assert abs(of["constant"]["explained"]) < 0.01 and of["constant"]["correlation"] is None
    json.dumps(of, allow_nan=False)
    for name in ("frozen", "trained"):
        monkeypatch.setattr(confidence, name, lambda *_: predicted)
    monkeypatch.setattr(confidence, "estimates", lambda *_: (true, by_name))
    rows = confidence.compute(plan_of(tmp_path))["rows"]  # of one seed
    assert [row["per_seed"] for row in rows] == [[of[row["estimate"]]] for row in rows]
    assert [row["estimate"] for row in rows] == 4 * list(by_name)


def test_fitted_estimates_of_the_cosine_by_hand():
    """Lines and slopes by least squares; the length after ridge regression from the unit predictions."""
    member, rng = Known(1, noise=1.0), np.random.default_rng(5)
    predicted = {s: rows * rng.uniform(0.2, 0.9, (len(rows), 1)) for s, rows in member.arrays.items()}
    true, found = confidence.estimates(predicted, member)
    x, y = ({s: rows.astype(float) for s, rows in of.items()} for of in (member.arrays, member.truth))
    cosine = {s: (x[s] * y[s]).sum(axis=1) for s in ("val", "test")}
    again = {s: np.linalg.norm(by_hand(x | {"test": x[s]}, y), axis=1) for s in cosine}
    slope = again["val"] @ cosine["val"] / (again["val"] @ again["val"])
    assert true == pytest.approx(cosine["test"], abs=1e-6)
    assert found[confidence.OURS] == pytest.approx(slope * again["test"], abs=1e-5)
    length = {s: np.linalg.norm(predicted[s], axis=1) for s in cosine}
    nearest = {s: (x[s] @ y["train"].T).max(axis=1) for s in cosine}
    for name, of in (("length", length), ("the nearest training prompt's cosine", nearest)):
        line = np.polyfit(of["val"], cosine["val"], 1)
        assert found[f"line of {name}"] == pytest.approx(np.polyval(line, of["test"]), abs=1e-5)


# -- both tables from trainings ----------------------------------------


def test_both_tables_from_trainings(make: Callable[..., Path], monkeypatch):  # noqa: F811
    monkeypatch.setattr(words, "PARTS", 1)
    monkeypatch.setattr(words, "PER_PART", 40)
    monkeypatch.setattr(words, "RESAMPLES", 30)
    monkeypatch.setitem(eval.NEEDS, "drawn", (lambda plan: True, ""))
    scores_of, predicted_by, scored, predicted = words.scores_of, words.predicted_by, [], []

    def kept(into: list, of: Callable) -> Callable:
        return lambda *given: into.append((given, of(*given))) or into[-1][1]

    monkeypatch.setattr(words, "predicted_by", kept(predicted, predicted_by))
    monkeypatch.setattr(words, "scores_of", kept(scored, scores_of))
    folder = make("--table", "words,confidence", "--seeds", "0,1", *QUICK)
    for ((world, plan, run, seed), (scores, reliable)), (_, (embedding, p)), (_, (_, of_val)) in zip(
        scored, predicted[::2], predicted[1::2], strict=True
    ):
        scene, known = world.items.scene, scores["column"] >= 0
        cosine = np.einsum("kd,kd->k", embedding[scene], world.prompts[scene])
        without = np.einsum("kd,kd->k", embedding[scene], world.shortened)
        assert scores["cosine of the prompt"] == pytest.approx(cosine, abs=1e-6)
        assert scores["leave the word out"] == pytest.approx(cosine - without, abs=1e-6)
        own, column = prepare(plan.config(run, seed)), scores["column"][known]
        listed = json.loads((plan.run_folder(run, seed) / "vocabulary.json").read_text())
        texts = {s: [own.pairs.prompts[i] for i in own.splits[s]] for s in ("train", "val")}
        texts["new"] = world.prepared[run.backbone].pairs.prompts
        present = {s: np.array([[w in words.words(t) for w in listed] for t in texts[s]]) for s in texts}
        count = present["train"].sum(axis=0)
        base = np.log((count + 0.5) / (len(own.splits["train"]) - count + 0.5))
        slope, offsets = fit_words(calibration.logit(of_val), present["val"], base)
        calibrated = slope * calibration.logit(p) + offsets
        for name, of in (("vocabulary head", p), ("vocabulary head, calibrated", calibrated)):
            assert scores[name][known] == pytest.approx(of[scene[known], column], abs=1e-5)
        assert scores["base rate of the word"][known] == pytest.approx(base[column])
        pair, word, is_own = own_and_other(present["new"])
        error = calibration_error(sigmoid(calibrated)[pair, word], is_own)
        assert reliable["calibration error"]["vocabulary head, calibrated"] == pytest.approx(error, abs=1e-5)
        for name, kind in (("not shown", ~world.items.shown), ("shown", world.items.shown)):
            doubted = scores[words.OURS][known & kind] < 0.5
            assert reliable[f"{name}, below .5"] == pytest.approx(doubted.mean())
    result = read(folder, "table-words")
    areas = {
        (row["backbone"], row["score"]): row["per_seed"]
        for row in result["rows"]
        if row["in vocabulary"] and row["measure"] == "all words"
    }
    assert len(areas) == 14 and result["counts"]["scenes"] == 40
    assert min(areas["swin", "probe"]) > 0.9 and areas["swin", "probe"] != areas["swin", words.OURS]
    rows = read(folder, "table-confidence")["rows"]
    assert len(rows) == 24 and len(rows[0]["bins"]) == 10
    assert all(len(row["per_seed"]) == 2 for row in rows)
