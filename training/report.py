"""The outputs of `python reverse_sd.py`: lines of text, a JSON line, a .txt beside the image, an HTML page.

Each is made from the record of an image, JSON as training/reading.py describes it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from files import DataError, atomic_write, json_object, lock_bytes, require_file

THUMBNAIL = 320  # pixels of the longer side
BAR = 20  # characters of a certain word
HEAD, TAIL = Path(__file__).with_name("report.html").read_text("utf-8").split("{{images}}")
MARK = HEAD.split("<title>")[0]  # of the pages written here


def percent(words: Sequence[dict]) -> str:
    return ", ".join(f"{word['word']} {word['p']:.0%}" for word in words)


def lines(record: dict) -> list[str]:
    """The text that is printed for an image."""
    text = [record["image"]]
    if record["prompt"] is not None:
        text.append(f"  prompt  {record['prompt']}")
    text += [f"  {near['cosine']:.3f}  {near['prompt']}" for near in record["nearest"]]
    if record["words"]:
        text.append(f"  words  {percent(record['words'])}")
    return text + [f"  {line}" for line in alignment(record)]


def alignment(record: dict) -> list[str]:
    """The scores of an image, and the judgement of a prompt beside it."""
    text, judged = [], record["judged"]
    if record["expected_cosine"] is not None:
        text.append(f"expected cosine with its prompt: {record['expected_cosine']:.2f}")
    if record["clip_score"] is not None:
        text.append(f"CLIPScore of the text above, by {record['clip']}: {record['clip_score']:.3f}")
    if judged is None:
        return text
    line = f"cosine with the given prompt: {judged['cosine']:.3f}"
    if judged["rank"] is not None:
        line += f", above {judged['rank']:.0%} of the validation pairs"
    text.append(line)
    if judged["clip_score"] is not None:
        text.append(f"CLIPScore of the given prompt: {judged['clip_score']:.3f}")
    for word in judged["words"]:
        p = word["shown"]
        shown = "not judged: not in this run's vocabulary" if p is None else bar(p)
        text.append(f"  {word['word']:<16} {shown}")
    return text


def bar(p: float) -> str:
    return f"{p:4.0%} {'#' * round(BAR * p)}".rstrip()


def text_of(record: dict) -> str:
    """The text for a sidecar: the prompt, or the nearest one where there is no captioner."""
    return record["nearest"][0]["prompt"] if record["prompt"] is None else record["prompt"]


# ============================================================================================================
# Beside the images
# ============================================================================================================


class Sidecars:
    """Writes `a.txt` beside `a.png`, or `a.png.txt` if another of the images is called `a`, too; `kept`
    counts the other texts that stood there and were not replaced."""

    def __init__(self, images: Sequence[Path], overwrite: bool):
        self.same_stem, self.overwrite, self.kept = Counter(p.with_suffix("") for p in images), overwrite, 0
        for folder in {image.parent for image in images}:
            if not os.access(folder, os.W_OK):
                raise DataError(f"{folder}: cannot be written; remove --sidecar, or use --jsonl")

    def write(self, image: Path, record: dict) -> None:
        alone = self.same_stem[image.with_suffix("")] == 1
        path = image.with_suffix(".txt") if alone else image.with_name(f"{image.name}.txt")
        content = (text_of(record) + "\n").encode()
        if self.overwrite or not os.path.lexists(path):
            atomic_write(path, content)
        else:
            self.kept += not path.is_file() or path.read_bytes() != content


# ============================================================================================================
# JSON lines
# ============================================================================================================


class JsonLines:
    """A file of records, one a line, each written when it is computed; `done`: those that it held before, by
    image.

    A stopped call goes on: images with a line are not read again unless their file has changed since. Raises
    DataError for a file with anything else than lines of the same settings, unless `overwrite`, and while
    another process writes it.
    """

    def __init__(self, path: Path, settings: str, overwrite: bool):
        if path.exists():
            require_file(path)
        content = path.read_bytes() if path.exists() and not overwrite else b""
        self.done: dict[str, dict] = {}
        kept = []
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            record = json_object(line.decode("utf-8", "replace"))
            if not line.endswith(b"\n"):  # cut when a process was killed
                break
            if not record or record.get("settings") != settings:
                raise DataError(
                    f"{path}, line {number}: is not by the same run and options; give another file, or "
                    "--overwrite to lose it"
                )
            if stamp_of(Path(record["image"])) in ("", record["stamp"]):  # the image is gone, or the same
                self.done[record["image"]] = record
                kept.append(line)
        if b"".join(kept) != content or not path.exists() or overwrite:
            atomic_write(path, b"".join(kept))
        self.file = open(path, "r+b", buffering=0)
        self.file.seek(0, os.SEEK_END)
        if not lock_bytes(self.file, 0, 0):
            raise DataError(f"{path}: another process writes it; give another file")

    def write(self, record: dict) -> None:
        if record["image"] not in self.done:
            self.file.write((json.dumps(record) + "\n").encode())


def stamp_of(path: Path) -> str:
    """Size and time of change of a file, equal while it is the same; "" for a missing one."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"


