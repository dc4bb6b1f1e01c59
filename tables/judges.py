"""Error rates of the probes, and the shares that they find in generated pictures, corrected for them.

Sensitivity and specificity of a verdict are measured on drawings whose content is known. Three kinds of
questions have the answer "not shown": the prompt of another drawing; a word that a drawing leaves out; and,
the hardest, a drawing of the same prompt and the same jitter in which exactly one thing is exchanged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mini import naming, scenes
from mini.judge import drawings, new_scenes
from mini.scenes import Scene, View
from mini.subjects import SHAPES
from schema import read_json
from tables.exhibit import Exhibit, bullets, markdown, page, percent, percents, provenance_text
from tables.probe import Verdicts, default_views, pixels_of, verdicts
from tables.runs import Plan, RunName
from training.inputs import prepare
from training.metrics import bootstrap_weights, percentiles

log = logging.getLogger("tables")

SEED = 5_000_011  # of the drawings
DRAWINGS = {1: 1000, 2: 500}  # by the number of things
NATURAL = 2000  # drawings that leave out words as the drawn data do
RESAMPLES = 1000
NOISE, BLEND = 25, 0.3  # deviation of the noise added to pixels, and another picture's share in a blend
LIKE_GENERATED = "autoencoder"  # the drawings on which the corrections' rates are measured
TITLES = {"probe": "probe", "probe-vit": "second probe"}
Counts = dict[str, np.ndarray]  # by kind of label: labels found and labels asked for in n pictures, (n, 2)


def load_probes(device: str) -> dict[str, naming.Namer]:
    """The shipped probe and, if it has been trained, the second one, by their names in TITLES."""
    probes = {"probe": naming.load_probe(naming.FOLDER).to(device)}
    if (naming.SECOND / "probe-vit").exists():
        probes["probe-vit"] = naming.load_probe(naming.SECOND, "probe-vit").to(device)
    else:
        log.warning(
            "%s/probe-vit is missing, so the shipped probe judges alone; train the second probe by "
            "python -m mini.pretrain probe-vit --seed 1 --folder %s",
            *(naming.SECOND, naming.SECOND),
        )
    return probes


# ------------------------------------------------------------------------------------------------------------
# drawings and verdicts
# ------------------------------------------------------------------------------------------------------------


def exchanges(view: View, label: tuple) -> list[View]:
    """Every view that shows what `view` shows, with another key of the same kind in place of `label`.

    The colour of a thing without a named colour stays when its subject is exchanged.
    """
    slot, key = label
    rest = Counter(naming.drawn_labels(view)) - Counter([label])
    views = []
    for other in naming.TABLES[slot]:
        if slot in ("subject", "colour", "material"):
            i = next(i for i, thing in enumerate(view.things) if getattr(thing, slot) == key)
            old = view.things[i]
            new = replace(old, **{slot: other})
            if slot == "subject":
                new = replace(new, colour=old.colour or SHAPES[key].colour)
            exchanged = replace(view, things=(*view.things[:i], new, *view.things[i + 1 :]))
        else:
            exchanged = replace(view, **{slot: other})
        closed = exchanged.place in scenes.INDOORS and exchanged.light not in (None, *scenes.EVERYWHERE)
        labels = naming.drawn_labels(exchanged)
        if not closed and label not in labels and Counter(labels) == rest + Counter([(slot, other)]):
            if (slot, other) not in rest:
                views.append(exchanged)
    return views


def exchanged_scenes(chosen: Sequence[Scene], rng: np.random.Generator) -> list[tuple[int, tuple, Scene]]:
    """For each label that a prompt names: (position of its scene, label, the scene with it exchanged)."""
    made = []
    for i, scene in enumerate(chosen):
        for label in dict.fromkeys(naming.named_labels(scene.said)):
            if options := exchanges(scene.said, label):
                view = options[int(rng.integers(len(options)))]
                made.append((i, label, replace(scene, drawn=view)))
    return made


def forms_of(pictures: np.ndarray, device: str) -> dict[str, np.ndarray]:
    """The pictures as they are and in three degraded forms."""
    noise = np.random.default_rng(SEED).standard_normal(pictures.shape, np.float32)
    weight, other = np.float32(BLEND), np.roll(pictures, len(pictures) // 2, axis=0)
    return {
        "drawing": pictures,
        "autoencoder": naming.reconstructed(pictures, device),
        "noise": (pictures + NOISE * noise).round().clip(0, 255).astype(np.uint8),
        "blend": ((1 - weight) * pictures + weight * other).round().astype(np.uint8),
    }


def counted(verdicts: Iterable[Verdicts]) -> Counts:
    """The verdicts of n pictures as counts."""
    verdicts, counts = list(verdicts), {}
    for i, of in enumerate(verdicts):
        for (slot, _), found in of.items():
            counts.setdefault(slot, np.zeros((len(verdicts), 2)))[i] += (found, 1)
    return counts


def share(counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The share found of counts (n, 2); or, with weights (resamples, n), one for each bootstrap sample."""
    found, of = (counts.sum(axis=0) if weights is None else weights @ counts).T
    with np.errstate(invalid="ignore"):
        return np.asarray(found / of)


