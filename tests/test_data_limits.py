"""Readers alter and lose nothing in silence, and refuse what would wait or fill the memory."""

import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from test_data_readers import chunk, part, picture

import data
import files
import graphs
import schema
from data import (
    DataError,
    Preprocessing,
    image_tensor,
    load_image,
    read_captions,
    read_pairs,
)

# nothing altered or lost in silence -------------------------------------------------------------------------


def folder_of(tmp_path, *names, table=None, **texts):
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(k))
    for name, text in texts.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_rows_that_a_table_would_alter_are_passed_over(tmp_path):
    folder_of(tmp_path, *"abcdef")
    (tmp_path / "list.csv").write_text(
        'file_name,text\na,one\nb,two, with a comma\nc,"three" and more\nd,"four, quoted"\ne,five\n'
        'f,"six\nopen\n'
    )
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one", "four, quoted", "five"]
    reasons = [line.split(", line ")[1] for line in pairs.skipped]
    assert [line[:20] for line in reasons] == [
        "3: has more fields t",
        "4: does not parse ('",
        "8: does not parse (u",
    ]


def test_lists_numbers_and_lone_surrogates_as_texts(tmp_path):
    folder_of(tmp_path, *"abcd")
    rows = [("a", ["one", " two "]), ("b", 5), ("c", [None, 1]), ("d", "x \ud83d y")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one", "two", "", "x \ufffd y"] and pairs.names == ["a", "a", "c", "d"]
    assert [line.rsplit(": ", 1)[1] for line in pairs.skipped] == ["its text is no string (int)"] * 2
    (tmp_path / "list.jsonl").unlink()
    (tmp_path / "list.csv").write_text('file_name,text\na,"[""one"", ""two""]"\nb,[not json]\n')
    assert read_pairs(tmp_path).prompts == ["one", "two", "[not json]"]
    (tmp_path / "list.csv").write_bytes(b'file_name,text\r\na,"one\r\ntwo"\r\n')
    assert read_pairs(tmp_path).prompts == ["one\r\ntwo"]


def test_texts_beside_images_under_every_name(tmp_path):
    folder_of(tmp_path, "a.png", "b.png", "c.png", "d.png", "d.jpg", "e.JFIF", "f.PNG")
    names = {
        "a.txt": "a",
        "a.caption": "not this",
        "b.png.txt": "b",
        "c.caption": "c",
        "d.png.txt": "dp",
        "d.txt": "d",
        "e.TXT": "e",
        "f.txt": "f",
        "._a.txt": "\0",
        "._a.png": "\0",
    }
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.png").write_text("junk")
    pairs = read_pairs(tmp_path)
    assert dict(zip(pairs.names, pairs.prompts, strict=True)) == {
        "a.png": "a",
        "b.png": "b",
        "c.png": "c",
        "d.jpg": "d",
        "d.png": "dp",
        "e.JFIF": "e",
        "f.PNG": "f",
    }
    assert pairs.skipped == []


def test_other_formats_are_counted(tmp_path, caplog):
    folder_of(tmp_path, "a.png", "b.avif", "c.heic", "d.mp4", "e", a__txt="a", e__txt="e", readme__md="x")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["a"]
    assert sorted(Path(line.split(":")[0]).name for line in pairs.skipped) == [
        "b.avif",
        "c.heic",
        "d.mp4",
        "e",
    ]
    assert caplog.text.endswith(" ...\n")


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    folder_of(tmp_path, "a.png", "no/b.png", a__txt="a")
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (open if Path(path).name == "no" else listed)(path))
    assert read_pairs(tmp_path).skipped == [f"{tmp_path}/no: the folder cannot be listed (Is a directory)"]


def test_metadata_of_several_folders_are_read_and_no_other_tables_there(tmp_path):
    for k, name in enumerate(("test/metadata", "train/metadata", "train/more")):
        (folder_of(tmp_path, f"{name}.png") / f"{name}.csv").write_text(f"path,p\nmetadata.png,{k}\n")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["0", "1"] and [a.name for a in pairs.archives] == ["test", "train"]


