"""A run's folder: creation, configuration, cosines of phase 1."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

import data
import weights
from backbones import READERS
from files import read_array, write_array, write_json
from reverse_sd import Vocabulary
from schema import TEXT, number, read_json
from training.config import NO_COSINES, TrainConfig, read_run
from training.inputs import Prepared

log = logging.getLogger("train")

# The names in a run's folder beside config.json, in no order
WRITTEN = ("vocabulary.json", "model.safetensors", "last", "log.jsonl", "result.json", "predictions",
           "calibration.json", "calibration.npy", "examples.png", "captions.jsonl", "blip", "phase-1",
           "cosines.npy", "easiness.npy", "curriculum.json")  # fmt: skip


def new_folder(config: TrainConfig, out: Path | None) -> Path:
    """The folder of a new run, created here: --out, or the first free runs/BACKBONE-DATA[-CURRICULUM]-seedN.

    `mkdir` without `exist_ok` separates two runs that start at once. Raises data.DataError if --out holds a
    run already, or files of the names that a run writes, or is not a folder, and if it cannot be created.
    """
    kind = "" if config.curriculum == "none" else f"-{config.curriculum}"
    name = f"{config.backbone}-{Path(config.data).resolve().name}{kind}-seed{config.seed}"
    folder = out or Path("runs") / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                if out:
                    break
                folder = folder.with_name(f"{name}-{number}")
    except OSError as error:
        raise data.DataError(
            f"{folder}: cannot be created ({error.strerror or error}); give another --out"
        ) from error
    if not folder.is_dir():
        raise data.DataError(f"{folder}: is a file; give a folder")
    if (folder / "config.json").exists():
        raise data.DataError(
            f"{folder}: holds a run already; continue it with --resume {folder}, or give another --out"
        )
    if there := [name for name in WRITTEN if (folder / name).exists()]:
        raise data.DataError(
            f"{folder}: holds {', '.join(there)}, which a run would overwrite; give another --out"
        )
    return folder


def saved_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`. Raises data.DataError if the folder is not a run."""
    return TrainConfig(**saved_fields(folder))


def saved_fields(folder: Path) -> dict[str, Any]:
    """The fields of TrainConfig in a run's config.json, older names included."""
    saved = read_run(folder)
    return {f.name: saved[f.name] for f in dataclasses.fields(TrainConfig)}


def write_run(folder: Path, config: TrainConfig, prepared: Prepared, vocabulary: Vocabulary) -> None:
    """Write a new run's description into its folder, config.json last."""
    write_json(folder / "vocabulary.json", vocabulary.words)
    derived = {
        "model": weights.config(READERS[config.backbone].kind, config.weights),
        "preprocessing": prepared.preprocessing,
    }
    content = dataclasses.asdict(config) | {k: dataclasses.asdict(value) for k, value in derived.items()}
    content |= {"vocabulary": vocabulary.fingerprint, "origin": prepared.origin}
    write_json(folder / "config.json", content)


def mention_other_origin(folder: Path, prepared: Prepared) -> None:
    """Warn if other models or captions made the inputs than those of the run's training."""
    then = read_run(folder)["origin"] or prepared.origin
    if changed := sorted(name for name, key in prepared.origin.items() if then.get(name) != key):
        log.warning(
            "%s: its inputs are made by other files than those of its training (%s); give back the files, or "
            "train a new run", folder, ", ".join(changed)
        )  # fmt: skip


def save_cosines(folder: Path, cosines: np.ndarray, easiness: np.ndarray, **about: Any) -> None:
    """Write easiness.npy (n,), curriculum.json and, to mark the set as complete, cosines.npy (epochs, n)."""
    write_array(folder / "easiness.npy", easiness)
    write_json(folder / "curriculum.json", {"epochs": len(cosines)} | about)
    write_array(folder / "cosines.npy", cosines)


def read_cosines(folder: Path, prepared: Prepared) -> np.ndarray:
    """The cosines (epochs, n) that a run recorded of these training samples."""
    names = ("curriculum.json", "difficulty.json")  # today's, older runs'
    try:
        about = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
        recorded = read_json(about, {"data": TEXT, "epochs": number(int, 1)})
        cosines = read_array(folder / "cosines.npy", np.float32, (recorded["epochs"], None))
    except (OSError, ValueError) as error:
        raise data.DataError(f"{folder}: {NO_COSINES} ({error})") from error
    if not np.isfinite(cosines).all():
        raise data.DataError(f"{folder}/cosines.npy: is not finite; {NO_COSINES}")
    if recorded["data"] != prepared.fingerprint or cosines.shape[1:] != prepared.splits["train"].shape:
        raise data.DataError(
            f"{folder}: recorded its cosines on other pairs or another split (--data, --clean, --seed, "
            "--val-size, --test-size); give a run on these"
        )
    return cosines
