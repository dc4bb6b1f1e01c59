"""generate.py against diffusers' pipeline in float64, the swap, the attention maps, and the command."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train_here
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data
import generate
import weights
from generate import Pipeline
from mini.pretrain import FOLDER
from models import clip, unet, vae
from tests.parity import parameters, randomise
from weights import to_home

PROMPTS = ["a crimson star over snow", "two owls, highly detailed"]


def their_unet(config: unet.UNetConfig) -> UNet2DConditionModel:
    widths = [config.model_channels * m for m in config.channel_mult]
    cross = ["CrossAttn" if level in config.attention_levels else "" for level in range(len(widths))]
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim, attention_head_dim=config.num_heads, sample_size=8,
        down_block_types=[f"{kind}DownBlock2D" for kind in cross],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(cross)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def both() -> tuple[Pipeline, StableDiffusionPipeline]:
    """The miniature's sizes, but for fewer channels, with random weights in float64: ours and diffusers'."""
    sizes = replace(unet.CONFIGS["sd-mini"], model_channels=32, channel_mult=(1, 2), attention_levels=(0,))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1024, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
            pad_token_id=1023, bos_token_id=1022, eos_token_id=1023,
        )
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=[16, 16, 32, 32], layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=0.7,
    )  # fmt: skip
    parts = [randomise(part, seed) for seed, part in enumerate((their_unet(sizes), autoencoder, text))]
    scheduler = DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    # theirs are float32 scalars, whose roots it takes in float32
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    theirs = StableDiffusionPipeline(
        vae=parts[1], text_encoder=parts[2], tokenizer=CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"),
        unet=parts[0], scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    ours = [
        unet.UNet(sizes),
        vae.VAE(
            replace(vae.CONFIGS["sd-mini"], ch_mult=(1, 1, 2, 2), scale_factor=0.7),
        ),
        clip.CLIPText(
            replace(clip.CONFIGS["sd-mini"], intermediate_size=96, num_hidden_layers=2),
        ),
    ]
    for kind, model, part in zip(("unet", "vae", "clip-text"), ours, parts, strict=True):
        model.double().eval().load_state_dict(to_home(kind, parameters(part)))
    return Pipeline(*ours, weights.load_tokenizer("sd-mini")), theirs


def steps_of(theirs: StableDiffusionPipeline, noise: Tensor, **options: object) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(pipeline: object, i: int, t: int, state: dict) -> dict:
        seen.append(state["latents"].clone())
        return state

    theirs(PROMPTS, latents=noise, output_type="latent", callback_on_step_end=keep, **options)
    return seen


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "v"),
    [(5, 7.5, "", False), (7, 3.0, "blurry, a cat", False), (3, 1.0, "", False), (6, 5.0, "", True)],
)
def test_every_step_is_that_of_diffusers(both: tuple, steps: int, guidance: float, negative: str, v: bool):
    ours, theirs = both
    prediction = "v_prediction" if v else "epsilon"
    scheduler = theirs.scheduler
    scheduler.register_to_config(prediction_type=prediction)
    noise = ours.noise([3, 4], (32, 48))
    expected = steps_of(
        theirs, noise, num_inference_steps=steps, guidance_scale=guidance, negative_prompt=[negative] * 2
    )
    seen: list[Tensor] = []
    pipeline = replace(ours, predicts_v=True) if v else ours  # noise is the default
    final = pipeline.sample(
        PROMPTS, noise, negative, steps, guidance, on_step=lambda i, latents: seen.append(latents)
    )
    assert len(seen) == len(expected) == steps
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    decoded = theirs.vae.decode(final / theirs.vae.config.scaling_factor).sample
    levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (ours.decode(final).int() - levels.int()).abs().max() <= 1  # a rounding at .5


@pytest.mark.parametrize("steps", [1, 3, 4, 50, 999])
def test_the_schedule_is_that_of_diffusers(steps: int):
    scheduler = DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    scheduler.set_timesteps(steps)
    assert generate.ddim_timesteps(steps) == scheduler.timesteps.tolist()
    assert torch.equal(generate.alphas_bar(), scheduler.alphas_cumprod)
    assert scheduler.final_alpha_cumprod == generate.alphas_bar()[0]


def test_fifty_steps_are_those_of_the_paper():
    assert generate.ddim_timesteps(50)[:2] == [981, 961] and generate.ddim_timesteps(50)[-2:] == [21, 1]


def test_a_picture_depends_on_its_own_seed_alone(both: tuple):
    ours = both[0]
    draw = partial(ours.sample, steps=3)
    together = draw(PROMPTS, ours.noise([8, 9], (16, 16)))
    alone = draw(PROMPTS[1:], ours.noise([9], (16, 16)))
    torch.testing.assert_close(together[1:], alone, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(together[1:], draw(PROMPTS[1:], ours.noise([8], (16, 16))))
    assert ours.noise([8], (8, 16)).shape == (1, 4, 1, 2)  # one latent is the least


def test_pictures_drawn_in_batches_are_those_drawn_alone(both: tuple):
    ours, prompts, seeds = both[0], [*PROMPTS, PROMPTS[0]], [8, 9, 10]
    together = ours.draw(prompts, seeds, (16, 24), batch_size=2, steps=2)
    assert together.shape == (3, 16, 24, 3)
    for i in range(3):
        alone = ours.draw(prompts[i : i + 1], seeds[i : i + 1], (16, 24), steps=2)[0]
        assert (together[i].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[2])


def other_encoder(whole: unet.UNet, seed: int) -> unet.UNetEncoder:
    return randomise(unet.UNetEncoder(whole.config), seed)


def test_the_swap_takes_the_encoder_and_leaves_the_decoder(both: tuple):
    whole = both[0].unet
    encoder = other_encoder(whole, 7)
    merged = generate.swapped(whole, encoder).state_dict()
    ours, trained = whole.state_dict(), encoder.state_dict()
    assert merged.keys() == ours.keys() and trained.keys() < ours.keys()
    for name, value in merged.items():
        assert torch.equal(value, trained.get(name, ours[name])), name
    with pytest.raises(ValueError, match="other sizes"):
        generate.swapped(whole, unet.UNetEncoder(replace(whole.config, num_res_blocks=2)))


def test_swapping_after_n_steps_uses_the_original_for_n(both: tuple):
    ours = both[0]
    noise, trained = ours.noise([1], (16, 16)), generate.swapped(ours.unet, other_encoder(ours.unet, 7))

    def latents(n: int) -> list[Tensor]:
        seen: list[Tensor] = []
        at = generate.after(n, ours.unet, trained)
        ours.sample(PROMPTS[:1], noise, "", 4, 2.0, at, lambda i, x: seen.append(x))
        return seen

    original, swapped_at_once = latents(4), latents(0)
    plain: list[Tensor] = []
    ours.sample(PROMPTS[:1], noise, "", 4, 2.0, on_step=lambda i, x: plain.append(x))
    assert all(torch.equal(a, b) for a, b in zip(original, plain, strict=True))
    for n in (1, 3):
        same = [torch.equal(a, b) for a, b in zip(latents(n), original, strict=True)]
        assert same == [True] * n + [False] * (4 - n)
    assert not torch.equal(swapped_at_once[0], original[0])


def test_attention_maps_are_what_the_layers_attend_with(both: tuple):
    """With one head, the map times the values, projected, is the layer's output."""
    sizes = replace(both[0].unet.config, num_heads=1)
    model = randomise(unet.UNet(sizes))
    context = torch.randn(2, 77, sizes.context_dim, dtype=torch.float64)
    outputs: list[Tensor] = []
    layers = [m for name, m in model.named_modules() if name.endswith("attn2")]
    values = [layer.to_v(context) for layer in layers]
    for layer in layers:
        layer.register_forward_hook(lambda module, given, output: outputs.append(output))
    with generate.attention_maps(model) as maps:
        model(torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([5, 5]), context)
    assert len(maps) == len(layers) == 4  # one going down, the middle, two going up
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 4, 4))
    rebuilt = layers[0].to_out(maps[0].double().flatten(1, 2) @ values[0])
    torch.testing.assert_close(rebuilt, outputs[0], atol=1e-5, rtol=1e-5)
    model(torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([5, 5]), context)
    assert len(maps) == 4  # nothing listens any more
    for width, count in ((2, 3), (4, 4)):  # the middle block has one place, or two
        with generate.attention_maps(model) as maps:
            model(torch.randn(2, 4, 2, width, dtype=torch.float64), torch.tensor([5, 5]), context)
        assert len(maps) == count


