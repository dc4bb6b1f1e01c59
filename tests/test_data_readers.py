"""Every kind of input that read_pairs knows, whole and broken; images as a user would expect them."""

import copy
import csv
import io
import json
import logging
import os
import struct
import sys
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, PngImagePlugin

import archives
import data
from data import (
    DataError,
    Preprocessing,
    embedded_prompt,
    image_tensor,
    load_image,
    read_captions,
    read_pairs,
)
from training.cache import ImageRows, in_batches

PORTRAITS = Path(__file__).parents[2] / "shared" / "data" / "portraits"


def picture(value=0, form="PNG", size=(12, 8), **save):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 10, 20)).save(buffer, form, **save)
    return buffer.getvalue()


def part(path, entries, images, listing=None, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in images.items():
            archive.writestr(prefix + name, content)
        text = entries if isinstance(entries, str) else json.dumps(entries)
        archive.writestr(prefix + (listing or path.stem + ".json"), text)
    return path


def png_with(path, **texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_itxt(key.replace("_dash_", "-"), value)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


# DiffusionDB ------------------------------------------------------------------------------------------------


def test_diffusiondb_parts_with_keys_missing(tmp_path):
    part(
        tmp_path / "images/part-000002.zip",
        {"c.webp": {"p": "third"}},
        {"c.webp": picture(3, "WEBP", lossless=True)},
    )
    part(
        tmp_path / "images/part-000001.zip",
        {
            "b.png": {"p": " first\n", "se": 7, "c": 7.5, "st": 50, "sa": "k_lms", "extra": 1},
            "a.png": {"se": 1},
            "d.png": {"p": None},
            "e.png": {"p": float("nan")},
            "f.png": "plain",
        },
        {f"{k}.png": picture(i) for i, k in enumerate("abdef")},
    )
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["first", "", "", "", "plain", "third"]
    assert pairs.names == ["b.png", "a.png", "d.png", "e.png", "f.png", "c.webp"]
    assert pairs.meta[0] == {"se": 7, "c": 7.5, "st": 50, "sa": "k_lms", "extra": 1}
    assert pairs.archive.tolist() == [0, 0, 0, 0, 0, 1] and pairs.archive.dtype == np.int32
    assert pairs.image(0).getpixel((0, 0)) == (1, 10, 20)
    assert pairs.image(5).getpixel((0, 0)) == (3, 10, 20)
    assert pairs.skipped == []
    assert not list(tmp_path.rglob("*.png")), "images must be read inside the zip"


def test_large_layout_one_zip_and_unpacked_folder_agree(tmp_path):
    entries = {"b.webp": {"p": "two"}, "a.webp": {"p": "one"}}
    images = {"a.webp": picture(1, "WEBP", lossless=True), "b.webp": picture(2, "WEBP", lossless=True)}
    zipped = part(tmp_path / "large/diffusiondb-large-part-1/part-000001.zip", entries, images)
    folder = tmp_path / "unpacked/part-000001"
    folder.mkdir(parents=True)
    for name, content in images.items():
        (folder / name).write_bytes(content)
    (folder / "part-000001.json").write_text(json.dumps(entries))
    sources = [tmp_path / "large", zipped, zipped.parent, tmp_path / "unpacked", folder]
    for source in sources:
        pairs = read_pairs(source)
        assert (pairs.prompts, pairs.names) == (["two", "one"], ["b.webp", "a.webp"])
        assert pairs.image(0).getpixel((0, 0)) == (2, 10, 20)
    # a zip that was unpacked next to itself counts once
    part(tmp_path / "unpacked/part-000001.zip", entries, images)
    assert len(read_pairs(tmp_path / "unpacked")) == 2


def test_a_zip_made_again_with_a_folder_inside(tmp_path):
    part(tmp_path / "part-000001.zip", {"a.png": {"p": "one"}}, {"a.png": picture(1)}, prefix="part-000001/")
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "a") as archive:
        archive.writestr("part-000001/other.json", "{}")
    pairs = read_pairs(tmp_path)
    assert pairs.names == ["part-000001/a.png"] and pairs.image(0).size == (12, 8)


def test_faulty_zips_are_passed_over_listed_and_counted(tmp_path, caplog):
    good = part(
        tmp_path / "part-000001.zip",
        {"a.png": {"p": "one"}, "gone.png": {"p": "x"}, "list.png": [1]},
        {"a.png": picture(1), "orphan.png": picture(2), "list.png": picture(3)},
    )
    whole = part(tmp_path / "part-000002.zip", {"b.png": {"p": "two"}}, {"b.png": picture(1)}).read_bytes()
    (tmp_path / "part-000002.zip").write_bytes(whole[:-30])
    part(tmp_path / "part-000003.zip", '{"c.png": {"p": "thr', {"c.png": picture(1)})
    part(tmp_path / "part-000004.zip", "[1, 2]", {"c.png": picture(1)})
    (tmp_path / "part-000005.zip").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "part-000006.zip", "w") as archive:
        archive.writestr("d.png", picture(4))
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one"] and pairs.image(0).size == (12, 8)
    assert len(pairs.skipped) == 8
    for where, why in (
        (f"{good}!gone.png", "not there"),
        (f"{good}!orphan.png", "not in the JSON"),
        (f"{good}!list.png", "no object"),
        ("part-000002.zip", "fetch it again"),
        ("part-000003.zip!part-000003.json", "does not parse"),
        ("part-000004", "not an object"),
        ("part-000005.zip", "fetch it again"),
        ("part-000006.zip", "no JSON"),
    ):
        assert any(where in line and why in line for line in pairs.skipped), where
    assert len(caplog.records) == 1 and "8 passed over" in caplog.text
    assert caplog.text.endswith("; ".join(pairs.skipped[:3]) + " ...\n")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:/x.png", "..\\x.png"])
