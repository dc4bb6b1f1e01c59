"""models/bert.py against transformers' BertModel, and what SentenceEncoder.encode promises."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F

import weights
from models.bert import CONFIGS, MAX_TOKENS, Bert, BertConfig, SentenceEncoder
from tests.parity import (
    assert_parity,
    assert_same_shapes,
    first_difference,
    home_names,
    parameters,
    randomise,
)

TINY = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=72,
    max_position_embeddings=300, type_vocab_size=2, layer_norm_eps=1e-12,
)


def reference(config: BertConfig, pooler: bool = False) -> nn.Module:
    upstream = transformers.BertConfig(**asdict(config), hidden_act="gelu")
    return transformers.BertModel(upstream, add_pooling_layer=pooler)


def home(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def pair(config: BertConfig = TINY) -> tuple[Bert, nn.Module]:
    theirs = randomise(reference(config))
    ours = Bert(config).double().eval()
    ours.load_state_dict(parameters(theirs), strict=True)
    return ours, theirs


def ids(tokens: int, batch: int = 3) -> Tensor:
    """Never 0, the padding: transformers keeps that row of the table out of the gradients."""
    return torch.randint(1, TINY.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tokens", [1, 17, 256])
def test_last_layer_and_gradients(tokens: int) -> None:
    ours, theirs = pair()
    given = ids(tokens)
    assert_parity(ours, theirs, home, lambda: ours(given), lambda: theirs(given).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_masked_states_and_gradients(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    given = ids(9)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).to(dtype)
    assert_parity(
        ours, theirs, home,
        lambda: ours(given, mask)[mask.bool()],
        lambda: theirs(given, attention_mask=mask.long()).last_hidden_state[mask.bool()],
    )


def test_full_size_names_and_shapes() -> None:
    with torch.device("meta"):
        ours, theirs = SentenceEncoder(CONFIGS["minilm"]), reference(CONFIGS["minilm"], pooler=True)
    published = {k: t for k, t in parameters(theirs).items() if not k.startswith("pooler.")}
    assert len(published) == len(parameters(theirs)) - 2
    assert_same_shapes(ours, published)


def test_a_wrong_weight_and_a_wrong_eps_are_found_where_they_are() -> None:
    ours, theirs = pair()
    names = home_names(theirs, home)
    runs = [lambda: ours(ids(7)), lambda: theirs(ids(7)).last_hidden_state]
    assert first_difference(ours, theirs, names, *runs) == ""
    layer = "encoder.layer.1.attention.self.key"
    with torch.no_grad():
        ours.get_submodule(layer).weight[0, 0].add_(1e-6)
    assert first_difference(ours, theirs, names, *runs).startswith(f"{layer} is the first layer that gives")
    ours.embeddings.LayerNorm.eps = 1e-5
    with pytest.raises(AssertionError, match="^embeddings.LayerNorm is the first layer that gives"):
        assert_parity(ours, theirs, home, *runs)


def word_tokenizer() -> tokenizers.Tokenizer:
    """w0 ... w56 are words. Padded and cut at 8, as all-MiniLM's own file is at 128: encode must not mind."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i + 3 for i in range(TINY.vocab_size - 3)}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(max_length=8)
    return tokenizer


def sentence_encoder() -> tuple[SentenceEncoder, nn.Module]:
    theirs = randomise(reference(TINY))
    ours = SentenceEncoder(TINY, word_tokenizer()).double().eval()
    ours.load_state_dict(parameters(theirs), strict=True)
    return ours, theirs


def sentence(words: int, start: int = 0) -> str:
    return " ".join(f"w{(7 * i + start) % 57}" for i in range(words))


SENTENCES = [sentence(n, start) for start, n in enumerate([3, 40, 0, 11, 1, 300, 3, 11, 254, 2])]


def expected_rows(theirs: nn.Module, sentences: list[str]) -> Tensor:
    rows = []
    for text in sentences:
        tokens = [1, *(int(word[1:]) + 3 for word in text.split())][: MAX_TOKENS - 1] + [2]
        states = theirs(torch.tensor([tokens])).last_hidden_state[0]
        rows.append(F.normalize(states.mean(dim=0), dim=0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_encode_is_the_normalised_mean_in_the_order_given(batch_size: int) -> None:
    ours, theirs = sentence_encoder()
    found = ours.encode(SENTENCES, batch_size=batch_size)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found.double(), expected_rows(theirs, SENTENCES), rtol=0, atol=1e-7)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(SENTENCES)), rtol=0, atol=1e-6)


