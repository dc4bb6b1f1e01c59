"""Tables 3 and 4, figures 4 and 10: texts of each row, scores, statistics, redrawn pictures."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT
from PIL import Image
from test_tables import QUICK, make, read, trained_here  # noqa: F401  (fixtures)

import clipscore
import data
import inversion
import weights
from mini import scenes
from tables import generation, prompts, redrawn
from tables.prompts import BEST, TRUE, SeedPairs
from tables.runs import SOURCES, Plan, RunName
from training.calibration import Calibration, write_calibration
from training.decoder import DecoderConfig, DecoderTrainer, decoded, new_decoder
from training.inputs import prompt_targets
from training.metrics import bootstrap_interval, paired_by_group, seeds_p, signed_rank_p

# -- statistics ----------------------------------------


def test_the_signed_rank_test_is_scipys_with_ties_and_zeros():
    rng = np.random.default_rng(0)
    for n in (30, 101):
        differences = rng.integers(-4, 7, n).astype(float)
        expected = scipy.stats.wilcoxon(differences, correction=False, method="asymptotic").pvalue
        assert signed_rank_p(differences) == pytest.approx(expected, rel=1e-9)
        assert 0 in differences and len(set(np.abs(differences))) < n
    assert signed_rank_p(np.zeros(9)) == 1


def test_the_bootstrap_draws_whole_groups():
    values = np.array([0.0, 0.0, 0.0, 1.0])
    assert bootstrap_interval(values, groups=np.arange(4)) == bootstrap_interval(values)
    low, high = bootstrap_interval(values, groups=np.array(["a", "a", "b", "b"]))
    assert (low, high) == (0, 0.5)  # means of (a, a), (a, b) and (b, b) are 0, 1/4 and 1/2
    low, high = bootstrap_interval(values, groups=np.array(["a", "a", "a", "b"]))
    assert (low, high) == (0, 1)


def test_paired_statistics_by_hand():
    ours, other = [np.array([0.5, 0.7, 0.2]), np.array([0.4])], [np.array([0.4, 0.4, 0.2]), np.array([0.5])]
    test = paired_by_group(ours, other, [np.array(["a", "b", "c"]), np.array(["a"])])
    differences = [0.1, 0.3, 0, -0.1]
    assert test["difference"] == pytest.approx(np.mean(differences))
    assert test["d_z"] == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))
    assert test["won"] == 2 / 4 + 1 / 8 and test["per_seed"] == pytest.approx([0.4 / 3, -0.1])
    assert test["difference_95"][0] == pytest.approx(0, abs=1e-9)  # of "a" 0, of "b" .3, of "c" 0


def test_p_values_are_adjusted_over_the_papers_claims_alone():
    per_seed = {"a": [0.1, 0.2, 0.3], "b": [0.1, 0.11, 0.12], "c": [0.5, 0.6, 0.71]}
    values = {"none": {"cosine": [np.zeros(4)] * 3}} | {
        name: {"cosine": [of + np.array([-0.1, 0.1, 0.05, -0.05]) for of in each]}
        for name, each in per_seed.items()
    }
    paper = {("none", "cosine"): 30.93, ("a", "cosine"): 31.77, ("b", "cosine"): 31.88}
    groups = [["p", "q", "r", "s"]] * 3
    tests = prompts.comparisons(values, groups, [(name, "none") for name in "abc"], ["cosine"], paper)
    text = prompts.comparisons_text(tests, lambda test: seeds_p(test["per_seed"])).splitlines()
    p = {name: scipy.stats.ttest_1samp(of, 0).pvalue for name, of in per_seed.items()}
    cells = {line.split(" | ")[1][0]: [cell.strip(" |") for cell in line.split(" | ")] for line in text[2:]}
    assert float(cells["a"][-2]) == pytest.approx(p["a"], abs=1e-4) and cells["a"][-1] == "+0.84"
    assert float(cells["b"][-2]) == pytest.approx(2 * p["b"], abs=1e-4)
    assert cells["c"][-2:] == ["", ""]


# -- runs ----------------------------------------


def test_captioners_are_trained_with_their_own_head_and_curriculum(tmp_path: Path):
    plan = Plan("mini", SOURCES["mini"], (2,), tmp_path, 1, "cpu", {"train_blocks": 0, "epochs": 5})
    fields = {name: plan.fields(run, 2) for name, run in prompts.RUNS.items()}
    assert [each["heads"] for each in fields.values()] == [0, 1, 1] * 2
    assert [each["weights"] for each in fields.values()] == ["blip-mini"] * 3 + ["blip2-mini"] * 3
    assert all("train_blocks" not in each and each["epochs"] == 5 for each in fields.values())
    assert fields["BLIP-2 + MLC"]["record_cosines"] and "record_cosines" not in fields["BLIP-2"]
    assert fields[BEST]["curriculum"] == "difficulty"
    assert fields[BEST]["phase_1"] == str(tmp_path / "blip2-mlc-seed2")
    for run in prompts.RUNS.values():
        plan.config(run, 2)  # no flags conflict


# -- texts ----------------------------------------

TEXTS = ["a red cat", "a blue owl", "two moons", "a green car", "a red kitten"]
FOLDER, RUN = "blip-plain-seed3", RunName("blip", "plain")


@pytest.fixture
def pairs(tmp_path: Path) -> SeedPairs:
    """Three training pairs and two test pairs with embeddings of two numbers, and two runs' folders."""
    targets = np.float32([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6], [0.96, 0.28]])
    subset = lambda rows: SimpleNamespace(prompts=[TEXTS[i] for i in rows])  # noqa: E731
    prepared = SimpleNamespace(
        pairs=SimpleNamespace(prompts=TEXTS, subset=subset), targets=targets,
        splits={"train": np.array([0, 1, 2]), "test": np.array([4, 3])},
    )  # fmt: skip
    for run in (prompts.SWIN, RUN):
        folder = tmp_path / run.folder(3) / "predictions"
        folder.mkdir(parents=True)
        np.save(folder / "test.npy", np.float32([[0.1, 0.99], [0.5, 0.86]]))
    return SeedPairs(Plan("-", SOURCES["mini"], (3,), tmp_path, 1, "cpu", {}), 3, prepared)


