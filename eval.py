"""Evaluate trained runs on their test pairs, or make the paper's tables and figures by their number.

    python eval.py RUN [RUN ...]                                   one's own runs
    python eval.py --table 1                                       a table, on the embedded default
    python eval.py --table all --seeds 0,1,2 --jobs 2              every table; shared runs are trained once
    python eval.py --table 8 --data DIFFUSIONDB --weights paper    the real experiment (a GPU is wanted)
    python eval.py --figure 9                                      easy, medium and hard pairs

For each RUN: the mean cosine between predicted and true prompt embeddings with a 95 % bootstrap interval,
beside the baseline that predicts the mean training embedding for every image. Writes RUN/result.json,
RUN/predictions/*.npy (the unit-length predicted embeddings of each split and their targets, in the order of
RUN/predictions/rows.json) and RUN/examples.png.

--table (1 heads and curriculum, 2 heads, 5 and 6 the trained U-Net put back to draw, 7 curricula, 8 ensemble
and DAKL, 9 parts of the ensemble, 10 DAKL, 11 other models; noise, section 4.7; and, beyond the paper,
captions, what the U-Net reads, and ceiling, what the embedded pictures give away) and --figure (9 difficulty,
11 the ensemble) train what is missing, a run for each row and seed, and go on where a former call was
stopped. They write results/table-N.md and .json, ours beside the paper's. All other flags are train.py's and
hold for every run, as --epochs (here 3).

What a table runs and how its numbers come about is in tables/; here are one run's evaluation and the command
line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shlex
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import data
import weights
from tables.compute import compute_table, table_text, write_result
from tables.figures import FIGURES, compute_figure_9, compute_figure_11, figure_9_text, figure_11_text
from tables.generation import DRAWN, RUN, read_drawbench
from tables.probe import default_views
from tables.rows import TABLES
from tables.runs import DECIDED, EPOCHS, SOURCES, Plan, cores, train_missing, with_phase_1
from training.config import EMBEDDED, parse_args
from training.evaluate import evaluate
from training.folder import saved_config
from training.inputs import prepare

log = logging.getLogger("eval")

NUMBERS = sorted([*TABLES, *DRAWN], key=lambda n: (isinstance(n, str), n))


# ============================================================================================================
# Command line
# ============================================================================================================


def asked_for(given: str, known: Iterable[int | str], what: str) -> list[int | str]:
    """ "1,2" or "all" as keys of TABLES or FIGURES, in their order."""
    by_name = {str(key): key for key in known}
    parts = list(by_name) if given == "all" else given.split(",")
    if unknown := [part for part in parts if part not in by_name]:
        raise data.DataError(
            f"--{what} {unknown[0] or given}: no such {what} here; there are {', '.join(by_name)} and all"
        )
    return [key for name, key in by_name.items() if name in parts]


def runs_of(number: int | str) -> list[str]:
    """The runs that a table is made of."""
    return [RUN] if number in DRAWN else [run for row in TABLES[number].rows for run in row.runs]


def seeds_of(given: str) -> tuple[int, ...]:
    parts = given.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise data.DataError(
            f"--seeds {given}: must be different whole numbers with commas between, as 0,1,2"
        )
    return tuple(map(int, parts))


def sources_of(given: str) -> dict[str, str]:
    """ "paper", "mini" or "paper,clip=clip-l-14" as the source of each backbone."""
    sources = dict(SOURCES["mini"])
    for part in given.split(","):
        backbone, _, source = part.partition("=")
        if part in SOURCES:
            sources |= SOURCES[part]
        elif backbone in sources and source:
            sources[backbone] = source
        else:
            raise data.DataError(
                f"--weights {part}: must be {' or '.join(SOURCES)}, and then BACKBONE=SOURCE for "
                f"{', '.join(sources)} that differ, with commas between"
            )
    return sources


def probe_knows(name: str) -> bool:
    """Whether all prompts of --data are the embedded default's."""
    return name in EMBEDDED or set(data.read_pairs(Path(name)).prompts) <= default_views().keys()