def test_attention_maps_have_the_shape_of_the_picture(both: tuple):
    model = both[0].unet
    context = torch.randn(1, 77, model.config.context_dim, dtype=torch.float64)
    with generate.attention_maps(model) as maps:
        model(torch.randn(1, 4, 5, 24, dtype=torch.float64), torch.tensor([5]), context)
    assert {tuple(entry.shape[1:3]) for entry in maps} == {(5, 24), (3, 12)}
    found = generate.word_maps(maps, 1, "a star", both[0].tokenizer)
    assert [where.shape for _, where in found] == [(5, 24)] * 2


def test_a_folder_says_how_it_was_trained(tmp_path: Path):
    assert generate.trained_as("sd-1") == (512, False) and generate.trained_as("sd-2") == (768, True)
    assert generate.trained_as("sd-mini") == (64, False)
    assert generate.trained_as(str(tmp_path)) == (512, None)
    v = {"prediction_type": "v_prediction"}
    for name, said in {"unet/config": {"sample_size": 96}, "scheduler/scheduler_config": v}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    assert generate.trained_as(str(tmp_path)) == (768, True)
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": [80, 80]}')
    assert generate.trained_as(str(tmp_path)) == (640, True)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(weights.WeightsError, match="scheduler_config.json: cannot be read as JSON"):
        generate.trained_as(str(tmp_path))


