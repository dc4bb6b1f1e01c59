"""Section 4.4: table 3, captioners that write the prompt, and figure 4, some of their texts.

Beside the paper's rows: the captioners before fine-tuning, texts made from a predicted embedding, and two
bounds. Each text is scored against its image by CLIP and against the true prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import clipscore
import data
import weights
from backbones import CAPTIONERS
from files import records
from mini import scenes
from reverse_sd import nearest_rows, read_vocabulary
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
    percent,
    provenance_text,
    short,
)
from tables.generation import spread
from tables.methods import Member, members_of, tensor
from tables.runs import Plan, RunName, last_quarter, validation_curve
from training.calibration import require_calibration
from training.captioner import Captioner, load_model
from training.captions import written_prompts
from training.config import read_run
from training.decoder import DecoderConfig, DecoderTrainer, decoded
from training.inputs import Prepared, prepare, prompt_targets
from training.metrics import cosines, holm, paired_by_group, seeds_p, student_interval
from training.pictures import Line, sheet
from words import words

SWIN, UNET = RunName("swin", "mlc"), RunName("unet", "mlc")
READERS = {"Swin": SWIN, "U-Net": UNET}  # whose predicted embeddings become texts
STAGES = {"": "plain", " + MLC": "mlc", " + MLC + CL": "mlc-cl"}  # of fine-tuning
RUNS = {
    f"{captioner.title}{stage}": RunName(kind, recipe)
    for kind, captioner in CAPTIONERS.items()
    for stage, recipe in STAGES.items()
}
PAPER = dict(zip(RUNS, (30.93, 31.77, 31.88, 31.22, 31.96, 32.14), strict=True))
BEST, TRUE = "BLIP-2 + MLC + CL", "true prompt"
LIKELY = 0.5  # probability from which a word is added to a caption
SENTENCES, SENTENCES_SEED = 10_000, 6_000_011  # random sentences of the little world, for the decoder
EXAMPLES = 8  # pictures of figure 4
PAPERS_SCALE = "100 RefCLIPScore, w = 1"
METRICS = (PAPERS_SCALE, "RefCLIPScore", "CLIPScore", "100 cos", "cosine")
TESTED = (PAPERS_SCALE, "cosine")


@dataclass(frozen=True)
class SeedPairs:
    """The test pairs of a seed, in the order of the runs' predictions."""

    plan: Plan
    seed: int
    prepared: Prepared

    @property
    def images(self) -> data.Pairs:
        return self.prepared.pairs.subset(self.prepared.splits["test"])

    @property
    def prompts(self) -> list[str]:
        return list(self.images.prompts)

    @property
    def train_prompts(self) -> list[str]:
        return [self.prepared.pairs.prompts[i] for i in self.prepared.splits["train"]]

    @property
    def train_targets(self) -> np.ndarray:
        return self.prepared.targets[self.prepared.splits["train"]]

    def member(self, run: RunName) -> Member:
        return Member(self.plan.run_folder(run, self.seed))


def pairs_of(plan: Plan, seed: int, runs: Sequence[RunName]) -> SeedPairs:
    """The test pairs of a seed. Raises DataError unless all runs have them."""
    members_of(plan, runs, seed)
    return SeedPairs(plan, seed, prepare(plan.config(SWIN, seed), plan.device))


def is_mini(plan: Plan) -> bool:
    return plan.sources["unet"] == "sd-mini"


# ============================================================================================================
# Texts: functions from test pairs to a text for each
# ============================================================================================================


def written_by(run: RunName, pairs: SeedPairs) -> list[str]:
    """A captioner's texts, from its captions.jsonl. Raises DataError for a file of other pairs."""
    folder = pairs.plan.run_folder(run, pairs.seed)
    rows = [row for _, row in records(folder / "captions.jsonl") if isinstance(row, dict)]
    rows = [row for row in rows if row.get("split") == "test" and isinstance(row.get("caption"), str)]
    if [row.get("prompt") for row in rows] != pairs.prompts:
        raise data.DataError(
            f"{folder}/captions.jsonl: does not hold the {len(pairs.prompts):,} test pairs in their order; "
            f"write it again with python eval.py {folder}"
        )
    return [row["caption"] for row in rows]


