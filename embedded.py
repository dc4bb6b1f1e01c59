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
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

MAX_TEXT = 1 << 23  # bytes of one text
MAX_TEXTS = 1 << 25  # bytes of all texts of one image
MAX_NODES = 10_000  # of a graph
MAX_PASSES = 100  # of one picture through a graph
MAX_DEPTH = 4  # of JSON within JSON
MAX_PROMPT = 500_000  # characters
UNKNOWN = "\0"  # stands for a text that was made while the graph ran


class NoPrompt(ValueError):
    """Nothing inside is certainly the prompt. `reason` is one of few, `detail` names what this image has."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Candidate(NamedTuple):
    """A prompt, what else its source has (se seed, st steps, c guidance, sa sampler), and how sure it is."""

    prompt: str
    settings: dict
    certainty: int


PLAIN, BARE, EDITED, GRAPH, WITH_SETTINGS = range(5)  # EDITED: a graph as the editor keeps it
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
PLAIN_KEYS = ("parameters", "prompt")  # PNG's fields whose text is a prompt although nothing else shows it


def find_prompt(texts: dict[str, str]) -> tuple[str, dict]:
    """(prompt, settings) of the best supported source. Raises NoPrompt where none is certain."""
    fields = _from_row(texts)  # of Easy Diffusion and NovelAI
    candidates = [fields] if fields and fields.prompt and fields.settings else []
    reasons: list[NoPrompt] = []
    for key, text in texts.items():
        try:
            candidates += _from_text(key, text)
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
    """(prompt, settings) of a text file beside an image: AUTOMATIC1111's infotext, or else all of it."""
    candidate = _from_infotext(text)
    return (candidate.prompt, candidate.settings) if candidate else (text.strip(), {})


def _from_text(key: str, text: str) -> list[Candidate]:
    value = _json(text)
    if value is not None:
        candidates = _from_object(value)
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


def _from_object(value: Any, depth: int = 0) -> list[Candidate]:
    """The prompts of an object: its own, or those of a graph and of objects (also as text) within it."""
    if not isinstance(value, dict) or depth > MAX_DEPTH or "edges" in value:  # InvokeAI's graph has edges
        return []
    nodes = graph_of(value) or {}
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
                candidates += [graph_prompt(nodes)._replace(certainty=certainty)] if nodes else []
            else:
                candidates += _from_object(_json(inner) if isinstance(inner, str) else inner, depth + 1)
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
            parts = [part.get("prompt") if isinstance(part, dict) else part for part in value]
            value = ", ".join(part for part in parts if isinstance(part, str)) or None
        if isinstance(value, str) and _json(value) is None:
            texts.append(value.strip())
    return _candidate(next(filter(None, texts), ""), _settings(row)) if texts else None


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
SETTINGS_INSIDE = re.compile(r"(?<=[\s,.;])Steps: ?\d+, ")
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


# ============================================================================================================
# ComfyUI's graph
# ============================================================================================================

# Words of the names of inputs. Names are the only types that a graph has.
PICTURES = frozenset(("image", "images", "pixels", "samples", "latent", "latents"))
NO_TEXT = PICTURES | frozenset(
    ("model", "vae", "mask", "masks", "net", "controlnet", "vision", "noise", "sigmas", "sampler",
     "scheduler", "seed", "steps", "cfg", "denoise", "width", "height", "detector", "lora")
)
TEXT = frozenset(("text", "prompt", "string", "caption", "positive", "wildcard", "populated", "tags", "value",
                  "clip", "xxl", "llama"))
OPTION = frozenset(("name", "filename", "path", "file", "type", "mode", "device", "dtype", "style", "styles",
                    "format", "method", "system", "template", "normalization", "interpretation", "parser",
                    "font", "delimiter", "separator", "option", "find", "pattern", "regex", "replace"))
NEGATIVE = frozenset(("negative",))
SIDES = NEGATIVE | {"positive", "populated"}
SEPARATOR = frozenset(("delimiter", "separator"))
SILENT = frozenset(("zero",))  # kinds that take the text out of what they hand on
SELECTOR = frozenset(("select", "selected", "index", "input", "choice", "switch", "boolean", "condition"))
MADE = frozenset(("temperature", "tokens", "beams", "maxlength"))  # inputs of what writes a text itself
ALTERED = frozenset(("find", "pattern", "regex"))  # of what rewrites one
FLAGS = frozenset(("yes", "no", "true", "false", "on", "off", "auto", "none", "enable", "disable"))
SETTLED = PICTURES | TEXT | NEGATIVE | {"conditioning", "model", "vae"}  # no way to a painter's numbers
SHORT = {"pos": "positive", "neg": "negative", "uncond": "negative", "uc": "negative"}
SPELLED = {"comma": ", ", "space": " ", "newline": "\n", "none": "", "\\n": "\n"}
MUTED, BYPASSED = 2, 4  # modes of the editor
CONTROLS_AFTER = ("fixed", "increment", "decrement", "randomize")  # the editor's own, after a seed


