"""Pairs as columns: nothing lost, few bytes a row, made once for many parts, shared; zips by descriptor."""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_data_readers import part, picture

import archives
import columns
import data
from columns import Records, RecordsBuilder, TextsBuilder
from data import DataError, Pairs, read_pairs
from training.cache import image_identity

ROOT = Path(__file__).parents[1]

# texts and records ------------------------------------------------------------------------------------------

STRINGS = ["", "a", "née", "\U0001f600", "line\nline", "\udce9 lone", "x" * 10_000, "", "一只猫"]


def texts_of(strings):
    builder = TextsBuilder()
    for string in strings:
        builder.append(string)
    return builder.texts()


def test_texts_are_a_sequence_of_the_strings():
    texts, n = texts_of(STRINGS), len(STRINGS)
    assert texts == STRINGS and list(texts) == STRINGS and len(texts) == n and texts != STRINGS[:-1]
    assert [texts[i] for i in range(-n, n)] == STRINGS * 2 and texts[np.int64(2)] == "née"
    assert texts[1:6:2] == STRINGS[1:6:2] and texts[:0] == [] and texts.index("一只猫") == n - 1
    for i in (n, -n - 1):
        with pytest.raises(IndexError):
            texts[i]
    many = texts_of(str(k) for k in range(3 * columns.BLOCK + 5))
    assert list(many) == [str(k) for k in range(3 * columns.BLOCK + 5)]
    assert texts_of([]) == [] and repr(many) == "Texts(12,293: '0', '1', '2', ...)"
    assert [repr(texts_of("abcd"[:n]))[9:] for n in (3, 4)] == ["'a', 'b', 'c')", "'a', 'b', 'c', ...)"]


RECORDS = [
    {"se": 7, "c": 7.5, "st": 50, "sa": "k_lms"},
    {},
    {"st": 2**31 - 1, "se": -(2**63) + 1, "c": 1e308},
    {"st": -(2**31), "se": -(2**63), "c": float("-inf"), "sa": ""},
    {"st": 2**31, "se": 2**63, "c": 7, "sa": None, "other": [1, {"a": None}]},
    {"se": "7", "c": True, "st": 50.0, "sa": 3, "": "\ud83d", "undrawn": ["red"]},
    {"se": None},
    {"c": float("inf"), "sa": "k_lms"},
]


def test_records_are_what_they_were():
    builder = RecordsBuilder()
    records = RECORDS * 1000 + [{"sa": f"sampler {k}"} for k in range(300)]
    for record in records:
        builder.append(record)
    made = builder.records()
    assert made == records and len(made.words) == columns.WORDS
    for mine, theirs in zip(made, records, strict=True):
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in theirs.items()}
    arrays = made.arrays("meta")
    assert Records.of(arrays, "meta", made.words, np.array([4, 0])) == [RECORDS[4], RECORDS[0]]
    builder = RecordsBuilder()
    builder.append(RECORDS[0])
    assert sum(column.nbytes for column in builder.records().arrays("meta").values()) == 21
    builder.append({"c": float("nan")})
    assert np.isnan(builder.records()[1]["c"])


# many parts -------------------------------------------------------------------------------------------------

PER_PART = 4


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of five parts, from which on they are kept, and the empty cache."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "KEEP", 5)
    for k in range(5):
        names = [f"{k}-{j}.png" for j in range(PER_PART)]
        part(
            tmp_path / f"parts/part-00000{k}.zip",
            {name: {"p": f"prompt {name}", "se": k, "undrawn": [k]} for name in names} | {"gone.png": {}},
            {name: picture(10 * k + j) for j, name in enumerate(names)},
        )
    return tmp_path / "parts"


@pytest.fixture
def parsed(monkeypatch):
    """The paths of the zips that are parsed from now on."""
    paths, opened = [], zipfile.ZipFile.__init__

    def spy(self, file, *args, **options):
        paths.append(Path(file).name)
        opened(self, file, *args, **options)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", spy)
    return paths


def everything(pairs):
    pixels = [pairs.image(i).getpixel((0, 0)) for i in range(len(pairs))]
    lists = [list(x) for x in (pairs.prompts, pairs.names, pairs.meta, pairs.archives, pairs.skipped)]
    return [*lists, pairs.archive.tolist(), pairs.member.tolist(), pixels, image_identity(pairs)]


