"""inversion.py: projections, gradients at them, texts encoded again, files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.nn import functional as F

import data
import generate
import inversion
import weights
from data import DataError
from models.clip import CONFIGS, VISION_CONFIGS, CLIPText, CLIPVision
from models.search import sampled

TOKENIZER = weights.load_tokenizer("sd-mini")


@pytest.fixture(scope="module")
def clip() -> inversion.Clip:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "projection_dim": 16}
    text = CLIPText(dataclasses.replace(CONFIGS["clip-mini"], **sizes)).requires_grad_(False)
    vision = CLIPVision(dataclasses.replace(VISION_CONFIGS["clip-mini"], **sizes)).requires_grad_(False)
    return inversion.Clip(text, vision, TOKENIZER, data.Preprocessing.square(64))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    pairs = data.read_pairs(ROOT / "mini" / "generated")
    for i in range(20):
        pairs.image(i).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(20)]


def images(paths: list[Path]) -> list:
    return [data.load_image(path) for path in paths]


@pytest.mark.parametrize("by", ["cosine", "l2"])
def test_slots_are_projected_to_the_nearest_row(clip: inversion.Clip, by: str):
    allowed = inversion.Candidates(clip.text, TOKENIZER, "all", by)
    slots = 3 * torch.randn(2, 3, 16)
    rows = clip.text.text_model.embeddings.token_embedding.weight
    for slot, number in zip(slots.flatten(0, 1), allowed.nearest(slots).flatten(), strict=True):
        distances = 1 - F.cosine_similarity(slot, rows) if by == "cosine" else (slot - rows).norm(dim=1)
        assert number == distances.argmin()


def test_slots_move_by_the_gradient_at_their_projection(clip: inversion.Clip):
    allowed = inversion.Candidates(clip.text, TOKENIZER, "all", "l2")
    slots, aim = 0.5 * torch.randn(2, 3, 16), torch.randn(16)
    options = inversion.settings("ph2p", steps=2, lr=0.3, keep="last")
    kept, _ = inversion.descend(slots, allowed, lambda q: ((q - aim) ** 2).sum(dim=(1, 2)), None, options)
    at_projection = slots - 0.3 * 2 * (allowed.rows[allowed.nearest(slots)] - aim)
    at_slots = slots - 0.3 * 2 * (slots - aim)
    assert torch.equal(kept, allowed.nearest(at_projection))
    assert not torch.equal(kept, allowed.nearest(at_slots))


def test_embeddings_are_pooled_like_the_ids_of_a_text(clip: inversion.Clip):
    ids = TOKENIZER(["a red fox", "the sea"])
    pooled = clip.text.pooled(ids)
    for row, expected in zip(ids, pooled, strict=True):
        tokens = row[1 : int((row == TOKENIZER.end).int().argmax())]
        slots = clip.text.text_model.embeddings.token_embedding(tokens)[None]
        assert torch.allclose(clip.slots(slots)[0], F.normalize(expected, dim=0), atol=1e-6)
    many = clip.texts(["a red fox", *["the sea"] * 256])
    assert torch.allclose(many[[0, -1]], F.normalize(pooled, dim=1), atol=1e-6) and len(many) == 257


def random_numbers(allowed: inversion.Candidates) -> Tensor:
    return torch.randint(len(allowed.words), (50, 16), generator=torch.Generator().manual_seed(0))


def encoded(texts: list[str]) -> list[list[int]]:
    return [TOKENIZER.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_surviving_tokens_come_back_from_their_text(clip: inversion.Clip):
    for choice, come_back in (("surviving", True), ("all", False)):
        allowed = inversion.Candidates(clip.text, TOKENIZER, choice)
        numbers = random_numbers(allowed)
        table = clip.text.text_model.embeddings.token_embedding.weight
        same = [
            len(ids) == 16 and torch.equal(table[ids], allowed.rows[row])
            for ids, row in zip(encoded(allowed.texts(numbers)), numbers, strict=True)
        ]
        assert all(same) if come_back else sum(same) < 25


def test_bytes_of_several_tokens_make_one_character(clip: inversion.Clip):
    allowed = inversion.Candidates(clip.text, TOKENIZER, "all")
    ids = encoded(["café"])
    assert len(ids[0]) > 2 and allowed.texts(torch.tensor(ids)) == ["café"]


def test_keys_are_written_as_in_the_code_of_ph2p(clip: inversion.Clip):
    allowed = inversion.Candidates(clip.text, TOKENIZER, "keys")
    vocabulary = TOKENIZER.tokenizer.get_vocab()
    table = clip.text.text_model.embeddings.token_embedding.weight
    numbers = torch.tensor([[vocabulary[key] for key in ("in", "on</w>", ".</w>", "<|endoftext|>", "Ã")]])
    assert allowed.texts(numbers) == ["in on  Ã"]
    assert torch.equal(allowed.rows[vocabulary["in"]], table[vocabulary["in</w>"]])


@pytest.mark.parametrize("keep", ["slots", "text"])
def test_the_cosine_is_that_of_the_printed_prompt(
    clip: inversion.Clip, pictures: list[Path], keep: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    options = inversion.settings("pez", steps=6, keep=keep, restarts=2)
    rows = inversion.inverter(options)(images(pictures[:3]))
    alone = inversion.inverter(options)(images(pictures[1:2]))
    assert alone[0]["prompt"] == rows[1]["prompt"]  # the other images change nothing
    for row, target in zip(rows, clip.images(images(pictures[:3])), strict=True):
        text = F.normalize(clip.text.pooled(TOKENIZER([row["prompt"]])), dim=1)[0]
        assert row["cosine"] == pytest.approx(float(text @ target), abs=2e-6)
    assert any(abs(row["cosine"] - row["slots_cosine"]) > 1e-3 for row in rows)  # tokens that do not survive
    options.keep, by = "last", "cosine" if keep == "text" else "slots_cosine"
    last = inversion.inverter(options)(images(pictures[:3]))
    gains = [row[by] - other[by] for row, other in zip(rows, last, strict=True)]
    assert min(gains) > -2e-6 and max(gains) > 1e-3


def test_swaps_only_improve_and_their_tokens_survive(
    clip: inversion.Clip, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    few, more = (
        inversion.inverter(inversion.settings("swaps", steps=steps, tries=4))(images(pictures[:2]))
        for steps in (1, 30)
    )
    for before, after in zip(few, more, strict=True):
        assert after["cosine"] > before["cosine"]
        assert after["cosine"] == pytest.approx(after["slots_cosine"], abs=2e-6)


def test_the_denoising_loss_of_each_image_is_its_own(pictures: list[Path]):
    pipeline, options = generate.load_pipeline("sd-mini"), inversion.settings("ph2p", draws=2, crop=1)
    batch = inversion.as_batch(images(pictures[:2]), data.Preprocessing.square(64), pipeline.text)
    slots = pipeline.text.text_model.embeddings.token_embedding(TOKENIZER(["a red fox", "the sea"])[:, 1:4])
    draws = [[torch.Generator().manual_seed(j) for j in range(i, 2)] for i in (0, 1)]
    both, second = (inversion.Denoising(pipeline, batch[i:], draws[i], options) for i in (0, 1))
    with torch.no_grad():
        assert torch.allclose(both.loss(slots)[1:], second.loss(slots[1:]), atol=1e-5)
    judged = both.judged(["a red fox", "the sea"], [0, 1])
    assert torch.allclose(judged[1:], second.judged(["the sea"], [0]), atol=1e-5)
    latents, t, noise = both.fixed[0]
    assert ((t >= 500) & (t <= 899)).all()
    alpha, states = pipeline.alphas[t][:, None, None, None], pipeline.states(["a red fox", "the sea"])
    with torch.no_grad():
        predicted = pipeline.unet(alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise, t, states)
        expected = F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        assert torch.allclose(both.error(states, latents, t, noise), expected, atol=1e-6)


def test_a_command_resumes_and_lists_unreadable_images(
    clip: inversion.Clip,
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    sizes, real = [], inversion.inverter

    def counted(*args):
        invert = real(*args)
        return lambda batch: sizes.append(len(batch)) or invert(batch)

    monkeypatch.setattr(inversion, "inverter", counted)
    (tmp_path / "prompts").write_text("a red fox\nthe sea\n")
    out, broken = tmp_path / "out.jsonl", tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    flags = ["--method", "nearest", "--prompts", str(tmp_path / "prompts"), "--out", str(out)]
    flags += ["--batch-size", "2"]
    paths = [str(path) for path in pictures[:4]]
    assert inversion.main([*paths[:3], *flags]) == 0
    first = out.read_text().splitlines()
    out.write_text("\n".join(first) + '\n{"image": "torn')
    assert inversion.main([*paths, str(broken), *flags]) == 2
    assert sizes == [2, 1, 1]
    lines = out.read_text().splitlines()
    assert lines[:3] == first and [json.loads(line)["image"] for line in lines] == paths
    captured = capsys.readouterr()
    assert captured.out.count("fox") + captured.out.count("sea") == 7
    assert f"skipped: {broken}" in captured.err and "1 of 5 images skipped" in captured.err
    assert inversion.main([paths[0], *flags, "--seed", "1"]) == 0  # other settings
    assert sizes == [2, 1, 1, 1]


def test_refusals(pictures: list[Path], capsys: pytest.CaptureFixture, tmp_path: Path):
    image, out = str(pictures[0]), str(tmp_path / "x.jsonl")
    assert inversion.main([image, "--method", "pez", "--clip", "sd-mini", "--out", out]) == 2
    error = capsys.readouterr().err
    assert "text_projection" in error and error.count("\n") == 1
    with pytest.raises(DataError, match="unknown"):
        inversion.settings("lerac")
    for flags, message in (
        (["--method", "swaps", "--lr", "1"], "--lr: swaps has no such option"),
        (["--method", "pez", "--keep", "drawing"], "--keep drawing"),
        (["--method", "nearest"], "--prompts FILE"),
        (["--method", "pez", "--optimiser", "lbfgs"], "--batch-size 1"),
        (["--method", "ph2p", "--timesteps", "9", "3"], "--timesteps"),
    ):
        with pytest.raises(SystemExit):
            inversion.main([image, *flags])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_pez_beats_a_hundred_random_prompts(pictures: list[Path]):
    clip, options = inversion.load_clip("clip-mini"), inversion.settings("pez", steps=300)
    targets = clip.images(images(pictures))
    allowed = inversion.Candidates(clip.text, clip.tokenizer, "all")
    numbers = torch.randint(len(allowed.words), (100, 16), generator=torch.Generator().manual_seed(1))
    random = targets @ clip.slots(allowed.rows[numbers]).T
    found = inversion.inverter(options)(images(pictures))
    won = [row["slots_cosine"] > float(best) for row, best in zip(found, random.amax(dim=1), strict=True)]
    assert sum(won) >= 19


# -- whole methods with few steps ----------------------------------------


DEFAULTS = {  # of PEZ's and PH2P's code, and ours for the controls
    "pez": dict(tokens=16, steps=3000, optimiser="adamw", lr=0.1, weight_decay=0.1, nearest_by="cosine",
                candidates="all", start="", restarts=1, keep="slots", keep_every=1),
    "ph2p": dict(tokens=15, steps=10_000, optimiser="sgd", lr=80.0, weight_decay=0.0, nearest_by="l2",
                 candidates="keys", start="A photo of bus of color .", keep="text", keep_every=20,
                 timesteps=[500, 899], crop=0.5, posterior="sample", draws=16, weights="sd-mini"),
    "swaps": dict(tokens=16, steps=600, candidates="surviving", restarts=1, tries=16),
    "best-of": dict(captions=16, top_p=0.9, max_length=77, captioner="blip-mini"),
    "nearest": dict(prompts="x"),
}  # fmt: skip


@pytest.mark.parametrize("method, expected", DEFAULTS.items())
def test_the_defaults_of_each_method(method: str, expected: dict):
    changes = {"prompts": "x"} if method == "nearest" else {}
    always = {"method": method, "seed": 0, "clip": "clip-mini"}
    assert vars(inversion.settings(method, **changes)) == always | expected


@pytest.mark.parametrize("keep", ["text", "drawing"])
def test_ph2p_states_the_error_of_the_prompt_that_it_keeps(
    keep: str, clip: inversion.Clip, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    sample = generate.Pipeline.sample
    quick = lambda self, texts, noise: sample(self, texts, noise, steps=1, guidance=1.0)  # noqa: E731
    monkeypatch.setattr(generate.Pipeline, "sample", quick)
    options = inversion.settings("ph2p", steps=2, draws=2, keep=keep, keep_every=1, start="a red fox")
    rows = inversion.inverter(options)(images(pictures[:2]))
    (alone,) = inversion.inverter(options)(images(pictures[1:2]))
    assert alone["prompt"] == rows[1]["prompt"] and alone["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)
    assert all(0 < row["loss"] < 2 and row["prompt"] for row in rows)


def test_ph2p_keeps_the_prompt_whose_drawing_is_nearest(
    clip: inversion.Clip, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    texts, seen, real, sample = [], [], clip.images, generate.Pipeline.sample

    def quick(self, some, noise):
        texts.extend(some)
        return sample(self, some, noise, steps=1, guidance=1.0)

    monkeypatch.setattr(generate.Pipeline, "sample", quick)
    monkeypatch.setattr(clip, "images", lambda some: seen.append(real(some)) or seen[-1], raising=False)
    options = inversion.settings("ph2p", steps=4, draws=1, keep="drawing", keep_every=1)
    (row,) = inversion.inverter(options)(images(pictures[:1]))
    target, *drawings = torch.cat(seen)
    cosines = torch.stack(drawings) @ target
    assert len(set(texts)) == len(cosines) > 1 and row["prompt"] == texts[cosines.argmax()]


def test_the_first_slots_are_a_text_and_end_marks(clip: inversion.Clip):
    allowed = inversion.Candidates(clip.text, TOKENIZER, "all")
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = inversion.settings("ph2p", tokens=6, start="a red fox")
    slots = inversion.start(clip.text, TOKENIZER, allowed, draws, options)
    ids = TOKENIZER(["a red fox", "a red fox"])[:, 1:7]
    assert TOKENIZER.end in ids[0, :-1]
    assert torch.equal(slots, clip.text.text_model.embeddings.token_embedding.weight[ids])


def test_the_best_of_some_captions_has_the_highest_cosine(
    clip: inversion.Clip, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inversion, "load_clip", lambda *_: clip)
    texts, real = [], clip.texts
    monkeypatch.setattr(clip, "texts", lambda some: texts.append(some) or real(some), raising=False)
    inverted = inversion.inverter(inversion.settings("best-of", captions=4, max_length=8))
    (row,), some = inverted(images(pictures[:1])), texts[0]
    (target,) = clip.images(images(pictures[:1]))
    cosines = real(some) @ target
    assert len(some) == 4 and len(set(some)) > 1
    assert row["prompt"] == some[cosines.argmax()]
    assert row["cosine"] == pytest.approx(float(cosines.max()), abs=2e-6)


@pytest.mark.parametrize("top_p, allowed", [(1.0, {0, 1, 2}), (0.6, {0, 1}), (0.1, {0})])
def test_sampled_tokens_are_drawn_by_their_probability(top_p: float, allowed: set):
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4000, 1)
    step = sampled(lambda new, past: (logits, [7]), torch.Generator().manual_seed(0), top_p)
    scores, past = step(None, None)
    shares = scores.argmax(dim=1).bincount(minlength=3) / 4000
    kept = torch.tensor([p if i in allowed else 0.0 for i, p in enumerate((0.5, 0.3, 0.2))])
    assert past == [7]
    torch.testing.assert_close(shares, kept / kept.sum(), atol=0.03, rtol=0)
