"""python reverse_sd.py at use: folders, JSON lines, texts beside images, the page. The run is made up."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import Browser
from conftest import ROOT
from PIL import Image

import data
import weights
from backbones import BACKBONES
from command import run_command
from files import DataError
from training import reading
from training.calibration import Calibration, write_calibration
from training.captions import scorer_source
from training.reading import Captioner as Captions

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROMPTS = ["a cat", "a dog", "a <script>alert(1)</script> & \"b\"", "a star", "a moon"]
WORDS = ["cat", "dog", "star", "moon"]


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """A run of five training prompts with the unit vectors as embeddings."""
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    rows = {"train": [{"prompt": prompt} for prompt in PROMPTS]}
    (folder / "predictions" / "rows.json").write_text(json.dumps(rows))
    np.save(folder / "predictions" / "train-targets.npy", np.eye(5, 384, dtype=np.float32))
    config = {"weights": "some", "captions": None}
    vocabulary = SimpleNamespace(words=WORDS)
    return SimpleNamespace(folder=folder, config=config, vocabulary=vocabulary, backbone=BACKBONES["vit"])


def picture(k: int, size: tuple[int, int] = (40, 20)) -> Image.Image:
    return Image.new("RGB", size, (10 * k, 0, 0))


def number(image: Image.Image) -> int:
    return round(image.getpixel((0, 0))[0] / 10)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Pictures 0 to 4 in a folder with others' files and a link to itself."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for k, name in enumerate(("a.png", "b.png", "below/c.png", "below/d.png", "below/e.png")):
        picture(k).save(folder / name)
    picture(4).save(folder / ".hidden" / "f.png")
    (folder / "._a.png").write_bytes(b"x")
    (folder / ".b.png").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    (folder / "below" / "loop").symlink_to(folder)
    return folder


class Captioner:
    """Picture k is described by training prompt k."""

    def __init__(self, source: str, device: str):
        pass

    def captions(self, images: list[Image.Image]) -> list[str]:
        return [PROMPTS[number(image)] for image in images]


@pytest.fixture
def read(run: SimpleNamespace, monkeypatch):
    """The exit status of the command; `read.images` collects the numbers of the pictures that are read."""
    monkeypatch.setattr(reading, "Captioner", Captioner)

    def predict(images: list[Image.Image], captions: list[str] | None) -> tuple[np.ndarray, np.ndarray]:
        command.images += (numbers := [number(image) for image in images])
        if command.stop_at in numbers:
            raise KeyboardInterrupt
        embeddings = 0.8 * np.eye(5, 384)[numbers] + 0.6 * np.eye(6, 384)[5]
        return embeddings.astype(np.float32), np.array([[0.1, 0.9, 0.5, 0.7]] * len(images), np.float32)

    def command(*argv: object) -> int:
        command.images = []
        args = reading.parse(list(map(str, argv)))
        return run_command(lambda: reading.read_images(args, run, predict, "cpu"))

    command.images, command.stop_at = [], None
    return command


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_read_to_the_bottom(read, images: Path, capsys):
    (images / "below" / "broken.png").write_bytes(b"\x89PNG\r\n")
    assert read(images, images / "a.png", "-n", 1) == 2
    printed = capsys.readouterr()
    names = [line for line in printed.out.splitlines() if not line.startswith(" ")]
    assert names == [str(images / name) for name in
                     ("a.png", "b.png", "below/c.png", "below/d.png", "below/e.png")]  # fmt: skip
    assert read.images == [0, 1, 2, 3, 4]
    lines = printed.out.splitlines()
    assert lines[1:3] == ["  0.800  a cat", "  words  dog 90%, moon 70%, star 50%, cat 10%"]
    skipped, summary = printed.err.splitlines()
    assert skipped.startswith(f"skipped: {images}/below/broken.png: ")
    assert summary == "5 of 6 images read, 1 skipped; passed over: 2 hidden, 1 .md"


def test_a_folder_without_images_is_refused(read, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty") == 2 and "empty: holds no image" in capsys.readouterr().err


def test_a_caption_for_a_run_that_reads_none_is_refused(read, images: Path, capsys):
    assert read(images, "--caption", "a star") == 2 and "reads no text" in capsys.readouterr().err


@pytest.mark.parametrize("n, added", [(0, []), (1, ["dog"]), (5, ["dog", "moon", "star"])])
def test_a_line_of_json_for_each_image(n: int, added: list[str], read, images: Path, tmp_path: Path):
    path, flags = tmp_path / "out.jsonl", ["--add-words", n] if n else []
    assert read(images / "a.png", "--captioner", "x", "-n", 2, "--jsonl", path, *flags) == 0
    (record,) = records(path)
    state = (images / "a.png").stat()
    assert record == {
        "image": str(images / "a.png"),
        "stamp": f"{state.st_size} {state.st_mtime_ns}",
        "settings": record["settings"],
        "prompt": ", ".join(["a cat", *added]),
        "caption": "a cat",
        "added": added,
        "clip_score": None,
        "clip": None,
        "nearest": [{"prompt": "a cat", "cosine": pytest.approx(0.8)},
                    {"prompt": "a dog", "cosine": pytest.approx(0)}],
        "words": [{"word": word, "p": pytest.approx(p)}
                  for word, p in (("dog", 0.9), ("moon", 0.7), ("star", 0.5), ("cat", 0.1))],
        "expected_cosine": None,
        "judged": None,
    }  # fmt: skip


def test_likely_words_are_calibrated(read, run: SimpleNamespace, images: Path, tmp_path: Path, capsys):
    """By the predicted embedding, .8 of the picture's axis and .6 of axis 5, not by the vocabulary head; with
    the run's evaluation earlier lines of --jsonl become those of other options."""
    lines_before = images / "a.png", "--jsonl", tmp_path / "out.jsonl"
    assert read(*lines_before) == read(*lines_before) == 0 and read.images == []
    maps = np.zeros((385, 388), np.float32)
    maps[6, 384 + WORDS.index("star")], maps[1, 384 + WORDS.index("dog")] = 0.9 / 0.6, 0.6 / 0.8
    calibration = Calibration([0.0] * 101, 1.0, [1.0] * 5, [1.0, 0, 0, 0, 0], maps)
    write_calibration(run.folder, calibration)
    assert read(*lines_before) == 2
    capsys.readouterr()
    assert read(images / "a.png", images / "b.png", "--captioner", "x", "--add-words", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if line.startswith("  words"))
    assert first == "  words  star 90%, dog 60%, cat 1%, moon 1%"
    assert second == "  words  star 90%, cat 1%, dog 1%, moon 1%"


