"""The embedded default: image-prompt pairs drawn by the miniature Stable Diffusion, as DiffusionDB parts.

    python -m mini.generated                     8,000 pictures, 8 parts; resumes if interrupted
    python -m mini.generated FOLDER --parts 2    another folder, fewer parts
    python -m mini.generated FOLDER --weights second/sd-mini     by another generator
    python -m mini.generated --sheet FILE.png    the first 64 with their prompts and [unread words]

They are stored in mini/generated/, because drawing them takes half an hour on two cores. The prompts are
those of the drawn default; the pictures are lossless WebP, as in DiffusionDB's large set. An entry of a
part's JSON has the prompt "p", the seed "se", the guidance "c", the steps "st" and the sampler "sa", as in
DiffusionDB; and "undrawn", the words that the probe does not find in the picture (in drawn scenes: the words
omitted on purpose). card.json holds settings, the probe's shares, and the sha256 of each part.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import generate
import weights
from command import Parser, positive, run_command
from data import read_pairs
from files import atomic_write
from mini import naming, scenes
from mini.scenes import Scene
from mini.write import write_card

FOLDER = Path(__file__).parent / "generated"
STEPS, GUIDANCE, SAMPLER = 50, 7.5, "ddim"
BATCH = {"cpu": 50, "cuda": 500}


def image_name(scene: Scene, version: str) -> str:
    """A uuid, as in DiffusionDB, from the weights' version and the prompt."""
    digest = hashlib.sha256(f"{version} {scene.seed} {scene.prompt}".encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}.webp"


def version(source: str = "sd-mini") -> str:
    """Version of a generator: a hash of its weights."""
    return " ".join(weights.fingerprint(kind, source) for kind in ("unet", "vae", "clip-text"))


def unread(probe: naming.Namer, images: np.ndarray, chosen: list[Scene]) -> list[list[str]]:
    """The words of each prompt that the probe does not find in its picture."""
    missing = []
    for row, scene in zip(naming.name_pictures(probe, images), chosen, strict=True):
        shown = naming.shown_labels(row, scene.said)
        labels = zip(naming.named_labels(scene.said), scene.words, strict=True)
        missing.append([word for label, word in labels if not shown[label]])
    return missing


def webp(pixels: np.ndarray) -> bytes:
    """uint8 (3, H, W) as lossless WebP."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "WEBP", lossless=True, method=4)
    return file.getvalue()


def chosen_scenes(n: int) -> list[Scene]:
    """The first n scenes of the drawn default."""
    return [scenes.candidate(0, index) for index in scenes.kept_indices(n, 0)]


def generate_parts(
    folder: Path,
    parts: int = scenes.PARTS,
    per_part: int = scenes.PER_PART,
    steps: int = STEPS,
    source: str = "sd-mini",
    device: str = "cpu",
) -> Path:
    """The path folder/images; writes part-000001.zip ... there. Complete parts are kept."""
    pipeline, probe = generate.load_pipeline(source, device), naming.load_probe(naming.FOLDER)
    images, made = folder / "images", version(source)
    images.mkdir(parents=True, exist_ok=True)
    everything = chosen_scenes(parts * per_part)
    for number in range(1, parts + 1):
        chosen = everything[(number - 1) * per_part : number * per_part]
        names = [image_name(scene, made) for scene in chosen]
        path = images / f"part-{number:06d}.zip"
        if scenes.is_complete(path, names):
            continue
        pairs, title = [], f"drawing part {number} of {parts}"
        prompts, seeds = [scene.prompt for scene in chosen], [scene.seed for scene in chosen]
        options = {"title": title, "steps": steps, "guidance": GUIDANCE}
        drawn = pipeline.draw(prompts, seeds, (64, 64), BATCH[device.split(":")[0]], **options)
        drawn = drawn.permute(0, 3, 1, 2).contiguous().numpy()
        for scene, pixels, undrawn in zip(chosen, drawn, unread(probe, drawn, chosen), strict=True):
            entry = {"p": scene.prompt, "se": scene.seed, "c": GUIDANCE, "st": steps, "sa": SAMPLER}
            pairs.append((image_name(scene, made), webp(pixels), entry | {"undrawn": undrawn}))
        atomic_write(path, scenes.part_bytes(number, pairs))
    return images


def card(folder: Path, source: str) -> dict:
    """The card of the parts in `folder`, drawn by `source`."""
    pairs, probe = read_pairs(folder / "images"), naming.load_probe(naming.FOLDER)
    views = {scene.prompt: scene.said for scene in chosen_scenes(len(pairs))}
    shown = {}
    for things, name in ((1, "one subject"), (2, "two subjects")):
        rows = [i for i, prompt in enumerate(pairs.prompts) if len(views[prompt].things) == things]
        images = np.stack([np.asarray(pairs.image(i)).transpose(2, 0, 1) for i in rows])
        accuracy = naming.accuracy(probe, images, [views[pairs.prompts[i]] for i in rows])
        shown[name] = {"pictures": len(rows), **accuracy}
    return {
        "pictures": len(pairs),
        "prompts": f"of the drawn default: mini scenes, version {scenes.VERSION}, seed 0",
        "steps": pairs.meta[0]["st"],
        "guidance": GUIDANCE,
        "sampler": SAMPLER,
        "weights": version(source),
        "found by the probe": shown,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "images").glob("part-*.zip"))
        },
    }


def main() -> None:
    parser = Parser(
        prog="python -m mini.generated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="(default mini/generated)")
    parser.add_argument("--parts", type=positive, default=scenes.PARTS, help="of 1,000 pictures (default 8)")
    parser.add_argument("--weights", default="sd-mini", help="the generator (default sd-mini)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a sheet of the existing pairs")
    args = parser.parse_args()
    if args.sheet:
        pairs = read_pairs(args.folder)
        some = range(min(64, len(pairs)))
        texts = [scenes.bracketed(pairs.prompts[i], pairs.meta[i].get("undrawn", [])) for i in some]
        scenes.contact_sheet([(pairs.image(i), text) for i, text in enumerate(texts)]).save(args.sheet, "PNG")
        return
    command = f"python -m mini.generated --parts {args.parts}"
    command += f" --weights {args.weights}" if args.weights != "sd-mini" else ""
    device = weights.resolve_device(args.device)
    generate_parts(args.folder, args.parts, source=args.weights, device=device)
    write_card(args.folder, command, **card(args.folder, args.weights))
    print(args.folder)


if __name__ == "__main__":
    sys.exit(run_command(main, "stopped; repeat the command to resume"))
