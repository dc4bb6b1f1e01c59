"""The recipe of each backbone and of each curriculum, chosen on validation.

One axis after another: all values of an axis are trained with the best values of the axes before it. Give a
seed that no table uses: `python eval.py --table sweep --seeds 100`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import data
from schema import TEXT, read_value, record
from tables.exhibit import Exhibit, bullets, markdown, page, provenance_text, short
from tables.runs import MODELS, Plan, RunName, last_quarter, train_missing, validation_curve

Changes = dict[str, Any]
FLAT = 0.002  # a longer training is chosen only for this gain, and one is flat below it in its last quarter


def grid(**values: Sequence[Any]) -> tuple[Changes, ...]:
    """All combinations of the values of some fields."""
    return tuple(dict(zip(values, each, strict=True)) for each in product(*values.values()))


@dataclass(frozen=True)
class Sweep:
    """A run and the values to try, axis by axis. `start`: the values before the first axis; `after`: the
    sweep whose chosen values come before them."""

    run: RunName
    axes: tuple[tuple[Changes, ...], ...]
    start: Changes
    after: str | None = None


def sweeps() -> dict[str, Sweep]:
    start = {"layer_decay": 1.0, "epochs": 4}
    axes = (
        grid(lr=(3e-4, 1e-3, 2e-3), head_lr=(5e-5, 2e-4)),
        grid(layer_decay=(0.7, 1.0)),
        grid(epochs=(4, 6)),
    )
    backbones = {title: Sweep(RunName(backbone, "mlc"), axes, start) for backbone, title in MODELS.items()}
    thirds, thresholds = {"chunks": "thirds"}, {"chunks": "thresholds"}
    shares = tuple(thresholds | each for each in grid(easy_share=(0.5, 0.8), hard_share=(0.1,)))
    curricula = {
        "cl": ((thirds, *shares),),
        "lerac": (grid(lerac_min_lr=(1e-8, 1e-5), lerac_epochs=(0.08, 1.0)),),
        "cbs": (grid(cbs_every=(0.02, 0.2)),),
    }
    for recipe, values in curricula.items():
        start = {"layer_decay": 1.0} if recipe == "lerac" else {}
        backbones[f"ViT, {recipe}"] = Sweep(RunName("vit", recipe), values, start, MODELS["vit"])
    return backbones


def named(sweep: Sweep, best: Changes) -> RunName:
    return replace(sweep.run, changes=tuple(sorted(best.items())))


def outcome(plan: Plan, run: RunName) -> dict:
    """Validation cosines of a run, best and by epoch, averaged over the seeds; its steps and device."""
    curves = []
    for seed in plan.seeds:
        folder = plan.run_folder(run, seed)
        device = read_value(folder / "config.json", record({"device": TEXT}))["device"]
        steps, curve = validation_curve(folder)
        curves.append(curve)
    by_epoch = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    found = {"val": sum(map(max, curves)) / len(curves), "val_by_epoch": by_epoch, "steps": steps}
    return found | {"last_quarter": last_quarter(by_epoch), "device": device}


def compute(plan: Plan) -> dict:
    """Train and compare the values of each axis; each sweep's chosen values."""
    todo, best, rows = sweeps(), {}, []
    while waiting := {name: sweep for name, sweep in todo.items() if sweep.after in (None, *best)}:
        todo = {name: sweep for name, sweep in todo.items() if name not in waiting}
        chosen = {name: best.get(sweep.after, {}) | sweep.start for name, sweep in waiting.items()}
        for k in range(max(len(sweep.axes) for sweep in waiting.values())):
            axis = {name: sweep.axes[k] for name, sweep in waiting.items() if k < len(sweep.axes)}
            tried = [
                (name, values, named(waiting[name], chosen[name] | values))
                for name, all_values in axis.items()
                for values in all_values
            ]
            if failed := train_missing(plan, [run for *_, run in tried]):
                raise data.DataError(
                    f"{len(failed)} trainings failed; see above; repeat the command to retry"
                )
            for name in axis:
                of = [(values, outcome(plan, run)) for other, values, run in tried if other == name]
                chosen[name] |= (values := best_of(of))
                rows += [{"sweep": name, "values": v, "chosen": v is values} | result for v, result in of]
        best |= chosen
    return {"rows": rows, "chosen": best}


def best_of(tried: Sequence[tuple[Changes, dict]]) -> Changes:
    """The values with the highest validation cosine; of several lengths the first that no longer one beats by
    FLAT."""
    best = max(result["val"] for _, result in tried)
    if "epochs" in tried[0][0]:
        return next(values for values, result in tried if result["val"] > best - FLAT)
    return next(values for values, result in tried if result["val"] == best)


def text(result: dict) -> str:
    rows = [
        (row["sweep"], values_text(row["values"]), row["steps"], row["val"], short(row["last_quarter"], True))
        + (row["device"], "chosen" if row["chosen"] else "")
        for row in result["rows"]
    ]
    chosen = [f"{name}: {values_text(values)}." for name, values in result["chosen"].items()]
    notes = (
        "Axis by axis: each value is trained with the values chosen above it. Backbones: head 3 of figure 3, "
        "heads started at ridge regression. Curricula: ViT without vocabulary head, with its chosen values.",
        f"The highest cosine on validation is chosen; of several lengths the shortest within {FLAT:g} of it. "
        "Test pairs play no part.",
    )
    columns = "sweep | values | steps | validation cosine | gain in the last quarter | device | "
    return page(
        "Recipes chosen on validation",
        provenance_text(result),
        markdown(columns, rows),
        bullets((*chosen, *notes)),
    )


def values_text(values: Changes) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


SWEEP = {"sweep": Exhibit((), compute, text)}