def test_linked_folders_are_read_once(tmp_path):
    root = folder_of(tmp_path / "root", "own/a.png", "own/a.txt")
    (root / "own/a.txt").write_text("a")
    other = folder_of(tmp_path / "other", "b.png")
    (other / "b.txt").write_text("b")
    (root / "again").symlink_to(root / "own")
    (root / "own/up").symlink_to(root)
    (root / "linked").symlink_to(other)
    (root / "twice").symlink_to(other)
    (root / "nowhere").symlink_to(tmp_path / "gone")
    pairs = read_pairs(root)
    assert pairs.names == ["linked/b.png", "own/a.png"] and pairs.prompts == ["b", "a"]
    assert pairs.image(0).size == (12, 8)


@pytest.mark.parametrize("file, listed", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_whose_accents_are_written_apart(tmp_path, file, listed):
    """Macs split "é" into letter and accent; both are the same text."""
    folder_of(tmp_path, normalize(file, "café.png"))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{normalize(listed, 'café.png')},a cup\n")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["a cup"] and pairs.names == [normalize(file, "café.png")]
    assert pairs.image(0).size == (12, 8) and not pairs.skipped


def test_names_written_on_windows(tmp_path):
    folder_of(tmp_path, "images/a.png", "other/a.png", r"x\b.png")  # the last one is not of Windows
    rows = "file_name,text\r\nimages\\a.png,1\r\nother\\a.png,2\r\nx\\b.png,3\r\n"
    (tmp_path / "metadata.csv").write_bytes(rows.encode())
    pairs = read_pairs(tmp_path)
    assert pairs.names == ["images/a.png", "other/a.png", r"x\b.png"] and pairs.image(0).size == (12, 8)
    (tmp_path / "c.csv").write_text("image,caption\nimages\\a.png,first\nother\\a.png,second\n")
    assert read_captions(tmp_path / "c.csv", pairs) == ["first", "second", ""]


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("prompts.csv", "imgId,prompt\n1,a\n", r" \(it has imgid, prompt\)"),
        ("images/list.csv", "a,b\n1,2\n", r" \(it has a, b\)"),
        ("metadata.csv", "file_name,label\na.png,3\n", r" \(it has file_name, label\)"),
        ("metadata.jsonl", '{"id": 1}\n', r" \(it has id\)"),
        ("metadata.json", "[]", r" \(it is a .json\)"),
        ("list.csv", "file_name;text\na.png;x\n", r" \(it has file_name;text\)"),
        ("list.tsv", "file_name\ttext\n", r" \(it is a .tsv\)"),
        ("x.parquet", "PAR1", r" \(it is a .parquet\)"),
        ("list.csv", "file_name,text\n", r" \(it has no rows\)"),
        ("metadata.csv", "file_name,text\na.png,\xff\n", r" \(.*metadata.csv: .*save it as UTF-8 .csv\)"),
    ],
)
def test_tables_that_are_not_understood_are_named(tmp_path, name, text, why):
    folder_of(tmp_path, "images/a.png")
    (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(DataError, match=rf"{name}: (no manifest|not understood).*a.png: no text beside it"):
        read_pairs(tmp_path)
    (tmp_path / "images/a.txt").write_text("a")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["a"] and len(pairs.skipped) == 1
    assert re.fullmatch(f".*{name}: no manifest, .*{re.escape(data.COLUMNS)}{why}", pairs.skipped[0])


def test_what_is_not_listed_is_counted(tmp_path):
    folder_of(tmp_path, "train/a.png", "test/a.png", "other/b.png", other__txt="b")
    (tmp_path / "train/metadata.csv").write_text("file_name,text\na.png,one\n")
    (tmp_path / "test/metadata.csv").write_text("file_name;text\na.png;two\n")
    (tmp_path / "other/metadata.parquet").write_bytes(b"PAR1")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one"] and len(pairs.skipped) == 4
    for where in ("test/metadata.csv: no man", "other/metadata.parquet: no", "test/a.png: not", "b.png: not"):
        assert sum(where in line for line in pairs.skipped) == 1
    part = folder_of(tmp_path / "parts", "part-000001/a.png", "b.png", b__txt="two")
    (part / "part-000001/part-000001.json").write_text('{"a.png": {"p": "one"}}')
    pairs = read_pairs(part)
    assert pairs.prompts == ["one"] and pairs.skipped[0].startswith(f"{part}/b.png: in no part")
    below = folder_of(tmp_path / "below", "sub/a.png")
    (below / "sub/list.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    with pytest.raises(DataError, match="sub/list.jsonl: a manifest, but in a folder below"):
        read_pairs(below)


INFOTEXT = "a barn\nNegative prompt: ugly\nSteps: 20, Sampler: Euler, Seed: 3"


@pytest.mark.parametrize(
    "rows, prompts",
    [
        ('{"image": 1, "filename": "a.png", "text": "", "caption": "one"}', ["one"]),
        ('{"path": "a.png"}\n{"path": "b.png", "text": "two"}', ["", "two"]),
        (json.dumps({"image": "a.png", "text": INFOTEXT}), ["a barn"]),
        (json.dumps({"image": "a.png", "text": "['one', \"it's two\"]"}), ["one", "it's two"]),
        (json.dumps({"image": "a.png", "text": "[one, two"}), ["[one, two"]),
        (json.dumps({"image": "a.png", "text": "[1, 2]"}), ["[1, 2]"]),
    ],
)
def test_texts_of_a_manifest(tmp_path, rows, prompts):
    folder_of(tmp_path, "a.png", "b.png")
    (tmp_path / "list.jsonl").write_text(rows)
    assert read_pairs(tmp_path).prompts == prompts


def test_json_beside_an_image(tmp_path):
    folder_of(tmp_path, "a.png", "b.png", "c.png", a__txt='{"prompt": "one", "negative_prompt": "ugly"}')
    (tmp_path / "b.json").write_text('{"prompt": "two", "seed": 3, "num_inference_steps": 20}')
    (tmp_path / "c.json").write_text('{"id": 3}')
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one", "two"] and pairs.meta[1] == {"se": 3, "st": 20}
    assert [line.split(": ")[-1] for line in pairs.skipped] == ["no text beside it and no prompt inside"]
    (tmp_path / "list.jsonl").write_text('{"file_name": "a.png", "text": "{\\"id\\": 3}"}')
    with pytest.raises(DataError, match="a.png: its text is no prompt: no text inside is certainly a prompt"):
        read_pairs(tmp_path)


# borders ----------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused(tmp_path):
    for name in ("part-000001.zip", "a.png", "b.txt", "list.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: is no regular file"):
            read_pairs(tmp_path / name)
    with pytest.raises(DataError, match="regular"):
        load_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="part-000001.zip: cannot be read.*no regular file"):
        read_pairs(tmp_path)
    (tmp_path / "part-000001.zip").unlink()
    (tmp_path / "list.jsonl").unlink()
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "c.png").write_bytes(picture())
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="3 passed over: .*a.png.*b.txt.*c.txt.*no regular file.*[)]$"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("content, message", {
    b"": "no sound .npy", b"\x93NUMPY": "no sound .npy", b"{": "no sound .npy", None: "no regular file",
}.items(), ids=str)  # fmt: skip
def test_no_array_can_be_read(content, message, tmp_path):
    path = tmp_path / "a.npy"
    if content is None:
        os.mkfifo(path)
    elif content == b"{":  # within the header
        np.save(path, np.zeros((2, 3)))
        content = path.read_bytes().replace(b"(2, 3)", b"(2, (3")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.npy: .*{message}"):
        files.read_array(path, np.float64, (2, 3))
    np.save(tmp_path / "b.npy", np.array([None]))
    with pytest.raises(DataError, match="b.npy: is no sound .npy"):
        files.read_array(tmp_path / "b.npy", object, (1,))


