"""models/blip2.py against transformers' Blip2ForConditionalGeneration: numbers, tokens, names and sizes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import environment
from safetensors.torch import load_file, save_file, save_model
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

import weights
from models.blip2 import BLIP2, CONFIGS, BLIP2Config
from models.search import beam_search
from tests.parity import assert_parity, assert_same_shapes, fit, parameters, pictures, randomise
from weights import WeightsError, to_home
from weights.kinds.blip2 import HEAD, KIND, WORDS, load_tokenizer, published
from weights.options import sizes_of
from weights.sources import verify

TINY = BLIP2Config(
    vision_hidden_size=24, vision_intermediate_size=40, vision_num_hidden_layers=2,
    vision_num_attention_heads=3, vision_image_size=16, vision_patch_size=8, vision_layer_norm_eps=1e-6,
    num_query_tokens=4, qformer_hidden_size=20, qformer_intermediate_size=28, qformer_num_hidden_layers=3,
    qformer_num_attention_heads=2, qformer_cross_attention_frequency=2, qformer_layer_norm_eps=1e-12,
    text_vocab_size=44, text_hidden_size=32, text_ffn_dim=48, text_num_hidden_layers=2,
    text_num_attention_heads=4, text_max_position_embeddings=40, text_bos_token_id=2, text_pad_token_id=1,
    text_eos_token_id=5,
)  # fmt: skip
VARIANTS: dict[str, BLIP2Config] = {
    "tiny": TINY,
    "rest-of-a-patch": replace(TINY, vision_image_size=23, vision_patch_size=5, num_query_tokens=1),
    "one-layer": replace(
        TINY, vision_num_hidden_layers=1, qformer_num_hidden_layers=1, text_num_hidden_layers=1
    ),
    "odd": replace(
        TINY, vision_hidden_size=21, vision_num_attention_heads=1, text_num_attention_heads=2,
        qformer_hidden_size=33, qformer_num_attention_heads=3, text_hidden_size=34, text_vocab_size=41,
        text_pad_token_id=7, qformer_cross_attention_frequency=3, qformer_num_hidden_layers=4,
        vision_layer_norm_eps=1e-5,
    ),
}  # fmt: skip
PROMPT = 3  # tokens


def reference(config: BLIP2Config) -> nn.Module:
    """The last token is "<image>": transformers puts the queries in its place."""
    options = published(config) | {"image_token_index": config.text_vocab_size - 1}
    return transformers.Blip2ForConditionalGeneration(transformers.Blip2Config.from_dict(options)).eval()


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_home("blip2", tensors)


def filled(theirs: nn.Module, config: BLIP2Config = TINY) -> BLIP2:
    ours = BLIP2(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours


def pair(config: BLIP2Config = TINY, seed: int = 0) -> tuple[BLIP2, nn.Module]:
    theirs = randomise(reference(config), seed)
    return filled(theirs, config), theirs


def images_of(config: BLIP2Config = TINY, batch: int = 2) -> Tensor:
    return pictures(3, (config.vision_image_size, config.vision_image_size), batch)


def words(config: BLIP2Config = TINY, batch: int = 2, tokens: int = 9) -> Tensor:
    """Texts, the first with padding at its end; no "<image>"."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, config.text_vocab_size - 1, (batch, tokens), generator=generator)
    ids[:, 0], ids[:, -1], ids[0, -3] = config.text_bos_token_id, config.text_eos_token_id, 5
    ids[0, -2:] = config.text_pad_token_id
    return ids


def behind_images(ids: Tensor, config: BLIP2Config, token: int | None = None) -> Tensor:
    """The ids behind as many of a token ("<image>") as there are queries."""
    token = config.text_vocab_size - 1 if token is None else token
    return torch.cat([torch.full((len(ids), config.num_query_tokens), token), ids], dim=1)


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name: str) -> None:
    config = VARIANTS[name]
    ours, theirs = pair(config)
    images, ids = images_of(config), words(config)
    theirs_ids, behind = behind_images(ids, config), config.num_query_tokens
    assert_parity(
        ours, theirs, home,
        lambda: ours(images, ids),
        lambda: theirs(pixel_values=images, input_ids=theirs_ids).logits[:, behind:],
    )  # fmt: skip


