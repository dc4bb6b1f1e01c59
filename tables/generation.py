"""Section 4.5, tables 5 and 6: pictures generated with the trained U-Net; section 4.7: the effect of noise.

Both U-Nets draw each prompt from the same noise, so that all comparisons are paired. The judge of table 6
is the trained U-Net itself, as in the paper; and, because it helped to draw half of the pictures, also the
run of the next seed. The judge of table 5 is the probe, in place of people.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data
import generate
import reverse_sd
import weights
from files import require_file
from mini import drawbench, naming, scenes
from schema import read_json
from tables.exhibit import (
    COMPARED,
    Exhibit,
    bullets,
    comparison,
    interval,
    markdown,
    one_by_one,
    p_text,
    page,
    provenance_text,
    short,
)
from tables.probe import default_views, verdicts
from tables.runs import Plan, RunName
from training.metrics import RESAMPLES, bootstrap_interval, cosines, paired_test, seeds_p, student_interval
from training.reading import split_prompts

log = logging.getLogger("tables")

RUN = RunName("unet", "mlc-cl")
STEPS, GUIDANCE, SWAP_AFTER = 50, 7.5, 1  # the paper states only the last; the others are SD's defaults
MINI_PROMPTS, PROMPTS = 200, 2500  # test prompts with the miniature, and the paper's number
VOTES = 100  # pairs of table 5
NOISE_PROMPTS, NOISE_SEEDS = 100, 10  # section 4.7
BATCH, MINI_CUDA_BATCH = 40, 256  # pictures at a time; the larger for sd-mini's on a GPU
DEAF = ("material", "relation")  # the probe finds few of those that drawings show (results/generated.md)
PAPER = {"DrawBench": (0.4594, 0.5067), "test prompts": (0.6417, 0.6443)}
PAPER_VOTES = ((52, 30, 18), (36, 10, 54), (31, 5, 64))
TABLE_6_COLUMNS = (
    f"prompts | per seed | judge | original | trained | {COMPARED} | paper: original | paper: trained"
)
TABLE_6_NOTES = (
    "A model judging images it helped to generate is biased; the paper's numbers are of this kind.",
    "Over seeds: Student's interval and test of the seeds' differences. Over pairs: bootstrap; the test "
    "prompts of all seeds are pooled; DrawBench, the same for each seed, is averaged over the seeds.",
    "Most test prompts of a seed are training prompts of the other, whose run predicts them better.",
)


@dataclass(frozen=True)
class Request:
    """A prompt, and the view that it describes if that is known, as for mini scenes."""

    prompt: str
    view: scenes.View | None = None


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """n of the items, or all if they are fewer, evenly spaced. Paper: "a subset of test examples". Test rows
    are in the order of the data, so the first ones would be those of DiffusionDB's first parts."""
    n = min(n, len(items))
    return [items[k * len(items) // n] for k in range(n)]


def prompt_sets(plan: Plan, seed: int) -> dict[str, list[Request]]:
    """DrawBench, from its file or the miniature's own, and test prompts of the run of a seed."""
    mini = plan.sources["unet"] == "sd-mini"
    splits = split_prompts(plan.run_folder(RUN, seed), "train", "val", "test")
    seen = set().union(*splits)
    sets = {}
    if plan.drawbench is not None:
        sets["DrawBench"] = [Request(prompt) for prompt in read_drawbench(plan.drawbench)]
    elif mini:
        sets["DrawBench"] = [Request(p.prompt, p.view) for p in drawbench.prompts(seen)]
    else:
        log.warning("DrawBench is skipped; give its file with --drawbench")
    views = default_views() if mini else {}
    test = spread(splits[2], MINI_PROMPTS if mini else PROMPTS)
    return sets | {"test prompts": [Request(prompt, views.get(prompt)) for prompt in test]}


def read_drawbench(path: Path) -> list[str]:
    """The column Prompts of DrawBench's CSV. Raises DataError if it is missing or empty."""
    require_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            cells = [(row.get("Prompts") or "").strip() for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise data.DataError(f"{path}: cannot be read as DrawBench's CSV ({error})") from error
    if not (prompts := [cell for cell in cells if cell]):
        raise data.DataError(f"{path}: column Prompts is missing or empty; give DrawBench's CSV")
    return prompts


def batch_size(plan: Plan) -> int:
    mini_on_cuda = plan.device.startswith("cuda") and plan.sources["unet"] == "sd-mini"
    return MINI_CUDA_BATCH if mini_on_cuda else BATCH


def kept_pictures(
    plan: Plan,
    pipeline: generate.Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    swap: Sequence[object] = (),
    unet_at: Callable[[], Callable[[int], generate.UNet]] | None = None,
) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3), cached in the runs' folder, by the U-Nets `unet_at()` of each step, or by
    the original one alone. `swap` identifies these U-Nets."""
    path, side = picture_file(plan, "drawn", [list(prompts), list(seeds), STEPS, GUIDANCE], swap)
    if not path.exists():
        options = {"steps": STEPS, "guidance": GUIDANCE, "unet_at": unet_at() if unet_at else None}
        draw_into(path, pipeline, prompts, seeds, side, batch_size(plan), **options)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def picture_file(plan: Plan, name: str, settings: list, swap: Sequence[object] = ()) -> tuple[Path, int]:
    """The file of pictures with these settings in the runs' folder, and the side of a picture in pixels."""
    source = plan.sources["unet"]
    side, _ = generate.trained_as(source)
    key = [weights.fingerprint(kind, source) for kind in ("unet", "vae", "clip-text")]
    digest = hashlib.sha256(json.dumps([*key, *settings, side, *swap]).encode()).hexdigest()
    return plan.folder / "kept" / f"{name}-{digest[:16]}.npy", side


def draw_into(
    path: Path,
    pipeline: generate.Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    side: int,
    batch: int,
    **options: Any,
) -> None:
    """Write the pictures uint8 (n, side, side, 3) of the prompts to a .npy file, atomically. `options`: of
    `Pipeline.draw`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pictures = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(prompts), side, side, 3))
        for start in range(0, len(prompts), 10 * batch):  # only these are in memory
            some = slice(start, start + 10 * batch)
            pictures[some] = pipeline.draw(prompts[some], seeds[some], (side, side), batch, **options).numpy()
        pictures.flush()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def drawn(
    plan: Plan, pipeline: generate.Pipeline, prompts: Sequence[str], seeds: Sequence[int], run: int | None
) -> np.ndarray:
    """`kept_pictures` by the original U-Net or, after the first step, by the run of seed `run`."""
    if run is None:
        return kept_pictures(plan, pipeline, prompts, seeds)
    folder = plan.run_folder(RUN, run)
    swap = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), SWAP_AFTER

    def unet_at() -> Callable[[int], generate.UNet]:
        trained = generate.swapped_by_run(pipeline.unet, folder, plan.sources["unet"])
        return generate.after(SWAP_AFTER, pipeline.unet, trained)

    return kept_pictures(plan, pipeline, prompts, seeds, swap, unet_at)


def drawn_by_both(
    plan: Plan, pipeline: generate.Pipeline, requests: Sequence[Request], seed: int
) -> dict[str, np.ndarray]:
    """The pictures of the original U-Net and of the trained one, from the same noise."""
    prompts, noise = [request.prompt for request in requests], list(range(len(requests)))
    by_run = {"original": None, "trained": seed}
    return {unet: drawn(plan, pipeline, prompts, noise, run) for unet, run in by_run.items()}


def predicted(plan: Plan, seed: int, pictures: np.ndarray, run: RunName = RUN) -> np.ndarray:
    """The embeddings (n, E) that a run of a seed predicts from pictures uint8 (n, H, W, 3), unit rows."""
    loaded = reverse_sd.load_run(plan.run_folder(run, seed), plan.device)
    predict_images = reverse_sd.image_predictor(loaded, plan.device)
    size = batch_size(plan)
    parts = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    return np.concatenate([predict_images([Image.fromarray(x) for x in part])[0] for part in parts])


def labels_shown(
    pictures: np.ndarray, requests: Sequence[Request], device: str = "cpu"
) -> list[dict[tuple[str, str], bool]]:
    """For each picture: whether the probe finds each thing in its prompt, by slot and key."""
    probe = naming.load_probe(naming.FOLDER).to(device)
    planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    return verdicts(probe, planes, [request.view for request in requests])


def words_shown(pictures: np.ndarray, requests: Sequence[Request], device: str = "cpu") -> np.ndarray:
    """The share of the things in each prompt that the probe finds in its picture, (n,)."""
    return np.array([np.mean(list(of.values())) for of in labels_shown(pictures, requests, device)])


def judges_of(plan: Plan) -> dict[int, int | None]:
    """By seed, the other seed whose run judges its pictures: the next one; None if there is no other."""
    others = zip(plan.seeds, (*plan.seeds[1:], plan.seeds[0]), strict=True)
    return {seed: other if other != seed else None for seed, other in others}


def open_pipeline(plan: Plan) -> generate.Pipeline:
    return generate.load_pipeline(plan.sources["unet"], plan.device)


def drawing_settings() -> dict:
    return {"steps": STEPS, "guidance": GUIDANCE, "swap_after": SWAP_AFTER, "run": RUN.name}


def compute_table_6(plan: Plan) -> dict:
    """Cosines between the prompts and the embeddings that a judge predicts from the pictures."""
    pipeline = open_pipeline(plan)
    minilm = weights.load("minilm", device=plan.device)
    values: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for seed, other in judges_of(plan).items():
        judges = {"itself": seed} | ({} if other is None else {"a run of another seed": other})
        for name, requests in prompt_sets(plan, seed).items():
            targets = minilm.encode([request.prompt for request in requests]).cpu().numpy()
            for unet, pictures in drawn_by_both(plan, pipeline, requests, seed).items():
                for judge, run in judges.items():
                    by_unet = values.setdefault((name, judge), {"original": [], "trained": []})
                    by_unet[unet].append(cosines(predicted(plan, run, pictures), targets))
    entries = []
    for (name, judge), by_unet in values.items():
        original, trained = by_unet["original"], by_unet["trained"]
        per_seed = [float(np.mean(b - a)) for a, b in zip(original, trained, strict=True)]
        if name == "DrawBench":  # the same prompts for each seed
            original, trained = [np.mean(original, axis=0)], [np.mean(trained, axis=0)]
        entry = {"prompts": name, "judge": judge, "n_prompts": len(original[0])}
        entry |= {"original": float(np.mean(original)), "trained": float(np.mean(trained))}
        entry["paper"] = PAPER[name] if judge == "itself" else None
        entries.append(entry | paired_test(trained, original) | {"per_seed": per_seed})
    bench = None
    if any(name == "DrawBench" for name, _ in values):
        bench = plan.drawbench.name if plan.drawbench else "mini"
    return drawing_settings() | {"bench": bench, "rows": entries}


def table_6_text(result: dict) -> str:
    """Table 6 as Markdown."""
    bench = ""
    if result["bench"]:
        prompts = "a list of prompts for mini scenes" if result["bench"] == "mini" else result["bench"]
        bench = f" DrawBench is {prompts}."
    rows = [
        (row["prompts"], row["n_prompts"], row["judge"], row["original"], row["trained"], *comparison(row))
        + tuple(row["paper"] or (None, None))
        for row in result["rows"]
    ]
    return page(
        "Table 6: pictures by the original and by the trained U-Net",
        f"{provenance_text(result)} The cosine between the embedding that a judge predicts from a picture "
        f"and that of its prompt. Trained: {result['run']}, from step {result['swap_after'] + 1} of "
        f"{result['steps']} on; guidance {result['guidance']:g}; the same noise for both.{bench}",
        markdown(TABLE_6_COLUMNS, rows),
        bullets(TABLE_6_NOTES),
    )


def compute_table_5(plan: Plan) -> dict:
    """The share of its prompt that the probe finds in a picture, for VOTES test prompts of each seed."""
    pipeline = open_pipeline(plan)
    shares: dict[str, list[np.ndarray]] = {"original": [], "trained": []}
    by_slot: dict[str, list[dict[str, list[float]]]] = {"original": [], "trained": []}
    for seed in plan.seeds:
        requests = [request for request in prompt_sets(plan, seed)["test prompts"] if request.view]
        requests = spread(requests, VOTES)
        if not requests:
            raise data.DataError("--table 5: the probe can judge only mini scenes")
        for unet, pictures in drawn_by_both(plan, pipeline, requests, seed).items():
            found = labels_shown(pictures, requests, plan.device)
            shares[unet].append(np.array([np.mean(list(of.values())) for of in found]))
            by_slot[unet].append(slot_shares(found))
    votes = [
        [int((a > b).sum()), int((a < b).sum()), int((a == b).sum())]
        for a, b in zip(shares["trained"], shares["original"], strict=True)
    ]
    card = read_json(naming.FOLDER / "probe" / "card.json")
    return drawing_settings() | {
        "n": len(shares["original"][0]),
        "votes": votes,
        "shares": {
            unet: {"mean": float(np.mean(of)), "95": bootstrap_interval(np.concatenate(of), 0, RESAMPLES)}
            for unet, of in shares.items()
        },
        "test": paired_test(shares["trained"], shares["original"]),
        "slots": slot_rows(**by_slot),
        "probe": card["found"],
    }


ALL_HEARD = f"all but {' and '.join(DEAF)}"


def slot_shares(found: Sequence[dict[tuple[str, str], bool]]) -> dict[str, list[float]]:
    """The shares found, one a picture, of all things and of all but DEAF; by slot 0 or 1 for each thing."""
    shares: dict[str, list[float]] = {"all": [], ALL_HEARD: []} | {slot: [] for slot in naming.TABLES}
    for of in found:
        heard = [shown for (slot, _), shown in of.items() if slot not in DEAF]
        shares["all"].append(float(np.mean(list(of.values()))))
        shares[ALL_HEARD].append(float(np.mean(heard)))
        for (slot, _), shown in of.items():
            shares[slot].append(float(shown))
    return shares


def slot_rows(original: Sequence[dict], trained: Sequence[dict]) -> list[dict]:
    """For each key of `slot_shares`, one a seed in each list: means, and the difference over seeds."""
    rows = []
    for slot in original[0]:
        pairs = [(a[slot], b[slot]) for a, b in zip(original, trained, strict=True) if a[slot]]
        if pairs:
            means = np.array([[np.mean(a), np.mean(b)] for a, b in pairs])
            per_seed = (means[:, 1] - means[:, 0]).tolist()
            row = {"slot": slot, "n": sum(len(a) for a, _ in pairs), "per_seed": per_seed}
            row |= dict(zip(("original", "trained"), means.mean(axis=0).tolist(), strict=True))
            row |= {"difference": float(np.mean(per_seed)), "seeds_95": student_interval(per_seed)}
            rows.append(row | {"p": seeds_p(per_seed)})
    return rows


def slot_table(rows: Sequence[dict]) -> str:
    """`slot_rows` as Markdown, with notes."""
    cells = [
        (row["slot"], row["n"], row["original"], row["trained"], short(row["difference"], True))
        + (interval(row["seeds_95"], True), p_text(row["p"]))
        + (one_by_one(row["per_seed"]),)
        for row in rows
    ]
    columns = "things | number | original | trained | difference | 95 % interval | p | by seed"
    note = (
        "First two rows: means over pictures; the others over things. Intervals and p are over seeds, p "
        "without correction for the number of rows."
    )
    return f"{markdown(columns, cells)}\n\n{bullets([note])}"


def table_5_text(result: dict) -> str:
    """Table 5 as Markdown."""
    probes = " | ".join(f"probe, seed {seed}" for seed in result["seeds"])
    rows = zip(("trained", "original", "undecided (equal)"), *result["votes"], *PAPER_VOTES, strict=True)
    test, drawn_shares = result["test"], result["probe"]["drawn"]
    p, limits = p_text(seeds_p(test["per_seed"])), student_interval(test["per_seed"]) or test["difference_95"]
    notes = [
        f"{unet}: the probe finds {of['mean']:.1%} of the things ({of['95'][0]:.1%} to {of['95'][1]:.1%})."
        for unet, of in result["shares"].items()
    ]
    return page(
        "Table 5: which picture shows more of its prompt",
        f"{provenance_text(result)} The paper asked three people; here the probe of mini scenes counts how "
        "many of the things in a prompt (subjects, colours, place, ...) it finds in a picture. "
        f"{result['n']} test prompts of each seed, the same noise for both U-Nets. Trained: {result['run']}.",
        markdown(f"choice | {probes} | paper: #1 | #2 | #3", rows),
        *([slot_table(result["slots"])] if "slots" in result else []),  # older files have none
        bullets(
            (
                *notes,
                f"Difference {100 * test['difference']:+.2f} percentage points "
                f"({100 * limits[0]:+.2f} to {100 * limits[1]:+.2f} over seeds, p {p}); seed by seed "
                f"{', '.join(f'{100 * d:+.2f}' for d in test['per_seed'])}.",
                "In drawings that show all of their prompt, the probe finds: "
                f"{', '.join(f'{slot} {share:.1%}' for slot, share in drawn_shares.items())}.",
            )
        ),
    )


def compute_noise(plan: Plan) -> dict:
    """The cosines between the predictions from pictures of one prompt, each from other noise, and their mean;
    and the standard deviation of these cosines, averaged over prompts.

    Paper: the standard deviation's definition is not stated; here that of the pictures drawn (ddof 0)."""
    pipeline, seeds = open_pipeline(plan), []
    for seed in plan.seeds:
        requests = spread(prompt_sets(plan, seed)["test prompts"], NOISE_PROMPTS)
        prompts = [request.prompt for request in requests]
        repeated = [prompt for prompt in prompts for _ in range(NOISE_SEEDS)]
        pictures = drawn(plan, pipeline, repeated, list(range(NOISE_SEEDS)) * len(prompts), None)
        embedding = predicted(plan, seed, pictures).reshape(len(prompts), NOISE_SEEDS, -1)
        mean = embedding.mean(axis=1, keepdims=True)
        cosine = (embedding * mean).sum(axis=-1) / np.linalg.norm(mean, axis=-1)
        deviation = cosine.std(axis=1)
        entry = {"seed": seed, "prompts": len(prompts), "deviation": float(deviation.mean())}
        entry["deviation_95"] = bootstrap_interval(deviation, 0, RESAMPLES)
        seeds.append(entry | {"cosine_to_mean": float(cosine.mean())})
    return drawing_settings() | {"draws": NOISE_SEEDS, "per_seed": seeds}


def noise_text(result: dict) -> str:
    """The noise study as Markdown."""
    rows = [
        (entry["seed"], entry["prompts"], entry["cosine_to_mean"], entry["deviation"])
        + (interval(entry["deviation_95"]),)
        for entry in result["per_seed"]
    ]
    return page(
        "Section 4.7: the effect of the input noise",
        f"{provenance_text(result)} {result['draws']} pictures per prompt, each from other noise. "
        f"{result['run']} predicts an embedding from each; the table gives the cosine between these and "
        "their mean, and its standard deviation over the pictures of a prompt, both averaged over prompts. "
        "The paper's number is not legible in the copy we used.",
        markdown("seed | prompts | mean cosine to the mean | standard deviation | 95 % interval", rows),
    )


GENERATION_TABLES = {
    5: Exhibit((RUN,), compute_table_5, table_5_text, needs="probe"),
    6: Exhibit((RUN,), compute_table_6, table_6_text),
    "noise": Exhibit((RUN,), compute_noise, noise_text),
}
