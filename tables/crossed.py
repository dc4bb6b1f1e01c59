"""Two generators and their pictures, crossed: does the white box read well because it made the picture?

Generator A is the embedded sd-mini (--weights) with its pictures (--data); generator B, of another seed, is
in the folder --second. Each reader is trained on both sets of pictures, which have the same prompts and
splits. The interaction (A on A - B on A) - (A on B - B on B) is positive if a U-Net reads its own pictures
better than the other U-Net does. It does not depend on which U-Net is better or which pictures are easier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import data
import weights
from schema import read_json
from tables.cells import MEAN, cell_texts, contrasts_text, frozen_cosines, part, trained_cosines
from tables.exhibit import Exhibit, bullets, markdown, page, provenance_text
from tables.runs import Plan, RunName
from training.inputs import pairs_folder, split_pairs

READERS = {  # backbone, its recipes on the pictures of A and of B
    "U-Net A": ("unet", "captions-empty", "captions-empty-on-second"),
    "U-Net B": ("unet", "second", "second-on-second"),
    "Swin": ("swin", "mlc", "mlc-on-second"),
    "ViT": ("vit", "mlc", "mlc-on-second"),
}
CELLS = {
    f"{reader} on {pictures}": RunName(backbone, recipe)
    for reader, (backbone, *recipes) in READERS.items()
    for pictures, recipe in zip("AB", recipes, strict=True)
}
CONTRASTS = {
    "(U-Net A on A − U-Net B on A) − (U-Net A on B − U-Net B on B)": (
        ("U-Net A on A", "U-Net B on B"),
        ("U-Net B on A", "U-Net A on B"),
    ),
    "(U-Net A on A − Swin on A) − (U-Net A on B − Swin on B)": (
        ("U-Net A on A", "Swin on B"),
        ("Swin on A", "U-Net A on B"),
    ),
    "U-Net A on A − Swin on A": (("U-Net A on A",), ("Swin on A",)),
    "U-Net A on B − Swin on B": (("U-Net A on B",), ("Swin on B",)),
    "U-Net B on A − Swin on A": (("U-Net B on A",), ("Swin on A",)),
    "U-Net B on B − Swin on B": (("U-Net B on B",), ("Swin on B",)),
}
FROZEN_SEEDS = (0, 1, 2, 3, 4)  # splits of the part without training
FOUND = "found by the probe"
FACTS = {  # of a generator: its card (vae, unet, pictures) and the keys there
    "autoencoder": ("vae", "command"),
    "the autoencoder was trained on": ("vae", "trained_on"),
    "PSNR of held-out pictures, dB": ("vae", "psnr_db"),
    "U-Net": ("unet", "command"),
    "the U-Net was trained on": ("unet", "trained_on"),
    "its loss on held-out pictures": ("unet", "held_out_loss"),
    "pictures": ("pictures", "command"),
    "single subjects that the probe finds": ("pictures", FOUND, "one subject", "subject"),
    "their colours": ("pictures", FOUND, "one subject", "colour"),
    "their places": ("pictures", FOUND, "one subject", "place"),
    "subjects, of two in a picture": ("pictures", FOUND, "two subjects", "subject"),
}


def require_same_pairs(plan: Plan) -> None:
    """Raises DataError unless both sets of pictures have the same prompts and the same split."""
    configs = [plan.config(CELLS[f"Swin on {pictures}"], plan.seeds[0]) for pictures in "AB"]
    (_, ours, splits), (_, others, their_splits) = (split_pairs(c, pairs_folder(c.data)) for c in configs)
    same = all(np.array_equal(rows, their_splits[name]) for name, rows in splits.items())
    if ours.prompts != others.prompts or not same:
        raise data.DataError(
            f"{configs[1].data}: its prompts or their split are not those of --data {plan.data}; draw the "
            "same prompts with both generators: python -m mini.generated"
        )


def facts(source: str, pictures: str) -> dict:
    """The FACTS of a generator from the cards beside its weights and its pictures; None without a card."""
    folder = weights.resolve(source)
    folders = {"vae": folder / "vae", "unet": folder / "unet", "pictures": pairs_folder(pictures)}
    paths = {name: place / "card.json" for name, place in folders.items()}
    cards = {name: read_json(path) for name, path in paths.items() if path.exists()}
    found: dict[str, Any] = {}
    for fact, keys in FACTS.items():
        value: Any = cards
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found[fact] = value
    return found


def compute(plan: Plan) -> dict:
    trained = part(plan.seeds, CONTRASTS, lambda seed: trained_cosines(plan, CELLS, seed))
    frozen = part(FROZEN_SEEDS, CONTRASTS, lambda seed: frozen_cosines(plan, CELLS, seed))
    sources = {"A": plan.sources["unet"], "B": str(plan.second / "sd-mini")}
    unets = {name: weights.fingerprint("unet", source) for name, source in sources.items()}
    pictures = {"A": plan.data, "B": str(plan.second / "generated")}
    generators = {name: facts(source, pictures[name]) for name, source in sources.items()}
    return {"unets": unets, "generators": generators} | trained | {"frozen": frozen}


def part_text(part: dict) -> tuple[str, str]:
    rows = cell_texts(part)
    cells = [(MEAN, *rows[MEAN], *rows[MEAN])]
    cells += [(reader, *rows[f"{reader} on A"], *rows[f"{reader} on B"]) for reader in READERS]
    columns = "reader | pictures of A | 95 % interval over seeds | pictures of B | 95 % interval over seeds"
    return markdown(columns, cells), contrasts_text(part)


def text(result: dict) -> str:
    frozen, cards = result["frozen"], [result["generators"][name] for name in "AB"]
    values = [(fact, *("" if card[fact] is None else str(card[fact]) for card in cards)) for fact in FACTS]
    generators = [[cell.removeprefix("0") for cell in row] for row in values]  # 23.16, .0991
    notes = (
        "A is the embedded sd-mini, B an autoencoder and a U-Net of another seed with A's text tower. Both "
        "drew the same prompts; the splits are the same. Swin and ViT are the embedded miniatures. A U-Net "
        "reads through its own autoencoder, with the empty text, so that no captioner takes part.",
        "The first contrast is the claim: it is positive if a U-Net reads its own pictures better than the "
        "other U-Net reads them. Half of it is the mean advantage of the U-Net that made the picture. The "
        "second contrast takes Swin in place of U-Net B. The others are shown for reference, without "
        "correction for their number.",
        "Student's intervals and tests over seeds; each seed has its own split. Bootstrap over the test "
        "pairs of all seeds, which does not cover chance in training. One pair of generators: chance in "
        "their training is not covered either.",
        f"Frozen features: no network is trained; seeds {', '.join(map(str, frozen['seeds']))}.",
    )
    frozen_title = "## Ridge regression on frozen features"
    return page(
        "Two generators and their pictures, crossed",
        provenance_text(result),
        *part_text(result),
        frozen_title,
        *part_text(frozen),
        "## The generators",
        markdown("from their cards | A | B", generators),
        bullets(notes),
    )


CROSSED = {
    "crossed": Exhibit(tuple(CELLS.values()), compute, text, needs="second", before=require_same_pairs)
}
