"""Scores of the single words of a prompt against the truth of drawn scenes: which ones a picture lacks.

A drawn scene records the words of its prompt that its picture leaves out. New scenes, which no run has seen,
are drawn, and each score ranks the words of their prompts. Only words with visible content are judged, not
tags such as "highly detailed". A word that stands for two things of a scene is shown if one of them is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mini import naming, scenes
from reverse_sd import Run, load_run
from tables.exhibit import (
    COMPARED,
    Exhibit,
    bullets,
    comparison,
    interval,
    markdown,
    page,
    provenance_text,
    short,
)
from tables.probe import readings
from tables.runs import MODELS, Plan, RunName
from training.calibration import fit_words, log_odds, logit, own_and_other, require_calibration, sigmoid
from training.evaluate import shared_predictions
from training.inputs import Prepared, Samples, cache_folder, prepare, prompt_targets, sample_readers
from training.loop import Process
from training.metrics import auroc, bootstrap_weights, calibration_error, percentiles, student_interval
from words import is_content_word, words

SEED = 7_000_003  # of the new scenes, which no other part uses
PARTS, PER_PART = 6, 1000
RESAMPLES = 500
RUNS = tuple(RunName(backbone, "mlc") for backbone in ("unet", "swin"))
MEASURES = ("all words", "same word", "same prompt")
OURS = "P(shown)"
OUTSIDE = ("cosine of the prompt", "leave the word out", "probe")  # scores of any word


@dataclass(frozen=True)
class Items:
    """The words with visible content of all prompts: numbers of their scenes (k,), the words, whether the
    picture shows them (k,) bool, the probe's labels that they name."""

    scene: np.ndarray
    words: list[str]
    shown: np.ndarray
    labels: list[list[int]]


def new_scenes(plan: Plan) -> tuple[str, dict[str, scenes.Scene]]:
    """The folder of the new scenes, drawn here if missing, and the scenes by prompt."""
    folder = cache_folder() / f"mini-scenes-{scenes.VERSION}-{SEED}"
    scenes.build(folder, PARTS, PER_PART, SEED)
    drawn = (scenes.candidate(SEED, index) for index in scenes.kept_indices(PARTS * PER_PART, SEED))
    return str(folder), {scene.prompt: scene for scene in drawn}


def items_of(drawn: Sequence[scenes.Scene]) -> Items:
    """The items of these scenes. A function word counts only if it is a phrase by itself ("two", "above")."""
    rows = []
    for number, scene in enumerate(drawn):
        by_word: dict[str, tuple[bool, list[int]]] = {}
        for phrase, label in zip(scene.words, naming.named_labels(scene.said), strict=True):
            for word in words(phrase):
                if is_content_word(word) or word == phrase:
                    shown, labels = by_word.get(word, (False, []))
                    labels = [*labels, naming.POSITION[label]]
                    by_word[word] = shown or phrase not in scene.undrawn, labels
        rows += [(number, word, shown, labels) for word, (shown, labels) in by_word.items()]
    number, word, shown, labels = zip(*rows, strict=True)
    return Items(np.array(number), list(word), np.array(shown), list(labels))


def without(prompt: str, word: str) -> str:
    """The prompt in lower case without each occurrence of the word."""
    rest = re.sub(rf"(?<![a-z'-]){re.escape(word)}(?![a-z'-])", "", prompt.lower())
    return " ".join(rest.split())


@dataclass(frozen=True)
class World:
    """The new scenes: pairs and inputs by backbone, items, embeddings of the prompts (n, E) and of each
    item's prompt without its word (k, E), the probe's probability of each item's labels (k,)."""

    prepared: dict[str, Prepared]
    items: Items
    prompts: np.ndarray
    shortened: np.ndarray
    probe: np.ndarray


def new_world(plan: Plan) -> World:
    folder, by_prompt = new_scenes(plan)
    prepared = {}
    for run in RUNS:
        config = dataclasses.replace(plan.config(run, plan.seeds[0]), data=folder)
        prepared[run.backbone] = prepare(config, plan.device)
    pairs = prepared[RUNS[0].backbone].pairs
    items = items_of([by_prompt[prompt] for prompt in pairs.prompts])
    texts = [without(pairs.prompts[i], word) for i, word in zip(items.scene, items.words, strict=True)]
    shortened = prompt_targets(texts, plan.device)[np.arange(len(texts))]
    prompts = prompt_targets(pairs.prompts, plan.device)[np.arange(len(pairs))]
    found = readings(pairs, range(len(pairs))).numpy()
    probe = np.array([found[i, of].max() for i, of in zip(items.scene, items.labels, strict=True)])
    return World(prepared, items, prompts, shortened, probe)