def test_parts_are_read_once_and_then_mapped(many, parsed, caplog, monkeypatch):
    pairs = read_pairs(many)
    assert len(parsed) == 5 and len(pairs) == 20 and len(pairs.skipped) == 5
    expected, warning = everything(pairs), caplog.messages[-1]
    assert "5 passed over (5 " in warning
    assert len(parsed) == 5, "images are read by file descriptor"
    caplog.clear()
    again = read_pairs(many)
    assert len(parsed) == 5 and everything(again) == expected and caplog.messages == [warning]
    (folder,) = (many.parent / "cache").iterdir()
    assert folder.name.startswith("pairs-") and not list(folder.glob(".*"))
    monkeypatch.chdir(many.parent)
    assert read_pairs("parts").prompts == pairs.prompts and len(parsed) == 5, "the same folder"


def test_what_has_changed_is_read_again(many, parsed):
    read_pairs(many)
    os.utime(many / "part-000002.zip", ns=(5, 5))
    assert len(read_pairs(many)) == 20 and len(parsed) == 10
    part(many / "part-000002.zip", {"new.png": {"p": "new"}}, {"new.png": picture(1)})
    assert "new" in list(read_pairs(many).prompts)
    part(many / "part-000007.zip", {"newer.png": {"p": "newer"}}, {"newer.png": picture(1)})
    assert "newer" in list(read_pairs(many).prompts)
    (many / "part-000007.zip").unlink()
    assert len(read_pairs(many)) == 17
    read = len(parsed)
    read_pairs(many)
    assert len(parsed) == read and len(list((many.parent / "cache").iterdir())) == 1


def test_damaged_files_are_made_again(many, parsed):
    expected = everything(read_pairs(many))
    (folder,) = (many.parent / "cache").iterdir()
    for file in sorted(folder.iterdir()):
        for damage in (
            lambda raw: raw[:-2],
            lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
            None,
        ):
            before = len(parsed)
            file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
            assert everything(read_pairs(many)) == expected, file.name
            assert len(parsed) == before + 5


@pytest.mark.parametrize("cache", ["/proc/none", "file/cache"])
def test_without_a_writable_cache_parts_are_read_anew(many, parsed, monkeypatch, cache):
    expected = everything(read_pairs(many))
    (many.parent / "file").write_text("")
    monkeypatch.setenv("REVERSE_SD_CACHE", str(many.parent / cache))
    assert everything(read_pairs(many)) == expected and len(parsed) == 10

    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("REVERSE_SD_CACHE", str(many.parent / "full"))
    monkeypatch.setattr(columns.np, "save", refuse)
    assert everything(read_pairs(many)) == expected
    assert [path.name for path in (many.parent / "full").rglob("*") if path.is_file()] == []


