"""Section 4.5, tables 5 and 6: what the U-Net that learned to read draws; section 4.7: the effect of noise.

Both U-Nets draw each prompt from the same noise, so that all comparisons are paired. Table 6 asks the
trained U-Net itself how well the pictures fit their prompts, as the paper does; but it helped to draw half of
them, so a run of the next seed, which drew none, is asked too. Table 5 asks the probe of mini scenes in place
of people.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import data
import generate
import reverse_sd
import weights
from mini import drawbench, naming, scenes
from tables.compute import origin, short, stated
from tables.probe import default_views
from tables.runs import Plan
from training.loop import save_array
from training.metrics import RESAMPLES, bootstrap_interval, cosines, paired_test

log = logging.getLogger("tables")

RUN = "unet-mlc-cl"
STEPS, GUIDANCE, SWAP_AFTER = 50, 7.5, 1  # the paper states the last one alone; the others are SD's own
MINI_PROMPTS, PROMPTS = 200, 2500  # test prompts on the miniature, and the paper's number
VOTES = 100  # pairs of table 5
NOISE_PROMPTS, NOISE_SEEDS = 100, 10  # section 4.7
BATCH = 40
PAPER = {"DrawBench": (0.4594, 0.5067), "test prompts": (0.6417, 0.6443)}
PAPER_VOTES = ((52, 30, 18), (36, 10, 54), (31, 5, 64))


@dataclass(frozen=True)
class Asked:
    """A prompt, and what it asks for where that is known, as of mini scenes."""

    prompt: str
    view: scenes.View | None = None


def prompt_sets(plan: Plan, seed: int, file: Path | None) -> dict[str, list[Asked]]:
    """DrawBench from its file, or the miniature's own, and the first test prompts of the run of a seed."""
    mini = plan.sources["unet"] == "sd-mini"
    rows = json.loads((plan.run_folder(RUN, seed) / "predictions" / "rows.json").read_text())
    seen = {row["prompt"] for split in rows.values() for row in split}
    sets = {}
    if file is not None:
        sets["DrawBench"] = [Asked(prompt) for prompt in read_drawbench(file)]
    elif mini:
        sets["DrawBench"] = [Asked(asked.prompt, asked.view) for asked in drawbench.prompts(seen)]
    else:
        log.warning("DrawBench is left out: give its file by --drawbench")
    views = default_views() if mini else {}
    test = [row["prompt"] for row in rows["test"][: MINI_PROMPTS if mini else PROMPTS]]
    return sets | {"test prompts": [Asked(prompt, views.get(prompt)) for prompt in test]}


def read_drawbench(path: Path) -> list[str]:
    """The column Prompts of DrawBench's CSV. Raises DataError where there is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            cells = [(row.get("Prompts") or "").strip() for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise data.DataError(f"{path}: cannot be read as DrawBench's CSV ({error})") from error
    if not (prompts := [cell for cell in cells if cell]):
        raise data.DataError(f"{path}: no column Prompts, or nothing in it; give DrawBench's CSV")
    return prompts


def drawn(
    plan: Plan, pipeline: generate.Pipeline, prompts: Sequence[str], seeds: Sequence[int], run: int | None
) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3), by the original U-Net or, after the first step, by the run of that seed.

    Drawn once and kept in the folder of the runs.
    """
    source = plan.sources["unet"]
    side, _ = generate.trained_as(source)
    said = [weights.fingerprint(kind, source) for kind in ("unet", "vae", "clip-text")]
    said += [list(prompts), list(seeds), STEPS, GUIDANCE, side]
    unet_at = None
    if run is not None:
        folder = plan.run_folder(RUN, run)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        said += [digest, SWAP_AFTER]
    kept = plan.folder / "kept" / f"drawn-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}.npy"
    if kept.exists():
        return np.load(kept, allow_pickle=False)
    if run is not None:
        trained = generate.swapped_by_run(pipeline.unet, folder, source)
        unet_at = generate.after(SWAP_AFTER, pipeline.unet, trained)
    options = {"steps": STEPS, "guidance": GUIDANCE, "unet_at": unet_at}
    pictures = pipeline.draw(prompts, seeds, (side, side), BATCH, **options).numpy()
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_array(kept, pictures)
    return pictures


def predicted(plan: Plan, seed: int, pictures: np.ndarray) -> np.ndarray:
    """What the run of a seed reads in pictures: (n, E), unit rows."""
    run = reverse_sd.load_run(plan.run_folder(RUN, seed), plan.device)
    read = reverse_sd.image_predictor(run, plan.device)
    parts = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
    return np.concatenate([read([Image.fromarray(picture) for picture in part])[0] for part in parts])