def test_words_of_the_caption_are_not_added():
    likely = [{"word": "cat", "p": 0.9}, {"word": "dog", "p": 0.6}, {"word": "star", "p": 0.4}]
    assert reading.words_to_add("A Cat, running", likely, 3) == ["dog"]


def test_a_stopped_call_goes_on(read, images: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "BATCH", 2)
    path, page = tmp_path / "out.jsonl", tmp_path / "out.html"
    flags = [images, "--jsonl", path, "--html", page]
    read.stop_at = 3
    assert read(*flags) == 130
    assert len(records(path)) == 2 and page.read_text().count("<article>") == 2
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"image": "cut')  # as by a kill
    first, read.stop_at = capsys.readouterr().out, None
    assert read(*flags) == 0
    assert read.images == [2, 3, 4] and path.read_bytes().startswith(whole)
    assert [Path(r["image"]).name for r in records(path)] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert capsys.readouterr().out.startswith(first) and page.read_text().count("<article>") == 5

    picture(1, (50, 50)).save(images / "a.png")  # another picture
    assert read(*flags) == 0 and read.images == [1] and len(records(path)) == 5
    assert records(path)[-1]["nearest"][0]["prompt"] == "a dog"

    before = path.read_bytes()
    assert read(*flags, "-n", 1) == 2 and path.read_bytes() == before
    assert "out.jsonl, line 1: is not by the same run and options" in capsys.readouterr().err
    assert read(*flags, "-n", 1, "--overwrite") == 0
    assert [len(r["nearest"]) for r in records(path)] == [1] * 5


def test_other_files_are_not_replaced(read, images: Path, tmp_path: Path, capsys):
    (tmp_path / "mine").write_text("mine\n")
    for flag, message in (("--jsonl", "line 1: is not by"), ("--html", "is no page of this command")):
        assert read(images, flag, tmp_path / "mine") == 2
        assert message in capsys.readouterr().err and (tmp_path / "mine").read_text() == "mine\n"
    assert read(images, "--html", tmp_path / "mine", "--overwrite") == 0
    assert (tmp_path / "mine").read_text().startswith("<!doctype html>")
    os.mkfifo(tmp_path / "pipe")
    for flag in ("--jsonl", "--html"):  # it would be replaced, or read without end
        assert read(images, flag, tmp_path / "pipe", "--overwrite") == 2
        assert "pipe: is no regular file" in capsys.readouterr().err


