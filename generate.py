"""Text to image with Stable Diffusion, and section 4.5 of the paper: generation with the U-Net that was
trained to read images.

    python generate.py "a crimson star over snow" --weights sd-mini
    python generate.py PROMPT --weights sd-mini --n 8 --seed 3          eight pictures, seeds 3 to 10
    python generate.py PROMPT --swap runs/unet-mini-seed0               that run's U-Net after the first step
    python generate.py PROMPT --swap RUN --grid 1,5,25,49               figure 6: swap after N steps
    python generate.py PROMPT --swap RUN --swap RUN --grid runs         figures 5 and 8: a column for each
    python generate.py PROMPT --attention                               figure 7: cross-attention maps

The sampler is DDIM (Song et al. 2021) with classifier-free guidance (Ho and Salimans 2022), as Stable
Diffusion was published: deterministic once the noise is drawn. Each picture's noise comes from its own seed,
drawn on the CPU, so that it does not depend on batch and device. Each picture's PNG holds the prompt and all
settings, which data.py reads; grids and attention maps have none. Numbers go on where the folder's end, so
that no picture is overwritten. Letters in shape comments: B batch, h w the latents' grid.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

import weights
from command import Parser, decodable, number, run_command
from files import MAX_JSON, atomic_write, exclusive, read_text
from models.unet import UNet, UNetEncoder
from reverse_sd import load_run
from schema import NULL, check, checked, one_of
from schema import number as number_rule
from weights.fetch import name_of
from weights.files import read_metadata, stored_tensors
from weights.sources import weights_file

log = logging.getLogger("generate")

TRAIN_STEPS = 1000
# Below it threads wait for each other longer than they save, and much longer beside a busy process
# (benchmarks/busy.py). Stable Diffusion 1 has 4,096 places a picture, the miniature 64.
FEW_PLACES = 256
OWN_NAME = re.compile(r"(?:grid-|attention-)?(\d{3,})(?:-seed\d+)?\.png")  # of what the command writes
PUBLISHED = {"sd-1": (512, False), "sd-2": (768, True)}  # side in pixels, whether it predicts v: `trained_as`
# The marks of a single file, in its metadata and in the .yaml beside it
MARKS = {
    "modelspec.prediction_type": one_of("epsilon", "v", "v_prediction"),
    "parameterization": one_of("eps", "v"),
}
_DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_LDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# diffusers' samplers of the process that is implemented here, with the betas that they assume
SAMPLERS = {f"{name}Scheduler": betas for names, betas in {
    """DDPM DDPMParallel DDIM DDIMParallel DDIMInverse PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete
       DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep DEISMultistep UniPCMultistep
       SASolver""": _DDPM,
    "HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverSDE": _LDM | {"beta_schedule": "linear"},
    "LCM TCD": _LDM,
}.items() for name in names.split()}  # fmt: skip
# The fields of scheduler_config.json that belong to the trained model; the others choose a sampler.
SCHEDULER = {
    "_class_name": one_of(*SAMPLERS).or_else("DDIMScheduler"),
    "beta_start": number_rule(above=0, below=1),
    "beta_end": number_rule(above=0, below=1),
    "beta_schedule": one_of("linear", "scaled_linear"),
    "num_train_timesteps": one_of(TRAIN_STEPS).or_else(TRAIN_STEPS),
    "prediction_type": one_of("epsilon", "v_prediction").or_else("epsilon"),
    "rescale_betas_zero_snr": one_of(False).or_else(False),
    "use_flow_sigmas": one_of(False).or_else(False),
    "trained_betas": NULL.or_else(None),
}


# ============================================================================================================
# The noise schedule and DDIM
# ============================================================================================================


def alphas_bar(start: float = 0.00085, end: float = 0.012, schedule: str = "scaled_linear") -> Tensor:
    """alpha_bar (signal variance) at each of the 1000 timesteps, float32: the cumulative product of 1 - beta.

    The betas ("linear") or their square roots ("scaled_linear") are evenly spaced. Source: v1-inference.yaml
    of LDM (`linear_start`, `linear_end`).
    """
    power = 2 if schedule == "scaled_linear" else 1
    roots = torch.linspace(start ** (1 / power), end ** (1 / power), TRAIN_STEPS, dtype=torch.float32)
    return (1 - roots**power).cumprod(dim=0)


def ddim_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps from high to low, the lowest being 1: for 50 steps 981, 961, ..., 21, 1.

    Raises ValueError unless 1 <= steps <= 999: the highest must be below 1000.
    """
    if not 1 <= steps < TRAIN_STEPS:
        raise ValueError(f"{steps} sampling steps: there must be 1 to {TRAIN_STEPS - 1}")
    stride = TRAIN_STEPS // steps
    return [i * stride + 1 for i in reversed(range(steps))]


