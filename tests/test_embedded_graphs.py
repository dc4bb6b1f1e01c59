"""Prompts of ComfyUI's graphs: each is walked from the picture that it saves."""

import json

import pytest
from PIL import Image, PngImagePlugin

from data import DataError, embedded_prompt, read_pairs
from embedded import NoPrompt, find_prompt

WANT = "a red barn at dusk"
UGLY = "blurry, ugly"


def text_png(path, **texts: str):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


GRAPH_SETTINGS = {"se": 5, "st": 20, "c": 8.0, "sa": "euler"}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def clip(text):
    return node("CLIPTextEncode", text=text, clip=["4", 1])


def sampler(positive, negative=("7", 0), kind="KSampler", **more):
    return node(
        kind,
        seed=5,
        steps=20,
        cfg=8.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        positive=positive,
        negative=list(negative),
        **more,
    )


def saved(nodes):
    """The graph, its picture (of node 3) decoded and saved, with a negative that comes first."""
    return {
        "7": clip("blurry, ugly"),
        "9": node("SaveImage", filename_prefix="a b", images=["8", 0]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "4": node("CheckpointLoaderSimple", ckpt_name="some model.safetensors"),
        **nodes,
    }


def prompt_of(graph):
    return find_prompt({"prompt": json.dumps(graph)})


GRAPH = saved({"3": sampler(["6", 0]), "6": clip(WANT)})
PIPE = {
    "1": node("ToBasicPipe", positive=["6", 0], negative=["7", 0]),
    "2": node("FromBasicPipe", basic_pipe=["1", 0]),
    "6": clip(WANT),
}
GRAPHS = {
    "plain": {"3": sampler(["6", 0]), "6": clip(WANT)},
    "a link to text": {"3": sampler(["6", 0]), "6": clip(["5", 0]), "5": node("PrimitiveString", value=WANT)},
    "text box": {"3": sampler(["6", 0]), "6": clip(["5", 0]), "5": node("CR Prompt Text", Prompt=WANT)},
    "unnamed text": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Anything", whatever=WANT, mode="a b"),
    },
    "reroute": {"3": sampler(["5", 0]), "5": node("Reroute", **{"": ["6", 0]}), "6": clip(WANT)},
    "subgraph": {"3": sampler(["12:6", 0]), "12:6": clip(["12:5", 0]), "12:5": node("Text", text=WANT)},
    "concatenate": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("StringConcatenate", string_a="a red", string_b=["1", 0], delimiter=" "),
        "1": node("X", string="barn at dusk"),
    },
    "concatenate, spelled": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Join", text="a red", next_text="barn at dusk", separator="space"),
    },
    "styler": {
        "3": sampler(["6", 0], ["7", 0]),
        "6": clip(["5", 0]),
        "7": clip(["5", 1]),
        "5": node("SDXLPromptStyler", text_negative="ugly", text_positive=WANT, style="sai-base style"),
    },
    "loader": {
        "3": sampler(["1", 1], ["1", 2], "KSampler (Efficient)", latent_image=["1", 3]),
        "1": node("Efficient Loader", ckpt_name="x y", negative="ugly", positive=WANT),
    },
    "loader, other outputs": {"3": sampler(["1", 4], ["1", 0]), "1": node("X", neg="ugly", pos=WANT)},
    "controlnet": {
        "3": sampler(["1", 0], ["1", 1]),
        "6": clip(WANT),
        "1": node("ControlNetApplyAdvanced", negative=["7", 0], positive=["6", 0], image=["2", 0]),
        "2": node("LoadImage", image="my own picture.png"),
    },
    "controlnet, slots swapped": {
        "3": sampler(["1", 1], ["1", 0]),
        "6": clip(WANT),
        "1": node("X", positive=["6", 0], negative=["7", 0]),
    },
    "guidance": {
        "3": sampler(["1", 0]),
        "1": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        "6": clip(WANT),
    },
    "two encoders": {
        "3": sampler(["6", 0]),
        "6": node("CLIPTextEncodeFlux", clip_l=WANT, t5xxl=WANT, guidance=3.5),
    },
    "xl": {
        "3": sampler(["6", 0]),
        "6": node("CLIPTextEncodeSDXL", text_g=["1", 0], text_l=["1", 0], width=1024),
        "1": node("Text", text=WANT),
    },
    "pipe": {"3": sampler(["2", 3], ["2", 4]), **PIPE},
    "pipe alone": {
        "3": node("KSampler (pipe)", seed=5, steps=20, cfg=8.0, sampler_name="euler", basic_pipe=["1", 0]),
        **PIPE,
    },
    "context": {
        "3": sampler(["2", 4], ["2", 5]),
        "6": clip(WANT),
        "2": node("Context (rgthree)", base_ctx=["1", 0]),
        "1": node("Context (rgthree)", positive=["6", 0], negative=["7", 0]),
    },
    "context, replaced": {
        "3": sampler(["2", 4], ["2", 5]),
        "6": clip(WANT),
        "5": clip("an old text"),
        "2": node("Context Big (rgthree)", base_ctx=["1", 0], positive=["6", 0]),
        "1": node("Context (rgthree)", positive=["5", 0], negative=["7", 0]),
    },
    "shown": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "1": node("LLM", prompt="Write of a barn.", seed=3),
        "5": node("ShowText|pysssss", text=["1", 0], text_0=WANT),
    },
    "populated": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "1": node("ShowText", text=["5", 1]),
        "5": node(
            "ImpactWildcardProcessor", wildcard_text="a __colour__ barn", populated_text=WANT, mode="populate"
        ),
    },
    "switch": {
        "3": sampler(["5", 0]),
        "6": clip(WANT),
        "1": clip("not this"),
        "20": node("Reroute", **{"": ["6", 0]}),
        "5": node("ImpactSwitch", select=2, width=7, input1=["1", 0], input2=["20", 0], sel_mode=False),
    },
    "switch of two": {
        "3": sampler(["5", 0]),
        "6": clip(WANT),
        "1": clip("not this"),
        "5": node("easy ifElse", boolean=False, on_true=["1", 0], on_false=["6", 0]),
    },
    "first of many": {
        "3": sampler(["5", 0]),
        "6": clip(WANT),
        "1": clip("not this"),
        "5": node("Any Switch (rgthree)", any_01=["6", 0], any_02=["1", 0]),
    },
    "second pass": {
        "3": sampler(["6", 0], latent_image=["1", 0]),
        "1": node("LatentUpscale", samples=["2", 0]),
        "2": sampler(["6", 0], latent_image=["5", 0]),
        "5": node("EmptyLatentImage", width=64),
        "6": clip(WANT),
    },
    "detailer": {
        "3": sampler(["1", 0], kind="FaceDetailer", image=["10", 0], wildcard=""),
        "1": clip("a detailed face"),
        "10": node("VAEDecode", samples=["2", 0], vae=["4", 2]),
        "2": sampler(["6", 0]),
        "6": clip(WANT),
    },
    "text on the picture": {
        "3": node("Draw Text", image=["2", 0], text="(c) me"),
        "2": sampler(["6", 0]),
        "6": clip(WANT),
    },
    "another picture": {
        "3": sampler(["6", 0]),
        "6": clip(WANT),
        "20": sampler(["21", 0]),
        "21": clip("another"),
        "22": node("PreviewImage", images=["20", 0]),
    },
    "not linked": {"3": sampler(["6", 0]), "6": clip(WANT), "20": clip("not linked")},
    "service": {
        "3": node("SomeService", prompt=WANT, model="x y", seed=5, steps=20, cfg=8.0, sampler_name="euler")
    },
    "loaded picture": {
        "3": sampler(["6", 0], latent_image=["1", 0]),
        "6": clip(WANT),
        "1": node("VAEEncode", pixels=["2", 0]),
        "2": node("LoadImage", image="a b.png", upload="image"),
    },
    "custom": {
        "3": node(
            "SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0]
        ),
        "20": node("RandomNoise", noise_seed=5),
        "21": node("CFGGuider", cfg=8.0, positive=["6", 0], negative=["7", 0]),
        "22": node("KSamplerSelect", sampler_name="euler"),
        "6": clip(WANT),
        "23": node("BasicScheduler", scheduler="simple", steps=20, denoise=1.0),
    },
    "outputs in turn": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "7": clip(["5", 1]),
        "5": node("Text String", text=WANT, text_b=UGLY, text_c=""),
    },
    "outputs in turn, negative first": {
        "3": sampler(["5", 1], ["5", 0], model=["5", 2], base_clip=["5", 3]),
        "5": node("Two Encoders", text_1=UGLY, text_2=WANT),
    },
    "n_prompt": {"3": sampler(["6", 0], ["6", 1]), "6": node("X", prompt_2="", prompt=WANT, n_prompt=UGLY)},
    "kinds for each side": {
        "3": sampler(["1", 0], cond_a=["6", 0], cond_b=["7", 0]),
        "1": node("Mix", a=["6", 0], b=["7", 0]),
        "6": node("EncodePositive", text=WANT),
        "7": node("EncodeNegative", text=UGLY),
    },
    "a third text that is the negative": {
        "3": sampler(["6", 0], cond2=["1", 0]),
        "1": node("ReferenceLatent", conditioning=["7", 0], latent=["2", 0]),
        "2": node("VAEEncode", pixels=["5", 0]),
        "5": node("LoadImage", image="a b.png"),
        "6": clip(WANT),
    },
    "negative made of the positive": {
        "3": sampler(["6", 0], ["1", 0]),
        "1": node("ConditioningZeroOut", conditioning=["6", 0]),
        "6": clip(WANT),
    },
    "switch of two by a link": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("ComfySwitchNode", switch=["1", 0], on_true=["2", 0], on_false=["20", 0]),
        "1": node("PrimitiveBoolean", value=False),
        "2": node("Text", text="not this"),
        "20": node("Text", text=WANT),
    },
    "switch by a linked number": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Text Switch", Input=["1", 0], text1=["2", 0], text2=["20", 0]),
        "1": node("PrimitiveInt", value=2),
        "2": node("Text", text="not this"),
        "20": node("Text", text=WANT),
    },
    "switch to a text made meanwhile": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("ComfySwitchNode", switch=True, on_true=["1", 0], on_false=["20", 0]),
        "1": node("TextGenerate", prompt=["2", 0], max_length=512),
        "2": node("StringConcatenate", string_a="Write of this:", string_b=["20", 0], delimiter=" "),
        "20": node("Text", text=WANT),
    },
    "flags": {"3": sampler(["6", 0]), "6": node("Style", text=WANT, tags="yes", prompt_type="AB", trim=True)},
    "numbers by links": {
        "3": sampler(["6", 0])
        | {"inputs": sampler(["6", 0])["inputs"] | {"seed": ["20", 0], "steps": ["21", 0]}},
        "20": node("Seed", seed=5),
        "21": node("Int", value=20),
        "6": clip(WANT),
    },
    "parts in order": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("StringConcatenate", string_a=["1", 0], string_b="at dusk", delimiter=" "),
        "1": node("PrimitiveStringMultiline", value="a red barn"),
    },
    "numbered parts of one word": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("CR Combine Prompt", part3="dusk", part1="a", part2=["1", 0], part4="", separator=" "),
        "1": node("CR Prompt Text", prompt="red barn at"),
    },
    "by a boolean": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Text Input Switch", text_a=["1", 0], text_b=["2", 0], boolean=False),
        "1": node("Text Multiline", text="not this one"),
        "2": node("Text Multiline", text=WANT),
    },
    "by a condition": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("ImpactConditionalBranch", cond=True, tt_value=["2", 0], ff_value=["1", 0]),
        "1": node("Text Multiline", text="not this one"),
        "2": node("Text Multiline", text=WANT),
    },
    "by a name": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Prompt Switch", select="prompt_2", prompt_1="not this one", prompt_2=WANT),
    },
    "one line of a text": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("ImpactStringSelector", strings=f"a blue barn\n{WANT}\na cat", select=1),
    },
    "what the editor says": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node(
            "easy wildcards", text=WANT, text_b="undefined", seed=5,
            **{"Select to add Wildcard": "Select the Wildcard to add to the text"},
        ),
    },
    "a text searched in the picture": {
        "3": sampler(["6", 0], latent_image=["5", 0]),
        "6": clip(WANT),
        "5": node("VAEEncodeForInpaint", pixels=["2", 0], mask=["2", 1]),
        "2": node("GroundingDinoSAMSegment", prompt="the dog", threshold=0.3, image=["1", 0]),
        "1": node("LoadImage", image="a b.png"),
    },
    "numbered texts, the first output": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Text String", text=WANT, text_b="other words", text_c=""),
    },
    "added to a pipe": {
        "1": node("pipeLoader", positive="a red barn at", negative=UGLY),
        "2": node("pipeEncodeConcat", positive="dusk", negative="", pipe=["1", 0], separator=" "),
        "3": node("pipeKSampler", seed=5, steps=20, cfg=8.0, sampler_name="euler", pipe=["2", 0]),
    },
    "a LoRA's tag beside it": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("StringConcatenate", string_a=["1", 0], string_b=WANT, delimiter=", "),
        "1": node("Lora Loader", text="<lora:abc:0.8> <lora:b:1>"),
    },
    "a sampler that saves": {
        "3": node(
            "easy kSampler", seed=5, steps=20, cfg=8.0, sampler_name="euler", positive=["6", 0],
            image_output="Save",
        ),
        "6": clip(WANT),
        "8": node("Canny", image=["2", 0]),
        "9": node("PreviewImage", images=["8", 0]),
        "2": node("LoadImage", image="a b.png"),
    },
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_is_walked_from_its_end(kind):
    assert prompt_of(saved(GRAPHS[kind])) == (WANT, GRAPH_SETTINGS)