def test_arrays_have_the_dtype_and_shape_that_are_wanted(tmp_path):
    path, array = tmp_path / "a.npy", np.arange(6.0).reshape(2, 3)
    np.save(path, array)
    assert (files.read_array(path, np.float64, (None, 3), "r") == array).all()
    for wrong in ((np.float32, (2, 3)), (">f8", (2, 3)), (np.float64, (2, 4)), (np.float64, (6,))):
        with pytest.raises(DataError, match="a.npy: (has the shape|holds)"):
            files.read_array(path, *wrong)
    np.savez(path.open("wb"), array)
    with pytest.raises(DataError, match="a.npy: (has the shape|holds)"):
        files.read_array(path, np.float64, (2, 3))


def test_large_files_and_texts_are_refused(tmp_path, monkeypatch):
    folder_of(tmp_path, *"ab")
    long = "x" * (graphs.MAX_PROMPT + 1)
    (tmp_path / "list.csv").write_text(f"file_name,text\na,{long}\nb,{long[1:]}\n")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == [long[1:]] and "longer than 500,000 characters" in pairs.skipped[0]
    part(
        tmp_path / "zips/part-000001.zip",
        {"a.png": {"p": long}, "b.png": {"p": "b"}},
        {"a.png": picture(), "b.png": picture(1)},
    )
    assert read_pairs(tmp_path / "zips").prompts == ["b"]
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    with pytest.raises(DataError, match="list.csv: a line has 1,000 characters"):
        read_pairs(tmp_path / "list.csv")
    monkeypatch.setattr(data, "MAX_JSON", 1000)
    (tmp_path / "zips/part-000002").mkdir()
    (tmp_path / "zips/part-000002/part-000002.json").write_text(json.dumps({"a.png": {"p": long}}))
    with pytest.raises(DataError, match="unpacks to more.*part-000002.json: cannot be read.*larger"):
        read_pairs(tmp_path / "zips")
    (tmp_path / "c.json").write_text(json.dumps({"b": long}))
    with pytest.raises(DataError, match="c.json: is larger than"):
        read_captions(tmp_path / "c.json", pairs)