def write_captions(pairs: SeedPairs, *lines: tuple[str, str, str]) -> None:
    rows = [dict(zip(("split", "prompt", "caption"), line, strict=True)) for line in lines]
    path = pairs.plan.folder / FOLDER / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_texts_from_embeddings_are_training_prompts(pairs: SeedPairs):
    assert prompts.nearest_prompt(prompts.SWIN, pairs) == ["two moons", "a blue owl"]
    assert prompts.central_prompt(pairs) == ["a blue owl"] * 2
    assert set(prompts.random_prompt(pairs)) <= set(TEXTS[:3])


def test_captions_are_those_of_the_test_pairs_in_their_order(pairs: SeedPairs):
    lines = [("val", "two moons", "x"), ("test", "a red kitten", "a cat"), ("test", "a green car", "cars")]
    write_captions(pairs, *lines)
    assert prompts.written_by(RUN, pairs) == ["a cat", "cars"]
    write_captions(pairs, *reversed(lines))
    with pytest.raises(data.DataError, match="2 test pairs in their order; write it again"):
        prompts.written_by(RUN, pairs)
    with pytest.raises(data.DataError, match="val-targets.npy: cannot be read"):
        prompts.pairs_of(pairs.plan, 3, [RUN])
    (pairs.plan.folder / FOLDER / "captions.jsonl").unlink()
    with pytest.raises(data.DataError, match="captions.jsonl"):
        prompts.written_by(RUN, pairs)


def test_likely_words_that_a_caption_lacks_follow_it(pairs: SeedPairs, monkeypatch):
    write_captions(pairs, ("test", "a red kitten", "a red cat"), ("test", "a green car", "a Car"))
    folder = pairs.plan.run_folder(prompts.SWIN, 3)
    (folder / "vocabulary.json").write_text(json.dumps(["cat", "snow", "car", "red"]))
    monkeypatch.setattr(prompts, "read_run", lambda _: {"vocabulary": None})
    maps = np.zeros((3, 6), np.float32)  # from the embeddings to these probabilities
    probabilities = np.array([[0.9, 0.6, 0.49, 0.95], [0.2, 0.7, 0.9, 0.8]])
    maps[1:, 2:] = np.linalg.solve(np.load(folder / "predictions" / "test.npy"), probabilities)
    write_calibration(folder, Calibration([0.0] * 101, 1.0, [1.0] * 5, [1.0, 0, 0, 0, 0], maps))
    texts = prompts.with_likely_words(RUN, prompts.SWIN, pairs)
    assert texts == ["a red cat, snow", "a Car, red, snow"]


