"""The error of the mean embedding, 1 - cosine, split into its causes.

From the whole error to none, each step a predictor that has more:

    mean embedding -> trained reader          read: the part that the reader removes
    -> the same with a converged read-out     read-out: ridge regression on the reader's own predictions
    -> the content shown by the picture       unread: shown, and missed by the reader
    -> the content of the prompt              not drawn: in the prompt, not in the picture
    -> the prompt                             wording: the prompt's content is known, its words are not

A content predicts by the mean embedding of infinitely many wordings (wordings.py). Mini scenes have known
contents. Drawn pictures have known omissions; for generated ones the probe judges, and it calls more undrawn
than is: "not drawn" is then overestimated, and "unread" underestimated by as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import reverse_sd
from baselines import RidgeSums, ridge
from mini import naming, scenes
from tables.compute import mean_embedding_cosines
from tables.exhibit import Exhibit, bullets, interval, markdown, page, provenance_text, short
from tables.methods import Member, members_of, tensor
from tables.probe import default_scenes, readings, view_of
from tables.runs import Plan, RunName
from tables.wordings import embedded_wordings, limit_cosines
from training.inputs import prepare
from training.metrics import cosines, student_interval

READERS = {
    "Swin": (RunName("swin", "mlc"),),
    "U-Net, empty text": (RunName("unet", "captions-empty"),),
    "U-Net, captions": (RunName("unet", "mlc"),),
    "Swin and U-Net, captions": (RunName("swin", "mlc"), RunName("unet", "mlc")),
}
RUNS = tuple(dict.fromkeys(run for runs in READERS.values() for run in runs))
PARTS = ("read", "read-out", "unread", "not drawn", "wording")
WORDINGS = 12  # from which the limit is estimated
SHOWN = (1, 4, WORDINGS)  # numbers of wordings whose own mean is also stated


def parts_of(mean: float, trained: float, converged: float, shown: float, content: float) -> dict[str, float]:
    """The parts of the error 1 - mean, from the cosines of the module's steps; they sum to it."""
    steps = np.diff([mean, trained, converged, shown, content, 1.0])
    return dict(zip(PARTS, steps.tolist(), strict=True))


def seen_view(view: scenes.View, probabilities: Tensor) -> scenes.View:
    """The prompt's content as the picture shows it by the probe's verdict. A word that the probe does not
    find is replaced by the most probable other one of its kind, or removed if none is above one half."""
    shown, named = naming.shown_labels(probabilities, view), naming.named_labels(view)

    def seen(slot: str, key: str | int | None) -> str | int | None:
        if (slot, key) not in shown or shown[slot, key]:
            return key
        others = [other for other in naming.TABLES[slot] if (slot, other) not in named]
        best = max(others, key=lambda other: probabilities[naming.POSITION[slot, other]])
        return best if slot == "subject" or probabilities[naming.POSITION[slot, best]] > 0.5 else None

    kinds = ("subject", "colour", "material")
    things = tuple(scenes.Thing(*(seen(k, getattr(thing, k)) for k in kinds)) for thing in view.things)
    others = {name: seen(name, getattr(view, name)) for name in ("relation", "position", "place", "light")}
    count, style = seen("count", view.count) or 1, seen("style", view.style)
    return scenes.View(things, count=count, style=style, **others)


def converged_cosines(members: Sequence[Member], device: str) -> np.ndarray:
    """The cosine of each test pair (n,) by ridge regression on the readers' predictions side by side."""
    x = {s: torch.cat([tensor(m.predicted(s), device) for m in members], 1) for s in ("train", "val", "test")}
    y = {split: tensor(members[0].targets(split), device) for split in x}
    sums = RidgeSums(x["train"].shape[1], y["train"].shape[1], device)
    sums.add(x["train"], y["train"])
    predicted = ridge(sums, x["val"], y["val"]).predict(x["test"])
    return cosines(predicted.cpu().numpy(), members[0].targets("test"))


def contents_of(plan: Plan, seed: int) -> dict[str, list[scenes.View]]:
    """The contents of the test pairs: "said" by the prompt, "read" by the probe without the prompt, "verdict"
    of the probe on the prompt, and for drawn pictures "drawn"."""
    prepared = prepare(plan.config(READERS["Swin"][0], seed), plan.device)
    pairs, rows = prepared.pairs, prepared.splits["test"]
    known = default_scenes()
    chosen = [known[pairs.prompts[i]] for i in rows]
    seen = readings(pairs, rows)
    contents = {
        "said": [scene.said for scene in chosen],
        "verdict": [seen_view(scene.said, row) for scene, row in zip(chosen, seen, strict=True)],
        "read": [view_of(row) for row in seen],
    }
    generated = any("sa" in meta for meta in pairs.meta)  # only generated pictures have a sampler
    return contents if generated else contents | {"drawn": [scene.drawn for scene in chosen]}