def mark(path: Path, tensors: Sequence[str] = (), **metadata: str) -> str:
    """A file of empty tensors, without its .yaml."""
    save_file({name: torch.zeros(0) for name in ("betas", *tensors)}, path, metadata)
    path.with_suffix(".yaml").unlink(missing_ok=True)
    return str(path)


def test_a_single_file_is_marked_as_predicting_v(tmp_path: Path):
    path = tmp_path / "own.safetensors"
    assert generate.trained_as(mark(path)) == (512, None)
    assert generate.trained_as(mark(path, ["v_pred"])) == (512, True)
    for stated, predicts_v in (("v", True), ("v_prediction", True), ("epsilon", False)):
        metadata = {"modelspec.prediction_type": stated, "format": "pt"}
        assert generate.trained_as(mark(path, **metadata)) == (512, predicts_v)
        assert generate.trained_as(str(tmp_path)) == (512, predicts_v)  # the only file in a folder
    with pytest.raises(weights.WeightsError, match='prediction_type is "flow"; it must be one of'):
        generate.trained_as(mark(path, **{"modelspec.prediction_type": "flow"}))
    for line, predicts_v in {
        'parameterization: "v"': True, "parameterization:   v": True, "parameterization: 'eps'": False,
        '# parameterization: "v"': None, "scale: 1": None,
    }.items():  # fmt: skip
        mark(path)
        path.with_suffix(".yaml").write_text(f"model:\n  params:\n    {line}\n    timesteps: 1000\n")
        assert generate.trained_as(str(path)) == (512, predicts_v), line


def test_a_registered_folder_given_by_path_is_what_its_name_is(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("REVERSE_SD_CACHE", str(tmp_path))
    unet = tmp_path / "weights" / "sd-2" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text('{"sample_size": 96}')
    monkeypatch.chdir(unet.parent)
    for source in (unet.parent, Path(".")):
        assert generate.trained_as(str(source)) == (768, True)
    unet.parent.rename(tmp_path / "sd-2")
    assert generate.trained_as(str(tmp_path / "sd-2")) == (768, None)


def test_a_folder_that_does_not_state_the_prediction_is_reported_once(tmp_path: Path, caplog):
    for path in FOLDER.iterdir():
        if path.name != "scheduler":
            (tmp_path / path.name).symlink_to(path)
    assert generate.load_pipeline(str(tmp_path)).predicts_v is False
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: the U-Net's target is not stated; noise is assumed, --predicts-v for v"
    ]
    caplog.clear()
    assert generate.load_pipeline(str(tmp_path), predicts_v=True).predicts_v and not caplog.records


