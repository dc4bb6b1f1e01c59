"""Correlation of difficulty and label noise: within prompts, and with the prompts' content regressed out.

Difficulty is 1 - cosine of a prediction and the embedding of its prompt. Label noise is the share of the
labels in a prompt that its picture does not show: known for drawings, a probe's verdict for any picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import generate
import reverse_sd
from mini import naming, scenes
from mini.judge import drawings
from mini.scenes import Scene, View
from tables.exhibit import (
    Exhibit,
    bullets,
    interval,
    markdown,
    one_by_one,
    page,
    percent,
    provenance_text,
    short,
)
from tables.figures import PHASE_1_RUNS
from tables.generation import drawn, open_pipeline, predicted, spread
from tables.judges import RESAMPLES, TITLES, load_probes, truth_of
from tables.probe import ALPHAS, default_views, pixels_of, ridge_regression, verdicts
from tables.runs import Plan, RunName
from training.folder import read_cosines
from training.inputs import Prepared, prepare
from training.metrics import bootstrap_weights, cosines, pearson, percentiles, spearman, student_interval

PROMPTS, DRAWS = 150, 8  # test prompts of each seed, and pictures of each
LOST = 0.25  # probability that a drawing leaves out a word
FOLDS = 10
NUMBERS = ("spearman", "pearson", "explained by noise")


# ------------------------------------------------------------------------------------------------------------
# statistics
# ------------------------------------------------------------------------------------------------------------


def within(a: np.ndarray, b: np.ndarray) -> dict:
    """Correlations of difficulty a and noise b (prompts, draws) within prompts and of their means.

    "within": Pearson's after each prompt's mean is removed, with a bootstrap interval over prompts; "slope":
    the difficulty that all of a prompt's labels would add, which, unlike the correlation, does not depend on
    how much the noise varies; "spearman": the mean over prompts of Spearman's, where both vary; "between":
    Pearson's of the means.
    """
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    sums = np.stack([(x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1)], axis=1)

    def pooled(sums: np.ndarray) -> np.ndarray:
        xy, xx, yy = np.moveaxis(sums, -1, 0)
        with np.errstate(invalid="ignore"):
            return xy / np.sqrt(xx * yy)

    vary = [spearman(p, q) for p, q in zip(a, b, strict=True) if np.ptp(p) and np.ptp(q)]
    value, (xy, _, yy) = float(pooled(sums.sum(axis=0))), sums.sum(axis=0)
    return {
        "within": None if np.isnan(value) else value,
        "slope": float(xy / yy) if yy else None,
        "within_95": percentiles(pooled(bootstrap_weights(len(a), RESAMPLES) @ sums)),
        "spearman": float(np.mean(vary)) if vary else None,
        "prompts_that_vary": len(vary),
        "between": pearson(a.mean(axis=1), b.mean(axis=1)),
    }


def cross_fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Predictions (n, k) of y (n, k) from x (n, d): each row by ridge regression on the other folds.

    The penalty of each column has the least squared error over the folds.
    """
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    predicted = np.empty((len(ALPHAS), *y.shape))
    for k in range(FOLDS):
        inside = fold != k
        for penalty, alpha in enumerate(ALPHAS):
            slope, intercept = ridge_regression(x[inside], y[inside], alpha)
            predicted[penalty, ~inside] = x[~inside] @ slope + intercept
    best = ((predicted - y) ** 2).mean(axis=1).argmin(axis=0)
    return predicted[best, :, np.arange(y.shape[1])].T


def explained(y: np.ndarray, predicted: np.ndarray) -> float:
    """The share of the variance of y (n,) that the prediction explains."""
    return float(1 - ((y - predicted) ** 2).mean() / y.var())


