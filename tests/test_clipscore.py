"""CLIPScore and RefCLIPScore by hand, and by the miniature CLIP."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import weights
from clipscore import PREFIX, Scorer, clip_score, ref_clip_score
from training.inputs import clip_texts

IMAGE = np.array([[2.0, 0], [2.0, 0], [2.0, 0]])
CAPTION = np.array([[3.0, 4], [-3.0, 4], [0.0, 1]])  # cosines .6, -.6, 0


def test_scores_by_hand():
    assert clip_score(IMAGE, CAPTION) == pytest.approx([1.5, 0, 0])
    assert clip_score(IMAGE, CAPTION, weight=1) == pytest.approx([0.6, 0, 0])
    # The better of two references has cosine .8 with the first caption: 2 · 1.5 · .8 / 2.3
    references = [np.array([[-1.0, 0], [0, 5]]), np.array([[0.0, 1]]), np.array([[0.0, 1]])]
    assert ref_clip_score(IMAGE, CAPTION, references) == pytest.approx([2.4 / 2.3, 0, 0])
    assert ref_clip_score(IMAGE, CAPTION, references, 1)[0] == pytest.approx(2 * 0.6 * 0.8 / 1.4)
    opposite = [np.array([[-3.0, -4]]), np.array([[3.0, -4]]), np.array([[0.0, -1]])]
    assert ref_clip_score(IMAGE, CAPTION, opposite).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def mini() -> Scorer:
    return Scorer("clip-mini")


def shown(n: int) -> tuple[list[Image.Image], list[str]]:
    pairs = data.read_pairs("mini/generated")
    return [pairs.image(i) for i in range(n)], pairs.prompts[:n]


def test_true_prompts_score_above_others(mini: Scorer):
    images, prompts = shown(8)
    true, other = (mini.scores(images, texts) for texts in (prompts, prompts[1:] + prompts[:1]))
    assert true["CLIPScore"].mean() > other["CLIPScore"].mean() + 0.5
    assert true["100 cos"] == pytest.approx(100 * true["cos"])
    assert true["CLIPScore"] == pytest.approx(2.5 * np.maximum(true["cos"], 0))


def test_images_captions_and_references(mini: Scorer):
    images, prompts = shown(3)
    references = [prompts[:1], prompts, prompts[1:]]
    found = mini.scores(images, prompts, references)
    # Each caption is among its references, so that the largest cosine is 1.
    assert found["RefCLIPScore"] == pytest.approx(2 * found["CLIPScore"] / (1 + found["CLIPScore"]), abs=1e-6)
    one = found["CLIPScore"] / 2.5
    assert found["100 RefCLIPScore, w = 1"] == pytest.approx(200 * one / (1 + one), abs=1e-4)
    ids = mini.tokenizer([PREFIX + prompts[0]])
    with torch.no_grad():
        expected = weights.load("clip-text", "clip-mini").pooled(ids)[0].numpy()
    assert mini.texts(prompts[:1])[0] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(data.DataError, match="as many captions"):
        mini.scores(images, prompts[:2])
    with pytest.raises(data.DataError, match="an image has no references"):
        mini.scores(images, prompts, [["a"], [], ["b"]])


def test_long_captions_differ_by_their_words(mini: Scorer):
    star, owl = mini.texts(["a crimson star over snow, " * 20, "two owls, " * 60])
    assert mini.tokenizer.truncated >= 2 and np.abs(star - owl).max() > 0.1


def test_a_clip_without_text_projection_is_refused():
    with pytest.raises(weights.WeightsError, match="sd-mini: its text half has no projection; give a whole CLIP"):
        Scorer("sd-mini")


def test_prompts_for_knn_are_clips_text_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    prompts = ["two owls", "a crimson star over snow", "two owls"]
    found = clip_texts("clip-mini", prompts, "cpu")
    with torch.no_grad():
        expected = weights.load("clip-text", "clip-mini").pooled(weights.load_tokenizer("clip-mini")(prompts))
    assert found.rows.shape == (2, 128)
    assert found[np.arange(3)] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.slow
def test_the_published_example():
    """The official repository's first example picture and captions need its files and ViT-B/32."""
    folder = weights.cache_dir() / "clipscore-example"
    if not folder.is_dir() or weights.fetch.missing(weights.registry.ENTRIES["clip-b-32"]):
        pytest.skip(f"needs clip-b-32, and images/, good_captions.json, bad_captions.json and refs.json of "
                    f"the official example in {folder}")
    import json

    read = {name: json.loads((folder / f"{name}.json").read_text())
            for name in ("good_captions", "bad_captions", "refs")}
    scorer = Scorer("clip-b-32")
    for name, plain, referenced in (("good_captions", 0.8585, 0.8450), ("bad_captions", 0.7153, 0.7253)):
        paths = {path.stem: path for path in (folder / "images").iterdir()}
        keys = list(read[name])
        scores = scorer.scores([Image.open(paths[k]) for k in keys], [read[name][k] for k in keys],
                               [read["refs"][k] for k in keys])
        assert scores["CLIPScore"].mean() == pytest.approx(plain, abs=2e-3)
        assert scores["RefCLIPScore"].mean() == pytest.approx(referenced, abs=2e-3)
