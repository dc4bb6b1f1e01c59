"""Caches: made once, keyed by what they depend on, resumed when interrupted, clear about a full disk."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import files
from data import DataError, Preprocessing, read_pairs
from files import atomic_write
from training import rows as caches
from training.cache import Encoder, cached_images, cached_texts

ROOT = Path(__file__).parents[1]


class Lengths:
    """A little encoder: (length, first letter) of each text; counts what it was asked, and may stop."""

    def __init__(self, stop_after=None, stop=AssertionError):
        self.asked, self.stop_after, self.stop = [], stop_after, stop

    def __call__(self, texts):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise self.stop
        self.asked.append(texts)
        return torch.tensor([[len(t), ord(t[0]) if t else 0] for t in texts], dtype=torch.float32)


class Means:
    """A little encoder: the mean of each channel."""

    def __init__(self, stop_after=None, stop=AssertionError):
        self.seen, self.batches, self.stop_after, self.stop = 0, 0, stop_after, stop

    def __call__(self, images):
        if self.batches == self.stop_after:
            raise self.stop
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 16, 16) and images.abs().max() <= 1
        self.batches += 1
        self.seen += len(images)
        return images.mean((2, 3))


def texts_cache(cache, texts, encode, key="model a", batch_size=2, dtype=np.float32):
    return cached_texts(cache, texts, Encoder("targets", key, (2,), dtype, batch_size, encode))


def images_cache(cache, pairs, encode, key="vae", size=16, workers=0):
    encoder = Encoder("latents", key, (3,), "float16", 4, encode)
    return cached_images(cache, pairs, Preprocessing.square(size), encoder, workers)


TEXTS = ["bee", "a", "bee", "", "cc", "dddd", "a", "é" * 7]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "data" / "part-000001.zip"
    path.parent.mkdir()
    entries = {}
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(20):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 16 + k), (10 * k, 0, 255)).save(buffer, "PNG")
            content = {3: b"", 11: buffer.getvalue()[:50], 17: b"nonsense"}.get(k, buffer.getvalue())
            archive.writestr(f"{k}.png", content)
            entries[f"{k}.png"] = {"p": str(k)}
        archive.writestr("part-000001.json", json.dumps(entries))
    return read_pairs(path.parent)


# texts ------------------------------------------------------------------------------------------------------


def test_each_distinct_text_is_encoded_once_and_never_again(tmp_path):
    encode = Lengths()
    rows, index = texts_cache(tmp_path, TEXTS, encode)
    assert sorted(sum(encode.asked, [])) == sorted(set(TEXTS))
    assert max(map(len, encode.asked)) == 2 and rows.shape == (6, 2) and rows.dtype == np.float32
    assert isinstance(rows, np.memmap) and not rows.flags.writeable and index.dtype == np.int64
    assert rows[index][:, 0].tolist() == [len(t) for t in TEXTS]
    again, same = texts_cache(tmp_path, TEXTS, Lengths(stop_after=0))
    assert np.array_equal(again, rows) and np.array_equal(same, index)


def test_the_key_covers_encoder_texts_and_type(tmp_path):
    texts_cache(tmp_path, TEXTS, Lengths())
    for arguments in (
        {"key": "model b"},
        {"key": {"model": "a", "tokens": 77}},
        {"texts": TEXTS + ["new"]},
        {"texts": ["be", "ea"]},
        {"texts": ["b", "eea"]},
        {"dtype": np.float16},
    ):
        encode = Lengths()
        texts_cache(tmp_path, arguments.pop("texts", TEXTS), encode, **arguments)
        assert encode.asked, arguments
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 7 and all(f.name.startswith("targets-") and len(f.name) == 24 for f in folders)
    keys = [json.loads((f / "key.json").read_text()) for f in folders]
    assert {"model": "a", "tokens": 77} in [k["key"] for k in keys]
    assert (
        "model b" in (tmp_path / folders[[k["key"] for k in keys].index("model b")] / "key.json").read_text()
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_resumes_where_it_stopped(tmp_path, stop):
    texts = [f"text {k}" for k in range(21)]
    with pytest.raises(stop):
        texts_cache(tmp_path, texts, Lengths(stop_after=4, stop=stop))
    rest = Lengths()
    rows, index = texts_cache(tmp_path, texts, rest)
    assert sum(rest.asked, []) == texts[8:]
    assert np.array_equal(rows[index], texts_cache(tmp_path / "fresh", texts, Lengths())[0])


def test_a_killed_process_leaves_a_cache_to_resume(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        sys.path.insert(0, sys.argv[1])
        from training import cache, rows
        rows.COMMIT_SECONDS = 0.0
        def encode(texts):
            time.sleep(0.01)
            print(texts[0], flush=True)
            return torch.tensor([[float(t), 1.0] for t in texts])
        texts = [str(k) for k in range(10_000)]
        cache.cached_texts(sys.argv[2], texts, cache.Encoder("targets", "k", (2,), "float32", 1, encode))
    """)
    run = subprocess.Popen(
        [sys.executable, "-c", script, ROOT, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(15):
        last = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait()
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.tensor([[float(t), 1.0] for t in texts])

    texts = [str(k) for k in range(10_000)]
    rows, _ = cached_texts(tmp_path, texts, Encoder("targets", "k", (2,), "float32", 1, encode))
    assert rows[:, 0].tolist() == list(range(10_000)) and (rows[:, 1] == 1).all()
    assert last - 1 <= int(asked[0]) and len(asked) == 10_000 - int(asked[0])


def test_damaged_cache_files_are_made_again(tmp_path):
    rows, _ = texts_cache(tmp_path, TEXTS, Lengths())
    expected = np.array(rows)
    (folder,) = tmp_path.iterdir()
    for file, damage in (
        ("rows.npy", lambda b: b[:-3]),
        ("rows.npy", lambda b: b""),
        ("done.npy", lambda b: b[:9]),
        ("rows.npy", lambda b: b.replace(b"<f4", b"<f2")),
        ("rows.npy", lambda b: b.replace(b"(6, ", b"(6, (")),
        ("done.npy", None),
    ):
        path = folder / file
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        encode = Lengths()
        assert np.array_equal(texts_cache(tmp_path, TEXTS, encode)[0], expected)
        assert len(sum(encode.asked, [])) == 6, file


@pytest.mark.parametrize("n, damaged", [(6, [0]), (600, [3]), (600, [599, 300])])
def test_flipped_bits_are_found_and_their_rows_computed_again(tmp_path, caplog, n, damaged):
    texts = [str(k) for k in range(n)]
    rows, _ = texts_cache(tmp_path, texts, Lengths(), batch_size=100)
    expected = np.array(rows)
    (folder,) = tmp_path.iterdir()
    raw = bytearray((folder / "rows.npy").read_bytes())
    for row in damaged:
        raw[len(raw) - (n - row) * 8] ^= 1
    (folder / "rows.npy").write_bytes(raw)
    encode = Lengths()
    assert np.array_equal(texts_cache(tmp_path, texts, encode, batch_size=100)[0], expected)
    blocks = {row // caches.BLOCK for row in damaged}
    again = [k for k in range(n) if k // caches.BLOCK in blocks]
    assert sorted(map(int, sum(encode.asked, []))) == again
    assert f"{len(again)} rows are damaged" in caplog.text
    assert np.array_equal(texts_cache(tmp_path, texts, Lengths(stop_after=0))[0], expected)


def test_a_cache_without_checksums_is_read_and_gets_them(tmp_path):
    rows, _ = texts_cache(tmp_path, TEXTS, Lengths())
    (folder,) = tmp_path.iterdir()
    sums = (folder / "sums.npy").read_bytes()
    (folder / "sums.npy").unlink()
    assert np.array_equal(texts_cache(tmp_path, TEXTS, Lengths(stop_after=0))[0], rows)
    assert (folder / "sums.npy").read_bytes() == sums


def test_two_processes_fill_one_cache_once(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        sys.path.insert(0, sys.argv[1])
        from training import cache
        def encode(texts):
            time.sleep(0.02)
            print(*texts, flush=True)
            return torch.tensor([[float(t), 1.0] for t in texts])
        texts = [str(k) for k in range(60)]
        encoder = cache.Encoder("targets", "k", (2,), "float32", 4, encode)
        rows, _ = cache.cached_texts(sys.argv[2], texts, encoder)
        assert rows[:, 0].tolist() == list(range(60))
    """)
    command = [sys.executable, "-c", script, ROOT, tmp_path]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(3)]
    encoded = [word for run in runs for word in run.communicate()[0].split()]
    assert [run.returncode for run in runs] == [0, 0, 0] and sorted(map(int, encoded)) == list(range(60))


def test_encoders_that_answer_wrongly(tmp_path):
    with pytest.raises(DataError, match=r"targets.*gave \(2, 3\), not \(2, 2\)"):
        texts_cache(tmp_path, TEXTS, lambda texts: torch.zeros(len(texts), 3))
    with pytest.raises(DataError, match="NaN"):
        texts_cache(tmp_path, TEXTS, lambda texts: torch.full((len(texts), 2), float("nan")))
    with pytest.raises(DataError, match="more than float16"):
        texts_cache(tmp_path, TEXTS, lambda texts: torch.full((len(texts), 2), 1e6), dtype="float16")
    with pytest.raises(DataError, match="no pairs to cache"):
        texts_cache(tmp_path, [], Lengths())
    assert texts_cache(tmp_path, TEXTS, lambda t: Lengths()(t).bfloat16())[0].shape == (6, 2)


# images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_images_broken_ones_are_passed_over_and_listed(tmp_path, pairs, caplog, workers):
    encode = Means()
    rows, ok = images_cache(tmp_path / "cache", pairs, encode, workers=workers)
    assert rows.shape == (20, 3) and rows.dtype == np.float16 and isinstance(rows, np.memmap)
    assert ok.dtype == bool and np.flatnonzero(~ok).tolist() == [3, 11, 17] and encode.seen == 17
    assert (rows[~ok] == 0).all()
    expected = np.arange(20) * 10 / 127.5 - 1
    assert np.abs(rows[ok, 0] - expected[ok]).max() < 1e-3 and (rows[ok, 2] == 1).all()
    (folder,) = (tmp_path / "cache").iterdir()
    listed = json.loads((folder / "skipped.json").read_text())
    assert set(listed) == {"3", "11", "17"} and "part-000001.zip!3.png: the file is empty" in listed["3"]
    assert "3 of 20 images cannot be used" in caplog.text and str(folder / "skipped.json") in caplog.text
    caplog.clear()
    again, still = images_cache(tmp_path / "cache", pairs, Means(stop_after=0))
    assert np.array_equal(again, rows) and np.array_equal(still, ok) and "3 of 20" in caplog.text


def test_image_cache_resumes(tmp_path, pairs):
    with pytest.raises(KeyboardInterrupt):
        images_cache(tmp_path, pairs, Means(stop_after=3, stop=KeyboardInterrupt))
    rest = Means()
    rows, ok = images_cache(tmp_path, pairs, rest)
    assert rest.seen == 20 - 12 - 1 and ok.sum() == 17  # batches 0..11 were done, of 12..19 one is broken
    fresh, _ = images_cache(tmp_path / "fresh", pairs, Means())
    assert np.array_equal(rows, fresh)
    (folder,) = [f for f in tmp_path.iterdir() if f.name.startswith("latents-")]
    assert set(json.loads((folder / "skipped.json").read_text())) == {"3", "11", "17"}


def test_the_image_key_covers_archives_members_and_size(tmp_path, pairs):
    cache = tmp_path / "cache"
    images_cache(cache, pairs, Means())
    images_cache(cache, pairs.subset([0, 1, 2]), Means())
    images_cache(cache, pairs.subset([0, 2, 1]), Means())
    images_cache(cache, pairs, Means(), key="another vae")
    how = Preprocessing.square(8)
    encoder = Encoder("latents", "vae", (3,), "float16", 4, lambda images: images.mean((2, 3)))
    cached_images(cache, pairs, how, encoder)
    assert len(list(cache.iterdir())) == 5
    os.utime(pairs.archives[0], ns=(1, 1))
    images_cache(cache, pairs, Means())
    assert len(list(cache.iterdir())) == 6
    shutil.copytree(pairs.archives[0].parent, tmp_path / "moved")  # with its times: the same images elsewhere
    images_cache(cache, read_pairs(tmp_path / "moved"), Means(stop_after=0))


def test_images_in_folders_are_keyed_one_by_one(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        Image.new("RGB", (16, 16), (k, k, k)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}")
    images_cache(tmp_path / "cache", read_pairs(folder), Means())
    Image.new("RGB", (16, 16), "white").save(folder / "1.png")
    os.utime(folder / "1.png", ns=(5, 5))
    rows, _ = images_cache(tmp_path / "cache", read_pairs(folder), Means())
    assert (rows[1] == 1).all()
    gone = read_pairs(folder)
    (folder / "1.png").unlink()
    rows, ok = images_cache(tmp_path / "cache", gone, Means())
    assert ok.tolist() == [True, False]


def test_filling_a_cache_draws_no_random_numbers(tmp_path, pairs):
    torch.manual_seed(3)
    images_cache(tmp_path, pairs, Means())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


# disks ------------------------------------------------------------------------------------------------------


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    encode = Lengths()
    expected = r"no space left in .*: needs 8 MB, 5 MB free; set REVERSE_SD_CACHE to a larger disk$"
    with pytest.raises(DataError, match=expected) as caught:
        cached_texts(tmp_path, TEXTS, Encoder("targets", "k", (330_000,), np.float32, 2, encode))
    assert "\n" not in str(caught.value) and not encode.asked and not list(tmp_path.rglob("rows.npy"))


def test_a_disk_that_fills_while_reserving(tmp_path, monkeypatch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system reserves nothing")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(DataError, match="no space left in"):
            texts_cache(tmp_path, TEXTS, Lengths())
        assert not list(tmp_path.rglob("rows.npy"))
    assert len(texts_cache(tmp_path, TEXTS, Lengths())[0]) == 6


def test_a_disk_that_fills_half_way_leaves_a_cache_to_resume(tmp_path, monkeypatch):
    texts = [f"text {k}" for k in range(21)]
    with monkeypatch.context() as patch:
        patch.setattr(caches, "COMMIT_SECONDS", 0.0)
        write, calls = caches.Column.write, []

        def write_or_fail(self, start, values):
            calls.append(1)
            full_disk() if len(calls) > 6 else write(self, start, values)

        patch.setattr(caches.Column, "write", write_or_fail)
        with pytest.raises(DataError, match="no space left in .*set REVERSE_SD_CACHE"):
            texts_cache(tmp_path, texts, Lengths())
    rest = Lengths()
    rows, index = texts_cache(tmp_path, texts, rest)
    assert 0 < len(sum(rest.asked, [])) < 21 and rows[index][:, 0].tolist() == [len(t) for t in texts]


def test_rows_are_reserved_on_the_disk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode = Lengths(stop_after=0, stop=KeyboardInterrupt)
        cached_texts(tmp_path, TEXTS, Encoder("targets", "k", (100_000,), np.float32, 2, encode))
    (rows,) = tmp_path.rglob("rows.npy")
    if hasattr(os, "posix_fallocate"):
        assert rows.stat().st_blocks * 512 >= 6 * 400_000


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file.*cannot be written.*REVERSE_SD_CACHE") as caught:
        texts_cache(tmp_path / "file" / "cache", TEXTS, Lengths())
    assert "\n" not in str(caught.value)

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    rows, _ = texts_cache(tmp_path, TEXTS, Lengths())
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        texts_cache(tmp_path / "other", TEXTS, Lengths())
    assert np.array_equal(texts_cache(tmp_path, TEXTS, Lengths(stop_after=0))[0], rows), (
        "a full cache is only read"
    )


# atomic writes ----------------------------------------------------------------------------------------------


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "née")
    assert path.read_bytes() == "née".encode()
    atomic_write(path, b"\0new")
    assert path.read_bytes() == b"\0new"
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(OSError) as caught:
                atomic_write(path, "newer")
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"\0new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"no/a\.json'$"):  # not its temporary file
        atomic_write(tmp_path / "no" / "a.json", "newer")


def test_json_and_arrays_are_written_with_their_folders(tmp_path):
    text, array = tmp_path / "a" / "b" / "a.json", tmp_path / "c" / "d" / "a.npy"
    for value in (1, 2):
        files.write_json(text, {"a": value})
        files.write_array(array, np.array([value]))
    assert text.read_text() == '{\n "a": 2\n}\n' and np.load(array).tolist() == [2]
    with pytest.raises(ValueError):
        files.write_array(array, np.array([None]))


def test_a_process_killed_while_writing_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "a.bin"
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        from files import atomic_write
        k = 0
        while True:
            atomic_write(sys.argv[2], bytes([k % 256]) * 3_000_000)
            k += 1
            if k == 3:
                print("on", flush=True)
    """)
    run = subprocess.Popen([sys.executable, "-c", script, ROOT, path], stdout=subprocess.PIPE)
    run.stdout.readline()
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    content = path.read_bytes()
    assert len(content) == 3_000_000 and len(set(content)) == 1
