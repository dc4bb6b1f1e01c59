"""models/blip.py against transformers' BlipForConditionalGeneration: numbers, tokens, names and sizes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import weights
from models.blip import BLIP, CONFIGS, BLIPConfig
from tests.parity import assert_parity, assert_same_shapes, fit, parameters, randomise
from weights import WeightsError, from_home, to_home
from weights.kinds.blip import KIND, load_tokenizer, published
from weights.options import sizes_of

TINY = BLIPConfig(
    vision_hidden_size=24, vision_intermediate_size=40, vision_num_hidden_layers=2,
    vision_num_attention_heads=3, vision_image_size=16, vision_patch_size=8, vision_layer_norm_eps=1e-5,
    text_vocab_size=40, text_hidden_size=32, text_intermediate_size=48, text_num_hidden_layers=3,
    text_num_attention_heads=4, text_max_position_embeddings=24, text_layer_norm_eps=1e-12,
    text_bos_token_id=38, text_pad_token_id=0, text_sep_token_id=3,
)
VARIANTS: dict[str, BLIPConfig] = {
    "tiny": TINY,
    "rest-of-a-patch": replace(TINY, vision_image_size=23, vision_patch_size=5),
    "one-layer": replace(TINY, vision_num_hidden_layers=1, text_num_hidden_layers=1),
    "odd": replace(TINY, vision_hidden_size=21, vision_num_attention_heads=1, text_num_attention_heads=2,
                   text_hidden_size=34, text_vocab_size=41, text_pad_token_id=7),
}


def halves(config: BLIPConfig) -> dict[str, dict[str, Any]]:
    """As config.json has it."""
    both: dict[str, dict[str, Any]] = {"vision_config": {}, "text_config": {}}
    for name, value in asdict(config).items():
        half, _, option = name.partition("_")
        both[f"{half}_config"][option] = value
    return both


def reference(config: BLIPConfig) -> nn.Module:
    model = transformers.BlipForConditionalGeneration(transformers.BlipConfig(**halves(config)))
    return model.eval()


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_home("blip", tensors)


def filled(config: BLIPConfig, theirs: nn.Module) -> BLIP:
    ours = BLIP(config).double().eval()
    ours.load_state_dict(home(parameters(theirs)), strict=True)
    return ours


def pair(config: BLIPConfig = TINY, seed: int = 0) -> tuple[BLIP, nn.Module]:
    theirs = randomise(reference(config), seed)
    return filled(config, theirs), theirs


def pictures(config: BLIPConfig = TINY, batch: int = 2, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.vision_image_size
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def words(config: BLIPConfig = TINY, batch: int = 2, tokens: int = 9) -> Tensor:
    """Every id may stand anywhere, padding too."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(config.text_vocab_size, (batch, tokens), generator=generator)
    ids[0, -2:] = config.text_pad_token_id
    return ids


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name: str) -> None:
    ours, theirs = pair(VARIANTS[name])
    images, ids = pictures(ours.config), words(ours.config)
    assert_parity(
        ours, theirs, home,
        lambda: ours(images, ids), lambda: theirs(pixel_values=images, input_ids=ids).logits,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_training_and_its_gradients(smoothing: float) -> None:
    """A prompt of three tokens and padding are not learnt. The texts' losses, weighted by their tokens, are
    transformers' mean over the tokens of the batch."""
    theirs = randomise(reference(TINY))
    theirs.text_decoder.label_smoothing = smoothing
    ours, images, ids = filled(TINY, theirs), pictures(), words()
    ids[ids == TINY.text_pad_token_id] = 5
    ids[0, -2:] = TINY.text_pad_token_id
    labels = ids.masked_fill(ids == TINY.text_pad_token_id, -100)
    labels[:, :3] = -100
    counts = (labels != -100).sum(dim=1)
    assert counts.tolist() == [4, 6]
    assert_parity(
        ours, theirs, home,
        lambda: (ours.loss(images, ids, 3, smoothing) * counts).sum() / counts.sum(),
        lambda: theirs(pixel_values=images, input_ids=ids, labels=labels).loss,
    )


def test_image_states_and_gradients() -> None:
    ours, theirs = pair()
    images = pictures(batch=3)
    assert_parity(
        ours, theirs, home,
        lambda: ours.encode_image(images), lambda: theirs.vision_model(images).last_hidden_state,
    )


def test_a_word_reads_nothing_behind_it() -> None:
    ours, _ = pair()
    ids = words()
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % TINY.text_vocab_size
    a, b = ours(pictures(), ids), ours(pictures(), other)
    assert torch.allclose(a[:, :5], b[:, :5], rtol=0, atol=1e-12)
    assert (a[:, 5:] - b[:, 5:]).abs().amin() > 0


def test_the_cache_changes_nothing() -> None:
    """Prompt at once, then word by word, with two beams an image whose order changes on the way."""
    ours, _ = pair()
    images, ids = pictures(), words(batch=4)
    ids[1, :4], ids[3, :4] = ids[0, :4], ids[2, :4]  # rows 0 and 1 are beams of the first image
    whole = ours(images.repeat_interleave(2, dim=0), ids)
    image = ours._image_keys_values(ours.encode_image(images))
    x, past = ours._states(ids[::2, :4], image, None)
    assert torch.allclose(ours._logits(x), whole[::2, :4], rtol=0, atol=1e-10)
    rows = torch.tensor([0, 0, 1, 1])
    for n in range(4, ids.shape[1]):
        past = [(k[rows], v[rows]) for k, v in past]
        x, past = ours._states(ids[:, n : n + 1], image, past)
        assert torch.allclose(ours._logits(x), whole[:, n : n + 1], rtol=0, atol=1e-10)
        ids, whole, rows = ids[[1, 0, 2, 3]], whole[[1, 0, 2, 3]], torch.tensor([1, 0, 2, 3])


def test_a_wrong_weight_is_found_where_it_is() -> None:
    ours, theirs = pair()
    layer = "vision_model.encoder.layers.1.self_attn.projection"
    with torch.no_grad():
        ours.get_submodule(layer).bias[0].add_(1e-6)
    with pytest.raises(AssertionError, match=f"^{layer} is the first layer that gives"):
        assert_parity(
            ours, theirs, home,
            lambda: ours(pictures(), words()), lambda: theirs(pictures(), words()).logits,
        )


def test_a_wrong_size_is_refused() -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"images are \(B, 3, 16, 16\) .* not \(2, 3, 16, 24\)"):
        ours.encode_image(torch.zeros(2, 3, 16, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="25 tokens are more than this model's 24 positions"):
        ours(pictures(), torch.ones(2, 25, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------------

SEEDS = range(21)
SETTINGS: tuple[dict[str, Any], ...] = (  # taken in turn
    dict(min_length=5, max_length=20, length_penalty=1.0),
    dict(min_length=0, max_length=14, length_penalty=0.0),
    dict(min_length=8, max_length=12, length_penalty=2.0),
    dict(min_length=1, max_length=24, length_penalty=-1.0),
    dict(min_length=7, max_length=7, length_penalty=1.0),
    dict(min_length=6, max_length=16, length_penalty=0.5),
    dict(min_length=0, max_length=5, length_penalty=1.0),
)


def talkative(seed: int, config: BLIPConfig = TINY) -> tuple[BLIP, nn.Module]:
    """Models that do not repeat themselves, and whose captions end at other places for other images."""
    theirs = randomise(reference(config), seed)
    decoder = theirs.text_decoder
    with torch.no_grad():
        decoder.cls.predictions.transform.LayerNorm.weight.mul_(1.5)
        decoder.cls.predictions.bias[config.text_sep_token_id] += 3
        decoder.bert.embeddings.position_embeddings.weight.mul_(2)
        for layer in decoder.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(4)
            layer.attention.output.dense.weight.mul_(0.5)
            layer.crossattention.output.dense.weight.mul_(0.5)
    return filled(config, theirs), theirs


def prompts(config: BLIPConfig = TINY, batch: int = 4, tokens: int = 5) -> Tensor:
    """[CLS] w w w [SEP], another one for each image; both ends are replaced or cut."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(8, config.text_vocab_size, (batch, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = 1, config.text_sep_token_id
    return ids


def both(
    ours: BLIP, theirs: nn.Module, images: Tensor, ids: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    expected = theirs.generate(pixel_values=images, input_ids=ids.clone(), do_sample=False, **settings)
    return ours.generate_ids(images, ids, **settings), expected


def lengths(ids: Tensor, end: int = TINY.text_sep_token_id) -> list[int]:
    """Of the captions, up to the first end."""
    return [row.index(end) + 1 if end in row else len(row) for row in ids.tolist()]


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
def test_tokens(num_beams: int) -> None:
    ends = set()
    for seed in SEEDS:
        ours, theirs = talkative(seed)
        images, ids = pictures(batch=4, seed=seed), prompts()
        settings = SETTINGS[seed % len(SETTINGS)]
        found, expected = both(ours, theirs, images, ids, num_beams=num_beams, **settings)
        assert torch.equal(found, expected), f"seed {seed}, {settings}:\n{found}\n{expected}"
        ends.add(tuple(lengths(expected)))
    assert sum(len(set(several)) > 1 for several in ends) >= len(SEEDS) / 3, ends
    assert len({length for several in ends for length in several}) >= 8, ends


def test_one_beam_stops_at_its_first_end() -> None:
    """Though a longer caption's score, with such a length penalty, would be the better one."""
    for seed in range(6):
        ours, theirs = talkative(seed)
        found, expected = both(
            ours, theirs, pictures(batch=4, seed=seed), prompts(),
            num_beams=1, min_length=0, max_length=24, length_penalty=6.0,
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pad", [0, 5])
def test_tokens_with_another_padding(pad: int) -> None:
    """After the end stands the padding's id; but 0 counts as none in a beam search, as in transformers."""
    config = replace(TINY, text_pad_token_id=pad)
    shorter = 0
    for seed in range(3):
        ours, theirs = talkative(seed, config)
        for num_beams in (1, 3):
            found, expected = both(
                ours, theirs, pictures(batch=4, seed=seed), prompts(),
                num_beams=num_beams, min_length=5, max_length=20,
            )
            assert torch.equal(found, expected)
            shorter += min(lengths(expected)) < expected.shape[1]
    assert shorter >= 3


@pytest.mark.parametrize("num_beams", [1, 3])
def test_images_of_a_batch_do_not_influence_one_another(num_beams: int) -> None:
    end, differ = TINY.text_sep_token_id, 0
    for seed in range(6):
        ours, _ = talkative(seed)
        images, ids = pictures(batch=5, seed=seed), prompts(batch=1)
        together = ours.generate_ids(images, ids, num_beams)
        alone = [ours.generate_ids(image[None], ids, num_beams)[0] for image in images]
        differ += len({len(row) for row in alone}) > 1
        for row, single, length in zip(together, alone, lengths(together), strict=True):
            assert torch.equal(row[:length], single)
            assert length == together.shape[1] or row[length] in (end, TINY.text_pad_token_id)
    assert differ >= 3


def test_the_prompt_is_left_as_it_was_and_bad_ones_are_refused() -> None:
    ours, theirs = talkative(0)
    ids = prompts()
    ours.generate_ids(pictures(batch=4), ids)
    assert torch.equal(ids, prompts())
    with pytest.raises(ValueError, match="max_length = 4 must be above the prompt's 4 tokens"):
        ours.generate_ids(pictures(batch=4), ids, max_length=4)
    with pytest.raises(ValueError, match="max_length = 25"):
        ours.generate_ids(pictures(batch=4), ids, max_length=25)
    ids[2, 2:] = TINY.text_pad_token_id
    with pytest.raises(ValueError, match="a prompt holds padding"):
        ours.generate_ids(pictures(batch=4), ids)


# ----------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a picture of dog ##s cat in the grass , é\u2028".split(" ")


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    filling = [f"w{i}" for i in range(len(VOCABULARY), TINY.text_bos_token_id)]
    lines = "".join(f"{word}\n" for word in VOCABULARY + filling)
    (tmp_path / "vocab.txt").write_text(lines, encoding="utf-8")
    return tmp_path


def test_tokenizer_of_a_vocabulary(vocabulary: Path) -> None:
    tokenizer = load_tokenizer(vocabulary)
    theirs = transformers.BertTokenizer.from_pretrained(vocabulary)
    assert [tokenizer.token_to_id(token) for token in ("[DEC]", "[ENC]")] == [38, 39]
    for text in ("A picture of dogs in the GRASS,cat", "a  caté quick", "a picture of ", "w17 [SEP] a", ""):
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode([38, 5, 8, 9, 14, 3, 0]) == "a dogs,"


def test_tokens_added_to_a_vocabulary(vocabulary: Path) -> None:
    (vocabulary / "added_tokens.json").write_text('{"<loc>": 40, "[DEC]": 38, "[ENC]": 39}')
    tokenizer = load_tokenizer(vocabulary)
    assert [tokenizer.token_to_id(token) for token in ("[DEC]", "[ENC]")] == [38, 39]
    assert tokenizer.encode("a <loc> dog", add_special_tokens=False).ids[1] == 40


def test_tokenizer_json_comes_first_and_is_freed_of_padding(vocabulary: Path) -> None:
    plain = load_tokenizer(vocabulary)
    padded = Tokenizer.from_str(plain.to_str())
    padded.enable_padding(length=30)
    padded.enable_truncation(4)
    padded.save(str(vocabulary / "tokenizer.json"))
    (vocabulary / "vocab.txt").write_text("nonsense")
    text = "a cat in the grass"
    assert load_tokenizer(vocabulary).encode(text).ids == plain.encode(text).ids


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("nothing.txt", b"", "no tokenizer.json and no vocab.txt"),
    ("vocab.txt", b"[PAD]\n[UNK]\na\n", r"lacks \[CLS\], \[SEP\]"),
    ("vocab.txt", b"\xff\xfe", "no words can be read"),
    ("tokenizer.json", b"{", "no tokenizer can be read"),
])
def test_a_missing_or_damaged_tokenizer_is_refused(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=problem):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions(vocabulary: Path, num_beams: int) -> None:
    ours, theirs = talkative(1)
    with pytest.raises(ValueError, match="no tokenizer"):
        ours.generate(pictures())
    ours.tokenizer = load_tokenizer(vocabulary)
    ids = torch.tensor([[2, 5, 6, 7, 3]]).expand(4, -1)
    expected = theirs.generate(
        pixel_values=pictures(batch=4), input_ids=ids.clone(), num_beams=num_beams, min_length=5,
        max_length=20,
    )
    tokenizer = transformers.BertTokenizer.from_pretrained(vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    behind = [tokenizer.decode(row[4:], skip_special_tokens=True) for row in expected]
    found = ours.generate(pictures(batch=4), num_beams=num_beams)
    assert found == behind
    assert len(set(found)) > 1 and all(found)


def test_a_caption_has_no_special_tokens_and_ends_at_the_first_end(vocabulary: Path, monkeypatch) -> None:
    ours, _ = talkative(1)
    ours.tokenizer = load_tokenizer(vocabulary)
    rows = [[38, 5, 6, 7, 8, 1, 9, 2, 4, 10, 3, 11], [38, 5, 6, 7, 3, 9, 0, 0, 0, 0, 0, 0]]
    monkeypatch.setattr(ours, "generate_ids", lambda images, ids, **settings: torch.tensor(rows))
    assert ours.generate(pictures()) == ["dogs cat", ""]


# ----------------------------------------------------------------------------------------------------------
# Names and sizes
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = BLIP(CONFIGS[name]), reference(CONFIGS[name])
    tensors = home(parameters(theirs))
    assert_same_shapes(ours, tensors)
    assert sizes_of(KIND, theirs.config.to_dict(), tensors, "here") == CONFIGS[name]
    read = transformers.BlipConfig.from_dict(published(CONFIGS[name]))
    assert sizes_of(KIND, read.to_dict(), tensors, "here") == CONFIGS[name]
    assert sizes_of(KIND, None, tensors, "here") == CONFIGS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_folder(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    theirs = randomise(reference(config))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    sizes = sizes_of(KIND, json.loads((tmp_path / "config.json").read_text()), home(tensors), "here")
    assert sizes == config
    assert_same_shapes(BLIP(sizes), home(tensors))


def test_an_older_file_holds_some_tensors_twice() -> None:
    ours, theirs = pair()
    older = theirs.state_dict() | {"text_decoder.bert.embeddings.position_ids": torch.arange(24)[None]}
    assert "text_decoder.cls.predictions.decoder.weight" in older
    assert home(older).keys() == parameters(ours).keys()
    again = from_home("blip", home(older), "hf")
    assert all(torch.equal(older[name], tensor) for name, tensor in again.items())
    assert home(again).keys() == parameters(ours).keys()


def test_a_file_with_the_copies_alone(vocabulary: Path) -> None:
    theirs = pair()[1].float()
    (vocabulary / "config.json").write_text(json.dumps({"model_type": "blip"} | halves(TINY)))
    file = vocabulary / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, file)
    expected, key = weights.load("blip", vocabulary).state_dict(), weights.fingerprint("blip", vocabulary)
    save_file({name: tensor for name, tensor in tensors.items() if name not in KIND.tied.values()}, file)
    found = weights.load("blip", vocabulary).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert weights.fingerprint("blip", vocabulary) == key


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_that_is_no_copy_is_refused(name: str, vocabulary: Path) -> None:
    _, theirs = pair()
    head = f"text_decoder.cls.predictions.decoder.{name}"
    older = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    (vocabulary / "config.json").write_text(json.dumps({"model_type": "blip"} | halves(TINY)))
    save_file(older, vocabulary / "model.safetensors")
    weights.load("blip", vocabulary)
    older[head][-1] += 1e-3
    save_file(older, vocabulary / "model.safetensors")
    with pytest.raises(WeightsError, match=f"{head} differs from text_decoder"):
        weights.load("blip", vocabulary)


@pytest.mark.parametrize(("half", "change", "problem"), [
    ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
    ("text_config", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("text_config", {"is_decoder": False}, "is_decoder = False"),
    ("text_config", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ("text_config", {"vocab_size": 41}, r"word_embeddings.weight \(40, 32\) instead of \(41, 32\)"),
    ("text_config", {"num_attention_heads": 5}, "text_hidden_size = 32 is not 5 equal heads"),
    ("text_config", {"bos_token_id": 40}, "text_bos_token_id = 40 is not among its 40 words"),
    ("vision_config", {"image_size": 24}, r"position_embedding \(1, 5, 24\) instead of \(1, 10, 24\)"),
    (None, {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
])
def test_what_is_not_implemented_or_does_not_fit_is_refused(
    half: str | None, change: dict[str, Any], problem: str
) -> None:
    tensors = parameters(BLIP(TINY))
    config: dict[str, Any] = {"model_type": "blip"} | halves(TINY)
    (config[half] if half else config).update(change)
    with pytest.raises(WeightsError, match=f"^here.*{problem}"):
        fit(KIND, config, tensors)


def test_only_published_sizes_are_read_without_config_json() -> None:
    with pytest.raises(WeightsError, match="^here: without a config.json .*nearest is blip-mini"):
        sizes_of(KIND, None, parameters(BLIP(TINY)), "here")