def test_scores_are_those_of_clipscore(cache: Path, monkeypatch):
    monkeypatch.setattr(clipscore, "BATCH", 2)
    some = data.read_pairs(ROOT / "mini" / "generated").subset([5, 70, 7000])
    scores, texts = prompts.Scores(some, "clip-mini", "cpu"), ["a red cat", some.prompts[1], "two moons"]
    found = scores.of(texts)
    images = [some.image(i) for i in range(3)]
    expected = clipscore.Scorer("clip-mini").scores(images, texts, [[prompt] for prompt in some.prompts])
    for name in prompts.METRICS[:4]:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    both = weights.load("minilm").encode([*texts, *some.prompts]).numpy()
    assert found["cosine"] == pytest.approx((both[:3] * both[3:]).sum(axis=1), abs=1e-5)
    assert found["exact"].tolist() == [0, 1, 0] and found["words"][0] == 3


# -- the decoder ----------------------------------------


def test_a_decoder_learns_to_write_prompts_from_their_embeddings(cache: Path, tmp_path: Path):
    config = DecoderConfig(epochs=25, batch_size=4, lr=2e-3)
    targets = prompt_targets(TEXTS, "cpu")
    trainer = DecoderTrainer(config, tmp_path, TEXTS, targets)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.05
    (_, batch), _ = trainer.batches(0, 0)
    untrained = np.log(trainer.model.model.config.text_vocab_size)  # of a token, all being equally likely
    assert trainer.loss(batch)["loss"].item() == pytest.approx(untrained, rel=0.1)
    trainer.fit()
    assert decoded(trainer.model, targets[np.arange(5)]) == TEXTS
    again = DecoderTrainer(config, tmp_path, TEXTS, targets)  # from its checkpoint, without a step
    again.train_step = lambda _: pytest.fail("trained again")
    again.fit()
    assert decoded(again.model, targets[np.array([3])]) == [TEXTS[3]]
    with pytest.raises(data.DataError, match="was trained on other pairs or options"):
        DecoderTrainer(config, tmp_path, TEXTS[::-1], targets).fit()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_decoder_starts_the_same_for_a_seed_and_may_start_pretrained(pretrained: bool):
    config = DecoderConfig(pretrained=pretrained)
    first, again, other = (new_decoder(replace(config, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["model.projection.weight"], other["model.projection.weight"])
    theirs = weights.load("blip", "blip-mini").text_decoder.state_dict()
    same = [torch.equal(first[f"model.text_decoder.{name}"], value) for name, value in theirs.items()]
    assert all(same) is pretrained


def test_the_miniatures_decoder_and_the_published_one(pairs: SeedPairs, monkeypatch):
    """The first learns sentences of the little world too; the second starts from its pretrained weights."""
    trained = []

    class Trainer:
        def __init__(self, *arguments: object):
            trained.append(arguments)

        def fit(self) -> None:
            self.model = len(trained)

    monkeypatch.setattr(prompts, "DecoderTrainer", Trainer)
    monkeypatch.setattr(prompts, "prompt_targets", lambda texts, device: f"of {len(texts)}")
    monkeypatch.setattr(prompts, "decoded", lambda model, embeddings: (model, embeddings.tolist()))
    monkeypatch.setattr(prompts, "SENTENCES", 3)
    published = replace(pairs, plan=replace(pairs.plan, sources=SOURCES["paper"]))
    predicted = np.load(pairs.plan.folder / FOLDER / "predictions" / "test.npy")
    assert prompts.decoded_by(RUN, pairs) == (1, predicted.tolist())
    assert prompts.decoded_by(None, published) == (2, pairs.prepared.targets[[4, 3]].tolist())
    folder, sentences = pairs.plan.folder / "decoder-seed3", {
        scenes.candidate(prompts.SENTENCES_SEED, k).prompt for k in range(3)
    }  # fmt: skip
    mini, paper = DecoderConfig("blip-mini", seed=3), SOURCES["paper"]["blip"]
    assert trained == [
        (mini, folder, [*TEXTS[:3], *sorted(sentences)], "of 6", "cpu"),
        (DecoderConfig(paper, True, 3, lr=1e-4, seed=3), folder, TEXTS[:3], "of 3", "cpu"),
    ]


# -- tables and figures of known texts ----------------------------------------


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, data.Pairs]:
    """A plan whose seeds have three and two of these embedded pairs; scores count the letters of texts."""
    pairs = data.read_pairs(ROOT / "mini" / "generated").subset([5, 70, 700, 7000, 71])
    every = iter((pairs, None))  # those of the first seed are those of all

    def pairs_of(plan: Plan, seed: int, runs: object) -> SimpleNamespace:
        rows = np.arange(3) if seed == 3 else np.arange(3, 5)
        prepared, own = SimpleNamespace(pairs=next(every), splits={"test": rows}), pairs.subset(rows)
        return SimpleNamespace(seed=seed, prepared=prepared, images=own, prompts=list(own.prompts),
                               train_prompts=["a"])  # fmt: skip

    def of(texts: list[str]) -> dict[str, np.ndarray]:
        letters = np.array([len(text) for text in texts])
        return {metric: k * letters for k, metric in enumerate((*prompts.METRICS, "exact", "words"), 1)}

    rows = [prompts.Row(name, lambda own, end=end: [p[:end] for p in own.prompts], prompts.PAPER.get(name))
            for name, end in (("BLIP", 2), (BEST, 9), (TRUE, None))]  # fmt: skip
    for module in (prompts, redrawn):
        for name, value in {
            "pairs_of": pairs_of, "rows_of": lambda plan: rows, "Scores": lambda *_: SimpleNamespace(of=of),
            "COMPARISONS": ((BEST, "BLIP"), (TRUE, BEST)), "sheet": lambda rows: rows,
        }.items():  # fmt: skip
            monkeypatch.setattr(module, name, value)
    return Plan("-", SOURCES["mini"], (3, 8), tmp_path, 1, "cpu", {}), pairs


def test_table_3_and_figure_4_of_known_texts(known: tuple[Plan, data.Pairs], monkeypatch):
    plan, pairs = known
    monkeypatch.setattr(prompts, "validation_curve", lambda of: (int(of.name[-1]), [0.1, 0.3, 0.2]))
    result = prompts.compute_table_3(plan)
    assert (result["n_test"], result["trainings"]) == ([3, 2], 16)
    assert [row["words"] for row in result["rows"][:2]] == [[14, 14], [63, 63]]
    scale, _, cosine, _ = result["tests"]
    assert (scale["row"], scale["per_seed"], scale["paper"]) == (BEST, [7, 7], pytest.approx(1.21))
    assert cosine["per_seed"] == [35, 35] and result["rows"][1]["paper"] == 32.14
    expected = {"steps": 3, "likelihood": [0.3] * 2, "last_quarter": pytest.approx([-0.1] * 2)}
    assert result["trained"][BEST] == expected

    texts = {"plain": ["x", "xx", "xxx"], "mlc-cl": ["xxxx", "xx", "xx"]}
    monkeypatch.setattr(prompts, "written_by", lambda run, pairs: texts[run.recipe])
    monkeypatch.setattr(prompts, "pairs_of", lambda *_: SimpleNamespace(images=pairs, prompts=pairs.prompts))
    figure = prompts.compute_figure_4(replace(plan, seeds=(3,)))
    assert figure["examples"] == [
        {"prompt": prompt, "plain": plain, "enhanced": best, "cosines": [5 * len(plain), 5 * len(best)]}
        for prompt, plain, best in zip(list(pairs.prompts)[:3], *texts.values(), strict=True)
    ]
    assert figure["won"] == pytest.approx([1 / 3] * 3) and figure["n"] == 3
    shown = [picture.tobytes() for (picture,), _ in figure["files"]["figure-4.png"]]
    assert shown == [pairs.image(k).tobytes() for k in range(3)]


def test_table_4_of_known_texts(known: tuple[Plan, data.Pairs], monkeypatch: pytest.MonkeyPatch):
    """True prompts and "BLIP" draw the images again, the others negatives, in which the probe finds half."""
    (plan, pairs), noises = known, []
    images = np.stack([np.asarray(pairs.image(k)) for k in range(5)])
    (plan.folder / "kept").mkdir()
    for name, value in {
        "IMAGES": 5, "open_pipeline": lambda plan: None,
        "default_views": lambda: dict.fromkeys(pairs.prompts, "a view"),
        "kept_pictures": lambda plan, pipeline, texts, noise:
            noises.append(noise) or (255 - images if len(texts[0]) in (3, 9) else images),
        "labels_shown": lambda pictures, requests, device:
            [{("place", "sea"): True, ("place", "snow"): x} for x in (pictures == images).all((1, 2, 3))],
        "searched": lambda plan, o, of:
            [{"prompt": "x" * (k + o.seed), "seconds": o.seed} for k in range(len(of))],
        "above_random": lambda o, rows, of: 10 * o.seed + len(of) if o.method == "pez" else None,
    }.items():  # fmt: skip
        monkeypatch.setattr(redrawn, name, value)
    result = redrawn.compute_table_4(plan)
    counts = [result[name] for name in ("images", "pictures", "trainings", "above_random")]
    assert counts == [5, 8 * 5, 16, 33 + 82] and noises == [[redrawn.NOISE + k for k in range(5)]] * 8
    assert list(result["steps"].values()) == [1000, 500, 200, None, None]
    assert list(result["seconds"].values()) == [(3 * 3 + 2 * 8) / 5] * 5
    embed = clipscore.Scorer("clip-mini").images
    negative = clipscore.cosines(*(embed([Image.fromarray(x) for x in of]) for of in (images, 255 - images)))
    rows = {row["name"]: row for row in result["rows"]}
    measures = {name: [row["means"][measure] for measure in redrawn.MEASURES] for name, row in rows.items()}
    assert measures.pop(TRUE) == measures.pop("BLIP") == pytest.approx([1, 1])
    assert list(measures.values()) == [pytest.approx([negative.mean(), 0.5])] * 6
    limits = pytest.approx(bootstrap_interval(negative, resamples=2000))
    assert rows["PEZ"]["images_95"][redrawn.REDRAWN] == limits
    ranks = scipy.stats.spearmanr([3, 4, 5, 8, 9], negative).statistic
    assert rows["PEZ"]["ranks"]["CLIPScore"]["spearman"] == pytest.approx(ranks)
    paper = {"PEZ": [26.14, 0.7458], "PH2P": [25.13, 0.7214], BEST: [32.19, 0.7468], TRUE: [None, None]}
    assert {name: rows[name]["paper"] for name in paper} == paper
    by_probe = [test["per_seed"] for test in result["tests"] if test["metric"] == redrawn.PROBE]
    assert by_probe == [[-0.5, -0.5], [0.5, 0.5]] and [of["rows"] for of in result["buys"]] == [7] * 4
    assert result["texts"][BEST] == [prompt[:9] for prompt in pairs.prompts]
    sheet = zip(images, result["files"]["table-4.png"], strict=True)
    shown = [[np.array_equal(x, image) for x in pictures] for image, (pictures, _) in sheet]
    assert shown == [[True, False, False, False, True]] * 5


# -- table 4 ----------------------------------------


def test_no_image_is_chosen_twice(monkeypatch):
    monkeypatch.setattr(redrawn, "IMAGES", 10)
    tests = [np.arange(0, 40), np.arange(20, 60), np.arange(0, 40)]
    every = [SimpleNamespace(prepared=SimpleNamespace(splits={"test": rows})) for rows in tests]
    positions = redrawn.Chosen.of(every).positions
    rows = [int(test[i]) for test, of in zip(tests, positions, strict=True) for i in of]
    assert [len(of) for of in positions] == [4, 3, 3] and len(set(rows)) == 10
    assert max(positions[0]) >= 30  # spread over the data


def test_a_search_is_made_once_for_each_image(tmp_path: Path, monkeypatch):
    calls = []

    def inverter(o: inversion.Options, device: str):
        def invert(pictures: list[Image.Image]) -> list[dict]:
            calls.append(len(pictures))
            return [
                {"prompt": f"{o.method} {picture.getpixel((0, 0))[0]}", "cosine": 0.5} for picture in pictures
            ]

        return invert

    monkeypatch.setattr(inversion, "inverter", inverter)
    monkeypatch.setattr(redrawn, "BATCH", 2)
    plan = Plan("-", SOURCES["mini"], (0,), tmp_path, 1, "cpu", {})
    pictures = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(5)]
    o = redrawn.search_options(plan, SimpleNamespace(seed=0), "pez")
    assert o.steps == redrawn.MINI_STEPS["pez"] and o.clip == "clip-mini"
    monkeypatch.setattr(redrawn, "time", SimpleNamespace(monotonic=count(0, 8).__next__))
    rows = redrawn.searched(plan, o, pictures)
    assert [row["seconds"] for row in rows] == [4, 4, 4, 4, 8]
    assert [row["prompt"] for row in rows] == [f"pez {k}" for k in range(5)] and calls == [2, 2, 1]
    assert redrawn.searched(plan, o, pictures) == rows and calls == [2, 2, 1]
    o.steps += 1
    redrawn.searched(plan, o, pictures[:2])
    assert calls == [2, 2, 1, 2]
    paper = Plan("-", SOURCES["paper"], (0,), tmp_path, 1, "cpu", {})
    pairs = SimpleNamespace(seed=0, train_prompts=["a  red\ncat", "two moons"])
    others = {method: redrawn.search_options(plan, pairs, method) for method in redrawn.SEARCHES}
    assert (others["ph2p"].weights, others["ph2p"].keep) == ("sd-mini", "text")
    assert others["best-of"].captioner == str(tmp_path / "blip-mlc-cl-seed0" / "blip")
    assert Path(others["nearest"].prompts).read_text() == "a red cat\ntwo moons"
    published = [redrawn.search_options(paper, SimpleNamespace(seed=0), m) for m in ("pez", "ph2p")]
    assert [o.steps for o in published] == [3000, 10_000] and published[1].keep == "drawing"