# ============================================================================================================
# HTML
# ============================================================================================================


class Page:
    """One HTML page with all images and nothing outside it; it takes its place when it is closed, with the
    images so far. Raises DataError for a file that is no such page, unless `overwrite`."""

    def __init__(self, path: Path, overwrite: bool):
        if path.exists():
            require_file(path)
        if not overwrite and path.exists() and not path.read_bytes().startswith(MARK.encode()):
            raise DataError(f"{path}: is no page of this command; give another file, or --overwrite")
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "w", encoding="utf-8", errors="backslashreplace")
        self.file.write(HEAD)

    def write(self, image: Image.Image, record: dict) -> None:
        self.file.write(article(image, record))

    def close(self, summary: str, skipped: Sequence[str]) -> None:
        items = "".join(f"<li>{escape(reason)}</li>\n" for reason in skipped)
        self.file.write(f"<footer><p>{escape(summary)}</p>\n<ul>\n{items}</ul></footer>{TAIL}")
        self.file.close()
        os.replace(self.temporary, self.path)


def article(image: Image.Image, record: dict) -> str:
    """An image's part of the page."""
    uri, width, height = thumbnail(image)
    near = "".join(
        f"<li><span>{near['cosine']:.3f}</span> {escape(near['prompt'])}</li>\n" for near in record["nearest"]
    )
    words = f"<p>Likely words: {escape(percent(record['words']))}</p>\n" if record["words"] else ""
    scores = escape("\n".join(alignment(record)))
    name = escape(record["image"])
    return f"""<article>
<img src="{uri}" width="{width}" height="{height}" alt="{name}">
<div>
<h2>{escape(text_of(record))}</h2>
<p class="name">{name}</p>
<ol>
{near}</ol>
{words}<pre>{scores}</pre>
</div>
</article>
"""


def thumbnail(image: Image.Image) -> tuple[str, int, int]:
    """A small picture as a data URI, its width and height."""
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size


# ============================================================================================================
# All of them
# ============================================================================================================


class Outputs:
    """The files that the options ask for. At the end, also after Ctrl-C, the page takes its place and the
    skipped images are listed on standard error."""

    def __init__(self, args: argparse.Namespace, images: Any, settings: str):
        self.images = images
        self.table = JsonLines(args.jsonl, settings, args.overwrite) if args.jsonl else None
        self.sidecars = Sidecars(images.paths, args.overwrite) if args.sidecar else None
        self.page = Page(args.html, args.overwrite) if args.html else None

    @property
    def done(self) -> dict[str, dict]:
        return self.table.done if self.table else {}

    def write(self, path: Path, image: Image.Image | None, record: dict) -> None:
        if self.table:
            self.table.write(record)
        if self.sidecars:
            self.sidecars.write(path, record)
        if self.page:
            self.page.write(image, record)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        skipped = self.images.skipped
        if self.table:
            self.table.file.close()
        if self.page:
            self.page.close(self.images.summary(), skipped)
        for reason in skipped:
            print(f"skipped: {reason}", file=sys.stderr)
        if self.sidecars and self.sidecars.kept:
            print(f"{self.sidecars.kept} texts beside images are kept; --overwrite replaces", file=sys.stderr)
        if len(self.images.paths) > 1 and (self.images.others or len(skipped) > 1):
            print(self.images.summary(), file=sys.stderr)
