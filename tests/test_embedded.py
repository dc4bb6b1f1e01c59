"""Prompts inside images: every place and encoding, every kind of source, and graphs walked from their end."""

import gzip
import html
import io
import json
import struct
import time
import zlib
from itertools import product

import numpy as np
import pytest
from PIL import Image
from test_embedded_graphs import GRAPH, GRAPH_SETTINGS, WANT, clip, node, sampler, saved, text_png

import embedded
import graphs
from data import embedded_prompt, load_image, read_pairs
from embedded import NoPrompt, decoded, find_prompt, sidecar_prompt

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


@pytest.mark.parametrize(
    "text", ["ein Café – im Schnee", "夕暮れの赤い納屋, 8k", "红色的谷仓", "сарай", "😀 barn"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-16"])
def test_letters_beyond_ascii(text, encoding):
    text = f"{text}\nNegative prompt: ugly\nSteps: 4, Seed: 1"
    for code in (b"", b"UNICODE\0", b"ASCII\0\0\0", bytes(8)):
        assert decoded(code + text.encode(encoding)) == text
    assert decoded(b"UNICODE\0" + "barn".encode("utf-16-be") + b"\0") == "barn"
    assert decoded(b"caf\xe9 au lait") == "café au lait"
    assert decoded(b"\x93a barn\x94") == "“a barn”"
    assert decoded("夕暮れの赤い納屋".encode()[:-1]) == "夕暮れの赤い納\ufffd"
    assert decoded(b"JIS\0\0\0\0\0" + "赤い納屋".encode("iso2022_jp")) == "赤い納屋"
    assert decoded(b"JIS\0\0\0\0\0" + "赤い納屋 8k".encode("shift_jis")) == "赤い納屋 8k"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "tEXt, UTF-8", "zTXt", "iTXt", "iTXt, packed"])
def test_every_chunk_of_a_png(tmp_path, kind, after):
    text = INFOTEXT.replace("barn", "bärn")
    raw = text.encode("latin-1" if kind == "tEXt" else "utf-8")
    packed = zlib.compress(raw)
    content = {
        "tEXt": raw,
        "tEXt, UTF-8": raw,
        "zTXt": b"\0" + packed,
        "iTXt": b"\0\0\0\0" + raw,
        "iTXt, packed": b"\1\0en\0Parameter\0" + packed,
    }[kind]
    path = png(tmp_path / "a.png", chunk(kind[:4].encode(), b"parameters\0" + content), after=after)
    assert embedded_prompt(path) == (WANT.replace("barn", "bärn"), META)


@pytest.mark.parametrize(
    "tag, name", [(0x010E, "description"), (0x010F, "make"), (0x9C9C, "Windows' comment")]
)
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
    forms = (f"<a><![CDATA[{INFOTEXT}]]></a>", f"<a b='{INFOTEXT}'/>", f'<a b="{INFOTEXT}"/>',
             f"<a>{INFOTEXT}</a>".replace("\n", "&#10;"))  # fmt: skip
    for xmp in forms:
        Image.new("RGB", (16, 16)).save(path, "JPEG", xmp=xmp.encode())
        assert embedded_prompt(path) == (WANT, META)
    xmp = f"<x><exif:UserComment><rdf:li>{html.escape(words)}</rdf:li></exif:UserComment></x>"
    Image.new("RGB", (16, 16)).save(path, "JPEG", xmp=xmp.encode())
    assert embedded_prompt(path) == (WANT, META)
    assert embedded_prompt(text_png(tmp_path / "a.png", **{"XML:com.adobe.xmp": xmp})) == (WANT, META)


@pytest.mark.parametrize("key", ["exif", "APP1"])
@pytest.mark.parametrize("after", [False, True])
def test_exif_where_imagemagick_keeps_it(tmp_path, key, after):
    exif = b"Exif\0\0" + tiff(0x9286, b"UNICODE\0" + INFOTEXT.encode("utf-16-le"), 7, own=True)
    digits = exif.hex()
    lines = "\n".join(digits[k : k + 72] for k in range(0, len(digits), 72))
    packed = zlib.compress(f"\n{key.lower()}\n{len(exif):8}\n{lines}\n".encode())
    content = f"Raw profile type {key}\0\0".encode() + packed
    assert embedded_prompt(png(tmp_path / "a.png", chunk(b"zTXt", content), after=after)) == (WANT, META)
    chunks = chunk(b"eXIf", exif), chunk(b"zTXt", content[:-3])  # the other one damaged
    assert embedded_prompt(png(tmp_path / "a.png", *chunks, after=after)) == (WANT, META)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("kind", ["pnginfo", "pngcomp", "rgbinfo", "rgbcomp"])
