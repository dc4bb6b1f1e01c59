"""The runs that tables and figures are made of: what a run's name tells train.py, where its folder is, and
training those that are missing, several at once, each by a process of train.py. Which runs a table needs is
said in rows.py."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import data
from reverse_sd import BACKBONES
from training.config import RESUMABLE, TrainConfig, resolve
from training.folder import saved_fields
from training.inputs import prepare

try:
    import fcntl
except ImportError:  # Windows: two calls at once in the same folder are not told apart
    fcntl = None

log = logging.getLogger("tables")

TRAIN = Path(__file__).resolve().parent.parent / "train.py"

# What each backbone starts from: --weights mini, --weights paper.
SOURCES = {
    "mini": {name: b.mini for name, b in BACKBONES.items()} | {"blip": "blip-mini"},
    "paper": {name: b.paper for name, b in BACKBONES.items()} | {"blip": "blip-base"},
}
# A run is named BACKBONE-RECIPE, and its folder BACKBONE-RECIPE-seedN. A recipe is what a row tells train.py.
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
PHASE_1 = {"mlc-cl": "mlc", "cl": "plain"}  # phase 1 of the curriculum is a row of its own
MODELS = {name: b.title for name, b in BACKBONES.items()}  # in the paper's order

# Flags that mean something to some runs alone; the others are trained without them.
PART_OF = {
    "difficulty": ("chunks", "easy_share", "hard_share", "epoch_weights"),
    "lerac": ("lerac_epochs", "lerac_min_lr"),
    "cbs": ("cbs_every",),
    "unet": ("captions", "image_size"),
}
# The paper's number (section 4.2), on the miniatures too: six, train.py's default for them, would take table
# 1, of 36 trainings, beyond an hour on two cores.
EPOCHS = 3
DECIDED = {"backbone", "heads", "curriculum", "record_cosines", "phase_1", "seed"}  # by the rows
RECORDING = {f"{backbone}-mlc" for backbone in MODELS} | {"vit-plain"}  # phase 1 of another run


@dataclass(frozen=True)
class Plan:
    """Where and how a call's runs are trained. `given`: further fields of TrainConfig, for every run."""

    data: str
    sources: dict[str, str]
    seeds: tuple[int, ...]
    folder: Path
    jobs: int
    device: str
    given: dict[str, Any]

    def run_folder(self, run: str, seed: int) -> Path:
        return self.folder / f"{run}-seed{seed}"

    def fields(self, run: str, seed: int) -> dict[str, Any]:
        """What train.py is told for a run."""
        backbone, recipe = run.split("-", 1)
        curriculum = RECIPES[recipe].get("curriculum")
        elsewhere = {
            name for part, names in PART_OF.items() if part not in (backbone, curriculum) for name in names
        }
        fields = {name: value for name, value in self.given.items() if name not in elsewhere}
        fields |= {"backbone": backbone, "data": self.data, "weights": self.sources[backbone], "seed": seed}
        if backbone == "unet":
            fields.setdefault("captions", self.sources["blip"])
        fields |= {"device": self.device} | RECIPES[recipe]
        if run in RECORDING:
            fields["record_cosines"] = True
        if recipe in PHASE_1:
            fields["phase_1"] = str(self.run_folder(f"{backbone}-{PHASE_1[recipe]}", seed))
        return fields

    def config(self, run: str, seed: int) -> TrainConfig:
        """The configuration that train.py makes of it, but for the run that phase 1 is taken from."""
        fields = self.fields(run, seed)
        fields.pop("phase_1", None)
        return resolve(TrainConfig(**fields))

    def finished(self, run: str, seed: int) -> bool:
        """Whether the run is there and evaluated. Raises DataError where its folder holds another run."""
        folder = self.run_folder(run, seed)
        if not (folder / "config.json").exists():
            return False
        saved, asked = saved_fields(folder), vars(self.config(run, seed))
        free = RESUMABLE | {"phase_1"}
        for name, value in asked.items():
            there = saved.get(name)
            same = there == value or (name == "data" and Path(there).resolve() == Path(value).resolve())
            if name not in free and not same:
                raise data.DataError(
                    f"{folder}: was trained with {name} {there}, and {value} is asked for; give another "
                    "--runs folder, or the flags of the first call"
                )
        return (folder / "result.json").exists()


def with_phase_1(runs: Iterable[str]) -> list[str]:
    """`runs`, each after the run that its phase 1 is taken from, each once."""
    ordered: dict[str, None] = {}
    for run in runs:
        backbone, recipe = run.split("-", 1)
        ordered |= dict.fromkeys([f"{backbone}-{PHASE_1[recipe]}"] if recipe in PHASE_1 else []) | {run: None}
    return list(ordered)