def beyond_content(y: np.ndarray, predicted: np.ndarray) -> dict:
    """Correlation of difficulty and noise, the columns of y (n, 2), beyond what their content predicts.

    "from content": the correlation of difficulty with the predicted noise; "residual": that of what is left
    of both without their predictions; the others: shares of the variance of difficulty.
    """
    by_content = explained(y[:, 0], predicted[:, 0])
    residual = pearson(*(y - predicted).T)
    return {
        "from content": pearson(y[:, 0], predicted[:, 1]),
        "residual": residual,
        "explained by content": by_content,
        "added by noise": None if residual is None else residual**2 * (1 - by_content),
    }


# ------------------------------------------------------------------------------------------------------------
# label noise
# ------------------------------------------------------------------------------------------------------------


def missing_share(found: dict[tuple, bool]) -> float:
    return 1 - float(np.mean(list(found.values())))


def noise_by(probe: naming.Namer, pictures: np.ndarray, views: Sequence[View]) -> np.ndarray:
    """The share of each prompt's labels that the probe does not find in its picture (n, 3, H, W), (n,)."""
    return np.array([missing_share(found) for found in verdicts(probe, pictures, views)])


def instruments(by_probe: dict[str, np.ndarray], truth: np.ndarray | None) -> dict[str, np.ndarray]:
    """Measures of label noise (n,) by name: the truth, if it is known; verdicts; and errors of verdicts."""
    if truth is None:
        return by_probe
    errors = {f"{name}, errors": noise - truth for name, noise in by_probe.items()}
    return {"truth": truth} | by_probe | errors


def compared(scores: dict[str, np.ndarray], noise: dict[str, np.ndarray]) -> dict[tuple[str, str], tuple]:
    """(score, noise) of each reader with each instrument, and of each probe with the first instrument."""
    first, *others = (name for name in noise if "errors" not in name)
    pairs = {(reader, name): (scores[reader], noise[name]) for reader in scores for name in noise}
    return pairs | {(name, first): (noise[name], noise[first]) for name in others}


def redrawn(view: View, prompt: str, rng: np.random.Generator) -> Scene:
    """The prompt's scene, drawn without each of its words with probability LOST, with new jitter."""
    slots = scenes.choose_words(view, rng)
    shown, _ = scenes.undraw(view, {slot for slot in slots if rng.random() < LOST}, rng)
    return Scene(prompt, (), (), view, shown, int(rng.integers(2**32)))


# ------------------------------------------------------------------------------------------------------------
# within prompts
# ------------------------------------------------------------------------------------------------------------


def within_prompts(
    plan: Plan, pipeline: generate.Pipeline, probes: dict[str, naming.Namer], prepared: Prepared, seed: int
) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """By kind of picture, reader and instrument: difficulty and noise of test prompts, (n, draws) each."""
    rows = np.array(spread(prepared.splits["test"], PROMPTS))
    prompts = [prepared.pairs.prompts[i] for i in rows for _ in range(DRAWS)]
    views = [default_views()[prompt] for prompt in prompts]
    targets = np.repeat(prepared.targets[rows], DRAWS, axis=0)
    rng = np.random.default_rng(seed)
    made = [redrawn(view, prompt, rng) for view, prompt in zip(views, prompts, strict=True)]
    by_kind = {
        "generated": (drawn(plan, pipeline, prompts, list(range(DRAWS)) * len(rows), None), None),
        "drawn": (
            drawings(made).transpose(0, 2, 3, 1),
            np.array([missing_share(truth_of(scene)) for scene in made]),
        ),
    }
    result = {}
    for kind, (pictures, truth) in by_kind.items():
        planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        noise = instruments({name: noise_by(p, planes, views) for name, p in probes.items()}, truth)
        embeddings = {run.name: predicted(plan, seed, pictures, run) for run in PHASE_1_RUNS}
        scores = {name: 1 - cosines(of, targets) for name, of in embeddings.items()}
        for names, values in compared(scores, noise).items():
            result[kind, *names] = tuple(array.reshape(len(rows), DRAWS) for array in values)
    return result


# ------------------------------------------------------------------------------------------------------------
# training pairs, with content regressed out
# ------------------------------------------------------------------------------------------------------------