def train_fields(flags: list[str]) -> dict[str, Any]:
    """train.py's flags as fields. Raises DataError for one that it does not know or that the rows decide."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            fields, out, resume = parse_args(flags, "")
        except SystemExit as stop:
            line = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise data.DataError(f"{line}; see eval.py --help and train.py --help") from stop
    decided = sorted(DECIDED & fields.keys()) + ["out"] * bool(out) + ["resume"] * bool(resume)
    if decided:
        name = decided[0].replace("_", "-")
        raise data.DataError(f"--{name}: each row decides it; see --seeds and --runs in eval.py --help")
    return fields


def make(args: argparse.Namespace, flags: list[str], command: str) -> int:
    """The tables and figures asked for. Returns the exit status."""
    seeds, sources = seeds_of(args.seeds), sources_of(args.weights)
    tables = asked_for(args.table, NUMBERS, "table") if args.table else []
    needs_probe = [n for n in (5, "ceiling") if n in tables]
    if needs_probe and not (sources["unet"] == "sd-mini" and probe_knows(args.data)):
        if args.table != "all":
            raise data.DataError(
                f"--table {needs_probe[0]}: its judge, the probe, knows the embedded mini scenes alone; "
                "leave --data and --weights out"
            )
        tables = [n for n in tables if n not in needs_probe]
    sheets = asked_for(args.figure, FIGURES, "figure") if args.figure else []
    given = {"epochs": EPOCHS} | train_fields(flags)
    device = weights.resolve_device(args.device)
    jobs = args.jobs or (2 if device == "cpu" and cores() > 1 else 1)
    name = Path(args.data).resolve().name
    kind = "" if args.weights == "mini" else "-" + args.weights.replace("/", "_")
    plan = Plan(
        args.data, sources, seeds, args.folder or Path("runs") / f"tables-{name}{kind}", jobs, device, given
    )
    results = args.results or Path("results") / (name if args.data != "mini" else "")
    # What would stop it after the trainings is better known before them.
    there = next(path for path in (results.absolute(), *results.absolute().parents) if path.exists())
    if not there.is_dir():
        raise data.DataError(f"--results {results}: {there} is a file; give a folder")
    if args.drawbench:
        read_drawbench(args.drawbench)
    runs = {("table", n): runs_of(n) for n in tables}
    runs |= {("figure", n): FIGURES[n] for n in sheets}
    failed = train_missing(plan, [run for needed in runs.values() for run in needed])
    for (what, n), needed in runs.items():
        missing = [run for run, _ in failed if run in with_phase_1(needed)]
        if missing:
            log.error("%s %s: not written, %d of its trainings failed", what, n, len(missing))
            continue
        results.mkdir(parents=True, exist_ok=True)
        if what == "table" and n in DRAWN:
            compute, text = DRAWN[n]
            result = compute(plan, command, args.drawbench)
            write_result(results, f"table-{n}", result, text(result))
        elif what == "table":
            result = compute_table(plan, n, command)
            write_result(results, f"table-{n}", result, table_text(result))
        elif n == 9:
            result, sheet = compute_figure_9(plan, command)
            data.atomic_write(results / "figure-9.png", sheet)
            write_result(results, "figure-9", result, figure_9_text(result))
        else:
            result = compute_figure_11(plan, command)
            write_result(results, "figure-11", result, figure_11_text(result))
    if failed:
        raise data.DataError(f"{len(failed)} trainings failed, see above; the same command tries them again")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s RUN [RUN ...] | --table N | --figure N   [flags]",
    )
    numbers = ", ".join(map(str, NUMBERS))
    parser.add_argument("--table", metavar="N", help=f"{numbers}, several as 1,2, or all")
    parser.add_argument("--figure", metavar="N", help=f"{', '.join(map(str, FIGURES))} or all")
    parser.add_argument(
        "--data", default="mini", help="mini, drawn or a folder, as in train.py (default: mini)"
    )
    parser.add_argument(
        "--weights",
        default="mini",
        help="mini, paper (sd-1, vit-b-16, swin-l, clip-h-14), or either with changes, as "
        "paper,clip=clip-l-14 (default: mini)",
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the runs of each row (default: 0,1,2)")
    parser.add_argument(
        "--runs", dest="folder", type=Path, metavar="DIR", help="the runs' folder (default: runs/tables-DATA)"
    )
    parser.add_argument(
        "--jobs", type=int, help="trainings at once (default: 2 on a CPU of several cores, else 1)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="(default: results; of other data results/DATA)"
    )
    parser.add_argument(
        "--drawbench", type=Path, metavar="CSV",
        help="DrawBench's prompts for table 6 (default: those of mini/drawbench.py)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    making = any(flag.split("=")[0] in ("--table", "--figure") for flag in argv)
    if not making:
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that train.py wrote")
    args, flags = parser.parse_known_args(argv)
    if flags and not making:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if making:
            if args.jobs is not None and args.jobs < 1:
                raise data.DataError(f"--jobs {args.jobs}: must be at least 1")
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return make(args, flags, f"python eval.py {shlex.join(argv)}")
        device = weights.resolve_device(args.device)
        for folder in args.runs:
            config = saved_config(folder)
            evaluate(folder, prepare(config, device), device)
    except (data.DataError, weights.WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; all that was trained is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