def test_names_that_leave_the_archive(tmp_path, name):
    part(
        tmp_path / "part-000001.zip",
        {name: {"p": "evil"}, "a.png": {"p": "good"}},
        {name: picture(9), "a.png": picture(1)},
    )
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["good"]
    assert len(pairs.skipped) == 1 and "leaves the archive" in pairs.skipped[0]
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "w") as archive:  # in the zip alone
        archive.writestr(name, picture(9))
        archive.writestr("part-000001.json", "{}")
    with pytest.raises(DataError, match="leaves the archive"):
        read_pairs(tmp_path)


def test_blurred_images_are_dropped_where_pyarrow_can_read_the_metadata(tmp_path, monkeypatch, caplog):
    part(
        tmp_path / "images/part-000001.zip",
        {"a.png": {"p": "one"}, "b.png": {"p": "two"}},
        {"a.png": picture(1), "b.png": picture(2)},
    )
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_pairs(tmp_path)) == 2
    assert "pip install pyarrow" in caplog.text

    class Column(list):
        def take(self, rows):
            return Column(self[k] for k in rows)

        def to_pylist(self):
            return list(self)

    columns = {"image_name": Column(["b.png", "a.png"]), "image_nsfw": Column([2.0, 0.3])}
    batch = types.SimpleNamespace(column=columns.__getitem__)
    module = types.ModuleType("pyarrow")
    module.ArrowException = type("ArrowException", (Exception,), {})
    module.parquet = types.SimpleNamespace(
        ParquetFile=lambda path, **options: types.SimpleNamespace(iter_batches=lambda **options: [batch])
    )
    monkeypatch.setitem(sys.modules, "pyarrow", module)
    for source in (tmp_path, tmp_path / "images", tmp_path / "images/part-000001.zip"):
        pairs = read_pairs(source)
        assert pairs.prompts == ["one"] and "blurred" in pairs.skipped[0]
    deep = tmp_path / "other/images/part-000001.zip"  # three folders below the table, which is another's
    deep.parent.mkdir(parents=True)
    assert len(read_pairs((tmp_path / "images/part-000001.zip").rename(deep))) == 2