@pytest.mark.parametrize("asked, predicted", [(None, False), (False, False), (True, True)])
def test_what_the_unet_predicts_is_asked_for_or_the_models_own(asked: bool | None, predicted: bool, tmp_path):
    assert generate.load_pipeline("sd-mini", predicts_v=asked).predicts_v is predicted
    for path in FOLDER.iterdir():
        if path.name != "scheduler":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    assert generate.load_pipeline(str(tmp_path), predicts_v=asked).predicts_v is (asked is not False)


def test_each_word_has_the_map_of_its_tokens(both: tuple):
    tokenizer = both[0].tokenizer
    prompt = "a crimson zebra on a"  # zebra is no token of its own; a word that comes twice has two maps
    lengths = [len(tokenizer.tokenizer.encode(word).ids) for word in prompt.split()]
    assert lengths[:2] == [1, 1] and lengths[2] > 1
    maps = [torch.rand(2, side, side, 77) for side in (4, 2)]
    found = generate.word_maps(maps, 1, prompt, tokenizer)
    assert [word for word, _ in found] == prompt.split()
    for number, position in ((0, 1), (1, 2), (4, 1 + sum(lengths[:4]))):
        large = maps[0][1][..., position] + torch.nn.functional.interpolate(
            maps[1][1:, ..., position][None], size=(4, 4), mode="bilinear", align_corners=False
        )[0, 0]
        torch.testing.assert_close(found[number][1], (large - large.min()) / (large.max() - large.min()))


