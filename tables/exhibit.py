"""Shared parts of tables and figures: provenance, Markdown, writing."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from files import atomic_write
from tables.runs import Plan, RunName
from training.metrics import seeds_p, student_interval

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Exhibit:
    """A table or figure. `runs`: its trainings. `compute`: its numbers for JSON, and under "files" the bytes
    of further files by name. `text`: the numbers and their provenance as Markdown.
    `needs`: the data that allow it, a key of eval.NEEDS. `before`: makes the checks and files that the
    trainings need."""

    runs: tuple[RunName, ...]
    compute: Callable[[Plan], dict]
    text: Callable[[dict], str]
    needs: str = ""
    before: Callable[[Plan], None] | None = None

    def write(self, plan: Plan, folder: Path, kind: str, number: int | str) -> None:
        """Compute it and write KIND-NUMBER.json, KIND-NUMBER.md and its further files into `folder`."""
        result = provenance(plan) | {kind: number} | self.compute(plan)
        path, text = folder / f"{kind}-{number}", self.text(result)
        files = result.pop("files", {})
        files |= {f"{path.name}.json": json.dumps(result, indent=1) + "\n", f"{path.name}.md": text}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            atomic_write(folder / name, content)
        print(text)
        print(f"written: {path}.md and .json")


def provenance(plan: Plan) -> dict:
    """Provenance fields of every results file."""
    return {
        "command": plan.command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": processor(plan.device),
        "data": Path(plan.data).resolve().name,
        "weights": plan.sources,
        "seeds": list(plan.seeds),
    }


def provenance_text(result: dict) -> str:
    """`provenance` as two sentences. Files of older versions lack commit, numpy and processor."""
    made = [f"`{result['command']}`", result["date"]]
    if commit := result.get("commit"):
        made.append(f"commit {commit[:10]}")
    made += [f"{name} {result[name]}" for name in ("torch", "numpy") if name in result]
    if "processor" in result:
        made.append(result["processor"])
    seeds = f"seed{'s' * (len(result['seeds']) > 1)} {', '.join(map(str, result['seeds']))}"
    return f"{', '.join(made)}. Data: {result['data']}; {seeds}."


def commit() -> str | None:
    """The commit of this checkout; None outside one."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None


def processor(device: str) -> str:
    """The name of the GPU or CPU that computes."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def markdown(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `header` names the columns: "a | b | c". `short` formats floats."""
    lines = [f"| {header} |", "|---" * len(header.split(" | ")) + "|"]
    for row in rows:
        cells = (short(cell) if cell is None or isinstance(cell, float) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bullets(notes: Iterable[str]) -> str:
    return "\n".join(f"* {note}" for note in notes)


def short(value: float | None, sign: bool = False) -> str:
    """.6544, as the paper writes cosines; +.0012 for differences."""
    if value is None:
        return ""
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def interval(limits: Sequence[float] | None, sign: bool = False) -> str:
    return f"{short(limits[0], sign)} to {short(limits[1], sign)}" if limits else ""


def one_by_one(differences: Iterable[float | None]) -> str:
    return ", ".join(short(difference, True) for difference in differences)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def percents(limits: Sequence[float] | None) -> str:
    return " to ".join(map(percent, limits or ()))


COMPARED = "difference | 95 % interval over seeds | p over seeds | seed by seed | 95 % interval over pairs"


def comparison(test: dict) -> tuple[str, ...]:
    """The columns of COMPARED, of a paired test."""
    by_seed = test["per_seed"]
    return (
        short(test["difference"], True),
        interval(student_interval(by_seed), True),
        p_text(seeds_p(by_seed)),
        one_by_one(by_seed),
        interval(test["difference_95"], True),
    )


def p_text(p: float | None) -> str:
    return "< .0001" if p is not None and p < 1e-4 else short(p)
