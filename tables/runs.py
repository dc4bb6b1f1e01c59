"""The runs of tables and figures: names, settings and folders, and parallel training of the missing ones by
processes of train.py."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import data
from backbones import BACKBONES, CAPTIONERS, READERS
from schema import number, read_json
from training.config import RESUMABLE, TrainConfig, resolve, without_effect
from training.folder import saved_fields
from training.inputs import prepare

log = logging.getLogger("tables")

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

# Pretrained weights of each backbone and captioner: --weights mini, --weights paper.
SOURCES = {
    "mini": {name: b.mini for name, b in READERS.items()},
    "paper": {name: b.paper for name, b in READERS.items()},
}
MODELS = {name: b.title for name, b in BACKBONES.items()}  # in the paper's order
# Fields of TrainConfig by the name of a recipe. {second}: the folder of eval.py --second; {runs}: that of
# the runs.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 0},
    "head-1": {"heads": 1},
    "head-2": {"heads": 2},
    "mlc": {"heads": 3},
    "mlc-drawn": {"heads": 3, "data": "drawn"},
    "captions-empty-drawn": {"heads": 3, "captions": "empty", "data": "drawn"},
    "mlc-cl": {"heads": 3, "curriculum": "difficulty"},
    "cl": {"heads": 0, "curriculum": "difficulty"},
    "lerac": {"heads": 0, "curriculum": "lerac"},
    "cbs": {"heads": 0, "curriculum": "cbs"},
    "captions-empty": {"heads": 3, "captions": "empty"},
    "captions-prompt": {"heads": 3, "captions": "prompt"},
    "captions-plain": {"heads": 3, "captions": "blip-plain-mini"},
    "second": {"heads": 3, "captions": "empty", "weights": "{second}/sd-mini"},
    "mlc-on-second": {"heads": 3, "data": "{second}/generated"},
    "captions-empty-on-second": {"heads": 3, "captions": "empty", "data": "{second}/generated"},
    "second-on-second": {
        "heads": 3, "captions": "empty", "weights": "{second}/sd-mini", "data": "{second}/generated",
    },
    "mlc-paraphrases": {"heads": 3, "target_texts": "{runs}/paraphrases.jsonl"},
    "mlc-same-subject": {"heads": 3, "target_texts": "{runs}/same-subject.jsonl"},
}  # fmt: skip
# Chosen on validation: results/table-sweep.json.
TUNED: dict[str, dict[str, Any]] = {
    "cl": {"chunks": "thresholds", "easy_share": 0.8, "hard_share": 0.1},
    "lerac": {"head_lr": 5e-05, "lerac_epochs": 0.08, "lerac_min_lr": 1e-08},
    "cbs": {"cbs_every": 0.02},
}
RECIPES |= {f"{recipe}-tuned": RECIPES[recipe] | values for recipe, values in TUNED.items()}
# The recipe whose recorded cosines a curriculum uses.
PHASE_1 = {"mlc-cl": "mlc", "cl": "plain", "cl-tuned": "plain"}

Changes = tuple[tuple[str, Any], ...]  # (field of TrainConfig, value)
SET_BY_ROWS = {"backbone", "heads", "curriculum", "record_cosines", "phase_1", "seed", "plan", "memory"}


@dataclass(frozen=True)
class RunName:
    """A backbone trained by a recipe of RECIPES with `changes`."""

    backbone: str
    recipe: str
    changes: Changes = ()

    @property
    def name(self) -> str:
        return "-".join([self.backbone, self.recipe, *(f"{field}={value}" for field, value in self.changes)])

    def folder(self, seed: int) -> str:
        return f"{self.name}-seed{seed}"

    @property
    def phase_1(self) -> RunName | None:
        """The run whose recorded cosines this one's curriculum uses."""
        if self.recipe not in PHASE_1:
            return None
        first = PHASE_1[self.recipe]
        foreign = without_effect({"backbone": self.backbone} | RECIPES[first] | dict(self.changes))
        kept = tuple(change for change in self.changes if change[0] not in foreign)
        return RunName(self.backbone, first, kept)


