"""Section 4.4: table 4, images drawn again from their predicted prompts; section 4.7: figure 10.

The prompt of each image is predicted by the rows of table 3, by PEZ and PH2P, and by controls that also
search for each image. Stable Diffusion draws a picture from each prompt, with the settings of the data and
the same noise for all rows, and the picture is compared with the image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import clipscore
import data
import inversion
import weights
from files import atomic_write, write_json
from schema import OBJECT, many, read_value
from tables.exhibit import Exhibit, bullets, interval, markdown, page, provenance_text, short
from tables.generation import (
    ALL_HEARD,
    Request,
    drawing_settings,
    kept_pictures,
    labels_shown,
    open_pipeline,
    slot_shares,
    spread,
)
from tables.probe import default_views
from tables.prompts import (
    BEST,
    PAPERS_SCALE,
    RUNS,
    SCALES,
    STATISTICS,
    SWIN,
    TABLE_3_RUNS,
    TRUE,
    By,
    Scores,
    SeedPairs,
    clip_of,
    comparisons,
    comparisons_text,
    is_mini,
    pairs_of,
    rows_of,
)
from tables.runs import Plan
from training.captions import open_captioner_run
from training.metrics import (
    RESAMPLES,
    bootstrap_interval,
    bootstrap_weights,
    cosines,
    percentiles,
    rank_correlation,
    spearman,
)
from training.pictures import Line, sheet

log = logging.getLogger("tables")

IMAGES = 100  # of all seeds together
NOISE = 20_000_003  # first seed of the noise, which is not that of the images
BATCH = 20  # images that are searched for at a time
# Steps on a CPU with the miniature; otherwise the published ones: 3,000 for PEZ, 10,000 for PH2P.
MINI_STEPS = {"pez": 1000, "ph2p": 500, "swaps": 200}
RANDOM_PROMPTS = 100  # to which PEZ is compared
REDRAWN, PROBE = "image and redrawn image", "probe"
MEASURES = (REDRAWN, PROBE)
BOUNDS = ("random training prompt", "most central training prompt", "decoder, true embedding", TRUE)
SEARCHES = {
    "pez": "PEZ", "ph2p": "PH2P", "swaps": "token swaps", "best-of": "best of 16 samples, BLIP + MLC + CL",
    "nearest": "nearest training prompt by CLIP",
}  # fmt: skip
PAPER = {
    ("PH2P", PAPERS_SCALE): 25.13, ("PH2P", REDRAWN): 0.7214, ("PEZ", PAPERS_SCALE): 26.14,
    ("PEZ", REDRAWN): 0.7458, (BEST, PAPERS_SCALE): 32.19, (BEST, REDRAWN): 0.7468,
}  # fmt: skip
COMPARISONS = (
    (BEST, "PEZ"),
    (BEST, "PH2P"),
    (BEST, "BLIP-2, not fine-tuned"),
    (BEST, "nearest prompt, Swin"),
    (BEST, "BLIP + MLC + CL"),
    (SEARCHES["best-of"], "BLIP + MLC + CL"),
    ("PEZ", "token swaps"),
    ("decoder, Swin", "nearest prompt, Swin"),
    (TRUE, BEST),
)
SHEET_ROWS = ("PEZ", "PH2P", BEST, TRUE)
SHEET_IMAGES, FIGURE_PROMPTS, FIGURE_DRAWS = 8, 3, 5  # the paper's figure 10 has three prompts, five noises

# ============================================================================================================
# Prompts
# ============================================================================================================


@dataclass(frozen=True)
class Chosen:
    """The images: positions among the test pairs of each seed."""

    every: list[SeedPairs]
    positions: list[list[int]]

    @classmethod
    def of(cls, every: list[SeedPairs]) -> Chosen:
        """IMAGES in all, as many of each seed, no image twice, spread over the data."""
        taken: set[int] = set()
        positions = []
        for k, pairs in enumerate(every):
            rows = pairs.prepared.splits["test"].tolist()
            free = [i for i, row in enumerate(rows) if row not in taken]
            positions.append(spread(free, IMAGES // len(every) + (k < IMAGES % len(every))))
            taken |= {rows[i] for i in positions[-1]}
        return cls(every, positions)

    def by_seed(self, of: Callable[[SeedPairs], Sequence]) -> list[list]:
        """The items of the images, of a function that has an item for each test pair."""
        return [[each[i] for i in at] for each, at in zip(map(of, self.every), self.positions, strict=True)]


def search_options(plan: Plan, pairs: SeedPairs, method: str) -> inversion.Options:
    """The settings of a search for a seed's images; its text file of training prompts is written here."""
    changes: dict[str, Any] = {"clip": "clip-mini" if is_mini(plan) else "clip-l-14", "seed": pairs.seed}
    if is_mini(plan) and method in MINI_STEPS:
        changes["steps"] = MINI_STEPS[method]
    if method == "ph2p":
        changes |= {"weights": plan.sources["unet"], "keep": "text" if is_mini(plan) else "drawing"}
    if method == "best-of":
        changes["captioner"] = str(plan.run_folder(RUNS["BLIP + MLC + CL"], pairs.seed) / "blip")
    if method == "nearest":
        lines = "\n".join(" ".join(prompt.split()) for prompt in pairs.train_prompts)
        path = plan.folder / "kept" / f"prompts-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.txt"
        atomic_write(path, lines)
        changes["prompts"] = str(path)
    return inversion.settings(method, **changes)