def test_texts_hidden_in_the_pixels(tmp_path, kind, form, monkeypatch):
    texts = {
        INFOTEXT: META,
        json.dumps({"Description": WANT, "Comment": json.dumps({"steps": 28, "uc": "ugly"})}): {"st": 28},
    }
    for (text, settings), spare in product(texts.items(), (0, 9)):
        body = gzip.compress(text.encode()) if kind.endswith("comp") else text.encode()
        head = b"stealth_" + kind.encode() + struct.pack(">I", 8 * len(body))
        bits = np.unpackbits(np.frombuffer(head + body, np.uint8))
        channels = slice(3, 4) if kind.startswith("png") else slice(0, 3)
        columns = -(-len(bits) // (40 * (channels.stop - channels.start)))  # the text fills the picture
        pixels = np.full((columns + spare, 40, 4), 254, np.uint8)
        pixels[columns:] = 255
        flat = pixels[..., channels].reshape(-1)
        flat[: len(bits)] |= bits
        pixels[..., channels] = flat.reshape(pixels[..., channels].shape)
        image = Image.fromarray(pixels.swapaxes(0, 1).copy())
        path = tmp_path / f"a.{form.lower()}"
        for mode in ("RGBA",) if kind.startswith("png") else ("RGBA", "RGB"):
            image.convert(mode).save(path, form, lossless=True)
            assert embedded_prompt(path) == (WANT, settings)
    for limit, found in ((len(body), True), (len(body) - 1, False)):
        monkeypatch.setattr(embedded, "MAX_TEXT", limit)
        assert bool(embedded_prompt(path)) == found
    Image.new("RGB", (1, 40)).save(path, form)
    assert embedded_prompt(path) is None


# the kinds of texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, prompt, settings",
    [
        (INFOTEXT, WANT, META),
        (INFOTEXT.replace("\n", " "), WANT, META),
        (INFOTEXT.replace("\n", "\\n"), WANT, META),
        (INFOTEXT.replace("\n", ", "), WANT, META),
        (f"{WANT}\n{SETTINGS}", WANT, META),
        (f"{WANT} {SETTINGS}", WANT, META),
        (f"{INFOTEXT}\nTemplate: a __colour__ barn\nNegative Template: ugly", WANT, META),
        (f"{WANT}\nNegative prompt: ugly\nSteps: 9\n{SETTINGS}", WANT, META),
        (f"steps: 3\nSteps: 3 eggs\n{SETTINGS}", "steps: 3\nSteps: 3 eggs", META),
        (f'{WANT}\nHires prompt: "a, Seed: 5", {SETTINGS}', WANT, META),
        (
            f'{WANT}\nSteps: 20, Extra: "Seed: 5, CFG scale: 1", {SETTINGS[11:]}',
            WANT,
            META,
        ),
        (
            f"Prompt: {WANT}\nSeed: 11\nSteps: 20\nGuidance Scale: 7\nSampler: Euler a\nNegative Prompt: no",
            WANT,
            META,
        ),
        ("Prompt: \nSeed: 11\nSteps: 20", "", {"se": 11, "st": 20}),
        ("Prompt: a barn\nScale: 7\nin snow", "Prompt: a barn\nScale: 7\nin snow", {}),
        (f"{WANT}\nSteps: 20, Size: 64x64, Model: x", WANT, {"st": 20}),
        (f"{WANT}\nSeed: 11, CFG scale: 7", WANT, {"se": 11, "c": 7.0}),
        (f"{WANT},\n{SETTINGS}", f"{WANT},", META),
        (f"{WANT},\nNegative prompt: ugly", f"{WANT},", {}),
        (f"\nClip skip: 2, {SETTINGS}", "", META),
        (rf"a \new barn, {SETTINGS}", r"a \new barn", META),
        ("a poster\nSeed: 7", "a poster\nSeed: 7", {}),
        (f"{WANT}\nClip skip: 2, {SETTINGS}", WANT, META),
        (f"{WANT}\nClip skip: 2, CFG scale: 7, Steps: 20\n", WANT, {"st": 20}),
        (f"a sign\n{WANT} {SETTINGS}", f"a sign\n{WANT}", META),
        (f"sign: a barn, {SETTINGS}", "sign: a barn", META),
        (f"{WANT}\nNegative prompt: ugly", WANT, {}),
        (f"{WANT}\r\nNegative prompt: ugly\r\n{SETTINGS}\r\n", WANT, META),
        (f"\n{WANT}\n", WANT, {}),
        ("a recipe card\nSteps: 3 eggs, whisk", "a recipe card\nSteps: 3 eggs, whisk", {}),
        ("a cat, negative prompt: of a photograph", "a cat, negative prompt: of a photograph", {}),
        ("", "", {}),
    ],
)
def test_infotext(tmp_path, text, prompt, settings):
    assert sidecar_prompt(text) == (prompt, settings)
    if text:
        assert find_prompt({"parameters": text}) == (prompt, settings)