def test_three_processes_make_the_columns_once(tmp_path, monkeypatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    script = """if True:
        import sys, time
        sys.path.insert(0, sys.argv[1])
        import columns
        def make():
            print("made")
            time.sleep(1)
            builder = columns.PairsBuilder()
            builder.add(columns.Path("part.zip"), "a.png", "a prompt", {})
            return builder.columns()
        made, facts = columns.kept("pairs", "key", make)
        assert columns.Texts.of(made, "prompts") == ["a prompt"] and facts["archives"] == ["part.zip"]
    """
    command = [sys.executable, "-c", script, ROOT]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    lines = [line for run in runs for line in run.communicate()[0].split()]
    assert [run.returncode for run in runs] == [0, 0, 0] and lines == [b"made"]


def test_few_parts_and_unpacked_ones_are_not_kept(many, monkeypatch):
    (many / "part-000009").mkdir()
    (many / "part-000009" / "a.png").write_bytes(picture(1))
    (many / "part-000009" / "part-000009.json").write_text('{"a.png": {"p": "a"}}')
    assert len(read_pairs(many)) == 21
    (many / "part-000009" / "part-000009.json").unlink()
    monkeypatch.setattr(data, "KEEP", 6)
    assert len(read_pairs(many)) == 20 and not (many.parent / "cache").exists()


def test_a_row_takes_few_bytes_and_a_subset_eight(tmp_path):
    """Names of 41 characters and metadata as in DiffusionDB."""
    builder = columns.PairsBuilder()
    for k in range(1000):
        name = f"{k:08x}-028e-48ac-8857-a52814fd2a06.webp"
        entry = {"se": 1, "c": 7.0, "st": 50, "sa": "k_lms"}
        builder.add(tmp_path / "part-000001.zip", name, "p" * 160, entry)
    made, facts = builder.columns()
    pairs = Pairs(made, facts["words"], archives.Zips([tmp_path / "part-000001.zip"]), [])
    size = sum(column.nbytes for column in made.values()) - 160_000 + pairs.row.nbytes
    assert size / 1000 < 120
    some = pairs.subset(np.arange(0, 1000, 2)).subset([4, 2])
    assert some.row.tolist() == [8, 4] and some.prompts.buffer is pairs.prompts.buffer
    assert some.prompts.row is some.row and some.names.row is some.row and some.meta.row is some.row


def look(pairs, order, answers):
    answers.put(([pairs.image(i).getpixel((0, 0))[0] for i in order], everything(pairs)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pairs_go_to_other_processes(many, method):
    pairs = read_pairs(many).subset(np.arange(19, -1, -1))
    expected = [pairs.image(i).getpixel((0, 0))[0] for i in range(20)]
    assert expected == [10 * k + j for k in range(4, -1, -1) for j in range(3, -1, -1)]
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=look, args=(pairs, range(20), answers), daemon=True)
    with pairs._zips._lock:  # as another thread may, while this one forks
        process.start()
    assert answers.get(timeout=60) == (expected, everything(pairs))
    process.join()


# zips -------------------------------------------------------------------------------------------------------


def zip_of(path, method=zipfile.ZIP_DEFLATED, content=None, **options):
    content = content or picture(7)
    with zipfile.ZipFile(path, "w", method) as archive:
        with archive.open("a.png", "w", **options) as file:
            file.write(content)
        archive.writestr(f"{path.stem}.json", json.dumps({"a.png": {"p": "a"}}))
    return path


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_compression(tmp_path, parsed, method, zip64, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", len(picture(7)))
    pairs = read_pairs(zip_of(tmp_path / "part-000001.zip", method, force_zip64=zip64))
    before = len(parsed)
    assert pairs.image(0).getpixel((0, 0)) == (7, 10, 20)
    assert len(parsed) - before == (0 if method in METHODS[:2] else 1)
    monkeypatch.delattr(os, "pread")  # as on Windows
    assert read_pairs(tmp_path).image(0).getpixel((0, 0)) == (7, 10, 20)


def test_bytes_before_the_zip_and_a_comment_after_it(tmp_path):
    path = zip_of(tmp_path / "part-000001.zip")
    path.write_bytes(b"#!/bin/sh\n" * 20 + path.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of no use"
    assert read_pairs(tmp_path).image(0).getpixel((0, 0)) == (7, 10, 20)


def test_more_members_than_a_short_directory_numbers(tmp_path):
    path = tmp_path / "part-000001.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("part-000001.json", '{"last.png": {"p": "a"}}')
        for k in range(65_540):
            archive.writestr(f"{k}.txt", b"")
        archive.writestr("last.png", picture(3))
    assert read_pairs(tmp_path).image(0).getpixel((0, 0)) == (3, 10, 20)


def directory(path, name, **fields):
    """Overwrite fields of a member's entry in the zip's directory."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\1\2", 0, raw.rindex(name.encode()))
    places = {"flags": (8, 2), "method": (10, 2), "crc": (16, 4), "packed": (20, 4), "size": (24, 4)}
    for field, value in fields.items():
        start, length = places[field]
        raw[at + start : at + start + length] = value.to_bytes(length, "little")
    path.write_bytes(raw)


def method_of(path, name):
    with zipfile.ZipFile(path) as archive:
        return int(np.frombuffer(archives.members_of(archive)[name], archives.MEMBER)["method"][0])


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"flags": 1}, "encrypted"),
        ({"method": 99}, "not supported"),
        ({"size": 1 << 30}, "unpacks to more than 512 MB"),
        ({"size": 50}, "CRC|corrupt"),
        ({"size": 5000}, "CRC|EOF|corrupt"),
        ({"crc": 1}, "CRC"),
        ({"packed": 20}, "CRC|EOF|corrupt|incomplete"),
        ({"packed": 0}, "CRC|EOF|corrupt|incomplete"),
    ],
)
def test_a_directory_that_lies_gives_one_clear_line(tmp_path, fields, why):
    path = zip_of(tmp_path / "part-000001.zip")
    directory(path, "a.png", **fields)
    expected = rf"part-000001.zip!a.png: cannot be read \(.*({why}).*fetch the zip again"
    with pytest.raises(DataError, match=expected) as caught:
        read_pairs(path).image(0)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_not_unpacked_beyond_its_stated_size(tmp_path):
    path = zip_of(tmp_path / "part-000001.zip", content=bytes(1 << 28))
    directory(path, "a.png", size=1000)
    pairs = read_pairs(path)
    assert method_of(path, "a.png") == archives.OTHER
    with pytest.raises(DataError, match="cannot be read"):
        pairs.image(0)
    small = zip_of(tmp_path / "part-000002.zip", content=bytes(1 << 16))
    directory(small, "a.png", size=1000)
    with pytest.raises(DataError, match="CRC"):
        read_pairs(small).image(0)


def test_members_that_share_bytes_are_left_to_zipfile(tmp_path):
    path = tmp_path / "part-000001.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, picture(1))
        archive.writestr("part-000001.json", '{"a.png": {"p": "a"}, "b.png": {"p": "b"}}')
        archive.filelist[1].header_offset = archive.filelist[0].header_offset
    assert archives.OTHER in (method_of(path, "a.png"), method_of(path, "b.png"))
    with pytest.raises(DataError, match="b.png: cannot be read"):
        read_pairs(path).image(1)


def test_a_zip_that_is_cut_short_replaced_or_gone_after_reading(tmp_path):
    path = zip_of(tmp_path / "part-000001.zip")
    whole = path.read_bytes()
    for content in (whole[:20], whole[:60], b"", bytes(len(whole)), whole[:40] + whole, None):
        pairs = read_pairs(path)
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(DataError, match=r"part-000001.zip!a.png: cannot be read .*fetch the zip again"):
            pairs.image(0)
        path.write_bytes(whole)


def test_flipped_bits_never_raise_anything_else(tmp_path):
    path = zip_of(tmp_path / "part-000001.zip")
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(whole)
        raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
        path.write_bytes(raw)
        try:
            assert read_pairs(path).image(0).size == (12, 8)
        except DataError as error:
            assert "\n" not in str(error)


def test_a_quarter_of_the_descriptors_is_held_and_at_most_4096(monkeypatch):
    for limit, held in {-1: 4096, 0: 1, 3: 1, 41: 10, 1 << 20: 4096}.items():
        monkeypatch.setattr(archives.resource, "getrlimit", lambda _, limit=limit: (limit, 7))
        assert archives.most_open() == held


def test_descriptors_stay_below_the_limit_and_serve_many_parts(tmp_path, many):
    script = """if True:
        import os, resource, sys
        sys.path.insert(0, sys.argv[1])
        import data
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 400))  # the first one is enforced
        pairs = data.read_pairs(sys.argv[2])
        for i in list(range(len(pairs))) * 2:
            pairs.image(i)
        print(len(pairs._zips._open), len(os.listdir("/proc/self/fd")))
    """
    for k in range(5, 60):
        part(many / f"part-{k:06}.zip", {f"{k}.png": {"p": "p"}}, {f"{k}.png": picture(1)})
    done = subprocess.run(
        [sys.executable, "-c", script, ROOT, many], capture_output=True, text=True, check=True
    )
    held, descriptors = map(int, done.stdout.split())
    assert held == 10 and descriptors < 30


def test_equal_pictures_are_found_without_opening_a_zip(many, parsed):
    pairs = read_pairs(many)
    before = len(parsed)
    assert data.same_pictures(pairs).tolist() == list(range(20))
    assert data.same_pictures(pairs.subset([3, 3, 2, 1])).tolist() == [0, 0, 1, 2] and len(parsed) == before
    assert zlib.crc32(picture(0)) == pairs.member["crc"][0] and pairs.member["size"][0] == len(picture(0))
    assert io.BytesIO(picture(0)).getbuffer().nbytes == pairs.member["packed"][0]
