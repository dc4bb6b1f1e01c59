"""Share of each prompt's content that the probe finds in the miniature's pictures.

    python -m mini.judge                     500 one-subject and 500 two-subject prompts: shares realised
    python -m mini.judge --sheet FILE.png    64 pictures with their prompts

The prompts are not in the miniatures' training data. Each picture has its own seed.
The same is measured on complete drawings, and on these after the autoencoder, to separate errors of the probe
and the autoencoder. Writes results/generated.md and .json.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import generate
from command import Parser, number, positive, run_command
from files import atomic_write, write_json
from mini import drawbench, naming, scenes
from mini.scenes import Scene

SEED = 3_000_007


def new_scenes(n: int, things: int, seed: int = SEED) -> list[Scene]:
    """n truthful scenes with `things` subjects and prompts unseen in training."""
    chosen, index, seen = [], 0, set(drawbench.training_prompts())
    while len(chosen) < n:
        scene = scenes.candidate(seed, index, truthful=True)
        index += 1
        if len(scene.said.things) == things and scene.prompt not in seen:
            chosen.append(scene)
            seen.add(scene.prompt)
    return chosen


def generated(pipeline: generate.Pipeline, prompts: list[str], steps: int, guidance: float) -> np.ndarray:
    """Pictures uint8 (n, 3, 64, 64), with seeds 0, 1, ..."""
    drawn = pipeline.draw(prompts, range(len(prompts)), (64, 64), steps=steps, guidance=guidance)
    return drawn.permute(0, 3, 1, 2).contiguous().numpy()


def drawings(chosen: Sequence[Scene]) -> np.ndarray:
    """The scenes' drawings, uint8 (n, 3, 64, 64), made by several processes."""
    with scenes.workers(len(chosen)) as pool:
        drawn = pool.map(scenes.render, chosen, chunksize=25) if pool else map(scenes.render, chosen)
        return np.stack([np.asarray(image) for image in drawn]).transpose(0, 3, 1, 2).copy()


def shares(probe: naming.Namer, images: np.ndarray, chosen: list[Scene]) -> dict[str, dict]:
    """For each kind of label: the number named, and the share shown with its 95 % interval (Wilson's)."""
    return {
        slot: {"said": len(shown), "found": float(np.mean(shown)), "95": wilson(sum(shown), len(shown))}
        for slot, shown in naming.tally(probe, images, [scene.said for scene in chosen]).items()
    }


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.959964, hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5)
    return middle - half, middle + half


def text_of(result: dict) -> str:
    """The shares as Markdown."""
    lines = [
        "# What the miniature draws of what its prompts say",
        "",
        f"`{result['command']}`, {result['date']}. {result['n']} new prompts with one subject and as many "
        f"with two, a picture each: DDIM, {result['steps']} steps, guidance {result['guidance']:g}, "
        "seeds from 0. The share of the things said that the probe finds in the pictures; what it finds in "
        "drawings that show all they say, and in these after the autoencoder.",
    ]
    for things, by_kind in result["shares"].items():
        lines += ["", f"| {things} | said | generated | 95 % interval | drawn | through the autoencoder |"]
        lines.append("|---|---|---|---|---|---|")
        for slot, of in by_kind["generated"].items():
            low, high = of["95"]
            drawn, rebuilt = (by_kind[kind][slot]["found"] for kind in ("drawn", "reconstructed"))
            lines.append(
                f"| {slot} | {of['said']} | {of['found']:.1%} | {low:.1%} to {high:.1%} | {drawn:.1%} | "
                f"{rebuilt:.1%} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = Parser(
        prog="python -m mini.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=positive, default=500, help="prompts of each kind (default 500)")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (default 50)")
    scale = number(float, -1e6, 1e6)
    parser.add_argument("--guidance", type=scale, default=7.5, help="(default 7.5)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw 64 pictures and nothing else")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    args = parser.parse_args()
    if args.steps >= generate.TRAIN_STEPS:
        parser.error(f"argument --steps: {args.steps}: must be below {generate.TRAIN_STEPS}")
    pipeline = generate.load_pipeline("sd-mini")
    if args.sheet:
        some = [scenes.candidate(SEED, i, truthful=True).prompt for i in range(64)]
        images = generated(pipeline, some, args.steps, args.guidance)
        pictures = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in images]
        scenes.contact_sheet(list(zip(pictures, some, strict=True))).save(args.sheet)
        return
    probe, by_things = naming.load_probe(naming.FOLDER), {}
    for things, name in ((1, "one subject"), (2, "two subjects")):
        chosen = new_scenes(args.n, things)
        drawn = drawings(chosen)
        kinds = {
            "generated": generated(pipeline, [scene.prompt for scene in chosen], args.steps, args.guidance),
            "drawn": drawn,
            "reconstructed": naming.reconstructed(drawn),
        }
        by_things[name] = {kind: shares(probe, images, chosen) for kind, images in kinds.items()}
    result = {
        "command": f"python -m mini.judge --n {args.n} --steps {args.steps} --guidance {args.guidance:g}",
        "date": datetime.date.today().isoformat(),
        "n": args.n,
        "steps": args.steps,
        "guidance": args.guidance,
        "shares": by_things,
    }
    write_json(args.results / "generated.json", result)
    atomic_write(args.results / "generated.md", text_of(result))
    print(text_of(result))


if __name__ == "__main__":
    sys.exit(run_command(main, "stopped; the same command continues from what was saved"))