def test_a_text_is_written_beside_each_image_that_has_none(read, images: Path, capsys):
    (images / "a.txt").write_text("mine\n")
    picture(3).save(images / "b.bmp")  # the same stem as b.png
    assert read(images, "--captioner", "x", "--sidecar") == 0
    texts = {path.name: path.read_text() for path in images.rglob("*.txt")}
    assert texts == {"a.txt": "mine\n", "b.png.txt": "a dog\n", "b.bmp.txt": "a star\n",
                     "c.txt": PROMPTS[2] + "\n", "d.txt": "a star\n", "e.txt": "a moon\n"}  # fmt: skip
    assert "1 texts beside images are kept" in capsys.readouterr().err
    assert read(images, "--captioner", "x", "--sidecar", "--overwrite") == 0
    assert (images / "a.txt").read_text() == "a cat\n"
    assert read(images, "--captioner", "x", "--sidecar") == 0  # the same texts again
    assert "kept" not in capsys.readouterr().err


def test_without_a_captioner_the_text_is_the_nearest_prompt(read, images: Path, tmp_path: Path):
    assert read(images / "b.png", "--sidecar", "--jsonl", tmp_path / "o") == 0
    assert (images / "b.txt").read_text() == "a dog\n" and records(tmp_path / "o")[0]["prompt"] is None


def test_prompts_of_a_file_are_searched(read, images: Path, tmp_path: Path, monkeypatch, capsys):
    rows = np.eye(5, 384, dtype=np.float32)
    monkeypatch.setattr(reading, "open_bank", lambda path, device: reading.bank_of(["v", "w"], rows[[1, 0]]))
    (tmp_path / "bank.txt").write_text("v\nw\n")
    assert read(images / "a.png", "--prompts", tmp_path / "bank.txt") == 0
    assert capsys.readouterr().out.splitlines()[1:3] == ["  0.800  w", "  0.000  v"]
    lines = images / "a.png", "--prompts", tmp_path / "bank.txt", "--jsonl", tmp_path / "o.jsonl"
    assert read(*lines) == read(*lines) == 0
    (tmp_path / "bank.txt").write_text("v\nw\nx\n")
    assert read(*lines) == 2 and "is not by the same run and options" in capsys.readouterr().err


def test_several_unread_images_are_counted(read, tmp_path: Path, capsys):
    assert read(tmp_path / "a.png", tmp_path / "b.png") == 2
    assert capsys.readouterr().err.splitlines()[2:] == ["0 of 2 images read, 2 skipped"]


def test_a_name_that_is_no_utf_8(read, tmp_path: Path):
    picture(1).save(path := tmp_path / os.fsdecode(b"\xe9.png"))
    assert read(path, "--jsonl", tmp_path / "o.jsonl", "--html", tmp_path / "o.html", "--sidecar") == 0
    assert records(tmp_path / "o.jsonl")[0]["image"] == str(path) and path.with_suffix(".txt").exists()
    assert "\\udce9.png</p>" in (tmp_path / "o.html").read_text("utf-8")


def test_a_prompt_of_as_many_tokens_as_the_encoder_reads():
    assert reading.embedded("star " * 254).shape == (384,)  # and its two marks
    with pytest.raises(DataError, match="has 257 tokens, .* reads at most 256"):
        reading.embedded("star " * 255)