def words_shown(pictures: np.ndarray, asked: Sequence[Asked]) -> np.ndarray:
    """The share of the things that each prompt says that the probe finds in its picture, (n,)."""
    probe = naming.load_probe(naming.FOLDER)
    rows = naming.name_pictures(probe, np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    found = [naming.realised(row, one.view) for row, one in zip(rows, asked, strict=True)]
    return np.array([np.mean(list(shown.values())) for shown in found])


def open_pipeline(plan: Plan) -> generate.Pipeline:
    return generate.load_pipeline(plan.sources["unet"], plan.device)


def compute_table_6(plan: Plan, command: str, file: Path | None) -> dict:
    """Cosines between what a judge reads in the pictures and the prompts, set by set."""
    pipeline = open_pipeline(plan)
    minilm = weights.load("minilm", device=plan.device)
    values: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for seed, other in zip(plan.seeds, (*plan.seeds[1:], plan.seeds[0]), strict=True):
        for name, asked in prompt_sets(plan, seed, file).items():
            prompts, noise = [one.prompt for one in asked], list(range(len(asked)))
            targets = minilm.encode(prompts).cpu().numpy()
            judges = {"itself": seed} | ({"a run of another seed": other} if other != seed else {})
            for unet, run in (("original", None), ("trained", seed)):
                pictures = drawn(plan, pipeline, prompts, noise, run)
                for judge, judging in judges.items():
                    cosine = cosines(predicted(plan, judging, pictures), targets)
                    values.setdefault((name, judge, unet), []).append(cosine)
    entries = []
    for name, judge, unet in values:
        if unet == "original":
            both = [values[name, judge, which] for which in ("original", "trained")]
            by_seed = [float(np.mean(trained - original)) for original, trained in zip(*both, strict=True)]
            if name == "DrawBench":  # the same prompts for each seed
                both = [[np.mean(of, axis=0)] for of in both]
            entries.append(
                {
                    "prompts": name,
                    "judge": judge,
                    "n_prompts": len(both[0][0]),
                    "original": float(np.mean(both[0])),
                    "trained": float(np.mean(both[1])),
                    "paper": PAPER[name] if judge == "itself" else None,
                    **paired_test(both[1], both[0]),
                    "per_seed": by_seed,
                }
            )
    bench = None
    if any(entry["prompts"] == "DrawBench" for entry in entries):
        bench = file.name if file else "mini"
    return drawn_as(plan, command) | {"table": 6, "bench": bench, "rows": entries}


def drawn_as(plan: Plan, command: str) -> dict:
    settings = {"steps": STEPS, "guidance": GUIDANCE, "swap_after": SWAP_AFTER, "run": RUN}
    return stated(plan, command) | settings


def table_6_text(result: dict) -> str:
    """Table 6 as Markdown."""
    bench = ""
    if result["bench"]:
        what = "one of mini scenes" if result["bench"] == "mini" else result["bench"]
        bench = f" DrawBench is {what}."
    lines = [
        "# Table 6: pictures by the original and by the trained U-Net",
        "",
        f"{origin(result)} The cosine between the embedding that a judge reads in a picture and that of its "
        f"prompt. Trained: {result['run']}, from step {result['swap_after'] + 1} of {result['steps']} on; "
        f"guidance {result['guidance']:g}; the same noise for both.{bench}",
        "",
        "| prompts | a seed | judge | original | trained | difference | 95 % interval | p | seed by seed | "
        "paper: original | trained |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["difference_95"]
        by_seed = ", ".join(short(value, True) for value in row["per_seed"])
        theirs = " | ".join(short(value) for value in row["paper"] or (None, None))
        p = "< .0001" if row["p"] < 1e-4 else short(row["p"])
        lines.append(
            f"| {row['prompts']} | {row['n_prompts']} | {row['judge']} | {short(row['original'])} | "
            f"{short(row['trained'])} | {short(row['difference'], True)} | {short(low, True)} to "
            f"{short(high, True)} | {p} | {by_seed} | {theirs} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "* A judge that helped to draw is no fair one: the paper's figures are of the first kind.",
            "* p: Student's paired test over prompts; test prompts of all seeds together, DrawBench's, which "
            "are the same for each seed, averaged over the seeds.",
            "* Most test prompts of a seed are training prompts of the other, so its run reads them better.",
            "",
        ]
    )


def compute_table_5(plan: Plan, command: str, file: Path | None) -> dict:
    """How much of its prompt the probe finds in a picture, for VOTES test prompts of each seed."""
    pipeline = open_pipeline(plan)
    shares: dict[str, list[np.ndarray]] = {"original": [], "trained": []}
    for seed in plan.seeds:
        asked = [one for one in prompt_sets(plan, seed, file)["test prompts"] if one.view][:VOTES]
        if not asked:
            raise data.DataError("--table 5: its judge, the probe, reads mini scenes alone")
        prompts, noise = [one.prompt for one in asked], list(range(len(asked)))
        for unet, run in (("original", None), ("trained", seed)):
            shares[unet].append(words_shown(drawn(plan, pipeline, prompts, noise, run), asked))
    votes = [
        [int((a > b).sum()), int((a < b).sum()), int((a == b).sum())]
        for a, b in zip(shares["trained"], shares["original"], strict=True)
    ]
    card = json.loads((naming.FOLDER / "probe" / "card.json").read_text())
    return drawn_as(plan, command) | {
        "table": 5,
        "n": len(shares["original"][0]),
        "votes": votes,
        "shares": {
            unet: {"mean": float(np.mean(of)), "95": bootstrap_interval(np.concatenate(of), 0, RESAMPLES)}
            for unet, of in shares.items()
        },
        "test": paired_test(shares["trained"], shares["original"]),
        "probe": card["found"],
    }


def table_5_text(result: dict) -> str:
    """Table 5 as Markdown."""
    lines = [
        "# Table 5: which picture shows more of its prompt",
        "",
        f"{origin(result)} The paper asked three people; here the probe of mini scenes counts how many of "
        "the things that a prompt says (subjects, colours, place, ...) it finds in a picture. "
        f"{result['n']} test prompts of each seed, the same noise for both U-Nets. Trained: {result['run']}.",
        "",
        "| choice | " + " | ".join(f"probe, seed {seed}" for seed in result["seeds"])
        + " | paper: #1 | #2 | #3 |",
        "|---|" + "---|" * (len(result["seeds"]) + 3),
    ]  # fmt: skip
    for i, choice in enumerate(("trained", "original", "undecided (as many)")):
        ours = " | ".join(str(votes[i]) for votes in result["votes"])
        lines.append(f"| {choice} | {ours} | " + " | ".join(str(votes[i]) for votes in PAPER_VOTES) + " |")
    shares, test = result["shares"], result["test"]
    low, high = test["difference_95"]
    lines += [
        "",
        *(
            f"* {unet}: {of['mean']:.1%} of what is said is found ({of['95'][0]:.1%} to {of['95'][1]:.1%})."
            for unet, of in shares.items()
        ),
        f"* Difference {test['difference']:+.2%} ({low:+.2%} to {high:+.2%}), Student's paired test p = "
        f"{test['p']:.2g}; seed by seed {', '.join(f'{d:+.2%}' for d in test['per_seed'])}.",
        "* The probe itself, on drawn pictures that show all they say, finds: "
        + ", ".join(f"{slot} {share:.1%}" for slot, share in result["probe"]["drawn"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def compute_noise(plan: Plan, command: str, file: Path | None) -> dict:
    """Section 4.7: for each prompt the deviation, over pictures from other noise, of the cosines between each
    prediction and their mean."""
    pipeline = open_pipeline(plan)
    seeds = []
    for seed in plan.seeds:
        prompts = [one.prompt for one in prompt_sets(plan, seed, file)["test prompts"][:NOISE_PROMPTS]]
        repeated = [prompt for prompt in prompts for _ in range(NOISE_SEEDS)]
        noise = [s for _ in prompts for s in range(NOISE_SEEDS)]
        pictures = drawn(plan, pipeline, repeated, noise, None)
        found = predicted(plan, seed, pictures).reshape(len(prompts), NOISE_SEEDS, -1)
        mean = found.mean(axis=1, keepdims=True)
        cosine = (found * mean).sum(axis=-1) / np.linalg.norm(mean, axis=-1)
        seeds.append(
            {
                "seed": seed,
                "prompts": len(prompts),
                "deviation": float(cosine.std(axis=1).mean()),
                "deviation_95": bootstrap_interval(cosine.std(axis=1), 0, RESAMPLES),
                "cosine_to_mean": float(cosine.mean()),
            }
        )
    return drawn_as(plan, command) | {"table": "noise", "draws": NOISE_SEEDS, "per_seed": seeds}


def noise_text(result: dict) -> str:
    """The noise study as Markdown."""
    lines = [
        "# Section 4.7: the effect of the input noise",
        "",
        f"{origin(result)} {result['draws']} pictures a prompt, each from other noise, read by "
        f"{result['run']}: the cosine between each prediction and the mean of its prompt's, and its standard "
        "deviation over the pictures of a prompt, averaged over prompts. The paper's figure is lost here.",
        "",
        "| seed | prompts | mean cosine to the mean | standard deviation | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for entry in result["per_seed"]:
        low, high = entry["deviation_95"]
        lines.append(
            f"| {entry['seed']} | {entry['prompts']} | {short(entry['cosine_to_mean'])} | "
            f"{short(entry['deviation'])} | {short(low)} to {short(high)} |"
        )
    return "\n".join([*lines, ""])


# table -> what computes it and what writes it down
DRAWN = {
    5: (compute_table_5, table_5_text),
    6: (compute_table_6, table_6_text),
    "noise": (compute_noise, noise_text),
}
