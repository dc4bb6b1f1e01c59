"""Denoised targets: training on the mean embedding of paraphrases of each prompt, testing on the prompt.

The wording of a prompt cannot be read from a picture. In mini scenes each prompt's content is known, so that
it can be worded again. The control takes sentences of other contents with the same subject: a target that is
as smooth and that holds less of the content.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import data
from files import atomic_write
from mini import scenes
from tables.cells import cell_texts, contrasts_text, frozen_cosines, part, trained_cosines
from tables.exhibit import Exhibit, bullets, markdown, page, provenance_text
from tables.probe import default_views
from tables.runs import Plan, RunName
from tables.wordings import random_of, wordings
from training.inputs import pairs_folder

TEXTS = 16  # of each prompt
FROZEN_SEEDS = (0, 1, 2, 3, 4)
MODELS = {"Swin": "swin", "U-Net": "unet"}
TARGETS = {
    "the prompt": "mlc",
    "paraphrases": "mlc-paraphrases",
    "the same subject": "mlc-same-subject",
}
CELLS = {
    f"{model}, {target}": RunName(backbone, recipe)
    for model, backbone in MODELS.items()
    for target, recipe in TARGETS.items()
}
PARAPHRASED, CONTROL = (CELLS[f"Swin, {target}"] for target in list(TARGETS)[1:])
TRAINED = {cell: run for cell, run in CELLS.items() if run.recipe != CONTROL.recipe}


def contrasts_of(cells: Iterable[str]) -> dict:
    """Each cell less the cell of the same model whose targets are the prompts'."""
    pairs = [(cell, f"{cell.partition(', ')[0]}, the prompt") for cell in cells]
    return {f"{cell} − {plain}": ((cell,), (plain,)) for cell, plain in pairs if cell != plain}


def same_subject(view: scenes.View, k: int) -> list[str]:
    """k prompts for random contents with the view's first subject."""
    rng, texts = random_of(view), []
    for _ in range(k):
        other = scenes.sample_view(rng)
        first = replace(other.things[0], subject=view.things[0].subject)
        other = replace(other, things=(first, *other.things[1:]))
        texts.append(scenes.say(scenes.choose_words(other, rng), rng))
    return texts


def write_texts(plan: Plan) -> None:
    """Write the files of --target-texts into the runs' folder."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    views, prompts = default_views(), data.read_pairs(pairs_folder(plan.data)).prompts
    for run, texts_of in ((PARAPHRASED, wordings), (CONTROL, same_subject)):
        lines = [{"prompt": p, "texts": texts_of(views[p], TEXTS)} for p in dict.fromkeys(prompts)]
        atomic_write(
            Path(plan.config(run, 0).target_texts), "".join(json.dumps(line) + "\n" for line in lines)
        )


def compute(plan: Plan) -> dict:
    trained = part(plan.seeds, contrasts_of(TRAINED), lambda seed: trained_cosines(plan, TRAINED, seed))
    frozen = part(FROZEN_SEEDS, contrasts_of(CELLS), lambda seed: frozen_cosines(plan, CELLS, seed))
    return trained | {"frozen": frozen}


def part_text(part: dict) -> tuple[str, str]:
    rows = [(name, *cells) for name, cells in cell_texts(part).items()]
    return markdown("targets | cosine | 95 % interval over seeds", rows), contrasts_text(part)


def text(result: dict) -> str:
    frozen = result["frozen"]
    notes = (
        f"Paraphrases: a training pair's target is the mean embedding of {TEXTS} other wordings of its "
        "prompt's content, as a unit vector. The same subject, a control: the mean embedding of as many "
        "prompts with the same first subject and other contents. Validation and test have the single true "
        "prompts in all rows.",
        "Student's intervals and tests over seeds; each seed has its own split. Bootstrap over the test "
        "pairs of all seeds, which does not cover chance in training.",
        f"Frozen features: no network is trained; seeds {', '.join(map(str, frozen['seeds']))}.",
    )
    return page(
        "Denoised targets: training on the mean embedding of paraphrases",
        provenance_text(result),
        *part_text(result),
        "## Ridge regression on frozen features",
        *part_text(frozen),
        bullets(notes),
    )


DENOISED = {"denoised": Exhibit(tuple(TRAINED.values()), compute, text, needs="probe", before=write_texts)}