def test_what_is_added_to_a_scene_stands_behind_it():
    def box(text, to):
        return node("GLIGENTextBoxApply", text=text, width=64, conditioning_to=to)

    graph = saved(
        {"3": sampler(["5", 0]), "5": box("sun", ["1", 0]), "1": box("bottle", ["6", 0]), "6": clip(WANT)}
    )
    assert prompt_of(graph)[0] == f"{WANT}, bottle, sun"
    graph = saved(
        {
            "3": sampler(["5", 0]),
            "6": clip("a barn"),
            "1": clip("at night"),
            "5": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["1", 0]),
        }
    )
    assert prompt_of(graph)[0] == "a barn, at night"


def test_numbers_behind_texts_pictures_and_models_are_not_the_painters():
    links = {"positive": ["6", 0], "latent_image": ["21", 0], "model": ["22", 0]}
    others = {"20": node("Text", text=WANT, seed=9), "21": node("X", seed=9), "22": node("Y", seed=9)}
    graph = saved({"3": node("Painter", steps=20, **links), "6": clip(["20", 0]), **others})
    assert prompt_of(graph) == (WANT, {"st": 20})


UNCERTAIN = {
    "negative alone": {"3": sampler(["6", 0]), "6": clip("")},
    "made while it ran": {
        "3": sampler(["6", 0]),
        "6": clip(["1", 0]),
        "1": node("WD14Tagger", image=["2", 0]),
        "2": node("LoadImage", image="a b.png"),
    },
    "written by a model": {
        "3": sampler(["6", 0]),
        "6": clip(["1", 0]),
        "1": node("LLM", system="You are a poet.", prompt="a barn, please", max_new_tokens=200),
    },
    "written by a model in part": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Join", text1="masterpiece", text2=["1", 0], delimiter=", "),
        "1": node("LLM", prompt="a barn, please", temperature=0.7),
    },
    "rewritten": {
        "3": sampler(["6", 0]),
        "6": clip(["1", 0]),
        "1": node("StringReplace", string="a blue barn", find="blue", replace="red"),
    },
    "taken out": {
        "3": sampler(["1", 0]),
        "1": node("ConditioningZeroOut", conditioning=["6", 0]),
        "6": clip("a barn"),
    },
    "no painter": {
        "3": node("ImageUpscale", image=["2", 0]),
        "2": node("LoadImage", image="a b.png"),
        "6": clip("not linked"),
    },
    "two prompts": {
        "3": node("ImageBlend", image1=["1", 0], image2=["2", 0]),
        "1": sampler(["5", 0]),
        "2": sampler(["6", 0]),
        "5": clip("one"),
        "6": clip("two"),
        "9": node("SaveImage", text="(c) me", images=["8", 0]),
    },
    "two pictures": {
        "3": sampler(["6", 0]),
        "6": clip("one"),
        "1": sampler(["5", 0]),
        "5": clip("two"),
        "20": node("SaveImage", images=["1", 0]),
    },
    "made in part of what a picture shows": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("StringFunction", action="append", text_a="masterpiece", text_b=["1", 0]),
        "1": node("WD14Tagger", image=["2", 0], exclude_tags="watermark, text"),
        "2": node("LoadImage", image="a b.png"),
    },
    "a file's in part": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Text Concatenate", delimiter=", ", text_a=["1", 0], text_b="best quality"),
        "1": node("Text Load Line From File", file_path="C:/p.txt", label="TextBatch", index=0),
    },
    "a second pass over a picture of a text that is not known": {
        "3": sampler(["1", 0], kind="FaceDetailer", image=["10", 0]),
        "1": clip("a detailed face"),
        "10": node("VAEDecode", samples=["2", 0]),
        "2": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Load Prompt", path="x.txt"),
    },
    "what is seen in a picture": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Vision", prompt="Describe this image", image=["2", 0]),
        "2": node("LoadImage", image="a b.png"),
    },
    "an instruction": {
        "3": node("FluxProUltraImageNode", prompt=["6", 0], seed=5),
        "6": node("OpenAIChatNode", prompt="Write a flux prompt", model="gpt-5"),
    },
    "a service's": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("Generate", prompt="Write of a barn", url="http://127.0.0.1:11434"),
    },
    "drawn by lot": {
        "3": sampler(["6", 0]), "6": clip(["5", 0]), "5": node("OneButton", imagetype="octane render", seed=3)
    },
    "a template": {
        "3": sampler(["6", 0]), "6": clip(["5", 0]), "5": node("Prompts", text="a {red|blue} barn", seed=3)
    },
    "replaced": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("StringFunction", action="replace", text_a="a blue barn", text_b="blue", text_c="red"),
    },
    "a switch by what was computed": {
        "3": sampler(["6", 0]),
        "6": clip(["5", 0]),
        "5": node("easy ifElse", boolean=["20", 0], on_true=["1", 0], on_false=["2", 0]),
        "20": node("easy compare", comparison="a == b", a=["1", 0], b=["2", 0]),
        "1": node("Text Multiline", text="one"),
        "2": node("Text Multiline", text="two"),
    },
    "no such line": {
        "3": sampler(["6", 0]), "6": clip(["5", 0]), "5": node("Lines", strings="one\ntwo", select=2)
    },
    "names that say nothing": {"3": sampler(["5", 0], ["5", 1]), "5": node("Two", good="a barn", bad=UGLY)},
    "names in another script": {
        "3": sampler(["5", 0], ["5", 1]), "5": node("X", 正面提示词="a barn at dusk", 负面提示词=UGLY)
    },
    "a title on a loaded picture": {
        "3": node("CR Overlay Text", image=["2", 0], text="My Title Here", font_size=50),
        "2": node("LoadImage", image="a b.png"),
    },
    "in a circle": {
        "3": sampler(["1", 0], latent_image=["3", 0]),
        "1": node("A", text=["2", 0]),
        "2": node("B", text=["1", 0]),
    },
}


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_an_uncertain_graph_gives_no_prompt(kind, tmp_path):
    graph = saved(UNCERTAIN[kind])
    with pytest.raises(NoPrompt, match="graph"):
        find_prompt({"prompt": json.dumps(graph)})
    path = text_png(tmp_path / "a.png", prompt=json.dumps(graph))
    assert embedded_prompt(path) is None
    with pytest.raises(DataError, match="a.png: no text beside it and .*graph"):
        read_pairs(tmp_path)