def test_better_texts_and_better_pictures_by_hand():
    rng = np.random.default_rng(0)
    image, score = rng.random(6), {name: rng.random(6) for name in ("a", "b", "c")}
    slope = np.array([1, 1, 2, 2, 3, 3])  # within an image
    measure = {name: 5 * image + slope * of for name, of in score.items()}
    metrics = {
        "cosine": score,
        "CLIPScore": {name: -of for name, of in score.items()},
        redrawn.REDRAWN: measure,
    }
    names = {metric: of | {TRUE: np.full(6, 100.0)} for metric, of in metrics.items()}  # a bound is left out
    values = {n: {m: np.split(of[n], [4]) for m, of in names.items()} for n in ("a", "b", "c", TRUE)}
    cosine, clip = redrawn.bought(values)
    assert (cosine["rows"], cosine["images"]) == (3, 6)
    spread = np.var([score[name] for name in "abc"], axis=0)
    pooled = (slope * spread).sum() / spread.sum()
    assert (cosine["spearman"], cosine["slope"]) == pytest.approx((1, pooled))
    assert (clip["spearman"], clip["slope"]) == pytest.approx((-1, -pooled))
    assert 1 <= cosine["slope_95"][0] < pooled < cosine["slope_95"][1] <= 3
    expected = scipy.stats.spearmanr([score[n].mean() for n in "abc"], [measure[n].mean() for n in "abc"])
    assert cosine["rows_spearman"] == pytest.approx(expected.statistic)