def searched(plan: Plan, o: inversion.Options, pictures: Sequence[Image.Image]) -> list[dict]:
    """The rows of `inversion.inverter` of each picture, and their "seconds", kept in the runs' folder."""
    kinds = {"clip": "clip-text", "captioner": "blip", "weights": "unet"}
    models = [weights.fingerprint(kinds[name], value) for name, value in vars(o).items() if name in kinds]
    settings = vars(o) | {"prompts": Path(getattr(o, "prompts", "")).name}
    rows: list[dict] = []
    invert = None
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        key = json.dumps([settings, models, [inversion.digest(picture) for picture in batch]])
        path = plan.folder / "kept" / f"{o.method}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            log.info("%s: images %d to %d of %d", o.method, start + 1, start + len(batch), len(pictures))
            invert = invert or inversion.inverter(o, plan.device)
            started = time.monotonic()
            found = invert(batch)
            seconds = (time.monotonic() - started) / len(batch)
            write_json(path, [row | {"seconds": round(seconds, 3)} for row in found])
        rows += read_value(path, many(OBJECT))
    return rows


def above_random(o: inversion.Options, rows: Sequence[dict], pictures: Sequence[Image.Image]) -> int:
    """The number of images for which the slots of PEZ have a higher cosine than RANDOM_PROMPTS prompts of as
    many random tokens."""
    clip = inversion.load_clip(o.clip)
    allowed = inversion.Candidates(clip.text, clip.tokenizer, o.candidates)
    numbers = torch.Generator().manual_seed(o.seed)
    index = torch.randint(len(allowed.words), (RANDOM_PROMPTS, o.tokens), generator=numbers)
    with torch.no_grad():
        best = (clip.images(pictures) @ clip.slots(allowed.rows[index]).T).amax(dim=1)
    return sum(row["slots_cosine"] > value for row, value in zip(rows, best.tolist(), strict=True))


# ============================================================================================================
# Table 4
# ============================================================================================================


def search_texts(
    plan: Plan, chosen: Chosen, pictures: Sequence[Sequence[Image.Image]]
) -> tuple[dict[str, list[str]], dict]:
    """(texts of the images by search; steps and seconds for an image by search, and `above_random`)."""
    texts, about = {}, {"steps": {}, "seconds": {}}
    for method, name in SEARCHES.items():
        options = [search_options(plan, pairs, method) for pairs in chosen.every]
        parts = [searched(plan, o, of) for o, of in zip(options, pictures, strict=True)]
        texts[name] = [row["prompt"] for part in parts for row in part]
        about["seconds"][name] = float(np.mean([row["seconds"] for part in parts for row in part]))
        about["steps"][name] = getattr(options[0], "steps", None)
        if method == "pez":
            about["above_random"] = sum(map(above_random, options, parts, pictures))
    return texts, about


