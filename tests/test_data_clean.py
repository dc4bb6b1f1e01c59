"""The cleaning rules of section 4.1 against a slow and plain oracle, and the splits."""

import io
import json
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataError, clean, read_pairs, same_pictures, split
from files import sizes_and_sums

PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "prompts" / "diffusiondb_10k.txt"


def plain_clean(prompts):
    """Each prompt against every one kept before: quadratic, and written from the paper's sentence."""
    kept, texts = [], []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            continue
        prompt = prompt.strip()
        if prompt.lower() in ("null", "nan") or not any(c.isalnum() for c in prompt):
            continue
        if any(ord(c) > 127 for c in prompt):
            continue
        if any(
            prompt == t
            or (min(len(prompt), len(t)) >= 50 and (prompt[:50] == t[:50] or prompt[-50:] == t[-50:]))
            for t in texts
        ):
            continue
        kept.append(i)
        texts.append(prompt)
    return kept


def test_each_rule_in_its_order():
    head, tail = "h" * 50, "t" * 50
    prompts = [
        "  a cat \n",
        "",
        "   ",
        None,
        float("nan"),
        "null",
        " NaN ",
        "...",
        "_ -",
        "nan cat",  # 1, 8 empty, 1
        "café",
        "一只猫",
        "a “cat”",
        "é" * 60,
        "\u00a0",  # 4 foreign, 1 empty
        "a cat",
        "A cat",
        head + " one",
        head + " two",
        "h" * 49 + " three",  # dup, -, -, dup, -
        "one " + tail,
        "two " + tail,
        "three " + "t" * 49,
        head + " four " + tail,
        head,
        tail,  # -, dup, -, 3 dup
    ]
    kept, report = clean(prompts)
    assert kept.dtype == np.int64 and kept.tolist() == [0, 9, 16, 17, 19, 20, 22]
    assert report == {"read": 26, "empty": 9, "non_english": 4, "near_duplicate": 6, "kept": 7}
    assert list(report) == ["read", "empty", "non_english", "near_duplicate", "kept"]


def test_a_dropped_prompt_drops_nobody():
    shared = "x" * 50
    first, second, third = shared + " a " + "y" * 50, shared + " b " + "z" * 50, "c " + "z" * 50
    assert clean([first, second, third])[0].tolist() == [0, 2], (
        "third resembles second alone, which was dropped"
    )


def test_fifty_is_the_border():
    for n, expected in ((49, [0, 1]), (50, [0])):
        assert clean(["x" * n + "abc" * 20, "x" * n + "def" * 20])[0].tolist() == expected
        assert clean(["abc" * 20 + "x" * n, "def" * 20 + "x" * n])[0].tolist() == expected
    same = "s" * 50
    assert clean([same, same + "more"])[0].tolist() == [0]
    assert clean(["s" * 49, "s" * 49 + "more" * 9])[0].tolist() == [0, 1]


def test_equal_prompts_alone_can_be_dropped():
    prompts = ["x" * 60 + " one", "x" * 60 + " two", "x" * 60 + " one", "null", "nulls"]
    kept, report = clean(prompts, near_duplicates=False)
    assert kept.tolist() == [0, 1, 4]
    assert report == {"read": 5, "empty": 1, "non_english": 0, "duplicate": 1, "kept": 3}


@pytest.mark.parametrize("seed", range(8))
def test_against_the_plain_oracle(seed):
    generator = np.random.default_rng(seed)
    pieces = ["a" * 25, "b" * 25, "c" * 24, "d" * 26, "e", " ", "é", "f" * 49, "null", "nan", "-", "g" * 51]
    prompts = ["".join(generator.choice(pieces, generator.integers(0, 5))) for _ in range(400)]
    prompts += [None, float("nan")] + prompts[:50]
    kept, report = clean(prompts)
    assert kept.tolist() == plain_clean(prompts)
    assert report["read"] == len(prompts) == sum(report[k] for k in report if k != "read")


@pytest.mark.skipif(not PROMPTS.exists(), reason="the real prompts are not here")
def test_against_the_plain_oracle_on_real_prompts():
    prompts = PROMPTS.read_text().splitlines()[:1500]
    kept, report = clean(prompts)
    assert kept.tolist() == plain_clean(prompts) and 0 < report["near_duplicate"] < 500


def test_nothing_and_generators():
    assert clean([])[0].shape == (0,) and clean([])[1]["read"] == 0
    assert clean(str(k) for k in range(3))[0].tolist() == [0, 1, 2]


# splits -----------------------------------------------------------------------------------------------------


def test_split_is_disjoint_covering_seeded_and_fixed():
    prompts = [f"prompt {k}" for k in range(40)]
    rows = split(prompts, 0, 5, 7)
    assert list(rows) == ["train", "val", "test"] and [len(v) for v in rows.values()] == [28, 5, 7]
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(40))
    assert all(v.dtype == np.int64 and (np.diff(v) > 0).all() for v in rows.values())
    again, other = split(prompts, 0, 5, 7), split(prompts, 1, 5, 7)
    assert all(np.array_equal(rows[k], again[k]) for k in rows)
    assert not np.array_equal(rows["test"], other["test"])
    assert rows["val"].tolist() == FIXED_VAL, "splits must not change between platforms and versions"


FIXED_VAL = [1, 10, 18, 22, 34]