def test_blurred_images_with_pyarrow_itself(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    part(
        tmp_path / "part-000001.zip",
        {"a.png": {"p": "one"}, "b.png": {"p": "two"}},
        {"a.png": picture(1), "b.png": picture(2)},
    )
    parquet.write_table(
        pyarrow.table({"image_name": ["b.png"], "image_nsfw": [2.0]}), tmp_path / "metadata.parquet"
    )
    assert read_pairs(tmp_path).prompts == ["one"]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="metadata.parquet"):
        read_pairs(tmp_path)


def test_more_archives_than_are_held_open_from_threads_and_workers(tmp_path, monkeypatch):
    for k in range(9):
        images = {f"{k}-{j}.png": picture(10 * k + j) for j in range(3)}
        part(tmp_path / f"part-00000{k}.zip", {name: {"p": name} for name in images}, images)
    monkeypatch.setattr(archives, "most_open", lambda: 2)
    pairs = read_pairs(tmp_path)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(27), 4)).tolist()
    wrong = []

    def look(rows):
        for i in rows:
            k, j = pairs.names[i][0], pairs.names[i][2]
            if pairs.image(i).getpixel((0, 0))[0] != 10 * int(k) + int(j):
                wrong.append(i)

    threads = [threading.Thread(target=look, args=(order[t::4],)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(pairs._zips._open) <= 2
    copied = copy.deepcopy(pairs)
    assert np.array_equal(np.asarray(copied.image(13)), np.asarray(pairs.image(13)))
    # after the parent opened archives, forked workers must not share its file offsets: none moves
    assert {os.lseek(descriptor, 0, os.SEEK_CUR) for descriptor in pairs._zips._open.values()} == {0}
    images = ImageRows(pairs, [Preprocessing.square(8)])
    for row, (array,) in (item for batch in in_batches(images, [range(27)], 2, list) for item in batch):
        assert np.array_equal(array, image_tensor(pairs.image(row), Preprocessing.square(8)))


def test_subset_keeps_columns_together(tmp_path):
    images = {f"{k}.png": picture(k) for k in range(5)}
    part(tmp_path / "part-000001.zip", {n: {"p": n, "se": n} for n in images}, images)
    pairs = read_pairs(tmp_path).subset([3, 1]).subset(np.array([1, 0]))
    assert pairs.prompts == pairs.names == ["1.png", "3.png"] and pairs.meta[1] == {"se": "3.png"}
    assert pairs.image(1).getpixel((0, 0))[0] == 3 and pairs.row.tolist() == [1, 3] and pairs.n_read == 5


# manifests and text files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_key", ["file_name", "image", "path"])
@pytest.mark.parametrize("text_key", ["text", "prompt", "caption", "p"])
def test_manifest_columns(tmp_path, image_key, text_key):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").write_bytes(picture(1))
    (tmp_path / "b.jpg").write_bytes(picture(2, "JPEG"))
    rows = [
        {image_key: "sub/a.png", text_key: " one "},
        {image_key: "b.jpg", text_key: 'two, "quoted"', "n": 1},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one", 'two, "quoted"'] and pairs.names == ["sub/a.png", "b.jpg"]
    assert pairs.archives == [tmp_path]
    assert pairs.meta[1] == {"n": 1} and pairs.image(0).size == (12, 8)
    (tmp_path / "list.jsonl").unlink()
    (tmp_path / "list.csv").write_text(
        f'\ufeff{image_key},{text_key.upper()}\nsub/a.png, one \nb.jpg,"two, ""quoted"""\n', "utf-8"
    )
    for source in (tmp_path, tmp_path / "list.csv"):
        assert read_pairs(source).prompts == pairs.prompts


def test_manifest_faults(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.p\n'
        '{"text": "no name"}\n{"file_name": "gone.png", "text": "x"}\n'
        '{"file_name": "a.png"}\n{"file_name": 7, "text": "x"}\n'
    )
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["one", ""]
    assert [line.removeprefix(f"{tmp_path}/") for line in pairs.skipped] == [
        "metadata.jsonl, line 2: does not parse",
        "metadata.jsonl, line 3: names no image",
        "gone.png: in the manifest but not there",
        "metadata.jsonl, line 6: names no image",
    ]
    (tmp_path / "metadata.jsonl").rename(tmp_path / "one.jsonl")
    (tmp_path / "two.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(DataError, match="one.jsonl, two.csv"):
        read_pairs(tmp_path)
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="two.csv: its first line"):
        read_pairs(tmp_path / "two.csv")
    (tmp_path / "two.csv").write_bytes(b"file_name,text\na.png,\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_pairs(tmp_path / "two.csv")


def test_prompt_of_ten_thousand_words_everywhere(tmp_path):
    long = " ".join(f"word{k}" for k in range(10_000)) + " " + "x" * 200_000
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "list.csv").write_text(f"file_name,text\na.png,{long}\n")
    assert read_pairs(tmp_path / "list.csv").prompts == [long]
    assert csv.field_size_limit() == 131_072, "Python's own limit is left as it was"
    (tmp_path / "list.csv").unlink()
    (tmp_path / "a.txt").write_text(long)
    assert read_pairs(tmp_path).prompts == [long]
    part(tmp_path / "zips/part-000001.zip", {"a.png": {"p": long}}, {"a.png": picture(1)})
    assert read_pairs(tmp_path / "zips").prompts == [long]
    png_with(tmp_path / "inside/a.png", parameters=long + "\nSteps: 20, Sampler: Euler a")
    assert read_pairs(tmp_path / "inside").prompts == [long]
    assert data.clean([long, long, "short"])[0].tolist() == [0, 2]


def test_text_beside_each_image(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("b.png", "deep/a.webp", "deep/er/c.JPG", "lonely.png"):
        kind = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[name.lower().rsplit(".", 1)[1]]
        (tmp_path / name).write_bytes(picture(1, kind))
    (tmp_path / "b.txt").write_text("bee\n")
    (tmp_path / "deep/a.txt").write_text("\ufeffay", "utf-8")
    (tmp_path / "deep/er/c.txt").write_text("")
    (tmp_path / "notes.txt").write_text("of no image")
    pairs = read_pairs(tmp_path)
    assert dict(zip(pairs.names, pairs.prompts, strict=True)) == {
        "b.png": "bee",
        "deep/a.webp": "ay",
        "deep/er/c.JPG": "",
    }
    assert len(pairs.skipped) == 1 and "lonely.png" in pairs.skipped[0]
    assert all(pairs.image(i).size == (12, 8) for i in range(3))
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    assert any("b.txt: cannot be read" in line for line in read_pairs(tmp_path).skipped)


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder \(No such file or directory\); check"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found no file"):
        read_pairs(tmp_path)
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(DataError, match=r"Looked for part-\*\.zip.*found 1 \.md"):
        read_pairs(tmp_path)
    for name in ("a.b", "b.c", "c.d", "d.e", "photos.zip"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"found 1 \.b, 1 \.c, 1 \.d, 1 \.e, 1 \.zip$"):
        read_pairs(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "plain.png").write_bytes(picture())
    with pytest.raises(DataError, match="no usable image-prompt pair; 2 passed over.*empty.png") as caught:
        read_pairs(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="readme.md: neither"):
        read_pairs(tmp_path / "readme.md")


# prompts inside images --------------------------------------------------------------------------------------

A1111 = (
    "a castle,\nsecond line (detailed:1.2)\nNegative prompt: ugly,\nblurry\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: v1-5"
)
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5,
            "steps": 30,
            "cfg": 8.0,
            "sampler_name": "euler",
            "positive": ["10", 0],
            "negative": ["7", 0],
            "model": ["4", 0],
        },
    },
    "10": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["11", 0], "negative": ["7", 0]}},
    "11": {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["8", 0]},
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["4", 1]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "at night", "clip": ["4", 1]}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "a linked castle"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
}
FLUX = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0], "sampler": ["9", 0]}},
    "2": {"class_type": "BasicGuider", "inputs": {"conditioning": ["3", 0]}},
    "3": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["4", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a guided castle"}},
}
LOOP = {"1": {"inputs": {"steps": 1, "positive": ["2", 0]}}, "2": {"inputs": {"conditioning": ["2", 0]}}}
FRONT_ENDS = {
    "automatic1111": (
        {"parameters": A1111},
        "a castle,\nsecond line (detailed:1.2)",
        {"se": 42, "c": 7.5, "st": 20, "sa": "Euler a"},
    ),
    "forge, no negative": ({"parameters": "a hut\nSteps: 4, Seed: 1"}, "a hut", {"se": 1, "st": 4}),
    "automatic1111, no settings": ({"parameters": "only words"}, "only words", {}),
    "automatic1111, no prompt": ({"parameters": "Negative prompt: ugly\nSteps: 4"}, "", {"st": 4}),
    "fooocus": ({"parameters": json.dumps({"prompt": "a fort", "seed": 3})}, "a fort", {"se": 3}),
    "swarm": (
        {"parameters": json.dumps({"sui_image_params": {"prompt": "a den", "cfgscale": 7}})},
        "a den",
        {"c": 7},
    ),
    "comfyui": (
        {"prompt": json.dumps(GRAPH), "workflow": "{}"},
        "a linked castle, at night",
        {"se": 5, "st": 30, "c": 8.0, "sa": "euler"},
    ),
    "comfyui, guider": ({"prompt": json.dumps(FLUX)}, "a guided castle", {}),
    "easy diffusion": ({"prompt": "a plain castle"}, "a plain castle", {}),
    "invokeai 3": (
        {"invokeai_metadata": json.dumps({"positive_prompt": "a keep", "seed": 1, "steps": 9})},
        "a keep",
        {"se": 1, "st": 9},
    ),
    "invokeai 2": (
        {
            "sd_dash_metadata": json.dumps(
                {"image": {"prompt": [{"prompt": "a moat", "weight": 1}], "seed": 2, "cfg_scale": 7.5}}
            )
        },
        "a moat",
        {"se": 2, "c": 7.5},
    ),
    "invokeai 1": (
        {"Dream": '"a tower [ugly]" -s 50 -S 123 -W512 -H512 -C7.5 -A k_lms'},
        "a tower",
        {"st": 50, "se": 123, "c": 7.5, "sa": "k_lms"},
    ),
    "novelai": (
        {
            "Software": "NovelAI",
            "Description": "a hall",
            "Comment": json.dumps(
                {"steps": 28, "sampler": "k_euler", "seed": 6, "scale": 11.0, "uc": "ugly"}
            ),
        },
        "a hall",
        {"st": 28, "sa": "k_euler", "se": 6, "c": 11.0},
    ),
    "novelai 4": ({"Comment": json.dumps({"prompt": "a cave", "steps": 28})}, "a cave", {"st": 28}),
}


