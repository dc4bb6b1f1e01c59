"""A bank of prompts: the exact nearest, and what is embedded when."""

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from files import DataError
from training import bank


def embedding(text: str) -> np.ndarray:
    row = np.random.default_rng(list(sha256(text.encode()).digest())).normal(size=384)
    return (row / np.linalg.norm(row)).astype(np.float32)


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch) -> list[str]:
    """The texts that have been embedded so far; the encoder is made up."""
    texts: list[str] = []

    def encode(sentences: list[str], progress=iter) -> torch.Tensor:
        for batch in progress([sentences]):
            texts.extend(batch)
        return torch.from_numpy(np.stack([embedding(text) for text in sentences]))

    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bank.weights, "load", lambda kind, device: SimpleNamespace(encode=encode))
    monkeypatch.setattr(bank.weights, "fingerprint", lambda kind: "0123456789abcdef")
    monkeypatch.setattr(bank, "CHUNK", 8)
    return texts


def written(path: Path, prompts: list[str]) -> Path:
    path.write_text("\n".join(prompts) + "\n")
    return path


def brute_force(prompts: list[str], query: np.ndarray, n: int) -> list[tuple[str, float]]:
    cosines = np.stack([embedding(prompt) for prompt in prompts]).astype(np.float64) @ query.astype(float)
    return [(prompts[i], cosines[i]) for i in np.argsort(-cosines, kind="stable")[:n]]


def test_the_nearest_are_those_of_brute_force_whatever_the_batch(tmp_path: Path, embedded: list[str]):
    prompts = [f"prompt {k}" for k in range(500)]
    opened = bank.open_bank(written(tmp_path / "bank.txt", prompts))
    queries = np.stack([embedding(f"query {k}") for k in range(7)])
    together = opened.nearest(queries, 9)
    for query, found in zip(queries, together, strict=True):
        expected = brute_force(prompts, query, 9)
        assert [text for text, _ in found] == [text for text, _ in expected]
        np.testing.assert_allclose([c for _, c in found], [c for _, c in expected], atol=1e-12)
    assert [opened.nearest(query[None], 9)[0] for query in queries] == together  # the same bits


def test_near_ties_are_ranked_beyond_the_rounding_of_float32():
    rng = np.random.default_rng(0)
    query = rng.normal(size=384).astype(np.float32)
    query /= np.linalg.norm(query)
    rows = np.repeat(query[None], 4000, axis=0) + rng.normal(size=(4000, 384)).astype(np.float32) * 1e-8
    texts = [str(k) for k in range(len(rows))]
    exact = (rows.astype(np.float64) * query).sum(axis=1)
    found = bank.bank_of(texts, rows).nearest(query[None], 5)[0]
    assert [text for text, _ in found] == [str(k) for k in np.lexsort((np.arange(4000), -exact))[:5]]


def test_a_bank_is_embedded_once_and_again_where_it_changed(tmp_path: Path, embedded: list[str]):
    prompts = [f"prompt {k}" for k in range(400)]
    path = written(tmp_path / "bank.txt", prompts)
    bank.open_bank(path)
    assert embedded == prompts
    embedded.clear()
    assert len(bank.open_bank(path).texts) == 400 and embedded == []

    changed = [*prompts[:150], "a new one", *prompts[150:]]
    found = bank.open_bank(written(path, changed)).nearest(embedding("a new one")[None], 2)[0]
    assert found == [(text, pytest.approx(c, abs=1e-12))
                     for text, c in brute_force(changed, embedding("a new one"), 2)]  # fmt: skip
    assert "a new one" in embedded and 0 < len(embedded) <= 4 * 8 + 1

    folder = next(tmp_path.glob("cache/bank-*/0123456789abcdef"))
    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-1])  # damaged
    embedded.clear()
    assert len(bank.open_bank(path).texts) == 401 and 0 < len(embedded) <= 4 * 8
    bank.open_bank(written(path, prompts[:3]))
    assert len(list(folder.iterdir())) == 1  # nothing of former prompts stays


def test_a_stopped_call_goes_on(tmp_path: Path, embedded: list[str], monkeypatch):
    prompts, writes = [f"prompt {k}" for k in range(200)], []
    write_array = bank.write_array

    def stopped(path: Path, rows: np.ndarray) -> None:
        writes.append(len(rows))
        if len(writes) == 5:
            raise KeyboardInterrupt
        write_array(path, rows)

    monkeypatch.setattr(bank, "write_array", stopped)
    path = written(tmp_path / "bank.txt", prompts)
    with pytest.raises(KeyboardInterrupt):
        bank.open_bank(path)
    embedded.clear()
    bank.open_bank(path)
    assert embedded == prompts[sum(writes[:4]) :]


def test_prompts_equal_but_for_case_and_spacing_count_once(tmp_path: Path, embedded: list[str], monkeypatch):
    monkeypatch.setattr(bank, "MAX_PROMPT", 9)  # characters; longer ones are left out
    path = written(tmp_path / "bank.txt", ["A  red cat", "", "a red CAT ", "ten of it.", "a dog"])
    assert list(bank.open_bank(path).texts) == ["A red cat", "a dog"]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "a cat", "x": 1}\n{"prompt": "a dog"}\nbroken\n'),
    ("a.csv", 'id,Prompt\n1,a cat\n2,"a dog"\n'),
    ("a.txt", "\ufeffa cat\r\na dog"),
])  # fmt: skip
def test_tables_and_lines(name: str, content: str, tmp_path: Path, embedded: list[str]):
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert list(bank.open_bank(tmp_path / name).texts) == ["a cat", "a dog"]


def test_embeddings_that_are_not_finite_are_refused():
    rows = np.array([[1, 0], [np.nan, 0]], np.float32)
    with pytest.raises(DataError, match="not finite; evaluate the run again"):
        bank.bank_of(["a", "b"], rows).nearest(np.array([[1.0, 0]]), 1)


def test_a_bank_of_one_prompt(tmp_path: Path, embedded: list[str]):
    opened = bank.open_bank(written(tmp_path / "bank.txt", ["a cat"]))
    assert opened.nearest(embedding("a cat")[None], 5) == [[("a cat", pytest.approx(1, abs=1e-6))]]


@pytest.mark.parametrize("content, message", [
    (b"\n \n", "holds no prompt"), (b"", "holds no prompt"), (b"caf\xe9\n", "save it as UTF-8 text"),
])  # fmt: skip
def test_other_files_are_refused_in_one_line(content, message, tmp_path: Path, embedded: list[str]):
    (tmp_path / "bank.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        bank.open_bank(tmp_path / "bank.txt")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        bank.open_bank(tmp_path / "none.txt")