@pytest.mark.parametrize("n,expected", [(3, 1), (8, 1), (100, 12), (300_000, 30_000)])
def test_split_defaults(n, expected):
    rows = split([str(k) for k in range(n)], 3)
    assert (len(rows["val"]), len(rows["test"])) == (expected, expected) and len(
        rows["train"]
    ) == n - 2 * expected


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_never_cross_splits(seed):
    generator = np.random.default_rng(seed)
    variants = ["A  Cat{}", "a cat{}", " a CAT{} ", "a\tcat{}"]
    prompts = [variants[generator.integers(4)].format(generator.integers(30)) for _ in range(200)]
    rows = split(prompts, seed)
    seen = {name: {" ".join(prompts[i].lower().split()) for i in index} for name, index in rows.items()}
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])
    assert sum(map(len, rows.values())) == 200 and all(map(len, rows.values()))
    assert len(rows["val"]) <= 25 and len(rows["test"]) <= 25


def test_split_of_few_large_groups():
    rows = split(["a"] * 10 + ["b"] * 3 + ["c"] * 4, 0, 1, 1)
    assert sorted(map(len, rows.values())) == [3, 4, 10] and len(rows["train"]) == 10
    for seed in range(3):  # where the large one comes first, too, the small ones fill the splits
        rows = split(["a"] * 10 + list("bcdefghijk"), seed, 3, 3)
        assert [len(rows[name]) for name in ("train", "val", "test")] == [14, 3, 3]


@pytest.mark.parametrize(
    "prompts,sizes",
    [
        ([], (None, None)),
        (["a"], (None, None)),
        (["a", "b"] * 9, (None, None)),
        (list("abcdef"), (3, 3)),
        (list("abcdef"), (0, 1)),
        (list("abcdef"), (1, -1)),
    ],
)
def test_too_few_to_split(prompts, sizes):
    with pytest.raises(DataError, match="distinct prompts and pictures cannot give"):
        split(prompts, 0, *sizes)


def test_the_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "clean.py"
    run = subprocess.run(
        [sys.executable, script, "--prompts", "20000"], capture_output=True, text=True, check=True
    )
    assert "kept" in run.stdout and "peak" in run.stdout


# pictures ---------------------------------------------------------------------------------------------------


def test_a_picture_lies_in_one_split():
    prompts = [f"prompt {k}" for k in range(120)]
    pictures = [k // 3 for k in range(120)]
    rows = split(prompts, 0, 15, 15, pictures)
    seen = {name: {pictures[i] for i in index} for name, index in rows.items()}
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])
    assert [len(rows[name]) for name in ("train", "val", "test")] == [90, 15, 15]
    # a prompt of two pictures, and a picture of two prompts, join all that they touch
    joined = split(["a", "b", "b", "c", "d", "e"], 0, 1, 1, [0, 0, 1, 1, 2, 3])
    assert sorted(map(len, joined.values())) == [1, 1, 4]
    distinct = split(prompts, 0, 15, 15, range(120))
    assert all(np.array_equal(distinct[k], v) for k, v in split(prompts, 0, 15, 15).items())
    with pytest.raises(DataError, match="1 distinct prompts and pictures"):
        split(prompts, 0, 15, 15, [7] * 120)


@pytest.mark.parametrize("numbers", [(-1, 1, 1), (0, 2.5, 1), (0, 1, "1"), (1.5, 1, 1)])
def test_numbers_of_a_split_that_cannot_be(numbers):
    with pytest.raises(DataError, match="whole numbers"):
        split(list("abcdefgh"), *numbers)


def test_equal_pictures_are_found_in_zips_and_folders(tmp_path):
    def picture(k):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (k, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    names = {"a.png": 1, "b.png": 2, "c.png": 1, "d.png": 3}
    for home in ("one", "two"):
        (tmp_path / "zips").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "zips" / f"part-{home}.zip", "w") as archive:
            archive.writestr("p.json", json.dumps({name: {"p": name + home} for name in names}))
            for name, k in names.items():
                archive.writestr(name, picture(k))
        (tmp_path / "loose" / home).mkdir(parents=True)
        for name, k in names.items():
            (tmp_path / "loose" / home / name).write_bytes(picture(k))
            (tmp_path / "loose" / home / f"{name}.txt").write_text(name + home)
    for folder in ("zips", "loose"):
        pairs = read_pairs(tmp_path / folder)
        assert same_pictures(pairs).tolist() == [0, 1, 0, 2, 0, 1, 0, 2]
        # two pictures alone are taken for blanks
        assert same_pictures(pairs.subset([3, 1, 7])).tolist() == [0, 1, 2]
    (tmp_path / "loose/one/a.png").unlink()
    assert len(set(same_pictures(pairs).tolist())) == 4


def test_sums_are_of_files_that_have_the_size_of_another(tmp_path):
    names = ["xy", "gone", "gone too", "zw", "abc", "defg", "none", "xy", "."]
    for name in ("xy", "zw", "abc", "defg", "none"):
        (tmp_path / name).write_text(name.replace("none", ""))
    marks = sizes_and_sums([tmp_path / name for name in names], {4})
    read = [(len(text), zlib.crc32(text.encode())) for text in ("xy", "zw", "defg")]
    assert [marks[k] for k in (0, 3, 4, 5, 6, 7)] == [*read[:2], (3, 0), read[2], (0, 0), read[0]]
    assert len({marks[k] for k in (1, 2, 8)}) == 3 and max(marks[1], marks[2], marks[8]) < (0, 0)