def predicted_by(run: Run, prepared: Prepared, rows: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The run's embeddings (n, E) and word probabilities (n, V) of these rows."""
    workers = sample_readers(run.config.get("workers"), prepared, plan.device)
    samples = Samples(prepared, rows, run.vocabulary)
    return shared_predictions(run, samples, Process(device=plan.device), workers, True)


def scores_of(world: World, plan: Plan, name: RunName, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """Scores of all items (k,), higher for shown words, by name, with their "column" in the run's vocabulary
    (-1 outside it); and the reliability of P(shown)."""
    run = load_run(plan.run_folder(name, seed), plan.device)
    calibration = require_calibration(run.folder, len(run.vocabulary))
    prepared, scene = world.prepared[name.backbone], world.items.scene
    embedding, probabilities = predicted_by(run, prepared, np.arange(len(world.prompts)), plan)
    shown = calibration.shown(embedding)

    own = prepare(plan.config(name, seed), plan.device)
    prompts = {s: [own.pairs.prompts[i] for i in own.splits[s]] for s in ("train", "val")}
    present = {s: run.vocabulary.targets(prompts[s]).numpy() > 0 for s in prompts}
    base = log_odds(present["train"].sum(axis=0), len(present["train"]))
    validation = predicted_by(run, own, own.splits["val"], plan)[1]
    slope, offsets = fit_words(logit(validation), present["val"], base)

    known = {word: j for j, word in enumerate(run.vocabulary.words)}
    column = np.array([known.get(word, -1) for word in world.items.words])
    cosine = (embedding * world.prompts).sum(axis=1)[scene]
    scores = {
        "column": column,
        "base rate of the word": base[column],
        "cosine of the prompt": cosine,
        "leave the word out": cosine - (embedding[scene] * world.shortened).sum(axis=1),
        "vocabulary head": probabilities[scene, column],
        "vocabulary head, calibrated": slope * logit(probabilities[scene, column]) + offsets[column],
        OURS: shown[scene, column],
        "probe": world.probe,
    }
    pair, word, is_own = own_and_other(run.vocabulary.targets(prepared.pairs.prompts).numpy() > 0)
    of_head = sigmoid(slope * logit(probabilities) + offsets)
    doubted, true = scores[OURS][column >= 0] < 0.5, world.items.shown[column >= 0]
    errors = {"vocabulary head": probabilities, "vocabulary head, calibrated": of_head, OURS: shown}
    return scores, {
        "calibration error": {key: calibration_error(p[pair, word], is_own) for key, p in errors.items()},
        "not shown, below .5": float(doubted[~true].mean()),
        "shown, below .5": float(doubted[true].mean()),
    }


def measured(items: Items, scores: dict[str, np.ndarray], names: Sequence[str], inside: bool) -> dict:
    """By measure and name: the area under the ROC curve of all scenes and then of RESAMPLES bootstrap samples
    of the scenes (1 + RESAMPLES,), over the words inside the run's vocabulary or over those outside it."""
    chosen = (scores["column"] >= 0) == inside
    scene, shown = items.scene[chosen], items.shown[chosen]
    _, word = np.unique(np.array(items.words)[chosen], return_inverse=True)
    n = items.scene.max() + 1
    weights = np.concatenate([np.ones((1, n)), bootstrap_weights(n, RESAMPLES)])[:, scene]
    # A pair within a scene that is drawn k times counts k times, not k^2 times.
    groups = {"all words": (np.zeros_like(scene), weights), "same word": (word, weights)}
    groups["same prompt"] = (scene, np.sqrt(weights))
    return {
        (measure, name): np.concatenate(
            [auroc(scores[name][chosen], shown, of, rows) for rows in np.array_split(weight, 20)]
        )
        for measure, (of, weight) in groups.items()
        for name in names
    }


def compute(plan: Plan) -> dict:
    """The areas by backbone, words, measure and score, their differences from OURS's, and the
    reliability of P(shown)."""
    world, rows, tests, reliable = new_world(plan), [], [], {}
    for run in RUNS:
        by_seed = [scores_of(world, plan, run, seed) for seed in plan.seeds]
        reliable[run.name] = [numbers for _, numbers in by_seed]
        for inside in (True, False):
            names = [name for name in by_seed[0][0] if name != "column"] if inside else list(OUTSIDE)
            areas = [measured(world.items, scores, names, inside) for scores, _ in by_seed]
            for measure, name in areas[0]:
                key = {"backbone": run.backbone, "in vocabulary": inside, "measure": measure, "score": name}
                values = [of[measure, name] for of in areas]
                rows.append(key | summary(values))
                if inside and name != OURS:
                    difference = [of[measure, OURS] - of[measure, name] for of in areas]
                    of_scenes = summary(difference)
                    tests.append(
                        key
                        | {"difference": of_scenes["mean"], "difference_95": of_scenes["scenes_95"]}
                        | {"per_seed": of_scenes["per_seed"]}
                    )
    items = world.items
    counts = {
        "scenes": len(world.prompts),
        "scenes with a word not shown": len(set(items.scene[~items.shown])),
    }
    counts |= {"words": len(items.words), "words not shown": int((~items.shown).sum())}
    return {"counts": counts, "rows": rows, "tests": tests, "reliability": reliable}


def summary(values: Sequence[np.ndarray]) -> dict:
    """Of one array of `measured` a seed: the mean, its interval over scenes, the value of each seed; None
    without a pair of words to compare."""
    means = np.mean(values, axis=0)
    if np.isnan(means[0]):
        return {"mean": None, "scenes_95": None, "per_seed": None}
    return {
        "mean": float(means[0]),
        "scenes_95": percentiles(means[1:]),
        "per_seed": [float(of[0]) for of in values],
    }


def text(result: dict) -> str:
    parts = []
    for inside, title in ((True, "Words in the run's vocabulary"), (False, "Other words")):
        rows = [row for row in result["rows"] if row["in vocabulary"] == inside]
        by_score: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            by_score.setdefault((MODELS[row["backbone"]], row["score"]), []).append(cell_of(row))
        cells = [(*key, *measures) for key, measures in by_score.items()]
        parts += [f"## {title}", markdown(f"run | score | {' | '.join(MEASURES)}", cells)]
    tests = [
        (MODELS[test["backbone"]], test["measure"], test["score"], *comparison(test))
        for test in result["tests"]
    ]
    reliable = [
        (MODELS[name.split("-")[0]], *np.mean([list(flat(of).values()) for of in by_seed], axis=0).tolist())
        for name, by_seed in result["reliability"].items()
    ]
    columns = flat(next(iter(result["reliability"].values()))[0])
    counts = ", ".join(f"{n:,} {name}" for name, n in result["counts"].items())
    notes = (
        "The area under the ROC curve for the words of a prompt that are not in its picture, on new drawn "
        "scenes, mean over the seeds (95 % interval by bootstrap over the scenes; Student's over the seeds). "
        ".5 is chance. Same word: only pairs of one word in two prompts count, so that its frequency cannot "
        "help. Same prompt: only pairs of words of one prompt count.",
        "P(shown): ridge regression from the predicted embedding to the words, calibrated on the validation "
        "pairs (training/calibration.py); python reverse_sd.py --prompt prints it. Vocabulary head: its "
        "probability of the word as trained; calibrated: in the same way, with the word's base rate. Leave "
        "the word out: the cosine with the prompt less the cosine with the prompt without the word. Probe: a "
        "classifier trained on drawings of known content; its probability of the label that the word names.",
        "Reliability, mean over the seeds. Error: calibration error on words of a scene's own prompt and of "
        "another prompt, as many of both. Below .5: the shares of the words not shown and of the words shown "
        "whose P(shown) is below .5.",
    )
    return page(
        "Per word: is it in the picture?",
        f"{provenance_text(result)} {counts}.",
        *parts,
        f"## {OURS} − each other score",
        markdown(f"run | measure | other score | {COMPARED.replace('over pairs', 'over scenes')}", tests),
        "## Reliability",
        markdown(f"run | {' | '.join(columns)}", reliable),
        bullets(notes),
    )


def cell_of(row: dict) -> str:
    if row["mean"] is None:
        return ""
    seeds = student_interval(row["per_seed"])
    return f"{short(row['mean'])} ({interval(row['scenes_95'])}{'; ' + interval(seeds) if seeds else ''})"


def flat(numbers: dict) -> dict[str, float]:
    """The numbers of a run's reliability by column of the table."""
    errors = {f"error, {name}": error for name, error in numbers["calibration error"].items()}
    return errors | {name: value for name, value in numbers.items() if name != "calibration error"}


WORDS = {"words": Exhibit(RUNS, compute, text, needs="drawn")}
