"""Figures 9 and 11: their numbers from runs that are there, and these as Markdown. Figure 9's sheet of
pictures is drawn in pictures.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

import reverse_sd
from tables.compute import origin, short, stated
from tables.methods import Ensemble, members_of
from tables.runs import MODELS, Plan
from training.folder import read_cosines
from training.inputs import prepare
from training.metrics import cosines, rank_correlation
from training.pictures import CHUNKS, difficulty_sheet

FIGURES = {
    9: tuple(f"{backbone}-mlc" for backbone in MODELS),
    11: tuple(f"{backbone}-mlc-cl" for backbone in MODELS),
}


def undrawn_share(prompt: str, undrawn: Sequence[str]) -> float:
    """The share of a prompt's words that its picture does not show, as mini scenes state it."""
    return sum(len(phrase.split()) for phrase in undrawn) / max(1, len(prompt.split()))


def compute_figure_9(plan: Plan, command: str) -> tuple[dict, bytes]:
    """Figure 9: a sheet of easy, medium and hard pairs (PNG); and, where the data say which words a picture
    does not show, as mini scenes do, how well the difficulty agrees with their share."""
    backbones: dict[str, list[dict]] = {}
    for seed in plan.seeds:
        # Every backbone has the same pairs; the ViT's need the least work.
        prepared = prepare(plan.config("vit-mlc", seed), plan.device)
        pairs, rows = prepared.pairs, prepared.splits["train"]
        known = all("undrawn" in pairs.meta[i] for i in rows)
        share = np.array([undrawn_share(pairs.prompts[i], pairs.meta[i].get("undrawn", ())) for i in rows])
        for run in FIGURES[9]:
            score = reverse_sd.easiness(read_cosines(plan.run_folder(run, seed), prepared))
            entry: dict[str, Any] = {"seed": seed, "n": len(rows)}
            chunks = reverse_sd.thirds(score)
            entry["cosine"] = {name: float(score[c].mean()) for name, c in zip(CHUNKS, chunks, strict=True)}
            if known:
                # Positive where the paper's conjecture holds: the score is high for what is easy.
                entry |= rank_correlation(-score, share)
                entry["undrawn"] = {
                    name: float(share[c].mean()) for name, c in zip(CHUNKS, chunks, strict=True)
                }
            backbones.setdefault(run, []).append(entry)
            if run == "unet-mlc" and seed == plan.seeds[0]:
                rng = np.random.default_rng(0)
                picked = [rng.choice(chunk, size=min(8, len(chunk)), replace=False) for chunk in chunks]
                sheet = difficulty_sheet(pairs, rows, score, picked)
                examples = {
                    name: [
                        {
                            "image": pairs.names[rows[i]],
                            "prompt": pairs.prompts[rows[i]],
                            "cosine": float(score[i]),
                        }
                        | ({"undrawn": pairs.meta[rows[i]]["undrawn"]} if known else {})
                        for i in chosen
                    ]
                    for name, chosen in zip(CHUNKS, picked, strict=True)
                }
    result = stated(plan, command) | {"figure": 9, "sheet": f"{FIGURES[9][1]}, seed {plan.seeds[0]}"}
    return result | {"examples": examples, "runs": backbones}, sheet


def figure_9_text(result: dict) -> str:
    """Figure 9's numbers as Markdown."""
    lines = [
        "# Figure 9: easy, medium and hard pairs",
        "",
        f"{origin(result)} The sheet is figure-9.png: {result['sheet']}, eight of each third by difficulty, "
        "drawn at random.",
        "",
    ]
    spoken = [
        (run, entry) for run, entries in result["runs"].items() for entry in entries if "undrawn" in entry
    ]
    if not spoken:
        return "\n".join([*lines, "These data do not say what their pictures leave undrawn.", ""])
    lines += [
        "Does the difficulty tell pictures that do not show what their prompts say? Spearman's correlation "
        "of difficulty (positive: harder where more is undrawn) with the share of the prompt's words that is "
        "undrawn, over the training pairs; and the mean of that share in each third.",
        "",
        "| run | seed | pairs | Spearman | 95 % interval | easy | medium | hard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, entry in spoken:
        low, high = entry["spearman_95"] or (None, None)
        shares = " | ".join(short(entry["undrawn"][name]) for name in CHUNKS)
        lines.append(
            f"| {run} | {entry['seed']} | {entry['n']:,} | {short(entry['spearman'], True)} | "
            f"{short(low, True)} to {short(high, True)} | {shares} |"
        )
    return "\n".join([*lines, ""])


def compute_figure_11(plan: Plan, command: str) -> dict:
    """Figure 11: how the ensemble and its members answer, over the test pairs."""
    edges = np.linspace(-1, 1, 41)
    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    seeds = []
    for seed in plan.seeds:
        members = members_of(plan, FIGURES[11], seed)
        targets = members[0].targets("test")
        named = {run: member.predicted("test") for run, member in zip(FIGURES[11], members, strict=True)}
        named["ensemble"] = Ensemble()(members, plan, seed)[0]
        by_name = {name: cosines(predicted, targets) for name, predicted in named.items()}
        seeds.append(
            {
                "seed": seed,
                "n": len(targets),
                "cosines": {
                    name: {
                        "mean": float(values.mean()),
                        "quantiles": np.quantile(values, levels).tolist(),
                        "histogram": np.histogram(values, edges)[0].tolist(),
                    }
                    for name, values in by_name.items()
                },
                "share_where_ensemble_is_better": {
                    name: float((by_name["ensemble"] > values).mean())
                    for name, values in by_name.items()
                    if name != "ensemble"
                },
                "cosine_between_predictions": {
                    f"{a}, {b}": float(cosines(named[a], named[b]).mean())
                    for a, b in combinations(FIGURES[11], 2)
                },
            }
        )
    return stated(plan, command) | {
        "figure": 11,
        "levels_of_quantiles": levels,
        "edges_of_histogram": edges.tolist(),
        "per_seed": seeds,
    }


def figure_11_text(result: dict) -> str:
    """Figure 11's numbers as Markdown: means over the seeds."""
    lines = [
        "# Figure 11: the ensemble and its members",
        "",
        f"{origin(result)} Means over the seeds; figure-11.json holds the histograms.",
        "",
        "| | cosine | lowest twentieth below | median | highest twentieth above | pairs where the "
        "ensemble is nearer |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*FIGURES[11], "ensemble"):
        of = [seed["cosines"][name] for seed in result["per_seed"]]
        quantiles = np.mean([o["quantiles"] for o in of], axis=0)
        better = [seed["share_where_ensemble_is_better"].get(name) for seed in result["per_seed"]]
        share = f"{np.mean(better):.1%}" if name != "ensemble" else ""
        lines.append(
            f"| {name} | {short(float(np.mean([o['mean'] for o in of])))} | {short(quantiles[1])} | "
            f"{short(quantiles[3])} | {short(quantiles[5])} | {share} |"
        )
    return "\n".join([*lines, ""])