def edited(*nodes: dict, links: list) -> dict[str, str]:
    """A picture's texts with a graph in the form of the editor."""
    return {"workflow": json.dumps({"nodes": nodes, "links": links})}


def edited_node(number: int, kind: str, *values, mode: int = 0, **sockets) -> dict:
    """sockets: name = (type, link), or the name of a widget that has a socket of its own."""
    inputs = [{"name": name, "link": None, "widget": {"name": name}} if isinstance(end, str)
              else {"name": name, "type": end[0], "link": end[1]} for name, end in sockets.items()]
    return {"id": number, "type": kind, "mode": mode, "inputs": inputs, "widgets_values": list(values)}


SAMPLED = (
    edited_node(7, "CLIPTextEncode", UGLY, clip=("CLIP", None)),
    edited_node(5, "CLIPTextEncode", "bypassed", mode=4),
    edited_node(3, "KSampler", 5, "randomize", 20, 8.0, "euler", "normal", 1.0, seed="INT",
                steps="INT", cfg="FLOAT", sampler_name="COMBO", positive=("CONDITIONING", 1),
                negative=("CONDITIONING", 2)),
    edited_node(9, "SaveImage", "a b", images=("IMAGE", 3)),
)  # fmt: skip
LINKS = [[1, 6, 0, 3, 0, "CONDITIONING"], [2, 7, 0, 3, 1, "CONDITIONING"], [3, 3, 0, 9, 0, "IMAGE"],
         [4, 10, 0, 6, 1, "STRING"], [5, 11, 0, 10, 0, "STRING"],
         [6, 12, 0, 6, 2, "CONDITIONING"], [7, 10, 1, 12, 0, "STRING"], [9, 13, 0, 10, 1, "STRING"],
         [10, 12, 0, 10, 2, "INT"], [11, 13, 0, 6, 1, "CLIP"]]  # fmt: skip
