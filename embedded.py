"""The prompt that a program left inside an image, or in a text file beside it.

An image carries texts: PNG's text chunks, EXIF's fields, XMP, a comment. All are collected, whatever the
program, each decoded by what its bytes show. Every text is then read for what it is: settings as JSON, the
infotext of AUTOMATIC1111, InvokeAI's command line or ComfyUI's graph. The best supported prompt is taken.
"""

from __future__ import annotations

import html
import io
import json
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from graphs import MAX_PROMPT, NoPrompt, graph_of, graph_prompt, show_texts

MAX_TEXT = 1 << 23  # bytes of one text
MAX_TEXTS = 1 << 25  # bytes of all texts of one image
MAX_DEPTH = 4  # of JSON within JSON


class Candidate(NamedTuple):
    """A prompt, what else its source has (se seed, st steps, c guidance, sa sampler), and how sure it is."""

    prompt: str
    settings: dict
    certainty: int


PLAIN, BARE, EDITED, GRAPH, WITH_SETTINGS, BOTH = range(6)  # EDITED: a graph as the editor keeps it
PLACEHOLDERS = frozenset(("unknown", "none", "null", "undefined", "nan", "n/a", "empty", "[object object]"))


# ============================================================================================================
# Texts of an image
# ============================================================================================================