def test_a_text_file_with_infotext(tmp_path):
    for suffix, text in ((".txt", INFOTEXT), (".caption", "a\nb")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}.png")
        (tmp_path / f"a{suffix}{suffix}").write_text(text)
    pairs = read_pairs(tmp_path)
    assert pairs.prompts == ["a\nb", WANT] and pairs.meta == [{}, META]


OBJECTS = {
    "comfyui": ({"prompt": json.dumps(GRAPH), "workflow": "{}"}, GRAPH_SETTINGS),
    "comfyui, named": (
        {"Make": "Prompt: " + json.dumps(GRAPH), "ImageDescription": "Workflow: {}"},
        GRAPH_SETTINGS,
    ),
    "comfyui, as text": ({"UserComment": json.dumps({"prompt": json.dumps(GRAPH)})}, GRAPH_SETTINGS),
    "comfyui, as object": ({"UserComment": json.dumps({"workflow": {}, "prompt": GRAPH})}, GRAPH_SETTINGS),
    "placeholder": (
        {"parameters": f"unknown\nNegative prompt: unknown\n{SETTINGS}", "prompt": json.dumps(GRAPH)},
        GRAPH_SETTINGS,
    ),
    "nothing": (
        {"parameters": f"\nNegative prompt: ugly\n{SETTINGS}", "prompt": json.dumps(GRAPH)},
        GRAPH_SETTINGS,
    ),
    "comment": ({"comment": "CREATOR: gd-jpeg", "UserComment": INFOTEXT}, META),
    "infotext and graph": (
        {
            "prompt": json.dumps(saved({"3": sampler(["6", 0]), "6": clip("a __colour__ barn")})),
            "parameters": INFOTEXT,
        },
        META,
    ),
    "civitai": (
        {
            "UserComment": GRAPH
            | {
                "extra": {"airs": []},
                "extraMetadata": json.dumps({"prompt": WANT, "negativePrompt": "ugly", "steps": 9}),
            }
        },
        {"st": 9},
    ),
    "tensorart": (
        {"generation_data": json.dumps({"prompt": WANT, "negativePrompt": "", "seed": "3"}) + "\0\0"},
        {"se": 3},
    ),
    "stability matrix": (
        {
            "parameters-json": {"PositivePrompt": WANT, "NegativePrompt": "ugly", "Steps": 5, "CfgScale": 2.5}
        },
        {"st": 5, "c": 2.5},
    ),
    "ruined fooocus": ({"parameters": {"Prompt": WANT, "Negative": "ugly", "steps": 5}}, {"st": 5}),
    "space": (
        {
            "parameters": {
                "prompt": WANT, "negative_prompt": "ugly", "guidance_scale": 7.0, "num_inference_steps": 28
            }
        },
        {"st": 28, "c": 7.0},
    ),
    "swarmui": (
        {
            "UserComment": {
                "sui_image_params": {"prompt": WANT, "negativeprompt": "ugly", "seed": 3},
                "sui_extra_data": {},
            }
        },
        {"se": 3},
    ),
    "easy diffusion": (
        {
            "prompt": WANT,
            "negative_prompt": "ugly",
            "seed": "3",
            "num_inference_steps": "20",
            "guidance_scale": "7.5",
            "sampler_name": "euler",
        },
        {"se": 3, "st": 20, "c": 7.5, "sa": "euler"},
    ),
    "easy diffusion, names": (
        {"Prompt": WANT, "Negative Prompt": "ugly", "Seed": "3", "Steps": "9"},
        {"se": 3, "st": 9},
    ),
    "easy diffusion, jpeg": (
        {"UserComment": json.dumps({"prompt": WANT, "seed": 3, "negative_prompt": "ugly"})},
        {"se": 3},
    ),
    "a list of nodes": ({"UserComment": {"nodes": [], "prompt": WANT}}, {}),
    "draw things": (
        {
            "xmp 0": f"{WANT}\n-ugly\nSteps: 8, Sampler: UniPC, Guidance Scale: 1.0, Seed: 5, Size: 64x64",
            "xmp 1": json.dumps({"c": WANT, "uc": "ugly", "scale": 1, "seed": 5, "steps": 8}),
        },
        {"se": 5, "st": 8, "c": 1},
    ),
    "named fields beside an uncertain graph": (
        {
            "prompt": json.dumps(saved({"3": sampler(["6", 0]), "6": node("LLM", temperature=1)})),
            "positive_prompt": WANT,
            "negative_prompt": "ugly",
        },
        {},
    ),
    "midjourney": ({"Description": f"{WANT} Job ID: 0a1b2c3d-1111-2222-3333-444455556666"}, {}),
    "novelai": ({"Description": WANT, "Comment": json.dumps({"steps": 28, "uc": "ugly"})}, {"st": 28}),
    "novelai, webp": (
        {
            "UserComment": json.dumps(
                {
                    "Description": WANT,
                    "Software": "NovelAI",
                    "Comment": json.dumps({"steps": 28, "uc": "ugly"}),
                }
            )
        },
        {"st": 28},
    ),
    "novelai 4": (
        {
            "Comment": json.dumps(
                {
                    "v4_prompt": {"caption": {"base_caption": WANT}},
                    "v4_negative_prompt": {"caption": {"base_caption": "ugly"}},
                }
            )
        },
        {},
    ),
    "invokeai": (
        {
            "invokeai_metadata": json.dumps({"positive_prompt": WANT, "negative_prompt": "ugly", "seed": 1}),
            "invokeai_graph": json.dumps({"nodes": {"a": {"prompt": "ugly"}}, "edges": []}),
        },
        {"se": 1},
    ),
    "invokeai 2": (
        {"sd-metadata": json.dumps({"image": {"prompt": WANT + " [ugly, blurry]", "seed": 1}})},
        {"se": 1},
    ),
    "invokeai 2, list": (
        {
            "sd-metadata": json.dumps(
                {"image": {"prompt": [
                    {"prompt": WANT + " [ugly, blurry]", "weight": 1}, {"prompt": "fog", "weight": -0.5}
                ], "steps": 9}}
            )
        },
        {"st": 9},
    ),
    "invokeai 1": (
        {"Dream": f'"{WANT} [ugly]" -s 50 -S 123 -W512 -C7.5 -A k_lms'},
        {"st": 50, "se": 123, "c": 7.5, "sa": "k_lms"},
    ),
    "invokeai 1, bare": ({"Dream": f"{WANT} -s50 -S123"}, {"st": 50, "se": 123}),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_kind_of_source(kind):
    texts, settings = OBJECTS[kind]
    texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    assert find_prompt(texts) == (WANT, settings)


@pytest.mark.parametrize("prompt", ['a sign "hi" on a wall', '"a cat'])
def test_quotes_within_a_bare_prompt_belong_to_it(prompt):
    assert find_prompt({"Dream": f"{prompt} -s50 -S123"}) == (prompt, {"st": 50, "se": 123})
    assert find_prompt({"Dream": '"" -s50'}) == ("", {"st": 50})


# nothing certain, and limits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        {"UserComment": "Screenshot"},
        {"ImageDescription": "a holiday", "Make": "Canon", "Model": "EOS 5D"},
        {"comment": "CREATOR: gd-jpeg v1.0"},
        {"Description": "a holiday"},
        {"Title": "x", "Comment": "{}"},
        {"parameters": "unknown"},
        {"parameters": f"undefined\nNegative prompt: undefined\n{SETTINGS}"},
        {"UserComment": '{"device": "phone"}'},
        {"prompt": "[1, 2]"},
        {"prompt": "[" * 100_000},
        {},
        {"UserComment": "Steps: 10 minutes of walking, then sleep"},
    ],
    ids=str,
)
def test_no_prompt_is_made_up(texts):
    with pytest.raises(NoPrompt):
        find_prompt(texts)