def compute_seed(plan: Plan, seed: int) -> dict:
    """The cosines of one seed: of each content by its number of wordings, and of each reader's parts."""
    members = dict(zip(RUNS, members_of(plan, RUNS, seed), strict=True))
    targets = members[RUNS[0]].targets("test")
    by_content = {}
    for name, views in contents_of(plan, seed).items():
        rows = embedded_wordings(views, WORDINGS, plan.device)
        found = {str(k): float(cosines(rows[:, :k].mean(axis=1), targets).mean()) for k in SHOWN}
        by_content[name] = found | {"limit": float(limit_cosines(rows, targets).mean())}
    limits = {name: found["limit"] for name, found in by_content.items()}
    shown = limits.get("drawn", limits["verdict"])
    readers = {}
    for name, runs in READERS.items():
        own = [members[run] for run in runs]
        together = reverse_sd.ensemble([tensor(member.predicted("test")) for member in own]).numpy()
        steps = [mean_embedding_cosines(own[0]), cosines(together, targets)]
        steps.append(converged_cosines(own, plan.device))
        readers[name] = parts_of(*(float(step.mean()) for step in steps), shown, limits["said"])
    return {"contents": by_content, "readers": readers, "n_test": len(targets)}


def compute(plan: Plan) -> dict:
    by_seed = [compute_seed(plan, seed) for seed in plan.seeds]

    def per_seed(kind: str) -> dict:
        return {
            name: {part: [found[kind][name][part] for found in by_seed] for part in by_seed[0][kind][name]}
            for name in by_seed[0][kind]
        }

    return {"n_test": [found["n_test"] for found in by_seed]} | {
        k: per_seed(k) for k in ("readers", "contents")
    }


CONTENTS = {
    "said": "the content of the prompt",
    "drawn": "the content as drawn",
    "verdict": "the content of the prompt, as far as the probe finds it in the picture",
    "read": "the content that the probe reads, without the prompt",
}


def text(result: dict) -> str:
    readers, contents = result["readers"], result["contents"]
    whole = {name: np.sum([parts[part] for part in PARTS], axis=0) for name, parts in readers.items()}

    def cell(values: Sequence[float], of: Sequence[float]) -> str:
        limits = interval(student_interval(values))
        return f"{short(float(np.mean(values)))} ({limits}), {np.mean(values) / np.mean(of):.0%}"

    judged = () if "drawn" in contents else ("not drawn", "unread")
    rows = [
        (
            part + ", by the probe" * (part in judged),
            *(cell(parts[part], whole[name]) for name, parts in readers.items()),
        )
        for part in reversed(PARTS)
    ]
    rows.append(("all", *(cell(total, total) for total in whole.values())))
    numbers = [*map(str, SHOWN), "limit"]
    limits = []
    for name, found in contents.items():
        means = [float(np.mean(found[k])) for k in numbers]
        limits.append((CONTENTS[name], *means, interval(student_interval(found["limit"]))))
    omissions = (
        "The omissions of drawn pictures are known."
        if "drawn" in contents
        else "Not drawn is judged by the probe, which calls more undrawn than is: this part is overestimated "
        "and unread underestimated. Their sum does not depend on the probe."
    )
    notes = (
        "Error: 1 - mean cosine on the test pairs; Student's intervals over seeds; share of all. Wording: "
        "the content of the prompt is known, not its words. Not drawn: content of the prompt that the "
        "picture lacks. Unread: shown by the picture, missed by the reader with a converged read-out. "
        "Read-out: gained by ridge regression on the reader's own predictions. Read: removed by the trained "
        "reader.",
        omissions,
        "A content predicts by the mean embedding of infinitely many wordings, estimated from those of "
        f"{WORDINGS}. The second table also has the mean of fewer, which is lower.",
        "The steps are predictors that could be built, not bounds: all contents that fit a picture, weighted "
        "by their probability, may predict better than the content as drawn.",
    )
    return page(
        "The error of the mean embedding, by cause",
        provenance_text(result),
        markdown(f"part | {' | '.join(readers)}", rows),
        markdown(
            f"cosine of the mean of wordings | {' | '.join(numbers)} | 95 % interval of the limit", limits
        ),
        bullets(notes),
    )


BUDGET = {"budget": Exhibit(RUNS, compute, text, needs="probe")}