def ddim_step(latents: Tensor, noise: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """One deterministic step (eta 0): remove the predicted noise and add the noise level of the next step.

    Song et al. 2021, equation 12. `alpha` and `alpha_next` are `alphas_bar` of this timestep and of the next,
    lower one. The clean latents predicted on the way are not clipped.
    """
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise


def noise_from_v(v: Tensor, latents: Tensor, alpha: Tensor) -> Tensor:
    """The noise implied by a prediction of v = sqrt(alpha) noise - sqrt(1 - alpha) clean.

    Salimans and Ho 2022, appendix D. Stable Diffusion 2 at 768 px predicts v.
    """
    return alpha.sqrt() * v + (1 - alpha).sqrt() * latents


# ============================================================================================================
# The pipeline
# ============================================================================================================


@contextmanager
def threads_for(places: int) -> Iterator[None]:
    """One thread while a batch has fewer latent places than FEW_PLACES, else torch's own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if places < FEW_PLACES else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Pipeline:
    """The parts of a Stable Diffusion, in eval mode, on one device, of one dtype."""

    unet: UNet
    vae: nn.Module
    text: nn.Module
    tokenizer: weights.ClipTokenizer
    predicts_v: bool = False
    alphas: Tensor = field(default_factory=alphas_bar)  # (1000,)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """Text states for the U-Net's cross-attention: (B, 77, context_dim)."""
        device = next(self.text.parameters()).device
        return self.text(self.tokenizer(list(texts)).to(device))

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The latents to start from, one seed for each: (B, 4, h, w) for `size` (height, width) in pixels."""
        if min(size) < 8 or size[0] % 8 or size[1] % 8:
            raise ValueError(f"pictures of {size} pixels: height and width must be multiples of 8")
        like, shape = next(self.unet.parameters()), (self.unet.config.in_channels, size[0] // 8, size[1] // 8)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws).to(like)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        negative: str = "",
        steps: int = 50,
        guidance: float = 7.5,
        unet_at: Callable[[int], UNet] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents (B, 4, h, w), scaled, drawn for the prompts from `noise` of that shape.

        guidance: classifier-free guidance scale; 1 = off, the negative prompt is not computed. unet_at: the
        U-Net of step 0, 1, ... (default: the pipeline's own in all). on_step is called with each step's
        latents. Raises ValueError for a guidance that is not finite.
        """
        if not math.isfinite(guidance):
            raise ValueError(f"guidance {guidance}: must be a finite number")
        precise = torch.promote_types(noise.dtype, torch.float32)  # in half precision 1 - alpha is 0
        alphas, timesteps = self.alphas.to(noise.device, precise), ddim_timesteps(steps)
        context, latents = self.states(prompts), noise
        if guided := guidance != 1:
            context = torch.cat([self.states([negative]).expand_as(context), context])  # (2B, 77, D)
        for i, t in enumerate(timesteps):
            unet = unet_at(i) if unet_at else self.unet
            both = torch.cat([latents, latents]) if guided else latents
            predicted = unet(both, torch.full((len(both),), t, device=both.device), context)
            if guided:
                without, with_prompt = predicted.chunk(2)
                predicted = without + guidance * (with_prompt - without)
            alpha = alphas[t]
            alpha_next = alphas[timesteps[i + 1]] if i + 1 < steps else alphas[0]
            if self.predicts_v:
                predicted = noise_from_v(predicted, latents, alpha)
            latents = ddim_step(latents, predicted, alpha, alpha_next)
            if on_step:
                on_step(i, latents)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures, uint8 (B, 8h, 8w, 3) on the CPU."""
        images = self.vae.decode(latents / self.vae.config.scale_factor)
        levels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round()
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        size: tuple[int, int],
        batch_size: int = 50,
        title: str = "drawing",
        on_batch: Callable[[int, Tensor], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Pictures, uint8 (n, H, W, 3), of prompts with a seed each, `batch_size` at a time; options as for
        `sample`. on_batch is called with each batch of pictures and the index of its first one."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        parts = []
        with tqdm(total=len(prompts), desc=title, unit="picture") as bar:
            for start in range(0, len(prompts), batch_size):
                some = slice(start, start + batch_size)
                noise = self.noise(seeds[some], size)
                with threads_for(noise[:, 0].numel()):
                    parts.append(self.decode(self.sample(prompts[some], noise, **options)))
                if on_batch:
                    on_batch(start, parts[-1])
                bar.update(len(noise))
        return torch.cat(parts)


def trained_as(source: str) -> tuple[int, bool | None]:
    """The side in pixels at which a Stable Diffusion was trained, and whether its U-Net predicts v; None
    where that is not stated.

    Read from a diffusers folder, built in for sd-1 and sd-2. For a single file, 512 pixels are assumed.
    Raises WeightsError for a U-Net that predicts neither noise nor v.
    """
    if (name := name_of(source)) in PUBLISHED:
        return PUBLISHED[name]
    root = weights.resolve(source)
    path = root / "unet" / "config.json"
    stated = weights.read_config(path) if path.is_file() else {}
    cells = stated.get("sample_size") or 64
    if (root / "scheduler" / "scheduler_config.json").is_file():
        predicts_v = scheduler(source)["prediction_type"] == "v_prediction"
    else:
        predicts_v = _marked_v(root)
    return 8 * (cells if isinstance(cells, int) else cells[0]), predicts_v


def _marked_v(path: Path) -> bool | None:
    """Whether the U-Net in a single file predicts v, from its metadata, its tensor `v_pred` and the .yaml
    beside it; None where none of them states it."""
    file = weights_file(path) if path.is_dir() else path
    if file is None or file.suffix == ".json":
        return None
    config = file.with_suffix(".yaml")
    lines = read_text(config, MAX_JSON) if config.is_file() else ""
    stated = {"v_pred": "v"} if "v_pred" in stored_tensors(file) else {}
    stated |= {name: value for name, value in read_metadata(file).items() if name in MARKS}
    stated |= dict(re.findall(r"^\s*(parameterization):\s*[\"']?(\w+)", lines, re.MULTILINE))
    check(stated, MARKS, file)
    return any(value[0] == "v" for value in stated.values()) if stated else None


def scheduler(source: str) -> dict[str, Any]:
    """SCHEDULER's fields of a diffusers folder; Stable Diffusion 1's for any other source. Raises
    WeightsError for a noise process or schedule that is not implemented."""
    root = Path() if name_of(source) in PUBLISHED else weights.resolve(source)
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        named = weights.read_json(path, {"_class_name": SCHEDULER["_class_name"]})
        return checked(SAMPLERS[named["_class_name"]] | named, SCHEDULER, path)
    return checked(_LDM, SCHEDULER, source)


def alphas_of(source: str) -> Tensor:
    """The source's alpha_bar at each timestep, (1000,) float32."""
    settings = scheduler(source)
    return alphas_bar(settings["beta_start"], settings["beta_end"], settings["beta_schedule"])


def load_pipeline(
    source: str, device: str = "cpu", dtype: torch.dtype = torch.float32, predicts_v: bool | None = None
) -> Pipeline:
    """The pipeline of a registry name, a diffusers folder or a single file (see weights.load).

    predicts_v None: use `trained_as`; where that is None, noise, with a warning.
    """
    kinds = ("unet", "vae", "clip-text")
    weights.require_fed(source, *kinds)
    parts = (weights.load(kind, source, dtype=dtype, device=device) for kind in kinds)
    predicts_v = trained_as(source)[1] if predicts_v is None else predicts_v
    if predicts_v is None:
        log.warning("%s: the U-Net's target is not stated; noise is assumed, --predicts-v for v", source)
    return Pipeline(*parts, weights.load_tokenizer(source), bool(predicts_v), alphas_of(source))


# ============================================================================================================
# Section 4.5: the swap
# ============================================================================================================


def swapped(unet: UNet, encoder: UNetEncoder) -> UNet:
    """A copy of `unet` with the trained encoder half and the original decoder half.

    Paper: "replacing the U-Net": only the encoder half was trained, so only it is replaced. Raises
    weights.WeightsError for an encoder of other sizes.
    """
    if encoder.config != unet.config:
        raise weights.WeightsError(f"the trained U-Net has other sizes: {encoder.config}, not {unet.config}")
    merged = copy.deepcopy(unet)
    like = next(unet.parameters())
    trained = {name: value.to(like) for name, value in encoder.state_dict().items()}
    merged.load_state_dict(unet.state_dict() | trained)
    return merged.eval()


def swapped_by_run(unet: UNet, folder: str | Path, source: str) -> UNet:
    """`swapped` with a run's U-Net. Raises WeightsError if the run has no pretrained U-Net."""
    run = load_run(folder)
    if run.config["backbone"] != "unet" or run.config.get("train_blocks") == 0:
        raise weights.WeightsError(f"{folder}: the run trained no U-Net; give one of --backbone unet")
    if run.config.get("random_start"):
        raise weights.WeightsError(
            f"{folder}: its U-Net was trained from scratch (--random-start) and cannot replace part of a "
            "pretrained one"
        )
    if run.config["weights"] != source:
        raise weights.WeightsError(
            f"{folder}: the run started from {run.config['weights']}; give --weights {run.config['weights']}"
        )
    return swapped(unet, run.regressor.backbone.unet)


def after(steps: int, first: UNet, then: UNet) -> Callable[[int], UNet]:
    """The U-Net of each step: `first` for the first n steps (paper: 1), then `then`."""
    return lambda i: first if i < steps else then


# ============================================================================================================
# Figure 7: cross-attention maps
# ============================================================================================================


@contextmanager
def attention_maps(unet: UNet) -> Iterator[list[Tensor]]:
    """Context manager: the cross-attention maps of all layers, (B, h, w, 77), averaged over heads.

    One entry for each layer and call; layers with a 1x1 grid are skipped.
    """
    maps: list[Tensor] = []
    grid: list[int] = []  # of the U-Net's input latents

    def record_grid(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grid[:] = inputs[0].shape[-2:]

    @torch.no_grad()
    def record_attention(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        x, context = inputs
        q, k = (
            y.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for y in (module.to_q(x), module.to_k(context))
        )
        attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, heads, h·w, 77)
        height, width = grid
        while height * width > x.shape[1]:  # the strided convolutions halve it
            height, width = -(-height // 2), -(-width // 2)
        if x.shape[1] > 1:
            maps.append(attended.mean(dim=1).unflatten(1, (height, width)).float().cpu())

    handles = [unet.register_forward_pre_hook(record_grid)]
    handles += [
        module.register_forward_pre_hook(record_attention)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def word_maps(
    maps: Sequence[Tensor], n: int, prompt: str, tokenizer: weights.ClipTokenizer
) -> list[tuple[str, Tensor]]:
    """Each word of the prompt with the mean of its tokens' maps over layers and steps, (h, w) in [0, 1].

    maps: from `attention_maps`, for one prompt and n pictures; with guidance each entry has 2n rows, negative
    prompt first. Each map is stretched to its own range, as in the figure.
    """
    finest = max((tuple(entry.shape[1:3]) for entry in maps), key=math.prod)
    total = torch.zeros(*finest, maps[0].shape[-1])
    for entry in maps:
        mean = entry[-n:].mean(dim=0).permute(2, 0, 1)[None]  # (1, 77, h, w)
        stretched = nn.functional.interpolate(mean, size=finest, mode="bilinear", align_corners=False)
        total += stretched[0].permute(1, 2, 0)
    by_word, position = [], 1  # after the start mark
    for word in prompt.split():
        length = len(tokenizer.tokenizer.encode(word, add_special_tokens=False).ids)
        if position + length > total.shape[-1] - 1:
            break
        seen = total[..., position : position + length].mean(dim=-1)
        by_word.append((word, (seen - seen.min()) / (seen.max() - seen.min()).clamp_min(1e-12)))
        position += length
    return by_word


# ============================================================================================================
# Pictures and the command line
# ============================================================================================================


def picture(pixels: Tensor) -> Image.Image:
    """uint8 (H, W, 3) -> a picture."""
    return Image.fromarray(pixels.numpy())


def save(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG atomically and print its path."""
    png = io.BytesIO()
    image.save(png, "PNG", pnginfo=info)
    atomic_write(path, png.getvalue())
    print(path)


def enlarged(image: Image.Image, side: int = 192) -> Image.Image:
    """Small pictures enlarged by an integer factor."""
    zoom = max(1, side // image.height)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def grid_picture(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str]
) -> Image.Image:
    """Rows of pictures under their columns' titles, each row's name above it."""
    rows = [[enlarged(image) for image in row] for row in rows]
    width, height, line = rows[0][0].width, rows[0][0].height, 16
    page = Image.new("RGB", (len(columns) * (width + 4), line + len(rows) * (height + line + 4)), "white")
    draw = ImageDraw.Draw(page)
    for j, title in enumerate(columns):
        draw.text((j * (width + 4) + 2, 2), title, "black")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = line + i * (height + line + 4)
        draw.text((2, y + 2), name, "black")
        for j, image in enumerate(row):
            page.paste(image, (j * (width + 4), y + line))
    return page


def heat(image: Image.Image, seen: Tensor) -> Image.Image:
    """The picture darkened where the word's attention is low."""
    mask = Image.fromarray((seen * 255).to(torch.uint8).numpy()).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(image, Image.eval(image, lambda level: level // 6), mask)


def described(prompt: str, args: argparse.Namespace, seed: int, size: tuple[int, int]) -> PngInfo:
    """The settings as Stable Diffusion's front ends write them into a PNG."""
    text = " ".join(prompt.split()) + (f"\nNegative prompt: {args.negative}" if args.negative else "")
    text += f"\nSteps: {args.steps}, Sampler: DDIM, CFG scale: {args.guidance:g}, Seed: {seed}, "
    text += f"Size: {size[1]}x{size[0]}, Model: {args.weights}"
    if args.swap:
        text += f", Swap: {Path(args.swap[0]).name} after {args.swap_after}"
    info = PngInfo()
    info.add_text("parameters", text)
    return info


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count = number(int, 1)
    add("prompts", type=decodable, nargs="+", metavar="PROMPT")
    source = "sd-1, sd-2, sd-mini, a diffusers folder or a single file (default sd-mini)"
    add("--weights", default="sd-mini", help=source)
    add("--n", type=number(int, 1, 10**6), default=1, help="pictures for each prompt (default 1)")
    seeds = "seed of each prompt's first picture, +1 for each further one (default 0)"
    add("--seed", type=number(int, 0), default=0, help=seeds)
    add("--steps", type=number(int, 1, TRAIN_STEPS - 1), default=50, help="DDIM steps (default 50)")
    scale = "guidance scale, 1 = none (default 7.5)"
    add("--guidance", type=number(float, -1e6, 1e6), default=7.5, help=scale)
    add("--negative", type=decodable, default="", metavar="TEXT", help="negative prompt")
    sides = "height and width in pixels, multiples of 8 (default: the training size)"
    add("--size", type=number(int, 8, 2048), nargs=2, metavar=("H", "W"), help=sides)
    add("--batch-size", type=count, default=8, help="pictures per batch (default 8)")
    runs = "draw with the U-Net of this train.py run; repeat for --grid runs"
    add("--swap", action="append", metavar="RUN", help=runs)
    before = "steps of the original U-Net before the swap (default 1, the paper's)"
    add("--swap-after", type=number(int, 0), default=1, metavar="N", help=before)
    columns = "one image with a column per number of steps N,N,..., or per run"
    add("--grid", metavar="N,N,...|runs", help=columns)
    add("--attention", action="store_true", help="also write cross-attention maps")
    target = "the U-Net predicts v (default: from the model)"
    add("--predicts-v", action="store_true", default=None, help=target)
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default float32)")
    add("--out", type=Path, default=Path("pictures"), metavar="FOLDER", help="(default pictures)")
    args = parser.parse_args(argv)
    args.grid_steps = []
    if args.grid is not None and args.grid != "runs":
        try:
            args.grid_steps = [int(part) for part in args.grid.split(",")]
        except ValueError:
            parser.error(f"--grid {args.grid}: give numbers of steps, e.g. 1,5,25, or runs")
    for occurs, message in conflicts(args):
        if occurs:
            parser.error(message)
    return args


def conflicts(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """(whether it occurs, message) for each conflict between options."""
    grid, swap, after = args.grid is not None, args.swap or [], f"--swap-after {args.swap_after}:"
    beyond = any(not 0 <= step <= args.steps for step in args.grid_steps)
    return [
        (any(side % 8 for side in args.size or ()), "--size: must be multiples of 8"),
        (args.seed >= 2**63 - args.n, f"--seed {args.seed}: must be from 0 to less than 2^63"),
        (bool(args.negative) and args.guidance == 1, "--negative: --guidance 1 draws without it; remove one"),
        (args.swap_after != 1 and not swap, "--swap-after: only --swap uses it; give --swap RUN"),
        (args.swap_after != 1 and bool(args.grid_steps), "--swap-after: --grid sets it; remove one"),
        (args.swap_after > args.steps, f"{after} must be 0 to --steps ({args.steps})"),
        (
            args.attention and (grid or args.n > 1),
            "--attention draws one picture of each prompt: remove --grid and --n",
        ),
        (
            args.attention and bool(swap) and args.swap_after == args.steps,
            f"{after} leaves no step of the run's U-Net for --attention",
        ),
        (grid and not swap, "--grid compares with a trained U-Net: give --swap RUN"),
        (len(swap) > 1 and args.grid != "runs", "several --swap runs need --grid runs"),
        (beyond, f"--grid {args.grid}: must be 0 to --steps ({args.steps})"),
    ]


def draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    args: argparse.Namespace,
    unet_at: Callable[[int], UNet] | None = None,
    title: str = "drawing",
    on_batch: Callable[[int, Tensor], None] | None = None,
) -> list[Image.Image]:
    """Pictures of the prompts with their seeds, for the parsed options."""
    options = {"negative": args.negative, "steps": args.steps, "guidance": args.guidance, "unet_at": unet_at}
    drawn = pipeline.draw(prompts, seeds, args.size, args.batch_size, title, on_batch, **options)
    return [picture(x) for x in drawn]


def write_pictures(args: argparse.Namespace) -> None:
    side, _ = trained_as(args.weights)
    args.size = tuple(args.size or (side, side))
    device = weights.resolve_device(args.device)
    pipeline = load_pipeline(args.weights, device, getattr(torch, args.dtype), args.predicts_v)
    trained = [swapped_by_run(pipeline.unet, folder, args.weights) for folder in args.swap or []]
    args.out.mkdir(parents=True, exist_ok=True)
    with exclusive(args.out, f"{args.out}: another command draws into it; waiting for it to end"):
        own = (OWN_NAME.fullmatch(file.name) for file in args.out.glob("*.png"))
        first = 1 + max((int(name[1]) for name in own if name), default=-1)
        write_new_pictures(args, pipeline, trained, first)


def write_new_pictures(args: argparse.Namespace, pipeline: Pipeline, trained: list[UNet], first: int) -> None:
    """Pictures, or pages of them, numbered from `first` on."""
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    seeds = [args.seed + i for _ in args.prompts for i in range(args.n)]
    if args.grid:
        if args.grid == "runs":
            names = [Path(folder).name for folder in args.swap]
            titles = args.swap if len(set(names)) < len(names) else names
            columns = [after(args.swap_after, pipeline.unet, unet) for unet in trained]
        else:
            titles = [f"swapped after {n}" for n in args.grid_steps]
            columns = [after(n, pipeline.unet, trained[0]) for n in args.grid_steps]
        titles, columns = ["original", *titles], [None, *columns]
        drawn = [
            draw(pipeline, prompts, seeds, args, unet_at, title)
            for title, unet_at in zip(titles, columns, strict=True)
        ]
        names = [f"{prompt}  (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)]
        page = grid_picture(list(zip(*drawn, strict=True)), titles, names)
        save(page, args.out / f"grid-{first:03d}.png")
        return
    unet_at = after(args.swap_after, pipeline.unet, trained[0]) if trained else None
    if args.attention:
        for number, prompt in enumerate(args.prompts, first):
            with attention_maps(trained[0] if trained else pipeline.unet) as maps:
                image = draw(pipeline, [prompt], [args.seed], args, unet_at)[0]
            seen = word_maps(maps, 1, prompt, pipeline.tokenizer)
            row = [image, *(heat(image, where) for _, where in seen)]
            page = grid_picture([row], ["", *(word for word, _ in seen)], [prompt])
            save(page, args.out / f"attention-{number:03d}.png")
        return

    def keep(start: int, batch: Tensor) -> None:
        for number, pixels in enumerate(batch, start):
            path = args.out / f"{first + number:03d}-seed{seeds[number]}.png"
            save(picture(pixels), path, described(prompts[number], args, seeds[number], args.size))

    draw(pipeline, prompts, seeds, args, unet_at, on_batch=keep)
    if pipeline.tokenizer.truncated:
        log.warning("prompts were cut to 75 tokens, the text tower's limit")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    return run_command(lambda: write_pictures(args), "stopped; finished pictures are kept")


if __name__ == "__main__":
    sys.exit(main())