# The runs that record their cosines, as phase 1 of another run.
RECORDING = {RunName(backbone, "mlc") for backbone in READERS} | {RunName("vit", "plain")}


@dataclass(frozen=True)
class Plan:
    """The settings of one call of eval.py. `options`: fields of TrainConfig for every run that they apply to;
    `drawbench`: the file of DrawBench's prompts, or None for those of mini/drawbench.py; `second`: the folder
    of a second generator (mini/pretrain.py)."""

    data: str
    sources: dict[str, str]
    seeds: tuple[int, ...]
    folder: Path  # of the runs
    jobs: int
    device: str
    options: dict[str, Any]
    command: str = ""
    drawbench: Path | None = None
    second: Path | None = None

    def run_folder(self, run: RunName, seed: int) -> Path:
        return self.folder / run.folder(seed)

    def fields(self, run: RunName, seed: int) -> dict[str, Any]:
        """The fields of TrainConfig that define a run."""
        recipe = dict(RECIPES[run.recipe])
        for name in recipe.keys() & {"data", "weights", "target_texts"}:
            recipe[name] = recipe[name].format(second=self.second, runs=self.folder)
        if run.backbone in CAPTIONERS:
            recipe["heads"] = min(recipe["heads"], 1)  # a captioner's vocabulary head is that of placement 1
        fixed = {"backbone": run.backbone, "data": self.data, "weights": self.sources[run.backbone]}
        fixed |= {"seed": seed, "device": self.device} | recipe | dict(run.changes)
        foreign = without_effect(self.options | fixed)
        fields = {name: value for name, value in self.options.items() if name not in foreign}
        if run.backbone == "unet":
            fields.setdefault("captions", self.sources["blip"])
        fields |= fixed
        if RunName(run.backbone, run.recipe) in RECORDING:
            fields["record_cosines"] = True
        if run.phase_1:
            fields["phase_1"] = str(self.run_folder(run.phase_1, seed))
        return fields

    def config(self, run: RunName, seed: int) -> TrainConfig:
        """The resolved configuration of a run, without the path of its phase 1."""
        fields = self.fields(run, seed)
        fields.pop("phase_1", None)
        return resolve(TrainConfig(**fields))

    def finished(self, run: RunName, seed: int) -> bool:
        """Whether the run exists and is evaluated. Raises DataError if its folder holds a different run."""
        folder = self.run_folder(run, seed)
        if not (folder / "config.json").exists():
            return False
        saved = vars(TrainConfig(**saved_fields(folder)))
        for name, value in vars(self.config(run, seed)).items():
            old = saved[name]
            same = old == value or (name == "data" and Path(old).resolve() == Path(value).resolve())
            if name not in RESUMABLE | {"phase_1"} and not same:
                raise data.DataError(
                    f"{folder}: was trained with {name} {old}, not {value}; give another --runs folder or "
                    "the flags of the first call"
                )
        if not (folder / "result.json").exists():
            return False
        result = result_of(folder)  # an evaluation of a stopped run is none of the run
        return result["step"] == result["steps"]