@pytest.mark.parametrize("kind", FRONT_ENDS)
def test_prompt_inside_png(tmp_path, kind):
    texts, prompt, meta = FRONT_ENDS[kind]
    path = png_with(tmp_path / "a.png", **texts)
    assert embedded_prompt(path) == (prompt, meta)
    pairs = read_pairs(tmp_path)
    assert (pairs.prompts, pairs.meta) == ([prompt], [meta])


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"prompt": json.dumps(LOOP)},
        {"prompt": "{broken"},
        {"Comment": "made with x"},
        {"Comment": "{}", "Description": "a holiday"},
        {"invokeai_metadata": "[]"},
        {"prompt": '{"1": 3, "2": {"inputs": 4}}'},
        {"parameters": "  "},
        {"prompt": "[" * 5000},
    ],
    ids=str,
)
def test_png_without_a_prompt(tmp_path, texts):
    assert embedded_prompt(png_with(tmp_path / "a.png", **texts)) is None


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_prompt_inside_exif(tmp_path, form):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.replace("castle", "château").encode("utf-16-be")
    path = tmp_path / f"a.{form.lower()}"
    Image.new("RGB", (8, 8)).save(path, form, exif=exif)
    prompt, meta = embedded_prompt(path)
    assert prompt.startswith("a château,") and meta["se"] == 42
    Image.new("RGB", (8, 8)).save(path, form)
    assert embedded_prompt(path) is None


