"""Table swap: changes of the encoder half, its trainings, judging."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import entries

import generate
import weights
from mini import scenes
from models.unet import UNet, UNetConfig, UNetEncoder
from tables import swap
from tables.runs import SOURCES, Plan
from training.config import TrainConfig, resolve
from training.inputs import Distinct, Prepared

TINY = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=(1, 1),
    attention_levels=(0,), num_heads=2, num_head_channels=None, context_dim=8,
    use_linear_in_transformer=False,
)  # fmt: skip
N = 20
PLAN = Plan("mini", SOURCES["mini"], (0,), Path("runs"), 1, "cpu", {})
BOTH = swap.Arm("noisy reading + noise", reading=True, noise=True, drawn=True, lr=1e-3)


def unet(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(TINY)


def encoder_half(model: UNet) -> dict[str, torch.Tensor]:
    names = swap.encoder_names(model)
    return {name: value for name, value in model.state_dict().items() if name in names}


def decoder_half(model: UNet) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name not in encoder_half(model)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_no_and_all_of_a_change_are_the_two_unets_bit_for_bit():
    original, trained = unet(0), unet(1)
    encoder = UNetEncoder(TINY)
    encoder.load_state_dict(encoder_half(trained))
    whole = generate.swapped(original, encoder)
    assert len(encoder_half(original)) + len(decoder_half(original)) == len(original.state_dict())
    assert not same(encoder_half(original), encoder_half(whole))
    assert same(swap.changed(original, trained, swap.ORIGINAL.share).state_dict(), original.state_dict())
    assert same(swap.changed(original, trained, 1.0).state_dict(), whole.state_dict())
    trained.load_state_dict({name: 3 * value for name, value in original.state_dict().items()})
    assert swap.relative_change(original, trained) == pytest.approx(2)
    quarter = encoder_half(swap.changed(original, trained, 0.25))
    for name, value in encoder_half(original).items():
        torch.testing.assert_close(quarter[name], 0.75 * value + 0.25 * trained.state_dict()[name])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_random_change_has_the_size_of_the_trained_one_in_each_tensor(share: float):
    original, trained = unet(0), unet(1)
    random = swap.changed(original, trained, share, seed=3)
    assert same(decoder_half(random), decoder_half(original))
    for name, value in encoder_half(original).items():
        change, trained_change = random.state_dict()[name] - value, trained.state_dict()[name] - value
        torch.testing.assert_close(change.norm(), share * trained_change.norm(), rtol=1e-4, atol=1e-6)
        if trained_change.norm() > 0:
            assert not torch.allclose(change, share * trained_change, rtol=0.1)
    assert same(random.state_dict(), swap.changed(original, trained, share, seed=3).state_dict())
    assert not same(*(swap.changed(original, trained, share, seed).state_dict() for seed in (0, 1)))
    relative = swap.relative_change(original, random)
    assert relative == pytest.approx(share * swap.relative_change(original, trained), rel=1e-4)


@pytest.fixture
def trainer_in(tmp_path: Path):
    """A function (folder, arm) -> the trainer of a tiny U-Net, on random pairs."""
    rng = np.random.default_rng(0)

    def rows(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    each = np.arange(N)
    splits = {"train": each[:12], "val": each[12:16], "test": each[16:]}
    targets = rows(N, 384)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    prompts = [f"a {'red' if i % 2 else 'green'} star over snow" for i in each]
    inputs = rows(N, 4, 4, 4), Distinct(rows(N, 5, 8), each)
    pairs = SimpleNamespace(prompts=prompts)
    prepared = Prepared(pairs, splits, Distinct(targets, each), inputs, None, "these pairs")
    states = Distinct(rows(N + 1, 5, 8), np.arange(N + 1))
    config = resolve(TrainConfig(backbone="unet", weights="sd-mini", epochs=2, batch_size=4))

    def made(name: str, arm: swap.Arm = BOTH) -> swap.EncoderTrainer:
        start = unet(0)
        torch.seed()  # the trainer sets its own
        return swap.EncoderTrainer(tmp_path / name, start, arm, config, prepared, states, "cpu")

    return made


@pytest.mark.parametrize("drawn", [False, True])
def test_the_losses_of_an_untouched_encoder_by_hand(trainer_in, drawn: bool):
    trainer, batch = trainer_in("run", swap.Arm("both", True, True, drawn, 1e-3)), np.arange(12)
    generator = trainer.random()
    clean, captions = (torch.from_numpy(of[batch]) for of in trainer.prepared.inputs)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (12,), generator=generator)
    empty = torch.rand(12, generator=generator) < 0.1
    assert 0 < empty.sum() < 12
    alpha = generate.alphas_bar()[t].view(12, 1, 1, 1)
    context = torch.from_numpy(trainer.prompts.rows[np.where(empty, N, batch)])
    latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    prediction = trainer.model(latents if drawn else clean, captions, t if drawn else None)
    target = torch.from_numpy(trainer.prepared.targets[batch])
    cosine = 1 - F.cosine_similarity(prediction.embedding, target).mean()
    words = F.binary_cross_entropy_with_logits(prediction.logits, trainer.words[batch])
    expected = {"reading": cosine + 0.1 * words, "noise": F.mse_loss(unet(0)(latents, t, context), noise)}
    expected = {name: float(of.detach()) for name, of in expected.items()}
    found = {name: float(of.detach()) for name, of in trainer.loss(batch).items()}
    assert found == pytest.approx({"loss": sum(expected.values())} | expected, rel=1e-5)


def test_only_the_encoder_half_is_trained(trainer_in):
    for name, arm in (
        ("both", BOTH),
        ("reading", swap.Arm("reading", True, False, False, 1e-3)),
        ("noise", swap.Arm("noise", False, True, False, 1e-4)),
    ):
        trainer = trainer_in(name, arm)
        trainer.fit()
        assert same(decoder_half(trainer.unet), decoder_half(unet(0)))
        assert not same(encoder_half(trainer.unet), encoder_half(unet(0)))
        rates = [arm.lr * group.get("scale", 1) for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([arm.lr, trainer.config.head_lr][: 1 + arm.reading])
        (first, *_, last) = [entry["loss"] for entry in entries(trainer.folder)]
        assert trainer.step == 6 and last != first


def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_stopped(trainer_in, monkeypatch):
    whole = trainer_in("whole")
    whole.fit()
    stopped, step = trainer_in("stopped"), swap.EncoderTrainer.train_step

    def stop_after_two(self: swap.EncoderTrainer, batch: np.ndarray) -> dict[str, float]:
        self.stopping = self.step == 1
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(swap.EncoderTrainer, "train_step", stop_after_two)
        stopped.fit()
    assert stopped.step == 2
    resumed = trainer_in("stopped")
    resumed.fit()
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert [e["loss"] for e in entries(resumed.folder)] == [e["loss"] for e in entries(whole.folder)]
    again = trainer_in("whole")  # finished: loaded, not trained
    monkeypatch.setattr(swap.EncoderTrainer, "train_step", lambda *_: pytest.fail("trained again"))
    again.fit()
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_heads_start_at_ridge_regression_on_what_the_arm_reads(trainer_in):
    for name, drawn in (("clean", False), ("noisy", True)):
        trainer = trainer_in(name, swap.Arm(name, True, False, drawn, 1e-3))
        trainer.restore()
        noise = (trainer.alphas, trainer.random()) if drawn else None
        features = swap.features_of(trainer.model.backbone, trainer.prepared, "cpu", noise)
        solution, _ = swap.fitted(features, trainer.prepared, "cpu")
        heads = trainer.model.heads(trainer.model.standardise(torch.from_numpy(features)))
        torch.testing.assert_close(
            heads.embedding.double(), solution.predict(torch.from_numpy(features)), rtol=1e-3, atol=1e-4
        )


def test_clip_prefers_each_pictures_own_prompt():
    chosen = [scenes.candidate(77, i, truthful=True) for i in range(6)]
    pictures = np.stack([np.asarray(scenes.render(scene)) for scene in chosen])
    own = swap.clip_cosines(pictures, [scene.prompt for scene in chosen], "cpu")
    others = swap.clip_cosines(pictures, [scene.prompt for scene in chosen[1:] + chosen[:1]], "cpu")
    assert own.shape == (6,) and own.mean() > others.mean() + 0.2


def test_an_arm_is_trained_once(trainer_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = trainer_in("any")
    monkeypatch.setattr(swap, "material", lambda *_: (known.prepared, known.prompts))
    plan = replace(PLAN, folder=tmp_path / "runs", options={"epochs": 1, "batch_size": 4})
    trained = swap.train_arm(plan, BOTH, unet(0), 5)
    assert not same(encoder_half(trained), encoder_half(unet(0)))
    assert [folder.name for folder in plan.folder.iterdir()] == ["swap-noisy-reading-noise-0.001-seed5"]
    monkeypatch.setattr(swap.EncoderTrainer, "train_step", lambda *_: pytest.fail("trained again"))
    assert same(swap.train_arm(plan, BOTH, unet(0), 5).state_dict(), trained.state_dict())


def test_each_condition_draws_with_its_share_of_its_own_change(trainer_in, monkeypatch):
    """Drawing and judges are replaced."""
    known, original, run, arm, kept = trainer_in("any"), unet(0), unet(1), unet(2), {}
    prepared, states = known.prepared, known.prompts

    def drawn(plan: Plan, pipeline: object, texts: list, noise: range, swap: tuple, unet_at) -> np.ndarray:
        kept[swap] = [unet_at()(step) is original for step in range(2)] if unet_at else None
        return np.full((2, 8, 8, 3), 7, np.uint8)

    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    for name, value in {
        "open_pipeline": lambda plan: SimpleNamespace(unet=original), "CHUNK": 3,
        "material": lambda *_: (prepared, states), "kept_pictures": drawn,
        "predicted": lambda plan, run, pictures: np.eye(2)[[1 - run] * 2],
        "labels_shown": lambda *_: [{("place", "snow"): shown} for shown in (True, False)],
        "clip_cosines": lambda pictures, *_: pictures[:, 0, 0, 0] / 10, "train_arm": lambda *_: arm,
    }.items():  # fmt: skip
        monkeypatch.setattr(swap, name, value)
    monkeypatch.setattr(generate, "swapped_by_run", lambda *_: run)
    monkeypatch.setattr(weights, "load", lambda *_, **__: SimpleNamespace(encode=lambda texts: rows))
    sets = {"test prompts": [swap.Request("a"), swap.Request("b")]}
    for condition in swap.CONDITIONS:
        title, trained = condition.title, arm if "rate" in condition.title else run
        named, _, rest = title.removeprefix("random, ").partition(" of ")
        share = float(named if rest else title != "original")
        found = swap.measure(PLAN, condition, 3, 1, sets)
        change = pytest.approx(share * swap.relative_change(original, trained), rel=1e-4)
        assert (title, found["change"]) == (title, change)
        assert found["test prompts"] == pytest.approx({"probe": 0.5, "reader": 0.8, "CLIP": 0.7})
        assert list(kept.values())[-1] == ([title[-6:] != "step 0", False] if share else None)
    assert len(kept) == 10  # but for the arms, which are one here, each has pictures of its own
    alone = swap.measure(PLAN, swap.ORIGINAL, 3, None, sets)
    assert alone["test prompts"].keys() == {"probe", "CLIP"}
    generator, squares = torch.Generator().manual_seed(0), []
    for test in np.split(prepared.splits["test"], [3]):
        clean = torch.from_numpy(prepared.inputs[0][test])
        latents, t, noise = swap.noisy(clean, generate.alphas_bar(), generator)
        squares.append((original(latents, t, torch.from_numpy(states[test])) - noise).detach().square())
    assert alone["noise"] == pytest.approx(float(torch.cat(squares).mean()), rel=1e-5)


def test_differences_are_over_seeds_with_holm_over_the_conditions():
    def of(*values: float) -> list[dict]:
        return [{"test prompts": {"probe": value}} for value in values]

    by_title = {"original": of(0.5, 0.6), "a": of(0.6, 0.72), "b": of(0.5, 0.7), "same": of(0.5, 0.6)}
    family = [(title, "original") for title in ("a", "b", "same")]
    a, b, equal = swap.compared(by_title, family, "test prompts", "probe")
    assert a["per_seed"] == pytest.approx([0.1, 0.12]) and a["difference"] == pytest.approx(0.11)
    assert a["mean"] == pytest.approx(0.66) and a["seeds_95"] == pytest.approx((-0.01706, 0.23706), abs=1e-4)
    assert a["holm"] == pytest.approx(2 * a["p"]) and b["holm"] == pytest.approx(max(b["p"], a["holm"]))
    assert equal["p"] is None and "holm" not in equal
    better = a | {"seeds_95": (0.01, 0.2), "holm": 0.05, "against": "original"}
    at_0 = [better | {"seeds_95": limits} for limits in ((0, 0.2), (-0.2, 0))]
    said = swap.answer([better, b, *at_0, better | {"judge": "CLIP"}, better | {"against": "b"}])
    assert "of 4 comparisons" in said and "below 0 in 0." in said
    assert "above 0 in 1: a (test prompts)" in said and "p < .05: none" in said
    assert "p < .05: a (test prompts)" in swap.answer([better | {"holm": 0.04}, b])


def test_every_contrast_is_of_two_conditions():
    titles = [condition.title for condition in swap.CONDITIONS]
    assert len(set(titles)) == len(titles) == 19
    assert {title for pair in swap.CONTRASTS for title in pair} <= set(titles) and len(swap.CONTRASTS) == 6
    for arm in (condition.arm for condition in swap.ARMS):
        losses = arm.name.removeprefix("noisy ").split(" + ")
        assert (arm.reading, arm.noise) == ("reading" in losses, "noise" in losses)
        assert arm.drawn == arm.name.startswith("noisy ")


def test_the_table_of_known_measures(monkeypatch: pytest.MonkeyPatch):
    """Each condition is measured once a seed, by the next seed's run, and keeps its own numbers."""
    plan = replace(PLAN, seeds=(3, 5, 8))
    numbers = {condition.title: i / 100 for i, condition in enumerate(swap.CONDITIONS)}
    tasks = []

    def known(plan: Plan, condition: swap.Condition, seed: int, reader: int, sets: dict) -> dict:
        tasks.append((condition.title, seed, reader))
        judged = {judge: j + seed * numbers[condition.title] for j, judge in enumerate(swap.JUDGES)}
        values = {key: numbers[condition.title] for key in ("change", "val", "test", "noise")}
        return values | {name: judged | {"probe": judged["probe"] + len(of)} for name, of in sets.items()}

    sets = {"DrawBench": [swap.Request("a")], "test prompts": [swap.Request("a"), swap.Request("b")]}
    monkeypatch.setattr(swap, "prompt_sets", lambda plan, seed: sets)
    monkeypatch.setattr(swap, "material", lambda config, device: None)
    monkeypatch.setattr(swap, "measure", known)
    result = swap.compute(plan)
    expected = {(title, *pair) for title in numbers for pair in ((3, 5), (5, 8), (8, 3))}
    assert set(tasks) == expected and len(tasks) == len(expected)
    assert list(result["conditions"]) == list(numbers)
    for row in result["rows"]:
        per = numbers[row["condition"]] - numbers[row["against"]]
        assert row["per_seed"] == pytest.approx([3 * per, 5 * per, 8 * per]), row
        start = list(swap.JUDGES).index(row["judge"])
        start += len(sets[row["prompts"]]) if row["judge"] == "probe" else 0
        assert row["mean"] == pytest.approx(start + 16 / 3 * numbers[row["condition"]])
    pairs = [(row["condition"], row["against"]) for row in result["rows"]]
    family = [(title, "original") for title in numbers if title != "original"] + swap.CONTRASTS
    assert pairs == family * len(sets) * len(swap.JUDGES)
    assert result["prompts"] == {"DrawBench": 1, "test prompts": 2}
    about = {"command": "", "date": "", "data": "mini"}
    text = swap.text(result | about | {"seeds": [3, 5, 8]})
    line = "| 0.1 of the run's change | 2.0533 | +.0533 | -.0092 to +.1158 |"
    by_clip, _, notes = text.partition("**CLIP, test prompts** (2 a seed)")[2].partition("\n\n* ")
    assert by_clip.count(line) == by_clip.count("\n| 0.1 of") == 1 and "* The run is unet-mlc-cl." in notes
    assert all(f"| {title} |" in text for title in numbers if title != "original")
    assert all(f"| {a} − {b} |" in text for a, b in swap.CONTRASTS)
    alone = swap.compute(replace(plan, seeds=(3,)))
    assert "above 0 in 0: none" in swap.text(alone | about | {"seeds": [3]})
    assert [row["per_seed"] for row in alone["rows"]] == [row["per_seed"][:1] for row in result["rows"]]
