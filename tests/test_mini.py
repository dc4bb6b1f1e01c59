"""The miniatures that the repository ships, and how they are trained."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

import data
import generate
import weights
from archives import Zips
from columns import PairsBuilder
from command import run_command
from mini import (
    autoencoder,
    contrastive,
    diffusion,
    generated,
    judge,
    loop,
    naming,
    pretrain,
    scenes,
)
from mini.loop import Recipe, World
from models import clip
from tests.parity import randomise

FOLDER = pretrain.FOLDER


def world_of(n: int, seed: int = 77) -> World:
    """n truthful scenes."""
    drawn = [scenes.candidate(seed, i, truthful=True) for i in range(n)]
    images = np.stack([np.asarray(scenes.render(scene)).transpose(2, 0, 1) for scene in drawn])
    return World(images, [scene.prompt for scene in drawn], [scene.said for scene in drawn])


@pytest.fixture(scope="module")
def world() -> World:
    return world_of(60)


def test_the_training_world_is_what_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    build = partial(scenes.build, per_part=30)
    monkeypatch.setattr(scenes, "build", build)
    monkeypatch.setattr(loop, "PER_PART", 30)
    world = loop.training_world(1)
    chosen = scenes.kept_indices(30, scenes.PRETRAIN_SEED)
    for image, prompt, view, index in zip(world.images, world.prompts, world.views, chosen, strict=True):
        scene = scenes.candidate(scenes.PRETRAIN_SEED, index, truthful=True)
        assert (prompt, view) == (scene.prompt, scene.drawn) and scene.undrawn == ()
        assert np.array_equal(image, np.asarray(scenes.render(scene)).transpose(2, 0, 1))


def test_the_shipped_autoencoder_is_as_good_as_its_card_says(world: World):
    card = json.loads((FOLDER / "vae" / "card.json").read_text())
    quality = autoencoder.vae_quality(weights.load("vae", "sd-mini"), world.images)
    assert quality["psnr_db"] > card["psnr_db"] - 1
    assert quality["latent_deviation"] == pytest.approx(card["latent_deviation"], rel=0.1)
    scale = weights.config("vae", "sd-mini").scale_factor
    assert scale == pytest.approx(1 / card["latent_deviation"], rel=1e-4)


def test_diffusers_reads_the_shipped_autoencoder():
    theirs = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float64).eval()
    ours = weights.load("vae", "sd-mini", dtype=torch.float64)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = ours.encode(images)
        torch.testing.assert_close(latents, theirs.encode(images).latent_dist.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-10, rtol=0)
    assert theirs.config.scaling_factor == ours.config.scale_factor


def test_transformers_reads_the_shipped_tokenizer(world: World):
    theirs = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    prompts = [*world.prompts, "", "zebra's XYLOPHONE, 123!", "snow " * 100]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert weights.load_tokenizer("sd-mini")(prompts).tolist() == expected


def test_the_tokenizer_and_the_vocabulary_learn_the_words_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pretrain, "FOLDER", tmp_path)
    monkeypatch.setattr(pretrain.captioner, "BLIP_MINI", tmp_path / "blip")
    monkeypatch.setattr(scenes, "kept_indices", lambda n, seed: range(n))  # not cleaned: faster
    learned = pretrain.training_prompts(1)
    monkeypatch.setattr(pretrain, "training_prompts", lambda parts: learned)
    for part in ("tokenizer", "vocabulary"):
        monkeypatch.setattr("sys.argv", ["pretrain", part])
        pretrain.main()
    assert len(learned) == 1000
    assert {"star", "snow"} <= set((tmp_path / "blip" / "vocab.txt").read_text().split())
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = ["a star, in the snow", *learned[:9]]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert weights.load_tokenizer(tmp_path)(prompts).tolist() == expected
    assert theirs.tokenize(prompts[0]) == [f"{word}</w>" for word in "a star , in the snow".split()]
    card = json.loads((tmp_path / "tokenizer" / "card.json").read_text())
    assert (card["tokens"], card["merges"]) == (1024, 510)  # bytes, bytes that end a word, two marks


# ------------------------------------------------------------------------------------------------------------
# the loop
# ------------------------------------------------------------------------------------------------------------

QUICK = Recipe(steps=5, batch_size=4, lr=1e-2, warmup=2, weight_decay=0.1)


def noisy(model: nn.Module, calls: int = 100) -> Callable[[Tensor, torch.Generator], dict[str, Tensor]]:
    """A loss with draws of its own that stops the training, as Ctrl-C does, after so many calls."""
    count = iter(range(calls))

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if next(count, None) is None:
            raise KeyboardInterrupt
        x = rows[:, None].float() / 10 + torch.randn(len(rows), 1, generator=generator)
        return {"loss": model(x).square().mean()}

    return loss


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def test_stopped_and_resumed_training_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    whole, stopped, resumed = small_model(), small_model(), small_model()
    loop.MiniTrainer("whole", whole, noisy(whole), 20, QUICK, seed=1).fit()
    with pytest.raises(KeyboardInterrupt):
        loop.MiniTrainer("other", stopped, noisy(stopped, 3), 20, QUICK, seed=1).fit()
    loop.MiniTrainer("other", resumed, noisy(resumed), 20, QUICK, seed=1).fit()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "pretrain-other/log.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]
    loop.remove_checkpoint("other")
    assert not (tmp_path / "pretrain-other").exists()
    loop.remove_checkpoint("other")  # nothing is left to remove


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    loop.MiniTrainer("part", model := small_model(), noisy(model), 20, QUICK, seed=1).fit()
    with pytest.raises(data.DataError, match="other pairs or options"):
        other = replace(QUICK, lr=1e-3)
        loop.MiniTrainer("part", model := small_model(), noisy(model), 20, other, seed=1).fit()


def test_the_averaged_weights_are_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A parameter that the optimizer moves by 1 at every step, beside its moving average by hand."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))

    def loss(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        seen.append(model[0].item())
        return {"loss": -model[0]}

    for name, cap in (("part", 0.999), ("warm", 0.2)):  # .2 is reached at the third step
        monkeypatch.setattr(loop, "AVERAGE_DECAY", cap)
        model, seen = nn.ParameterList([torch.zeros(())]), []
        loop.MiniTrainer(name, model, loss, 20, Recipe(steps=30, batch_size=1, lr=1.0), seed=0).fit()
        last = load_file(tmp_path / f"pretrain-{name}" / "last" / "step-00000030.safetensors")["model.0"]
        average = 0.0
        for step, value in enumerate([*seen[1:], float(last)], start=1):
            average += (value - average) * (1 - min(cap, step / (step + 9)))
        assert model[0].item() == pytest.approx(average, rel=1e-5)


def test_a_step_decays_weights_and_clips_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    recipe = Recipe(steps=1, batch_size=1, lr=0.1, weight_decay=0.5)
    model = nn.ParameterList([torch.ones(())])
    loop.MiniTrainer("still", model, lambda rows, generator: {"loss": 0 * model[0]}, 20, recipe, seed=0).fit()
    kept = load_file(tmp_path / "pretrain-still" / "last" / "step-00000001.safetensors")
    assert kept["model.0"].item() == pytest.approx(1 - 0.1 * 0.5)
    loop.MiniTrainer("steep", model, lambda *_: {"loss": -50 * model[0]}, 20, recipe, seed=0).fit()
    kept = load_file(tmp_path / "pretrain-steep" / "last" / "step-00000001.safetensors")
    assert kept["optimizer.exp_avg.0"].item() == pytest.approx(-0.1)  # 1 - beta_1 of a gradient of norm 1


@pytest.mark.parametrize("calls", [100, 3])
def test_the_minutes_are_those_of_all_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int):
    """A minute goes by between two looks at the clock: at the start, and at each checkpoint."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=count(0, 60).__next__))
    if calls == 3:
        model = small_model()
        with pytest.raises(KeyboardInterrupt):
            loop.MiniTrainer("part", model, noisy(model, calls), 20, QUICK, seed=1).fit()
    model = small_model()
    assert loop.MiniTrainer("part", model, noisy(model), 20, QUICK, seed=1).fit() == 3


