"""Speed of the image encoders beside timm's, transformers' and diffusers'.

    python benchmarks/encoders.py                       ViT-B/16, Swin-T, CLIP ViT-B/32, SD 1's U-Net encoder
    python benchmarks/encoders.py vit-b-16 --rounds 9

Same sizes, random weights copied from the peer, same inputs, dtype (float32) and threads. Each round times
ours and the peer's, forward and forward + backward, in alternating order; the ratio is the median over the
rounds of peer / ours of the same round (above 1: ours is faster). The share of the peak is the floating-point
operations of our matrix products and convolutions per second, divided by those of one large matrix product.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import clip, swin, unet, vit
from weights import to_home


class DiffusersEncoder(nn.Module):
    """diffusers' down and middle blocks, as its own forward runs them."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        net = self.whole
        emb = net.time_embedding(net.time_proj(timesteps).to(latents.dtype))
        h = net.conv_in(latents)
        for block in net.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            h, _ = block(h, emb, encoder_hidden_states=context) if attends else block(h, emb)
        return net.mid_block(h, emb, encoder_hidden_states=context)


class OurEncoder(nn.Module):
    def __init__(self, encoder: unet.UNetEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encoder.encode(*inputs)


Pair = tuple[nn.Module, nn.Module, tuple[Tensor, ...]]


def vit_pair(batch: int) -> Pair:
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0)
    ours = vit.ViT(vit.CONFIGS["vit-b-16"])
    ours.load_state_dict(to_home("vit", theirs.state_dict()))
    return ours, theirs, (torch.randn(batch, 3, 224, 224),)


def swin_pair(batch: int) -> Pair:
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    ours = swin.Swin(swin.CONFIGS["swin-t"])
    ours.load_state_dict(to_home("swin", theirs.state_dict()))
    return ours, theirs, (torch.randn(batch, 3, 224, 224),)


def clip_pair(batch: int) -> Pair:
    config = transformers.CLIPVisionConfig(hidden_act="quick_gelu", projection_dim=512)
    theirs = transformers.CLIPVisionModelWithProjection(config)
    ours = clip.CLIPVision(clip.VISION_CONFIGS["clip-b-32"])
    ours.load_state_dict(to_home("clip-vision", theirs.state_dict()))
    return ours, theirs, (torch.randn(batch, 3, 224, 224),)


def unet_pair(batch: int) -> Pair:
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768)  # diffusers' defaults are SD 1's sizes
    ours = unet.UNet(unet.CONFIGS["sd-1"])
    ours.load_state_dict(to_home("unet", theirs.state_dict()))
    theirs.up_blocks = ours.output_blocks = ours.out = None
    inputs = torch.randn(batch, 4, 32, 32), torch.zeros(batch, dtype=torch.long), torch.randn(batch, 77, 768)
    return OurEncoder(ours), DiffusersEncoder(theirs), inputs


CASES: dict[str, tuple[Callable[[int], Pair], int]] = {
    "vit-b-16": (vit_pair, 8), "swin-t": (swin_pair, 8), "clip-b-32": (clip_pair, 16), "sd-1": (unet_pair, 4),
}


def answer(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.image_embeds


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(*inputs)
    return run


def both_ways(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        answer(model(*inputs)).square().mean().backward()
    return run


def peak() -> float:
    """Floating-point operations per second of a product of two 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="MODEL", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown model: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    top = peak()
    print(f"{args.threads} threads, torch {torch.__version__}, float32, {args.rounds} rounds; "
          f"peak {top / 1e9:.0f} GFLOP/s")
    print("model      batch               pass     ours     peer            peer / ours  of peak")
    for name in args.cases or CASES:
        make, batch = CASES[name]
        ours, theirs, inputs = make(batch)
        ours.eval()
        theirs.eval()
        difference = (answer(ours(*inputs)) - answer(theirs(*inputs))).abs().max()
        assert difference < 1e-3, f"{name}: the outputs differ by {difference:.1e}; the timing is stopped"
        for what, make_run in (("forward", forward), ("forward + backward", both_ways)):
            runs = [make_run(model, inputs) for model in (ours, theirs)]
            with FlopCounterMode(display=False) as counter:
                runs[0]()
            runs[1]()
            times = []
            for k in range(args.rounds):
                a, b = (seconds(run) for run in (runs if k % 2 == 0 else runs[::-1]))
                times.append((a, b) if k % 2 == 0 else (b, a))
            ratios = sorted(b / a for a, b in times)
            a, b = (statistics.median(column) for column in zip(*times, strict=True))
            spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{name:10} {batch:5} {what:>18} {a:7.3f}s {b:7.3f}s {spread:>22} "
                  f"{counter.get_total_flops() / a / top:8.0%}", flush=True)


if __name__ == "__main__":
    main()