def test_padding_changes_nothing() -> None:
    ours, _ = sentence_encoder()
    short, long = "w5 w9", sentence(200)
    given, mask = torch.tensor([[1, 8, 12, 2]]), torch.ones(1, 4)
    padded, padded_mask = F.pad(given, (0, 196), value=41), F.pad(mask, (0, 196))
    assert torch.allclose(ours(given, mask), ours(padded, padded_mask)[:, :4], rtol=0, atol=1e-12)
    assert torch.allclose(ours.encode([short, long])[:1], ours.encode([short]), rtol=0, atol=1e-7)
    ours.float()
    assert torch.allclose(ours.encode([short, long])[:1], ours.encode([short]), rtol=0, atol=1e-6)


def test_tokens_behind_the_256th_are_not_read() -> None:
    ours, _ = sentence_encoder()
    words = sentence(MAX_TOKENS - 2)
    same, other = ours.encode([words, words + " w9 w10 w11"]), ours.encode([words.rsplit(" ", 1)[0]])
    assert torch.allclose(same[0], same[1], rtol=0, atol=1e-7)
    assert not torch.allclose(same[0], other[0], rtol=0, atol=1e-7)


def test_no_sentences_no_words_and_no_tokenizer() -> None:
    ours, _ = sentence_encoder()
    assert ours.encode([]).shape == (0, TINY.hidden_size)
    assert ours.encode(["", " \n"]).isfinite().all()
    with pytest.raises(ValueError, match="has no tokenizer"):
        SentenceEncoder(TINY).encode(["w1"])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]


def sentence_transformer(folder: Path, pooling: str = "mean", *more: nn.Module) -> SentenceTransformer:
    """A random model of sentence-transformers, written to the folder."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=20).save_pretrained(folder)
    bert = transformers.BertModel(transformers.BertConfig(**asdict(TINY), hidden_act="gelu"))
    randomise(bert).float().save_pretrained(folder)
    transformer = Transformer(str(folder))
    modules = [transformer, Pooling(TINY.hidden_size, pooling_mode=pooling), *more, Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("length", [None, 8, 256, 1000])
def test_a_folder_of_sentence_transformers(length: int | None, tmp_path: Path) -> None:
    theirs = sentence_transformer(tmp_path)
    if length:  # as earlier versions wrote it
        flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
        pooling = {"word_embedding_dimension": 32, **flags, "pooling_mode_lasttoken": False}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        stated = {"max_seq_length": length, "do_lower_case": False}
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps(stated))
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
    texts = [sentence(n) for n in (3, 30, 290)] if length != 1000 else [sentence(290)]
    ours = weights.load("minilm", tmp_path)
    assert ours.config.max_seq_length == (length or 20)
    assert torch.allclose(ours.encode(texts), torch.tensor(theirs.encode(texts)), rtol=0, atol=1e-6)


def test_sentence_encoders_of_other_modules_are_refused(tmp_path: Path) -> None:
    for name, refused in {
        "cls": 'pooling_mode is "cls"; it must be "mean"', "max": 'pooling_mode is "max"',
        "Dense": 'modules.json: type is "Dense"; it must be one of Transformer, Pooling, Normalize',
        "pooling_mode_cls_token": "pooling_mode_cls_token is true; it must be false",
    }.items():
        (tmp_path / name).mkdir()
        dense = [Dense(TINY.hidden_size, 16)] if name == "Dense" else []
        sentence_transformer(tmp_path / name, name if len(name) == 3 else "mean", *dense)
        if len(name) > 5:
            (tmp_path / name / "1_Pooling" / "config.json").write_text(json.dumps({name: True}))
        with pytest.raises(weights.WeightsError, match=refused):
            weights.load("minilm", tmp_path / name)


def test_many_sentences_are_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = sentence_encoder()
    whole = ours.encode(SENTENCES, batch_size=4)
    monkeypatch.setattr("models.bert.TOKENISE_AT_ONCE", 3)
    assert torch.equal(ours.encode(SENTENCES, batch_size=4), whole)


def test_progress_wraps_the_batches() -> None:
    ours, _ = sentence_encoder()
    lengths: list[int] = []

    def progress(batches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lengths.extend(len(batch) for batch in batches)
        return batches

    silent = ours.encode(SENTENCES, batch_size=4)
    assert torch.equal(ours.encode(SENTENCES, batch_size=4, progress=progress), silent)
    assert lengths == [4, 4, 2]


def test_a_short_position_table_cuts_earlier() -> None:
    ours = SentenceEncoder(replace(TINY, max_position_embeddings=16), word_tokenizer()).eval()
    assert ours.encode([sentence(100)]).isfinite().all()