def contents(prepared: Prepared, rows: np.ndarray, views: Sequence[View]) -> dict[str, np.ndarray]:
    """Features (n, d) of each prompt: its labels and lengths; and these with its embedding."""
    labels = naming.targets(views, naming.named_labels).numpy().astype(np.float64)
    words = [len(prepared.pairs.prompts[i].split()) for i in rows]
    things = [len(view.things) for view in views]
    labels = np.column_stack([labels, labels.sum(axis=1), words, things])
    return {"labels": labels, "embedding": np.column_stack([labels, prepared.targets[rows]])}


def over_training_pairs(
    plan: Plan, probes: dict[str, naming.Namer], prepared: Prepared, seed: int
) -> dict[tuple[str, str], dict]:
    """By reader and instrument: correlations of recorded difficulty with noise over the training pairs."""
    rows = prepared.splits["train"]
    pairs = prepared.pairs.subset(rows)
    views, pictures = [default_views()[prompt] for prompt in pairs.prompts], pixels_of(prepared.pairs, rows)
    truth = None
    if "sa" not in pairs.meta[0]:  # drawn, not sampled: "undrawn" lists the words that were left out
        metas = zip(pairs.meta, views, strict=True)
        truth = np.array([len(meta["undrawn"]) / len(naming.named_labels(view)) for meta, view in metas])
    noise = instruments({name: noise_by(p, pictures, views) for name, p in probes.items()}, truth)
    scores = {
        run.name: 1 - reverse_sd.easiness(read_cosines(plan.run_folder(run, seed), prepared))
        for run in PHASE_1_RUNS
    }
    columns = scores | noise
    y, at = np.stack(list(columns.values()), axis=1), {name: i for i, name in enumerate(columns)}
    predicted = {name: cross_fitted(x, y) for name, x in contents(prepared, rows, views).items()}
    result = {}
    for names, (score, share) in compared(scores, noise).items():
        pair = [at[name] for name in names]
        r = pearson(score, share)
        entry = {"pairs": len(rows), "spearman": spearman(score, share), "pearson": r}
        entry["explained by noise"] = None if r is None else r * r
        for name, of in predicted.items():
            entry[name] = beyond_content(y[:, pair], of[:, pair])
        result[names] = entry
    return result


# ------------------------------------------------------------------------------------------------------------
# the table
# ------------------------------------------------------------------------------------------------------------


def mean_over_seeds(values: Sequence[float | None]) -> dict:
    """Mean, Student's interval and the values, one a seed; None if one of them is."""
    known = None not in values
    return {
        "mean": float(np.mean(values)) if known else None,
        "seeds_95": student_interval(values) if known else None,
        "per_seed": list(values),
    }


def compute(plan: Plan) -> dict:
    """Correlations of difficulty with label noise, within prompts and over the training pairs."""
    probes, pipeline = load_probes(plan.device), open_pipeline(plan)
    arrays: dict[tuple, list] = {}
    numbers: dict[tuple, list] = {}
    for seed in plan.seeds:
        prepared = prepare(plan.config(RunName("vit", "mlc"), seed), plan.device)
        for key, values in within_prompts(plan, pipeline, probes, prepared, seed).items():
            arrays.setdefault(key, []).append(values)
        for key, values in over_training_pairs(plan, probes, prepared, seed).items():
            numbers.setdefault(key, []).append(values)
    inside, training = [], []
    for (kind, reader, instrument), by_seed in arrays.items():
        row = {"pictures": kind, "reader": reader, "instrument": instrument}
        row |= mean_over_seeds([within(*values)["within"] for values in by_seed])
        pooled = (np.concatenate(values) for values in zip(*by_seed, strict=True))
        inside.append(row | {"pooled": within(*pooled)})
    for (reader, instrument), by_seed in numbers.items():
        row = {"reader": reader, "instrument": instrument, "pairs": [of["pairs"] for of in by_seed]}
        row |= {name: mean_over_seeds([of[name] for of in by_seed]) for name in NUMBERS}
        for content in ("labels", "embedding"):
            row[content] = {
                name: mean_over_seeds([of[content][name] for of in by_seed]) for name in by_seed[0][content]
            }
        training.append(row)
    settings = {"prompts": PROMPTS, "draws": DRAWS, "lost": LOST, "probes": list(probes)}
    return settings | {"within": inside, "training": training}