def validation_curve(folder: Path) -> tuple[int, list[float]]:
    """(the steps of a run, the mean score on validation after each epoch: a regressor's cosine, a captioner's
    likelihood)."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = [entry.get("val_cosine", entry.get("val_likelihood")) for entry in entries]
    return entries[-1]["step"], [score for score in scores if score is not None]


def last_quarter(curve: Sequence[float]) -> float:
    """The gain of a curve in the last quarter of its epochs, and at least in the last one."""
    return curve[-1] - curve[min(math.ceil(len(curve) * 3 / 4), len(curve) - 1) - 1]


def with_phase_1(runs: Iterable[RunName]) -> list[RunName]:
    """`runs` without repetitions, each after its phase 1."""
    return list(dict.fromkeys(each for run in runs for each in (run.phase_1, run) if each))


def flags_of(fields: dict[str, Any]) -> list[str]:
    """Fields of TrainConfig as flags of train.py."""
    flags = []
    for field, value in fields.items():
        name = field.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def step_text(folder: Path) -> str:
    """The run's name and the last step in its log."""
    try:
        with (folder / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            return f"{folder.name} step {json.loads(file.read().splitlines()[-1])['step']}"
    except (OSError, ValueError, IndexError):  # no step yet, or a line half written
        return f"{folder.name} starts"


def result_of(folder: Path) -> dict:
    """A run's result.json; older ones have no steps. Raises DataError if it is damaged."""
    steps = number(int, 0).or_else(0)
    fields = {"test_cosine": number(), "seconds": number(), "step": steps, "steps": steps}
    return read_json(folder / "result.json", fields)


def result_text(folder: Path) -> str:
    result = result_of(folder)
    return f"{folder.name}: test cosine {result['test_cosine']:.4f}, {result['seconds']:.0f} s"


def output_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def failure_of(folder: Path, status: int) -> str | None:
    """The last error, else the last line, in the output of a training that failed; None for any other."""
    if status == 0 and (folder / "result.json").exists():
        return None
    lines = output_of(folder).read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or ["no output"])[-1].removeprefix("error: ")
    return f"{last} (full output: {output_of(folder)})"


def start(plan: Plan, run: RunName, seed: int) -> subprocess.Popen:
    """train.py for a new or stopped run; it appends its output to a file."""
    folder = plan.run_folder(run, seed)
    if (folder / "config.json").exists():
        flags = ["--resume", str(folder), "--device", plan.device]
    else:
        flags = ["--out", str(folder), *flags_of(plan.fields(run, seed))]
    threads = str(max(1, cores() // plan.jobs))
    with output_of(folder).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "30"} | os.environ,
            start_new_session=True,  # Ctrl-C reaches it once, from `train_missing`
        )


def train_missing(plan: Plan, runs: Iterable[RunName]) -> set[tuple[RunName, int]]:
    """The runs that failed. Trains each run with each seed unless it is finished, `plan.jobs` at once.

    If a run fails, the others continue. Ctrl-C stops all, each after its step; a later call resumes them.
    """
    wanted = [(run, seed) for seed in plan.seeds for run in with_phase_1(runs)]
    waiting = [job for job in wanted if not plan.finished(*job)]
    if not waiting:
        return set()
    plan.folder.mkdir(parents=True, exist_ok=True)
    configs = [plan.config(run, seed) for run, seed in waiting]
    by_cache = {(c.backbone, c.captions, c.weights, c.data, c.target_texts): c for c in configs}
    for config in by_cache.values():
        prepare(config, plan.device)  # fills the caches once
    counts = f"{len(waiting)} of {len(wanted)} are missing"
    log.info("trainings: %s; %d at once, logs in %s", counts, plan.jobs, plan.folder)
    failed: set[tuple[RunName, int]] = set()
    running: dict[tuple[RunName, int], subprocess.Popen] = {}
    interval = 2 if sys.stderr.isatty() else 60
    with tqdm(total=len(waiting), desc="trainings", mininterval=interval, miniters=0) as bar:

        def end(job: tuple[RunName, int], failure: str | None) -> None:
            folder = plan.run_folder(*job)
            bar.write(f"failed: {folder.name}: {failure}" if failure else result_text(folder), sys.stderr)
            bar.update()
            if failure:
                failed.add(job)

        try:
            while waiting or running:
                for run, seed in waiting[:]:
                    first = (run.phase_1, seed)
                    if first in failed:
                        end((run, seed), f"needs {run.phase_1.folder(seed)}")
                    elif len(running) < plan.jobs and first not in waiting and first not in running:
                        running[run, seed] = start(plan, run, seed)
                    else:
                        continue
                    waiting.remove((run, seed))
                for job, process in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        end(job, failure_of(plan.run_folder(*job), process.returncode))
                bar.set_postfix_str(", ".join(step_text(plan.run_folder(*job)) for job in running), False)
                bar.update(0)
                if running:
                    time.sleep(0.2)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