PNG = b"\x89PNG\r\n\x1a\n"
CODES = (b"ASCII\0\0\0", b"UNICODE\0", b"JIS\0\0\0\0\0", bytes(8))  # EXIF 2.3, table 9
TURNS = {  # how to turn a picture upright, by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
XMP_VALUE = re.compile(r""">([^<>]*)</|="([^"<>]*)"|='([^'<>]*)'""")
PROFILE = "Raw profile type "  # ImageMagick's keys of profiles in hexadecimal
CONTROLS = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")  # and what is private


def texts_of(image: Image.Image, file: BinaryIO) -> dict[str, str]:
    """{field: text} of everything textual in an opened image; what is damaged or too large is left out.

    file: the image's file, from which the chunks of a PNG are read.
    """
    raw: list[tuple[str, bytes | str]] = [*_png_texts(file)]
    raw += [] if image.format == "PNG" else _exif_texts(image.getexif)
    raw += [(key, value) for key, value in image.info.items() if key in ("comment", "xmp")]
    texts: dict[str, str] = {}
    room = MAX_TEXTS
    for key, value in raw:
        room -= len(value)
        if not value or len(value) > MAX_TEXT or room < 0:
            continue
        text = value if isinstance(value, str) else decoded(value)
        if key in ("xmp", "XML:com.adobe.xmp"):
            values = XMP_VALUE.findall(text.replace("<![CDATA[", "").replace("]]>", ""))
            texts |= {f"xmp {k}": html.unescape("".join(value)) for k, value in enumerate(values)}
        elif text.strip():
            texts.setdefault(key, text)
    return texts


def decoded(raw: bytes) -> str:
    """The text of bytes of unknown encoding: an EXIF comment with or without its code, a BOM or neither.

    Writers disagree with their own code and byte order, so every reading is made, and the one wins that has
    the most ASCII characters, the fewest others, and next to none that no text has.
    """
    code = raw[:8].upper() if raw[:8].upper() in CODES else b""
    raw = raw[len(code):]
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return raw.decode("utf-8-sig" if raw[0] == 0xEF else "utf-16", "replace").rstrip("\0")
    encodings = ["utf-8", "cp1252", "utf-16-be", "utf-16-le"]
    if code == b"UNICODE\0":
        encodings = encodings[2:] + encodings[:2]
    elif code.startswith(b"JIS"):
        encodings = ["iso2022_jp"] if b"\x1b" in raw else ["shift_jis", *encodings]
    best, most = "", -1e9
    for encoding in encodings:
        even = raw[:len(raw) // 2 * 2] if encoding.startswith("utf-16") else raw
        text = even.decode(encoding, "replace").rstrip("\0")
        others = len(text) - len(text.encode("ascii", "ignore"))
        score = len(text) - 1.5 * others - 2 * len(CONTROLS.findall(text)) - 3 * text.count("\ufffd")
        if score > most:
            best, most = text, score
    return best


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of each chunk of a PNG, its length and checksum included; the last may be cut. None
    of another file. The file is left at the chunk's content."""
    file.seek(0)
    begin = len(PNG)
    if file.read(begin) != PNG:
        return
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, begin, begin + length + 12
        begin += length + 12
        file.seek(begin)


def png_pixels(file: BinaryIO, header: bool) -> io.BytesIO:
    """The PNG without texts and colour profile, which Pillow refuses together with the pixels if they are
    damaged or large. header: only as far as the pixels begin."""
    kept = [PNG]
    for kind, begin, end in png_chunks(file):
        needed = kind[:1].isupper()
        if not needed and (kind not in (b"tRNS", b"eXIf", b"tEXt", b"zTXt") or end - begin > MAX_TEXT):
            continue
        file.seek(begin)
        first = header and kind == b"IDAT"
        chunk = file.read(8 if first else end - begin)
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in (b"tEXt", b"zTXt"):  # ImageMagick's place for EXIF, which may turn the picture
            key, text = _text_of_chunk(kind, chunk[8:-4])
            whole = whole and key == f"{PROFILE}exif" and 0 < len(text) < 1 << 20
        if needed or whole:
            kept.append(chunk)
        if first:
            break
    return io.BytesIO(b"".join(kept))


def _png_texts(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(key, text) of all chunks of text, and EXIF's in a chunk of its own or where ImageMagick keeps it."""
    for kind, begin, end in png_chunks(file):
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") or end - begin > MAX_TEXT:
            continue
        content = file.read(end - begin - 12)
        if kind == b"eXIf":
            yield from _exif_texts(lambda raw=content: _exif(raw))
            continue
        key, text = _text_of_chunk(kind, content)
        yield key, text
        if key.startswith(PROFILE):  # its lines: "", name, length, and the bytes
            yield from _exif_texts(lambda raw=text: _exif(bytes.fromhex(b"".join(raw.split()[2:]).decode())))


def _text_of_chunk(kind: bytes, content: bytes) -> tuple[str, bytes]:
    """(key, text as bytes); no text where it cannot be unpacked."""
    key, _, content = content.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":  # packed or not, method, language, translated key
        packed, content = content[:1] == b"\1", content[2:].split(b"\0", 2)[-1]
    elif packed:
        content = content[1:]
    try:
        content = zlib.decompressobj().decompress(content, MAX_TEXT + 1) if packed else content
    except zlib.error:
        content = b""
    return key.decode("latin-1"), content


def upright(image: Image.Image) -> Image.Image:
    """The image turned as EXIF's orientation says, if that can be read."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's parser raises nearly any kind on damaged fields
        return image
    return image if turn is None else image.transpose(turn)


def _exif(raw: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(raw)
    return exif


def _exif_texts(load: Callable[[], Image.Exif]) -> list[tuple[str, bytes]]:
    """The strings of EXIF's first directory and of its own, in the file's bytes."""
    texts: list[tuple[str, bytes]] = []
    try:
        exif = load()
        for fields in (exif.get_ifd(ExifTags.IFD.Exif), exif):
            for tag, value in fields.items():
                value = value.encode("latin-1", "replace") if isinstance(value, str) else value
                if isinstance(value, bytes):
                    texts.append((ExifTags.TAGS.get(tag, str(tag)), value))
    except Exception:  # Pillow's parser raises nearly any kind on damaged fields
        return texts
    return texts


def hidden_text(image: Image.Image) -> str | None:
    """The text in the lowest bits of the pixels, where NovelAI and others leave one that outlives metadata.

    Column by column, of alpha or else of red, green and blue: 15 letters that name the kind, the number of
    bits (32 bits, big endian), and the text as UTF-8, or packed by gzip.
    """
    if image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "WEBP"):
        return None
    pixels = np.asarray(image).swapaxes(0, 1)
    for name, channels in ((b"png", pixels[..., 3:]), (b"rgb", pixels[..., :3])):
        head = _lowest_bits(channels, 0, 19 * 8)
        kind, length = head[:15], int.from_bytes(head[15:])
        if kind in (b"stealth_" + name + b"info", b"stealth_" + name + b"comp") and length <= 8 * MAX_TEXT:
            body = _lowest_bits(channels, 19 * 8, length)
            try:
                packed = kind.endswith(b"comp")
                body = zlib.decompressobj(31).decompress(body, MAX_TEXT) if packed else body
            except zlib.error:
                return None
            return decoded(body)
    return None


def _lowest_bits(columns: np.ndarray, begin: int, count: int) -> bytes:
    needed = -(-(begin + count) // max(columns[0].size, 1))  # columns
    return np.packbits(columns[:needed].reshape(-1)[begin:begin + count] & 1).tobytes()


# ============================================================================================================
# Texts that hold a prompt
# ============================================================================================================

# Keys are compared in lower case, letters and digits alone; a key's partner must be beside it if it has one.
PROMPT_KEYS = {"positiveprompt": "", "prompt": "", "positive": "", "fullprompt": "", "basecaption": "",
               "c": "uc", "description": "uc"}  # Draw Things, NovelAI
SETTINGS = {
    "se": ("seed", "noiseseed"),
    "st": ("steps", "numinferencesteps"),
    "c": ("cfgscale", "cfg", "scale", "guidancescale"),
    "sa": ("sampler", "samplername", "scheduler"),
}
NUMBERS = {"se": int, "st": int, "c": float}
DREAM = {"s": "steps", "S": "seed", "C": "cfg", "A": "sampler"}  # flags of InvokeAI's command line
MIDJOURNEY = re.compile(r"Job ID: [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\s*\Z")
PLAIN_KEYS = ("parameters", "prompt")  # PNG's fields whose text is a prompt although nothing else shows it


def find_prompt(texts: dict[str, str]) -> tuple[str, dict]:
    """(prompt, settings) of the best supported source. Raises NoPrompt where none is certain."""
    fields = _from_row(texts)  # of Easy Diffusion and NovelAI
    sure = fields and fields.prompt and (fields.settings or fields.certainty == BOTH)
    candidates = [fields] if sure else []
    reasons: list[NoPrompt] = []
    workflow = _json(texts.get("workflow", ""))
    for key, text in texts.items():
        try:
            candidates += _from_text(key, text, workflow)
        except NoPrompt as reason:
            reasons.append(reason)
    real = [c for c in candidates if c.prompt.lower() not in PLACEHOLDERS]
    if real:
        best = max(real, key=lambda c: (bool(c.prompt), c.certainty))
        if reasons and best.certainty == EDITED:  # of the graph as it was run, the prompt is not certain
            raise reasons[0]
        if len(best.prompt) > MAX_PROMPT:
            raise NoPrompt(f"its prompt is longer than {MAX_PROMPT:,} characters")
        if best.prompt or not reasons:
            return best.prompt, best.settings
    if candidates and not reasons:
        raise NoPrompt("a placeholder stands for its prompt", candidates[0].prompt)
    if reasons:
        raise reasons[0]
    raise NoPrompt("no text inside is certainly a prompt" if texts else "no prompt inside",
                   ", ".join(texts)[:100] or None)


def sidecar_prompt(text: str) -> tuple[str, dict]:
    """(prompt, settings) of a text beside an image: AUTOMATIC1111's infotext, the prompt of a JSON object, or
    else all of it. Raises NoPrompt for an object without a certain one."""
    if isinstance(_json(text), dict):
        return find_prompt({"text": text})
    candidate = _from_infotext(text)
    return (candidate.prompt, candidate.settings) if candidate else (text.strip(), {})


def _from_text(key: str, text: str, workflow: Any) -> list[Candidate]:
    value = _json(text)
    if value is not None:
        candidates = _from_object(value, workflow)
    elif job := MIDJOURNEY.search(text, max(len(text) - 60, 0)):
        candidates = [Candidate(text[:job.start()].strip(), {}, BARE)]
    elif candidate := _from_dream(text) if key == "Dream" else _from_infotext(text):
        candidates = [candidate]
    else:
        plain = key in PLAIN_KEYS and re.search(r"[^\W_]", text) and not text.lstrip().startswith("{")
        candidates = [Candidate(text.strip(), {}, PLAIN)] if plain else []
    if key in ("Dream", "sd-metadata"):  # InvokeAI 2 steers away from what stands [in brackets]
        candidates = [c._replace(prompt=re.sub(r" ?\[[^\[\]]*\]", "", c.prompt).strip()) for c in candidates]
    return candidates


def _json(text: str) -> Any:
    """The object or list of a text, which may have a name before it as in `prompt:{...}`; else None."""
    text = text.strip("\0 \t\r\n")
    named = re.match(r"\w{1,30}: *(?=[{\[])", text)
    text = text[named.end():] if named else text
    if not text.startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _from_object(value: Any, workflow: Any, depth: int = 0) -> list[Candidate]:
    """The prompts of an object: its own, or those of a graph and of objects (also as text) within it;
    `workflow`: the editor's form of the graph, if there is one."""
    if not isinstance(value, dict) or depth > MAX_DEPTH or "edges" in value:  # InvokeAI's graph has edges
        return []
    nodes, workflow = graph_of(value) or {}, value.get("workflow", workflow)
    show_texts(nodes, _json(workflow) if isinstance(workflow, str) else workflow)
    if not nodes and (own := _from_row(value)):
        return [own]
    candidates: list[Candidate] = []
    reasons: list[NoPrompt] = []
    for key, inner in (("", nodes), *value.items()):
        if str(key) in nodes or "negative" in _key(key):
            continue
        try:
            if inner is nodes:
                certainty = EDITED if isinstance(value.get("nodes"), list) else GRAPH
                candidates += [Candidate(*graph_prompt(nodes, _settings), certainty)] if nodes else []
            else:
                inner = _json(inner) if isinstance(inner, str) else inner
                candidates += _from_object(inner, workflow, depth + 1)
        except NoPrompt as reason:
            reasons.append(reason)
    if reasons and not candidates:
        raise reasons[0]
    return candidates


def _from_row(row: dict) -> Candidate | None:
    """The text under a prompt's key, unless it is JSON itself, and the settings beside it."""
    keys = _by_key(row)
    texts = []
    there = (key for key, partner in PROMPT_KEYS.items() if key in keys and partner in ("", *keys))
    for value in (keys[key] for key in there):
        if isinstance(value, list):  # InvokeAI 2: [{"prompt", "weight"}, ...]
            parts = [part.get("prompt") if isinstance(part, dict) else part for part in value
                     if not (isinstance(part, dict) and str(part.get("weight")).startswith("-"))]
            value = ", ".join(part for part in parts if isinstance(part, str)) or None
        if isinstance(value, str) and _json(value) is None:
            texts.append(value.strip())
    if not texts:
        return None
    candidate = _candidate(next(filter(None, texts), ""), _settings(row))
    both = any(isinstance(value, str) and (key == "uc" or "negative" in key) for key, value in keys.items())
    return candidate._replace(certainty=BOTH) if both else candidate


def _candidate(prompt: str, settings: dict) -> Candidate:
    return Candidate(prompt, settings, WITH_SETTINGS if settings else BARE)


def _by_key(row: dict) -> dict[str, Any]:
    """The row by keys as they are compared, with NovelAI's, which are in a comment."""
    comment = _json(row["Comment"]) if isinstance(row.get("Comment"), str) else None
    return {_key(name): value for part in (comment, row) if isinstance(part, dict)
            for name, value in part.items()}


def _key(name: Any) -> str:
    return re.sub("[^a-z0-9]", "", str(name).lower())


def _settings(row: dict) -> dict:
    keys, settings = _by_key(row), {}
    for name, its_keys in SETTINGS.items():
        values = (keys[key] for key in its_keys if key in keys)
        value = next((value for value in values if type(value) in (int, float, str)), None)
        try:
            value = NUMBERS.get(name, str)(value) if isinstance(value, str) else value
        except ValueError:
            continue
        settings |= {} if value is None else {name: value}
    return settings


# AUTOMATIC1111's infotext -----------------------------------------------------------------------------------

SETTINGS_LINE = re.compile(r"^(?:Steps|Seed|Sampler|CFG scale|Size|Model): ", re.MULTILINE)
SETTINGS_INSIDE = re.compile(r"(?<=[\s,.;])Steps: ?\d+(?:, |$)", re.MULTILINE)
NEGATIVE_LINE = re.compile(r"^Negative prompt:", re.MULTILINE | re.IGNORECASE)
NEGATIVE_INSIDE = re.compile(r"(?<=[\s,.;])Negative prompt:", re.IGNORECASE)
LABEL = re.compile(r"\A\s*(?:Positive )?Prompt: ", re.IGNORECASE)


def _from_infotext(text: str) -> Candidate | None:
    """Prompt, `Negative prompt: ...` and `Steps: 20, Seed: 1, ...`, on lines of their own or all on one; or
    each setting and the prompt on a line that begins with its name.

    The last line of settings counts, as the prompt may have one that looks alike.
    """
    if "\n" not in text and re.search(r"\\n(?:Negative prompt|Steps): ", text):
        text = text.replace("\\n", "\n")  # its new lines were escaped once too often
    if LABEL.match(text) and (listed := _from_row(_pairs(text.splitlines()))) and len(listed.settings) > 1:
        return listed
    start, settings, inside = _settings_begin(text)
    negative = NEGATIVE_LINE.search(text, 0, start)
    if negative is None and settings:
        negative = NEGATIVE_INSIDE.search(text, 0, start)
        inside = inside or negative is not None
    if not settings and negative is None:
        return None
    prompt = LABEL.sub("", text[:negative.start() if negative else start].strip())
    return _candidate(prompt.rstrip(" ,;") if inside else prompt, settings)


def _settings_begin(text: str) -> tuple[int, dict, bool]:
    """(where the last settings begin, the settings, whether within a line)."""
    for pattern in (SETTINGS_LINE, SETTINGS_INSIDE):
        for match in reversed(deque(pattern.finditer(text), maxlen=100)):
            line = text[match.start():match.start() + 20_000].split("\n", 1)[0]
            row = _pairs(re.sub('"[^"]*"', '""', line).split(","))
            settings = _settings(row | {"Scheduler": None})
            # Two known settings, or steps and nothing but pairs; else it is a line of the prompt.
            if len(settings) > 1 or ("st" in settings and all(row.values())):
                start = text.rfind("\n", 0, match.start()) + 1
                before = text[start:match.start()].rstrip(", ")
                whole = start > 0 and all(_pairs(before.split(",")).values())  # other settings come first
                return start if whole else match.start(), settings, pattern is SETTINGS_INSIDE and not whole
    return len(text), {}, False


def _pairs(parts: list[str]) -> dict[str, str]:
    """{name: value} of parts `name: value`; the first of a name counts."""
    pairs = (part.partition(":") for part in reversed(parts))
    return {name.strip(): value.strip() for name, _, value in pairs}


def _from_dream(text: str) -> Candidate:
    """InvokeAI's command line: "prompt" -s 50 -S 123 -C 7.5 -A k_lms."""
    text = text.strip()
    end = text.rfind('"')
    if text.startswith('"') and end > 0:
        prompt, flags = text[1:end], text[end + 1:]
    else:
        cut = re.search(r"\s-[A-Za-z] ?[\d.k]", text)
        prompt, flags = (text[:cut.start()], text[cut.start():]) if cut else (text, "")
    values = reversed(re.findall(r"\s-([sSCA]) ?([\w.]+)", flags))
    return _candidate(prompt, _settings({DREAM[flag]: value for flag, value in values}))
