"""The prompt of the picture that a graph of ComfyUI saves.

The graph is walked from the node that saves the picture, back to the nodes that paint it and, from them, to
their texts. Nodes are known by the names of their inputs and of their kinds alone: what anyone's nodes do is
not in the file. Where a text was made while the graph ran, or it is not certain which one was used, there is
no prompt.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

MAX_NODES = 10_000  # of a graph
MAX_PASSES = 100  # of one picture through a graph
MAX_PROMPT = 500_000  # characters
MAX_SELECTORS = 9  # of a switch
UNKNOWN = "\0"  # stands for a text that was made while the graph ran


class NoPrompt(ValueError):
    """Nothing inside is certainly the prompt. `reason` is one of few, `detail` names what this image has."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# Words of the names of inputs. Names are the only types that a graph has.
PICTURES = frozenset(("image", "images", "pixels", "samples", "latent", "latents"))
NO_TEXT = PICTURES | frozenset(
    ("model", "vae", "mask", "masks", "net", "controlnet", "vision", "noise", "sigmas", "sampler",
     "encoder", "scheduler", "seed", "steps", "cfg", "denoise", "width", "height", "detector", "lora")
)
TEXT_LINKS = frozenset(("text", "texts", "prompt", "string", "strings", "caption", "part", "tags",
                        "populated", "wildcard"))  # of links that bring a text and nothing else
TEXT = TEXT_LINKS | {"positive", "value", "clip", "xxl", "llama"}
OPTION = frozenset(("name", "filename", "path", "file", "type", "mode", "device", "dtype", "style", "styles",
                    "format", "method", "system", "template", "normalization", "interpretation", "parser",
                    "font", "delimiter", "separator", "option", "find", "pattern", "regex", "replace",
                    "action", "select", "add", "load", "save", "list", "lists", "preset", "length",
                    "language", "position", "color"))
NEGATIVE = frozenset(("negative", "negatives", "unconditional", "exclude", "excluded", "unwanted", "avoid"))
SIDES = NEGATIVE | {"positive", "populated"}
SEPARATOR = frozenset(("delimiter", "separator"))
JOINS = frozenset(("concat", "concatenate", "join", "combine", "append", "merge", "action"))
SILENT = frozenset(("zero",))  # kinds that take the text out of what they hand on
SWITCHES = frozenset(("switch", "branch", "if"))  # kinds that hand on one of their inputs
SELECTOR = frozenset(("select", "selected", "index", "choice", "switch", "boolean", "condition"))
CHOSEN = {True: {"true", "tt", "a", "1"}, False: {"false", "ff", "b", "2"}}  # names, by a boolean's value
# Inputs and kinds of what writes a text itself, and inputs of what rewrites one.
MADE = frozenset(("temperature", "tokens", "beams", "maxlength", "url", "connectivity", "persist",
                  "instruction", "instructions"))
WRITERS = frozenset(("caption", "captioner", "tagger", "interrogate", "interrogator", "llm", "vlm", "gpt",
                     "chat", "ollama", "gemini", "enhance", "enhancer", "expand", "expander", "translate",
                     "translator", "random", "split", "truncate", "substring", "case"))
