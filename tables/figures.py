"""Numbers of figures 9 and 11, from finished runs, and their Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

import data
import reverse_sd
from tables.exhibit import Exhibit, interval, markdown, page, provenance_text, short
from tables.methods import EnsembleMethod, members_of
from tables.runs import MODELS, Plan, RunName
from training.folder import read_cosines
from training.inputs import prepare
from training.metrics import cosines, rank_correlation
from training.pictures import CHUNKS, difficulty_sheet

PHASE_1_RUNS = tuple(RunName(backbone, "mlc") for backbone in MODELS)
ENSEMBLE_RUNS = tuple(RunName(backbone, "mlc-cl") for backbone in MODELS)
SHEET_RUN = RunName("unet", "mlc")


def undrawn_share(prompt: str, undrawn: Sequence[str]) -> float:
    """The share of a prompt's words that are recorded as undrawn."""
    return sum(len(phrase.split()) for phrase in undrawn) / max(1, len(prompt.split()))


def compute_figure_9(plan: Plan) -> dict:
    """The mean cosine of easy, medium and hard pairs; the correlation of difficulty (minus the easiness) with
    the share of words that the data record as undrawn, if they do; and a sheet of examples.

    The record is the truth for drawn pairs and the probe's verdict for generated ones. The correlation is
    not evidence that undrawn words cause difficulty; see tables/difficulty.py.
    """
    figure = {"sheet": f"{SHEET_RUN.name}, seed {plan.seeds[0]}", "runs": {}}
    for seed in plan.seeds:
        # Every backbone has the same pairs; the ViT's need the least work.
        prepared = prepare(plan.config(RunName("vit", "mlc"), seed), plan.device)
        pairs, rows = prepared.pairs, prepared.splits["train"]
        recorded = all("undrawn" in pairs.meta[i] for i in rows)
        undrawn = [pairs.meta[i].get("undrawn", ()) for i in rows]
        share = np.array([undrawn_share(pairs.prompts[i], u) for i, u in zip(rows, undrawn, strict=True)])
        for run in PHASE_1_RUNS:
            easiness = reverse_sd.easiness(read_cosines(plan.run_folder(run, seed), prepared))
            thirds = dict(zip(CHUNKS, reverse_sd.thirds(easiness), strict=True))
            entry = {"seed": seed, "n": len(rows), "cosine": means_of(easiness, thirds)}
            if recorded:
                difficulty = -easiness
                entry |= rank_correlation(difficulty, share) | {"undrawn": means_of(share, thirds)}
            figure["runs"].setdefault(run.name, []).append(entry)
            if run == SHEET_RUN and seed == plan.seeds[0]:
                figure |= sheet_of(pairs, rows, easiness, thirds)
    return figure


def means_of(values: np.ndarray, thirds: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values[third].mean()) for name, third in thirds.items()}


def sheet_of(
    pairs: data.Pairs, rows: np.ndarray, easiness: np.ndarray, thirds: dict[str, np.ndarray]
) -> dict:
    """Eight pairs of each third, drawn at random: as data and as a picture."""
    rng = np.random.default_rng(0)
    picked = {name: rng.choice(third, min(8, len(third)), replace=False) for name, third in thirds.items()}

    def example(i: int) -> dict:
        row = rows[i]
        entry = {"image": pairs.names[row], "prompt": pairs.prompts[row], "cosine": float(easiness[i])}
        return entry | {name: pairs.meta[row][name] for name in ("undrawn",) if name in pairs.meta[row]}

    examples = {name: [example(i) for i in chosen] for name, chosen in picked.items()}
    sheet = difficulty_sheet(pairs, rows, easiness, list(picked.values()))
    return {"examples": examples, "files": {"figure-9.png": sheet}}