def test_the_rate_rises_and_falls():
    for warmup in (10, 0):
        rates = [Recipe(steps=100, batch_size=1, lr=2.0, warmup=warmup).rate(step) for step in range(100)]
        rising = [min(1, (step + 1) / 10) if warmup else 1 for step in range(100)]
        assert rates == pytest.approx([x * (1 + np.cos(np.pi * i / 100)) for i, x in enumerate(rising)])


# ------------------------------------------------------------------------------------------------------------
# each part: trained for two steps, written, and read by ours and by the oracle
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Trains a part and returns the folder that stands for mini/."""
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path / "cache"))
    for module in (autoencoder, contrastive, diffusion, naming, pretrain):
        monkeypatch.setattr(module, "HELD_OUT", 20)
    monkeypatch.setattr(pretrain, "MINI", tmp_path / "mini")
    monkeypatch.setattr(pretrain, "training_world", lambda parts: world)

    def train(part: str) -> Path:
        pretrain.train_part(part, replace(pretrain.PARTS[part].recipe, steps=2, batch_size=6), 1, 0)
        assert not (tmp_path / "cache" / f"pretrain-{part}").exists()
        card = json.loads((tmp_path / "mini" / pretrain.PARTS[part].card / "card.json").read_text())
        assert {"command", "seed", "steps", "minutes", "data", "date"} < card.keys() and card["steps"] == 2
        return tmp_path / "mini"

    return train


@pytest.mark.parametrize("name", sorted(pretrain.PARTS.keys() - {"probe-vit"}))
def test_the_shipped_parts_were_trained_by_the_recipes_that_a_user_repeats(name: str):
    part = pretrain.PARTS[name]
    card = json.loads((pretrain.MINI / part.card / "card.json").read_text())
    card = card["language_model"] if name == "opt" else card
    of = part.recipe
    settings = f"--steps {of.steps} --batch-size {of.batch_size} --lr {of.lr:g} --seed 0"
    assert card["command"] == f"python -m mini.pretrain {name} --parts 48 {settings}"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_autoencoder_is_written_for_diffusers(trained: Callable[[str], Path]):
    folder = trained("vae") / "sd-mini"
    theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float64).eval()
    ours = weights.load("vae", folder, dtype=torch.float64)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        close(ours.encode(images), theirs.encode(images).latent_dist.mean)
    assert ours.config.scale_factor == theirs.config.scaling_factor != 1


def test_the_unet_is_written_for_diffusers(trained: Callable[[str], Path]):
    trained("vae")
    folder = trained("unet") / "sd-mini"
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float64).eval()
    ours = weights.load("unet", folder, dtype=torch.float64)
    draw = partial(torch.randn, dtype=torch.float64)
    given = draw(2, 4, 8, 8), torch.tensor([1, 981]), draw(2, 77, 128)
    with torch.no_grad():
        close(ours(*given), theirs(*given).sample)
    assert (folder / "scheduler" / "scheduler_config.json").exists()


def test_clip_is_written_for_transformers(trained: Callable[[str], Path], world: World):
    folder = trained("clip")
    options = {"torch_dtype": torch.float64}
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "clip-mini", **options).eval()
    text = CLIPTextModel.from_pretrained(folder / "sd-mini" / "text_encoder", **options).eval()
    images, ids = torch.rand(2, 3, 64, 64, dtype=torch.float64), weights.load_tokenizer("sd-mini")(PROMPTS)
    with torch.no_grad():
        ours = weights.load("clip-vision", folder / "clip-mini", dtype=torch.float64)
        close(ours(images), vision(images).image_embeds)
        ours = weights.load("clip-text", folder / "sd-mini", dtype=torch.float64)
        close(ours(ids), text(ids).last_hidden_state)
    how = weights.preprocessing("clip-vision", folder / "clip-mini")
    assert how["mean"] == contrastive.CLIP_MEAN and how["size"] == (64, 64)


PROMPTS = ["a crimson star over snow", "two owls"]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("vit", "vit_base_patch16_224"), ("swin", "swin_tiny_patch4_window7_224")],
)
def test_vit_and_swin_are_written_for_timm(trained: Callable[[str], Path], name: str, architecture: str):
    folder = trained(name) / f"{name}-mini"
    ours = weights.load(name, folder, dtype=torch.float64)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == architecture
    theirs = timm.create_model(architecture, pretrained=False, num_classes=0, **config["model_args"])
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        close(ours(images), theirs.double().eval()(images))
    how = weights.preprocessing(name, folder)
    assert (how["mean"], how["std"]) == ((0.5,) * 3, (0.5,) * 3) and how["size"] == (64, 64)
    square = data.Preprocessing.square(64)
    image = scenes.render(scenes.candidate(1, 1))
    assert torch.equal(data.image_tensor(image, data.Preprocessing(**how)), data.image_tensor(image, square))


@pytest.mark.parametrize("name", naming.PROBES)
def test_a_probe_is_written_and_read(trained: Callable[[str], Path], world: World, name: str):
    folder = trained(name)
    probabilities = naming.name_pictures(naming.load_probe(folder, name), world.images[:3])
    assert probabilities.shape == (3, len(naming.LABELS)) and probabilities.isfinite().all()
    card = json.loads((folder / name / "card.json").read_text())
    assert card["found"].keys() == {"drawn", "reconstructed"}


# ------------------------------------------------------------------------------------------------------------
# labels
# ------------------------------------------------------------------------------------------------------------


def test_labels_are_what_the_picture_shows():
    owl, car = scenes.Thing("owl"), scenes.Thing("car", "blue", "wood")
    view = scenes.View((owl, car), relation="left", place="snow")
    both = {("subject", "owl"), ("subject", "car"), ("colour", "blue"), ("material", "wood")}
    assert set(naming.named_labels(view)) == both | {("relation", "left"), ("place", "snow")}
    own_colour = {("colour", "brown")}
    assert set(naming.drawn_labels(view)) == set(naming.named_labels(view)) | own_colour
    row = naming.targets([view])[0]
    assert {naming.LABELS[i] for i in row.nonzero().flatten().tolist()} == set(naming.drawn_labels(view))
    assert naming.named_labels(scenes.View((owl,), count=3)) == [("count", 3), ("subject", "owl")]


def test_what_is_said_is_a_label_for_each_word():
    for i in range(60):
        scene = scenes.candidate(5, i)
        for (slot, key), word in zip(naming.named_labels(scene.said), scene.words, strict=True):
            words = [known for _, known in scenes.words_of(naming.TABLES[slot], key)]
            plurals = [scenes.PLURALS.get(known, known + "s") for known in words]
            assert word in words + plurals * (slot == "subject"), (word, words)


def test_realised_is_the_likeliest_of_its_kind_or_above_one_half():
    view = scenes.View((scenes.Thing("owl", "red"), scenes.Thing("car")), place="snow", light="rain")
    p = torch.zeros(len(naming.LABELS))
    levels = {
        ("subject", "owl"): 0.4, ("subject", "cat"): 0.3, ("subject", "car"): 0.2,
        ("colour", "red"): 0.1, ("place", "snow"): 0.3, ("light", "rain"): 0.4,
    }  # fmt: skip
    for label, level in levels.items():
        p[naming.POSITION[label]] = level
    found = naming.shown_labels(p, view)
    assert found == {
        ("subject", "owl"): True, ("subject", "car"): False,  # two things, and it is the third likeliest
        ("colour", "red"): True, ("place", "snow"): True, ("light", "rain"): False,
    }  # fmt: skip
    p[naming.POSITION["place", "sea"]] = 0.35
    assert not naming.shown_labels(p, view)["place", "snow"]


def test_the_contrastive_loss_pairs_the_rows():
    """Two pairs by hand: each row's own partner against the other's, both ways."""
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    s = 2.0
    logits = s * np.array([[0.8, 0.0], [0.96, 0.8]])
    rows = np.log(np.exp(logits).sum(axis=1)) - logits.diagonal()
    columns = np.log(np.exp(logits).sum(axis=0)) - logits.diagonal()
    expected = (rows.mean() + columns.mean()) / 2
    loss = contrastive.contrastive_loss(images, texts, torch.tensor(s).log())
    assert float(loss) == pytest.approx(expected)


def test_the_two_towers_learn_to_pair(world: World):
    """Gradients reach every parameter of both towers, the projection and the temperature."""
    model = contrastive.CLIP(clip.CONFIGS["sd-mini"], clip.VISION_CONFIGS["clip-mini"])
    randomise(model)
    ids = weights.load_tokenizer("sd-mini")(world.prompts[:4])
    images = model.embed_images(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    texts = model.embed_texts(ids, torch.full((4,), 9))
    contrastive.contrastive_loss(images, texts, model.logit_scale).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# ------------------------------------------------------------------------------------------------------------
# the judge
# ------------------------------------------------------------------------------------------------------------


def test_new_scenes_are_truthful_and_have_not_been_seen(monkeypatch: pytest.MonkeyPatch):
    first = judge.new_scenes(3, 2)
    assert all(len(scene.said.things) == 2 and not scene.undrawn for scene in first)
    monkeypatch.setattr(judge.drawbench, "training_prompts", lambda: frozenset({first[0].prompt}))
    assert judge.new_scenes(2, 2) == first[1:]


def test_several_processes_draw_what_one_draws(monkeypatch):
    chosen = [scenes.candidate(5, index) for index in range(100)]
    drawn = {}
    for cores in (1, 2):
        monkeypatch.setattr(scenes.os, "cpu_count", lambda cores=cores: cores)
        drawn[cores] = judge.drawings(chosen)
    assert drawn[2].shape == (100, 3, 64, 64) and np.array_equal(drawn[1], drawn[2])
    assert drawn[1].flags.c_contiguous and drawn[2].flags.c_contiguous
    assert np.array_equal(drawn[2][7].transpose(1, 2, 0), np.asarray(scenes.render(chosen[7])))


def test_the_judge_counts_what_the_probe_finds(world: World):
    torch.manual_seed(0)
    probe = naming.Namer(naming.swin.Swin(naming.PROBE)).eval()
    chosen = judge.new_scenes(8, 1)
    images = judge.drawings(chosen)
    found = judge.shares(probe, images, chosen)
    rows = naming.name_pictures(probe, images)
    places = [
        naming.shown_labels(row, scene.said)["place", scene.said.place]
        for row, scene in zip(rows, chosen, strict=True)
        if scene.said.place
    ]
    assert found["place"]["said"] == len(places) and found["place"]["found"] == np.mean(places)


def test_wilson_s_interval_is_that_of_scipy():
    for hits, n in ((0, 10), (7, 10), (431, 500)):
        theirs = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert judge.wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_the_judge_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    torch.manual_seed(0)
    probe = naming.Namer(naming.swin.Swin(naming.PROBE)).eval()
    monkeypatch.setattr(naming, "load_probe", lambda folder: probe)
    monkeypatch.setattr("sys.argv", ["judge", "--n", "3", "--steps", "2", "--results", str(tmp_path)])
    judge.main()
    result = json.loads((tmp_path / "generated.json").read_text())
    assert result["shares"].keys() == {"one subject", "two subjects"}
    assert result["shares"]["two subjects"]["generated"]["subject"]["said"] == 6
    assert "| two subjects | said | generated |" in (tmp_path / "generated.md").read_text()
    monkeypatch.setattr("sys.argv", ["judge", "--steps", "1", "--sheet", str(tmp_path / "sheet.png")])
    judge.main()
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------------------
# the generated pairs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_probe(monkeypatch: pytest.MonkeyPatch) -> naming.Namer:
    torch.manual_seed(0)
    probe = naming.Namer(naming.swin.Swin(naming.PROBE)).eval()
    monkeypatch.setattr(naming, "load_probe", lambda folder: probe)
    return probe


def test_generated_pairs_are_read_and_say_how_they_were_made(
    tmp_path: Path, any_probe: naming.Namer
):
    images = generated.generate_parts(tmp_path, parts=2, per_part=4, steps=2)
    pairs = data.read_pairs(images)
    chosen = [scenes.candidate(0, index) for index in scenes.kept_indices(8, 0)]
    assert pairs.prompts == [scene.prompt for scene in chosen]
    pipeline = generate.load_pipeline("sd-mini")
    for i, (scene, meta) in enumerate(zip(chosen, pairs.meta, strict=True)):
        assert (meta["se"], meta["c"], meta["st"], meta["sa"]) == (scene.seed, 7.5, 2, "ddim")
        drawn = pipeline.sample([scene.prompt], pipeline.noise([scene.seed], (64, 64)), "", 2, 7.5)
        levels = np.asarray(pairs.image(i)).astype(int) - pipeline.decode(drawn)[0].numpy()
        assert np.abs(levels).max() <= 1  # float32, in other batches
        row = naming.name_pictures(any_probe, np.asarray(pairs.image(i)).transpose(2, 0, 1)[None].copy())[0]
        found = naming.shown_labels(row, scene.said).values()
        assert len(meta["undrawn"]) == len(found) - sum(found)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    (images / "part-000002.zip").unlink()
    generated.generate_parts(tmp_path, parts=2, per_part=4, steps=2)
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


@pytest.mark.parametrize("n, shown", [(3, 3), (64, 64), (70, 64)])
def test_a_sheet_shows_the_first_64_pairs_with_their_unread_words(n: int, shown: int, tmp_path, monkeypatch):
    picture, sheets = scenes.Image.new("RGB", (64, 64)), []
    meta = [{"undrawn": ["red", "owl"]}, *({} for _ in range(n - 1))]
    builder = PairsBuilder()
    for i in range(n):
        builder.add(tmp_path, f"p{i}", f"p{i}", meta[i])
    columns, facts = builder.columns()
    pairs = data.Pairs(columns, facts["words"], Zips([tmp_path]), [])
    monkeypatch.setattr(data.Pairs, "image", lambda self, i: picture)
    monkeypatch.setattr(generated, "read_pairs", lambda folder: pairs)
    monkeypatch.setattr(scenes, "contact_sheet", lambda pictures: sheets.append(pictures) or picture)
    monkeypatch.setattr("sys.argv", ["generated", "--sheet", str(tmp_path / "sheet.png")])
    generated.main()
    assert [text for _, text in sheets[0]] == ["p0 [red, owl]", *(f"p{i}" for i in range(1, shown))]
    assert (tmp_path / "sheet.png").exists()


def test_the_shipped_pairs_are_those_of_their_card():
    card = json.loads((generated.FOLDER / "card.json").read_text())
    files = sorted((generated.FOLDER / "images").iterdir())
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == card["sha256"]
    assert generated.version() == card["weights"], "the miniature was trained anew; draw the pairs again"
    pairs = data.read_pairs(generated.FOLDER)
    chosen = generated.chosen_scenes(8000)
    assert pairs.prompts == [scene.prompt for scene in chosen]
    entry = {"c": generated.GUIDANCE, "st": generated.STEPS, "sa": generated.SAMPLER}
    assert all(meta.items() >= entry.items() and meta["se"] == scene.seed
               for meta, scene in zip(pairs.meta, chosen, strict=True))
    some = [3, 4242, 7999]
    again = generate.load_pipeline("sd-mini").draw(
        [pairs.prompts[i] for i in some], [chosen[i].seed for i in some], (64, 64),
        steps=generated.STEPS, guidance=generated.GUIDANCE,
    )
    for i, pixels in zip(some, again.numpy(), strict=True):
        assert np.abs(np.asarray(pairs.image(i)).astype(int) - pixels).mean() < 1


# ------------------------------------------------------------------------------------------------------------
# bad input
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "main, flags, said",
    [
        (generated.main, ["--sheet", "sheet.png", "nowhere"], "error: nowhere: no such file or folder"),
        (generated.main, ["--parts", "0"], "--parts: 0: must be a whole number from 1"),
        (judge.main, ["--steps", "1000"], "--steps: 1000: must be below 1000"),
        (pretrain.main, ["vae", "--batch-size", "many"], "--batch-size: many: must be a whole number"),
        (judge.main, ["--guidance", "nan"], "--guidance: nan: must be from"),
        (pretrain.main, ["vit", "--lr", "nan"], "--lr: nan: must be from"),
        (pretrain.main, ["vit", "--seed", "-1"], "--seed: -1: must be from 0"),
        (scenes.main, ["--n", "1", "--sheet", "sheet.png", "--seed", "-1"], "--seed: -1: must be from 0"),
        (scenes.main, ["--n", "1", "--sheet", "nowhere/sheet.png"], "nowhere/sheet.png"),
    ],
)
def test_bad_input_is_one_line(
    main: Callable, flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["command", *flags])
    try:
        status = run_command(main)
    except SystemExit as stop:  # by argparse
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_recipe_is_refused_in_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrain, "training_world", lambda parts: world)
    trainer = loop.MiniTrainer("vit", small_model(), lambda *_: {}, 20, QUICK, seed=1)
    trainer.checkpoint.save({"step": 0, "seconds": 0, "data": "of another recipe"}, {"x": torch.zeros(1)})
    monkeypatch.setattr("sys.argv", ["pretrain", "vit"])
    status = run_command(pretrain.main)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert status == 2 and "pretrain-vit: was trained on other pairs or options" in line


def test_ctrl_c_says_that_the_same_command_goes_on(capsys):
    def stopped() -> None:
        raise KeyboardInterrupt

    assert run_command(stopped, "the same command continues") == 130
    assert capsys.readouterr().err == "the same command continues\n"