@pytest.mark.parametrize("n_prompt", [0, PROMPT])
def test_the_loss_of_each_text_and_its_gradients(n_prompt: int) -> None:
    """Without a prompt the first token is learnt from the last query; padding never is."""
    ours, theirs = pair()
    images, ids = images_of(), words()
    labels = ids.masked_fill(ids == TINY.text_pad_token_id, -100)
    labels[:, :n_prompt] = -100
    labels, theirs_ids = behind_images(labels, TINY, -100), behind_images(ids, TINY)

    def of(row: int) -> Tensor:
        """transformers' loss is in float32, so it is computed from their logits, in float64."""
        output = theirs(pixel_values=images, input_ids=theirs_ids)
        return F.cross_entropy(output.logits[row, :-1], labels[row, 1:])

    assert_parity(
        ours, theirs, home,
        lambda: ours.loss(images, ids, n_prompt), lambda: torch.stack([of(0), of(1)]),
    )  # fmt: skip
    counts = (labels != -100).sum(dim=1)
    mean = (ours.loss(images, ids, n_prompt) * counts).sum() / counts.sum()
    float32 = theirs(pixel_values=images, input_ids=theirs_ids, labels=labels).loss
    torch.testing.assert_close(mean.float(), float32, rtol=1e-6, atol=0)


