"""Table 5 by people: the page, the arithmetic of the votes, refused files, and the page in a real browser."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import Browser
from PIL import Image

import eval
from tables import generation, votes
from tables.generation import RUN, Request
from tables.registry import text_of
from training.metrics import fleiss_kappa, sign_test

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
UNDECIDED = "undecided"
OTHER = {"trained": "original", "original": "trained"}
ABOUT = {"command": "python eval.py --vote", "date": "2026-01-31", "torch": "2", "numpy": "2"}
ABOUT |= {
    "processor": "x",
    "data": "mini",
    "weights": {"unet": "sd-mini"},
    "seeds": [0],
    "run": "unet-mlc-cl",
}


def key_file(folder: Path, left: list[str], probe: list[str] | None = None, page: str = "p1") -> None:
    """The key of made-up pairs."""
    columns = zip(left, probe or [None] * len(left), strict=True)
    pairs = [{"prompt": f"prompt {k}", "left": side, "probe": p} for k, (side, p) in enumerate(columns)]
    (folder / "vote-key.json").write_text(json.dumps(ABOUT | {"page": page, "pairs": pairs}))


def vote_file(path: Path, left: list[str], choices: str, **other: object) -> str:
    """A file of votes for the U-Nets (t, o) or undecided (u)."""
    sides = [
        UNDECIDED if choice == "u" else "left" if unet.startswith(choice) else "right"
        for unet, choice in zip(left, choices, strict=True)
    ]
    by_pair = {str(k): side for k, side in enumerate(sides, 1)}
    content = {"page": "p1", "voter": path.stem, "votes": by_pair} | other
    path.write_text(json.dumps(content))
    return str(path)


def table_5(folder: Path, *files: str) -> int:
    return eval.main(["--table", "5", "--device", "cpu", "--results", str(folder), "--votes", *files])


# -- the arithmetic ----------------------------------------

# Counts, agreements and averages of the paper's table 5: 37 pairs by all alike, then 63 by no three alike.
ALIKE = "t" * 21 + "o" * 2 + "u" * 14
PAPER = [
    ALIKE + "u" * 4 + "t" * 31 + "o" * 28,
    ALIKE + "t" * 4 + "o" * 8 + "u" * 40 + "t" * 11,
    ALIKE + "o" * 3 + "u" * 50 + "t" * 10,
]


def test_votes_with_the_papers_counts_make_the_papers_table(tmp_path: Path, capsys):
    left = np.random.default_rng(5).choice(["trained", "original"], 100).tolist()
    probe = ["trained"] * 30 + ["original"] * 20 + [UNDECIDED] * 50
    key_file(tmp_path, left, probe)
    files = [vote_file(tmp_path / f"{k}.json", left, choices) for k, choices in enumerate(PAPER)]
    assert table_5(tmp_path, *files) == 0
    result = json.loads((tmp_path / "table-5.json").read_text())
    assert result["people"] == [[52, 30, 18], [36, 10, 54], [31, 5, 64]]
    assert result["agreements"] == [21, 2, 14]
    assert result["average"] == pytest.approx([119 / 3, 15, 136 / 3])
    pairs = [[a == b for a, b in zip(PAPER[i], PAPER[j], strict=True)] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert result["alike"] == [sum(pair) for pair in pairs]
    most = [max("tou", key=of.count) if max(map(of.count, "tou")) > 1 else "u"
            for of in zip(*PAPER, strict=True)]  # fmt: skip
    assert result["majority"] == [most.count(choice) for choice in "tou"]
    assert result["preference"] == pytest.approx((119 - 45) / 300)
    low, high = result["preference_95"]
    assert low < result["preference"] < high
    assert result["probe"]["votes"] == [30, 20, 50]
    assert result["probe"]["alike"] == sum(a == b[0] for a, b in zip(most, probe, strict=True))
    assert result["pairs"][37] == {
        "prompt": "prompt 37", "people": [UNDECIDED, "trained", "original"], "probe": "original"
    }  # fmt: skip
    text = (tmp_path / "table-5.md").read_text()
    assert "#1 and #3 " f"{result['alike'][1]} of 100" in text and "+24.7 percentage points" in text
    assert f"the probe agree in {result['probe']['alike']} of 100 pairs" in text
    assert text == text_of(result) and text in capsys.readouterr().out
    trained, original, undecided = result["majority"]
    for row in (
        "| choice | #1 | #2 | #3 | agreements | average | majority | probe | paper: #1 | paper: #2 | "
        "paper: #3 | paper: agreements | paper: average |",
        f"| trained | 52 | 36 | 31 | 21 | 39.7 | {trained} | 30 | 52 | 36 | 31 | 21 | 39.6 |",
        f"| original | 30 | 10 | 5 | 2 | 15.0 | {original} | 20 | 30 | 10 | 5 | 2 | 15.0 |",
        f"| undecided | 18 | 54 | 64 | 14 | 45.3 | {undecided} | 50 | 18 | 54 | 64 | 14 | 45.4 |",
    ):
        assert row in text.splitlines()


def test_fleiss_kappa_of_his_example():
    """Fleiss 1971, as often reproduced: 10 subjects, 14 raters, 5 categories."""
    counts = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
                7 7 0 0 0   3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    counts = np.array(counts.split(), dtype=int).reshape(10, 5)
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None


def test_the_sign_test():
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024) == sign_test(2, 8)
    assert sign_test(3, 3) == 1 and sign_test(0, 0) is None


def test_one_person_two_and_no_probe(tmp_path: Path):
    key_file(tmp_path, ["original"])
    assert table_5(tmp_path, vote_file(tmp_path / "a.json", ["original"], "t")) == 0
    result = json.loads((tmp_path / "table-5.json").read_text())
    assert (result["people"], result["kappa"], result["probe"]) == ([[1, 0, 0]], None, None)
    assert "kappa" not in (tmp_path / "table-5.md").read_text()
    key_file(tmp_path, left := ["trained", "original"])
    files = [vote_file(tmp_path / f"{name}.json", left, "tu") for name in "ab"]
    assert table_5(tmp_path, *files) == 0
    assert json.loads((tmp_path / "table-5.json").read_text())["kappa"] == pytest.approx(1)


# -- refusals ----------------------------------------


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"page": "p2"}, "b.json: holds votes of another page"),
        ({"voter": "A "}, "b.json: has the voter of"),
        ({"votes": {"1": "left"}}, "b.json: votes: lacks 2; add it: one of left, right, undecided"),
        ({"votes": {"1": "left", "2": "both"}}, 'b.json: votes: 2 is "both"; it must be one of left, right'),
        ({"votes": {"1": "left", "2": None}}, "b.json: votes: 2 is null; it must be one of left, right"),
        ({"votes": {"1": "left", "2": "left", "3": "left"}}, 'b.json: votes: "3": no such field'),
        ({"votes": ["left", "left"]}, "b.json: votes is"),
        ({"voter": 3}, "b.json: voter is 3; it must be a text"),
        ({"seconds": 3}, 'b.json: "seconds": no such field'),
    ],
)
def test_wrong_votes_are_refused_in_one_line(changed: dict, line: str, tmp_path: Path, capsys):
    left = ["trained", "original"]
    key_file(tmp_path, left)
    good = vote_file(tmp_path / "a.json", left, "to")
    assert table_5(tmp_path, good, vote_file(tmp_path / "b.json", left, "uu", **changed)) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "table-5.json").exists()


def test_wrong_flags_and_missing_files_are_refused(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(eval, "train_missing", lambda *given: pytest.fail("trained"))
    file = vote_file(tmp_path / "a.json", ["trained"], "t")
    for flags, line in (
        (["--table", "5", "--votes", file], "vote-key.json: is missing; give --results"),
        (["--table", "2", "--votes", file], "--votes: needs --table 5"),
        (["--vote", "--table", "2"], "--vote: give it without --table"),
    ):
        assert eval.main([*flags, "--results", str(tmp_path), "--device", "cpu"]) == 2
        assert line in capsys.readouterr().err
    key_file(tmp_path, ["trained"])
    (tmp_path / "b.json").write_text("{")
    assert table_5(tmp_path, file, str(tmp_path / "b.json")) == 2
    assert "b.json: cannot be read as JSON" in capsys.readouterr().err


# -- the page ----------------------------------------


def content_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', html, re.S)[1])


def picture_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def pictures(n: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(n).integers(256, size=(2, n, side, side, 3), dtype=np.uint8)
    return drawn[0], drawn[1]


def test_the_page_holds_the_pictures_at_the_sides_of_the_key_and_no_key():
    original, trained = pictures(40)
    prompts = [f"</script><!-- {k}" for k in range(40)]
    page_id, left, html = votes.ballot(prompts, original, trained)
    page = content_of(html)
    assert page["id"] == page_id and [pair["prompt"] for pair in page["pairs"]] == prompts
    for k, pair in enumerate(page["pairs"]):
        on_left = left[k] == "trained"
        assert np.array_equal(picture_of(pair["left"]), (trained if on_left else original)[k])
        assert np.array_equal(picture_of(pair["right"]), (original if on_left else trained)[k])
    assert [pair["id"] for pair in page["pairs"]] == [str(k) for k in range(1, 41)]
    assert 8 < left.count("trained") < 32 and set(left) == OTHER.keys()
    assert "trained" not in html and "original" not in html and not re.search(r"https?://", html)
    assert votes.ballot(prompts, original, trained) == (page_id, left, html)
    other_id, other_left, _ = votes.ballot(prompts, trained, original)
    assert other_id != page_id and other_left != left


def test_large_pictures_are_jpegs_of_their_own_size():
    original, trained = (np.zeros((1, 512, 512, 3), np.uint8) + level for level in (10, 200))
    _, left, html = votes.ballot(["a"], original.astype(np.uint8), trained.astype(np.uint8))
    (pair,) = content_of(html)["pairs"]
    assert pair["left"].startswith("data:image/jpeg")
    assert picture_of(pair["left"]).shape == (512, 512, 3)
    assert abs(int(picture_of(pair["left"]).mean()) - (200 if left == ["trained"] else 10)) < 3
    kinds = [votes.data_uri(original[0, :side, :side].astype(np.uint8))[:15] for side in (256, 257)]
    assert kinds == ["data:image/png;", "data:image/jpeg"]


def test_the_probe_chooses_the_picture_that_shows_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation, "words_shown", lambda pictures, requests: pictures)
    drawn = {"trained": np.array([0.5, 0.2, 0.3]), "original": np.array([0.4, 0.25, 0.3])}
    requests = [Request("a", "a view")] * 3
    assert votes.probe_choices(requests, drawn) == ["trained", "original", UNDECIDED]
    assert votes.probe_choices([*requests[1:], Request("a")], drawn) == [None] * 3


def test_a_page_is_written_again_and_not_over_the_key_of_another(tmp_path: Path, monkeypatch, capsys):
    """The drawing is replaced; test_generation_tables.py draws."""
    original, trained = pictures(4)
    drawn = {"original": original, "trained": trained}
    requests = [Request(f"prompt {k}") for k in range(4)]
    monkeypatch.setattr(generation, "prompt_sets", lambda plan, seed: {"test prompts": requests})
    monkeypatch.setattr(generation, "open_pipeline", lambda plan: None)
    monkeypatch.setattr(generation, "drawn_by_both", lambda plan, pipeline, requests, seed: drawn)
    started = []
    monkeypatch.setattr(eval, "train_missing", lambda plan, runs: started.append((plan.seeds, runs)) or set())
    flags = ["--vote", "--weights", "paper", "--seeds", "3,4", "--device", "cpu", "--results", str(tmp_path)]
    assert eval.main(flags) == 0
    assert started == [((3,), [RUN])] and "vote.html, 4 pairs for the voters" in capsys.readouterr().out
    page, key = ((tmp_path / name).read_bytes() for name in ("vote.html", "vote-key.json"))
    assert eval.main(flags) == 0 and page == (tmp_path / "vote.html").read_bytes()
    left = [pair["left"] for pair in json.loads(key)["pairs"]]
    vote = vote_file(tmp_path / "a.json", left, "toou", page=content_of(page.decode())["id"])
    assert table_5(tmp_path, vote) == 0
    result = json.loads((tmp_path / "table-5.json").read_text())
    assert result["people"] == [[1, 2, 1]] and result["probe"] is None
    assert result["seeds"] == [3] and result["weights"]["unet"] == "sd-1"

    original += 1
    assert eval.main(flags) == 2
    assert "vote-key.json: is the key of another page" in capsys.readouterr().err
    assert page == (tmp_path / "vote.html").read_bytes()
    assert key == (tmp_path / "vote-key.json").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH")
def test_a_person_votes_in_a_browser(tmp_path: Path):
    """From a file by keyboard and button, with a reload and steps back; eval.py reads the saved votes."""
    original, trained = pictures(5)
    prompts = [f"a <b>red</b> cube {k}" for k in range(5)]
    page_id, left, html = votes.ballot(prompts, original, trained)
    path = tmp_path / "vote.html"
    path.write_text(html)
    with Browser(CHROMIUM, tmp_path, path.as_uri()) as browser:

        def shown() -> list[str]:
            return browser.value("['count', 'prompt'].map(id => document.getElementById(id).textContent)")

        def pressed() -> list[str]:
            chosen = "document.querySelectorAll('[aria-pressed=true]')"
            return browser.value(f"[...{chosen}].map(button => button.dataset.choice)")

        assert browser.value("document.querySelector('#vote').hidden")
        browser.value("document.getElementById('voter').focus()")
        browser.send("Input.insertText", text=" Ana 12")
        browser.press("Backspace")  # in the name it deletes a letter
        browser.press("Enter", text="\r")
        assert shown() == ["1 of 5", prompts[0]]
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth === 8)")
        browser.press("ArrowLeft")
        browser.press("ArrowRight", autoRepeat=True)  # a key held down
        assert shown() == ["2 of 5", prompts[1]] and pressed() == []
        browser.press("ArrowRight")
        browser.press("ArrowDown")
        browser.reload("document.getElementById('start').hidden")
        assert shown() == ["4 of 5", prompts[3]]
        browser.press("Backspace")
        assert shown() == ["3 of 5", prompts[2]] and pressed() == [UNDECIDED]
        browser.press("ArrowUp")
        assert shown() == ["2 of 5", prompts[1]] and pressed() == ["right"]
        browser.press("ArrowLeft")  # in place of the former vote
        assert shown() == ["4 of 5", prompts[3]]
        browser.value("document.getElementById('right').click()")
        browser.press("ArrowDown")
        assert browser.value("['vote', 'done'].map(id => document.getElementById(id).hidden)") == [
            True,
            False,
        ]
        browser.value("document.getElementById('save').click()")
        file = browser.downloaded("*.json")
        assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data", "blob"}
    saved = json.loads(file.read_text())
    by_pair = {"1": "left", "2": "left", "3": UNDECIDED, "4": "right", "5": UNDECIDED}
    assert file.name == f"votes-Ana-1-{page_id}.json"
    assert saved == {"page": page_id, "voter": "Ana 1", "votes": by_pair}
    key_file(tmp_path, left, page=page_id)
    assert table_5(tmp_path, str(file)) == 0
    result = json.loads((tmp_path / "table-5.json").read_text())
    choices = [pair["people"][0] for pair in result["pairs"]]
    assert choices == [left[0], left[1], UNDECIDED, OTHER[left[3]], UNDECIDED]
