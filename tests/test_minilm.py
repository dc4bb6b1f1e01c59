"""The published all-MiniLM-L6-v2 beside sentence-transformers."""

from pathlib import Path

import pytest
import torch
from conftest import SHARED
from sentence_transformers import SentenceTransformer

import weights
from benchmarks.encode import sentence_transformer

PROMPTS = [
    "",
    "a",
    "portrait of a knight, highly detailed, trending on artstation, 8 k",
    "Ein Bär im Wald, café, 東京の夜, \U0001f600",
    "line\nbreak\tand   spaces",
    "word " * 10_000,
    "red, " * 100,
]


@pytest.fixture(scope="module")
def ours(minilm_folder: Path):
    return weights.load("minilm", minilm_folder)


@pytest.fixture(scope="module")
def theirs(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return sentence_transformer(minilm_folder, tmp_path_factory.mktemp("oracle"))


def difference(ours, theirs, prompts: list[str]) -> float:
    expected = torch.as_tensor(theirs.encode(prompts, batch_size=64, show_progress_bar=False))
    return (ours.encode(prompts) - expected).abs().max().item()


def test_awkward_texts(ours, theirs):
    assert difference(ours, theirs, PROMPTS) < 1e-6


@pytest.mark.skipif(not SHARED.exists(), reason="the real prompts are not here")
def test_real_prompts(ours, theirs):
    text = (SHARED / "prompts" / "diffusiondb_10k.txt").read_text(encoding="utf-8")
    assert difference(ours, theirs, text.splitlines()[::10]) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real prompts are not here")
def test_all_real_prompts(ours, theirs):
    text = (SHARED / "prompts" / "diffusiondb_10k.txt").read_text(encoding="utf-8")
    assert difference(ours, theirs, text.splitlines()) < 1e-6


def test_neither_the_order_nor_the_batch_matters(ours):
    together = ours.encode(PROMPTS, batch_size=64)
    alone = torch.cat([ours.encode([prompt], batch_size=1) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode(PROMPTS[::-1], batch_size=2), together.flip(0), atol=1e-6, rtol=0)


def test_rows_are_unit_length_float32(ours):
    rows = ours.encode(PROMPTS)
    assert rows.dtype == torch.float32 and rows.shape == (len(PROMPTS), 384)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(PROMPTS)))