def rogan_gladen(found: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
    """The share that is shown, estimated from the share found by a fallible judge; NaN where the judge is no
    better than chance. It is outside [0, 1] by chance, or if the rates are not those of these pictures.
    Source: Rogan and Gladen, Estimating prevalence from the results of a screening test, 1978."""
    better = np.asarray(sensitivity + specificity - 1, np.float64)
    better = np.where(better > 0, better, np.nan)
    return (found + specificity - 1) / better


def kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cohen's kappa of two arrays of verdicts (n,); None if chance alone makes them agree."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else None


# ------------------------------------------------------------------------------------------------------------
# the table
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Verdicts of a probe on drawings with the same number of things, by form of the picture."""

    shown: dict[str, Counts]  # on labels that are drawn
    exchanged: dict[str, Counts]  # on labels in whose place another is drawn
    random: Counts  # on labels of another prompt

    def corrected(self, slot: str, counts: np.ndarray, form: str) -> tuple[float | None, list[float] | None]:
        """The share shown behind verdicts `counts` (n, 2) on other pictures, and its 95 % interval.

        A bootstrap sample draws the scenes of both sets of pictures. None, None if the probe is no better
        than chance in more than 1 of 40 of them, since the estimate divides by what it is better.
        """
        if slot not in self.exchanged[form]:
            return None, None
        right, wrong = self.shown[form][slot], self.exchanged[form][slot]
        value = float(rogan_gladen(share(counts), share(right), 1 - share(wrong)))
        drawn = bootstrap_weights(len(right), RESAMPLES)
        others = bootstrap_weights(len(counts), RESAMPLES, seed=1)
        draws = rogan_gladen(share(counts, others), share(right, drawn), 1 - share(wrong, drawn))
        limits = percentiles(draws)
        return (None, None) if limits is None or np.isnan(value) else (value, limits)


def calibrate(probes: dict[str, naming.Namer], things: int, device: str) -> dict[str, Calibration]:
    """Each probe's verdicts on DRAWINGS[things] new drawings and on those with one label exchanged."""
    chosen = new_scenes(DRAWINGS[things], things, SEED)
    made = exchanged_scenes(chosen, np.random.default_rng(SEED))
    n, views = len(chosen), [scene.said for scene in chosen]
    forms = forms_of(drawings([*chosen, *(scene for _, _, scene in made)]), device)
    questions = [*views, *(scene.said for _, _, scene in made)]
    others = [*views[1:], views[0]]  # each drawing is asked for the content of the next
    result = {}
    for name, probe in probes.items():
        shown, exchanged = {}, {}
        for form, pictures in forms.items():
            found = verdicts(probe, pictures, questions)
            by_scene: list[Verdicts] = [{} for _ in chosen]
            for (i, label, _), of in zip(made, found[n:], strict=True):
                by_scene[i][label] = of[label]
            shown[form], exchanged[form] = counted(found[:n]), counted(by_scene)
        found = verdicts(probe, forms["drawing"][:n], others)
        result[name] = Calibration(shown, exchanged, counted(map(undrawn_only, found, views)))
    return result


def truth_of(scene: Scene) -> Verdicts:
    """The verdicts of a judge without error on a drawing."""
    labels = naming.drawn_labels(scene.drawn)
    return {label: label in labels for label in naming.named_labels(scene.said)}


def undrawn_only(verdicts: Verdicts, drawn: View) -> Verdicts:
    """The verdicts on labels that a picture of `drawn` does not show."""
    labels = naming.drawn_labels(drawn)
    return {label: found for label, found in verdicts.items() if label not in labels}


def rate_rows(calibrated: dict[int, dict[str, Calibration]], left_out: dict) -> list[dict]:
    """By probe, number of things and kind of label: sensitivity, specificity and the number of questions."""
    rows = []
    for things, by_probe in calibrated.items():
        for name, calibration in by_probe.items():
            for slot in (slot for slot in naming.TABLES if slot in calibration.exchanged["drawing"]):
                yes = {form: counts[slot] for form, counts in calibration.shown.items()}
                no = {f"exchanged, {form}": counts[slot] for form, counts in calibration.exchanged.items()}
                others = {"another prompt": calibration.random, "left out": left_out[things, name]}
                no |= {kind: counts[slot] for kind, counts in others.items() if slot in counts}
                row = {"probe": name, "things": things, "kind": slot}
                row["drawn"] = int(yes["drawing"][:, 1].sum())
                row["sensitivity"] = {form: float(share(counts)) for form, counts in yes.items()}
                row["not drawn"] = {kind: int(counts[:, 1].sum()) for kind, counts in no.items()}
                row["specificity"] = {kind: float(1 - share(counts)) for kind, counts in no.items()}
                rows.append(row)
    return rows


def found_rows(
    found: dict[str, list[Verdicts]], views: Sequence[View], calibrated: dict[int, dict], form: str
) -> list[dict]:
    """By number of things and kind of label: the share found by each probe, raw and corrected by its rates on
    drawings of this form, and the probes' agreement."""
    rows = []
    for things, by_probe in calibrated.items():
        chosen = [i for i, view in enumerate(views) if len(view.things) == things]
        counts = {name: counted(of[i] for i in chosen) for name, of in found.items()}
        for slot in (slot for slot in naming.TABLES if slot in counts["probe"]):
            row = {"things": things, "kind": slot, "labels": int(counts["probe"][slot][:, 1].sum())}
            row |= {"found": {}, "corrected": {}, "corrected_95": {}}
            for name, calibration in by_probe.items():
                row["found"][name] = float(share(counts[name][slot]))
                value, interval_95 = calibration.corrected(slot, counts[name][slot], form)
                row["corrected"][name], row["corrected_95"][name] = value, interval_95
            both = [
                [yes for i in chosen for label, yes in of[i].items() if label[0] == slot]
                for of in found.values()
            ]
            rows.append(row | ({"kappa": kappa(*both)} if len(both) == 2 else {}))
    return rows


def undrawn_rows(found: list[Verdicts], chosen: Sequence[Scene]) -> dict[str, dict]:
    """By kind of label, and for all: how the verdicts "undrawn" relate to the truth of drawings."""
    truth = [truth_of(scene) for scene in chosen]
    again, rows = bootstrap_weights(len(chosen), RESAMPLES), {}
    for slot in (*naming.TABLES, "all"):
        right, detected = np.zeros((len(chosen), 2)), np.zeros((len(chosen), 2))
        for i, of in enumerate(found):
            for label, yes in of.items():
                if slot in (label[0], "all"):
                    both = not yes and not truth[i][label]
                    right[i] += (both, not yes)
                    detected[i] += (both, not truth[i][label])
        rows[slot] = {
            "verdicts": int(right[:, 1].sum()),
            "undrawn": int(detected[:, 1].sum()),
            "right": None if not right[:, 1].any() else float(share(right)),
            "right_95": percentiles(share(right, again)),
            "detected": None if not detected[:, 1].any() else float(share(detected)),
        }
    return rows


def compute(plan: Plan) -> dict:
    """Rates, agreement and corrected shares; see the text."""
    probes = load_probes(plan.device)
    calibrated = {things: calibrate(probes, things, plan.device) for things in DRAWINGS}
    natural = [scenes.candidate(SEED + 1, index) for index in range(NATURAL)]
    pairs = prepare(plan.config(RunName("vit", "mlc"), plan.seeds[0]), plan.device).pairs

    def judged(pictures: np.ndarray, views: Sequence[View]) -> dict[str, list[Verdicts]]:
        return {name: verdicts(probe, pictures, views) for name, probe in probes.items()}

    views = [scene.said for scene in natural]
    on_drawings = judged(drawings(natural), views)
    check, left_out = found_rows(on_drawings, views, calibrated, "drawing"), {}
    for things in DRAWINGS:
        chosen = [i for i, view in enumerate(views) if len(view.things) == things]
        truth = counted(truth_of(natural[i]) for i in chosen)
        for row in check:
            if row["things"] == things:
                row["drawn"] = float(share(truth[row["kind"]]))
        for name, found in on_drawings.items():
            left_out[things, name] = counted(undrawn_only(found[i], natural[i].drawn) for i in chosen)
    views = [default_views()[prompt] for prompt in pairs.prompts]
    pictures = pixels_of(pairs, range(len(pairs)))
    return {
        "probes": {name: card_of(name) for name in probes},
        "drawings": list(DRAWINGS.values()),
        "natural": NATURAL,
        "pairs": len(pairs),
        "rates": rate_rows(calibrated, left_out),
        "found": found_rows(judged(pictures, views), views, calibrated, LIKE_GENERATED),
        "check": check,
        "undrawn": {name: undrawn_rows(of, natural) for name, of in on_drawings.items()},
    }


def card_of(name: str) -> dict:
    """The card of a probe that is loaded."""
    folder = naming.FOLDER if name == "probe" else naming.SECOND
    return read_json(folder / name / "card.json")


RATES = {
    "sensitivity": ("drawing", "autoencoder", "noise", "blend"),
    "specificity": (
        *(f"exchanged, {form}" for form in ("drawing", "autoencoder", "noise", "blend")),
        "another prompt",
        "left out",
    ),
}


def found_table(rows: list[dict], probes: Sequence[str], truth: str = "") -> str:
    """Markdown of `found_rows`."""
    columns, cells = ["things", "kind", "labels", *([truth] if truth else [])], []
    for name in probes:
        columns += [f"{TITLES[name]}: found", "corrected", "95 % interval"]
    columns += ["kappa"] * (len(probes) == 2)
    for row in rows:
        line = [row["things"], row["kind"], f"{row['labels']:,}", *([percent(row["drawn"])] if truth else [])]
        for name in probes:
            line += [percent(row[of][name]) for of in ("found", "corrected")]
            line.append(percents(row["corrected_95"][name]))
        cells.append([*line, *([row["kappa"]] if len(probes) == 2 else [])])
    return markdown(" | ".join(columns), cells)


def text(result: dict) -> str:
    """The table as Markdown."""
    parts, probes = [], list(result["probes"])
    for name in probes:
        rows = [
            (row["things"], row["kind"], f"{row['drawn']:,}")
            + tuple(percent(row[rate].get(kind)) for rate, kinds in RATES.items() for kind in kinds)
            for row in result["rates"]
            if row["probe"] == name
        ]
        parts += [f"## Rates of the {TITLES[name]}, `{result['probes'][name]['command']}`"]
        columns = (
            "things | kind | labels | sensitivity: drawing | autoencoder | noise | blend | specificity: "
        )
        columns += "exchanged | autoencoder | noise | blend | another prompt | left out"
        parts += [markdown(columns, rows)]
    undrawn = []
    for slot in result["undrawn"]["probe"]:
        of = [result["undrawn"][name][slot] for name in probes]
        cells = [(f"{x['verdicts']:,}", percent(x["right"]), percents(x["right_95"])) for x in of]
        line = [(*cell, percent(x["detected"])) for cell, x in zip(cells, of, strict=True)]
        undrawn.append((slot, of[0]["undrawn"], *(value for cell in line for value in cell)))
    titles = [f"{TITLES[name]}: verdicts | right | 95 % interval | undrawn detected" for name in probes]
    one, two = result["drawings"]
    notes = (
        "Sensitivity: the share found of the labels that a picture shows. Specificity: the share not found "
        "of those that it does not show.",
        "Exchanged: a drawing of the same prompt with the same jitter in which exactly this label is "
        "exchanged for another of its kind. Another prompt: the content of an unrelated prompt. Left out: "
        "words that drawings leave out as the drawn data do.",
        f"Autoencoder: pictures through the autoencoder. Noise: its deviation is {NOISE} of 255. Blend: with "
        f"{BLEND:.0%} of another picture.",
        "Corrected: the estimate of Rogan and Gladen from sensitivity and from specificity on exchanged "
        f"labels; for the pictures of the data from those through the {LIKE_GENERATED}. It assumes that a "
        "probe has the same rates on generated pictures. An interval above 100 % refutes this for its kind "
        "of label: the probe finds more in generated pictures than in complete drawings. Intervals: "
        "bootstrap over scenes and pictures. Empty: the probe is no better than chance in more than 1 of 40 "
        "bootstrap samples.",
        "Kappa: Cohen's, of the verdicts of the two probes.",
    )
    return page(
        "How well the probes judge pictures",
        f"{provenance_text(result)} {one:,} new drawings with one thing and {two:,} with two; "
        f"{result['natural']:,} that leave out words; {result['pairs']:,} pictures of the data.",
        bullets(notes),
        *parts,
        "## Found in the pictures of the data",
        found_table(result["found"], probes),
        "## Check of the correction: drawings that leave out words",
        found_table(result["check"], probes, truth="drawn"),
        '## Verdicts "undrawn" on these drawings, at the rate at which they leave out words',
        markdown(f"kind | undrawn | {' | '.join(titles)}", undrawn),
    )


JUDGES = {"probe": Exhibit((), compute, text, needs="probe")}