# images -----------------------------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(side=30_000):
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_huge_picture_is_refused_without_decoding(tmp_path):
    part(
        tmp_path / "part-000001.zip",
        {"big.png": {"p": "big"}, "mid.png": {"p": "mid"}},
        {"big.png": huge_png(), "mid.png": huge_png(12_000)},
    )
    pairs = read_pairs(tmp_path)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"part-000001\.zip!big\.png: more than 100 megapixels"):
        pairs.image(0)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="megapixels"):
        pairs.image(1)
    assert time.perf_counter() - start < 2
    (tmp_path / "big.png").write_bytes(huge_png())
    with pytest.raises(DataError, match="megapixels"):
        embedded_prompt(tmp_path / "big.png")


BROKEN = {
    "empty": (b"", "empty"),
    "truncated": (picture(size=(99, 99))[:90], "cannot be read"),
    "text": (b"not an image", "no known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images(tmp_path, kind):
    content, what = BROKEN[kind]
    part(tmp_path / "part-000001.zip", {"a.png": {"p": "x"}}, {"a.png": content})
    with pytest.raises(DataError, match=what) as caught:
        read_pairs(tmp_path).image(0)
    assert str(caught.value).startswith(f"{tmp_path / 'part-000001.zip'}!a.png: ")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        load_image(tmp_path / "a.png")
    assert str(caught.value).startswith(f"{tmp_path / 'a.png'}: ")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
def test_damaged_bytes_never_raise_anything_else():
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8))
    refused = 0
    for form in ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        noise.save(buffer, form)
        for _ in range(60):
            damaged = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            damaged[generator.integers(0, len(damaged), 12)] = generator.integers(0, 256, 12)
            try:
                assert load_image(damaged[: generator.integers(1, len(damaged) + 1)].tobytes()).mode == "RGB"
            except DataError:
                refused += 1
    assert refused > 100