def title(name: str) -> str:
    """The name of a reader or an instrument in the text."""
    probe, errors = name.partition(", ")[::2]
    return f"{TITLES.get(probe, probe)}{', errors' if errors else ''}"


def text(result: dict) -> str:
    """The table as Markdown."""
    inside = [
        (row["pictures"], title(row["reader"]), title(row["instrument"]), short(row["mean"], True))
        + (interval(row["seeds_95"], True), one_by_one(row["per_seed"]))
        + (interval(row["pooled"]["within_95"], True),)
        + tuple(short(row["pooled"][name], True) for name in ("slope", "spearman", "between"))
        for row in result["within"]
    ]
    training = [
        (title(row["reader"]), title(row["instrument"]))
        + tuple(short(row[name]["mean"], True) for name in ("spearman", "pearson"))
        + (short(row["labels"]["from content"]["mean"], True),)
        + tuple(
            value
            for content in ("labels", "embedding")
            for value in (
                short(row[content]["residual"]["mean"], True),
                interval(row[content]["residual"]["seeds_95"], True),
            )
        )
        + (percent(row["explained by noise"]["mean"]),)
        + tuple(percent(row["labels"][name]["mean"]) for name in ("explained by content", "added by noise"))
        for row in result["training"]
    ]
    notes = (
        "Difficulty: 1 - cosine of a prediction and the prompt's embedding. Label noise: the share of the "
        "labels in a prompt (subjects, colours, place, ...) that its picture does not show. Truth: known, "
        "because a program drew the picture; probes: their verdict, which is wrong at times (table probe); "
        "errors: verdict minus truth. A correlation of difficulty with a probe's errors shows pictures that "
        "are hard for both, not label noise.",
        "A row whose reader is a probe shows how far the instruments agree.",
    )
    return page(
        "Is difficulty label noise?",
        provenance_text(result),
        bullets(notes),
        "## Within prompts",
        f"{result['prompts']} test prompts of each seed, {result['draws']} pictures of each: generated, each "
        f"from other noise; and drawn, each without some of the words (probability {result['lost']:g}). "
        "The prompt's content cannot cause a correlation here, because it is the same in all its pictures. "
        "Within: Pearson's correlation after the mean of each prompt is removed, with intervals over seeds "
        "(Student's) and over prompts (bootstrap). Slope: the difficulty that is added when all labels are "
        "missing, by linear regression within prompts; unlike the correlation it does not depend on how much "
        "the noise varies. Between: the correlation of the prompts' means.",
        markdown(
            "pictures | reader | instrument | within | 95 %, seeds | seed by seed | 95 %, prompts | slope "
            "| mean of Spearman's | between",
            inside,
        ),
        "## Training pairs, with content removed",
        "Difficulty as recorded in training. From labels: the correlation of difficulty with the noise that "
        "the prompt's labels and lengths predict, without a picture. Without labels: Pearson's correlation "
        "of the residuals of cross-fitted ridge regression, on labels and lengths, of difficulty and of "
        "noise; without wording: on the prompt's embedding, too. Shares of the variance of difficulty that "
        "are explained: by the noise alone, by labels and lengths, and by the noise in addition to these. "
        "Intervals: Student's over seeds.",
        markdown(
            "reader | instrument | Spearman | Pearson | from labels | without labels | 95 %, seeds | without "
            "wording | 95 %, seeds | variance: noise | labels | added by noise",
            training,
        ),
    )


DIFFICULTY = {"difficulty": Exhibit(PHASE_1_RUNS, compute, text, needs="probe")}
