"""Tables 5 and 6 and the noise study, on few scenes and with few pictures."""

import base64
import io
import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tables import make, read, trained_here  # noqa: F401  (fixtures)

import data
import eval
import generate
import weights
from mini import drawbench, naming, scenes
from tables import generation, swap
from tables.exhibit import Exhibit
from tables.registry import EXHIBITS, text_of
from tables.runs import SOURCES, Plan
from training.metrics import cosines

QUICK = shlex.split("--epochs 1 --batch-size 12 --val-size 12 --test-size 12")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = {"STEPS": 2, "MINI_PROMPTS": 6, "VOTES": 5, "NOISE_PROMPTS": 3, "NOISE_SEEDS": 4}
    for name, value in few.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(drawbench, "TRAINING_CANDIDATES", 10)
    monkeypatch.setattr(drawbench, "prompts", partial(drawbench.prompts, per_category=1))


def plan_of(folder: Path) -> Plan:
    return Plan("-", SOURCES["mini"], (0, 1), folder / "runs", 1, "cpu", {})


def test_table_6_is_what_the_judges_read(make: Callable[..., Path]):  # noqa: F811
    folder = make("--table", "6", "--seeds", "0,1", *QUICK)
    rows = {(row["prompts"], row["judge"]): row for row in read(folder, "table-6")["rows"]}
    judges = ("itself", "a run of another seed")
    assert rows.keys() == {(name, judge) for name in ("DrawBench", "test prompts") for judge in judges}
    assert [rows[name, "itself"]["n_prompts"] for name in ("DrawBench", "test prompts")] == [8, 6]
    assert read(folder, "table-6")["bench"] == "mini"

    plan = plan_of(folder)
    expected: dict[str, list[np.ndarray]] = {"itself": [], "a run of another seed": []}
    for seed in (0, 1):
        requests = generation.prompt_sets(plan, seed)["test prompts"]
        prompts = [request.prompt for request in requests]
        pictures = generation.drawn(plan, None, prompts, list(range(6)), seed)  # kept: nothing is drawn again
        targets = weights.load("minilm").encode(prompts).numpy()
        for judge, run in (("itself", seed), ("a run of another seed", 1 - seed)):
            expected[judge].append(cosines(generation.predicted(plan, run, pictures), targets))
    for judge in judges:
        assert rows["test prompts", judge]["trained"] == pytest.approx(np.mean(expected[judge]))
    bench = rows["DrawBench", "itself"]  # the same prompts for both seeds
    assert bench["n"] == 8 and rows["test prompts", "itself"]["n"] == 12
    assert bench["difference"] == pytest.approx(np.mean(bench["per_seed"])) and len(bench["per_seed"]) == 2
    text = (folder / "results" / "table-6.md").read_text()
    assert "| DrawBench | 8 | itself |" in text and "| .4594 | .5067 |" in text