class Redrawing:
    """Pictures drawn from texts, and their scores beside the images."""

    def __init__(self, plan: Plan, images: Sequence[Image.Image], prompts: Sequence[str]):
        self.plan, self.pipeline = plan, open_pipeline(plan)
        self.scorer = clipscore.Scorer("clip-mini" if is_mini(plan) else "clip-l-14", plan.device)
        self.images = self.scorer.images(images)
        views = default_views() if is_mini(plan) else {}
        self.requests = [Request(prompt, views.get(prompt)) for prompt in prompts]

    def pictures(self, texts: Sequence[str]) -> np.ndarray:
        """Pictures uint8 (n, H, W, 3); the noise of an image depends on its place alone."""
        noise = list(range(NOISE, NOISE + len(texts)))
        return kept_pictures(self.plan, self.pipeline, list(texts), noise)

    def scores(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """By measure, (n,); the probe needs the views of all prompts."""
        embedded = self.scorer.images([Image.fromarray(x) for x in pictures])
        found = {REDRAWN: clipscore.cosines(self.images, embedded)}
        if all(request.view for request in self.requests):
            shown = labels_shown(np.asarray(pictures), self.requests, self.plan.device)
            found[PROBE] = np.array(slot_shares(shown)[ALL_HEARD])
        return found


def compute_table_4(plan: Plan) -> dict:
    """The scores of the prompts of each row and of the pictures drawn from them."""
    chosen = Chosen.of([pairs_of(plan, seed, TABLE_3_RUNS) for seed in plan.seeds])
    everything = chosen.every[0].prepared.pairs  # the same for all seeds
    rows, prompts = chosen.by_seed(lambda p: p.prepared.splits["test"]), chosen.by_seed(lambda p: p.prompts)
    pictures = [[everything.image(i) for i in of] for of in rows]
    texts, about = search_texts(plan, chosen, pictures)
    texts |= {row.name: sum(chosen.by_seed(row.texts), []) for row in rows_of(plan)}

    flat = sum(pictures, [])
    scores = Scores(everything.subset(np.concatenate(rows)), clip_of(plan), plan.device)
    redrawing, values, drawn = Redrawing(plan, flat, sum(prompts, [])), {}, {}
    for name, of in texts.items():
        drawn[name] = redrawing.pictures(of)
        found = redrawing.scores(drawn[name]) | scores.of(of)
        stops = np.cumsum([len(part) for part in rows])[:-1]
        values[name] = {metric: np.split(each, stops) for metric, each in found.items()}
    tested = (PAPERS_SCALE, *measures(values))
    return about | {
        "images": len(flat),
        "clip": clip_of(plan),
        "drawing": drawing_settings(),
        "pictures": len(texts) * len(flat),
        "trainings": len(TABLE_3_RUNS) * len(plan.seeds),
        "rows": [entry(name, of) for name, of in values.items()],
        "buys": bought(values),
        "tests": comparisons(values, prompts, COMPARISONS, tested, PAPER),
        "texts": texts,
        "files": {"table-4.png": redrawn_sheet(flat, drawn, texts)},
    }


def measures(values: By) -> list[str]:
    """MEASURES, without the probe where there is none."""
    return [measure for measure in MEASURES if measure in values[TRUE]]


def entry(name: str, by_metric: dict[str, list[np.ndarray]]) -> dict:
    """A row's means with intervals over the images, and the rank correlations of the text's scores with
    those of its picture."""
    whole = {metric: np.concatenate(of) for metric, of in by_metric.items()}
    found: dict[str, Any] = {"name": name}
    found["paper"] = [PAPER.get((name, metric)) for metric in (PAPERS_SCALE, REDRAWN)]
    found["means"] = {metric: float(of.mean()) for metric, of in whole.items()}
    found["images_95"] = {metric: bootstrap_interval(of, 0, RESAMPLES) for metric, of in whole.items()}
    found["ranks"] = {x: rank_correlation(whole[x], whole[REDRAWN]) for x in ("cosine", "CLIPScore")}
    return found


def bought(values: By) -> list[dict]:
    """Whether a text with a higher score draws a better picture of the same image: for each score of the text
    and each measure of the picture the rank correlation over the rows, mean over the images; the slope of the
    measure within images; and the rank correlation of the rows' means. Without BOUNDS."""
    found = []
    names = [name for name in values if name not in BOUNDS]
    for x in ("cosine", "CLIPScore"):
        for y in measures(values):
            a, b = (np.array([np.concatenate(values[name][of]) for name in names]) for of in (x, y))
            within = np.array([spearman(*each) for each in zip(a.T, b.T, strict=True)])
            within = within[~np.isnan(within)]
            dx, dy = a - a.mean(axis=0), b - b.mean(axis=0)
            weight = np.concatenate([np.ones((1, a.shape[1])), bootstrap_weights(a.shape[1], RESAMPLES)])
            slopes = weight @ (dx * dy).sum(axis=0) / (weight @ (dx**2).sum(axis=0))
            found.append(
                {"text": x, "picture": y, "rows": len(names), "images": len(within)}
                | {"spearman": float(within.mean()), "spearman_95": bootstrap_interval(within, 0, RESAMPLES)}
                | {"slope": float(slopes[0]), "slope_95": percentiles(slopes[1:])}
                | {"rows_spearman": spearman(a.mean(axis=1), b.mean(axis=1))}
            )
    return found


def redrawn_sheet(
    pictures: Sequence[Image.Image], drawn: dict[str, np.ndarray], texts: dict[str, list[str]]
) -> bytes:
    """A PNG of the first images, each beside the pictures of SHEET_ROWS, with their texts."""
    rows = []
    for i in spread(range(len(pictures)), SHEET_IMAGES):
        beside = [Image.fromarray(np.asarray(drawn[name][i])) for name in SHEET_ROWS]
        rows.append(([pictures[i].copy(), *beside], [Line(name, texts[name][i]) for name in SHEET_ROWS]))
    return sheet(rows)


def table_4_text(result: dict) -> str:
    """Table 4 as Markdown."""
    of_probe = PROBE in result["rows"][0]["means"]
    rows = []
    for row in result["rows"]:
        mean, limits = row["means"], row["images_95"]
        cells = [row["name"], *(mean[metric] for metric in (PAPERS_SCALE, "CLIPScore", "cosine"))]
        cells.append(f"{short(mean[REDRAWN])} ({interval(limits[REDRAWN])})")
        cells += [f"{short(mean[PROBE])} ({interval(limits[PROBE])})"] * of_probe
        cells += [short(of["spearman"], True) for of in row["ranks"].values()]
        seconds = result["seconds"].get(row["name"])
        cells.append("" if seconds is None else f"{seconds:.1f}")
        rows.append((*cells, *("" if number is None else f"{number:.4g}" for number in row["paper"])))
    columns = f"prompt | {PAPERS_SCALE} | CLIPScore | cosine | {REDRAWN}{f' | {PROBE}' * of_probe}"
    columns += " | ranks: cosine | ranks: CLIPScore | seconds | paper: RefCLIPScore | paper: images"
    drawing, steps = result["drawing"], {name: n for name, n in result["steps"].items() if n}
    published = " (published: PEZ 3,000, PH2P 10,000)" if result["clip"] == "clip-mini" else ""
    notes = (
        f"{REDRAWN}: cosine of CLIP's embeddings, by clip-mini or else ViT-L/14. {PROBE}: the share of the "
        f"things in the true prompt, {ALL_HEARD}, that the probe finds in the redrawn picture. In brackets: "
        "95 % interval by bootstrap over the images.",
        f"Drawn with {drawing['steps']} steps and guidance {drawing['guidance']:g}, as the embedded data. "
        "The noise of an image is the same for all rows and is not that of the data, so that the true prompt "
        f"draws another picture: its row is the ceiling. {result['pictures']:,} pictures in all.",
        f"Steps: {', '.join(f'{name} {n:,}' for name, n in steps.items())}{published}. Seconds: of a search "
        "for one image, where it was computed. The texts of all searches are encoded again and scored so. "
        f"PEZ has a higher objective than each of {RANDOM_PROMPTS} prompts of as many random tokens for "
        f"{result['above_random']} of {result['images']} images.",
        "Ranks: Spearman's correlation over the images of the text's score and the cosine of the images.",
        SCALES,
        STATISTICS + " Holm: adjusts Wilcoxon's p for the paper's claims.",
        "The paper calls the cosine of the images CLIPScore; its numbers are of DiffusionDB.",
    )
    return page(
        "Table 4: images drawn again from predicted prompts",
        f"{provenance_text(result)} {result['images']} test images, as many of each seed. "
        f"{result['trainings']} trainings, those of table 3. table-4.png shows {', '.join(SHEET_ROWS)}.",
        markdown(columns, rows),
        "## Does a higher score of the text buy a better picture?",
        bought_text(result["buys"]),
        "## Comparisons",
        comparisons_text(result["tests"], lambda test: test["wilcoxon_p"]),
        bullets(notes),
    )


def bought_text(rows: Sequence[dict]) -> str:
    """`bought` as Markdown."""
    cells = [
        (row["text"], row["picture"], short(row["spearman"], True), interval(row["spearman_95"], True))
        + (f"{row['slope'] / 100:+.5f}", " to ".join(f"{limit / 100:+.5f}" for limit in row["slope_95"]))
        + (short(row["rows_spearman"], True),)
        for row in rows
    ]
    columns = "score of the text | measure of the picture | rank correlation within an image | 95 % interval"
    columns += " | change for +.01 | 95 % interval | rank correlation of the rows' means"
    return (
        f"{rows[0]['rows']} rows, without {', '.join(BOUNDS)}. Intervals: bootstrap over the images.\n\n"
        f"{markdown(columns, cells)}"
    )


# ============================================================================================================
# Figure 10
# ============================================================================================================


def compute_figure_10(plan: Plan) -> dict:
    """Texts of the enhanced BLIP-2 for pictures of one prompt, each from other noise, and the cosines of
    their embeddings with the mean. Paper: three prompts, five pictures of each."""
    seed = plan.seeds[0]
    prompts = spread(pairs_of(plan, seed, (SWIN, RUNS[BEST])).prompts, FIGURE_PROMPTS)
    repeated = [prompt for prompt in prompts for _ in range(FIGURE_DRAWS)]
    noise = [NOISE + k for k in range(FIGURE_DRAWS)] * len(prompts)
    pictures = [Image.fromarray(x) for x in kept_pictures(plan, open_pipeline(plan), repeated, noise)]
    run = open_captioner_run(plan.run_folder(RUNS[BEST], seed), plan.device)
    texts = run.captions(torch.stack([data.image_tensor(x, run.preprocessing) for x in pictures]))
    embeddings = weights.load("minilm", device=plan.device).encode(texts).cpu().numpy()
    examples, rows = [], []
    for k, prompt in enumerate(prompts):
        part = slice(k * FIGURE_DRAWS, (k + 1) * FIGURE_DRAWS)
        of_mean = cosines(embeddings[part].mean(axis=0), embeddings[part])
        example = {"prompt": prompt, "texts": texts[part], "cosine_to_mean": float(of_mean.mean())}
        examples.append(example | {"deviation": float(of_mean.std())})
        lines = [Line("true prompt", prompt), *(Line("", text, "#1b4f8a") for text in texts[part])]
        rows.append((pictures[part], lines))
    return {"examples": examples, "draws": FIGURE_DRAWS, "files": {"figure-10.png": sheet(rows, 120)}}


def figure_10_text(result: dict) -> str:
    """Figure 10 as Markdown."""
    rows = [
        (example["prompt"], "; ".join(example["texts"]), example["cosine_to_mean"], example["deviation"])
        for example in result["examples"]
    ]
    return page(
        "Figure 10: texts for pictures of one prompt",
        f"{provenance_text(result)} {result['draws']} pictures of each prompt, each from other noise, and "
        f"their texts by {BEST} of the first seed, in the order of figure-10.png. Prompts evenly spread over "
        "the test pairs, not selected. Cosine: of the texts' embeddings with their mean; deviation: its "
        "standard deviation. Table noise has many prompts.",
        markdown("true prompt | texts | mean cosine to the mean | standard deviation", rows),
    )


REDRAWN_TABLES = {4: Exhibit(TABLE_3_RUNS, compute_table_4, table_4_text)}
REDRAWN_FIGURES = {10: Exhibit((SWIN, RUNS[BEST]), compute_figure_10, figure_10_text)}
