"""The captioners that never saw a prompt: blip-plain-mini, and blip2-mini in two stages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration, GPT2Tokenizer

import weights
from mini import captioning, plain, pretrain, scenes
from mini.captioning import BLIP_2, PLAIN
from mini.loop import World, batch_of
from mini.scenes import Thing, View
from models import blip, blip2
from tests.test_mini import close, world_of
from weights.kinds.blip2 import KIND, load_tokenizer

MINI = pretrain.MINI
ODD_TEXTS = ["a red cat\n", "8 k, close - up", "Zebra's XYLOPHONE, 123!", "  caté\u2028\n\n☃", ""]
STAGES = ("plain", "opt", "qformer")


@pytest.fixture(scope="module")
def world() -> World:
    return world_of(40, seed=78)


@pytest.fixture(scope="module")
def stages(
    world: World, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Mapping[str, Tensor]]]:
    """The folder that stands for mini/, each part trained for two steps, and the tensors after each part."""
    folder, tensors = tmp_path_factory.mktemp("mini"), {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (captioning, pretrain):
            patch.setattr(module, "HELD_OUT", 10)
        patch.setattr(pretrain, "MINI", folder)
        patch.setattr(pretrain, "training_world", lambda parts: world)
        for name in STAGES:
            part = pretrain.PARTS[name]
            pretrain.train_part(name, replace(part.recipe, steps=2, batch_size=6), 1, 0)
            tensors[name] = load_file(folder / part.card / "model.safetensors")
    return folder, tensors


# ------------------------------------------------------------------------------------------------------------
# plain descriptions
# ------------------------------------------------------------------------------------------------------------


def test_descriptions_by_hand():
    cat, star = Thing("cat", "turquoise", "stripes"), Thing("star")
    assert plain.describe(View((star,))) == "a yellow star"  # the colour that is drawn
    two = View((cat, star), relation="left", place="forest", light="night", style="oil")
    assert plain.describe(two) == (
        "a blue green cat with stripes with a yellow star on its right side between trees at night"
    )
    assert plain.describe(View((cat, star))) == "a blue green cat with stripes and a yellow star"
    several = View((Thing("cactus", "orange"),), count=3, position="far")
    assert plain.describe(several) == "three orange cacti far away"


def test_every_content_is_described_in_other_words_than_the_prompts_tags():
    for name in ("MATERIALS", "COUNTS", "RELATIONS", "POSITIONS", "PLACES", "LIGHTS"):
        assert getattr(plain, name).keys() == getattr(scenes, name).keys(), name
    drawn = [scenes.candidate(3, i).said for i in range(300)]
    texts = [plain.describe(view) for view in drawn]
    assert not any("," in text for text in texts)
    tags = {word for tag in scenes.BOILERPLATE for word in tag.split()} - {"on"}
    styles = {"painting", "drawing", "art", "photograph", "mosaic", "sketch", "woodcut", "render"}
    words = {word for text in texts for word in text.split()}
    assert words & (tags | styles) == set()
    settings = {**plain.PLACES, **plain.LIGHTS}.items()
    prompts = {key: text.replace("*", "").split("|") for key, text in (scenes.PLACES | scenes.LIGHTS).items()}
    assert {key for key, phrase in settings if phrase in prompts[key]} == {"volcano", "night"}


# ------------------------------------------------------------------------------------------------------------
# the stages
# ------------------------------------------------------------------------------------------------------------


def test_the_image_half_starts_as_the_first_layers_of_the_vit():
    vit, captioner = weights.load("vit", "vit-mini"), blip.BLIP(blip.CONFIGS[PLAIN]).eval()
    captioner.text_decoder.requires_grad_(False)
    captioning.start_from_vit(captioner.vision_model)
    states = []
    for layer in (vit.blocks[2], captioner.vision_model.encoder.layers[2]):
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    images = torch.rand(2, 3, 64, 64)
    vit(images), captioner.encode_image(images)
    torch.testing.assert_close(*states, atol=5e-3, rtol=0)  # the epsilons differ: 1e-6 and 1e-5


def test_the_loss_of_text_leaves_out_its_first_token_and_padding():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logs, ids = logits.log_softmax(dim=-1), torch.tensor([[2, 4, 3, 0], [2, 4, 3, 4]])
    of_rows = [logs[0, 0, 4] + logs[0, 1, 3], logs[1, 0, 4] + logs[1, 1, 3] + logs[1, 2, 4]]
    torch.testing.assert_close(captioning.following_loss(logits, ids, pad=0), -sum(of_rows) / 5)


def test_a_document_is_about_one_scene(world: World):
    texts = captioning.documents(world, seed=4)
    assert texts == captioning.documents(world, seed=4) != captioning.documents(world, seed=5)
    for (own, other, description), prompt, view in zip(texts, world.prompts, world.views, strict=True):
        assert (own, description) == (prompt, plain.describe(view))
        words = scenes.words_of(scenes.SUBJECTS, view.things[0].subject)
        plural = [scenes.PLURALS.get(word, word + "s") for _, word in words]
        assert any(word in other for _, word in words) or any(word in other for word in plural)
    assert sum(other != own for own, other, _ in texts) > len(texts) / 2


def test_blip_plain_mini_is_written_for_transformers(stages: tuple, world: World):
    folder = stages[0] / PLAIN
    theirs = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    ours = weights.load("blip", folder, dtype=torch.float64)
    texts = [plain.describe(view) for view in world.views[:30]]  # those that it is trained on
    lines = ours.tokenizer.encode_batch(texts, add_special_tokens=False)
    assert [" ".join(line.tokens) for line in lines] == texts
    ids, images = torch.tensor([lines[0].ids]), batch_of(world.images, torch.arange(1)).double()
    with torch.no_grad():
        close(ours(images, ids), theirs(pixel_values=images, input_ids=ids).logits)
    files = [(root / "preprocessor_config.json").read_text() for root in (folder, MINI / "blip-mini")]
    assert files[0] == files[1]


def both_blip2(folder: Path, images: Tensor) -> tuple[blip2.BLIP2, Blip2ForConditionalGeneration]:
    """Ours and transformers' from a folder in float64, after a comparison of their logits."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    ours = weights.load("blip2", folder, dtype=torch.float64)
    ids = torch.tensor([ours.tokenizer.encode("a red cat between trees\n").ids] * len(images))
    n = ours.config.num_query_tokens
    assert theirs.config.image_token_index == ours.tokenizer.get_vocab_size()  # behind all tokens
    behind = torch.cat([torch.full((len(ids), n), theirs.config.image_token_index), ids], dim=1)
    with torch.no_grad():
        close(ours(images, ids), theirs(pixel_values=images, input_ids=behind).logits[:, n:])
    return ours, theirs