def test_pictures_of_the_two_unets_start_from_the_same_noise(make: Callable[..., Path], monkeypatch):  # noqa: F811
    """Swapped after all steps the trained U-Net draws what the original draws."""
    folder = make("--table", "6", "--seeds", "0", *QUICK)
    plan = plan_of(folder)
    pipeline = generation.open_pipeline(plan)
    original = generation.drawn(plan, pipeline, ["a red cat"], [3], None)
    assert not np.array_equal(original, generation.drawn(plan, pipeline, ["a red cat"], [3], 0))
    monkeypatch.setattr(generation, "SWAP_AFTER", 2)
    assert np.array_equal(original, generation.drawn(plan, pipeline, ["a red cat"], [3], 0))


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of random weights, with a card."""
    torch.manual_seed(0)
    model = naming.Namer(naming.swin.Swin(naming.PROBE))
    naming.write_tensors(model.state_dict(), tmp_path / "probe" / "model.safetensors")
    card = {"found": {"drawn": {"subject": 0.9}}}
    (tmp_path / "probe" / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(naming, "FOLDER", tmp_path)


def test_table_5_counts_what_the_probe_finds(make: Callable[..., Path], probe: None):  # noqa: F811
    folder = make("--table", "5", "--seeds", "0,1", *QUICK)
    result = read(folder, "table-5")
    plan = plan_of(folder)
    assert result["n"] == 5 and [sum(votes) for votes in result["votes"]] == [5, 5]
    for i, seed in enumerate((0, 1)):
        requests = generation.prompt_sets(plan, seed)["test prompts"][:5]
        prompts = [request.prompt for request in requests]
        shares = [
            generation.words_shown(generation.drawn(plan, None, prompts, list(range(5)), run), requests)
            for run in (seed, None)
        ]
        assert result["votes"][i][0] == int((shares[0] > shares[1]).sum())
        assert result["test"]["per_seed"][i] == pytest.approx(float((shares[0] - shares[1]).mean()))
    assert "subject 90.0%" in (folder / "results" / "table-5.md").read_text()
    rows = {row["slot"]: row for row in result["slots"]}
    assert rows["all"]["per_seed"] == pytest.approx(result["test"]["per_seed"])
    asked = [label for seed in (0, 1) for request in generation.prompt_sets(plan, seed)["test prompts"][:5]
             for label in naming.named_labels(request.view)]  # fmt: skip
    assert rows["place"]["n"] == sum(slot == "place" for slot, _ in asked)


def test_shares_by_kind_leave_out_materials_and_relations_only_in_the_second_total():
    found = [
        {("subject", "cat"): True, ("material", "gold"): False},
        {("subject", "dog"): False, ("subject", "cat"): True, ("relation", "above"): True},
    ]
    shares = generation.slot_shares(found)
    assert shares["all"] == pytest.approx([1 / 2, 2 / 3]) and shares[generation.ALL_HEARD] == [1, 1 / 2]
    assert shares["subject"] == [1, 0, 1] and shares["relation"] == [1] and shares["place"] == []
    other = generation.slot_shares([{label: True for label in of} for of in found])
    rows = {row["slot"]: row for row in generation.slot_rows([shares, shares], [other, shares])}
    assert rows["subject"]["per_seed"] == pytest.approx([1 / 3, 0]) and rows["subject"]["n"] == 6
    assert rows["material"]["trained"] == 0.5 and "place" not in rows
    assert "| subject | 6 | .6667 | .8333 | +.1667 |" in generation.slot_table(list(rows.values()))


@pytest.mark.slow
def test_table_swap_judges_each_unet(make: Callable[..., Path], probe: None, monkeypatch):  # noqa: F811
    arm = next(condition for condition in swap.ARMS if condition.arm.reading and condition.arm.noise)
    conditions = (swap.ORIGINAL, swap.PARTS[-1], swap.RANDOM[-1], arm)
    monkeypatch.setattr(swap, "CONDITIONS", conditions)
    monkeypatch.setattr(swap, "CONTRASTS", swap.CONTRASTS[-1:])
    folder = make("--table", "swap", "--seeds", "0,1", *QUICK)
    result = read(folder, "table-swap")
    assert list(result["conditions"]) == [condition.title for condition in conditions]
    original, whole, random, trained = (result["conditions"][condition.title][1] for condition in conditions)
    assert original["change"] == 0 and random["change"] == pytest.approx(whole["change"], rel=1e-3)
    assert original["noise"] != random["noise"] and trained["test"] != original["test"]

    plan = plan_of(folder)
    requests = generation.prompt_sets(plan, 1)["test prompts"]
    prompts, noise = [request.prompt for request in requests], list(range(6))
    for of, run in ((original, None), (whole, 1)):
        pictures = generation.drawn(plan, generation.open_pipeline(plan), prompts, noise, run)
        judged = of["test prompts"]
        found = generation.slot_shares(generation.labels_shown(pictures, requests))
        assert judged["probe"] == pytest.approx(np.mean(found[generation.ALL_HEARD]))
        targets = weights.load("minilm").encode(prompts).numpy()
        read_by = cosines(generation.predicted(plan, 0, pictures), targets)
        assert judged["reader"] == pytest.approx(read_by.mean(), abs=1e-5)
        assert judged["CLIP"] == pytest.approx(swap.clip_cosines(pictures, prompts, "cpu").mean())
    (row,) = [row for row in result["rows"] if row["condition"] == arm.title and row["judge"] == "CLIP"
              and row["prompts"] == "DrawBench"]  # fmt: skip
    by_seed = [[seed["DrawBench"]["CLIP"] for seed in result["conditions"][title]]
               for title in (arm.title, "original")]  # fmt: skip
    assert row["per_seed"] == pytest.approx(np.subtract(*by_seed)) and row["against"] == "original"
    assert f"| {swap.PARTS[-1].title} − {swap.RANDOM[-1].title} |" in text_of(result)

    monkeypatch.setattr(swap.EncoderTrainer, "train_step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(generate.Pipeline, "draw", lambda *_, **__: pytest.fail("drew again"))
    make("--table", "swap", "--seeds", "0,1", *QUICK)
    assert read(folder, "table-swap")["rows"] == result["rows"]


def test_the_page_for_voters_has_the_pictures_and_the_probes_choices_of_table_5(
    make: Callable[..., Path], probe: None  # noqa: F811
):  # fmt: skip
    folder = make("--vote", "--seeds", "1,0", *QUICK)
    key = json.loads((folder / "results" / "vote-key.json").read_text())
    requests = generation.prompt_sets(plan_of(folder), 1)["test prompts"][:5]
    drawn = generation.drawn_by_both(plan_of(folder), None, requests, 1)  # kept: nothing is drawn again
    assert [pair["prompt"] for pair in key["pairs"]] == [request.prompt for request in requests]
    html = (folder / "results" / "vote.html").read_text()
    page = json.loads(html.partition('id="page">')[2].partition("</script>")[0])
    for k, (pair, shown) in enumerate(zip(key["pairs"], page["pairs"], strict=True)):
        picture = Image.open(io.BytesIO(base64.b64decode(shown["left"].partition(",")[2])))
        assert np.array_equal(np.asarray(picture), drawn[pair["left"]][k])
    choices = [pair["probe"] for pair in key["pairs"]]
    folder = make("--table", "5", "--seeds", "1", *QUICK)
    counts = [choices.count(choice) for choice in ("trained", "original", "undecided")]
    assert read(folder, "table-5")["votes"] == [counts]


def test_the_share_of_words_shown_is_that_of_the_probes_findings(probe: None):
    scene = scenes.candidate(3, 4, truthful=True)
    picture = np.asarray(scenes.render(scene))[None]
    request = generation.Request(scene.prompt, scene.said)
    row = naming.name_pictures(naming.load_probe(naming.FOLDER), picture.transpose(0, 3, 1, 2).copy())[0]
    found = list(naming.shown_labels(row, scene.said).values())
    assert generation.words_shown(picture, [request])[0] == pytest.approx(sum(found) / len(found))


def test_the_noise_study_by_hand(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr(generation, "BATCH", 1)  # more pictures than are drawn or read at a time
    folder = make("--table", "noise", "--seeds", "0", *QUICK)
    (entry,) = read(folder, "table-noise")["per_seed"]
    plan = plan_of(folder)
    prompts = [request.prompt for request in generation.prompt_sets(plan, 0)["test prompts"][::2]]
    pictures = generation.drawn(plan, None, [p for p in prompts for _ in range(4)], [0, 1, 2, 3] * 3, None)
    assert pictures.reshape(12, -1).any(axis=1).all()
    deviations = []
    for i in range(3):
        rows = generation.predicted(plan, 0, pictures[4 * i : 4 * i + 4]).astype(np.float64)
        mean = rows.sum(axis=0) / np.linalg.norm(rows.sum(axis=0))
        deviations.append(np.std(rows @ mean))
    assert entry["deviation"] == pytest.approx(np.mean(deviations), rel=1e-4)


def test_a_subset_of_the_test_prompts_is_spread_over_the_data():
    assert generation.spread(range(1000), 4) == [0, 250, 500, 750]
    assert generation.spread("abcde", 3) == ["a", "b", "d"] and generation.spread("ab", 3) == ["a", "b"]


def test_drawbench_is_read_from_its_file(tmp_path: Path):
    path = tmp_path / "drawbench.csv"
    path.write_text('Prompts,Category\nA red car.,Colors\n"A cat, left of a dog.",Positional\n')
    assert generation.read_drawbench(path) == ["A red car.", "A cat, left of a dog."]
    path.write_text("\ufeffPrompts\nA red car.\n   \n", encoding="utf-8")
    assert generation.read_drawbench(path) == ["A red car."]
    with pytest.raises(data.DataError, match="no regular file"):
        generation.read_drawbench(tmp_path)
    path.write_text("prompt\nA red car.\n")
    with pytest.raises(data.DataError, match="column Prompts is missing"):
        generation.read_drawbench(path)
    with pytest.raises(data.DataError, match="missing.csv: no such file"):
        generation.read_drawbench(tmp_path / "missing.csv")


def test_without_drawbench_table_6_does_not_speak_of_it():
    result = {"bench": None, "rows": [], "steps": 50, "guidance": 7.5, "swap_after": 1, "run": "unet-mlc-cl"}
    stated = {"command": "", "date": "", "torch": "", "data": "mini", "seeds": [0], "weights": {}}
    assert "DrawBench is" not in generation.table_6_text(result | stated)
    text = generation.table_6_text(result | stated | {"bench": "mini"})
    assert "DrawBench is a list of prompts for mini scenes" in text


def test_what_would_fail_after_training_is_refused_before(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval, "train_missing", lambda *given: pytest.fail("trained"))
    (tmp_path / "own").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "own" / f"{i}.png")
        (tmp_path / "own" / f"{i}.txt").write_text(f"my own prompt {i}")
    (tmp_path / "file").touch()
    for flags, said in (
        (["--table", "5", "--data", "own"], "--table 5: the probe"),
        (["--table", "ceiling", "--weights", "paper"], "--table ceiling: the probe"),
        (["--table", "6", "--drawbench", "missing.csv"], "missing.csv"),
        (["--table", "6", "--drawbench", "file"], "file: column Prompts is missing or empty"),
        (["--table", "6", "--results", "file/x"], "file/x"),
        (["--table", "crossed"], "--table crossed: needs the folder of a second generator"),
    ):
        assert eval.main(flags) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    written = []
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: set())
    monkeypatch.setattr(Exhibit, "write", lambda self, plan, folder, kind, number: written.append(number))
    assert eval.main(["--table", "all", "--data", "own"]) == 0
    impossible = {"budget", "ceiling", "crossed", "denoised", "difficulty", "probe", "shift", "swap", "words"}
    assert written == [name for name in EXHIBITS["table"] if name not in {5, *impossible}]


def test_the_little_drawbench_asks_for_what_it_says():
    asked = drawbench.prompts(set())
    again = drawbench.prompts({asked[0].prompt})
    assert [one.category for one in asked] == list(drawbench.CATEGORIES)
    assert again[0].prompt != asked[0].prompt and again[1:] == asked[1:]
    for one in asked:
        for _, key in naming.named_labels(one.view):
            tables = [table for table in naming.TABLES.values() if key in table]
            assert any(word in one.prompt for table in tables for _, word in scenes.words_of(table, key)), one


def test_all_tables_are_known_by_name():
    numbers = [name for name in EXHIBITS["table"] if isinstance(name, int)]
    names = list(EXHIBITS["table"])[len(numbers) :]
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert names == sorted(names) and {"captions", "crossed", "swap", "sweep", "words"} <= set(names)
