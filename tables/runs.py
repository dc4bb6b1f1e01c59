"""The runs of tables and figures: names, settings and folders, and parallel training of the missing ones by
processes of train.py."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import data
from backbones import BACKBONES
from training.config import RESUMABLE, TrainConfig, resolve
from training.folder import saved_fields
from training.inputs import prepare

log = logging.getLogger("tables")

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

# Pretrained weights of each backbone and of the captioner: --weights mini, --weights paper.
SOURCES = {
    "mini": {name: b.mini for name, b in BACKBONES.items()} | {"blip": "blip-mini"},
    "paper": {name: b.paper for name, b in BACKBONES.items()} | {"blip": "blip-base"},
}
MODELS = {name: b.title for name, b in BACKBONES.items()}  # in the paper's order
# Fields of TrainConfig by the name of a recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 0},
    "head-1": {"heads": 1},
    "head-2": {"heads": 2},
    "mlc": {"heads": 3},
    "mlc-cl": {"heads": 3, "curriculum": "difficulty"},
    "cl": {"heads": 0, "curriculum": "difficulty"},
    "lerac": {"heads": 0, "curriculum": "lerac"},
    "cbs": {"heads": 0, "curriculum": "cbs"},
    "captions-empty": {"heads": 3, "captions": "empty"},
    "captions-prompt": {"heads": 3, "captions": "prompt"},
}
PHASE_1 = {"mlc-cl": "mlc", "cl": "plain"}  # the recipe whose recorded cosines a curriculum uses

# Options that apply only to runs of one curriculum or backbone.
OPTIONS_OF = {
    "difficulty": ("chunks", "easy_share", "hard_share", "epoch_weights"),
    "lerac": ("lerac_epochs", "lerac_min_lr"),
    "cbs": ("cbs_every",),
    "unet": ("captions", "image_size"),
}
# The paper's number (section 4.2), for the miniatures too: with their default of six, the 36 trainings of
# table 1 would take more than an hour on two cores.
EPOCHS = 3
SET_BY_ROWS = {"backbone", "heads", "curriculum", "record_cosines", "phase_1", "seed"}


@dataclass(frozen=True)
class RunName:
    """A backbone trained by a recipe of RECIPES."""

    backbone: str
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.recipe}"

    def folder(self, seed: int) -> str:
        return f"{self.name}-seed{seed}"

    @property
    def phase_1(self) -> RunName | None:
        """The run whose recorded cosines this one's curriculum uses."""
        return RunName(self.backbone, PHASE_1[self.recipe]) if self.recipe in PHASE_1 else None


# The runs that record their cosines, as phase 1 of another run.
RECORDING = {RunName(backbone, "mlc") for backbone in MODELS} | {RunName("vit", "plain")}


@dataclass(frozen=True)
class Plan:
    """The settings of one call of eval.py. `options`: fields of TrainConfig for every run that they apply to;
    `drawbench`: the file of DrawBench's prompts, or None for those of mini/drawbench.py."""

    data: str
    sources: dict[str, str]
    seeds: tuple[int, ...]
    folder: Path  # of the runs
    jobs: int
    device: str
    options: dict[str, Any]
    command: str = ""
    drawbench: Path | None = None

    def run_folder(self, run: RunName, seed: int) -> Path:
        return self.folder / run.folder(seed)

    def fields(self, run: RunName, seed: int) -> dict[str, Any]:
        """The fields of TrainConfig that define a run."""
        recipe = RECIPES[run.recipe]
        owners = (run.backbone, recipe.get("curriculum"))
        foreign = {name for owner, names in OPTIONS_OF.items() if owner not in owners for name in names}
        fields = {name: value for name, value in self.options.items() if name not in foreign}
        fields |= {"backbone": run.backbone, "data": self.data, "weights": self.sources[run.backbone]}
        if run.backbone == "unet":
            fields.setdefault("captions", self.sources["blip"])
        fields |= {"seed": seed, "device": self.device} | recipe
        if run in RECORDING:
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
        return (folder / "result.json").exists()


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