def test_blip2_mini_is_written_for_transformers(stages: tuple, world: World):
    both_blip2(stages[0] / BLIP_2, batch_of(world.images, torch.arange(2)).double())


def test_the_tokenizer_is_gpt_2_s_and_reads_any_text(stages: tuple, world: World):
    ours, theirs = load_tokenizer(stages[0] / BLIP_2), GPT2Tokenizer.from_pretrained(stages[0] / BLIP_2)
    for text in [*ODD_TEXTS, *world.prompts]:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids and ids[0] == 2
        assert ours.decode(ids) == text
    assert [ours.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    shipped = load_tokenizer(MINI / BLIP_2)
    for text in [*world.prompts, *map(plain.describe, world.views)]:
        pieces = re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+", text)
        assert len(shipped.encode(text, add_special_tokens=False).ids) == len(pieces), text


def test_only_the_q_former_s_half_is_trained_and_stored_in_float32(stages: tuple):
    _, tensors = stages
    before, after, image = tensors["opt"], tensors["qformer"], tensors["plain"]
    trained = {name for name in after if re.fullmatch(KIND.full_precision, name)}
    assert all((after[name].dtype == torch.float32) == (name in trained) for name in after)
    for name in after.keys() - trained:
        if name.startswith("language_model."):
            assert torch.equal(after[name], before[name]), name
        elif name.endswith("qkv.bias"):
            (q, k, v), (their_q, _, their_v) = after[name].chunk(3), image[name].chunk(3)
            assert torch.equal(q, their_q) and not k.any() and torch.equal(v, their_v), name
        else:
            assert torch.equal(after[name], image[name]), name
    moved = [name for name in trained if not torch.equal(after[name], before[name])]
    assert {name.split(".")[0] for name in moved} == {"query_tokens", "qformer", "language_projection"}


def test_the_cards(stages: tuple):
    cards = {name: json.loads((stages[0] / name / "card.json").read_text()) for name in (PLAIN, BLIP_2)}
    quality = {"prompt_cosine", "description_cosine", "description_to_prompt_cosine", "subjects_named"}
    for card in cards.values():
        assert quality | {"command", "parameters", "minutes", "steps", "data"} < card.keys()
    language = cards[BLIP_2]["language_model"]
    assert "mini.pretrain opt" in language["command"] and "mini.pretrain qformer" in cards[BLIP_2]["command"]
    assert language["nats_alone"] > 0 and "language_model" not in language


def test_the_quality_of_captions_by_hand(cache: Path, world: World, monkeypatch: pytest.MonkeyPatch):
    class Perfect:
        def generate(self, images: Tensor) -> list[str]:
            return [plain.describe(view) for view in world.views[-len(images) :]]

    monkeypatch.setattr(captioning, "HELD_OUT", 20)
    quality = captioning.caption_quality(Perfect(), world)
    assert quality["subjects_named"] == quality["description_cosine"] == 1
    assert quality["prompt_cosine"] == quality["description_to_prompt_cosine"] < 0.9


def test_text_alone_is_read_as_behind_no_queries():
    config = replace(blip2.CONFIGS[BLIP_2], num_query_tokens=1)
    model, ids = blip2.BLIP2(config).eval(), torch.tensor([[2, 7, 9, 202]])
    with torch.no_grad():
        logits = captioning.text_logits(model, ids)
        torch.testing.assert_close(logits[:, :2], captioning.text_logits(model, ids[:, :2]))  # causal
        places = model.language_model.model.decoder.embed_positions.weight
        places[2] += 1  # the row of the first token
        assert not torch.allclose(captioning.text_logits(model, ids)[:, 0], logits[:, 0])


# ------------------------------------------------------------------------------------------------------------
# the shipped captioners
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 5])
def test_transformers_reads_the_shipped_blip2_mini(world: World, beams: int):
    """Its captions, token for token, begin behind the queries and "</s>"."""
    images = batch_of(world.images, torch.arange(6)).double()
    ours, theirs = both_blip2(MINI / BLIP_2, images)
    start = torch.tensor([[ours.config.text_bos_token_id]])
    found = ours.generate_ids(images, start, num_beams=beams)[:, 1:]
    expected = theirs.generate(pixel_values=images, num_beams=beams, max_new_tokens=30)
    assert torch.equal(found, expected[:, ours.config.num_query_tokens + 1 :])
    written = GPT2Tokenizer.from_pretrained(MINI / BLIP_2).batch_decode(found, skip_special_tokens=True)
    assert ours.generate(images, num_beams=beams) == [text.strip() for text in written]
    assert len(set(written)) > 3


@pytest.mark.parametrize("kind, name", [("blip", PLAIN), ("blip2", BLIP_2)])
def test_the_shipped_captioners_name_what_is_drawn(
    kind: str, name: str, world: World, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """On fresh drawings, about as often as their cards state for the held-out ones."""
    card = json.loads((MINI / name / "card.json").read_text())
    monkeypatch.setattr(captioning, "HELD_OUT", len(world))
    quality = captioning.caption_quality(weights.load(kind, name), world)
    assert quality["subjects_named"] > card["subjects_named"] - 0.2
    assert quality["prompt_cosine"] == pytest.approx(card["prompt_cosine"], abs=0.05)
    assert card["prompt_cosine"] > card["mean_embedding_cosine"]