def before_training(kind: str, source: str, pairs: SeedPairs) -> list[str]:
    """The texts of a captioner that is not fine-tuned."""
    plan = pairs.plan
    captioner = Captioner(kind, load_model(kind, source, plan.device.startswith("cuda")))
    return written_prompts(
        captioner.to(plan.device).eval(), weights.fingerprint(kind, source),
        data.Preprocessing(**weights.preprocessing(kind, source)), pairs.images, plan.device,
        plan.options.get("workers"),
    )  # fmt: skip


def with_likely_words(run: RunName, reader: RunName, pairs: SeedPairs) -> list[str]:
    """A captioner's texts, each followed by the words that it lacks and that are probably in the prompt, by a
    reader's predicted embedding."""
    folder = pairs.plan.run_folder(reader, pairs.seed)
    vocabulary = read_vocabulary(folder, read_run(folder)).words
    calibration = require_calibration(folder, len(vocabulary))
    texts = []
    for text, embedding in zip(written_by(run, pairs), pairs.member(reader).predicted("test"), strict=True):
        p = calibration.in_prompt(embedding)
        likely = [vocabulary[j] for j in np.argsort(-p) if p[j] > LIKELY]
        texts.append(", ".join([text, *(word for word in likely if word not in words(text))]))
    return texts


def nearest_prompt(run: RunName, pairs: SeedPairs) -> list[str]:
    """The training prompt nearest to each embedding that a run predicts."""
    predicted, targets = (tensor(x) for x in (pairs.member(run).predicted("test"), pairs.train_targets))
    prompts = pairs.train_prompts
    return [prompts[i] for i in nearest_rows(predicted, targets)[0]]


def central_prompt(pairs: SeedPairs) -> list[str]:
    """For each pair the training prompt with the highest mean cosine with all training prompts."""
    targets = pairs.train_targets
    return [pairs.train_prompts[(targets @ targets.mean(axis=0)).argmax()]] * len(pairs.prompts)


def random_prompt(pairs: SeedPairs) -> list[str]:
    """A random training prompt for each pair."""
    chosen = np.random.default_rng(pairs.seed).choice(pairs.train_prompts, len(pairs.prompts))
    return chosen.tolist()


def decoded_by(run: RunName | None, pairs: SeedPairs) -> list[str]:
    """The decoder's texts of the embeddings that a run predicts, or of the true ones."""
    test = pairs.prepared.splits["test"]
    embeddings = pairs.prepared.targets[test] if run is None else pairs.member(run).predicted("test")
    return decoded(trained_decoder(pairs), embeddings)


def trained_decoder(pairs: SeedPairs) -> Captioner:
    """The decoder of a seed, trained here if its folder holds none: on the training prompts and, with the
    miniature, on sentences of the little world that are no prompt of the data."""
    plan, texts = pairs.plan, pairs.train_prompts
    config = DecoderConfig(plan.sources["blip"], seed=pairs.seed)
    if is_mini(plan):
        drawn = (scenes.candidate(SENTENCES_SEED, index).prompt for index in range(SENTENCES))
        texts += sorted(set(drawn) - set(pairs.prepared.pairs.prompts))
    else:
        config = DecoderConfig(plan.sources["blip"], pretrained=True, epochs=3, lr=1e-4, seed=pairs.seed)
    folder = plan.folder / f"decoder-seed{pairs.seed}"
    trainer = DecoderTrainer(config, folder, texts, prompt_targets(texts, plan.device), plan.device)
    trainer.fit()
    return trainer.model


@dataclass(frozen=True)
class Row:
    """A row: `texts` of test pairs; the paper's RefCLIPScore, if it has the row."""

    name: str
    texts: Callable[[SeedPairs], list[str]]
    paper: float | None = None


def rows_of(plan: Plan) -> list[Row]:
    """The rows of table 3, which table 4 has too."""
    before = {f"{c.title}, not fine-tuned": (kind, plan.sources[kind]) for kind, c in CAPTIONERS.items()}
    if is_mini(plan):
        before["BLIP that saw no prompts, not fine-tuned"] = "blip", "blip-plain-mini"
    return [
        Row("random training prompt", random_prompt),
        Row("most central training prompt", central_prompt),
        *(Row(name, partial(before_training, *source)) for name, source in before.items()),
        *(Row(name, partial(written_by, run), PAPER[name]) for name, run in RUNS.items()),
        Row(f"{BEST}, likely words", partial(with_likely_words, RUNS[BEST], SWIN)),
        *(Row(f"nearest prompt, {name}", partial(nearest_prompt, run)) for name, run in READERS.items()),
        *(Row(f"decoder, {name}", partial(decoded_by, run)) for name, run in READERS.items()),
        Row("decoder, true embedding", partial(decoded_by, None)),
        Row(TRUE, lambda pairs: pairs.prompts),
    ]