def test_long_and_deep_sources_end_soon(tmp_path):
    start = time.process_time()
    chain = {str(k): node("X", text=[str(k + 1), 0]) for k in range(100, 5100)}
    graph = saved({"3": sampler(["100", 0]), **chain, "5100": clip(WANT)})
    assert find_prompt({"prompt": json.dumps(graph)})[0] == WANT
    passes = {str(k): sampler(["6", 0], latent_image=[str(k + 1), 0]) for k in range(100, 5100)}
    graph = saved({"3": sampler(["6", 0], latent_image=["100", 0]), "6": clip(WANT), **passes})
    assert find_prompt({"prompt": json.dumps(graph)})[0] == WANT
    doubled = {
        str(k): node("Join", text1=[str(k + 1), 0], text2=[str(k + 1), 0], delimiter=" ")
        for k in range(100, 200)
    }
    with pytest.raises(NoPrompt, match="longer than"):
        find_prompt({"prompt": json.dumps(saved({"3": sampler(["100", 0]), **doubled, "200": clip(WANT)}))})
    switch = {f"text_{k}": str(k) for k in range(10_000)} | {f"select_{k}": -k for k in range(10_000)}
    with pytest.raises(NoPrompt, match="made while"):
        find_prompt({"prompt": json.dumps(saved({"3": sampler(["6", 0]), "6": node("Switch", **switch)}))})
    with pytest.raises(NoPrompt, match="more than 10,000 nodes"):
        find_prompt({"prompt": json.dumps({str(k): clip("a") for k in range(10_001)})})
    with pytest.raises(NoPrompt, match="longer than"):
        find_prompt({"parameters": "x" * 600_000})
    for opening in ("<![CDATA[", "<a b='", '="', "><"):
        picture = text_png(tmp_path / "a.png", **{"XML:com.adobe.xmp": opening * 100_000})
        assert embedded_prompt(picture) is None
    for key, text in (
        ("Dream", " " * 900_000),
        ("Dream", '"' * 900_000),
        ("Dream", "[" * 900_000),
        ("Dream", " -s" * 300_000),
        ("parameters", "Steps: 1, " * 100_000),
        ("parameters", "Steps: 1\n" * 100_000),
        ("parameters", 'Steps: 1, a: "' * 90_000),
        ("parameters", " Negative prompt" * 60_000),
        ("UserComment", '{"a":' * 200_000),
        ("sd-metadata", json.dumps({"prompt": "[" * 900_000})),
        ("a", "a_" * 500_000 + "{"),
    ):
        try:
            find_prompt({key: text})
        except NoPrompt:
            pass
    assert time.process_time() - start < 10


