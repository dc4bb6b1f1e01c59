"""Prompts inside images: every place and encoding, every kind of source, and graphs walked from their end."""

import html
import io
import json
import struct
import time
import zlib

import pytest
from PIL import Image, PngImagePlugin

import embedded
from data import DataError, embedded_prompt, load_image, read_pairs
from embedded import NoPrompt, decoded, find_prompt, graph_of, graph_prompt, sidecar_prompt

WANT = "a red barn at dusk"
SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 11, Size: 64x64, Model: x"
INFOTEXT = f"{WANT}\nNegative prompt: blurry, ugly\n{SETTINGS}"
META = {"se": 11, "st": 20, "c": 7.0, "sa": "Euler a"}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, *chunks: bytes, after: bool = False):
    """A PNG with these chunks behind its header, or behind its pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    raw = buffer.getvalue()
    at = len(raw) - 12 if after else 33
    path.write_bytes(raw[:at] + b"".join(chunks) + raw[at:])
    return path


def text_png(path, **texts: str):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


def tiff(tag: int, value: bytes, kind: int, own: bool, order: str = "<") -> bytes:
    """EXIF with one field, in its first directory or in the one of its own."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)

    def entry(at):
        return struct.pack(order + "HHHII", 1, tag, kind, len(value), at) + struct.pack(order + "I", 0)

    if not own:
        return head + entry(26) + value
    link = struct.pack(order + "HHHII", 1, 0x8769, 4, 1, 26) + struct.pack(order + "I", 0)
    return head + link + entry(44) + value


def with_exif(path, form: str, exif: bytes):
    Image.new("RGB", (16, 16)).save(path, form, exif=b"Exif\0\0" + exif)
    return path


# places and encodings ---------------------------------------------------------------------------------------


ENCODED = {
    "UNICODE, big endian": b"UNICODE\0" + INFOTEXT.encode("utf-16-be"),
    "UNICODE, little endian": b"UNICODE\0" + INFOTEXT.encode("utf-16-le"),
    "UNICODE with a mark": b"UNICODE\0" + INFOTEXT.encode("utf-16"),
    "UNICODE that is UTF-8": b"UNICODE\0" + INFOTEXT.encode(),
    "ASCII": b"ASCII\0\0\0" + INFOTEXT.encode() + bytes(5),
    "ASCII that is UTF-8": b"ASCII\0\0\0" + INFOTEXT.encode(),
    "undefined": bytes(8) + INFOTEXT.encode(),
    "no code": INFOTEXT.encode(),
    "no code, UTF-16": INFOTEXT.encode("utf-16-le"),
    "no code, mark of UTF-8": b"\xef\xbb\xbf" + INFOTEXT.encode(),
}


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_comments_in_every_encoding(tmp_path, encoding, order, form):
    raw = ENCODED[encoding]
    for kind, own in ((7, True), (7, False), (2, True)):
        path = with_exif(tmp_path / "a", form, tiff(0x9286, raw, kind, own, order))
        assert embedded_prompt(path) == (WANT, META)


@pytest.mark.parametrize("text", ["ein Café – im Schnee", "夕暮れの赤い納屋, 8k", "红色的谷仓", "сарай", "😀 barn"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-16"])
def test_letters_beyond_ascii(text, encoding):
    text = f"{text}\nNegative prompt: ugly\nSteps: 4, Seed: 1"
    for code in (b"", b"UNICODE\0", b"ASCII\0\0\0", bytes(8)):
        assert decoded(code + text.encode(encoding)) == text
    assert decoded(b"caf\xe9 au lait") == "café au lait"
    assert decoded(b"JIS\0\0\0\0\0" + "赤い納屋".encode("iso2022_jp")) == "赤い納屋"
    assert decoded(b"JIS\0\0\0\0\0" + "赤い納屋 8k".encode("shift_jis")) == "赤い納屋 8k"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "tEXt, UTF-8", "zTXt", "iTXt", "iTXt, packed"])
def test_every_chunk_of_a_png(tmp_path, kind, after):
    text = INFOTEXT.replace("barn", "bärn")
    raw = text.encode("latin-1" if kind == "tEXt" else "utf-8")
    packed = zlib.compress(raw)
    content = {"tEXt": raw, "tEXt, UTF-8": raw, "zTXt": b"\0" + packed, "iTXt": b"\0\0\0\0" + raw,
               "iTXt, packed": b"\1\0en\0Parameter\0" + packed}[kind]
    path = png(tmp_path / "a.png", chunk(kind[:4].encode(), b"parameters\0" + content), after=after)
    assert embedded_prompt(path) == (WANT.replace("barn", "bärn"), META)


@pytest.mark.parametrize("tag, name", [(0x010E, "description"), (0x010F, "make"), (0x9C9C, "Windows' comment")])
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_other_fields(tmp_path, tag, name, form):
    raw = INFOTEXT.encode("utf-16-le") if tag == 0x9C9C else INFOTEXT.encode()
    path = with_exif(tmp_path / "a", form, tiff(tag, raw, 1 if tag == 0x9C9C else 2, own=False))
    assert embedded_prompt(path) == (WANT, META)


def test_comments_and_xmp(tmp_path):
    path = tmp_path / "a"
    Image.new("RGB", (16, 16)).save(path, "JPEG", comment=INFOTEXT.encode())
    assert embedded_prompt(path) == (WANT, META)
    words = json.dumps({"c": WANT, "uc": "ugly", "steps": 20, "scale": 7.0, "seed": 11, "sampler": "Euler a"})
    xmp = f"<x><exif:UserComment><rdf:li>{html.escape(words)}</rdf:li></exif:UserComment></x>"
    Image.new("RGB", (16, 16)).save(path, "JPEG", xmp=xmp.encode())
    assert embedded_prompt(path) == (WANT, META)
    assert embedded_prompt(text_png(tmp_path / "a.png", **{"XML:com.adobe.xmp": xmp})) == (WANT, META)