EDITED = {
    "one text": [edited_node(6, "CLIPTextEncode", WANT, 512)],
    "a text and its encoder": [edited_node(6, "CLIPTextEncode", WANT, clip=("CLIP", 11)),
                               edited_node(13, "Loader", "some model.safetensors")],
    "texts by the names of their sockets": [
        edited_node(6, "Loader", "x y", "fixed", "z", UGLY, WANT, model=("MODEL", None), seed="INT",
                    name="COMBO", negative="STRING", positive="STRING")
    ],
    "a text by a link": [
        edited_node(6, "CLIPTextEncode", "stale", text=("STRING", 4)), edited_node(10, "PrimitiveNode", WANT)
    ],
    "a bypassed text": [
        edited_node(6, "CLIPTextEncode", text=("STRING", 4)),
        edited_node(10, "Text Join", "and more", mode=4, other=("INT", 99), prompt=("STRING", 5)),
        edited_node(11, "PrimitiveNode", WANT),
    ],
    "outputs in turn": [
        edited_node(6, "CLIPTextEncode", text=("STRING", 4)), edited_node(12, "X", text=("STRING", 7)),
        edited_node(10, "Text Pair", WANT, "other words", text_1="STRING", text_2="STRING"),
    ],
    "a typed part before a linked one": [
        edited_node(6, "CLIPTextEncode", text=("STRING", 4)), edited_node(11, "PrimitiveNode", WANT[6:]),
        edited_node(10, "Join", WANT[:5], " ", string_a="STRING", string_b=("STRING", 5), delimiter="STRING"),
    ],
    "a switch by a linked number": [
        edited_node(6, "CLIPTextEncode", text=("STRING", 4)), edited_node(11, "PrimitiveNode", "not this"),
        edited_node(10, "Text Switch", text1=("STRING", 5), text2=("STRING", 9), select=("INT", 10)),
        edited_node(12, "PrimitiveNode", 2), edited_node(13, "PrimitiveNode", WANT),
    ],
    "a muted text": [
        edited_node(6, "Combine", a=("CONDITIONING", 6), text="STRING") | {"widgets_values": [WANT]},
        edited_node(12, "CLIPTextEncode", "muted", mode=2),
    ],
    "no node": [edited_node(6, "CLIPTextEncode", WANT), 5, {"id": [1], "inputs": 5}],
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITED)
def test_the_form_of_the_editor(kind):
    odd = [[[1], 2, 3, 4, 5, ""], 7, [8, [1], [2], 3, 4, {}], [8, 1, 2, 3, 4]]
    texts = edited(*EDITED[kind], *SAMPLED, links=LINKS + odd)
    assert find_prompt(texts) == (WANT, GRAPH_SETTINGS)
    made = saved(UNCERTAIN["written by a model"])
    with pytest.raises(NoPrompt, match="made while"):  # the editor's form knows no better than the run's
        find_prompt(texts | {"prompt": json.dumps(made)})