def test_files_and_lines_are_read_up_to_their_limits(tmp_path):
    path = folder_of(tmp_path, a__txt="é") / "a.txt"
    assert files.read_text(path, 2) == "é"
    with pytest.raises(DataError, match="larger than 0 MB"):
        files.read_text(path, 1)
    for size, suffix, read, message in (((1 << 26) + 1, ".json", schema.read_json, "than 64 MB"),
                                        ((1 << 24) + 1, ".jsonl", read_pairs, "16,777,216")):  # fmt: skip
        path = path.rename(path.with_suffix(suffix))
        os.truncate(path, size)
        with pytest.raises(DataError, match=message):
            read(path)


def test_damaged_lzma_streams(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "part-000001.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", generator.bytes(5000))
        archive.writestr("part-000001.json", json.dumps({"a.png": {"p": "x" * 900}}))
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(0, len(whole) - 200)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            read_pairs(path).image(0)
        except DataError:
            continue


def thin_png(width, height):
    rows = zlib.compress(bytes(((width + 7) // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [(1, 65_536), (65_536, 1)])
def test_pictures_however_thin(tmp_path, side):
    (tmp_path / "a.png").write_bytes(thin_png(*side))
    with pytest.raises(DataError, match="a.png: a side of 65,536 pixels"):
        load_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(thin_png(*(min(n, 65_535) for n in side)))
    for rules in ("torchvision", "transformers"):
        how = Preprocessing((64, 64), 64, "bicubic", (0, 0, 0), (1, 1, 1), rules)
        assert image_tensor(load_image(tmp_path / "a.png"), how).shape == (3, 64, 64)