def test_the_states_of_image_and_queries() -> None:
    ours, theirs = pair()
    images = images_of(batch=3)
    expected = theirs.get_image_features(images, return_dict=True)
    for found, wanted in (
        (ours.encode_image(images), expected.last_hidden_state),
        (ours.encode_queries(images), expected.qformer_outputs.last_hidden_state),
        (ours.language_projection(ours.encode_queries(images)), expected.pooler_output),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_a_bias_of_evas_keys_changes_nothing() -> None:
    ours, _ = pair()
    before = ours(images_of(), words())
    for layer in ours.vision_model.encoder.layers:
        q, k, v = layer.self_attn.qkv.bias.data.chunk(3)
        k += 5
    torch.testing.assert_close(ours(images_of(), words()), before, rtol=0, atol=1e-10)
    q += 5
    assert (ours(images_of(), words()) - before).abs().max() > 1e-2


def test_positions_are_counted_from_the_third_row_and_over_the_queries() -> None:
    ours, _ = pair()
    ours.loss(images_of(), words()[1:].expand(2, -1)).sum().backward()
    rows = ours.language_model.model.decoder.embed_positions.weight.grad.abs().amax(dim=1) > 0
    last = 2 + TINY.num_query_tokens + words().shape[1]
    assert rows.nonzero().flatten().tolist() == [*range(2, last - 1)]  # nothing is predicted from the last


def test_the_cache_changes_nothing() -> None:
    """Queries and prompt at once, then token by token, with two beams an image whose order changes."""
    ours, _ = pair()
    images, ids = images_of(), words(batch=4)
    ids[1, :4], ids[3, :4] = ids[0, :4], ids[2, :4]  # rows 0 and 1 are beams of the first image
    whole = ours(images.repeat_interleave(2, dim=0), ids)
    x, past = ours._states(ids[::2, :4], None, ours.language_projection(ours.encode_queries(images)))
    torch.testing.assert_close(ours._logits(x)[:, -4:], whole[::2, :4], rtol=0, atol=1e-10)
    rows = torch.tensor([0, 0, 1, 1])
    for n in range(4, ids.shape[1]):
        past = [(k[rows], v[rows]) for k, v in past]
        x, past = ours._states(ids[:, n : n + 1], past, x)
        torch.testing.assert_close(ours._logits(x), whole[:, n : n + 1], rtol=0, atol=1e-10)
        ids, whole, rows = ids[[1, 0, 2, 3]], whole[[1, 0, 2, 3]], torch.tensor([1, 0, 2, 3])


def test_a_wrong_size_is_refused() -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"images are \(B, 3, 16, 16\) .* not \(2, 3, 16, 24\)"):
        ours.encode_image(torch.zeros(2, 3, 16, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="41 queries and tokens are more than this model's 40 positions"):
        ours(images_of(), torch.ones(2, 37, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------

REAL = 40  # ids from here on have no token
SETTINGS: tuple[dict[str, Any], ...] = (
    dict(min_new_tokens=1, max_new_tokens=16, repetition_penalty=1.0, length_penalty=1.0),
    dict(min_new_tokens=1, max_new_tokens=14, repetition_penalty=1.15, length_penalty=0.0),  # LAVIS's task
    dict(min_new_tokens=8, max_new_tokens=12, repetition_penalty=1.5, length_penalty=2.0),
    dict(min_new_tokens=0, max_new_tokens=9, repetition_penalty=0.8, length_penalty=-1.0),
)


def talkative(seed: int, config: BLIP2Config = TINY) -> tuple[BLIP2, nn.Module]:
    """Models whose texts do not repeat themselves and end at other places for other images."""
    theirs = randomise(reference(config), seed)
    decoder = theirs.language_model.model.decoder
    with torch.no_grad():
        end = decoder.embed_tokens.weight[config.text_eos_token_id]
        decoder.final_layer_norm.weight.mul_(1.5)
        decoder.final_layer_norm.bias.add_(3 * end / end.square().sum())  # its logit is 3 higher
        decoder.embed_positions.weight.mul_(2)
        for layer in decoder.layers:
            layer.self_attn.q_proj.weight.mul_(3)
    return filled(theirs, config), theirs


def prompts(batch: int = 4) -> Tensor:
    """ "</s>" and two words, others for each image."""
    ids = torch.randint(6, REAL, (batch, PROMPT), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = TINY.text_bos_token_id
    return ids


def expected_tokens(theirs: nn.Module, images: Tensor, ids: Tensor, config: BLIP2Config = TINY,
                    real: int = REAL, **settings: Any) -> Tensor:  # fmt: skip
    rest = list(range(real, config.text_vocab_size))
    written = theirs.generate(
        pixel_values=images, input_ids=behind_images(ids, config), do_sample=False, suppress_tokens=rest,
        **settings,
    )  # fmt: skip
    return written[:, config.num_query_tokens :]


def test_tokens() -> None:
    ends = []
    for seed, settings in enumerate(SETTINGS):
        ours, theirs = talkative(seed)
        images, ids = torch.roll(images_of(batch=4), seed, dims=0), prompts()
        for num_beams in (1, 2, 5):
            found = ours.generate_ids(images, ids, num_beams, n_tokens=REAL, **settings)
            expected = expected_tokens(theirs, images, ids, num_beams=num_beams, **settings)
            assert torch.equal(found, expected), f"{settings}, {num_beams} beams:\n{found}\n{expected}"
            texts = [[*row, TINY.text_eos_token_id] for row in expected[:, PROMPT:].tolist()]
            ends.append([row.index(TINY.text_eos_token_id) for row in texts])
    assert sum(len(set(several)) > 1 for several in ends) >= 6, ends
    assert len({end for several in ends for end in several}) >= 8, ends


def test_what_has_no_token_is_never_written() -> None:
    ours, _ = talkative(0)
    with torch.no_grad():
        ours.language_model.model.decoder.embed_tokens.weight[REAL:] *= 20
    free = ours.generate_ids(images_of(), prompts(2), 3, max_new_tokens=8)
    held = ours.generate_ids(images_of(), prompts(2), 3, max_new_tokens=8, n_tokens=REAL)
    assert free.max() >= REAL > held.max()


def test_images_of_a_batch_do_not_influence_one_another() -> None:
    ours, _ = talkative(1)
    images, ids = images_of(batch=4), prompts()
    together = ours.generate_ids(images, ids, 3)
    for row, image, prompt in zip(together, images, ids, strict=True):
        alone = ours.generate_ids(image[None], prompt[None], 3)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == TINY.text_pad_token_id).all()


def test_the_penalty_of_repetition_is_the_logits_or_the_log_probabilities() -> None:
    """Of tokens with logits 2, 1.2, -1 and -9 the first is written again and again. A penalty of 2 makes its
    logit 1, below 1.2, but its log-probability -.4 only -.8, still above that of the second, -1.2."""
    logits = torch.tensor([[2.0, 1.2, -1.0, -9.0]])

    def step(new: Tensor, past: Any) -> tuple[Tensor, list]:
        return logits.expand(len(new), -1), []

    def written(beams: int, penalty: float) -> list[int]:
        found = beam_search(step, torch.tensor([[0]]), beams, end=2, pad=2, min_new=2, max_new=2,
                            repetition_penalty=penalty)  # fmt: skip
        return found[0].tolist()

    assert written(1, 1.0) == [0, 0, 0] and written(1, 2.0) == [0, 1, 0]
    assert written(2, 1.0) == [0, 0, 0] == written(2, 2.0) and written(2, 3.5) == [0, 1, 0]


def test_bad_prompts_are_refused() -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match="max_new_tokens = 34 must be above 0 and at most 33: 7 of 40 pos"):
        ours.generate_ids(images_of(batch=4), prompts(), max_new_tokens=34)
    ids = prompts()
    ids[2, 2:] = TINY.text_pad_token_id
    with pytest.raises(ValueError, match="a prompt holds padding"):
        ours.generate_ids(images_of(batch=4), ids)


# ----------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ a", "Ġ d", "o g", "Ġd og", "c a", "ca t", "Ċ Ċ", "Ġa Ġ"]
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *BYTES, *(merge.replace(" ", "") for merge in MERGES), "madeup"]
WORDY = replace(TINY, text_vocab_size=280, text_eos_token_id=TOKENS.index("Ċ"))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    write_vocabulary(tmp_path, TOKENS)
    return tmp_path


def write_vocabulary(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    stated = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def test_tokenizer_of_a_vocabulary(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    theirs = transformers.GPT2Tokenizer.from_pretrained(vocabulary)
    for text in ("a dog, 2 cats' dog's", "  a  caté\u2028\n\ndog\n", " dog</s> cat<pad>", "<s>☃", ""):
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids
        assert ids[0] == 2
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("a dog\n").ids == [TOKENS.index(token) for token in ("</s>", "a", "Ġdog", "Ċ")]


def test_tokens_added_to_a_vocabulary(vocabulary: Path) -> None:
    (vocabulary / "added_tokens.json").write_text(json.dumps({"<image>": len(TOKENS)}))
    assert len(TOKENS) in load_tokenizer(vocabulary).encode("a <image>").ids


def test_tokenizer_json_comes_first_and_is_freed_of_padding(vocabulary: Path) -> None:
    """One as transformers saves it, with "<image>" added behind the vocabulary."""
    plain, theirs = load_tokenizer(vocabulary), transformers.GPT2Tokenizer.from_pretrained(vocabulary)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs(["a", "a dog"], padding="max_length", max_length=4, truncation=True)
    theirs.save_pretrained(vocabulary)
    (vocabulary / "vocab.json").write_text("nonsense")
    text = "a dog, two dogs and a cat\n"
    again = load_tokenizer(vocabulary)
    assert again.encode(text).ids == plain.encode(text).ids
    assert again.token_to_id("<image>") == len(TOKENS) not in again.get_vocab(False).values()


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("merges.txt", None, "no tokenizer.json, and no vocab.json with merges.txt"),
    ("vocab.json", b'{"</s>": 0, "a": 1}', "vocab.json lacks <pad> or .: it is no OPT tokenizer's"),
    ("merges.txt", b"#version: 0.2\no g\n", "merges.txt: does not fit vocab.json .no line makes"),
    ("tokenizer.json", b"{", "no tokenizer can be read"),
    ("tokenizer.json", Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
     .to_str().encode(), "the tokenizer lacks </s>, <pad>, .: it is no OPT tokenizer's"),
])  # fmt: skip
def test_a_missing_or_damaged_tokenizer_is_refused(
    vocabulary: Path, name: str, content: bytes | None, problem: str
) -> None:
    (vocabulary / name).unlink(missing_ok=True)
    if content is not None:
        (vocabulary / name).write_bytes(content)
    with pytest.raises(WeightsError, match=problem):
        load_tokenizer(vocabulary)


def test_captions(vocabulary: Path) -> None:
    ours, theirs = talkative(1, WORDY)
    with pytest.raises(ValueError, match="no tokenizer"):
        ours.generate(images_of())
    ours.tokenizer = load_tokenizer(vocabulary)
    ours.tokenizer.add_special_tokens(["<image>"])
    for model in (ours, theirs):  # it would be written in place of the line break
        rows = model.language_model.model.decoder.embed_tokens.weight.data
        rows[len(TOKENS)] = 1.5 * rows[WORDY.text_eos_token_id]
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(vocabulary)
    images = images_of(batch=4)
    for prompt, settings in (("", {}), ("a dog", {"num_beams": 1, "max_new_tokens": 12})):
        ids = torch.tensor(tokenizer([prompt] * 4).input_ids)
        usual = {"num_beams": 5, "min_new_tokens": 1, "max_new_tokens": 30} | settings
        expected = expected_tokens(theirs, images, ids, WORDY, len(TOKENS), **usual)[:, ids.shape[1] :]
        texts = [text.strip() for text in tokenizer.batch_decode(expected, skip_special_tokens=True)]
        assert ours.generate(images, prompt, **settings) == texts
        assert len(set(texts)) > 1 and all(texts)


# ----------------------------------------------------------------------------------------------------------
# Names and sizes
# ----------------------------------------------------------------------------------------------------------

# config.json of Salesforce/blip2-opt-2.7b in its two generations, with all that matters here
OPT_2_7B = {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_attention_heads": 32,
            "num_hidden_layers": 32, "word_embed_proj_dim": 2560, "eos_token_id": 50118,
            "prefix": "</s>"}  # fmt: skip
HUB = {
    "model_type": "blip-2", "num_query_tokens": 32, "use_decoder_only_language_model": True,
    "tie_word_embeddings": True, "vision_config": {"model_type": "blip_2_vision_model"},
    "qformer_config": {"model_type": "blip_2_qformer"},
}  # fmt: skip
GENERATIONS = {
    50272: HUB | {"text_config": OPT_2_7B},
    50304: HUB | {"text_config": OPT_2_7B | {"vocab_size": 50304}, "image_token_index": 50265,
                  "image_text_hidden_size": 256},
}  # fmt: skip
TOTAL_SIZE = 15_493_505_024  # of the published pytorch_model.bin.index.json, which holds `lm_head`


@pytest.mark.parametrize("rows", GENERATIONS)
def test_full_size_names_and_shapes(rows: int) -> None:
    config = replace(CONFIGS["blip2-opt-2.7b"], text_vocab_size=rows)
    with torch.device("meta"):
        ours, theirs = BLIP2(config), reference(config)
    published_tensors = theirs.state_dict()
    assert_same_shapes(ours, home(published_tensors))
    size = sum(tensor.numel() * 4 for tensor in published_tensors.values())
    assert size - TOTAL_SIZE == 2 * 4 * 2560 * (rows - 50272)  # words and head
    for stated in (GENERATIONS[rows], theirs.config.to_dict(), published(config)):
        assert sizes_of(KIND, stated, home(published_tensors), "here") == config
    trained = [p.numel() for name, p in ours.named_parameters() if re.fullmatch(KIND.full_precision, name)]
    assert round(sum(trained) / 1e6, 1) == 107.1


def folder_of(theirs: nn.Module, folder: Path, **options: Any) -> Path:
    theirs.float().save_pretrained(folder, **options)
    return folder


def assert_loaded(folder: Path, theirs: nn.Module, config: BLIP2Config = WORDY) -> None:
    loaded = weights.load("blip2", folder)
    assert loaded.config == config
    expected = home(parameters(theirs))
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_folder_as_transformers_saves_it(vocabulary: Path) -> None:
    """In shards, without the head, and without what equals transformers' defaults in config.json."""
    theirs = randomise(reference(WORDY))
    folder_of(theirs, vocabulary, max_shard_size="60KB")
    index = json.loads((vocabulary / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and HEAD not in index and WORDS in index
    assert_loaded(vocabulary, theirs)
    assert [line.partition(":")[0] for line in verify(vocabulary)] == ["blip2"]  # not CLIP's image half
    config = json.loads((vocabulary / "config.json").read_text())
    del config["text_config"]["vocab_size"], config["vision_config"]["layer_norm_eps"]
    config["qformer_config"].pop("layer_norm_eps")
    (vocabulary / "config.json").write_text(json.dumps(config))
    assert_loaded(vocabulary, theirs)


def test_a_file_with_the_head_alone(vocabulary: Path) -> None:
    """safetensors' save_model keeps one of two tied tensors, here the copy that other files leave out."""
    theirs = randomise(reference(WORDY)).float()
    (vocabulary / "config.json").write_text(json.dumps(published(WORDY)))
    save_model(theirs, str(vocabulary / "model.safetensors"))
    held = load_file(vocabulary / "model.safetensors")
    assert HEAD in held and WORDS not in held
    assert_loaded(vocabulary, theirs)


def test_an_older_folder_holds_the_words_twice(vocabulary: Path) -> None:
    theirs = randomise(reference(WORDY)).float()
    older = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    older["qformer.embeddings.position_ids"] = torch.arange(512)[None]
    assert HEAD in older
    (vocabulary / "config.json").write_text(json.dumps(published(WORDY)))
    halves = [{name: older[name] for name in sorted(older)[n::2]} for n in (0, 1)]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, vocabulary / name)
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (vocabulary / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_loaded(vocabulary, theirs)
    half = next(half for half in halves if HEAD in half)
    half[HEAD][-1] += 1e-3
    save_file(half, vocabulary / index[HEAD])
    with pytest.raises(WeightsError, match=f"{HEAD} differs from {WORDS}"):
        weights.load("blip2", vocabulary)


@pytest.mark.parametrize(("part", "change", "problem"), [
    ("text_config", {"model_type": "t5"}, "not implemented here: text_config.model_type = 't5'"),
    (None, {"use_decoder_only_language_model": False}, "use_decoder_only_language_model = False"),
    ("text_config", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    ("text_config", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 is not .* hidden_size = 32"),
    ("text_config", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
    ("text_config", {"enable_bias": False}, "enable_bias = False"),
    ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ("vision_config", {"qkv_bias": False}, "qkv_bias = False"),
    ("qformer_config", {"use_qformer_text_input": True}, "use_qformer_text_input = True"),
    ("qformer_config", {"cross_attention_frequency": 1}, r"missing: qformer.encoder.layer.1.crossattention"),
    ("text_config", {"vocab_size": 45}, r"embed_tokens.weight \(44, 32\) instead of \(45, 32\)"),
    ("text_config", {"num_attention_heads": 5}, "text_hidden_size = 32 is not 5 equal heads"),
    ("text_config", {"eos_token_id": 44}, "text_eos_token_id = 44 is not among its 44 words"),
    ("text_config", {"eos_token_id": [5, 2]}, "its sizes do not fit one another"),
    ("vision_config", {"image_size": 24}, r"position_embedding \(1, 5, 24\) instead of \(1, 10, 24\)"),
    (None, {"num_query_tokens": 5}, r"query_tokens \(1, 4, 20\) instead of \(1, 5, 20\)"),
    (None, {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
])  # fmt: skip
def test_what_is_not_implemented_or_does_not_fit_is_refused(
    part: str | None, change: dict[str, Any], problem: str
) -> None:
    config = published(TINY)
    (config[part] if part else config).update(change)
    with pytest.raises(WeightsError, match=f"^here.*{problem}") as raised:
        fit(KIND, config, parameters(BLIP2(TINY)))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_whose_end_is_another_one_is_refused(vocabulary: Path) -> None:
    theirs = randomise(reference(replace(WORDY, text_eos_token_id=2)))
    folder_of(theirs, vocabulary)
    with pytest.raises(WeightsError, match=r"Ċ is 2\d\d in the tokenizer and 2 in the model .text_eos_token"):
        weights.load("blip2", vocabulary)


# ----------------------------------------------------------------------------------------------------------
# Half precision
# ----------------------------------------------------------------------------------------------------------


def test_half_precision_leaves_what_is_trained_in_float32(vocabulary: Path) -> None:
    _, theirs = talkative(1, WORDY)
    folder_of(theirs, vocabulary)
    whole, half = (
        weights.load("blip2", vocabulary, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert {name.partition(".")[0] for name in kept} == {"query_tokens", "qformer", "language_projection"}
    assert {p.dtype for name, p in half.named_parameters() if name not in kept} == {torch.bfloat16}
    for name in kept:
        assert torch.equal(half.get_parameter(name), whole.get_parameter(name))
    images, ids = images_of().float(), words(WORDY)
    for name, parameter in half.named_parameters():
        parameter.requires_grad_(name in kept)
    loss = half.loss(images, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole.loss(images, ids), rtol=0.05, atol=0)
    loss.sum().backward()
    assert all(half.get_parameter(name).grad.abs().sum() > 0 for name in kept if "key.bias" not in name)
    assert all(half.generate(images, num_beams=2, max_new_tokens=5))


# ----------------------------------------------------------------------------------------------------------
# Full size
# ----------------------------------------------------------------------------------------------------------

CAPTION = """
import sys, torch, weights
model = weights.load("blip2", sys.argv[1])
print(repr(model.generate(torch.randn(1, 3, 224, 224), max_new_tokens=4)))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_a_full_size_model_in_float16_shards_writes_a_caption_in_20_gb(tmp_path: Path) -> None:
    """Linux only (/proc). Weights are random and small, so the caption has no meaning."""
    config = CONFIGS["blip2-opt-2.7b"]
    with torch.device("meta"):
        tensors = BLIP2(config).state_dict()
    filling = [f"w{n}" for n in range(len(TOKENS), 50265)]
    tokens = [*TOKENS, *filling]
    here = tokens.index("Ċ")
    tokens[here], tokens[config.text_eos_token_id] = tokens[config.text_eos_token_id], tokens[here]
    write_vocabulary(tmp_path, tokens)
    (tmp_path / "config.json").write_text(json.dumps(GENERATIONS[50304]))
    index, names = {}, list(tensors)
    for n, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-0000{n}-of-00002.safetensors"
        held = {
            name: torch.empty(tensors[name].shape, dtype=torch.float16).uniform_(-0.05, 0.05) for name in some
        }
        save_file(held, tmp_path / shard)
        index |= dict.fromkeys(some, shard)
        del held
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done = subprocess.run(
        [sys.executable, "-c", CAPTION, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    caption, peak = done.stdout.splitlines()
    assert len(caption) > 4 and int(peak) < 20e9, done.stdout