def flags_of(fields: dict[str, Any]) -> list[str]:
    """Fields of TrainConfig as flags of train.py."""
    flags = []
    for name, value in fields.items():
        name = name.replace("_", "-")
        flags += (
            [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        )
    return flags


def start(plan: Plan, run: str, seed: int, threads: int) -> subprocess.Popen | None:
    """train.py for a run, new or resumed, writing to the run's log; None where another call trains it now.

    The log stays locked as long as the training lives, even if this process is killed.
    """
    folder = plan.run_folder(run, seed)
    with (plan.folder / f"{folder.name}.log").open("ab") as output:
        try:
            if fcntl:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if (folder / "config.json").exists():
            flags = ["--resume", str(folder), "--device", plan.device]
        else:
            flags = ["--out", str(folder), *flags_of(plan.fields(run, seed))]
        # Its own session: Ctrl-C comes here, and from here once to each training.
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"} | os.environ,
            start_new_session=True,
        )


def progress(folder: Path) -> str:
    """How far a run is, by the last line of its log."""
    try:
        with (folder / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            return f"{folder.name} step {json.loads(file.read().splitlines()[-1])['step']}"
    except (OSError, ValueError, IndexError):  # nothing there yet, or a line half written
        return f"{folder.name} starts"


def last_line(path: Path) -> str:
    """What a training that failed said last."""
    lines = [line.strip() for line in path.read_text(errors="replace").replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line]
    said = [line for line in lines if line.startswith("error:")]
    return (said or lines or ["nothing"])[-1].removeprefix("error: ")


def train_missing(plan: Plan, runs: Iterable[str]) -> set[tuple[str, int]]:
    """Train each run with each seed that is not there yet, `plan.jobs` at once; returns those that failed.

    A run that fails is reported, the others go on. Ctrl-C stops all, each after its step.
    """
    wanted = [(run, seed) for seed in plan.seeds for run in with_phase_1(runs)]
    waiting = [job for job in wanted if not plan.finished(*job)]
    if not waiting:
        return set()
    plan.folder.mkdir(parents=True, exist_ok=True)
    configs = [plan.config(run, seed) for run, seed in waiting]
    for config in {(config.backbone, config.captions): config for config in configs}.values():
        prepare(config, plan.device)  # fills the caches once
    threads = max(1, cores() // plan.jobs)
    log.info(
        "trainings: %d of %d are missing; %d at once, logs in %s",
        *(len(waiting), len(wanted), plan.jobs, plan.folder),
    )
    failed: set[tuple[str, int]] = set()
    running: dict[tuple[str, int], subprocess.Popen] = {}
    elsewhere: set[tuple[str, int]] = set()
    shown, interval = time.monotonic(), 2 if sys.stderr.isatty() else 60
    with tqdm(total=len(waiting), desc="trainings", unit="run", mininterval=interval) as bar:
        try:
            while waiting or running:
                for job in list(waiting):
                    run, seed = job
                    folder = plan.run_folder(run, seed)
                    before = [(other, seed) for other in with_phase_1([run])[:-1]]
                    if (folder / "result.json").exists():  # by another call
                        waiting.remove(job)
                        bar.update()
                    elif failed.intersection(before):
                        failed.add(job)
                        waiting.remove(job)
                        bar.update()
                        bar.write(f"failed: {folder.name}: needs {before[0][0]}-seed{seed}", sys.stderr)
                    elif len(running) < plan.jobs and all(plan.finished(*other) for other in before):
                        process = start(plan, run, seed, threads)
                        if process:
                            running[job] = process
                            waiting.remove(job)
                        elif job not in elsewhere:
                            elsewhere.add(job)
                            bar.write(f"{folder.name}: another call is training it; waiting", sys.stderr)
                time.sleep(0.2)
                for job, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[job]
                    folder = plan.run_folder(*job)
                    bar.update()
                    if process.returncode or not (folder / "result.json").exists():
                        failed.add(job)
                        said = plan.folder / f"{folder.name}.log"
                        bar.write(
                            f"failed: {folder.name}: {last_line(said)} (all it said: {said})", sys.stderr
                        )
                        continue
                    result = json.loads((folder / "result.json").read_text())
                    bar.write(
                        f"{folder.name}: test cosine {result['test_cosine']:.4f}, {result['seconds']:.0f} s",
                        sys.stderr,
                    )
                if time.monotonic() - shown > interval:
                    bar.set_postfix_str(", ".join(progress(plan.run_folder(*job)) for job in running))
                    shown = time.monotonic()
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