def result_text(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    return f"{folder.name}: test cosine {result['test_cosine']:.4f}, {result['seconds']:.0f} s"


def last_line(path: Path) -> str:
    """The last error in a training's output, else its last line."""
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")


def start(plan: Plan, run: RunName, seed: int, output: Path) -> subprocess.Popen:
    """train.py for a new or stopped run; it appends its output to a file."""
    folder = plan.run_folder(run, seed)
    if (folder / "config.json").exists():
        flags = ["--resume", str(folder), "--device", plan.device]
    else:
        flags = ["--out", str(folder), *flags_of(plan.fields(run, seed))]
    threads = str(max(1, cores() // plan.jobs))
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "30"} | os.environ,
            start_new_session=True,  # only `stop` ends it on Ctrl-C, and once
        )


def train_one(
    plan: Plan, run: RunName, seed: int, phase_1: Future | None, running: dict[Path, subprocess.Popen]
) -> str | None:
    """The reason if training failed. Trains a run after its phase 1 and lists its process in `running`."""
    if phase_1 and phase_1.result():
        return f"needs {run.phase_1.folder(seed)}"
    folder = plan.run_folder(run, seed)
    output = plan.folder / f"{folder.name}.log"
    running[folder] = process = start(plan, run, seed, output)
    process.wait()
    running.pop(folder, None)
    if process.returncode or not (folder / "result.json").exists():
        return f"{last_line(output)} (full output: {output})"
    return None


def stop(pool: ThreadPoolExecutor, futures: Iterable[Future], running: dict[Path, subprocess.Popen]) -> None:
    """Cancel waiting trainings, end running ones after their step, and wait for them."""
    pool.shutdown(wait=False, cancel_futures=True)
    while any(future.running() for future in futures):
        for folder in list(running):
            if process := running.pop(folder, None):
                process.terminate()
        time.sleep(0.1)


def train_missing(plan: Plan, runs: Iterable[RunName]) -> set[tuple[RunName, int]]:
    """The runs that failed. Trains each run with each seed unless it is finished, `plan.jobs` at once.

    If a run fails, the others continue. Ctrl-C stops all, each after its step; a later call resumes them.
    """
    wanted = [(run, seed) for seed in plan.seeds for run in with_phase_1(runs)]
    # Runs that need another's phase 1 come last, so that no thread waits for a run that has not started.
    missing = sorted((job for job in wanted if not plan.finished(*job)), key=lambda job: bool(job[0].phase_1))
    if not missing:
        return set()
    plan.folder.mkdir(parents=True, exist_ok=True)
    configs = [plan.config(run, seed) for run, seed in missing]
    for config in {(config.backbone, config.captions): config for config in configs}.values():
        prepare(config, plan.device)  # fills the caches once
    counts = f"{len(missing)} of {len(wanted)} are missing"
    log.info("trainings: %s; %d at once, logs in %s", counts, plan.jobs, plan.folder)
    futures: dict[tuple[RunName, int], Future] = {}
    running: dict[Path, subprocess.Popen] = {}
    failed, interval = set(), 2 if sys.stderr.isatty() else 60
    with ThreadPoolExecutor(plan.jobs) as pool, tqdm(total=len(missing), desc="trainings") as bar:
        try:
            for run, seed in missing:
                phase_1 = futures.get((run.phase_1, seed))
                futures[run, seed] = pool.submit(train_one, plan, run, seed, phase_1, running)
            jobs = {future: job for job, future in futures.items()}
            pending = set(jobs)
            while pending:
                done, pending = wait(pending, interval, FIRST_COMPLETED)
                for future in done:
                    folder = plan.run_folder(*jobs[future])
                    if reason := future.result():
                        failed.add(jobs[future])
                        bar.write(f"failed: {folder.name}: {reason}", sys.stderr)
                    else:
                        bar.write(result_text(folder), sys.stderr)
                bar.update(len(done))
                bar.set_postfix_str(", ".join(map(step_text, list(running))))
        finally:
            stop(pool, futures.values(), running)
    return failed


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