# ============================================================================================================
# Scores and comparisons
# ============================================================================================================


class Scores:
    """Scores of texts for pairs, by the CLIP in `source`."""

    def __init__(self, pairs: data.Pairs, source: str, device: str):
        self.scorer, prompts = clipscore.Scorer(source, device), list(pairs.prompts)
        starts = range(0, len(pairs), clipscore.BATCH)
        batches = (range(start, min(start + clipscore.BATCH, len(pairs))) for start in starts)
        parts = [self.scorer.images([pairs.image(i) for i in batch]) for batch in batches]
        self.images, self.references = np.concatenate(parts), self.scorer.texts(prompts)[:, None]
        self.prompts, self.minilm = prompts, weights.load("minilm", device=device)
        self.targets = self.minilm.encode(prompts).cpu().numpy()

    def of(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """By name: METRICS, "exact", whether a text is the prompt, and "words", their number, (n,)."""
        captions = self.scorer.texts(texts)
        embeddings = self.minilm.encode(list(texts)).cpu().numpy()
        values = (
            100 * clipscore.ref_clip_score(self.images, captions, self.references, weight=1.0),
            clipscore.ref_clip_score(self.images, captions, self.references),
            clipscore.clip_score(self.images, captions),
            100 * clipscore.cosines(self.images, captions),
            cosines(embeddings, self.targets),
        )
        same = [text == prompt for text, prompt in zip(texts, self.prompts, strict=True)]
        further = {"exact": np.array(same, float), "words": np.array([len(text.split()) for text in texts])}
        return dict(zip(METRICS, values, strict=True)) | further


By = dict[str, dict[str, list[np.ndarray]]]  # by row and metric: of each seed (n,)
# (row, row to compare it with): the paper's claims, if the paper has both, and others
COMPARISONS = (
    ("BLIP + MLC", "BLIP"),
    ("BLIP + MLC + CL", "BLIP + MLC"),
    ("BLIP + MLC + CL", "BLIP"),
    ("BLIP-2 + MLC", "BLIP-2"),
    (BEST, "BLIP-2 + MLC"),
    (BEST, "BLIP-2"),
    ("BLIP-2", "BLIP"),
    (BEST, "BLIP + MLC + CL"),
    ("BLIP", "BLIP, not fine-tuned"),
    ("BLIP-2", "BLIP-2, not fine-tuned"),
    (f"{BEST}, likely words", BEST),
    ("nearest prompt, Swin", BEST),
    ("decoder, Swin", "nearest prompt, Swin"),
    ("decoder, Swin", BEST),
)


def comparisons(
    values: By, groups: Sequence[Sequence[str]], pairs: Sequence[tuple[str, str]], metrics: Sequence[str],
    paper: dict[tuple[str, str], float],
) -> list[dict]:  # fmt: skip
    """A paired test for each metric and pair of rows; `groups`: the prompts of each seed; `paper`: by row and
    metric."""
    tests = []
    for metric in metrics:
        for ours, other in pairs:
            theirs = [paper.get((name, metric)) for name in (ours, other)]
            test = {"metric": metric, "row": ours, "against": other}
            test["paper"] = None if None in theirs else theirs[0] - theirs[1]
            arrays = values[ours][metric], values[other][metric], [np.array(group) for group in groups]
            tests.append(test | paired_by_group(*arrays))
    return tests


def comparisons_text(tests: Sequence[dict], p_of: Callable[[dict], float | None]) -> str:
    """The tests as Markdown; `p_of` a test is adjusted by Holm's method over the paper's claims."""
    adjusted: dict[int, float] = {}
    claims = [test for test in tests if test["paper"] is not None]
    p_values = [p_of(test) for test in claims]
    if None not in p_values:
        adjusted = {id(test): p for test, p in zip(claims, holm(p_values), strict=True)}
    rows = [
        (test["metric"], f"{test['row']} − {test['against']}", *comparison(test), short(test["d_z"], True))
        + (percent(test["won"]), p_text(test["wilcoxon_p"]), p_text(adjusted.get(id(test))))
        + ("" if test["paper"] is None else f"{test['paper']:+.4g}",)
        for test in tests
    ]
    columns = f"{COMPARED.replace('over pairs', 'over prompts')} | d_z | won | p Wilcoxon | p by Holm | paper"
    return markdown(f"score | comparison | {columns}", rows)


STATISTICS = (
    "Over seeds: Student's interval and test of the seeds' means. Over prompts: bootstrap that resamples the "
    "prompts of all seeds. d_z: mean over standard deviation of the differences. Won: share of images, ties "
    "count one half. Wilcoxon: signed-rank test over the images of all seeds; like the bootstrap it does not "
    "cover chance in training."
)
SCALES = (
    "The paper states neither the scale of its RefCLIPScore nor its CLIP, so three scales are given: the "
    "official one (2.5 · cosine), w = 1 times 100, and 100 · the cosine of image and text. Each text follows "
    '"A photo depicts". With the miniature, CLIP is clip-mini, whose text half is also the generator\'s; '
    "otherwise OpenAI's ViT-B/32. The cosines of two CLIPs are not comparable."
)


def clip_of(plan: Plan) -> str:
    """The CLIP of CLIPScore."""
    return "clip-mini" if is_mini(plan) else "clip-b-32"


# ============================================================================================================
# Table 3
# ============================================================================================================


def compute_table_3(plan: Plan) -> dict:
    """The scores of each row over all test pairs, and the comparisons of rows."""
    values: By = {}
    groups, rows = [], rows_of(plan)
    for seed in plan.seeds:
        pairs = pairs_of(plan, seed, TABLE_3_RUNS)
        scores = Scores(pairs.images, clip_of(plan), plan.device)
        groups.append(pairs.prompts)
        for row in rows:
            for metric, found in scores.of(row.texts(pairs)).items():
                values.setdefault(row.name, {}).setdefault(metric, []).append(found)
    paper = {(name, PAPERS_SCALE): value for name, value in PAPER.items()}
    curves = {
        name: [validation_curve(plan.run_folder(run, seed)) for seed in plan.seeds]
        for name, run in RUNS.items()
    }
    return {
        "clip": clip_of(plan),
        "n_test": [len(group) for group in groups],
        "trainings": len(TABLE_3_RUNS) * len(plan.seeds),
        "decoders": len(plan.seeds),
        "rows": [{"name": row.name, "paper": row.paper} | means_of(values[row.name]) for row in rows],
        "tests": comparisons(values, groups, COMPARISONS, TESTED, paper),
        "trained": {
            name: {
                "steps": by_seed[0][0],
                "likelihood": [max(curve) for _, curve in by_seed],
                "last_quarter": [last_quarter(curve) for _, curve in by_seed],
            }
            for name, by_seed in curves.items()
        },
    }


def means_of(by_metric: dict[str, list[np.ndarray]]) -> dict:
    """The mean of each seed, by metric."""
    return {metric: [float(of.mean()) for of in by_seed] for metric, by_seed in by_metric.items()}


def table_3_text(result: dict) -> str:
    """Table 3 as Markdown."""

    def cell(row: dict, metric: str) -> str:
        limits = student_interval(row[metric]) if metric in TESTED else None
        return f"{short(float(np.mean(row[metric])))}{f' ({interval(limits)})' if limits else ''}"

    rows = [
        (row["name"], *(cell(row, metric) for metric in METRICS), percent(float(np.mean(row["exact"]))))
        + (f"{np.mean(row['words']):.1f}", "" if row["paper"] is None else f"{row['paper']:.2f}")
        for row in result["rows"]
    ]
    notes = (
        SCALES,
        STATISTICS + " Holm: adjusts p over seeds for the paper's claims.",
        "Captioners that are not fine-tuned are the pretrained ones. blip-mini was pretrained on drawings "
        "and prompts of this grammar, blip-plain-mini and the Q-Former of blip2-mini on plain descriptions "
        "of the drawings; the language model of blip2-mini has read prompts.",
        "Likely words: those that the caption lacks and that are in the prompt with a probability above "
        f"{LIKELY:g}, by {SWIN.name}, calibrated (training/calibration.py). Nearest prompt: among the "
        "training prompts, by the embedding that the run predicts. Decoder: BLIP's text decoder on a "
        "projected embedding, trained on the training prompts and, with the miniature, on some "
        f"{SENTENCES:,} sentences of the same grammar; one training for each seed, of prompts alone. With "
        "the true embedding it tests whether the embedding suffices to write the prompt.",
        "The paper's p-threshold is not legible in the copy we used. Its numbers are of DiffusionDB.",
    )
    trained = [
        (name, of["steps"], f"{short(float(np.mean(of['likelihood'])))} "
         f"({interval(student_interval(of['likelihood']))})", one_by_one(of["last_quarter"]))
        for name, of in result["trained"].items()
    ]  # fmt: skip
    counts = ", ".join(f"{n:,}" for n in result["n_test"])
    return page(
        "Table 3: texts for the test images",
        f"{provenance_text(result)} Test pairs by seed: {counts}. CLIP: {result['clip']}. "
        f"{result['trainings']} trainings and {result['decoders']} of decoders.",
        markdown(f"text | {' | '.join(METRICS)} | exact | words | paper", rows),
        comparisons_text(result["tests"], lambda test: seeds_p(test["per_seed"])),
        "The trainings: mean token likelihood of the validation pairs' prompts; of CL the second phase.",
        markdown("fine-tuned | steps | token likelihood | its gain in the last quarter, by seed", trained),
        bullets(notes),
    )


# ============================================================================================================
# Figure 4
# ============================================================================================================

FIGURE_4_RUNS = (RUNS["BLIP"], RUNS["BLIP + MLC + CL"])


def compute_figure_4(plan: Plan) -> dict:
    """Texts of plain and enhanced BLIP for test images of the first seed, evenly spread over the data."""
    pairs = pairs_of(plan, plan.seeds[0], (SWIN, *FIGURE_4_RUNS))
    scores = Scores(pairs.images, clip_of(plan), plan.device)
    texts = [written_by(run, pairs) for run in FIGURE_4_RUNS]
    plain, enhanced = (scores.of(each)["cosine"] for each in texts)
    examples, rows = [], []
    for i in spread(range(len(plain)), EXAMPLES):
        example: dict[str, Any] = {"prompt": pairs.prompts[i], "plain": texts[0][i], "enhanced": texts[1][i]}
        examples.append(example | {"cosines": [float(plain[i]), float(enhanced[i])]})
        lines = [
            Line("true prompt", example["prompt"]),
            Line("BLIP", f"{example['plain']}  ({plain[i]:.2f})", "#1b4f8a"),
            Line("+ MLC + CL", f"{example['enhanced']}  ({enhanced[i]:.2f})", "#8a3b1b"),
        ]
        rows.append(([pairs.images.image(i)], lines))
    won = [float(of.mean()) for of in (enhanced > plain, enhanced == plain, enhanced < plain)]
    return {"examples": examples, "won": won, "n": len(plain), "files": {"figure-4.png": sheet(rows)}}


def figure_4_text(result: dict) -> str:
    """Figure 4 as Markdown."""
    rows = [
        (example["prompt"], *(f"{example[key]} ({short(cosine)})" for key, cosine in
                              zip(("plain", "enhanced"), example["cosines"], strict=True)))
        for example in result["examples"]
    ]  # fmt: skip
    better, same, worse = (percent(share) for share in result["won"])
    return page(
        "Figure 4: texts of plain and enhanced BLIP",
        f"{provenance_text(result)} The first seed; images evenly spread over the test pairs, not selected, "
        "in the order of figure-4.png. In brackets the cosine with the prompt's embedding. Over all "
        f"{result['n']:,} test images the enhanced BLIP has the higher cosine for {better}, the same for "
        f"{same}, the lower for {worse}.",
        markdown("true prompt | BLIP | BLIP + MLC + CL", rows),
    )


TABLE_3_RUNS = (*READERS.values(), *RUNS.values())
PROMPTS = {3: Exhibit(TABLE_3_RUNS, compute_table_3, table_3_text)}
PROMPTS_FIGURES = {4: Exhibit((SWIN, *FIGURE_4_RUNS), compute_figure_4, figure_4_text)}