SUBGRAPH = "0b1c5f3e-1111-2222-3333-444455556666"
UNCERTAIN_EDITED = {
    "a subgraph's texts": [edited_node(6, SUBGRAPH, "a barn", UGLY, text="STRING", text_1="STRING")],
    "a group's": [edited_node(6, "workflow>my group", UGLY)],
    "a template": [edited_node(6, "CLIPTextEncode", "a {red|blue} barn")],
    "perhaps the negative": [
        edited_node(6, "My Pair", UGLY, 512, positive=("STRING", 4)), edited_node(10, "LoadLine", 3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCERTAIN_EDITED)
def test_an_uncertain_graph_of_the_editor_gives_no_prompt(kind):
    with pytest.raises(NoPrompt, match="graph"):
        find_prompt(edited(*UNCERTAIN_EDITED[kind], *SAMPLED, links=LINKS))


@pytest.mark.parametrize(
    "values, prompt", [([[WANT]], WANT), ([WANT], WANT), ([], "of the run before"), (["one", "two"], None)]
)
def test_a_shown_text_is_that_of_the_editors_form(values, prompt):
    """In the run's form it is what the run before has shown."""
    shown = node("ShowText|pysssss", text=["1", 0], text_0="of the run before")
    graph = saved({"3": sampler(["6", 0]), "6": clip(["5", 0]), "5": shown, "1": node("LLM", seed=3)})
    workflow = {"nodes": [{"id": 5, "type": "ShowText|pysssss", "widgets_values": values}, 7]}
    apart = {"prompt": json.dumps(graph), "workflow": json.dumps(workflow)}
    for texts in (apart, {"UserComment": json.dumps({"prompt": graph, "workflow": workflow})}):
        try:
            found = find_prompt(texts)[0]
        except NoPrompt:
            found = None
        assert found == prompt


def test_links_of_the_editor_as_objects():
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(fields, link, strict=True)) for link in LINKS]
    nodes = edited_node(6, "CLIPTextEncode", WANT), *SAMPLED
    assert find_prompt(edited(*nodes, links=links)) == (WANT, GRAPH_SETTINGS)


def test_a_single_word_is_a_text_in_a_node_of_texts_alone():
    assert find_prompt(edited(edited_node(6, "CLIPTextEncode", "cat"), *SAMPLED, links=LINKS))[0] == "cat"
    with pytest.raises(NoPrompt):
        find_prompt(edited(edited_node(6, "LoadTextFile", "cat.txt"), *SAMPLED, links=LINKS))


def test_a_text_without_a_name_is_not_guessed():
    loader = edited_node(6, "Efficient Loader", "x", "a b", "ugly c")
    with pytest.raises(NoPrompt):
        find_prompt(edited(loader, *SAMPLED, links=LINKS))