def test_pictures_are_kept_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    decode, calls = Pipeline.decode, []

    def stopped(self: Pipeline, latents: Tensor) -> Tensor:
        calls.append(len(latents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(Pipeline, "decode", stopped)
    asked = ["a cat\non a mat", "--n", "6", "--batch-size", "2", "--steps", "1", "--out", str(tmp_path)]
    assert generate.main(asked) == 130
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"00{i}-seed{i}.png" for i in range(4)]
    assert data.embedded_prompt(paths[3])[0] == "a cat on a mat"
    assert "kept" in capsys.readouterr().err


def test_half_precision_keeps_the_schedule(both: tuple):
    ours = generate.load_pipeline("sd-mini")
    noise = ours.noise([0], (64, 64))
    exact = ours.sample(PROMPTS[:1], noise, steps=4)
    seen: list[torch.dtype] = []
    step = generate.ddim_step

    def noted(latents: Tensor, predicted: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
        seen.append(alpha.dtype)
        return step(latents, predicted, alpha, alpha_next)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "ddim_step", noted)
        half = generate.load_pipeline("sd-mini", dtype=torch.bfloat16)
        drawn = half.sample(PROMPTS[:1], noise.bfloat16(), steps=4)
    assert set(seen) == {torch.float32} and drawn.dtype == torch.bfloat16
    assert (drawn.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_command_writes_pictures_that_hold_their_prompts(tmp_path: Path, capsys: pytest.CaptureFixture):
    asked = [*PROMPTS, "--steps", "2", "--n", "2", "--seed", "5", "--out", str(tmp_path), "--negative", "fog"]
    (tmp_path / "IMG_20251105.png").write_bytes(b"mine")  # does not count
    assert generate.main([*asked, "--batch-size", "3"]) == 0
    paths = sorted(tmp_path.glob("0*"))
    assert [str(path) for path in paths] == capsys.readouterr().out.split()
    assert [path.name for path in paths] == [f"00{i}-seed{5 + i % 2}.png" for i in range(4)]
    prompt, settings = data.embedded_prompt(paths[3])
    assert prompt == PROMPTS[1] and settings["se"] == 6 and settings["st"] == 2
    assert Image.open(paths[0]).size == (64, 64)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "1000"], "--steps: 1000"),
        (["--size", "60", "64"], "multiples of 8"),
        (["--swap", "no-such-run", "--swap-after", "60"], "--swap-after 60"),
        (["--swap-after", "2"], "--swap-after: only --swap uses it"),
        (["--swap", "no-such-run", "--swap-after", "2", "--grid", "1,5"], "--swap-after: --grid sets it"),
        (["--negative", "fog", "--guidance", "1"], "--negative: --guidance 1 draws without it"),
        (["--grid", "1,5"], "--swap RUN"),
        (["--weights", "no-such-thing"], "no-such-thing"),
        (["--swap", "no-such-run"], "no-such-run"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--guidance", "nan"], "--guidance: nan"),
        (["--seed", str(2**63 - 1)], f"--seed {2**63 - 1}"),
        (["--attention", "--n", "2"], "remove --grid and --n"),
        (["--attention", "--swap", "no-such-run", "--swap-after", "50"], "--swap-after 50"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(flags: list[str], said: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(generate.main(["a cat", "--out", str(tmp_path), *flags]))
    printed = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and said in printed[-1] and "Traceback" not in "".join(printed)


@pytest.fixture(scope="module")
def run(few_scenes: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(few_scenes, tmp_path_factory.mktemp("runs") / "unet", "--backbone", "unet")


def column(page: Image.Image, j: int) -> bytes:
    """The pixels of a grid's picture in its first row and column j."""
    return page.crop((196 * j, 32, 196 * j + 192, 224)).tobytes()


def test_a_run_is_put_back_to_draw(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    asked = ["--steps", "3", "--out", str(tmp_path), "--swap", str(run), "a red cat"]
    assert generate.main(asked) == 0
    assert generate.main([*asked, "--grid", "0,1,3"]) == 0
    page = Image.open(tmp_path / "grid-001.png")
    original, at_once, after_1, after_3 = (column(page, j) for j in range(4))
    assert original == after_3 and len({original, at_once, after_1}) == 3
    pairs = ([], [run.name]), (["--swap", str(run)], [str(run)] * 2)  # two of one name
    for number, (more, titles) in enumerate(pairs, 2):
        assert generate.main([*asked, *more, "--grid", "runs"]) == 0
        page, blank = Image.open(tmp_path / f"grid-00{number}.png"), Image.new("RGB", (64, 64))
        titled = generate.grid_picture([[blank] * (1 + len(titles))], ["original", *titles], [""])
        assert page.width == titled.width and column(page, 0) == original
        assert page.crop((0, 0, page.width, 16)).tobytes() == titled.crop((0, 0, page.width, 16)).tobytes()
    assert generate.main([*asked, "--swap-after", "2"]) == 0
    assert Image.open(tmp_path / "004-seed0.png").info["parameters"] == (
        "a red cat\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 64x64, Model: sd-mini, "
        "Swap: unet after 2"
    )
    assert generate.main([*asked, "--attention"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    grids = {f"grid-00{number}.png" for number in (1, 2, 3)}
    assert names == {"000-seed0.png", *grids, "004-seed0.png", "attention-005.png"}
    pipeline = generate.load_pipeline("sd-mini")
    trained = generate.swapped_by_run(pipeline.unet, run, "sd-mini")
    changed = [name for name, value in trained.state_dict().items()
               if not torch.equal(value, pipeline.unet.state_dict()[name])]
    assert changed and not any(name.startswith(("output_blocks", "out.")) for name in changed)
    with pytest.raises(weights.WeightsError, match="started from sd-mini"):
        generate.swapped_by_run(pipeline.unet, run, "sd-1")


def test_each_option_reaches_the_picture(tmp_path: Path):
    """The default size is square, so that one that is not would catch a swap of the sides."""
    out = tmp_path / "new" / "deep"  # is made
    asked = "--size 72 64 --steps 2 --guidance 3 --seed 4 --predicts-v --dtype bfloat16 --negative".split()
    assert generate.main([*PROMPTS, *asked, "thick fog", "--out", str(out)]) == 0
    pipeline = generate.load_pipeline("sd-mini", dtype=torch.bfloat16, predicts_v=True)
    drawn = pipeline.draw(PROMPTS, [4, 4], (72, 64), 8, negative="thick fog", steps=2, guidance=3.0)
    for seeds, size, options in (
        ([4], (72, 64), {}), ([4, 4], (60, 64), {}), ([4, 4], (-8, 8), {}),
        ([4, 4], (72, 64), {"guidance": float("inf")}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="seeds|multiples|guidance inf"):
            pipeline.draw(PROMPTS, seeds, size, **options)
    for i in range(2):
        with Image.open(out / f"00{i}-seed4.png") as image:
            assert image.size == (64, 72)
            assert np.array_equal(np.asarray(image), drawn[i].numpy())
            said = image.info["parameters"]
        assert "Size: 64x72," in said and "CFG scale: 3," in said and "Negative prompt: thick fog\n" in said


@pytest.mark.parametrize(
    "flags",
    ["--size 8 8", "--steps 1", "--steps 999", "--seed 0", f"--seed {2**63 - 2}", f"--seed {2**63 - 3} --n 2",
     "--n 1 --batch-size 1", "--n 1000000", "--guidance 1000000.0", "--guidance -1000000.0",
     "--steps 9 --swap one --swap-after 9", "--swap one --swap-after 0", "--swap one --steps 9 --grid 0,9",
     "--swap one --swap two --grid runs", "--attention --steps 9 --swap one --swap-after 8"],
)  # fmt: skip
def test_values_at_the_bounds_are_taken(flags: str):
    args = vars(generate.parse(["a cat", *flags.split()]))
    name, value = flags.split()[:2]
    assert str(args[name.strip("-")]) in (value, "[8, 8]", "['one']", "['one', 'two']", "True")


@pytest.mark.parametrize(
    "flags",
    ["--attention --swap one --grid 1", f"--seed {2**63 - 2} --n 2", "--size 0 8", "--size 8 0",
     "--size 8 12", "--size 12 8", "--steps 0", "--seed -1", "--n 0", "--n 1000001",
     "--guidance 1000001", "--guidance -1000001", "--dtype float64",
     "--batch-size 0", "--steps 9 --swap one --swap-after 10", "--swap one --swap-after -1",
     "--swap one --steps 9 --grid 0,10", "--swap one --grid -1,1", "--swap one --grid 1,x",
     "--swap one --swap two", "--swap one --swap two --grid 1,2",
     "--attention --steps 9 --swap one --swap-after 9"],
)  # fmt: skip
def test_values_beyond_the_bounds_are_refused(flags: str, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.parse(["a cat", *flags.split()])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_options_defaults():
    assert vars(generate.parse(["a cat"])) == {
        "prompts": ["a cat"], "weights": "sd-mini", "n": 1, "seed": 0, "steps": 50, "guidance": 7.5,
        "negative": "", "size": None, "batch_size": 8, "swap": None, "swap_after": 1, "grid": None,
        "grid_steps": [], "attention": False, "predicts_v": None, "device": "auto", "dtype": "float32",
        "out": Path("pictures"),
    }  # fmt: skip
    args = generate.parse(["no \udcff", "--negative", "UTF-8 \udcff"])
    assert (args.prompts, args.negative) == (["no ?"], "UTF-8 ?")


def test_the_defaults_of_sampling_are_50_steps_at_guidance_7_5(both: tuple):
    noise = both[0].noise([3], (16, 16))
    explicit = both[0].sample(PROMPTS[:1], noise, negative="", steps=50, guidance=7.5)
    assert torch.equal(both[0].sample(PROMPTS[:1], noise), explicit)


@pytest.mark.parametrize("places, threads", [(1, 1), (generate.FEW_PLACES - 1, 1), (generate.FEW_PLACES, 3)])
def test_few_places_are_drawn_with_one_thread(places: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with generate.threads_for(places):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "vit", "weights": "sd-mini"}, "trained no U-Net"),
        ({"train_blocks": 0}, "trained no U-Net"),
        ({"random_start": True}, "from scratch"),
        ({"weights": "sd-1"}, "give --weights sd-1"),
        ({"train_blocks": 1}, None),
        ({}, None),
    ],
)
def test_only_a_run_of_the_same_pretrained_unet_replaces_it(
    both: tuple, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str | None
):
    encoder = other_encoder(both[0].unet, 7)
    regressor = SimpleNamespace(backbone=SimpleNamespace(unet=encoder))
    config = {"backbone": "unet", "weights": "sd-mini"} | settings
    run = SimpleNamespace(config=config, regressor=regressor)
    monkeypatch.setattr(generate, "load_run", lambda folder: run)
    if message:
        with pytest.raises(weights.WeightsError, match=message):
            generate.swapped_by_run(both[0].unet, "run", "sd-mini")
    else:
        merged = generate.swapped_by_run(both[0].unet, "run", "sd-mini").state_dict()
        assert all(torch.equal(merged[name], value) for name, value in encoder.state_dict().items())


def test_each_prompt_has_a_page_of_its_words_maps(tmp_path: Path):
    asked = ["--attention", "--seed", "3", "--steps", "2", "--out", str(tmp_path)]
    assert generate.main(["a red cat", "snow", *asked]) == 0
    pipeline = generate.load_pipeline("sd-mini")
    for number, prompt in enumerate(("a red cat", "snow")):
        with generate.attention_maps(pipeline.unet) as maps:
            pixels = pipeline.draw([prompt], [3], (64, 64), steps=2)[0]
        image = Image.fromarray(pixels.numpy())
        seen = generate.word_maps(maps, 1, prompt, pipeline.tokenizer)
        row = [image, *(generate.heat(image, where) for _, where in seen)]
        expected = generate.grid_picture([row], ["", *prompt.split()], [prompt])
        with Image.open(tmp_path / f"attention-{number:03d}.png") as page:
            assert page.size == expected.size and page.tobytes() == expected.tobytes()


def test_a_prompt_that_is_cut_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for n, reported in ((75, False), (76, True)):
        assert generate.main([" ".join(["a"] * n), "--steps", "1", "--out", str(tmp_path)]) == 0
        assert ("cut to 75 tokens" in caplog.text) is reported


def test_a_word_that_is_seen_everywhere_alike_has_a_map_of_zeros():
    (_, seen), = generate.word_maps([torch.ones(1, 4, 4, 77)], 1, "a", weights.load_tokenizer("sd-mini"))
    assert torch.equal(seen, torch.zeros(4, 4))


@pytest.mark.parametrize("n, shown", [(74, 74), (75, 75), (76, 75), (80, 75)])
def test_words_that_the_text_tower_does_not_read_have_no_map(n: int, shown: int):
    maps = [torch.rand(1, 4, 4, 77)]
    found = generate.word_maps(maps, 1, " ".join(["a"] * n), weights.load_tokenizer("sd-mini"))
    assert len(found) == shown and all(bool(seen.isfinite().all()) for _, seen in found)
    last = maps[0][0, ..., shown]  # position 0 is the start mark
    torch.testing.assert_close(found[-1][1], (last - last.min()) / (last.max() - last.min()))


def test_a_grid_holds_each_picture_whole_under_its_title():
    colours = [["red", "lime"], ["blue", "gray"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    page = generate.grid_picture(rows, ["left", "right"], ["one", "two"])
    assert page.size == (2 * 196, 16 + 2 * (192 + 16 + 4))  # small pictures three times as large
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            x, y = j * 196, 16 + i * 212 + 16
            assert page.crop((x, y, x + 192, y + 192)).getcolors() == [(192 * 192, image.getpixel((0, 0)))]
    for x, y, text in ((0, 0, "left"), (196, 0, "right"), (0, 16, "one"), (0, 16 + 212, "two")):
        strip = Image.new("RGB", (192, 16), "white")
        ImageDraw.Draw(strip).text((2, 2), text, "black")
        assert page.crop((x, y, x + 192, y + 16)).tobytes() == strip.tobytes(), text
    assert generate.enlarged(Image.new("RGB", (200, 256))).size == (200, 256)


def test_a_heat_map_is_the_picture_where_a_word_is_seen_and_dark_elsewhere():
    image = Image.new("RGB", (8, 8), (60, 120, 240))
    seen = torch.zeros(8, 8)
    seen[:, 4:] = 1
    heat = generate.heat(image, seen)
    assert heat.getpixel((0, 0)) == (10, 20, 40) and heat.getpixel((7, 7)) == (60, 120, 240)
    assert generate.heat(image, torch.full((2, 2), 0.5)).getcolors() == [(64, (35, 70, 140))]


def test_the_published_text_tower_reads_77_tokens():
    assert clip.CONFIGS["sd-1"].max_position_embeddings == CLIPTextConfig().max_position_embeddings
