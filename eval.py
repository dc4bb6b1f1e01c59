"""Evaluate trained runs on their test pairs, or make the paper's tables and figures by their number.

    python eval.py RUN [RUN ...]                                   your own runs
    python eval.py --table 1                                       a table, on the embedded default
    python eval.py --table all --seeds 0,1,2 --jobs 2              every table; shared runs are trained once
    python eval.py --table 8 --data DIFFUSIONDB --weights paper    the full experiment (needs a GPU)
    python eval.py --figure 9                                      easy, medium and hard pairs
    python eval.py --vote                                          a page on which people vote for table 5
    python eval.py --table 5 --votes A.json B.json C.json          table 5 of their votes

For each RUN: the mean cosine between predicted and true prompt embeddings with a 95 % bootstrap interval,
beside the baseline that predicts the mean training embedding for every image. Writes RUN/result.json,
RUN/predictions/*.npy (the unit-length predicted embeddings of each split and their targets, in the order of
RUN/predictions/rows.json), RUN/calibration.json and .npy, and RUN/examples.png.

--table (1 heads and curriculum, 2 heads, 3 captioners, 4 images drawn again from predicted prompts, 5 and 6
pictures by the trained U-Net, 7 curricula, 8 ensemble and DAKL, 9 combinations of the ensemble's members, 10
DAKL, 11 other models; noise, section 4.7; and, beyond the paper, those of tables/__init__.py, e.g. sweep, the
recipes, readouts, ridge regression on frozen features, and crossed, two generators and their pictures) and
--figure (4 and 10 texts of captioners, 9 easy, medium and hard pairs, 11 the ensemble)
train the missing runs, one per row and seed, and resume stopped ones. They write results/table-N.md and
.json, with the paper's numbers beside ours. All other flags are train.py's and apply to every run, e.g.
--epochs.

Table 5 without votes holds the choices of a probe of mini scenes, in place of the paper's three people.
--vote writes results/vote.html, one file with 100 pairs of pictures by the original and the trained U-Net
of the first seed, sides at random, and results/vote-key.json, the sides. Give each voter the page alone. It
works without network, also on phones, by buttons or arrow keys (left, right, down for undecided, up to go
back), and saves the votes as a JSON file. --votes reads these files and the key, and needs no runs.

tables/ defines the tables and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import weights
from backbones import BACKBONES
from command import Parser, positive, run_command, text
from tables.exhibit import Exhibit
from tables.generation import RUN, read_drawbench
from tables.probe import only_default_prompts
from tables.registry import EXHIBITS
from tables.runs import SET_BY_ROWS, SOURCES, Plan, RunName, cores, train_missing, with_phase_1
from tables.votes import KEY, voted, write_page
from training.config import parse_args
from training.evaluate import evaluate
from training.folder import mention_other_origin, saved_config
from training.inputs import prepare
from training.loop import process_group
from weights.registry import ENTRIES

log = logging.getLogger("eval")


# The needs of exhibits: whether a plan meets them, and the error if it does not.
NEEDS: dict[str, tuple[Callable[[Plan], bool], str]] = {
    "drawn": (
        lambda plan: plan.data == "drawn",
        "only drawn scenes record the words that a picture leaves out; add --data drawn",
    ),
    "second": (
        lambda plan: plan.second is not None,
        "needs the folder of a second generator; give --second FOLDER",
    ),
    "probe": (
        lambda plan: plan.sources["unet"] == "sd-mini" and only_default_prompts(plan.data),
        "the probe can judge only the embedded mini scenes; remove --data and --weights, or give people's "
        "votes for table 5 (--vote, --votes)",
    ),
}


def selected(flag: str, kind: str) -> dict[tuple[str, int | str], Exhibit]:
    """The exhibits of a flag, e.g. "1,2" or "all", by kind and number."""
    by_name = {str(number): number for number in EXHIBITS[kind]}
    names = list(by_name) if flag == "all" else flag.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise data.DataError(f"--{kind} {unknown[0] or flag}: unknown; choose from {', '.join(by_name)}, all")
    return {(kind, number): EXHIBITS[kind][number] for name, number in by_name.items() if name in names}


def seeds_of(flag: str) -> tuple[int, ...]:
    seeds = flag.split(",")
    good = all(seed.isdecimal() and len(seed) < 20 for seed in seeds)
    if not good or len(set(map(int, seeds))) < len(seeds):
        raise data.DataError(f"--seeds {flag}: must be distinct integers separated by commas, e.g. 0,1,2")
    return tuple(map(int, seeds))


def sources_of(flag: str) -> dict[str, str]:
    """The weights of each backbone from "paper", "mini" or "paper,clip=clip-l-14"."""
    sources = dict(SOURCES["mini"])
    for part in flag.split(","):
        backbone, _, source = part.partition("=")
        if part in SOURCES:
            sources |= SOURCES[part]
        elif backbone in sources and source:
            require_source(BACKBONES[backbone].kind if backbone in BACKBONES else backbone, source)
            sources[backbone] = source
        else:
            raise data.DataError(
                f"--weights {part}: must be {' or '.join(SOURCES)}, or BACKBONE=SOURCE for "
                f"{', '.join(sources)}, with commas between"
            )
    return sources


def require_source(kind: str, source: str) -> None:
    """Raise WeightsError unless the source holds that kind of weights; published ones are not fetched."""
    entry = ENTRIES.get(source)
    if not entry or kind not in entry.kinds:
        weights.config(kind, source)


def train_fields(flags: list[str]) -> dict[str, Any]:
    """train.py's flags as fields. Raises DataError for unknown flags and for those that the rows set."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            fields, out, resume = parse_args(flags, "")
        except SystemExit as stop:
            line = stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            raise data.DataError(f"{line}; see eval.py --help and train.py --help") from stop
    if set_by_rows := sorted(SET_BY_ROWS & fields.keys()) + ["out"] * bool(out) + ["resume"] * bool(resume):
        name = set_by_rows[0].replace("_", "-")
        raise data.DataError(f"--{name}: is set by each row; see --seeds and --runs")
    return fields