def test_pez_is_compared_with_random_prompts_of_its_length(monkeypatch):
    monkeypatch.setattr(redrawn, "RANDOM_PROMPTS", 3)
    some = data.read_pairs(ROOT / "mini" / "generated").subset([5, 70])
    pictures = [some.image(i) for i in range(2)]
    assert (
        redrawn.above_random(
            inversion.settings("pez"), [{"slots_cosine": 1.0}, {"slots_cosine": -1.0}], pictures
        )
        == 1
    )


def test_figure_10_has_the_pictures_and_texts_of_each_prompt(tmp_path: Path, monkeypatch):
    """Drawing and captioner are replaced: the text of picture k is k, its embedding is the row k."""
    rows, asked = np.random.default_rng(0).normal(size=(15, 4)), []
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def drawn(plan: Plan, pipeline: None, of: list[str], noise: list[int]) -> np.ndarray:
        asked.append((of, noise))
        return np.arange(15, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)

    captioner = SimpleNamespace(preprocessing=None, captions=lambda x: [str(int(k)) for k in x])
    encoder = SimpleNamespace(encode=lambda texts: torch.from_numpy(rows[[int(text) for text in texts]]))
    for name, value in {
        "pairs_of": lambda *_: SimpleNamespace(prompts=list("abcdef")), "open_pipeline": lambda plan: None,
        "kept_pictures": drawn, "open_captioner_run": lambda *_: captioner, "sheet": lambda rows, side: rows,
    }.items():  # fmt: skip
        monkeypatch.setattr(redrawn, name, value)
    monkeypatch.setattr(data, "image_tensor", lambda picture, _: torch.tensor(picture.getpixel((0, 0))[0]))
    monkeypatch.setattr(weights, "load", lambda *_, **__: encoder)
    result = redrawn.compute_figure_10(Plan("-", SOURCES["mini"], (4,), tmp_path, 1, "cpu", {}))
    noise = list(range(redrawn.NOISE, redrawn.NOISE + 5))
    assert asked == [(["a"] * 5 + ["c"] * 5 + ["e"] * 5, noise * 3)] and result["draws"] == 5
    sheets = result["files"]["figure-10.png"]
    for k, (example, (pictures, lines)) in enumerate(zip(result["examples"], sheets, strict=True)):
        numbers = list(range(5 * k, 5 * k + 5))
        assert example["prompt"] == "ace"[k] and example["texts"] == [str(n) for n in numbers]
        assert [picture.getpixel((0, 0))[0] for picture in pictures] == numbers and len(lines) == 6
        mean = rows[numbers].mean(axis=0)
        cosine = rows[numbers] @ mean / np.linalg.norm(mean)
        found = example["cosine_to_mean"], example["deviation"]
        assert found == pytest.approx((cosine.mean(), cosine.std()))