def test_texts_are_read_up_to_their_limits(tmp_path, monkeypatch):
    text, path = INFOTEXT.encode() + b" " * 1000, tmp_path / "a.png"
    plain, graph = (chunk(b"tEXt", b"prompt\0" + part.encode()) for part in (INFOTEXT, json.dumps(GRAPH)))
    packed = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(text))
    for part, name, limit in (
        (plain, "MAX_TEXT", len(plain)), (packed, "MAX_TEXT", len(text)),
        (plain, "MAX_TEXTS", len(INFOTEXT)), (plain, "MAX_PROMPT", len(WANT)),
        (graph, "MAX_PROMPT", len(WANT)), (graph, "MAX_NODES", len(GRAPH)),
    ):  # fmt: skip
        for beyond, found in ((0, WANT), (1, None)):
            for module in (embedded, graphs):
                monkeypatch.setattr(module, name, limit - beyond, raising=False)
            assert (embedded_prompt(png(path, part)) or (None,))[0] == found
        monkeypatch.undo()
    large = chunk(b"zTXt", b"w\0\0" + zlib.compress(bytes((1 << 23) + 1)))  # all texts: 32 MB
    for count, found in ((3, (WANT, META)), (4, None)):
        assert embedded_prompt(png(path, *[large] * count, plain)) == found
    deep = json.dumps({"a": {"b": {"c": {"d": {"prompt": WANT}}}}})
    assert find_prompt({"UserComment": deep})[0] == WANT
    with pytest.raises(NoPrompt):
        find_prompt({"UserComment": f'{{"a": {deep}}}'})


def test_an_object_under_a_negative_key_holds_no_prompt():
    """A front end's settings, with both texts in objects of their own."""
    texts = {"settings": json.dumps({"negative": {"prompt": "ugly, blurry"}, "main": {"prompt": "a barn"}})}
    assert find_prompt(texts)[0] == "a barn"
    with pytest.raises(NoPrompt):
        find_prompt({"settings": json.dumps({"negative": {"prompt": "ugly, blurry"}})})