def figure_9_text(result: dict) -> str:
    """Figure 9's numbers as Markdown."""
    rows = [
        (run, entry["seed"], f"{entry['n']:,}", short(entry["spearman"], True))
        + (interval(entry["spearman_95"], True), *(entry["undrawn"][name] for name in CHUNKS))
        for run, by_seed in result["runs"].items()
        for entry in by_seed
        if "undrawn" in entry
    ]
    correlation = (
        "Spearman's correlation of difficulty with the share of the prompt's words that are recorded as "
        "undrawn, over the training pairs (positive: pairs with more such words are harder); and the mean of "
        "that share in each third. For drawn pictures the record is the truth. For generated pictures it is "
        "the probe's verdict, which is wrong at times (table probe), so the two are not comparable. The "
        "content of a prompt affects both difficulty and the share; therefore this correlation does not show "
        "that undrawn words cause difficulty. Table difficulty compares pictures of the same prompt.",
        markdown(f"run | seed | pairs | Spearman | 95 % interval | {' | '.join(CHUNKS)}", rows),
    )
    return page(
        "Figure 9: easy, medium and hard pairs",
        f"{provenance_text(result)} The sheet is figure-9.png: {result['sheet']}, eight pairs of each third "
        "by difficulty, drawn at random.",
        *(correlation if rows else ["These data do not record which words a picture leaves out."]),
    )


def compute_figure_11(plan: Plan) -> dict:
    """The distribution of the cosines of the ensemble and of its members, over the test pairs."""
    edges = np.linspace(-1, 1, 41)
    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    names = [run.name for run in ENSEMBLE_RUNS]

    def distribution(values: np.ndarray) -> dict:
        quantiles, histogram = np.quantile(values, levels), np.histogram(values, edges)[0]
        return {
            "mean": float(values.mean()), "quantiles": quantiles.tolist(), "histogram": histogram.tolist()
        }

    def numbers(seed: int) -> dict:
        members = members_of(plan, ENSEMBLE_RUNS, seed)
        targets = members[0].targets("test")
        predicted = {name: member.predicted("test") for name, member in zip(names, members, strict=True)}
        predicted["ensemble"] = EnsembleMethod()(members, plan, seed)[0]
        values = {name: cosines(rows, targets) for name, rows in predicted.items()}
        better = {name: float((values["ensemble"] > values[name]).mean()) for name in names}
        between = {
            f"{a}, {b}": float(cosines(predicted[a], predicted[b]).mean()) for a, b in combinations(names, 2)
        }
        return {
            "seed": seed,
            "n": len(targets),
            "cosines": {name: distribution(of) for name, of in values.items()},
            "share_where_ensemble_is_better": better,
            "cosine_between_predictions": between,
        }

    per_seed = [numbers(seed) for seed in plan.seeds]
    return {"levels_of_quantiles": levels, "edges_of_histogram": edges.tolist(), "per_seed": per_seed}


def figure_11_text(result: dict) -> str:
    """Figure 11's numbers as Markdown: means over the seeds."""
    seeds, rows = result["per_seed"], []
    for name in seeds[0]["cosines"]:
        by_seed = [seed["cosines"][name] for seed in seeds]
        mean = float(np.mean([of["mean"] for of in by_seed]))
        quantiles = np.mean([of["quantiles"] for of in by_seed], axis=0)
        better = [seed["share_where_ensemble_is_better"].get(name) for seed in seeds]
        share = "" if name == "ensemble" else f"{np.mean(better):.1%}"
        rows.append((name, mean, *quantiles[[1, 3, 5]], share))
    return page(
        "Figure 11: the ensemble and its members",
        f"{provenance_text(result)} Means over the seeds; figure-11.json holds the histograms.",
        markdown("model | cosine | 5 % quantile | median | 95 % quantile | ensemble is better", rows),
    )


FIGURES = {
    9: Exhibit(PHASE_1_RUNS, compute_figure_9, figure_9_text),
    11: Exhibit(ENSEMBLE_RUNS, compute_figure_11, figure_11_text),
}