def test_missing_image_and_member_damaged_after_reading(tmp_path):
    with pytest.raises(DataError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    path = part(tmp_path / "part-000001.zip", {"a.png": {"p": "x"}}, {"a.png": picture()})
    pairs = read_pairs(tmp_path)
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: cannot be read .*CRC.*fetch the zip again"):
        pairs.image(0)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return load_image(buffer.getvalue())


def test_modes_become_the_rgb_one_expects():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = saved(Image.fromarray(ramp))
    assert deep.mode == "RGB"
    assert np.abs(np.asarray(deep)[..., 0].astype(float) - ramp / 257).max() <= 0.5
    assert saved(Image.fromarray(ramp), "TIFF").getpixel((7, 7)) == (255, 255, 255)
    assert saved(Image.new("I", (2, 2), 70_000), "TIFF").getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert saved(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (2, 2), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert saved(palette).getpixel((0, 0)) == (200, 100, 50)
    assert saved(palette, transparency=palette.getpixel((0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("RGBA", (2, 2), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)
    assert saved(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7)).getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    assert saved(Image.new("CMYK", (2, 2)), "JPEG").mode == "RGB"


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: rotate by 90 degrees to the right
    turned = saved(image, exif=exif)
    assert turned.size == (4, 6) and turned.getpixel((3, 0)) == (255, 255, 255)


@pytest.mark.parametrize("side", [(40, 40), (61, 40), (33, 90), (20, 15), (101, 64), (64, 511)])
def test_image_tensor_is_torchvisions_resize_and_centre_crop(side):
    pixels = np.random.default_rng(1).integers(0, 256, (side[1], side[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    for size in (16, 64):
        ours = image_tensor(image, Preprocessing.square(size))
        theirs = TF.center_crop(
            TF.resize(image, size, TF.InterpolationMode.BICUBIC, antialias=True), [size, size]
        )
        assert ours.shape == (3, size, size) and ours.dtype == torch.float32 and ours.is_contiguous()
        assert torch.equal(((ours + 1) * 127.5).round().to(torch.uint8), TF.pil_to_tensor(theirs))


def test_image_tensor_range_modes_and_strips():
    assert image_tensor(Image.new("RGB", (9, 9), "black"), Preprocessing.square(4)).eq(-1).all()
    assert image_tensor(Image.new("L", (9, 9), 255), Preprocessing.square(4)).eq(1).all()
    start = time.perf_counter()
    assert image_tensor(Image.new("RGB", (1, 20_000)), Preprocessing.square(512)).shape == (3, 512, 512)
    assert time.perf_counter() - start < 2


# captions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_parts(tmp_path):
    part(
        tmp_path / "p/part-000001.zip",
        {"a.png": {"p": "1"}, "b.png": {"p": "2"}},
        {"a.png": picture(), "b.png": picture()},
    )
    part(
        tmp_path / "p/part-000002.zip",
        {"c.png": {"p": "3"}, "b.png": {"p": "4"}},
        {"c.png": picture(), "b.png": picture()},
    )
    return read_pairs(tmp_path / "p")


def test_captions_in_every_form(tmp_path, two_parts, caplog):
    (tmp_path / "c.jsonl").write_text(
        '{"file_name": "x/a.png", "caption": " first "}\n{"image": "c.png", "text": "3"}\n'
    )
    assert read_captions(tmp_path / "c.jsonl", two_parts) == ["first", "", "3", ""]
    assert "no caption for 2 of 4" in caplog.text
    (tmp_path / "c.csv").write_text("file_name,caption\na.png,first\nc.png,\n")
    assert read_captions(tmp_path / "c.csv", two_parts) == ["first", "", "", ""]
    parts = {"part-000002.zip!b.png": "fourth", "part-000002.zip!c.png": "third"}
    (tmp_path / "c.json").write_text(json.dumps({"a.png": "first", "b.png": "?", "c.png": None} | parts))
    assert read_captions(tmp_path / "c.json", two_parts) == ["first", "", "third", "fourth"]
    (tmp_path / "c.txt").write_text("1\n\n3\n4\n")
    assert read_captions(tmp_path / "c.txt", two_parts) == ["1", "", "3", "4"]
    assert read_captions(tmp_path / "c.txt", two_parts.subset([3, 0])) == ["4", "1"]


def test_a_name_that_two_archives_hold_is_not_guessed(tmp_path, two_parts):
    (tmp_path / "c.json").write_text('{"b.png": "which?", "a.png": "first"}')
    assert read_captions(tmp_path / "c.json", two_parts) == ["first", "", "", ""]


def test_caption_faults(tmp_path, two_parts):
    for name, content, what in (
        ("c.json", '{"z.png": "x"}', "none of 1 captions.*a.png"),
        ("c.json", "[1]", "not a JSON object"),
        ("c.json", "{", "not a JSON object"),
        ("c.txt", "1\n2\n", "2 lines for 4 pairs"),
        ("c.jsonl", "", "none of 0"),
        ("c.yaml", "", "captions come as"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=what):
            read_captions(tmp_path / name, two_parts)
    with pytest.raises(DataError, match="gone.csv: no such file"):
        read_captions(tmp_path / "gone.csv", two_parts)


# real data --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PORTRAITS.exists(), reason="the real portraits are not here")
def test_real_portraits():
    pairs = read_pairs(PORTRAITS)
    assert len(pairs) == 1332 and len(pairs.archives) == 2 and not pairs.skipped
    assert len(set(pairs.prompts)) == 1332 and all(
        p.startswith("highest quality photo of") for p in pairs.prompts
    )
    for i in range(0, 1332, 111):
        assert pairs.image(i).size == (256, 256)
        assert image_tensor(pairs.image(i), Preprocessing.square(64)).std() > 0.1
    report = data.clean(pairs.prompts)[1]
    assert report == {"read": 1332, "empty": 0, "non_english": 0, "near_duplicate": 1321, "kept": 11}
    assert {k: len(v) for k, v in data.split(pairs.prompts, 0).items()} == {
        "train": 1000,
        "val": 166,
        "test": 166,
    }