ALTERED = frozenset(("find", "pattern", "regex", "code", "expression"))
ALTERING = frozenset(("replace", "remove", "extract"))  # values of an `action`
TEMPLATE = re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/*-]+__")  # leaves a choice to the run
SUBGRAPH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|workflow[>/].*")  # the editor's own kinds
FLAGS = frozenset(("yes", "no", "true", "false", "on", "off", "auto", "none", "enable", "disable",
                   "undefined", "null", "nan"))
PAINTERS = frozenset(("seed", "steps", "cfg", "denoise", "sampler", "sigmas", "noise", "guidance"))  # inputs
SETTLED = PICTURES | TEXT | NEGATIVE | {"conditioning", "model", "vae"}  # no way to a painter's numbers
SHORT = {"pos": "positive", "neg": "negative", "uncond": "negative", "uc": "negative"}
SPELLED = {"comma": ", ", "space": " ", "newline": "\n", "none": "", "\\n": "\n"}
LORAS = re.compile(r"(?:\s*<lora:[^<>]*>,?)+\s*")  # a text of these alone says nothing of the picture
MUTED, BYPASSED = 2, 4  # modes of the editor
CONTROLS_AFTER = ("fixed", "increment", "decrement", "randomize")  # the editor's own, after a seed


class Link(NamedTuple):
    """The node at the other end of a linked input, and which of that node's outputs it is."""

    node: str
    slot: int


class Node(NamedTuple):
    """A node: its kind, and its inputs in order, values or links, by name."""

    kind: str
    inputs: dict[str, Any]

    @property
    def links(self) -> dict[str, Link]:
        return {name: end for name, end in self.inputs.items() if isinstance(end, Link)}

    @property
    def values(self) -> dict[str, Any]:
        return {name: value for name, value in self.inputs.items() if not isinstance(value, Link)}


# The two forms of a graph -----------------------------------------------------------------------------------


def graph_of(value: dict) -> dict[str, Node] | None:
    """The nodes of a graph as ComfyUI runs it, {id: {class_type, inputs}}, or edits it; None for others."""
    if isinstance(value.get("nodes"), list) and isinstance(value.get("links"), list):
        value = _run_form(value)
    raw = {str(key): node for key, node in value.items()
           if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}

    def link(end: Any) -> Any:
        linked = isinstance(end, list) and len(end) == 2 and isinstance(end[1], int) and str(end[0]) in raw
        return Link(str(end[0]), end[1]) if linked else end

    nodes = {}
    for key, node in raw.items():
        inputs = {name: link(end) for name, end in node["inputs"].items()}
        nodes[key] = Node(str(node.get("class_type", "")), inputs)
    return nodes or None


def show_texts(nodes: dict[str, Node], workflow: Any) -> None:
    """Put the texts that nodes show beside a link, as `text_0`, in their place: in the run's form they are
    those of the run before, in the editor's, `workflow`, this run's. UNKNOWN where a node has several."""
    edited = workflow.get("nodes") if isinstance(workflow, dict) else None
    for node in edited if isinstance(edited, list) else ():
        if not isinstance(node, dict) or str(node.get("id")) not in nodes:
            continue
        inputs, values = nodes[str(node["id"])].inputs, node.get("widgets_values")
        lists = [value if isinstance(value, list) else [value]
                 for value in (values if isinstance(values, list) else ())]
        texts = [text for each in lists for text in each if isinstance(text, str)]
        for name in [f"{name}_0" for name in inputs if f"{name}_0" in inputs]:
            if texts and inputs[name] not in texts:
                inputs[name] = texts[0] if len(texts) == 1 else UNKNOWN


def _run_form(workflow: dict) -> dict:
    """A graph as the editor keeps it in the form that is run, with a socket's type before its name.

    A node's texts have names only where it has a socket for each; of a node with several texts and no such
    sockets it is not known which is the prompt, and none is taken.
    """
    nodes = {str(node.get("id")): node for node in workflow["nodes"]
             if isinstance(node, dict) and node.get("mode") != MUTED}
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # of the newer form
    links = ([link.get(field) for field in fields] if isinstance(link, dict) else link
             for link in workflow["links"])
    ends = {link[0]: (str(link[1]), link[2], str(link[5])) for link in links
            if isinstance(link, list) and len(link) > 5 and isinstance(link[0], int)}
    graph = {}
    for key, node in nodes.items():
        widgets, inputs = _widgets(node), {}
        for socket in _sockets(node):
            name = str(socket.get("name"))
            if end := _behind_bypassed(nodes, ends, socket.get("link")):
                widgets.pop(name, None)
                inputs[f"{end[2].lower()} {name}"] = list(end[:2])
            elif name in widgets:
                inputs[name] = widgets.pop(name)
        if node.get("mode") != BYPASSED:
            graph[key] = {"class_type": node.get("type"), "inputs": inputs | widgets}
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
    values, kind = node.get("widgets_values"), str(node.get("type"))
    if isinstance(values, dict):
        return dict(values)
    if not isinstance(values, list):
        return {}
    # A choice within a text, and which of a subgraph's texts is which, were settled when the graph was run.
    values = [UNKNOWN if isinstance(value, str) and (TEMPLATE.search(value) or SUBGRAPH.fullmatch(kind))
              else value for value in values]
    sockets = _sockets(node)
    names = [str(socket["name"]) for socket in sockets if isinstance(socket.get("widget"), dict)
             and "name" in socket]
    named = [value for k, value in enumerate(values) if not (k and value in CONTROLS_AFTER)]
    if names and len(named) >= len(names):
        return dict(zip(names, named[:len(names)], strict=True))
    if len(values) == 1 and type(values[0]) in (int, bool):
        return {"select": values[0]}
    texts = [value for value in values if isinstance(value, str) and value not in CONTROLS_AFTER]
    linked = any(socket.get("link") is not None and _has(str(socket.get("name")), TEXT - {"clip"})
                 for socket in sockets)  # then the one text may be the negative
    name = "text" if _has(kind, TEXT) and not _has(kind, OPTION) else "widget"
    return {name: texts[0]} if len(texts) == 1 and not (linked and name == "widget") else {}


# From the picture to its painter ----------------------------------------------------------------------------


def graph_prompt(nodes: dict[str, Node], settings_in: Callable[[dict], dict]) -> tuple[str, dict]:
    """(prompt, settings) of the picture that the graph saves. Raises NoPrompt where there is none or more
    than one.

    From the node that saves, the picture's links are followed back to the nodes that paint: those to whose
    other inputs a text leads. Where one paints over another's picture (a second pass, a detailer), the first
    one's prompt is the picture's. settings_in: the settings among the values of a node.
    """
    if len(nodes) > MAX_NODES:
        raise NoPrompt(f"its ComfyUI graph has more than {MAX_NODES:,} nodes")
    texts = _texts_at(nodes)
    painted = {key: text if _paints(nodes[key]) else "" for key, text in texts.items()}
    prompts: dict[str, dict] = {}
    for saver in _savers(nodes):
        paints = not _pictures(nodes[saver]) and texts[saver]  # a graph without its last nodes
        for key in [saver] if paints else _painters(nodes, painted, saver) or [saver]:
            first = _first_painter(nodes, painted, key)
            settings = _settings(nodes, first, settings_in) or _settings(nodes, key, settings_in)
            prompts.setdefault(texts[first] if paints else painted[first], settings)
    prompts.pop("", None)
    if not prompts:
        raise NoPrompt("in its ComfyUI graph no text leads to the picture")
    if any(UNKNOWN in prompt for prompt in prompts):
        raise NoPrompt("its prompt was made while its ComfyUI graph ran")
    if len(prompts) > 1:
        raise NoPrompt("its ComfyUI graph has several pictures with different prompts")
    return next(iter(prompts.items()))


def _words(name: str) -> tuple[str, ...]:
    return _words_of(name[-100:])


@lru_cache(2000)
def _words_of(name: str) -> tuple[str, ...]:
    name = re.sub(r"\bn_", "negative_", name)  # as in n_prompt
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", name)
    return tuple(SHORT.get(word.lower(), word.lower()) for word in words)


def _has(name: str, words: frozenset[str] | set[str]) -> bool:
    return not words.isdisjoint(_words(name))


def _has_any(node: Node, words: frozenset[str] | set[str]) -> bool:
    return any(_has(name, words) for name in node.inputs)


def _pictures(node: Node) -> list[str]:
    return [end.node for name, end in node.links.items() if _has(name, PICTURES)]


def _paints(node: Node) -> bool:
    """Whether a text paints at a node: one beside a picture alone is written on it, or searched in it."""
    return not _pictures(node) or any(
        _has(name, PAINTERS) or (isinstance(end, Link) and not _has(name, NO_TEXT | TEXT_LINKS))
        for name, end in node.inputs.items())


def _savers(nodes: dict[str, Node]) -> list[str]:
    """The nodes that save pictures, or else those that show them, or else the last of all."""
    used = {end.node for node in nodes.values() for end in node.links.values()}
    last = [key for key in nodes if key not in used]

    def saves(node: Node) -> bool:
        own = str(node.inputs.get("image_output", "")).lower()  # of samplers that save what they paint
        return own.startswith("save") or ("save" in node.kind.lower() and bool(_pictures(node)))

    saving = [key for key, node in nodes.items() if saves(node)]
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
        unnamed = [end.node for name, end in links if not _has(name, NO_TEXT | NEGATIVE)]
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


def _settings(nodes: dict[str, Node], painter: str, settings_in: Callable[[dict], dict]) -> dict:
    """The settings in a painter's inputs and in the nodes that lead to them."""

    def ends(key: str) -> list[str]:
        return [end.node for name, end in nodes[key].links.items() if not _has(name, SETTLED)]

    settings: dict[str, Any] = {}
    for key in _upstream(painter, ends):
        values = nodes[key].values | {"scheduler": None}
        for name, end in nodes[key].links.items():  # a number may come from a node of its own
            numbers = (value for value in nodes[end.node].values.values() if type(value) in (int, float))
            values |= {} if "sampler" in _words(name) else {name: next(numbers, None)}
        settings = settings_in(values) | settings
    return settings


# From the painter to its text -------------------------------------------------------------------------------


def _texts_at(nodes: dict[str, Node]) -> dict[str, str]:
    """The text that leads to each node, through links of any kind but of pictures, models and numbers.

    A node hands on its text to those behind it, UNKNOWN where it is not in the graph, or nothing.
    """
    inputs = {key: _text_inputs(node) for key, node in nodes.items()}
    taken = _taken_outputs(nodes)
    texts: dict[str, str] = {}
    handed: dict[tuple[str, int | None], str] = {}  # also a text of no known name, not painted
    sees = {key for key, node in nodes.items() if _pictures(node)}
    stack, entered = list(nodes), set()

    def brought(node: Node, name: str) -> str | None:
        link = node.inputs[name]
        text = handed.get((link.node, link.slot), handed.get((link.node, None)))
        if _has(name, TEXT_LINKS) and (text is None or link.node in sees):
            return UNKNOWN  # a file's, or what a model sees in a picture
        return text

    while stack:
        key = stack[-1]
        node = nodes[key]
        if key not in entered:
            entered.add(key)
            ends = (end.node for name, end in node.links.items()
                    if name in inputs[key] or _has(name, NEGATIVE))
            stack += [end for end in ends if end not in entered]
        elif stack.pop() not in texts:
            found = {name: brought(node, name) if isinstance(value, Link) else value
                     for name, value in inputs[key].items()}
            found = _selected(nodes, node, {name: text for name, text in found.items() if text is not None})
            unwanted = {brought(node, name) for name in node.links if _has(name, NEGATIVE)}
            wanted = {name: text for name, text in found.items() if text not in unwanted}
            found = wanted if any(wanted.values()) else found
            texts[key] = "" if _has(node.kind, SILENT) else _joined(node, found)
            unnamed = {} if texts[key] else _unnamed_texts(node)
            if _is_made(node) or len(set(unnamed.values())) > 1 or (unnamed and _has_any(node, {"seed"})):
                handed[key, None] = UNKNOWN
            elif found or unnamed:
                handed[key, None] = texts[key] or _joined(node, unnamed)
                if _in_turn(node, found, taken[key]):
                    handed |= {(key, k): text.strip() for k, text in enumerate(found.values())}
    return texts


def _taken_outputs(nodes: dict[str, Node]) -> dict[str, dict[int, bool]]:
    """The outputs of each node from which others may take a text, and whether as a text and nothing else."""
    taken: dict[str, dict[int, bool]] = {key: {} for key in nodes}
    for node in nodes.values():
        for name, end in node.links.items():
            if not (_has(name, NO_TEXT) or _words(name)[-1:] == ("clip",)):
                taken[end.node][end.slot] = taken[end.node].get(end.slot, True) and _has(name, TEXT_LINKS)
    return taken


def _in_turn(node: Node, found: dict[str, str], taken: dict[int, bool]) -> bool:
    """Whether a node's outputs are its texts in turn: several are taken, or one of numbered texts, and
    nothing tells that it joins them, or positive from negative."""
    numbered = len({_in_series(name)[0] for name in found}) == 1 and all(taken.values())
    return len(found) > max(taken, default=len(found)) and (len(taken) > 1 or numbered) and not any(
        _has(name, SIDES | SEPARATOR | JOINS) for name in (node.kind, *node.inputs))


def _unnamed_texts(node: Node) -> dict[str, str]:
    return {name: value for name, value in node.values.items() if isinstance(value, str)
            and " " in value.strip() and not _has(f"{name} {node.kind}", NO_TEXT | OPTION | NEGATIVE)}


def _is_made(node: Node) -> bool:
    """Whether the node writes or rewrites its text while the graph runs."""
    texts = [(name, value) for name, value in node.values.items() if isinstance(value, str) and value]
    rolls = _has_any(node, {"seed"}) and not _has_any(node, {"populated"})
    return (
        _has(node.kind, WRITERS)
        or any(_has(name, MADE) or "".join(_words(name)) in MADE for name in node.inputs)
        or any(_has(name, ALTERED) or (_has(name, {"action"}) and value.lower() in ALTERING)
               or (rolls and TEMPLATE.search(value)) for name, value in texts)
    )


def _joined(node: Node, found: dict[str, str]) -> str:
    """The texts of a node's inputs as one: those named positive, or else all."""
    texts = {name: text.strip(" \t\r\n") for name, text in found.items()
             if text.strip() and not LORAS.fullmatch(text)}
    for wanted in () if _has(node.kind, JOINS) else ("populated", "positive"):
        texts = {name: text for name, text in texts.items() if wanted in _words(name)} or texts
    parts = [texts[name] for name in sorted(texts, key=lambda name: not _has(name, {"conditioning", "pipe"}))]
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
    """The inputs, by name, that may hold or lead to the positive text, in the order of their names' numbers
    or letters. In a node with a separator all texts are parts."""
    joins = _has_any(node, SEPARATOR)
    chosen = {}
    for name, value in node.inputs.items():
        if isinstance(value, Link):  # the text of a link that a node shows is beside it as `text_0`
            unfit = f"{name}_0" in node.inputs or _words(name)[-1:] == ("clip",)
            unfit = unfit or _has(name, NO_TEXT | NEGATIVE | SELECTOR)
        else:
            unfit = not isinstance(value, str) or value.lower() in FLAGS or _has(node.kind, NEGATIVE)
            unfit = unfit or _has(name, OPTION | NEGATIVE) or not (_has(name, TEXT) or joins)
        if not unfit:
            chosen[name] = value
    first: dict[tuple, int] = {}
    place = {name: first.setdefault(_in_series(name)[0], k) for k, name in enumerate(chosen)}
    order = sorted(chosen, key=lambda name: (place[name], *_in_series(name)[1:]))
    return {name: chosen[name] for name in order}


def _in_series(name: str) -> tuple[tuple, int, str]:
    """A name's words without its last number or letter, and those, as of text_a, text_b, or part1, part2."""
    *stem, last = _words(name) or ("",)
    if stem and (last.isdigit() or len(last) == 1):
        return tuple(stem), len(last), last
    return (*stem, last), 0, ""


def _selected(nodes: dict[str, Node], node: Node, found: dict[str, str]) -> dict[str, str]:
    """Of the inputs of a switch the one that it hands on, UNKNOWN if that is not found out; of the lines of a
    text the chosen one; all of another node."""
    selectors = {}
    for name, value in node.inputs.items():
        selects = _has(name, SELECTOR) or _words(name) in (("input",), ("cond",))
        if selects and len(selectors) < MAX_SELECTORS:
            if isinstance(value, Link):
                values = [*nodes[value.node].values.values()]
                value = values[0] if len(values) == 1 else None
            selectors[name] = value
    for value in selectors.values():
        wanted = CHOSEN[value] if type(value) is bool else {str(value).lower()}
        one = {name: text for name, text in found.items() if name == value or (name not in selectors and (
            wanted & {word.lstrip("0") for word in (*_words(name)[:1], *_words(name)[-1:])}))}
        if one and len(one) < len(found):
            known = {name: text for name, text in found.items() if UNKNOWN not in text}
            return one if known.keys() & one.keys() or not known else known  # the original of one rewritten
    if selectors and _has(node.kind, SWITCHES) and len(set(found.values())) > 1:
        return {"": UNKNOWN}
    for value in selectors.values():
        if type(value) is int and len(found) == 1 and node.inputs.keys() & found.keys():
            (name, text), = found.items()
            lines = text.splitlines()
            if len(lines) > 1 and not isinstance(node.inputs[name], Link):
                return {name: lines[value] if 0 <= value < len(lines) else UNKNOWN}
    return found
