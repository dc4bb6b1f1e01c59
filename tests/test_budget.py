"""Tables budget and denoised: the parts of the error, the limit of many wordings, the files of texts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tables import QUICK, Here, make, read, trained_here  # noqa: F401  (fixtures)

from mini import naming, scenes
from mini.scenes import Thing, View
from tables import budget, denoised
from tables.budget import PARTS, parts_of, seen_view
from tables.runs import SOURCES, Plan
from tables.wordings import limit_cosines, random_of, wordings
from training.metrics import cosines

CAT = View((Thing("cat", "red"),), place="snow", light="night")


def test_parts_by_hand():
    parts = parts_of(0.5, 0.7, 0.72, 0.8, 0.85)
    expected = {"read": 0.2, "read-out": 0.02, "unread": 0.08, "not drawn": 0.05, "wording": 0.15}
    assert parts == pytest.approx(expected) and sum(parts.values()) == pytest.approx(1 - 0.5)


def test_the_limit_by_hand():
    """Wordings (1, 0) and (.6, .8): their mean has the product .8 with (1, 0), they have .6 with another."""
    rows = np.array([[[1.0, 0.0], [0.6, 0.8]]])
    assert limit_cosines(rows, np.array([[1.0, 0.0]])) == pytest.approx([0.8 / 0.6**0.5])


def test_the_limit_of_few_wordings_is_that_of_many():
    rng = np.random.default_rng(0)
    centre = np.array([3.0, 0, 0, 0, 0, 0])
    spread = np.array([0.1, 1, 1, 1, 1, 1])
    rows = centre + spread * rng.normal(size=(20_000, 4, 6))
    targets = centre + spread * rng.normal(size=(20_000, 6))
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    true = cosines(centre, targets).mean()
    assert limit_cosines(rows, targets).mean() == pytest.approx(true, abs=0.01)
    assert cosines(rows.mean(axis=1), targets).mean() < true - 0.04


def test_wordings_have_the_views_words_alone():
    texts = wordings(CAT, 40)
    assert texts == wordings(CAT, 40)[:40] and wordings(CAT, 3) == texts[:3] and len(set(texts)) > 30
    assert wordings(View((Thing("cat", "red"),)), 3) != texts[:3]
    for text in texts:
        for table, key in ((scenes.SUBJECTS, "cat"), (scenes.COLOURS, "red"), (scenes.PLACES, "snow")):
            assert any(word in text for _, word in scenes.words_of(table, key)), text
        assert not any(word in text for _, word in scenes.words_of(scenes.SUBJECTS, "robot"))


def test_words_that_the_probe_does_not_find_are_replaced_or_removed():
    def seen(*labels: tuple[str, str]) -> View:
        p = torch.full((len(naming.LABELS),), 0.01)
        for label in labels:
            p[naming.POSITION[label]] = 0.9
        return seen_view(CAT, p)

    every = [("subject", "cat"), ("colour", "red"), ("place", "snow"), ("light", "night")]
    assert seen(*every) == CAT
    assert seen(*every[:3]) == View((Thing("cat", "red"),), place="snow")
    assert seen(("subject", "robot"), *every[1:]) == View(
        (Thing("robot", "red"),), place="snow", light="night"
    )
    assert seen(*every[:2], ("place", "cave"), ("light", "rays")) == View(
        (Thing("cat", "red"),), place="cave", light="rays"
    )
    two = View((Thing("cat", "red"), Thing("star")), relation="left")
    blank = torch.full((len(naming.LABELS),), 0.01)
    blank[[naming.POSITION["subject", "cat"], naming.POSITION["colour", "red"]]] = 0.9
    assert seen_view(two, blank).things[0] == two.things[0] and seen_view(two, blank).relation is None
    cats, found = View((Thing("cat", "red"),), count=3, style="oil"), blank.clone()
    assert seen_view(cats, found) == View((Thing("cat", "red"),))
    found[[naming.POSITION["count", 4], naming.POSITION["style", "oil"]]] = torch.tensor([0.5, 0.9])
    assert seen_view(cats, found) == View((Thing("cat", "red"),), style="oil")  # 1/2 is not above it
    found[naming.POSITION["count", 3]] = 0.9
    assert seen_view(cats, found) == cats


def test_texts_of_denoised_targets(few_scenes: Path, tmp_path: Path):
    folder = tmp_path / "new" / "runs"
    plan = Plan(str(few_scenes), SOURCES["mini"], (0,), folder, 1, "cpu", {})
    denoised.write_texts(plan)
    files = {name: (folder / f"{name}.jsonl").read_text() for name in ("paraphrases", "same-subject")}
    denoised.write_texts(plan)  # at each call of eval.py
    assert {name: (folder / f"{name}.jsonl").read_text() for name in files} == files
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    views = denoised.default_views()
    for one, other in zip(*lines.values(), strict=True):
        view = views[one["prompt"]]
        assert one["prompt"] == other["prompt"] and one["texts"] == wordings(view, denoised.TEXTS)
        assert len(other["texts"]) == denoised.TEXTS and not set(one["texts"]) & set(other["texts"])
        named = [word for _, word in scenes.words_of(scenes.SUBJECTS, view.things[0].subject)]
        named += [scenes.PLURALS.get(word, word) for word in named]
        assert all(any(word in text for word in named) for text in other["texts"])
        for thing in scenes.sample_view(random_of(view)).things[1:]:  # of the first sentence's content
            second = [word for _, word in scenes.words_of(scenes.SUBJECTS, thing.subject)]
            assert any(word in other["texts"][0] for word in second)
    assert len(lines["paraphrases"]) == 84


def test_the_tables(make: Callable[..., Path], monkeypatch):  # noqa: F811
    monkeypatch.setattr(denoised, "FROZEN_SEEDS", (0,))
    monkeypatch.setattr(denoised, "TEXTS", 2)
    monkeypatch.setattr(budget, "WORDINGS", 3)
    folder = make("--table", "budget,denoised", "--seeds", "0", *QUICK)
    assert len(Here.started) == 5
    result = read(folder, "table-budget")
    stored = {}
    for name in ("swin-mlc", "unet-mlc"):
        stored[name] = json.loads((folder / "runs" / f"{name}-seed0" / "result.json").read_text())
    for reader, name in (("Swin", "swin-mlc"), ("U-Net, captions", "unet-mlc")):
        parts = {part: values[0] for part, values in result["readers"][reader].items()}
        assert sum(parts.values()) == pytest.approx(1 - stored[name]["mean_embedding_cosine"])
        gained = stored[name]["test_cosine"] - stored[name]["mean_embedding_cosine"]
        assert parts["read"] == pytest.approx(gained) and list(parts) == list(PARTS)
        limits = {content: found["limit"][0] for content, found in result["contents"].items()}
        assert parts["wording"] == pytest.approx(1 - limits["said"])
        assert parts["not drawn"] == pytest.approx(limits["said"] - limits["drawn"])
    assert limits["read"] < limits["said"]
    for found in result["contents"].values():  # of one wording, of all three, of infinitely many
        assert found["1"] < found["4"] == found["12"] < found["limit"]

    result = read(folder, "table-denoised")
    trained, frozen = ({r["name"]: r["cosine"] for r in part["rows"]} for part in (result, result["frozen"]))
    assert trained.keys() < frozen.keys() and len(result["contrasts"]) == 2
    assert frozen["Swin, the prompt"] != frozen["Swin, paraphrases"] > frozen["Swin, the same subject"]