class Node(NamedTuple):
    """A node: its kind, its inputs' values, and for each linked input the node at the other end and which of
    that node's outputs it is."""

    kind: str
    values: dict[str, Any]
    links: dict[str, str]
    slots: dict[str, int]


def graph_of(value: dict) -> dict[str, Node] | None:
    """The nodes of a graph as ComfyUI runs it, {id: {class_type, inputs}}, or edits it; None for others."""
    if isinstance(value.get("nodes"), list) and isinstance(value.get("links"), list):
        value = _run_form(value)
    raw = {str(key): node for key, node in value.items()
           if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    nodes = {}
    for key, node in raw.items():
        ends = {name: end for name, end in node["inputs"].items() if isinstance(end, list)
                and len(end) == 2 and isinstance(end[1], int) and str(end[0]) in raw}
        values = {name: value for name, value in node["inputs"].items() if name not in ends}
        nodes[key] = Node(str(node.get("class_type", "")), values,
                          {name: str(end[0]) for name, end in ends.items()},
                          {name: end[1] for name, end in ends.items()})
    return nodes or None


def _run_form(workflow: dict) -> dict:
    """A graph as the editor keeps it in the form that is run, with a socket's type before its name.

    A node's texts have names only where it has a socket for each; of a node with several texts and no such
    sockets it is not known which is the prompt, and none is taken.
    """
    nodes = {str(node.get("id")): node for node in workflow["nodes"]
             if isinstance(node, dict) and node.get("mode") != MUTED}
    ends = {link[0]: (str(link[1]), link[2], str(link[5])) for link in workflow["links"]
            if isinstance(link, list) and len(link) > 5 and isinstance(link[0], int)}
    graph = {}
    for key, node in nodes.items():
        inputs = _widgets(node)
        for socket in _sockets(node):
            if end := _behind_bypassed(nodes, ends, socket.get("link")):
                inputs.pop(str(socket.get("name")), None)
                inputs[f"{end[2].lower()} {socket.get('name')}"] = list(end[:2])
        if node.get("mode") != BYPASSED:
            graph[key] = {"class_type": node.get("type"), "inputs": inputs}
    return graph


def _sockets(node: dict) -> list[dict]:
    sockets = node.get("inputs")
    return [socket for socket in sockets if isinstance(socket, dict)] if isinstance(sockets, list) else []


def _behind_bypassed(nodes: dict[str, dict], ends: dict[int, tuple], link: Any) -> tuple | None:
    """(node, output, type) at the other end of a link; a bypassed node hands on its first input of the type
    that is wanted."""
    for _ in range(MAX_PASSES):
        end = ends.get(link) if isinstance(link, int) else None
        node = nodes.get(end[0]) if end else None
        if node is None or node.get("mode") != BYPASSED:
            return end
        link = next((socket.get("link") for socket in _sockets(node) if socket.get("type") == end[2]), None)
    return None


def _widgets(node: dict) -> dict[str, Any]:
    """The values of a node of the editor by name, or its one text under a name that is no other's."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    if not isinstance(values, list):
        return {}
    names = [str(socket["name"]) for socket in _sockets(node) if isinstance(socket.get("widget"), dict)
             and "name" in socket]
    named = [value for k, value in enumerate(values) if not (k and value in CONTROLS_AFTER)]
    if names and len(named) >= len(names):
        return dict(zip(names, named[:len(names)], strict=True))
    if len(values) == 1 and type(values[0]) in (int, bool):
        return {"select": values[0]}
    texts = [value for value in values if isinstance(value, str) and value not in CONTROLS_AFTER]
    kind = str(node.get("type"))
    name = "text" if _has(kind, TEXT) and not _has(kind, OPTION) else "widget"
    return {name: texts[0]} if len(texts) == 1 else {}


def graph_prompt(nodes: dict[str, Node]) -> Candidate:
    """The prompt of the picture that the graph saves. Raises NoPrompt where there is none or more than one.

    From the node that saves, the picture's links are followed back to the nodes that paint: those to whose
    other inputs a text leads. Where one paints over another's picture (a second pass, a detailer), the first
    one's prompt is the picture's.
    """
    if len(nodes) > MAX_NODES:
        raise NoPrompt(f"its ComfyUI graph has more than {MAX_NODES:,} nodes")
    texts = _texts_at(nodes)
    prompts: dict[str, dict] = {}
    for saver in _savers(nodes):
        paints = not _pictures(nodes[saver]) and texts[saver]  # a graph without its last nodes
        for key in [saver] if paints else _painters(nodes, texts, saver) or [saver]:
            first = _first_painter(nodes, texts, key)
            settings = _graph_settings(nodes, first) or _graph_settings(nodes, key)
            prompts.setdefault(texts[first], settings)
    prompts.pop("", None)
    if not prompts:
        raise NoPrompt("in its ComfyUI graph no text leads to the picture")
    if any(UNKNOWN in prompt for prompt in prompts):
        raise NoPrompt("its prompt was made while its ComfyUI graph ran")
    if len(prompts) > 1:
        raise NoPrompt("its ComfyUI graph has several pictures with different prompts")
    (prompt, settings), = prompts.items()
    return Candidate(prompt, settings, GRAPH)


def _words(name: str) -> tuple[str, ...]:
    return _words_of(name[-100:])


@lru_cache(2000)
def _words_of(name: str) -> tuple[str, ...]:
    name = re.sub(r"\bn_", "negative_", name)  # as in n_prompt
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", name)
    return tuple(SHORT.get(word.lower(), word.lower()) for word in words)


def _has(name: str, words: frozenset[str]) -> bool:
    return not words.isdisjoint(_words(name))


def _pictures(node: Node) -> list[str]:
    return [end for name, end in node.links.items() if _has(name, PICTURES)]


def _savers(nodes: dict[str, Node]) -> list[str]:
    """The nodes that save pictures, or else those that show them, or else the last of all."""
    used = {end for node in nodes.values() for end in node.links.values()}
    last = [key for key in nodes if key not in used]
    saving = [key for key, node in nodes.items() if "save" in node.kind.lower() and _pictures(node)]
    return saving or [key for key in last if _pictures(nodes[key])] or last


def _upstream(start: str, ends: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """`start` and the nodes that lead to it, nearest first; `ends`: those before a node, as far as wanted."""
    found = {start}
    queue = deque(found)
    while queue:
        key = queue.popleft()
        yield key
        new = [end for end in dict.fromkeys(ends(key)) if end not in found]
        found.update(new)
        queue += new


def _painters(nodes: dict[str, Node], texts: dict[str, str], start: str) -> list[str]:
    """The nearest nodes upstream of the picture at `start` to which a text leads."""

    def ends(key: str) -> list[str]:
        links = nodes[key].links.items()
        unnamed = [end for name, end in links if not _has(name, NO_TEXT | NEGATIVE)]
        ends_here = (texts[key] and key != start) or _has(nodes[key].kind, SILENT)
        return [] if ends_here else _pictures(nodes[key]) or unnamed

    return [key for key in _upstream(start, ends) if texts[key] and key != start]


def _first_painter(nodes: dict[str, Node], texts: dict[str, str], key: str) -> str:
    """The painter whose picture `key` paints over, as far back as there is one; of several, none."""
    seen = {key}
    while _pictures(nodes[key]) and len(seen) < MAX_PASSES:
        before = [end for end in _painters(nodes, texts, key) if end not in seen]
        if len({texts[end] for end in before}) != 1:
            break
        key = before[0]
        seen.add(key)
    return key


def _graph_settings(nodes: dict[str, Node], painter: str) -> dict:
    """The settings in a painter's inputs and in the nodes that lead to them."""

    def ends(key: str) -> list[str]:
        return [end for name, end in nodes[key].links.items() if not _has(name, SETTLED)]

    settings: dict[str, Any] = {}
    for key in _upstream(painter, ends):
        values = nodes[key].values | {"scheduler": None}
        for name, end in nodes[key].links.items():  # a number may come from a node of its own
            numbers = (value for value in nodes[end].values.values() if type(value) in (int, float))
            values |= {} if "sampler" in _words(name) else {name: next(numbers, None)}
        settings = _settings(values) | settings
        if len(settings) == len(SETTINGS):
            break
    return settings


def _texts_at(nodes: dict[str, Node]) -> dict[str, str]:
    """The text that leads to each node, through links of any kind but of pictures, models and numbers."""
    inputs = {key: _text_inputs(node) for key, node in nodes.items()}
    taken = _taken_outputs(nodes)
    texts: dict[str, str] = {}
    handed: dict[tuple[str, int | None], str] = {}  # also a text of no known name, not painted
    stack, entered = list(nodes), set()
    while stack:
        key = stack[-1]
        node = nodes[key]
        if key not in entered:
            entered.add(key)
            ends = (end for name, end in node.links.items() if name in inputs[key] or _has(name, NEGATIVE))
            stack += [end for end in ends if end not in entered]
        elif stack.pop() not in texts:
            found = {name: _handed(handed, node, name) if name in node.links else value
                     for name, value in inputs[key].items()}
            known = {name: text for name, text in found.items() if UNKNOWN not in str(text)}
            one = _selected(nodes, node, found)
            found = one if known.keys() & one.keys() or not known or not one else known
            unwanted = {_handed(handed, node, name) for name in node.links if _has(name, NEGATIVE)}
            wanted = {name: text for name, text in found.items() if text not in unwanted}
            found = wanted if any(wanted.values()) else found
            texts[key] = "" if _has(node.kind, SILENT) else _joined(node, found)
            handed[key, None] = texts[key] or _joined(node, _unnamed_texts(node))
            if _is_made(node):
                handed[key, None] = UNKNOWN
            elif len(taken[key]) > 1 and len(found) > max(taken[key]) and not any(
                    _has(name, SIDES | SEPARATOR) for name in (*node.values, *node.links)):
                handed |= {(key, k): text.strip() for k, text in enumerate(found.values())}
    return texts


def _handed(handed: dict[tuple[str, int | None], str], node: Node, name: str) -> str:
    """The text at the other end of a link."""
    end = node.links[name]
    return handed.get((end, node.slots[name]), handed.get((end, None), ""))


def _taken_outputs(nodes: dict[str, Node]) -> dict[str, set[int]]:
    """The outputs of each node from which others may take a text. Where there are several, they are those of
    the node's texts in turn, unless the names of its inputs tell positive from negative."""
    taken: dict[str, set[int]] = {key: set() for key in nodes}
    for node in nodes.values():
        for name, end in node.links.items():
            if not (_has(name, NO_TEXT) or _words(name)[-1:] == ("clip",)):
                taken[end].add(node.slots[name])
    return taken


def _unnamed_texts(node: Node) -> dict[str, str]:
    return {name: value for name, value in node.values.items() if isinstance(value, str)
            and " " in value.strip() and not _has(f"{name} {node.kind}", NO_TEXT | OPTION | NEGATIVE)}


def _is_made(node: Node) -> bool:
    """Whether the node writes or rewrites its text while the graph runs."""
    names = (*node.values, *node.links)
    return any(_has(name, MADE) or _key(name) in MADE for name in names) or any(
        _has(name, ALTERED) and isinstance(value, str) and value for name, value in node.values.items())


def _joined(node: Node, found: dict[str, str]) -> str:
    """The texts of a node's inputs as one: those named positive, or else all."""
    texts = {name: text.strip(" \t\r\n") for name, text in found.items() if text.strip()}
    for wanted in ("populated", "positive"):
        texts = {name: text for name, text in texts.items() if wanted in _words(name)} or texts
    parts = [texts[name] for name in sorted(texts, key=lambda name: "conditioning" not in _words(name))]
    if "switch" in node.kind.lower():
        parts = parts[:1]
    between = next((value for name, value in node.values.items()
                    if _has(name, SEPARATOR) and isinstance(value, str)), None)
    parts = list(dict.fromkeys(parts)) if between is None else parts
    joined = (", " if between is None else SPELLED.get(between, between)).join(parts)
    if len(joined) > MAX_PROMPT:
        raise NoPrompt(f"its prompt is longer than {MAX_PROMPT:,} characters")
    return joined


def _text_inputs(node: Node) -> dict[str, Any]:
    """The inputs, by name, that may hold or lead to the positive text."""
    values = {} if _has(node.kind, NEGATIVE) else node.values
    chosen = {name: value for name, value in values.items() if isinstance(value, str)
              and _has(name, TEXT) and not _has(name, OPTION | NEGATIVE) and value.lower() not in FLAGS}
    for name, end in node.links.items():  # the text of a link that a node shows is beside it as `text_0`
        shown = f"{name}_0" in node.values
        if not (shown or _has(name, NO_TEXT | NEGATIVE) or _words(name)[-1:] == ("clip",)):
            chosen[name] = end
    return chosen


def _selected(nodes: dict[str, Node], node: Node, chosen: dict[str, str]) -> dict[str, str]:
    """Of the inputs of a switch the one that it hands on; all of another node."""
    linked = {name: next(iter(nodes[end].values.values())) for name, end in node.links.items()
              if _has(name, SELECTOR) and len(nodes[end].values) == 1}
    values = node.values | linked
    numbers = {str(value) for name, value in values.items() if type(value) is int and _has(name, SELECTOR)}
    truths = {str(value).lower() for value in values.values() if type(value) is bool}
    for wanted in (numbers, truths):
        one = {name: value for name, value in chosen.items() if _words(name)[-1:] == tuple(wanted)}
        if one and wanted:
            return one
    return chosen