def plan_of(args: argparse.Namespace, flags: list[str], command: str) -> Plan:
    seeds, sources, options = seeds_of(args.seeds), sources_of(args.weights), train_fields(flags)
    seeds = seeds[:1] if args.vote else seeds
    name = Path(args.data).resolve().name
    kind = "" if args.weights == "mini" else "-" + args.weights.replace("/", "_")
    folder = args.runs or Path("runs") / f"tables-{name}{kind}"
    device = weights.resolve_device(args.device)
    jobs = args.jobs or (2 if device == "cpu" and cores() > 1 else 1)
    paths = args.drawbench, args.second
    return Plan(args.data, sources, seeds, folder, jobs, device, options, command, *paths)


def results_of(args: argparse.Namespace) -> Path:
    """The folder of results. Raises DataError if it cannot be made."""
    name = "" if args.data == "mini" else Path(args.data).resolve().name
    results = args.results or Path("results") / name
    parent = next(path for path in (results.absolute(), *results.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise data.DataError(f"--results {results}: {parent} is a file; give a folder")
    return results


def exhibits_of(args: argparse.Namespace, plan: Plan, results: Path) -> dict[tuple[str, int | str], Exhibit]:
    """The tables and figures to make; "all" skips tables that the data do not allow."""
    exhibits = selected(args.table, "table") if args.table is not None else {}
    exhibits |= selected(args.figure, "figure") if args.figure is not None else {}
    if args.votes:
        if ("table", 5) not in exhibits:
            raise data.DataError("--votes: needs --table 5")
        exhibits["table", 5] = voted(args.votes, results / KEY)
    lacking = {key: e.needs for key, e in exhibits.items() if e.needs and not NEEDS[e.needs][0](plan)}
    if lacking and args.table != "all":
        (_, name), needs = next(iter(lacking.items()))
        raise data.DataError(f"--table {name}: {NEEDS[needs][1]}")
    return {key: exhibit for key, exhibit in exhibits.items() if key not in lacking}


def make(args: argparse.Namespace, flags: list[str], command: str) -> None:
    """Train the missing runs of the tables and figures, and write these."""
    # Errors that would come after the trainings are reported before them.
    plan, results = plan_of(args, flags, command), results_of(args)
    exhibits = exhibits_of(args, plan, results)
    if plan.drawbench:
        read_drawbench(plan.drawbench)
    for exhibit in exhibits.values():
        if exhibit.before:
            exhibit.before(plan)
    failed = train_missing(plan, [run for exhibit in exhibits.values() for run in exhibit.runs])
    for (kind, number), exhibit in exhibits.items():
        if missing := [run for run, _ in failed if run in with_phase_1(exhibit.runs)]:
            log.error("%s %s: not written: %d trainings failed", kind, number, len(missing))
        else:
            exhibit.write(plan, results, kind, number)
    require_trained(failed)


def require_trained(failed: set[tuple[RunName, int]]) -> None:
    if failed:
        raise data.DataError(f"{len(failed)} trainings failed, see above; repeat the command to retry")


def make_page(args: argparse.Namespace, flags: list[str], command: str) -> None:
    """Train the run of the page for voters if it is missing, and write the page."""
    if args.table is not None or args.figure is not None or args.votes:
        raise data.DataError("--vote: give it without --table, --figure and --votes")
    plan, results = plan_of(args, flags, command), results_of(args)
    require_trained(train_missing(plan, [RUN]))
    write_page(plan, results)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s RUN [RUN ...] | --table N | --figure N | --vote   [flags]",
    )
    for kind, exhibits in EXHIBITS.items():
        numbers = ", ".join(map(str, exhibits))
        parser.add_argument(f"--{kind}", metavar="N", help=f"{numbers}, several (1,2), or all")
    parser.add_argument("--vote", action="store_true", help="write the page on which people vote for table 5")
    parser.add_argument(
        "--votes", type=Path, nargs="+", metavar="FILE", help="the files that the page saved, for --table 5"
    )
    parser.add_argument(
        "--data", type=text, default="mini", help="mini, drawn or a folder, as in train.py (default: mini)"
    )
    parser.add_argument(
        "--weights",
        default="mini",
        help="mini, paper (sd-1, vit-b-16, swin-l, clip-h-14), or either with changes, e.g. "
        "paper,clip=clip-l-14 (default: mini)",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of each row (default: 0,1,2)")
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="the runs' folder (default: runs/tables-DATA)"
    )
    parser.add_argument(
        "--jobs", type=positive, help="parallel trainings (default: 2 on a multi-core CPU, otherwise 1)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="(default: results; for other data results/DATA)"
    )
    parser.add_argument(
        "--drawbench",
        type=Path,
        metavar="CSV",
        help="DrawBench's prompts for table 6 (default: those of mini/drawbench.py)",
    )
    parser.add_argument(
        "--second",
        type=Path,
        metavar="FOLDER",
        help="a second generator and its pictures for table crossed, FOLDER/sd-mini and FOLDER/generated, as "
        "mini/pretrain.py describes",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    making = any(flag.split("=")[0] in ("--table", "--figure", "--vote", "--votes") for flag in argv)
    if not making:
        parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    args, flags = parser.parse_known_args(argv)
    if flags and not making:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    changed -= {"run", "device"}
    if changed and not making:
        parser.error(f"--{min(changed)}: only --table, --figure and --vote use it; leave it out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def evaluate_runs() -> None:
        device = weights.resolve_device(args.device)
        with process_group(device) as process:
            for folder in args.run:
                prepared = prepare(saved_config(folder), process.device)
                if process.first:
                    mention_other_origin(folder, prepared)
                evaluate(folder, prepared, process)

    def make_exhibits() -> None:
        (make_page if args.vote else make)(args, flags, f"python eval.py {shlex.join(argv)}")

    return run_command(make_exhibits if making else evaluate_runs, "stopped; repeat the command to resume")


if __name__ == "__main__":
    sys.exit(main())