class Parts(HTMLParser):
    """The tags of a page, its links and its texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, text: str) -> None:
        self.texts.append(text.strip())


def test_the_page_holds_all_images_and_nothing_of_it_is_elsewhere(read, images: Path, tmp_path: Path):
    picture(2, (900, 300)).save(images / "below" / "c.png")
    picture(0).save(images / "<b>&.png")
    (images / "z.png").write_bytes(b"x")
    path = tmp_path / "page.html"
    assert read(images, "--captioner", "x", "--html", path) == 2
    parts = Parts(path)
    assert parts.tags.count("img") == parts.tags.count("article") == 6
    assert not {"script", "link", "b", "iframe"} & set(parts.tags) and "http" not in "".join(parts.texts)
    assert PROMPTS[2] in parts.texts and str(images / "<b>&.png") in parts.texts
    assert "6 of 7 images read, 1 skipped; passed over: 2 hidden, 1 .md" in parts.texts
    assert any(text.startswith(f"{images}/z.png: ") for text in parts.texts)
    start = "data:image/jpeg;base64,"
    assert all(link.startswith(start) for link in parts.links)
    shown = [Image.open(io.BytesIO(base64.b64decode(link.removeprefix(start)))) for link in parts.links]
    assert [(number(image), image.size) for image in shown] == [
        (0, (40, 20)), (0, (40, 20)), (1, (40, 20)), (2, (320, 107)), (3, (40, 20)), (4, (40, 20))
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH")
def test_the_page_fits_a_phone(read, images: Path, tmp_path: Path):
    picture(1, (900, 100)).save(images / f"{'long' * 50}.png")
    path = tmp_path / "page.html"
    assert read(images, "--captioner", "x", "--html", path) == 0
    with Browser(CHROMIUM, tmp_path, path.as_uri()) as browser:
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        browser.send("Emulation.setDeviceMetricsOverride", **phone)
        browser.wait_for("innerWidth === 390")
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.value("document.documentElement.scrollWidth") == 390
        all_of_it = "[...document.querySelectorAll('*')]"
        right = browser.value(f"Math.max(...{all_of_it}.map(e => e.getBoundingClientRect().right))")
        assert right <= 390 and browser.value("document.images.length") == 6
        assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}


def test_a_line_is_written_before_the_next_image_is_read(read, images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH", 1)
    path, seen = tmp_path / "o.jsonl", []
    load_image = reading.data.load_image

    def counted(image: Path) -> Image.Image:
        seen.append(len(path.read_bytes().splitlines()))
        return load_image(image)

    monkeypatch.setattr(reading.data, "load_image", counted)
    assert read(images, "--jsonl", path) == 0 and seen == [0, 1, 2, 3, 4]


def test_two_commands_do_not_write_one_file(read, images: Path, tmp_path: Path, capsys):
    path = tmp_path / "o.jsonl"
    path.touch()
    code = "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX); "
    code += "print(1, flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    try:
        assert read(images, "--jsonl", path) == 2 and "another process writes it" in capsys.readouterr().err
    finally:
        holder.communicate()


def test_the_newest_run_is_that_of_a_regressor(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="python train.py"):
        reading.newest_run()
    for k, backbone in enumerate(("vit", "unet", "blip")):
        (folder := tmp_path / "runs" / backbone).mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"backbone": backbone}))
        (folder / "result.json").touch()
        os.utime(folder / "result.json", (k, k))
    assert reading.newest_run() == Path("runs/unet")


def test_a_published_captioner_writes_texts_of_its_own_length():
    model, images = weights.load("blip", "blip-mini"), [picture(k, (64, 64)) for k in range(3)]
    preprocessing = data.Preprocessing(**weights.preprocessing("blip", "blip-mini"))
    tensors = torch.stack([data.image_tensor(image, preprocessing) for image in images])
    assert Captions("blip-mini", "cpu").captions(images) == model.generate(tensors, max_length=20)


def test_a_regressors_run_is_no_captioner():
    with pytest.raises(DataError, match="not a captioner's run, its --backbone is unet"):
        Captions(str(ROOT / "tests" / "made_at_24701ab" / "finished"), "cpu")


@pytest.mark.parametrize("source", ["nowhere", "clip-mini"])
def test_what_is_no_captioner_is_refused(source: str):
    with pytest.raises(DataError, match=source) as error:
        Captions(source, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, captions, weights_of, expected", [
    ([], "blip-mini", "sd-mini", ("blip-mini", True)),
    ([], "folder/blip", "sd-1", ("folder/blip", True)),
    ([], "empty", "sd-mini", ("blip-mini", False)),
    ([], "empty", "sd-1", (None, False)),
    (["--captioner", "blip-large"], "blip-mini", "sd-mini", ("blip-large", False)),
    (["--captioner", "none"], "blip-mini", "sd-mini", (None, False)),
])  # fmt: skip
def test_the_captioner_of_the_text(flags, captions, weights_of, expected):
    """And whether the U-Net reads the same text."""
    run = SimpleNamespace(config={"captions": captions, "weights": weights_of}, backbone=BACKBONES["unet"])
    assert reading.captioner_source(reading.parse(["x.png", *flags]), run) == expected


def test_the_clip_of_the_score(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    args = reading.parse(["x.png"])
    paper = SimpleNamespace(config={"weights": "swin-l"}, backbone=BACKBONES["swin"])
    mini = SimpleNamespace(config={"weights": "swin-mini"}, backbone=BACKBONES["swin"])
    assert reading.clip_source(args, mini) == "clip-mini" and reading.clip_source(args, paper) is None
    assert (scorer_source("my/own-mini"), scorer_source("blip-base")) == ("clip-mini", None)
    for entry in ("clip-b-32", "clip-tokenizer"):
        for file in reading.ENTRIES[entry].files:
            path = tmp_path / "weights" / entry / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert reading.clip_source(args, paper) == scorer_source("blip-base") == "clip-b-32"
    assert reading.clip_source(reading.parse(["x.png", "--clip", "none"]), mini) is None