@pytest.mark.slow
def test_both_tables_and_figures_from_trainings(make: Callable[..., Path], monkeypatch):  # noqa: F811
    monkeypatch.setattr(generation, "STEPS", 2)
    monkeypatch.setattr(redrawn, "IMAGES", 7)
    monkeypatch.setattr(redrawn, "MINI_STEPS", {"pez": 3, "ph2p": 3, "swaps": 3})
    monkeypatch.setattr(prompts, "SENTENCES", 50)
    folder = make("--table", "3,4", "--figure", "4,10", "--seeds", "0,1", *QUICK)
    three, four = read(folder, "table-3"), read(folder, "table-4")
    rows = {row["name"]: row for row in three["rows"]}
    assert three["n_test"] == [12, 12] and rows[TRUE]["exact"] == [1, 1]
    assert rows[TRUE]["cosine"] == pytest.approx([1, 1], abs=1e-5)
    runs = folder / "runs"
    result = json.loads((runs / "blip-mlc-cl-seed1" / "result.json").read_text())
    assert rows["BLIP + MLC + CL"]["cosine"][1] == pytest.approx(result["test_cosine"], abs=1e-5)
    for name in (prompts.PAPERS_SCALE, "RefCLIPScore", "CLIPScore", "100 cos"):
        assert rows["BLIP + MLC + CL"][name][1] == pytest.approx(result["scores"][name], abs=1e-4)
    redrawn_rows = {row["name"]: row for row in four["rows"]}
    assert redrawn_rows.keys() == {*rows, *redrawn.SEARCHES.values()}
    assert 0 < four["seconds"]["PEZ"] < 600
    for name in ("table-4.png", "figure-4.png", "figure-10.png", "figure-10.md"):
        assert (folder / "results" / name).stat().st_size > 500
    assert [len(e["texts"]) for e in read(folder, "figure-10")["examples"]] == [5, 5, 5]
    assert np.isfinite([row["slope"] for row in four["buys"]]).all()