def test_a_placeholder_is_named_and_an_empty_prompt_beside_an_uncertain_one_is_none():
    with pytest.raises(NoPrompt, match="^a placeholder stands for its prompt$"):
        find_prompt({"settings": json.dumps({"prompt": "unknown", "steps": 20})})
    node = {"class_type": "LLM", "inputs": {"temperature": 1, "prompt": "write a prompt"}}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"text": ["1", 0], "clip": ["9", 0]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "seed": 1, "steps": 2}}
    graph = {"1": node, "2": encode, "3": sampler,
             "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}}}
    empty = json.dumps({"prompt": "", "steps": 20})
    with pytest.raises(NoPrompt, match="made while its ComfyUI graph ran"):
        find_prompt({"prompt": json.dumps(graph), "settings": empty})


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_pixels_and_prompt_survive_other_texts(tmp_path, kind):
    large = zlib.compress(b"{" + b" " * 20_000_000 + b"}")
    bodies = {
        "large": {
            b"zTXt": b"w\0\0" + large,
            b"iTXt": b"w\0\1\0\0\0" + large,
            b"iCCP": b"p\0\0" + large,
            b"tEXt": b"w\0" + b" " * 9_000_000,
        }[kind],
        "damaged": b"w\0\0\1\2\3",
        "empty": b"",
        "no key": b"\0\0\0\0\0\0",
        "profile": {b"zTXt": b"Raw profile type exif\0\0" + zlib.compress(b"0" * 1_500_000)}.get(kind, b""),
    }
    for body in bodies.values():
        for damage in (False, True):
            bad = chunk(kind, body)
            bad = bad[:-1] + bytes([bad[-1] ^ damage])
            path = png(tmp_path / "a.png", bad, chunk(b"tEXt", b"parameters\0" + INFOTEXT.encode()))
            assert load_image(path).getpixel((0, 0)) == (255, 0, 0)
            assert embedded_prompt(path) == (WANT, META)


def test_a_packed_text_that_is_too_large_is_left_out_and_not_cut(tmp_path):
    packed = zlib.compress(INFOTEXT.encode() + b" " * 9_000_000)
    path = png(tmp_path / "a.png", chunk(b"zTXt", b"parameters\0\0" + packed))
    assert embedded_prompt(path) is None


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_pixels_survive_damaged_exif(tmp_path, form):
    good = tiff(0x9286, b"UNICODE\0" + INFOTEXT.encode("utf-16-le"), 7, True)
    turned = struct.pack("<HHII", 0x112, 3, 1, 6)
    for damaged in (
        good[:30],
        b"II*\0\xff\xff\xff\x7f",
        b"",
        b"nonsense" * 9,
        good.replace(b"\1\0\x69", b"\xff\xff\x69"),
        b"II*\0\x08\0\0\0\2\0"
        + turned
        + struct.pack("<HHII", 0x11A, 5, 1, 38)
        + bytes(4)
        + struct.pack("<II", 72, 0),
    ):
        path = with_exif(tmp_path / "a", form, damaged)
        assert load_image(path).size == (16, 16)
        assert embedded_prompt(path) in (None, (WANT, META))


@pytest.mark.parametrize("kind", ["eXIf", "tEXt", "zTXt"])
def test_a_png_is_turned_wherever_its_exif_is(tmp_path, kind, monkeypatch):
    exif = tiff(0x112, struct.pack("<H", 6), 3, own=False)
    exif = exif[:14] + struct.pack("<II", 1, 6) + exif[22:]
    raw = ("\nexif\n      40\n" + (b"Exif\0\0" + exif).hex() + "\n").encode()
    body = {
        "eXIf": exif,
        "tEXt": b"Raw profile type exif\0" + raw,
        "zTXt": b"Raw profile type exif\0\0" + zlib.compress(raw),
    }[kind]
    path, part = tmp_path / "a.png", chunk(kind.encode(), body)
    image = Image.new("RGB", (16, 16), "red")
    image.putpixel((0, 0), (0, 0, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    raw = buffer.getvalue()
    path.write_bytes(raw[:33] + part + raw[33:])
    assert load_image(path).getpixel((15, 0)) == (0, 0, 255)
    if kind != "zTXt":  # whose text is longer than the chunk
        for limit, corner in ((len(part), (0, 0, 255)), (len(part) - 1, (255, 0, 0))):
            monkeypatch.setattr(embedded, "MAX_TEXT", limit)
            assert load_image(path).getpixel((15, 0)) == corner
